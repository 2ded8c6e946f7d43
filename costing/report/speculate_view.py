"""The page of speculative decoding: $/M by batch for each number of drafts; acceptance lengths are its inputs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cost import StepCost
from ..levers.speculative import Speculation, SpeculationPoint
from ..levers.speculative_view import DENOMINATOR, draft_share, speculation_lines
from .page import Cell, Section, html_table, layout, log_axis, plot, price_inputs, write_page
from .parts import line, lines_html


def _by_drafts(points: Sequence[SpeculationPoint]) -> dict[int, list[StepCost]]:
    found: dict[int, list[StepCost]] = {}
    for point in points:
        for drafts, cost in {0: point.plain, **point.drafted}.items():
            found.setdefault(drafts, []).append(cost)
    return dict(sorted(found.items()))


def _drafts(drafts: int) -> str:
    return "1 draft" if drafts == 1 else f"{drafts or 'no'} drafts"


def _cell(text: str, cost: StepCost, drafts: int, **value: float) -> Cell:
    kept = {"kept_of": str(drafts)} if drafts else {}
    return Cell.of(text, gpu=cost.step.gpu.name, **kept, **value)


def speculation_figure(points: Sequence[SpeculationPoint]) -> dict[str, Any]:
    """A line per number of drafts: where one crosses the line of none is its break-even batch."""
    traces = []
    for number, (drafts, costs) in enumerate(_by_drafts(points).items()):
        trace = line(
            _drafts(drafts), number, [cost.step.deployment.batch_per_gpu for cost in costs],
            [cost.usd_per_mtok_output for cost in costs], [_hover(cost, drafts) for cost in costs],
        )  # fmt: skip
        kept = {"keptOf": str(drafts)} if drafts else {}
        traces.append({**trace, "meta": {"gpu": costs[0].step.gpu.name, "y": "usd", **kept}})
    return {"data": traces, "layout": layout(log_axis("sequences per GPU"), log_axis(f"$ per million {DENOMINATOR}"))}


def _hover(cost: StepCost, drafts: int) -> str:
    shares = ", ".join(f"{share:.0%} {name}" for name, share in cost.step.coverage().items())
    drafting = f", {draft_share(cost):.1%} of it drafting" if drafts else ""
    return f"step {cost.step.step_s * 1e3:.2f} ms{drafting}; {shares}"


def speculation_section(found: Speculation, points: list[SpeculationPoint], number: int) -> Section:
    deployment = points[0].plain.step.deployment
    rows = [
        (
            f"{cost.step.deployment.batch_per_gpu:g}", drafts or "none", f"{cost.step.step_s * 1e3:.2f}",
            _cell(f"{cost.tokens_per_s_per_user:.1f}", cost, drafts, rate=cost.tokens_per_s_per_user),
            _cell(f"{cost.usd_per_mtok_output:.3f}", cost, drafts, usd=cost.usd_per_mtok_output),
            *(f"{share:.0%}" for share in cost.step.coverage().values()),
        )
        for point in points for drafts, cost in {0: point.plain, **point.drafted}.items()
    ]  # fmt: skip
    columns = ("batch/GPU", "drafts", "step ms", "tok/s/user", "$/M output", *found.stack.provenances)
    at = f"{deployment.precision.name}: {deployment.describe()}, {deployment.context} tokens of context"
    body = (
        f"<p>{html.escape(at)}.</p>{plot(f'speculation-{number}', 'price by batch and drafts')}"
        f"{lines_html(speculation_lines(found, points))}"
        "<p class='soft'>Lines and cells follow the inputs above; the break-even batches in the list do not.</p>"
        f"{html_table(columns, rows, 0)}"
    )
    title = f"{found.model.name} on {found.gpu.title}, {found.stack}"
    return Section(f"speculate-{number}", title, body, {f"speculation-{number}": speculation_figure(points)})


def write_speculation(path: Path, found: Sequence[tuple[Speculation, list[SpeculationPoint]]]) -> None:
    """Write the page of one or more GPUs and stacks.

    Raises:
        ValueError: the file cannot be written.
    """
    prices = {each.gpu.name: (each.gpu.title, each.price.usd_per_gpu_hour) for each, _ in found}
    kept = {
        str(drafts): (f"acceptance length with {_drafts(drafts)}", value, 1 + drafts)
        for each, _ in found
        for drafts, value in each.kept.items()
    }
    sections = [speculation_section(each, points, number) for number, (each, points) in enumerate(found)]
    subtitle = "speculative decoding, its verify steps from published kernel times"
    write_page(path, "What drafts save, and where they stop", subtitle, sections, price_inputs(prices, kept))
