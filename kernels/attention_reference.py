"""What the kernels around a KV cache are held to, in plain torch. Imports no kernel.

The rotation in float32, each operation rounded once and in the order that it is written; other devices give the same.
"""

from __future__ import annotations

import math

import torch

from .kv_cache import KvCache, MlaCache, read_ref, slots_of, write_mla_ref, write_ref
from .reference import rms_norm_ref

# -- append ----------------------------------------------------------------------------------------


def rope_ref(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, style: str) -> torch.Tensor:
    """BF16 (T, ..., D) with the first rotary_dim channels rotated: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin.

    Pairs (x1, x2) are channels i, i + rotary_dim / 2 ("half") or 2i, 2i + 1 ("interleaved"). ``cos_sin``: float32
    (max_positions, rotary_dim), cosines, then sines.
    """
    width = cos_sin.shape[1]
    each = cos_sin[positions.long()].view(-1, *[1] * (x.dim() - 2), width)
    cos, sin = each.chunk(2, dim=-1)
    head, tail = x[..., :width].float(), x[..., width:]
    if style == "half":
        x1, x2 = head.chunk(2, dim=-1)
    else:
        x1, x2 = head[..., 0::2], head[..., 1::2]
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.cat((y1, y2), dim=-1) if style == "half" else torch.stack((y1, y2), dim=-1).flatten(-2)
    return torch.cat((y.to(torch.bfloat16), tail), dim=-1)


def _norm_ref(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else rms_norm_ref(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def append_kv_ref(
    qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KvCache, slots: torch.Tensor,
    num_heads: int, *, style: str = "half", q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:  # fmt: skip
    """As ``kv_append.append_kv``; a norm's sum in another order."""
    heads = qkv.unflatten(1, (-1, cache.layout.head_dim))
    q, k, v = heads.split((num_heads, cache.num_kv_heads, cache.num_kv_heads), dim=1)
    k = rope_ref(_norm_ref(k, k_norm, eps), positions, cos_sin, style)
    write_ref(cache, k, v, slots)
    return rope_ref(_norm_ref(q, q_norm, eps), positions, cos_sin, style)


def append_mla_ref(
    latent: torch.Tensor, rope: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: MlaCache,
    slots: torch.Tensor, *, q_rope: torch.Tensor | None = None, style: str = "interleaved",
    norm: torch.Tensor | None = None, eps: float = 1e-6,
) -> torch.Tensor | None:  # fmt: skip
    """As ``mla_append.append_mla``; a norm's sum in another order."""
    write_mla_ref(cache, _norm_ref(latent, norm, eps), rope_ref(rope, positions, cos_sin, style), slots)
    return None if q_rope is None else rope_ref(q_rope, positions, cos_sin, style)


# -- attention -------------------------------------------------------------------------------------


def attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, end: int, scale: float,
    soft_cap: float | None = None, sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o (H, D_v), lse (H,)) of one query token q (H, D) over keys ``first`` to ``end`` of k (T, Hk, D) and v.

    In the dtype of k and v: float64 for the truth, BF16 for what a plain implementation reaches (scores and softmax in
    float32, probabilities rounded to BF16). Sinks (H,) are one more key each, whose value is zero.
    """
    heads, group = q.shape[0], q.shape[0] // k.shape[1]
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    extra = None if sinks is None else sinks.to(wide)[:, None]
    if end <= first:
        lse = torch.full((heads,), -math.inf, dtype=wide, device=q.device) if extra is None else extra[:, 0]
        return torch.zeros(heads, v.shape[2], dtype=wide, device=q.device), lse
    grouped = q.to(k.dtype).view(k.shape[1], group, -1)
    s = (grouped @ k[first:end].permute(1, 2, 0)).to(wide).reshape(heads, -1) * scale
    if soft_cap is not None:
        s = soft_cap * torch.tanh(s / soft_cap)
    lse = torch.logsumexp(s if extra is None else torch.cat((s, extra), dim=1), dim=1)
    p = torch.exp(s - lse[:, None]).to(v.dtype).view(k.shape[1], group, -1)
    return (p @ v[first:end].transpose(0, 1)).to(wide).reshape(heads, -1), lse


def paged_attention_ref(
    q: torch.Tensor, cache: KvCache, page_table: torch.Tensor, lengths: torch.Tensor, *, q_len: int = 1,
    scale: float | None = None, window: int | None = None, soft_cap: float | None = None,
    sinks: torch.Tensor | None = None, is_causal: bool = True, dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As ``paged_attention.paged_attention``: (o, lse) over the dequantized cache, in float64 or as BF16 would."""
    scale = cache.layout.head_dim**-0.5 if scale is None else scale
    outputs, sums = [], []
    for seq, length in enumerate(lengths.tolist()):
        k, v = (part.to(dtype) for part in read_ref(cache, slots_of(page_table[seq], length, cache.layout.page_size)))
        for token in range(q_len):
            end = length - q_len + 1 + token if is_causal else length
            first = 0 if window is None else max(0, end - window)
            o, lse = attention_ref(q[seq * q_len + token], k, v, first, end, scale, soft_cap, sinks)
            outputs.append(o)
            sums.append(lse)
    return torch.stack(outputs), torch.stack(sums)
