"""The expert matmuls of an MoE layer with BF16 or FP8 operands: gather, matmul, SwiGLU; matmul, weight, scatter.

Math:    gate-up  h[p, c] = act(g) u, (g, u) = sum_k x[token(p), k] w[e, (c, I + c), k] (+ bias), e the expert of
                  position p; down  y[r, n] = routing[r] (sum_k h[p, k] w[e, n, k] (+ bias)), r = row_index[p].
Shapes:  x (T, K) or h (positions, K); w (E, 2 I, K), gate rows 0..I-1, up rows I..2 I-1, or (E, N, K); h (T k, I) by
         position, BF16, or FP8 with a scale per 128 columns; y (T k, N) by row, BF16 or FP32.
         FP8 scales, FP32: "row" x (rows), w (E, rows); "block" x (rows, K / 128), w (E, rows / 128, K / 128).
Bytes:   the weights of every expert that has rows, once per block of rows; x or h, and the output, once.
Accuracy: as ``fp8_matmul``: 128 of k in a fresh accumulator, summed in FP32; BF16 sums in the matrix unit.
Edges:   no rows: nothing is read or written. Rows of other ranks' experts are neither computed nor written.
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  vLLM's fused_moe and DeepGEMM's grouped GEMM (contiguous layout) do the same with padded blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require
from .codec import QuantizedTensor
from .fp8_matmul import accumulate
from .grouped_parts import find_channels, find_rows, store_tile
from .moe_schedule import Schedule
from .moe_weights import GroupedWeight
from .tiles import Tile


@triton.jit
def _grouped_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, routing_ptr, y_ptr, ys_ptr,
    row_index_ptr, block_expert_ptr, block_start_ptr, expert_offsets_ptr, N, K, n_tiles,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALING: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, QUANTIZE: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile of y^T; programs of one block of rows stand side by side, blocks that do not exist at the end."""
    block, pid_n = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    IS_DOWN: tl.constexpr = ACTIVATION == ""
    x_rows, y_rows, mask_m = find_rows(
        block, row_index_ptr, block_start_ptr, expert_offsets_ptr, expert, BLOCK_M, TOP_K, IS_DOWN
    )
    rows_w, mask_n = find_channels(pid_n, N, BLOCK_N, IS_DOWN)
    size = N if IS_DOWN else 2 * N  # rows of one expert's weight
    k_tiles = tl.cdiv(K, 128)
    offs_k = tl.arange(0, 128)
    x_ptrs = x_ptr + x_rows[None, :].to(tl.int64) * K + offs_k[:, None]
    rows_all = expert.to(tl.int64) * size + rows_w
    w_ptrs = w_ptr + rows_all[:, None] * K + offs_k[None, :]
    xs_ptrs, ws_ptrs = x_ptrs, w_ptrs  # not read but where scales are per block
    if SCALING == "block":
        xs_ptrs = xs_ptr + x_rows.to(tl.int64) * k_tiles
        ws_ptrs = ws_ptr + (expert.to(tl.int64) * tl.cdiv(size, 128) + rows_w // 128) * k_tiles
    acc = accumulate(x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, mask_m, mask_n, K, 0, k_tiles, BLOCK_M, BLOCK_N, SCALING, EVEN_K)
    if SCALING == "row":
        ws = tl.load(ws_ptr + rows_all, mask=mask_n, other=0.0)
        acc = acc * ws[:, None] * tl.load(xs_ptr + x_rows, mask=mask_m, other=0.0)[None, :]
    store_tile(
        acc, bias_ptr, routing_ptr, y_ptr, ys_ptr, expert, pid_n, y_rows, mask_m, N, BLOCK_M, BLOCK_N,
        ACTIVATION, HAS_BIAS, QUANTIZE,
    )  # fmt: skip


SCALINGS = {"bf16": "none", "fp8_row": "row", "fp8_block": "block"}
"""Of the weight's format."""


def launch_grouped(
    x: QuantizedTensor, w: GroupedWeight, plan: Schedule, out: QuantizedTensor | torch.Tensor, *, top_k: int,
    activation: str, routing: torch.Tensor | None, tile: Tile,
) -> None:  # fmt: skip
    """The kernel of BF16 and FP8 weights, its arguments checked by ``grouped_experts.py``."""
    require(tile.block_k == 128, "tile", "block_k = 128", tile)
    y = out.data if isinstance(out, QuantizedTensor) else out
    ys = out.scale if isinstance(out, QuantizedTensor) else None
    channels = w.num_channels
    n_tiles = triton.cdiv(channels, tile.block_n // 2 if activation else tile.block_n)
    scale, bias = w.parts.get("scale"), w.bias
    _grouped_kernel[(plan.block_expert.numel() * n_tiles,)](
        x.data, x.scale, w.parts["data"], scale, bias, routing, y, ys,
        plan.row_index, plan.block_expert, plan.block_start, plan.expert_offsets, channels, w.num_columns, n_tiles,
        TOP_K=top_k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SCALING=SCALINGS[w.format], ACTIVATION=activation,
        HAS_BIAS=bias is not None, QUANTIZE=ys is not None, EVEN_K=w.num_columns % 128 == 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
