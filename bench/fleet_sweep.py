"""A sweep over the GPUs of a cluster, on the driver: who measures, what is missing, and the one writer of the store.

A pass opens a fresh process on every free GPU of the model, has each run its anchors, leaves out those that are slower
than their peers (they keep their GPU, so that no other worker of the sweep gets it), and goes through the points that
the store lacks. Each record is on the driver's disk before the next answer is looked at. A GPU whose process dies gets
another, which begins with its anchors again.

The anchors' records are lines of ``OUT/anchors/GPU.ndjson``: they are no points, and no reader of records takes them.

Errors: ``FleetError``; what the store raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from .campaign import Outcome
from .device import DeviceProperties
from .fleet import ATTEMPTS, FleetError, GpuReport, Lost, SeatDied, drive, excluded, fingerprint, slowness
from .fleet_seat import Hello, NotMeasured, Point, Seat, SeatSpec, unpack
from .gpus import Gpu
from .lab import append_line
from .measurement import Settings
from .record import Point as RecordPoint
from .record import encode
from .records import RecordStore
from .targets import Target

ACTOR = f"{Seat.__module__}:{Seat.__name__}"
ANCHOR_FOLDER = "anchors"
HELLO_S, CALL_S = 900.0, 900.0
"""What a worker may take to import torch, compile and run its anchors; and for a point beside its timing. A process
that is silent for longer hangs."""


class Remote(Protocol):
    """A ``Seat`` somewhere. ``call`` raises ``SeatDied`` where its process is gone; else as the method does."""

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any: ...

    def close(self) -> None: ...


class Seats(Protocol):
    """Where workers come from: ``fleet_ray.Cluster``."""

    def seats(
        self, gpu: str, actor: str, *arguments: Any, most: int | None = None, expected: int | None = None
    ) -> Sequence[Remote]: ...


def limit_s(settings: Settings) -> float:
    """How long one point may take before its process counts as hanging."""
    return CALL_S + 4 * settings.max_warm_up_s + 4 * settings.budget_s + 2 * (settings.energy_s or 0.0)


@dataclass(frozen=True)
class Excluded:
    """A GPU that does not measure, and why."""

    report: GpuReport
    reason: str

    def __str__(self) -> str:
        return f"excluded: {self.report.place}: {self.reason}"


class Fleet:
    """The GPUs of one model in a cluster."""

    def __init__(
        self, cluster: Seats, row: Gpu, spec: SeatSpec, out: Path | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """``out``: the folder of the records; None to keep none of the anchors. ``tell``: a line for people."""
        self._cluster, self.row, self.spec, self._tell = cluster, row, spec, tell
        self._anchors = None if out is None else out / ANCHOR_FOLDER / f"{row.name}.ndjson"
        self._lock = threading.Lock()
        self._held: list[Remote] = []
        self._reports: dict[str, GpuReport] = {}
        self.seats: list[Remote] = []
        self.excluded: dict[str, Excluded] = {}
        self.properties: DeviceProperties | None = None

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
        for seat in self._held:
            seat.close()
        self._held = []

    def close(self) -> None:
        """Ends the processes that measure; those of excluded GPUs keep them until the end."""
        for seat in self.seats:
            seat.close()
        self.seats = []

    # -- opening -----------------------------------------------------------------------------------

    def open(self) -> None:
        """A fresh process on each free GPU, and the anchors on all of them at once.

        Raises:
            FleetError: no GPU is left to measure on; says why of each.
        """
        before = len(self.seats) or None
        self.close()
        made = self._cluster.seats(self.row.name, ACTOR, self.spec, expected=before)
        if not made:
            raise FleetError(f"gpu: expected a {self.row.name} that is free; others use every one of the cluster")
        with ThreadPoolExecutor(len(made)) as pool:
            hellos = list(pool.map(self._hello, made))
        there = [(seat, hello) for seat, hello in zip(made, hellos, strict=True) if isinstance(hello, Hello)]
        reports = [hello.report for _, hello in there]
        reasons = excluded(reports)
        self._reports = {report.uuid: report for report in reports if not report.problem}
        for seat, hello in there:
            self._keep(hello)
            if hello.report.uuid in reasons:
                self._exclude(seat, hello.report, reasons[hello.report.uuid])
            else:
                self._welcome(seat, hello)
        if not self.seats:
            why = "; ".join(
                [*map(str, self.excluded.values()), *(str(each) for each in hellos if isinstance(each, SeatDied))]
            )
            raise FleetError(f"gpu: expected a {self.row.name} to measure on; none is left: {why}")

    def _hello(self, seat: Remote) -> Hello | SeatDied:
        try:
            return seat.call("hello", timeout_s=HELLO_S)
        except SeatDied as error:
            self._tell(f"a worker ended before it measured: {error}")
            return error

    def _keep(self, hello: Hello) -> None:
        """The anchors of every GPU, those of the excluded ones included: they say why."""
        if self._anchors is not None:
            for packed in hello.records:
                append_line(self._anchors, encode(unpack(packed)).rstrip(b"\n"))

    def _welcome(self, seat: Remote, hello: Hello) -> None:
        self.seats.append(seat)
        self.properties = self.properties or hello.properties

    def _exclude(self, seat: Remote, report: GpuReport, reason: str) -> None:
        self._held.append(seat)
        self.excluded[report.uuid] = Excluded(report, reason)
        self._tell(str(self.excluded[report.uuid]))

    def renew(self, seat: Remote) -> Remote | None:
        """Another process in place of one; None where no GPU is free, or the one that is must not measure."""
        with self._lock:
            seat.close()
            self.seats = [each for each in self.seats if each is not seat]
            for other in self._cluster.seats(self.row.name, ACTOR, self.spec, most=1):
                hello = self._hello(other)
                if isinstance(hello, SeatDied):
                    return None
                self._keep(hello)
                report = hello.report
                peers = [each for uuid, each in self._reports.items() if uuid != report.uuid]
                reason = report.problem or slowness(report, peers)
                if reason:
                    self._exclude(other, report, reason)
                    return None
                self._reports[report.uuid] = report
                self._welcome(other, hello)
                return other
            return None

    # -- points ------------------------------------------------------------------------------------

    def keys(self, points: list[Point]) -> list[str | NotMeasured]:
        """The records' keys."""
        return self.ask("keys", points)

    def ask(self, method: str, *arguments: Any) -> Any:
        """What one worker says for all: they are of one model and one code."""
        for seat in list(self.seats):
            try:
                return seat.call(method, *arguments, timeout_s=CALL_S)
            except SeatDied as error:
                self._tell(f"a worker ended: {error}")
                self.renew(seat)
        raise FleetError(f"gpu: expected a {self.row.name} to measure on; none is left")

    def drive(
        self, items: Sequence[Any], work: Callable[[Remote, Any], Any], done: Callable[[Any, Any], None],
        allows: Callable[[Any], bool] = lambda item: True, attempts: int = ATTEMPTS,
    ) -> list[Any]:  # fmt: skip
        """As ``fleet.drive`` on these seats."""

        def is_spoiled(result: Any) -> bool:
            return isinstance(result, NotMeasured) and result.is_spoiled

        return drive(
            self.seats, items, work, done, renew=self.renew, is_spoiled=is_spoiled, allows=allows, attempts=attempts
        )


def make_spec(gpu: str, tuned: Path | None = None, is_named: bool = False) -> SeatSpec:
    """What the workers of a sweep are told. ``tuned``: a table of tuned tiles, which travels as text."""
    return SeatSpec(gpu, fingerprint(), tuned=tuned and tuned.read_text(), is_named=is_named)


@dataclass
class Swept:
    """What came of a sweep: an outcome per target and pass; ``left``: not in every pass; ``lost``: cost a worker."""

    outcomes: list[Outcome]
    left: list[Target]
    lost: list[Outcome]


def sweep_targets(
    fleet: Fleet, targets: Sequence[Target], store: RecordStore, *, processes: int, settings: Settings,
    first: int = 1, allows: Callable[[Target], bool] = lambda target: True,
    begin: Callable[[int, int], None] = lambda number, total: None,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> Swept:  # fmt: skip
    """Brings each target to records of ``processes`` processes: passes ``first`` to ``processes``, in fresh ones each.

    Args:
        allows: asked before each point; what is not allowed is left.
        begin: called with the pass and its points. done: with each outcome, old ones included.
    """
    points = {Point.of(target): target for target in targets}
    swept = Swept([], [], [])

    def say(outcome: Outcome) -> None:
        swept.outcomes.append(outcome)
        done(outcome)

    fleet.open()
    keys = dict(zip(points, fleet.keys(list(points)), strict=True))
    for number in range(first, processes + 1):
        begin(number, len(points))
        waiting: list[Point] = []
        for point, key in keys.items():
            if isinstance(key, NotMeasured):
                say(Outcome(points[point], skipped=key.reason))
            elif store.done(msgspec.json.decode(key, type=RecordPoint), number):
                say(Outcome(points[point], is_old=True))
            else:
                waiting.append(point)
        swept.left = [points[point] for point in waiting]
        if not any(allows(points[point]) for point in waiting):
            continue
        if number > first:
            fleet.open()

        def arrived(point: Point, made: bytes | NotMeasured | Lost) -> None:
            target = points[point]
            if isinstance(made, bytes):
                record = unpack(made)
                store.append(record)
                say(Outcome(target, record))
                return
            outcome = Outcome(target, skipped=made.reason)
            if isinstance(made, Lost) or made.is_spoiled:
                swept.lost.append(outcome)
            say(outcome)

        left = fleet.drive(
            waiting, lambda seat, point: seat.call("measure", point, settings, timeout_s=limit_s(settings)), arrived,
            lambda point: allows(points[point]),
        )  # fmt: skip
        swept.left = [points[point] for point in left]
    fleet.close()
    return swept
