"""Comparisons and gates for people and machines: microseconds, percent, and what it is worth in dollars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from ..bench.compare import Compared, Comparison, Version, point_name
from ..bench.gate import GateResult, GateRow
from ..bench.gpus import get_gpu
from ..bench.judgement import Judgement
from ..bench.places import Place, places_of
from ..bench.tables import plain_table
from .kernel_price import usd_per_mtok
from .prices import Price

PriceOf = Callable[[str], Price]
"""A GPU's name to its price."""


def worth(pair: Comparison, models: Sequence[str], price: PriceOf) -> list[tuple[Place, float, float]]:
    """Where the kernel stands, and its $/M there on side A and on side B."""
    found = []
    for place in places_of(pair.b.point.op, pair.b.point.shape, models, get_gpu(pair.b.point.gpu)):
        if pair.a.time_s is not None and pair.b.time_s is not None:
            costs = [usd_per_mtok(side.time_s or 0.0, place, price(side.point.gpu)) for side in (pair.a, pair.b)]
            found.append((place, costs[0], costs[1]))
    return found


def comparison_table(title: str, compared: Compared, models: Sequence[str], price: PriceOf) -> Table:
    """One row per point, what changed first."""
    rows = []
    for pair in sorted(compared.pairs, key=lambda pair: ("slower", "faster", "unsure", "same").index(pair.word)):
        priced = worth(pair, models, price)
        place, before, after = max(priced, key=lambda each: abs(each[2] - each[1]), default=(None, 0.0, 0.0))
        rows.append((
            pair.name, _shape(pair.b), pair.word, place or "-", _us(pair.a.time_s), _us(pair.b.time_s),
            *_percents(pair.judgement), f"{before:.4f}" if place else "-", f"{after - before:+.4f}" if place else "-",
        ))  # fmt: skip
    columns = ("kernel", "shape", "verdict", "where", "A us", "B us", "B / A", "95 %", "noise", "A $/M", "B - A $/M")
    return plain_table(title, columns, rows, left=4)


def comparison_lines(compared: Compared) -> list[str]:
    """The verdicts counted, every note, and what has no counterpart."""
    words = [pair.word for pair in compared.pairs]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("same", "faster", "slower", "unsure"))
    lines = [f"{len(words)} points: {counts}"]
    bases = dict.fromkeys(pair.basis for pair in compared.pairs)
    lines.append(f"compared by {', '.join(bases)}; $/M: dollars per million output tokens of one decode GPU")
    for pair in compared.pairs:
        lines += [f"{pair.name} {_shape(pair.b)}: {note}" for note in pair.notes]
    for label, side in (("A", compared.only_a), ("B", compared.only_b)):
        lines += [f"only in {label}: {point_name(each.point)} {_shape(each)}" for each in side]
    return lines


def comparison_document(compared: Compared, models: Sequence[str], price: PriceOf) -> dict[str, Any]:
    """One JSON document; seconds and dollars per million tokens as the names say."""
    return {
        "schema_version": 1,
        "pairs": [
            {
                "kernel": pair.name, "op": pair.b.point.op, "shape": pair.b.point.shape, "verdict": pair.word,
                "basis": pair.basis, "a": _version(pair.a), "b": _version(pair.b),
                **_judged(pair.judgement), "notes": list(pair.notes),
                "places": [
                    {"model": place.model, "place": place.name, "tokens_per_step": place.tokens_per_step,
                     "a_usd_per_mtok": before, "b_usd_per_mtok": after}
                    for place, before, after in worth(pair, models, price)
                ],
            }
            for pair in compared.pairs
        ],
        "only_a": [_version(each) for each in compared.only_a],
        "only_b": [_version(each) for each in compared.only_b],
    }  # fmt: skip


def gate_table(title: str, result: GateResult, price: PriceOf) -> Table:
    """What fails first, then what is inconclusive, then the rest."""
    rows = []
    for row in sorted(result.rows, key=lambda row: ("fail", "inconclusive", "pass").index(row.result)):
        pair = row.comparison
        place, usd = _dearest(row, price)
        rows.append((
            row.name, row.shape, row.result, row.word, place,
            *((_us(pair.a.time_s), _us(pair.b.time_s), *_percents(pair.judgement)) if pair else ("-",) * 5), usd,
        ))  # fmt: skip
    columns = ("kernel", "shape", "gate", "verdict", "where", "before us", "now us", "change", "95 %", "noise", "$/M")
    return plain_table(title, columns, rows, left=5)


def gate_lines(result: GateResult, price: PriceOf) -> list[str]:
    """Every reason, the models' totals, and the verdict in one line."""
    lines = [f"inconclusive: {problem}" for problem in result.problems]
    for row in result.rows:
        place, usd = _dearest(row, price)
        if row.result == "fail":
            where = "" if place == "-" else f": {usd} $/M in {place}"
            lines.append(f"fail: {row.name} {row.shape} is slower{where}{'; ' + row.reason if row.reason else ''}")
        elif row.reason:
            lines.append(f"{row.result if row.result != 'pass' else row.word}: {row.name} {row.shape}: {row.reason}")
    gpu = next((row.comparison.b.point.gpu for row in result.rows if row.comparison), None)
    for total in result.totals:
        per_s = 1e6 * price(gpu).usd_per_gpu_hour / 3600 if gpu else 0.0
        lines.append(
            f"{total.result}: {total.model} at {total.tokens_per_step:g} tokens: {total.num_kernels} points "
            f"{total.before_s * per_s:.4f} -> {total.after_s * per_s:.4f} $/M "
            f"({total.after_s / total.before_s - 1:+.1%}, surely {total.low_s / total.before_s:+.1%} or more; "
            f"limit {total.limit_s / total.before_s:+.1%})"
        )
    return [*lines, f"gate: {result.result}"]


def gate_document(result: GateResult, price: PriceOf) -> dict[str, Any]:
    """One JSON document."""
    return {
        "schema_version": 1,
        "result": result.result,
        "problems": list(result.problems),
        "rows": [
            {
                "kernel": row.name, "shape": row.shape, "result": row.result, "verdict": row.word, "reason": row.reason,
                **(_judged(row.comparison.judgement) if row.comparison else {}),
                "places": [
                    {"model": place.model, "place": place.name, "tokens_per_step": place.tokens_per_step,
                     "change_usd_per_mtok": _usd(row, lost, price)}
                    for place, lost in row.seconds_per_token
                ],
            }
            for row in result.rows
        ],
        "totals": [vars(total) for total in result.totals],
    }  # fmt: skip


def _usd(row: GateRow, seconds_per_token: float, price: PriceOf) -> float:
    assert row.comparison is not None
    return seconds_per_token * price(row.comparison.b.point.gpu).usd_per_gpu_hour / 3600 * 1e6


def _dearest(row: GateRow, price: PriceOf) -> tuple[str, str]:
    """The place where the change costs most, and its dollars per million tokens."""
    if not row.seconds_per_token:
        return "-", "-"
    place, lost = max(row.seconds_per_token, key=lambda each: abs(each[1]))
    return f"{place} at {place.tokens_per_step:g}", f"{_usd(row, lost, price):+.4f}"


def _shape(version: Version) -> str:
    return " x ".join(map(str, version.point.shape.values()))


def _us(time_s: float | None) -> str:
    return "-" if time_s is None else f"{time_s * 1e6:.2f}"


def _percents(judgement: Judgement | None) -> tuple[str, str, str]:
    if judgement is None:
        return "-", "-", "-"
    interval, noise = judgement.interval, judgement.noise
    wide = "-" if interval is None else f"{interval.low - 1:+.1%} to {interval.high - 1:+.1%}"
    return f"{judgement.ratio - 1:+.1%}", wide, "-" if noise is None else f"{noise:.1%}"


def _judged(judgement: Judgement | None) -> dict[str, Any]:
    if judgement is None:
        return {"ratio": None, "interval": None, "noise": None, "margin": None}
    interval = judgement.interval
    return {
        "ratio": judgement.ratio, "interval": None if interval is None else [interval.low, interval.high],
        "noise": judgement.noise, "margin": judgement.margin,
    }  # fmt: skip


def _version(version: Version) -> dict[str, Any]:
    point = version.point
    return {
        "op": point.op, "formats": point.formats, "recipe": point.recipe, "gpu": point.gpu, "shape": point.shape,
        "kernel_hash": point.kernel_hash, "tile": point.tile, "time_s": version.time_s,
        "processes": len(version.samples), "flags": list(version.flags), "invalid": list(version.invalid),
        "source": version.source,
    }  # fmt: skip
