"""The page of a study: throughput and $/M against interactivity, and where the money goes."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ...bench.decode_plan import OMITTED
from ...bench.published import MEASURED_HERE, PROVENANCES
from ..cost import OpCost, StepCost
from ..levers.common_draws import CommonDraws
from ..levers.sensitivity import sensitivity
from ..study import StudyResult, study_of
from ..sweep import Parallel, best_points, frontier
from .lever_view import tornado, tornado_body
from .page import OKABE_ITO, Cell, Section, axis, html_table, layout, log_axis, plot, price_inputs, write_page

STACK_STYLE = {
    "vllm": ("solid", "circle"), "sglang": ("dash", "square"), "trtllm": ("dot", "diamond"),
    "tokenfab": ("longdash", "star"), "tokenfab+vllm": ("longdashdot", "circle-open"),
    "tokenfab+sglang": ("longdashdot", "square-open"), "tokenfab+trtllm": ("longdashdot", "diamond-open"),
}  # fmt: skip
HATCH = {"measured here": ".", "measured": "", "interpolated here": "\\", "interpolated": "/", "modelled": "x"}

GROUPS = {
    "experts": "experts",
    "router": "experts",
    "router_top_k": "experts",
    "attention": "attention",
    "window_attention": "attention",
    "attention_module": "attention",
    "index_scores": "attention",
    "absorbed_q_bmm": "attention",
    "absorbed_v_bmm": "attention",
}
GROUP_ORDER = ("experts", "attention", "dense GEMMs", "communication", "norms and the rest")


def op_group(op: OpCost) -> str:
    """The group an op's dollars are shown under."""
    call = op.timed.call
    if call.name in GROUPS:
        return GROUPS[call.name]
    kinds = {"gemm": "dense GEMMs", "collective": "communication", "all_to_all": "communication"}
    return kinds.get(call.op.kind, "norms and the rest")


def _series(points: Iterable[StepCost]) -> dict[tuple[str, str], list[StepCost]]:
    found: dict[tuple[str, str], list[StepCost]] = {}
    for point in points:
        found.setdefault((point.step.gpu.name, point.step.stack.name), []).append(point)
    return found


def _hover(point: StepCost) -> str:
    deployment = point.step.deployment
    shares = ", ".join(f"{share:.0%} {name}" for name, share in point.step.coverage().items())
    twice = ", ".join(op.timed.call.name for op in point.suspects())
    lines = [
        f"<b>{point.step.gpu.title}, {point.step.stack}</b>",
        f"{deployment.describe()}, {deployment.batch_per_gpu:g} sequences/GPU",
        f"{point.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {point.tokens_per_s_per_user:.1f} tokens/s/user",
        f"${point.usd_per_mtok_output:.3g} per million output tokens",
        shares,
    ]
    return "<br>".join(lines + ([f"look twice: {twice}"] if twice else []))


def _curves(points: Sequence[StepCost], y: str, title: str) -> dict[str, Any]:
    """One line per GPU and stack along its frontier, and the frontier of all of them."""
    gpus = list(dict.fromkeys(point.step.gpu.name for point in points))
    kinds = {"x": "rate", "y": "usd" if y == "usd_per_mtok_output" else "rate"}
    traces: list[dict[str, Any]] = []
    for (gpu, stack), series in _series(points).items():
        dash, symbol = STACK_STYLE[stack]
        colour = OKABE_ITO[gpus.index(gpu) % len(OKABE_ITO)]
        line = {"color": colour, "width": 1.8, "dash": dash}
        marker = {"color": colour, "symbol": symbol, "size": 7}
        traces.append(_line(frontier(series), y, f"{gpu} {stack}", line, marker) | {"meta": {"gpu": gpu, **kinds}})
    best = frontier(points) if y == "tokens_per_s_per_gpu" else cheapest_frontier(points)
    over_all = _line(best, y, "best of all", {"color": "rgba(0,0,0,0.25)", "width": 9}, {"size": 1, "color": "#000"})
    over_all |= {"hoverinfo": "skip", "meta": {"best": "low" if kinds["y"] == "usd" else "high"}}
    del over_all["hovertemplate"]
    axes = (log_axis("tokens per second per user"), log_axis(title))
    return {"data": [over_all, *traces], "layout": layout(*axes, legend={"groupclick": "toggleitem"})}


def _line(
    points: Sequence[StepCost], y: str, name: str, line: dict[str, Any], marker: dict[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "line": line,
        "marker": marker,
        "x": [point.tokens_per_s_per_user for point in points],
        "y": [getattr(point, y) for point in points],
        "text": [_hover(point) for point in points],
        "hovertemplate": "%{text}<extra></extra>",
    }


def cheapest_frontier(points: Iterable[StepCost]) -> list[StepCost]:
    """The points no other beats in both tokens/s/user and $/M, slowest user first."""
    kept: list[StepCost] = []
    for point in sorted(points, key=lambda p: (-p.tokens_per_s_per_user, p.usd_per_mtok_output)):
        if not kept or point.usd_per_mtok_output < kept[-1].usd_per_mtok_output:
            kept.append(point)
    return kept[::-1]


def _breakdown(best: Sequence[StepCost]) -> dict[str, Any]:
    """Stacked bars: dollars by group of ops, hatched by provenance; cheapest on top.

    The axis ends at four times the median, so that one bad row does not flatten the rest; every
    bar's label has its total.
    """
    totals_usd = [point.usd_per_mtok_output for point in best]
    labels = [f"{point.step.gpu.name} {point.step.stack.name}  ${point.usd_per_mtok_output:.3g}" for point in best]
    meta = {
        "x": "usd",
        "gpus": [point.step.gpu.name for point in best],
        "labels": [f"{point.step.gpu.name} {point.step.stack.name}" for point in best],
    }
    totals: dict[tuple[str, str], list[float]] = {}
    for index, point in enumerate(best):
        for op in point.ops():
            key = (op_group(op), op.timed.provenance)
            totals.setdefault(key, [0.0] * len(best))[index] += op.usd_per_mtok
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "y": labels,
            "x": totals[group, provenance],
            "name": f"{group}, {provenance}",
            "legendgroup": group,
            "marker": {
                "color": OKABE_ITO[number],
                "line": {"color": "#fff", "width": 0.5},
                "pattern": {"shape": HATCH[provenance], "fgcolor": "#fff", "fillmode": "overlay", "size": 7},
            },
            "hovertemplate": f"%{{y}}: {group}, {provenance}<br>$%{{x:.3f}} per million tokens<extra></extra>",
            "meta": meta,
        }
        for number, group in enumerate(GROUP_ORDER)
        for provenance in PROVENANCES
        if (group, provenance) in totals
    ]
    return {
        "data": traces,
        "layout": layout(
            axis("$ per million output tokens", range=[0, 1.02 * min(max(totals_usd), 4 * median(totals_usd))]),
            axis("", autorange="reversed", narrow=True),
            barmode="stack",
        ),
    }


def _best_table(best: Sequence[StepCost], draws: CommonDraws) -> str:
    rows = []
    kinds = [name for name in PROVENANCES if any(name in point.step.stack.provenances for point in best)]
    for point in best:
        deployment, shares = point.step.deployment, point.step.coverage()
        gpu, parallel, at = point.step.gpu.name, Parallel.of(deployment), draws.at_price(point)
        rows.append(
            (
                point.step.gpu.title,
                point.step.stack,
                parallel,
                f"{deployment.batch_per_gpu:g}",
                f"{point.step.step_s * 1e3:.2f}",
                Cell.of(f"{point.tokens_per_s_per_gpu:.1f}", rate=point.tokens_per_s_per_gpu),
                Cell.of(f"{point.tokens_per_s_per_user:.1f}", rate=point.tokens_per_s_per_user),
                Cell.of(f"{point.price.usd_per_gpu_hour:.2f}", price=gpu),
                *(Cell.of(f"{usd:.3f}", usd=usd, gpu=gpu) for usd in (point.usd_per_mtok_output, at.p5, at.p95)),
                *(f"{shares.get(kind, 0.0):.0%}" for kind in kinds),
                ", ".join(op.timed.call.name for op in point.suspects()) or "-",
            )
        )
    columns = (
        "GPU",
        "stack",
        "parallel",
        "batch/GPU",
        "step ms",
        "tok/s/GPU",
        "tok/s/user",
        "$/GPU-h",
        "$/M output",
        "5th",
        "95th percentile",
        *kinds,
        "look twice",
    )
    return html_table(columns, rows, 3)


def _best_section(
    best: Sequence[StepCost], number: int, name: str, min_tokens_per_s_per_user: float, draws: CommonDraws
) -> str:
    at = f"the cheapest points at {min_tokens_per_s_per_user:g} tokens/s/user or more"
    if not best:
        return f"<p>No ranked point reaches {min_tokens_per_s_per_user:g} tokens/s/user.</p>"
    has_own = any(MEASURED_HERE in point.step.stack.provenances for point in best)
    here = " Dotted: measured here. Hatched the other way: interpolated here." if has_own else ""
    return (
        f"<h3>Where the money goes: {at}</h3>"
        f"<p class='soft'>Plain: measured. Hatched: interpolated. Crossed: modelled.{here}</p>"
        f"{plot(f'breakdown-{number}', f'{name}: cost by group of ops', is_tall=True)}"
        f"<h3>In numbers: {at}, per GPU and stack</h3>"
        "<p class='soft'>Percentiles: of what the times' errors make of the price of a token.</p>"
        f"{_best_table(best, draws)}"
    )


def _drafts(study: StudyResult) -> str:
    kept, tokens = study.sweep.kept_tokens_per_step, study.sweep.tokens_per_step
    return f"{tokens} tokens verified per step, {kept:g} of them kept; " if tokens > 1 else ""


def _model_section(study: StudyResult, number: int, min_rate: float, max_modelled: float) -> Section:
    name = study.model.name
    ranked = [point for point in study.points if point.step.coverage()["modelled"] <= max_modelled]
    best = best_points(ranked, min_rate, max_modelled)
    throughput, cost = (f"{kind}-{number}" for kind in ("throughput", "cost"))
    figures = {
        throughput: _curves(ranked, "tokens_per_s_per_gpu", "tokens per second per GPU"),
        cost: _curves(ranked, "usd_per_mtok_output", "$ per million output tokens"),
    }
    moved = ""
    if best:
        moves = sensitivity(study_of(study.study, best[0]))
        figures[f"breakdown-{number}"], figures[f"moves-{number}"] = _breakdown(best), tornado(moves)
        moved = tornado_body(moves, f"moves-{number}")
    body = (
        f"<p>{html.escape(study.sweep.precision.title)}; {study.sweep.context} tokens of context per sequence; "
        f"expert load {html.escape(study.sweep.load)}; {_drafts(study)}"
        f"{len(ranked)} of {len(study.points)} points ranked.</p>"
        f"<h3>Throughput against interactivity</h3><p class='soft'>Up and right is better.</p>"
        f"{plot(throughput, f'{name}, throughput')}"
        f"<h3>Cost against interactivity</h3><p class='soft'>Down and right is better.</p>{plot(cost, f'{name}, cost')}"
        + _best_section(best, number, name, min_rate, CommonDraws(study.data))
        + moved
    )
    return Section(f"model-{number}", name, body, figures)


def _prices_section(studies: Sequence[StudyResult]) -> Section:
    rows = {
        point.price: (
            point.step.gpu.title, point.price.tier, f"{point.price.usd_per_gpu_hour:.3f}",
            point.price.kw_per_gpu or "-", point.price.date, point.price.source, point.price.note,
        )
        for study in studies for point in study.points
    }  # fmt: skip
    columns = ("GPU", "tier", "$/GPU-h", "kW/GPU", "date", "source", "note")
    return Section("prices", "Price book used", html_table(columns, rows.values(), 2))


def _how_section(max_modelled: float) -> Section:
    body = (
        "<p>Every time is one of three kinds. <b>Measured</b>: the exact row of a published table. "
        "<b>Interpolated</b>: between two rows, through the roofline. <b>Modelled</b>: beyond the last row, borrowed "
        "from the nearest published shape, or a roofline at a stated efficiency. A stack called tokenfab is this "
        "project's own kernels: <b>measured here</b> and <b>interpolated here</b> are from its records, and what has "
        "none is modelled, or the named stack's published row. Published rows replay a CUDA graph over the same "
        "buffers, so small weights may be warm in L2. Source: aiconfigurator-core (NVIDIA, Apache-2.0). Points with "
        f"more than {max_modelled:.0%} of their time modelled are not drawn or ranked. Tokens are output tokens of "
        "decode GPUs. Which points are listed as cheapest, and which kernels to look at twice, is by the book's "
        "prices; dollars follow the inputs above.</p>"
    )
    return Section("how", "How to read this", body)


def write_report(
    path: Path, studies: Sequence[StudyResult], min_tokens_per_s_per_user: float, max_modelled: float
) -> None:
    """Write the report of one or more studies.

    Raises:
        ValueError: the file cannot be written.
    """
    prices = {
        point.step.gpu.name: (point.step.gpu.title, point.price.usd_per_gpu_hour)
        for study in studies for point in study.points
    }  # fmt: skip
    kept = {(study.sweep.kept_tokens_per_step, study.sweep.tokens_per_step) for study in studies}
    one = next(iter(kept)) if len(kept) == 1 else (1.0, 1)
    omitted = "".join(f"<li>{html.escape(text)}</li>" for text in OMITTED)
    sections = [
        *(
            _model_section(study, number, min_tokens_per_s_per_user, max_modelled)
            for number, study in enumerate(studies)
        ),
        _prices_section(studies),
        Section("omitted", "What the sums leave out", f"<ul>{omitted}</ul>"),
        _how_section(max_modelled),
    ]
    title = "Dollars per million tokens, kernel by kernel"
    write_page(
        path,
        title,
        "a decode step from published kernel times",
        sections,
        price_inputs(prices, {"": ("acceptance length", one[0], one[1])} if one[1] > 1 else None),
    )
