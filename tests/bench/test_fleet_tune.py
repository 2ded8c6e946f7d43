"""Tuning and the lab over GPUs of a cluster, with seats that are objects of this process: what is asked and kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli
from tokenfab.bench import fleet_lab, fleet_ray, fleet_tune, targets, tune, tune_prune, tune_show
from tokenfab.bench.case import Anchor
from tokenfab.bench.fleet import AnchorTime, FleetError, GpuReport, SeatDied, fingerprint
from tokenfab.bench.fleet_lab import run_lab
from tokenfab.bench.fleet_seat import Hello, NotMeasured, Point, SeatSpec, Stepped, StepWork, pack
from tokenfab.bench.fleet_sweep import Fleet
from tokenfab.bench.fleet_tune import tune_on
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.lab import Deadline
from tokenfab.bench.lab_checks import MODEST_SHAPES, CheckFile
from tokenfab.bench.peers import ANCHORS
from tokenfab.bench.record import Record, encode, environment
from tokenfab.bench.records import RecordStore
from tokenfab.bench.targets import Target
from tokenfab.bench.timing import measure
from tokenfab.bench.tune import Trials, anchor_name, decide
from tokenfab.bench.tune_prune import Pruned
from tokenfab.kernels.registry import KERNELS
from tokenfab.kernels.tiles import Tile
from tokenfab.tests.bench.fake_device import Buffer, FakeDevice, make_case, random_buffer
from tokenfab.tests.bench.made_records import RECORD, numbered
from tokenfab.tests.bench.test_tune import DEFAULT, ROUNDS, TILES, WEIGHTS, Lab, planted, pruned

H100 = get_gpu("h100")
PROPERTIES = FakeDevice().properties


@dataclass
class Gpus:
    """Seats on two GPUs; what they do is written down. ``answers``: method to what it gives."""

    answers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    count: int = 2
    log: list[tuple[str, int, Any]] = field(default_factory=list)
    made: int = 0
    slow: set[str] = field(default_factory=set)
    faulty: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    # as much of a cluster as the commands ask for

    def gpu_models(self) -> dict[str, int]:
        return {"h100": self.count} if self.count else {}

    def num_cpus(self) -> int:
        return 2

    def spread(self, function: str, jobs: Any) -> Any:
        raise AssertionError("nothing compiles here")

    def seats(
        self, gpu: str, actor: str, *arguments: Any, most: int | None = None, expected: int | None = None
    ) -> list[GpuSeat]:
        assert gpu == "h100"
        assert actor == "tokenfab.bench.fleet_seat:Seat"
        with self.lock:
            free = [uuid for uuid in (f"GPU-{n}" for n in range(self.count)) if uuid not in self.busy][:most]
            self.busy |= set(free)
            self.made += len(free)
            return [GpuSeat(self, uuid, self.made - index) for index, uuid in enumerate(free)]


class GpuSeat:
    def __init__(self, gpus: Gpus, uuid: str, number: int) -> None:
        self.gpus, self.uuid, self.number, self.is_alive = gpus, uuid, number, True

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        assert self.is_alive, "a seat that died is not asked again"
        assert timeout_s > 0
        with self.gpus.lock:
            self.gpus.log.append((method, self.number, arguments))
        if method == "hello":
            factor = 1.2 if self.uuid in self.gpus.slow else 1.0
            anchors = (AnchorTime("copy", factor * 1e-4, factor * 0.999e-4, factor * 1.001e-4),)
            problem = "anchor copy: check: wrong" if self.uuid in self.gpus.faulty else ""
            return Hello(GpuReport(self.uuid, "here", anchors, problem), PROPERTIES)
        try:
            return self.gpus.answers[method](self, *copy.deepcopy(arguments))  # as if it travelled
        except SeatDied:
            self.close()
            raise

    def close(self) -> None:
        self.is_alive = False
        with self.gpus.lock:
            self.gpus.busy.discard(self.uuid)


def fleet_of(gpus: Gpus) -> Fleet:
    return Fleet(gpus, H100, SeatSpec("h100", fingerprint()))


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


def test_a_gpu_that_comes_back_slow_is_excluded_then() -> None:
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


def test_without_a_gpu_to_measure_on() -> None:
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


def test_tiles_that_kill_or_raise_are_out_and_cost_no_other_twice(tmp_path: Path) -> None:
    tiles = Tiles(planted(TILES[11]), raising=frozenset([TILES[3]]), killing=frozenset([TILES[7]]))
    trials, _, missing = tuned(tmp_path, tiles)
    assert (decide(trials).adopted, missing) == (TILES[11], 0)
    first = Counter(tile for _, name, tile in tiles.asked if name == "first")
    assert first == Counter({**dict.fromkeys([DEFAULT, *TILES], 1), TILES[7]: 2})
    assert not trials.records(TILES[3], ROUNDS[0])
    assert not trials.records(TILES[7], ROUNDS[0])


def test_a_search_whose_driver_was_killed_goes_on(tmp_path: Path) -> None:
    first, second = Tiles(planted(TILES[11]), dies_after=20), Tiles(planted(TILES[11]))
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, first)
    done = set(map(tuple, ((name, tile) for _, name, tile in first.asked[:20])))
    trials, _, _ = tuned(tmp_path, second)
    assert decide(trials).adopted == TILES[11]
    again = [(name, tile) for _, name, tile in second.asked if name != "final"]
    assert not done & set(again)


# -- the lab ---------------------------------------------------------------------------------------


def a_record(number: int, seat: GpuSeat) -> bytes:
    return pack(numbered(number, f"seat-{seat.number}"))


STEP_LINE = {
    "model": "m", "precision": "bf16", "batch": 16, "length": 1024, "layers": 2, "distinct_layers": 2, "whole_s": 1e-3,
    "floor_s": 5e-4, "sum_s": None, "gap_s": None, "tokens_per_s_per_gpu": 16000.0, "omitted": [], "ops": [],
    "invalid": [],
}  # fmt: skip


@dataclass
class LabRun:
    folder: Path
    kernels: Any = tuple(kernel for kernel in KERNELS if kernel.op == "gemm")[:2]
    clock_s: float = 0.0
    cost_s: float = 0.0
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def spend(self, what: str, item: Any) -> None:
        self.calls.append((what, item))
        self.clock_s += self.cost_s

    def gpus(self) -> Gpus:
        def keys(seat: GpuSeat, points: list[Point]) -> list[str]:
            return [numbered(dict(point.fields)["m"]).point.key for point in points]

        def measured(seat: GpuSeat, point: Point, settings: Any) -> bytes:
            self.spend("measure", dict(point.fields)["m"])
            return a_record(dict(point.fields)["m"], seat)

        def check(seat: GpuSeat, kernel: str, shape: dict[str, int], repeats: int) -> Any:
            self.spend("check", kernel)
            return f"hash {seat.uuid} 1 2 3", ("wrong: by 1.2",) if shape["m"] == 64 else ()

        def step(seat: GpuSeat, work: StepWork, seconds: float) -> Stepped:
            self.spend("step", work.name)
            point = msgspec.structs.replace(
                RECORD.point, op="decode_step", shape={"batch": work.batch, "length": work.length},
                tile={"model": work.model}, kernel_hash="5" * 64,
            )  # fmt: skip
            return Stepped(
                (pack(msgspec.structs.replace(RECORD, point=point)),), (json.dumps(STEP_LINE).encode(),), ("told",)
            )

        return Gpus({
            "keys": keys, "measure": measured, "check": check, "step": step,
            "versions": lambda seat, names: [f"hash {seat.uuid} 1 2 3"] * len(names),
            "step_version": lambda seat: ["5" * 64],
        })  # fmt: skip

    def targets(self) -> list[Target]:
        return [Target(ANCHORS[0], (("m", m), ("n", 64), ("k", 64)), ("somewhere",)) for m in range(1, 7)]

    def run(self, seconds: float = 1e6, **more: Any) -> tuple[Any, list[str]]:
        steps, told = [StepWork("m", 16, 1024), StepWork("m", 1, 1024)], []
        with fleet_of(self.gpus()) as fleet:
            session = run_lab(
                fleet, self.targets(), steps, RecordStore(self.folder, "h100.jsonl"),
                CheckFile(self.folder / "checks.ndjson"), self.folder / "steps.ndjson",
                Deadline(seconds, lambda: self.clock_s), kernels=self.kernels, tell=told.append, **more,
            )  # fmt: skip
        return session, told


def test_the_labs_stages_in_their_order_and_nothing_twice(tmp_path: Path) -> None:
    lab = LabRun(tmp_path)
    session, told = lab.run()
    checks = sum(len(MODEST_SHAPES[kernel.op]) for kernel in lab.kernels)
    stages = [what for what, _ in lab.calls]
    assert stages == ["check"] * checks + ["measure"] * 6 + ["step"] * 2 + ["measure"] * 12
    assert (session.checks, session.steps, session.lost, session.left) == (checks, 2, [], 0)
    assert sum("wrong: by 1.2" in line for line in told) == len(lab.kernels)
    assert len((tmp_path / "steps.ndjson").read_text().splitlines()) == 2
    records = list(RecordStore(tmp_path, "h100.jsonl").records())
    assert Counter(record.point.shape["m"] for record in records if record.point.op == "gemm") == dict.fromkeys(
        range(1, 7), 3
    )
    assert len({record.process for record in records if record.point.shape.get("m") == 3}) == 3

    lab.calls.clear()
    session, _ = lab.run()
    assert lab.calls == []
    assert (session.checks, session.steps) == (0, 0)


def test_the_deadline_leaves_what_does_not_fit(tmp_path: Path) -> None:
    lab = LabRun(tmp_path, cost_s=10.0)
    session, _ = lab.run(100.0, stages=("measure",))
    first_s = fleet_lab.PointCost(fleet_lab.LAB_SETTINGS).expect("")
    assert 0 < first_s < 10
    assert len(lab.calls) == 10  # pass 1 and four points of pass 2; the next would begin at 100 s
    assert session.left == 6  # have no third pass
    lab.clock_s = 0.0
    session, _ = lab.run(1e6, stages=("measure",))
    assert len(lab.calls) == 18


def test_a_record_is_small_enough_for_a_message() -> None:
    """A record of a thousand blocks: answers beyond 100 KB would lie on the node until they are fetched."""
    block = RECORD.measurement.blocks[0]
    assert len(encode(RECORD)) > 1000
    many = [msgspec.structs.replace(block, time_s=block.time_s * (1 + number * 1.0000001e-6)) for number in range(1000)]
    line = msgspec.json.encode(many)
    assert len(line) > 100_000
    assert len(zlib.compress(line)) < 60_000


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """A command with ``--ray auto`` on such a cluster."""

    def run(gpus: Gpus, *arguments: str) -> Result:
        @contextmanager
        def connected(address: str) -> Iterator[Gpus]:
            assert address == "auto"
            yield gpus

        monkeypatch.setattr(fleet_ray, "connect", connected)
        return CliRunner().invoke(cli, [*arguments, "--ray", "auto", "--out", str(tmp_path)])

    return run


TUNE = ("tune", "gemm", "--format", "fp8_block", "--shape", "m=64,n=2112,k=7168", "--json")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_prune, "prune", lambda target, row, **_: pruned())
    monkeypatch.setattr(tune_show, "pruned_dict", lambda each: {"kernel": each.target.kernel.name})
    monkeypatch.setattr(tune, "ROUNDS", ROUNDS)
    monkeypatch.setattr(fleet_tune, "tune_on", partial(tune_on, rounds=ROUNDS))


@pytest.mark.usefixtures("no_compiler")
def test_tune_writes_the_table_and_says_the_gain(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke(Gpus({"measure_tile": Tiles(planted(TILES[11]))}), *TUNE)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["targets"]
    assert row["adopted"] == dataclasses.asdict(TILES[11])
    assert row["gain"] > 0.1
    assert json.loads((tmp_path / "tuned-h100.json").read_text())
    assert "pass 3 on 2 GPUs: 1/1" in result.stderr or "pass 3" not in result.stderr


@pytest.mark.usefixtures("no_compiler")
def test_tune_without_gpus_ends_with_the_floors(invoke: Callable[..., Result], tmp_path: Path) -> None:
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


def test_the_lab_ends_with_its_summary_and_says_what_is_missing(
    invoke: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = LabRun(tmp_path)
    gpus = lab.gpus()
    measure = gpus.answers["measure"]

    def dying(seat: GpuSeat, point: Point, settings: Any) -> bytes:
        if dict(point.fields)["m"] == 4:
            raise SeatDied("killed")
        return measure(seat, point, settings)

    gpus.answers["measure"] = dying
    monkeypatch.setattr(targets, "find_targets", lambda *_, **__: lab.targets())
    monkeypatch.setattr(fleet_lab, "kernels_of", lambda gpu: lab.kernels)
    result = invoke(gpus, "lab", "--model", "qwen3-30b-a3b", "--batch", "16", "--context", "1024", "--json")
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["gpu"] == "h100"
    assert "sanitize: left out over a cluster" in result.stderr
    assert "lost: gemm/bf16-bf16@torch.matmul died: killed" in result.stderr
    assert "3 points took their workers down or raised, 0 were not begun" in result.stderr  # one in each pass
    assert {name for name, _ in lab.calls} == {"check", "measure", "step"}
    assert [item for name, item in lab.calls if name == "step"] == ["qwen3-30b-a3b 16 x 1024"]
    found = [record.point for record in RecordStore(tmp_path, "h100.jsonl").records()]
    kept = Counter(point.shape["m"] for point in found if point.op == "gemm")
    assert kept == dict.fromkeys((1, 2, 3, 5, 6), 3)
