"""A report's figures, and the report in a real browser with the network off (the fixture ``browser``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def figures(path: Path) -> dict[str, Any]:
    """Plotly's data and layout of every plot, by its id."""
    text = path.read_text()
    start = text.index("const figures = ") + len("const figures = ")
    return json.JSONDecoder().raw_decode(text[start:])[0]


def opened(browser: Any, path: Path, width: int = 1280, height: int = 900) -> tuple[Any, list[str]]:
    """The page with every plot drawn, and what its console has complained of (filled as it goes)."""
    page = browser.new_context(viewport={"width": width, "height": height}, offline=True).new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.goto(path.as_uri())
    plots = len(figures(path))
    page.wait_for_function(
        f"[...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg')).length === {plots}"
    )
    return page, errors


def drawn(page: Any, plot: str, axis: str) -> list[list[float]]:
    """What a plot shows now, by trace."""
    return page.evaluate(f"document.getElementById('{plot}').data.map(t => [...t.{axis}])")


def move(page: Any, selector: str, value: float) -> None:
    """Move a slider."""
    page.eval_on_selector(
        selector, f"e => {{ e.value = {value}; e.dispatchEvent(new Event('input', {{bubbles: true}})) }}"
    )
