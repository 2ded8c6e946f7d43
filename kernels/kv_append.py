"""RoPE, quantize and append to a paged KV cache: one launch between the QKV matmul and attention.

Math:    q, k = rotate([norm](q)), rotate([norm](k)) rounded to BF16; k and v quantized to the cache's format and
         stored at their slots. norm: bf16((x * (1 / sqrt(mean(x^2) + eps))) * weight) over a head. rotate, of the first
         rotary_dim channels of a head: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, where (x1, x2) are channels
         i, i + rotary_dim / 2 ("half", GPT-NeoX) or 2i, 2i + 1 ("interleaved"); the others pass through.
Shapes:  qkv (T, (H + 2 Hk) D) BF16, queries, keys, values; positions, slots (T,) int32 or int64; cos_sin float32
         (max_positions, rotary_dim), cosines, then sines; norms (D,) BF16; q (T, H, D) BF16.
Layout:  rows of qkv and heads of q may lie any distance apart; the cache as ``kv_layout.py`` says. A program writes
         the bytes of its own token alone: those of other tokens in the page may be written at the same time.
Bytes:   T (H + 2 Hk) D x 2 read, T H D x 2 and T Hk record_bytes / page_size written, T rotary_dim x 4 of cos_sin.
         V's codes of a token lie page_size apart, so each is a store of its own. Flops: hidden by the bytes.
Accuracy: float32, every operation rounded once; bytes equal ``attention_reference.append_kv_ref``, but for the payload
         of a NaN, and but for the order of the sum of a norm.
Edges:   T may be 0: no launch. Slot -1: q is computed, nothing stored. NaN and infinity as ``kv_cache.encode_ref``;
         other tokens do not change. Two tokens with one slot: either may win, byte by byte. A position outside of
         cos_sin or a slot outside of the cache is not checked (that would wait for the device).
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  Su et al. 2021 (RoPE); vLLM (slots, -1); FlashInfer's ``rope_quantize_fp8_append_paged_kv_cache`` (the fusion).
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from .append_tiles import STYLES, append_kv_launch
from .checks import require, seen
from .codec import NVFP4_SCALE_MIN
from .formats import ELEMENTS, FP8_ROW
from .kv_cache import KvCache
from .kv_layout import MXFP4_MAX_BYTE, MXFP4_NAN, NVFP4_BIAS, NVFP4_NAN
from .quantize import e8m0_inverse, encode_e2m1, encode_e4m3, encode_e8m0, fp8_scale, magnitude_bits
from .quantize_tiles import EXACT

_AMAX_MIN = tl.constexpr(struct.unpack("<i", struct.pack("<f", FP8_ROW.amax_clamp))[0])
_E4M3_MAX = tl.constexpr(ELEMENTS["e4m3"].max)
_E2M1_MAX = tl.constexpr(ELEMENTS["e2m1"].max)
_SCALE_MIN = tl.constexpr(NVFP4_SCALE_MIN)
_MXFP4_MAX_BYTE = tl.constexpr(MXFP4_MAX_BYTE)
_MXFP4_NAN = tl.constexpr(MXFP4_NAN)
_NVFP4_NAN = tl.constexpr(NVFP4_NAN)
_NVFP4_SHIFT = tl.constexpr((127 - NVFP4_BIAS) << 3)
"""From exponent and three mantissa bits of a float32 to the byte."""

_SIGN_BITS = tl.constexpr(0xDECF)
_SIZE_SHIFTS = tl.constexpr(0x0936)
"""Of value v in half a word of K, a nibble each, v = 0 lowest; see ``kv_layout.py``."""


# -- device helpers --------------------------------------------------------------------------------


@triton.jit
def inverse_rms(x, eps, COUNT: tl.constexpr):
    """(ROWS, 1) 1 / sqrt(mean(x^2) + eps) of float32 rows of COUNT values."""
    mean = tl.div_rn(tl.sum(x * x, axis=1), COUNT * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]


@triton.jit
def apply_norm(x, inverse, norm_ptr, offs, mask):
    """x * inverse * weight, rounded to BF16, as float32."""
    weight = tl.load(norm_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return (x * inverse * weight[None, :]).to(tl.bfloat16).to(tl.float32)


@triton.jit
def rotate_heads(
    row_ptrs, mask, position, cos_sin_ptr, norm_ptr, eps,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """BF16 (ROWS, HEAD_DIM) of the heads at ``row_ptrs`` (ROWS,), normalised if ``norm_ptr`` is given, and rotated.

    y = x cos +- partner sin: the partner is the other channel of the pair, so that both halves are one expression.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    offs = tl.arange(0, HEAD_DIM)
    turns = offs < ROTARY_DIM
    x = tl.load(row_ptrs[:, None] + offs[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    inverse = inverse_rms(x, eps, HEAD_DIM) if norm_ptr is not None else 1.0
    if IS_INTERLEAVED:
        pair, is_first = offs // 2, offs % 2 == 0
        if norm_ptr is not None:
            x = apply_norm(x, inverse, norm_ptr, offs, offs < HEAD_DIM)
        even, odd = tl.split(tl.reshape(x, (ROWS, HEAD_DIM // 2, 2)))
        partner = tl.reshape(tl.join(odd, even), (ROWS, HEAD_DIM))
    else:
        is_first = offs < HALF
        pair = tl.where(is_first, offs, offs - HALF)
        other = tl.where(is_first, offs + HALF, offs - HALF)
        # from the L1 cache: cheaper than an exchange between threads
        other_ptrs = row_ptrs[:, None] + other[None, :]
        partner = tl.load(other_ptrs, mask=mask[:, None] & turns[None, :], other=0.0).to(tl.float32)
        if norm_ptr is not None:
            x = apply_norm(x, inverse, norm_ptr, offs, offs < HEAD_DIM)
            partner = apply_norm(partner, inverse, norm_ptr, other, turns)
    row_ptr = cos_sin_ptr + position * ROTARY_DIM
    cos = tl.load(row_ptr + pair, mask=turns, other=1.0)
    sin = tl.load(row_ptr + HALF + pair, mask=turns, other=0.0)
    sin *= tl.where(is_first, -1.0, 1.0)  # not -sin, which is 0 - sin in Triton 3.6 and no -0
    y = x * cos[None, :] + partner * sin[None, :]
    return tl.where(turns[None, :], y, x).to(tl.bfloat16)


@triton.jit
def typed_pages(pages_ptr, FORMAT: tl.constexpr):
    """The pages by elements: BF16, or bytes."""
    return pages_ptr.to(tl.pointer_type(tl.bfloat16)) if FORMAT == "bf16" else pages_ptr


@triton.jit
def row_scale(amax_bits):
    """The float32 scale of fp8_row of a row whose largest magnitude has these bits."""
    return fp8_scale(amax_bits, _AMAX_MIN)


@triton.jit
def encode_row(x, scale, FORMAT: tl.constexpr):
    """What is stored of BF16 values: themselves, or E4M3 codes of x / scale."""
    return x if FORMAT == "bf16" else encode_e4m3(tl.div_rn(x.to(tl.float32), scale))


@triton.jit
def _encode_fp4(x, factor, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(codes int32 (ROWS, COLUMNS), stored scales uint8 (ROWS, COLUMNS / GROUP)) of BF16 values."""
    blocks = tl.reshape(x.to(tl.float32), (ROWS, COLUMNS // GROUP, GROUP))
    amax_bits = tl.max(magnitude_bits(blocks), axis=2)
    if FORMAT == "mxfp4":
        byte = encode_e8m0(amax_bits, "e2m1", "floor")
        blocks = blocks * e8m0_inverse(byte)[:, :, None]
        stored = tl.where(byte > _MXFP4_MAX_BYTE, _MXFP4_NAN, byte)
    else:
        wanted = tl.div_rn(tl.div_rn(amax_bits.to(tl.float32, bitcast=True), _E2M1_MAX), factor)
        wanted = tl.where(wanted < _SCALE_MIN, _SCALE_MIN, wanted)  # NaN stays
        wanted = tl.where(wanted > _E4M3_MAX, _E4M3_MAX, wanted)
        decoded = encode_e4m3(wanted).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        blocks = blocks * tl.div_rn(tl.div_rn(1.0, factor), decoded)[:, :, None]
        stored = (decoded.to(tl.int32, bitcast=True) >> 20) - _NVFP4_SHIFT
        stored = tl.where(decoded == decoded, stored, _NVFP4_NAN)
    return tl.reshape(encode_e2m1(blocks), (ROWS, COLUMNS)), stored.to(tl.uint8)


@triton.jit
def _pack_words(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words (int32) of K, of 8 channels each."""
    place = tl.arange(0, COLUMNS) % 8
    half = (place % 2) * 16
    sign = half + ((_SIGN_BITS >> (place // 2 * 4)) & 15)
    size = half + ((_SIZE_SHIFTS >> (place // 2 * 4)) & 15)
    bits = ((codes >> 3) << sign[None, :]) | ((codes & 7) << size[None, :])
    return tl.sum(tl.reshape(bits, (ROWS, COLUMNS // 8, 8)), axis=2)  # no bit twice


@triton.jit
def _store_k(
    k, record_ptrs, place, factor, mask,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """BF16 keys (ROWS, HEAD_DIM) of one token into records (ROWS,); SCALES: where these begin."""
    if FORMAT == "mxfp4" or FORMAT == "nvfp4":
        GROUP: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
        codes, stored = _encode_fp4(k, factor, FORMAT, ROWS, HEAD_DIM, GROUP)
        offs = place * (HEAD_DIM // 8) + tl.arange(0, HEAD_DIM // 8)
        word_ptrs = record_ptrs.to(tl.pointer_type(tl.int32))[:, None] + offs[None, :]
        tl.store(word_ptrs, _pack_words(codes, ROWS, HEAD_DIM), mask=mask[:, None])
        scale_offs = SCALES + place * (HEAD_DIM // GROUP) + tl.arange(0, HEAD_DIM // GROUP)
        tl.store(record_ptrs[:, None] + scale_offs[None, :], stored, mask=mask[:, None])
    else:
        scale = factor
        if FORMAT == "fp8_row":
            each = row_scale(tl.max(magnitude_bits(k.to(tl.float32)), axis=1))
            tl.store((record_ptrs + SCALES).to(tl.pointer_type(tl.float32)) + place, each, mask=mask)
            scale = each[:, None]
        offs = place * HEAD_DIM + tl.arange(0, HEAD_DIM)
        code_ptrs = typed_pages(record_ptrs, FORMAT)[:, None] + offs[None, :]
        tl.store(code_ptrs, encode_row(k, scale, FORMAT), mask=mask[:, None])


@triton.jit
def _store_v(
    v_ptrs, record_ptrs, place, factor, mask,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Heads of values at ``v_ptrs`` (ROWS,) into records (ROWS,) by channels; CODES, SCALES: where these begin."""
    if FORMAT == "mxfp4" or FORMAT == "nvfp4":
        GROUP: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
        HALF: tl.constexpr = HEAD_DIM // 2
        offs = tl.arange(0, HALF)
        low_v = tl.load(v_ptrs[:, None] + offs[None, :], mask=mask[:, None], other=0.0)
        high_v = tl.load(v_ptrs[:, None] + HALF + offs[None, :], mask=mask[:, None], other=0.0)
        low, low_scale = _encode_fp4(low_v, factor, FORMAT, ROWS, HALF, GROUP)
        high, high_scale = _encode_fp4(high_v, factor, FORMAT, ROWS, HALF, GROUP)
        codes = ((low >> 3) << 7) | ((low & 7) << 3) | ((high >> 3) << 6) | (high & 7)
        code_ptrs = record_ptrs[:, None] + (CODES + place + offs * PAGE_SIZE)[None, :]
        tl.store(code_ptrs, codes.to(tl.uint8), mask=mask[:, None])
        scale_ptrs = record_ptrs[:, None] + (SCALES + place + tl.arange(0, HALF // GROUP) * PAGE_SIZE)[None, :]
        tl.store(scale_ptrs, low_scale, mask=mask[:, None])
        tl.store(scale_ptrs + HALF // GROUP * PAGE_SIZE, high_scale, mask=mask[:, None])
    else:
        offs = tl.arange(0, HEAD_DIM)
        v = tl.load(v_ptrs[:, None] + offs[None, :], mask=mask[:, None], other=0.0)
        scale = factor
        if FORMAT == "fp8_row":
            each = row_scale(tl.max(magnitude_bits(v.to(tl.float32)), axis=1))
            tl.store((record_ptrs + SCALES).to(tl.pointer_type(tl.float32)) + place, each, mask=mask)
            scale = each[:, None]
        code_ptrs = typed_pages(record_ptrs + CODES, FORMAT)[:, None] + (place + offs * PAGE_SIZE)[None, :]
        tl.store(code_ptrs, encode_row(v, scale, FORMAT), mask=mask[:, None])


# -- kernel ----------------------------------------------------------------------------------------


@triton.jit
def _append_kv_kernel(
    qkv_ptr, positions_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, pages_ptr, factors_ptr, q_ptr,
    num_heads, num_kv_heads, eps, stride_xt, stride_qt, stride_qh,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CODES_BYTES: tl.constexpr, SCALES_BYTES: tl.constexpr, IS_INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A token and BLOCK_H heads per program: first those of queries, then of keys, then of values."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts = tl.cdiv(num_heads, BLOCK_H)
    kv_parts = tl.cdiv(num_kv_heads, BLOCK_H)
    row_ptr = qkv_ptr + token * stride_xt
    position = tl.load(positions_ptr + token).to(tl.int64)
    if part < q_parts:
        heads = part * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = heads < num_heads
        q = rotate_heads(
            row_ptr + heads * HEAD_DIM, mask, position, cos_sin_ptr, q_norm_ptr, eps,
            BLOCK_H, HEAD_DIM, ROTARY_DIM, IS_INTERLEAVED,
        )  # fmt: skip
        q_ptrs = q_ptr + token * stride_qt + heads.to(tl.int64) * stride_qh
        tl.store(q_ptrs[:, None] + tl.arange(0, HEAD_DIM)[None, :], q, mask=mask[:, None])
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            is_k = part < q_parts + kv_parts
            heads = (part - q_parts) % kv_parts * BLOCK_H + tl.arange(0, BLOCK_H)
            mask = heads < num_kv_heads
            records = slot // PAGE_SIZE * num_kv_heads + heads
            record_ptrs = pages_ptr + records * (2 * (CODES_BYTES + SCALES_BYTES))
            place = (slot % PAGE_SIZE).to(tl.int32)
            k_ptrs = row_ptr + (num_heads + heads) * HEAD_DIM
            if is_k:
                k = rotate_heads(
                    k_ptrs, mask, position, cos_sin_ptr, k_norm_ptr, eps, BLOCK_H, HEAD_DIM, ROTARY_DIM, IS_INTERLEAVED
                )
                factor = tl.load(factors_ptr)
                _store_k(k, record_ptrs, place, factor, mask, FORMAT, HEAD_DIM, 2 * CODES_BYTES, BLOCK_H)
            else:
                factor = tl.load(factors_ptr + 1)
                _store_v(
                    k_ptrs + num_kv_heads * HEAD_DIM, record_ptrs, place, factor, mask,
                    FORMAT, HEAD_DIM, PAGE_SIZE, CODES_BYTES, 2 * CODES_BYTES + SCALES_BYTES, BLOCK_H,
                )  # fmt: skip


# -- wrapper ---------------------------------------------------------------------------------------


def check_tokens(argument: str, values: torch.Tensor, num_tokens: int, device: torch.device) -> None:
    """A number per token: positions or slots."""
    good = isinstance(values, torch.Tensor) and values.dtype in (torch.int32, torch.int64)
    good = good and tuple(values.shape) == (num_tokens,) and values.is_contiguous() and values.device == device
    require(good, argument, f"contiguous int32 or int64 ({num_tokens},) on {device}", _described(values))


def check_cos_sin(cos_sin: torch.Tensor, widths: tuple[int, int], device: torch.device) -> None:
    """``widths``: least and greatest rotary_dim."""
    good = isinstance(cos_sin, torch.Tensor) and cos_sin.dtype == torch.float32 and cos_sin.dim() == 2
    good = good and cos_sin.is_contiguous() and cos_sin.device == device and cos_sin.shape[0] > 0
    low, high = widths
    good = good and low <= cos_sin.shape[1] <= high and cos_sin.shape[1] % 2 == 0
    width = f"an even rotary_dim from {low} to {high}" if low < high else str(low)
    expected = f"contiguous float32 (max_positions, {width}) on {device}"
    require(good, "cos_sin", expected, _described(cos_sin))


def check_options(style: str, eps: float, device: torch.device, **norms: tuple[torch.Tensor | None, int]) -> None:
    """The style, eps, and norms with their widths by argument."""
    require(style in STYLES, "style", f"one of {', '.join(STYLES)}", repr(style))
    smallest = torch.finfo(torch.float32).tiny
    require(isinstance(eps, float) and smallest <= eps < 1, "eps", f"a number from {smallest:.3g} to below 1", eps)
    for argument, (norm, width) in norms.items():
        if norm is not None:
            good = isinstance(norm, torch.Tensor) and norm.dtype == torch.bfloat16 and tuple(norm.shape) == (width,)
            good = good and norm.is_contiguous() and norm.device == device
            require(good, argument, f"contiguous bfloat16 ({width},) on {device}", _described(norm))


def check_values(argument: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """BF16 of this shape, last axis contiguous, the others of any stride."""
    good = isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 and tuple(x.shape) == shape and x.device == device
    require(good, argument, f"bfloat16 {shape} on {device}", _described(x))
    require(x.stride(-1) == 1, argument, "a contiguous last axis", f"strides {x.stride()}")


def check_q_out(q_out: torch.Tensor, shape: tuple[int, int, int], read: torch.Tensor) -> None:
    """What q is written to: rows that overlap neither one another nor what is read meanwhile."""
    check_values("q_out", q_out, shape, read.device)
    if q_out.numel():
        apart = q_out.stride(1) >= shape[2] or shape[1] == 1
        apart = apart and (q_out.stride(0) >= (shape[1] - 1) * q_out.stride(1) + shape[2] or shape[0] == 1)
        require(apart, "q_out", "heads that do not overlap, token by token", f"strides {q_out.stride()}")
        ends = [(x.data_ptr(), x.data_ptr() + 2 * _extent(x)) for x in (q_out, read)]
        apart = ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0]
        require(apart, "q_out", "memory apart from what is rotated", f"bytes {ends[0]}, which read {ends[1]}")


def _extent(x: torch.Tensor) -> int:
    """Values from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _described(x: object) -> str:
    return f"{seen(x)} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)


def append_kv(
    qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KvCache, slots: torch.Tensor,
    num_heads: int, *, style: str = "half", q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None,
    eps: float = 1e-6, q_out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rotated queries (T, H, D) BF16; keys and values of ``qkv`` are stored in ``cache`` at ``slots``.

    Args:
        qkv: (T, (H + 2 Hk) D) BF16, last axis contiguous.
        positions: (T,) int32 or int64, rows of ``cos_sin``; not checked.
        cos_sin: float32 (max_positions, rotary_dim), rotary_dim even, from 16 to D.
        slots: (T,) int32 or int64, page x page_size + place, or -1; not checked, see ``kv_cache.check_pages``.
        num_heads: H, of queries; a multiple of the cache's Hk.
        style: "half" or "interleaved", see the module.
        q_norm, k_norm: (D,) BF16, RMSNorm of each head before the rotation; None: without.
        q_out: where q goes, last axis contiguous, apart from ``qkv``; allocated if None.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    require(isinstance(cache, KvCache), "cache", "a KvCache", type(cache).__name__)
    layout, num_kv_heads, device = cache.layout, cache.num_kv_heads, cache.pages.device
    good = isinstance(num_heads, int) and num_heads > 0 and num_heads % num_kv_heads == 0
    require(good, "num_heads", f"a positive multiple of {num_kv_heads} KV heads", num_heads)
    require(isinstance(qkv, torch.Tensor) and qkv.dim() == 2, "qkv", "a tensor (T, (H + 2 Hk) D)", seen(qkv))
    num_tokens, head_dim = qkv.shape[0], layout.head_dim
    check_values("qkv", qkv, (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), device)
    check_tokens("positions", positions, num_tokens, device)
    check_tokens("slots", slots, num_tokens, device)
    check_cos_sin(cos_sin, (16, head_dim), device)
    check_options(style, eps, device, q_norm=(q_norm, head_dim), k_norm=(k_norm, head_dim))
    if q_out is None:
        q_out = torch.empty(num_tokens, num_heads, head_dim, dtype=torch.bfloat16, device=device)
    check_q_out(q_out, (num_tokens, num_heads, head_dim), qkv)
    if num_tokens == 0:
        return q_out
    launch = append_kv_launch(layout, num_kv_heads, cos_sin.shape[1], style)
    block_h = launch.constants["BLOCK_H"]
    parts = triton.cdiv(num_heads, block_h) + 2 * triton.cdiv(num_kv_heads, block_h)
    _append_kv_kernel[(num_tokens, parts)](
        qkv, positions, cos_sin, q_norm, k_norm, slots, cache.pages, cache.factors, q_out,
        num_heads, num_kv_heads, eps, qkv.stride(0), q_out.stride(0), q_out.stride(1),
        num_warps=launch.num_warps, **launch.constants, **EXACT,
    )  # fmt: skip
    return q_out
