"""What a decode plan asks of records: each call as the kernel, formats and shape that ``targets.op_shapes`` names.

Quantizers and appends stand for a plan's streaming ops (norms, SwiGLU, RoPE): one launch that also quantizes. Where a
kernel of tokenfab's takes quantized activations that no op before it makes (the output projection), the quantizer is a
call of its own, which published rows of a linear layer contain. Router, LM head, the norms of latents, absorbed
projections, ends and communication ask nothing: there is no kernel of ours. One plan per step of attention is not
counted. Needs no torch.

An expert layer is recorded with all of its group's tokens on the rank; where only those that chose the rank's experts
arrive, the row is an upper estimate, and the answer a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..kernels.formats import get_format
from .decode_plan import OpCall, decode_plan
from .deployment import PRECISIONS, Deployment
from .gpus import GPUS, Gpu
from .model_config import ModelConfig
from .ops import Experts, Gemm, MlaAttention, Op, PagedAttention, Streaming
from .recorded import Ask
from .targets import op_shapes

LOAD_OF = {"balanced": 0, "power_law_1.01": 101, "power_law_1.2": 120}
"""A deployment's load as a record's shape has it."""

QUANTIZE = "_quantize"
"""Ends the name of a call that is in no published plan."""

AXES = {
    "gemm": ("m",), "moe": ("num_tokens",), "attention": ("batch", "length"), "mla": ("batch", "length"),
    "rope_append": ("num_tokens",), "mla_append": ("num_tokens",), "quantize": ("rows",),
    "rms_norm_quantize": ("rows",), "swiglu_quantize": ("rows",),
}  # fmt: skip
"""Sizes to interpolate along; all others of an op's shape must be the same."""

_STANDS_FOR = {"mla_append": "rope_append"}
"""The name in the plan of what ``op_shapes`` places elsewhere."""

_SHAPES = PRECISIONS["fp8"]
"""Shapes do not depend on the precision; ``op_shapes`` knows a linear layer by this one."""

REPLICATED = "an upper estimate: the row ran all of the group's tokens through this rank"


@dataclass(frozen=True)
class Asked:
    """A call and what it asks; ``ask`` None where no kernel of ours does it.

    ``only_with``: the call of the plan without whose record this one is not there.
    """

    call: OpCall
    ask: Ask | None
    only_with: OpCall | None = None


def plan_asks(model: ModelConfig, gpu: Gpu, deployment: Deployment, *, check_memory: bool = True) -> list[Asked]:
    """The calls of one decode step with what they ask, in the plan's order.

    Raises:
        ValueError: as ``decode_plan``.
    """
    calls = decode_plan(model, gpu, deployment, check_memory=check_memory)
    twins = decode_plan(model, GPUS["h100"], replace(deployment, precision=_SHAPES), check_memory=False)
    placed = list(_placed(calls, twins, model, deployment))
    streams: dict[str, set[tuple[str, tuple[tuple[str, int], ...]]]] = defaultdict(set)
    for call, op, fields, place in placed:
        if place != call.name:
            streams[_STANDS_FOR.get(place, place)].add((op, fields))
    asked = []
    for call in calls:
        own = [(op, fields) for other, op, fields, place in placed if other is call and place == call.name]
        if not own and isinstance(call.op, Streaming) and len(streams[call.name]) == 1:
            own = list(streams[call.name])
        quantizers = [each for each in own if each[0] == "quantize"]
        shapes = [each for each in own if each[0] != "quantize"]
        asked.append(Asked(call, _ask(*shapes[0], call.op, deployment) if shapes else None))
        for op, fields in quantizers:
            extra = _quantizer(call, dict(fields), deployment)
            if extra is not None:
                asked.append(Asked(extra, _ask(op, fields, extra.op, deployment), call))
    return asked


def _placed(
    calls: tuple[OpCall, ...], twins: tuple[OpCall, ...], model: ModelConfig, deployment: Deployment
) -> Iterator[tuple[OpCall, str, tuple[tuple[str, int], ...], str]]:
    """(call, op, fields, place) of all that the registry has kernels for."""
    for call, twin in zip(calls, twins, strict=True):
        assert call.name == twin.name
        if isinstance(call.op, Experts):
            op = call.op
            sizes = {"num_tokens": op.num_tokens, "hidden": op.hidden, "inter": op.inter // op.tp, "top_k": op.top_k}
            sizes |= {"num_experts": op.num_experts, "ep": op.ep, "load": LOAD_OF[op.load]}
            yield call, op.kind, tuple(sizes.items()), call.name
        else:
            for op, fields, place in op_shapes(twin, model, deployment.rows):
                yield call, op, fields, place


def _quantizer(call: OpCall, shape: dict[str, int], deployment: Deployment) -> OpCall | None:
    """The launch that makes the activations of a linear layer; None where they stay BF16."""
    format = get_format(deployment.precision.linear_activation)
    if format.name == "bf16":
        return None
    num_bytes = shape["rows"] * shape["columns"] * (2.0 + format.bytes_per_value)
    return OpCall(call.name + QUANTIZE, Streaming(num_bytes), call.calls_per_step, call.block)


def _ask(op: str, fields: tuple[tuple[str, int], ...], plan_op: Op, deployment: Deployment) -> Ask | None:
    formats = _formats(op, plan_op, deployment)
    if formats == {"activation": "bf16"}:  # a quantizer that need not quantize
        return None
    names = AXES[op]
    fixed = tuple((name, value) for name, value in fields if name not in names)
    axes = tuple((name, dict(fields)[name]) for name in names)
    dispatched = isinstance(plan_op, Experts) and plan_op.dispatched and plan_op.ep > 1
    return Ask(op, tuple(formats.items()), fixed, axes, _floor(plan_op, axes), REPLICATED if dispatched else "")


def _formats(op: str, plan_op: Op, deployment: Deployment) -> dict[str, str]:
    if isinstance(plan_op, Gemm | Experts):
        return {"weight": plan_op.weight, "activation": plan_op.activation}
    if isinstance(plan_op, PagedAttention | MlaAttention):
        return {"weight": plan_op.kv_format, "activation": "bf16"}
    precision = deployment.precision
    return {"activation": precision.kv if op in ("rope_append", "mla_append") else precision.linear_activation}


def _floor(plan_op: Op, axes: tuple[tuple[str, int], ...]) -> Callable[[Gpu, tuple[float, ...]], float]:
    """The plan's roofline at other sizes; a streaming op's bytes go with its rows."""

    def floor_s(gpu: Gpu, at: tuple[float, ...]) -> float:
        if isinstance(plan_op, Streaming):
            return Streaming(plan_op.num_bytes * at[0] / axes[0][1]).floor_s(gpu)
        sizes: dict[str, Any] = {name: value for (name, _), value in zip(axes, at, strict=True)}
        return replace(plan_op, **sizes).floor_s(gpu)

    return floor_s
