"""The pools that serve a request, predicted: prefill passes and a decode step, from published kernels.

Prompts shorter than the token budget share a pass, as many as it and the memory hold; a longer prompt is prefilled in
chunks of the budget, each over the cached tokens and the chunks before. The budget is in new tokens per pass and
attention group; activations of a pass must fit the reserve. Of a chunk's time over tokens before it, cached ones bear
their share of these tokens.

One pool (aggregated) prefills and decodes on the same GPUs, at full load by turns: tokens/s/user are the decode step's
times the share of time that prefill leaves. Two pools: the decode step's. First token: the passes of its prompt, and
between two pools the hand-over of its KV cache, without any wait or host time. Units: seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...bench.deployment import Deployment
from ...bench.gpus import GIB
from ...bench.memory import largest_batch
from ...bench.model_config import DenseFfn, GqaAttention, ModelConfig
from ...bench.prefill_time import PrefillTime, prefill_time
from ...bench.recorded import find_stack
from ..cost import StepCost
from ..study import Study, price_step
from ..sweep import Parallel
from .pools import hand_over_s
from .serving import CACHED_INPUT, DECODE, NEW, Pool, Request, Serving

DEFAULT_TOKEN_BUDGET = 8192
"""New tokens per pass and attention group: this tool's choice, in the range that serving stacks use."""


@dataclass(frozen=True)
class PrefillWork:
    """The passes that prefill a prompt; ``passes`` in order, all with as many prompts per attention group."""

    passes: tuple[PrefillTime, ...]
    cached_tokens: int

    @property
    def prompts(self) -> int:
        """Of one pass and attention group."""
        return self.passes[0].sequences

    @property
    def time_s(self) -> float:
        return sum(each.time_s for each in self.passes)

    @property
    def cached_s(self) -> float:
        """The part of ``time_s`` over tokens that were cached before the request."""
        cached = self.cached_tokens
        return sum(each.cached_s * cached / each.cached_tokens for each in self.passes) if cached else 0.0

    @property
    def gpu_s(self) -> float:
        """GPU-seconds of one prompt."""
        return self.time_s * self.passes[0].deployment.attention_tp / self.prompts

    def coverage(self) -> dict[str, float]:
        """Share of the time by provenance."""
        found: dict[str, float] = {}
        for each in self.passes:
            for kind, share in each.coverage().items():
                found[kind] = found.get(kind, 0.0) + share * each.time_s / self.time_s
        return found

    def gpu_s_of(self) -> dict[str, float]:
        share = self.cached_s / self.time_s
        found = {NEW: self.gpu_s * (1 - share)}
        return {**found, CACHED_INPUT: self.gpu_s * share} if self.cached_tokens else found


@dataclass(frozen=True)
class Predicted:
    """A request served, and what its user sees. ``hand_over_s``: modelled; 0 in one pool."""

    serving: Serving
    prefill: PrefillWork
    decode: StepCost
    hand_over_s: float

    @property
    def first_token_s(self) -> float:
        return self.prefill.time_s + self.hand_over_s

    @property
    def tokens_per_s_per_user(self) -> float:
        alone = self.decode.tokens_per_s_per_user
        if self.serving.is_disaggregated:
            return alone
        decode, prefill = self.serving.gpu_s(DECODE), self.serving.gpu_s(NEW, CACHED_INPUT)
        return alone * decode / (decode + prefill)


def prefill_work(study: Study, request: Request, token_budget: int = DEFAULT_TOKEN_BUDGET) -> PrefillWork:
    """How the one GPU, stack and parallelism of ``study`` prefill the request's prompt.

    Raises:
        ValueError: a budget that is not a whole number of tokens; a prompt that cannot be, or does not fit.
    """
    if not (1 <= token_budget < 2**31 and token_budget == int(token_budget)):
        raise ValueError(f"token_budget: expected a whole number of at least 1; got {token_budget}")
    sweep, gpu = study.sweep, study.sweep.gpus[0]
    stack = find_stack(gpu, sweep.stacks[0], study.data, study.recorded)
    parallel = sweep.parallels[0]
    deployment = sweep.deployment(parallel, 1 / parallel.attention_tp)
    most = largest_batch(sweep.model, gpu, replace(deployment, context=request.input_tokens))
    prompts = max(1, min(token_budget // request.new_tokens, most))

    def run(new: int, cached: int) -> PrefillTime:
        return prefill_time(
            study.data, sweep.model, gpu, stack, deployment, new_tokens=new, cached_tokens=cached, sequences=prompts
        )  # raises where not even one prompt fits

    rows = prompts * min(token_budget, request.new_tokens)
    needed, reserve = activation_bytes(sweep.model, deployment, rows), deployment.reserve_bytes
    if needed > reserve:
        raise ValueError(
            f"token_budget: expected passes with activations of at most the reserve's {reserve / GIB:.1f} GiB; {rows} "
            f"tokens need {needed / GIB:.1f} GiB"
        )
    starts = range(0, request.new_tokens, token_budget)
    chunks = [(min(token_budget, request.new_tokens - start), request.cached_tokens + start) for start in starts]
    return PrefillWork(tuple(run(new, cached) for new, cached in chunks), request.cached_tokens)


def activation_bytes(model: ModelConfig, deployment: Deployment, rows: int) -> float:
    """What a pass of so many rows holds at least on one GPU, all in BF16.

    The residual and a block's input, and the widest there is beside them: queries, keys and values; a gated FFN's
    halves and their product; of experts, the rows that reach this rank, before and after its last GEMM.
    """
    tp = deployment.attention_tp
    widest = 0.0
    for layer, _ in model.layers:
        attention, ffn = layer.attention, layer.ffn
        if isinstance(attention, GqaAttention):
            width = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
        else:
            width = attention.num_heads * (2 * attention.nope_dim + attention.rope_dim + attention.v_dim)
        if isinstance(ffn, DenseFfn):
            wide = 3 * ffn.intermediate_size / tp
        else:
            pairs = ffn.top_k * deployment.attention_dp / deployment.expert_parallel
            wide = pairs * (model.hidden_size + ffn.intermediate_size / deployment.expert_tp)
        widest = max(widest, width / tp, wide)
    return rows * (2 * model.hidden_size + widest) * 2.0


def predict(
    decode: Study, prefill: Study | None, request: Request, *, token_budget: int = DEFAULT_TOKEN_BUDGET,
    utilisation: float = 1.0,
) -> Predicted:  # fmt: skip
    """A request served by the pool of ``decode`` alone, or with ``prefill`` of its own: each one GPU, stack, split.

    The decode study's context must be the request's.

    Raises:
        ValueError: what cannot be, does not fit or is out of range; names the field.
    """
    import numpy as np

    if decode.sweep.context != request.context:
        raise ValueError(f"context: expected the request's {request.context}; got {decode.sweep.context}")
    cost = price_step(decode)
    work = prefill_work(prefill or decode, request, token_budget)
    decode_gpu_s = {DECODE: request.output_tokens / cost.tokens_per_s_per_gpu}
    deployment = cost.step.deployment
    decode_pool = Pool(
        "decode", decode_point(cost), deployment.gpus, cost.price.usd_per_gpu_hour, cost.price.describe(),
        decode_gpu_s, cost.step.coverage(),
    )  # fmt: skip
    price = (prefill or decode).price((prefill or decode).sweep.gpus[0])
    prefill_pool = Pool(
        "prefill", prefill_point(work), work.passes[0].deployment.gpus, price.usd_per_gpu_hour, price.describe(),
        work.gpu_s_of(), work.coverage(),
    )  # fmt: skip
    pools = (prefill_pool, decode_pool) if prefill else (_together(prefill_pool, decode_pool),)
    one, handed_over_s = work.passes[0], 0.0
    if prefill:
        handed_over_s = float(hand_over_s(one.model, one.gpu, one.deployment, np.array([request.input_tokens]))[0])
    return Predicted(Serving(request, pools, utilisation), work, cost, handed_over_s)


def _together(prefill: Pool, decode: Pool) -> Pool:
    """One pool that does the work of both."""
    total = prefill.gpu_s + decode.gpu_s
    kinds = dict.fromkeys((*prefill.shares, *decode.shares))
    shares = {
        kind: (prefill.shares.get(kind, 0.0) * prefill.gpu_s + decode.shares.get(kind, 0.0) * decode.gpu_s) / total
        for kind in kinds
    }
    point = f"{prefill.operating_point}; {decode.operating_point}"
    return replace(
        decode, name="prefill and decode", operating_point=point, gpu_s_of={**prefill.gpu_s_of, **decode.gpu_s_of},
        shares=shares,
    )  # fmt: skip


def prefill_point(work: PrefillWork) -> str:
    """Where a pool prefills, in one line."""
    one = work.passes[0]
    chunks = f" in {len(work.passes)} chunks" if len(work.passes) > 1 else ""
    new = sum(each.new_tokens for each in work.passes)
    cached = f" over {work.cached_tokens} cached" if work.cached_tokens else ""
    place = _place(one.model.name, one.gpu.title, str(one.stack), one.deployment)
    prompts = f"{work.prompts} prompt" + ("s" if work.prompts > 1 else "")
    return f"{place}, {prompts} of {new} new tokens{chunks}{cached} per pass and attention group"


def decode_point(cost: StepCost) -> str:
    """Where a pool decodes, in one line."""
    step, deployment = cost.step, cost.step.deployment
    kept = ""
    if deployment.tokens_per_step > 1:
        kept = f", {deployment.kept_tokens_per_step:g} of {deployment.tokens_per_step} tokens kept per step"
    place = _place(step.model.name, step.gpu.title, str(step.stack), deployment)
    return f"{place}, {deployment.batch_per_gpu:g} sequences/GPU x {deployment.context} tokens{kept}"


def _place(model: str, gpu: str, stack: str, deployment: Deployment) -> str:
    split = f"{deployment.describe()} ({Parallel.of(deployment)})"
    return f"{model} on {gpu}, {stack}, {deployment.precision.name}, load {deployment.load}: {split}"
