"""The cost of a request for people, as a table and lines, and for machines, as one document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...bench.tables import number, plain_table
from ..document import point_dict
from ..sweep import Parallel
from .request_pools import Predicted
from .serving import DECODE, PURPOSES, Bill, Fleet, Paid, Serving

if TYPE_CHECKING:
    from rich.table import Table

    from ...bench.prefill_time import PrefillTime

SCHEMA_VERSION = 1

OMITTED = (
    "launch gaps between kernels, scheduler and other host time",
    "waiting for a pass or for a place in the batch; memory and links that a cache of prefixes takes",
    "imbalance between prompts of one pass and between expert-parallel ranks beyond the load named in the deployment",
    "overlap: communication is added, never hidden behind compute",
    "a batch that is not full; spare GPUs for failures",
)
"""What a request's bill and times do not contain, shown beside them."""

OF_TOKENS = {
    "usd_per_mtok_output": "million output tokens, all GPUs paid",
    "usd_per_mtok_total": "million tokens of input and output, all GPUs paid",
    "usd_per_mtok_input": "million input tokens, cached or not: prefill's part",
    "usd_per_mtok_input_new": "million new input tokens: their prefill",
    "usd_per_mtok_input_cached": "million cached input tokens: reading them",
}
"""Every denominator of a bill that hides nothing, in words."""

DECODE_ONLY = "million output tokens, decode GPUs only"


def _of_hundred(serving: Serving) -> str:
    ratio = serving.prefill_gpus_per_decode_gpu
    prefill = ratio / (1 + ratio)
    kind = "of GPUs" if serving.is_disaggregated else "of the pool's time"
    return f"{prefill:.1%} {kind} prefill, {1 - prefill:.1%} decode"


def _title(serving: Serving) -> str:
    request = serving.request
    cached = f" ({request.cached_tokens:,} of them cached)" if request.cached_tokens else ""
    how = "a prefill pool and a decode pool" if serving.is_disaggregated else "one pool"
    return f"{request.input_tokens:,} input tokens{cached} and {request.output_tokens:,} output tokens, {how}"


def _dollars(usd: float) -> str:
    return f"{usd:,.2f}" if usd >= 100 else f"{usd:.4g}"


def request_table(serving: Serving, bill: Bill) -> Table:
    request = serving.request
    rows = []
    for purpose in PURPOSES:
        tokens, usd = request.tokens_of(purpose), bill.usd_of[purpose]
        if tokens:
            rows.append(
                (
                    purpose, f"{tokens:,}", number(serving.gpu_s(purpose), 4), _dollars(usd),
                    f"{bill.share(purpose):.1%}", number(usd / tokens * 1e6, 4),
                )
            )  # fmt: skip
    total = request.total_tokens
    rows.append(
        (
            "total, all GPUs", f"{total:,}", number(serving.gpu_s(*PURPOSES), 4), _dollars(bill.usd), "100.0%",
            number(bill.usd_per_mtok_total, 4),
        )
    )  # fmt: skip
    columns = ("what for", "tokens", "busy GPU-s", "$", "share of $", "$/M of these tokens")
    return plain_table(_title(serving), columns, rows)


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.0%} {kind}" for kind, share in shares.items())


def request_lines(
    serving: Serving, bill: Bill, predicted: Predicted | None = None, fleet: Fleet | None = None,
    paid: Paid | None = None,
) -> list[str]:  # fmt: skip
    lines = [
        f"{pool.name}: {pool.operating_point}; ${pool.usd_per_gpu_hour:g}/GPU-h ({pool.price_source}); of the time, "
        f"{_shares(pool.shares)}"
        for pool in serving.pools
    ]
    balance = "in balance: " if serving.is_disaggregated else ""
    ratio = f"{serving.prefill_gpus_per_decode_gpu:.3g} prefill GPUs per decode GPU; " if balance else ""
    busy = f"; busy {serving.utilisation:.0%} of the time that is paid" if paid is None else ""
    lines.append(f"{balance}{ratio}{_of_hundred(serving)}{busy}")
    cached = ", cached ones counted" if serving.request.cached_tokens else ""
    lines.append(
        f"while at it: {serving.input_tokens_per_s_per_gpu:,.0f} input tokens/s/GPU{cached}, "
        f"{serving.output_tokens_per_s_per_gpu:,.0f} output tokens/s/GPU"
    )
    for name, words in OF_TOKENS.items():
        value = getattr(bill, name)
        if value is not None:
            lines.append(f"${number(value, 4)} per {words}")
    lines.append(
        f"beside it: ${number(bill.usd_per_mtok_output_decode_gpus_only, 4)} per {DECODE_ONLY}, which omits "
        f"{1 - bill.share(DECODE):.0%} of the bill"
    )
    if predicted is not None:
        hand_over = f" ({predicted.hand_over_s:.2g} s of it hand-over of the KV cache, modelled)"
        lines.append(
            f"user: first token {predicted.first_token_s:.3g} s after its prefill begins"
            f"{hand_over if predicted.hand_over_s else ''}, then {predicted.tokens_per_s_per_user:.1f} tokens/s/user"
        )
    if fleet is not None:
        parts = ", ".join(
            f"{count} x {number(fleet.gpus[name] / count, 4)} GPUs to {name}" for name, count in fleet.replicas.items()
        )
        lines.append(
            f"fleet: {parts}; ${fleet.usd_per_hour:,.2f} per hour, ${fleet.bill.usd:.4g} per request and "
            f"${number(fleet.bill.usd_per_mtok_output, 4)} per million output tokens with the GPUs that idle"
        )
    if paid:
        lines.append(
            f"paid: {paid.gpus:,g} GPUs x {paid.hours:g} hours = {paid.gpu_hours:,.0f} GPU-hours, shared out as the "
            f"rates say, which ask for {paid.work_gpu_hours:,.0f}"
        )
    return [*lines, "left out: " + "; ".join(OMITTED)] if predicted else lines


def _pass_dict(each: PrefillTime) -> dict[str, Any]:
    deployment = each.deployment
    return {
        "gpu": each.gpu.name, "stack": each.stack.name, "stack_version": each.stack.version,
        "precision": deployment.precision.name, "parallel": str(Parallel.of(deployment)), "gpus": deployment.gpus,
        "new_tokens": each.new_tokens, "cached_tokens": each.cached_tokens, "prompts": each.sequences,
        "time_s": each.time_s, "cached_s": each.cached_s, "floor_s": each.floor_s, "coverage": each.coverage(),
    }  # fmt: skip


def _bill_dict(bill: Bill) -> dict[str, Any]:
    return {
        "usd": bill.usd,
        "usd_of": bill.usd_of,
        "share_of": {purpose: bill.share(purpose) for purpose in PURPOSES},
        **{name: getattr(bill, name) for name in OF_TOKENS},
        "usd_per_mtok_output_decode_gpus_only": bill.usd_per_mtok_output_decode_gpus_only,
    }


def request_document(
    serving: Serving, bill: Bill, predicted: Predicted | None = None, fleet: Fleet | None = None,
    paid: Paid | None = None,
) -> dict[str, Any]:  # fmt: skip
    """SI units as the field names say. ``bill``: of one request, or of what was paid for all of it."""
    request = serving.request
    pools = [
        {
            "pool": pool.name, "operating_point": pool.operating_point, "replica_gpus": pool.replica_gpus,
            "usd_per_gpu_hour": pool.usd_per_gpu_hour, "price_source": pool.price_source,
            "gpu_s_of": pool.gpu_s_of, "coverage": pool.shares,
        }
        for pool in serving.pools
    ]  # fmt: skip
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "input_tokens": request.input_tokens,
        "cached_tokens": request.cached_tokens,
        "output_tokens": request.output_tokens,
        "is_disaggregated": serving.is_disaggregated,
        "utilisation": serving.utilisation if paid is None else None,
        "input_tokens_per_s_per_gpu": serving.input_tokens_per_s_per_gpu,
        "output_tokens_per_s_per_gpu": serving.output_tokens_per_s_per_gpu,
        "prefill_gpus_per_decode_gpu": serving.prefill_gpus_per_decode_gpu,
        "pools": pools,
        "coverage_of_usd": serving.shares,
        **_bill_dict(bill),
        "denominators": {**OF_TOKENS, "usd_per_mtok_output_decode_gpus_only": DECODE_ONLY},
        "omitted": list(OMITTED),
    }
    if predicted is not None:
        found |= {
            "model": predicted.decode.step.model.name,
            "first_token_s": predicted.first_token_s,
            "hand_over_s": predicted.hand_over_s,
            "tokens_per_s_per_user": predicted.tokens_per_s_per_user,
            "prefill_passes": [_pass_dict(each) for each in predicted.prefill.passes],
            "decode_step": {key: value for key, value in point_dict(predicted.decode).items() if key != "ops"},
        }
    if paid is not None:
        found["paid"] = {
            "gpus": paid.gpus, "hours": paid.hours, "gpu_hours": paid.gpu_hours,
            "gpu_hours_of_the_rates": paid.work_gpu_hours,
        }  # fmt: skip
    if fleet is not None:
        found["fleet"] = {
            "replicas": fleet.replicas, "gpus": fleet.gpus, "usd_per_hour": fleet.usd_per_hour,
            **_bill_dict(fleet.bill),
        }  # fmt: skip
    return found
