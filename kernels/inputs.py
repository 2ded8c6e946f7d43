"""Inputs of kernels, for tests and for the bench alike: seeded, on any device.

Two kinds. ``random_operand``: normal values whose size changes from block to block, as activations and weights do,
through the codec; never zeros, which draw less power than data. ``exact_operand``: small integers under scales that
are powers of two, so that every product and every partial sum is exact in float32 and a result must be exact.
"""

from __future__ import annotations

import torch

from .codec import QuantizedTensor, pack_fp4, quantize
from .formats import get_format

_SPREAD_BLOCK = 16

EXACT_GLOBAL_SCALE = 0.5
"""Of ``exact_operand`` in NVFP4."""


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def random_matrix(rows: int, columns: int, seed: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) BF16: normal, times 2^n for each 16 columns of a row, n normal with deviation 1."""
    generator = _generator(seed, device)
    values = torch.randn(rows, columns, generator=generator, device=device)
    sizes = torch.exp2(torch.randn(rows, -(-columns // _SPREAD_BLOCK), generator=generator, device=device))
    return (values * sizes.repeat_interleave(_SPREAD_BLOCK, dim=1)[:, :columns]).to(torch.bfloat16)


def random_operand(format: str, rows: int, columns: int, seed: int, device: torch.device) -> QuantizedTensor:
    """``random_matrix`` in ``format``."""
    return quantize(random_matrix(rows, columns, seed, device), format)


def exact_operand(format: str, rows: int, columns: int, seed: int, device: torch.device) -> QuantizedTensor:
    """Integers from -2 to 2 under scales of 1/2, 1 and 2, in ``format``."""
    row, generator = get_format(format), _generator(seed, device)
    choice = torch.randint(0, 5, (rows, columns), generator=generator, device=device)
    if row.packing:
        data = pack_fp4(torch.tensor([0, 2, 4, 10, 12], dtype=torch.uint8, device=device)[choice])
    else:
        data = (choice - 2).to(torch.bfloat16)
        data = data if row.element == "bf16" else data.to(torch.float8_e4m3fn)
    shape, scale = row.scale_shape(rows, columns), None
    if shape is not None:
        exponents = torch.randint(-1, 2, shape, generator=generator, device=device)
        powers = torch.exp2(exponents.float())
        scale = {"f32": powers, "e4m3": powers.to(torch.float8_e4m3fn), "e8m0": (exponents + 127).to(torch.uint8)}[
            row.scale
        ]
    global_scale = torch.tensor(EXACT_GLOBAL_SCALE, device=device) if row.tensor_scale else None
    return QuantizedTensor(row, data, scale, global_scale, (rows, columns))
