"""Table, lines and JSON of speculative decoding."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...bench.tables import number, plain_table
from ..cost import StepCost
from ..document import SCHEMA_VERSION, point_dict
from .speculative import DRAFT, SPECULATION_OMITTED, Speculation, SpeculationPoint

if TYPE_CHECKING:
    from rich.table import Table

DENOMINATOR = "output tokens of decode GPUs"


def draft_share(cost: StepCost) -> float:
    """The part of a step that drafts take."""
    step = cost.step
    return sum(op.time_s for op in step.ops if op.call.name.startswith(DRAFT)) / step.step_s


def speculation_table(found: Speculation, points: list[SpeculationPoint]) -> Table:
    """A row for every batch and number of drafts; the cheapest of a batch has a star."""
    deployment = points[0].plain.step.deployment
    title = (
        f"{found.model.name} on {found.gpu.title}, {found.stack}, {deployment.precision.name}: "
        f"{deployment.describe()}, {deployment.context} tokens of context"
    )
    rows = []
    for point in points:
        best = point.best_drafts
        for drafts, cost in {0: point.plain, **point.drafted}.items():
            step = cost.step
            change = cost.usd_per_mtok_output / point.plain.usd_per_mtok_output - 1
            rows.append(
                (
                    f"{point.batch_per_gpu:g}",
                    f"{drafts or 'none'}{' *' if drafts == best else '  '}",
                    f"{step.deployment.kept_tokens_per_step:.3g}",
                    f"{step.step_s * 1e3:.2f}",
                    f"{draft_share(cost):.1%}" if drafts else "-",
                    f"{cost.tokens_per_s_per_gpu:,.0f}",
                    f"{cost.tokens_per_s_per_user:.1f}",
                    number(cost.usd_per_mtok_output, 3),
                    f"{change:+.1%}" if drafts else "-",
                    "/".join(f"{share:.0%}" for share in step.coverage().values()),
                )
            )
    columns = ("batch/GPU", "drafts", "kept/step", "step ms", "drafting", "tok/s/GPU", "tok/s/user", "$/M output",
               "against none", "/".join(found.stack.provenances))  # fmt: skip
    return plain_table(title, columns, rows, left=0)


def speculation_lines(found: Speculation, points: list[SpeculationPoint]) -> list[str]:
    lines = [f"break-even, {each.describe()}" for each in found.break_evens]
    lines += [
        f"drafts {drafts}: not one sequence fits beside what drafts"
        for drafts in found.drafts
        if not found.most(drafts)
    ]
    price = found.price
    modelled = [cost for point in points for cost in point.drafted.values() if cost.step.coverage()["modelled"] > 0.25]
    if modelled:
        lines.append(
            f"{len(modelled)} points with drafts have more than 25% of their time modelled: published attention rows "
            "ran one query token per sequence"
        )
    return [
        *lines,
        f"{found.drafter.describe()}; {found.acceptance.describe()}",
        f"price: ${price.usd_per_gpu_hour:g}/GPU-h, {price.describe()}; $/M are per million {DENOMINATOR}",
        "left out: " + "; ".join(SPECULATION_OMITTED),
    ]


def speculation_document(found: Speculation, points: list[SpeculationPoint]) -> dict[str, Any]:
    """``points``: of ``tokenfab step --json`` without ops, each with its share of drafting."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": found.model.name,
        "gpu": found.gpu.name,
        "stack": str(found.stack),
        "denominator": DENOMINATOR,
        "drafter": found.drafter.kind,
        "acceptance": {
            "source": found.acceptance.source,
            "kept_tokens_per_step": {str(drafts): kept for drafts, kept in found.kept.items()},
        },
        "points": [
            {
                "batch_per_gpu": point.batch_per_gpu,
                "best_drafts": point.best_drafts,
                "by_drafts": {str(drafts): _cost(cost) for drafts, cost in {0: point.plain, **point.drafted}.items()},
            }
            for point in points
        ],
        "break_even": [asdict(each) for each in found.break_evens],
        "omitted": list(SPECULATION_OMITTED),
    }


def _cost(cost: StepCost) -> dict[str, Any]:
    point = {key: value for key, value in point_dict(cost).items() if key != "ops"}
    return point | {"draft_share": draft_share(cost)}
