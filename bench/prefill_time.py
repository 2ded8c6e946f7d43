"""The time of a prefill pass: the plan's ops, each with a time, its provenance and its floor.

Attention over cached tokens has rows in sparse (DSA) blocks only: a row with so many cached, less the row without. All
other attention over them is given the efficiency (floor / time) that the same attention reaches in the tables over all
the tokens, cached and new, without a cache:

    time(n new over c cached) = floor(n over c) x time(c + n) / floor(c + n)

where time(L) is that of a pass of L new tokens per prompt: of the attention alone where a table has it, else of the
whole attention block. This is always ``modelled``, and the source says of what.

Answers are kept by the ``PublishedData``, so that many passes over the same lengths cost little.
"""

from __future__ import annotations

from dataclasses import dataclass

from .decode_plan import OpCall
from .deployment import Deployment
from .gpus import Gpu
from .model_config import ModelConfig
from .prefill_ops import CachedPart, ContextModule, ContextOp, IndexContext, SparseContext, SparseModule
from .prefill_plan import CACHED, merge_context_block, prefill_plan
from .prefill_tables import scale_attention
from .published import MODELLED, PROVENANCES, PublishedData, Stack, Timing
from .recorded import RecordedStack
from .step_time import TimedOp


@dataclass(frozen=True)
class PrefillTime:
    """One prefill pass on one GPU of a deployment, in a stack; every attention group runs one at the same time.

    ``sequences`` prompts per attention group, each of ``new_tokens`` behind ``cached_tokens``.
    """

    model: ModelConfig
    gpu: Gpu
    stack: Stack
    deployment: Deployment
    new_tokens: int
    cached_tokens: int
    sequences: int
    ops: tuple[TimedOp, ...]

    @property
    def time_s(self) -> float:
        return sum(op.time_s for op in self.ops)

    @property
    def floor_s(self) -> float:
        return sum(op.floor_s for op in self.ops)

    @property
    def cached_s(self) -> float:
        """The part of ``time_s`` that is there for cached tokens alone."""
        return sum(op.time_s for op in self.ops if op.call.name.startswith(CACHED))

    @property
    def new_tokens_per_s_per_gpu(self) -> float:
        """New tokens that the deployment computes per second and GPU; cached ones are not counted."""
        return self.sequences * self.new_tokens / (self.deployment.attention_tp * self.time_s)

    def coverage(self) -> dict[str, float]:
        """Share of the pass's time by provenance, of all that the stack can have."""
        total = self.time_s
        shares: dict[str, float] = dict.fromkeys(self.stack.provenances, 0.0)
        for op in self.ops:
            shares[op.provenance] += op.time_s / total
        return shares


def prefill_time(
    data: PublishedData, model: ModelConfig, gpu: Gpu, stack: Stack, deployment: Deployment, *, new_tokens: int,
    cached_tokens: int = 0, sequences: int = 1, check_memory: bool = True,
) -> PrefillTime:  # fmt: skip
    """One prefill pass priced in time by a stack's published kernels.

    Raises:
        ValueError: what ``prefill_plan`` refuses; the stack ``tokenfab``, whose kernels are for decoding: with the rows
            of another stack for the rest, those are taken.
    """
    if isinstance(stack, RecordedStack):
        if stack.rest is None:
            raise ValueError(f"stack: expected a published one, or {stack.name}+STACK; {stack.name} only decodes")
        stack = stack.rest
    calls = prefill_plan(
        model, gpu, deployment, new_tokens=new_tokens, cached_tokens=cached_tokens, sequences=sequences,
        check_memory=check_memory,
    )  # fmt: skip
    calls = _as_tabled(data, calls, gpu, stack, deployment)
    timings = {call: data.time(call.op, gpu, stack) for call in calls if not _is_over_cached(call)}
    for call in calls:
        if _is_over_cached(call):
            timings[call] = _over_cached(data, call, tuple(timings), gpu, stack)
    experts_measured = any(call.name == "experts" and timing.provenance != MODELLED for call, timing in timings.items())
    ops = tuple(
        TimedOp(
            call, call.calls_per_step * timings[call].time_s, call.calls_per_step * call.op.floor_s(gpu),
            timings[call].provenance, timings[call].source,
        )
        for call in calls
        if not (experts_measured and call.name == "router_top_k")  # the MoE row contains it
    )  # fmt: skip
    return PrefillTime(model, gpu, stack, deployment, new_tokens, cached_tokens, sequences, ops)


def _is_over_cached(call: OpCall) -> bool:
    return isinstance(call.op, ContextOp | CachedPart) and call.op.cached_tokens > 0


def _as_tabled(
    data: PublishedData, calls: tuple[OpCall, ...], gpu: Gpu, stack: Stack, deployment: Deployment
) -> tuple[OpCall, ...]:
    """MLA blocks merged into one module where a table of the stack times the whole, with cached tokens or without."""
    merged = merge_context_block(calls, deployment.precision.linear)
    modules = [call.op for call in merged if isinstance(call.op, ContextModule)]
    if not modules or not data.has_rows(modules[0], gpu, stack):
        return calls
    over = [call for call in merged if _is_over_cached(call) and isinstance(call.op, SparseContext | IndexContext)]
    part = CachedPart(modules[0], tuple(call.op for call in over))
    if not over or _row_less_row(data, part, gpu, stack) is None:
        return merged
    as_one = OpCall(CACHED + "attention", part, over[0].calls_per_step)
    return tuple(as_one if call is over[0] else call for call in merged if call not in over[1:])


def _row_less_row(data: PublishedData, part: CachedPart, gpu: Gpu, stack: Stack) -> Timing | None:
    """The row with cached tokens, less the row without; None where the first is a model, or not above the second."""
    whole, alone = data.time(SparseModule.of(part), gpu, stack), data.time(part.module, gpu, stack)
    if whole.provenance == MODELLED or whole.time_s <= alone.time_s:
        return None
    weaker = max(whole.provenance, alone.provenance, key=PROVENANCES.index)
    return Timing(whole.time_s - alone.time_s, weaker, f"{whole.source}, less the row without cached tokens")


def _over_cached(data: PublishedData, call: OpCall, others: tuple[OpCall, ...], gpu: Gpu, stack: Stack) -> Timing:
    """As the module's docstring says. ``others``: the calls of the pass without cached tokens."""
    op = call.op
    if isinstance(op, CachedPart):
        found = _row_less_row(data, op, gpu, stack)
        assert found is not None  # or it would not be one call
        return found
    assert isinstance(op, ContextOp)
    names = (call.name.removeprefix(CACHED), "attention_module")
    like = next(other.op for other in others if other.name in names and isinstance(other.op, ContextOp | ContextModule))
    length = op.cached_tokens + op.new_tokens
    whole = scale_attention(like, op.batch, length)
    timing = data.time(whole, gpu, stack)
    time_s = op.floor_s(gpu) * timing.time_s / whole.floor_s(gpu)
    return Timing(time_s, MODELLED, f"roofline at the efficiency of {length} new tokens in {timing.source}")
