"""Deployments that serve a trace, for people and for machines: every figure with its denominator and its limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...bench.model_config import ModelConfig
from ...bench.tables import number, plain_table
from ..sweep import Parallel
from .cheapest import NONE, TOGETHER, Choice, Options, Search
from .demand import Demand
from .deploy import OMITTED, Limits, Served
from .frontier import Frontier

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Answer:
    """What ``tokenfab deploy`` found. ``choices``: the best of every GPU and stack, None where nothing is."""

    model: ModelConfig
    demand: Demand
    limits: Limits
    search: Search
    choices: Sequence[Choice | None]
    best: Choice | None
    frontier: Frontier | None = None

    @property
    def options(self) -> Sequence[Options]:
        return self.search.options


def answer(
    model: ModelConfig, demand: Demand, limits: Limits, search: Search, frontier: Frontier | None = None
) -> Answer:
    """The cheapest of every GPU and stack, and of all."""
    choices = [search.choose(limits, index) for index in range(len(search.options))]
    return Answer(model, demand, limits, search, choices, search.choose(limits), frontier)


# -- in words --------------------------------------------------------------------------------------


def limits_text(limits: Limits) -> str:
    """What users are promised."""
    parts = []
    if limits.min_tokens_per_s_per_user:
        parts.append(f">= {limits.min_tokens_per_s_per_user:g} tokens/s/user")
    if limits.max_ttft_s is not None:
        parts.append(f"time to first token <= {limits.max_ttft_s:g} s for {limits.ttft_percentile:.0%} of requests")
    return ", ".join(parts) or "no limit of latency"


def pools_text(served: Served) -> tuple[str, str]:
    """Prefill and decode, as replicas x parallelism; the batch is in sequences per GPU."""
    one = served.decode.deployment
    decode = f"{served.decode_replicas:g} x {Parallel.of(one)}, batch {number(one.batch_per_gpu)}"
    if not served.is_disaggregated:
        return "in the same pool", decode
    return f"{served.prefill_replicas:g} x {Parallel.of(served.prefill.deployment)}", decode


def saved_lines(choice: Choice) -> list[str]:
    """Which limit binds, and what lifting each would save."""
    saved = ", ".join(f"{name} {share:.1%}" for name, share in choice.saved.items() if share > 0) or "nothing"
    if choice.binding == NONE:
        binds = "no limit binds"
    elif choice.binding == TOGETHER:
        binds = "several limits bind together: lifting one saves nothing, lifting all does"
    else:
        binds = f"{choice.binding} binds"
    return [f"{binds}; lifting one limit, all others kept, would save of the bill: {saved}"]


def failing_text(search: Search, limits: Limits, failing: Sequence[str], only: int | None = None) -> str:
    """Which limits cannot be held, and how far one gets."""
    if not failing:
        return "nothing serves this trace, whatever the limits"
    if list(failing) == [TOGETHER]:
        fails = "several limits fail together; lifting one of them is not enough"
    else:
        fails = f"{' or '.join(failing)} would have to be lifted"
    fastest, least_s = search.reach(limits, only)
    if fastest is None or least_s is None:
        return f"{fails}; nothing fits in memory"
    return (
        f"{fails}; the fastest step that fits gives {fastest:.4g} tokens/s/user, the fastest prefill alone takes "
        f"{least_s:.3g} s at {limits.ttft_percentile:.0%}"
    )


# -- tables ----------------------------------------------------------------------------------------

_COLUMNS = (
    "prefill", "decode", "GPUs", "tok/s/user", "TTFT s", "load", "$/h", "$/M output", "$/M in+out", "modelled",
)  # fmt: skip


def _cells(served: Served) -> tuple[str, ...]:
    load = f"{served.prefill_load:.0%} + {served.decode_load:.0%}"
    return (
        *pools_text(served), f"{served.gpus:g}", f"{served.tokens_per_s_per_user:.1f}", f"{served.ttft_s:.2f}", load,
        number(served.usd_per_hour, 4), number(served.usd_per_mtok_output), number(served.usd_per_mtok_total),
        f"{served.shares.get('modelled', 0.0):.0%}",
    )  # fmt: skip


def deploy_table(found: Answer) -> Table:
    """The cheapest of every GPU and stack, cheapest first; those that cannot last."""
    rows = []

    def place(index: int) -> tuple[float, float]:
        choice = found.choices[index]
        served = choice and choice.served
        return (served.usd_per_hour, -served.tokens_per_s_per_user) if served else (math.inf, 0.0)

    for index in sorted(range(len(found.options)), key=place):
        option, choice = found.options[index], found.choices[index]
        if choice is None:
            rows.append((option.gpu, option.stack, "cannot", *["-"] * (len(_COLUMNS) - 1), "see below"))
        else:
            rows.append((option.gpu, option.stack, *_cells(choice.served), choice.binding))
    return plain_table(
        f"The cheapest of each GPU and stack: {found.model.name} on {found.demand.trace.name}, "
        f"{limits_text(found.limits)}",
        ("gpu", "stack", *_COLUMNS, "binds"), rows, left=4,
    )  # fmt: skip


def frontier_table(found: Answer) -> Table:
    """One row a point: limit, deployment, what binds."""
    assert found.frontier is not None
    rows = [
        (
            f">= {rate:.1f}" if (rate := point.min_tokens_per_s_per_user) else "none",
            point.choice.option.gpu, point.choice.option.stack, *_cells(point.served), point.choice.binding,
            f"{point.choice.saved.get(point.choice.binding, 0.0):.0%}",
        )
        for point in found.frontier.points
    ]  # fmt: skip
    ttft = found.limits.max_ttft_s
    limit = f"TTFT <= {ttft:g} s for {found.limits.ttft_percentile:.0%}" if ttft is not None else "no limit of TTFT"
    return plain_table(
        f"Cost against interactivity (tokens/s/user): {found.model.name} on {found.demand.trace.name}, {limit}",
        ("limit", "gpu", "stack", *_COLUMNS, "binds", "costs"), rows, left=5,
    )  # fmt: skip


def demand_lines(demand: Demand) -> list[str]:
    load = demand.workload
    lines = [
        f"trace: {len(load.arrival_s):,} requests, {load.requests_per_s:.3g}/s; mean input "
        f"{load.input_tokens.mean():,.0f} tokens, {demand.cached_share:.1%} of them cached ({demand.cached}); mean "
        f"output {load.mean_output_tokens:,.0f}; decode at a mean context of {load.context:,}"
    ]
    return lines + [f"trace: {note}" for note in demand.notes]


def deploy_lines(found: Answer) -> list[str]:
    """The overall cheapest, what binds it, and what every figure leaves out."""
    lines, search, limits = demand_lines(found.demand), found.search, found.limits
    if found.best is None:
        lines.append(f"cannot be met: {limits_text(limits)}: {failing_text(search, limits, search.failing(limits))}")
    else:
        lines += _best_lines(found.best)
        served, caches = found.best.served, found.demand.caches
        groups = served.prefill_replicas * served.prefill.deployment.attention_dp or (
            served.decode_replicas * served.decode.deployment.attention_dp
        )
        if caches is not None and caches != groups:
            lines.append(
                f"caches: simulated for {caches} replicas; here {groups:g} attention groups prefill: "
                f"--replicas {groups:g} simulates as many"
            )
        for index, choice in enumerate(found.choices):
            if choice is None:
                why = failing_text(search, limits, search.failing(limits, index), index)
                lines.append(f"cannot: {found.options[index].gpu} {found.options[index].stack}: {why}")
    if found.frontier is not None:
        for each in found.frontier.unmet:
            asked = replace(limits, min_tokens_per_s_per_user=each.min_tokens_per_s_per_user)
            lines.append(f"cannot be met: {limits_text(asked)}: {failing_text(search, asked, each.failing)}")
    choices = [*found.choices, *(point.choice for point in (found.frontier.points if found.frontier else ()))]
    prices = {choice.option.gpu: choice.served.decode.cost.price for choice in choices if choice is not None}
    lines += [f"price: {gpu} ${price.usd_per_gpu_hour:g}/GPU-h, {price.describe()}" for gpu, price in prices.items()]
    lines += [
        "columns: replicas x parallelism; batch in sequences per GPU; load: shares of its pool's time that prefill and "
        "decode take (of one pool they add up); modelled: of busy GPU-time; costs: of the bill, what the limit that "
        "binds costs",
        "not searched: prefill on one GPU or stack and decode on another",
        "left out: " + "; ".join(OMITTED),
    ]
    for option in found.options:
        lines += [f"skipped: {option.gpu} {option.stack}: {reason}" for reason in option.left_out]
    return lines


def _best_lines(best: Choice) -> list[str]:
    served, option = best.served, best.option
    prefill, decode = pools_text(served)
    kinds = ", ".join(f"{share:.0%} {kind}" for kind, share in served.shares.items() if share >= 0.005)
    return [
        f"cheapest: {option.gpu}, {option.stack}: prefill {prefill}; decode {decode}; {served.gpus:g} GPUs, "
        f"${number(served.usd_per_hour, 4)}/h in all, ${number(served.usd_per_mtok_output)}/M output tokens, "
        f"${number(served.usd_per_mtok_total)}/M input and output tokens, every GPU paid",
        *saved_lines(best),
        f"its busy GPU-time: {kinds}; waits and the hand-over of the KV cache are modelled",
    ]


# -- for machines ----------------------------------------------------------------------------------


def _pool_dict(deployment: Any, replicas: float) -> dict[str, Any]:
    return {"parallel": str(Parallel.of(deployment)), "gpus_per_replica": deployment.gpus, "replicas": replicas}


def choice_dict(choice: Choice) -> dict[str, Any]:
    served, one = choice.served, choice.served.decode.deployment
    return {
        "gpu": choice.option.gpu,
        "stack": choice.option.stack,
        "disaggregated": served.is_disaggregated,
        "prefill": _pool_dict(served.prefill.deployment, served.prefill_replicas) if served.is_disaggregated else None,
        "decode": {**_pool_dict(one, served.decode_replicas), "batch_per_gpu": one.batch_per_gpu},
        "gpus": served.gpus,
        "tokens_per_s_per_user": served.tokens_per_s_per_user,
        "ttft_s": served.ttft_s,
        "prefill_load": served.prefill_load,
        "decode_load": served.decode_load,
        "usd_per_gpu_hour": served.decode.cost.price.usd_per_gpu_hour,
        "price_source": served.decode.cost.price.describe(),
        "usd_per_hour": served.usd_per_hour,
        "usd_per_mtok_output": served.usd_per_mtok_output,
        "usd_per_mtok_input_and_output": served.usd_per_mtok_total,
        "provenance": served.shares,
        "binding": choice.binding,
        "saved_by_lifting": choice.saved,
    }


def deploy_document(found: Answer) -> dict[str, Any]:
    load, limits = found.demand.workload, found.limits
    return {
        "schema_version": SCHEMA_VERSION,
        "model": found.model.name,
        "trace": {
            "file": found.demand.trace.name,
            "requests": len(load.arrival_s),
            "requests_per_s": load.requests_per_s,
            "mean_input_tokens": float(load.input_tokens.mean()),
            "cached_share_of_input": found.demand.cached_share,
            "cached_from": found.demand.cached,
            "mean_output_tokens": load.mean_output_tokens,
            "decode_context": load.context,
            "notes": list(found.demand.notes),
        },
        "limits": {
            "min_tokens_per_s_per_user": limits.min_tokens_per_s_per_user,
            "max_ttft_s": limits.max_ttft_s,
            "ttft_percentile": limits.ttft_percentile,
        },
        "cheapest": None if found.best is None else choice_dict(found.best),
        "failing": found.search.failing(limits) if found.best is None else [],
        "by_gpu_and_stack": [
            {"gpu": option.gpu, "stack": option.stack, "failing": found.search.failing(limits, index)}
            if choice is None else choice_dict(choice)
            for index, (option, choice) in enumerate(zip(found.options, found.choices, strict=True))
        ],
        "frontier": None if found.frontier is None else _frontier_dict(found.frontier),
        "omitted": list(OMITTED),
        "skipped": [
            {"gpu": option.gpu, "stack": option.stack, "reason": reason}
            for option in found.options for reason in option.left_out
        ],
    }  # fmt: skip


def _frontier_dict(found: Frontier) -> dict[str, Any]:
    return {
        "points": [
            {"min_tokens_per_s_per_user": point.min_tokens_per_s_per_user, **choice_dict(point.choice)}
            for point in found.points
        ],
        "unmet": [
            {"min_tokens_per_s_per_user": each.min_tokens_per_s_per_user, "failing": list(each.failing)}
            for each in found.unmet
        ],
    }
