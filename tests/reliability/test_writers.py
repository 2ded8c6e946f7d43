"""Rows 21 and 22 for the files that tokenfab keeps beside its records: a kill at each step, a full disk, many writers.

Records themselves: ``tests/bench/test_records.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.inspect_gate import Baseline, read_baseline, write_baseline
from tokenfab.bench.lab_checks import CheckFile, KernelCheck
from tokenfab.bench.record import Environment
from tokenfab.bench.tune_table import TunedRow, read_table, update_table
from tokenfab.tests.reliability.dying import in_child, killed_at, with_full_disk

H100 = get_gpu("h100")
HERE = Environment(
    name="NVIDIA H100 80GB HBM3", uuid="GPU-1", l2_bytes=52428800, driver="580.1", cuda="13.0", torch="2.11.0",
    triton="3.6.0", git_sha="a" * 40, git_dirty=False,
)  # fmt: skip
MAX_STEPS = 4000


def tuned_row(m: int) -> TunedRow:
    tile = {"block_m": 64, "block_n": 256, "block_k": 128, "num_warps": 8, "num_stages": 4}
    return TunedRow(
        op="gemm", formats={"weight": "fp8_block", "activation": "fp8_group"}, kernel="fp8", format="block",
        arch="sm_90", shape={"m": m, "n": 2112, "k": 7168}, tile=tile, default_tile=tile | {"num_stages": 3},
        time_s=9e-6, default_time_s=1e-5, gain=0.1, noise=0.01, processes=3, environment=HERE,
        recorded_unix_s=1.8e9, kernel_hash="a" * 64, records="h100-tune.jsonl",
    )  # fmt: skip


@dataclass(frozen=True)
class Writer:
    """One kind of file: what is in it by number, and how a number gets into it beside those that are there."""

    add: Callable[[Path, int], None]
    read: Callable[[Path], list[int]]
    name: str
    is_kept_beside_others: bool = True


def _baseline(path: Path, number: int) -> None:
    write_baseline(path, Baseline(schema_version=1, toolchain={"triton": str(number)}, points={}))


def _check(path: Path, number: int) -> None:
    CheckFile(path).append(KernelCheck(how="lab", kernel="gemm/fp8-fp8", shape={"m": number}, version="1"))


WRITERS = {
    "tuned table": Writer(
        lambda path, number: void(update_table(path, H100, [tuned_row(number)])),
        lambda path: sorted(row.shape["m"] for row in read_table(path, H100).tiles), "h100.json",
    ),
    "inspection baseline": Writer(
        _baseline, lambda path: [int(read_baseline(path).toolchain["triton"])], "inspection-triton-3.9.0.json", False,
    ),
    "checks": Writer(_check, lambda path: [check.shape["m"] for check in CheckFile(path).read()], "checks.jsonl"),
}  # fmt: skip


def void(value: object) -> None:
    """An action's result, which nobody asks for."""


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


def test_r21_kill_at_each_write_step(writer: Writer, tmp_path: Path) -> None:
    """After the kill: the old set or the new one, whole, and the next writer adds to it."""
    path, outcomes, steps = tmp_path / writer.name, set(), 0
    writer.add(path, 1)
    old = path.read_bytes()
    after = [1, 2] if writer.is_kept_beside_others else [2]
    while killed_at(steps, lambda: writer.add(path, 2)):
        found = writer.read(path)
        assert found in ([1], after), (steps, found)
        outcomes.add(tuple(found))
        path.write_bytes(old)
        steps += 1
        assert steps < MAX_STEPS
    assert writer.read(path) == after
    assert outcomes == {(1,), tuple(after)}  # kills fell on both sides of the change
    writer.add(path, 3)
    assert 3 in writer.read(path)


def test_r21_kill_while_a_torn_end_is_repaired(tmp_path: Path) -> None:
    """A first writer was killed in a line; a second is killed at each step of cutting that line off."""
    writer = WRITERS["checks"]
    path, steps = tmp_path / writer.name, 0
    for number in (1, 2):
        writer.add(path, number)
    torn = path.read_bytes() + path.read_bytes()[:50]
    path.write_bytes(torn)
    while killed_at(steps, lambda: writer.add(path, 3)):
        assert writer.read(path) in ([1, 2], [1, 2, 3]), steps
        path.write_bytes(torn)
        steps += 1
        assert steps < MAX_STEPS


def test_r21_disk_full(writer: Writer, tmp_path: Path) -> None:
    """At the first byte, and in the middle: an error, and the file is as it was."""
    path = tmp_path / writer.name
    writer.add(path, 1)
    old = path.read_bytes()
    for room in (0, len(old) // 2):
        if writer is WRITERS["checks"]:
            room += len(old)  # appended to
        assert with_full_disk(room, lambda: writer.add(path, 2)) == 3
        kept = path.read_bytes()
        assert kept == old or writer is WRITERS["checks"]  # whose torn end is no line
        assert writer.read(path) == [1]
    writer.add(path, 2)
    assert 2 in writer.read(path)


def test_r22_concurrent_writers_of_a_tuned_table(tmp_path: Path) -> None:
    """8 processes, 6 rows each; a reader among them always sees a whole table."""
    path, rows = tmp_path / "h100.json", 6
    children = []
    for writer in range(8):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for number in range(rows):
                    update_table(path, H100, [tuned_row(100 * writer + number + 1)])
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    seen = 0
    while children:
        count = len(read_table(path, H100).tiles)
        assert count >= seen
        seen = count
        left = []
        for child in children:
            done, status = os.waitpid(child, os.WNOHANG)
            assert status == 0
            if done == 0:
                left.append(child)
        children = left
    expected = sorted(100 * writer + number + 1 for writer in range(8) for number in range(rows))
    assert WRITERS["tuned table"].read(path) == expected
    assert [each.name for each in tmp_path.iterdir()] == ["h100.json"]


def test_the_dying_process_dies_where_it_should(tmp_path: Path) -> None:
    """The harness itself: between two writes of a careless writer the file is cut."""
    path = tmp_path / "careless.json"

    def careless() -> None:
        with path.open("w") as file:
            file.write('{"a": ')
            file.flush()
            file.write("1}")

    found, steps = set(), 0
    while killed_at(steps, careless):
        found.add(path.read_text() if path.exists() else None)
        steps += 1
    assert {None, "", '{"a": '} <= found
    assert json.loads(path.read_text()) == {"a": 1}
    assert in_child(lambda: void(path.read_text())) == 0
    assert with_full_disk(3, careless) == 3
    assert len(path.read_text()) <= 3
