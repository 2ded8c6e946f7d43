"""Traces read whole against csv and json, in any chunks; every way a trace can be wrong is named by line and field."""

from __future__ import annotations

import csv
import gzip
import json
import math
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from tokenfab.costing.workload.synthetic import Mix, chunks_of, synthetic_requests, write_mooncake
from tokenfab.costing.workload.traces import AZURE, MOONCAKE, Trace, open_trace, read_trace, whole

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the published traces are not beside this checkout")

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def line(timestamp: float = 0, inputs: int = 600, outputs: int = 5, ids: tuple[int, ...] = (0, 1)) -> str:
    row = {"timestamp": timestamp, "input_length": inputs, "output_length": outputs, "hash_ids": list(ids)}
    return json.dumps(row) + "\n"


def stamp(second: float, inputs: object = 4808, outputs: object = 10) -> str:
    return f"2023-11-16 18:17:{second:010.7f},{inputs},{outputs}\n"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "trace"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# -- the published traces --------------------------------------------------------------------------


@needs_traces
@pytest.mark.parametrize(
    ("name", "requests"), [("mooncake_conversation.jsonl", 12_031), ("mooncake_synthetic.jsonl", 3_993)]
)
def test_mooncake_read_whole_against_json(name: str, requests: int) -> None:
    rows = [json.loads(text) for text in (TRACES / name).read_text().splitlines()]
    trace = read_trace(TRACES / name)
    assert len(trace) == len(rows) == requests
    assert trace.input_tokens.tolist() == [row["input_length"] for row in rows]
    assert trace.output_tokens.tolist() == [row["output_length"] for row in rows]
    assert trace.arrival_s == pytest.approx([(row["timestamp"] - rows[0]["timestamp"]) / 1000 for row in rows])
    assert trace.block_ids is not None
    assert trace.block_starts is not None
    assert trace.block_ids.tolist() == [each for row in rows for each in row["hash_ids"]]
    assert np.diff(trace.block_starts).tolist() == [len(row["hash_ids"]) for row in rows]


@needs_traces
@pytest.mark.parametrize(
    ("name", "requests"), [("azure_llm_2023_code.csv", 8_819), ("azure_llm_2023_conv.csv", 19_366)]
)
def test_azure_read_whole_against_csv(name: str, requests: int) -> None:
    with (TRACES / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = open_trace(TRACES / name)
    assert (found.format, found.has_prefixes) == (AZURE, False)
    trace = read_trace(found)
    assert len(trace) == len(rows) == requests
    assert int(trace.input_tokens.sum()) == sum(int(row["ContextTokens"]) for row in rows)
    assert trace.output_tokens.tolist() == [int(row["GeneratedTokens"]) for row in rows]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]  # to the microsecond
    assert trace.arrival_s == pytest.approx([(each - times[0]).total_seconds() for each in times], abs=2e-6)
    assert trace.block_ids is None
    assert not trace.has_prefixes


def test_seven_decimals_of_a_second(written: Callable[[str], Path]) -> None:
    trace = read_trace(written(HEADER + stamp(3.9799601) + stamp(3.9799608)))
    assert trace.arrival_s[1] == pytest.approx(7e-7, rel=1e-6)


def test_a_zone_as_in_the_traces_of_2024(written: Callable[[str], Path]) -> None:
    text = HEADER + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.009930+00:00,2399,6\n"
    assert read_trace(written(text)).arrival_s.tolist() == [0, 1]


# -- as a stream -----------------------------------------------------------------------------------


def same(a: Trace, b: Trace) -> bool:
    names = ("arrival_s", "input_tokens", "output_tokens", "block_ids", "block_starts")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000, 50_000])
@pytest.mark.parametrize("newline_at_end", [True, False])
def test_any_chunks_make_one_trace(written: Callable[[str], Path], chunk_bytes: int, newline_at_end: bool) -> None:
    text = "".join(line(7 + 3 * each, 500 + each, 1 + each, tuple(range(math.ceil((500 + each) / 512))))
                   for each in range(40))  # fmt: skip
    path = written(text if newline_at_end else text[:-1])
    trace = whole(open_trace(path).chunks(chunk_bytes=chunk_bytes))
    assert len(trace) == 40
    assert trace.arrival_s[-1] == pytest.approx(39 * 3 / 1000)
    assert same(trace, read_trace(path))


def test_azure_in_chunks(written: Callable[[str], Path]) -> None:
    rows = [stamp(each / 100, 10 + each, 1 + each) for each in range(1000)]
    path = written(HEADER + "".join(rows))
    chunks = list(open_trace(path).chunks(chunk_bytes=4096))
    assert len(chunks) > 5
    assert [chunk.first_request for chunk in chunks] == np.cumsum([0, *map(len, chunks[:-1])]).tolist()
    trace = whole(chunks)
    assert trace.input_tokens.tolist() == list(range(10, 1010))
    assert trace.arrival_s == pytest.approx([each / 100 for each in range(1000)])


def test_gzip_whatever_the_name(written: Callable[[bytes], Path]) -> None:
    assert len(read_trace(written(gzip.compress((line() * 3).encode())))) == 3
    found = open_trace(written(gzip.compress((HEADER + stamp(1)).encode())))
    assert found.format == AZURE
    assert len(read_trace(found)) == 1
    with pytest.raises(ValueError, match=r"trace: truncated or damaged gzip"):
        read_trace(written(gzip.compress((line() * 3000).encode())[:-20]))


def test_memory_is_that_of_a_chunk(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write_mooncake(path, synthetic_requests(20_000, seed=3))
    size = path.stat().st_size
    seen = []
    tracemalloc.start()
    requests = sum(len(chunk) for chunk in open_trace(path).chunks(lambda *at: seen.append(at), chunk_bytes=100_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert requests == 20_000
    assert size > 4_000_000
    assert peak < 3_000_000
    assert seen[0][0] < size / 10
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_workload(written: Callable[[str], Path]) -> None:
    trace = read_trace(written(line(1000) + line(3000, 700, 9)))
    workload = trace.workload(np.array([0, 512]))
    assert workload.requests_per_s == pytest.approx(0.5)
    assert workload.new_tokens.tolist() == [600, 188]
    assert workload.mean_output_tokens == 7
    with pytest.raises(ValueError, match="new and output tokens"):
        trace.workload(np.array([600, 0]))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line() + line()[:40], "line 2: truncated or malformed JSON"),
        (line() + "\n" + line(), "line 2: a blank line"),
        (line() + line().replace("600", "NaN"), "line 2: input_length: expected a finite number; got nan"),
        (line() + line().replace(": 0,", ": -Infinity,", 1), "line 2: timestamp: expected a finite number; got -inf"),
        (line() + line().replace("600", "1e999"), "line 2: input_length: expected a finite number; got inf"),
        (line() + line().replace(": 0,", ": 1e999,", 1), "line 2: timestamp: .*got inf"),
        (line().replace('"output_length": 5, ', ""), "line 1: Object missing required field `output_length`"),
        (line().replace('"timestamp": 0, ', ""), "line 1: Object missing required field `timestamp`"),
        (line() + line().replace("5,", '5, "session": 1,'), "line 2: Object contains unknown field `session`"),
        (line() + line(outputs=0), "line 2: output_length: expected 1 or more; got 0"),
        (line() + line(inputs=-600), "line 2: input_length: expected 1 or more; got -600"),
        (line() + line(inputs=0, ids=()), "line 2: input_length: expected 1 or more; got 0"),
        (line(-1), "line 1: timestamp: expected a finite time of 0 or more; got -1"),
        (line(9) + line(9) + line(8), "line 3: timestamp: expected times in order; got 8 after 9"),
        (line(200_000) + line(200), r"line 2: timestamp: .*\(seconds after milliseconds\?\)"),
        (line(3) + line(3.5), "line 2: timestamp: mixed units: 3.5 where the trace began with whole numbers"),
        (line(3.5) + line(4), "line 2: timestamp: mixed units: 4 where the trace began with decimals"),
        (line() + line(ids=(0,)), r"line 2: hash_ids: expected ceil\(input_length / 512\) = 2 ids for 600 .*; got 1"),
        (line(inputs=512), r"line 1: hash_ids: .* = 1 ids for 512 tokens; got 2"),
        (line(inputs=513, ids=(0,)), r"line 1: hash_ids: .* = 2 ids for 513 tokens; got 1"),
        (line() + line(ids=(0, -1)), "line 2: hash_ids: expected ids of 0 or more"),
        (line() + line(ids=(0, -9)), r"line 2: .*hash_ids\[1\]"),
        (line().replace("600", "600.0"), r"line 1: Expected `int`, got `float` - at `\$.input_length`"),
        (line().replace("600", "true"), r"line 1: .*input_length"),
        (line().replace("600", "null"), r"line 1: .*input_length"),
        (line() + HEADER + stamp(1), "line 2: truncated or malformed JSON"),
        (line() + line()[:-1] + " " + line(), "line 2: "),
        ("", "an empty trace"),
        ("\n\n", "an empty trace"),
        (HEADER, "an empty trace"),
        ("hello\n", "line 1: expected Mooncake JSON lines"),
        ("TIMESTAMP,ContextTokens\n", "line 1: missing field GeneratedTokens"),
        (HEADER[:-1] + ",Model\n", "line 1: unknown field Model"),
        ("ContextTokens,TIMESTAMP,GeneratedTokens\n", "line 1: its fields in another order"),
        (HEADER + stamp(1) + "\n" + stamp(2), "line 3: TIMESTAMP"),
        (HEADER + stamp(2) + stamp(1), "line 3: TIMESTAMP: expected times in order"),
        (HEADER + stamp(1) + stamp(3) + stamp(2), "line 4: TIMESTAMP: expected times in order; got 1 after 2"),
        (HEADER + stamp(1) + stamp(2, -4), "line 3: ContextTokens: expected 1 or more; got -4"),
        (HEADER + stamp(1) + stamp(2, 4, 0), "line 3: GeneratedTokens: expected 1 or more; got 0"),
        (HEADER + stamp(1) + stamp(2, "nan"), "line 3: ContextTokens: .*'nan'"),
        (HEADER + stamp(1) + stamp(2, ""), "line 3: ContextTokens: .*''"),
        (HEADER + stamp(1) + stamp(2, 4, 1.5), "line 3: GeneratedTokens: .*'1.5'"),
        (HEADER + stamp(1) + "1700159823.97,4,5\n", "line 3: TIMESTAMP: .*'1700159823.97'"),
        (HEADER + stamp(1) + HEADER, "line 3: TIMESTAMP: .*'TIMESTAMP'"),
        (HEADER + stamp(1) + stamp(2)[:-6], "line 3: expected TIMESTAMP,ContextTokens,GeneratedTokens; got 2 fields"),
        (HEADER + stamp(1) + line(), "line 3: expected TIMESTAMP,ContextTokens,GeneratedTokens; got 5 fields"),
    ],
)  # fmt: skip
def test_r28_a_damaged_trace_is_refused_by_line_and_field(
    written: Callable[[str], Path], text: str, words: str
) -> None:
    path = written(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_seconds_then_milliseconds(written: Callable[[str], Path]) -> None:
    seconds = "".join(line(each) for each in range(3400, 3600))
    with pytest.raises(ValueError, match=r"line 201: timestamp: mixed units: 3599, then 3600000, 1000 times as much"):
        read_trace(written(seconds + line(3_600_000)))
    assert len(read_trace(written(seconds + line(3_000_000)))) == 201  # a gap is no unit


def test_a_fault_in_a_later_chunk_has_its_line(written: Callable[[str], Path]) -> None:
    path = written(line() * 99 + line(outputs=0) + line() * 5)
    with pytest.raises(ValueError, match="line 100: output_length"):
        list(open_trace(path).chunks(chunk_bytes=700))
    path = written(line() * 99 + "{}\n" + line() * 5)
    with pytest.raises(ValueError, match="line 100: Object missing"):
        list(open_trace(path).chunks(chunk_bytes=700))
    path = written(line(5) * 99 + line(4))
    for chunk_bytes in (1, 700):  # 1: the line before is in another chunk
        with pytest.raises(ValueError, match="line 100: timestamp"):
            list(open_trace(path).chunks(chunk_bytes=chunk_bytes))


def test_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="trace: cannot read"):
            open_trace(path)
    with pytest.raises(ValueError, match="chunk_bytes: expected at least 1; got 0"):
        list(open_trace(tmp_path / "trace" if (tmp_path / "trace").write_text(line()) else "").chunks(chunk_bytes=0))
    with pytest.raises(ValueError, match="expected at least one request; got none"):
        whole([])


# -- made-up requests ------------------------------------------------------------------------------


def test_synthetic_requests_share_prefixes_and_repeat(tmp_path: Path) -> None:
    made = list(synthetic_requests(3000, seed=5))
    assert made == list(synthetic_requests(3000, seed=5))
    assert made != list(synthetic_requests(3000, seed=6))
    path = tmp_path / "trace"
    assert write_mooncake(path, made) == 3000
    assert open_trace(path).format == MOONCAKE
    assert same(read_trace(path), whole(chunks_of(made, 700)))
    before: dict[int, int] = {}
    shared = 0
    for request in made:
        shared += request.block_ids[0] in before
        for ahead, block in zip((-1, *request.block_ids), request.block_ids, strict=False):
            assert before.setdefault(block, ahead) == ahead  # an id names its prefix
    assert shared > 2000
    assert 10 <= np.mean([len(request.block_ids) for request in synthetic_requests(20_000)]) <= 30


def test_synthetic_sessions_end(tmp_path: Path) -> None:
    mix = Mix(open_sessions=3, max_tokens=5000)
    assert max(request.input_tokens for request in synthetic_requests(2000, mix=mix)) < 40_000
    with pytest.raises(ValueError, match="count: expected 0 or more; got -1"):
        list(synthetic_requests(-1))
