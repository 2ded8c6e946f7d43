"""Results of serving tools: each read in the tool's real schema, each field that must be there, what contradicts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.costing.imports import aiperf, inferencex, sglang, trtllm, vllm
from tokenfab.costing.imports.checks import Source
from tokenfab.costing.imports.read import read_results
from tokenfab.costing.imports.served import Given, Served, Spread, completed_by
from tokenfab.costing.sweep import Parallel
from tokenfab.tests.costing.imports_files import DATA, changed, documents, write


def read(name: str, index: int = 0) -> Served:
    return read_results(DATA / name)[index]


def fields_of(served: Served, *wanted: str) -> tuple[Any, ...]:
    return tuple(getattr(served, name) for name in wanted)


def spread(found: Spread | None) -> Spread:
    assert found is not None
    return found


def test_vllm() -> None:
    served = read("vllm_serve.json")
    raw = documents("vllm_serve.json")[0]
    assert served.tool == "vllm bench serve"
    assert fields_of(served, "model", "known_model") == ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1")
    assert fields_of(served, "gpu", "num_gpus", "precision", "parallel", "framework") == (None,) * 5
    assert fields_of(served, "completed", "failed", "duration_s") == (128, 0, 64.0)
    assert fields_of(served, "input_tokens_mean", "output_tokens_mean") == (1000, 500)
    assert fields_of(served, "output_tokens_per_s", "total_tokens_per_s") == (1000, 3000)  # 64,000 and 192,000 in 64 s
    assert served.input_tokens_per_s == 2000
    assert (served.concurrency_limit, served.request_rate_per_s) == (64, math.inf)
    assert served.mean_in_flight == pytest.approx(sum(raw["latencies"]) / 64)
    assert served.mean_in_flight == pytest.approx(60, rel=0.01)
    ttft, tpot, itl = spread(served.ttft), spread(served.tpot), spread(served.itl)
    assert ttft.mean_s == pytest.approx(0.25)
    assert tpot.mean_s == pytest.approx(29.75 / 499)
    assert itl.percentiles_s[99] == pytest.approx(raw["p99_itl_ms"] / 1e3)
    assert ttft.median_s == pytest.approx(raw["median_ttft_ms"] / 1e3)
    assert set(ttft.percentiles_s) == {50, 99}
    assert fields_of(served, "speculative", "tokens_per_step", "acceptance_length") == (None, None, None)


def test_vllm_lines_with_metadata_and_drafts() -> None:
    small, large = read_results(DATA / "vllm_append.jsonl")
    assert small.source.endswith("vllm_append.jsonl:1")
    assert large.source.endswith("vllm_append.jsonl:2")
    assert fields_of(small, "gpu", "num_gpus", "precision", "framework_version") == ("h200", 8, "fp8", "0.24.0")
    assert small.parallel == Parallel(1, 8, 8)
    assert fields_of(small, "model", "known_model", "failed") == ("/models/r1", None, 2)
    assert fields_of(small, "speculative", "tokens_per_step", "acceptance_length") == (True, 2, 1.85)
    assert (small.mean_in_flight, large.mean_in_flight) == pytest.approx((30.4, 60.8))  # 0.95 of the limits 32 and 64
    assert small.concurrency_source == "measured mean in flight"
    assert set(spread(small.e2e).percentiles_s) == {50, 90, 99}


def test_a_runs_own_notes_in_other_words_say_nothing() -> None:
    notes = {"gpu": "4xNVIDIA_L40S", "num_gpus": "four", "parallel": "tensor 4", "model": "llama", "input_len": "1000"}
    served = vllm.read("x", changed("vllm_serve.json", lambda raw: raw.update(notes)))
    assert fields_of(served, "gpu", "num_gpus", "parallel") == (None, None, None)
    driver = vllm.read("x", changed("vllm_serve.json", lambda raw: raw.update(gpu="NVIDIA H200")))
    assert driver.gpu == "h200"


def test_older_vllm_schema() -> None:
    def older(raw: dict[str, Any]) -> None:
        for name in ("failed", "endpoint_type", "label", "latencies", "queue_times", "max_output_tokens_per_s",
                     "max_concurrent_requests", "rtfx", "request_goodput"):  # fmt: skip
            del raw[name]
        raw |= {"best_of": 1, "request_goodput:": None}

    served = vllm.read("old.json", changed("vllm_serve.json", older))
    assert fields_of(served, "failed", "mean_in_flight", "output_tokens_per_s") == (None, None, 1000)
    assert (served.concurrency, served.concurrency_source) == (64, "stated limit")


def test_sglang() -> None:
    small, large = read_results(DATA / "sglang.jsonl")
    assert small.tool == "sglang bench_serving"
    assert fields_of(small, "known_model", "precision", "num_gpus", "framework") == (
        "gpt-oss-120b", "mxfp4", 4, "sglang",
    )  # fmt: skip
    assert (small.parallel, small.framework_version, small.gpu) == (Parallel(4, 1, 1), "0.5.14", None)
    assert fields_of(small, "output_tokens_per_s", "total_tokens_per_s") == (1024, 5120)
    assert fields_of(large, "output_tokens_per_s", "total_tokens_per_s") == (2048, 10240)
    assert (small.mean_in_flight, large.mean_in_flight) == pytest.approx((15, 60))
    assert fields_of(small, "concurrency_limit", "request_rate_per_s", "failed") == (16, math.inf, None)
    assert spread(small.ttft).mean_s == pytest.approx(0.12)
    assert set(spread(small.e2e).percentiles_s) == {50, 90, 95, 99}
    assert fields_of(small, "speculative", "kv_format") == (False, None)


def test_older_sglang_says_nothing_of_the_server() -> None:
    served = read("sglang_old.jsonl")
    assert fields_of(served, "model", "num_gpus", "precision", "parallel") == (None,) * 4
    assert fields_of(served, "output_tokens_per_s", "total_tokens_per_s") == (1024, 5120)
    assert set(spread(served.itl).percentiles_s) == {50, 95, 99}


@pytest.mark.parametrize(
    ("server", "gpus", "parallel"),
    [
        ({"tp_size": 8}, 8, Parallel(8, 1, 1)),
        ({"tp_size": 8, "dp_size": 8, "enable_dp_attention": True, "ep_size": 8}, 8, Parallel(1, 8, 8)),
        ({"tp_size": 8, "dp_size": 2, "enable_dp_attention": True}, 8, Parallel(4, 2, 1)),
        ({"tp_size": 4, "dp_size": 2, "ep_size": 4}, 8, Parallel(4, 1, 4)),  # two replicas
        ({"tp_size": 4, "pp_size": 2}, 8, None),
    ],
)
def test_sglang_parallelism(server: dict[str, Any], gpus: int, parallel: Parallel | None) -> None:
    def other(raw: dict[str, Any]) -> None:
        raw["server_info"] = {"model_path": "/models/x", **server}

    served = sglang.read("x", changed("sglang.jsonl", other))
    assert (served.num_gpus, served.parallel) == (gpus, parallel)
    assert (served.parallel_note is None) == (parallel is not None)


def test_sglang_counts_failures_where_errors_are_written() -> None:
    raw = changed("sglang.jsonl", lambda raw: raw.update(errors=["", "timeout", "", "reset"]))
    assert sglang.read("x", raw).failed == 2


def test_trtllm() -> None:
    served = read("trtllm_bench.json")
    assert fields_of(served, "tool", "known_model", "gpu", "num_gpus") == ("trtllm-bench", "gpt-oss-120b", "b200", 1)
    assert fields_of(served, "precision", "kv_format", "framework_version") == (
        "W4A8_MXFP4_MXFP8", "fp8", "1.3.0rc20",
    )  # fmt: skip
    assert (served.parallel, served.completed, served.duration_s) == (Parallel(), 200, 80)
    assert fields_of(served, "output_tokens_per_s", "total_tokens_per_s") == (2560, 5120)
    assert served.mean_in_flight == pytest.approx(40)
    assert (spread(served.ttft).mean_s, spread(served.tpot).mean_s) == pytest.approx((0.35, 15.65 / 1023))
    assert {0, 50, 90, 95, 99, 100} == set(spread(served.tpot).percentiles_s)
    assert fields_of(served, "failed", "speculative") == (None, False)


def test_trtllm_of_several_gpus_does_not_say_how_attention_is_split() -> None:
    def eight(raw: dict[str, Any]) -> None:
        raw["world_info"] |= {"tp_size": 8, "ep_size": 8, "world_size": 8}
        raw["performance"]["output_throughput_per_gpu_tok_s"] /= 8
        del raw["machine"]

    served = trtllm.read("x", changed("trtllm_bench.json", eight))
    assert fields_of(served, "num_gpus", "parallel", "gpu") == (8, None, None)
    with pytest.raises(ValueError, match="--parallel"):
        completed_by(served, Given(gpu="b200"))


def test_aiperf() -> None:
    served = read("profile_export_aiperf.json")
    assert fields_of(served, "tool", "known_model", "gpu", "failed") == ("aiperf", "qwen3-30b-a3b", None, 3)
    assert fields_of(served, "completed", "duration_s", "concurrency_limit") == (100, 16, 20)
    assert fields_of(served, "input_tokens_mean", "output_tokens_mean") == (550, 256)
    assert fields_of(served, "output_tokens_per_s", "total_tokens_per_s") == (1600, 1600 + 100 * 550 / 16)
    assert served.mean_in_flight == pytest.approx(19)
    assert spread(served.tpot).mean_s == pytest.approx((3.04 - 0.09) / 255)  # 20 x 16 s / 100 x 0.95 = 3.04 s each
    assert {1, 5, 10, 25, 75} < set(spread(served.ttft).percentiles_s)


def test_later_aiperf_with_telemetry() -> None:
    served = read("profile_export_aiperf_telemetry.json")
    assert fields_of(served, "tool_version", "gpu", "num_gpus", "failed") == ("0.5.0", "h200", None, 0)
    assert fields_of(served, "known_model", "concurrency_limit") == ("qwen3-30b-a3b", 20)

    def cooled_down(raw: dict[str, Any]) -> None:
        raw["input_config"]["phases"].append({"name": "cooldown", "type": "concurrency", "concurrency": 1})

    again = aiperf.read("x", changed("profile_export_aiperf_telemetry.json", cooled_down))
    assert again.concurrency_limit == 20


def test_aiperf_records_by_hand() -> None:
    """Two slots, three requests each of 100 ms + 100 x 9 ms = 1 s, one after the other: 3 s. No warm-up, no failure."""
    served = read("profile_export.jsonl")
    assert fields_of(served, "completed", "failed", "model") == (6, 1, None)
    assert served.duration_s == pytest.approx(3)
    assert fields_of(served, "output_tokens_per_s", "total_tokens_per_s") == pytest.approx((202, 1202))
    assert served.mean_in_flight == pytest.approx(2)
    assert (spread(served.ttft).mean_s, spread(served.tpot).mean_s) == pytest.approx((0.1, 0.009))


def test_aiperf_records_percentiles_are_linear_between_requests(tmp_path: Path) -> None:
    records = [line for line in documents("profile_export.jsonl") if line["error"] is None][1:5]
    for record, ttft in zip(records, (100.0, 50.0, 400.0, 200.0), strict=True):
        record["metrics"]["time_to_first_token"]["value"] = ttft
    (served,) = read_results(write(tmp_path / "records.jsonl", *records))
    found = spread(served.ttft)
    assert found.mean_s == pytest.approx(0.1875)
    assert found.percentiles_s[50] == pytest.approx(0.15)
    assert found.percentiles_s[90] == pytest.approx(0.2 + 0.7 * 0.2)  # place 2.7 of 0, 1, 2, 3
    assert (found.percentiles_s[0], found.percentiles_s[100]) == (0.05, 0.4)


def test_inferencex_of_one_node() -> None:
    served = read("inferencex_agg_bmk.json")
    assert fields_of(served, "tool", "known_model", "gpu", "num_gpus") == ("inferencex", "deepseek-r1", "h200", 8)
    assert fields_of(served, "precision", "framework", "concurrency_limit") == ("fp8", "sglang", 64)
    assert (served.parallel, served.aggregated, served.prefill_gpus) == (Parallel(8, 1, 1), True, None)
    assert fields_of(served, "output_tokens_per_s", "total_tokens_per_s") == pytest.approx((448, 4032))
    assert fields_of(served, "completed", "failed", "duration_s", "mean_in_flight") == (None,) * 4
    assert spread(served.tpot).mean_s == pytest.approx(0.14182)
    assert {50, 90, 99, 99.9} == set(spread(served.ttft).percentiles_s)


def test_inferencex_of_two_pools_counts_all_gpus() -> None:
    served = read("inferencex_agg_bmk.json", 1)
    assert fields_of(served, "num_gpus", "prefill_gpus", "decode_gpus") == (28, 20, 8)
    assert fields_of(served, "gpu", "precision", "framework") == ("gb200", "fp4", "dynamo-trt")
    assert (served.parallel, served.prefill_parallel) == (Parallel(1, 8, 8), Parallel(1, 4, 4))
    assert fields_of(served, "output_tokens_per_s", "total_tokens_per_s") == pytest.approx((14_000, 126_000))
    assert served.known_model == "deepseek-r1"  # by its prefix and by its name
    assert "/" in str(served.framework_version)


def test_inferencex_api_is_the_same_rows() -> None:
    """Its num_*_gpu of one node are tp x ep, no GPUs that exist."""
    for index in (0, 1):
        row, api = read("inferencex_agg_bmk.json", index), read("inferencex_api.json", index)
        same = ("num_gpus", "prefill_gpus", "parallel", "prefill_parallel", "known_model", "gpu", "precision")
        assert fields_of(row, *same) == fields_of(api, *same)
        assert row.output_tokens_per_s == pytest.approx(api.output_tokens_per_s)


@pytest.mark.parametrize(
    ("row", "num_gpus", "prefill_gpus", "parallel"),
    [
        ({"pp": 2}, 16, None, None),  # tp x pp x pcp GPUs, no plan for pipelines
        ({"pcp_size": 2}, 16, None, None),
        ({"dcp_size": 2}, 8, None, None),
        ({"dp_attention": "True", "ep": 8}, 8, None, Parallel(1, 8, 8)),
        ({"ep": 4}, 8, None, Parallel(8, 1, 4)),
    ],
)
def test_inferencex_gpus(
    row: dict[str, Any], num_gpus: int, prefill_gpus: int | None, parallel: Parallel | None
) -> None:
    served = inferencex.read("x", changed("inferencex_agg_bmk.json", lambda raw: raw.update(row)))
    assert fields_of(served, "num_gpus", "prefill_gpus", "parallel") == (num_gpus, prefill_gpus, parallel)


def test_inferencex_before_the_pools_had_a_parallelism_of_their_own() -> None:
    """2025-11: ``tp`` is all GPUs, and must be the sum of the two pools'."""

    def older(raw: dict[str, Any]) -> None:
        for name in [name for name in raw if name.startswith(("prefill_", "decode_", "is_multinode", "pp"))]:
            del raw[name]
        raw |= {"tp": 28, "ep": 1, "dp_attention": None, "mtp": "on"}
        del raw["spec_decoding"]

    served = inferencex.read("x", changed("inferencex_agg_bmk.json", older, 1))
    assert fields_of(served, "num_gpus", "prefill_gpus", "parallel", "speculative") == (28, 20, None, True)
    assert "decode_tp" in str(served.parallel_note)


def test_inferencex_several_nodes_as_one_pool() -> None:
    """No decode GPUs: the prefill fields are those of the one pool, and every rate is over all of them."""

    def aggregated(raw: dict[str, Any]) -> None:
        raw |= {"num_prefill_gpu": 16, "num_decode_gpu": 0, "decode_tp": 0, "decode_ep": 0, "disagg": False,
                "prefill_tp": 16, "prefill_ep": 16}  # fmt: skip
        raw |= {"tput_per_gpu": 1000.0, "output_tput_per_gpu": 200.0, "input_tput_per_gpu": 800.0}

    served = inferencex.read("x", changed("inferencex_agg_bmk.json", aggregated, 1))
    assert fields_of(served, "num_gpus", "prefill_gpus", "aggregated") == (16, None, True)
    assert served.parallel == Parallel(1, 16, 16)
    assert fields_of(served, "output_tokens_per_s", "total_tokens_per_s") == pytest.approx((3200, 16_000))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_percentiles_of_records_match_numpy(values: list[float]) -> None:
    import numpy as np

    found = aiperf._spread_over(Source("x"), "latency", values)  # pyright: ignore[reportPrivateUsage]
    assert found is not None
    assert found.mean_s == pytest.approx(np.mean(values))
    for rank in (0, 50, 90, 95, 99, 100):
        assert found.percentiles_s[rank] == pytest.approx(np.percentile(values, rank))


def test_records_are_read_line_by_line(tmp_path: Path) -> None:
    """5,000 requests, as a file that is never held whole would give them."""
    record = documents("profile_export.jsonl")[1]
    path, step = tmp_path / "many.jsonl", 1_000_000_000
    with path.open("w") as file:
        for index in range(5_000):
            start = record["metadata"]["request_start_ns"] + index * step
            metadata = record["metadata"] | {"request_start_ns": start, "request_end_ns": start + step}
            file.write(json.dumps(record | {"metadata": metadata}) + "\n")
    (served,) = read_results(path)
    assert served.completed == 5_000
    assert served.output_tokens_per_s == pytest.approx(101)
