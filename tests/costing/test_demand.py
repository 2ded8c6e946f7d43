"""From a trace on disk to a load: which requests, how fast, what is cached; by hand on traces of a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenfab.bench.models import load_model
from tokenfab.costing.workload.demand import Cache, Demand, read_demand

# (milliseconds, input, output, blocks): the second shares two blocks with the first, the fourth all of the second
ROWS = [
    (0, 1500, 100, [0, 1, 2]),
    (3000, 1300, 50, [0, 1, 3]),
    (3000, 600, 10, [4, 5]),
    (9000, 1300, 20, [0, 1, 3]),
    (12000, 40_000, 7, list(range(100, 179))),
]


def mooncake(tmp_path: Path, rows: list[Any] = ROWS) -> Path:
    path = tmp_path / "trace.jsonl"
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def azure(tmp_path: Path, rows: str = "") -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + (rows or "2023-11-16 18:17:03.00,4808,10\n2023-11-16 18:17:03.50,3180,8\n2023-11-16 18:17:05.00,110,27\n")
    )
    return path


def read(path: Path, *args: Any, **kwargs: Any) -> Demand:
    return read_demand(path, load_model("deepseek-v3"), *args, **kwargs)


def test_an_endless_cache_is_the_default_and_said_so(tmp_path: Path) -> None:
    found = read(mooncake(tmp_path))
    load = found.workload
    assert load.arrival_s.tolist() == [0, 3, 3, 9, 12]
    assert load.input_tokens.tolist() == [1500, 1300, 600, 1300, 40_000]
    assert load.output_tokens.tolist() == [100, 50, 10, 20, 7]
    # two whole blocks; all three but the last token
    assert load.cached_tokens.tolist() == [0, 1024, 0, 1299, 0]
    assert found.cached_share == pytest.approx((1024 + 1299) / 44_700)
    assert "endless" in found.cached
    assert "upper bound" in found.cached
    assert any("20% of the requests have the time of the one before" in note for note in found.notes)


def test_a_fleet_s_cache_is_simulated(tmp_path: Path) -> None:
    found = read(mooncake(tmp_path), Cache(replicas=2, tokens_per_replica=10 * 512, policy="round_robin"))
    # requests 0, 2, 4 go to one replica, 1 and 3 to the other: the second finds nothing, the fourth all
    assert found.workload.cached_tokens.tolist() == [0, 0, 0, 1299, 0]
    assert found.cached == "round_robin routing over 2 replicas with caches of 5,120 tokens each"
    small = read(mooncake(tmp_path), Cache(replicas=1, tokens_per_replica=2 * 512, policy="random"))
    assert small.cached_share < read(mooncake(tmp_path)).cached_share


def test_a_stated_share_leaves_a_token_to_compute(tmp_path: Path) -> None:
    found = read(mooncake(tmp_path, [(0, 1, 1, [0]), (5, 1000, 1, [1, 2])]), Cache(share=0.9999))
    assert found.workload.cached_tokens.tolist() == [0, 999]
    half = read(azure(tmp_path), Cache(share=0.5))
    assert half.workload.cached_tokens.tolist() == [2404, 1590, 55]
    assert half.cached == "a stated 50.0% of every prompt"


def test_no_cache(tmp_path: Path) -> None:
    found = read(mooncake(tmp_path), Cache(is_off=True))
    assert not found.workload.cached_tokens.any()
    assert found.cached == "no prefix cache"


def test_an_azure_trace_says_nothing_of_prefixes(tmp_path: Path) -> None:
    found = read(azure(tmp_path))
    assert found.workload.arrival_s == pytest.approx([0, 0.5, 2])
    assert found.workload.input_tokens.tolist() == [4808, 3180, 110]
    assert not found.workload.cached_tokens.any()
    assert "unknown, which is not 0" in found.cached
    with pytest.raises(ValueError, match=r"^hash_ids: an Azure trace has no prefix information"):
        read(azure(tmp_path), Cache(replicas=2, tokens_per_replica=4096))


@pytest.mark.parametrize("requests", [2, 4, 5, 6])
def test_the_first_requests_alone(tmp_path: Path, requests: int) -> None:
    found = read(mooncake(tmp_path), requests=requests)
    assert found.workload.input_tokens.tolist() == [row[1] for row in ROWS[:requests]]
    assert found.workload.cached_tokens.tolist() == [0, 1024, 0, 1299, 0][:requests]
    assert any("it has more" in note for note in found.notes) == (requests < 5)


def test_the_first_requests_of_a_long_trace_are_all_that_is_read(tmp_path: Path) -> None:
    path = mooncake(tmp_path, [(i, 500, 5, [i]) for i in range(60_000)])
    path.write_text(path.read_text() + "not a request\n")
    assert len(read(path, requests=1000).workload.arrival_s) == 1000
    with pytest.raises(ValueError, match="line 60001"):
        read(path, requests=60_001)


def test_arrivals_may_be_faster(tmp_path: Path) -> None:
    found = read(mooncake(tmp_path), rate_scale=4)
    assert found.workload.arrival_s.tolist() == [0, 0.75, 0.75, 2.25, 3]
    assert found.workload.requests_per_s == pytest.approx(4 * 4 / 12)
    assert "arrivals 4 times as fast as in the trace" in found.notes


def test_requests_beyond_the_context_are_left_out_only_if_asked(tmp_path: Path) -> None:
    model = load_model("mixtral-8x7b")
    path = mooncake(tmp_path)
    assert len(read_demand(path, model).workload.arrival_s) == 5
    found = read_demand(path, model, skip_longer=True)
    assert found.workload.input_tokens.tolist() == [1500, 1300, 600, 1300]
    assert found.workload.cached_tokens.tolist() == [0, 1024, 0, 1299]
    assert any(note == "left out: 1 requests longer than mixtral-8x7b's 32,768 tokens" for note in found.notes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: read(path, requests=1), "requests: expected at least 2; got 1"),
        (lambda path: read(path, rate_scale=0), "rate_scale: expected a positive number; got 0"),
        (lambda path: read(path, rate_scale=float("inf")), "rate_scale: expected a positive number; got inf"),
        (lambda path: Cache(share=1.0), "cached_share: expected 0 or more and less than 1; got 1.0"),
        (lambda path: Cache(share=-0.1), "cached_share: expected 0 or more and less than 1; got -0.1"),
        (lambda path: Cache(share=float("nan")), "cached_share: expected 0 or more .* got nan"),
        (lambda path: Cache(replicas=2), "cache: expected replicas and tokens per replica together; got 2 and None"),
        (lambda path: Cache(share=0.5, is_off=True), "cache: expected one of .* got several"),
        (lambda path: Cache(share=0.5, replicas=1, tokens_per_replica=512), "cache: expected one of .* got several"),
        (
            lambda path: read(path, Cache(replicas=2, tokens_per_replica=100)),
            "cache_tokens: expected a block of 512 tokens or more; got 100",
        ),
        (lambda path: read(path, Cache(replicas=2, tokens_per_replica=512, policy="luck")), "policy: expected one of"),
        (lambda path: read(mooncake(path.parent, [])), ".*an empty trace"),
        (lambda path: read(mooncake(path.parent, ROWS[:1])), "trace: expected at least two requests"),
        (lambda path: read(mooncake(path.parent, ROWS[1:3])), "trace: expected requests over some time"),
        (lambda path: read(mooncake(path.parent, ROWS[1::-1])), ".*timestamp: expected times in order"),
        (lambda path: read(path.parent / "absent.jsonl"), "trace: cannot read .*absent.jsonl"),
    ],
)
def test_r28_absurd_demands_are_named(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make(mooncake(tmp_path))


SHARED = Path(__file__).parents[2] / "../shared/traces/mooncake_conversation.jsonl"


@pytest.mark.skipif(not SHARED.is_file(), reason="no published trace beside the repository")
def test_the_published_trace() -> None:
    found = read(SHARED)
    seen: set[int] = set()
    hits = total = 0
    for line in SHARED.read_text().splitlines():
        row = json.loads(line)
        leading = next((i for i, block in enumerate(row["hash_ids"]) if block not in seen), len(row["hash_ids"]))
        seen.update(row["hash_ids"])
        hits += min(512 * leading, row["input_length"] - 1)
        total += row["input_length"]
    assert len(found.workload.arrival_s) == 12_031
    assert int(found.workload.cached_tokens.sum()) == hits
    assert found.cached_share == pytest.approx(hits / total)
    assert np.diff(found.workload.arrival_s).min() >= 0
