"""Routing and its schedule compiled ahead of time: no spills, and the arguments that a launch passes."""

from __future__ import annotations

import importlib
import inspect as python

from compiled import compiled
from tokenfab.kernels.routing_points import routing_points

ARCHS = ("sm_90", "sm_100", "sm_120")


def test_r18_every_point_compiles_without_spills() -> None:
    points = routing_points()
    found = compiled(points, ARCHS)
    assert not [each for each in found if each.problems]
    assert len(found) == len(points) * len(ARCHS)
    assert all(each.facts.spill_bytes == 0 and not each.facts.matrix for each in found)


def test_every_kernel_has_a_point_with_its_arguments() -> None:
    seen = set()
    for point in routing_points():
        module = importlib.import_module(point.module)
        parameters = python.signature(getattr(module, point.function).fn).parameters
        assert set(parameters) == {name for name, _ in point.signature}, point.name
        assert len(parameters) <= 25
        seen.add(point.function)
    modules = [importlib.import_module(f"tokenfab.kernels.{name}") for name in ("routing", "moe_schedule")]
    assert seen == {name for module in modules for name in vars(module) if name.endswith("_kernel")}
