"""The expert layer as registry rows: within its tolerance at odd shapes and every load; what it claims to move."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tokenfab.bench.ops import Experts
from tokenfab.kernels.moe_work import draw_ids, touched
from tokenfab.kernels.reference import error
from tokenfab.kernels.registry import Kernel, find_kernels

MOES = find_kernels("moe")
SHAPE = {"num_tokens": 9, "hidden": 160, "inter": 96, "top_k": 2, "num_experts": 8, "ep": 2, "load": 0}


def by_name(kernel: Kernel) -> str:
    return kernel.name


@pytest.mark.parametrize("changes", [{}, {"load": 120, "num_tokens": 21}, {"ep": 1, "num_tokens": 1}], ids=str)
@pytest.mark.parametrize("kernel", MOES, ids=by_name)
def test_within_the_tolerance(kernel: Kernel, changes: dict[str, int], device: torch.device) -> None:
    if device.type == "cuda" and 10 * torch.cuda.get_device_capability()[0] < kernel.min_capability // 10 * 10:
        pytest.skip(f"{kernel.name} needs compute capability {kernel.min_capability / 10}")
    shape, run = SHAPE | changes, kernel.load()
    weights, activations = run.make_weights(shape, 3, device), run.make_activations(shape, 4, device)
    y = run.make_output(shape, device).fill_(float("nan"))
    run.launch(weights, activations, y)
    expected = run.reference(shape, weights, activations)
    assert error(y, expected) <= kernel.tolerance
    assert error(y.double() * 1.03, expected) > kernel.tolerance
    again = y.clone().fill_(float("nan"))
    run.launch(weights, activations, again)
    assert torch.equal(again, y)


@pytest.mark.parametrize("kernel", MOES, ids=by_name)
def test_work_is_what_the_decode_plan_counts(kernel: Kernel) -> None:
    """Balanced: as the plan's experts; x is BF16 here, and the router's logits are read."""
    shape = SHAPE | {"num_tokens": 64}
    work = kernel.work(shape)
    op = Experts(64, 160, 96, 2, 8, 2, weight=kernel.weight, activation="bf16")
    denser = 0.125 / 8 * 4 * 3 * 160 * 96 if kernel.activation.startswith("fp8") and kernel.weight == "mxfp4" else 0
    assert work.weight_bytes + work.activation_bytes == pytest.approx(op.bytes - denser + 64 * 8 * 4, abs=2)
    assert work.flops == op.flops


@pytest.mark.parametrize("kernel", MOES, ids=by_name)
def test_buffers_hold_what_work_claims(kernel: Kernel) -> None:
    shape = SHAPE | {"hidden": 256, "inter": 256, "num_tokens": 64}
    run, work = kernel.load(), kernel.work(shape)
    held = sum(part.nbytes for part in run.make_weights(shape, 0, "cpu").values())
    assert work.weight_bytes <= held <= 1.02 * work.weight_bytes + 20000
    activations = sum(part.nbytes for part in run.make_activations(shape, 0, "cpu").values())
    assert work.activation_bytes <= activations + run.make_output(shape, "cpu").nbytes


@pytest.mark.parametrize("load", [0, 101, 120])
def test_loads_are_the_tables_and_the_seed_moves_tokens_only(load: int) -> None:
    shape = {"num_tokens": 64, "hidden": 8, "inter": 8, "top_k": 8, "num_experts": 256, "ep": 8, "load": load}
    one, other = draw_ids(shape, 0), draw_ids(shape, 1)
    counts = one.flatten().long().bincount(minlength=256)
    assert torch.equal(counts, other.flatten().long().bincount(minlength=256))
    assert not torch.equal(one, other)
    experts, rows = touched(shape)
    assert experts == int((counts[:32] > 0).sum())
    assert rows == int(counts[:32].sum())
    assert (rows == 64) == (load == 0)


def test_registry_alone_needs_no_torch() -> None:
    code = "import sys, tokenfab.kernels.registry; print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
