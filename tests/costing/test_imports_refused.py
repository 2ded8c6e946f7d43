"""Results of serving tools that are refused: a field that is missing, figures that contradict, files that are none."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.costing.imports import aiperf, view, vllm
from tokenfab.costing.imports.bill import bills
from tokenfab.costing.imports.read import detect, is_request_record, read_results
from tokenfab.costing.imports.served import Given, completed_by
from tokenfab.costing.prices import price_lookup
from tokenfab.tests.costing.imports_files import DATA, changed, documents, set_at, write

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
        "performance/output_throughput_per_gpu_tok_s",
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
def test_r28_a_missing_field_is_named(tmp_path: Path, name: str, index: int, field: str) -> None:
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
def test_r28_figures_that_contradict_are_refused(tmp_path: Path, name: str, index: int, field: str, value: Any) -> None:
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


def test_a_load_of_a_given_rate_does_not_keep_to_its_limit() -> None:
    """2 requests/s of 0.25 s + 499 x 59.6 ms = 30 s each: 60 in flight, whatever the limit."""

    def paced(raw: dict[str, Any], limit: int | None) -> None:
        del raw["latencies"]
        raw |= {"request_rate": 2.0, "max_concurrency": limit}

    for limit in (None, 500):
        served = vllm.read("x", changed("vllm_serve.json", lambda raw, limit=limit: paced(raw, limit)))
        assert served.mean_in_flight is None
        assert served.concurrency == pytest.approx(60, rel=0.01)
        assert "TTFT and TPOT" in served.concurrency_source


@pytest.mark.parametrize(("metric", "factor"), [("ttft", 1e-3), ("ttft", 1e3), ("tpot", 1e-3), ("tpot", 1e3)])
def test_one_latency_in_another_unit_than_the_rest(metric: str, factor: float) -> None:
    """All statistics of it, so that they agree with each other: TTFT + TPOT x length is not what requests took."""

    def scaled(raw: dict[str, Any]) -> None:
        for name in raw:
            if name.endswith(f"_{metric}_ms"):
                raw[name] *= factor

    with pytest.raises(ValueError, match=f"mean_{metric}_ms.*wrong unit"):
        vllm.read("x", changed("vllm_serve.json", scaled))


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
def test_r28_a_file_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
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


ODD = (None, [], {}, "x", True, -1, 0, 1e308, 10**400, math.nan, math.inf, -math.inf, 5e-324)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a document; of a long list the first three."""
    items = document.items() if isinstance(document, dict) else enumerate(document[:3])
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.json*")))
def test_r28_any_odd_value_is_refused_in_a_line_or_harmless(name: str) -> None:
    """Never another error than one line, never a price that is 0, infinite or no number."""
    first, *more = documents(name)
    said, messages = Given(gpu="h200", num_gpus=8), list[str]()
    for path in places(first):
        for odd in ODD:
            raw = copy.deepcopy(first)
            parent = raw
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = odd
            try:
                if is_request_record(raw):
                    served = aiperf.read_records("x", [("x:1", raw), ("x:2", more[0])])
                else:
                    served = detect("x", raw)("x", raw)
                silent = {option: None for option in ("gpu", "num_gpus") if getattr(served, option) is not None}
                served = completed_by(served, replace(said, **silent), kernels=False)
            except ValueError as error:
                messages.append(str(error))
                continue
            (bill,) = bills([served], price_lookup(2.0), None)
            assert 0 < bill.usd_per_mtok_total <= bill.usd_per_mtok_output < math.inf, (path, odd)
            json.dumps(view.document([bill]), allow_nan=False)
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)
