"""The expert matmuls of an MoE layer with both operands block-scaled: MXFP8, MXFP4, NVFP4, MXFP4 x MXFP8.

Math, modes, edges: as ``grouped_matmul.py``; NVFP4 results are multiplied by one factor per expert, the product of
        the weight's and the activations' scale per tensor.
Shapes:  x (T, K) or h (positions, K) and w (E, R, K) as the codec stores them, with their block scales.
Kernel:  weights are the M side of the matrix instruction, 128 rows: gate and up, 64 of each, or 128 channels.
        Native where ``block_scaled_matmul.py`` is; the same conditions hold.
Source:  as ``block_scaled_matmul.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .block_scaled_matmul import accumulate_block_scaled
from .checks import require
from .codec import QuantizedTensor
from .grouped_parts import find_channels, find_rows, store_tile
from .moe_schedule import Schedule
from .moe_weights import GroupedWeight
from .split_k import arch_of
from .tiles import Tile

BLOCK_N = 128


@triton.jit
def _grouped_block_scaled_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, factor_ptr, bias_ptr, routing_ptr, y_ptr,
    row_index_ptr, block_expert_ptr, block_start_ptr, expert_offsets_ptr, N, K, n_tiles,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PACK_W: tl.constexpr,
    PACK_X: tl.constexpr, ACTIVATION: tl.constexpr, FLAGS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One (128, BLOCK_M) tile of y^T. FLAGS: (has bias, has a factor per expert)."""
    block, pid_n = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    IS_DOWN: tl.constexpr = ACTIVATION == ""
    x_rows, y_rows, mask_m = find_rows(
        block, row_index_ptr, block_start_ptr, expert_offsets_ptr, expert, BLOCK_M, TOP_K, IS_DOWN
    )
    rows_w, mask_n = find_channels(pid_n, N, 128, IS_DOWN)
    size = N if IS_DOWN else 2 * N  # rows of one expert's weight
    rows_all = expert.to(tl.int64) * size + rows_w
    x_rows = x_rows.to(tl.int64)
    acc = accumulate_block_scaled(
        w_ptr + rows_all[:, None] * (K // PACK_W) + tl.arange(0, BLOCK_K // PACK_W)[None, :],
        x_ptr + x_rows[None, :] * (K // PACK_X) + tl.arange(0, BLOCK_K // PACK_X)[:, None],
        ws_ptr + rows_all[:, None] * (K // GROUP) + tl.arange(0, BLOCK_K // GROUP)[None, :],
        xs_ptr + x_rows[:, None] * (K // GROUP) + tl.arange(0, BLOCK_K // GROUP)[None, :],
        mask_n, mask_m, K, 0, tl.cdiv(K, BLOCK_K), 128, BLOCK_M, BLOCK_K, GROUP, PACK_W, PACK_X, EVEN_K,
    )  # fmt: skip
    if FLAGS[1]:
        acc *= tl.load(factor_ptr + expert)
    store_tile(
        acc, bias_ptr, routing_ptr, y_ptr, y_ptr, expert, pid_n, y_rows, mask_m, N, BLOCK_M, 128,
        ACTIVATION, FLAGS[0], False,
    )  # fmt: skip


def launch_grouped_block_scaled(
    x: QuantizedTensor, w: GroupedWeight, plan: Schedule, out: torch.Tensor, *, top_k: int, activation: str,
    routing: torch.Tensor | None, tile: Tile,
) -> None:  # fmt: skip
    """The kernel of the MX formats and NVFP4, its arguments checked by ``grouped_experts.py``."""
    require(tile.block_n == BLOCK_N, "tile", f"block_n = {BLOCK_N}", tile)
    data, arch = w.parts["data"], arch_of(x.data.device)
    pack_w, pack_x = (2 if row.packing else 1 for row in (w.row, x.format))
    if pack_w > pack_x and arch.startswith("sm_12"):
        data, pack_w = data.view(torch.int32), 8  # expanded to E4M3: there is no instruction for the pair
    n_tiles = triton.cdiv(w.num_channels, BLOCK_N // 2 if activation else BLOCK_N)
    factor = w.parts.get("factor")
    _grouped_block_scaled_kernel[(plan.block_expert.numel() * n_tiles,)](
        x.data, x.scale, data, w.parts["scale"], factor, w.bias, routing, out,
        plan.row_index, plan.block_expert, plan.block_start, plan.expert_offsets,
        w.num_channels, w.num_columns, n_tiles,
        TOP_K=top_k, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, GROUP=16 if w.format == "nvfp4" else 32,
        PACK_W=pack_w, PACK_X=pack_x, ACTIVATION=activation, FLAGS=(w.bias is not None, factor is not None),
        EVEN_K=w.num_columns % tile.block_k == 0, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
