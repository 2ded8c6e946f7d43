"""Routed rows sorted by expert, and the blocks of a grouped matmul over them.

Math:    row r = token k + slot of the (T, k) ids, N = T k rows. A row is local where
         first_expert <= ids[r] < first_expert + num_local_experts; the others (of another rank, -1 for
         padding, any number out of range) are left out. Local rows in ascending (expert, r): a stable sort.
Shapes:  see ``Schedule``. All int32, contiguous.
Layout:  block b covers positions block_start[b] .. min(block_start[b] + block_m, expert_offsets[block_expert[b]
         + 1]) - 1, of one expert; blocks ascend, an expert without rows has none.
Bytes:   beyond ``ONE_LAUNCH_ROWS`` rows 20 N + 16 L N / 128 with L local experts; up to there 12 N, and 4 N for each
         of ceil(N / 128) + ceil(max_blocks / 32) programs. Both + 8 max_blocks.
Kernels: up to ``ONE_LAUNCH_ROWS`` rows one launch (``_schedule_kernel``): each program counts all ids and
         ranks its 128 rows. Beyond, three: counts of each 128 rows, their sums along the rows, ranks.
         Work is bounded whatever the load. No atomics on memory: nothing depends on the order of programs.
Edges:   T may be 0. One token may name an expert twice: two rows.
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  counting sort; vLLM's and SGLang's moe_align_block_size give the same blocks, padded and in the order of
         atomics; triton_kernels' routing makes partial counts per chunk of rows, and is stable as this is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import require, seen
from .routing_rule import MAX_EXPERTS
from .routing_tiles import CHUNK, CHUNK_TILE, COUNT_TILE, EXPERT_TILE, ONE_LAUNCH_ROWS, SLOTS

MAX_ROWS = 2**30
"""Positions and offsets are int32."""

MAX_BLOCK_M = 2**16


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a grouped matmul of N = T k rows over L local experts needs; see the module.

    Attributes:
        expert_offsets: (L + 1,) position of each expert's first row; the last: all local rows.
        row_index: (N,) position -> row, token = row // k; -1 beyond the last.
        position: (N,) row -> position; -1 where a row is left out.
        block_expert: (max_blocks,) local expert of each block; -1 beyond the last.
        block_start: (max_blocks,) first position of each block; -1 beyond the last.
        workspace: what one launch leaves the next; empty where one launch does.
        block_m: rows of a full block.
    """

    expert_offsets: torch.Tensor
    row_index: torch.Tensor
    position: torch.Tensor
    block_expert: torch.Tensor
    block_start: torch.Tensor
    workspace: torch.Tensor
    block_m: int

    @property
    def num_local_experts(self) -> int:
        return self.expert_offsets.numel() - 1


def max_blocks(num_rows: int, num_local_experts: int, block_m: int) -> int:
    """The most blocks that any load of up to ``num_rows`` rows makes; some load makes as many.

    An expert of c > 0 rows has ceil(c / block_m) <= 1 + (c - 1) / block_m blocks: the most where as many experts
    as can be have one row, and the rest come block_m at a time.
    """
    busy = min(num_rows, num_local_experts)
    return busy + (num_rows - busy) // block_m


def _sizes(num_tokens: int, top_k: int, num_local_experts: int, block_m: int) -> dict[str, int]:
    """Elements of each tensor of a ``Schedule``, arguments checked."""
    require(num_tokens >= 0, "num_tokens", "0 or more", num_tokens)
    require(top_k >= 1, "top_k", "1 or more", top_k)
    require(1 <= num_local_experts <= MAX_EXPERTS, "num_local_experts", f"1 to {MAX_EXPERTS}", num_local_experts)
    require(1 <= block_m <= MAX_BLOCK_M, "block_m", f"1 to {MAX_BLOCK_M}", block_m)
    rows = num_tokens * top_k
    require(rows <= MAX_ROWS, "num_tokens", f"at most {MAX_ROWS} rows of {top_k} a token", num_tokens)
    blocks = max_blocks(rows, num_local_experts, block_m)
    counts = 0 if rows <= ONE_LAUNCH_ROWS else (1 + triton.cdiv(rows, CHUNK)) * num_local_experts
    return {
        "expert_offsets": num_local_experts + 1, "row_index": rows, "position": rows,
        "block_expert": blocks, "block_start": blocks, "workspace": counts,
    }  # fmt: skip


def empty_schedule(
    num_tokens: int, top_k: int, num_local_experts: int, block_m: int, device: torch.device | str
) -> Schedule:
    """A schedule to fill, its contents undefined: allocate once, pass as ``out`` while a graph is captured.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    sizes = _sizes(num_tokens, top_k, num_local_experts, block_m)
    tensors = {name: torch.empty(size, dtype=torch.int32, device=device) for name, size in sizes.items()}
    return Schedule(**tensors, block_m=block_m)


@triton.jit
def _local_experts(ids_ptr, offs, num_rows, first_expert, NUM_LOCAL: tl.constexpr):
    """Local experts of rows, and where they are local."""
    local = tl.load(ids_ptr + offs, mask=offs < num_rows, other=first_expert - 1) - first_expert
    return local, (local >= 0) & (local < NUM_LOCAL)


@triton.jit
def _place_rows(offs, local, is_local, starts, num_local_rows, num_rows, row_index_ptr, position_ptr):
    """Stores of one chunk; ``starts``: position of the first row of each row's expert in this chunk."""
    expert = tl.where(is_local, local, -1)
    ahead = (expert[:, None] == expert[None, :]) & (offs[None, :] < offs[:, None])
    position = starts + tl.sum(ahead.to(tl.int32), axis=1)
    tl.store(position_ptr + offs, tl.where(is_local, position, -1), mask=offs < num_rows)
    tl.store(row_index_ptr + position, offs, mask=is_local)
    tl.store(row_index_ptr + offs, -1, mask=(offs >= num_local_rows) & (offs < num_rows))


@triton.jit
def _place_blocks(
    program, counts, expert_offsets_ptr, block_expert_ptr, block_start_ptr, num_blocks,
    NUM_LOCAL: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Stores of SLOTS blocks, and by program 0 the offsets. A block's expert: the ends at or before it, counted."""
    offs_l = tl.arange(0, BLOCK_L)
    starts = tl.cumsum(counts, 0) - counts
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(blocks, 0)
    if program == 0:
        tl.store(expert_offsets_ptr + offs_l, starts, mask=offs_l < NUM_LOCAL)
        tl.store(expert_offsets_ptr + NUM_LOCAL, tl.sum(counts))
    slots = program * SLOTS + tl.arange(0, SLOTS)
    is_block = slots < tl.sum(blocks)
    expert = tl.sum((ends[None, :] <= slots[:, None]).to(tl.int32), axis=1)
    safe = tl.where(is_block, expert, 0)
    start = tl.gather(starts, safe, 0) + (slots - tl.gather(ends - blocks, safe, 0)) * BLOCK_M
    mask = slots < num_blocks
    tl.store(block_expert_ptr + slots, tl.where(is_block, expert, -1), mask=mask)
    tl.store(block_start_ptr + slots, tl.where(is_block, start, -1), mask=mask)


@triton.jit
def _schedule_kernel(
    ids_ptr, expert_offsets_ptr, row_index_ptr, position_ptr, block_expert_ptr, block_start_ptr,
    num_rows, num_blocks, row_programs, first_expert,
    NUM_LOCAL: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    COUNT_TILE: tl.constexpr,
):  # fmt: skip
    """The first ``row_programs`` programs place a chunk of rows each, the others SLOTS blocks each."""
    program = tl.program_id(0)
    before = tl.zeros((BLOCK_L,), tl.int32)  # rows of each expert ahead of this chunk
    counts = tl.zeros((BLOCK_L,), tl.int32)
    for first in range(0, num_rows, COUNT_TILE):
        offs = first + tl.arange(0, COUNT_TILE)
        local, is_local = _local_experts(ids_ptr, offs, num_rows, first_expert, NUM_LOCAL)
        local = tl.where(is_local, local, 0)
        found = tl.histogram(local, BLOCK_L, mask=is_local)
        counts += found
        if first + COUNT_TILE <= program * CHUNK:
            before += found
        elif first < program * CHUNK:
            before += tl.histogram(local, BLOCK_L, mask=is_local & (offs < program * CHUNK))
    if program < row_programs:
        starts = tl.cumsum(counts, 0) - counts + before
        offs = program * CHUNK + tl.arange(0, CHUNK)
        local, is_local = _local_experts(ids_ptr, offs, num_rows, first_expert, NUM_LOCAL)
        _place_rows(
            offs, local, is_local, tl.gather(starts, tl.where(is_local, local, 0), 0), tl.sum(counts), num_rows,
            row_index_ptr, position_ptr,
        )  # fmt: skip
    else:
        _place_blocks(
            program - row_programs, counts, expert_offsets_ptr, block_expert_ptr, block_start_ptr, num_blocks,
            NUM_LOCAL, BLOCK_L, BLOCK_M, SLOTS,
        )  # fmt: skip


@triton.jit
def _count_rows_kernel(
    ids_ptr, partial_ptr, num_rows, first_expert,
    NUM_LOCAL: tl.constexpr, BLOCK_L: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partial[1 + chunk, expert]: rows of one chunk."""
    chunk = tl.program_id(0)
    offs_l = tl.arange(0, BLOCK_L)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    local, is_local = _local_experts(ids_ptr, offs, num_rows, first_expert, NUM_LOCAL)
    counts = tl.histogram(tl.where(is_local, local, 0), BLOCK_L, mask=is_local)
    tl.store(partial_ptr + (chunk + 1).to(tl.int64) * NUM_LOCAL + offs_l, counts, mask=offs_l < NUM_LOCAL)


@triton.jit
def _sum_chunks_kernel(
    partial_ptr, num_chunks, NUM_LOCAL: tl.constexpr, CHUNK_TILE: tl.constexpr, EXPERT_TILE: tl.constexpr,
):  # fmt: skip
    """In place, EXPERT_TILE experts per program: counts become those ahead of each chunk; row 0 the totals."""
    offs_l = tl.program_id(0) * EXPERT_TILE + tl.arange(0, EXPERT_TILE)
    ahead = tl.zeros((EXPERT_TILE,), tl.int32)
    for first in range(0, num_chunks, CHUNK_TILE):
        offs_c = first + tl.arange(0, CHUNK_TILE)
        ptrs = partial_ptr + (offs_c[:, None] + 1).to(tl.int64) * NUM_LOCAL + offs_l[None, :]
        mask = (offs_c[:, None] < num_chunks) & (offs_l[None, :] < NUM_LOCAL)
        counts = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, tl.cumsum(counts, 0) - counts + ahead[None, :], mask=mask)
        ahead += tl.sum(counts, axis=0)
    tl.store(partial_ptr + offs_l, ahead, mask=offs_l < NUM_LOCAL)


@triton.jit
def _place_kernel(
    ids_ptr, partial_ptr, expert_offsets_ptr, row_index_ptr, position_ptr, block_expert_ptr, block_start_ptr,
    num_rows, num_blocks, row_programs, first_expert,
    NUM_LOCAL: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """As ``_schedule_kernel``, with the counts of the two launches before."""
    program = tl.program_id(0)
    offs_l = tl.arange(0, BLOCK_L)
    counts = tl.load(partial_ptr + offs_l, mask=offs_l < NUM_LOCAL, other=0)
    if program < row_programs:
        offs = program * CHUNK + tl.arange(0, CHUNK)
        local, is_local = _local_experts(ids_ptr, offs, num_rows, first_expert, NUM_LOCAL)
        safe = tl.where(is_local, local, 0)
        before = tl.load(partial_ptr + (program + 1).to(tl.int64) * NUM_LOCAL + safe)
        starts = tl.gather(tl.cumsum(counts, 0) - counts, safe, 0) + before
        _place_rows(offs, local, is_local, starts, tl.sum(counts), num_rows, row_index_ptr, position_ptr)
    else:
        _place_blocks(
            program - row_programs, counts, expert_offsets_ptr, block_expert_ptr, block_start_ptr, num_blocks,
            NUM_LOCAL, BLOCK_L, BLOCK_M, SLOTS,
        )  # fmt: skip


def schedule(
    ids: torch.Tensor, num_local_experts: int, block_m: int, *, first_expert: int = 0, out: Schedule | None = None
) -> Schedule:
    """The schedule of this rank's experts, first_expert .. first_expert + num_local_experts - 1.

    Args:
        ids: (T, k) int32, contiguous, as ``route`` gives them.
        block_m: rows of a block of the grouped matmul.
        out: from ``empty_schedule`` with the same sizes; allocated if None.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    require(ids.dim() == 2 and ids.dtype == torch.int32, "ids", "int32 (T, k)", seen(ids))
    require(ids.is_contiguous(), "ids", "contiguous", f"stride {ids.stride()}")
    require(0 <= first_expert < 2**31 - MAX_EXPERTS, "first_expert", "0 or more", first_expert)
    num_tokens, top_k = ids.shape
    sizes = _sizes(num_tokens, top_k, num_local_experts, block_m)
    if out is None:
        out = empty_schedule(num_tokens, top_k, num_local_experts, block_m, ids.device)
    require(out.block_m == block_m, "out", f"block_m = {block_m}", out.block_m)
    for name, size in sizes.items():
        tensor = getattr(out, name)
        fits = tensor.dtype == torch.int32 and tuple(tensor.shape) == (size,) and tensor.is_contiguous()
        require(fits, f"out.{name}", f"int32 ({size},), contiguous", seen(tensor))
        require(tensor.device == ids.device, f"out.{name}", f"device {ids.device}", tensor.device)
    rows, blocks = sizes["row_index"], sizes["block_expert"]
    row_programs = triton.cdiv(rows, CHUNK)
    grid = (row_programs + max(1, triton.cdiv(blocks, SLOTS)),)
    constants = {"NUM_LOCAL": num_local_experts, "BLOCK_L": max(32, triton.next_power_of_2(num_local_experts))}
    tile = {"BLOCK_M": block_m, "CHUNK": CHUNK, "SLOTS": SLOTS}
    results = (out.expert_offsets, out.row_index, out.position, out.block_expert, out.block_start)
    scalars = (rows, blocks, row_programs, first_expert)
    if rows <= ONE_LAUNCH_ROWS:
        _schedule_kernel[grid](ids, *results, *scalars, **constants, **tile, COUNT_TILE=COUNT_TILE, num_warps=4)
        return out
    _count_rows_kernel[(row_programs,)](ids, out.workspace, rows, first_expert, **constants, CHUNK=CHUNK, num_warps=4)
    _sum_chunks_kernel[(triton.cdiv(num_local_experts, EXPERT_TILE),)](
        out.workspace, row_programs, NUM_LOCAL=num_local_experts, CHUNK_TILE=CHUNK_TILE, EXPERT_TILE=EXPERT_TILE,
        num_warps=4,
    )  # fmt: skip
    _place_kernel[grid](ids, out.workspace, *results, *scalars, **constants, **tile, num_warps=4)
    return out
