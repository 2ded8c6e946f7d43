"""What every kernel of the registry writes: all of it, exactly, the same each time and in any order of programs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenfab.kernels.reference import error
from tokenfab.kernels.registry import KERNELS, OPS, Kernel
from tokenfab.tests.reliability.walk import PREFILLS, SHAPES, case_of, each_kernel, plain, same, whole


def test_every_op_has_a_shape() -> None:
    assert set(SHAPES) == set(OPS)


@each_kernel
def test_r02_unwritten_output(kernel: Kernel, device: torch.device) -> None:
    """A byte that follows what was there before was not written; what was written is finite and right."""
    case = case_of(kernel, device)
    expected = case.expected
    outputs = [plain(case), case.launch(prefill=PREFILLS[1])]
    first, second = (case.written(output) for output in outputs)
    assert same(first, second)
    for output in outputs:
        assert error(whole(output), expected) <= kernel.tolerance
        for part in output.values():
            assert not part.is_floating_point() or part.float().isfinite().all()


@each_kernel
def test_r15_bitwise_repeatable_in_any_order(
    kernel: Kernel, device: torch.device, reverse_programs: Callable[[], None]
) -> None:
    case = case_of(kernel, device)
    reverse_programs()
    assert same(plain(case), case.launch())


# -- exactness -------------------------------------------------------------------------------------


@each_kernel
def test_r12_numeric_drift(kernel: Kernel, device: torch.device) -> None:
    """Largest and RMS error at most twice those of the float64 result rounded once to BF16."""
    case = case_of(kernel, device)
    got, expected = whole(plain(case)), case.expected
    if not isinstance(expected, torch.Tensor):  # codes and bytes: no bit may drift
        assert error(got, expected) == 0.0
        return
    low = expected.to(torch.bfloat16)
    ours, theirs = ((y.double() - expected).abs() for y in (got, low))
    assert ours.max() <= 2 * theirs.max()
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


EXACT = [kernel for kernel in KERNELS if kernel.op == "gemm" or kernel.tolerance == 0]


@pytest.mark.parametrize("kernel", EXACT, ids=lambda kernel: kernel.name)
def test_r11_dropped_tile(kernel: Kernel, device: torch.device) -> None:
    """Exact on exactly representable inputs: a matmul to the last bit of float32, codes and bytes to the last bit.

    Expert layers and attention, whose exponentials are not exact: the tests of their parts.
    """
    case = case_of(kernel, device, is_exact=True)
    if kernel.op == "gemm":
        y = case.launch(change=lambda output: {"": output[""].float().fill_(float("nan"))})[""]
        assert torch.equal(y.double(), case.expected)
    else:
        assert error(case.launch(), case.expected) == 0.0
