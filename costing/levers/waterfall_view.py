"""Tables, lines and JSON of waterfalls and of ratios over interactivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...bench.published import PROVENANCES
from ...bench.tables import number, plain_table
from .waterfall import Waterfall
from .waterfall_ends import Found, Ratio
from .waterfall_orders import Orders, order_text
from .waterfall_point import Priced

if TYPE_CHECKING:
    from rich.table import Table

    from .intervals import Percentiles

Limits = Sequence[float | None]
"""Tokens/s/user that each end had to reach; None where its batch was given."""

SCHEMA_VERSION = 1
SHORT: dict[str, str] = dict(zip(PROVENANCES, ("here", "meas", "interp here", "interp", "model"), strict=True))
WHAT_IF = "modelled: what-if by roofline"


def shares_text(coverage: Mapping[str, float]) -> str:
    """ "72% measured, 5% interpolated, 23% modelled"."""
    return ", ".join(f"{share:.0%} {name}" for name, share in coverage.items() if share)


def _short(coverage: Mapping[str, float]) -> str:
    return "/".join(f"{share:.0%}" for share in coverage.values())


def priced_dict(priced: Priced) -> dict[str, Any]:
    """One operating point, without its ops."""
    point, deployment = priced.point, priced.step.deployment
    return {
        "operating_point": priced.describe(),
        "gpu": point.gpu.name,
        "stack": str(priced.step.stack),
        "precision": point.precision.name,
        "kv_format": point.precision.kv,
        "parallel": str(point.parallel),
        "gpus": deployment.gpus,
        "batch_per_gpu": point.batch_per_gpu,
        "context": point.context,
        "drafts": point.drafts,
        "acceptance_length": point.acceptance_length,
        "acceptance_source": point.acceptance_source,
        "drafter": point.drafter if point.drafts else None,
        "input_tokens": point.request.input_tokens if point.request else None,
        "cached_tokens": point.request.cached_tokens if point.request else None,
        "output_tokens": point.request.output_tokens if point.request else None,
        "prefill_parallel": str(point.prefill_parallel) if point.prefill_parallel else None,
        "prefill_gpus_per_decode_gpu": priced.prefill_per_decode_gpu if priced.prefill else None,
        "load": point.load,
        "usd_per_gpu_hour": point.price.usd_per_gpu_hour,
        "price_source": point.price.describe(),
        "tokens_per_s_per_gpu": priced.tokens_per_s_per_gpu,
        "tokens_per_s_per_user": priced.tokens_per_s_per_user,
        "usd_per_mtok_output": priced.usd_per_mtok,
        "usd_per_mtok_total": priced.usd_per_mtok_total,
        "denominator": priced.denominator,
        "coverage": priced.coverage,
    }


def waterfall_document(
    shown: Waterfall, orders: Orders, intervals: Sequence[Percentiles | None] = (), limits: Limits = (None, None)
) -> dict[str, Any]:  # fmt: skip
    """The machine-readable result. ``intervals``: of the two ends, at their own prices."""
    ends = [priced_dict(shown.start), priced_dict(shown.end)]
    for end, interval in zip(ends, intervals, strict=False):
        end["usd_per_mtok_output_at_price"] = asdict(interval) if interval else None
    cumulative, factors = 1.0, []
    for factor in shown.factors:
        cumulative *= factor.factor
        factors.append(
            {
                "factor": factor.name,
                "from": factor.change_from,
                "to": factor.change_to,
                "usd_per_mtok_output_before": factor.usd_before,
                "usd_per_mtok_output_after": factor.usd_after,
                "ratio": factor.factor,
                "cumulative": cumulative,
                "what_if_by_roofline": factor.modelled,
                "coverage_before": dict(factor.coverage_before),
                "coverage_after": dict(factor.coverage_after),
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "model": shown.start.step.model.name,
        "denominator": _denominator(shown),
        "from": ends[0],
        "to": ends[1],
        "from_min_tokens_per_s_per_user": limits[0],
        "to_min_tokens_per_s_per_user": limits[1],
        "order": order_text(shown.order),
        "factors": factors,
        "ratio": shown.total,
        "times_cheaper": 1 / shown.total,
        "unchanged": {name: shown.start.point.show(name) for name in shown.unchanged},
        "points": [priced_dict(point) for point in shown.points],
        "orders": {
            "possible": orders.possible,
            "all": orders.all,
            "points": orders.points,
            "factors": [asdict(each) for each in orders.softness],
            "impossible": list(orders.impossible),
        },
        "omitted": list(omitted(shown)),
    }


def omitted(shown: Waterfall) -> tuple[str, ...]:
    """What no figure of the waterfall contains."""
    return tuple(dict.fromkeys((*shown.start.omitted, *shown.end.omitted)))


def _denominator(shown: Waterfall) -> str:
    return " against ".join(dict.fromkeys((shown.start.denominator, shown.end.denominator)))


def waterfall_table(shown: Waterfall, orders: Orders) -> Table:
    """Every change with what it made of the $/M, and how soft that is."""
    soft = {each.name: each for each in orders.softness}
    cumulative, rows = 1.0, []
    for factor in shown.factors:
        cumulative *= factor.factor
        each = soft.get(factor.name)
        rows.append(
            (
                factor.name,
                factor.change_from,
                factor.change_to,
                WHAT_IF if factor.modelled else f"{_short(factor.coverage_before)} -> {_short(factor.coverage_after)}",
                number(factor.usd_before, 4),
                number(factor.usd_after, 4),
                f"{factor.factor:.3f}",
                f"{cumulative:.3f}",
                f"{each.average:.3f}" if each else "",
                f"{each.least:.3f} .. {each.most:.3f}" if each else "",
            )
        )
        if factor.name == "gpu: kernels" and "gpu" in soft:
            rows.append(_whole_gpu(shown, soft["gpu"]))
    kinds = "/".join(SHORT[name] for name in shown.start.coverage)
    columns = (
        "change", "from", "to", kinds, "$/M before", "after", "x", "cumulative", "x, mean of orders", "least .. most",
    )  # fmt: skip
    title = f"{shown.start.step.model.name}: $ per million {_denominator(shown)}, x = after / before"
    return plain_table(title, columns, rows, left=4)


def _whole_gpu(shown: Waterfall, soft: Any) -> tuple[str, ...]:
    return ("gpu, all four", "", "", "", "", "", f"({soft.shown:.3f})", "", f"{soft.average:.3f}",
            f"{soft.least:.3f} .. {soft.most:.3f}")  # fmt: skip


def end_lines(name: str, priced: Priced, interval: Percentiles | None = None) -> list[str]:
    """One end in full: the operating point, what it gives, what it costs, where from."""
    point = priced.point
    span = f", 5th to 95th percentile ${interval.p5:.4g} to ${interval.p95:.4g} at this price" if interval else ""
    return [
        f"{name}: {priced.describe()}",
        f"  {priced.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {priced.tokens_per_s_per_user:.1f} tokens/s/user, "
        f"${priced.usd_per_mtok:.4g}/M {priced.denominator}{_of_total(priced)}{span}",
        f"  of the GPU time, {shares_text(priced.coverage)}{_prefill_gpus(priced)}",
        f"  price ${point.price.usd_per_gpu_hour:g}/GPU-h: {point.price.describe()}",
    ]


def _of_total(priced: Priced) -> str:
    total = priced.usd_per_mtok_total
    return "" if total is None else f", ${total:.4g}/M of input and output tokens"


def _prefill_gpus(priced: Priced) -> str:
    if priced.prefill is None:
        return ""
    ratio = priced.prefill_per_decode_gpu
    if priced.point.prefill_parallel is None:
        return f"; {ratio / (1 + ratio):.0%} of it prefill"
    return f"; {ratio:.2f} GPUs prefill for each that decodes, paid for"


def waterfall_lines(
    shown: Waterfall, orders: Orders, intervals: Sequence[Percentiles | None] = (), limits: Limits = (None, None)
) -> list[str]:  # fmt: skip
    first, last = intervals if intervals else (None, None)
    lines = [
        *end_lines("from", shown.start, first),
        *end_lines("to", shown.end, last),
        f"total: ${shown.start.usd_per_mtok:.4g} to ${shown.end.usd_per_mtok:.4g} per million {_denominator(shown)}, "
        f"x {shown.total:.4g}: {_times(shown.total)}, at these two operating points; {_chosen(limits)}",
        f"order: {order_text(shown.order)}; a change's x depends on it, the total does not. {orders.possible} of "
        f"{orders.all} orders can be ({orders.points} points); their mean is geometric",
    ]
    if any(factor.modelled for factor in shown.factors):
        lines.append(
            "gpu: bandwidth, compute and links scale every op by its roofline, launch-bound ones too; kernels is what "
            "the tables of the two GPUs leave of that"
        )
    if shown.unchanged:
        lines.append("the same at both ends: " + "; ".join(shown.start.point.show(g) for g in shown.unchanged))
    return [*lines, "left out: " + "; ".join(omitted(shown))]


def _chosen(limits: Limits) -> str:
    if None not in limits and limits[0] == limits[1]:
        return f"each the cheapest found at {limits[0]:g} tokens/s/user or more"
    if limits[0] is limits[1] is None:
        return "each the cheapest found at its given batch, whatever its tokens/s/user"
    names = ("at a given batch" if limit is None else f"the cheapest at >= {limit:g} tokens/s/user" for limit in limits)
    return "unlike interactivity: from {}, to {}".format(*names)


def _times(ratio: float) -> str:
    return f"{1 / ratio:.3g} times cheaper" if ratio <= 1 else f"{ratio:.3g} times dearer"


# -- ratios over interactivity -------------------------------------------------------------------


def ratios_document(
    found: Sequence[Found], rows: Sequence[Ratio], matrix: Sequence[Sequence[Ratio]] = ()
) -> dict[str, Any]:
    """Same interactivity on both sides (``rows``), each against each (``matrix``); null: a side has no such point."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": found[0].points[0].step.model.name,
        "denominator": _sides_denominator(found),
        "rows": [_ratio_dict(row) for row in rows],
        "mismatched": [
            [
                {
                    "from_min_tokens_per_s_per_user": each.min_before,
                    "to_min_tokens_per_s_per_user": each.min_after,
                    "times_cheaper": each.factor,
                }
                for each in row
            ]
            for row in matrix
        ],
        "omitted": list(_sides_omitted(found)),
    }


def _sides_denominator(found: Sequence[Found]) -> str:
    return " against ".join(dict.fromkeys(each.points[0].denominator for each in found))


def _sides_omitted(found: Sequence[Found]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(what for each in found for what in each.points[0].omitted))


def _ratio_dict(row: Ratio) -> dict[str, Any]:
    return {
        "min_tokens_per_s_per_user": row.min_before,
        "times_cheaper": row.factor,
        "times_tokens_per_s_per_gpu": row.throughput,
        "from": None if row.before is None else priced_dict(row.before),
        "to": None if row.after is None else priced_dict(row.after),
    }


def ratios_lines(found: Sequence[Found], max_modelled: float) -> list[str]:
    """What both tables are of."""
    lines = []
    for name, each in zip(("from", "to"), found, strict=True):
        side, point = each.side, each.points[0].point
        tried = [", ".join(f"{p.name} (KV {p.kv})" for p in side.precisions), ", ".join(side.stacks)]
        tried += [f"{len(side.parallels)} splits", f"{len(each.points)} points"]
        apart = f"own GPUs prefill, {len(side.prefill_parallels)} splits" if side.prefill_parallels else ""
        lines += [
            f"{name}: {side.gpu.title}, ${side.price.usd_per_gpu_hour:g}/GPU-h: {side.price.describe()}",
            f"  tried: {', '.join(tried)}; {point.show('context')}; {point.show('drafts')}; "
            + (apart or point.show("disaggregation")),
        ]
    return [
        *lines,
        f"each point is the cheapest of its side that is so fast; none with more than {max_modelled:.0%} of its time "
        "modelled",
        "left out: " + "; ".join(_sides_omitted(found)),
    ]


def point_cells(priced: Priced | None) -> tuple[str, ...]:
    """A point in few words, tokens/s/user, tokens/s/GPU, $/M, share modelled."""
    if priced is None:
        return ("no such point", "-", "-", "-", "-")
    point = priced.point
    drafts = f", {point.drafts} draft{'s' if point.drafts > 1 else ''}" if point.drafts else ""
    apart = f", prefill {point.prefill_parallel}" if point.prefill_parallel else ""
    return (
        f"{point.stack} {point.precision.name} {point.parallel} batch {point.batch_per_gpu:g}{drafts}{apart}",
        number(priced.tokens_per_s_per_user, 3),
        f"{priced.tokens_per_s_per_gpu:,.0f}",
        number(priced.usd_per_mtok),
        f"{priced.coverage['modelled']:.0%}",
    )


def ratios_table(found: Sequence[Found], rows: Sequence[Ratio]) -> Table:
    """Same interactivity on both sides: how many times cheaper, and both operating points."""
    cells = [
        (
            f"{row.min_before:g}",
            *point_cells(row.before),
            *point_cells(row.after),
            "-" if row.throughput is None else f"{row.throughput:.1f}",
            "-" if row.factor is None else f"{row.factor:.1f}",
        )
        for row in rows
    ]
    model = found[0].points[0].step.model.name
    title = f"{model}: $ per million {_sides_denominator(found)}, the same tokens/s/user on both sides"
    figures = ("tok/s/user", "tok/s/GPU", "$/M", "model")
    columns = (">= tok/s/user", "from", *figures, "to", *figures, "x tok/s/GPU", "times cheaper")
    table = plain_table(title, columns, cells, left=2)
    second = table.columns[2 + len(figures)]
    second.justify, second.no_wrap = "left", False
    return table


def mismatched_table(matrix: Sequence[Sequence[Ratio]]) -> Table:
    """Times cheaper, a row per limit of ``from``, a column per limit of ``to``."""
    columns = ("from >= \\ to >=", *(f"{each.min_after:g}" for each in matrix[0]))
    cells = [
        (f"{row[0].min_before:g}", *(number(each.factor, 2 if (each.factor or 0) < 10 else 3) for each in row))
        for row in matrix
    ]
    return plain_table("Times cheaper, unlike tokens/s/user: rows from, columns to", columns, cells, left=1)
