"""y = x . w^T with FP4 weights decoded to BF16 in registers (W4A16): small numbers of tokens.

Math:    y[m, n] = factor * sum_k x[m, k] * e2m1(w[n, k]) * scale[n, k / block], FP32 accumulation.
Shapes:  x (M, K) BF16, rows of any stride, last axis contiguous; w an ``Fp4Weight`` of (N, K); y (M, N).
Layout:  weights are the M side of the matrix instruction and come from registers in fragment order
         (``fp4_weights.py``); tokens are the N side, from shared memory, their k permuted alike.
Bytes:   N K (4 + 8 / block) / 8 + 2 M K + M N x output; flops: 2 M N K.
Accuracy: every product of an E2M1 code and its scale is exact in BF16, so the result is that of a
         BF16 matmul over the dequantized weights.
Edges:   M, N and K need not divide the tile; K must divide by the scale block.
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  own layout; the technique of fragment-ordered weights is Marlin's (Frantar et al., 2024).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require, seen
from .fp4_weights import NUM_WARPS, TILE_K, TILE_N, Fp4Weight
from .matmul_points import SCALE_CONSTANTS
from .split_k import arch_of, check_out, plan_splits, split_target, sum_splits
from .tiles import Tile, find_tile


@triton.jit
def mul_bf16x2(a, b):
    """Products of the two BF16 halves of int32 words."""
    return tl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def decode_e2m1_to_bf16(w, scale_0, scale_1):
    """Four words of two BF16 each from a word of eight codes; scales are BF16 pairs times 2^126."""
    value_0 = w & -0x7E3F7E40  # 0x81C081C0: sign 15, exponent and mantissa 8:6 of both halves
    value_1 = (w << 3) & -0x7E3F7E40
    value_2 = ((w << 1) & -0x7FFF8000) | ((w >> 3) & 0x01C001C0)
    value_3 = ((w << 2) & -0x7FFF8000) | ((w << 6) & 0x01C001C0)
    return (
        mul_bf16x2(value_0, scale_0),
        mul_bf16x2(value_1, scale_1),
        mul_bf16x2(value_2, scale_0),
        mul_bf16x2(value_3, scale_1),
    )


@triton.jit
def accumulate_w4a16(
    x_ptrs, w_ptr, s_ptr, part, mask_m, K, first, trips,
    BLOCK_M: tl.constexpr, BLOCKS_N: tl.constexpr, UNROLL: tl.constexpr, SCALE_HALVES: tl.constexpr,
    SCALE_MUL: tl.constexpr, SCALE_ADD: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """(64 BLOCKS_N, BLOCK_M) FP32: decoded w . x^T over ``trips`` tiles of k from ``first`` on, UNROLL at a time.

    ``x_ptrs`` (BLOCK_M, 128) at tile ``first``; ``w_ptr``, ``s_ptr``: words and scales of tile ``first`` of a row of
    tiles, of which ``part`` (of 4 / BLOCKS_N) is computed.
    """
    BLOCK_K: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 64 * BLOCKS_N
    WORDS: tl.constexpr = 4096  # int32 per tile
    SCALES: tl.constexpr = SCALE_HALVES * 512  # int16 per tile
    # one axis, so that shared memory holds the words in this order whatever layout the decoding wants of them:
    # with more, Triton 3.9.0 puts lanes 128 bytes apart and every 128-bit load conflicts eight ways
    w_ptrs = w_ptr + part * (1024 * BLOCKS_N) + tl.arange(0, 1024 * BLOCKS_N)
    s_ptrs = s_ptr + part * (128 * SCALE_HALVES * BLOCKS_N) + tl.arange(0, 128 * SCALE_HALVES * BLOCKS_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for trip in range(0, trips // UNROLL):
        for step in tl.static_range(UNROLL):
            w = tl.reshape(tl.load(w_ptrs + step * WORDS), (BLOCKS_N, 2, 128, 4))
            scale = tl.load(s_ptrs + step * SCALES)
            if EVEN_K:
                x = tl.load(x_ptrs + step * BLOCK_K, mask=mask_m[:, None], other=0.0)
            else:
                mask_k = offs_k < K - (first + trip * UNROLL + step) * BLOCK_K
                x = tl.load(x_ptrs + step * BLOCK_K, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            scale = scale.to(tl.uint16, bitcast=True).to(tl.uint32)  # no sign: the high byte needs no mask
            scale = tl.reshape(scale, (BLOCKS_N, SCALE_HALVES, 128, 1)).to(tl.int32, bitcast=True)
            scale_0 = (scale & 0xFF) * SCALE_MUL + SCALE_ADD
            scale_1 = (scale >> 8) * SCALE_MUL + SCALE_ADD
            scale_0, _ = tl.broadcast(scale_0, w)
            scale_1, _ = tl.broadcast(scale_1, w)
            value_0, value_1, value_2, value_3 = decode_e2m1_to_bf16(w, scale_0, scale_1)
            pairs = tl.join(tl.join(value_0, value_1), tl.join(value_2, value_3))
            low, high = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
            values = tl.join(low, high).to(tl.bfloat16, bitcast=True)
            # n76, k4, n54, n210, k65, k32, n3, k1, k0 -> the matrix instruction's own order of n and k
            values = tl.reshape(values, (BLOCKS_N, 2, 4, 8, 4, 4, 2, 2, 2))
            values = tl.permute(values, (0, 2, 6, 3, 1, 5, 7, 4, 8))
            values = tl.reshape(values, (BLOCK_N, BLOCK_K))
            x = tl.reshape(x, (BLOCK_M, 4, 2, 4, 2, 2))  # k65, k4, k32, k1, k0
            x = tl.permute(x, (0, 2, 3, 4, 1, 5))
            x = tl.reshape(x, (BLOCK_M, BLOCK_K))
            acc = tl.dot(values, tl.trans(x), acc)
        w_ptrs += UNROLL * WORDS
        s_ptrs += UNROLL * SCALES
        x_ptrs += UNROLL * BLOCK_K
    return acc


@triton.jit
def _w4a16_kernel(
    x_ptr, w_ptr, s_ptr, factor_ptr, y_ptr,
    M, N, K, stride_xm, stride_ym, stride_ys, k_tiles, k_tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCKS_N: tl.constexpr, UNROLL: tl.constexpr, SCALE_HALVES: tl.constexpr,
    SCALE_MUL: tl.constexpr, SCALE_ADD: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One (64 BLOCKS_N, BLOCK_M) tile of y^T over a range of k."""
    pid_n, pid_m, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    BLOCK_N: tl.constexpr = 64 * BLOCKS_N
    PARTS: tl.constexpr = 4 // BLOCKS_N  # programs that share a tile of 256 rows
    first = pid_k * k_tiles_per_split
    trips = tl.minimum(k_tiles - first, k_tiles_per_split)
    tile = (pid_n // PARTS).to(tl.int64) * k_tiles + first
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + (first * 128 + tl.arange(0, 128))[None, :]
    acc = accumulate_w4a16(
        x_ptrs, w_ptr + tile * 4096, s_ptr + tile * (SCALE_HALVES * 512), pid_n % PARTS, mask_m, K, first, trips,
        BLOCK_M, BLOCKS_N, UNROLL, SCALE_HALVES, SCALE_MUL, SCALE_ADD, EVEN_K,
    )  # fmt: skip
    acc = acc * tl.load(factor_ptr)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + pid_k.to(tl.int64) * stride_ys + offs_m[None, :].to(tl.int64) * stride_ym + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_n[:, None] < N) & mask_m[None, :])


SCALE_BITS = {name: (row["SCALE_MUL"], row["SCALE_ADD"]) for name, row in SCALE_CONSTANTS.items()}
"""(multiplier, addend) that turn a prepared scale byte into a pair of BF16 times 2^126."""


def w4a16_matmul(
    x: torch.Tensor, weight: Fp4Weight, *, out_dtype: torch.dtype = torch.bfloat16, tile: Tile | None = None,
    split_k: int | None = None, workspace: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y = x . w^T: (M, K) BF16 by FP4 (N, K) -> (M, N) BF16 or FP32.

    Args:
        tile: by default that of ``tiles.py``. Its block_n is 128 or 256, its block_k 128 or 256, with 4 warps.
        split_k: programs that share one k range, summed in a fixed order; by default as many as fill the GPU.
        workspace: float32, at least split_k x M x N values, where split_k > 1; allocated if None.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    require(x.dim() == 2 and x.dtype == torch.bfloat16, "x", "bfloat16 (M, K)", seen(x))
    require(x.shape[1] == weight.num_columns, "x", f"K = {weight.num_columns}", f"K = {x.shape[1]}")
    require(x.stride(1) == 1, "x", "a contiguous last axis", f"stride {x.stride()}")
    require(
        x.stride(0) % 8 == 0 or x.shape[0] <= 1, "x", "rows 16 bytes apart or a multiple of it", f"stride {x.stride()}"
    )
    require(x.device == weight.words.device, "x", f"device {weight.words.device}", x.device)
    tokens, rows, columns = x.shape[0], weight.num_rows, weight.num_columns
    out = check_out(out, tokens, rows, out_dtype, x.device)
    tile = check_w4a16_tile(tile or find_tile("w4a16", weight.format, arch_of(x.device), tokens, n=rows, k=columns))
    n_tiles, k_tiles = weight.words.shape[:2]
    parts_n, blocks_m = TILE_N // tile.block_n, triton.cdiv(tokens, tile.block_m)
    unroll = tile.block_k // TILE_K if k_tiles % 2 == 0 else 1  # an odd number of tiles cannot be taken in pairs
    splits, per_split = plan_splits(split_k, n_tiles * parts_n * blocks_m, k_tiles // unroll, x.device)
    target = split_target(out, workspace, splits)
    if tokens == 0:
        return out
    multiplier, addend = SCALE_BITS[weight.format]
    _w4a16_kernel[(n_tiles * parts_n, blocks_m, splits)](
        x, weight.words, weight.scales, weight.factor, target,
        tokens, rows, columns, x.stride(0), target.stride(-2), target.stride(0) if splits > 1 else 0,
        k_tiles, per_split * unroll,
        BLOCK_M=tile.block_m, BLOCKS_N=tile.block_n // 64, UNROLL=unroll, SCALE_HALVES=weight.scales.shape[3],
        SCALE_MUL=multiplier, SCALE_ADD=addend, EVEN_K=columns % TILE_K == 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    sum_splits(target, out)
    return out


def check_w4a16_tile(tile: Tile) -> Tile:
    """The tile, if it is one that this decoding has.

    Raises:
        ValueError: naming ``tile``.
    """
    fits = tile.block_m in (16, 32, 64, 128) and tile.block_n in (128, 256) and tile.block_k in (128, 256)
    require(fits and tile.num_warps == NUM_WARPS, "tile", "16 to 128 tokens, 128 or 256 of n and k, 4 warps", tile)
    return tile


assert TILE_N == 256  # the kernel's largest BLOCK_N
