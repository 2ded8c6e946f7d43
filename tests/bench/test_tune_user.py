"""Tuning a kernel of one's own: its tiles, under a virtual clock that the tile moves, from the file to the verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli
from tokenfab.bench import cuda_device, tune_user
from tokenfab.bench import record as record_module
from tokenfab.bench.device import NoGpu, Replay
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.record import environment
from tokenfab.bench.records import RecordStore
from tokenfab.bench.targets import Target
from tokenfab.bench.tune import ROUNDS, Trials, decide
from tokenfab.bench.tune_user import run_user_search, user_contest
from tokenfab.bench.user_kernel import UserKernel, base_kernel, load_user_kernel
from tokenfab.commands import tune as tune_module
from tokenfab.tests.bench.test_campaign import CALL_S, VirtualDevice

H100 = get_gpu("h100")
SHAPE = "m=4,n=128,k=256"
OWN = """
import torch
import virtual_clock

TILES = [
    {"block_n": 64, "stages": 2}, {"block_n": 128, "stages": 2}, {"block_n": 128, "stages": 4},
    {"block_n": 256, "stages": 4}, {"block_n": 512, "stages": 4},
]
TIMES = {(64, 2): 1.0, (128, 2): 0.9, (128, 4): 0.8, (256, 4): 0.7, (512, 4): 0.6}

def mine(weights, activations, output, block_n, stages=3):
    if block_n == 512:
        raise RuntimeError("shared memory")
    x = activations["data"].float() * activations["scale"]
    output.copy_(x @ (weights["data"].float() * weights["scale"]).t())
    if block_n == 256:  # the fastest but one, and wrong
        output *= 1.2
    virtual_clock.factor = TIMES[block_n, stages]
"""


class _Graph:
    def __init__(self, device: VirtualDevice, clock: Any, calls: Sequence[Callable[[], None]]) -> None:
        self.device, self.clock, self.calls = device, clock, list(calls)

    def launch(self) -> float:
        time_s = 0.0
        for call in self.calls:
            self.clock.factor = 1.0
            call()
            time_s += CALL_S * self.clock.factor
        self.device.now_s += time_s
        return time_s

    def replay(self, in_flight: Callable[[], None] | None = None) -> Replay:
        time_s = self.launch()
        if in_flight is not None:
            in_flight()
        self.device.now_s += time_s
        return Replay(time_s, 2 * time_s)


@pytest.fixture
def clock(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> type[VirtualDevice]:
    """A GPU whose calls take as long as the user's function says, by the module ``virtual_clock``."""
    if device.type != "cpu":
        pytest.skip("a virtual clock over the CPU; a GPU has its own")
    clock = ModuleType("virtual_clock")
    monkeypatch.setitem(sys.modules, "virtual_clock", clock)

    class Clocked(VirtualDevice):
        def capture(self, calls: Sequence[Callable[[], None]]) -> Any:
            return _Graph(self, clock, calls)

    monkeypatch.setattr(cuda_device, "CudaDevice", Clocked)
    monkeypatch.setattr(tune_user, "run_user_search", partial(run_user_search, buffers_on="cpu"))
    return Clocked


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:mine"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["tune", "gemm", "--format", "fp8_row", "--gpu", "h100", *arguments])


@pytest.mark.parametrize(
    ("tiles", "got"),
    [
        ("[]", r"got \[\]"),
        ("{}", r"got \{\}"),
        ("[3]", r"got \[3\]"),
        ("[{}]", r"got \[\{\}\]"),
        ("[{'block_n': 64.5}]", r"whole numbers or texts; got 'block_n': 64.5"),
        ("[{'block_m': 64}]", r"got \{'block_m': 64\}: missing a required argument: 'block_n'"),
        ("[{'block_n': 64, 'block_m': 64}]", r"got .*: got an unexpected keyword argument 'block_m'"),
        ("[{'block_n': 64, 'output': 64}]", r"got .*: multiple values for argument 'output'"),
        ("[{'block_n': 64, 'stages': 2}, {'stages': 2, 'block_n': 64}]", r"got one twice"),
    ],
)
def test_tiles_that_cannot_be_launched_are_said(clock: Any, tiles: str, got: str, own: str) -> None:
    path = Path(own.rpartition(":")[0])
    path.write_text(f"{OWN}\nTILES = {tiles}\n")
    expected = r"^kernel: .*own.py: TILES: expected a list of dicts of keyword arguments of mine, each another"
    with pytest.raises(ValueError, match=f"{expected}.*{got}$"):
        load_user_kernel(own, base_kernel("gemm", ["fp8_row"]))


def kernel_of(own: str) -> UserKernel:
    return load_user_kernel(own, base_kernel("gemm", ["fp8_row"]))


def target_of(kernel: Any) -> Target:
    return Target(kernel, (("m", 4), ("n", 128), ("k", 256)), ("asked",))


def test_the_first_tile_is_launched_and_recorded(clock: Any, own: str) -> None:
    runnable = kernel_of(own).load()
    assert runnable.tile({}, "cpu") == {"block_n": 64, "stages": 2}
    shape = dict(target_of(None).shape)
    weights, activations = (make(shape, 1, "cpu") for make in (runnable.make_weights, runnable.make_activations))
    output = runnable.make_output(shape, "cpu")
    sys.modules["virtual_clock"].factor = 0.0  # type: ignore[attr-defined]
    runnable.launch(weights, activations, output)
    assert sys.modules["virtual_clock"].factor == 1.0  # type: ignore[attr-defined]
    assert torch.isfinite(output).all()


def test_one_tile_is_no_choice(clock: Any, own: str) -> None:
    path = Path(own.rpartition(":")[0])
    path.write_text(OWN.replace("TILES =", "OTHERS =").replace("block_n, stages=3", "block_n=64, stages=2"))
    with pytest.raises(ValueError, match=r"^TILES: expected at least two tiles of .*user:mine to choose among; got 0$"):
        user_contest(target_of(kernel_of(own)))


def test_the_fastest_right_tile_is_found(clock: type[VirtualDevice], own: str, tmp_path: Path) -> None:
    target, store = target_of(kernel_of(own)), RecordStore(tmp_path / "records", "h100-tune.jsonl")
    skipped: dict[Any, str] = {}
    for process in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record_module, "_TOKEN", f"process{process}")
            searched = run_user_search(target, clock(), H100, store, process=process, buffers_on="cpu")
            assert searched.is_whole
            skipped |= searched.skipped
    contest = user_contest(target)
    trials = Trials(contest, H100, environment(clock().properties), ROUNDS, store.records())
    verdict = decide(trials, 3)
    assert verdict.adopted is not None
    assert dict(verdict.adopted) == {"block_n": 128, "stages": 4}
    assert verdict.gain == pytest.approx(0.2, rel=1e-6)
    assert verdict.saved_s == pytest.approx(0.2 * CALL_S, rel=1e-6)
    wrong, raises = contest.tiles[3:]
    assert trials.fault(wrong).startswith("check: before timing, call 0: error ")
    assert "RuntimeError: shared memory" in skipped.pop(raises)
    assert not skipped
    assert {tuple(record.point.tile.items()) for record in store.records()} <= set(contest.tiles)
    assert {record.measurement.anchor for record in store.records()} == {
        "gemm/fp8_row-fp8_row@user:mine block_n=64 stages=2"
    }
    # again: all is there
    before = len(list(store.records()))
    run_user_search(target, clock(), H100, store, buffers_on="cpu")
    assert len(list(store.records())) == before
    # an edit is another kernel: nothing of the old one counts
    path = Path(own.rpartition(":")[0])
    path.write_text(OWN + "# edited\n")
    edited = Trials(user_contest(target_of(kernel_of(own))), H100, trials.here, ROUNDS, store.records())
    assert decide(edited, 3).default is None


def test_the_command_measures_and_says_which(
    clock: type[VirtualDevice], own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[str]] = []
    others = subprocess.run

    def in_process(command: list[str], **options: Any) -> Any:
        if "--pass" not in command:
            return others(command, **options)
        passes.append(command[command.index("tune") :])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record_module, "_TOKEN", f"process{len(passes)}")
            result = CliRunner().invoke(cli, passes[-1])
        assert result.exit_code == 0, result.output
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tune_module.subprocess, "run", in_process)
    asked = ["--shape", SHAPE, "--kernel", own, "--out", str(tmp_path / "records")]
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    assert len(passes) == 3
    assert all(own in command for command in passes)
    (row,) = json.loads(result.stdout)["rows"]
    assert row["default"] == {"block_n": 64, "stages": 2}
    assert row["adopted"] == {"block_n": 128, "stages": 4}
    assert row["gain"] == pytest.approx(0.2, rel=1e-6)
    assert set(row["faults"]) == {"block_n=256 stages=4"}
    text = run(*asked).stdout
    assert "+20.0%" in text
    assert "put the fastest first in TILES" in text


def test_without_a_gpu_it_says_what_can_be_done(own: str, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise NoGpu("GPU: none here")

    monkeypatch.setattr(cuda_device, "CudaDevice", none)
    result = run("--shape", SHAPE, "--kernel", own)
    assert result.exit_code == 2
    assert "its 5 tiles cannot be ranked by floors" in result.output
    assert "bench --kernel ... --check" in result.output
    assert "GPU: none here" in result.output
