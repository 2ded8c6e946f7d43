"""The lab over GPUs of a cluster, with seats that are objects of this process."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenfab.bench import fleet_lab, targets
from tokenfab.bench.fleet import SeatDied
from tokenfab.bench.fleet_lab import run_lab
from tokenfab.bench.fleet_seat import Point, Stepped, StepWork, pack
from tokenfab.bench.lab import Deadline
from tokenfab.bench.lab_checks import MODEST_SHAPES, CheckFile
from tokenfab.bench.peers import ANCHORS
from tokenfab.bench.record import encode
from tokenfab.bench.records import RecordStore
from tokenfab.bench.targets import Target
from tokenfab.kernels.registry import KERNELS
from tokenfab.tests.bench.fleet_seats import Gpus, GpuSeat, fleet_of, invoker
from tokenfab.tests.bench.made_records import RECORD, numbered


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


def test_the_lab_ends_with_its_summary_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, invoke = LabRun(tmp_path), invoker(monkeypatch, tmp_path)
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
