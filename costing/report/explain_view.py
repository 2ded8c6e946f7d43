"""The page of a waterfall: from one $/M to another, factor by factor, on a log axis, where equal factors look alike."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..levers.waterfall import Factor, Waterfall
from ..levers.waterfall_view import WHAT_IF, shares_text
from .page import OKABE_ITO, axis, layout, log_axis
from .parts import marker, write_view

if TYPE_CHECKING:
    from rich.table import Table

_CHEAPER, _DEARER, _END = OKABE_ITO[2], OKABE_ITO[1], OKABE_ITO[0]


def waterfall_figure(shown: Waterfall) -> dict[str, Any]:
    """A bar per factor from the $/M before it to that after it; the two ends stand on the axis. Crossed: modelled."""
    usd = [shown.start.usd_per_mtok, *(each.usd_after for each in shown.factors)]
    ground = min(usd) / 2
    ends = [("from", ground, usd[0], html.escape(shown.start.describe())),
            ("to", ground, usd[-1], html.escape(shown.end.describe()))]  # fmt: skip
    bars = [_bars("ends", _END, False, [(*end, f"${end[2]:.3g}") for end in ends])]
    for name, colour, is_cheaper in (("cheaper", _CHEAPER, True), ("dearer", _DEARER, False)):
        for modelled in (False, True):
            rows = [
                (each.name, min(each.usd_before, each.usd_after), max(each.usd_before, each.usd_after), _hover(each),
                 f"x {each.factor:.3f}")
                for each in shown.factors if (each.factor <= 1, each.modelled) == (is_cheaper, modelled)
            ]  # fmt: skip
            if rows:
                bars.append(_bars(f"{name}, a what-if by roofline" if modelled else name, colour, modelled, rows))
    order = ["from", *(each.name for each in shown.factors), "to"]
    x = axis("", type="category", categoryorder="array", categoryarray=order)
    y = log_axis(f"$ per million {shown.start.denominator}")
    return {"data": bars, "layout": layout(x, y, barmode="overlay")}


def _bars(name: str, colour: str, modelled: bool, rows: Sequence[tuple[str, float, float, str, str]]) -> dict[str, Any]:
    """Bars of one kind. ``rows``: where, from, to (in $/M), what is told under the pointer, what stands on top."""
    names, low, high, hover, labels = zip(*rows, strict=True)
    return {
        "type": "bar", "name": name, "x": names, "base": low,
        "y": [top - bottom for bottom, top in zip(low, high, strict=True)],
        "marker": marker(colour, "x" if modelled else ""),
        "text": labels, "textposition": "outside", "cliponaxis": False, "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>",
    }  # fmt: skip


def _hover(factor: Factor) -> str:
    source = WHAT_IF if factor.modelled else shares_text(factor.coverage_after)
    return (
        f"<b>{html.escape(factor.name)}</b>: {html.escape(factor.change_from)} -> {html.escape(factor.change_to)}<br>"
        f"${factor.usd_before:.4g} to ${factor.usd_after:.4g}, x {factor.factor:.3f}<br>{html.escape(source)}"
    )


def write_explanation(path: Path, shown: Waterfall, table: Table, lines: Sequence[str]) -> None:
    """Write the page of one waterfall; ``table`` and ``lines`` as in the terminal.

    Raises:
        ValueError: the file cannot be written.
    """
    name = f"{shown.start.step.model.name}: {shown.start.point.gpu.title} to {shown.end.point.gpu.title}"
    times = f"{1 / shown.total:.3g} times cheaper" if shown.total <= 1 else f"{shown.total:.3g} times dearer"
    caption = f"{times} at these two operating points; green: cheaper, crossed: modelled"
    figures = [(caption, waterfall_figure(shown))]
    write_view(path, "From one price per million tokens to another, factor by factor", name, figures, [table], lines)
