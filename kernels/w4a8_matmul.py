"""y = x . w^T with MXFP4 weights decoded to E4M3 in registers and FP8 activations (W4A8), for Hopper.

Math:    y[m, n] = sum_g xs[m, g] sum_{k in g} x[m, k] e2m1(w[n, k]) scale[n, k / 32], g = k / 128, or one xs[m]
         for all of k.
Shapes:  x (M, K) float8_e4m3fn, rows of any stride, last axis contiguous; xs float32, (M, 1) or
         (M, ceil(K / 128)); w a ``W4A8Weight`` of (N, K); y (M, N) BF16 or FP32.
Layout:  weights are the M side of the matrix instruction and come from registers in fragment order
         (``w4a8_weights.py``); tokens are the N side, from shared memory, their k permuted alike.
Decode:  a word of eight codes is two ``prmt``: the selectors are the magnitudes, the table is the eight
         magnitudes as E4M3 under the block's scale. Signs are or-ed in. One table serves a thread's 32 values.
Bytes:   N K 4.125 / 8 (4.25 / 8 with a base per 128) + M K + M N x output; flops: 2 M N K.
Accuracy: a code under its scale is exact in E4M3. Hopper's FP8 matrix units keep about 14 bits of the running sum,
         so every 128 of k go into a fresh accumulator that is added in FP32, times the scales of x and of w.
Edges:   M, N and K need not divide the tile; K must divide by 32.
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  own layout and decoding. Fragment-ordered weights: Marlin (Frantar et al., 2024); a ``prmt`` table that holds
         the scale: CUTLASS's Hopper INT4 x FP8 matmul (example 55); promotion: DeepSeek-V3 technical report 3.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require, seen
from .split_k import arch_of, check_out, plan_splits, split_target, sum_splits
from .tiles import Tile, find_tile
from .w4a8_weights import NUM_WARPS, TILE_K, TILE_N, W4A8Weight


@triton.jit
def prmt(low, high, selector):
    """Four bytes of the eight in (low, high), chosen by the selector's four lowest nibbles."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def bytes_as_e4m3(words):
    """Four E4M3 of each word, the lowest byte first, on two new last axes of 2."""
    halves = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16))
    return tl.join((halves & 0xFF).to(tl.int8), (halves >> 8).to(tl.int8)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _decode_e2m1_to_e4m3(w, octave):
    """Two words of four E4M3 each from a word of eight codes, times 2^(octave - 5)."""
    low, _ = tl.broadcast(octave * 0x08080800 + 0x14100800, w)  # 0, 0.5, 1, 1.5 in octave 0: 0 stays 0
    high, _ = tl.broadcast(octave * 0x08080808 + 0x24201C18, w)  # 2, 3, 4, 6
    selector = w & 0x77777777
    value_0 = prmt(low, high, selector) | (w & -0x7F7F7F80)  # 0x80808080
    value_1 = prmt(low, high, selector >> 16) | ((w << 4) & -0x7F7F7F80)
    return value_0, value_1


@triton.jit
def accumulate_w4a8(
    x_ptrs, xs_ptr, offs_xs, w_ptr, s_ptr, base_ptr, stride_base, part, mask_m, K, first, trips,
    BLOCK_M: tl.constexpr, BLOCKS_N: tl.constexpr, UNROLL: tl.constexpr, GROUP_X: tl.constexpr,
    GROUP_BASE: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(64 BLOCKS_N, BLOCK_M) FP32: decoded w . x^T over ``trips`` tiles of k from ``first`` on, UNROLL at a time.

    ``x_ptrs`` (BLOCK_M, 128), ``w_ptr``, ``s_ptr``: at tile ``first``, words and scales of a row of tiles, of which
    ``part`` (of 4 / BLOCKS_N) is computed. ``xs_ptr`` + ``offs_xs`` (BLOCK_M): scales of x, a scalar pointer and
    32-bit offsets that are in range in every lane, clamped instead of masked: half the registers, no predicates.
    ``base_ptr``: of these rows of w. GROUP_X, GROUP_BASE: scales of x and bases of w per 128 of k, applied here;
    without, both are the caller's to apply. STAGES: of all loads, or None.
    """
    BLOCK_K: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 64 * BLOCKS_N
    WORDS: tl.constexpr = 4096  # int32 per tile
    SCALES: tl.constexpr = 128  # int32 per tile
    # one axis, so that shared memory holds the words in this order whatever layout the decoding wants of them
    w_ptrs = w_ptr + (part * (1024 * BLOCKS_N) + tl.arange(0, 1024 * BLOCKS_N))
    s_ptrs = s_ptr + tl.arange(0, 128)
    n76 = part * BLOCKS_N + tl.arange(0, BLOCKS_N)[:, None, None, None]
    n3 = tl.arange(0, 4)[None, None, None, :] & 1
    shift = (2 * n76 + n3) * 4
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    if GROUP_X:
        xs_ptr += first
    if GROUP_BASE:
        base_ptr += first * stride_base
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for trip in tl.range(0, trips // UNROLL, num_stages=STAGES):
        for step in tl.static_range(UNROLL):
            w = tl.reshape(tl.load(w_ptrs + step * WORDS), (BLOCKS_N, 2, 128, 4))
            octave = tl.reshape(tl.load(s_ptrs + step * SCALES), (1, 1, 128, 1))
            if EVEN_K:
                x = tl.load(x_ptrs + step * BLOCK_K, mask=mask_m[:, None], other=0.0)
            else:
                mask_k = offs_k < K - (first + trip * UNROLL + step) * BLOCK_K
                x = tl.load(x_ptrs + step * BLOCK_K, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            if GROUP_X:
                xs = tl.load(xs_ptr + step + offs_xs)
            if GROUP_BASE:
                base = tl.load(base_ptr + step * stride_base + offs_n)
            value_0, value_1 = _decode_e2m1_to_e4m3(w, (octave >> shift) & 0xF)
            values = bytes_as_e4m3(tl.join(value_0, value_1))
            # n76, k4, n54, n210, k65, k3, n3, k2, k1, k0 -> the matrix instruction's own order of n and k
            values = tl.reshape(values, (BLOCKS_N, 2, 4, 8, 4, 2, 2, 2, 2, 2))
            values = tl.permute(values, (0, 2, 6, 3, 1, 5, 7, 4, 8, 9))
            values = tl.reshape(values, (BLOCK_N, BLOCK_K))
            x = tl.reshape(x, (BLOCK_M, 4, 2, 2, 2, 4))  # k65, k4, k3, k2, k10
            x = tl.permute(x, (0, 2, 3, 4, 1, 5))
            x = tl.reshape(x, (BLOCK_M, BLOCK_K))
            product = tl.dot(values, tl.trans(x))
            if GROUP_X:
                product = product * xs[None, :]  # pyright: ignore[reportPossiblyUnboundVariable]
            if GROUP_BASE:
                product = product * base.to(tl.float32)[:, None]  # pyright: ignore[reportPossiblyUnboundVariable]
            acc += product
        w_ptrs += UNROLL * WORDS
        s_ptrs += UNROLL * SCALES
        x_ptrs += UNROLL * BLOCK_K
        xs_ptr += UNROLL
        base_ptr += UNROLL * stride_base
    return acc


@triton.jit
def _w4a8_kernel(
    x_ptr, xs_ptr, w_ptr, s_ptr, base_ptr, y_ptr,
    M, N, K, stride_xm, stride_xs, stride_base, stride_ym, stride_ys, k_tiles, k_tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCKS_N: tl.constexpr, UNROLL: tl.constexpr, GROUP_X: tl.constexpr,
    GROUP_BASE: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One (64 BLOCKS_N, BLOCK_M) tile of y^T over a range of k."""
    pid_n, pid_m, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    BLOCK_N: tl.constexpr = 64 * BLOCKS_N
    PARTS: tl.constexpr = 4 // BLOCKS_N  # programs that share a tile of 256 rows
    first = pid_k * k_tiles_per_split
    trips = tl.minimum(k_tiles - first, k_tiles_per_split)
    tile = (pid_n // PARTS).to(tl.int64) * k_tiles + first
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + (first * 128 + tl.arange(0, 128))[None, :]
    xs_row = xs_ptr + (pid_m * BLOCK_M).to(tl.int64) * stride_xs
    offs_xs = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - pid_m * BLOCK_M) * stride_xs
    acc = accumulate_w4a8(
        x_ptrs, xs_row, offs_xs, w_ptr + tile * 4096, s_ptr + tile * 128, base_ptr + pid_n * BLOCK_N, stride_base,
        pid_n % PARTS, mask_m, K, first, trips, BLOCK_M, BLOCKS_N, UNROLL, GROUP_X, GROUP_BASE, EVEN_K, STAGES,
    )  # fmt: skip
    if not GROUP_X:
        acc = acc * tl.load(xs_row + offs_xs)[None, :]
    if not GROUP_BASE:
        acc = acc * tl.load(base_ptr + offs_n).to(tl.float32)[:, None]
    y_ptrs = y_ptr + pid_k.to(tl.int64) * stride_ys + offs_m[None, :].to(tl.int64) * stride_ym + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_n[:, None] < N) & mask_m[None, :])


def w4a8_matmul(
    x: torch.Tensor, x_scale: torch.Tensor, weight: W4A8Weight, *, out_dtype: torch.dtype = torch.bfloat16,
    tile: Tile | None = None, split_k: int | None = None, workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y = x . w^T: (M, K) FP8 by MXFP4 (N, K) -> (M, N) BF16 or FP32.

    Args:
        x_scale: float32, (M, 1): one per token ("fp8_row"); (M, ceil(K / 128)): one per 128 columns ("fp8_group").
        tile: by default that of ``tiles.py``: 16, 32 or 64 tokens by 128 or 256 channels (128 with 64 tokens, whose
            accumulators fill the registers), block_k 128 or 256, 4 warps.
        split_k: programs that share one k range, summed in a fixed order; by default as many as fill the GPU.
        workspace: float32, at least split_k x M x N values, where split_k > 1; allocated if None.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    require(x.dim() == 2 and x.dtype == torch.float8_e4m3fn, "x", "float8_e4m3fn (M, K)", seen(x))
    require(x.shape[1] == weight.num_columns, "x", f"K = {weight.num_columns}", f"K = {x.shape[1]}")
    require(x.stride(1) == 1, "x", "a contiguous last axis", f"stride {x.stride()}")
    is_aligned = x.stride(0) % 16 == 0 or x.shape[0] <= 1
    require(is_aligned, "x", "rows 16 bytes apart or a multiple of it", f"stride {x.stride()}")
    require(x.device == weight.words.device, "x", f"device {weight.words.device}", x.device)
    tokens, rows, columns = x.shape[0], weight.num_rows, weight.num_columns
    n_tiles, k_tiles = weight.words.shape[:2]
    is_scale = x_scale.dtype == torch.float32 and tuple(x_scale.shape) in ((tokens, 1), (tokens, k_tiles))
    require(is_scale, "x_scale", f"float32 ({tokens}, 1) or ({tokens}, {k_tiles})", seen(x_scale))
    is_group = x_scale.shape[1] > 1
    is_dense = not is_group or x_scale.stride(1) == 1
    require(is_dense, "x_scale", "a contiguous last axis", f"stride {x_scale.stride()}")
    require(x_scale.stride(0) < 2**24, "x_scale", "rows less than 2^24 values apart", f"stride {x_scale.stride()}")
    require(x_scale.device == x.device, "x_scale", f"device {x.device}", x_scale.device)
    out = check_out(out, tokens, rows, out_dtype, x.device)
    format = "fp8_group" if is_group else "fp8_row"
    tile = check_tile(tile or find_tile("w4a8", format, arch_of(x.device), tokens, n=rows, k=columns))
    parts, blocks = TILE_N // tile.block_n, triton.cdiv(tokens, tile.block_m)
    unroll = tile.block_k // TILE_K if k_tiles % 2 == 0 else 1  # an odd number of tiles cannot be taken in pairs
    splits, per_split = plan_splits(split_k, n_tiles * parts * blocks, k_tiles // unroll, x.device)
    target = split_target(out, workspace, splits)
    if tokens == 0:
        return out
    _w4a8_kernel[(n_tiles * parts, blocks, splits)](
        x, x_scale, weight.words, weight.scales, weight.base, target,
        tokens, rows, columns, x.stride(0), x_scale.stride(0), weight.base.stride(0), target.stride(-2),
        target.stride(0) if splits > 1 else 0, k_tiles, per_split * unroll,
        BLOCK_M=tile.block_m, BLOCKS_N=tile.block_n // 64, UNROLL=unroll, GROUP_X=is_group,
        GROUP_BASE=weight.has_group_base, EVEN_K=columns % TILE_K == 0,
        STAGES=stages(tile, weight.has_group_base),
        num_warps=NUM_WARPS, num_stages=tile.num_stages,
    )  # fmt: skip
    sum_splits(target, out)
    return out


def check_tile(tile: Tile) -> Tile:
    """The tile, if it is one that this decoding has.

    Raises:
        ValueError: naming ``tile``.
    """
    sizes = {(16, 256), (16, 128), (32, 256), (32, 128), (64, 128)}
    fits = (tile.block_m, tile.block_n) in sizes and tile.block_k in (TILE_K, 2 * TILE_K)
    expected = "16 or 32 x 128 or 256, or 64 x 128, 128 or 256 of k, 4 warps"
    require(fits and tile.num_warps == NUM_WARPS, "tile", expected, tile)
    return tile


def stages(tile: Tile, has_group_base: bool) -> int | None:
    """With a base per 128 its loads are pipelined too; else Triton chooses what to pipeline."""
    return tile.num_stages if has_group_base else None


assert TILE_N == 256  # the kernel's largest BLOCK_N
