"""Encode, decode, pack and unpack every number format: the ground truth, in plain torch.

Kernels must equal this file bit for bit, so each function states its float32 operations and their
order. Works on CPU and CUDA tensors, with equal results: every division is an IEEE float32 division
between tensors, because ``tensor / number`` multiplies by a rounded reciprocal on CUDA.

Layout: a matrix is (rows, columns), row-major, and a block lies along the columns of one row, but for
the 128 x 128 blocks of ``fp8_block``. Units: values are as given; value = code * scale [* global scale].

What happens to the unusual, per scale group (tensor, row or block); other groups never change, except
through a scale that covers the tensor (``fp8``; ``nvfp4`` without a given ``global_scale``):

=====================  =====================================  ==================  ======================
group holds            fp8, fp8_row, fp8_group, fp8_block     mxfp8, mxfp4        nvfp4
=====================  =====================================  ==================  ======================
only zeros             scale amax_clamp / 448, codes +-0      byte 0, codes +-0   scale 2^-9, codes +-0
NaN                    scale NaN, codes 0x7F: all NaN         byte 255: all NaN   scale NaN: all NaN
inf                    scale inf: all NaN                     inf stays inf       saturates (given global)
only subnormals        as far below amax_clamp: codes +-0     byte 0, rounded     as far below 2^-118: +-0
=====================  =====================================  ==================  ======================

Sources: OCP Microscaling Formats (MX) v1.0, sections 5.3, 5.4 and 6.3; OCP 8-bit Floating Point (OFP8)
v1.0; PTX ISA, ``cvt`` (NaN codes of E4M3, E2M1 and UE8M0, saturation); cuBLAS documentation, "1D Block
Scaling" (rule "rceil"); DeepGEMM (amax >= 1e-4); torchao (rule "even", order of NVFP4's operations).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .formats import ELEMENTS, SCALE_RULES, Format, get_format

NVFP4_SCALE_MIN = 2.0**-9
"""Least block scale of NVFP4: the smallest positive E4M3 value, so that no block divides by zero."""

NVFP4_GLOBAL_MIN = 2.0**-118
"""Least global scale of NVFP4: below it, 1 / global / NVFP4_SCALE_MIN would overflow float32."""

AMAX_CLAMP_MIN = 2.0**-117
"""Least ``amax_clamp``: amax_clamp / 448 stays a normal float32."""

E8M0_NAN = 255
_E4M3_NAN = 0x7F
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ELEMENT_OF_MAX = {ELEMENTS[name].max: ELEMENTS[name] for name in ("e4m3", "e2m1")}


def _check_dtype(argument: str, tensor: torch.Tensor, expected: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in expected:
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{argument}: expected a tensor of {' or '.join(map(str, expected))}; got {got}")


def _as_f32(argument: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, which holds every float16 and bfloat16 exactly."""
    _check_dtype(argument, tensor, _FLOATS)
    return tensor.detach().to(torch.float32)


def _divide(numerator: torch.Tensor, number: float) -> torch.Tensor:
    """IEEE float32 numerator / number, on CUDA too."""
    return numerator / torch.full_like(numerator, number)


# --- elements ---------------------------------------------------------------------------------


def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """E4M3FN codes of ``x``: nearest, ties to even, saturating.

    ``x``: float32, bfloat16 or float16, any shape. Returns uint8 of the same shape: sign, 4 exponent
    bits (bias 7), 3 mantissa bits. Above 448, and at infinity, +-448; NaN of any sign is 0x7F; zeros
    and what rounds to zero keep their sign.

    Raises:
        ValueError: another dtype.
    """
    x = _as_f32("x", x)
    # Clamp first: on overflow the cast gave NaN up to torch 2.11 and saturates in 2.13.
    codes = x.clamp(-ELEMENTS["e4m3"].max, ELEMENTS["e4m3"].max).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill(x.isnan(), _E4M3_NAN)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of E4M3FN codes (uint8 or float8_e4m3fn, any shape), exact; 0x7F and 0xFF are NaN.

    Raises:
        ValueError: another dtype.
    """
    _check_dtype("codes", codes, (torch.uint8, torch.float8_e4m3fn))
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """E2M1 codes of ``x``: nearest, ties to even, saturating.

    ``x``: float32, bfloat16 or float16, any shape. Returns uint8 of the same shape with codes 0..15,
    one per byte: sign, 2 exponent bits (bias 1), 1 mantissa bit; magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    Above 6, and at infinity, +-6. NaN has no code: it is 7 (+6), as in PTX, and only a scale can say
    NaN. Zeros and what rounds to zero keep their sign: -0.0 is 8.

    Raises:
        ValueError: another dtype.
    """
    x = _as_f32("x", x)
    size = x.abs()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for code in range(1, 8):
        midpoint = (_E2M1_VALUES[code - 1] + _E2M1_VALUES[code]) / 2
        codes += size > midpoint if code % 2 else size >= midpoint  # a midpoint takes the even code
    codes += x.signbit().to(torch.uint8) * 8
    return codes.masked_fill(x.isnan(), 7)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of E2M1 codes (uint8 0..15, one per byte, any shape), exact; code 8 is -0.0.

    Raises:
        ValueError: another dtype, or a code above 15.
    """
    _check_nibbles(codes)
    values = (*_E2M1_VALUES, *(-value for value in _E2M1_VALUES))
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.long()]


def _check_nibbles(codes: torch.Tensor) -> None:
    _check_dtype("codes", codes, (torch.uint8,))
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes: expected 0..15; got {int(codes.max())}")


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """Two FP4 codes per byte: (..., C) uint8 0..15 -> (..., C / 2) uint8, element 0 in the low nibble.

    Raises:
        ValueError: another dtype, a code above 15, no axis, or an odd C.
    """
    _check_nibbles(codes)
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes: expected an even last axis; got shape {tuple(codes.shape)}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """The codes of ``pack_fp4``: (..., C / 2) uint8 -> (..., C) uint8 0..15.

    Raises:
        ValueError: another dtype, or no axis.
    """
    _check_dtype("packed", packed, (torch.uint8,))
    if packed.ndim == 0:
        raise ValueError("packed: expected at least one axis; got shape ()")
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


# --- scales -----------------------------------------------------------------------------------


def encode_e8m0(amax: torch.Tensor, element_max: float, rule: str) -> torch.Tensor:
    """E8M0 scale bytes (value 2^(byte - 127)) of blocks whose largest magnitude is ``amax``.

    ``amax``: float32, bfloat16 or float16, any shape; its sign is ignored. ``element_max``: 448.0
    (E4M3) or 6.0 (E2M1), with emax = floor(log2(element_max)) of 8 or 2. Returns uint8. Decided on
    the exponent and mantissa bits of the float32, never on a rounded logarithm or a bfloat16:

    - "floor" (OCP MX): 2^(floor(log2(amax)) - emax); the largest elements may saturate.
    - "rceil" (cuBLAS): the smallest power of two >= amax / element_max; nothing saturates.
    - "even": "floor" of amax rounded to the element's mantissa bits, halves up.

    The byte is clamped to 0..254; a zero or subnormal amax gives 0 (2^-127). Infinity counts as 2^128
    for "floor" and "even" and gives 254 for "rceil", as in PTX ``cvt.rp``; NaN gives 255.

    Raises:
        ValueError: another dtype, element_max or rule.
    """
    bits = _as_f32("amax", amax).abs().view(torch.int32)
    if element_max not in _ELEMENT_OF_MAX:
        raise ValueError(f"element_max: expected one of {list(_ELEMENT_OF_MAX)}; got {element_max!r}")
    if rule not in SCALE_RULES:
        raise ValueError(f"rule: expected one of {', '.join(SCALE_RULES)}; got {rule!r}")
    element = _ELEMENT_OF_MAX[element_max]
    exponent = bits >> 23
    if rule == "rceil":
        max_mantissa = int((element.max / 2**element.max_exponent - 1) * 2**23)
        exponent = exponent + ((bits & 0x7FFFFF) > max_mantissa)
    elif rule == "even":
        exponent = (bits + (1 << (22 - element.mantissa_bits))) >> 23
    byte = (exponent - element.max_exponent).clamp(0, 254)
    infinity = 0xFF << 23
    if rule == "rceil":
        byte = byte.masked_fill(bits == infinity, 254)
    return byte.masked_fill(bits > infinity, E8M0_NAN).to(torch.uint8)


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values 2^(byte - 127) of E8M0 bytes (uint8, any shape), exact: 0 is 2^-127, 255 is NaN.

    Raises:
        ValueError: another dtype.
    """
    _check_dtype("codes", codes, (torch.uint8,))
    bits = codes.to(torch.int32) << 23
    bits = bits.masked_fill(codes == 0, 1 << 22)  # 2^-127 is subnormal
    return bits.masked_fill(codes == E8M0_NAN, 0x7FC00000).view(torch.float32)


# --- matrices ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix of logical shape (rows, columns) = (R, C) as stored in ``format``.

    ==========  =======================  ==========================================  ============
    format      data                     scale                                       global_scale
    ==========  =======================  ==========================================  ============
    bf16        bfloat16 (R, C)          None                                        None
    fp8         float8_e4m3fn (R, C)     float32 ()                                  None
    fp8_row     float8_e4m3fn (R, C)     float32 (R, 1)                              None
    fp8_group   float8_e4m3fn (R, C)     float32 (R, ceil(C / 128))                  None
    fp8_block   float8_e4m3fn (R, C)     float32 (ceil(R / 128), ceil(C / 128))      None
    mxfp8       float8_e4m3fn (R, C)     uint8 E8M0 (R, C / 32)                      None
    mxfp4       uint8 packed (R, C / 2)  uint8 E8M0 (R, C / 32)                      None
    nvfp4       uint8 packed (R, C / 2)  float8_e4m3fn (R, C / 16)                   float32 ()
    ==========  =======================  ==========================================  ============

    Raises:
        ValueError: a part whose dtype, shape or presence differs from its row above.
    """

    format: Format
    data: torch.Tensor
    scale: torch.Tensor | None
    global_scale: torch.Tensor | None
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        row = self.format
        if not isinstance(row, Format):
            raise ValueError(f"format: expected a Format; got {row!r}")
        _check_columns("shape", row, self.shape)
        rows, columns = self.shape
        data = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e2m1": torch.uint8}[row.element]
        scale = {"f32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}.get(row.scale)
        _check_part("data", row, self.data, data, row.data_shape(rows, columns))
        _check_part("scale", row, self.scale, scale, row.scale_shape(rows, columns))
        _check_part("global_scale", row, self.global_scale, torch.float32 if row.tensor_scale else None, ())


def _check_part(
    argument: str,
    row: Format,
    part: torch.Tensor | None,
    dtype: torch.dtype | None,
    shape: tuple[int, ...] | None,
) -> None:
    expected = "None" if dtype is None else f"{dtype} {shape}"
    got = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, torch.Tensor) else repr(part)
    if got != expected:
        raise ValueError(f"{argument}: expected {expected} ({row.name}); got {got}")


def _check_columns(argument: str, row: Format, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"{argument}: expected (rows, columns) with columns >= 1; got {tuple(shape)}")
    if shape[1] % row.column_multiple:
        raise ValueError(
            f"{argument}: expected columns divisible by {row.column_multiple} ({row.name}); got {tuple(shape)}"
        )


def _block_amax(x: torch.Tensor, row: Format) -> torch.Tensor:
    """Largest magnitude of each scale's values, shaped like the scales. NaN wins over everything."""
    size = x.abs()
    if row.scale_per == "tensor":
        return size.amax() if size.numel() else size.new_zeros(())
    if row.scale_per == "row":
        return size.amax(dim=1, keepdim=True)
    block_rows, block_columns = row.block or (1, 1)
    padded = torch.nn.functional.pad(size, (0, -size.shape[1] % block_columns, 0, -size.shape[0] % block_rows))
    return padded.unflatten(1, (-1, block_columns)).unflatten(0, (-1, block_rows)).amax(dim=(1, 3))


def _spread(scale: torch.Tensor, row: Format, shape: tuple[int, int]) -> torch.Tensor:
    """Each value's scale: (rows, columns), or what broadcasts to it."""
    if row.block is None:
        return scale
    each = scale.repeat_interleave(row.block[0], dim=0).repeat_interleave(row.block[1], dim=1)
    return each[: shape[0], : shape[1]]


def _encode_elements(x: torch.Tensor, row: Format) -> torch.Tensor:
    if row.element == "e2m1":
        return pack_fp4(encode_e2m1(x))
    return encode_e4m3(x).view(torch.float8_e4m3fn)


def _clamp_of(row: Format, amax_clamp: float | None) -> float:
    if amax_clamp is None:
        return row.amax_clamp or 0.0
    if row.amax_clamp is None:
        raise ValueError(f"amax_clamp: expected None ({row.name}); got {amax_clamp!r}")
    if not AMAX_CLAMP_MIN <= amax_clamp < math.inf:
        raise ValueError(f"amax_clamp: expected finite and >= 2^-117; got {amax_clamp!r}")
    return amax_clamp


def _global_of(x: torch.Tensor, row: Format, global_scale: float | torch.Tensor | None) -> torch.Tensor | None:
    if not row.tensor_scale:
        if global_scale is not None:
            raise ValueError(f"global_scale: expected None ({row.name}); got {type(global_scale).__name__}")
        return None
    if global_scale is None:
        amax = x.abs().amax() if x.numel() else x.new_zeros(())
        return _divide(amax, ELEMENTS["e4m3"].max * row.element_max).clamp(min=NVFP4_GLOBAL_MIN)
    given = torch.as_tensor(global_scale, dtype=torch.float32, device=x.device).detach()
    if given.shape != () or not NVFP4_GLOBAL_MIN <= float(given) < math.inf:
        got = float(given) if given.shape == () else f"shape {tuple(given.shape)}"
        raise ValueError(f"global_scale: expected one finite number >= 2^-118; got {got}")
    return given


def quantize(
    x: torch.Tensor,
    format: Format | str,
    *,
    scale_rule: str | None = None,
    global_scale: float | torch.Tensor | None = None,
    amax_clamp: float | None = None,
) -> QuantizedTensor:
    """``x`` (R, C), float32, bfloat16 or float16, any strides, in ``format``; computed in float32.

    amax is the largest magnitude of a scale's values. In order, each step one float32 operation:

    - bf16: x rounded to nearest even.
    - fp8, fp8_row, fp8_group, fp8_block: amax = max(amax, amax_clamp); scale = amax / 448;
      code = e4m3(x / scale). Divisions, no reciprocals (DeepGEMM multiplies by 1 / scale instead).
    - mxfp8, mxfp4: byte = encode_e8m0(amax, 448 or 6, scale_rule); code = element(x / 2^(byte - 127)).
      A power of two: the quotient, and the product with 2^(127 - byte), is exact where it matters.
    - nvfp4: global = max(amax of x / 2688, 2^-118); scale = e4m3(clamp(amax / 6 / global, 2^-9, 448));
      code = e2m1(x * (1 / global / scale)), with (1 / global) / scale rounded before the product.

    Args:
        scale_rule: of MX formats, one of ``SCALE_RULES``; None takes the format's own ("floor").
        global_scale: of nvfp4, a positive finite number; None computes it from ``x``.
        amax_clamp: of FP8 formats with an FP32 scale; None takes the format's own.

    Raises:
        ValueError: a wrong dtype or shape of ``x``, columns that an MX or NVFP4 block does not
            divide, an unknown format, or an option that the format has not.
    """
    row = format if isinstance(format, Format) else get_format(format)
    values = _as_f32("x", x)
    _check_columns("x", row, tuple(values.shape))
    shape = (values.shape[0], values.shape[1])
    if scale_rule is not None and row.scale_rule is None:
        raise ValueError(f"scale_rule: expected None ({row.name}); got {scale_rule!r}")
    clamp = _clamp_of(row, amax_clamp)
    tensor_scale = _global_of(values, row, global_scale)
    if row.scale_per == "none":
        return QuantizedTensor(row, values.to(torch.bfloat16).contiguous(), None, None, shape)
    amax = _block_amax(values, row)
    if row.scale == "f32":
        scale = _divide(amax.clamp(min=clamp), row.element_max)
        scaled = values / _spread(scale, row, shape)
    elif row.scale == "e8m0":
        scale = encode_e8m0(amax, row.element_max, scale_rule or row.scale_rule or "floor")
        scaled = values / _spread(decode_e8m0(scale), row, shape)
    else:
        assert tensor_scale is not None
        wanted = (_divide(amax, row.element_max) / tensor_scale).clamp(NVFP4_SCALE_MIN, ELEMENTS["e4m3"].max)
        scale = encode_e4m3(wanted).view(torch.float8_e4m3fn)
        scaled = values * _spread(tensor_scale.reciprocal() / decode_e4m3(scale), row, shape)
    return QuantizedTensor(row, _encode_elements(scaled, row).contiguous(), scale, tensor_scale, shape)


def dequantize(q: QuantizedTensor) -> torch.Tensor:
    """Float32 (R, C) values of ``q``: code * scale, rounded once; nvfp4: (code * scale) * global, the first exact.

    Inputs within a rounding of 2^128 may come back as infinity from an MX format.
    """
    if q.format.element == "bf16":
        return q.data.to(torch.float32)
    values = decode_e2m1(unpack_fp4(q.data)) if q.format.packing else decode_e4m3(q.data)
    scale = q.scale
    assert scale is not None
    if q.format.scale != "f32":
        scale = decode_e8m0(scale) if q.format.scale == "e8m0" else decode_e4m3(scale)
    values = values * _spread(scale, q.format, q.shape)
    return values if q.global_scale is None else values * q.global_scale
