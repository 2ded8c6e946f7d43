"""What every kernel of the registry may not let through: NaN beside its inputs, a bad token into other tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenfab.kernels.formats import get_format
from tokenfab.kernels.kv_cache import KvCache, MlaCache, slots_of, write_mla_ref, write_ref
from tokenfab.kernels.moe_work import draw_ids, local_experts
from tokenfab.kernels.registry import KERNELS, Kernel, find_kernels
from tokenfab.tests.reliability.walk import (
    Buffers,
    Case,
    as_bytes,
    as_nan,
    cache_of,
    case_of,
    copies,
    each_kernel,
    plain,
    same,
)
from torch.overrides import TorchFunctionMode

# NumPy, behind the interpreter, tells of each NaN that it computes with
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN, INF = float("nan"), float("inf")

each_cached = pytest.mark.parametrize(
    "kernel", [*find_kernels("attention"), *find_kernels("mla")], ids=lambda k: k.name
)


class NanMemory(TorchFunctionMode):
    """Memory that comes unwritten from torch holds NaN, as another kernel's leftovers may."""

    NEW = (torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.empty_strided)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self.NEW and made.numel():
            self.count += 1
            as_bytes(made).fill_(0xFF)
        return made


@each_kernel
def test_r03_nan_in_memory_that_a_wrapper_allocates(kernel: Kernel, device: torch.device) -> None:
    """Workspaces, partial results, schedules."""
    case = case_of(kernel, device)
    with NanMemory() as memory:
        fresh = replace(case, run=kernel.load())  # whose workspaces are its own
        output = fresh.launch()
    assert memory.count  # the output at least
    assert same(plain(case), output)


def _write(cache: KvCache | MlaCache, value: float, slots: torch.Tensor, case: Case) -> None:
    """K and V, or latents, of one value."""
    rows, device = slots.numel(), cache.pages.device
    if isinstance(cache, KvCache):
        k = torch.full((rows, cache.num_kv_heads, case.shape["head_dim"]), value, dtype=torch.bfloat16, device=device)
        write_ref(cache, k, k, slots)
    else:
        latent, rope = (
            torch.full((rows, case.shape[name]), value, dtype=torch.bfloat16, device=device)
            for name in ("kv_lora_rank", "rope_dim")
        )
        write_mla_ref(cache, latent, rope, slots)


@each_cached
def test_r03_nan_in_the_tail_of_a_cache_and_in_unused_pages(kernel: Kernel, device: torch.device) -> None:
    case = case_of(kernel, device)
    length, size = case.shape["length"], case.shape["page_size"]
    assert length % size
    pages = torch.cat((case.weights["pages"], as_nan(case.weights["pages"][:3])))
    cache = cache_of(case, pages)
    table = case.weights["page_table"]
    for row in table:
        slots = slots_of(row, table.shape[1] * size, size)
        _write(cache, NAN, slots[length:], case)
    assert not torch.equal(pages[:-3], case.weights["pages"])
    assert same(plain(case), case.launch(case.weights | {"pages": pages}))
    _write(cache, NAN, slots_of(table[0], length, size)[-1:], case)  # and the last token is not beside it
    assert not same(plain(case), case.launch(case.weights | {"pages": pages}))


@pytest.mark.parametrize("kernel", find_kernels("moe"), ids=lambda kernel: kernel.name)
def test_r03_nan_in_experts_that_no_token_chose(kernel: Kernel, device: torch.device) -> None:
    case = case_of(kernel, device)
    chosen = set(draw_ids(case.shape, 2).flatten().tolist())
    unused = [expert for expert in range(local_experts(case.shape)) if expert not in chosen]
    used = [expert for expert in range(local_experts(case.shape)) if expert in chosen]
    assert unused
    assert used

    def poisoned(expert: int) -> Buffers:
        weights = copies(case.weights)
        for name, part in weights.items():
            if "." in name:  # of the experts, by half
                part[expert] = as_nan(part[expert])
        return weights

    assert same(plain(case), case.launch(poisoned(unused[0])))
    assert not same(plain(case), case.launch(poisoned(used[0])))  # nor is an expert dropped


# -- a bad token -----------------------------------------------------------------------------------

TOKENS = {
    "gemm": "m", "moe": "num_tokens", "rope_append": "num_tokens", "mla_append": "num_tokens",
    "quantize": "rows", "rms_norm_quantize": "rows", "swiglu_quantize": "rows",
}  # fmt: skip
ONE_SCALE = [k for k in KERNELS if k.op.endswith("quantize") and get_format(k.activation).scale_per == "tensor"]
"""Quantizers whose scale is that of the whole tensor, found by the call: every row follows the largest value."""


def num_tokens(case: Case) -> int:
    name = TOKENS.get(case.kernel.op)
    return case.shape[name] if name else case.shape["batch"] * case.shape["q_len"]


def spoil(part: torch.Tensor, values: tuple[float, ...]) -> None:
    """Row 0: the values in turn, one in each 32 numbers; bytes of NaN in codes and in scales that hold no others."""
    row = part[0].view(-1)
    if part.dtype in (torch.bfloat16, torch.float32):
        for index, place in enumerate(range(0, row.numel(), 32)):
            row[place] = values[index % len(values)]
    else:
        part[0] = as_nan(part[0])


@pytest.mark.parametrize("values", [(NAN,), (2.0**120, -INF)], ids=["nan", "outlier and inf"])
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k not in ONE_SCALE], ids=lambda kernel: kernel.name)
def test_r09_a_bad_token_stays_in_its_row(kernel: Kernel, values: tuple[float, ...], device: torch.device) -> None:
    case = case_of(kernel, device)
    rows, activations = num_tokens(case), copies(case.activations)
    spoilt = [
        name for name, part in activations.items()
        if part.dim() > 1 and part.shape[0] == rows and name not in ("logits", "page_table")
    ]  # fmt: skip
    assert spoilt
    for name in spoilt:
        spoil(activations[name], values)
    got, clean = case.launch(activations=activations), plain(case)
    for name, part in got.items():
        if name == "pages":
            others = _bytes_of_other_tokens(case)
            assert others.any()
            assert torch.equal(as_bytes(part)[others], as_bytes(clean[name])[others])
            assert not torch.equal(as_bytes(part), as_bytes(clean[name]))
        else:
            assert part.shape[0] == rows
            assert same({"": part[1:]}, {"": clean[name][1:]}), name
    assert not same(got, clean)
    if "" in got and values == (NAN,):
        assert not got[""][0].isfinite().all()  # it is told, not hidden


def _bytes_of_other_tokens(case: Case) -> torch.Tensor:
    """Which bytes of the pages a launch writes that stores all tokens but the first."""
    slots = case.activations["slots"].clone()
    slots[0] = -1
    one, other = (case.launch(activations=case.activations | {"slots": slots}, prefill=fill) for fill in (0, 0xFF))
    return as_bytes(one["pages"]) == as_bytes(other["pages"])


@pytest.mark.parametrize("kernel", ONE_SCALE, ids=lambda kernel: kernel.name)
def test_r09_a_bad_row_under_one_scale_spoils_the_scale(kernel: Kernel, device: torch.device) -> None:
    """As documented: NaN in one row makes the tensor's scale NaN, so that no row passes for a number."""
    case = case_of(kernel, device)
    activations = copies(case.activations)
    spoil(next(iter(activations.values())), (NAN,))
    assert case.launch(activations=activations)["scale"].isnan().all()


# -- zeros -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.op.endswith("quantize")], ids=lambda kernel: kernel.name)
def test_r08_zero_or_subnormal_block(kernel: Kernel, device: torch.device) -> None:
    """Scales stay finite, zeros stay zero, beside subnormals and alone."""
    case = case_of(kernel, device)

    def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda part: torch.full_like(part, value) if part.is_floating_point() else part

    for value in (0.0, 2.0**-133):  # BF16's smallest subnormal
        activations = {name: filled(value)(part) for name, part in case.activations.items()}
        for part in activations.values():
            part[1] = 0.0
        output = case.launch(activations=activations)
        codes, scale = output["data"], output["scale"]
        is_e8m0 = scale.dtype == torch.uint8
        assert (scale != 255).all() if is_e8m0 else scale.float().isfinite().all()
        zero = 0x77 if codes.dtype == torch.uint8 else 0x7F  # all but signs
        assert (codes[1].view(torch.uint8) & zero == 0).all()
        if value == 0.0:
            assert (codes.view(torch.uint8) & zero == 0).all()
