"""Tuning over GPUs of a cluster, with seats that are objects of this process: what is asked and what is kept."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenfab.bench import fleet_tune, tune, tune_prune, tune_show
from tokenfab.bench.case import Anchor
from tokenfab.bench.fleet import FleetError, SeatDied
from tokenfab.bench.fleet_seat import NotMeasured, Point, pack
from tokenfab.bench.fleet_sweep import Fleet
from tokenfab.bench.fleet_tune import tune_on
from tokenfab.bench.record import Record, environment
from tokenfab.bench.records import RecordStore
from tokenfab.bench.timing import measure
from tokenfab.bench.tune import Trials, anchor_name, decide
from tokenfab.bench.tune_prune import Pruned
from tokenfab.commands.fleet import FleetProgress
from tokenfab.kernels.tiles import Tile
from tokenfab.tests.bench.fake_device import Buffer, FakeDevice, make_case, random_buffer
from tokenfab.tests.bench.fleet_seats import H100, PROPERTIES, Gpus, GpuSeat, fleet_of, invoker
from tokenfab.tests.bench.test_tune import DEFAULT, ROUNDS, TILES, WEIGHTS, Lab, planted, pruned

# -- the fleet -------------------------------------------------------------------------------------


def on(fleet: Fleet) -> list[str]:
    return sorted(seat.uuid for seat in fleet.seats if isinstance(seat, GpuSeat))


def test_a_slow_gpu_keeps_its_process_and_measures_nothing() -> None:
    gpus = Gpus(count=3, slow={"GPU-1"})
    with fleet_of(gpus) as fleet:
        for _ in range(2):
            fleet.open()
            assert on(fleet) == ["GPU-0", "GPU-2"]
            assert gpus.busy == {"GPU-0", "GPU-1", "GPU-2"}, "nobody else of the sweep gets it"
        assert list(fleet.excluded) == ["GPU-1"]
        assert str(fleet.excluded["GPU-1"]).startswith("excluded: GPU-1 on here: copy takes 120.00 us, 20.0% more")
    assert gpus.busy == set()


def test_r30_a_gpu_that_comes_back_slow_is_excluded_then() -> None:
    gpus = Gpus(count=3)
    with fleet_of(gpus) as fleet:
        fleet.open()
        assert fleet.excluded == {}
        lost = next(seat for seat in fleet.seats if isinstance(seat, GpuSeat) and seat.uuid == "GPU-2")
        again = fleet.renew(lost)
        assert isinstance(again, GpuSeat)
        assert (again.uuid, on(fleet)) == ("GPU-2", ["GPU-0", "GPU-1", "GPU-2"])
        assert again.number != lost.number
        gpus.slow = {"GPU-2"}
        assert fleet.renew(again) is None
        assert list(fleet.excluded) == ["GPU-2"]
        assert on(fleet) == ["GPU-0", "GPU-1"]


def test_r30_without_a_gpu_to_measure_on() -> None:
    with fleet_of(Gpus(count=0)) as fleet, pytest.raises(FleetError, match="expected a h100 that is free"):
        fleet.open()
    with fleet_of(Gpus(faulty={"GPU-0", "GPU-1"})) as fleet:
        with pytest.raises(FleetError, match="none is left: excluded: GPU-0 on here: anchor copy.*GPU-1 on here"):
            fleet.open()
        with pytest.raises(FleetError, match="none is left"):
            fleet.ask("versions", [])


# -- tune ------------------------------------------------------------------------------------------


@dataclass
class Tiles:
    """Measures tiles as ``test_tune.Lab`` does, in the name of a seat's process."""

    extra: Callable[[Tile], float]
    raising: frozenset[Tile] = frozenset()
    killing: frozenset[Tile] = frozenset()
    dies_after: int = 1 << 30
    asked: list[tuple[int, str, Tile]] = field(default_factory=list)

    def __call__(self, seat: GpuSeat, point: Point, place: Any, tile: Tile, key: Any, settings: Any) -> Any:
        name = next(each.name for each in ROUNDS if each.settings == settings)
        self.asked.append((seat.number, name, tile))
        if len(self.asked) > self.dies_after:
            raise KeyboardInterrupt
        if tile in self.killing:
            raise SeatDied("killed")
        if tile in self.raising:
            return NotMeasured("raised: RuntimeError: an illegal memory access", is_spoiled=True)
        device = FakeDevice(seed=len(self.asked), noise=0.0, outliers=0.0)
        source, target = random_buffer(WEIGHTS, 1 << 20), Buffer(1000, [0.0])
        what = Pruned(point.target, place, (), ())

        def launch(work_s: float, reads: list[Buffer], writes: list[Buffer], effect: Callable[[], None]) -> None:
            from tokenfab.tests.bench.fake_device import Launch

            device.enqueue(Launch(reads, writes, effect, work_s=work_s))

        def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
            total = sum(weights.values)

            def effect() -> None:
                output.values[:] = [x * total for x in activations.values]

            launch(self.extra(tile), [weights, activations], [output], effect)

        anchor = Anchor(anchor_name(what), lambda: launch(self.extra(DEFAULT), [source], [target], lambda: None))
        found = measure(make_case(device, kernel, weight_bytes=WEIGHTS), device, anchor=anchor, settings=settings)
        made = Record.of(key, found, environment(PROPERTIES))
        return pack(msgspec.structs.replace(made, process=f"seat-{seat.number}"))


def tuned(tmp_path: Path, tiles: Tiles) -> tuple[Trials, Gpus, int]:
    gpus, store = Gpus({"measure_tile": tiles}), RecordStore(tmp_path, "h100-tune.jsonl")
    with fleet_of(gpus) as fleet:
        missing = tune_on(fleet, [pruned()], store, processes=3, rounds=ROUNDS)
    return Trials(pruned(), H100, environment(PROPERTIES), ROUNDS, store.records()), gpus, missing


def test_the_same_tile_as_on_one_machine(tmp_path: Path) -> None:
    tiles = Tiles(planted(TILES[11]))
    trials, gpus, missing = tuned(tmp_path / "fleet", tiles)
    alone = Lab(tmp_path / "alone", planted(TILES[11]), noise=0.0)
    alone.all()
    verdict, expected = decide(trials), decide(alone.trials())
    assert (verdict.adopted, missing) == (TILES[11], 0)
    assert verdict.adopted == expected.adopted
    assert verdict.gain == pytest.approx(expected.gain, rel=2e-2)
    per_round = Counter((name, tile) for _, name, tile in tiles.asked)
    assert per_round == Counter((name, tile) for _, name, tile in alone.seen)
    finals = {seat for seat, name, _ in tiles.asked if name == "final"}
    assert len(finals) == 3, "three fresh processes"
    assert gpus.busy == set(), "every GPU is given back"


def test_r30_tiles_that_kill_or_raise_are_out_and_cost_no_other_twice(tmp_path: Path) -> None:
    tiles = Tiles(planted(TILES[11]), raising=frozenset([TILES[3]]), killing=frozenset([TILES[7]]))
    trials, _, missing = tuned(tmp_path, tiles)
    assert (decide(trials).adopted, missing) == (TILES[11], 0)
    first = Counter(tile for _, name, tile in tiles.asked if name == "first")
    assert first == Counter({**dict.fromkeys([DEFAULT, *TILES], 1), TILES[7]: 2})
    assert not trials.records(TILES[3], ROUNDS[0])
    assert not trials.records(TILES[7], ROUNDS[0])


def test_r30_a_search_whose_driver_was_killed_goes_on(tmp_path: Path) -> None:
    first, second = Tiles(planted(TILES[11]), dies_after=20), Tiles(planted(TILES[11]))
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, first)
    done = set(map(tuple, ((name, tile) for _, name, tile in first.asked[:20])))
    trials, _, _ = tuned(tmp_path, second)
    assert decide(trials).adopted == TILES[11]
    again = [(name, tile) for _, name, tile in second.asked if name != "final"]
    assert not done & set(again)


TUNE = ("tune", "gemm", "--format", "fp8_block", "--shape", "m=64,n=2112,k=7168", "--json")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_prune, "prune", lambda target, row, **_: pruned())
    monkeypatch.setattr(tune_show, "pruned_dict", lambda each: {"kernel": each.target.kernel.name})
    monkeypatch.setattr(tune, "ROUNDS", ROUNDS)
    monkeypatch.setattr(fleet_tune, "tune_on", partial(tune_on, rounds=ROUNDS))


@pytest.mark.usefixtures("no_compiler")
def test_tune_writes_the_table_and_says_the_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke = invoker(monkeypatch, tmp_path)
    result = invoke(Gpus({"measure_tile": Tiles(planted(TILES[11]))}), *TUNE)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["targets"]
    assert row["adopted"] == dataclasses.asdict(TILES[11])
    assert row["gain"] > 0.1
    assert json.loads((tmp_path / "tuned-h100.json").read_text())


@pytest.mark.usefixtures("no_compiler")
def test_tune_without_gpus_ends_with_the_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke = invoker(monkeypatch, tmp_path)
    result = invoke(Gpus(count=0), *TUNE, "--gpu", "h100")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["gpu"] == "h100"
    assert not list(tmp_path.iterdir())
    result = invoke(Gpus(count=0), *TUNE)
    assert (result.exit_code, result.output.splitlines()[-1]) == (
        2, "error: gpu: expected --gpu NAME, for a sweep is of one GPU model; the cluster has no GPU"
    )  # fmt: skip
    result = invoke(Gpus(), *TUNE, "--arch", "sm_100")
    assert result.output.endswith("error: arch: expected sm_90, as h100 has; got sm_100\n")


def test_a_jobs_log_has_lines_with_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with FleetProgress("sweep", quiet=quiet) as progress:
            progress.begin("pass 1 on 2 GPUs", 3)
            for name in "abc":
                progress.advance(3, name)
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert lines == ([] if quiet else ["pass 1 on 2 GPUs: 3/3, about 0 s left"])
