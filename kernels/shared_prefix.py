"""Attention over a prefix that all sequences share (cascade): one pass over it for all, one per sequence over the rest.

Math:    o = (2^lse_1 o_1 + 2^lse_2 o_2) / (2^lse_1 + 2^lse_2), lse = log of the denominator, of the prefix's pass and
         the others'. The first has B q_len query tokens of one "sequence", the prefix, all of which they see: its keys
         are read once per block of query rows, not once per sequence.
Shapes:  as ``paged_attention``; both passes leave float32, rounded to BF16 once.
Edges:   a prefix, or a rest, of length 0 changes nothing. Sinks count once, with the rest.
Source:  Ye et al. 2024 (cascade inference, FlashInfer); Juravsky et al. 2024 (Hydragen).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_plan import AttentionPlan
from .checks import require, seen
from .kv_cache import KvCache
from .paged_attention import check_outputs, check_table, paged_attention


@triton.jit
def _merge_kernel(
    o_1_ptr, lse_1_ptr, o_2_ptr, lse_2_ptr, out_ptr, lse_ptr, num_rows, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of HEAD_DIM: one head of one token."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    lse_1 = tl.load(lse_1_ptr + rows, mask=mask, other=0.0)
    lse_2 = tl.load(lse_2_ptr + rows, mask=mask, other=0.0)
    top = tl.maximum(lse_1, lse_2)
    top = tl.where(top == float("-inf"), 0.0, top)
    w_1, w_2 = tl.exp(lse_1 - top), tl.exp(lse_2 - top)
    total = w_1 + w_2
    tl.store(lse_ptr + rows, top + tl.log(total), mask=mask)
    share = tl.where(total == 0, 0.0, 1.0 / total)
    offs = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    o_1 = tl.load(o_1_ptr + offs, mask=mask[:, None], other=0.0)
    o_2 = tl.load(o_2_ptr + offs, mask=mask[:, None], other=0.0)
    o = o_1 * (w_1 * share)[:, None] + o_2 * (w_2 * share)[:, None]
    tl.store(out_ptr + offs, o.to(out_ptr.dtype.element_ty), mask=mask[:, None])


def merge_attention(
    o_1: torch.Tensor, lse_1: torch.Tensor, o_2: torch.Tensor, lse_2: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """``out`` (T, H, D) and ``lse`` (T, H), natural, of two disjoint sets of keys: float32 parts of these shapes."""
    rows, width = lse.numel(), out.shape[2]
    block = max(1, 512 // width)
    _merge_kernel[(triton.cdiv(rows, block),)](
        o_1, lse_1, o_2, lse_2, out, lse, rows, HEAD_DIM=width, BLOCK=block, num_warps=4
    )


def shared_prefix_attention(
    q: torch.Tensor, cache: KvCache, prefix_pages: torch.Tensor, prefix_length: torch.Tensor,
    page_table: torch.Tensor, lengths: torch.Tensor, *, q_len: int = 1, scale: float | None = None,
    soft_cap: float | None = None, sinks: torch.Tensor | None = None, split_tokens: int | None = None,
    prefix_plan: AttentionPlan | None = None, plan: AttentionPlan | None = None, out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o, lse) as ``paged_attention`` gives them for sequences that begin with the same tokens.

    Args:
        prefix_pages: (max_pages,) int32, pages of the prefix. prefix_length: (1,) int32, its tokens.
        page_table, lengths: of what follows the prefix in each sequence, the q_len new tokens among it; pages there
            count from the end of the prefix.
        prefix_plan, plan: of the two passes, to share between layers.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    good = prefix_pages.dim() == 1 and prefix_pages.dtype == torch.int32 and prefix_pages.is_contiguous()
    require(good, "prefix_pages", "contiguous int32 (max_pages,)", seen(prefix_pages))
    good = tuple(prefix_length.shape) == (1,) and prefix_length.dtype == torch.int32
    require(good, "prefix_length", "int32 (1,)", seen(prefix_length))
    check_table(page_table, page_table.shape[0], cache.pages.device)
    out, lse = check_outputs(q, cache.layout.head_dim, out, lse)
    parts = [(torch.empty_like(out, dtype=torch.float32), torch.empty_like(lse)) for _ in range(2)]
    (o_1, lse_1), (o_2, lse_2) = parts
    paged_attention(
        q, cache, prefix_pages[None], prefix_length, q_len=q.shape[0], scale=scale, soft_cap=soft_cap,
        split_tokens=split_tokens, is_causal=False, plan=prefix_plan, out=o_1, lse=lse_1,
    )  # fmt: skip
    paged_attention(
        q, cache, page_table, lengths, q_len=q_len, scale=scale, soft_cap=soft_cap, sinks=sinks,
        split_tokens=split_tokens, plan=plan, out=o_2, lse=lse_2,
    )  # fmt: skip
    merge_attention(o_1, lse_1, o_2, lse_2, out, lse)
    return out, lse
