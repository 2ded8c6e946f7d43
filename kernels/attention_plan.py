"""Who attends to what: the tiles of all sequences shared out over programs, on the device, and the parts put together.

Math:    sequence b has T_b tiles of block_n tokens (those of its window where it has one). Balanced: all tiles stand in
         one row, each sequence's behind ``overhead_tiles`` of what a sequence costs besides; program w of P takes the
         w-th of P equal lengths, so a long sequence is cut and short ones share a program. Batch-invariant: a
         sequence is cut every ``split_tokens`` tokens, whatever else is in the batch, and pieces are dealt out.
         A piece (one program, one sequence) of a cut sequence leaves o_p, normalised, and l_p = log2 sum 2^s; then
         o = sum_p 2^(l_p - l) o_p with l = log2 sum_p 2^l_p, in the order of the pieces.
Result:  int32: P x (first sequence, its first tile, last sequence, end of its tiles), then
         B x (length, tile the window begins in, T_b, first part, pieces). Tiles count from the window's first.
         Parts are numbered w + b (balanced) or by piece (invariant): no two pieces share one.
Reuse:   a plan depends on lengths, window and q_len only: one serves all layers of a step that agree in these.
Capture: one launch; nothing waits for the device; lengths may change between replays.
Edges:   a sequence of length 0, or a query before its first token, has no pieces: output 0, LSE -inf.
Source:  FlashMLA's and FlashInfer's schedules (fixed overhead per sequence, ranges that cross requests); fixed split
         sizes for batch invariance: He et al., "Defeating Nondeterminism in LLM Inference" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import require, seen
from .split_k import num_multiprocessors

PROGRAM_FIELDS = tl.constexpr(4)
SEQUENCE_FIELDS = tl.constexpr(5)
MAX_BATCH = 4096
PROGRAMS_AT_ONCE = 16
"""Of the schedule, per launched program: a comparison with every sequence for each."""

OVERHEAD_TILES = 1
"""What a sequence costs beside its tiles (its queries in, its part out), in tiles."""

PIECES_AT_ONCE = 8
"""Parts of a sequence that ``_combine_parts_kernel`` reads at once."""


@triton.jit
def _plan_kernel(
    lengths_ptr, plan_ptr, batch, num_programs, q_len, window, split_tiles, overhead,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Each program of the plan's own finds the ranges of BLOCK_P others; the first one also writes the sequences."""
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    length = tl.load(lengths_ptr + offs_b, mask=mask_b, other=0)
    skipped = offs_b * 0
    if window is not None:
        skipped = tl.maximum(length - q_len + 1 - window, 0) // BLOCK_N
    tiles = tl.cdiv(length, BLOCK_N) - skipped
    tiles = tl.where(length > 0, tiles, 0)
    if split_tiles > 0:
        width, pad = tl.cdiv(tiles, split_tiles), 0
    else:
        width, pad = tl.where(tiles > 0, tiles + overhead, 0), overhead
    ends = tl.cumsum(width, axis=0)
    starts = ends - width
    total = tl.sum(width, axis=0)
    share = tl.maximum(tl.cdiv(total, num_programs), 1)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    low, high = offs_p * share, (offs_p + 1) * share
    # without work left ``first`` is past ``last``: an empty range
    first = tl.sum(((ends[None, :] <= low[:, None]) & mask_b[None, :]).to(tl.int32), axis=1)
    last = tl.sum(((starts[None, :] + pad < high[:, None]) & mask_b[None, :]).to(tl.int32), axis=1) - 1
    is_first, is_last = offs_b[None, :] == first[:, None], offs_b[None, :] == last[:, None]
    begin = low - tl.sum(tl.where(is_first, starts[None, :], 0), axis=1) - pad
    end = high - tl.sum(tl.where(is_last, starts[None, :], 0), axis=1) - pad
    if split_tiles > 0:
        begin, end = begin * split_tiles, end * split_tiles
    begin = tl.maximum(begin, 0)
    end = tl.minimum(end, tl.sum(tl.where(is_last, tiles[None, :], 0), axis=1))
    mask_p = offs_p < num_programs
    program_ptrs = plan_ptr + offs_p * PROGRAM_FIELDS
    tl.store(program_ptrs, first, mask=mask_p)
    tl.store(program_ptrs + 1, begin, mask=mask_p)
    tl.store(program_ptrs + 2, last, mask=mask_p)
    tl.store(program_ptrs + 3, end, mask=mask_p)
    if tl.program_id(0) == 0:
        if split_tiles > 0:
            first_part, pieces = starts, width
        else:
            opening = (starts + pad) // share
            pieces = tl.where(tiles > 0, (ends - 1) // share - opening + 1, 0)
            first_part = opening + offs_b
        sequence_ptrs = plan_ptr + num_programs * PROGRAM_FIELDS + offs_b * SEQUENCE_FIELDS
        tl.store(sequence_ptrs, length, mask=mask_b)
        tl.store(sequence_ptrs + 1, skipped, mask=mask_b)
        tl.store(sequence_ptrs + 2, tiles, mask=mask_b)
        tl.store(sequence_ptrs + 3, first_part, mask=mask_b)
        tl.store(sequence_ptrs + 4, pieces, mask=mask_b)


@triton.jit
def finish(lse, sink):
    """(factor of o, LSE in natural units) with a sink, in log2 units, -inf for none: a key whose value is zero."""
    top = tl.maximum(lse, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = top + tl.log2(tl.exp2(lse - top) + tl.exp2(sink - top))
    weight = tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - total))
    return weight, total * 0.6931471805599453


@triton.jit
def _combine_parts_kernel(
    parts_ptr, parts_lse_ptr, plan_ptr, sinks_ptr, out_ptr, lse_ptr, num_programs, q_len, num_heads,
    HEAD_DIM: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One token and head per program; nothing to do where its sequence is one piece."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq, token = row // q_len, row % q_len
    sequence_ptr = plan_ptr + num_programs * PROGRAM_FIELDS + seq * SEQUENCE_FIELDS
    first_part = tl.load(sequence_ptr + 3)
    pieces = tl.load(sequence_ptr + 4)
    if pieces != 1:
        offs_d = tl.arange(0, HEAD_DIM)
        offs_p = tl.arange(0, PIECES)
        top = float("-inf")
        total = 0.0
        acc = tl.zeros((HEAD_DIM,), tl.float32)
        for start in range(0, pieces, PIECES):
            mask = start + offs_p < pieces
            place = ((first_part + start + offs_p).to(tl.int64) * q_len + token) * num_heads + head
            part = tl.load(parts_lse_ptr + place, mask=mask, other=float("-inf"))
            each = tl.load(parts_ptr + place[:, None] * HEAD_DIM + offs_d[None, :], mask=mask[:, None], other=0.0)
            new = tl.maximum(top, tl.max(part, axis=0))
            safe = tl.where(new == float("-inf"), 0.0, new)
            share = tl.exp2(part - safe)
            alpha = tl.exp2(top - safe)
            total = total * alpha + tl.sum(share, axis=0)
            acc = acc * alpha + tl.sum(share[:, None] * each, axis=0)
            top = new
        sink = float("-inf")
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        lse = tl.where(total == 0, float("-inf"), top + tl.log2(total))
        o = tl.where(total == 0, 0.0, acc / total)
        weight, lse = finish(lse, sink)
        place = row * num_heads + head
        tl.store(out_ptr + place * HEAD_DIM + offs_d, (o * weight).to(out_ptr.dtype.element_ty))
        tl.store(lse_ptr + place, lse)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What ``plan_attention`` wrote, and what it was asked.

    Attributes:
        table: int32, as in the module. num_programs: per KV head. block_n: tokens per tile.
        split_tiles: tiles per piece in batch-invariant mode, else 0. num_parts: most parts there can be.
    """

    table: torch.Tensor
    batch: int
    num_programs: int
    block_n: int
    q_len: int
    window: int | None
    split_tiles: int
    num_parts: int


def num_plan_programs(num_kv_heads: int, device: torch.device, num_warps: int) -> int:
    """Programs per KV head (or block of heads), so that all heads' fill the device once: eight warps per SM."""
    ctas_per_sm = max(1, 8 // num_warps)
    return max(1, ctas_per_sm * num_multiprocessors(device) // num_kv_heads)


def plan_attention(
    lengths: torch.Tensor, num_programs: int, block_n: int, *, q_len: int = 1, window: int | None = None,
    split_tokens: int | None = None, max_length: int | None = None, out: torch.Tensor | None = None,
) -> AttentionPlan:  # fmt: skip
    """Share the tiles of sequences of ``lengths`` out over ``num_programs``.

    Args:
        lengths: (B,) int32, cached tokens of each sequence, the q_len new ones among them.
        window: keys that a query sees, itself among them; None for all.
        split_tokens: batch-invariant mode: the most tokens of one piece, a multiple of block_n. Results are then
            the same bits in any batch and with any ``num_programs``. Needs ``max_length``.
        max_length: an upper bound of lengths, for the number of parts; not checked (that would wait for the device).
        out: int32, at least 4 num_programs + 5 B values; allocated if None.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    good = lengths.dtype == torch.int32 and lengths.dim() == 1 and lengths.is_contiguous()
    require(good and 1 <= lengths.numel() <= MAX_BATCH, "lengths", f"contiguous int32 (B,), 1 to {MAX_BATCH} sequences",
            seen(lengths))  # fmt: skip
    require(num_programs >= 1, "num_programs", "at least 1", num_programs)
    require(block_n >= 16 and block_n & (block_n - 1) == 0, "block_n", "a power of two, at least 16", block_n)
    require(q_len >= 1, "q_len", "at least 1", q_len)
    require(window is None or window >= 1, "window", "None or at least 1", window)
    batch, split_tiles, num_parts = lengths.numel(), 0, num_programs + lengths.numel() - 1
    if split_tokens is not None:
        require(split_tokens >= block_n and split_tokens % block_n == 0, "split_tokens", f"a multiple of {block_n}",
                split_tokens)  # fmt: skip
        require(max_length is not None and max_length >= 1, "max_length", "a bound with split_tokens", max_length)
        assert max_length is not None
        split_tiles = split_tokens // block_n
        num_parts = batch * triton.cdiv(triton.cdiv(max_length, block_n) + 1, split_tiles)
    size = num_programs * PROGRAM_FIELDS.value + batch * SEQUENCE_FIELDS.value
    out = torch.empty(size, dtype=torch.int32, device=lengths.device) if out is None else out
    fits = out.dtype == torch.int32 and out.is_contiguous() and out.numel() >= size and out.device == lengths.device
    require(
        fits, "out", f"contiguous int32, at least {size} values on {lengths.device}", f"{seen(out)} on {out.device}"
    )
    _plan_kernel[(triton.cdiv(num_programs, PROGRAMS_AT_ONCE),)](
        lengths, out, batch, num_programs, q_len, window, split_tiles, OVERHEAD_TILES,
        BLOCK_N=block_n, BLOCK_B=triton.next_power_of_2(batch), BLOCK_P=PROGRAMS_AT_ONCE, num_warps=4,
    )  # fmt: skip
    return AttentionPlan(out, batch, num_programs, block_n, q_len, window, split_tiles, num_parts)


@dataclass(frozen=True, eq=False)
class Parts:
    """Where pieces leave o and l: float32 (num_parts, q_len, H, D_v) and (num_parts, q_len, H)."""

    o: torch.Tensor
    lse: torch.Tensor


def empty_parts(plan: AttentionPlan, num_heads: int, head_dim: int) -> Parts:
    """Room for the parts of a plan; layers may share it."""
    shape, device = (plan.num_parts, plan.q_len, num_heads), plan.table.device
    return Parts(torch.empty(*shape, head_dim, device=device), torch.empty(shape, device=device))


def check_plan(
    plan: AttentionPlan, batch: int, block_n: int, q_len: int, window: int | None, split_tokens: int | None
) -> None:
    """That a plan was made for this call.

    Raises:
        ValueError: naming ``plan``.
    """
    asked, got = (batch, block_n, q_len, window), (plan.batch, plan.block_n, plan.q_len, plan.window)
    require(got == asked, "plan", f"(batch, block_n, q_len, window) = {asked}", got)
    require(plan.table.is_contiguous(), "plan", "a contiguous table", f"stride {plan.table.stride()}")
    good = split_tokens is None or plan.split_tiles * plan.block_n == split_tokens
    require(good, "plan", f"pieces of {split_tokens} tokens", plan.split_tiles * plan.block_n)


def combine_parts(
    parts: Parts, plan: AttentionPlan, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None
) -> None:
    """Write ``out`` (T, H, D_v) and ``lse`` (T, H) of every sequence that is not one piece."""
    _combine_parts_kernel[(out.shape[0], out.shape[1])](
        parts.o, parts.lse, plan.table, sinks, out, lse, plan.num_programs, plan.q_len, out.shape[1],
        HEAD_DIM=out.shape[2], PIECES=PIECES_AT_ONCE, num_warps=2,
    )  # fmt: skip
