"""Quantize activations to FP8, MX and NVFP4, bit-equal to ``codec.quantize``.

Math:    code[m, k] = element(x[m, k] / scale), scale from the largest magnitude of its tensor, row or
         block; the float32 operations, and their order, are those of ``codec.quantize``.
Shapes:  x (M, K) BF16 or FP32; data, scale and global_scale as in ``codec.QuantizedTensor``.
Layout:  rows of x and of the data may lie any distance apart (64-bit offsets), their last axis is
         contiguous; scales may have any strides, so they can be written transposed. FP4: element 0 in
         the low nibble. What lies between rows is not touched.
Bytes:   M K (size of x + bits_per_value / 8); x is read twice where a scale covers a row or the
         tensor (the second time from the cache if it fits). Flops: about 4 M K, hidden by the bytes.
Accuracy: exact: every code and scale equals the codec's. Divisions are IEEE (``div_rn``; Triton's ``/``
         is approximate on a GPU) or products with an exact power of two. E4M3 is rounded by the cast
         (nearest even, saturating, on sm_89 and later), E2M1 by float32's own rounding, not by ``cvt``.
Edges:   M may be 0; zeros, NaN, infinity and subnormals as the table in ``codec.py`` says. K must
         divide by the block of mxfp8, mxfp4 and nvfp4; the last group of fp8_group may be partial.
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Capture: nothing waits for the device, every launch depends on shapes only. Two launches where a scale
         covers the tensor (fp8; nvfp4 without ``global_scale``): partial maxima, then codes; the result
         does not depend on the order of the programs.
Source:  OCP Microscaling Formats (MX) v1.0; see ``codec.py`` for the rules.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import quantize_tiles
from .checks import require, seen
from .codec import NVFP4_GLOBAL_MIN, NVFP4_SCALE_MIN, QuantizedTensor
from .formats import ELEMENTS, SCALE_RULES, Format, get_format
from .quantize_tiles import EXACT, amax_launch, needs_tensor_amax, num_partials, quantize_launch

_E4M3_MAX = tl.constexpr(ELEMENTS["e4m3"].max)
_E2M1_MAX = tl.constexpr(ELEMENTS["e2m1"].max)
_SCALE_MIN = tl.constexpr(NVFP4_SCALE_MIN)
_GLOBAL_MIN = tl.constexpr(NVFP4_GLOBAL_MIN)
_E4M3_NAN = tl.constexpr(0x7F)
_INFINITY = tl.constexpr(0x7F800000)  # as bits; what is above is NaN

LARGEST_F32 = torch.finfo(torch.float32).max


# --- device helpers ---------------------------------------------------------------------------


@triton.jit
def magnitude_bits(x):
    """Bits of \\|x|, float32: as integers they are ordered like the magnitudes, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode_e4m3(x):
    """E4M3FN codes (uint8) of float32 values: nearest even, saturating; any NaN is 0x7F."""
    codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(x == x, codes, _E4M3_NAN).to(tl.uint8)


@triton.jit
def encode_e2m1(x):
    """E2M1 codes (int32, 0..15) of float32 values: nearest even, saturating; any NaN is 7.

    Beside 2^22 times a power of two, float32 values lie as far apart as E2M1 values of that binade, so
    that one addition rounds to nearest even and leaves the code in the low bits.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x40C00000)  # 6.0
    anchor = (tl.maximum(size, 0x3F800000) & 0x7F800000) + (22 << 23)  # 2^22 times 1, 2 or 4
    total = size.to(tl.float32, bitcast=True) + anchor.to(tl.float32, bitcast=True)
    codes = total.to(tl.int32, bitcast=True) - anchor + (anchor >> 22) - 2 * (127 + 22)
    return tl.where(x == x, codes | ((bits >> 28) & 8), 7)


@triton.jit
def encode_e8m0(amax_bits, ELEMENT: tl.constexpr, RULE: tl.constexpr):
    """E8M0 bytes (int32) for blocks whose largest magnitude has these float32 bits."""
    MAX_EXPONENT: tl.constexpr = 8 if ELEMENT == "e4m3" else 2
    MAX_MANTISSA: tl.constexpr = 0x600000 if ELEMENT == "e4m3" else 0x400000
    HALF_ULP: tl.constexpr = 1 << 19 if ELEMENT == "e4m3" else 1 << 21
    exponent = amax_bits >> 23
    if RULE == "rceil":
        exponent += ((amax_bits & 0x7FFFFF) > MAX_MANTISSA).to(tl.int32)
    elif RULE == "even":
        exponent = (amax_bits + HALF_ULP) >> 23
    byte = tl.minimum(tl.maximum(exponent - MAX_EXPONENT, 0), 254)
    if RULE == "rceil":
        byte = tl.where(amax_bits == _INFINITY, 254, byte)
    return tl.where(amax_bits > _INFINITY, 255, byte)


@triton.jit
def e8m0_inverse(byte):
    """Float32 2^(127 - byte), exact: byte 254 gives a subnormal, 255 NaN."""
    bits = tl.where(byte == 254, 1 << 22, (254 - byte) << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def fp8_scale(amax_bits, AMAX_MIN: tl.constexpr):
    """Float32 max(amax, clamp) / 448; AMAX_MIN holds the bits of the clamp."""
    return tl.div_rn(tl.maximum(amax_bits, AMAX_MIN).to(tl.float32, bitcast=True), _E4M3_MAX)


@triton.jit
def load_tile(x_ptr, rows, mask_m, offs_k, K, stride_xm):
    """A tile of x as float32; zeros outside, which change no maximum and no sum."""
    mask = mask_m[:, None] & (offs_k < K)[None, :]
    return tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    values, scale, data_ptr, scale_ptr, rows, mask_m, first_k, K, stride_dm, stride_sm, stride_sk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, AMAX_MIN: tl.constexpr,
):  # fmt: skip
    """Quantize a tile (ROWS, COLUMNS) of float32 whose columns start at first_k; store codes and block scales.

    scale: without blocks (GROUP 0) that of the rows or the tensor; of nvfp4 the global scale; else unused.
    """
    if SCALE == "none":
        codes = values.to(tl.bfloat16)
    elif GROUP == 0:
        codes = encode_e4m3(tl.div_rn(values, scale))
    else:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        blocks = tl.reshape(values, (ROWS, GROUPS, GROUP))
        amax_bits = tl.max(magnitude_bits(blocks), axis=2)
        if SCALE == "f32":
            stored = fp8_scale(amax_bits, AMAX_MIN)
            blocks = tl.div_rn(blocks, stored[:, :, None])
        elif SCALE == "e8m0":
            byte = encode_e8m0(amax_bits, ELEMENT, RULE)
            stored = byte.to(tl.uint8)
            blocks = blocks * e8m0_inverse(byte)[:, :, None]
        else:
            wanted = tl.div_rn(tl.div_rn(amax_bits.to(tl.float32, bitcast=True), _E2M1_MAX), scale)
            wanted = tl.where(wanted < _SCALE_MIN, _SCALE_MIN, wanted)  # NaN stays
            wanted = tl.where(wanted > _E4M3_MAX, _E4M3_MAX, wanted)
            stored = encode_e4m3(wanted)
            decoded = stored.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            blocks = blocks * tl.div_rn(tl.div_rn(1.0, scale), decoded)[:, :, None]
        offs_g = first_k // GROUP + tl.arange(0, GROUPS)
        scale_ptrs = scale_ptr + rows[:, None] * stride_sm + offs_g[None, :].to(tl.int64) * stride_sk
        tl.store(scale_ptrs, stored, mask=mask_m[:, None] & (offs_g * GROUP < K)[None, :])
        if ELEMENT == "e2m1":
            low, high = tl.split(tl.reshape(encode_e2m1(blocks), (ROWS, COLUMNS // 2, 2)))
            codes = (low | (high << 4)).to(tl.uint8)
        else:
            codes = tl.reshape(encode_e4m3(blocks), (ROWS, COLUMNS))
    PACK: tl.constexpr = 2 if ELEMENT == "e2m1" else 1
    offs = first_k // PACK + tl.arange(0, COLUMNS // PACK)
    data_ptrs = data_ptr + rows[:, None] * stride_dm + offs[None, :]
    tl.store(data_ptrs, codes, mask=mask_m[:, None] & (offs < K // PACK)[None, :])


# --- kernels ----------------------------------------------------------------------------------


@triton.jit
def _amax_kernel(x_ptr, partials_ptr, M, K, stride_xm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Each program's largest magnitude, as bits, over every num_programs-th tile."""
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(K, BLOCK_K)
    best = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for tile in range(pid, tl.cdiv(M, BLOCK_M) * tiles_k, tl.num_programs(0)):
        rows = (tile // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
        best = tl.maximum(best, magnitude_bits(load_tile(x_ptr, rows, rows < M, offs_k, K, stride_xm)))
    tl.store(partials_ptr + pid, tl.max(tl.max(best, axis=1), axis=0))


@triton.jit
def _quantize_kernel(
    x_ptr, data_ptr, scale_ptr, tensor_scale_ptr, partials_ptr,
    M, K, num_partials, stride_xm, stride_dm, stride_sm, stride_sk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PARTIALS: tl.constexpr, PER: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, AMAX_MIN: tl.constexpr,
):  # fmt: skip
    """PARTIALS > 0: the tensor's scale comes from partial maxima, and program (0, 0) stores it."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < M
    tiles_k = tl.cdiv(K, BLOCK_K)
    scale = 1.0
    if PER == "row":
        best = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        for tile in range(0, tiles_k):
            offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            best = tl.maximum(best, magnitude_bits(load_tile(x_ptr, rows, mask_m, offs_k, K, stride_xm)))
        row_scale = fp8_scale(tl.max(best, axis=1), AMAX_MIN)
        tl.store(scale_ptr + rows * stride_sm, row_scale, mask=mask_m)
        scale = row_scale[:, None]
    elif PARTIALS > 0:
        offs_p = tl.arange(0, PARTIALS)
        amax_bits = tl.max(tl.load(partials_ptr + offs_p, mask=offs_p < num_partials, other=0), axis=0)
        if SCALE == "f32":
            scale = fp8_scale(amax_bits, AMAX_MIN)
        else:
            scale = tl.div_rn(amax_bits.to(tl.float32, bitcast=True), _E4M3_MAX * _E2M1_MAX)
            scale = tl.where(scale < _GLOBAL_MIN, _GLOBAL_MIN, scale)  # NaN stays
        tl.store(tensor_scale_ptr, scale, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    elif SCALE == "e4m3":
        scale = tl.load(tensor_scale_ptr)
    for tile in range(tl.program_id(1), tiles_k, tl.num_programs(1)):
        offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        values = load_tile(x_ptr, rows, mask_m, offs_k, K, stride_xm)
        store_tile(
            values, scale, data_ptr, scale_ptr, rows, mask_m, tile * BLOCK_K, K, stride_dm, stride_sm, stride_sk,
            BLOCK_M, BLOCK_K, GROUP, ELEMENT, SCALE, RULE, AMAX_MIN,
        )  # fmt: skip


# --- wrappers ---------------------------------------------------------------------------------


def empty_quantized(format: Format | str, rows: int, columns: int, device: torch.device | str) -> QuantizedTensor:
    """An unwritten ``QuantizedTensor`` to pass as ``out``.

    Raises:
        ValueError: an unknown format, or columns that its block does not divide.
    """
    row = format if isinstance(format, Format) else get_format(format)
    data_dtype = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e2m1": torch.uint8}[row.element]
    scale_dtype = {"f32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}.get(row.scale)
    data = torch.empty(row.data_shape(rows, columns), dtype=data_dtype, device=device)
    shape = row.scale_shape(rows, columns)
    scale = None if shape is None else torch.empty(shape, dtype=scale_dtype, device=device)
    tensor_scale = torch.empty((), dtype=torch.float32, device=device) if row.tensor_scale else None
    return QuantizedTensor(row, data, scale, tensor_scale, (rows, columns))


def check_matrix(argument: str, x: torch.Tensor) -> None:
    """A matrix that the kernels read: BF16 or FP32, K >= 1, last axis contiguous."""
    require(isinstance(x, torch.Tensor), argument, "a tensor (M, K)", type(x).__name__)
    good = x.dim() == 2 and x.dtype in (torch.bfloat16, torch.float32) and x.shape[1] > 0
    require(good, argument, "bfloat16 or float32 (M, K), K >= 1", seen(x))
    require(x.stride(1) == 1 or x.shape[1] == 1, argument, "a contiguous last axis", f"strides {x.stride()}")


def check_format(format: Format | str, columns: int, argument: str, extra: tuple[str, ...] = ()) -> Format:
    """The format of an activation, whose block divides the columns; extra: names allowed beside these."""
    row = format if isinstance(format, Format) else get_format(format)
    names = ("fp8", "fp8_row", "fp8_group", "mxfp8", "mxfp4", "nvfp4", *extra)
    require(row.name in names, "format", f"one of {', '.join(names)}", row.name)
    divides = columns % row.column_multiple == 0
    require(divides, argument, f"columns divisible by {row.column_multiple} ({row.name})", columns)
    return row


def check_options(
    row: Format, device: torch.device, scale_rule: str | None, global_scale: float | torch.Tensor | None
) -> None:
    """The options that only some formats have."""
    if scale_rule is not None:
        require(row.scale_rule is not None, "scale_rule", f"None ({row.name})", repr(scale_rule))
        require(scale_rule in SCALE_RULES, "scale_rule", f"one of {', '.join(SCALE_RULES)}", repr(scale_rule))
    if global_scale is None:
        return
    require(row.tensor_scale, "global_scale", f"None ({row.name})", type(global_scale).__name__)
    if isinstance(global_scale, torch.Tensor):
        good = global_scale.dtype == torch.float32 and global_scale.shape == () and global_scale.device == device
        got = f"{seen(global_scale)} on {global_scale.device}"
        require(good, "global_scale", f"a number, or float32 () on {device}", got)
    else:
        good = isinstance(global_scale, (int, float)) and NVFP4_GLOBAL_MIN <= global_scale <= LARGEST_F32
        require(good, "global_scale", "a finite number >= 2^-118", repr(global_scale))


def prepare_out(row: Format, shape: tuple[int, int], device: torch.device, out: QuantizedTensor | None,
                global_scale: float | torch.Tensor | None) -> QuantizedTensor:  # fmt: skip
    """``out``, checked or made, with a given global scale already in it."""
    if out is None:
        out = empty_quantized(row, *shape, device)
    else:
        require(isinstance(out, QuantizedTensor), "out", "a QuantizedTensor", type(out).__name__)
        got = f"{out.format.name} {tuple(out.shape)} on {out.data.device}"
        good = out.format == row and tuple(out.shape) == shape and out.data.device == device
        require(good, "out", f"{row.name} {shape} on {device}", got)
        data = out.data
        apart = (data.stride(1) == 1 or data.shape[1] == 1) and (data.stride(0) >= data.shape[1] or shape[0] <= 1)
        require(apart, "out", "data whose rows are contiguous and do not overlap", f"strides {data.stride()}")
    if global_scale is not None:
        assert out.global_scale is not None
        if isinstance(global_scale, torch.Tensor):
            if global_scale is not out.global_scale:
                out.global_scale.copy_(global_scale)
        else:
            out.global_scale.fill_(global_scale)
    return out


def as_bytes(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A tensor as the kernels take it: FP8 as bytes; ``unused`` in place of None."""
    if tensor is None:
        return unused
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def scale_strides(row: Format, scale: torch.Tensor | None) -> tuple[int, int]:
    """Row and column stride of a matrix of scales; zeros without one."""
    return (scale.stride(0), scale.stride(1)) if scale is not None and row.scale_per in ("row", "block") else (0, 0)


def quantize_activation(
    x: torch.Tensor, format: Format | str, *, scale_rule: str | None = None,
    global_scale: float | torch.Tensor | None = None, workspace: torch.Tensor | None = None,
    out: QuantizedTensor | None = None,
) -> QuantizedTensor:  # fmt: skip
    """``x`` (M, K) in ``format``: fp8, fp8_row, fp8_group, mxfp8, mxfp4 or nvfp4.

    Args:
        scale_rule: of MX formats, one of ``SCALE_RULES``; None takes the format's own ("floor").
        global_scale: of nvfp4: a number, or a float32 () on x's device, whose value is not checked (that
            would wait for the device): finite, >= 2^-118. None computes it from ``x``.
        workspace: int32, contiguous, at least ``quantize_tiles.MAX_PARTIALS`` values, for fp8 and nvfp4 without
            ``global_scale``; allocated if None, unused otherwise.
        out: where to write, see ``empty_quantized``; allocated if None.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    check_matrix("x", x)
    row = check_format(format, x.shape[1], "x")
    check_options(row, x.device, scale_rule, global_scale)
    from_amax = needs_tensor_amax(row, has_global_scale=global_scale is not None)
    if workspace is not None:
        good = workspace.dtype == torch.int32 and workspace.is_contiguous() and workspace.device == x.device
        got = f"{workspace.dtype} {workspace.numel()} on {workspace.device}"
        expected = f"contiguous int32, at least {quantize_tiles.MAX_PARTIALS} values on {x.device}"
        require(good and workspace.numel() >= quantize_tiles.MAX_PARTIALS, "workspace", expected, got)
    rows, columns = x.shape
    out = prepare_out(row, (rows, columns), x.device, out, global_scale)
    if rows == 0 and not from_amax:
        return out
    launch = quantize_launch(row, columns, scale_rule, from_amax=from_amax)
    tiles_m, tiles_k = triton.cdiv(rows, launch.block_m), triton.cdiv(columns, launch.block_k)
    partials = num_partials(rows, columns) if from_amax else 0
    if from_amax:
        first = amax_launch(columns)
        if workspace is None:
            workspace = torch.empty(quantize_tiles.MAX_PARTIALS, dtype=torch.int32, device=x.device)
        _amax_kernel[(partials,)](
            x, workspace, rows, columns, x.stride(0), num_warps=first.num_warps, **first.constants, **EXACT
        )
    _quantize_kernel[(max(1, tiles_m), 1 if row.scale_per == "row" else tiles_k)](
        x, as_bytes(out.data, x), as_bytes(out.scale, x),
        out.scale if row.scale_per == "tensor" else as_bytes(out.global_scale, x), workspace if from_amax else x,
        rows, columns, partials, x.stride(0), out.data.stride(0), *scale_strides(row, out.scale),
        num_warps=launch.num_warps, **launch.constants, **EXACT,
    )  # fmt: skip
    return out
