"""The machine-readable result of ``tokenfab step`` and ``tokenfab cost``: one JSON document.

``{"schema_version", "model", "points": [...], "omitted": [...], "skipped": [...]}``. SI units as the
field names say; ``time_s``, ``floor_s``, ``bytes`` and ``flops`` of an op are those of all its calls
in one step on one GPU. ``skipped`` lists what cannot be, and why. ``usd_per_mtok_output_p5`` and ``_p95`` bound 90 % of
what the times' errors make of a price (``levers.intervals``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..bench.decode_plan import OMITTED
from ..bench.model_config import ModelConfig

if TYPE_CHECKING:
    from .cost import OpCost, StepCost
    from .levers.common_draws import CommonDraws
    from .sweep import Skipped

SCHEMA_VERSION = 1


def model_dict(model: ModelConfig) -> dict[str, Any]:
    return {
        "model": model.name,
        "architecture": model.architecture,
        "checkpoint_precision": model.native_precision,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
        "kv_values_per_token": model.kv_values_per_token(),
        "max_context": model.max_context,
    }


def op_dict(op: OpCost) -> dict[str, Any]:
    call, timed = op.timed.call, op.timed
    return {
        "op": call.name,
        "kind": call.op.kind,
        "shape": call.op.shape(),
        "calls_per_step": call.calls_per_step,
        "time_s": timed.time_s,
        "floor_s": timed.floor_s,
        "share": op.share,
        "usd_per_mtok": op.usd_per_mtok,
        "saving_at_floor_usd_per_mtok": op.saving_usd_per_mtok,
        "provenance": timed.provenance,
        "source": timed.source,
        "bytes": call.op.bytes * call.calls_per_step,
        "flops": call.op.flops * call.calls_per_step,
    }


def point_dict(cost: StepCost) -> dict[str, Any]:
    step, deployment, price = cost.step, cost.step.deployment, cost.price
    return {
        "gpu": step.gpu.name,
        "stack": step.stack.name,
        "stack_version": step.stack.version,
        "precision": deployment.precision.name,
        "kv_format": deployment.precision.kv,
        "gpus": deployment.gpus,
        "attention_tp": deployment.attention_tp,
        "attention_dp": deployment.attention_dp,
        "expert_parallel": deployment.expert_parallel,
        "expert_tp": deployment.expert_tp,
        "exchange": deployment.exchange,
        "load": deployment.load,
        "batch_per_gpu": deployment.batch_per_gpu,
        "context": deployment.context,
        "tokens_per_step": deployment.tokens_per_step,
        "kept_tokens_per_step": deployment.kept_tokens_per_step,
        "step_s": step.step_s,
        "floor_s": step.floor_s,
        "tokens_per_s_per_gpu": cost.tokens_per_s_per_gpu,
        "tokens_per_s_per_user": cost.tokens_per_s_per_user,
        "tokens_per_s_per_mw": cost.tokens_per_s_per_mw,
        "joules_per_token": cost.joules_per_token,
        "usd_per_gpu_hour": price.usd_per_gpu_hour,
        "price_source": price.describe(),
        "usd_per_mtok_output": cost.usd_per_mtok_output,
        "coverage": step.coverage(),
        "ops": [op_dict(op) for op in cost.ops()],
    }


def _with_interval(cost: StepCost, draws: CommonDraws | None) -> dict[str, Any]:
    """The point, its interval right after its price."""
    found = point_dict(cost)
    if draws is None:
        return found
    at = draws.at_price(cost)
    rest = {name: found.pop(name) for name in ("coverage", "ops")}
    return found | {"usd_per_mtok_output_p5": at.p5, "usd_per_mtok_output_p95": at.p95} | rest


def document(
    model: str, points: Iterable[StepCost], skipped: Iterable[Skipped] = (), draws: CommonDraws | None = None
) -> dict[str, Any]:
    """``draws``: what the points' intervals are drawn from; without it they have none."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "points": [_with_interval(point, draws) for point in points],
        "omitted": list(OMITTED),
        "skipped": [asdict(row) for row in skipped],
    }
