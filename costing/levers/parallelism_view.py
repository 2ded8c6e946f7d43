"""Tables, lines and JSON of a search over splits and of what a scale-up domain is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...bench.decode_plan import OMITTED
from ...bench.domain import native
from ...bench.gpus import Gpu
from ...bench.tables import number, plain_table
from ..cost import StepCost
from ..document import SCHEMA_VERSION
from ..sweep import Parallel
from .parallelism import DomainWorth, Scale

if TYPE_CHECKING:
    from rich.table import Table

DENOMINATOR = "output tokens of decode GPUs"
OTHER_RATES = (10.0, 20.0, 50.0, 100.0)
"""Tokens/s/user that the tables show beside the asked one."""


def rates(min_rate: float) -> list[float]:
    """The asked interactivity among the shown ones."""
    return sorted({min_rate, *OTHER_RATES})


def _title(found: Scale) -> str:
    sweep = found.sweep
    return f"{sweep.model.name}, {sweep.precision.name}, {sweep.context} tokens of context, {sweep.load} expert load"


def _point(cost: StepCost) -> tuple[str, ...]:
    deployment, shares = cost.step.deployment, cost.step.coverage()
    return (
        str(Parallel.of(deployment)),
        str(cost.step.stack),
        f"{deployment.batch_per_gpu:g}",
        f"{cost.tokens_per_s_per_gpu:,.0f}",
        f"{cost.tokens_per_s_per_user:.1f}",
        number(cost.usd_per_mtok_output),
        "/".join(f"{share:.0%}" for share in shares.values()),
    )


_POINT = ("split", "stack", "batch/GPU", "tok/s/GPU", "tok/s/user", "$/M output", "meas/interp/model")


def _own(found: Scale) -> list[Gpu]:
    """The GPUs in their own domains."""
    return [gpu for gpu in found.sweep.gpus if gpu == native(gpu)]


def counts_table(found: Scale, min_rate: float, max_modelled: float) -> Table:
    """For every GPU and number of GPUs: the cheapest point that is fast enough."""
    rows = []
    for gpu in _own(found):
        for gpus in found.counts(gpu.name):
            best = found.best(gpu.name, min_rate, max_modelled, gpus)
            rows.append((gpu.name, gpus, *(_point(best) if best else ("none so fast", *("-",) * (len(_POINT) - 1)))))
    title = f"{_title(found)}: cheapest at >= {min_rate:g} tokens/s/user by number of GPUs"
    table = plain_table(title, ("gpu", "GPUs", *_POINT), rows)
    for column in table.columns[2:4]:
        column.justify = "left"
    return table


def pareto_table(found: Scale, min_rate: float, max_modelled: float) -> Table:
    """The frontier of every number of GPUs, read off at several interactivities."""
    shown = rates(min_rate)
    rows = []
    for gpu in _own(found):
        for gpus in found.counts(gpu.name):
            curve = found.pareto(gpu.name, gpus, max_modelled)
            fast = [[point for point in curve if point.tokens_per_s_per_user >= rate] for rate in shown]
            prices = [number(min((p.usd_per_mtok_output for p in points), default=None)) for points in fast]
            most = f"{max((point.tokens_per_s_per_user for point in curve), default=0):.1f}" if curve else "-"
            rows.append((gpu.name, gpus, len(curve), *prices, most))
    title = f"{_title(found)}: Pareto frontier by number of GPUs, $/M output at >= so many tokens/s/user"
    return plain_table(title, ("gpu", "GPUs", "points", *(f"{rate:g}" for rate in shown), "fastest tok/s/user"), rows)


def domain_table(found: Scale, worths: Sequence[DomainWorth]) -> Table:
    """The cheapest point at each interactivity by size of the scale-up domain."""
    rows = []
    for worth in worths:
        for domain, cost in worth.by_domain.items():
            own = " (own)" if domain == worth.gpu.scale_up_gpus else ""
            factor = worth.worth(domain)
            rows.append(
                (
                    worth.gpu.name, f"{worth.min_tokens_per_s_per_user:g}", f"{domain}{own}",
                    "-" if cost is None else cost.step.deployment.gpus,
                    *(_point(cost) if cost else ("none so fast", *("-",) * (len(_POINT) - 1))),
                    "-" if factor is None else f"{factor:.2f}x",
                )
            )  # fmt: skip
    title = f"{_title(found)}: the same GPU at the same $/GPU-h in another scale-up domain"
    columns = ("gpu", ">= tok/s/user", "domain", "GPUs", *_POINT, "$/M to own domain's")
    table = plain_table(title, columns, rows)
    for column in table.columns[4:6]:
        column.justify = "left"
    return table


def scale_lines(found: Scale, max_modelled: float) -> list[str]:
    splits = len({Parallel.of(point.step.deployment) for point in found.points})
    lines = [f"{len(found.points):,} points over {splits} splits; $/M are per million {DENOMINATOR}"]
    unranked = sum(point.step.coverage()["modelled"] > max_modelled for point in found.points)
    if unranked:
        lines.append(
            f"not ranked by number of GPUs: {unranked:,} points with more than {max_modelled:.0%} of their time "
            "modelled; the comparison of domains ranks all"
        )
    if len(found.sweep.gpus) > len(_own(found)):
        lines.append("links that a domain's size changes are modelled: bytes at the other link's rate, not its latency")
    if found.no_split:
        lines.append(
            f"no split of {found.sweep.model.name} over {', '.join(map(str, found.no_split))} GPUs, experts held once"
        )
    lines += [f"price: {source}" for source in dict.fromkeys(_prices(found))]
    return [*lines, "left out: " + "; ".join(OMITTED)]


def _prices(found: Scale) -> list[str]:
    return [f"{p.price.gpu} ${p.price.usd_per_gpu_hour:g}/GPU-h, {p.price.describe()}" for p in found.points]


def _dict(cost: StepCost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    step, deployment = cost.step, cost.step.deployment
    return {
        "gpu": step.gpu.name,
        "scale_up_gpus": step.gpu.scale_up_gpus,
        "stack": str(step.stack),
        "split": str(Parallel.of(deployment)),
        "gpus": deployment.gpus,
        "attention_tp": deployment.attention_tp,
        "attention_dp": deployment.attention_dp,
        "expert_parallel": deployment.expert_parallel,
        "expert_tp": deployment.expert_tp,
        "exchange": deployment.exchange,
        "batch_per_gpu": deployment.batch_per_gpu,
        "step_s": step.step_s,
        "tokens_per_s_per_gpu": cost.tokens_per_s_per_gpu,
        "tokens_per_s_per_user": cost.tokens_per_s_per_user,
        "usd_per_gpu_hour": cost.price.usd_per_gpu_hour,
        "price_source": cost.price.describe(),
        "usd_per_mtok_output": cost.usd_per_mtok_output,
        "coverage": step.coverage(),
    }


def scale_document(found: Scale, worths: Sequence[DomainWorth], min_rate: float, max_modelled: float) -> dict[str, Any]:
    """``best`` and ``pareto`` by GPU and number of GPUs, ``domain_worth`` by GPU and interactivity."""
    sweep = found.sweep
    places = [(gpu.name, gpus) for gpu in _own(found) for gpus in found.counts(gpu.name)]
    return {
        "schema_version": SCHEMA_VERSION,
        "model": sweep.model.name,
        "precision": sweep.precision.name,
        "context": sweep.context,
        "load": sweep.load,
        "denominator": DENOMINATOR,
        "min_tokens_per_s_per_user": min_rate,
        "max_modelled": max_modelled,
        "points": len(found.points),
        "best": [
            {"gpu": gpu, "gpus": gpus, "point": _dict(found.best(gpu, min_rate, max_modelled, gpus))}
            for gpu, gpus in places
        ],
        "pareto": [
            {"gpu": gpu, "gpus": gpus, "points": [_dict(point) for point in found.pareto(gpu, gpus, max_modelled)]}
            for gpu, gpus in places
        ],
        "domain_worth": [
            {
                "gpu": worth.gpu.name,
                "own_domain": worth.gpu.scale_up_gpus,
                "min_tokens_per_s_per_user": worth.min_tokens_per_s_per_user,
                "by_domain": {
                    str(domain): {"point": _dict(cost), "usd_per_mtok_to_own_domains": worth.worth(domain)}
                    for domain, cost in worth.by_domain.items()
                },
            }
            for worth in worths
        ],
        "gpus_without_split": list(found.no_split),
        "omitted": list(OMITTED),
    }
