"""Tables for people. Numbers in the unit of the column's head; provenance in words, not in colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

from ..bench.decode_plan import OMITTED
from ..bench.published import PROVENANCES
from ..bench.published_check import TableError
from ..bench.tables import console, plain_table
from .cost import StepCost
from .levers.common_draws import CommonDraws
from .study import StudyResult
from .sweep import Parallel, Skipped, best_points


def _usd(value: float) -> str:
    """Dollars per million tokens: three significant digits from a cent on."""
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def plain_price_lines(result: dict[str, float]) -> list[str]:
    lines = [f"${result['usd_per_mtok']:.4g} per million tokens"]
    if "joules_per_token" in result:
        lines.append(f"{result['tokens_per_s_per_mw']:,.0f} tokens/s/MW, {result['joules_per_token']:.3g} J/token")
    return lines


def step_table(cost: StepCost) -> Table:
    """One decode step op by op, dearest first."""
    step, deployment = cost.step, cost.step.deployment
    title = (
        f"{step.model.name} on {step.gpu.title}, {step.stack}, {deployment.precision.name}: {deployment.describe()}, "
        f"{deployment.batch_per_gpu:g} sequences/GPU x {deployment.context} tokens"
    )
    rows = [
        (
            op.timed.call.name,
            op.timed.call.op.shape(),
            op.timed.provenance,
            op.timed.source,
            op.timed.call.calls_per_step,
            f"{op.timed.time_s * 1e3:.3f}",
            f"{op.share:.1%}",
            f"{op.timed.floor_s / op.timed.time_s:.0%}",
            _usd(op.usd_per_mtok),
            _usd(op.saving_usd_per_mtok),
        )
        for op in sorted(cost.ops(), key=lambda op: -op.usd_per_mtok)
    ]
    columns = (
        "op",
        "shape",
        "provenance",
        "source",
        "calls",
        "ms/step",
        "share",
        "of floor",
        "$/M",
        "$/M saved at floor",
    )
    return plain_table(title, columns, rows, left=4)


def step_summary(cost: StepCost, draws: CommonDraws) -> list[str]:
    """The totals, how sure they are, where they are from and what they leave out."""
    step, at = cost.step, draws.at_price(cost)
    watts = cost.tokens_per_s_per_mw
    lines = [
        f"step {step.step_s * 1e3:.2f} ms (roofline {step.floor_s * 1e3:.2f} ms): "
        f"{cost.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {cost.tokens_per_s_per_user:.1f} tokens/s/user"
        + (f", {watts:,.0f} tokens/s/MW, {cost.joules_per_token:.2f} J/token" if watts else ""),
        f"${_usd(cost.usd_per_mtok_output)} per million output tokens (decode GPUs only) at "
        f"${cost.price.usd_per_gpu_hour:g}/GPU-h: {cost.price.describe()}",
        f"90 % of what the times' errors make of it: ${_usd(at.p5)} to ${_usd(at.p95)} (see `tokenfab interval`)",
        f"of the time, {_coverage(cost)}",
    ]
    for op in cost.suspects():
        lines.append(
            f"look twice: {op.timed.call.name} takes {op.share:.0%} of the step at "
            f"{op.timed.floor_s / op.timed.time_s:.1%} of its roofline; the row is a fact about this stack's path "
            f"({op.timed.source}), not the kernel's limit"
        )
    return [*lines, "left out: " + "; ".join(OMITTED)]


def _coverage(cost: StepCost) -> str:
    return ", ".join(f"{share:.0%} {name}" for name, share in cost.step.coverage().items())


_SHORT: dict[str, str] = dict(zip(PROVENANCES, ("here", "meas", "interp here", "interp", "model"), strict=True))


def points_table(title: str, points: Sequence[StepCost], draws: CommonDraws) -> Table:
    rows = []
    kinds = [name for name in PROVENANCES if any(name in point.step.stack.provenances for point in points)]
    for point in points:
        step, deployment = point.step, point.step.deployment
        parallel = Parallel.of(deployment)
        shares, at = step.coverage(), draws.at_price(point)
        rows.append(
            (
                step.gpu.name,
                str(step.stack),
                str(parallel),
                deployment.gpus,
                f"{deployment.batch_per_gpu:g}",
                f"{step.step_s * 1e3:.2f}",
                f"{point.tokens_per_s_per_gpu:,.0f}",
                f"{point.tokens_per_s_per_user:.1f}",
                f"{point.price.usd_per_gpu_hour:.2f}",
                _usd(point.usd_per_mtok_output),
                f"{_usd(at.p5)}-{_usd(at.p95)}",
                "/".join(f"{shares.get(kind, 0.0):.0%}" for kind in kinds),
                ", ".join(op.timed.call.name for op in point.suspects()) or "-",
            )
        )
    columns = (
        "gpu",
        "stack",
        "parallel",
        "GPUs",
        "batch/GPU",
        "step ms",
        "tok/s/GPU",
        "tok/s/user",
        "$/GPU-h",
        "$/M output",
        "90 % interval",
        "/".join(_SHORT[kind] for kind in kinds),
        "look twice",
    )
    table = plain_table(title, columns, rows, left=3)
    table.columns[-1].justify = "left"
    return table


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """One line per GPU for what does not fit, one per reason for the rest."""
    unfit: dict[str, dict[str, None]] = {}
    reasons: dict[str, dict[str, None]] = {}
    for row in skipped:
        if row.reason.startswith("memory:"):
            unfit.setdefault(row.gpu, {})[row.parallel] = None
        else:
            reasons.setdefault(row.reason, {})[row.parallel] = None
    lines = [f"no batch fits on {gpu} at {', '.join(parallels)}" for gpu, parallels in unfit.items()]
    return lines + [f"{', '.join(parallels)}: {reason}" for reason, parallels in reasons.items()]


def errors_table(errors: Sequence[TableError]) -> Table:
    rows = [
        (e.gpu, e.stack, e.table, e.variant, e.held_out, f"{e.num_rows:,}", f"{e.median:.1%}", f"{e.p95:.1%}")
        for e in errors
    ]
    title = "Leave-one-out error of interpolation: every inner row, or plane of rows, predicted from its neighbours"
    return plain_table(title, ("gpu", "stack", "table", "variant", "held out", "rows", "median", "p95"), rows, left=5)


def check_summary(errors: Sequence[TableError]) -> list[str]:
    """Per table, the middle of its checks; and how many meet the aim (median 5 %, 95th percentile 20 %)."""
    lines = []
    for table in dict.fromkeys(error.table for error in errors):
        of_table = [error for error in errors if error.table == table]
        medians, p95s = sorted(e.median for e in of_table), sorted(e.p95 for e in of_table)
        lines.append(
            f"{table}: {len(of_table)} checks, half at or below median {median(medians):.1%}, p95 {median(p95s):.1%}; "
            f"worst median {medians[-1]:.1%}, p95 {p95s[-1]:.1%}"
        )
    good_median = sum(error.median <= 0.05 for error in errors)
    good_p95 = sum(error.p95 <= 0.20 for error in errors)
    rows = sum(error.num_rows for error in errors)
    return [
        *lines,
        f"{len(errors)} checks, {rows:,} held-out rows: median <= 5 % in {good_median}, p95 <= 20 % in {good_p95}",
        "Each check bridges about twice the gap of a real query, so the error is an upper estimate.",
    ]


def inventory_table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [
        (
            r["stack"],
            r["table"],
            r["version"],
            ", ".join(r["kernels"][:6]) + (", ..." if len(r["kernels"]) > 6 else ""),
            f"{r['rows']:,}",
        )
        for r in rows
    ]
    return plain_table("Published tables", ("stack", "table", "version", "kernels", "rows"), cells, left=4)


def timings_table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [
        (
            r["stack"],
            r["provenance"],
            r["source"],
            f"{r['time_s'] * 1e6:.2f}",
            f"{r['floor_s'] * 1e6:.2f}",
            f"{r['floor_s'] / r['time_s']:.0%}",
        )
        for r in rows
    ]
    title = f"{rows[0]['op']} {rows[0]['shape']} on {rows[0]['gpu']}"
    return plain_table(title, ("stack", "provenance", "source", "us", "floor us", "of floor"), cells, left=3)


def print_study(result: StudyResult, min_tokens_per_s_per_user: float, max_modelled: float, show_all: bool) -> None:
    """The best points, or all, and what could not be."""
    out, sweep, draws = console(), result.sweep, CommonDraws(result.data)
    title = f"{sweep.model.name}, {sweep.precision.name}, {sweep.context} tokens of context: "
    if show_all:
        out.print(points_table(title + f"all {len(result.points)} points", result.points, draws))
    best = best_points(result.points, min_tokens_per_s_per_user, max_modelled)
    title += f"cheapest at >= {min_tokens_per_s_per_user:g} tokens/s/user, of {len(result.points)} points"
    if best:
        out.print(points_table(title, best, draws))
    else:
        fastest = max(point.tokens_per_s_per_user for point in result.points)
        out.print(f"{title}: none; the fastest reaches {fastest:.1f} tokens/s/user", soft_wrap=True)
    unranked = sum(point.step.coverage()["modelled"] > max_modelled for point in result.points)
    if unranked:
        out.print(
            f"not ranked: {unranked} points with more than {max_modelled:.0%} of their time modelled", soft_wrap=True
        )
    for source in dict.fromkeys(point.price.describe() for point in best):
        out.print(f"price: {source}", soft_wrap=True)
    if best:
        out.print("90 % interval: of the times' errors, at this price; `tokenfab interval` says more", soft_wrap=True)
    out.print("left out: " + "; ".join(OMITTED), soft_wrap=True)
    for line in skipped_lines(result.skipped):
        out.print(f"skipped: {line}", soft_wrap=True)
    out.print()
