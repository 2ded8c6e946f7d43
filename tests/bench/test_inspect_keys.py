"""The digest of what a point is compiled from: it changes with all that decides the facts, and with nothing else."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench import inspect_keys
from tokenfab.bench.inspect_gate import Baseline, Facts, unchanged
from tokenfab.bench.inspect_keys import digests
from tokenfab.kernels.compile_point import CompilePoint
from tokenfab.kernels.registry import find_points

pytest.importorskip("triton")

SOURCE = """
import triton
import triton.language as tl

STEP: tl.constexpr = 4
LAST = tl.constexpr(3)
UNUSED: tl.constexpr = 5


@triton.jit
def inner(x):
    return x + LAST


@triton.jit
def helper(x):
    return inner(x) + 1


@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N) * STEP
    tl.store(x_ptr + offs, helper(tl.load(x_ptr + offs)))


def wrapper(x):
    return 1
"""


@pytest.fixture
def point(tmp_path: Path) -> CompilePoint:
    file = tmp_path / "keyed.py"
    file.write_text(SOURCE)
    return CompilePoint(
        name="keyed", module=str(file), function="kernel", signature=(("x_ptr", "*fp32"), ("N", "constexpr")),
        constexprs=(("N", 64),), aligned=(), num_warps=4, num_stages=2, values_per_iteration=64, bits_per_value=32,
        flops_per_value=0, matrix_rate="bf16",
    )  # fmt: skip


def digest(point: CompilePoint, arch: str = "sm_90") -> str:
    return digests([(point, arch)])[point.name, arch]


def test_it_is_the_same_for_the_same(point: CompilePoint) -> None:
    before = digest(point)
    assert digest(dataclasses.replace(point, archs=("sm_90",))) == before
    file = Path(point.module)
    for old, new in [
        ("return 1", "return 2"), ("UNUSED: tl.constexpr = 5", "UNUSED: tl.constexpr = 6"),
        ("import triton\n", "# moved\n\n\nimport triton\n"),
    ]:  # fmt: skip
        file.write_text(SOURCE.replace(old, new))
        assert digest(point) == before


def test_sources_that_a_kernel_reaches_decide(point: CompilePoint) -> None:
    seen, file = {digest(point)}, Path(point.module)
    edits = [
        ("(x) + 1", "(x) + 2"), ("STEP: tl.constexpr = 4", "STEP: tl.constexpr = 8"), ("* STEP", "* 2"),
        ("x + LAST", "x - LAST"), ("tl.constexpr(3)", "tl.constexpr(5)"), ("N: tl.constexpr)", "N: tl.constexpr = 1)"),
    ]  # fmt: skip
    for old, new in edits:
        assert SOURCE.count(old) == 1
        file.write_text(SOURCE.replace(old, new))
        seen.add(digest(point))
    assert len(seen) == 1 + len(edits)


def test_it_does_not_depend_on_what_else_is_asked() -> None:
    points = {point.function: point for point in find_points()}
    together = digests((point, "sm_90") for point in points.values())
    assert len(together) == len(points) > 15
    for name in ("_grouped_kernel", "_append_kv_kernel", "_paged_attention_kernel"):
        point = points[name]
        assert digest(point) == together[point.name, "sm_90"]


def test_inputs_expectations_variables_and_readers_decide(point: CompilePoint, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [
        {"constexprs": (("N", 128),)}, {"aligned": ("x_ptr",)}, {"num_warps": 8}, {"num_stages": 3},
        {"options": (("maxnreg", 64),)}, {"values_per_iteration": 32}, {"bits_per_value": 16.0},
        {"flops_per_value": 2.0}, {"matrix_rate": "fp8"}, {"expect": "HGMMA"}, {"max_instructions_per_value": 2.0},
    ]  # fmt: skip
    points = [point, *(dataclasses.replace(point, **change, name=f"changed{i}") for i, change in enumerate(changes))]
    found = digests([*((each, "sm_90") for each in points), (point, "sm_100")])
    assert len(set(found.values())) == len(found) == len(changes) + 2
    before = digest(point)
    monkeypatch.setattr(inspect_keys, "_readers_hash", lambda: "other")
    assert digest(point) != before
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert digest(point) != before


def test_a_kernel_that_cannot_be_imported_has_none(point: CompilePoint) -> None:
    gone = dataclasses.replace(point, name="gone", module=str(Path(point.module).with_name("gone.py")))
    none = dataclasses.replace(point, name="none", function="wrapper")
    assert set(digests([(gone, "sm_90"), (none, "sm_90"), (point, "sm_90")])) == {("keyed", "sm_90")}


def test_what_is_unchanged(point: CompilePoint) -> None:
    tools = {"triton": "3"}
    facts = Facts(
        registers=32, spill_bytes=0, shared_bytes=0, ctas_per_sm=8, matrix=(), instructions_per_value=1.0, floor_s={},
        bound_by={}, digest=digest(point),
    )  # fmt: skip
    baseline = Baseline(schema_version=1, toolchain=tools, points={"keyed@sm_90": facts, "keyed@sm_100": facts})
    tasks = [(point, "sm_90"), (point, "sm_100")]
    assert unchanged(baseline, tools, tasks) == {("keyed", "sm_90"): facts}
    assert unchanged(baseline, {"triton": "4"}, tasks) == {}


def test_what_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_keys, "child_command", lambda _: [sys.executable, "-c", "raise SystemExit('no disk')"])
    result = CliRunner().invoke(cli, ["gate", "inspection", "--changed", "--op", "quantize", "--arch", "sm_90"])
    expected = "error: sources of kernels: expected them read; the process exited with 1: no disk"
    assert (result.exit_code, result.output.strip()) == (2, expected)
    result = CliRunner().invoke(cli, ["gate", "inspection", "--changed", "--write"])
    assert result.exit_code == 2
    assert "--changed: expected without --write" in result.output
