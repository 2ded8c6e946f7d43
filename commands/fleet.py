"""``--ray``: the commands that fan out over a Ray cluster share how they reach it, and what they say meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from .shared import Progress, UserError, show

if TYPE_CHECKING:
    from pathlib import Path

    from ..bench.fleet import Pace, Spread
    from ..bench.fleet_ray import Cluster
    from ..bench.gpus import Gpu
    from ..bench.inspect import Compile
    from ..bench.measurement import Settings
    from ..bench.targets import Target

_LINE_S = 10.0

ray_option = click.option(
    "--ray", "ray", metavar="auto|ADDRESS",
    help="Over a Ray cluster: the one that runs on this machine, or at ADDRESS. See docs/many_gpus.md.",
)  # fmt: skip


class FleetProgress:
    """A bar where standard error is a terminal; elsewhere (a job's log), of a cluster, a line now and then. Both with
    an estimate."""

    def __init__(self, title: str, quiet: bool, has_lines: bool = True) -> None:
        self._title, self._quiet, self._has_lines = title, quiet, has_lines
        self._bar = Progress(title, quiet)
        self._pace: Pace | None = None
        self._told_s = time.monotonic()

    def __enter__(self) -> FleetProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.__exit__()

    def begin(self, title: str, total: int) -> None:
        from ..bench.fleet import Pace

        self._title, self._pace = title, Pace(total)

    def advance(self, total: int, what: str, is_new: bool = True) -> None:
        if self._pace is None or self._pace.total != total:
            self.begin(self._title, total)
        assert self._pace is not None
        self._pace.advance(is_new)
        self._bar.update(self._pace.done, total, f"{self._title}: {self._pace} {what}")
        is_due = time.monotonic() - self._told_s >= _LINE_S or self._pace.done == total
        if is_due and self._has_lines and not self._quiet and not sys.stderr.isatty():
            click.echo(f"{self._title}: {self._pace}", err=True)
            self._told_s = time.monotonic()


def tell(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def compiling(address: str | None, jobs: int | None) -> Iterator[Compile | None]:
    """Where ``inspect`` compiles: on the cluster, or here (None)."""
    if address is None:
        yield None
        return
    from ..bench.fleet_compile import compile_on
    from ..bench.fleet_ray import connect

    if jobs is not None:
        raise ValueError("jobs: expected it left out with --ray, where each CPU of the cluster compiles")
    with connect(address) as cluster:
        tell(f"compiling on {cluster.num_cpus()} CPUs of {cluster.num_nodes()} nodes")
        yield compile_on(cluster.spread)


@contextmanager
def spreading(address: str | None) -> Iterator[Spread | None]:
    """Where a search that needs no GPU runs: on the cluster's CPUs, or here (None)."""
    if address is None:
        yield None
        return
    from ..bench.fleet_ray import connect

    with connect(address) as cluster:
        yield cluster.spread


def row_of(cluster: Cluster, gpu: str | None) -> Gpu:
    """The GPU model to measure on: as asked, or the only one that the cluster has."""
    from ..bench.gpus import get_gpu

    if gpu is not None:
        return get_gpu(gpu)
    found = cluster.gpu_models()
    known = [name for name in found if name != "unknown"]
    if len(known) != 1:
        got = ", ".join(f"{count} {name}" for name, count in found.items()) or "no GPU"
        raise UserError(f"gpu: expected --gpu NAME, for a sweep is of one GPU model; the cluster has {got}")
    return get_gpu(known[0])


def bench_on_ray(
    address: str, find: Any, gpu: str | None, processes: int, settings: Settings, folder: Path, tuned: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """``tokenfab bench --ray``: every pass over all GPUs of one model. Exit code 1 where points got no record."""
    from ..bench.fleet_ray import connect
    from ..bench.fleet_sweep import Fleet, make_spec, sweep_targets
    from ..bench.kernel_tables import summaries_table
    from ..bench.records import RecordStore
    from ..bench.summaries import summaries

    with connect(address) as cluster:
        row = row_of(cluster, gpu)
        targets: list[Target] = find(row)
        store = RecordStore(folder, f"{row.name}.jsonl")
        spec = make_spec(row.name, tuned, is_named=gpu is not None)
        with Fleet(cluster, row, spec, folder, tell) as fleet, FleetProgress("pass", quiet=as_json) as progress:
            swept = sweep_targets(
                fleet, targets, store, processes=processes, settings=settings,
                begin=lambda number, total: progress.begin(f"pass {number} on {len(fleet.seats)} GPUs", total),
                done=lambda outcome: progress.advance(len(targets), outcome.target.kernel.name, not outcome.is_old),
            )  # fmt: skip
    for outcome in {(each.target.kernel.name, each.target.fields): each for each in swept.outcomes}.values():
        if outcome.skipped:
            shape = " x ".join(str(value) for _, value in outcome.target.fields)
            tell(f"skipped: {outcome.target.kernel.name} {shape}: {outcome.skipped}")
    wanted = [(each.kernel.op, each.kernel.formats, each.shape) for each in targets]
    found = [
        each for each in summaries(store.records())
        if (each.point.op, each.point.formats, each.point.shape) in wanted
    ]  # fmt: skip
    found.sort(key=lambda each: wanted.index((each.point.op, each.point.formats, each.point.shape)))  # not as they came
    title = f"{row.title}, {store.path}"
    show(as_json, lambda: [each.as_dict() for each in found], lambda: summaries_table(title, found))
    finish(len(swept.lost), len(swept.left))


def finish(lost: int, left: int) -> None:
    """Exit code 1 where something is missing."""
    if lost or left:
        tell(f"{lost} points took their workers down or raised, {left} were not begun; the same command goes on there")
        raise click.exceptions.Exit(1)
