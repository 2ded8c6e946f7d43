"""Which input of one deployment moves its price per million tokens most: one at a time, over each input's own range.

    elasticity = ln(usd_high / usd_low) / ln(high / low)      (the arc over the whole range)

-1 for what divides the price, +1 for what multiplies it, an op group's is near its share of the step. Batch and
context are evaluated again at both ends, with all their ops; an op group's or an error's range is its 5th and 95th
percentile (``intervals``), times as a factor of what was said. Every range names its source; ``ranges`` replaces it.

Units: dollars per million output tokens of decode GPUs. Errors: ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...bench.memory import largest_batch
from ...bench.model_config import ModelConfig
from ...bench.ops import Collective, ExpertAllToAll, Experts, Gemm, Op, Streaming
from ..cost import StepCost
from ..prices import PriceBook
from ..study import Study, price_step
from .intervals import INTERPOLATION, MODEL, OpError, at_probability, op_errors, price_range_of

PRICE, UTILISATION, ACCEPTANCE, BATCH, CONTEXT = INPUTS = (
    "price", "utilisation", "acceptance length", "batch", "context",
)  # fmt: skip
"""Inputs whose range can be given; op groups and errors have that of their calibration."""

UTILISATION_RANGE = (
    226.75 / 278, 1.0,
    "average over peak nodes of DeepSeek's day (open-infra-index, day 6: 226.75 of 278), to every hour used",
)  # fmt: skip

ACCEPTED = {2: (1.79, 1.93), 4: (2.49, 3.39), 8: (2.54, 5.04)}
"""Acceptance lengths at 1, 3 and 7 drafts, lowest and highest of Qwen3.5-397B, GLM-5.2 and DeepSeek-V4-Pro.
Source: InferenceX golden distributions, coding (facts: economics, case 4)."""


@dataclass(frozen=True)
class Sensitivity:
    """One input moved from ``low`` to ``high`` (``unit``), all others as they are.

    ``usd_per_mtok_low`` is the price at ``low``, not the lower price. ``elasticity`` is None where low = high. The
    shares are how much of the step's time is modelled at either end.
    """

    input: str
    unit: str
    low: float
    base: float
    high: float
    usd_per_mtok_low: float
    usd_per_mtok_high: float
    elasticity: float | None
    range_source: str
    modelled_share_low: float
    modelled_share_high: float

    @property
    def swing_usd_per_mtok(self) -> float:
        """How far the price moves from end to end."""
        return abs(self.usd_per_mtok_high - self.usd_per_mtok_low)


@dataclass(frozen=True)
class SensitivityResult:
    """``rows``: what moves the price most first. ``skipped``: inputs that cannot move, and why."""

    cost: StepCost
    rows: tuple[Sensitivity, ...]
    skipped: dict[str, str]
    calibration: str


def sensitivity(plan: Study, ranges: Mapping[str, tuple[float, float]] | None = None) -> SensitivityResult:
    """Every input of the study's one deployment, ranked by how far it moves the price.

    Args:
        ranges: (low, high) per input of ``INPUTS``: $/GPU-h, share of paid hours, tokens kept per step, sequences per
            GPU, cached tokens.

    Raises:
        ValueError: an unknown input, a range that is none, out of bounds or does not fit; as ``price_step``.
    """
    from .calibration import Calibration

    given = dict(ranges or {})
    for name, (low, high) in given.items():
        if name not in INPUTS:
            raise ValueError(f"ranges: expected inputs of {', '.join(INPUTS)}; got {name!r}")
        if not 0 < low < high < math.inf:
            raise ValueError(f"ranges: {name}: expected 0 < low < high; got {low} to {high}")
    cost = price_step(plan)
    calibration = Calibration.read()
    errors = op_errors(cost, plan.data, calibration)
    rows: list[Sensitivity] = []
    skipped: dict[str, str] = {}
    makers: dict[str, Callable[[Study, StepCost, tuple[float, float] | None], Sensitivity]] = {
        PRICE: _price, UTILISATION: _utilisation, ACCEPTANCE: _acceptance, BATCH: _batch, CONTEXT: _context,
    }  # fmt: skip
    for name, make in makers.items():
        try:
            rows.append(make(plan, cost, given.get(name)))
        except _CannotMove as reason:
            if name in given:
                raise ValueError(f"ranges: {name}: {reason}") from None
            skipped[name] = str(reason)
    rows += _op_rows(cost, errors)
    rows.sort(key=lambda row: -row.swing_usd_per_mtok)
    return SensitivityResult(cost, tuple(rows), skipped, calibration.version)


class _CannotMove(Exception):
    """An input without a range at this operating point."""


def _row(
    name: str, unit: str, points: tuple[float, float, float], prices: tuple[float, float], source: str,
    shares: tuple[float, float],
) -> Sensitivity:  # fmt: skip
    low, base, high = points
    elasticity = math.log(prices[1] / prices[0]) / math.log(high / low) if high != low else None
    return Sensitivity(name, unit, low, base, high, *prices, elasticity, source, *shares)


def _modelled(cost: StepCost) -> float:
    return cost.step.coverage()["modelled"]


def _scaled(
    name: str, unit: str, cost: StepCost, base: float, span: tuple[float, float], source: str, power: int
) -> Sensitivity:
    """What the price is proportional to, or (power -1) to the reciprocal of."""
    usd, share = cost.usd_per_mtok_output, _modelled(cost)
    prices = tuple(usd * (end / base) ** power for end in span)
    return _row(name, unit, (span[0], base, span[1]), (prices[0], prices[1]), source, (share, share))


def _price(plan: Study, cost: StepCost, given: tuple[float, float] | None) -> Sensitivity:
    base = cost.price.usd_per_gpu_hour
    if given is not None:
        return _scaled(PRICE, "$/GPU-h", cost, base, given, "given", 1)
    span = price_range_of(cost.price, PriceBook.read())
    if span is None:
        raise _CannotMove("a stated price has no range of its own; give one")
    ends = (span.low_usd_per_gpu_hour, span.high_usd_per_gpu_hour)
    return _scaled(PRICE, "$/GPU-h", cost, base, ends, span.source, 1)


def _utilisation(plan: Study, cost: StepCost, given: tuple[float, float] | None) -> Sensitivity:
    """Of the paid hours, the share that decodes; the cost itself assumes all."""
    low, high = given or UTILISATION_RANGE[:2]
    if high > 1:
        raise ValueError(f"ranges: {UTILISATION}: expected at most 1; got {high}")
    source = "given" if given else UTILISATION_RANGE[2]
    return _scaled(UTILISATION, "share of paid hours", cost, 1.0, (low, high), source, -1)


def _acceptance(plan: Study, cost: StepCost, given: tuple[float, float] | None) -> Sensitivity:
    deployment = cost.step.deployment
    most = deployment.tokens_per_step
    if most == 1:
        raise _CannotMove("one token per step: nothing is drafted")
    known = ACCEPTED.get(most)
    low, high = given or known or (1.0, float(most))
    if not 1 <= low <= high <= most:
        raise ValueError(f"ranges: {ACCEPTANCE}: expected 1 to {most} tokens per step; got {low} to {high}")
    base = deployment.kept_tokens_per_step
    if given:
        source = "given"
    elif known:
        source = f"three models' measured lengths at {most - 1} drafts (InferenceX golden distributions, coding)"
        if not low <= base <= high:
            low, high, source = min(low, base), max(high, base), f"{source}, widened to the base"
    else:
        source = f"its bounds: none or all of {most - 1} drafts kept"
    return _scaled(ACCEPTANCE, "tokens kept/step", cost, base, (low, high), source, -1)


def _batch(plan: Study, cost: StepCost, given: tuple[float, float] | None) -> Sensitivity:
    deployment = cost.step.deployment
    group = deployment.attention_tp
    sequences = round(deployment.batch_per_gpu * group)
    if given is not None:
        low, high, source = *given, "given"
    else:
        most = largest_batch(plan.sweep.model, cost.step.gpu, replace(deployment, batch_per_gpu=1 / group))
        ends = max(1, sequences // 2), min(2 * sequences, most)
        if ends[0] == ends[1]:
            raise _CannotMove(f"{sequences} sequence is all that fits an attention group")
        low, high = (end / group for end in ends)
        source = "half to twice" if ends[1] == 2 * sequences else f"half to what fits ({ends[1]} per attention group)"
    points = [price_step(replace(plan, sweep=replace(plan.sweep, batches=[end]))) for end in (low, high)]
    return _evaluated(BATCH, "sequences/GPU", (low, deployment.batch_per_gpu, high), points, source)


def _context(plan: Study, cost: StepCost, given: tuple[float, float] | None) -> Sensitivity:
    model, deployment = plan.sweep.model, cost.step.deployment
    base = deployment.context
    if given is not None:
        if any(end != int(end) for end in given):
            raise ValueError(f"ranges: {CONTEXT}: expected whole tokens; got {given[0]} to {given[1]}")
        low, high, source = int(given[0]), int(given[1]), "given"
    else:
        low, high, source = max(1, base // 2), 2 * base, "half to twice"
        most = _largest_context(model, cost, min(high, model.max_context))
        if most < high:
            high, source = most, f"half to what the model and its memory hold ({most} tokens)"
        if low == high:
            raise _CannotMove(f"{base} tokens are all that fits")
    points = [price_step(replace(plan, sweep=replace(plan.sweep, context=end))) for end in (low, high)]
    return _evaluated(CONTEXT, "cached tokens", (low, base, high), points, source)


def _largest_context(model: ModelConfig, cost: StepCost, limit: int) -> int:
    """The most cached tokens up to ``limit`` at which the cost's own batch fits, by bisection."""
    deployment = cost.step.deployment
    sequences = round(deployment.batch_per_gpu * deployment.attention_tp)
    one = replace(deployment, batch_per_gpu=1 / deployment.attention_tp)

    def fits(context: int) -> bool:
        return largest_batch(model, cost.step.gpu, replace(one, context=context)) >= sequences

    if fits(limit):
        return limit
    low, high = deployment.context, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _evaluated(
    name: str, unit: str, values: tuple[float, float, float], points: Sequence[StepCost], source: str
) -> Sensitivity:
    prices, shares = [each.usd_per_mtok_output for each in points], [_modelled(each) for each in points]
    return _row(name, unit, values, (prices[0], prices[1]), source, (shares[0], shares[1]))


# -- times ---------------------------------------------------------------------------------------


def op_group(op: Op) -> str:
    """What an op is to a reader of a bill: attention, experts, linear layers, communication, or streams."""
    if isinstance(op, Experts):
        return "experts"
    if isinstance(op, Collective | ExpertAllToAll):
        return "communication"
    if isinstance(op, Streaming):
        return "norms and streams"
    return "linear layers" if isinstance(op, Gemm) else "attention"


def _op_rows(cost: StepCost, errors: Sequence[OpError]) -> list[Sensitivity]:
    """Each op group's time, and all interpolated and all modelled times, at their 5th and 95th percentile."""
    chosen: dict[str, list[OpError]] = {}
    for error in errors:
        chosen.setdefault(f"time of {op_group(error.timed.call.op)}", []).append(error)
        if error.cause in (INTERPOLATION, MODEL):
            title = "interpolation" if error.cause == INTERPOLATION else "models where no row is"
            chosen.setdefault(title, []).append(error)
    share = _modelled(cost)
    rows = []
    for name, members in chosen.items():
        said_s = sum(each.timed.time_s for each in members)
        ends = [
            sum(each.timed.time_s * float(each.factor(probability)) for each in members) / said_s
            for probability in (0.05, 0.95)
        ]
        usd = [at_probability(cost, list(members), probability) for probability in (0.05, 0.95)]
        causes = " and ".join(sorted({each.cause for each in members}))
        source = f"5th to 95th percentile of its {causes} errors, {said_s / cost.step.step_s:.1%} of the step"
        rows.append(_row(name, "x the said time", (ends[0], 1.0, ends[1]), (usd[0], usd[1]), source, (share, share)))
    return rows
