"""``tokenfab deploy`` from end to end on a small trace: the document against itself, the table, what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 requests, 2/s, of conversations that share their first blocks."""
    generator = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("traces") / "trace.jsonl"
    lines, at, block = [], 0, 1000
    for _ in range(400):
        at += int(generator.exponential(500))
        length = int(generator.integers(600, 12_000))
        shared = int(generator.integers(0, 2 + length // 1024))
        own = -(-length // 512) - shared
        ids = [*range(shared), *range(block, block + own)]
        block += own
        row = {
            "timestamp": at,
            "input_length": length,
            "output_length": int(generator.integers(20, 600)),
            "hash_ids": ids,
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def run(trace: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, ["deploy", "deepseek-v3", "--trace", str(trace), "--gpu", "h200", *args])


QUICK = ("--stack", "sglang", "--parallel", "tp8,dp8-ep8", "--rate-scale", "5")


@pytest.fixture(scope="module")
def document(trace: Path) -> Any:
    result = run(trace, *QUICK, "--stack", "sglang,trtllm", "--frontier", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [each for item in value.values() for each in numbers(item)]
    if isinstance(value, list):
        return [each for item in value for each in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_the_document_closes(document: Any, trace: Path) -> None:
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    load = document["trace"]
    assert load["requests"] == 400
    assert load["requests_per_s"] == pytest.approx(399 / (rows[-1]["timestamp"] - rows[0]["timestamp"]) * 1e3 * 5)
    assert load["mean_output_tokens"] == pytest.approx(sum(row["output_length"] for row in rows) / 400)
    assert 0 < load["cached_share_of_input"] < 1
    assert "endless" in load["cached_from"]
    tokens_per_s = load["requests_per_s"] * (load["mean_input_tokens"] + load["mean_output_tokens"])
    found = [document["cheapest"], *document["by_gpu_and_stack"], *document["frontier"]["points"]]
    for one in found:
        parts = [part for part in (one["prefill"], one["decode"]) if part]
        assert one["gpus"] == sum(part["gpus_per_replica"] * part["replicas"] for part in parts)
        assert one["disaggregated"] == (len(parts) == 2)
        assert one["usd_per_hour"] == pytest.approx(one["gpus"] * one["usd_per_gpu_hour"])  # every GPU is paid
        assert one["usd_per_mtok_input_and_output"] == pytest.approx(one["usd_per_hour"] / 3600 / tokens_per_s * 1e6)
        assert one["ttft_s"] <= 2
        assert sum(one["provenance"].values()) == pytest.approx(1)
        assert one["usd_per_mtok_output"] > one["usd_per_mtok_input_and_output"] > 0
    by_stack = [one["usd_per_hour"] for one in document["by_gpu_and_stack"]]
    assert len(by_stack) == 2
    assert document["cheapest"]["usd_per_hour"] == min(by_stack)
    assert all(one["tokens_per_s_per_user"] >= 20 for one in (document["cheapest"], *document["by_gpu_and_stack"]))
    points = document["frontier"]["points"]
    assert [one["usd_per_hour"] for one in points] == sorted({one["usd_per_hour"] for one in points})
    assert document["frontier"]["unmet"][-1]["failing"]
    assert all(math.isfinite(value) for value in numbers(document))


def test_the_limit_that_binds_is_verified_by_lifting_it(document: Any, trace: Path) -> None:
    best = document["cheapest"]
    for lifted, name in (
        (("--min-tokens-per-s-per-user", "0"), "tokens/s/user"),
        (("--no-ttft-limit",), "time to first token"),
    ):
        result = run(trace, *QUICK, "--stack", "sglang,trtllm", "--json", *lifted)
        without = json.loads(result.stdout)["cheapest"]["usd_per_hour"]
        assert best["saved_by_lifting"][name] == pytest.approx(1 - without / best["usd_per_hour"])
    most = max(best["saved_by_lifting"].values())
    assert best["binding"] in ("none", "several together") or best["saved_by_lifting"][best["binding"]] == most


def test_for_people(trace: Path) -> None:
    result = run(trace, *QUICK, "--frontier", "--rates", "20,40,100000")
    assert result.exit_code == 0, result.output
    for phrase in (
        "time to first token <= 2 s for 90% of requests", "$/M output", "$/M in+out", "every GPU paid",
        "lifting one limit, all others kept, would save of the bill", "one endless cache of prefixes", "price: h200",
        "cannot be met: >= 100000 tokens/s/user", "tokens/s/user would have to be lifted", "left out: launch gaps",
        "Cost against interactivity (tokens/s/user): deepseek-v3 on trace.jsonl, TTFT <= 2 s for 90%",
    ):  # fmt: skip
        assert phrase in result.output
    assert "nan" not in result.output.lower().split()
    assert " inf" not in result.output


def test_caches_are_set_against_what_prefills(trace: Path) -> None:
    result = run(trace, *QUICK, "--cache-tokens", "500000", "--replicas", "3")
    assert result.exit_code == 0, result.output
    assert "kv_aware routing over 3 replicas with caches of 500,000 tokens each" in result.output
    found = re.search(r"simulated for 3 replicas; here (\d+) attention groups prefill", result.output)
    assert found
    again = run(trace, *QUICK, "--cache-tokens", "500000", "--replicas", found[1])
    assert f"kv_aware routing over {found[1]} replicas" in again.output


def test_help(trace: Path) -> None:
    result = run(trace, "--help")
    assert result.exit_code == 0
    assert "--max-ttft-s" in result.output
    assert "tokenfab deploy deepseek-v3 --trace mooncake_conversation.jsonl --gpu h200" in result.output


def test_what_cannot_be_met_is_an_answer(trace: Path) -> None:
    result = run(trace, *QUICK, "--max-ttft-s", "0.001", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["cheapest"] is None
    assert found["failing"] == ["time to first token"]
    assert found["by_gpu_and_stack"] == [{"gpu": "h200", "stack": "sglang 0.5.14", "failing": ["time to first token"]}]
    said = run(trace, *QUICK, "--max-ttft-s", "0.001").output
    assert "cannot be met: >= 20 tokens/s/user, time to first token <= 0.001 s" in said
    assert "the fastest prefill alone takes" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--min-tokens-per-s-per-user", "-1"), "min_tokens_per_s_per_user: expected 0 or more; got -1.0"),
        (("--max-ttft-s", "0"), "max_ttft_s: expected more than 0; got 0.0"),
        (("--ttft-percentile", "1.5"), "ttft_percentile: expected a share between 0 and 1; got 1.5"),
        (("--requests", "0"), "requests: expected at least 2; got 0"),
        (("--cached-share", "1"), "cached_share: expected 0 or more and less than 1; got 1.0"),
        (("--cache-tokens", "1000000"), "cache: expected replicas and tokens per replica together"),
        (("--usd-per-gpu-hour", "-3"), "usd_per_gpu_hour: expected a positive number; got -3.0"),
        (("--kept-tokens", "0.5"), "kept_tokens_per_step: expected between 1 and tokens_per_step"),
        (("--rates", "20"), "rates: expected with --frontier"),
        (("--frontier", "--rates", "-5"), "min_tokens_per_s_per_user: expected 0 or more; got -5.0"),
        (("--stack", "tokenfab"), "tokenfab"),
        (("--parallel", "tp3"), "deepseek-v3: nothing can serve: tp3: attention_tp: expected a divisor"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(trace: Path, args: tuple[str, ...], message: str) -> None:
    result = run(trace, *QUICK, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty trace"),
        ('{"timestamp": 5, "input_length": 4, "output_length": 4, "hash_ids": [0]}\n'
         '{"timestamp": 1, "input_length": 4, "output_length": 4, "hash_ids": [1]}\n', "expected times in order"),
        ('{"timestamp": 5, "input_length": 4, "output_length": 4, "hash_ids": [0]}\n', "at least two requests"),
    ],
)  # fmt: skip
def test_a_bad_trace_is_one_line_and_exit_code_2(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    result = run(tmp_path / "bad.jsonl", *QUICK)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
