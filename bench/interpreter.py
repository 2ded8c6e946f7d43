"""Repairs of Triton's CPU interpreter, so that a kernel checked on it is checked for what a GPU computes.

Seen in Triton 3.6.0 and 3.9.0, all silent: casts to FP8 and BF16 do not round to nearest even and do
not saturate; ``tl.dot`` multiplies the bit patterns of BF16 operands; arithmetic on BF16 and FP8
tensors does the same; ``tl.dot_scaled`` reads E4M3 scales (NVFP4) as E8M0. Inline assembly raises.

``install()`` gives casts and dots by way of ``ml_dtypes`` and NumPy, ``dot_scaled`` with every scale
type, and the few PTX instructions this project uses. What is left wrong raises: arithmetic on BF16 or
FP8 tensors, and PTX without an entry here.

It also does once what the interpreter does over and over (patching the language in every call of a device
function, spelling out a block's shape and type), and leaves out what it computes for nothing (whether an
integer overflows, which it only looks at in debug mode). That took half of a kernel's time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_FLOATS: dict[Any, Any] = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
    tl.float16: np.float16,
    tl.float32: np.float32,
    tl.float64: np.float64,
}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def as_float(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Interpreter storage (bit patterns for BF16 and FP8) as float32 or float64 values."""
    scalar = dtype.scalar
    if scalar not in _FLOATS:
        raise NotImplementedError(f"interpreter: no float conversion of {scalar}")
    values = data.view(_FLOATS[scalar]) if scalar in (tl.bfloat16, tl.float8e4nv, tl.float8e5) else data
    return values if values.dtype == np.float64 else values.astype(np.float32)


def from_float(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Values as interpreter storage: nearest even; FP8 saturates as ``cvt.rn.satfinite`` does."""
    scalar = dtype.scalar
    if scalar in _LARGEST:
        values = np.clip(values, -_LARGEST[scalar], _LARGEST[scalar])
    with np.errstate(over="ignore"):
        converted = values.astype(_FLOATS[scalar])
    return converted.view(interpreter._get_np_dtype(scalar))


def _is_small_float(dtype: Any) -> bool:
    return dtype.scalar in (tl.bfloat16, tl.float8e4nv, tl.float8e5)


def _cast(self: Any, src: TensorHandle, dst_type: Any, *_: Any) -> TensorHandle:
    source, target = src.dtype.scalar, dst_type.scalar
    if source in _FLOATS and target in _FLOATS:
        return TensorHandle(from_float(as_float(src.data, source), target), target)
    if _is_small_float(target):  # from an integer
        return TensorHandle(from_float(src.data.astype(np.float32), target), target)
    data = as_float(src.data, source) if _is_small_float(source) else src.data
    return TensorHandle(data.astype(interpreter._get_np_dtype(dst_type)), target)


def _dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
    if a.dtype.is_int():
        return TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)
    product = np.matmul(as_float(a.data, a.dtype), as_float(b.data, b.dtype))
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _scales(handle: TensorHandle) -> np.ndarray:
    """Microscaling factors: E4M3 by type, otherwise E8M0 bytes (255 is NaN)."""
    if handle.dtype.scalar == tl.float8e4nv:
        return as_float(handle.data, handle.dtype)
    return handle.data.view(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def _scaled_operand(handle: TensorHandle, scale: TensorHandle | None, name: str, k_axis: int) -> np.ndarray:
    """A ``dot_scaled`` operand as float32 with K last; packed E2M1 has element 0 in the low nibble."""
    data = np.moveaxis(handle.data, k_axis, -1)
    if name == "E2M1":
        codes = np.stack([data & 0xF, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
        values = E2M1[codes]
    else:
        values = as_float(np.ascontiguousarray(data), handle.dtype)
    if scale is None:
        return values
    factors = _scales(scale)
    return values * np.repeat(factors, values.shape[-1] // factors.shape[-1], axis=-1)


def _dot_scaled(
    self: Any, lhs: Any, lhs_scale: Any, lhs_format: Any, rhs: Any, rhs_scale: Any, rhs_format: Any,
    fast_math: bool, lhs_k_pack: bool, rhs_k_pack: bool, acc: TensorHandle,
) -> TensorHandle:  # fmt: skip
    if not (lhs_k_pack and rhs_k_pack):
        raise NotImplementedError("interpreter: dot_scaled packed along a dimension other than K")
    left = _scaled_operand(lhs, lhs_scale, lhs_format.name, -1)
    right = _scaled_operand(rhs, rhs_scale, rhs_format.name, -2)
    return TensorHandle((left @ right.T + acc.data).astype(np.float32), tl.float32)


# -- PTX -----------------------------------------------------------------------------------------


def _mul_bf16x2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Both halves' products, rounded to nearest even; subnormals kept, as ``mul.rn.bf16x2`` does."""
    left, right = (np.ascontiguousarray(v).view(ml_dtypes.bfloat16).astype(np.float32) for v in (a, b))
    with np.errstate(over="ignore", invalid="ignore"):
        return (left * right).astype(ml_dtypes.bfloat16).view(np.uint32)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """``prmt.b32``: four bytes of the pair (b, a), chosen by nibbles; bit 3 of a nibble replicates the sign."""
    pool = np.stack([(word >> np.uint32(8 * i)) & np.uint32(0xFF) for word in (a, b) for i in range(4)], axis=-1)
    result = np.zeros_like(a)
    for byte in range(4):
        nibble = (selector >> np.uint32(4 * byte)) & np.uint32(0xF)
        chosen = np.take_along_axis(pool, (nibble & np.uint32(7))[..., None].astype(np.int64), axis=-1)[..., 0]
        signs = np.where(chosen & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), signs, chosen) << np.uint32(8 * byte)
    return result


PTX: dict[str, Callable[..., np.ndarray]] = {"mul.rn.bf16x2": _mul_bf16x2, "prmt.b32": _prmt}
"""One instruction on 32-bit registers: mnemonic -> what it does."""


class _Results:
    def __init__(self, handles: list[TensorHandle]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> TensorHandle:
        return self.handles[index]


def _inline_asm(
    self: Any, asm: str, constraints: str, values: list[TensorHandle], types: list[Any], is_pure: bool, pack: int
) -> _Results:
    """A single instruction ``op $0, $1, ...;`` on 32-bit operands, one element each."""
    match = re.fullmatch(r"\s*([a-z0-9_.]+)\s+((?:\$\d+\s*,?\s*)+);?\s*", asm)
    if match is None or match[1] not in PTX or pack != 1 or len(types) != 1:
        raise NotImplementedError(f"interpreter: no emulation of this inline assembly: {asm!r}")
    operands = [int(number) for number in re.findall(r"\$(\d+)", match[2])]
    if operands != list(range(len(values) + 1)):
        raise NotImplementedError(f"interpreter: operands out of order: {asm!r}")
    registers = np.broadcast_arrays(*(np.ascontiguousarray(v.data).view(np.uint32) for v in values))
    result = PTX[match[1]](*(np.ascontiguousarray(register) for register in registers))
    return _Results([TensorHandle(result.view(interpreter._get_np_dtype(types[0])), types[0].scalar)])


# -- pace ----------------------------------------------------------------------------------------

_NP_DTYPES: dict[str, Any] = {}


def _np_dtype(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``_get_np_dtype`` builds its table of types in every call; types are told apart by their names."""

    def found(dtype: Any) -> Any:
        if dtype.name not in _NP_DTYPES:
            _NP_DTYPES[dtype.name] = original(dtype)
        return _NP_DTYPES[dtype.name]

    return found


class _PatchedOnce:
    """``_patch_lang``, which device functions call too, once for each launch and module of the language."""

    def __init__(self, original: Callable[[Any], Any]) -> None:
        self.original = original
        self.patched: set[int] = set()
        self.visible: dict[Any, set[int]] = {}

    def __call__(self, fn: Any) -> Any:
        if fn not in self.visible:
            self.visible[fn] = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        visible = self.visible[fn]
        if visible and visible <= self.patched:
            return interpreter._LangPatchScope()
        is_outermost = not self.patched
        scope = self.original(fn)
        self.patched |= visible
        if is_outermost:
            restore = scope.restore

            def restored() -> None:
                self.patched.clear()
                restore()

            scope.restore = restored
        return scope


def _known_blocks(original: Callable[..., None]) -> Callable[..., None]:
    """``block_type.__init__``, which checks and spells a shape out, once for each type and shape."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in known:
            original(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(known[key])

    return init


def _known_tensors(original: Callable[..., None]) -> Callable[..., None]:
    """``tensor.__init__``, which wraps every size of a shape anew, once for each block type."""
    known: dict[str, dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        name = type.name if type.is_block() else ""
        if name not in known:
            original(self, handle, type)
            known[name] = {key: value for key, value in vars(self).items() if key not in ("handle", "type", "dtype")}
        else:
            vars(self).update(known[name], handle=handle, type=type, dtype=type.scalar)

    return init


@cache
def install() -> None:
    """Put the repairs in place, once and for this process."""
    builder: Any = interpreter.InterpreterBuilder
    for name in ("create_fp_ext", "create_fp_trunc", "create_fp_to_fp", "create_si_to_fp", "create_ui_to_fp",
                 "create_fp_to_si", "create_fp_to_ui"):  # fmt: skip
        setattr(builder, name, _cast)
    builder.create_dot = _dot
    builder.create_dot_scaled = _dot_scaled
    builder.create_inline_asm = _inline_asm
    arithmetic = builder.binary_op

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if _is_small_float(lhs.dtype):
            raise NotImplementedError(f"interpreter: arithmetic on {lhs.dtype.scalar}; convert to float32 first")
        return arithmetic(self, lhs, rhs, op)

    builder.binary_op = binary_op
    semantic: Any = type(interpreter.interpreter_semantic)
    semantic.binary_op_sanitize_overflow_impl = lambda *_: None
    internals: Any = interpreter
    internals._get_np_dtype = _np_dtype(interpreter._get_np_dtype)
    core: Any = tl.core
    core.block_type.__init__ = _known_blocks(core.block_type.__init__)
    core.tensor.__init__ = _known_tensors(core.tensor.__init__)
    internals._patch_lang = _PatchedOnce(interpreter._patch_lang)
    dot_scaled = semantic.dot_scaled

    def with_constant_formats(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Triton 3.6.0 expects the formats as constants, and its interpreter passes them as strings."""
        return dot_scaled(self, *(tl.constexpr(arg) if isinstance(arg, str) else arg for arg in args), **kwargs)

    if triton.__version__ < "3.7":
        semantic.dot_scaled = with_constant_formats
