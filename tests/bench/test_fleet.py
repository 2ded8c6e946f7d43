"""What a sweep over many machines does whatever the cluster is: slow GPUs, seats that die, estimates. No Ray."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tokenfab.bench import fleet
from tokenfab.bench.fleet import (
    ACCELERATOR_TYPES,
    AnchorTime,
    FleetError,
    GpuReport,
    Lost,
    Pace,
    SeatDied,
    check_same,
    drive,
    excluded,
    slowness,
)
from tokenfab.bench.gpus import GPUS

COPY_S, MATMUL_S = 180e-6, 200e-6


def report(number: int, copy: float = 1.0, matmul: float = 1.0, width: float = 0.002, problem: str = "") -> GpuReport:
    """GPU ``number``: its anchors' times by factors, with intervals of a relative ``width``."""
    anchors = tuple(
        AnchorTime(name, time_s, time_s * (1 - width / 2), time_s * (1 + width / 2))
        for name, time_s in (("copy", COPY_S * copy), ("matmul", MATMUL_S * matmul))
    )
    return GpuReport(f"GPU-{number}", f"node-{number // 8}", () if problem else anchors, problem)


# -- slow GPUs -------------------------------------------------------------------------------------


def test_r30_one_of_two_is_20_percent_slow() -> None:
    reasons = excluded([report(0), report(1, matmul=1.2)])
    assert reasons == {
        "GPU-1": "matmul takes 240.00 us, 20.0% more than the 200.00 us of its 1 peer; margin 3.0%"
    }  # fmt: skip
    assert set(excluded([report(0, copy=1.2), report(1)])) == {"GPU-0"}


@pytest.mark.parametrize(("factor", "is_slow"), [(1.029, False), (1.031, True), (0.5, False)])
def test_three_percent_is_the_least_margin(factor: float, is_slow: bool) -> None:
    assert bool(excluded([report(0, factor), *(report(n) for n in range(1, 4))])) == is_slow


def test_a_fast_gpu_makes_none_slow() -> None:
    assert not excluded([report(0), report(1), report(2, 0.8, 0.8)])
    assert not excluded([report(0, 0.8, 0.8), *(report(n) for n in range(1, 8))])


def test_several_slow_ones_among_many() -> None:
    slow = {1, 5}
    reports = [report(n, matmul=1.1 if n in slow else 1.0) for n in range(8)]
    assert set(excluded(reports)) == {"GPU-1", "GPU-5"}


def test_a_wide_interval_widens_the_margin() -> None:
    """Three deviations behind a 95 % interval of 8 %: 3 x 0.04 / 1.96 = 6.1 %."""
    for which in (0, 1):
        pair = [report(0, 1.06, width=0.08 if which == 0 else 0.002), report(1, width=0.08 if which == 1 else 0.002)]
        assert not excluded(pair)
    assert "margin 6.1%" in excluded([report(0, 1.07, width=0.08), report(1)])["GPU-0"]


def test_peers_that_differ_among_themselves_widen_it_too() -> None:
    """Spread of eight peers, 1 % apart around 1: the median deviation is 2 %, x 1.4826 x 3 = 8.9 %."""
    peers = [report(n, 0.96 + 0.01 * n) for n in range(9)]
    assert not slowness(report(9, 1.08), peers)
    assert "margin 8.9%" in slowness(report(9, 1.10), peers)
    assert "margin 3.0%" in slowness(report(9, 1.08), [peers[0], peers[4], peers[8]])  # three tell no spread


def test_a_lone_gpu_has_no_peers() -> None:
    assert excluded([report(0, 3.0)]) == {}


def test_r30_a_faulty_gpu_is_out_and_no_peer() -> None:
    reasons = excluded([report(0), report(1, problem="anchor copy: check: wrong"), report(2, 1.2)])
    assert reasons["GPU-1"] == "anchor copy: check: wrong"
    assert set(reasons) == {"GPU-1", "GPU-2"}
    half = dataclasses.replace(report(1, 0.5, 0.5), problem="anchor matmul: floor")
    assert excluded([report(0), half]) == {"GPU-1": "anchor matmul: floor"}


def test_r30_two_workers_on_one_gpu() -> None:
    with pytest.raises(FleetError, match="each worker on a GPU of its own; got 2 on GPU-3"):
        excluded([report(3), report(4), report(3)])


def test_rays_labels_name_gpus() -> None:
    assert set(ACCELERATOR_TYPES.values()) <= set(GPUS)


def test_r30_another_code_is_refused() -> None:
    check_same("tokenfab's sources", "a", "a", "node")
    with pytest.raises(FleetError, match="expected tokenfab's sources on node-7 as where the sweep was started"):
        check_same("tokenfab's sources", "a", "b", "node-7")
    assert len(fleet.fingerprint()) == 64


# -- seats -----------------------------------------------------------------------------------------


class Bench:
    """Seats with numbers; each item may take a number of seats down first."""

    def __init__(self, deaths: dict[int, int] | None = None, spares: int = 99) -> None:
        self.deaths, self.spares = Counter(deaths or {}), spares
        self.log: list[tuple[int, int]] = []
        self.results: dict[int, Any] = {}
        self.busy: set[int] = set()
        self.lock = threading.Lock()
        self.next = 100
        self.writing = 0

    def work(self, seat: int, item: int) -> str:
        with self.lock:
            assert seat not in self.busy, "two items on one seat"
            self.busy.add(seat)
            self.log.append((seat, item))
            dies = self.deaths[item] > 0
            self.deaths[item] -= dies
        time.sleep(0.001)
        with self.lock:
            self.busy.discard(seat)
        if dies:
            raise SeatDied("killed")
        return f"result {item}"

    def done(self, item: int, result: Any) -> None:
        self.writing += 1
        assert self.writing == 1, "two writers"
        assert item not in self.results
        time.sleep(0.0005)
        self.results[item] = result
        self.writing -= 1

    def renew(self, seat: int) -> int | None:
        with self.lock:
            if not self.spares:
                return None
            self.spares -= 1
            self.next += 1
            return self.next

    def run(self, seats: int, items: int, **more: Any) -> list[int]:
        return drive(list(range(seats)), list(range(items)), self.work, self.done, renew=self.renew, **more)


def test_every_item_once_in_order() -> None:
    bench = Bench()
    assert bench.run(3, 40) == []
    assert bench.results == {item: f"result {item}" for item in range(40)}
    assert sorted(item for _, item in bench.log) == list(range(40))
    assert [item for _, item in bench.log][:3] == [0, 1, 2] or {item for _, item in bench.log[:3]} == {0, 1, 2}
    alone = Bench()
    alone.run(1, 10)
    assert alone.log == [(0, item) for item in range(10)]


def test_r30_a_seat_that_dies_repeats_only_the_item_in_flight() -> None:
    bench = Bench(deaths={4: 1})
    assert bench.run(2, 20) == []
    assert all(result == f"result {item}" for item, result in bench.results.items())
    times = Counter(item for _, item in bench.log)
    assert times == Counter({item: 1 + (item == 4) for item in range(20)})
    seats_of_4 = [seat for seat, item in bench.log if item == 4]
    assert len(set(seats_of_4)) == 2  # not the dead one again


def test_r30_an_item_that_takes_two_seats_down_is_lost_and_no_other() -> None:
    bench = Bench(deaths={4: 5})
    assert bench.run(2, 20) == []
    assert bench.results[4] == Lost("died: killed")
    assert sum(item == 4 for _, item in bench.log) == 2
    assert all(bench.results[item] == f"result {item}" for item in range(20) if item != 4)


def test_r30_without_seats_the_rest_is_left() -> None:
    bench = Bench(deaths={3: 1}, spares=0)
    assert bench.run(1, 10) == [3, 4, 5, 6, 7, 8, 9]
    assert sorted(bench.results) == [0, 1, 2]


def test_an_item_of_a_dead_seat_goes_to_one_that_had_nothing_left() -> None:
    """The last item's seat dies without a successor while the other seat is idle."""
    bench = Bench(deaths={1: 1}, spares=0)
    slow = bench.work

    def work(seat: int, item: int) -> str:
        if item == 1 and not any(each == 1 for _, each in bench.log):
            time.sleep(0.1)  # the other lane sees an empty queue meanwhile
        return slow(seat, item)

    assert drive([0, 1], [0, 1], work, bench.done, renew=bench.renew) == []
    assert bench.results == {0: "result 0", 1: "result 1"}


def test_a_spoiled_seat_is_not_used_again() -> None:
    bench = Bench()
    bench.run(1, 6, is_spoiled=lambda result: result == "result 2")
    assert [seat for seat, _ in bench.log] == [0, 0, 0, 101, 101, 101]
    assert len(bench.results) == 6


def test_what_is_not_allowed_is_left() -> None:
    bench = Bench()
    assert bench.run(2, 10, allows=lambda item: item % 3 != 0) == [0, 3, 6, 9]
    assert sorted(bench.results) == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("where", ["work", "done"])
def test_r30_an_error_stops_and_is_raised(where: str) -> None:
    bench = Bench()

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if 5 in arguments:
                raise OSError("disk full")
            return function(*arguments)

        return call

    work, done = (broken(bench.work), bench.done) if where == "work" else (bench.work, broken(bench.done))
    with pytest.raises(OSError, match="disk full"):
        drive([0, 1], list(range(1000)), work, done, renew=bench.renew)
    assert len(bench.results) < 20


# -- estimates -------------------------------------------------------------------------------------


def test_the_estimate_counts_new_points_only() -> None:
    now = [0.0]
    pace = Pace(100, clock=lambda: now[0])
    assert (str(pace), pace.rest_s) == ("0/100", None)
    for _ in range(40):
        now[0] += 1.0  # reading what is known is no work
        pace.advance(is_new=False)
    assert str(pace) == "40/100"
    for _ in range(10):
        now[0] += 3.0
        pace.advance()
    assert pace.rest_s == pytest.approx(3.0 * 50)
    assert str(pace) == "50/100, about 2.5 min left"
    for _ in range(45):
        now[0] += 3.0
        pace.advance()
    assert str(pace) == "95/100, about 15 s left"


def test_reports_and_jobs_are_plain_data() -> None:
    assert dataclasses.asdict(report(0))["anchors"][0]["time_s"] == COPY_S
    assert report(9).place == "GPU-9 on node-1"
