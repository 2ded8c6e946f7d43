"""A sweep over many machines, as far as no cluster has to be known for it: jobs, slow GPUs, who takes which point.

A sweep is a list of points with the keys that a run on one machine resumes by. Workers answer one point at a time; one
process, the driver, writes each answer to the same store at once. Whatever dies, what was written stays, and what is
there is not done again. A point whose worker or machine dies is begun once more elsewhere; one that takes two workers
down is named and left out of the run. ``fleet_ray`` is the cluster; it alone imports ray.

Math, per anchor (a copy, a matmul) and GPU, its peers being the other GPUs of the same model:
    peers' time = their upper median;  spread = 1.4826 x median |time - peers' time| / peers' time, of 4 peers or more
    margin = max(3 %, 3 x the largest of: spread, the deviations behind both medians' own 95 % intervals)
    slow: time > (1 + margin) x peers' time

Units: seconds. Errors: ``FleetError``, one line. Needs no torch.

Source: median absolute deviation as an estimate of sigma: Rousseeuw and Croux, JASA 1993.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median, median_high
from typing import Any, Generic, Protocol, TypeVar

from .judgement import GATE_MARGIN, NOISE_FACTOR

ATTEMPTS = 2
"""Workers that one point may take down."""

GPU_RESOURCE = "gpu_model:"
"""``ray start --resources '{"gpu_model:h100": 8}'`` says which GPUs a node has, where Ray's own label does not."""

ACCELERATOR_TYPES = {
    "A100": "a100", "B200": "b200", "B300": "b300", "GB200": "gb200", "GB300": "gb300", "GeForce-RTX-5090": "rtx_5090",
    "H100": "h100", "H20": "h20", "H200": "h200", "H800": "h800", "L40S": "l40s", "RTX-PRO-6000": "rtx_pro_6000",
}  # fmt: skip
"""Ray's label of a node to a row of ``gpus``. Source: Ray 2.60, ``_private/accelerators/nvidia_gpu.py``: the driver's
name up to its first word with a digit, so PCIe and SXM are one label; a worker looks which it is on."""

_MAD_TO_SIGMA = 1.4826
_NORMAL_95 = 1.96
_MIN_SPREAD_PEERS = 4


class FleetError(ValueError):
    """The cluster, or a node of it, is not what the sweep needs."""


class SeatDied(Exception):
    """The process that held a GPU is gone, or does not answer."""


@dataclass(frozen=True)
class Job:
    """One point for any CPU. ``payload``: what the worker's function takes; ``what``: its name for people."""

    key: str
    what: str
    payload: Any


@dataclass(frozen=True)
class Lost:
    """What came of a point that took its workers down: nothing, and why."""

    reason: str


class Spread(Protocol):
    """Runs ``function`` ("module:name", importable on every node) on each job on some CPU of a cluster."""

    def __call__(self, function: str, jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        """(job, answer or ``Lost``) as they come. Raises ``FleetError`` where no CPU can."""
        ...


@lru_cache
def fingerprint() -> str:
    """SHA-256 of the sources of this package's kernels and bench: a worker of other code measures something else."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for room in ("bench", "kernels") for path in (root / room).glob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_same(what: str, expected: object, got: object, node: str) -> None:
    """Raises ``FleetError`` where a node has other code, or another compiler, than the driver."""
    if expected != got:
        raise FleetError(f"ray: expected {what} on {node} as where the sweep was started; install the same there")


# -- estimates -------------------------------------------------------------------------------------


class Pace:
    """How fast points come, and what the rest will take. Points that were known before do not count as work."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self._new = total, 0, 0
        self._clock, self._begun_s = clock, clock()

    def advance(self, is_new: bool = True) -> None:
        self.done += 1
        if not self._new and not is_new:
            self._begun_s = self._clock()  # nothing was worked at so far
        self._new += is_new

    @property
    def rest_s(self) -> float | None:
        """None before the first new point."""
        if not self._new:
            return None
        return (self._clock() - self._begun_s) / self._new * (self.total - self.done)

    def __str__(self) -> str:
        rest_s = self.rest_s
        known = "" if rest_s is None else f", about {rest_s / 60:.1f} min left" if rest_s >= 60 else (
            f", about {rest_s:.0f} s left"
        )  # fmt: skip
        return f"{self.done}/{self.total}{known}"


# -- slow GPUs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnchorTime:
    """An anchor on one GPU: median and 95 % interval of its blocks."""

    name: str
    time_s: float
    low_s: float
    high_s: float

    @property
    def deviation(self) -> float:
        """Relative; of the median, by its interval."""
        return (self.high_s - self.low_s) / 2 / _NORMAL_95 / self.time_s


@dataclass(frozen=True)
class GpuReport:
    """One GPU as its worker found it. ``problem``: why it cannot be used, whatever its peers do; "" for nothing."""

    uuid: str
    node: str
    anchors: tuple[AnchorTime, ...]
    problem: str = ""

    @property
    def place(self) -> str:
        return f"{self.uuid} on {self.node}"


def slowness(report: GpuReport, peers: Sequence[GpuReport]) -> str:
    """Why a GPU is slower than its peers by more than the noise; "" where it is not, or has none."""
    for anchor in report.anchors:
        others = [other for peer in peers for other in peer.anchors if other.name == anchor.name]
        if not others:
            continue
        reference_s = median_high(other.time_s for other in others)
        noises = [anchor.deviation, median_high(other.deviation for other in others)]
        if len(others) >= _MIN_SPREAD_PEERS:
            noises.append(_MAD_TO_SIGMA * median(abs(each.time_s - reference_s) for each in others) / reference_s)
        margin = max(GATE_MARGIN, NOISE_FACTOR * max(noises))
        if anchor.time_s > (1 + margin) * reference_s:
            more, many = anchor.time_s / reference_s - 1, "peers" if len(others) > 1 else "peer"
            return (
                f"{anchor.name} takes {anchor.time_s * 1e6:.2f} us, {more:.1%} more than the "
                f"{reference_s * 1e6:.2f} us of its {len(others)} {many}; margin {margin:.1%}"
            )
    return ""


def excluded(reports: Sequence[GpuReport]) -> dict[str, str]:
    """UUID to reason of those that must not measure: faulty by themselves, or slower than their peers.

    Raises:
        FleetError: two workers on one GPU.
    """
    uuids = [report.uuid for report in reports]
    if len(set(uuids)) < len(uuids):
        twice = max(uuids, key=uuids.count)
        raise FleetError(f"ray: expected each worker on a GPU of its own; got {uuids.count(twice)} on {twice}")
    sound = [report for report in reports if not report.problem]
    reasons = {report.uuid: report.problem for report in reports if report.problem}
    for report in sound:
        reason = slowness(report, [peer for peer in sound if peer.uuid != report.uuid])
        if reason:
            reasons[report.uuid] = reason
    return reasons


# -- who takes which point -------------------------------------------------------------------------

Item = TypeVar("Item")
Seat = TypeVar("Seat")


@dataclass
class _Queue(Generic[Item]):
    """Points that wait, and how many are in flight. Used under ``changed``."""

    waiting: deque[tuple[int, Item]]
    changed: threading.Condition = field(default_factory=threading.Condition)
    in_flight: int = 0
    tries: dict[int, int] = field(default_factory=dict)
    left: list[tuple[int, Item]] = field(default_factory=list)
    error: BaseException | None = None
    is_stopped: bool = False

    def take(self, allows: Callable[[Item], bool]) -> tuple[int, Item] | None:
        """The next point; waits while one in flight may yet come back. None at the end."""
        while not self.is_stopped:
            if self.waiting:
                index, item = self.waiting.popleft()
                if allows(item):
                    self.in_flight += 1
                    return index, item
                self.left.append((index, item))
            elif self.in_flight:
                self.changed.wait(1.0)
            else:
                return None
        return None

    def stop(self, error: BaseException | None = None) -> None:
        self.is_stopped, self.error = True, self.error or error
        self.changed.notify_all()


def drive(
    seats: Sequence[Seat],
    items: Sequence[Item],
    work: Callable[[Seat, Item], Any],
    done: Callable[[Item, Any], None],
    *,
    renew: Callable[[Seat], Seat | None],
    is_spoiled: Callable[[Any], bool] = lambda result: False,
    allows: Callable[[Item], bool] = lambda item: True,
    attempts: int = ATTEMPTS,
) -> list[Item]:
    """Every item on some seat, in this order; a seat does one at a time. The items that were not done.

    Args:
        work: on a thread of the seat; ``SeatDied`` puts the item back, to be tried by ``attempts`` seats in all.
        done: called with each item and its result, or ``Lost``, by one thread at a time: the only writer.
        renew: another seat in place of one that died or was spoiled; None where there is none.
        is_spoiled: whether a result says that its seat must not be used again.
        allows: asked before each item, under the lock; what is not allowed is left.

    Raises:
        What ``work`` or ``done`` raises; no item is begun after it.
    """
    queue: _Queue[Item] = _Queue(deque(enumerate(items)))

    def lane(seat: Seat | None) -> None:
        try:
            while seat is not None:
                with queue.changed:
                    taken = queue.take(allows)
                if taken is None:
                    return
                seat = _one(queue, seat, taken, attempts, work, done, renew, is_spoiled)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            with queue.changed:
                queue.stop(error)

    threads = [threading.Thread(target=lane, args=(seat,), daemon=True) for seat in seats]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        with queue.changed:
            queue.stop()
    if queue.error is not None:
        raise queue.error
    return [item for _, item in sorted([*queue.left, *queue.waiting], key=lambda each: each[0])]


def _one(
    queue: _Queue[Item], seat: Seat, taken: tuple[int, Item], attempts: int, work: Callable[[Seat, Item], Any],
    done: Callable[[Item, Any], None], renew: Callable[[Seat], Seat | None], is_spoiled: Callable[[Any], bool],
) -> Seat | None:  # fmt: skip
    """One item on one seat, and the seat for the next."""
    index, item = taken
    died = False
    try:
        result = work(seat, item)
    except SeatDied as error:
        died = True
        result = Lost(f"died: {error}")
    with queue.changed:
        queue.in_flight -= 1
        queue.tries[index] = queue.tries.get(index, 0) + died
        if died and queue.tries[index] < attempts and not queue.is_stopped:
            queue.waiting.appendleft(taken)
        elif not (died and queue.is_stopped):
            done(item, result)
        queue.changed.notify_all()
        if queue.is_stopped:
            return None
    return renew(seat) if died or is_spoiled(result) else seat
