"""Tables, lines and JSON of the levers: owning or renting, intervals, sensitivities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...bench.decode_plan import OMITTED
from ...bench.tables import number, plain_table
from ..cost import StepCost
from ..document import point_dict
from .intervals import CostInterval
from .sensitivity import Sensitivity, SensitivityResult
from .tco import Ownership, break_even_capex_usd, break_even_utilisation, per_token

if TYPE_CHECKING:
    from rich.table import Table

DENOMINATOR = "output tokens of decode GPUs"


def operating_point(cost: StepCost) -> str:
    """Model, GPU, stack, precision, split, batch and context in one line."""
    step, deployment = cost.step, cost.step.deployment
    accepted = f", {deployment.kept_tokens_per_step:g} of {deployment.tokens_per_step} tokens kept per step"
    return (
        f"{step.model.name} on {step.gpu.title}, {step.stack}, {deployment.precision.name}: {deployment.describe()}, "
        f"{deployment.batch_per_gpu:g} sequences/GPU x {deployment.context} tokens"
        + (accepted if deployment.tokens_per_step > 1 else "")
    )


def _price_line(cost: StepCost) -> str:
    return f"price: ${cost.price.usd_per_gpu_hour:g}/GPU-h, {cost.price.describe()}"


def _coverage_line(cost: StepCost) -> str:
    return "of the time, " + ", ".join(f"{share:.0%} {name}" for name, share in cost.step.coverage().items())


def _head(cost: StepCost) -> dict[str, Any]:
    """The point without its ops."""
    return {key: value for key, value in point_dict(cost).items() if key != "ops"} | {"denominator": DENOMINATOR}


# -- owning --------------------------------------------------------------------------------------


def tco_table(ownership: Ownership) -> Table:
    total = ownership.usd_per_gpu_hour
    rows = [(name, number(usd, 4), f"{usd / total:.1%}") for name, usd in ownership.parts_usd_per_gpu_hour.items()]
    title = f"Owning one {ownership.gpu}"
    return plain_table(title, ("part", "$/GPU-h sold", "share"), [*rows, ("total", number(total, 4), "100.0%")])


def tco_lines(ownership: Ownership, rents: Mapping[str, float], tokens_per_s: float | None = None) -> list[str]:
    lines = [
        f"${ownership.usd_per_gpu_hour:.4g} per GPU-hour sold ({ownership.utilisation:.0%} of hours), "
        f"${sum(ownership.owned_hour_parts_usd.values()):.4g} per GPU-hour owned",
        f"inputs: {ownership.describe()}",
        f"electricity and colocation: {ownership.energy_and_colocation_share:.1%} (InferenceX: under 20 % of TCO)",
    ]
    for name, usd in rents.items():
        share, capex = break_even_utilisation(ownership, usd), break_even_capex_usd(ownership, usd)
        lines.append(
            f"rent ${usd:g} ({name}): "
            + (
                f"break-even where {share:.1%} of owned hours are sold"
                if share
                else "never: rent is cheaper even if all are sold"
            )
            + (f"; at the stated utilisation, where capex is ${capex:,.0f}/GPU" if capex else "")
        )
    if rents:
        lines.append("break-even is against rent that is paid only for hours used; a contract pays for all of them")
    if tokens_per_s is not None:
        found = per_token(ownership, tokens_per_s)
        lines.append(
            f"at {tokens_per_s:g} tokens/s/GPU: ${found['usd_per_mtok']:.4g}/M of these tokens, of it "
            f"${found['electricity_usd_per_mtok']:.3g} electricity ({found['electricity_share']:.1%}); "
            f"{found['tokens_per_s_per_w']:.3g} tokens/s/W, {found['tokens_per_s_per_mw']:,.0f} tokens/s/MW, "
            f"{found['joules_per_token']:.3g} J/token"
        )
    return lines


# -- intervals -----------------------------------------------------------------------------------


def interval_document(found: CostInterval, coverage: Mapping[str, float]) -> dict[str, Any]:
    """``coverage``: of the calibration, by GPU left out."""
    return {
        "schema_version": 1,
        "point": _head(found.cost),
        "usd_per_mtok_output": asdict(found.usd_per_mtok_output),
        "usd_per_mtok_output_at_price": asdict(found.at_price),
        "variance_share": found.variance_share,
        "parts": [asdict(part) for part in found.parts],
        "price_range": None if found.price_range is None else asdict(found.price_range),
        "correlated_within_table": found.correlated,
        "samples": found.samples,
        "seed": found.seed,
        "calibration": {"package": "aiconfigurator-core", "version": found.calibration, "coverage_90": dict(coverage)},
        "omitted": list(OMITTED),
    }


def interval_table(found: CostInterval) -> Table:
    """What the kernels' part of the width is made of, by cause and table."""
    rows = [
        (part.cause, part.table, part.basis, f"{part.time_share:.1%}", f"{part.variance_share:.1%}")
        for part in found.parts
    ]
    columns = ("cause", "table", "calibrated on", "of the time", "of the times' variance")
    return plain_table(operating_point(found.cost), columns, rows, left=3)


def interval_lines(found: CostInterval, coverage: Mapping[str, float]) -> list[str]:
    cost, at = found.cost, found.at_price
    lines = [
        f"${cost.usd_per_mtok_output:.4g} per million {DENOMINATOR}, 5th to 95th percentile at this price "
        f"${at.p5:.4g} to ${at.p95:.4g}, median ${at.p50:.4g}"
    ]
    if found.price_range is not None:
        all_, span = found.usd_per_mtok_output, found.price_range
        lines.append(
            f"with the price at ${span.low_usd_per_gpu_hour:g} to ${span.high_usd_per_gpu_hour:g}/GPU-h "
            f"({span.source}; log-uniform): ${all_.p5:.4g} to ${all_.p95:.4g}, median ${all_.p50:.4g}"
        )
    kind = "one draw per table (the widest)" if found.correlated else "one draw per op (the narrowest)"
    shares = ", ".join(f"{name} {share:.1%}" for name, share in found.variance_share.items())
    covers = coverage.values()
    return [
        *lines,
        f"variance: {shares}; errors {kind}, {found.samples:,} samples, seed {found.seed}",
        f"spreads: left-out rows of aiconfigurator-core {found.calibration}; of a GPU left out, 90 % intervals hold "
        f"{min(covers):.0%} to {max(covers):.0%}",
        _price_line(cost),
        _coverage_line(cost),
        "in no interval: " + "; ".join(OMITTED),
    ]


# -- sensitivities -------------------------------------------------------------------------------


def sensitivity_document(found: SensitivityResult) -> dict[str, Any]:
    rows = [asdict(row) | {"swing_usd_per_mtok": row.swing_usd_per_mtok} for row in found.rows]
    return {
        "schema_version": 1,
        "point": _head(found.cost),
        "rows": rows,
        "skipped": found.skipped,
        "calibration": {"package": "aiconfigurator-core", "version": found.calibration},
        "omitted": list(OMITTED),
    }


def sensitivity_table(found: SensitivityResult) -> Table:
    """Tornado: what moves the price most first."""
    widest = max((row.swing_usd_per_mtok for row in found.rows), default=0.0)
    rows = [
        (
            row.input,
            row.unit,
            row.range_source,
            f"{number(row.low, 4)} .. {number(row.base, 4)} .. {number(row.high, 4)}",
            number(row.usd_per_mtok_low),
            number(row.usd_per_mtok_high),
            "-" if row.elasticity is None else f"{row.elasticity:+.2f}",
            _bar(row, widest),
        )
        for row in found.rows
    ]
    columns = ("input", "unit", "range from", "low .. base .. high", "$/M at low", "$/M at high", "elasticity", "moves")
    table = plain_table(operating_point(found.cost), columns, rows, left=3)
    table.columns[-1].justify = "left"
    return table


def _bar(row: Sensitivity, widest: float) -> str:
    length = round(16 * row.swing_usd_per_mtok / widest) if widest else 0
    return "#" * max(1, length)


def sensitivity_lines(found: SensitivityResult) -> list[str]:
    cost = found.cost
    return [
        f"${cost.usd_per_mtok_output:.4g} per million {DENOMINATOR}; one input moved at a time, all others as they are",
        *(f"not moved: {name}: {reason}" for name, reason in found.skipped.items()),
        _price_line(cost),
        _coverage_line(cost),
        "left out: " + "; ".join(OMITTED),
    ]
