"""The matmuls compiled ahead of time: native matrix instructions, no spills, the price of a weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tokenfab.bench.inspect import inspect
from tokenfab.kernels.matmul_points import matmul_points


def test_every_point_compiles_as_it_says(tmp_path: Path) -> None:
    found = inspect(matmul_points(), cache_dir=tmp_path)
    problems = [(i.point.name, i.arch, f.kind, f.text) for i in found for f in i.findings]
    assert not problems
    assert {i.arch for i in found} == {"sm_90", "sm_100", "sm_120"}
    assert all(i.compiled is not None and i.compiled.spill_bytes == 0 for i in found)
    prices = {i.point.name: i.compiled.instructions_per_value for i in found if i.compiled}
    assert prices["w4a16/mxfp4/m16"] == pytest.approx(2.40, abs=0.03)


def test_a_wrong_expectation_is_a_finding(tmp_path: Path) -> None:
    point = next(p for p in matmul_points() if p.name == "fp8/tensor/m16" and p.archs == ("sm_90",))
    wrong = dataclasses.replace(point, expect="^HGMMA", max_instructions_per_value=1.0)
    (inspection,) = inspect([wrong], cache_dir=tmp_path)
    assert {finding.kind for finding in inspection.findings} == {"expect", "instructions"}
