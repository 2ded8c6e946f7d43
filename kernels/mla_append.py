"""RoPE, quantize and append to a paged MLA cache: the latent and rope parts of a token, and the rope parts of queries.

Math:    latent [normalised], rotate(rope), rounded to BF16, quantized as one vector per token (fp8_row: one scale over
         both) and stored at the token's slot; q_out = rotate(q_rope). norm and rotate as in ``kv_append.py``, rotated
         over all of rope_dim, the norm over the latent.
Shapes:  latent (T, kv_lora_rank), rope (T, rope_dim), q_rope, q_out (T, H, rope_dim) BF16; positions, slots (T,) int32
         or int64; cos_sin float32 (max_positions, rope_dim), cosines, then sines; norm (kv_lora_rank,) BF16.
Layout:  every tensor of values may be a view with any strides but a contiguous last axis: latent and rope parts of one
         matmul's output, q_out the tail of (T, H, kv_lora_rank + rope_dim). The cache as ``kv_layout.py`` says.
Bytes:   T (kv_lora_rank + rope_dim + H rope_dim) x 2 read, T H rope_dim x 2 and T record_bytes / page_size written,
         T rope_dim x 4 of cos_sin.
Accuracy, edges, errors: as ``kv_append.py``.
Source:  DeepSeek-V2 technical report (MLA); Su et al. 2021 (RoPE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .append_tiles import append_mla_launch
from .checks import require, seen
from .kv_append import (
    apply_norm,
    check_cos_sin,
    check_options,
    check_q_out,
    check_tokens,
    check_values,
    encode_row,
    inverse_rms,
    rotate_heads,
    row_scale,
    typed_pages,
)
from .kv_cache import MlaCache
from .quantize import magnitude_bits
from .quantize_tiles import EXACT


@triton.jit
def _append_mla_kernel(
    latent_ptr, rope_ptr, positions_ptr, cos_sin_ptr, norm_ptr, slots_ptr, pages_ptr, factors_ptr, q_rope_ptr, q_ptr,
    num_heads, eps, stride_lt, stride_rt, stride_xt, stride_xh, stride_qt, stride_qh,
    FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    RECORD_BYTES: tl.constexpr, IS_INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A token per column of programs: the first stores it, the others rotate BLOCK_H query heads each."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    offs_r = tl.arange(0, ROPE_DIM)[None, :]
    if tl.program_id(1) > 0:
        heads = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = heads < num_heads
        x_ptrs = q_rope_ptr + token * stride_xt + heads.to(tl.int64) * stride_xh
        q = rotate_heads(x_ptrs, mask, position, cos_sin_ptr, None, eps, BLOCK_H, ROPE_DIM, ROPE_DIM, IS_INTERLEAVED)
        q_ptrs = q_ptr + token * stride_qt + heads.to(tl.int64) * stride_qh
        tl.store(q_ptrs[:, None] + offs_r, q, mask=mask[:, None])
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            one = tl.zeros((1,), tl.int64)  # a row of one
            rope_ptrs = rope_ptr + token * stride_rt + one
            rope = rotate_heads(
                rope_ptrs, one == 0, position, cos_sin_ptr, None, eps, 1, ROPE_DIM, ROPE_DIM, IS_INTERLEAVED
            )
            offs_l = tl.arange(0, RANK)
            latent = tl.load(latent_ptr + token * stride_lt + offs_l)[None, :]
            if norm_ptr is not None:
                x = latent.to(tl.float32)
                latent = apply_norm(x, inverse_rms(x, eps, RANK), norm_ptr, offs_l, offs_l < RANK).to(tl.bfloat16)
            record_ptr = pages_ptr + slot // PAGE_SIZE * RECORD_BYTES
            place = (slot % PAGE_SIZE).to(tl.int32)
            scale = tl.load(factors_ptr)
            if FORMAT == "fp8_row":
                amax_bits = tl.maximum(
                    tl.max(magnitude_bits(latent.to(tl.float32))), tl.max(magnitude_bits(rope.to(tl.float32)))
                )
                scale = row_scale(amax_bits)
                scales_ptr = (record_ptr + RECORD_BYTES - 4 * PAGE_SIZE).to(tl.pointer_type(tl.float32))
                tl.store(scales_ptr + place, scale)
            codes_ptr = typed_pages(record_ptr, FORMAT)
            tl.store(codes_ptr + place * RANK + offs_l[None, :], encode_row(latent, scale, FORMAT))
            tl.store(codes_ptr + PAGE_SIZE * RANK + place * ROPE_DIM + offs_r, encode_row(rope, scale, FORMAT))


def append_mla(
    latent: torch.Tensor, rope: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: MlaCache,
    slots: torch.Tensor, *, q_rope: torch.Tensor | None = None, q_out: torch.Tensor | None = None,
    style: str = "interleaved", norm: torch.Tensor | None = None, eps: float = 1e-6,
) -> torch.Tensor | None:  # fmt: skip
    """Stores ``latent`` and the rotated ``rope`` in ``cache`` at ``slots``; returns rotated ``q_rope``, None without.

    Args:
        latent: (T, kv_lora_rank) BF16; rope: (T, rope_dim) BF16.
        positions: (T,) int32 or int64, rows of ``cos_sin``; not checked.
        cos_sin: float32 (max_positions, rope_dim).
        slots: (T,) int32 or int64, page x page_size + place, or -1; not checked, see ``kv_cache.check_pages``.
        q_rope: (T, H, rope_dim) BF16.
        q_out: where rotated ``q_rope`` goes, apart from it; allocated if None.
        style: "half" or "interleaved", see ``kv_append.py``.
        norm: (kv_lora_rank,) BF16, RMSNorm of the latent; None: without.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    require(isinstance(cache, MlaCache), "cache", "an MlaCache", type(cache).__name__)
    layout, device = cache.layout, cache.pages.device
    require(
        isinstance(latent, torch.Tensor) and latent.dim() == 2, "latent", "a tensor (T, kv_lora_rank)", seen(latent)
    )
    num_tokens = latent.shape[0]
    check_values("latent", latent, (num_tokens, layout.kv_lora_rank), device)
    check_values("rope", rope, (num_tokens, layout.rope_dim), device)
    check_tokens("positions", positions, num_tokens, device)
    check_tokens("slots", slots, num_tokens, device)
    check_cos_sin(cos_sin, (layout.rope_dim, layout.rope_dim), device)
    check_options(style, eps, device, norm=(norm, layout.kv_lora_rank))
    num_heads = 0
    if q_rope is None:
        require(q_out is None, "q_out", "None without q_rope", seen(q_out))
    else:
        good = isinstance(q_rope, torch.Tensor) and q_rope.dim() == 3 and q_rope.shape[1] > 0
        require(good, "q_rope", f"a tensor (T, H, {layout.rope_dim})", seen(q_rope))
        num_heads = q_rope.shape[1]
        shape = (num_tokens, num_heads, layout.rope_dim)
        check_values("q_rope", q_rope, shape, device)
        q_out = torch.empty(shape, dtype=torch.bfloat16, device=device) if q_out is None else q_out
        check_q_out(q_out, shape, q_rope)
    if num_tokens == 0:
        return q_out
    launch = append_mla_launch(layout, max(1, num_heads), style)
    strides = (0, 0, 0, 0)
    if q_rope is not None and q_out is not None:
        strides = (*q_rope.stride()[:2], *q_out.stride()[:2])
    _append_mla_kernel[(num_tokens, 1 + triton.cdiv(num_heads, launch.constants["BLOCK_H"]))](
        latent, rope, positions, cos_sin, norm, slots, cache.pages, cache.factors,
        rope if q_rope is None else q_rope, rope if q_out is None else q_out,
        num_heads, eps, latent.stride(0), rope.stride(0), *strides,
        num_warps=launch.num_warps, **launch.constants, **EXACT,
    )  # fmt: skip
    return q_out
