"""Tables of tuned tiles: used on their own GPU, Triton and kernel sources only; whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenfab.bench import tune_table
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.record import Environment
from tokenfab.bench.summaries import kernel_hash
from tokenfab.bench.targets import Target
from tokenfab.bench.tune import Timed, Trials, Verdict
from tokenfab.bench.tune_prune import Pruned
from tokenfab.bench.tune_space import place_of
from tokenfab.bench.tune_table import (
    SCHEMA_VERSION,
    NewerTableError,
    TableError,
    TunedRow,
    place_key,
    read_table,
    row_of,
    stale_reason,
    update_table,
    valid_rows,
)
from tokenfab.kernels.registry import Kernel, find_kernels
from tokenfab.kernels.tiles import Tile, find_tile
from tokenfab.kernels.tuned import use_tuned

H100, H200 = get_gpu("h100"), get_gpu("h200")
HERE = Environment(
    name="NVIDIA H100 80GB HBM3", uuid="GPU-1", l2_bytes=52428800, driver="580.1", cuda="13.0", torch="2.11.0",
    triton="3.6.0", git_sha="a" * 40, git_dirty=False,
)  # fmt: skip
TILE = Tile(64, 256, 128, 8, 4)
DEFAULT = find_tile("fp8", "block", "sm_90", 64)


def pruned(**shape: int) -> Pruned:
    (kernel,) = find_kernels("gemm", ["fp8_block"])
    fields = {"m": 64, "n": 2112, "k": 7168} | shape
    return Pruned(Target(kernel, tuple(fields.items()), ()), place_of(kernel, fields, "sm_90"), (), ())


def verdict(tile: Tile | None = TILE) -> Verdict:
    default = Timed(DEFAULT, 10e-6, 1.0, 0.002, (1.0, 1.001, 0.999))
    best = Timed(TILE, 9e-6, 0.9, 0.003, (0.9, 0.901, 0.899))
    return Verdict(default, best, 0.1, 0.01, tile, "faster by 10.0%, beyond the noise of 1.0%")


def row(what: Pruned | None = None, **changes: Any) -> TunedRow:
    what = what or pruned()
    made = row_of(what, verdict(), Trials(what, H100, HERE, (), ()), Path("records/h100-tune.jsonl"))
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    update_table(tmp_path / "tuned-h100.json", H100, [row()])
    return tmp_path / "tuned-h100.json"


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads(path.read_bytes())
    change(table)
    path.write_text(json.dumps(table))


# -- provenance and use ----------------------------------------------------------------------------


def test_a_row_holds_its_provenance(path: Path) -> None:
    (read,) = json.loads(path.read_bytes())["tiles"]
    assert read["kernel"] == "fp8"
    assert read["format"] == "block"
    assert read["arch"] == "sm_90"
    assert read["formats"] == {"weight": "fp8_block", "activation": "fp8_group"}
    assert read["shape"] == {"m": 64, "n": 2112, "k": 7168}
    assert read["tile"] == asdict(TILE)
    assert read["default_tile"] == asdict(DEFAULT)
    assert (read["time_s"], read["default_time_s"], read["gain"], read["noise"]) == (9e-6, 10e-6, 0.1, 0.01)
    assert read["processes"] == 3
    assert read["environment"]["driver"] == "580.1"
    assert read["records"] == "h100-tune.jsonl"
    assert read["recorded_unix_s"] > 1.7e9
    assert read["kernel_hash"] == kernel_hash(find_kernels("gemm", ["fp8_block"])[0], HERE)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_valid_row_is_used_by_find_tile(path: Path) -> None:
    rows = valid_rows(path, H100, HERE)
    assert [each.tile for each in rows] == [TILE]
    with use_tuned(rows):
        assert find_tile("fp8", "block", "sm_90", 64, n=2112, k=7168) == TILE
        assert find_tile("fp8", "block", "sm_90", 64, n=2112, k=7296) == DEFAULT
    assert find_tile("fp8", "block", "sm_90", 64, n=2112, k=7168) == DEFAULT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "NVIDIA H200"}, "measured on NVIDIA H100 80GB HBM3, not NVIDIA H200"),
        ({"triton": "3.9.0"}, "measured with Triton 3.6.0, not 3.9.0"),
    ],
)
def test_r18_another_gpu_or_triton_does_not_use_it(path: Path, change: dict[str, str], reason: str) -> None:
    other = msgspec.structs.replace(HERE, **change)
    assert stale_reason(row(), other) == reason
    assert valid_rows(path, H100, other) == []
    same = msgspec.structs.replace(HERE, uuid="GPU-2", driver="590")
    assert stale_reason(row(), same) == ""
    assert len(valid_rows(path, H100, same)) == 1


def test_r18_a_changed_kernel_does_not_use_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Kernel.source_texts
    monkeypatch.setattr(Kernel, "source_texts", lambda self: texts(self) | {"fp8_matmul.py": b"changed"})
    assert stale_reason(row(kernel_hash="0" * 64), HERE) == "the kernel's sources have changed"
    assert valid_rows(path, H100, HERE) == []
    monkeypatch.setattr(Kernel, "source_texts", texts)
    assert len(valid_rows(path, H100, HERE)) == 1
    assert stale_reason(row(formats={"weight": "int4"}), HERE) == "no kernel for gemm in int4"


def test_a_changed_default_does_not_use_it(path: Path) -> None:
    edited(path, lambda table: table["tiles"][0]["default_tile"].update(num_stages=4))
    assert valid_rows(path, H100, HERE) == []


def test_shapes_that_a_launch_cannot_tell_apart(tmp_path: Path) -> None:
    (kernel,) = find_kernels("moe", ["mxfp4-bf16"])
    shape = {"num_tokens": 64, "hidden": 2880, "inter": 2880, "top_k": 4, "num_experts": 128, "ep": 1, "load": 0}
    path = tmp_path / "table.json"
    place = place_of(kernel, shape, "sm_90")
    tiles = [Tile(16, 128, 128, 4, 3), Tile(16, 128, 128, 4, 4)]

    def of(load: int, tile: Tile) -> TunedRow:
        fields = shape | {"load": load}
        what = Pruned(Target(kernel, tuple(fields.items()), ()), place, (), ())
        return row(what, tile=asdict(tile))

    update_table(path, H100, [of(0, tiles[0]), of(101, tiles[0])])
    assert [each.tile for each in valid_rows(path, H100, HERE)] == [tiles[0]]
    update_table(path, H100, [of(101, tiles[1])])
    assert valid_rows(path, H100, HERE) == []


@pytest.mark.parametrize(
    "change",
    [
        {"tile": asdict(TILE) | {"block_k": 64}},
        {"tile": asdict(TILE) | {"block_n": 192}},
        {"tile": {"block_m": 64}},
        {"shape": {"m": 64, "n": 2112}},
        {"kernel": "w4a8"},
    ],
)
def test_r18_a_tile_or_shape_that_the_kernel_does_not_have(path: Path, change: dict[str, Any]) -> None:
    edited(path, lambda table: table["tiles"][0].update(change))
    with pytest.raises(TableError, match="tuned-h100.json: .*"):
        valid_rows(path, H100, HERE)


def test_no_file_is_an_empty_table(tmp_path: Path) -> None:
    assert valid_rows(tmp_path / "none.json", H100, HERE) == []
    assert update_table(tmp_path / "none.json", H100, []).tiles == ()
    assert list(tmp_path.iterdir()) == []


# -- what cannot be a row --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": 0.01}, "gain: expected more than the noise of 0.01 and less than 1; got 0.01"),
        ({"gain": 1.0}, "gain: expected more than"),
        ({"noise": 0.2}, "gain: expected more than the noise of 0.2"),
        ({"processes": 2}, "processes"),
        ({"time_s": -1.0}, "time_s"),
        ({"default_time_s": 0.0}, "default_time_s"),
        ({"kernel_hash": "short"}, "kernel_hash"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_rows_that_contradict_themselves(path: Path, change: dict[str, Any], message: str) -> None:
    edited(path, lambda table: table["tiles"][0].update(change))
    with pytest.raises(TableError, match=f"tuned-h100.json: .*{message}"):
        read_table(path, H100)


def test_a_verdict_that_keeps_the_default_makes_no_row() -> None:
    what = pruned()
    kept = dataclasses.replace(verdict(None), reason="the default is the fastest")
    with pytest.raises(ValueError, match="verdict: expected one that adopts a tile; got the default is the fastest"):
        row_of(what, kept, Trials(what, H100, HERE, (), ()), Path("x"))


@pytest.mark.parametrize("cut", [0, 1, 20, 0.5, -3])
def test_r23_a_truncated_table_names_its_file(path: Path, cut: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: round(cut * len(data)) if 0 < cut < 1 else int(cut)])
    with pytest.raises(TableError, match="tuned-h100.json: "):
        read_table(path, H100)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '{"schema_version": "1"}',
        "\xff",
        "[" * 100_000,
        '{"schema_version": 0, "gpu": "h100", "tiles": []}',
    ],
)
def test_what_is_no_table_names_its_file(path: Path, text: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TableError, match="tuned-h100.json: "):
        read_table(path, H100)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_r23_numbers_that_are_none(path: Path, number: str) -> None:
    path.write_bytes(path.read_bytes().replace(b"9e-06", number.encode()).replace(b"9e-6", number.encode()))
    assert number in path.read_text()
    with pytest.raises(TableError, match="tuned-h100.json: "):
        read_table(path, H100)


def test_r23_a_newer_schema_and_another_gpu(path: Path) -> None:
    with pytest.raises(TableError, match="tuned-h100.json: gpu: expected h200; got h100"):
        read_table(path, H200)

    def newer(table: dict[str, Any]) -> None:
        table.update(schema_version=SCHEMA_VERSION + 1, tiles={"another": "form"})

    edited(path, newer)
    with pytest.raises(NewerTableError, match="tuned-h100.json: expected schema_version 1; got 2, of a later tokenfab"):
        read_table(path, H100)
    before = path.read_bytes()
    with pytest.raises(NewerTableError):
        update_table(path, H100, [row()])
    assert path.read_bytes() == before


def test_a_place_twice(path: Path) -> None:
    edited(path, lambda table: table["tiles"].append(table["tiles"][0]))
    with pytest.raises(TableError, match="tuned-h100.json: tiles: expected one row per place"):
        read_table(path, H100)


def test_r26_links_and_giants_are_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(path)
    with pytest.raises(TableError, match="link.json: expected a file that can be read"):
        read_table(link, H100)
    monkeypatch.setattr(tune_table, "MAX_BYTES", 100)
    with pytest.raises(TableError, match="tuned-h100.json: expected at most 100 bytes"):
        read_table(path, H100)


# -- writing ---------------------------------------------------------------------------------------


def test_rows_are_replaced_added_and_withdrawn(path: Path) -> None:
    other = pruned(m=16)
    update_table(path, H100, [row(gain=0.2), row(other)])
    assert [(each.shape["m"], each.gain) for each in read_table(path, H100).tiles] == [(64, 0.2), (16, 0.1)]
    update_table(path, H100, [], [place_key(pruned())])
    assert [each.shape["m"] for each in read_table(path, H100).tiles] == [16]
    assert place_key(other) == row(other).place != place_key(pruned())


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_r21_a_writer_that_fails_leaves_the_old_table(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = path.read_bytes()

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError("disk full")

    if step == "write":
        monkeypatch.setattr(tune_table.msgspec.json, "format", lambda *a, **o: "not bytes ")
    else:
        monkeypatch.setattr(tune_table.os, step, fail)
    with pytest.raises((OSError, TypeError)):
        update_table(path, H100, [row(gain=0.3)])
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    update_table(path, H100, [row(gain=0.3)])
    assert read_table(path, H100).tiles[0].gain == 0.3


def test_an_unchanged_table_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = read_table(path, H100).tiles
    monkeypatch.setattr(tune_table, "_replace", lambda *arguments: pytest.fail("written"))
    assert update_table(path, H100, same).tiles == same


def test_tuned_here_takes_a_given_table_or_the_packages(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> Tile:
        return find_tile("fp8", "block", "sm_90", 64, n=2112, k=7168)

    with tune_table.tuned_here(H100, HERE, path):
        assert found() == TILE
    monkeypatch.setattr(tune_table, "SHIPPED", tmp_path / "tuned")
    with tune_table.tuned_here(H100, HERE):
        assert found() == DEFAULT
    (tmp_path / "tuned").mkdir()
    path.rename(tmp_path / "tuned" / "h100.json")
    with tune_table.tuned_here(H100, HERE):
        assert found() == TILE
    with tune_table.tuned_here(H200, HERE):
        assert found() == DEFAULT


def test_the_packages_tables_are_tables_of_their_gpus() -> None:
    for file in tune_table.SHIPPED.glob("*"):
        assert read_table(file, get_gpu(file.stem)).tiles
