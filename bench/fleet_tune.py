"""Searching tiles over the GPUs of a cluster: each target on one GPU at a time, by the search of one machine.

``tune.search`` runs on the driver and asks a seat for each measurement, so that its records lie in the same file before
the next is asked for, and a search goes on where it ended whoever ended it. Pass 1 searches; every pass is a fresh
process on each GPU and measures the finalists. A tile that takes two workers down, or raises, is out.

Errors: as ``fleet_sweep``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .fleet import ATTEMPTS, Lost, SeatDied
from .fleet_seat import NotMeasured, Point, unpack
from .fleet_sweep import Fleet, Remote, limit_s
from .measurement import Settings
from .record import Record, environment
from .records import RecordStore
from .tune import ROUNDS, Round, Searched, Trials, Unmeasured, search
from .tune_prune import Pruned

Done = Callable[[Pruned, Searched | Lost], None]


class _Bad:
    """Tiles of one target that cost a worker, over all tries of it."""

    def __init__(self) -> None:
        self.deaths: Counter[Any] = Counter()
        self.out: dict[Any, str] = {}

    def died(self, tile: Any, error: SeatDied) -> None:
        self.deaths[tile] += 1
        if self.deaths[tile] >= ATTEMPTS:
            self.out[tile] = f"died: {error}"


def tune_on(
    fleet: Fleet, pruned: Sequence[Pruned], store: RecordStore, *, processes: int, rounds: Sequence[Round] = ROUNDS,
    budget_s: float | None = None, first_pass: float = 0.6, begin: Callable[[int], None] = lambda number: None,
    done: Done = lambda each, searched: None,
) -> int:  # fmt: skip
    """All passes over all targets; how many of the last pass were not begun, or lost.

    Args:
        budget_s: for all passes together; the first gets ``first_pass`` of it, what is left is shared by the others.
    """
    end_s = None if budget_s is None else time.monotonic() + budget_s
    bad = {Point.of(each.target): _Bad() for each in pruned}
    missing = 0
    for number in range(1, processes + 1):
        fleet.open()
        begin(number)
        share = first_pass if number == 1 else 1 / (processes - number + 1)
        pass_s = None if end_s is None else share * max(0.0, end_s - time.monotonic())
        part_s = None if pass_s is None else pass_s * min(1.0, len(fleet.seats) / max(1, len(pruned)))
        lost = 0

        def work(seat: Remote, each: Pruned, number: int = number, part_s: float | None = part_s) -> Searched:
            return _search(fleet, seat, each, store, number, rounds, bad[Point.of(each.target)], _clock(part_s))

        def arrived(each: Pruned, searched: Searched | Lost) -> None:
            nonlocal lost
            lost += isinstance(searched, Lost)
            done(each, searched)

        attempts = ATTEMPTS * max((len(each.survivors) + 1 for each in pruned), default=1)
        missing = len(fleet.drive(pruned, work, arrived, attempts=attempts)) + lost
    fleet.close()
    return missing


def _clock(part_s: float | None) -> Callable[[float], bool]:
    """Whether a share of one target's part of the time, from now on, is spent."""
    begun_s = time.monotonic()
    return lambda share: part_s is not None and time.monotonic() - begun_s >= share * part_s


def _search(
    fleet: Fleet, seat: Remote, each: Pruned, store: RecordStore, number: int, rounds: Sequence[Round], bad: _Bad,
    is_over: Callable[[float], bool],
) -> Searched:  # fmt: skip
    assert fleet.properties is not None
    trials = Trials(each, fleet.row, environment(fleet.properties), rounds, store.records())
    trials.skipped.update(bad.out)

    def measured(tile: Any, settings: Settings) -> Record | Unmeasured:
        arguments = (Point.of(each.target), each.place, tile, trials.point(tile), settings)
        try:
            made = seat.call("measure_tile", *arguments, timeout_s=limit_s(settings))
        except SeatDied as error:
            bad.died(tile, error)
            raise
        if isinstance(made, NotMeasured):
            if made.is_spoiled:  # the next try of this target, on another worker, goes without it
                bad.out[tile] = made.reason
                raise SeatDied(made.reason)
            return Unmeasured(made.reason)
        return unpack(made)

    return search(trials, store, measured, process=number, is_over=is_over)
