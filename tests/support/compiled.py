"""What points compile to: as the baseline has it where that was compiled from the same sources, else compiled now.

That the baseline tells the truth is what ``tests/bench/test_inspect_gate.py`` compiles a sample for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenfab.bench.inspect import inspect
from tokenfab.bench.inspect_cache import toolchain
from tokenfab.bench.inspect_child import ARCHS
from tokenfab.bench.inspect_gate import Facts, baseline_path, facts_of, read_baseline, unchanged
from tokenfab.kernels.compile_point import CompilePoint, only, tasks_of


@dataclass(frozen=True)
class Compiled:
    """``kinds``: of what inspection found wrong. ``problems``: the same in words, where it was compiled now."""

    point: CompilePoint
    arch: str
    facts: Facts
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.point.name

    @property
    def kinds(self) -> set[str]:
        return set(self.facts.findings)


def compiled(points: Iterable[CompilePoint], archs: Sequence[str] = tuple(ARCHS)) -> list[Compiled]:
    """Every point on every architecture that it is for, in that order; all of them compile."""
    tools, tasks = toolchain(), tasks_of(points, archs)
    path = baseline_path(tools)
    same = unchanged(read_baseline(path), tools, tasks) if path.exists() else {}
    made = {}
    for each in inspect(only((point, arch) for point, arch in tasks if (point.name, arch) not in same)):
        facts, problems = facts_of(each), tuple(f"{finding.kind}: {finding.text}" for finding in each.findings)
        assert facts is not None, (each.point.name, each.arch, problems)
        made[each.point.name, each.arch] = facts, problems
    made |= {key: (facts, facts.findings) for key, facts in same.items()}
    return [Compiled(point, arch, *made[point.name, arch]) for point, arch in tasks]
