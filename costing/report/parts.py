"""What the levers' pages share: a terminal's tables and lines as HTML, a line of a plot, a page of one result."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .page import OKABE_ITO, Section, html_table, plot, write_page

if TYPE_CHECKING:
    from rich.table import Table

MARKERS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "longdash", "dashdot")


def table_html(table: Table) -> str:
    """A table of ``bench.tables`` with its title as a heading; cells are escaped."""
    columns = [str(column.header) for column in table.columns]
    text = next((index for index, column in enumerate(table.columns) if column.justify != "left"), len(columns))
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    return f"<h3>{html.escape(str(table.title))}</h3>{html_table(columns, rows, text)}"


def lines_html(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line.strip())}</li>' for line in lines)}</ul>"


def line(name: str, number: int, x: Sequence[float], y: Sequence[float], hover: Sequence[str]) -> dict[str, Any]:
    """A line with marks; colour, mark and dash by its number, so that nothing is told by colour alone."""
    return {
        "type": "scatter", "mode": "lines+markers", "name": html.escape(name), "x": list(x), "y": list(y),
        "line": {"color": OKABE_ITO[number % len(OKABE_ITO)], "width": 1.8, "dash": DASHES[number // 8 % 5]},
        "marker": {"symbol": MARKERS[number % 8], "size": 8}, "text": [html.escape(text) for text in hover],
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def marker(colour: str, shape: str = "") -> dict[str, Any]:
    """A bar's colour and hatching."""
    return {"color": colour, "pattern": {"shape": shape, "fgcolor": "#fff", "fillmode": "overlay", "size": 7}}


def write_view(
    path: Path, title: str, name: str, figures: Sequence[tuple[str, dict[str, Any]]], tables: Sequence[Table],
    lines: Sequence[str],
) -> None:  # fmt: skip
    """A page of one result, called ``name``: its plots, each under a caption, then what the terminal prints.

    Raises:
        ValueError: the file cannot be written.
    """
    places = [f"plot-{number}" for number in range(len(figures))]
    drawn = "".join(
        f"<h3>{html.escape(caption)}</h3>{plot(place, caption)}"
        for place, (caption, _) in zip(places, figures, strict=True)
    )
    body = drawn + "".join(map(table_html, tables)) + lines_html(lines)
    named = dict(zip(places, (figure for _, figure in figures), strict=True))
    write_page(path, title, "from published kernel times", [Section("result", name, body, named)])
