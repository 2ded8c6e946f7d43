"""MXFP4 weights laid out once, at load, for the matmul that decodes them to E4M3 in registers (W4A8).

A tile is 256 output channels x 128 input channels, stored in the order in which a warpgroup's threads consume it. A
thread holds whole scale blocks: one of 32 neighbours in k, of rows n and n + 8, in each of four 64-row blocks. The
order of the fragment is Hopper's for 8-bit operands; the bit layout is tokenfab's own.

Layout of ``words``, int32, (n_tiles, k_tiles, 4, 2, 128, 4), with n and k inside the tile in bits:

    index      bits of n and k             range
    [2]        n7 n6                       4     64-row blocks
    [3]        k4                          2
    [4]        n5 n4 | n2 n1 n0 | k6 k5    128   warp, lane
    [5]        k3 n3                       4     one 128-bit load
    8 codes    k2 k1 k0                          one word

Code i of a word has its magnitude in bits 4i+2:4i, where ``prmt`` takes it as a selector: two of them turn a word
into two registers of four E4M3 each. Its sign stands where it lands: bit 8i + 7 for i < 4, and 4 bits below bit
8 (i - 4) + 7 for the others.

``scales``, int32, (n_tiles, k_tiles, 128): nibble 2 n76 + n3 is the octave of a thread's block of rows n76, n3:
block scale = base x 2^(octave - 5), 0 to 11. Over these 12 octaves every code under its scale is a normal E4M3
number, so the product is exact. ``base``, bfloat16 powers of two, is one per row, (1, N padded), where 12 octaves
hold all blocks of every row, else one per row and 128 input channels, (k_tiles, N padded).

Memory: 4.125 bits per value; 4.25 with a base per 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import require, seen
from .codec import decode_e2m1, encode_e2m1

TILE_N, TILE_K = 256, 128
NUM_WARPS = 4
BLOCK = 32
OCTAVES = 12
"""Block scales that one base covers: 2^-5 to 2^6 times it."""

_LOW_OCTAVE = -5


@dataclass(frozen=True)
class W4A8Weight:
    """MXFP4 weights in the order of Hopper's FP8 fragments.

    Attributes:
        words: int32 (n_tiles, k_tiles, 4, 2, 128, 4); scales: int32 (n_tiles, k_tiles, 128).
        base: bfloat16 (1 or k_tiles, 256 n_tiles): powers of two.
        num_rows, num_columns: N and K without padding.
        num_rounded: values that ``round_wide`` changed; 0: the weights are exact.
    """

    words: torch.Tensor
    scales: torch.Tensor
    base: torch.Tensor
    num_rows: int
    num_columns: int
    num_rounded: int = 0

    def __post_init__(self) -> None:
        for name in ("words", "scales", "base"):
            part = getattr(self, name)
            require(part.is_contiguous(), name, "contiguous", f"stride {part.stride()}")

    @property
    def has_group_base(self) -> bool:
        """Whether every 128 input channels have their own base."""
        return self.base.shape[0] > 1

    @property
    def num_bytes(self) -> int:
        """Bytes a matmul reads."""
        return self.words.nbytes + self.scales.nbytes + self.base.nbytes


def prepare_w4a8_weight(
    packed: torch.Tensor, scale: torch.Tensor, format: str = "mxfp4", *, round_wide: bool = False
) -> W4A8Weight:
    """Lay MXFP4 weights out for decoding to E4M3 in registers.

    Args:
        packed: uint8 (N, K / 2), two E2M1 codes a byte, element 0 in the low nibble.
        scale: uint8 E8M0 (N, K / 32). A block of zeros may carry any scale but NaN.
        format: "mxfp4". NVFP4 is refused: an E2M1 code times an E4M3 scale has more bits than E4M3 holds.
        round_wide: where the block scales inside 128 input channels of a row are more than 11 octaves apart and a
            value below them is no E4M3 number, round it to nearest, by at most 2^-13 of the largest of these scales,
            and count it in ``num_rounded``. Otherwise such weights are refused.

    Raises:
        ValueError: a wrong dtype, shape, device or format; a NaN scale; values to be rounded without ``round_wide``.
    """
    reason = "mxfp4 (a code times NVFP4's E4M3 scale is no E4M3 number)"
    require(format == "mxfp4", "format", reason, format)
    require(packed.dtype == torch.uint8 and packed.dim() == 2, "packed", "uint8 (N, K / 2)", seen(packed))
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    is_sized = rows > 0 and columns > 0 and columns % BLOCK == 0
    require(is_sized, "packed", f"N > 0, K a multiple of {BLOCK}", seen(packed))
    expected = (rows, columns // BLOCK)
    is_scale = scale.dtype == torch.uint8 and tuple(scale.shape) == expected
    require(is_scale, "scale", f"torch.uint8 {expected}", seen(scale))
    require(scale.device == packed.device, "scale", f"device {packed.device}", scale.device)
    require(not bool((scale == 255).any()), "scale", "no NaN (E8M0 255)", "NaN")
    codes = _padded(torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(rows, columns), TILE_N, TILE_K)
    exponent = _padded(scale.int(), TILE_N, TILE_K // BLOCK)
    fitted, octave, base, num_rounded = _fit(codes, exponent, exponent.shape[1])
    if num_rounded:
        fitted, octave, base, num_rounded = _fit(codes, exponent, TILE_K // BLOCK)
    allowed = f"blocks at most {OCTAVES - 1} octaves apart within {TILE_K} columns, or round_wide"
    require(round_wide or not num_rounded, "scale", allowed, f"{num_rounded} values to round")
    return W4A8Weight(_words(fitted), _scale_words(octave), base, rows, columns, num_rounded)


def _fit(
    codes: torch.Tensor, exponent: torch.Tensor, blocks_per_base: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(codes, octaves (N, K / 32), bases (columns of blocks, N), values rounded), the largest scale at octave 11.

    Blocks below octave 0 are written in octave 0, where smaller codes say the same, or nearly.
    """
    blocks = codes.reshape(*exponent.shape, BLOCK)
    is_zero = (blocks & 7).amax(dim=-1) == 0
    live = exponent.masked_fill(is_zero, 0).reshape(exponent.shape[0], -1, blocks_per_base)
    field = (live.amax(dim=-1) - (OCTAVES - 1 + _LOW_OCTAVE)).clamp_min(1)  # FP32's and BF16's exponent field
    octave = exponent - field.repeat_interleave(blocks_per_base, dim=1) - _LOW_OCTAVE
    is_low = (octave < 0) & ~is_zero
    values = decode_e2m1(blocks[is_low]) * torch.exp2(octave[is_low].float().clamp_min(-8))[:, None]
    rounded = encode_e2m1(values)
    blocks = blocks.clone()
    blocks[is_low] = rounded
    base = (field << 7).to(torch.int16).view(torch.bfloat16).T.contiguous()
    octave = octave.masked_fill(is_zero, 0).clamp_min(0)
    return blocks.reshape(codes.shape), octave, base, int((decode_e2m1(rounded) != values).sum())


def _padded(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    padded = values.new_zeros(-(-values.shape[0] // rows) * rows, -(-values.shape[1] // columns) * columns)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


def _words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes (N, K) -> int32 words in fragment order."""
    tiles_n, tiles_k = codes.shape[0] // TILE_N, codes.shape[1] // TILE_K
    #                     n76 n54 n3 n210       k65 k4 k3 k210
    split = codes.reshape(tiles_n, 4, 4, 2, 8, tiles_k, 4, 2, 2, 8).int()
    ordered = split.permute(0, 5, 1, 7, 2, 4, 6, 8, 3, 9)  # n76, k4, n54, n210, k65, k3, n3 | k210
    words = torch.zeros(ordered.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(8):
        code = ordered[..., i]
        words |= ((code & 7) << (4 * i)) | ((code >> 3) << (8 * (i % 4) + (7 if i < 4 else 3)))
    return words.reshape(tiles_n, tiles_k, 4, 2, 128, 4).contiguous()


def _scale_words(octave: torch.Tensor) -> torch.Tensor:
    """Octaves (N, K / 32) -> int32 in fragment order."""
    tiles_n, tiles_k = octave.shape[0] // TILE_N, octave.shape[1] * BLOCK // TILE_K
    #                      n76 n54 n3 n210       k65
    split = octave.reshape(tiles_n, 4, 4, 2, 8, tiles_k, 4)
    ordered = split.permute(0, 5, 2, 4, 6, 1, 3).reshape(tiles_n, tiles_k, 128, 8)  # n54, n210, k65 | n76, n3
    words = torch.zeros(ordered.shape[:-1], dtype=torch.int32, device=octave.device)
    for i in range(8):
        words |= ordered[..., i].int() << (4 * i)
    return words.contiguous()
