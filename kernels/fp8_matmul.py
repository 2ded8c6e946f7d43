"""y = x . w^T with FP8 operands (W8A8): one scale per tensor, per row, or per block.

Math:    tensor  y[m, n] = xs ws            sum_k x[m, k] w[n, k]
         row     y[m, n] = xs[m] ws[n]      sum_k x[m, k] w[n, k]
         block   y[m, n] = sum_g xs[m, g] ws[n / 128, g] sum_{k in g} x[m, k] w[n, k], g = k / 128
Shapes:  x (M, K), w (N, K) float8_e4m3fn, last axes contiguous; xs and ws float32 as above ((M, K/128)
         and (N/128, K/128) rounded up for block); y (M, N) BF16 or FP32.
Accuracy: Hopper's FP8 matrix units keep about 14 bits of the running sum, so every 128 of k go into a
         fresh accumulator that is added in FP32.
Kernels: up to 64 tokens the weights are the M side of the matrix instruction and k may be split
         (``_fp8_few_tokens_kernel``); beyond, a persistent kernel reads tiles through tensor
         descriptors (``_fp8_many_tokens_kernel``).
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  DeepSeek-V3 technical report section 3.3 (block scales, promotion to FP32); the swap of operands
         at few tokens follows DeepGEMM and vLLM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .checks import require, seen
from .split_k import arch_of, check_out, num_multiprocessors, plan_splits, split_target, sum_splits
from .tiles import Tile, find_tile

SCALINGS = ("tensor", "row", "block")
MAX_FEW_TOKENS = 64
GROUP = 128


@triton.jit
def accumulate(
    x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, mask_m, mask_n, K, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALING: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_M) FP32: w . x^T over tiles of 128 of k from ``first`` to ``last``, block scales applied.

    Pointers: x (128, BLOCK_M), w (BLOCK_N, 128) at tile ``first``; xs (BLOCK_M), ws (BLOCK_N) at tile 0, advancing by
    one per tile. SCALING "none": operands without scales (BF16), summed by the matrix unit itself.
    """
    offs_k = first * 128 + tl.arange(0, 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(first, last):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[:, None], other=0.0)
        else:
            mask_k = offs_k < K
            x = tl.load(x_ptrs, mask=mask_m[None, :] & mask_k[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        if SCALING == "none":
            acc = tl.dot(w, x, acc)
        else:
            part = tl.dot(w, x)
            if SCALING == "block":
                xs = tl.load(xs_ptrs + tile, mask=mask_m, other=0.0)
                ws = tl.load(ws_ptrs + tile, mask=mask_n, other=0.0)
                part = part * ws[:, None] * xs[None, :]
            acc += part
        x_ptrs += 128
        w_ptrs += 128
        offs_k += 128
    return acc


@triton.jit
def _fp8_few_tokens_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, y_ptr,
    M, N, K, stride_xm, stride_wn, stride_xsm, stride_wsn, stride_ym, stride_ys, k_tiles, k_tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALING: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_M) tile of y^T over a range of k."""
    pid_n, pid_m, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = pid_k * k_tiles_per_split
    last = tl.minimum(first + k_tiles_per_split, k_tiles)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = first * 128 + tl.arange(0, 128)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[None, :].to(tl.int64) * stride_xm + offs_k[:, None]
    w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :]
    xs_ptrs = xs_ptr + offs_m.to(tl.int64) * stride_xsm
    ws_ptrs = ws_ptr + (offs_n // 128).to(tl.int64) * stride_wsn
    acc = accumulate(
        x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, mask_m, mask_n, K, first, last, BLOCK_M, BLOCK_N, SCALING, EVEN_K
    )
    if SCALING == "tensor":
        acc = acc * (tl.load(xs_ptr) * tl.load(ws_ptr))
    if SCALING == "row":
        ws = tl.load(ws_ptr + offs_n, mask=mask_n, other=0.0)
        xs = tl.load(xs_ptr + offs_m, mask=mask_m, other=0.0)
        acc = acc * ws[:, None] * xs[None, :]
    y_ptrs = y_ptr + pid_k.to(tl.int64) * stride_ys + offs_m[None, :].to(tl.int64) * stride_ym + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


@triton.jit
def _fp8_many_tokens_kernel(
    x_desc, w_desc, xs_ptr, ws_ptr, y_ptr,
    M, N, stride_xsm, stride_wsn, stride_ym, k_tiles, num_programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALING: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Persistent: each program takes every ``num_programs``-th tile, in bands of GROUP_M rows of tiles."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, num_programs):
        band = tile // (GROUP_M * tiles_n)
        rows = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        pid_m, pid_n = band * GROUP_M + within % rows, within // rows
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < M, offs_n < N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, k_tiles):
            x = x_desc.load([pid_m * BLOCK_M, k * BLOCK_K])
            w = w_desc.load([pid_n * BLOCK_N, k * BLOCK_K])
            part = tl.dot(x, w.T)
            if SCALING == "block":
                xs = tl.load(xs_ptr + offs_m.to(tl.int64) * stride_xsm + k, mask=mask_m, other=0.0)
                ws = tl.load(ws_ptr + (offs_n // 128).to(tl.int64) * stride_wsn + k, mask=mask_n, other=0.0)
                part = part * xs[:, None] * ws[None, :]
            acc += part
        if SCALING == "tensor":
            acc = acc * (tl.load(xs_ptr) * tl.load(ws_ptr))
        if SCALING == "row":
            xs = tl.load(xs_ptr + offs_m, mask=mask_m, other=0.0)
            ws = tl.load(ws_ptr + offs_n, mask=mask_n, other=0.0)
            acc = acc * xs[:, None] * ws[None, :]
        y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def fp8_matmul(
    x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, scaling: str, *,
    out_dtype: torch.dtype = torch.bfloat16, tile: Tile | None = None, split_k: int | None = None,
    num_programs: int | None = None, workspace: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y = x . w^T: (M, K) by (N, K), both float8_e4m3fn -> (M, N) BF16 or FP32.

    Args:
        x_scale, w_scale: float32; "tensor": one value each; "row": M and N values; "block":
            (M, ceil(K / 128)) and (ceil(N / 128), ceil(K / 128)).
        tile: by default that of ``tiles.py``; its block_k is 128.
        split_k, workspace: as in ``w4a16_matmul``, up to 64 tokens only.
        num_programs: of the persistent kernel, the GPU's multiprocessors by default.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    for name, tensor in (("x", x), ("w", w)):
        require(
            tensor.dim() == 2 and tensor.dtype == torch.float8_e4m3fn, name, "float8_e4m3fn, two axes", seen(tensor)
        )
        require(tensor.stride(1) == 1, name, "a contiguous last axis", f"stride {tensor.stride()}")
        aligned = tensor.stride(0) % 16 == 0 or tensor.shape[0] <= 1
        require(aligned, name, "rows a multiple of 16 bytes apart", f"stride {tensor.stride()}")
    (tokens, columns), rows = x.shape, w.shape[0]
    require(w.shape[1] == columns, "w", f"K = {columns}, as x", f"K = {w.shape[1]}")
    require(rows > 0 and columns > 0, "w", "N and K of 1 or more", seen(w))
    require(scaling in SCALINGS, "scaling", f"one of {', '.join(SCALINGS)}", repr(scaling))
    groups = triton.cdiv(columns, GROUP)
    shapes = {
        "tensor": ((1,), (1,)),
        "row": ((tokens,), (rows,)),
        "block": ((tokens, groups), (triton.cdiv(rows, GROUP), groups)),
    }[scaling]
    scales = []
    for name, scale, shape in (("x_scale", x_scale, shapes[0]), ("w_scale", w_scale, shapes[1])):
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        fits = (
            scale.dtype == torch.float32 and scale.numel() == size and (len(shape) == 1 or tuple(scale.shape) == shape)
        )
        require(fits, name, f"float32 {shape}", seen(scale))
        require(len(shape) == 1 or scale.stride(-1) == 1, name, "a contiguous last axis", f"stride {scale.stride()}")
        scales.append(scale if len(shape) > 1 else scale.reshape(-1).contiguous())
    for name, tensor in (("w", w), ("x_scale", x_scale), ("w_scale", w_scale)):
        require(tensor.device == x.device, name, f"device {x.device}", tensor.device)
    out = check_out(out, tokens, rows, out_dtype, x.device)
    is_few = tokens <= MAX_FEW_TOKENS
    kernel = "fp8" if is_few else "fp8_many"
    tile = tile or find_tile(kernel, scaling, arch_of(x.device), tokens, n=rows, k=columns)
    require(tile.block_k == GROUP, "tile", f"block_k = {GROUP}", tile)
    blocks_m, blocks_n = triton.cdiv(tokens, tile.block_m), triton.cdiv(rows, tile.block_n)
    require(is_few or split_k in (None, 1), "split_k", f"1 beyond {MAX_FEW_TOKENS} tokens", split_k)
    splits, per_split = plan_splits(split_k if is_few else 1, blocks_m * blocks_n, groups, x.device)
    target = split_target(out, workspace, splits)
    if tokens == 0:
        return out
    x_scale, w_scale = scales
    stride_xs, stride_ws = (s.stride(0) if s.dim() == 2 else 0 for s in scales)
    if not is_few:
        x_desc = TensorDescriptor.from_tensor(x, [tile.block_m, GROUP])
        w_desc = TensorDescriptor.from_tensor(w, [tile.block_n, GROUP])
        num_programs = min(blocks_m * blocks_n, num_programs or num_multiprocessors(x.device))
        _fp8_many_tokens_kernel[(num_programs,)](
            x_desc, w_desc, x_scale, w_scale, out,
            tokens, rows, stride_xs, stride_ws, out.stride(0), groups, num_programs,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=GROUP, SCALING=scaling, GROUP_M=8,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return out
    _fp8_few_tokens_kernel[(blocks_n, blocks_m, splits)](
        x, w, x_scale, w_scale, target,
        tokens, rows, columns, x.stride(0), w.stride(0), stride_xs, stride_ws,
        target.stride(-2), target.stride(0) if splits > 1 else 0, groups, per_split,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SCALING=scaling, EVEN_K=columns % GROUP == 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    sum_splits(target, out)
    return out
