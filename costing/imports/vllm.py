"""``vllm bench serve --save-result`` (or ``--append-result``: one document per line).

Source: vllm-project/vllm ``vllm/benchmarks/serve.py`` @009e6d4 (``main_async``, ``benchmark``, ``calculate_metrics``).
InferenceX's ``utils/bench_serving/benchmark_serving.py`` @843c625, a fork of the older ``benchmark_serving.py``, writes
the same fields without ``failed``, ``endpoint_type``, with ``best_of``. Times are milliseconds, ``duration`` seconds;
``request_rate`` is "inf" where all requests are offered at once. A statistic per metric named by
``--percentile-metrics`` (ttft, tpot, itl by default) and rank of ``--metric-percentiles`` (99 by default).

The file names neither GPU, number of GPUs, precision nor parallelism, unless the run said so itself:
``--metadata gpu=h200 num_gpus=8 parallel=tp8 precision=fp8 version=0.24.0``. That option adds any key to the file; one
of these with a value in other words than tokenfab's says nothing.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from ..sweep import Parallel
from . import names
from .checks import Source, mean_in_flight
from .served import VLLM, Served, Spread

MARKERS = ("model_id", "tokenizer_id", "num_prompts", "burstiness", "total_token_throughput", "best_of")
_MS = 1e-3


class _Result(msgspec.Struct, kw_only=True):
    model_id: str
    duration: float
    completed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    request_rate: float | str
    max_concurrency: int | None = None
    failed: int | None = None
    latencies: list[float] | None = None
    spec_decode_acceptance_length: float | None = None
    spec_decode_num_drafts: int | None = None
    spec_decode_draft_tokens: int | None = None
    gpu: str | None = None
    num_gpus: str | None = None
    parallel: str | None = None
    precision: str | None = None
    version: str | None = None


def read(where: str, raw: dict[str, Any]) -> Served:
    """The record of one result.

    Raises:
        ValueError: see ``checks.py``.
    """
    source = Source(where)
    found = source.read(raw, _Result)
    duration = source.positive("duration", found.duration)
    completed = source.count("completed", found.completed)
    inputs = source.count("total_input_tokens", found.total_input_tokens)
    outputs = source.count("total_output_tokens", found.total_output_tokens)
    requests = source.agrees(
        "request_throughput", found.request_throughput, completed / duration, "completed / duration"
    )
    limit = None if found.max_concurrency is None else source.count("max_concurrency", found.max_concurrency)
    ttft = source.spread(raw, "*_ttft_ms", _MS)
    e2e = source.spread(raw, "*_e2el_ms", _MS) or _of_latencies(source, found)
    served = Served(
        source=where,
        tool=VLLM,
        output_tokens_per_s=source.agrees(
            "output_throughput", found.output_throughput, outputs / duration, "total_output_tokens / duration"
        ),
        total_tokens_per_s=source.agrees(
            "total_token_throughput", found.total_token_throughput, (inputs + outputs) / duration,
            "(total_input_tokens + total_output_tokens) / duration",
        ),
        input_tokens_mean=inputs / completed,
        output_tokens_mean=outputs / completed,
        model=found.model_id,
        known_model=names.model(found.model_id),
        gpu=None if found.gpu is None else names.known_gpu(found.gpu),
        num_gpus=int(found.num_gpus) if found.num_gpus is not None and found.num_gpus.isdecimal() else None,
        precision=found.precision,
        parallel=_parallel(found.parallel),
        framework_version=found.version,
        concurrency_limit=limit,
        mean_in_flight=mean_in_flight(requests, e2e),
        request_rate_per_s=_rate(source, found.request_rate),
        duration_s=duration,
        completed=completed,
        failed=None if found.failed is None else source.count("failed", found.failed, least=0),
        ttft=ttft,
        tpot=source.spread(raw, "*_tpot_ms", _MS) if ttft else None,  # without streaming both are of whole requests
        itl=source.spread(raw, "*_itl_ms", _MS),
        e2e=e2e,
        speculative=True if found.spec_decode_num_drafts is not None else None,
        tokens_per_step=_tokens_per_step(source, found),
        acceptance_length=found.spec_decode_acceptance_length,
    )  # fmt: skip
    fields = {
        "tpot": "mean_tpot_ms", "ttft": "mean_ttft_ms", "limit": "max_concurrency",
        "acceptance": "spec_decode_acceptance_length",
    }  # fmt: skip
    return source.check(served, fields)


def _of_latencies(source: Source, found: _Result) -> Spread | None:
    """The mean end-to-end latency, where every request has one: newer versions always write them, in seconds."""
    if not found.latencies or len(found.latencies) != found.completed:
        return None
    for index, latency in enumerate(found.latencies):
        source.positive(f"latencies[{index}]", latency)
    return Spread(math.fsum(found.latencies) / found.completed)


def _rate(source: Source, rate: float | str) -> float:
    if rate in ("inf", math.inf):
        return math.inf
    if isinstance(rate, str):
        raise source.refuse("request_rate", "a number or 'inf'", rate)
    return source.positive("request_rate", rate)


def _parallel(text: str | None) -> Parallel | None:
    """A note of the run in tokenfab's notation; None for one in other words."""
    try:
        return None if text is None else Parallel.parse(text)
    except ValueError:
        return None


def _tokens_per_step(source: Source, found: _Result) -> int | None:
    """Tokens of a verification: its drafts and one."""
    if found.spec_decode_num_drafts is None or found.spec_decode_draft_tokens is None:
        return None
    drafts = source.count("spec_decode_num_drafts", found.spec_decode_num_drafts)
    return 1 + math.ceil(source.count("spec_decode_draft_tokens", found.spec_decode_draft_tokens) / drafts)
