"""What the kernels allow at a record's operating point: its decode step from published tables, and its prefill.

The step holds, per attention group, the sequences that were in flight (rounded up: the fullest group sets the pace), or
as many as fit; context is input + half the output. Tokens per step and those kept are the record's, where it drafts;
the drafting itself is not in it. A prefill pass holds prompts of together ``PASS_TOKENS``, at least one and at most
those in flight, on the pool that prefills. Input tokens are all taken as new: cached prefixes make prefill cheaper.

    decode   $/GPU-h x decode GPUs / (sequences x kept / step_s)
    prefill  $/GPU-h x attention_tp x pass_s / prompts of a pass / output tokens per prompt

Errors: ``ValueError`` saying why there is no such figure: a model, GPU, precision or server that tokenfab has no tables
for, a parallelism that it cannot plan, no concurrency, drafts without an acceptance length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...bench.decode_plan import step_tokens
from ...bench.deployment import Deployment, check_divides
from ...bench.gpus import Gpu, get_gpu
from ...bench.memory import DoesNotFit, check_fits, largest_batch
from ...bench.model_config import ModelConfig
from ...bench.models import load_model
from ...bench.prefill_time import PrefillTime, prefill_time
from ...bench.published import PublishedData
from ...bench.recorded import RecordedData, find_stack
from ...bench.step_time import StepTime, step_time
from ..cost import usd_per_mtok
from ..prices import Price
from ..study import choose_precision
from . import names
from .served import VLLM, Served

PASS_TOKENS = 8192
"""Tokens of a prefill pass per attention group, where prompts are shorter: the order of the servers' own budgets."""

DEFAULT_STACK = {VLLM: "vllm"}
"""The server that a tool without a word on it is made for."""


@dataclass(frozen=True)
class Tables:
    """Where times are from: the stack asked for (None: the record's own server), and its data."""

    data: PublishedData
    recorded: RecordedData
    stack: str | None = None
    load: str = "balanced"


@dataclass(frozen=True)
class Allowed:
    """The kernels' figure.

    Attributes:
        step: the decode step of one replica. sequences: of all replicas, that it holds.
        tokens_per_s: output tokens of all replicas, while they decode.
        prefill: one pass; None where it could not be priced, and the figure is of decode only.
        decode_usd_per_mtok, prefill_usd_per_mtok: per million output tokens, on the GPUs that do it.
        notes: what was assumed.
    """

    step: StepTime
    sequences: float
    tokens_per_s: float
    decode_usd_per_mtok: float
    prefill: PrefillTime | None
    prefill_usd_per_mtok: float | None
    notes: tuple[str, ...]

    @property
    def usd_per_mtok_output(self) -> float:
        return self.decode_usd_per_mtok + (self.prefill_usd_per_mtok or 0.0)

    def coverage(self) -> dict[str, float]:
        """Share of the kernels' dollars by provenance."""
        parts = [(self.decode_usd_per_mtok, self.step.coverage())]
        if self.prefill is not None and self.prefill_usd_per_mtok is not None:
            parts.append((self.prefill_usd_per_mtok, self.prefill.coverage()))
        shares: dict[str, float] = {}
        for usd, of_part in parts:
            for name, share in of_part.items():
                shares[name] = shares.get(name, 0.0) + share * usd / self.usd_per_mtok_output
        return shares


def allowed(served: Served, price: Price, prefill_price: Price, tables: Tables) -> Allowed:
    """What the kernels allow where ``served`` ran.

    Raises:
        ValueError: why there is no such figure.
    """
    model, gpu, stack_name = _model(served), _gpu(served), _stack(served, tables)
    parallel, concurrency = served.parallel, served.concurrency
    if parallel is None:
        raise ValueError(served.parallel_note or "parallel: not said")
    if concurrency is None:
        raise ValueError("concurrency: neither a limit nor latencies to tell it from")
    kept, tokens = _kept(served)
    assert served.precision is not None
    assert served.decode_gpus is not None
    precision = choose_precision(model, names.one_precision(served.precision, model.native_precision), served.kv_format)
    groups = served.decode_gpus // parallel.gpus * parallel.attention_dp
    wanted = math.ceil(concurrency / groups - 1e-6)
    context = max(1, round(served.input_tokens_mean + served.output_tokens_mean / 2))
    deployment = Deployment(
        parallel.gpus, parallel.attention_tp, parallel.expert_parallel, precision, wanted / parallel.attention_tp,
        context, tokens, kept, load=tables.load, exchange="all_gather" if parallel.all_gather else "all_to_all",
    )  # fmt: skip
    check_divides(model, deployment)
    notes = [f"{wanted} sequences per attention group ({served.concurrency_source} {concurrency:.4g} over {groups})"]
    held, deployment = _fitting(model, gpu, deployment, wanted)
    sequences = min(concurrency, held * groups)
    if held < wanted:
        notes.append(f"{held} of them fit by tokenfab's memory estimate; the step holds those")
    stack = find_stack(gpu, stack_name, tables.data, tables.recorded)
    step = step_time(tables.data, model, gpu, stack, deployment)
    rate = sequences * step_tokens(deployment)[1] / step.step_s
    if tokens > 1:
        notes.append(f"verify step of {tokens} tokens, {kept:g} kept; drafting is not in it")
    decode = usd_per_mtok(rate, served.decode_gpus * price.usd_per_gpu_hour)
    prefill, usd = None, None
    try:
        prefill = _prefill(served, model, deployment, tables, stack_name, wanted)
        per_prompt_s = prefill.time_s * prefill.deployment.attention_tp / prefill.sequences
        usd = usd_per_mtok(served.output_tokens_mean / per_prompt_s, prefill_price.usd_per_gpu_hour)
        notes.append(f"prefill passes of {prefill.sequences} x {prefill.new_tokens} new tokens per attention group")
    except ValueError as error:
        notes.append(f"decode only, without prefill: {error}")
    return Allowed(step, sequences, rate, decode, prefill, usd, tuple(notes))


def _prefill(
    served: Served, model: ModelConfig, decode: Deployment, tables: Tables, stack_name: str, in_flight: int
) -> PrefillTime:
    """A pass on the pool that prefills: one pool's own deployment, else the prefill pool's.

    Raises:
        ValueError: that pool is not known or not priced.
    """
    gpu, deployment = _gpu(served), decode
    if served.disaggregated:
        split = served.prefill_parallel
        if split is None:
            raise ValueError("prefill_parallel: the prefill pool's is not said; give --prefill-parallel")
        gpu = gpu if served.prefill_gpu is None else _published(served.prefill_gpu)
        deployment = replace(
            decode, gpus=split.gpus, attention_tp=split.attention_tp, expert_parallel=split.expert_parallel,
            batch_per_gpu=1 / split.attention_tp, exchange="all_gather" if split.all_gather else "all_to_all",
        )  # fmt: skip
    new_tokens = max(1, round(served.input_tokens_mean))
    sequences = max(1, min(in_flight, PASS_TOKENS // new_tokens))
    return prefill_time(
        tables.data, model, gpu, find_stack(gpu, stack_name, tables.data, tables.recorded), deployment,
        new_tokens=new_tokens, sequences=sequences, check_memory=False,
    )  # fmt: skip


def _fitting(model: ModelConfig, gpu: Gpu, deployment: Deployment, wanted: int) -> tuple[int, Deployment]:
    """The deployment with the sequences per group that fit, at most those wanted.

    Raises:
        DoesNotFit: not even one.
    """
    try:
        check_fits(model, gpu, deployment)
    except DoesNotFit:
        held = min(wanted, largest_batch(model, gpu, deployment))
        if held < 1:
            raise
        return held, replace(deployment, batch_per_gpu=held / deployment.attention_tp)
    return wanted, deployment


def _model(served: Served) -> ModelConfig:
    if served.known_model is None:
        said = "the file names no model" if served.model is None else f"{served.model!r} is none that tokenfab ships"
        raise ValueError(f"model: {said}; give --model, a name or the path of its config.json")
    return load_model(served.known_model)


def _gpu(served: Served) -> Gpu:
    assert served.gpu is not None
    return _published(served.gpu)


def _published(name: str) -> Gpu:
    gpu = get_gpu(name)
    if gpu.published_system is None:
        raise ValueError(f"gpu: no published kernel times for {gpu.name}")
    return gpu


def _stack(served: Served, tables: Tables) -> str:
    if tables.stack is not None:
        return tables.stack
    found = names.stack(served.framework) if served.framework else DEFAULT_STACK.get(served.tool)
    if found is None:
        said = "the file names no server" if served.framework is None else f"no tables of {served.framework!r}"
        raise ValueError(f"stack: {said}; give --stack")
    return found


def _kept(served: Served) -> tuple[float, int]:
    """Tokens kept and tokens verified per step."""
    kept, tokens = served.acceptance_length, served.tokens_per_step
    if not served.speculative and kept is None and tokens is None:
        return 1.0, 1
    if kept is None or tokens is None:
        raise ValueError(
            f"tokens_per_step: drafts were used, and the file does not say how many tokens a step verifies and keeps "
            f"(tokens_per_step {tokens}, kept_tokens {kept}); give --tokens-per-step and --kept-tokens"
        )
    return kept, tokens
