"""The gate on time: measurements of now against a baseline, for a build to pass or fail by.

A point fails when it is surely slower than ``max(margin, 3 x noise)`` (``judgement``); a model fails when the gated
kernels of one step are together surely slower than their own margin, which is narrower: ten kernels that each lose
2 % fail no point. Nothing passes for want of a baseline: what is missing, renamed, torn, invalid, of too few processes,
or of another kind of GPU is ``inconclusive``, and that is no pass.

Units: seconds per call and per token of one GPU. Errors: ``RecordError`` and ``SampleError`` of damaged files come
from ``sides.read_side``; a gate takes them as inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .compare import Comparison, Version, compare, point_name
from .gpus import get_gpu
from .judgement import GATE_MARGIN, NOISE_FACTOR
from .noise import MIN_PROCESSES
from .places import Place, places_of
from .sides import Side
from .targets import DEFAULT_MODELS

TOTAL_MARGIN = 0.01
"""Of the sum over a model's gated kernels."""

Result = Literal["pass", "fail", "inconclusive"]
PASS, FAIL, INCONCLUSIVE = 0, 1, 3
EXIT_CODES: dict[Result, int] = {"pass": PASS, "fail": FAIL, "inconclusive": INCONCLUSIVE}
"""2 is a command that was not understood."""


@dataclass(frozen=True)
class GateRow:
    """One point. ``seconds_per_token``: what it lost (or won, negative) at each of its places, sure or not."""

    name: str
    shape: str
    result: Result
    word: str
    reason: str
    comparison: Comparison | None = None
    seconds_per_token: tuple[tuple[Place, float], ...] = ()


@dataclass(frozen=True)
class TotalRow:
    """The gated kernels of one model's step together, in seconds per token of one GPU."""

    model: str
    tokens_per_step: float
    num_kernels: int
    before_s: float
    after_s: float
    low_s: float
    """The least that the rise surely is, after - before."""
    limit_s: float
    result: Result


@dataclass(frozen=True)
class GateResult:
    rows: tuple[GateRow, ...] = ()
    totals: tuple[TotalRow, ...] = ()
    problems: tuple[str, ...] = field(default=())
    """What makes the whole gate inconclusive."""

    @property
    def result(self) -> Result:
        results = {row.result for row in (*self.rows, *self.totals)}
        if "fail" in results:
            return "fail"
        return "inconclusive" if self.problems or "inconclusive" in results or not self.rows else "pass"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.result]


def gate(
    baseline: Side, current: Side, *, margin: float = GATE_MARGIN, total_margin: float = TOTAL_MARGIN,
    models: Sequence[str] = DEFAULT_MODELS,
) -> GateResult:  # fmt: skip
    """``current`` against ``baseline``.

    Raises:
        ValueError: a stack as a side (its noise is unknown, so nothing can be gated on it), a margin not in (0, 1).
    """
    if not 0 < total_margin < 1:
        raise ValueError(f"total_margin: expected more than 0 and less than 1; got {total_margin}")
    for name, side in (("baseline", baseline), ("current", current)):
        if side.stack:
            raise ValueError(f"{name}: expected measurements; got {side.label}, whose noise is unknown")
    problems = [f"{side.label}: {text}" for side in (baseline, current) for text in side.torn]
    devices = [sorted({f"{s.device} ({s.point.gpu})" for s in side.samples}) for side in (baseline, current)]
    if devices[0] != devices[1]:
        got = " and ".join(", ".join(names) for names in devices)
        return GateResult(problems=(*problems, f"GPU: expected the baseline's; got {got} (baseline and current)"))
    try:
        compared = compare(baseline, current, margin=margin)
    except ValueError as error:
        return GateResult(problems=(*problems, str(error)))
    rows = [
        *(_row(pair, models) for pair in compared.pairs),
        *(_alone(each, "in the baseline, but not measured now: renamed or left out") for each in compared.only_a),
        *(_alone(each, "measured now, but not in the baseline: renamed or new") for each in compared.only_b),
    ]
    return GateResult(tuple(rows), tuple(_totals(rows, total_margin)), tuple(problems))


def gate_in_cycles(
    baseline: Side, measure: Callable[[int, frozenset[str] | None], Side], cycles: int = 3,
    **options: float | Sequence[str],
) -> GateResult:  # fmt: skip
    """The gate on what ``measure`` measures; a failure counts only when every further cycle confirms it.

    Args:
        measure: called with the number of the cycle, from 1, and the keys of the points to measure again (all for
            None); gives what was measured in this cycle.
    """
    result = gate(baseline, measure(1, None), **options)  # type: ignore[arg-type]
    for cycle in range(2, cycles + 1):
        suspects = frozenset(
            row.comparison.a.point.key for row in result.rows if row.comparison and _is_lost(row, result)
        )
        if not suspects:
            break
        some = Side(baseline.label, tuple(s for s in baseline.samples if s.point.key in suspects), baseline.selected)
        again = gate(some, measure(cycle, suspects), **options)  # type: ignore[arg-type]
        kept = [row for row in result.rows if not (row.comparison and row.comparison.a.point.key in suspects)]
        rows = (*kept, *again.rows)
        total_margin = float(options.get("total_margin", TOTAL_MARGIN))  # type: ignore[arg-type]
        result = GateResult(rows, tuple(_totals(rows, total_margin)), (*result.problems, *again.problems))
    return result


def _is_lost(row: GateRow, result: GateResult) -> bool:
    """Whether a row failed, or slowed down in a model that failed as a whole."""
    failed = {(total.model, total.tokens_per_step) for total in result.totals if total.result == "fail"}
    mine = {(place.model, place.tokens_per_step) for place, lost in row.seconds_per_token if lost > 0}
    return row.result == "fail" or bool(mine & failed)


def _row(pair: Comparison, models: Sequence[str]) -> GateRow:
    a, b = pair.a, pair.b
    shape = " x ".join(map(str, b.point.shape.values()))
    reason = "; ".join(pair.notes)
    if (blocked := _why_inconclusive(pair)) or pair.judgement is None:
        return GateRow(pair.name, shape, "inconclusive", "unsure", blocked or reason, pair)
    places = places_of(b.point.op, b.point.shape, models, get_gpu(b.point.gpu))
    lost_s = _before_s(a) * (pair.judgement.ratio - 1)
    lost = tuple((place, lost_s * place.calls_per_step / place.tokens_per_step) for place in places)
    result: Result = "fail" if pair.word == "slower" else "pass"
    return GateRow(pair.name, shape, result, pair.word, reason, pair, lost)


def _why_inconclusive(pair: Comparison) -> str:
    for label, side in (("baseline", pair.a), ("now", pair.b)):
        if not side.samples:
            return f"{label}: no valid time: {'; '.join(side.invalid)}"
        if len(side.samples) < MIN_PROCESSES:
            return f"{label}: {len(side.samples)} processes where {MIN_PROCESSES} are needed"
    if pair.basis == "time":
        uuids = [{sample.uuid for sample in side.samples} for side in (pair.a, pair.b)]
        if uuids[0] != uuids[1]:
            return "another GPU of the same model, and no anchor beside both: times alone do not compare"
        if any("throttled" in side.flags for side in (pair.a, pair.b)):
            return "throttled, and no anchor beside both"
    return ""


def _before_s(version: Version) -> float:
    time_s = version.time_s
    assert time_s is not None
    return time_s


def _alone(version: Version, reason: str) -> GateRow:
    shape = " x ".join(map(str, version.point.shape.values()))
    return GateRow(point_name(version.point), shape, "inconclusive", "unsure", reason)


def _totals(rows: Iterable[GateRow], margin: float) -> list[TotalRow]:
    """Each model's gated kernels at one load, added up; the intervals of independent points add in quadrature."""
    groups: dict[tuple[str, float], list[tuple[float, float, float, float]]] = {}
    for row in rows:
        judgement = row.comparison.judgement if row.comparison else None
        if row.comparison is None or judgement is None or judgement.interval is None:
            continue
        interval, before_s = judgement.interval, _before_s(row.comparison.a)
        for place, lost in row.seconds_per_token:
            weight = place.calls_per_step / place.tokens_per_step
            half = (interval.high - interval.low) / 2 * before_s * weight
            part = (before_s * weight, lost, half, (judgement.noise or 0.0) * before_s * weight)
            groups.setdefault((place.model, place.tokens_per_step), []).append(part)
    found = []
    for (model, tokens), parts in groups.items():
        before, lost = sum(part[0] for part in parts), sum(part[1] for part in parts)
        low = lost - math.hypot(*(part[2] for part in parts))
        limit = max(margin * before, NOISE_FACTOR * math.hypot(*(part[3] for part in parts)))
        result: Result = "fail" if low > limit else "pass"
        found.append(TotalRow(model, tokens, len(parts), before, before + lost, low, limit, result))
    return found
