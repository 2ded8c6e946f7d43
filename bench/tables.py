"""What all tables for people share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Standard output; wide enough for every table where it is not a terminal."""
    probe = Console()
    return probe if probe.is_terminal else Console(width=180, highlight=False)


def plain_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> Table:
    """A table without lines. ``left``: that many columns are text, aligned left; the rest are numbers."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(
            column,
            justify="left" if index < left else "right",
            overflow="fold",
            no_wrap=index in (0, *range(left, len(columns))),
        )
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent; a dash where there is no value."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = f"{value:.{digits}g}"
    return f"{float(size):,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{float(size):g}"
