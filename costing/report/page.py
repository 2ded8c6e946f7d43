"""A page: one HTML file that works offline, of sections with plots and tables. Plotly draws; here data is arranged.

Colour means GPU (or group of ops), line and marker the stack, hatching the provenance, so nothing is told by colour
alone. The palette is Okabe and Ito's. Prices and utilisation are inputs of the page: what depends on them says so by
its tags (``page.js``), and is computed again in the browser, without a server.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from string import Template
from typing import Any

from ... import __version__

TEMPLATE, SCRIPT = Path(__file__).with_name("page.html"), Path(__file__).with_name("page.js")

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        name: its anchor. title: plain text. body: HTML, with a ``plot(id)`` for each of ``figures``.
        figures: Plotly's data and layout by id.
    """

    name: str
    title: str
    body: str
    figures: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def plot(name: str, label: str, *, is_tall: bool = False) -> str:
    """The place of a figure."""
    kind = "plot bars" if is_tall else "plot"
    return f'<div class="{kind}" id="{name}" role="img" aria-label="{html.escape(label)}"></div>'


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "gridcolor": "#e6e9ec", "zeroline": False, "automargin": True, **more}


def log_axis(title: str) -> dict[str, Any]:
    """A log axis labelled 1, 2, 5, 10, ... in full."""
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    return axis(
        title,
        type="log",
        tickvals=ticks,
        ticktext=[f"{tick:,.3g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks],
    )


def layout(x: dict[str, Any], y: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "xaxis": x,
        "yaxis": y,
        "plot_bgcolor": "#fff",
        "paper_bgcolor": "#fff",
        "hovermode": "closest",
        "margin": {"l": 70, "r": 20, "t": 10, "b": 55},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"align": "left"},
        **more,
    }


class Cell(str):
    """A cell's text with attributes for the page's script."""

    attributes: Mapping[str, Any] = {}

    @classmethod
    def of(cls, text: str, **attributes: Any) -> Cell:
        cell = cls(text)
        cell.attributes = attributes
        return cell


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int) -> str:
    """Every cell is escaped; the first ``text_columns`` are aligned left."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        parts = []
        for index, cell in enumerate(row):
            tags = "".join(
                f' data-{name.replace("_", "-")}="{html.escape(str(value))}"'
                for name, value in (cell.attributes if isinstance(cell, Cell) else {}).items()
            )
            kind = ' class="text"' if index < text_columns else ""
            parts.append(f"<{tag}{kind}{tags}>{html.escape(str(cell))}</{tag}>")
        return "".join(parts)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", columns)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def price_inputs(
    prices: Mapping[str, tuple[str, float]], kept: Mapping[str, tuple[str, float, int]] | None = None
) -> str:
    """Inputs that re-price the page.

    Args:
        prices: by GPU name its title and $/GPU-hour.
        kept: title, tokens kept per step (the acceptance length) and the most that can be, by number of drafts; "" for
            what names no number. A step takes as long however many of its tokens are kept.
    """
    inputs = "".join(
        f'<label>{html.escape(title)} <span class="unit">$<input type="number" min="0.01" step="any" '
        f'value="{usd:g}" data-price-of="{html.escape(name)}">/GPU-h</span></label>'
        for name, (title, usd) in prices.items()
    )
    acceptance = "".join(
        f'<label>{html.escape(title)} <span class="unit"><input type="range" '
        f'min="1" max="{most}" step="any" value="{value!r}" data-kept="{name}"><output>{value:.2f}</output></span>'
        "</label>"
        for name, (title, value, most) in (kept or {}).items()
    )
    return (
        f'<form id="reprice" autocomplete="off">{inputs}{acceptance}'
        '<label>utilisation <span class="unit"><input type="range" min="0.05" max="1" step="0.01" value="1" '
        "data-utilisation><output>100 %</output></span></label>"
        '<button type="reset">as in the book</button><span id="reprice-error" role="alert"></span></form>'
    )


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section], controls: str = "") -> None:
    """Write a page.

    Raises:
        ValueError: the file cannot be written; a figure with a number that is not finite.
    """
    from plotly.offline import get_plotlyjs

    figures = {name: figure for section in sections for name, figure in section.figures.items()}
    page = Template(TEMPLATE.read_text()).substitute(
        title=html.escape(title),
        subtitle=html.escape(f"tokenfab {__version__}, {date.today().isoformat()}: {subtitle}"),
        nav="".join(f'<a href="#{each.name}">{html.escape(each.title)}</a>' for each in sections if len(sections) > 1),
        controls=controls,
        sections="".join(f'<h2 id="{each.name}">{html.escape(each.title)}</h2>{each.body}' for each in sections),
        plotly=get_plotlyjs(),
        script=SCRIPT.read_text(),
        figures=json.dumps(figures, allow_nan=False).replace("<", "\\u003c"),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--report: cannot write {path}: {error.strerror}") from None
