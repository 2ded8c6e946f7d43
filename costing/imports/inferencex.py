"""Rows of the public benchmark InferenceX (InferenceMAX): ``agg_*.json``, single or collected in a list, or its API's.

Source: SemiAnalysisAI/InferenceX ``utils/process_result.py`` @843c625 (and its history: ``pp``, ``dcp_size``,
``pcp_size`` since @65b8d7f and @af224d6, ``isl`` and ``osl`` since @93e1b3c, ``mtp`` before ``spec_decoding``);
InferenceX-app ``packages/db/src/queries/benchmarks.ts`` and ``etl/benchmark-mapper.ts`` @77ca49a for the API's rows
(``hardware`` for ``hw``, ``spec_method``, metrics in an object of their own, tp and ep as ``decode_*``).

Latencies are seconds (the tool's milliseconds / 1000); ``*_intvty`` = 1 / ``*_tpot``. Rates are per GPU:

    tput_per_gpu         (input + output tokens/s) / all GPUs
    output_tput_per_gpu  output tokens/s / all GPUs; in disaggregated rows / decode GPUs only
    input_tput_per_gpu   input tokens/s / all GPUs; in disaggregated rows / prefill GPUs only

The three are one measurement: the sum over GPUs must agree. ``isl`` and ``osl`` are the lengths asked for. Neither the
run's duration nor its requests, completed or failed, are in a row.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..sweep import Parallel
from . import names
from .checks import Source
from .served import INFERENCEX, Served

MARKERS = (
    "hw", "conc", "framework", "precision", "tput_per_gpu", "infmax_model_prefix", "output_tput_per_gpu",
    "median_intvty",
)  # fmt: skip
API_MARKERS = ("hardware", "metrics", "spec_method", "decode_tp", "conc", "framework")


class _Row(msgspec.Struct, kw_only=True):
    hw: str
    conc: int
    model: str
    framework: str
    precision: str
    isl: int
    osl: int
    tput_per_gpu: float
    output_tput_per_gpu: float
    input_tput_per_gpu: float
    infmax_model_prefix: str | None = None
    image: str | None = None
    spec_decoding: str | None = None
    mtp: str | None = None
    disagg: bool | str | None = None
    is_multinode: bool | str | None = None
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    dcp_size: int | None = None
    pcp_size: int | None = None
    dp_attention: bool | str | None = None
    prefill_hw: str | None = None
    decode_hw: str | None = None
    prefill_tp: int | None = None
    prefill_pp: int | None = None
    prefill_ep: int | None = None
    prefill_dcp_size: int | None = None
    prefill_pcp_size: int | None = None
    prefill_dp_attention: bool | str | None = None
    decode_tp: int | None = None
    decode_pp: int | None = None
    decode_ep: int | None = None
    decode_dcp_size: int | None = None
    decode_pcp_size: int | None = None
    decode_dp_attention: bool | str | None = None
    num_prefill_gpu: int | None = None
    num_decode_gpu: int | None = None


class _Api(msgspec.Struct, kw_only=True):
    hardware: str
    metrics: dict[str, float]
    is_multinode: bool
    spec_method: str
    decode_tp: int
    decode_ep: int
    decode_dp_attention: bool


def flat(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    """A row of the API in the form of the file's rows."""
    api = Source(where).read(raw, _Api)
    row = {name: value for name, value in raw.items() if name not in ("hardware", "metrics", "spec_method")}
    row |= {"hw": api.hardware, "spec_decoding": api.spec_method, **api.metrics}
    if not api.is_multinode:  # num_*_gpu are then tp x ep, no number of GPUs, and not read
        row |= {"tp": api.decode_tp, "ep": api.decode_ep, "dp_attention": api.decode_dp_attention}
    return row


def read(where: str, raw: dict[str, Any]) -> Served:
    """The record of one row.

    Raises:
        ValueError: see ``checks.py``; an agentic row, which has no lengths.
    """
    source = Source(where)
    if "scenario_type" in raw and "isl" not in raw:
        raise source.refuse("isl", "a row of fixed lengths", f"scenario_type {raw['scenario_type']!r} without lengths")
    row = source.read(raw, _Row)
    multinode, disagg = _flag(source, "is_multinode", row.is_multinode), _flag(source, "disagg", row.disagg)
    separate = bool(multinode or disagg)
    prefill, decode = (_separate if separate else _together)(source, row)
    total = prefill + decode if separate else decode
    output_gpus, input_gpus = (decode or total, prefill) if separate else (total, total)
    output_rate = source.positive("output_tput_per_gpu", row.output_tput_per_gpu) * output_gpus
    input_rate = source.positive("input_tput_per_gpu", row.input_tput_per_gpu) * input_gpus
    denominators = f"{output_gpus} decode and {input_gpus} prefill" if separate else f"{total}"
    source.agrees(
        "tput_per_gpu", row.tput_per_gpu, (output_rate + input_rate) / total,
        f"(output + input tokens/s) / {total} GPUs, of output and input per {denominators} GPUs",
    )  # fmt: skip
    pools = separate and decode > 0
    parallel, note = _parallel(source, row, "decode_" if pools else "prefill_" if separate else "")
    hw, prefill_hw = row.decode_hw or row.hw, row.prefill_hw
    served = Served(
        source=where,
        tool=INFERENCEX,
        output_tokens_per_s=output_rate,
        total_tokens_per_s=output_rate + input_rate,
        input_tokens_mean=source.count("isl", row.isl),
        output_tokens_mean=source.count("osl", row.osl),
        model=row.model,
        known_model=_model(row),
        gpu=_gpu(source, "decode_hw" if row.decode_hw else "hw", hw),
        prefill_gpu=_gpu(source, "prefill_hw", prefill_hw) if prefill_hw else None,
        num_gpus=total,
        prefill_gpus=prefill if pools else None,
        aggregated=not pools,
        precision=row.precision.lower(),
        framework=row.framework,
        framework_version=None if row.image is None else row.image.replace("#", "/"),
        parallel=parallel,
        parallel_note=note,
        prefill_parallel=_parallel(source, row, "prefill_")[0] if pools else None,
        concurrency_limit=source.count("conc", row.conc),
        ttft=source.spread(raw, "*_ttft", 1.0),
        tpot=source.spread(raw, "*_tpot", 1.0),
        itl=source.spread(raw, "*_itl", 1.0),
        e2e=source.spread(raw, "*_e2el", 1.0),
        speculative=(row.spec_decoding or row.mtp or "none").lower() not in ("none", "off", "false"),
        stated={
            "tput_per_gpu": row.tput_per_gpu,
            "output_tput_per_gpu": row.output_tput_per_gpu,
            "input_tput_per_gpu": row.input_tput_per_gpu,
        },
    )
    _interactivity(source, raw)
    return source.check(served, {"tpot": "mean_tpot", "ttft": "mean_ttft", "limit": "conc"})


def _interactivity(source: Source, raw: dict[str, Any]) -> None:
    """Each ``*_intvty`` is the reciprocal of its ``*_tpot``: what tells seconds from milliseconds."""
    for key, value in raw.items():
        tpot = raw.get(key.removesuffix("_intvty") + "_tpot")
        if key.endswith("_intvty") and not key.startswith("std") and tpot:
            source.agrees(key, source.number(key, value), 1 / source.number(key, tpot), "1 / tpot in seconds")


def _flag(source: Source, field: str, value: bool | str | None) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise source.refuse(field, "true or false", value)


def _whole(source: Source, field: str, value: int | None) -> int:
    if value is None:
        raise source.refuse(field, "a whole number", None)
    return source.count(field, value)


def _separate(source: Source, row: _Row) -> tuple[int, int]:
    """GPUs of the prefill and the decode pool; no decode GPUs where several nodes make one pool."""
    if row.num_decode_gpu is None:
        raise source.refuse("num_decode_gpu", "a whole number", None)
    prefill = _whole(source, "num_prefill_gpu", row.num_prefill_gpu)
    return prefill, source.count("num_decode_gpu", row.num_decode_gpu, least=0)


def _together(source: Source, row: _Row) -> tuple[int, int]:
    gpus = _whole(source, "tp", row.tp)
    for field in ("pp", "pcp_size"):  # a context-parallel decode (dcp_size) shares the tensor-parallel GPUs
        gpus *= source.count(field, getattr(row, field) or 1)
    return 0, gpus


def _parallel(source: Source, row: _Row, prefix: str) -> tuple[Parallel | None, str | None]:
    """A pool's replica in tokenfab's notation; else why not. Neither where the row does not say."""
    tp, ep = getattr(row, f"{prefix}tp"), getattr(row, f"{prefix}ep")
    attention = _flag(source, f"{prefix}dp_attention", getattr(row, f"{prefix}dp_attention"))
    for field in ("pp", "dcp_size", "pcp_size"):
        ways = getattr(row, f"{prefix}{field}") or 1
        if ways > 1:
            return None, f"{prefix}{field} {ways} is not in tokenfab's plan"
    if not tp or ep is None or attention is None:
        return None, f"parallel: the row of two pools has no {prefix}tp" if prefix and not tp else None
    tp, ep = source.count(f"{prefix}tp", tp), max(1, source.count(f"{prefix}ep", ep, least=0))
    if tp % ep:
        return None, f"{prefix}ep {ep} does not divide {prefix}tp {tp}"
    return (Parallel(1, tp, ep) if attention else Parallel(tp, 1, ep)), None


def _gpu(source: Source, field: str, label: str) -> str:
    gpu = names.gpu_of_runner(label)
    if gpu is None:
        raise source.refuse(field, "a GPU that tokenfab knows", label)
    return gpu


def _model(row: _Row) -> str | None:
    """By its name, else by InferenceX's prefix, which the API's rows have in its place."""
    prefix = row.infmax_model_prefix or row.model
    return names.model(row.model) or names.model_of_prefix(prefix)
