"""FP4 weights laid out once, at load, for the matmuls that decode them in registers (W4A16).

A tile is 256 output channels x 128 input channels. It is stored in the order in which a warpgroup's
threads consume it: every thread loads 128 bits at a time and finds in them the very fragments that its
matrix instruction wants, so decoding is bit arithmetic in registers and nothing passes through shared
memory twice. The trick is that of Marlin and of humming (weights permuted offline to fragment order);
the bit layout here is tokenfab's own.

Layout of ``words``, int32, (n_tiles, k_tiles, 4, 2, 128, 4), with n and k inside the tile in bits:

    index      bits of n and k             range
    [2]        n7 n6                       4     64-row blocks
    [3]        k4                          2
    [4]        n5 n4 | n2 n1 n0 | k6 k5    128   warp, lane
    [5]        k3 k2                       4     one 128-bit load
    half word  k0                                low half k0 = 0
    4 values   k1 n3                             value j = n3 + 2 k1

The four values of a half word lie where a shift and a mask put them into a BF16's sign, low exponent
and high mantissa bit (15, 8, 7, 6): value 0 at {15, 8:6}, 1 at {12, 5:3}, 2 at {14, 11:9}, 3 at
{13, 2:0}; sign first, then exponent and mantissa. The BF16 so made is the value times 2^-126, exact
even where it is subnormal, and one multiplication by the block scale (times 2^126) finishes it. A
thread holds whole scale blocks: k6 k5 choose the lane, so 32 neighbours in k share one thread.

``scales``, int16: (n_tiles, k_tiles, 4, 2 or 1, 128): axis 3 is k4 for NVFP4's blocks of 16 and 1 for
MXFP4's blocks of 32; the low byte is the scale for n3 = 0, the high one for n3 = 1. MXFP4's
byte is the BF16 exponent field of scale x 2^126; NVFP4's is an unsigned float of 5 exponent and 3
mantissa bits (8 is 2^-9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import require, seen

TILE_N, TILE_K = 256, 128
NUM_WARPS = 4
_VALUE_BITS = ((15, 6), (12, 3), (14, 9), (13, 0))
"""(sign bit, lowest bit of exponent and mantissa) of value j in a half word."""

NVFP4_EXPONENT_OFFSET = 8
"""NVFP4 scales are applied times 2^-8 so that scale x 2^126 stays below BF16's largest exponent."""


@dataclass(frozen=True)
class Fp4Weight:
    """FP4 weights in fragment order.

    Attributes:
        format: "mxfp4" or "nvfp4".
        words: int32 (n_tiles, k_tiles, 4, 2, 128, 4); scales: int16 (n_tiles, k_tiles, 4, 1 or 2, 128).
        factor: float32 scalar that the accumulator is multiplied with at the end.
        num_rows, num_columns: N and K without padding.
    """

    format: str
    words: torch.Tensor
    scales: torch.Tensor
    factor: torch.Tensor
    num_rows: int
    num_columns: int

    def __post_init__(self) -> None:
        for name in ("words", "scales"):
            part = getattr(self, name)
            require(part.is_contiguous(), name, "contiguous", f"stride {part.stride()}")

    @property
    def num_bytes(self) -> int:
        """Bytes a matmul reads."""
        return self.words.nbytes + self.scales.nbytes


def prepare_fp4_weight(
    packed: torch.Tensor, scale: torch.Tensor, format: str, global_scale: torch.Tensor | None = None
) -> Fp4Weight:
    """Lay FP4 weights out for decoding in registers.

    Args:
        packed: uint8 (N, K / 2), two E2M1 codes a byte, element 0 in the low nibble.
        scale: "mxfp4": uint8 E8M0 (N, K / 32); "nvfp4": float8_e4m3fn (N, K / 16), not negative.
        global_scale: "nvfp4": float32 scalar.

    Raises:
        ValueError: a wrong dtype, shape or format; a scale that is NaN or, relative to the largest,
            below what BF16 can hold.
    """
    block = {"mxfp4": 32, "nvfp4": 16}.get(format)
    require(block is not None, "format", "mxfp4 or nvfp4", format)
    assert block is not None
    require(packed.dtype == torch.uint8 and packed.dim() == 2, "packed", "uint8 (N, K / 2)", seen(packed))
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    require(
        rows > 0 and columns > 0 and columns % block == 0, "packed", f"N > 0, K a multiple of {block}", seen(packed)
    )
    dtype = torch.uint8 if format == "mxfp4" else torch.float8_e4m3fn
    expected = (rows, columns // block)
    require(scale.dtype == dtype and tuple(scale.shape) == expected, "scale", f"{dtype} {expected}", seen(scale))
    require(scale.device == packed.device, "scale", f"device {packed.device}", scale.device)
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(rows, columns)
    is_zero_block = (codes & 7).reshape(rows, -1, block).amax(dim=-1) == 0
    if format == "mxfp4":
        require(global_scale is None, "global_scale", "None for mxfp4", global_scale)
        bytes_, factor = _mxfp4_scale_bytes(scale, is_zero_block)
    else:
        require(
            global_scale is not None and global_scale.numel() == 1, "global_scale", "a float32 scalar", global_scale
        )
        assert global_scale is not None
        bytes_ = _nvfp4_scale_bytes(scale)
        codes = codes.masked_fill((scale.float() == 0).repeat_interleave(block, dim=1), 0)
        factor = global_scale.float().reshape(()) * 2.0**NVFP4_EXPONENT_OFFSET
    return Fp4Weight(format, _words(codes), _scale_words(bytes_, block), factor, rows, columns)


def _mxfp4_scale_bytes(scale: torch.Tensor, is_zero_block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(BF16 exponent fields of scale x 2^(126 - c), the factor 2^c)."""
    exponent = scale.int()
    require(not bool((exponent == 255).any()), "scale", "no NaN (E8M0 255)", "NaN")
    live = exponent.masked_fill(is_zero_block, -1)
    largest = int(live.max())
    shift = max(0, largest - 128)
    field = (exponent + 126 - shift).clamp(1, 254)
    smallest = int(torch.where(is_zero_block, 255, exponent).min()) + 126 - shift
    require(smallest >= 1, "scale", "E8M0 bytes within 252 of each other", f"{largest - 126 - smallest}..{largest}")
    return field, torch.tensor(2.0**shift, dtype=torch.float32, device=scale.device)


def _nvfp4_scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    """E4M3 with 5 exponent bits: its subnormals become normal, 0 the smallest (its codes are zeroed)."""
    value = scale.float()
    require(bool((value >= 0).all()), "scale", "values of 0 or more, no NaN", "negative or NaN")
    mantissa, exponent = torch.frexp(value)  # value = mantissa x 2^exponent, mantissa in [0.5, 1)
    byte = ((exponent + 9) << 3) + ((mantissa * 2 - 1) * 8).to(torch.int32)
    return torch.where(value == 0, 8, byte)


def _padded(values: torch.Tensor, rows: int, columns: int, fill: int = 0) -> torch.Tensor:
    padded = values.new_full((-(-values.shape[0] // rows) * rows, -(-values.shape[1] // columns) * columns), fill)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


def _words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes (N, K) -> int32 words in fragment order."""
    codes = _padded(codes, TILE_N, TILE_K)
    tiles_n, tiles_k = codes.shape[0] // TILE_N, codes.shape[1] // TILE_K
    #                      n76 n54 n3 n210       k65 k4 k32 k1 k0
    split = codes.reshape(tiles_n, 4, 4, 2, 8, tiles_k, 4, 2, 4, 2, 2).int()
    ordered = split.permute(0, 5, 1, 7, 2, 4, 6, 8, 9, 3, 10)  # n76, k4, n54, n210, k65, k32 | k1, n3, k0
    words = torch.zeros(ordered.shape[:-3], dtype=torch.int32, device=codes.device)
    for half in (0, 1):
        for j, (sign, low) in enumerate(_VALUE_BITS):
            code = ordered[..., j >> 1, j & 1, half]
            words |= ((code >> 3) << (16 * half + sign)) | ((code & 7) << (16 * half + low))
    return words.reshape(tiles_n, tiles_k, 4, 2, 128, 4).contiguous()


def _scale_words(bytes_: torch.Tensor, block: int) -> torch.Tensor:
    """Bytes (N, K / block) -> int16 in fragment order."""
    bytes_ = _padded(bytes_.int(), TILE_N, TILE_K // block)
    tiles_n, tiles_k = bytes_.shape[0] // TILE_N, bytes_.shape[1] * block // TILE_K
    halves = 32 // block  # blocks of 32 k: one (MXFP4) or two (NVFP4, by k4)
    #                      n76 n54 n3 n210       k65 k4
    split = bytes_.reshape(tiles_n, 4, 4, 2, 8, tiles_k, 4, halves)
    ordered = split.permute(0, 5, 1, 7, 2, 4, 6, 3)  # n76, k4, n54, n210, k65 | n3
    words = (ordered[..., 0] | (ordered[..., 1] << 8)).to(torch.int16)
    return words.reshape(tiles_n, tiles_k, 4, halves, 128).contiguous()
