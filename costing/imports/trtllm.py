"""``trtllm-bench throughput|latency --report_json``.

Source: NVIDIA/TensorRT-LLM ``tensorrt_llm/bench/dataclasses/reporting.py`` @0249976 (``get_statistics_dict``) and
``statistics.py`` @77d7fe1; @2787769 writes the same without ``machine``, older ones without a total throughput. Times
are milliseconds, the percentiles too (they are nanoseconds converted in place); ``streaming_metrics`` only with
``--streaming``. All requests are offered at once. ``avg_num_concurrent_requests`` is the sum of latencies over the
total: the mean in flight.

The GPU is ``machine.name`` as CUDA gives it. ``world_info`` has tensor, pipeline and expert parallel sizes, but not
whether attention is data parallel, so that more than one GPU needs ``--parallel``. Failed requests are not counted.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..sweep import Parallel
from . import names
from .checks import Source
from .served import TRTLLM, Served, Spread

MARKERS = ("engine", "world_info", "request_info", "performance", "dataset", "streaming_metrics", "machine")
_MS = 1e-3
_WORDS = {"mean": "average", "min": "minimum", "max": "maximum"}


class _Engine(msgspec.Struct, kw_only=True):
    model: str
    version: str
    backend: str
    dtype: str
    quantization: str | None
    kv_cache_dtype: str | None


class _Machine(msgspec.Struct, kw_only=True):
    name: str


class _World(msgspec.Struct, kw_only=True):
    tp_size: int
    pp_size: int
    ep_size: int | None
    world_size: int


class _Requests(msgspec.Struct, kw_only=True):
    num_requests: int
    avg_num_concurrent_requests: float
    avg_input_length: float
    avg_output_length: float


class _Percentiles(msgspec.Struct, kw_only=True):
    p50: float
    p95: float
    p99: float
    minimum: float
    maximum: float
    average: float
    p90: float | None = None


class _Performance(msgspec.Struct, kw_only=True):
    total_latency_ms: float
    request_throughput_req_s: float
    system_output_throughput_tok_s: float
    system_total_throughput_tok_s: float | None = None
    output_throughput_per_gpu_tok_s: float
    request_latency_percentiles_ms: _Percentiles


class _Streaming(msgspec.Struct, kw_only=True):
    avg_ttft_ms: float
    avg_tpot_ms: float
    ttft_percentiles: _Percentiles
    tpot_percentiles: _Percentiles


class _Decoding(msgspec.Struct, kw_only=True):
    mode: str | None = None
    acceptance_length_percentiles: _Percentiles | None = None


class _Report(msgspec.Struct, kw_only=True):
    engine: _Engine
    world_info: _World
    request_info: _Requests
    performance: _Performance
    machine: _Machine | None = None
    streaming_metrics: _Streaming | None = None
    decoding_stats: _Decoding | None = None


def read(where: str, raw: dict[str, Any]) -> Served:
    """The record of one report.

    Raises:
        ValueError: see ``checks.py``.
    """
    source = Source(where)
    found = source.read(raw, _Report)
    requests, rates, world = found.request_info, found.performance, found.world_info
    duration = source.positive("performance.total_latency_ms", rates.total_latency_ms) * _MS
    completed = source.count("request_info.num_requests", requests.num_requests)
    inputs = source.positive("request_info.avg_input_length", requests.avg_input_length)
    outputs = source.positive("request_info.avg_output_length", requests.avg_output_length)
    request_rate = source.agrees(
        "performance.request_throughput_req_s", rates.request_throughput_req_s, completed / duration,
        "num_requests / total_latency_ms",
    )  # fmt: skip
    output_rate = source.agrees(
        "performance.system_output_throughput_tok_s", rates.system_output_throughput_tok_s, outputs * request_rate,
        "avg_output_length x num_requests / total_latency_ms",
    )  # fmt: skip
    total_rate = (inputs + outputs) * request_rate
    if rates.system_total_throughput_tok_s is not None:
        source.agrees(
            "performance.system_total_throughput_tok_s", rates.system_total_throughput_tok_s, total_rate,
            "(avg_input_length + avg_output_length) x num_requests / total_latency_ms",
        )  # fmt: skip
    gpus = source.count("world_info.world_size", world.world_size)
    source.agrees(
        "performance.output_throughput_per_gpu_tok_s", rates.output_throughput_per_gpu_tok_s, output_rate / gpus,
        "system_output_throughput_tok_s / world_size",
    )  # fmt: skip
    tp = source.count("world_info.tp_size", world.tp_size)
    pp = source.count("world_info.pp_size", world.pp_size)
    if tp * pp > gpus:
        raise source.refuse("world_info.world_size", f"at least tp_size {tp} x pp_size {pp}", gpus)
    e2e = _spread(source, "performance.request_latency_percentiles_ms", rates.request_latency_percentiles_ms)
    flight = source.positive("request_info.avg_num_concurrent_requests", requests.avg_num_concurrent_requests)
    if e2e is not None and e2e.mean_s is not None:
        source.agrees(
            "request_info.avg_num_concurrent_requests", flight, request_rate * e2e.mean_s,
            "request_throughput_req_s x average request latency",
        )  # fmt: skip
    streaming, decoding, engine = found.streaming_metrics, found.decoding_stats, found.engine
    acceptance = decoding.acceptance_length_percentiles if decoding else None
    served = Served(
        source=where,
        tool=TRTLLM,
        tool_version=engine.version,
        output_tokens_per_s=output_rate,
        total_tokens_per_s=total_rate,
        input_tokens_mean=inputs,
        output_tokens_mean=outputs,
        model=engine.model,
        known_model=names.model(engine.model),
        gpu=_gpu(source, found.machine),
        num_gpus=gpus,
        precision=_precision(engine),
        kv_format={"FP8": "fp8", None: "bf16" if engine.dtype == "bfloat16" else None}.get(engine.kv_cache_dtype),
        framework="trtllm",
        framework_version=engine.version,
        parallel=Parallel() if gpus == 1 else None,
        parallel_note=f"pipeline parallel {pp} is not in tokenfab's plan" if pp > 1 else None,
        mean_in_flight=flight,
        duration_s=duration,
        completed=completed,
        ttft=_streamed(source, "ttft", streaming.ttft_percentiles, streaming.avg_ttft_ms) if streaming else None,
        tpot=_streamed(source, "tpot", streaming.tpot_percentiles, streaming.avg_tpot_ms) if streaming else None,
        e2e=e2e,
        speculative=decoding is not None,
        acceptance_length=None if acceptance is None else acceptance.average,
    )
    fields = {
        "tpot": "streaming_metrics.avg_tpot_ms", "ttft": "streaming_metrics.avg_ttft_ms",
        "limit": "request_info.avg_num_concurrent_requests",
        "acceptance": "decoding_stats.acceptance_length_percentiles.average",
    }  # fmt: skip
    return source.check(served, fields)


def _spread(source: Source, field: str, found: _Percentiles) -> Spread | None:
    values = {"mean": found.average, "min": found.minimum, "max": found.maximum}
    values |= {name: value for name in ("p50", "p90", "p95", "p99") if (value := getattr(found, name)) is not None}
    for name, value in values.items():
        source.number(f"{field}.{_WORDS.get(name, name)}", value)
    return source.spread_of(values, f"{field}.*", _MS, _WORDS)


def _streamed(source: Source, name: str, found: _Percentiles, average_ms: float) -> Spread | None:
    spread = _spread(source, f"streaming_metrics.{name}_percentiles", found)
    if spread is not None:
        source.agrees(f"streaming_metrics.avg_{name}_ms", average_ms, found.average, f"{name}_percentiles.average")
    return spread


def _gpu(source: Source, machine: _Machine | None) -> str | None:
    """None also for a device that tokenfab does not know: the user says which GPU it is."""
    return None if machine is None else names.gpu_of_device(machine.name)


def _precision(engine: _Engine) -> str:
    quantization = engine.quantization or "NO_QUANT"
    return f"{quantization} {engine.dtype}" if quantization == "NO_QUANT" else quantization
