"""Plots of the levers: what moves a price most."""

from __future__ import annotations

import html
from typing import Any

from ...bench.tables import number
from ..levers.sensitivity import Sensitivity, SensitivityResult
from ..levers.view import operating_point
from .page import OKABE_ITO, axis, layout, plot

_LOW, _HIGH = OKABE_ITO[5], OKABE_ITO[1]


def tornado(found: SensitivityResult) -> dict[str, Any]:
    """A bar per input from its $/M at the low end to that at the high end; what moves most on top."""
    base = found.cost.usd_per_mtok_output
    names = [row.input for row in found.rows]

    def bars(end: str, colour: str) -> dict[str, Any]:
        usd = [getattr(row, f"usd_per_mtok_{end}") for row in found.rows]
        return {
            "type": "bar", "orientation": "h", "name": f"at its {end} end", "y": names, "base": base,
            "x": [value - base for value in usd], "marker": {"color": colour},
            "text": [_hover(row, end, value) for row, value in zip(found.rows, usd, strict=True)],
            "textposition": "none", "hovertemplate": "%{text}<extra></extra>",
        }  # fmt: skip

    line = {"type": "line", "xref": "x", "yref": "paper", "x0": base, "x1": base, "y0": 0, "y1": 1}
    return {
        "data": [bars("low", _LOW), bars("high", _HIGH)],
        "layout": layout(
            axis("$ per million output tokens"), axis("", autorange="reversed", narrow=True), barmode="overlay",
            shapes=[{**line, "line": {"color": "#1b1f24", "width": 1}}],
        ),
    }  # fmt: skip


def _hover(row: Sensitivity, end: str, usd: float) -> str:
    return (
        f"<b>{html.escape(row.input)}</b> {number(getattr(row, end), 4)} {html.escape(row.unit)} "
        f"(now {number(row.base, 4)})<br>${number(usd)} per million output tokens<br>{html.escape(row.range_source)}"
    )


def tornado_body(found: SensitivityResult, name: str) -> str:
    """The plot's place, with its operating point and what does not move."""
    still = "".join(f" Not moved: {input_}: {reason}." for input_, reason in found.skipped.items())
    unit = "per million output tokens"
    at = f"{operating_point(found.cost)}; ${found.cost.usd_per_mtok_output:.3g} {unit}"
    return (
        "<h3>What moves the price of the cheapest most</h3>"
        f"<p class='soft'>{html.escape(at)}. One input at a time over its own range, at the book's price."
        f"{html.escape(still)}</p>{plot(name, 'price by input')}"
    )
