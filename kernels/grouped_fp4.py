"""The expert matmuls of an MoE layer with FP4 weights decoded in registers: W4A16 (BF16) and W4A8 (FP8 activations).

Math, modes, edges: as ``grouped_matmul.py``. Decoding and its accuracy: as ``w4a16_matmul.py`` (MXFP4 and NVFP4, exact
        in BF16) and ``w4a8_matmul.py`` (MXFP4, exact in E4M3; 128 of k in a fresh accumulator).
Shapes:  x (T, K) or h (positions, K), BF16, or FP8 with float32 scales (rows, 1) or (rows, K / 128); w as
         ``moe_weights.py`` lays it out: the words and scales of ``fp4_weights.py`` or ``w4a8_weights.py`` with the
         expert as first axis, gate and up rows in turn.
Bytes:   the weights of every expert that has rows, 4.125 to 4.5 bits each, once per block of rows.
Source:  own; see the two dense kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .codec import QuantizedTensor
from .fp4_weights import TILE_K, TILE_N
from .grouped_parts import find_rows, store_tile
from .moe_schedule import Schedule
from .moe_weights import GroupedWeight
from .tiles import Tile
from .w4a8_matmul import accumulate_w4a8, check_tile, stages
from .w4a16_matmul import SCALE_BITS, accumulate_w4a16, check_w4a16_tile


@triton.jit
def _grouped_w4a16_kernel(
    x_ptr, w_ptr, s_ptr, factor_ptr, bias_ptr, routing_ptr, y_ptr, ys_ptr,
    row_index_ptr, block_expert_ptr, block_start_ptr, expert_offsets_ptr, N, K, n_tiles, k_tiles,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS_N: tl.constexpr, UNROLL: tl.constexpr,
    SCALE_HALVES: tl.constexpr, SCALE_BITS: tl.constexpr, ACTIVATION: tl.constexpr, FLAGS: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile of y^T. SCALE_BITS: (multiplier, addend). FLAGS: (has bias, quantize)."""
    PARTS: tl.constexpr = 4 // BLOCKS_N
    block, pid_n = tl.program_id(0) // (n_tiles * PARTS), tl.program_id(0) % (n_tiles * PARTS)
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    IS_DOWN: tl.constexpr = ACTIVATION == ""
    x_rows, y_rows, mask_m = find_rows(
        block, row_index_ptr, block_start_ptr, expert_offsets_ptr, expert, BLOCK_M, TOP_K, IS_DOWN
    )
    x_ptrs = x_ptr + x_rows[:, None].to(tl.int64) * K + tl.arange(0, 128)[None, :]
    tile = (expert.to(tl.int64) * n_tiles + pid_n // PARTS) * k_tiles
    acc = accumulate_w4a16(
        x_ptrs, w_ptr + tile * 4096, s_ptr + tile * (SCALE_HALVES * 512), pid_n % PARTS, mask_m, K, 0, k_tiles,
        BLOCK_M, BLOCKS_N, UNROLL, SCALE_HALVES, SCALE_BITS[0], SCALE_BITS[1], EVEN_K,
    )  # fmt: skip
    acc *= tl.load(factor_ptr + expert)
    store_tile(
        acc, bias_ptr, routing_ptr, y_ptr, ys_ptr, expert, pid_n, y_rows, mask_m, N, BLOCK_M, 64 * BLOCKS_N,
        ACTIVATION, FLAGS[0], FLAGS[1],
    )  # fmt: skip


@triton.jit
def _grouped_w4a8_kernel(
    x_ptr, xs_ptr, w_ptr, s_ptr, base_ptr, bias_ptr, routing_ptr, y_ptr, ys_ptr,
    row_index_ptr, block_expert_ptr, block_start_ptr, expert_offsets_ptr, N, K, n_tiles, k_tiles,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS_N: tl.constexpr, UNROLL: tl.constexpr,
    ACTIVATION: tl.constexpr, FLAGS: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of y^T. FLAGS: (has bias, quantize, scales of x per 128 of k, bases of w per 128 of k)."""
    PARTS: tl.constexpr = 4 // BLOCKS_N
    BLOCK_N: tl.constexpr = 64 * BLOCKS_N
    block, pid_n = tl.program_id(0) // (n_tiles * PARTS), tl.program_id(0) % (n_tiles * PARTS)
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    IS_DOWN: tl.constexpr = ACTIVATION == ""
    x_rows, y_rows, mask_m = find_rows(
        block, row_index_ptr, block_start_ptr, expert_offsets_ptr, expert, BLOCK_M, TOP_K, IS_DOWN
    )
    x_ptrs = x_ptr + x_rows[:, None].to(tl.int64) * K + tl.arange(0, 128)[None, :]
    tile = (expert.to(tl.int64) * n_tiles + pid_n // PARTS) * k_tiles
    # rows that are not there read the scales of row 0, which every block's tokens have
    offs_xs = tl.where(mask_m, x_rows, 0)
    if FLAGS[2]:
        offs_xs *= k_tiles
    base_row = base_ptr + pid_n * BLOCK_N
    if FLAGS[3]:
        base_row += expert.to(tl.int64) * k_tiles * (n_tiles * 256)
    else:
        base_row += expert.to(tl.int64) * (n_tiles * 256)
    acc = accumulate_w4a8(
        x_ptrs, xs_ptr, offs_xs, w_ptr + tile * 4096, s_ptr + tile * 128, base_row, n_tiles * 256, pid_n % PARTS,
        mask_m, K, 0, k_tiles, BLOCK_M, BLOCKS_N, UNROLL, FLAGS[2], FLAGS[3], EVEN_K, STAGES,
    )  # fmt: skip
    if not FLAGS[2]:
        acc *= tl.load(xs_ptr + offs_xs)[None, :]
    if not FLAGS[3]:
        acc *= tl.load(base_row + tl.arange(0, BLOCK_N)).to(tl.float32)[:, None]
    store_tile(
        acc, bias_ptr, routing_ptr, y_ptr, ys_ptr, expert, pid_n, y_rows, mask_m, N, BLOCK_M, BLOCK_N,
        ACTIVATION, FLAGS[0], FLAGS[1],
    )  # fmt: skip


def launch_grouped_fp4(
    x: QuantizedTensor, w: GroupedWeight, plan: Schedule, out: QuantizedTensor | torch.Tensor, *, top_k: int,
    activation: str, routing: torch.Tensor | None, tile: Tile,
) -> None:  # fmt: skip
    """The kernels of the layouts "w4a16" and "w4a8", their arguments checked by ``grouped_experts.py``."""
    tile = (check_w4a16_tile if w.layout == "w4a16" else check_tile)(tile)
    y = out.data if isinstance(out, QuantizedTensor) else out
    ys = out.scale if isinstance(out, QuantizedTensor) else None
    n_tiles, k_tiles = w.parts["words"].shape[1:3]
    unroll = tile.block_k // TILE_K if k_tiles % 2 == 0 else 1  # an odd number of tiles cannot be taken in pairs
    grid = (plan.block_expert.numel() * n_tiles * (TILE_N // tile.block_n),)
    flags = (w.bias is not None, ys is not None)
    common = {
        "TOP_K": top_k, "BLOCK_M": tile.block_m, "BLOCKS_N": tile.block_n // 64, "UNROLL": unroll,
        "ACTIVATION": activation, "EVEN_K": w.num_columns % TILE_K == 0,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    where = (plan.row_index, plan.block_expert, plan.block_start, plan.expert_offsets)
    sizes = (w.num_channels, w.num_columns, n_tiles, k_tiles)
    if w.layout == "w4a16":
        _grouped_w4a16_kernel[grid](
            x.data, w.parts["words"], w.parts["scales"], w.parts["factor"], w.bias, routing, y, ys, *where, *sizes,
            SCALE_HALVES=w.parts["scales"].shape[4], SCALE_BITS=SCALE_BITS[w.format], FLAGS=flags, **common,
        )  # fmt: skip
        return
    assert x.scale is not None
    groups = (x.scale.shape[1] > 1, w.parts["base"].shape[1] > 1)
    _grouped_w4a8_kernel[grid](
        x.data, x.scale, w.parts["words"], w.parts["scales"], w.parts["base"], w.bias, routing, y, ys, *where, *sizes,
        FLAGS=flags + groups, STAGES=stages(tile, groups[1]), **common,
    )  # fmt: skip
