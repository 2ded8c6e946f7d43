"""Every kernel of the registry at one tiny shape, for tests that hold a promise against all of them.

A kernel is covered by being in ``KERNELS``; a new op needs one row in ``SHAPES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from tokenfab.kernels.kv_cache import KvCache, MlaCache
from tokenfab.kernels.kv_layout import KvLayout, MlaLayout
from tokenfab.kernels.registry import KERNELS, Kernel, Runnable

Buffers = dict[str, torch.Tensor]

_GQA = {"num_kv_heads": 2, "head_dim": 64, "page_size": 16}
_MLA = {"kv_lora_rank": 256, "rope_dim": 32, "page_size": 16}
_TAILS = {"rows": 5, "columns": 160}
SHAPES: Mapping[str, dict[str, int]] = {
    "gemm": {"m": 3, "n": 136, "k": 288},
    # balanced: the two tokens use four experts, of which this rank has three; the fourth of its own is left alone
    "moe": {"num_tokens": 2, "hidden": 160, "inter": 96, "top_k": 2, "num_experts": 8, "ep": 2, "load": 0},
    "attention": {"batch": 2, "length": 37, "num_heads": 4, "window": 0, "q_len": 2} | _GQA,
    "mla": {"batch": 2, "length": 37, "num_heads": 4, "q_len": 2} | _MLA,
    "rope_append": {"num_tokens": 3, "num_heads": 2} | _GQA,
    "mla_append": {"num_tokens": 3, "num_heads": 2} | _MLA,
    "quantize": _TAILS,
    "rms_norm_quantize": _TAILS,
    "swiglu_quantize": _TAILS,
}
"""By op: the smallest with a tail in each direction that the formats leave free."""

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)

PREFILLS = (0xFF, 0x00)
"""Bytes of outputs before a launch: NaN in every format that has one, and zero."""


@dataclass(frozen=True, eq=False)
class Case:
    """A kernel with buffers of one shape. Launches leave the inputs as they are; see ``launch``."""

    kernel: Kernel
    shape: dict[str, int]
    run: Runnable
    weights: Buffers
    activations: Buffers
    device: torch.device

    def launch(
        self, weights: Buffers | None = None, activations: Buffers | None = None, *, prefill: int = PREFILLS[0],
        change: Callable[[Buffers], Buffers] = dict,
    ) -> Buffers:  # fmt: skip
        """The output of one launch by buffer ("" for a lone tensor), prefilled. ``change``: of it, before."""
        output = change(self.outputs(prefill))
        lone = output.get("", None)
        self.run.launch(
            self.weights if weights is None else weights, self.activations if activations is None else activations,
            output if lone is None else lone,
        )  # fmt: skip
        return output

    def outputs(self, prefill: int) -> Buffers:
        made = parts_of(self.run.make_output(self.shape, self.device))
        for part in made.values():
            as_bytes(part).fill_(prefill)
        return made

    @property
    def expected(self) -> Any:
        """Float64, or what else ``reference.error`` takes."""
        return self.run.reference(self.shape, self.weights, self.activations)

    def written(self, output: Buffers) -> Buffers:
        """The bytes that count, by buffer: of appended pages those of the tokens."""
        masks: Mapping[str, torch.Tensor] = getattr(self.expected, "written", {})
        return {
            name: as_bytes(part)[masks[name].view(-1)] if name in masks else as_bytes(part)
            for name, part in output.items()
        }


def parts_of(output: Any) -> Buffers:
    return output if isinstance(output, dict) else {"": output}


def whole(output: Buffers) -> Any:
    """What ``reference.error`` takes."""
    return output.get("", output)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Flat uint8: a view of contiguous memory, else a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def as_nan(like: torch.Tensor) -> torch.Tensor:
    """Bytes of 0xFF in its shape."""
    flat = torch.full((like.numel() * like.element_size(),), 0xFF, dtype=torch.uint8, device=like.device)
    return flat.view(like.dtype).view(like.shape)


def same(one: Buffers, other: Buffers) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(as_bytes(one[name]), as_bytes(other[name])) for name in one)


def copies(buffers: Buffers) -> Buffers:
    return {name: part.clone() for name, part in buffers.items()}


@cache
def _made(kernel: Kernel, device: torch.device, is_exact: bool) -> Case:
    shape, run = SHAPES[kernel.op], kernel.load()
    weights = run.make_weights(shape, 1, device, is_exact=is_exact)
    return Case(kernel, shape, run, weights, run.make_activations(shape, 2, device, is_exact=is_exact), device)


def case_of(kernel: Kernel, device: torch.device, *, is_exact: bool = False) -> Case:
    """The same buffers each time, which no test may write to. Skips what this GPU has no units for."""
    if device.type == "cuda" and 10 * torch.cuda.get_device_capability()[0] < kernel.min_capability // 10 * 10:
        pytest.skip(f"{kernel.name} needs compute capability {kernel.min_capability / 10}")
    return _made(kernel, device, is_exact)


@cache
def _plain(kernel: Kernel, device: torch.device) -> Buffers:
    return case_of(kernel, device).launch()


def plain(case: Case) -> Buffers:
    """The output of an undisturbed launch on ``case_of``'s inexact buffers; not to be written to."""
    return _plain(case.kernel, case.device)


def cache_of(case: Case, pages: torch.Tensor) -> KvCache | MlaCache:
    """The cache of an attention kernel's buffers, with other pages."""
    size, shape = case.shape["page_size"], case.shape
    if case.kernel.op == "attention":
        return KvCache(KvLayout(case.kernel.weight, shape["head_dim"], size), pages, case.weights["factors"])
    layout = MlaLayout(case.kernel.weight, shape["kv_lora_rank"], shape["rope_dim"], size)
    return MlaCache(layout, pages, case.weights["factors"])
