"""Tables of a user's kernel beside tokenfab's and the libraries': was it right, how fast, at what share of a price."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Table

from ..kernels.registry import Shape
from .places import Place, places_of
from .summaries import Summary
from .tables import number, plain_table
from .user_check import CheckedShape

ONE_CALL = "one call, per row"
"""In place of a model's step: what a million rows of the activations cost in this call alone."""

_ROWS = {"gemm": "m", "moe": "num_tokens", "rope_append": "num_tokens", "mla_append": "num_tokens"}

UsdPerMtok = Callable[[float, Place], float]
"""(seconds per call, place) to dollars per million tokens."""


def num_rows(op: str, shape: Shape) -> float | None:
    """Rows of one call on its GPU: tokens, or query tokens of attention, or what a quantizer reads; None of a copy."""
    if op in ("attention", "mla"):
        return shape["batch"] * shape["q_len"]
    if op == "copy":
        return None
    return shape[_ROWS.get(op, "rows")] / shape.get("ep", 1)


def place_of(summary: Summary, models: Iterable[str]) -> Place | None:
    """Where in a model's step the shape stands: the first place of several; one call alone for a shape of no model.

    None of a copy.
    """
    rows = num_rows(summary.point.op, summary.point.shape)
    if rows is None:
        return None
    found = places_of(summary.point.op, summary.point.shape, models)
    return found[0] if found else Place("", ONE_CALL, 1, rows)


def priced(summary: Summary, place: Place | None, usd_per_mtok: UsdPerMtok | None) -> float | None:
    """Dollars per million tokens at ``place``; None without a time, a place or a price."""
    if not summary.time_s or place is None or usd_per_mtok is None:
        return None
    return usd_per_mtok(summary.time_s, place)


def kernels_table(
    title: str, summaries: Sequence[Summary], models: Sequence[str], usd_per_mtok: UsdPerMtok | None
) -> Table:
    """One row per kernel and shape, shapes together; "x tokenfab": how many times faster than tokenfab's own."""
    shapes = list(dict.fromkeys(_shape(each) for each in summaries))
    own_s = {_shape(each): each.time_s for each in summaries if each.point.recipe == "tokenfab"}
    rows = []
    for each in sorted(summaries, key=lambda each: shapes.index(_shape(each))):
        ours_s = own_s.get(_shape(each))
        place = place_of(each, models)
        verdict = "; ".join(each.invalid or each.flags) or "ok"
        rows.append((
            each.point.recipe, "-".join(each.point.formats.values()), _shape(each),
            verdict + (" (quick)" if each.is_quick else ""), number(_micro(each.time_s), 4),
            number(_micro(each.floor_s)), "-" if each.roofline_fraction is None else f"{each.roofline_fraction:.0%}",
            "-" if not ours_s or not each.time_s else f"{ours_s / each.time_s:.2f}",
            "-" if place is None else str(place).strip(), number(priced(each, place, usd_per_mtok)),
        ))  # fmt: skip
    columns = ("kernel", "format", "shape", "verdict", "us", "floor us", "of floor", "x tokenfab", "where", "$/M")
    return plain_table(title, columns, rows, left=4)


def checks_table(title: str, checked: Sequence[CheckedShape]) -> Table:
    """One row per shape; errors as shares of what is allowed, before, after and on new inputs."""
    rows = []
    for each in checked:
        errors = (None,) * 3
        if each.check is not None:
            errors = (each.check.before_error, each.check.after_error, each.check.refreshed_error)
        shape = " x ".join(str(size) for size in each.shape.values())
        rows.append((shape, each.verdict, *("-" if error is None else f"{error:.3g}" for error in errors)))
    return plain_table(title, ("shape", "verdict", "error before", "after", "on new inputs"), rows, left=2)


def _shape(summary: Summary) -> str:
    return " x ".join(map(str, summary.point.shape.values()))


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def checked_dict(each: CheckedShape) -> dict[str, Any]:
    """For JSON."""
    import msgspec

    return {**msgspec.to_builtins(each), "passed": each.passed}
