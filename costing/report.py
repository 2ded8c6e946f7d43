"""The report: one HTML file that works offline. Throughput and $/M against interactivity, and where the money goes.

Plotly draws; this file only arranges data. Colour means GPU (or group of ops), line and marker the
stack, hatching the provenance, so nothing is told by colour alone. The palette is Okabe and Ito's.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from .. import __version__
from ..bench.decode_plan import OMITTED
from ..bench.published import MEASURED_HERE, PROVENANCES
from .cost import OpCost, StepCost
from .study import StudyResult
from .sweep import Parallel, best_points, frontier

TEMPLATE = Path(__file__).with_name("report.html")

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
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


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "gridcolor": "#e6e9ec", "zeroline": False, "automargin": True, **more}


def _log_axis(title: str) -> dict[str, Any]:
    """A log axis labelled 1, 2, 5, 10, ... in full."""
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    return _axis(
        title,
        type="log",
        tickvals=ticks,
        ticktext=[f"{tick:,.3g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks],
    )


def _layout(x: dict[str, Any], y: dict[str, Any], **more: Any) -> dict[str, Any]:
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


def _curves(points: Sequence[StepCost], y: str, title: str) -> dict[str, Any]:
    """One line per GPU and stack along its frontier, and the frontier of all of them."""
    gpus = list(dict.fromkeys(point.step.gpu.name for point in points))
    traces: list[dict[str, Any]] = []
    for (gpu, stack), series in _series(points).items():
        dash, symbol = STACK_STYLE[stack]
        colour = OKABE_ITO[gpus.index(gpu) % len(OKABE_ITO)]
        traces.append(
            _line(
                frontier(series),
                y,
                f"{gpu} {stack}",
                {"color": colour, "width": 1.8, "dash": dash},
                {"color": colour, "symbol": symbol, "size": 7},
            )
        )
    best = frontier(points) if y == "tokens_per_s_per_gpu" else cheapest_frontier(points)
    over_all = _line(best, y, "best of all", {"color": "rgba(0,0,0,0.25)", "width": 9}, {"size": 1, "color": "#000"})
    over_all["hoverinfo"] = "skip"
    del over_all["hovertemplate"]
    layout = _layout(_log_axis("tokens per second per user"), _log_axis(title), legend={"groupclick": "toggleitem"})
    return {"data": [over_all, *traces], "layout": layout}


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
        }
        for number, group in enumerate(GROUP_ORDER)
        for provenance in PROVENANCES
        if (group, provenance) in totals
    ]
    return {
        "data": traces,
        "layout": _layout(
            _axis("$ per million output tokens", range=[0, 1.02 * min(max(totals_usd), 4 * median(totals_usd))]),
            _axis("", autorange="reversed", narrow=True),
            barmode="stack",
        ),
    }


def _html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int) -> str:
    def cells(tag: str, row: Sequence[Any]) -> str:
        kind = [' class="text"' if index < text_columns else "" for index in range(len(row))]
        return "".join(f"<{tag}{k}>{html.escape(str(cell))}</{tag}>" for k, cell in zip(kind, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", columns)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _best_table(best: Sequence[StepCost]) -> str:
    rows = []
    kinds = [name for name in PROVENANCES if any(name in point.step.stack.provenances for point in best)]
    for point in best:
        deployment, shares = point.step.deployment, point.step.coverage()
        parallel = Parallel.of(deployment)
        rows.append(
            (
                point.step.gpu.title,
                point.step.stack,
                parallel,
                f"{deployment.batch_per_gpu:g}",
                f"{point.step.step_s * 1e3:.2f}",
                f"{point.tokens_per_s_per_gpu:,.0f}",
                f"{point.tokens_per_s_per_user:.1f}",
                f"{point.price.usd_per_gpu_hour:.2f}",
                f"{point.usd_per_mtok_output:.3f}",
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
        *kinds,
        "look twice",
    )
    return _html_table(columns, rows, 3)


def _best_section(best: Sequence[StepCost], number: int, name: str, min_tokens_per_s_per_user: float) -> str:
    at = f"the cheapest points at {min_tokens_per_s_per_user:g} tokens/s/user or more"
    if not best:
        return f"<p>No ranked point reaches {min_tokens_per_s_per_user:g} tokens/s/user.</p>"
    has_own = any(MEASURED_HERE in point.step.stack.provenances for point in best)
    here = " Dotted: measured here. Hatched the other way: interpolated here." if has_own else ""
    return (
        f"<h3>Where the money goes: {at}</h3>"
        f"<p class='soft'>Plain: measured. Hatched: interpolated. Crossed: modelled.{here}</p>"
        f'<div class="plot bars" id="breakdown-{number}" role="img" aria-label="{name}: cost by group of ops"></div>'
        f"<h3>In numbers: {at}, per GPU and stack</h3>{_best_table(best)}"
    )


def write_report(
    path: Path, studies: Sequence[StudyResult], min_tokens_per_s_per_user: float, max_modelled: float
) -> None:
    """Write the report of one or more studies.

    Raises:
        ValueError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs

    figures: dict[str, dict[str, Any]] = {}
    sections, nav, prices = [], [], {}
    for number, study in enumerate(studies):
        ranked = [point for point in study.points if point.step.coverage()["modelled"] <= max_modelled]
        best = best_points(ranked, min_tokens_per_s_per_user, max_modelled)
        for point in study.points:
            prices[point.price] = (
                point.step.gpu.title,
                point.price.tier,
                f"{point.price.usd_per_gpu_hour:.3f}",
                point.price.kw_per_gpu or "-",
                point.price.date,
                point.price.source,
                point.price.note,
            )
        name = html.escape(study.model.name)
        plots = {
            f"throughput-{number}": _curves(ranked, "tokens_per_s_per_gpu", "tokens per second per GPU"),
            f"cost-{number}": _curves(ranked, "usd_per_mtok_output", "$ per million output tokens"),
        }
        if best:
            plots[f"breakdown-{number}"] = _breakdown(best)
        figures |= plots
        throughput, cost = (
            f'<div class="plot" id="{kind}-{number}" role="img" aria-label="{name}, {kind}"></div>'
            for kind in ("throughput", "cost")
        )
        nav.append(f'<a href="#model-{number}">{name}</a>')
        sections.append(
            f'<h2 id="model-{number}">{name}</h2>'
            f"<p>{html.escape(study.sweep.precision.title)}; {study.sweep.context} tokens of context per sequence; "
            f"expert load {html.escape(study.sweep.load)}; {len(ranked)} of {len(study.points)} points ranked.</p>"
            f"<h3>Throughput against interactivity</h3><p class='soft'>Up and right is better.</p>{throughput}"
            f"<h3>Cost against interactivity</h3><p class='soft'>Down and right is better.</p>{cost}"
            + _best_section(best, number, name, min_tokens_per_s_per_user)
        )
    nav += ['<a href="#prices">prices</a>', '<a href="#omitted">left out</a>', '<a href="#how">how to read</a>']
    price_columns = ("GPU", "tier", "$/GPU-h", "kW/GPU", "date", "source", "note")
    page = Template(TEMPLATE.read_text()).substitute(
        subtitle=f"tokenfab {__version__}, {date.today().isoformat()}: a decode step from published kernel times",
        nav="".join(nav),
        sections="".join(sections),
        prices=_html_table(price_columns, prices.values(), 2),
        omitted="".join(f"<li>{html.escape(text)}</li>" for text in OMITTED),
        max_modelled=f"{max_modelled:.0%}",
        plotly=get_plotlyjs(),
        figures=json.dumps(figures, allow_nan=False).replace("<", "\\u003c"),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--report: cannot write {path}: {error.strerror}") from None
