"""Results of serving tools: each read in the tool's real schema, each field that must be there, what contradicts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.costing.imports import aiperf, inferencex, names, sglang, trtllm, vllm
from tokenfab.costing.imports.checks import Source
from tokenfab.costing.imports.read import detect, read_results
from tokenfab.costing.imports.served import Given, Served, Spread, completed_by
from tokenfab.costing.sweep import Parallel
from tokenfab.tests.costing.imports_files import DATA, changed, documents, set_at, write


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


REQUIRED = {
    ("vllm_serve.json", 0): (
        "model_id", "duration", "completed", "total_input_tokens", "total_output_tokens", "request_throughput",
        "output_throughput", "total_token_throughput", "request_rate",
    ),
    ("sglang.jsonl", 0): (
        "backend", "request_rate", "max_concurrency", "duration", "completed", "total_input_tokens",
        "total_output_tokens", "request_throughput", "input_throughput", "output_throughput", "concurrency",
    ),
    ("trtllm_bench.json", 0): (
        "engine", "world_info", "request_info", "performance", "engine/model", "engine/version", "engine/dtype",
        "engine/quantization", "engine/kv_cache_dtype", "world_info/tp_size", "world_info/pp_size",
        "world_info/world_size", "request_info/num_requests", "request_info/avg_num_concurrent_requests",
        "request_info/avg_input_length", "request_info/avg_output_length", "performance/total_latency_ms",
        "performance/request_throughput_req_s", "performance/system_output_throughput_tok_s",
        "performance/system_total_throughput_tok_s", "performance/output_throughput_per_gpu_tok_s",
        "performance/request_latency_percentiles_ms", "streaming_metrics/avg_tpot_ms",
        "streaming_metrics/tpot_percentiles", "streaming_metrics/ttft_percentiles/p50",
    ),
    ("profile_export_aiperf.json", 0): (
        "request_count", "request_throughput", "request_latency", "output_token_throughput", "output_sequence_length",
        "input_sequence_length", "benchmark_duration", "request_count/avg", "request_latency/unit",
    ),
    ("inferencex_agg_bmk.json", 0): (
        "hw", "conc", "model", "framework", "precision", "isl", "osl", "tput_per_gpu", "output_tput_per_gpu",
        "input_tput_per_gpu", "tp",
    ),
    ("inferencex_agg_bmk.json", 1): ("num_prefill_gpu", "num_decode_gpu"),
    ("inferencex_api.json", 0): ("hardware", "metrics", "decode_tp", "spec_method", "metrics/tput_per_gpu", "isl"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "index", "field"), [(*file, field) for file, fields in REQUIRED.items() for field in fields]
)
def test_a_missing_field_is_named(tmp_path: Path, name: str, index: int, field: str) -> None:
    path = write(tmp_path / "partial.json", changed(name, lambda raw: set_at(raw, field, ...), index))
    with pytest.raises(ValueError, match=rf"partial\.json.*\b{field.rsplit('/', 1)[-1]}\b") as caught:
        read_results(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["metadata/request_start_ns", "metrics/output_sequence_length",
                                   "metrics/input_sequence_length", "metrics/request_latency"])  # fmt: skip
def test_a_missing_field_of_a_record_is_named_with_its_line(tmp_path: Path, field: str) -> None:
    lines = documents("profile_export.jsonl")
    set_at(lines[2], field, ...)
    with pytest.raises(ValueError, match=rf"records\.jsonl:3.*{field.rsplit('/', 1)[-1]}"):
        read_results(write(tmp_path / "records.jsonl", *lines))


CONTRADICTIONS = [
    ("vllm_serve.json", 0, "output_throughput", 1010.0),
    ("vllm_serve.json", 0, "total_token_throughput", 2900.0),
    ("vllm_serve.json", 0, "request_throughput", 2.5),
    ("vllm_serve.json", 0, "completed", 0),
    ("vllm_serve.json", 0, "failed", -1),
    ("vllm_serve.json", 0, "total_output_tokens", 0),
    ("vllm_serve.json", 0, "total_input_tokens", -5),
    ("vllm_serve.json", 0, "duration", 0.0),
    ("vllm_serve.json", 0, "duration", math.nan),
    ("vllm_serve.json", 0, "output_throughput", math.inf),
    ("vllm_serve.json", 0, "mean_ttft_ms", math.nan),
    ("vllm_serve.json", 0, "p99_tpot_ms", "12"),
    ("vllm_serve.json", 0, "mean_tpot_ms", 0.0596),  # seconds in the field of milliseconds
    ("vllm_serve.json", 0, "mean_ttft_ms", 0.25),
    ("vllm_serve.json", 0, "mean_ttft_ms", -1.0),
    ("vllm_serve.json", 0, "p99_tpot_ms", 1.0),  # below the median
    ("vllm_serve.json", 0, "request_rate", "fast"),
    ("vllm_serve.json", 0, "max_concurrency", 30),  # 60 are in flight
    ("vllm_serve.json", 0, "max_concurrency", 0),
    ("vllm_append.jsonl", 0, "spec_decode_acceptance_length", 0.9),
    ("vllm_append.jsonl", 0, "num_gpus", "eight"),
    ("vllm_append.jsonl", 0, "p50_e2el_ms", 1.0),  # not the median beside it
    ("sglang.jsonl", 0, "input_throughput", 4000.0),
    ("sglang.jsonl", 0, "output_throughput", 1000.0),
    ("sglang.jsonl", 0, "total_throughput", 5000.0),
    ("sglang.jsonl", 0, "max_concurrency", 12),
    ("sglang.jsonl", 0, "concurrency", 0.0),
    ("sglang.jsonl", 0, "mean_tpot_ms", 0.0144),
    ("sglang.jsonl", 0, "p95_itl_ms", 0.1),
    ("sglang.jsonl", 0, "server_info/tp_size", 0),
    ("trtllm_bench.json", 0, "performance/system_output_throughput_tok_s", 2500.0),
    ("trtllm_bench.json", 0, "performance/system_total_throughput_tok_s", 2560.0),
    ("trtllm_bench.json", 0, "performance/total_latency_ms", 80.0),  # seconds
    ("trtllm_bench.json", 0, "performance/output_throughput_per_gpu_tok_s", 2000.0),
    ("trtllm_bench.json", 0, "request_info/avg_num_concurrent_requests", 20.0),
    ("trtllm_bench.json", 0, "streaming_metrics/avg_tpot_ms", 20.0),
    ("trtllm_bench.json", 0, "streaming_metrics/tpot_percentiles/p99", 1.0),
    ("trtllm_bench.json", 0, "streaming_metrics/tpot_percentiles/maximum", 1.0),
    ("trtllm_bench.json", 0, "world_info/tp_size", 4),
    ("profile_export_aiperf.json", 0, "output_token_throughput/avg", 1500.0),
    ("profile_export_aiperf.json", 0, "request_throughput/avg", 6.0),
    ("profile_export_aiperf.json", 0, "total_isl/avg", 1000.0),
    ("profile_export_aiperf.json", 0, "benchmark_duration/unit", "min"),
    ("profile_export_aiperf.json", 0, "request_latency/unit", "tokens"),
    ("profile_export_aiperf.json", 0, "inter_token_latency/unit", "us"),
    ("profile_export_aiperf.json", 0, "output_token_throughput/unit", "tokens/min"),
    ("profile_export_aiperf.json", 0, "was_cancelled", True),
    ("profile_export_aiperf.json", 0, "time_to_first_token/p90", 0.001),
    ("profile_export_aiperf.json", 0, "time_to_first_token/min", 1e6),
    ("inferencex_agg_bmk.json", 0, "tput_per_gpu", 600.0),
    ("inferencex_agg_bmk.json", 1, "output_tput_per_gpu", 500.0),  # divided by all GPUs
    ("inferencex_agg_bmk.json", 1, "num_decode_gpu", 16),
    ("inferencex_agg_bmk.json", 0, "isl", 0),
    ("inferencex_agg_bmk.json", 0, "osl", -1),
    ("inferencex_agg_bmk.json", 0, "conc", 0),
    ("inferencex_agg_bmk.json", 0, "hw", "tpu-v7"),
    ("inferencex_agg_bmk.json", 0, "mean_intvty", 7050.0),
    ("inferencex_agg_bmk.json", 0, "p99_tpot", 0.01),
    ("inferencex_agg_bmk.json", 0, "disagg", "perhaps"),
]


@pytest.mark.parametrize(("name", "index", "field", "value"), CONTRADICTIONS)
def test_figures_that_contradict_are_refused(tmp_path: Path, name: str, index: int, field: str, value: Any) -> None:
    path = write(tmp_path / "wrong.json", changed(name, lambda raw: set_at(raw, field, value), index))
    with pytest.raises(ValueError, match=r"wrong\.json") as caught:
        read_results(path)
    message, (*outer, last) = str(caught.value), field.split("/")
    wrong_pool = last in ("num_decode_gpu", "output_tput_per_gpu") and name.startswith("inferencex")
    near = {"p99_tpot": "p99_tpot|p99_intvty", "total_latency_ms": "request_throughput_req_s", "p50_e2el_ms": "e2el_ms",
            "tp_size": "tp_size|world_size"}  # fmt: skip
    expected = "tput_per_gpu" if wrong_pool else near.get(last, last)
    expected = outer[-1] if last in ("avg", "unit", "p90", "min") else expected
    assert any(word in message for word in expected.split("|")), message
    assert "\n" not in message


def test_a_latency_in_seconds_is_found_even_where_the_tool_does_not_say_what_was_in_flight() -> None:
    """640 x the true TPOT would keep more in flight than the limit; a thousandth of it next to nothing."""

    def plain(raw: dict[str, Any], factor: float) -> None:
        del raw["latencies"]
        for name in raw:
            if name.endswith(("_tpot_ms", "_ttft_ms")):
                raw[name] *= factor

    assert vllm.read("x", changed("vllm_serve.json", lambda raw: plain(raw, 1.0)))
    for factor in (1e3, 5e-3):
        with pytest.raises(ValueError, match="wrong unit"):
            vllm.read("x", changed("vllm_serve.json", lambda raw, factor=factor: plain(raw, factor)))


def test_latencies_that_were_not_measured_are_none_not_zero() -> None:
    def unstreamed(raw: dict[str, Any]) -> None:
        for name in raw:
            if name.endswith("_ttft_ms"):
                raw[name] = 0.0

    served = vllm.read("x", changed("vllm_serve.json", unstreamed))
    assert (served.ttft, served.tpot) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("  \n\n", "empty"),
        ("[]", "empty"),
        ("{", "not JSON"),
        ("not json", "not JSON"),
        ("[1, 2]", "format"),
        ("3", "format"),
        ('{"a": 1}', "format"),
        ('{"hello": {"world": 1}}', "format"),
        ('{"duration": 1, "duration": 2}', "duration: given twice"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"odd\.json.*{message}"):
        read_results(path)


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.json*")))
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    whole = (DATA / name).read_bytes().rstrip()
    path = tmp_path / name
    lines = [index for index in range(len(whole)) if whole[index : index + 1] == b"\n"] if name.endswith("l") else []
    for cut in range(1, len(whole), max(1, len(whole) // 60)):
        if cut in lines or cut + 1 in lines:  # a file of lines is whole at each line's end
            continue
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=name):
            read_results(path)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json: No such file"):
        read_results(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_results(tmp_path / "binary.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json"):
        read_results(tmp_path / "deep.json")


def test_a_line_that_is_wrong_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    small, large = documents("sglang.jsonl")
    large["output_throughput"] *= 2
    path = write(tmp_path / "lines.jsonl", small, large)
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: output_throughput"):
        read_results(path)
    refused: list[str] = []
    assert len(read_results(path, refused.append)) == 1
    assert len(refused) == 1
    assert "lines.jsonl:2" in refused[0]


def test_a_document_of_two_tools_is_refused() -> None:
    both = documents("vllm_serve.json")[0] | documents("sglang.jsonl")[0]
    with pytest.raises(ValueError, match="vllm bench serve and sglang"):
        detect("both.json", both)


def test_agentic_rows_have_no_lengths(tmp_path: Path) -> None:
    def agentic(raw: dict[str, Any]) -> None:
        del raw["isl"], raw["osl"]
        raw["scenario_type"] = "agentic-coding"

    path = write(tmp_path / "agg.json", changed("inferencex_agg_bmk.json", agentic))
    with pytest.raises(ValueError, match="isl.*agentic-coding"):
        read_results(path)


def test_pooling_results_have_no_output_tokens(tmp_path: Path) -> None:
    def pooling(raw: dict[str, Any]) -> None:
        del raw["total_output_tokens"], raw["output_throughput"]
        raw["total_input_sequences"] = raw["completed"]

    with pytest.raises(ValueError, match=r"total_output_tokens|output_throughput"):
        read_results(write(tmp_path / "pooling.json", changed("vllm_serve.json", pooling)))


def test_what_nobody_says_is_asked_for() -> None:
    served = read("vllm_serve.json")
    said: dict[str, Any] = {}
    for option, value in (("gpu", "h200"), ("num_gpus", 8), ("precision", "fp8"), ("parallel", Parallel.parse("tp8"))):
        with pytest.raises(ValueError, match=f"{option}: the file does not say; give --{option.replace('_', '-')}"):
            completed_by(served, Given(**said))
        said[option] = value
    whole = completed_by(served, Given(**said))
    assert fields_of(whole, *said) == tuple(said.values())
    assert completed_by(served, Given(gpu="h200", num_gpus=8), kernels=False).precision is None


@pytest.mark.parametrize(
    ("name", "index", "given", "field"),
    [
        ("trtllm_bench.json", 0, Given(gpu="h100"), "gpu"),
        ("trtllm_bench.json", 0, Given(num_gpus=2), "num_gpus"),
        ("trtllm_bench.json", 0, Given(precision="nvfp4"), "precision"),
        ("trtllm_bench.json", 0, Given(kv_format="bf16"), "kv_format"),
        ("trtllm_bench.json", 0, Given(model="gpt-oss-20b"), "model"),
        ("sglang.jsonl", 0, Given(gpu="h100", parallel=Parallel(1, 4, 4)), "parallel"),
        ("vllm_append.jsonl", 0, Given(model="deepseek-r1", kept_tokens=1.5), "kept_tokens"),
        ("vllm_append.jsonl", 0, Given(model="deepseek-r1", tokens_per_step=4), "tokens_per_step"),
        ("inferencex_agg_bmk.json", 1, Given(prefill_gpus=8), "prefill_gpus"),
        ("inferencex_agg_bmk.json", 1, Given(prefill_parallel=Parallel(4)), "prefill_parallel"),
        ("inferencex_agg_bmk.json", 0, Given(prefill_gpus=4), "prefill_gpus"),
        ("inferencex_agg_bmk.json", 0, Given(precision="nvfp4"), "precision"),
        ("inferencex_agg_bmk.json", 0, Given(model="deepseek-v3"), "model"),
    ],
)
def test_file_and_option_in_conflict(name: str, index: int, given: Given, field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}: the file says .*; --{field.replace('_', '-')} says"):
        completed_by(read(name, index), given)


def test_options_that_agree_or_refine_are_no_conflict() -> None:
    row = read("inferencex_agg_bmk.json")
    assert completed_by(row, Given(gpu="H200_SXM", num_gpus=8, model="deepseek-r1")).gpu == "h200"
    assert completed_by(row, Given(precision="fp8_tensor")).precision == "fp8_tensor"
    spread_out = completed_by(read("inferencex_agg_bmk.json", 1), Given(parallel=Parallel.parse("dp8-ep8-ag")))
    assert spread_out.parallel == Parallel(1, 8, 8, all_gather=True)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"num_gpus": 0}, "num_gpus"),
        ({"num_gpus": 8, "prefill_gpus": 8}, "prefill_gpus"),
        ({"num_gpus": 8, "prefill_gpus": -1}, "prefill_gpus"),
        ({"num_gpus": 12, "parallel": Parallel(8)}, "parallel"),
        ({"num_gpus": 12, "prefill_gpus": 4, "parallel": Parallel(8), "prefill_parallel": Parallel(8)},
         "prefill_parallel"),
        ({"num_gpus": 8, "prefill_parallel": Parallel(8)}, "prefill_gpus"),
        ({"gpu": "h2000"}, "gpu"),
        ({"model": "deepseek-r9"}, "model"),
        ({"precision": "fp7"}, "precision"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(given: dict[str, Any], field: str) -> None:
    whole = {"gpu": "h200", "num_gpus": 8, "precision": "fp8", "parallel": Parallel(4), **given}
    with pytest.raises(ValueError, match=field):
        completed_by(read("vllm_serve.json"), Given(**whole))


def test_names_are_exact() -> None:
    assert names.model("deepseek-ai/DeepSeek-R1-0528") == "deepseek-r1"
    assert names.model("/mnt/models/DeepSeek-R1/") == "deepseek-r1"
    assert names.model("deepseek-ai/DeepSeek-R1-Distill-Llama-70B") is None
    assert names.model("meta-llama/Llama-4-Scout-17B-16E-Instruct") is None
    runners = {
        "h200": "h200", "h200-nb_1": "h200", "b200-dgxc_03": "b200", "cluster:gb300-nv": "gb300", "gb200": "gb200",
        "mi355x-disagg": "mi355x", "rtx6000pro-lat": "rtx_pro_6000", "h2000": None, "": None,
    }  # fmt: skip
    assert {label: names.gpu_of_runner(label) for label in runners} == runners
    assert names.gpu_of_device("NVIDIA H100 80GB HBM3") == "h100"
    assert names.gpu_of_device("NVIDIA H100") is None
    assert names.stack("dynamo-trt") == "trtllm"
    assert names.stack("atom") is None


@pytest.mark.parametrize(
    ("word", "native", "expected"),
    [
        ("fp8", "fp8", "fp8"), ("fp8", "bf16", "fp8"), ("fp4", "mxfp4", "mxfp4"), ("fp4", "fp8", "nvfp4"),
        ("NVFP4", "fp8", "nvfp4"), ("FP8", "fp8", "fp8_tensor"), ("FP8_BLOCK_SCALES", "fp8", "fp8"),
        ("NO_QUANT bfloat16", "fp8", "bf16"), ("W4A16_MXFP4", "mxfp4", "mxfp4"), ("bf16", "fp8", "bf16"),
    ],
)  # fmt: skip
def test_a_word_for_a_precision(word: str, native: str, expected: str) -> None:
    assert names.one_precision(word, native) == expected


@pytest.mark.parametrize("word", ["int4", "awq", "NO_QUANT float16", "W4A16_AWQ"])
def test_a_precision_that_is_none_of_ours(word: str) -> None:
    with pytest.raises(ValueError, match=word):
        names.one_precision(word, "fp8")


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_percentiles_of_records_match_numpy(values: list[float]) -> None:
    import numpy as np

    found = aiperf._spread_over(Source("x"), "latency", values)  # pyright: ignore[reportPrivateUsage]
    assert found is not None
    assert found.mean_s == pytest.approx(np.mean(values))
    for rank in (0, 50, 90, 95, 99, 100):
        assert found.percentiles_s[rank] == pytest.approx(np.percentile(values, rank))


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(1, 10**4), st.floats(0.5, 1e5))
def test_any_consistent_vllm_result_is_read_and_any_20_percent_off_refused(
    completed: int, inputs: int, outputs: int, duration: float
) -> None:
    raw = {
        "model_id": "m", "tokenizer_id": "m", "num_prompts": completed, "burstiness": 1.0, "request_rate": 5.0,
        "max_concurrency": None, "duration": duration, "completed": completed, "total_input_tokens": inputs * completed,
        "total_output_tokens": outputs * completed, "request_throughput": completed / duration,
        "output_throughput": outputs * completed / duration,
        "total_token_throughput": (inputs + outputs) * completed / duration,
    }  # fmt: skip
    served = vllm.read("x", raw)
    assert served.output_tokens_per_s * duration == pytest.approx(outputs * completed)
    assert served.input_tokens_per_s * duration == pytest.approx(inputs * completed)
    for field in ("request_throughput", "output_throughput", "total_token_throughput"):
        for factor in (0.8, 1.2):
            with pytest.raises(ValueError, match=field):
                vllm.read("x", raw | {field: factor * raw[field]})


def test_records_are_read_line_by_line(tmp_path: Path) -> None:
    """20,000 requests, as a file that is never held whole would give them."""
    record = documents("profile_export.jsonl")[1]
    path, step = tmp_path / "many.jsonl", 1_000_000_000
    with path.open("w") as file:
        for index in range(20_000):
            start = record["metadata"]["request_start_ns"] + index * step
            metadata = record["metadata"] | {"request_start_ns": start, "request_end_ns": start + step}
            file.write(json.dumps(record | {"metadata": metadata}) + "\n")
    (served,) = read_results(path)
    assert served.completed == 20_000
    assert served.output_tokens_per_s == pytest.approx(101)
