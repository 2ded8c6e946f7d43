"""A price search over the CPUs of a cluster: each GPU and published stack is a job, and only totals travel back.

A job times every split and batch of one (GPU, stack); the driver joins prices, as ever, and works out the ops of a
point only where somebody asks for them. The stack ``tokenfab`` reads the driver's own records, and is priced there.
Points come out in the order, and with the numbers, of ``run_sweep`` on one machine. Nothing is kept: a search that is
interrupted is asked again.

Units: seconds. Errors: as ``run_sweep``; ``FleetError`` of a cluster.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from ..bench.deployment import Deployment
from ..bench.fleet import FleetError, Job, Lost, Spread, check_same, fingerprint
from ..bench.gpus import Gpu
from ..bench.published import PublishedData
from ..bench.recorded import OWN, RecordedData, find_stack
from ..bench.step_table import SummedStep
from .cost import StepCost
from .prices import Price, stated_price
from .sweep import Skipped, Sweep, SweepResult, run_sweep

WORKER = f"{__name__}:sweep_part"
_NO_PRICE = 1.0


@dataclass(frozen=True)
class Part:
    """A sweep of one GPU and one stack. ``data``: folder of the published tables; None for the package's."""

    sweep: Sweep
    data: Path | None
    fingerprint: str
    tables: str


def _tables(folder: Path | None) -> str:
    """The version of the package's tables; a folder of one's own is the same on every node."""
    return "" if folder is not None else version("aiconfigurator-core")


@dataclass(frozen=True)
class Priceless:
    """A part's points without prices: deployment, step and floor seconds, shares of provenances; and what cannot be."""

    points: tuple[tuple[Deployment, float, float, tuple[float, ...]], ...]
    skipped: tuple[Skipped, ...]


# -- the worker's end ------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _data(folder: Path | None) -> PublishedData:
    """Tables are read once per worker."""
    return PublishedData(folder)


def sweep_part(part: Part) -> Priceless:
    """Times one part."""
    node = platform.node()
    check_same("tokenfab's sources", part.fingerprint, fingerprint(), node)
    check_same("aiconfigurator-core", part.tables, _tables(part.data), node)
    result = run_sweep(part.sweep, _data(part.data), _unpriced)
    return Priceless(
        tuple(
            (cost.step.deployment, cost.step.step_s, cost.step.floor_s, tuple(cost.step.coverage().values()))
            for cost in result.points
        ),
        tuple(result.skipped),
    )


def _unpriced(gpu: Gpu) -> Price:
    """The driver joins the price; this one is seen by nobody."""
    return stated_price(gpu.name, _NO_PRICE)


# -- the driver's end ------------------------------------------------------------------------------


def run_sweep_on(
    spread: Spread, sweep: Sweep, data: PublishedData, price: Callable[[Gpu], Price],
    advance: Callable[[str], None] = lambda what: None, recorded: RecordedData | None = None,
    folder: Path | None = None,
) -> SweepResult:  # fmt: skip
    """As ``run_sweep``. ``folder``: of ``data``, which the workers read for themselves.

    Raises:
        ValueError: as ``run_sweep``. FleetError: a part that took its workers down.
    """
    cells = [(gpu, spec) for gpu in sweep.gpus for spec in sweep.stacks]
    parts = {cell: replace(sweep, gpus=(cell[0],), stacks=(cell[1],)) for cell in cells}
    found: dict[tuple[Gpu, str], SweepResult] = {}
    jobs: list[Job] = []
    for index, cell in enumerate(cells):
        gpu, spec = cell
        if spec.split("+")[0].split("@")[0] == OWN:
            found[cell] = run_sweep(parts[cell], data, price, advance, recorded)
        else:
            find_stack(gpu, spec, data, recorded or RecordedData())  # an unknown stack is an error before the work
            jobs.append(
                Job(str(index), f"{gpu.name} {spec}", Part(parts[cell], folder, fingerprint(), _tables(folder)))
            )
    with closing(spread(WORKER, jobs)) as answers:
        for job, made in answers:
            cell = cells[int(job.key)]
            if isinstance(made, Lost):
                raise FleetError(f"ray: {job.what}: {made.reason}")
            found[cell] = _priced(cell, sweep, made, data, price(cell[0]), recorded)
            for parallel in sweep.parallels:
                advance(f"{job.what} {parallel}")
    results = [found[cell] for cell in cells]
    return SweepResult(
        [point for result in results for point in result.points],
        [each for result in results for each in result.skipped],
    )


def _priced(
    cell: tuple[Gpu, str], sweep: Sweep, made: Priceless, data: PublishedData, price: Price,
    recorded: RecordedData | None,
) -> SweepResult:  # fmt: skip
    gpu, spec = cell
    stack = find_stack(gpu, spec, data, recorded or RecordedData())
    points = [
        StepCost(
            SummedStep(sweep.model, gpu, stack, deployment, data=data, totals=(step_s, floor_s, shares)), price
        )
        for deployment, step_s, floor_s, shares in made.points
    ]  # fmt: skip
    return SweepResult(points, list(made.skipped))
