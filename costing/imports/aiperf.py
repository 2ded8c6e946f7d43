"""AIPerf (NVIDIA Dynamo): ``profile_export_aiperf.json`` of a run, or ``profile_export.jsonl``, one record per request.

Source: ai-dynamo/aiperf ``aiperf/exporters/json_exporter.py``, ``aiperf/common/models/export_models.py``,
``aiperf/metrics/types/`` and ``docs/tutorials/working-with-profile-exports.md`` @db4f639 (v0.1.1);
``src/aiperf/common/models/export_models.py`` @26240f9 adds ``schema_version``, ``aiperf_version``, ``telemetry_data``.
A metric is ``{unit, avg, min, max, p1 ... p99, std}``; its unit is read, not assumed. Inter-token latency is
(latency - TTFT) / (output tokens - 1): what others call TPOT. ``input_config`` is the run's configuration:
``endpoint.model_names`` and ``loadgen`` in v0.1, ``models.items`` and ``phases`` in the later one
(``src/aiperf/config/config.py`` @0205ea1).

``request_count`` counts valid requests; ``error_request_count`` is written only where there were errors. GPU names come
from telemetry where it was collected; how many of those GPUs served is not in it. A record of the JSONL has metadata,
metrics with units, and an error; nothing in it names the model, and warm-up requests are left out as AIPerf does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from . import names
from .checks import Source, mean_in_flight
from .served import AIPERF, Served, Spread

MARKERS = (
    "input_config", "request_throughput", "request_latency", "request_count", "output_token_throughput",
    "output_sequence_length", "input_sequence_length", "benchmark_duration", "was_cancelled",
)  # fmt: skip
RECORD_MARKERS = ("metadata", "metrics", "error")

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "sec": 1.0, "s": 1.0}
_STATISTICS = ("p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "min", "max")


class _Metric(msgspec.Struct, kw_only=True):
    unit: str
    avg: float
    p1: float | None = None
    p5: float | None = None
    p10: float | None = None
    p25: float | None = None
    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    min: float | None = None
    max: float | None = None


class _Error(msgspec.Struct, kw_only=True):
    count: int


class _Gpu(msgspec.Struct, kw_only=True):
    gpu_name: str


class _Endpoint(msgspec.Struct, kw_only=True):
    gpus: dict[str, _Gpu]


class _Telemetry(msgspec.Struct, kw_only=True):
    endpoints: dict[str, _Endpoint]


class _Export(msgspec.Struct, kw_only=True):
    request_count: _Metric
    request_throughput: _Metric
    request_latency: _Metric
    output_token_throughput: _Metric
    output_sequence_length: _Metric
    input_sequence_length: _Metric
    benchmark_duration: _Metric
    time_to_first_token: _Metric | None = None
    inter_token_latency: _Metric | None = None
    total_isl: _Metric | None = None
    total_osl: _Metric | None = None
    error_request_count: _Metric | None = None
    error_summary: list[_Error] | None = None
    was_cancelled: bool | None = None
    aiperf_version: str | None = None
    telemetry_data: _Telemetry | None = None
    input_config: dict[str, Any] | None = None


class _Value(msgspec.Struct, kw_only=True):
    value: Any
    unit: str


class _Metadata(msgspec.Struct, kw_only=True):
    request_start_ns: int
    request_end_ns: int
    benchmark_phase: str


class _Record(msgspec.Struct, kw_only=True):
    metadata: _Metadata
    metrics: dict[str, _Value]
    error: dict[str, Any] | None = None


def read(where: str, raw: dict[str, Any]) -> Served:
    """The record of one export.

    Raises:
        ValueError: see ``checks.py``; a run that was cancelled.
    """
    source = Source(where)
    found = source.read(raw, _Export)
    if found.was_cancelled:
        raise source.refuse("was_cancelled", "a run that ended", True)
    duration = source.positive("benchmark_duration", _scaled(source, "benchmark_duration", found.benchmark_duration))
    completed = source.count("request_count", _in(source, "request_count", found.request_count, "requests"))
    inputs = source.positive(
        "input_sequence_length", _in(source, "input_sequence_length", found.input_sequence_length, "tokens")
    )
    outputs = source.positive(
        "output_sequence_length", _in(source, "output_sequence_length", found.output_sequence_length, "tokens")
    )
    for field, metric, mean in (("total_isl", found.total_isl, inputs), ("total_osl", found.total_osl, outputs)):
        if metric is not None:
            source.agrees(field, _in(source, field, metric, "tokens"), mean * completed, "mean length x requests")
    requests = source.agrees(
        "request_throughput", _in(source, "request_throughput", found.request_throughput, "requests/sec"),
        completed / duration, "request_count / benchmark_duration",
    )  # fmt: skip
    output_rate = source.agrees(
        "output_token_throughput", _in(source, "output_token_throughput", found.output_token_throughput, "tokens/sec"),
        outputs * requests, "output_sequence_length x request_throughput",
    )  # fmt: skip
    e2e = _spread(source, "request_latency", found.request_latency)
    model, limit, rate = _configured(source, found.input_config or {})
    gpu, unknown = _gpu(source, found.telemetry_data)
    served = Served(
        source=where,
        tool=AIPERF,
        tool_version=found.aiperf_version,
        output_tokens_per_s=output_rate,
        total_tokens_per_s=output_rate + inputs * requests,
        input_tokens_mean=inputs,
        output_tokens_mean=outputs,
        model=model,
        known_model=None if model is None else names.model(model),
        gpu=gpu if not unknown else None,
        concurrency_limit=limit,
        mean_in_flight=mean_in_flight(requests, e2e),
        request_rate_per_s=rate,
        duration_s=duration,
        completed=completed,
        failed=_failed(source, found),
        ttft=_spread(source, "time_to_first_token", found.time_to_first_token),
        tpot=_spread(source, "inter_token_latency", found.inter_token_latency),
        e2e=e2e,
    )
    return source.check(served, _FIELDS)


_FIELDS = {
    "tpot": "inter_token_latency", "ttft": "time_to_first_token", "limit": "input_config concurrency",
}  # fmt: skip


def _in(source: Source, field: str, metric: _Metric, unit: str) -> float:
    if metric.unit != unit:
        raise source.refuse(f"{field}.unit", repr(unit), metric.unit)
    return source.number(f"{field}.avg", metric.avg)


def _unit_s(source: Source, field: str, unit: str) -> float:
    if unit not in _SECONDS:
        raise source.refuse(f"{field}.unit", f"one of {', '.join(_SECONDS)}", unit)
    return _SECONDS[unit]


def _scaled(source: Source, field: str, metric: _Metric) -> float:
    return source.number(f"{field}.avg", metric.avg) * _unit_s(source, field, metric.unit)


def _spread(source: Source, field: str, metric: _Metric | None) -> Spread | None:
    if metric is None:
        return None
    values = {"mean": metric.avg}
    values |= {name: value for name in _STATISTICS if (value := getattr(metric, name)) is not None}
    for name, value in values.items():
        source.number(f"{field}.{'avg' if name == 'mean' else name}", value)
    return source.spread_of(values, f"{field}.*", _unit_s(source, field, metric.unit), {"mean": "avg"})


def _failed(source: Source, found: _Export) -> int | None:
    if found.error_request_count is not None:
        field = "error_request_count"
        return source.count(field, _in(source, field, found.error_request_count, "requests"), least=0)
    if found.error_summary is not None:
        return sum(error.count for error in found.error_summary)
    return None


def _gpu(source: Source, telemetry: _Telemetry | None) -> tuple[str | None, bool]:
    """The one GPU model of the telemetry; and whether it has one that tokenfab does not know."""
    if telemetry is None:
        return None, False
    found = {gpu.gpu_name for endpoint in telemetry.endpoints.values() for gpu in endpoint.gpus.values()}
    if len(found) > 1:
        raise source.refuse("telemetry_data.endpoints.gpus.gpu_name", "GPUs of one kind", sorted(found))
    known = names.gpu_of_device(found.pop()) if found else None
    return known, known is None


class _Loadgen(msgspec.Struct, kw_only=True):
    concurrency: float | None = None
    request_rate: float | None = None


class _EndpointConfig(msgspec.Struct, kw_only=True):
    model_names: list[str] | None = None


class _Item(msgspec.Struct, kw_only=True):
    name: str


class _Models(msgspec.Struct, kw_only=True):
    items: list[_Item]


class _Phase(msgspec.Struct, kw_only=True):
    name: str
    concurrency: Any = None


class _Config(msgspec.Struct, kw_only=True):
    endpoint: _EndpointConfig | None = None
    loadgen: _Loadgen | None = None
    models: _Models | None = None
    phases: list[_Phase] | None = None


def _configured(source: Source, raw: dict[str, Any]) -> tuple[str | None, float | None, float | None]:
    """Model, limit of concurrency and offered rate of a configuration, v0.1's or the later."""
    config = source.read(raw, _Config)
    models = list(config.endpoint.model_names or ()) if config.endpoint else []
    models += [item.name for item in config.models.items] if config.models else []
    if len(models) > 1:
        raise source.refuse("input_config.endpoint.model_names", "one model", models)
    load = config.loadgen or _Loadgen()
    limit, rate = load.concurrency, load.request_rate
    for phase in config.phases or ():
        if phase.name == "profiling" and isinstance(phase.concurrency, int | float):
            limit = phase.concurrency
    if limit is not None:
        source.positive("input_config concurrency", limit)
        rate = math.inf if rate is None else rate
    return models[0] if models else None, limit, rate


def read_records(where: str, records: Iterable[tuple[str, Any]]) -> Served:
    """The record of a run from its requests, read one by one.

    Raises:
        ValueError: see ``checks.py``; no valid request.
    """
    source, lengths = Source(where), (0, 0)
    first, last, completed, failed = math.inf, 0, 0, 0
    latencies: dict[str, list[float]] = {"request_latency": [], "time_to_first_token": [], "inter_token_latency": []}
    for line, raw in records:
        of_line = Source(line)
        record = of_line.read(raw, _Record)
        if record.metadata.benchmark_phase != "profiling":
            continue
        if record.error is not None:
            failed += 1
            continue
        start, end = record.metadata.request_start_ns, record.metadata.request_end_ns
        if not 0 <= start < end < 2**63:
            raise of_line.refuse("metadata.request_end_ns", f"later than request_start_ns {start}", end)
        first, last, completed = min(first, start), max(last, end), completed + 1
        lengths = (
            lengths[0] + _tokens(of_line, record, "input_sequence_length"),
            lengths[1] + _tokens(of_line, record, "output_sequence_length"),
        )
        for name, values in latencies.items():
            if (value := record.metrics.get(name)) is not None:
                unit_s = _unit_s(of_line, f"metrics.{name}", value.unit)
                values.append(of_line.number(f"metrics.{name}.value", value.value) * unit_s)
            elif name == "request_latency":
                raise of_line.refuse("metrics.request_latency", "a value", None)
    if not completed:
        raise source.refuse("metadata.benchmark_phase", "valid requests of the phase 'profiling'", f"{failed} failed")
    duration = (last - first) * 1e-9
    spreads = {name: _spread_over(source, name, values) for name, values in latencies.items()}
    served = Served(
        source=where,
        tool=AIPERF,
        output_tokens_per_s=lengths[1] / duration,
        total_tokens_per_s=sum(lengths) / duration,
        input_tokens_mean=lengths[0] / completed,
        output_tokens_mean=lengths[1] / completed,
        mean_in_flight=mean_in_flight(completed / duration, spreads["request_latency"]),
        duration_s=duration,
        completed=completed,
        failed=failed,
        ttft=spreads["time_to_first_token"],
        tpot=spreads["inter_token_latency"],
        e2e=spreads["request_latency"],
    )
    return source.check(served, _FIELDS)


def _tokens(source: Source, record: _Record, name: str) -> int:
    field = f"metrics.{name}"
    value = record.metrics.get(name)
    if value is None:
        raise source.refuse(field, "a value", None)
    if value.unit != "tokens":
        raise source.refuse(f"{field}.unit", "'tokens'", value.unit)
    return source.count(f"{field}.value", source.number(f"{field}.value", value.value))


def _spread_over(source: Source, name: str, values: list[float]) -> Spread | None:
    """Mean and percentiles of single requests, linear between them as numpy's."""
    if not values:
        return None
    ordered = sorted(values)

    def rank(percent: float) -> float:
        place = (len(ordered) - 1) * percent / 100
        low = math.floor(place)
        return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)

    found = {f"p{percent}": rank(percent) for percent in (50, 90, 95, 99)}
    found |= {"mean": math.fsum(values) / len(values), "min": ordered[0], "max": ordered[-1]}
    return source.spread_of(found, f"{name}.*", 1.0)
