"""The record of one serving benchmark, whichever tool wrote it: what was served, by what, how fast.

Units are in the names: seconds, tokens, tokens per second over all GPUs. ``None``: the file says nothing; missing
telemetry is not zero. Figures of a file are checked when they are read (see ``checks.py``); here is what is common.

    input tokens/s  = total - output tokens/s
    mean in flight  = requests/s x mean end-to-end latency            (Little's law; measured where the tool says it)

What a tool does not write (GPU, number of GPUs, precision, parallelism) is given by the user: ``completed_by``. A value
that the file has and the user contradicts is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from ..sweep import Parallel
from . import names

VLLM, SGLANG, TRTLLM, AIPERF, INFERENCEX = TOOLS = (
    "vllm bench serve", "sglang bench_serving", "trtllm-bench", "aiperf", "inferencex",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """A latency over requests, in seconds. ``percentiles_s``: 0 is the least, 100 the greatest."""

    mean_s: float | None = None
    percentiles_s: Mapping[float, float] = field(default_factory=dict)

    @property
    def median_s(self) -> float | None:
        return self.percentiles_s.get(50.0)


@dataclass(frozen=True)
class Served:
    """One result.

    Attributes:
        source: the file, with line or index where it holds several; tool: one of ``TOOLS``.
        model: as the file names it; known_model: the shipped model of that name.
        gpu: what decodes; prefill_gpu: what prefills where that differs. num_gpus: all, of all replicas.
        prefill_gpus: of those, the ones that only prefill; None where one pool does both, or nothing is said.
        aggregated: the file says that one pool does both.
        precision: the file's word for it; kv_format: bf16 or fp8.
        parallel: of one replica (of the decode pool); parallel_note: why it cannot be written so.
        prefill_parallel: of one replica of the prefill pool.
        concurrency_limit: requests in flight at most; mean_in_flight: on average, measured; estimated_in_flight: from
            mean TTFT and TPOT.
        request_rate_per_s: offered; infinite where all requests are offered at once.
        tokens_per_step, acceptance_length: tokens verified and kept per decode step, where drafts are used.
        stated: rates per GPU in the source's own convention, by the source's field names.
    """

    source: str
    tool: str
    output_tokens_per_s: float
    total_tokens_per_s: float
    input_tokens_mean: float
    output_tokens_mean: float
    tool_version: str | None = None
    model: str | None = None
    known_model: str | None = None
    gpu: str | None = None
    prefill_gpu: str | None = None
    num_gpus: int | None = None
    prefill_gpus: int | None = None
    precision: str | None = None
    kv_format: str | None = None
    framework: str | None = None
    framework_version: str | None = None
    parallel: Parallel | None = None
    parallel_note: str | None = None
    prefill_parallel: Parallel | None = None
    concurrency_limit: float | None = None
    mean_in_flight: float | None = None
    estimated_in_flight: float | None = None
    request_rate_per_s: float | None = None
    duration_s: float | None = None
    completed: int | None = None
    failed: int | None = None
    ttft: Spread | None = None
    tpot: Spread | None = None
    itl: Spread | None = None
    e2e: Spread | None = None
    aggregated: bool = False
    speculative: bool | None = None
    tokens_per_step: int | None = None
    acceptance_length: float | None = None
    stated: Mapping[str, float] = field(default_factory=dict)

    @property
    def input_tokens_per_s(self) -> float:
        return self.total_tokens_per_s - self.output_tokens_per_s

    @property
    def concurrency(self) -> float | None:
        """Requests in flight: measured where the file has it, else the limit that an unlimited load kept to."""
        if self.mean_in_flight is not None:
            return self.mean_in_flight
        return self.concurrency_limit if self._keeps_to_limit else self.estimated_in_flight

    @property
    def concurrency_source(self) -> str:
        if self.mean_in_flight is not None:
            return "measured mean in flight"
        return "stated limit" if self._keeps_to_limit else "in flight by request rate, TTFT and TPOT:"

    @property
    def _keeps_to_limit(self) -> bool:
        """Whether the limit is what was in flight: not where requests came at a rate that may never reach it."""
        if self.concurrency_limit is None:
            return False
        return self.request_rate_per_s in (None, math.inf) or self.estimated_in_flight is None

    @property
    def decode_gpus(self) -> int | None:
        if self.num_gpus is None:
            return None
        return self.num_gpus - (self.prefill_gpus or 0)

    @property
    def disaggregated(self) -> bool:
        return self.prefill_gpus is not None


@dataclass(frozen=True)
class Given:
    """What the user says of the files. ``None``: nothing."""

    model: str | None = None
    gpu: str | None = None
    num_gpus: int | None = None
    prefill_gpus: int | None = None
    parallel: Parallel | None = None
    prefill_parallel: Parallel | None = None
    precision: str | None = None
    kv_format: str | None = None
    tokens_per_step: int | None = None
    kept_tokens: float | None = None


OPTIONS = {item.name: f"--{item.name.replace('_', '-')}" for item in fields(Given)}


def completed_by(served: Served, given: Given, *, kernels: bool = True) -> Served:
    """The record with what the user gave for what the file does not say.

    ``kernels``: also ask for what only the kernels' figure needs: precision and parallelism.

    Raises:
        ValueError: what nobody said, with the option that says it; a file and an option that contradict each other.
    """

    def conflict(option: str, of_file: object, of_user: object) -> ValueError:
        return ValueError(f"{served.source}: {option}: the file says {of_file}; {OPTIONS[option]} says {of_user}")

    def merged(option: str, of_file: object, of_user: object) -> object:
        if None not in (of_file, of_user) and of_file != of_user:
            raise conflict(option, of_file, of_user)
        return of_user if of_file is None else of_file

    gpu = names.gpu(given.gpu) if given.gpu is not None else None
    if given.model is not None and not names.is_path(given.model):
        wanted = names.shipped(given.model)
        if served.known_model not in (None, wanted):
            raise conflict("model", f"{served.model} ({served.known_model})", given.model)
    if given.precision is not None:
        wanted, allowed = names.precision(given.precision), names.precisions_of(served.precision)
        if allowed and wanted not in allowed:
            raise conflict("precision", served.precision, given.precision)
    for option in ("parallel", "prefill_parallel"):
        of_file, of_user = getattr(served, option), getattr(given, option)
        if None not in (of_file, of_user) and replace(of_user, all_gather=False) != of_file:
            raise conflict(option, of_file, of_user)  # no file says how tokens reach the experts
    if served.aggregated and given.prefill_gpus is not None:
        raise conflict("prefill_gpus", "that one pool does both", given.prefill_gpus)
    changes = {
        "known_model": given.model or served.known_model,
        "gpu": merged("gpu", served.gpu, gpu),
        "num_gpus": merged("num_gpus", served.num_gpus, given.num_gpus),
        "prefill_gpus": merged("prefill_gpus", served.prefill_gpus, given.prefill_gpus),
        "parallel": given.parallel or served.parallel,
        "prefill_parallel": given.prefill_parallel or served.prefill_parallel,
        "precision": given.precision or served.precision,
        "kv_format": merged("kv_format", served.kv_format, given.kv_format),
        "tokens_per_step": merged("tokens_per_step", served.tokens_per_step, given.tokens_per_step),
        "acceptance_length": merged("kept_tokens", served.acceptance_length, given.kept_tokens),
    }
    whole = replace(served, **changes)
    needed = ["gpu", "num_gpus"]
    if kernels:
        needed += ["precision"] + ["parallel"] * (served.parallel_note is None)
    for option in needed:
        if getattr(whole, option) is None:
            raise ValueError(f"{served.source}: {option}: the file does not say; give {OPTIONS[option]}")
    if given.tokens_per_step is not None and given.tokens_per_step < 1:
        raise ValueError(f"tokens_per_step: expected at least 1; got {given.tokens_per_step}")
    if given.kept_tokens is not None and not 1 <= given.kept_tokens < math.inf:
        raise ValueError(f"kept_tokens: expected 1 or more: the acceptance length; got {given.kept_tokens}")
    assert whole.num_gpus is not None
    if whole.num_gpus < 1:
        raise ValueError(f"{served.source}: num_gpus: expected at least 1; got {whole.num_gpus}")
    if whole.prefill_gpus is not None and not 0 < whole.prefill_gpus < whole.num_gpus:
        raise ValueError(
            f"{served.source}: prefill_gpus: expected more than 0 and less than all {whole.num_gpus} GPUs; "
            f"got {whole.prefill_gpus}"
        )
    if whole.prefill_parallel is not None and whole.prefill_gpus is None:
        raise ValueError(f"{served.source}: prefill_gpus: expected it with --prefill-parallel; give --prefill-gpus")
    pools = (("parallel", whole.decode_gpus, "decode"), ("prefill_parallel", whole.prefill_gpus, "prefill"))
    for option, gpus, what in pools:
        split = getattr(whole, option)
        if split is not None and gpus is not None and gpus % split.gpus:
            raise ValueError(
                f"{served.source}: {option}: expected its {split.gpus} GPUs ({split}) to divide the {gpus} that {what}"
            )
    return whole
