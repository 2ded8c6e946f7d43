"""y = x . w^T, both operands block-scaled: MXFP8 and NVFP4 and MXFP4 (W4A4), or MXFP4 by MXFP8 (W4A8).

Math:    y[m, n] = xg wg sum_b xs[m, b] ws[n, b] sum_{k in b} x[m, k] w[n, k], b = k / 32 (NVFP4: k / 16);
         xg, wg are NVFP4's FP32 scales per tensor, 1 otherwise.
Shapes:  x (M, K), w (N, K) float8_e4m3fn, or (M, K / 2), (N, K / 2) uint8, two E2M1 codes a byte, even k
         low; xs (M, K / 32), ws (N, K / 32) uint8 E8M0, or (., K / 16) float8_e4m3fn for NVFP4.
Kernel:  one, computing a . b^T for the operand ``a`` on the M side of the matrix instruction: the tokens
         where there are many, the weights where there are at most 64, so that the 128 rows of a Blackwell
         instruction are all used. Block-scaled ``tcgen05`` on sm_100 and sm_103, block-scaled ``mma.sync``
         on sm_120. There Triton has no instruction for MXFP4 by MXFP8, so the kernel expands the E2M1 codes to
         E4M3, exactly, and multiplies MXFP8 by MXFP8. Elsewhere Triton widens MX operands to BF16, and NVFP4
         is refused: there, FP4 weights prepared once for ``w4a16_matmul`` are the better way.
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  OCP Microscaling Formats 1.0; PTX ISA, ``tcgen05.mma`` kinds mxf8f6f4, mxf4nvf4; Triton ``tl.dot_scaled``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require, seen
from .split_k import arch_of, check_out, plan_splits, split_target, sum_splits
from .tiles import Tile, find_tile
from .w4a8_matmul import bytes_as_e4m3, prmt

MAX_FEW_TOKENS = 64
OPERANDS = {
    # format: (dtype of the codes, codes per byte, values per scale, dtype of the scale)
    "mxfp8": (torch.float8_e4m3fn, 1, 32, torch.uint8),
    "mxfp4": (torch.uint8, 2, 32, torch.uint8),
    "nvfp4": (torch.uint8, 2, 16, torch.float8_e4m3fn),
}


@triton.jit
def _e2m1_as_e4m3(w, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS / 8) words of eight codes, the first lowest -> (ROWS, COLUMNS) E4M3 of the same value."""
    selector, raised = w & 0x77777777, w << 4
    value_0 = prmt(0x3C383000, 0x4C484440, selector)  # the eight magnitudes: 0 to 1.5, 2 to 6
    value_1 = prmt(0x3C383000, 0x4C484440, selector >> 16)
    sign_0 = prmt(raised, w, 0x5140) & -0x7F7F7F80  # each code at the top of its byte; 0x80808080
    sign_1 = prmt(raised, w, 0x7362) & -0x7F7F7F80
    return tl.reshape(bytes_as_e4m3(tl.join(value_0 | sign_0, value_1 | sign_1)), (ROWS, COLUMNS))


@triton.jit
def accumulate_block_scaled(
    a_ptrs, b_ptrs, as_ptrs, bs_ptrs, mask_a, mask_b, K, first, last,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PACK_A: tl.constexpr,
    PACK_B: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_A, BLOCK_B) FP32: a . b^T over tiles of BLOCK_K from ``first`` to ``last``.

    Pointers at tile ``first``: a (BLOCK_A, BLOCK_K / PACK_A), b (BLOCK_K / PACK_B, BLOCK_B), scales (rows, BLOCK_K /
    GROUP). PACK: codes per element: 1 (E4M3), 2 (E2M1 in bytes) or 8 (E2M1 in int32, to be expanded to E4M3).
    """
    offs_ka = first * (BLOCK_K // PACK_A) + tl.arange(0, BLOCK_K // PACK_A)
    offs_kb = first * (BLOCK_K // PACK_B) + tl.arange(0, BLOCK_K // PACK_B)
    offs_s = first * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
    kind_a: tl.constexpr = "e2m1" if PACK_A == 2 else "e4m3"
    kind_b: tl.constexpr = "e2m1" if PACK_B == 2 else "e4m3"
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for _ in range(first, last):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=mask_a[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=mask_b[None, :], other=0.0)
            a_scale = tl.load(as_ptrs, mask=mask_a[:, None], other=0.0)
            b_scale = tl.load(bs_ptrs, mask=mask_b[:, None], other=0.0)
        else:
            mask_ka, mask_kb, mask_s = offs_ka < K // PACK_A, offs_kb < K // PACK_B, offs_s < K // GROUP
            a = tl.load(a_ptrs, mask=mask_a[:, None] & mask_ka[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_b[None, :] & mask_kb[:, None], other=0.0)
            a_scale = tl.load(as_ptrs, mask=mask_a[:, None] & mask_s[None, :], other=0.0)
            b_scale = tl.load(bs_ptrs, mask=mask_b[:, None] & mask_s[None, :], other=0.0)
        if PACK_A == 8:
            a = _e2m1_as_e4m3(a, BLOCK_A, BLOCK_K)
        if PACK_B == 8:
            b = tl.trans(_e2m1_as_e4m3(tl.trans(b), BLOCK_B, BLOCK_K))
        acc = tl.dot_scaled(a, a_scale, kind_a, b, b_scale, kind_b, acc)
        a_ptrs += BLOCK_K // PACK_A
        b_ptrs += BLOCK_K // PACK_B
        as_ptrs += BLOCK_K // GROUP
        bs_ptrs += BLOCK_K // GROUP
        offs_ka += BLOCK_K // PACK_A
        offs_kb += BLOCK_K // PACK_B
        offs_s += BLOCK_K // GROUP
    return acc


@triton.jit
def _block_scaled_kernel(
    a_ptr, b_ptr, as_ptr, bs_ptr, factor_ptr, y_ptr,
    A, B, K, stride_a, stride_b, stride_as, stride_bs, stride_ya, stride_yb, stride_ys, k_tiles_per_split,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PACK_A: tl.constexpr,
    PACK_B: tl.constexpr, EVEN_K: tl.constexpr, GROUP_A: tl.constexpr,
):  # fmt: skip
    """y[a, b] = factor sum_k a[a, k] b[b, k] over a range of k; programs go in bands of GROUP_A tiles of a."""
    tiles_a, tiles_b = tl.cdiv(A, BLOCK_A), tl.cdiv(B, BLOCK_B)
    tile, pid_k = tl.program_id(0), tl.program_id(1)
    band = tile // (GROUP_A * tiles_b)
    tall = tl.minimum(tiles_a - band * GROUP_A, GROUP_A)
    within = tile % (GROUP_A * tiles_b)
    first = pid_k * k_tiles_per_split
    last = tl.minimum(first + k_tiles_per_split, tl.cdiv(K, BLOCK_K))
    offs_a = (band * GROUP_A + within % tall) * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_b = within // tall * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_a, mask_b = offs_a < A, offs_b < B
    offs_ka = first * (BLOCK_K // PACK_A) + tl.arange(0, BLOCK_K // PACK_A)
    offs_kb = first * (BLOCK_K // PACK_B) + tl.arange(0, BLOCK_K // PACK_B)
    offs_s = first * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
    acc = accumulate_block_scaled(
        a_ptr + offs_a[:, None].to(tl.int64) * stride_a + offs_ka[None, :],
        b_ptr + offs_b[None, :].to(tl.int64) * stride_b + offs_kb[:, None],
        as_ptr + offs_a[:, None].to(tl.int64) * stride_as + offs_s[None, :],
        bs_ptr + offs_b[:, None].to(tl.int64) * stride_bs + offs_s[None, :],
        mask_a, mask_b, K, first, last, BLOCK_A, BLOCK_B, BLOCK_K, GROUP, PACK_A, PACK_B, EVEN_K,
    )  # fmt: skip
    acc = acc * tl.load(factor_ptr)
    y_ptrs = y_ptr + pid_k.to(tl.int64) * stride_ys
    y_ptrs += offs_a[:, None].to(tl.int64) * stride_ya + offs_b[None, :].to(tl.int64) * stride_yb
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_a[:, None] & mask_b[None, :])


def block_scaled_matmul(
    x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, format: str, *,
    x_format: str | None = None, global_scale: torch.Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16,
    tile: Tile | None = None, split_k: int | None = None,
    workspace: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y = x . w^T with ``w`` in ``format`` and ``x`` in ``x_format`` -> (M, N) BF16 or FP32.

    Args:
        format: "mxfp8", "mxfp4" or "nvfp4"; shapes and dtypes as in the module's text. K divides by 32
            (NVFP4: 16 values share a scale, K still divides by 32).
        x_format: the activations' where it differs: "mxfp8" beside "mxfp4" weights (W4A8).
        global_scale: NVFP4 only, float32 of one value: the product of both tensors' scales.
        tile: by default that of ``tiles.py``.
        split_k, workspace: parts of k summed in a fixed order, and float32 room for split_k * M * N values;
            by default, up to 64 tokens, as many as fill the GPU.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    require(format in OPERANDS, "format", f"one of {', '.join(OPERANDS)}", repr(format))
    if format == "nvfp4" and x.device.type == "cuda":  # Triton 3.6.0 aborts the process compiling it for less
        major = torch.cuda.get_device_capability(x.device)[0]
        require(major >= 10, "format", "mxfp8 or mxfp4 below compute capability 10", f"nvfp4 on capability {major}")
    x_format = x_format or format
    is_pair = x_format == format or (format, x_format) == ("mxfp4", "mxfp8")
    require(is_pair, "x_format", f"{format}" + " or mxfp8" * (format == "mxfp4"), repr(x_format))
    dtype, pack, group, scale_dtype = OPERANDS[format]
    x_dtype, x_pack, _, _ = OPERANDS[x_format]
    for name, tensor, expected in (("x", x, x_dtype), ("w", w, dtype),
                                   ("x_scale", x_scale, scale_dtype), ("w_scale", w_scale, scale_dtype)):  # fmt: skip
        require(tensor.dim() == 2 and tensor.dtype == expected, name, f"{expected}, two axes", seen(tensor))
        require(tensor.stride(1) == 1, name, "a contiguous last axis", f"stride {tensor.stride()}")
        require(tensor.device == x.device, name, f"device {x.device}", tensor.device)
    tokens, rows, columns = x.shape[0], w.shape[0], x.shape[1] * x_pack
    require(columns > 0 and columns % 32 == 0, "x", "K a multiple of 32", f"K = {columns}")
    require(w.shape[1] * pack == columns, "w", f"K = {columns}, as x", f"K = {w.shape[1] * pack}")
    require(rows > 0, "w", "N of 1 or more", seen(w))
    for name, scale, size in (("x_scale", x_scale, tokens), ("w_scale", w_scale, rows)):
        require(tuple(scale.shape) == (size, columns // group), name, f"{(size, columns // group)}", seen(scale))
    if format == "nvfp4":
        require(global_scale is not None, "global_scale", "float32 of one value for nvfp4", global_scale)
        assert global_scale is not None
        fits = global_scale.dtype == torch.float32 and global_scale.numel() == 1 and global_scale.device == x.device
        require(fits, "global_scale", f"float32 of one value on {x.device}", seen(global_scale))
    else:
        require(global_scale is None, "global_scale", f"None for {format}", global_scale)
        global_scale = torch.ones((), device=x.device)
    out = check_out(out, tokens, rows, out_dtype, x.device)
    is_few = tokens <= MAX_FEW_TOKENS
    pair = format if x_format == format else f"{format}_{x_format}"
    arch = arch_of(x.device)
    tile = tile or find_tile("block_scaled", pair, arch, tokens, n=rows, k=columns)
    if pair == "mxfp4_mxfp8" and arch.startswith("sm_12"):
        is_aligned = w.storage_offset() % 4 == 0 and w.stride(0) % 4 == 0
        require(is_aligned, "w", "rows on a grid of 4 bytes", f"offset {w.storage_offset()}, stride {w.stride()}")
        w, pack = w.view(torch.int32), 8  # to be expanded
    k_tiles, num_tiles = triton.cdiv(columns, tile.block_k), triton.cdiv(tokens, tile.block_m)
    num_tiles *= triton.cdiv(rows, tile.block_n)
    splits, per_split = plan_splits(split_k if is_few or split_k else 1, num_tiles, k_tiles, x.device)
    target = split_target(out, workspace, splits)
    if tokens == 0:
        return out
    x_side = (x, x_scale, tokens, tile.block_m, target.stride(-2), x_pack)
    w_side = (w, w_scale, rows, tile.block_n, 1, pack)
    a, b = (w_side, x_side) if is_few else (x_side, w_side)
    _block_scaled_kernel[(num_tiles, splits)](
        a[0], b[0], a[1], b[1], global_scale, target,
        a[2], b[2], columns, a[0].stride(0), b[0].stride(0), a[1].stride(0), b[1].stride(0), a[4], b[4],
        target.stride(0) if splits > 1 else 0, per_split,
        BLOCK_A=a[3], BLOCK_B=b[3], BLOCK_K=tile.block_k, GROUP=group, PACK_A=a[5], PACK_B=b[5],
        EVEN_K=columns % tile.block_k == 0, GROUP_A=8, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    sum_splits(target, out)
    return out
