"""``python -m sglang.bench_serving --output-file``: one JSON document per line and run.

Source: sgl-project/sglang ``python/sglang/benchmark/serving.py`` @00f9ec4 (``benchmark``), before it moved
``python/sglang/bench_serving.py`` @0033168. The older writes neither ``tag``, ``server_info``, ``total_throughput``,
``total_input_text_tokens`` nor p90 and p95. Times are milliseconds, ``duration`` seconds; ``request_rate`` is JSON's
out-of-standard ``Infinity`` where all requests are offered at once, "trace" where a trace has its own times.
``concurrency`` is the sum of end-to-end latencies over the duration: the mean in flight.

``server_info`` is the server's ``/server_info``: ``dataclasses.asdict(server_args)`` and its version
(``python/sglang/srt/entrypoints/http_server.py``). From it: model, version, quantization, GPUs and parallelism
(tp_size x pp_size x dp_size GPUs, or tp_size x pp_size with attention data parallel inside). Nothing names the GPU, and
nothing counts failed requests unless ``--output-details`` wrote ``errors``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec

from ..sweep import Parallel
from . import names
from .checks import Source
from .served import SGLANG, Served

MARKERS = (
    "sharegpt_output_len", "random_input_len", "random_output_len", "random_range_ratio", "input_throughput",
    "total_output_tokens_retokenized", "accept_length",
)  # fmt: skip
_MS = 1e-3


class _Server(msgspec.Struct, kw_only=True):
    model_path: str | None = None
    version: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    tp_size: int | None = None
    pp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    enable_dp_attention: bool = False
    speculative_algorithm: str | None = None
    speculative_num_draft_tokens: int | None = None
    decode: Any = None


class _Result(msgspec.Struct, kw_only=True):
    backend: str
    request_rate: float | str
    max_concurrency: int | None
    duration: float
    completed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    input_throughput: float
    output_throughput: float
    concurrency: float
    accept_length: float | None = None
    total_throughput: float | None = None
    server_info: _Server | None = None
    errors: list[str] | None = None


def read(where: str, raw: dict[str, Any]) -> Served:
    """The record of one run.

    Raises:
        ValueError: see ``checks.py``.
    """
    source = Source(where)
    found = source.read(raw, _Result)
    duration = source.positive("duration", found.duration)
    completed = source.count("completed", found.completed)
    inputs = source.count("total_input_tokens", found.total_input_tokens)
    outputs = source.count("total_output_tokens", found.total_output_tokens)
    source.agrees("request_throughput", found.request_throughput, completed / duration, "completed / duration")
    input_rate = source.agrees(
        "input_throughput", found.input_throughput, inputs / duration, "total_input_tokens / duration"
    )
    output_rate = source.agrees(
        "output_throughput", found.output_throughput, outputs / duration, "total_output_tokens / duration"
    )
    if found.total_throughput is not None:
        source.agrees("total_throughput", found.total_throughput, input_rate + output_rate, "input + output throughput")
    ttft = source.spread(raw, "*_ttft_ms", _MS)
    served = Served(
        source=where,
        tool=SGLANG,
        output_tokens_per_s=output_rate,
        total_tokens_per_s=input_rate + output_rate,
        input_tokens_mean=inputs / completed,
        output_tokens_mean=outputs / completed,
        framework=found.backend.split("-")[0],
        concurrency_limit=None
        if found.max_concurrency is None
        else source.count("max_concurrency", found.max_concurrency),
        mean_in_flight=source.positive("concurrency", found.concurrency),
        request_rate_per_s=_rate(source, found.request_rate),
        duration_s=duration,
        completed=completed,
        failed=None if found.errors is None else sum(bool(error) for error in found.errors),
        ttft=ttft,
        tpot=source.spread(raw, "*_tpot_ms", _MS) if ttft else None,
        itl=source.spread(raw, "*_itl_ms", _MS),
        e2e=source.spread(raw, "*_e2e_latency_ms", _MS),
        acceptance_length=found.accept_length or None,
    )
    if found.server_info is not None:
        served = _of_server(source, served, found.server_info)
    fields = {
        "tpot": "mean_tpot_ms", "ttft": "mean_ttft_ms", "limit": "max_concurrency", "acceptance": "accept_length",
    }  # fmt: skip
    return source.check(served, fields)


def _rate(source: Source, rate: float | str) -> float | None:
    if rate == "trace":
        return None
    if rate == math.inf:
        return math.inf
    if isinstance(rate, str):
        raise source.refuse("request_rate", "a number or 'trace'", rate)
    return source.positive("request_rate", rate)


def _of_server(source: Source, served: Served, server: _Server) -> Served:
    """What the server said of itself; of a router over prefill and decode servers, nothing."""
    if server.decode is not None:
        return served
    served = replace(
        served,
        model=server.model_path,
        known_model=None if server.model_path is None else names.model(server.model_path),
        framework_version=server.version,
        precision=server.quantization,
        kv_format={"fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "bf16": "bf16", "bfloat16": "bf16"}.get(
            server.kv_cache_dtype or ""
        ),
        speculative=server.speculative_algorithm is not None,
        tokens_per_step=server.speculative_num_draft_tokens if server.speculative_algorithm else None,
    )
    if server.tp_size is None:
        return served
    tp, pp, dp, ep = (
        source.count(f"server_info.{field}", getattr(server, field))
        for field in ("tp_size", "pp_size", "dp_size", "ep_size")
    )
    inner = dp if server.enable_dp_attention else 1
    if tp % inner or tp % ep:
        raise source.refuse("server_info.tp_size", f"a multiple of dp_size {inner} and ep_size {ep}", tp)
    gpus = tp * pp * (1 if server.enable_dp_attention else dp)
    if pp > 1:
        return replace(served, num_gpus=gpus, parallel_note=f"pipeline parallel {pp} is not in tokenfab's plan")
    return replace(served, num_gpus=gpus, parallel=Parallel(tp // inner, inner, ep))
