"""The quantizers compiled ahead of time: no spills, and what the wrappers launch is what was compiled."""

from __future__ import annotations

import importlib
import inspect as python

import pytest
import torch
from compiled import compiled
from recorder import Recorder
from tokenfab.kernels.compile_point import CONSTEXPR, CompilePoint
from tokenfab.kernels.fused_quantize import rms_norm_quantize, swiglu_quantize
from tokenfab.kernels.quantize import quantize_activation
from tokenfab.kernels.quantize_points import COMPILED_ARCHS, QUANTIZE_OPS, QUANTIZED_FORMATS, quantize_points

POINTS = quantize_points()
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8"}


def test_r18_every_point_compiles_without_spills() -> None:
    found = compiled(POINTS, COMPILED_ARCHS)
    assert not [each for each in found if each.problems]
    assert all(each.facts.spill_bytes == 0 and not each.facts.matrix for each in found)
    assert all((each.facts.instructions_per_value or 0) > 1 for each in found)
    assert len(found) <= 60


def test_every_op_and_format_is_compiled_for_every_architecture() -> None:
    seen = {(*point.name.split("/")[:2], arch) for point in POINTS for arch in point.archs}
    assert seen == {
        (op, format, arch) for op in QUANTIZE_OPS for format in QUANTIZED_FORMATS for arch in COMPILED_ARCHS
    }
    assert len({point.name for point in POINTS}) == len(POINTS)


def test_every_kernel_has_a_point_with_its_arguments() -> None:
    seen = set()
    for point in POINTS:
        parameters = python.signature(getattr(importlib.import_module(point.module), point.function).fn).parameters
        assert set(parameters) == {name for name, _ in point.signature}, point.name
        assert len(parameters) <= 25
        seen.add(point.function)
    modules = [importlib.import_module(f"tokenfab.kernels.{name}") for name in ("quantize", "fused_quantize")]
    assert seen == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def call(point: CompilePoint) -> None:
    """The wrapper, as the point's name says."""
    op, format, size, *kind = point.name.split("/")
    rows, columns = map(int, size.split("x"))
    options = {"global_scale": 0.25} if format == "nvfp4" and kind != ["from_amax"] else {}
    x = torch.ones(rows, columns, dtype=torch.bfloat16)
    if op == "quantize":
        quantize_activation(x, format, **options)
    elif op == "rms_norm_quantize":
        rms_norm_quantize(x, x[0].clone(), 1e-6, format, residual=x, **options)
    else:
        swiglu_quantize(torch.cat([x, x], dim=1), format, limit=7.0 if kind == ["clamped"] else None, **options)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_the_wrappers_launch_what_is_compiled(point: CompilePoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants, warps, options, types, and which numbers Triton specialises."""
    recorders = {}
    for name in ("quantize", "fused_quantize"):
        module = importlib.import_module(f"tokenfab.kernels.{name}")
        for function in [each for each in vars(module) if each.endswith("_kernel")]:
            recorders[function] = Recorder(getattr(module, function))
            monkeypatch.setattr(module, function, recorders[function])
    call(point)
    launched, types, constants = recorders[point.function], dict(point.signature), dict(point.constexprs)
    assert launched.options == {"num_warps": point.num_warps, **dict(point.options)}
    specialised = {name for name, value in launched.arguments.items() if isinstance(value, int) and value == 1}
    assert {name for name, kind in types.items() if kind == CONSTEXPR} == constants.keys() >= specialised
    for name, value in launched.arguments.items():
        if name in constants:
            assert value == constants[name], name
        elif isinstance(value, torch.Tensor):
            assert (TYPES[value.dtype], name in point.aligned) == (types[name], True), name
        else:
            expected = ("fp32", False) if isinstance(value, float) else ("i32", value % 16 == 0)
            assert (types[name], name in point.aligned) == expected, name
