"""Pages of requests and splits: cost against interactivity on a trace, cache hits of routers, splits over GPUs, and
what was served beside what kernels allow. Below each plot stands what the terminal prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bench.domain import native
from .page import OKABE_ITO, axis, layout, log_axis
from .parts import line, marker, write_view

if TYPE_CHECKING:
    from rich.table import Table

    from ..imports.bill import Bill
    from ..levers.parallelism import Scale
    from ..workload.deploy_view import Answer
    from ..workload.frontier import Frontier, FrontierPoint
    from ..workload.routing_view import Comparison


# -- a trace: cost against interactivity -----------------------------------------------------------


def frontier_figure(found: Frontier) -> dict[str, Any]:
    """$/M against tokens/s/user, one mark per deployment; mark and colour say which limit binds."""
    traces = []
    kinds = list(dict.fromkeys(point.choice.binding for point in found.points))
    for number, kind in enumerate(kinds):
        points = [point for point in found.points if point.choice.binding == kind]
        trace = line(
            f"binds: {kind}", number, [point.served.tokens_per_s_per_user for point in points],
            [point.served.usd_per_mtok_output for point in points], [_deployed(point) for point in points],
        )  # fmt: skip
        traces.append({**trace, "mode": "markers"})
    along: dict[str, Any] = {
        "type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False,
        "x": [point.served.tokens_per_s_per_user for point in found.points],
        "y": [point.served.usd_per_mtok_output for point in found.points],
        "line": {"color": "rgba(0,0,0,0.3)", "shape": "vh", "width": 1.5},
    }  # fmt: skip
    axes = (log_axis("tokens per second per user"), log_axis("$ per million output tokens, every GPU paid"))
    return {"data": [along, *traces], "layout": layout(*axes)}


def _deployed(point: FrontierPoint) -> str:
    from ..workload.deploy_view import pools_text

    served, choice = point.served, point.choice
    prefill, decode = pools_text(served)
    return (
        f"{choice.option.gpu}, {choice.option.stack}: prefill {prefill}; decode {decode}; {served.gpus:g} GPUs, "
        f"{served.tokens_per_s_per_user:.1f} tokens/s/user, first token in {served.ttft_s:.2f} s, "
        f"${served.usd_per_mtok_output:.3g}/M output tokens; {choice.binding} binds"
    )


def write_deployment(path: Path, found: Answer, tables: Sequence[Table], lines: Sequence[str]) -> None:
    """The page of ``tokenfab deploy``.

    Raises:
        ValueError: the file cannot be written.
    """
    figures = []
    if found.frontier is not None and found.frontier.points:
        figures = [("Cost against interactivity: down and right is better", frontier_figure(found.frontier))]
    name = f"{found.model.name} on {found.demand.trace.name}"
    write_view(path, "The cheapest deployment that serves a trace within limits", name, figures, tables, lines)


# -- routers ---------------------------------------------------------------------------------------


def routing_figure(found: Comparison) -> dict[str, Any]:
    """Hit rate by policy, a bar for every size of cache; the line is the bound of a cache without end."""
    sizes = list(dict.fromkeys(each.router.cache_blocks for each in found.routed))
    traces = []
    for number, size in enumerate(sizes):
        routed = [each for each in found.routed if each.router.cache_blocks == size]
        traces.append(
            {
                "type": "bar", "name": "endless cache" if size is None else f"{size * 512 / 1e6:.3g}M tokens of cache",
                "x": [each.router.policy for each in routed], "y": [each.hit_rate for each in routed],
                "marker": marker(OKABE_ITO[number % len(OKABE_ITO)]),
                "hovertemplate": "%{x}: %{y:.1%} of input tokens<extra></extra>",
            }
        )  # fmt: skip
    bound = found.routed[0].bound
    rule = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": bound, "y1": bound, "line": {"dash": "dash"}}
    note = {"xref": "paper", "x": 1, "y": bound, "text": "one cache without end", "showarrow": False, "yshift": 10}
    axes = (axis("policy"), axis("hit rate, share of input tokens", tickformat=".0%", rangemode="tozero"))
    return {"data": traces, "layout": layout(*axes, barmode="group", shapes=[rule], annotations=[note])}


def write_routing(path: Path, found: Comparison, table: Table, lines: Sequence[str]) -> None:
    """The page of ``tokenfab routing``.

    Raises:
        ValueError: the file cannot be written.
    """
    count = found.routed[0].router.replicas
    figures = [(f"Prefix cache hits over {count} replicas, by policy and size of each cache", routing_figure(found))]
    write_view(path, "What a router makes of shared prefixes", found.path.name, figures, [table], lines)


# -- splits ----------------------------------------------------------------------------------------


def scale_figure(found: Scale, gpu: str, max_modelled: float) -> dict[str, Any]:
    """$/M against tokens/s/user, a line for every number of GPUs."""
    traces = []
    for number, gpus in enumerate(found.counts(gpu)):
        points = found.pareto(gpu, gpus, max_modelled)
        hover = [
            f"{point.step.deployment.describe()}, {point.step.stack}, {point.step.deployment.batch_per_gpu:g} "
            f"sequences/GPU: {point.tokens_per_s_per_user:.1f} tokens/s/user, ${point.usd_per_mtok_output:.3g}/M"
            for point in points
        ]
        if points:
            x, y = zip(*((point.tokens_per_s_per_user, point.usd_per_mtok_output) for point in points), strict=True)
            traces.append(line(f"{gpus} GPUs", number, x, y, hover))
    axes = (log_axis("tokens per second per user"), log_axis("$ per million output tokens of decode GPUs"))
    return {"data": traces, "layout": layout(*axes)}


def write_scale(path: Path, found: Scale, max_modelled: float, tables: Sequence[Table], lines: Sequence[str]) -> None:
    """The page of ``tokenfab scale``.

    Raises:
        ValueError: the file cannot be written.
    """
    figures = [
        (f"{gpu.title}: cost against interactivity by number of GPUs", scale_figure(found, gpu.name, max_modelled))
        for gpu in found.sweep.gpus
        if gpu == native(gpu) and any(found.pareto(gpu.name, n, max_modelled) for n in found.counts(gpu.name))
    ]  # fmt: skip
    title = "How many GPUs, how split, and what their links are worth"
    write_view(path, title, found.sweep.model.name, figures, tables, lines)


# -- what was served -------------------------------------------------------------------------------


def served_figure(bills: Sequence[Bill]) -> dict[str, Any]:
    """Stacked bars, served $/M output tokens: what kernels allow in decode, the decode gap, what is outside decode."""
    split = [
        bill for bill in bills
        if bill.allowed and bill.decode_gap_usd_per_mtok is not None and bill.outside_decode_usd_per_mtok is not None
    ]  # fmt: skip
    parts: tuple[tuple[str, list[Any], int, str], ...] = (
        ("decode, as kernels allow", [bill.allowed.decode_usd_per_mtok for bill in split if bill.allowed], 2, ""),
        ("decode gap", [bill.decode_gap_usd_per_mtok for bill in split], 1, "/"),
        ("outside decode", [bill.outside_decode_usd_per_mtok for bill in split], 4, "x"),
    )
    labels = [f"{bill.served.source.rsplit('/', 1)[-1]}  ${bill.usd_per_mtok_output:.3g}" for bill in split]
    traces = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": labels, "x": values,
            "marker": marker(OKABE_ITO[colour], shape),
            "hovertemplate": f"{name}: $%{{x:.4g}} per million output tokens<extra></extra>",
        }
        for name, values, colour, shape in parts
    ]  # fmt: skip
    axes = (axis("$ per million output tokens, every GPU paid"), axis("", autorange="reversed", narrow=True))
    return {"data": traces if split else [], "layout": layout(*axes, barmode="relative")}


def write_served(path: Path, bills: Sequence[Bill], tables: Sequence[Table], lines: Sequence[str]) -> None:
    """The page of ``tokenfab import``.

    Raises:
        ValueError: the file cannot be written.
    """
    figure = served_figure(bills)
    figures = [("Where the served price lies", figure)] if figure["data"] else []
    title = "What was served, in dollars, and how far it is from the kernels"
    write_view(path, title, f"{len(bills)} results", figures, tables, lines)
