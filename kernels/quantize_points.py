"""The quantize kernels as they are compiled. Read by ``bench.inspect``; standard library only.

A name is ``OP/FORMAT/ROWSxCOLUMNS``, columns of the result. Where the scale of a tensor is found, ``/amax`` is the
first pass, ``/from_amax`` what reads its maxima, ``/y`` a fused kernel that leaves BF16 to both. ``/clamped``:
gpt-oss's SwiGLU. Values are those of the input, a trip those of one tile; their bits hold what is written per value
too. fp8_row reads its rows twice: one of its two loops is counted. No matrix work, no spills anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .compile_point import CONSTEXPR, CompilePoint
from .formats import BF16, SCALE_BITS, Format, get_format
from .quantize_tiles import (
    EXACT,
    MAX_COLUMNS,
    Launch,
    amax_launch,
    num_partials,
    quantize_launch,
    rms_norm_launch,
    swiglu_launch,
)

ROOM = __package__

COMPILED_ARCHS = ("sm_90", "sm_100", "sm_120")

QUANTIZED_FORMATS = ("fp8", "fp8_row", "fp8_group", "mxfp8", "mxfp4", "nvfp4")

QUANTIZE_OPS = ("quantize", "rms_norm_quantize", "swiglu_quantize")

USUAL = (64, 7168)
"""Rows and columns of the points that each op and format has: sizes that divide by 16, as most models' do."""

WIDEST = (64, MAX_COLUMNS)

INPUT_BYTES = 2
"""Inputs, norm weights and residuals are BF16."""


def stored_bytes(row: Format, rows: int, columns: int) -> int:
    """Bytes of codes and scales; without the scale of the tensor that NVFP4 has beside its blocks'."""
    shape = row.scale_shape(rows, columns)
    scales = 0 if shape is None else math.prod(shape) * SCALE_BITS[row.scale] // 8
    return rows * columns * row.element_bits // 8 + scales


class _Way(NamedTuple):
    """One way to launch one of the kernels; ``kind``: as in the names."""

    op: str
    format: str
    rows: int
    columns: int
    kind: str = ""

    @property
    def row(self) -> Format:
        """What is stored."""
        return BF16 if self.kind == "y" else get_format(self.format)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.format}/{self.rows}x{self.columns}" + (f"/{self.kind}" if self.kind else "")


Arguments = dict[str, Any]
"""Pointers' types as text, numbers as a launch passes them."""


def _result(way: _Way) -> tuple[Arguments, Arguments]:
    """Pointers and strides of a contiguous result; a pointer without use is the input's."""
    row = way.row
    scale = {"none": "*bf16", "f32": "*fp32"}.get(row.scale, "*u8")
    tensor_scale = "*fp32" if row.tensor_scale or row.scale_per == "tensor" else "*bf16"
    pointers = {"data_ptr": "*bf16" if row is BF16 else "*u8", "scale_ptr": scale, "tensor_scale_ptr": tensor_scale}
    shape = row.scale_shape(way.rows, way.columns) or ()
    strides = (shape[1], 1) if len(shape) == 2 else (0, 0)
    stride_dm = row.data_shape(way.rows, way.columns)[1]
    return pointers, {"stride_dm": stride_dm, "stride_sm": strides[0], "stride_sk": strides[1]}


def _quantize(way: _Way) -> tuple[Arguments, Launch]:
    (pointers, strides), from_amax = _result(way), way.kind == "from_amax"
    pointers |= {"partials_ptr": "*i32" if from_amax else "*bf16"}
    partials = num_partials(way.rows, way.columns) if from_amax else 0
    sizes = {"M": way.rows, "K": way.columns, "num_partials": partials, "stride_xm": way.columns}
    return {"x_ptr": "*bf16"} | pointers | sizes | strides, quantize_launch(way.row, way.columns, from_amax=from_amax)


def _amax(way: _Way) -> tuple[Arguments, Launch]:
    sizes = {"M": way.rows, "K": way.columns, "stride_xm": way.columns}
    return {"x_ptr": "*bf16", "partials_ptr": "*i32"} | sizes, amax_launch(way.columns)


def _rms_norm(way: _Way) -> tuple[Arguments, Launch]:
    pointers, strides = _result(way)
    inputs = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "residual_out_ptr"), "*bf16")
    sizes = {"K": way.columns, "eps": 1e-6} | dict.fromkeys(("stride_xm", "stride_rm", "stride_om"), way.columns)
    return inputs | pointers | sizes | strides, rms_norm_launch(way.row, way.columns, has_residual=True)


def _swiglu(way: _Way) -> tuple[Arguments, Launch]:
    pointers, strides = _result(way)
    sizes = {"M": way.rows, "K": way.columns, "stride_xm": 2 * way.columns, "limit": 7.0, "alpha": 1.702}
    launch = swiglu_launch(way.row, way.columns, is_clamped=way.kind == "clamped")
    return {"gate_up_ptr": "*bf16"} | pointers | sizes | strides, launch


_Maker = Callable[[_Way], tuple[Arguments, Launch]]
_KERNELS: dict[str, tuple[str, str, _Maker]] = {
    "amax": ("quantize", "_amax_kernel", _amax),
    "quantize": ("quantize", "_quantize_kernel", _quantize),
    "rms_norm_quantize": ("fused_quantize", "_rms_norm_quantize_kernel", _rms_norm),
    "swiglu_quantize": ("fused_quantize", "_swiglu_quantize_kernel", _swiglu),
}


def _bytes_per_value(way: _Way) -> float:
    """Read and written per value of the input."""
    written = 0.0 if way.kind == "amax" else stored_bytes(way.row, way.rows, way.columns) / (way.rows * way.columns)
    if way.op == "rms_norm_quantize":
        return 3 * INPUT_BYTES + written  # the residual is read and written
    return INPUT_BYTES + written / (2 if way.op == "swiglu_quantize" else 1)


def _point(way: _Way, archs: tuple[str, ...]) -> CompilePoint:
    module, function, make = _KERNELS["amax" if way.kind == "amax" else way.op]
    arguments, launch = make(way)
    types = {name: "fp32" if isinstance(value, float) else "i32" for name, value in arguments.items()}
    types |= {name: value for name, value in arguments.items() if isinstance(value, str)}
    ones = {name: 1 for name, value in arguments.items() if value == 1}  # Triton makes them constants
    constants = launch.constants | ones
    aligned = [name for name, value in arguments.items()
               if isinstance(value, str) or (isinstance(value, int) and value % 16 == 0)]  # fmt: skip
    per_program = launch.block_m * (launch.block_k if "BLOCK_M" in launch.constants else way.columns)
    return CompilePoint(
        name=way.name,
        module=f"{ROOM}.{module}",
        function=function,
        signature=tuple((types | dict.fromkeys(constants, CONSTEXPR)).items()),
        constexprs=tuple(constants.items()),
        aligned=tuple(aligned),
        num_warps=launch.num_warps,
        num_stages=3,
        values_per_iteration=per_program * (2 if way.op == "swiglu_quantize" else 1),
        bits_per_value=8 * _bytes_per_value(way),
        flops_per_value=0,
        matrix_rate="bf16",
        archs=archs,
        options=tuple(EXACT.items()),
    )


def _usual() -> list[_Way]:
    """As the registry's rows launch them: FP8's scale is found, NVFP4's given."""
    kinds = {"quantize": "from_amax", "rms_norm_quantize": "y", "swiglu_quantize": "y"}
    ways = [_Way(op, format, *USUAL) for op in QUANTIZE_OPS for format in QUANTIZED_FORMATS]
    return [way._replace(kind=kinds[way.op]) if way.format == "fp8" else way for way in ways]


_MORE = (
    (_Way("quantize", "fp8", 17, 7185, "amax"), "sm_100"),
    (_Way("quantize", "nvfp4", *USUAL, "from_amax"), "sm_100"),
    (_Way("quantize", "fp8_row", 17, 7185), "sm_90"),
    (_Way("rms_norm_quantize", "fp8_group", 17, 8191), "sm_120"),
    (_Way("rms_norm_quantize", "nvfp4", *WIDEST), "sm_120"),
    (_Way("swiglu_quantize", "fp8_row", 1, 7185, "clamped"), "sm_100"),
)
"""Sizes that do not divide, one row, the widest norm and the other passes, where each takes most registers."""


def quantize_points() -> list[CompilePoint]:
    """Every point of the quantizers; one name appears once per architecture."""
    usual = [_point(way, COMPILED_ARCHS) for way in _usual()]
    return [*usual, *(_point(way, (arch,)) for way, arch in _MORE)]
