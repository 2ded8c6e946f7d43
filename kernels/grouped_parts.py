"""What the grouped matmuls of an expert layer share: their blocks of rows, the gated activation, stores, the combine.

A grouped matmul computes (BLOCK_N, BLOCK_M) tiles of y^T for blocks of at most BLOCK_M rows of one expert, as a
``moe_schedule.Schedule`` lists them. Two modes:

- gate-up: rows of x are gathered by token; the tile holds gate and up channels in turn, 64 of each, so that both
  halves of a channel stand in one thread's registers; y is h[position, channel] = act(gate) * up.
- down: rows of x are positions; y[row, channel] = routing weight[row] * sum, row = token k + slot, so that
  ``combine`` adds a token's slots in a fixed order: the same bits every time, whatever the order of programs.

Activations: "silu": gate sigmoid(gate) up. "swiglu_oai" (gpt-oss): gate at most 7, up within -7 and 7, then
gate sigmoid(1.702 gate) (up + 1).

Source: the model code of DeepSeek-V3, Qwen3-MoE, Mixtral and gpt-oss in Hugging Face transformers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require, seen
from .fused_quantize import swiglu
from .quantize import encode_e4m3, fp8_scale, magnitude_bits

ACTIVATIONS = ("silu", "swiglu_oai")
HALF = 64
"""Channels of gate, then of up: rows of one matrix instruction."""

_AMAX_MIN_BITS = tl.constexpr(0x38D1B717)  # 1e-4 in float32, the clamp of fp8_group


@triton.jit
def find_rows(
    block, row_index_ptr, block_start_ptr, expert_offsets_ptr, expert, BLOCK_M: tl.constexpr, TOP_K: tl.constexpr,
    IS_DOWN: tl.constexpr,
):  # fmt: skip
    """(rows of x, rows of y, where there is one) of a block."""
    positions = tl.load(block_start_ptr + block) + tl.arange(0, BLOCK_M)
    mask_m = positions < tl.load(expert_offsets_ptr + expert + 1)
    flat = tl.load(row_index_ptr + positions, mask=mask_m, other=0)
    if IS_DOWN:
        return positions, flat, mask_m
    return flat // TOP_K, positions, mask_m


@triton.jit
def find_channels(pid_n, N, BLOCK_N: tl.constexpr, IS_DOWN: tl.constexpr):
    """(rows of w, where there is one) of a tile: gate and up of 64 channels in turn, or as they stand."""
    offs = tl.arange(0, BLOCK_N)
    if IS_DOWN:
        channels = pid_n * BLOCK_N + offs
        return channels, channels < N
    channels = pid_n * (BLOCK_N // 2) + (offs // 128) * 64 + offs % 64
    return (offs // 64 % 2) * N + channels, channels < N


@triton.jit
def activate(acc, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ACTIVATION: tl.constexpr):
    """(BLOCK_N, BLOCK_M) sums, gate and up in turn -> (BLOCK_N / 2, BLOCK_M)."""
    pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 128, 2, 64, BLOCK_M)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    return tl.reshape(swiglu(gate, up, 7.0, 1.702, ACTIVATION == "swiglu_oai"), (BLOCK_N // 2, BLOCK_M))


@triton.jit
def store_tile(
    acc, bias_ptr, routing_ptr, y_ptr, ys_ptr, expert, pid_n, y_rows, mask_m, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Bias, then activation or routing weight, then the store; ACTIVATION "" is the mode "down".

    QUANTIZE: the 128 channels of a tile, rounded to BF16, in FP8 with one scale per row ("fp8_group").
    """
    if HAS_BIAS:
        size = N if ACTIVATION == "" else 2 * N
        rows_w, mask_n = find_channels(pid_n, N, BLOCK_N, ACTIVATION == "")
        bias = tl.load(bias_ptr + expert.to(tl.int64) * size + rows_w, mask=mask_n, other=0.0)
        acc += bias[:, None]
    if ACTIVATION == "":
        offs_y = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc *= tl.load(routing_ptr + y_rows, mask=mask_m, other=0.0)[None, :]
    else:
        offs_y = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        acc = activate(acc, BLOCK_N, BLOCK_M, ACTIVATION)
    mask = (offs_y < N)[:, None] & mask_m[None, :]
    y_ptrs = y_ptr + y_rows[None, :].to(tl.int64) * N + offs_y[:, None]
    if QUANTIZE:
        values = acc.to(tl.bfloat16).to(tl.float32)  # channels beyond the last are zero, as their weights are
        scale = fp8_scale(tl.max(magnitude_bits(values), axis=0), _AMAX_MIN_BITS)
        codes = encode_e4m3(tl.div_rn(values, tl.broadcast_to(scale[None, :], values.shape)))
        tl.store(y_ptrs, codes.to(tl.float8e4nv, bitcast=True), mask=mask)
        tl.store(ys_ptr + y_rows.to(tl.int64) * tl.cdiv(N, 128) + pid_n, scale, mask=mask_m)
    else:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    rows_ptr, position_ptr, extra_ptr, y_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr, HAS_EXTRA: tl.constexpr
):
    """y[token] = sum over slots, in their order, of the rows that some expert of this rank computed; then extra."""
    token = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        row = token.to(tl.int64) * TOP_K + slot
        is_here = tl.broadcast_to(tl.load(position_ptr + row), (BLOCK,)) >= 0
        total += tl.load(rows_ptr + row * hidden + offs, mask=mask & is_here, other=0.0).to(tl.float32)
    if HAS_EXTRA:
        total += tl.load(extra_ptr + token.to(tl.int64) * hidden + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64) * hidden + offs, total.to(y_ptr.dtype.element_ty), mask=mask)


def combine(
    rows: torch.Tensor, position: torch.Tensor, top_k: int, out: torch.Tensor, *, extra: torch.Tensor | None = None
) -> torch.Tensor:
    """``out[t]`` = sum over slots s of ``rows[t * top_k + s]`` where ``position`` is not -1; in FP32, slots in order.

    Args:
        rows: (T k, hidden) BF16 or FP32; what stands in rows that are left out is not read.
        position: int32 (T k,), of the schedule. out: (T, hidden) BF16 or FP32.
        extra: (T, hidden), added last: a shared expert.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    tokens, hidden = out.shape if out.dim() == 2 else (-1, -1)
    floats = (torch.bfloat16, torch.float32)
    require(
        out.dim() == 2 and out.dtype in floats and out.is_contiguous(), "out", "BF16 or FP32 (T, hidden)", seen(out)
    )
    fits = tuple(rows.shape) == (tokens * top_k, hidden) and rows.dtype in floats and rows.is_contiguous()
    require(fits, "rows", f"BF16 or FP32 {(tokens * top_k, hidden)}, contiguous", seen(rows))
    fits = position.dtype == torch.int32 and tuple(position.shape) == (tokens * top_k,)
    require(fits, "position", f"int32 {(tokens * top_k,)}", seen(position))
    if extra is not None:
        fits = extra.shape == out.shape and extra.dtype in floats and extra.is_contiguous()
        require(fits, "extra", f"BF16 or FP32 {tuple(out.shape)}, contiguous", seen(extra))
    for name, part in (("rows", rows), ("position", position), ("extra", rows if extra is None else extra)):
        require(part.device == out.device, name, f"device {out.device}", part.device)
    if tokens:
        block = min(1024, triton.next_power_of_2(hidden))
        _combine_kernel[(tokens, triton.cdiv(hidden, block))](
            rows, position, extra, out, hidden, TOP_K=top_k, BLOCK=block, HAS_EXTRA=extra is not None, num_warps=4
        )
    return out
