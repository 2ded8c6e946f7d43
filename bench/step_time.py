"""The time of a decode step: the plan's ops, each with a time, its provenance and its floor."""

from __future__ import annotations

from dataclasses import dataclass

from .decode_plan import OpCall, decode_plan, merge_mla_block
from .deployment import Deployment
from .gpus import Gpu
from .model_config import ModelConfig
from .ops import MlaAttention
from .published import MODELLED, PROVENANCES, PublishedData, Stack
from .published_tables import MLA


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
        """Share of the step's time by provenance."""
        total = self.step_s
        shares: dict[str, float] = dict.fromkeys(PROVENANCES, 0.0)
        for op in self.ops:
            shares[op.provenance] += op.time_s / total
        return shares


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
        TimedOp(
            call,
            call.calls_per_step * timing.time_s,
            call.calls_per_step * call.op.floor_s(gpu),
            timing.provenance,
            timing.source,
        )
        for call, timing in timings.items()
        if not (experts_measured and call.name == "router_top_k")  # the MoE row contains it
    ]
    return StepTime(model, gpu, stack, deployment, tuple(ops))


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
