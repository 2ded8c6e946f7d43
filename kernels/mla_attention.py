"""o = softmax(q . C^T) . C over a paged latent cache: MLA decoding in absorbed form, the cache in BF16 or FP8.

Math:    s[r, t] = scale (q[r, :kv_lora_rank] . latent[t] + q[r, kv_lora_rank:] . rope[t]); p = softmax of s over t;
         o[r] = sum_t p[r, t] latent[t]; lse[r] = log(sum_t exp(s[r, t])). Query token i of q_len of a sequence of
         length L sees tokens t <= L - q_len + i.
Shapes:  q (B q_len, H, kv_lora_rank + rope_dim) BF16: the query absorbed into the latent's basis, its rotated part
         behind it; contiguous. cache as in ``kv_layout.py``; page_table (B, max_pages) int32;
         o (B q_len, H, kv_lora_rank) BF16; lse (B q_len, H) float32, natural.
Layout:  heads and query tokens are the rows (M side) of both products, since they share one latent. A tile of tokens
         lies in shared memory once and serves both: as keys, and, read across, as values.
Bytes:   B L (kv_lora_rank + rope_dim) bits / 8 + B q_len H (2 kv_lora_rank + rope_dim) x 2, however large q_len is;
         flops: 2 B q_len H L (2 kv_lora_rank + rope_dim).
Scales:  of fp8 in the softmax scale and the epilogue; of fp8_row, a token's on its scores and its probabilities, which
         are kept relative to the largest scale so far.
Accuracy: BF16: that of a BF16 matmul with float32 scores. FP8: tokens become FP16, exactly; queries too, each row times
         a power of two (exact down to 2^-22 of its largest value); probabilities have FP16's 11 bits. Hopper's FP8
         instruction would want values along tokens for the second product, and FP16 runs both at one rate.
         Sums in float32. How a sequence is cut changes the last bits; in batch-invariant mode (``split_tokens``) the
         cut depends on the sequence alone, so do the bits.
Edges:   no visible token: o 0, lse -inf. Page table entries beyond a length, tokens of a page beyond it are never used.
         NaN in a stored token: NaN in all rows of its sequence; a query that is not finite: in its row.
Errors:  ``ValueError`` before any launch, naming argument, expected, got. Page ids are not checked (``check_pages``).
Capture: two launches beside the plan's: pieces, and their sums (``attention_plan.py``).
Source:  DeepSeek-V2 (absorption); FlashMLA (64 rows, tokens in shared memory once, two warpgroups share the output's
         channels); Dao et al. 2023 (Flash-Decoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_parts import LOG2_E, load_pages, place_in_page
from .attention_plan import (
    PROGRAM_FIELDS,
    SEQUENCE_FIELDS,
    AttentionPlan,
    Parts,
    check_plan,
    combine_parts,
    num_plan_programs,
    plan_attention,
)  # fmt: skip
from .checks import require, seen
from .kv_cache import MlaCache
from .mla_points import computed_in_branch
from .paged_attention import check_outputs, check_parts, check_table
from .split_k import arch_of
from .tiles import Tile, find_tile

_P_SHIFT = tl.constexpr(8.0)
"""FP16 probabilities are up to 2^8 (2^9 with scales), so that 2^-22 of the largest still is a normal number."""

_LEAST_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def _load_queries(
    q_ptr, start, mask, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(chunks of the absorbed part, rotated part, what their scores are to be multiplied by) of rows from ``start``."""
    mask = mask[:, None]
    q_ptrs = q_ptr + (start + tl.arange(0, BLOCK_R))[:, None] * (RANK + ROPE)
    q_rope = tl.load(q_ptrs + RANK + tl.arange(0, ROPE)[None, :], mask=mask, other=0.0)
    q = ()
    for chunk in tl.static_range(RANK // WIDTH):
        each = tl.load(q_ptrs + chunk * WIDTH + tl.arange(0, WIDTH)[None, :], mask=mask, other=0.0)
        q = q + (each,)  # noqa: RUF005
    factor = tl.full((BLOCK_R,), 1.0, tl.float32)
    if FORMAT != "bf16":
        bits = tl.max(q_rope.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        for chunk in tl.static_range(RANK // WIDTH):
            each = q[chunk].to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            bits = tl.maximum(bits, tl.max(each, axis=1))
        exponent = tl.maximum(bits >> 23, 8)
        up = ((261 - exponent) << 23).to(tl.float32, bitcast=True)  # to below 256
        down = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
        factor = tl.where(bits >= 0x7F800000, float("nan"), down)
        q_rope = (q_rope.to(tl.float32) * up[:, None]).to(tl.float16)
        scaled = ()
        for chunk in tl.static_range(RANK // WIDTH):
            scaled = scaled + ((q[chunk].to(tl.float32) * up[:, None]).to(tl.float16),)  # noqa: RUF005
        q = scaled
    return q, q_rope, factor


@triton.jit
def _offsets(tile, length, BLOCK_N: tl.constexpr):
    """Tokens of a tile from its first; past the length the last again: its probability is 0, a page's rest NaN."""
    return tl.minimum(tl.arange(0, BLOCK_N), length - 1 - tile * BLOCK_N)


@triton.jit
def _softmax_step(s, row_scale, m, total, greatest, FORMAT: tl.constexpr):
    """(probabilities as operand, scale of what was before, max, total, greatest scale) after a tile of scores."""
    SHIFT: tl.constexpr = 0.0 if FORMAT == "bf16" else _P_SHIFT
    if FORMAT == "fp8_row":
        s = s * row_scale[None, :]
    new = tl.maximum(m, tl.max(s, axis=1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # of rows that have seen nothing yet
    alpha = tl.exp2(m - safe)
    p = tl.exp2(s - (safe - SHIFT)[:, None])
    total = total * alpha + tl.sum(p, axis=1)
    if FORMAT == "fp8_row":  # relative to a power of two, so that nothing is rounded
        most = tl.maximum(greatest, tl.max(row_scale, axis=0))
        bits = most.to(tl.int32, bitcast=True) & 0x7F800000
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        most = bits.to(tl.float32, bitcast=True)
        p = p * (row_scale * inverse)[None, :]
        alpha = alpha * (greatest * inverse)
        greatest = most
    return p.to(tl.bfloat16 if FORMAT == "bf16" else tl.float16), alpha, new, total, greatest


@triton.jit
def _attend_tile(
    q, q_rope, factor, m, total, greatest, acc, pages, codes_ptr, scales_ptr, tile, length, ends,
    FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr, IN_BRANCH: tl.constexpr,
):  # fmt: skip
    """(m, total, greatest, acc) after one more tile."""
    HAS_ROWS: tl.constexpr = FORMAT == "fp8_row"
    CODES: tl.constexpr = PAGE * (RANK + ROPE)
    RECORD: tl.constexpr = CODES + (4 * PAGE if HAS_ROWS else 0)  # in codes
    CHUNKS: tl.constexpr = RANK // WIDTH
    tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    place = place_in_page(tile, _offsets(tile, length, BLOCK_N), PAGE, BLOCK_N)
    record = pages.to(tl.int64) * RECORD
    latent_offs = (place * RANK)[:, None] + tl.arange(0, WIDTH)[None, :]
    rope_offs = (place * ROPE)[:, None] + tl.arange(0, ROPE)[None, :]
    if BLOCK_N > PAGE:
        latent_ptrs = codes_ptr + record[:, None] + latent_offs
        rope_ptrs = codes_ptr + (record + PAGE * RANK)[:, None] + rope_offs
    else:
        latent_ptrs = codes_ptr + record + latent_offs
        rope_ptrs = codes_ptr + record + PAGE * RANK + rope_offs
    c = ()
    for chunk in tl.static_range(CHUNKS):
        each = tl.load(latent_ptrs + chunk * WIDTH)
        c = c + (each if FORMAT == "bf16" else each.to(tl.float16),)  # noqa: RUF005
    rope = tl.load(rope_ptrs)
    if FORMAT != "bf16":
        rope = rope.to(tl.float16)
    row_scale = 1.0
    if HAS_ROWS:
        row_scale = tl.load(scales_ptr + (record + CODES) // 4 + place)
    # A product whose result reaches another product is computed by every group of four warps where these stand side by
    # side, whole. Inside a branch the compiler does not see that far: each group takes half the tokens. The branch is
    # always taken, and its other side is no constant, which would be kept in shared memory.
    if not IN_BRANCH or tile * BLOCK_N < length:
        if not IN_BRANCH:
            s = tl.dot(q_rope, tl.trans(rope))
            for chunk in tl.static_range(CHUNKS):
                s = tl.dot(q[chunk], tl.trans(c[chunk]), s)
            s = s * factor[:, None]
        else:  # scaled before they are added, or they would be one chain of products
            s = tl.dot(q_rope, tl.trans(rope)) * factor[:, None]
            for chunk in tl.static_range(CHUNKS):
                s += tl.dot(q[chunk], tl.trans(c[chunk])) * factor[:, None]
        s = tl.where(tokens[None, :] < ends[:, None], s, float("-inf"))
        p, alpha, m, total, greatest = _softmax_step(s, row_scale, m, total, greatest, FORMAT)
    else:
        p = tl.full((BLOCK_R, BLOCK_N), length * 0.0, tl.float32).to(tl.bfloat16 if FORMAT == "bf16" else tl.float16)
        alpha = tl.full((BLOCK_R,), 1.0, tl.float32)
    sums = ()
    for chunk in tl.static_range(CHUNKS):
        sums = sums + (tl.dot(p, c[chunk], acc[chunk] * alpha[:, None]),)  # noqa: RUF005
    return m, total, greatest, sums


@triton.jit
def _mla_attention_kernel(
    q_ptr, codes_ptr, scales_ptr, factors_ptr, table_ptr, plan_ptr, out_ptr, lse_ptr, parts_ptr, parts_lse_ptr,
    stride_table, q_len, scale, split_tiles,
    FORMAT: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr, IN_BRANCH: tl.constexpr,
):  # fmt: skip
    """One range of the plan, for BLOCK_R query rows; WIDTH channels of the latent per load and product."""
    program, first_row = tl.program_id(0), tl.program_id(1) * BLOCK_R
    CHUNKS: tl.constexpr = RANK // WIDTH
    SHIFT: tl.constexpr = 0.0 if FORMAT == "bf16" else _P_SHIFT
    rows = first_row + tl.arange(0, BLOCK_R)
    all_rows = HEADS * q_len
    range_ptr = plan_ptr + program * PROGRAM_FIELDS
    first_seq, last_seq = tl.load(range_ptr), tl.load(range_ptr + 2)
    for index in range(0, last_seq + 1 - first_seq):
        seq = first_seq + index
        sequence_ptr = plan_ptr + tl.num_programs(0) * PROGRAM_FIELDS + seq * SEQUENCE_FIELDS
        length, tiles = tl.load(sequence_ptr), tl.load(sequence_ptr + 2)
        begin = tl.where(seq == first_seq, tl.load(range_ptr + 1), 0)
        end = tl.where(seq == last_seq, tl.load(range_ptr + 3), tiles)
        pages_ptr = table_ptr + seq.to(tl.int64) * stride_table
        start = seq.to(tl.int64) * all_rows + first_row
        q, q_rope, factor = _load_queries(q_ptr, start, rows < all_rows, FORMAT, RANK, ROPE, WIDTH, BLOCK_R)
        factor = factor * (scale * LOG2_E)
        if FORMAT == "fp8":
            factor = factor * tl.load(factors_ptr)
        ends = length + rows * 0
        if IS_CAUSAL and q_len > 1:
            ends = length - q_len + 1 + rows // HEADS
        step = tl.where(split_tiles > 0, split_tiles, tl.maximum(end - begin, 1))
        for piece in range(0, tl.cdiv(end - begin, step)):
            opening = begin + piece * step
            closing = tl.minimum(end, opening + step)
            m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_R,), tl.float32)
            greatest = _LEAST_SCALE
            acc = ()
            for _chunk in tl.static_range(CHUNKS):
                acc = acc + (tl.zeros((BLOCK_R, WIDTH), tl.float32),)  # noqa: RUF005
            pages = load_pages(pages_ptr, opening, _offsets(opening, length, BLOCK_N), length, PAGE, BLOCK_N)
            for tile in range(opening, closing):
                offs_n = _offsets(tile + 1, length, BLOCK_N)
                upcoming = load_pages(pages_ptr, tile + 1, offs_n, length, PAGE, BLOCK_N)
                m, total, greatest, acc = _attend_tile(
                    q, q_rope, factor, m, total, greatest, acc, pages, codes_ptr, scales_ptr, tile, length, ends,
                    FORMAT, RANK, ROPE, PAGE, BLOCK_N, BLOCK_R, WIDTH, IN_BRANCH,
                )  # fmt: skip
                pages = upcoming
            has_seen = total != 0
            lse = tl.where(has_seen, m + tl.log2(total) - SHIFT, float("-inf"))
            unit = greatest if FORMAT == "fp8_row" else tl.load(factors_ptr)  # that is one in BF16
            unit = tl.where(has_seen, tl.div_rn(unit, total), 0.0)
            # addresses from what is read only now: otherwise they would be found before the loop, and kept through it
            first_part, pieces = tl.load(sequence_ptr + 3), tl.load(sequence_ptr + 4)
            part = tl.where(split_tiles > 0, first_part + opening // step, program + seq)
            target = tl.where(pieces == 1, seq, part).to(tl.int64)
            place = target * all_rows + first_row + tl.arange(0, BLOCK_R)
            mask_r = place < (target + 1) * all_rows
            columns = tl.arange(0, WIDTH)[None, :]
            if pieces == 1:
                tl.store(lse_ptr + place, lse * 0.6931471805599453, mask=mask_r)
                for chunk in tl.static_range(CHUNKS):
                    whole = (acc[chunk] * unit[:, None]).to(out_ptr.dtype.element_ty)
                    tl.store(out_ptr + place[:, None] * RANK + chunk * WIDTH + columns, whole, mask=mask_r[:, None])
            else:
                tl.store(parts_lse_ptr + place, lse, mask=mask_r)
                for chunk in tl.static_range(CHUNKS):
                    o = acc[chunk] * unit[:, None]
                    tl.store(parts_ptr + place[:, None] * RANK + chunk * WIDTH + columns, o, mask=mask_r[:, None])


def choose_mla_tile(format: str, rows: int, arch: str, **sizes: int) -> Tile:
    """That of ``find_tile``: block_m query rows, block_n tokens and block_k channels per load, for ``rows`` in all.

    ``sizes``: batch, and max_tokens, what the page table has room for.
    """
    return find_tile("mla_attention", format, arch, rows, **sizes)


def mla_attention(
    q: torch.Tensor, cache: MlaCache, page_table: torch.Tensor, lengths: torch.Tensor, *, q_len: int = 1,
    scale: float, split_tokens: int | None = None, is_causal: bool = True, plan: AttentionPlan | None = None,
    tile: Tile | None = None, parts: Parts | None = None, out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o, lse) of ``q_len`` query tokens of each sequence over its cached tokens, themselves among them.

    Args:
        q: (B q_len, H, kv_lora_rank + rope_dim) BF16, contiguous, H at least 1: absorbed part, then rotated part.
        page_table: (B, max_pages) int32. lengths: (B,) int32, on the device; not read if ``plan`` is given.
        scale: of scores. DeepSeek's: (nope_dim + rope_dim)^-0.5, times YaRN's factor where the context is stretched.
        split_tokens: batch-invariant mode, see ``plan_attention``; a multiple of the tile's block_n.
        is_causal: False lets every query see all tokens of its sequence, as over a prefix.
        plan: of ``plan_attention`` for these lengths, q_len and tile, to share between layers.
        tile: by default that of ``tiles.py``. parts: room for partial results, see ``empty_parts``.
        out: (B q_len, H, kv_lora_rank) BF16. lse: (B q_len, H) float32. Allocated if None.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    layout, device, batch = cache.layout, cache.pages.device, page_table.shape[0]
    rank, width = layout.kv_lora_rank, layout.kv_lora_rank + layout.rope_dim
    check_table(page_table, batch, device)
    require(q_len >= 1, "q_len", "at least 1", q_len)
    good = q.dim() == 3 and q.dtype == torch.bfloat16 and q.shape[0] == batch * q_len and q.shape[2] == width
    require(good and q.shape[1] > 0, "q", f"bfloat16 ({batch * q_len}, H, {width})", seen(q))
    require(q.is_contiguous(), "q", "contiguous", f"strides {q.stride()}")
    require(q.device == device, "q", f"device {device}", q.device)
    require(0 < scale < float("inf"), "scale", "a positive number", scale)
    heads = q.shape[1]
    tile = tile or choose_mla_tile(
        layout.format, heads * q_len, arch_of(device), batch=batch, max_tokens=page_table.shape[1] * layout.page_size
    )
    row_blocks = triton.cdiv(heads * q_len, tile.block_m)
    if plan is None:
        good = lengths.shape == (batch,) and lengths.dtype == torch.int32 and lengths.device == device
        require(good, "lengths", f"int32 ({batch},) on {device}", f"{seen(lengths)} on {lengths.device}")
        plan = plan_attention(
            lengths, num_plan_programs(row_blocks, device, tile.num_warps), tile.block_n, q_len=q_len,
            split_tokens=split_tokens, max_length=page_table.shape[1] * layout.page_size if split_tokens else None,
        )  # fmt: skip
    check_plan(plan, batch, tile.block_n, q_len, None, split_tokens)
    out, lse = check_outputs(q, rank, out, lse)
    parts = check_parts(parts, plan, heads, rank)
    codes = torch.bfloat16 if layout.format == "bf16" else torch.float8_e4m3fn
    _mla_attention_kernel[(plan.num_programs, row_blocks)](
        q, cache.pages.view(codes), cache.pages.view(torch.float32), cache.factors, page_table, plan.table, out, lse,
        parts.o, parts.lse, page_table.stride(0), q_len, scale, plan.split_tiles,
        FORMAT=layout.format, HEADS=heads, RANK=rank, ROPE=layout.rope_dim, PAGE=layout.page_size,
        IS_CAUSAL=is_causal, BLOCK_N=tile.block_n, BLOCK_R=tile.block_m, WIDTH=min(tile.block_k, rank),
        IN_BRANCH=computed_in_branch(tile.block_m, arch_of(device)),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    combine_parts(parts, plan, out, lse, None)
    return out, lse
