"""One record: what it keeps, what it refuses to say, and the key it is found by."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenfab.bench.device import DeviceProperties
from tokenfab.bench.noise import Interval
from tokenfab.bench.record import (
    SCHEMA_VERSION,
    NewerSchemaError,
    Record,
    RecordError,
    decode,
    encode,
    environment,
    process_id,
    source_hash,
)
from tokenfab.bench.records import RecordStore, TornRecordWarning
from tokenfab.tests.bench.fake_device import NAN
from tokenfab.tests.bench.made_records import ENVIRONMENT, LINE, MEASUREMENT, POINT, RECORD, WRONG, numbered


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "recorded", "h100.jsonl")


@pytest.fixture(autouse=True)
def torn_is_expected_only_where_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TornRecordWarning)
        yield


def test_a_line_is_the_record() -> None:
    assert decode(LINE, "line") == RECORD
    assert LINE.endswith(b"\n")
    assert LINE.count(b"\n") == 1
    assert RECORD.time_s == MEASUREMENT.time_s
    assert RECORD.interval_s == MEASUREMENT.interval_s
    assert RECORD.roofline_fraction == pytest.approx(0.96, abs=0.01)


def test_a_record_keeps_what_it_must() -> None:
    fields = json.loads(LINE)
    measured = fields["measurement"]
    assert set(fields["environment"]) >= {"uuid", "driver", "cuda", "torch", "triton", "git_sha", "git_dirty"}
    assert {"weight_bytes", "activation_bytes", "flops", "seed", "settings", "check", "energy", "blocks"} <= set(
        measured
    )
    assert {"time_s", "sm_clock_hz", "throttle_bits", "temperature_c", "power_w", "wall_s"} <= set(
        measured["blocks"][0]
    )
    assert len(measured["blocks"]) >= 20
    assert {"time_s", "roofline_fraction", "anchor_ratio", "schema_version", "process"} <= set(fields)


def test_no_record_has_a_cost() -> None:
    names = re.findall(r'"(\w+)"', json.dumps(msgspec.json.schema(Record)))
    assert not [name for name in names if re.search("usd|cost|price|dollar", name, re.IGNORECASE)]
    with pytest.raises(RecordError, match=r"unknown field `cost_usd`"):
        decode(altered(cost_usd=1.0), "line")


def test_r20_an_invalid_measurement_is_kept_without_a_time() -> None:
    record = Record.of(POINT, WRONG, ENVIRONMENT)
    again = decode(encode(record), "line")
    assert again == record
    assert again.invalid[0].startswith("check: ")
    assert (again.time_s, again.interval_s, again.roofline_fraction, again.anchor_ratio) == (None,) * 4
    fields = json.loads(encode(record))
    assert fields["time_s"] is None
    assert fields["measurement"]["check"]["before_error"] is None


def altered(path: tuple[str | int, ...] = (), value: Any = None, **changes: Any) -> bytes:
    fields = json.loads(LINE)
    fields.update(changes)
    place: Any = fields
    for step in path[:-1]:
        place = place[step]
    if path:
        place[path[-1]] = value
    return json.dumps(fields).encode()


FORGED = [
    (("time_s",), 1e-9, "time_s: expected"),
    (("time_s",), None, "time_s: expected"),
    (("interval_s", "low"), 1e-6, "interval_s: expected"),
    (("interval_s", "high"), 1e-6, "interval_s: expected"),
    (("roofline_fraction",), 0.1, "roofline_fraction: expected"),
    (("anchor_ratio",), 1.0, "anchor_ratio: expected"),
    (("flags",), ["throttled"], "flags: expected"),
    (("invalid",), ["floor: a reason"], "invalid: expected"),
    (("measurement", "check", "after_error"), 1.0, "time_s: expected None, as measured"),
    (("measurement", "check", "after_error"), None, "time_s: expected None, as measured"),
    (("measurement", "check", "problems"), ["inputs changed"], "time_s: expected None, as measured"),
    (("measurement", "check", "before_error"), None, "before_error: expected"),
    (("measurement", "check"), None, "check: expected a Check"),
    (("measurement", "compute_floor_s"), 1.0, "time_s: expected None, as measured"),
    (("measurement", "num_calls"), 1, "num_calls: expected a multiple of num_sets = 7; got 1"),
    (("measurement", "num_sets"), 1, "num_sets: expected 7 under cold_weights; got 1"),
    (("measurement", "l2_policy"), "cold_all", "l2_policy: expected the point's, cold_weights; got cold_all"),
    (("point", "l2_policy"), "cold", "Invalid enum value 'cold'"),
    (("measurement", "blocks", 3, "time_s"), -1e-6, "Expected `float` > 0"),
    (("measurement", "blocks"), [], "time_s: expected None, as measured"),
    (("measurement", "settings", "min_blocks"), 1, "min_blocks: expected >= 20; got 1"),
    (("measurement", "usd"), 1, "unknown field `usd`"),
    (("point", "shape", "m"), 1.5, "Expected `int`, got `float`"),
    (("point", "kernel_hash"), "abc", "matching regex"),
    (("point", "op"), "", "length >= 1"),
    (("environment", "uuid"), None, "Expected `str`, got `null`"),
    (("environment", "git_sha"), "main", "matching regex"),
    (("time_s",), "1e-5", "Expected `float | null`, got `str`"),
    (("schema_version",), 0, "schema_version: expected 1; got 0"),
    (("schema_version",), True, "Expected `int`, got `bool`"),
    (("process",), None, "Expected `str`, got `null`"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), FORGED)
def test_what_the_facts_do_not_bear_out_is_refused(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(RecordError) as error:
        decode(altered(path, value), "h100.jsonl:3")
    assert str(error.value).startswith("h100.jsonl:3: ")
    assert message in str(error.value)


def test_reasons_may_be_reworded_but_not_exchanged() -> None:
    fields = json.loads(encode(Record.of(POINT, WRONG, ENVIRONMENT)))
    assert [reason.split(":")[0] for reason in fields["invalid"]] == ["check", "blocks"]
    fields["invalid"] = ["check: in other words", "blocks: likewise"]
    assert decode(json.dumps(fields).encode(), "line").invalid == ("check: in other words", "blocks: likewise")
    fields["invalid"] = ["floor: another", "blocks: likewise"]
    with pytest.raises(RecordError, match="invalid: expected"):
        decode(json.dumps(fields).encode(), "line")


TEXT = LINE.decode().rstrip("\n")
NOT_RECORDS: list[tuple[str, bytes, str]] = [
    ("truncated", LINE[:-50], "expected one JSON object; Invalid control character"),
    ("empty", b"\n", "expected one JSON object; Expecting value"),
    ("nan", altered(("measurement", "blocks", 0, "time_s"), NAN), "NaN is no JSON number"),
    ("infinity", altered(time_s=float("-inf")), "-Infinity is no JSON number"),
    ("beyond a float", TEXT.replace('"recorded_unix_s":1750000000.0', '"recorded_unix_s":1e999').encode(), "1e999"),
    ("huge integer", TEXT.replace('"seed":0', '"seed":' + "9" * 5000).encode(), "expected one JSON object; Exceeds"),
    ("large integer", TEXT.replace('"m":16', '"m":' + "9" * 40).encode(), "Expected `int` <= 9007199254740992"),
    ("key twice", TEXT.replace('"op":"gemm"', '"op":"gemm","op":"gemm"').encode(), "key 'op' is there twice"),
    ("list", b"[" + LINE[:-1] + b"]", "expected one JSON object; got list"),
    ("number", b"1", "expected one JSON object; got int"),
    ("two records", LINE[:-1] + LINE, "expected one JSON object; Extra data"),
    ("deep", b"[" * 200_000, "nested too deeply"),
    ("deep value", b'{"a":' * 100_000, "nested too deeply"),
    ("no text", LINE.replace(b"gemm", b"\xff\xfe"), "can't decode byte 0xff"),
    ("half a character", LINE.replace(b"gemm", b"\\ud800"), "surrogate"),
    ("pickle", pickle.dumps(ENVIRONMENT), "expected one JSON object"),
    ("no fields", b"{}", "missing required field"),
    ("zero byte", LINE[:-1] + b"\0", "expected one JSON object; Extra data"),
]


@pytest.mark.parametrize(("line", "message"), [row[1:] for row in NOT_RECORDS], ids=[row[0] for row in NOT_RECORDS])
def test_r23_what_is_no_record_is_refused_by_file_and_line(store: RecordStore, line: bytes, message: str) -> None:
    store.append(numbered(1))
    with store.path.open("ab") as file:
        file.write(line.rstrip(b"\n") + b"\n" + LINE)
    seen = []
    with pytest.raises(RecordError) as error:
        seen += store.records()
    assert str(error.value).startswith(f"{store.path}:2: ")
    assert message in str(error.value)
    # what was read before it was given; nothing is known of what is done
    given_before = store.records()
    assert next(given_before) == numbered(1)
    with pytest.raises(RecordError):
        store.done(POINT)


def test_r23_newer_schema_is_told_apart(store: RecordStore) -> None:
    store.append(numbered(1))
    with store.path.open("ab") as file:
        file.write(altered(schema_version=SCHEMA_VERSION + 1, new_field={"a": 1}) + b"\n")
    with pytest.raises(NewerSchemaError) as error:
        list(store.records())
    assert str(error.value).startswith(f"{store.path}:2: expected schema_version 1 or older; got 2")
    assert isinstance(error.value, RecordError)


def is_record_or_typed_error(line: bytes) -> bool:
    """Anything else is raised."""
    try:
        return isinstance(decode(line, "file:1"), Record)
    except RecordError as error:
        return str(error).startswith("file:1: ")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(LINE) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(LINE)),
)
def test_r23_damaged_lines_are_records_or_typed_errors(changes: list[tuple[int, int]], length: int) -> None:
    damaged = bytearray(LINE)
    for place, value in changes:
        damaged[place] = value
    for line in (bytes(damaged), bytes(damaged[:length])):
        assert is_record_or_typed_error(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([row[0] for row in FORGED if row[0]]), JSON)
def test_r23_any_json_anywhere_is_a_record_or_a_typed_error(path: tuple[str | int, ...], value: Any) -> None:
    assert is_record_or_typed_error(altered(path, value))


def test_what_could_not_be_read_back_is_not_written(store: RecordStore) -> None:
    bad = msgspec.structs.replace(RECORD, point=msgspec.structs.replace(POINT, shape={"m": 2**70}))
    with pytest.raises((RecordError, OverflowError)):
        store.append(bad)
    worse = msgspec.structs.replace(RECORD, point=msgspec.structs.replace(POINT, op=""))
    with pytest.raises(RecordError, match=r"^record: "):
        store.append(worse)
    assert not store.path.exists()


def test_record_of_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^l2_policy: expected the point's, hot; got cold_weights"):
        Record.of(msgspec.structs.replace(POINT, l2_policy="hot"), MEASUREMENT, ENVIRONMENT)
    with pytest.raises(ValueError, match=r"^recorded_unix_s: expected a finite number"):
        Record.of(POINT, MEASUREMENT, ENVIRONMENT, recorded_unix_s=NAN)
    assert Record.of(POINT, MEASUREMENT, ENVIRONMENT).recorded_unix_s > 1.7e9


def test_interval_is_compared_whole() -> None:
    interval = RECORD.interval_s
    assert interval is not None
    assert interval == Interval(interval.low, interval.high)
    with pytest.raises(ValueError, match="^interval_s: expected"):
        msgspec.structs.replace(RECORD, interval_s=None)


# -- keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"op": "moe"}, {"shape": {"m": 17, "n": 7168, "k": 2048}}, {"shape": {"m": 16, "n": 7168}},
        {"formats": {"weight": "mxfp4", "activation": "fp8"}}, {"recipe": "floor"}, {"l2_policy": "hot"},
        {"kernel_hash": "0" * 64}, {"gpu": "h200"}, {"tile": {}},
        {"tile": {"BLOCK_M": 32, "SPLIT_K": 4, "SWAP": True, "LAYOUT": "packed"}},
        {"tile": {"BLOCK_M": 16, "SPLIT_K": 4, "SWAP": 1, "LAYOUT": "packed"}},
    ],
)  # fmt: skip
def test_key_tells_points_apart(change: dict[str, Any]) -> None:
    assert msgspec.structs.replace(POINT, **change).key != POINT.key


def test_key_is_the_same_whatever_the_order() -> None:
    turned = msgspec.structs.replace(
        POINT, shape=dict(reversed(POINT.shape.items())), tile=dict(reversed(POINT.tile.items()))
    )
    assert turned.key == POINT.key
    assert decode(LINE, "line").point.key == POINT.key


def test_source_hash() -> None:
    assert source_hash({"a": "x", "b": b"y"}) == source_hash({"b": "y", "a": "x"})
    hashes = {
        source_hash(sources)
        for sources in ({"a": "x"}, {"a": "y"}, {"b": "x"}, {"a": "x", "b": ""}, {"ax": ""}, {"": "ax"}, {})
    }
    assert len(hashes) == 7


def test_process_is_named_anew_by_each_run() -> None:
    names = [process_id(), process_id()]
    assert names[0] == names[1] == RECORD.process
    # not by its number alone: containers give the same numbers again
    assert re.fullmatch(r"[0-9a-f]{12}-\d+", names[0])
    code = "from tokenfab.bench.record import process_id; print(process_id())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other
    assert other.split("-")[0] != names[0].split("-")[0]


def test_environment_says_which_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    gpu = DeviceProperties(name="n", uuid="u", l2_bytes=1, driver="d", cuda="c", torch="t", triton="t")
    assert environment(gpu, tmp_path).git_sha is None
    checkout = tmp_path / "checkout"
    (checkout / "inner").mkdir(parents=True)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"]
    for arguments in (["init", "-q"], commit):
        subprocess.run(["git", "-C", str(checkout), *arguments], check=True)
    clean = environment(gpu, checkout)
    assert re.fullmatch("[0-9a-f]{40}", clean.git_sha or "")
    assert (clean.git_dirty, clean.uuid) == (False, "u")
    (checkout / "new").write_text("x")
    assert environment(gpu, checkout).git_dirty
    # installed inside somebody else's checkout
    assert environment(gpu, checkout / "inner").git_sha is None
    monkeypatch.setenv("PATH", "")
    assert environment(gpu, checkout).git_sha is None
    assert environment(gpu).uuid == "u"
