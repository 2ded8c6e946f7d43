"""The time of a decode step: the plan's ops, each with a time, its provenance and its floor.

A stack is a published one, or tokenfab's own records, where they have no answer beside the roofline or, if asked, a
published stack's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from .decode_plan import OpCall, decode_plan, merge_mla_block
from .deployment import Deployment
from .gpus import Gpu
from .model_config import ModelConfig
from .ops import MlaAttention
from .published import MODELLED, PublishedData, Stack, Timing, model_timing
from .published_tables import MLA
from .recorded import RecordedStack
from .recorded_asks import plan_asks


@dataclass(frozen=True)
class TimedOp:
    """One op of a step. ``time_s`` and ``floor_s`` are those of all its calls in the step."""

    call: OpCall
    time_s: float
    floor_s: float
    provenance: str
    source: str


@dataclass(frozen=True)
class StepTime:
    """A decode step on one GPU of a deployment, in a stack."""

    model: ModelConfig
    gpu: Gpu
    stack: Stack
    deployment: Deployment
    ops: tuple[TimedOp, ...]

    @property
    def step_s(self) -> float:
        return sum(op.time_s for op in self.ops)

    @property
    def floor_s(self) -> float:
        return sum(op.floor_s for op in self.ops)

    def coverage(self) -> dict[str, float]:
        """Share of the step's time by provenance, of all that the stack can have."""
        total = self.step_s
        shares: dict[str, float] = dict.fromkeys(self.stack.provenances, 0.0)
        for op in self.ops:
            shares[op.provenance] += op.time_s / total
        return shares


def step_time(
    data: PublishedData,
    model: ModelConfig,
    gpu: Gpu,
    stack: Stack,
    deployment: Deployment,
    *,
    check_memory: bool = True,
) -> StepTime:
    """One decode step priced in time, by whatever the stack answers from.

    Raises:
        ValueError: a deployment that does not divide or fit (see ``decode_plan``).
    """
    if isinstance(stack, RecordedStack):
        return recorded_step(data, model, gpu, stack, deployment, check_memory=check_memory)
    return published_step(data, model, gpu, stack, deployment, check_memory=check_memory)


def published_step(
    data: PublishedData,
    model: ModelConfig,
    gpu: Gpu,
    stack: Stack,
    deployment: Deployment,
    *,
    check_memory: bool = True,
) -> StepTime:
    """One decode step priced in time by a stack's published kernels.

    Raises:
        ValueError: a deployment that does not divide or fit (see ``decode_plan``).
    """
    calls = decode_plan(model, gpu, deployment, check_memory=check_memory)
    calls = _as_tabled(data, calls, gpu, stack, deployment)
    timings = {call: data.time(call.op, gpu, stack) for call in calls}
    experts_measured = any(call.name == "experts" and timing.provenance != MODELLED for call, timing in timings.items())
    ops = [
        _timed(call, timing, gpu)
        for call, timing in timings.items()
        if not (experts_measured and call.name == "router_top_k")  # the MoE row contains it
    ]
    return StepTime(model, gpu, stack, deployment, tuple(ops))


def recorded_step(
    data: PublishedData,
    model: ModelConfig,
    gpu: Gpu,
    stack: RecordedStack,
    deployment: Deployment,
    *,
    check_memory: bool = True,
) -> StepTime:
    """One decode step by tokenfab's records; what they have no answer for by ``stack.rest``, or the roofline.

    An MLA block that ``rest`` times only as a whole stays whole where its attention is not recorded.

    Raises:
        ValueError: as ``published_step``.
    """
    asked = plan_asks(model, gpu, deployment, check_memory=check_memory)
    found = {each.call: stack.data.time(each.ask, gpu) if each.ask else None for each in asked}
    planned = tuple(each.call for each in asked if each.only_with is None)
    calls = tuple(each.call for each in asked if each.only_with is None or found[each.only_with])
    if stack.rest is not None and not any(isinstance(call.op, MlaAttention) and found[call] for call in planned):
        tabled = _as_tabled(data, planned, gpu, stack.rest, deployment)
        calls = calls if tabled is planned else tabled
    timings = {call: found.get(call) or _without_record(data, call, gpu, stack.rest) for call in calls}
    experts = any(
        call.name == "experts" and (found.get(call) is not None or timing.provenance != MODELLED)
        for call, timing in timings.items()
    )  # a row of either contains the choice of experts
    ops = [
        _timed(call, timing, gpu) for call, timing in timings.items() if not (experts and call.name == "router_top_k")
    ]
    return StepTime(model, gpu, stack, deployment, tuple(ops))


def _without_record(data: PublishedData, call: OpCall, gpu: Gpu, rest: Stack | None) -> Timing:
    if rest is None:
        return model_timing(call.op, gpu, "no record of a kernel of tokenfab's")
    return data.time(call.op, gpu, rest)


def _timed(call: OpCall, timing: Timing, gpu: Gpu) -> TimedOp:
    return TimedOp(
        call,
        call.calls_per_step * timing.time_s,
        call.calls_per_step * call.op.floor_s(gpu),
        timing.provenance,
        timing.source,
    )


def _as_tabled(
    data: PublishedData, calls: tuple[OpCall, ...], gpu: Gpu, stack: Stack, deployment: Deployment
) -> tuple[OpCall, ...]:
    """MLA blocks merged into one module where the stack's tables time only the whole."""
    attention = next((call.op for call in calls if isinstance(call.op, MlaAttention)), None)
    if attention is None:
        return calls
    if attention.top_k is not None or not data.has_table(gpu, stack, MLA):
        return merge_mla_block(calls, deployment.precision.linear)
    return calls
