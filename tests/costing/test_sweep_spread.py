"""The cost search over a cluster gives what one machine gives, in the same order."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from importlib import import_module
from typing import Any

import pytest
from tokenfab.bench.fleet import FleetError, Job, Lost
from tokenfab.costing import sweep_spread
from tokenfab.costing.cost import StepCost
from tokenfab.costing.document import document
from tokenfab.costing.levers.common_draws import CommonDraws
from tokenfab.costing.study import StudyResult, run_study, study
from tokenfab.costing.sweep import SweepResult


class Backwards:
    """A cluster whose jobs come back in the wrong order."""

    def __init__(self) -> None:
        self.jobs: list[str] = []

    def __call__(self, function: str, jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        module, _, name = function.partition(":")
        self.jobs += [job.what for job in jobs]
        for job in reversed(jobs):
            yield job, getattr(import_module(module), name)(job.payload)


def plan(stacks: list[str] | None = None, **more: Any) -> Any:
    return study(
        "gpt-oss-120b", ["h100", "b200"], stacks or ["vllm", "trtllm"], ["tp1", "tp2", "tp3"], [16, 64], **more
    )


def facts(result: StudyResult | SweepResult) -> list[Any]:
    def of(point: StepCost) -> tuple[Any, ...]:
        step = point.step
        return (
            step.gpu.name, str(step.stack), step.deployment, step.step_s, step.floor_s, step.coverage(),
            point.usd_per_mtok_output, point.price,
        )  # fmt: skip

    return [*map(of, result.points), *result.skipped]


def test_the_same_points_in_the_same_order() -> None:
    spread = Backwards()
    here, there = run_study(plan()), run_study(plan(), spread=spread)
    assert spread.jobs == ["h100 vllm", "h100 trtllm", "b200 vllm", "b200 trtllm"]
    assert len(here.points) == 16
    assert facts(there) == facts(here)
    assert [point.step.ops for point in there.points[:3]] == [point.step.ops for point in here.points[:3]]
    documents = [document("m", each.points, each.skipped, CommonDraws(each.data)) for each in (here, there)]
    assert documents[0] == documents[1]


def test_prices_are_the_drivers() -> None:
    for usd in (1.0, 7.5):
        found = run_study(plan(usd_per_gpu_hour=usd), spread=Backwards())
        assert {point.price.usd_per_gpu_hour for point in found.points} == {usd}


def test_a_stack_of_records_stays_on_the_driver() -> None:
    spread = Backwards()
    here, there = run_study(plan(["tokenfab", "vllm"])), run_study(plan(["tokenfab", "vllm"]), spread=spread)
    assert spread.jobs == ["h100 vllm", "b200 vllm"]
    assert facts(there) == facts(here)
    assert any(each.stack == "tokenfab" for each in there.skipped)


def test_what_is_wrong_is_said_before_the_work() -> None:
    spread = Backwards()
    with pytest.raises(ValueError, match="stack: expected one of vllm"):
        run_study(plan(["vllm", "nothing"]), spread=spread)
    assert spread.jobs == []


def test_a_part_that_took_its_workers_down_is_an_error() -> None:
    def spread(function: str, jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        yield jobs[0], Lost("died: twice")

    with pytest.raises(FleetError, match="ray: h100 vllm: died: twice"):
        run_study(plan(), spread=spread)


def test_other_code_and_other_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    part = sweep_spread.Part(plan().sweep, None, "another", sweep_spread._tables(None))
    with pytest.raises(FleetError, match="expected tokenfab's sources on"):
        sweep_spread.sweep_part(part)
    monkeypatch.setattr(sweep_spread, "_tables", lambda folder: "9.9")
    spread = Backwards()
    original = sweep_spread.sweep_part

    def elsewhere(part: sweep_spread.Part) -> Any:
        monkeypatch.setattr(sweep_spread, "_tables", lambda folder: "0.1")
        return original(part)

    monkeypatch.setattr(sweep_spread, "sweep_part", elsewhere)
    with pytest.raises(FleetError, match="expected aiconfigurator-core on"):
        run_study(plan(), spread=spread)
