"""Attention as the registry's rows run it: within tolerance, bytes as they lie in memory, the decode plan's work."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled
from tokenfab.bench.ops import PagedAttention
from tokenfab.kernels.attention_points import MAX_INSTRUCTIONS, attention_points, plan_points
from tokenfab.kernels.reference import error
from tokenfab.kernels.registry import Kernel, find_kernels

KERNELS = find_kernels("attention")
SIZES = {"batch": 3, "num_heads": 8, "num_kv_heads": 2, "page_size": 32}
SHAPES = [
    SIZES | {"length": 130, "head_dim": 64, "window": 0, "q_len": 1},
    SIZES | {"length": 96, "head_dim": 128, "window": 40, "q_len": 3},
]


def by_name(kernel: Kernel) -> str:
    return kernel.name


@pytest.mark.parametrize("shape", SHAPES, ids=["whole", "window"])
@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_within_tolerance_and_no_wider(kernel: Kernel, shape: dict[str, int], device: torch.device) -> None:
    run = kernel.load()
    weights, activations = run.make_weights(shape, 1, device), run.make_activations(shape, 2, device)
    output, expected = run.make_output(shape, device), run.reference(shape, weights, activations)
    for _ in range(2):  # buffers are used again
        output.fill_(float("nan"))
        run.launch(weights, activations, output)
        assert error(output, expected) <= kernel.tolerance
    assert error(output.double() * 1.03, expected) > kernel.tolerance
    assert expected.abs().max() > 0.01
    others = run.make_weights(shape, 3, device)
    run.launch(others, activations, output)
    assert error(output, expected) > kernel.tolerance


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_work_is_what_the_decode_plan_counts(kernel: Kernel) -> None:
    for window in (0, 40):
        shape = SIZES | {"length": 96, "head_dim": 128, "window": window, "q_len": 1}
        work = kernel.work(shape)
        op = PagedAttention(3, 96, 8, 2, 128, window or None, kernel.weight)
        scales = 4 * 2 * 3 * op.kv_tokens * 2 if kernel.weight == "fp8_row" else 0  # the plan leaves them out
        assert work.weight_bytes + work.activation_bytes == pytest.approx(op.bytes + scales, abs=2)
        assert work.flops == op.flops
    weights = kernel.load().make_weights(SHAPES[1], 1, "cpu")
    held = weights["pages"].nbytes
    assert held == kernel.work(SHAPES[1] | {"window": 0}).weight_bytes  # 96 tokens are 3 pages of 32


def test_r18_points_of_every_tile_compile_as_they_say() -> None:
    """No spills; the matrix instruction that a format and an architecture should have; the price of a value."""
    found = compiled([*attention_points(), *plan_points()])
    assert not [each for each in found if each.problems]
    assert all(each.facts.spill_bytes == 0 for each in found)
    prices = {(each.name, each.arch): each.facts.instructions_per_value for each in found}
    for format, price in (("fp8", 1.65), ("fp8_row", 2.46), ("bf16", 3.43), ("mxfp4", 4.74), ("nvfp4", 4.83)):
        rows = {"fp8": "r8-8", "fp8_row": "r8-8", "bf16": "r16-16"}.get(format, "rany-16")
        assert prices[f"attention/{format}-bf16/d128-{rows}/p64", "sm_90"] == pytest.approx(price, rel=0.06)
    assert {p.max_instructions_per_value for p in attention_points()} == {None, *MAX_INSTRUCTIONS.values()}
