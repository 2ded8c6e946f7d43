"""Device helpers of the attention kernels: page ids, FP8 operands in two terms, one step of the online softmax.

Scores are in log2 units, so that 2^s is one instruction. A tile of them is (BLOCK_N tokens, BLOCK_R query rows): keys
are the M side of the matrix instruction, a group's few queries its N side, as weights and tokens in the matmuls.

FP8 in two terms: a BF16 value has 8 bits, an E4M3 code 4. So x = high + low / 16 with both E4M3 is exact down to 2^-13
of the largest, and a product with FP8 keys or values needs no conversion of these: two columns of the N side instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_pages(table_ptr, tile, offs_n, length, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of the tokens ``offs_n`` of a tile: one where a page holds the tile whole, else one per token.

    Entries beyond the length are not read and count as 0.
    """
    start = tile * BLOCK_N
    slots = (start + offs_n) // PAGE if BLOCK_N > PAGE else start // PAGE
    return tl.load(table_ptr + slots, mask=slots * PAGE < length, other=0)


@triton.jit
def place_in_page(tile, offs_n, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where in their pages the tokens ``offs_n`` of a tile are."""
    if BLOCK_N > PAGE:
        return offs_n % PAGE
    else:
        return tl.multiple_of((tile * BLOCK_N) % PAGE, BLOCK_N) + offs_n


@triton.jit
def split_fp8(x):
    """(high, low) in E4M3 with x = high + low / 16, for |x| <= 448."""
    high = x.to(tl.float8e4nv)
    return high, ((x - high.to(tl.float32)) * 16.0).to(tl.float8e4nv)


@triton.jit
def normalize_rows(x):
    """(x times a power of two, below 256; its inverse) per row (axis 1); NaN inverse where a row is not finite."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = tl.maximum(bits >> 23, 8)
    up = ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    return x * up[:, None], tl.where(bits >= 0x7F800000, float("nan"), down)


@triton.jit
def query_operands(q, IS_FP8: tl.constexpr, IS_JOINED: tl.constexpr, BLOCK_R: tl.constexpr):
    """(what multiplies the keys: one operand or two, factor of each row's scores) of BF16 query rows.

    FP8 terms are joined in one operand, ``q`` with every row twice, BLOCK_R rows apart, or two of them. Joined takes
    half the instructions; but where accumulators lie in tensor memory, to part its columns again takes many more.
    """
    if IS_FP8:
        x, factor = normalize_rows(q.to(tl.float32))
        high, low = split_fp8(x)
        if IS_JOINED:
            is_high = tl.arange(0, 2 * BLOCK_R) < BLOCK_R
            high = tl.where(is_high[:, None], high, low)
            factor = tl.max(tl.reshape(factor, (2, BLOCK_R)), axis=0)
        return high, low, factor
    else:
        return q, q, tl.full((BLOCK_R,), 1.0, tl.float32)


@triton.jit
def dot_terms(a, high, low, IS_JOINED: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr):
    """a (ROWS, k) . (high + low / 16) (k, BLOCK_R) of E4M3 operands, float32; joined, ``high`` holds both."""
    if IS_JOINED:
        both = tl.reshape(tl.dot(a, high), (ROWS, 2, BLOCK_R))
        first, second = tl.split(tl.permute(both, (0, 2, 1)))
    else:
        first, second = tl.dot(a, high), tl.dot(a, low)
    return first + second * 0.0625


@triton.jit
def probability_operands(p, IS_JOINED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """The terms of (BLOCK_N, BLOCK_R) float32 below 448, as ``dot_terms`` takes them."""
    high, low = split_fp8(p)
    if IS_JOINED:
        high = tl.reshape(tl.permute(tl.join(high, low), (0, 2, 1)), (BLOCK_N, 2 * BLOCK_R))
    return high, low


@triton.jit
def cap_scores(s, soft_cap):
    """soft_cap tanh(s / soft_cap), s and the result in log2 units, soft_cap in natural ones."""
    cap = soft_cap * LOG2_E
    return cap - 2.0 * cap / (tl.exp2(s * (2.0 * LOG2_E / cap)) + 1.0)


@triton.jit
def is_visible(tokens, ends, window):
    """(BLOCK_N, BLOCK_R): whether a row whose keys end before ``ends`` sees a token."""
    visible = tokens[:, None] < ends[None, :]
    if window is not None:
        visible &= tokens[:, None] >= ends[None, :] - window
    return visible


@triton.jit
def full_tiles(begin, stop, least_end, greatest_end, window, BLOCK_N: tl.constexpr):
    """(first, end) of the tiles from begin to stop that every row sees whole."""
    low = begin
    if window is not None:
        low = tl.maximum(low, tl.cdiv(tl.maximum(greatest_end - window, 0), BLOCK_N))
    low = tl.minimum(low, stop)
    return low, tl.maximum(low, tl.minimum(stop, tl.maximum(least_end, 0) // BLOCK_N))


@triton.jit
def softmax_step(s, m, total, shift, IS_MASKED: tl.constexpr):
    """(2^(s - max + shift), scale of what was before, new max, new total) of a tile of scores.

    ``total`` stays a tile, summed over tokens at the end only.
    """
    new = tl.maximum(m, tl.max(s, axis=0))
    safe = new
    if IS_MASKED:  # rows that have seen nothing yet
        safe = tl.where(new == float("-inf"), 0.0, new)
    alpha = tl.exp2(m - safe)
    p = tl.exp2(s - (safe - shift)[None, :])
    return p, alpha, new, total * alpha[None, :] + p
