"""Inputs and outputs of every kernel of the registry as views of other memory: the same bits, or refused."""

from __future__ import annotations

import torch
from tokenfab.kernels.registry import Kernel
from tokenfab.tests.reliability.layouts import LAYOUTS, accepted, far_apart, launch_in
from tokenfab.tests.reliability.walk import case_of, each_kernel, plain, same


@each_kernel
def test_r14_strided_or_misaligned_input(kernel: Kernel, device: torch.device) -> None:
    """Each layout of each buffer is refused by name before a launch, or the bits stay the same."""
    case = case_of(kernel, device)
    for layout in LAYOUTS:
        taken, refused = accepted(case, layout)
        assert refused or any(taken.values())
        if any(taken.values()):
            assert same(plain(case), launch_in(case, taken, layout)), (layout.__name__, taken)


@each_kernel
def test_r04_offsets_beyond_32_bits(kernel: Kernel, device: torch.device) -> None:
    """Rows that lie 2^31 values apart: refused by name, or the same bits."""
    case = case_of(kernel, device)
    taken, refused = accepted(case, far_apart)
    assert refused or any(taken.values())
    if any(taken.values()):
        assert same(plain(case), launch_in(case, taken, far_apart)), taken
