"""RMSNorm + quantize and SwiGLU + quantize: the BF16 activation never reaches memory.

Math:    rms_norm: h = x [+ residual, rounded to the residual's dtype];
             y = bf16((h * (1 / sqrt(mean(h^2) + eps))) * weight).
         swiglu: y = bf16((g / (1 + exp(-g))) * u), with g the first and u the second half of a row; with
             ``limit`` (gpt-oss): g = min(g, limit), u = clamp(u, -limit, limit),
             y = bf16((g / (1 + exp(-alpha g))) * (u + 1)).
         Then y is quantized as ``codec.quantize`` would. All in float32, each operation rounded once, and
         rounded to BF16 before the scale is taken: what a BF16 model that quantizes afterwards computes.
Shapes:  x, residual (M, K), weight (K,), gate_up (M, 2 I), BF16 or FP32; results (M, K) or (M, I).
Layout:  rows of any stride, last axis contiguous. Gate and up are halves of a row, not interleaved.
Bytes:   rms_norm: M K (size of x [+ 2 x size of residual] + bits_per_value / 8); swiglu: M I (2 x size +
         bits_per_value / 8). fp8, and nvfp4 without ``global_scale``, need the maximum of the tensor
         first: y goes through memory as BF16, 2 + 2 x 2 bytes per value more.
Accuracy: codes and scales are the codec's for the BF16 y of ``format="bf16"``. Before its rounding to
         BF16, y is off by at most: swiglu, 2^-22 (2 + |g|) relative (exp; |alpha g| with ``limit``);
         rms_norm, (log2(K) / 2 + 14) 2^-24 relative (a sum of squares: 16 per thread, then a tree) where no
         square underflows or overflows. So y is the nearest BF16, but for values that close to a midpoint;
         elementwise steps equal plain float32 torch bit for bit, a device's ``exp`` apart.
Edges:   M may be 0. A row of zeros gives y = 0, since eps > 0. A NaN or infinity in a row of rms_norm makes
         its whole row NaN or 0 x inf, as the formula says; a gate of -inf gives NaN, below -88 gives -0.
Errors:  ``ValueError`` before any launch, naming argument, expected, got. K <= ``MAX_COLUMNS`` (16384) in rms_norm.
Source:  Zhang and Sennrich 2019 (RMSNorm); Shazeer 2020 (SwiGLU); gpt-oss (limit 7, alpha 1.702).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require, seen
from .codec import QuantizedTensor
from .formats import BF16, Format
from .quantize import (
    as_bytes,
    check_format,
    check_matrix,
    check_options,
    empty_quantized,
    fp8_scale,
    load_tile,
    magnitude_bits,
    prepare_out,
    quantize_activation,
    scale_strides,
    store_tile,
)
from .quantize_tiles import EXACT, MAX_COLUMNS, needs_tensor_amax, rms_norm_launch, swiglu_launch

GPT_OSS_ALPHA = 1.702


@triton.jit
def _rms_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, residual_out_ptr, data_ptr, scale_ptr, tensor_scale_ptr,
    K, eps, stride_xm, stride_rm, stride_om, stride_dm, stride_sm, stride_sk,
    BLOCK_K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PER: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, AMAX_MIN: tl.constexpr,
):  # fmt: skip
    """One row per program."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mask_m = rows >= 0
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    x = load_tile(x_ptr, rows, mask_m, offs_k, K, stride_xm)
    if HAS_RESIDUAL:
        total = x + load_tile(residual_ptr, rows, mask_m, offs_k, K, stride_rm)
        total = total.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + rows[:, None] * stride_om + offs_k[None, :], total, mask=mask_k[None, :])
        x = total.to(tl.float32)
    mean = tl.div_rn(tl.sum(x * x, axis=1), K * 1.0)  # K may be a constant
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    y = (x * inverse[:, None] * weight[None, :]).to(tl.bfloat16).to(tl.float32)  # zeros, or all NaN, in the tail
    scale = 1.0
    if PER == "row":
        row_scale = fp8_scale(tl.max(magnitude_bits(y), axis=1), AMAX_MIN)
        tl.store(scale_ptr + rows * stride_sm, row_scale)
        scale = row_scale[:, None]
    elif SCALE == "e4m3":
        scale = tl.load(tensor_scale_ptr)
    store_tile(
        y, scale, data_ptr, scale_ptr, rows, mask_m, 0, K, stride_dm, stride_sm, stride_sk,
        1, BLOCK_K, GROUP, ELEMENT, SCALE, RULE, AMAX_MIN,
    )  # fmt: skip


@triton.jit
def swiglu(gate, up, limit, alpha, CLAMPED: tl.constexpr):
    """gate sigmoid(gate) up of float32 tiles; CLAMPED: gpt-oss's, gate at most limit, up within it, sigmoid of alpha
    times the gate, up + 1. NaN stays NaN: a minimum would hide it."""
    if CLAMPED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        return tl.div_rn(gate, 1.0 + tl.exp(-(gate * alpha))) * (up + 1.0)
    return tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up


@triton.jit
def _swiglu_tile(gate_up_ptr, rows, mask_m, offs_k, K, stride_xm, limit, alpha, CLAMPED: tl.constexpr):
    """A tile of y, rounded to BF16, as float32; zeros outside."""
    gate = load_tile(gate_up_ptr, rows, mask_m, offs_k, K, stride_xm)
    up = load_tile(gate_up_ptr + K, rows, mask_m, offs_k, K, stride_xm)
    return swiglu(gate, up, limit, alpha, CLAMPED).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _swiglu_quantize_kernel(
    gate_up_ptr, data_ptr, scale_ptr, tensor_scale_ptr,
    M, K, stride_xm, stride_dm, stride_sm, stride_sk, limit, alpha,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CLAMPED: tl.constexpr, PER: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, AMAX_MIN: tl.constexpr,
):  # fmt: skip
    """K: columns of the result, half of a row."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < M
    tiles_k = tl.cdiv(K, BLOCK_K)
    scale = 1.0
    if PER == "row":
        best = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        for tile in range(0, tiles_k):
            offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            y = _swiglu_tile(gate_up_ptr, rows, mask_m, offs_k, K, stride_xm, limit, alpha, CLAMPED)
            best = tl.maximum(best, magnitude_bits(y))
        row_scale = fp8_scale(tl.max(best, axis=1), AMAX_MIN)
        tl.store(scale_ptr + rows * stride_sm, row_scale, mask=mask_m)
        scale = row_scale[:, None]
    elif SCALE == "e4m3":
        scale = tl.load(tensor_scale_ptr)
    for tile in range(tl.program_id(1), tiles_k, tl.num_programs(1)):
        offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        y = _swiglu_tile(gate_up_ptr, rows, mask_m, offs_k, K, stride_xm, limit, alpha, CLAMPED)
        store_tile(
            y, scale, data_ptr, scale_ptr, rows, mask_m, tile * BLOCK_K, K, stride_dm, stride_sm, stride_sk,
            BLOCK_M, BLOCK_K, GROUP, ELEMENT, SCALE, RULE, AMAX_MIN,
        )  # fmt: skip


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, format: Format | str, *,
    residual: torch.Tensor | None = None, residual_out: torch.Tensor | None = None, scale_rule: str | None = None,
    global_scale: float | torch.Tensor | None = None, out: QuantizedTensor | None = None,
) -> tuple[QuantizedTensor, torch.Tensor | None]:  # fmt: skip
    """RMSNorm of ``x`` (M, K) [+ ``residual``] in ``format``, and the updated residual (None without one).

    Args:
        format: one of ``quantize_activation``'s, or "bf16" for y itself.
        residual_out: where the updated residual goes, of the residual's shape and dtype; it may be
            ``residual`` itself; allocated if None.
        scale_rule, global_scale, out: as in ``quantize_activation``.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    check_matrix("x", x)
    rows, columns = x.shape
    require(columns <= MAX_COLUMNS, "x", f"at most {MAX_COLUMNS} columns", columns)
    good = isinstance(weight, torch.Tensor) and weight.dtype in (torch.bfloat16, torch.float32)
    got = f"{seen(weight)} on {weight.device}" if good else type(weight).__name__
    good = good and tuple(weight.shape) == (columns,) and weight.is_contiguous() and weight.device == x.device
    require(good, "weight", f"contiguous bfloat16 or float32 ({columns},) on {x.device}", got)
    smallest = torch.finfo(torch.float32).tiny
    require(isinstance(eps, float) and smallest <= eps < 1, "eps", f"a number from {smallest:.3g} to below 1", eps)
    row = check_format(format, columns, "x", ("bf16",))
    check_options(row, x.device, scale_rule, global_scale)
    if residual is not None:
        check_matrix("residual", residual)
        got = f"{tuple(residual.shape)} on {residual.device}"
        require(got == f"{tuple(x.shape)} on {x.device}", "residual", f"{tuple(x.shape)} on {x.device}", got)
    if residual_out is not None:
        require(residual is not None, "residual_out", "None without residual", tuple(residual_out.shape))
        assert residual is not None
        check_matrix("residual_out", residual_out)
        expected = f"{residual.dtype} {tuple(x.shape)} on {x.device}"
        got = f"{seen(residual_out)} on {residual_out.device}"
        require(got == expected, "residual_out", expected, got)
        apart = residual_out.stride(0) >= columns or rows <= 1
        require(apart, "residual_out", "rows that do not overlap", f"strides {residual_out.stride()}")
    elif residual is not None:
        residual_out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    wanted = out
    in_two_steps = needs_tensor_amax(row, has_global_scale=global_scale is not None)
    if in_two_steps:
        if out is not None:
            prepare_out(row, (rows, columns), x.device, out, None)
        wanted = empty_quantized(BF16, rows, columns, x.device)
    step = BF16 if in_two_steps else row
    target = prepare_out(step, (rows, columns), x.device, wanted, global_scale)
    if rows > 0:
        launch = rms_norm_launch(step, columns, scale_rule, has_residual=residual is not None)
        _rms_norm_quantize_kernel[(rows,)](
            x, x if residual is None else residual, weight, x if residual_out is None else residual_out,
            as_bytes(target.data, x), as_bytes(target.scale, x), as_bytes(target.global_scale, x),
            columns, eps, x.stride(0), 0 if residual is None else residual.stride(0),
            0 if residual_out is None else residual_out.stride(0),
            target.data.stride(0), *scale_strides(step, target.scale),
            num_warps=launch.num_warps, **launch.constants, **EXACT,
        )  # fmt: skip
    if in_two_steps:
        target = quantize_activation(target.data, row, out=out)
    return target, residual_out


def swiglu_quantize(
    gate_up: torch.Tensor, format: Format | str, *, limit: float | None = None, alpha: float | None = None,
    scale_rule: str | None = None, global_scale: float | torch.Tensor | None = None,
    out: QuantizedTensor | None = None,
) -> QuantizedTensor:  # fmt: skip
    """silu(gate) * up of ``gate_up`` (M, 2 I), gate in the first half of each row, in ``format`` (M, I).

    Args:
        format: one of ``quantize_activation``'s, or "bf16" for y itself.
        limit: clamps gate and up and adds 1 to up, as gpt-oss does (with 7.0); None does neither.
        alpha: factor of the gate inside the sigmoid, only with ``limit``; None takes gpt-oss's 1.702.
        scale_rule, global_scale, out: as in ``quantize_activation``.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    check_matrix("gate_up", gate_up)
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    require(gate_up.shape[1] % 2 == 0, "gate_up", "an even number of columns", gate_up.shape[1])
    require(limit is None or 0 < limit < float("inf"), "limit", "None or a positive number", limit)
    require(alpha is None or limit is not None, "alpha", "None without limit", alpha)
    require(alpha is None or 0 < alpha < float("inf"), "alpha", "None or a positive number", alpha)
    row = check_format(format, columns, "gate_up", ("bf16",))
    check_options(row, gate_up.device, scale_rule, global_scale)
    wanted = out
    in_two_steps = needs_tensor_amax(row, has_global_scale=global_scale is not None)
    if in_two_steps:
        if out is not None:
            prepare_out(row, (rows, columns), gate_up.device, out, None)
        wanted = empty_quantized(BF16, rows, columns, gate_up.device)
    step = BF16 if in_two_steps else row
    target = prepare_out(step, (rows, columns), gate_up.device, wanted, global_scale)
    if rows > 0:
        launch = swiglu_launch(step, columns, scale_rule, is_clamped=limit is not None)
        tiles_k = triton.cdiv(columns, launch.block_k)
        grid = (triton.cdiv(rows, launch.block_m), 1 if step.scale_per == "row" else tiles_k)
        _swiglu_quantize_kernel[grid](
            gate_up, as_bytes(target.data, gate_up), as_bytes(target.scale, gate_up),
            as_bytes(target.global_scale, gate_up),
            rows, columns, gate_up.stride(0), target.data.stride(0), *scale_strides(step, target.scale),
            float(limit or 0.0), float(alpha or GPT_OSS_ALPHA),
            num_warps=launch.num_warps, **launch.constants, **EXACT,
        )  # fmt: skip
    if in_two_steps:
        target = quantize_activation(target.data, row, out=out)
    return target
