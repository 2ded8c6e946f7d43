"""Measuring over a Ray cluster with two GPUs that are simulated, and, where there is one, on a real GPU.

The seats, their processes and their resources are Ray's own; only the device behind a seat runs on the CPU under a
virtual clock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench import fleet_lab, fleet_ray, fleet_seat, fleet_sweep, fleet_tune, tune, tune_prune, tune_show
from tokenfab.bench.fleet import FleetError, fingerprint
from tokenfab.bench.fleet_ray import connect
from tokenfab.bench.fleet_seat import Point, Seat, SeatSpec, pack, unpack
from tokenfab.bench.fleet_sweep import Fleet, sweep_targets
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.judgement import judge
from tokenfab.bench.lab_checks import CheckFile
from tokenfab.bench.peers import ANCHORS
from tokenfab.bench.record import decode
from tokenfab.bench.records import RecordStore
from tokenfab.bench.targets import Target
from tokenfab.bench.tune import Round
from tokenfab.bench.tune_prune import Candidate, Pruned
from tokenfab.bench.tune_space import place_of
from tokenfab.kernels.registry import find_kernels
from tokenfab.kernels.tiles import Tile
from tokenfab.tests.bench import fleet_fakes
from tokenfab.tests.bench.fleet_cluster import cluster as start_cluster
from tokenfab.tests.bench.fleet_cluster import within

H100 = get_gpu("h100")
SPEC = SeatSpec(
    "h100", fingerprint(), device=fleet_fakes.GPU, anchors=fleet_fakes.ANCHORS, anchor_settings=fleet_fakes.FAST
)
SIZES = (64, 80, 96, 112, 128, 144)


def targets(sizes: tuple[int, ...] = SIZES) -> list[Target]:
    return [Target(ANCHORS[0], (("m", 2), ("n", n), ("k", 64)), ("somewhere",)) for n in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fakes")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """One node that says it has two H100."""
    node = {"num_cpus": 3, "num_gpus": 2, "resources": {"gpu_model:h100": 2}}
    with ExitStack() as stack:
        with within(180):
            made = stack.enter_context(start_cluster(folder, node))
            connected = stack.enter_context(connect(made.address))
        yield connected


@pytest.fixture
def fakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the seats look into, empty; a test that hangs fails."""
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    monkeypatch.setattr(fleet_sweep, "ACTOR", fleet_fakes.MORTAL)
    with within(300):
        yield folder


Sweep = Callable[..., Any]


@pytest.fixture
def sweep(cluster: Any, fakes: Path, tmp_path: Path) -> Sweep:
    def run(sizes: tuple[int, ...] = SIZES, processes: int = 1, **more: Any) -> Any:
        told: list[str] = []
        store = RecordStore(tmp_path, "h100.jsonl")
        with Fleet(cluster, H100, SPEC, tmp_path, told.append) as fleet:
            swept = sweep_targets(fleet, targets(sizes), store, processes=processes, settings=fleet_fakes.FAST, **more)
            return fleet, swept, list(store.records()), told

    return run


def measured(folder: Path) -> list[tuple[str, str, int, int, float]]:
    return [tuple(line) for line in fleet_fakes.noted(folder / "measured")]


def test_r30_the_gpu_that_is_20_percent_slow_is_named_and_measures_nothing(
    sweep: Sweep, fakes: Path, tmp_path: Path
) -> None:
    (fakes / "slow").touch()
    sizes = SIZES[:3]
    fleet, swept, records, told = sweep(sizes, processes=2)
    assert list(fleet.excluded) == ["GPU-1"]
    (line,) = set(told)
    assert line.startswith("excluded: GPU-1 on ")
    assert line.endswith("% more than the 50000.00 us of its 1 peer; margin 3.0%")
    assert "takes 60000.00 us, 20.0% more" in line
    assert {record.environment.uuid for record in records} == {"GPU-0"}
    assert {uuid for _, uuid, *_ in measured(fakes)} == {"GPU-0"}
    assert len(records) == 2 * len(sizes)
    processes = defaultdict(set)
    for record in records:
        processes[record.point.shape["n"]].add(record.process)
    assert {len(found) for found in processes.values()} == {2}, "each pass is another process"
    assert len({record.process for record in records}) == 2
    lines = (tmp_path / "anchors" / "h100.ndjson").read_bytes().splitlines()
    anchors = [decode(line, "anchors") for line in lines]
    assert [file.name for file in tmp_path.rglob("*.jsonl")] == ["h100.jsonl"], "no reader takes anchors for points"
    assert {record.environment.uuid for record in anchors} == {"GPU-0", "GPU-1"}
    assert (swept.lost, swept.left) == ([], [])


def test_r30_points_that_kill_their_workers_and_never_two_at_once_on_a_gpu(sweep: Sweep, fakes: Path) -> None:
    """80 takes one worker down and is measured by another; 128 raises, and its process is not used again."""
    for name in ("kills-80-1", "raises-128"):
        (fakes / name).touch()
    fleet, swept, records, _ = sweep()
    assert fleet.excluded == {}
    assert sorted(record.point.shape["n"] for record in records) == [64, 80, 96, 112, 144]
    assert {record.environment.uuid for record in records} == {"GPU-0", "GPU-1"}
    assert {record.time_s for record in records} == {fleet_fakes.CALL_S}
    begun = [size for event, _, size, _, _ in measured(fakes) if event == "begin"]
    assert sorted(begun) == [64, 80, 80, 96, 112, 128, 144], "only what was in flight is repeated"
    lost = {outcome.target.shape["n"]: outcome.skipped for outcome in swept.lost}
    assert lost == {128: "raised: RuntimeError: an illegal memory access was encountered"}
    (raised,) = [pid for event, _, size, pid, _ in measured(fakes) if (event, size) == ("begin", 128)]
    assert [(event, size) for event, _, size, pid, _ in measured(fakes) if pid == raised][-1] == ("begin", 128)
    _check_alone(measured(fakes), ends_with_its_process={80, 128})

    (fakes / "raises-128").unlink()  # the next run measures what has no record, and nothing else
    before = len(measured(fakes))
    _, swept, records, _ = sweep()
    assert sorted(record.point.shape["n"] for record in records) == list(SIZES)
    assert sorted(size for event, _, size, _, _ in measured(fakes)[before:] if event == "begin") == [128]
    assert sum(outcome.is_old for outcome in swept.outcomes) == 5
    assert swept.lost == []


def _check_alone(lines: list[tuple[str, str, int, int, float]], ends_with_its_process: set[int]) -> None:
    """No point begins on a GPU while another is measured there."""
    running: dict[str, int] = {}
    for event, uuid, size, _, _ in sorted(lines, key=lambda each: each[4]):
        if event == "begin":
            assert uuid not in running, f"{size} began on {uuid} while {running[uuid]} was measured"
            if size not in ends_with_its_process:
                running[uuid] = size
        elif size not in ends_with_its_process:
            assert running.pop(uuid) == size


def test_r30_a_seat_lands_on_another_model_and_says_so(cluster: Any, fakes: Path) -> None:
    spec = SeatSpec("h200", fingerprint(), device=fleet_fakes.GPU)
    hello = _in_this_process(spec, fakes)
    assert hello.report.problem == "model: expected h200; this is 'NVIDIA H100 80GB HBM3'"
    with pytest.raises(FleetError, match="the cluster has 2 h100"):
        cluster.seats("h200", fleet_sweep.ACTOR, spec)


def _in_this_process(spec: SeatSpec, fakes: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        patch.setenv(fleet_fakes.FOLDER, str(fakes))
        return Seat(spec).hello()


Invoke = Callable[..., Any]


@pytest.fixture
def invoke(cluster: Any, fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """A command with ``--ray auto`` on the cluster; its JSON."""

    @contextmanager
    def same(address: str) -> Iterator[Any]:
        assert address == "auto"
        yield cluster

    monkeypatch.setattr(fleet_ray, "connect", same)
    monkeypatch.setattr(fleet_sweep, "make_spec", lambda *_, **__: SPEC)

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(cli, [*arguments, "--ray", "auto", "--out", str(tmp_path), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


def test_bench_over_two_simulated_gpus(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenfab.bench.targets.COPY_SHAPES", ({"num_bytes": 1 << 12}, {"num_bytes": 1 << 13}))
    monkeypatch.setattr("tokenfab.bench.summaries.QUICK", fleet_fakes.FAST)
    rows = invoke("bench", "copy", "--quick")
    assert [(row["num_bytes"], row["num_processes"]) for row in rows] == [(1 << 12, 1), (1 << 13, 1)]
    assert {row["time_s"] for row in rows} == {fleet_fakes.CALL_S}
    assert len((tmp_path / "quick" / "h100.jsonl").read_text().splitlines()) == 2


def test_tune_over_two_simulated_gpus(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only compiling is left out. Every tile takes the same time here: none is adopted over its default."""
    kernel = find_kernels("gemm", ["fp8_block"])[0]
    shapes = [(("m", 4), ("n", 128), ("k", 256)), (("m", 4), ("n", 256), ("k", 256))]
    tiles: dict[int, set[Tile]] = {}

    def prune(target: Target, *_: Any, **__: Any) -> Pruned:
        place = place_of(kernel, target.shape, "sm_90")
        tiles[target.shape["n"]] = {place.default, dataclasses.replace(place.default, block_n=64)}
        found = [Candidate(tile, (), 1e-6, 1e-6, 1e-6, 1, 1, 1.0, 1) for tile in tiles[target.shape["n"]]]
        return Pruned(target, place, tuple(found), ())

    rounds = (Round("first", fleet_fakes.FAST, 1.0), Round("final", fleet_fakes.FAST, 1.0))
    monkeypatch.setattr(tune_prune, "prune", prune)
    monkeypatch.setattr(tune_show, "pruned_dict", lambda each: {})
    monkeypatch.setattr(tune, "ROUNDS", rounds)
    monkeypatch.setattr(fleet_tune, "tune_on", partial(fleet_tune.tune_on, rounds=rounds))
    given = [part for shape in shapes for part in ("--shape", ",".join(f"{name}={size}" for name, size in shape))]
    rows = invoke("tune", "gemm", "--format", "fp8_block", *given, "--gpu", "h100")["targets"]
    assert [row["adopted"] for row in rows] == [None, None]
    records = list(RecordStore(tmp_path, "h100-tune.jsonl").records())
    assert {record.environment.uuid for record in records} == {"GPU-0", "GPU-1"}
    for n, both in tiles.items():
        found = [record for record in records if record.point.shape["n"] == n]
        assert len({record.environment.uuid for record in found}) == 1, "one target, one GPU at a time"
        assert all(record.time_s == fleet_fakes.CALL_S for record in found)
        launched = {record.point.tile["block_n"] for record in found}
        assert launched == {tile.block_n for tile in both}
        assert len(launched) == 2


def test_the_lab_over_two_simulated_gpus(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = find_kernels("quantize", ["fp8_row"])
    monkeypatch.setattr("tokenfab.bench.targets.find_targets", lambda *_, **__: targets(SIZES[:3]))
    monkeypatch.setattr(fleet_lab, "kernels_of", lambda gpu: [kernel])
    monkeypatch.setattr(fleet_lab, "MODEST_SHAPES", {"quantize": ({"rows": 5, "columns": 256},)})
    monkeypatch.setattr(fleet_lab, "REPEATS", 2)
    monkeypatch.setattr(fleet_lab, "run_lab", partial(fleet_lab.run_lab, settings=fleet_fakes.FAST))
    invoke("lab", "--stage", "check,measure", "--minutes", "5")
    (check,) = CheckFile(tmp_path / "checks" / "h100.ndjson").read()
    assert (check.kernel, check.problems, check.skipped) == (kernel.name, (), "")
    records = list(RecordStore(tmp_path, "h100.jsonl").records())
    assert Counter(record.point.shape["n"] for record in records) == dict.fromkeys(SIZES[:3], 3)
    assert len({record.process for record in records}) >= 3, "each pass is another process on each GPU"


# -- a seat, without a cluster ---------------------------------------------------------------------


@pytest.fixture
def seat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Seat:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv(fleet_fakes.FOLDER, str(folder))
    made = Seat(SPEC)
    made.hello()
    return made


def test_a_record_travels_whole(seat: Seat) -> None:
    packed = seat.measure(Point.of(targets()[0]), fleet_fakes.FAST)
    assert isinstance(packed, bytes)
    assert pack(unpack(packed)) == packed
    (key,) = seat.keys([Point.of(targets()[0])])
    assert unpack(packed).point.key == key


def test_a_small_record_fits_into_rays_message(seat: Seat) -> None:
    """Answers up to 100 KB travel with the message that they are done; larger ones lie on the node until fetched."""
    packed = seat.measure(Point.of(targets()[0]), fleet_fakes.FAST)
    assert isinstance(packed, bytes)
    assert len(packed) < 100_000 / 20  # 20 blocks here, 1000 at most


def test_r30_another_code_measures_nothing() -> None:
    with pytest.raises(FleetError, match="expected tokenfab's sources on"):
        Seat(dataclasses.replace(SPEC, fingerprint="0" * 64)).hello()


def test_r30_a_wrong_anchor_excludes_its_gpu(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seat, "_anchor", lambda *_: fleet_fakes._raise(MemoryError("no memory")))
    report = seat.hello().report
    assert (report.anchors, report.problem) == ((), "anchor copy/bf16-bf16@torch.copy_: no memory")


def test_a_kernel_of_ones_own_does_not_travel() -> None:
    own = dataclasses.replace(ANCHORS[0], library="user:mine")
    with pytest.raises(FleetError, match="expected one of the registry's on a cluster; got gemm/bf16-bf16@user:mine"):
        Point.of(Target(own, (), ()))
    assert fleet_seat.DEFAULT_ANCHORS[0].target.kernel.op == "copy"


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "not __import__('torch').cuda.is_available()",
    reason="compares one GPU's medians with and without Ray: needs a GPU",
)
def test_a_sweep_of_one_gpu_has_the_medians_of_a_plain_run(tmp_path: Path) -> None:
    """``tokenfab bench`` and ``tokenfab bench --ray``, three processes each, the same points."""
    pytest.importorskip("ray", reason="needs the extra: pip install '.[ray]'")
    shapes = ("m=64,n=7168,k=2048", "m=64,n=2112,k=7168")
    own = ["gemm", "--format", "fp8_block", "--no-energy", "--budget", "3", "--json"]
    own += [part for shape in shapes for part in ("--shape", shape)]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "TRITON_INTERPRET": "0"}
    times: dict[str, dict[str, list[float]]] = {}
    for name, more in (("plain", []), ("ray", ["--ray", "local"])):
        out = tmp_path / name
        command = [sys.executable, "-m", "tokenfab", "bench", *own, *more, "--out", str(out)]
        subprocess.run(command, check=True, timeout=900, env=environment, capture_output=True)
        (file,) = out.glob("*.jsonl")
        found: dict[str, list[float]] = defaultdict(list)
        for record in RecordStore(out, file.name).records():
            if record.time_s is not None:
                found[record.point.key].append(record.time_s)
        times[name] = found
    assert set(times["plain"]) == set(times["ray"])
    for key, plain in times["plain"].items():
        judged = judge(plain, times["ray"][key])
        assert judged.word == "same", f"{key}: {median(plain)} plain, {median(times['ray'][key])} on Ray: {judged}"
