"""FP4 keys and values of the attention kernel: decoded to BF16 in registers, in the matrix instruction's own order.

A thread holds, of a row of the M side, pairs of neighbours along the summed axis. Keys: a word of 8 channels gives four
pairs, so channels are summed in another order, and the query's are read in it (``channel_order``). Values: a word of 4
tokens gives two pairs of each of two channels, so tokens are in another order, and keys are read in it
(``token_order``): probabilities then need none. Neither costs an instruction in the loop.

A block's scale, as a pair of BF16, is the second factor of the multiplication that turns E2M1's bits into a number;
products are 2^-32 (mxfp4) or 2^-7 (nvfp4) of the values, which the softmax scale and the epilogue undo
(``FP4_FACTORS``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_parts import cap_scores, is_visible, place_in_page, softmax_step
from .w4a16_matmul import decode_e2m1_to_bf16, mul_bf16x2

FP4_FACTORS = {"mxfp4": 2.0**32, "nvfp4": 2.0**7}
_LOW_BYTES = tl.constexpr(0x00FF00FF)


@triton.jit
def channel_order(HEAD_DIM: tl.constexpr):
    """Channel at each place of a row of decoded keys."""
    place = tl.arange(0, HEAD_DIM)
    half, lane, value, word = place % 2, place // 2 % 4, place // 8 % 4, place // 32
    return 8 * (lane * (HEAD_DIM // 32) + word) + 2 * value + half


@triton.jit
def token_order(BLOCK_N: tl.constexpr):
    """Token of a tile at each place of a row of decoded values."""
    place = tl.arange(0, BLOCK_N)
    half, lane, byte, word = place % 2, place // 2 % 4, place // 8 % 2, place // 16
    return 4 * (lane * (BLOCK_N // 16) + word) + 2 * half + byte


@triton.jit
def _scale_pair(bytes, FORMAT: tl.constexpr):
    """Pairs of BF16 from bytes in both halves of a word."""
    if FORMAT == "mxfp4":
        return bytes * 128 + 94 * 128 * 65537
    else:
        return bytes * 16 + 0x70007000


@triton.jit
def _as_bf16(pairs):
    """(..., 2) BF16 of words of two."""
    low, high = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
    return tl.join(low, high).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode_keys(
    words, scales, FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """(BLOCK_N, HEAD_DIM) BF16 in ``channel_order`` of words (BLOCK_N, HEAD_DIM / 8) and scale bytes
    (int32), one per block."""
    WORDS: tl.constexpr = HEAD_DIM // 32  # of a lane
    BLOCKS: tl.constexpr = HEAD_DIM // GROUP
    w = tl.reshape(words, (BLOCK_N, 4, WORDS))
    pair = _scale_pair(scales * 65537, FORMAT)
    pair = tl.reshape(pair, (BLOCK_N, BLOCKS, 1)).broadcast_to(BLOCK_N, BLOCKS, GROUP // 8)
    pair = tl.reshape(pair, (BLOCK_N, 4, WORDS))
    v0, v1, v2, v3 = decode_e2m1_to_bf16(w, pair, pair)
    values = _as_bf16(tl.join(tl.join(v0, v1), tl.join(v2, v3)))  # token, lane, word, v0, v1, half
    return tl.reshape(tl.permute(values, (0, 2, 4, 3, 1, 5)), (BLOCK_N, HEAD_DIM))


@triton.jit
def _value_bits(words, SIGN: tl.constexpr, SIZE: tl.constexpr):
    """Sign in bit 15, magnitude in bits 8-6 of both halves."""
    return ((words << SIGN) & -0x7FFF8000) | ((words >> SIZE) & 0x01C001C0)


@triton.jit
def decode_values(
    words, scales_a, scales_b, FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """(HEAD_DIM, BLOCK_N) BF16 in ``token_order`` of words (HEAD_DIM / 2, BLOCK_N / 4) of 4 tokens and two channels.

    ``scales_a``, ``scales_b``: words (HEAD_DIM / 2 / GROUP, BLOCK_N / 4), of the lower and the upper channels' blocks.
    """
    ROWS: tl.constexpr = HEAD_DIM // 2
    BLOCKS: tl.constexpr = ROWS // GROUP
    WORDS: tl.constexpr = BLOCK_N // 16  # of a lane
    w = tl.reshape(words, (ROWS, 4, WORDS))
    up = w << 8
    a, b = _spread(scales_a, BLOCKS, GROUP, WORDS), _spread(scales_b, BLOCKS, GROUP, WORDS)
    low_a = mul_bf16x2(_value_bits(up, 0, 5), _scale_pair(a & _LOW_BYTES, FORMAT))
    high_a = mul_bf16x2(_value_bits(w, 0, 5), _scale_pair((a >> 8) & _LOW_BYTES, FORMAT))
    low_b = mul_bf16x2(_value_bits(up, 1, 2), _scale_pair(b & _LOW_BYTES, FORMAT))
    high_b = mul_bf16x2(_value_bits(w, 1, 2), _scale_pair((b >> 8) & _LOW_BYTES, FORMAT))
    values = _as_bf16(tl.join(tl.join(low_a, high_a), tl.join(low_b, high_b)))  # row, lane, word, byte, a or b, half
    return tl.reshape(tl.permute(values, (4, 0, 2, 3, 1, 5)), (HEAD_DIM, BLOCK_N))


@triton.jit
def _spread(scales, BLOCKS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr):
    """Each row's words (BLOCKS x GROUP, 4, WORDS) of a block's (BLOCKS, 4 x WORDS)."""
    each = tl.reshape(scales, (BLOCKS, 1, 4 * WORDS)).broadcast_to(BLOCKS, GROUP, 4 * WORDS)
    return tl.reshape(each, (BLOCKS * GROUP, 4, WORDS))


@triton.jit
def keep_tokens(words, first_tokens, length):
    """Words of 4 tokens with zeros in place of tokens from ``length`` on."""
    count = tl.minimum(tl.maximum(length - first_tokens, 0), 4)
    mask = tl.where(count == 4, -1, (1 << (8 * tl.minimum(count, 3))) - 1)
    return words & mask[None, :]


@triton.jit
def attend_fp4_tile(
    q, factor, m, total, acc, pages, word_pages, words_ptr, tile, length, ends, soft_cap, window,
    IS_MASKED: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(m, total, acc) after one more tile; as ``paged_attention.attend_tile``."""
    GROUP: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    CODES: tl.constexpr = PAGE * HEAD_DIM // 2  # bytes of K, and of V
    SCALES: tl.constexpr = PAGE * HEAD_DIM // GROUP
    RECORD: tl.constexpr = 2 * (CODES + SCALES)
    HALF: tl.constexpr = HEAD_DIM // 2
    order = token_order(BLOCK_N)
    head = tl.program_id(1)
    tokens = tile * BLOCK_N + order
    place = place_in_page(tile, order, PAGE, BLOCK_N)
    record = (pages.to(tl.int64) * tl.num_programs(1) + head) * RECORD
    offs_w = tl.arange(0, HEAD_DIM // 8)
    # words where a token has that many scales: narrower loads cannot be made ahead of time
    SCALES_PER_LOAD: tl.constexpr = 4 if HEAD_DIM // GROUP >= 4 else 1
    scales_ptr = words_ptr if SCALES_PER_LOAD == 4 else words_ptr.to(tl.pointer_type(tl.uint8))
    BLOCKS: tl.constexpr = HEAD_DIM // GROUP // SCALES_PER_LOAD
    offs_b = tl.arange(0, BLOCKS)
    if BLOCK_N > PAGE:
        k_ptrs = words_ptr + (record // 4 + place * (HEAD_DIM // 8))[:, None] + offs_w[None, :]
        ks_ptrs = scales_ptr + ((record + 2 * CODES) // SCALES_PER_LOAD + place * BLOCKS)[:, None] + offs_b[None, :]
    else:
        k_ptrs = words_ptr + record // 4 + (place * (HEAD_DIM // 8))[:, None] + offs_w[None, :]
        ks_ptrs = scales_ptr + (record + 2 * CODES) // SCALES_PER_LOAD + (place * BLOCKS)[:, None] + offs_b[None, :]
    k_scales = tl.load(ks_ptrs).to(tl.int32)
    if SCALES_PER_LOAD == 4:
        k_scales = (k_scales[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 0xFF
        k_scales = tl.reshape(k_scales, (BLOCK_N, 4 * BLOCKS))
    k = decode_keys(tl.load(k_ptrs), k_scales, FORMAT, GROUP, BLOCK_N, HEAD_DIM)
    s = tl.dot(k, tl.trans(q)) * factor[None, :]
    if soft_cap is not None:
        s = cap_scores(s, soft_cap)
    if IS_MASKED:
        s = tl.where(is_visible(tokens, ends, window), s, float("-inf"))
    p, alpha, m, total = softmax_step(s, m, total, 0.0, IS_MASKED)

    offs_n = tl.arange(0, BLOCK_N // 4)
    word = place_in_page(tile, offs_n, PAGE // 4, BLOCK_N // 4)
    base = (word_pages.to(tl.int64) * tl.num_programs(1) + head) * (RECORD // 4) + CODES // 4
    offs_h, offs_s = tl.arange(0, HALF), tl.arange(0, HALF // GROUP)
    STEP: tl.constexpr = PAGE // 4
    SCALES_AT: tl.constexpr = (CODES + SCALES) // 4  # from V's codes on
    if BLOCK_N > PAGE:
        v_ptrs = words_ptr + (base + word)[None, :] + offs_h[:, None] * STEP
        vs_ptrs = words_ptr + (base + SCALES_AT + word)[None, :] + offs_s[:, None] * STEP
    else:
        v_ptrs = words_ptr + base + word[None, :] + offs_h[:, None] * STEP
        vs_ptrs = words_ptr + base + SCALES_AT + word[None, :] + offs_s[:, None] * STEP
    v, scales_a, scales_b = tl.load(v_ptrs), tl.load(vs_ptrs), tl.load(vs_ptrs + HALF // GROUP * STEP)
    if IS_MASKED:
        first = tile * BLOCK_N + 4 * offs_n
        v, scales_a = keep_tokens(v, first, length), keep_tokens(scales_a, first, length)
        scales_b = keep_tokens(scales_b, first, length)
    v = decode_values(v, scales_a, scales_b, FORMAT, GROUP, BLOCK_N, HEAD_DIM)
    return m, total, tl.dot(v, p.to(tl.bfloat16), acc * alpha[None, :])
