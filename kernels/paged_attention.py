"""o = softmax(q . K^T) . V over a paged cache: GQA decoding, K and V in BF16, FP8 or FP4.

Math:    s[r, t] = scale q[r] . K[t], capped to soft_cap tanh(s / soft_cap) if asked; o[r] = sum_t p[r, t] V[t] with
         p = exp(s) / (sum_t exp(s) + exp(sink)); lse[r] = log(sum_t exp(s) + exp(sink)). Query token i of q_len of a
         sequence of length L sees tokens t <= L - q_len + i, with a window the last ``window`` of these.
Shapes:  q (B q_len, H, D) BF16, rows of any stride; cache as in ``kv_layout.py``; page_table (B, max_pages) int32;
         sinks (H,) float32 or BF16; o (B q_len, H, D) BF16 (or float32, given); lse (B q_len, H) float32. D 64, 128
         or 256.
Layout:  query heads of a KV head and query tokens share a program: they are the N side of the matrix instruction,
         tokens (for scores) and channels (for outputs) its M side.
Bytes:   B L 2 Hk D bits / 8 + 2 B q_len H D x 2, however large q_len is; flops: 4 B q_len H D L.
Scales:  of fp8 and nvfp4's tensor in the softmax scale and the epilogue; of fp8_row on the scores and on the
         probabilities, a token's on its row. Blocks of FP4 lie along D, so that no row of probabilities has one of V's:
         they ride on the one multiplication that decoding needs anyway.
Accuracy: BF16: that of a BF16 matmul with float32 scores. FP8: E4M3 keys and values are multiplied as they are, by
         queries and probabilities in two E4M3 terms (8 bits: ``attention_parts.py``). FP4: decoded exactly to BF16.
         One sum over tokens per tile, in float32 between tiles. How a sequence is cut changes the last bits (float32
         partial results merged by LSE); in batch-invariant mode the cut depends on the sequence alone, so do the bits.
Edges:   no visible token: o 0, lse -inf (with a sink o 0, lse the sink). Page table entries beyond a length, tokens of
         a page beyond it, pages before a window are never used. NaN in a stored key, or a query that is not finite:
         NaN in the rows that see it, no others; in a stored value: in all rows of its sequence and head (0 x NaN).
Errors:  ``ValueError`` before any launch, naming argument, expected, got. Page ids are not checked (``check_pages``).
Capture: two launches beside the plan's: pieces, and their sums (``attention_plan.py``).
Source:  Dao et al. 2023 (Flash-Decoding), Ye et al. 2025 (FlashInfer), gpt-oss (sinks); the swap of operands follows
         the matmuls here.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .attention_fp4 import FP4_FACTORS, attend_fp4_tile, channel_order, token_order
from .attention_parts import (
    LOG2_E,
    cap_scores,
    dot_terms,
    full_tiles,
    is_visible,
    load_pages,
    place_in_page,
    probability_operands,
    query_operands,
    softmax_step,
)  # fmt: skip
from .attention_plan import (
    PROGRAM_FIELDS,
    SEQUENCE_FIELDS,
    AttentionPlan,
    Parts,
    check_plan,
    combine_parts,
    empty_parts,
    finish,
    num_plan_programs,
    plan_attention,
)  # fmt: skip
from .attention_points import register_options
from .checks import require, seen
from .kv_cache import KvCache
from .split_k import arch_of
from .tiles import PARTED_ARCHS, Tile, find_tile

_MXFP4_FACTOR, _NVFP4_FACTOR = tl.constexpr(FP4_FACTORS["mxfp4"]), tl.constexpr(FP4_FACTORS["nvfp4"])


@triton.jit
def attend_tile(
    q, q_low, factor, m, total, acc, pages, codes_ptr, tile, length, ends, soft_cap, window,
    IS_MASKED: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, IS_JOINED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(m, total, acc) after one more tile."""
    IS_FP8: tl.constexpr = FORMAT != "bf16"
    HAS_ROWS: tl.constexpr = FORMAT == "fp8_row"
    PAGE_CODES: tl.constexpr = PAGE * HEAD_DIM
    RECORD: tl.constexpr = 2 * PAGE_CODES + (8 * PAGE if HAS_ROWS else 0)  # in codes
    offs_d = tl.arange(0, HEAD_DIM)
    offs_n = tl.arange(0, BLOCK_N)
    place = place_in_page(tile, offs_n, PAGE, BLOCK_N)
    tokens = tile * BLOCK_N + offs_n
    record = (pages.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * RECORD
    if BLOCK_N > PAGE:
        k_ptrs = codes_ptr + (record + place * HEAD_DIM)[:, None] + offs_d[None, :]
        v_ptrs = codes_ptr + (record + PAGE_CODES + place)[None, :] + offs_d[:, None] * PAGE
    else:
        k_ptrs = codes_ptr + record + place[:, None] * HEAD_DIM + offs_d[None, :]
        v_ptrs = codes_ptr + record + PAGE_CODES + place[None, :] + offs_d[:, None] * PAGE
    k = tl.load(k_ptrs)
    q, q_low = tl.trans(q), tl.trans(q_low)
    s = dot_terms(k, q, q_low, IS_JOINED, BLOCK_N, BLOCK_R) if IS_FP8 else tl.dot(k, q)
    s = s * factor[None, :]
    v_scale, greatest = 1.0, 1.0
    if HAS_ROWS:
        scale_ptrs = codes_ptr.to(tl.pointer_type(tl.float32)) + (record + 2 * PAGE_CODES) // 4 + place
        k_scale = tl.load(scale_ptrs, mask=tokens < length, other=0.0)
        v_scale = tl.load(scale_ptrs + PAGE, mask=tokens < length, other=0.0)
        greatest = tl.max(v_scale, axis=0)
        s = s * k_scale[:, None]
    if soft_cap is not None:
        s = cap_scores(s, soft_cap)
    if IS_MASKED:
        s = tl.where(is_visible(tokens, ends, window), s, float("-inf"))
    p, alpha, m, total = softmax_step(s, m, total, 8.0 if IS_FP8 else 0.0, IS_MASKED)
    v = tl.load(v_ptrs)
    if IS_MASKED:  # not in the load, whose 16 bytes at a time hold as many tokens
        v = tl.where((tokens < length)[None, :], v, tl.zeros_like(v))
    if not IS_FP8:
        acc = tl.dot(v, p.to(tl.bfloat16), acc * alpha[None, :])
    else:
        if HAS_ROWS:
            p = p * tl.div_rn(v_scale, greatest)[:, None]
        high, low = probability_operands(p, IS_JOINED, BLOCK_N, BLOCK_R)
        o = dot_terms(v, high, low, IS_JOINED, HEAD_DIM, BLOCK_R)
        if HAS_ROWS:
            o = o * greatest
        acc = acc * alpha[None, :] + o
    return m, total, acc


@triton.jit
def _paged_attention_kernel(
    q_ptr, codes_ptr, factors_ptr, table_ptr, plan_ptr, sinks_ptr, out_ptr, lse_ptr, parts_ptr,
    parts_lse_ptr, stride_qt, stride_table, q_len, scale, soft_cap, window, split_tiles,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    IS_JOINED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One range of the plan, for one KV head and BLOCK_R of its query rows."""
    program, kv_head, first_row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_R
    IS_FP4: tl.constexpr = FORMAT == "mxfp4" or FORMAT == "nvfp4"
    IS_FP8: tl.constexpr = FORMAT != "bf16" and not IS_FP4
    DECODED: tl.constexpr = _MXFP4_FACTOR if FORMAT == "mxfp4" else (_NVFP4_FACTOR if FORMAT == "nvfp4" else 1.0)
    offs_d = tl.arange(0, HEAD_DIM)
    channels, order, offs_w = offs_d, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N // 4)
    if IS_FP4:
        channels, order = channel_order(HEAD_DIM), token_order(BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_R)
    loaded = first_row + tl.arange(0, 2 * BLOCK_R) % BLOCK_R if IS_FP8 and IS_JOINED else rows  # twice: two terms
    num_heads = tl.num_programs(1) * GROUP
    k_factor, v_factor = tl.load(factors_ptr) * DECODED, tl.load(factors_ptr + 1) * DECODED
    range_ptr = plan_ptr + program * PROGRAM_FIELDS
    first_seq, first_tile = tl.load(range_ptr), tl.load(range_ptr + 1)
    last_seq, last_tile = tl.load(range_ptr + 2), tl.load(range_ptr + 3)
    for index in range(0, last_seq + 1 - first_seq):
        seq = first_seq + index
        sequence_ptr = plan_ptr + tl.num_programs(0) * PROGRAM_FIELDS + seq * SEQUENCE_FIELDS
        length, skipped, tiles = tl.load(sequence_ptr), tl.load(sequence_ptr + 1), tl.load(sequence_ptr + 2)
        first_part, pieces = tl.load(sequence_ptr + 3), tl.load(sequence_ptr + 4)
        words = tl.cdiv(length, 4)  # of 4 tokens
        begin = tl.where(seq == first_seq, first_tile, 0)
        end = tl.where(seq == last_seq, last_tile, tiles)
        pages_ptr = table_ptr + seq.to(tl.int64) * stride_table
        q_rows = (seq * q_len + loaded // GROUP).to(tl.int64)
        q_ptrs = q_ptr + q_rows[:, None] * stride_qt + (kv_head * GROUP + loaded % GROUP)[:, None] * HEAD_DIM
        q = tl.load(q_ptrs + channels[None, :], mask=(loaded < GROUP * q_len)[:, None], other=0.0)
        operand, low_operand, factor = query_operands(q, IS_FP8, IS_JOINED, BLOCK_R)
        factor = factor * (scale * LOG2_E * k_factor)
        ends = length + rows * 0
        if IS_CAUSAL:
            ends = length - q_len + 1 + rows // GROUP
        least_end = length - q_len + 1 if IS_CAUSAL else length
        step = tl.where(split_tiles > 0, split_tiles, tl.maximum(end - begin, 1))
        for piece in range(0, tl.cdiv(end - begin, step)):
            opening = begin + piece * step
            closing = tl.minimum(end, opening + step)
            m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
            acc = tl.zeros((HEAD_DIM, BLOCK_R), tl.float32)
            start, stop = skipped + opening, skipped + closing
            whole, end_whole = full_tiles(start, stop, least_end, length, window, BLOCK_N)
            pages = load_pages(pages_ptr, whole, order, length, PAGE, BLOCK_N)
            word_pages = load_pages(pages_ptr, whole, offs_w, words, PAGE // 4, BLOCK_N // 4)
            for tile in range(whole, end_whole):
                upcoming = load_pages(pages_ptr, tile + 1, order, length, PAGE, BLOCK_N)
                upcoming_words = load_pages(pages_ptr, tile + 1, offs_w, words, PAGE // 4, BLOCK_N // 4)
                if IS_FP4:
                    m, total, acc = attend_fp4_tile(
                        operand, factor, m, total, acc, pages, word_pages, codes_ptr, tile, length, ends,
                        soft_cap, window, False, FORMAT, HEAD_DIM, PAGE, BLOCK_N, BLOCK_R,
                    )  # fmt: skip
                else:
                    m, total, acc = attend_tile(
                        operand, low_operand, factor, m, total, acc, pages, codes_ptr, tile, length, ends,
                        soft_cap, window, False, FORMAT, HEAD_DIM, PAGE, IS_JOINED, BLOCK_N, BLOCK_R,
                    )  # fmt: skip
                pages, word_pages = upcoming, upcoming_words
            before = whole - start  # tiles that the window cuts
            for other in tl.range(0, before + stop - end_whole, num_stages=1):
                tile = tl.where(other < before, start + other, end_whole + other - before)
                pages = load_pages(pages_ptr, tile, order, length, PAGE, BLOCK_N)
                word_pages = load_pages(pages_ptr, tile, offs_w, words, PAGE // 4, BLOCK_N // 4)
                if IS_FP4:
                    m, total, acc = attend_fp4_tile(
                        operand, factor, m, total, acc, pages, word_pages, codes_ptr, tile, length, ends,
                        soft_cap, window, True, FORMAT, HEAD_DIM, PAGE, BLOCK_N, BLOCK_R,
                    )  # fmt: skip
                else:
                    m, total, acc = attend_tile(
                        operand, low_operand, factor, m, total, acc, pages, codes_ptr, tile, length, ends,
                        soft_cap, window, True, FORMAT, HEAD_DIM, PAGE, IS_JOINED, BLOCK_N, BLOCK_R,
                    )  # fmt: skip
            mass = tl.sum(total, axis=0)
            lse = tl.where(mass == 0, float("-inf"), m + tl.log2(mass) - (8.0 if IS_FP8 else 0.0))
            o = acc * tl.where(mass == 0, 0.0, v_factor / mass)[None, :]
            # + 0, which the compiler cannot know: else it works these out first and holds them through the loops
            late = rows + tl.minimum(length, 0)
            mask_r, token, heads = late < GROUP * q_len, late // GROUP, kv_head * GROUP + late % GROUP
            if pieces == 1:
                sink = tl.full((BLOCK_R,), float("-inf"), tl.float32)
                if sinks_ptr is not None:
                    sink = tl.load(sinks_ptr + heads, mask=mask_r, other=0.0).to(tl.float32) * LOG2_E
                weight, with_sink = finish(lse, sink)
                place = (seq * q_len + token).to(tl.int64) * num_heads + heads
                tl.store(lse_ptr + place, with_sink, mask=mask_r)
                result = (o * weight[None, :]).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + place[None, :] * HEAD_DIM + offs_d[:, None], result, mask=mask_r[None, :])
            else:
                part = tl.where(split_tiles > 0, first_part + opening // step, program + seq)
                place = (part.to(tl.int64) * q_len + token) * num_heads + heads
                tl.store(parts_lse_ptr + place, lse, mask=mask_r)
                tl.store(parts_ptr + place[None, :] * HEAD_DIM + offs_d[:, None], o, mask=mask_r[None, :])


def choose_attention_tile(head_dim: int, format: str, rows: int, arch: str, **sizes: int) -> Tile:
    """That of ``find_tile``: block_m query rows and block_n tokens per program, for ``rows`` query rows per KV head.

    ``sizes``: batch, kv_heads, window (0 without) and max_tokens, what the page table has room for.
    """
    return find_tile(f"attention_d{head_dim}", format, arch, rows, **sizes)


def check_queries(q: torch.Tensor, batch: int, q_len: int, head_dim: int, device: torch.device) -> None:
    good = q.dim() == 3 and q.dtype == torch.bfloat16 and q.shape[0] == batch * q_len and q.shape[2] == head_dim
    require(good, "q", f"bfloat16 ({batch * q_len}, H, {head_dim})", seen(q))
    require(q.stride(2) == 1 and (q.stride(1) == head_dim or q.shape[1] == 1), "q", "heads one behind the other",
            f"strides {q.stride()}")  # fmt: skip
    require(q.device == device, "q", f"device {device}", q.device)


def check_outputs(
    q: torch.Tensor, width: int, out: torch.Tensor | None, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), given ones that fit or new ones."""
    shape, device = (q.shape[0], q.shape[1], width), q.device
    out = torch.empty(shape, dtype=q.dtype, device=device) if out is None else out
    good = tuple(out.shape) == shape and out.dtype in (torch.bfloat16, torch.float32) and out.is_contiguous()
    require(good and out.device == device, "out", f"contiguous bfloat16 or float32 {shape} on {device}",
            f"{seen(out)} on {out.device}")  # fmt: skip
    lse = torch.empty(shape[:2], dtype=torch.float32, device=device) if lse is None else lse
    good = tuple(lse.shape) == shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous() and lse.device == device
    require(good, "lse", f"contiguous float32 {shape[:2]} on {device}", f"{seen(lse)} on {lse.device}")
    return out, lse


def check_parts(parts: Parts | None, plan: AttentionPlan, num_heads: int, width: int) -> Parts:
    """Given parts that are large enough, or new ones."""
    if parts is None:
        return empty_parts(plan, num_heads, width)
    count = plan.num_parts * plan.q_len * num_heads
    good = parts.o.numel() >= count * width and parts.lse.numel() >= count
    require(good, "parts", f"at least {count} x {width} values", f"{seen(parts.o)}, {seen(parts.lse)}")
    return parts


def check_table(page_table: torch.Tensor, batch: int, device: torch.device) -> None:
    good = page_table.dim() == 2 and page_table.dtype == torch.int32 and page_table.shape[0] == batch
    require(good and page_table.stride(1) == 1, "page_table", f"int32 ({batch}, max_pages), rows contiguous",
            seen(page_table))  # fmt: skip
    require(page_table.device == device, "page_table", f"device {device}", page_table.device)


_CODES = {"bf16": torch.bfloat16, "mxfp4": torch.int32, "nvfp4": torch.int32}


def paged_attention(
    q: torch.Tensor, cache: KvCache, page_table: torch.Tensor, lengths: torch.Tensor, *, q_len: int = 1,
    scale: float | None = None, window: int | None = None, soft_cap: float | None = None,
    sinks: torch.Tensor | None = None, split_tokens: int | None = None, is_causal: bool = True,
    plan: AttentionPlan | None = None, tile: Tile | None = None, parts: Parts | None = None,
    out: torch.Tensor | None = None, lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o, lse) of ``q_len`` query tokens of each sequence over its cached tokens, themselves among them.

    Args:
        q: (B q_len, H, D) BF16, H a multiple of the cache's heads.
        lengths: (B,) int32, on the device; not read if ``plan`` is given.
        scale: of scores; None: 1 / sqrt(D).
        window: keys that a query sees, itself among them. soft_cap: see the module; natural units.
        split_tokens: batch-invariant mode, see ``plan_attention``; a multiple of the tile's block_n.
        is_causal: False lets every query see all tokens of its sequence, as over a prefix.
        plan: of ``plan_attention`` for these lengths, q_len, window and tile, to share between layers.
        tile: by default that of ``tiles.py``. parts: room for partial results, see ``empty_parts``.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    layout, device, batch = cache.layout, cache.pages.device, page_table.shape[0]
    check_table(page_table, batch, device)
    check_queries(q, batch, q_len, layout.head_dim, device)
    heads, kv_heads = q.shape[1], cache.num_kv_heads
    require(heads % kv_heads == 0 and heads > 0, "q", f"a multiple of {kv_heads} heads", heads)
    scale = 1 / math.sqrt(layout.head_dim) if scale is None else scale
    require(0 < scale < math.inf, "scale", "a positive number", scale)
    require(soft_cap is None or 0 < soft_cap < math.inf, "soft_cap", "None or a positive number", soft_cap)
    require(is_causal or window is None, "window", "None without causal order", window)
    if sinks is not None:
        good = tuple(sinks.shape) == (heads,) and sinks.dtype in (torch.float32, torch.bfloat16)
        require(good and sinks.is_contiguous(), "sinks", f"float32 or bfloat16 ({heads},)", seen(sinks))
        require(sinks.device == device, "sinks", f"device {device}", sinks.device)
    group = heads // kv_heads
    tile = tile or choose_attention_tile(
        layout.head_dim, layout.format, group * q_len, arch_of(device), batch=batch, kv_heads=kv_heads,
        window=window or 0, max_tokens=page_table.shape[1] * layout.page_size,
    )  # fmt: skip
    row_blocks = triton.cdiv(group * q_len, tile.block_m)
    if plan is None:
        require(lengths.device == device, "lengths", f"device {device}", lengths.device)
        require(lengths.shape == (batch,), "lengths", f"int32 ({batch},)", seen(lengths))
        programs = num_plan_programs(kv_heads * row_blocks, device, tile.num_warps)
        plan = plan_attention(
            lengths, programs, tile.block_n, q_len=q_len, window=window, split_tokens=split_tokens,
            max_length=page_table.shape[1] * layout.page_size if split_tokens else None,
        )  # fmt: skip
    check_plan(plan, batch, tile.block_n, q_len, window, split_tokens)
    out, lse = check_outputs(q, layout.head_dim, out, lse)
    parts = check_parts(parts, plan, heads, layout.head_dim)
    _paged_attention_kernel[(plan.num_programs, kv_heads, row_blocks)](
        q, cache.pages.view(_CODES.get(layout.format, torch.float8_e4m3fn)), cache.factors, page_table, plan.table,
        sinks, out, lse, parts.o, parts.lse, q.stride(0), page_table.stride(0), q_len, scale, soft_cap,
        window, plan.split_tiles,
        FORMAT=layout.format, HEAD_DIM=layout.head_dim, GROUP=group, PAGE=layout.page_size, IS_CAUSAL=is_causal,
        IS_JOINED=arch_of(device) not in PARTED_ARCHS, BLOCK_N=tile.block_n, BLOCK_R=tile.block_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **register_options(tile.num_warps),
    )  # fmt: skip
    combine_parts(parts, plan, out, lse, sinks)
    return out, lse
