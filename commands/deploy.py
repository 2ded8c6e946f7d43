"""``tokenfab deploy``: the cheapest way to serve a trace within limits of latency, and what the limits cost."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import click

from .options import data_option, records_option, report_option, stacks_option
from .shared import Progress, combined, comma, json_option, path_type, price_options, print_json

_limit_options = combined(
    click.option("--min-tokens-per-s-per-user", "min_rate", type=float, default=20, show_default=True,
                 help="Interactivity of every user; 0 for none."),
    click.option("--max-ttft-s", type=float, default=2, show_default=True, help="Time to first token."),
    click.option("--no-ttft-limit", is_flag=True, help="Instead of --max-ttft-s."),
    click.option("--ttft-percentile", type=float, default=0.9, show_default=True, help="Share of requests within it."),
)  # fmt: skip
_trace_options = combined(
    click.option("--trace", "trace_file", type=path_type, required=True, metavar="FILE",
                 help="Mooncake JSON lines or Azure CSV, plain or gzip."),
    click.option("--requests", type=int, default=20_000, show_default=True, help="At most so many, the first ones."),
    click.option("--rate-scale", type=float, default=1, show_default=True, help="Arrivals so many times as fast."),
    click.option("--skip-longer", is_flag=True, help="Leave out requests beyond the model's context, and count them."),
    click.option("--cached-share", type=float, metavar="S", help="A stated share of every prompt is cached."),
    click.option("--cache-tokens", type=int, metavar="N", help="Simulate caches of N tokens, one of each --replicas."),
    click.option("--replicas", type=int, metavar="N", help="With --cache-tokens: caches that requests are routed to."),
    click.option("--policy", default="kv_aware", show_default=True, help="Of that simulation: see `tokenfab routing`."),
    click.option("--no-cache", is_flag=True, help="No prefix is cached."),
)  # fmt: skip
_model_options = combined(
    click.option("--precision", help="See `tokenfab models --precisions`; the checkpoint's own by default."),
    click.option("--kv-format", help="Format of the KV cache, instead of the precision's: bf16 or fp8."),
    click.option("--load", default="balanced", show_default=True, help="Expert load: balanced, power_law_1.01, ..."),
    click.option("--tokens-per-step", type=int, default=1, show_default=True, help="Per sequence: 1 + drafts."),
    click.option("--kept-tokens", type=float, default=1.0, show_default=True, help="Of those kept: acceptance length."),
)  # fmt: skip


@click.command()
@click.argument("model")
@comma("--gpu", "gpus", "See `tokenfab gpus`.", required=True)
@stacks_option
@comma("--parallel", "parallels", "tp8, dp8-ep8, tp2-dp4-ep8, dp8-ep8-ag, ...; a range by default.")
@comma("--batch", "batches", "Sequences per GPU; powers of two and the largest that fits by default.", item=float)
@_trace_options
@_limit_options
@click.option("--frontier", "with_frontier", is_flag=True, help="Cost against tokens/s/user, what binds at each point.")
@comma("--rates", "rates", "With --frontier: these limits of tokens/s/user; a walk up by default.", item=float)
@_model_options
@price_options
@click.option("--max-modelled", type=click.FloatRange(0, 1), default=0.25, show_default=True,
              help="Only decode steps with at most this share of their time modelled.")  # fmt: skip
@data_option
@records_option
@report_option
@json_option
def deploy(
    model: str, gpus: list[str], stacks: list[str], parallels: list[str] | None, batches: list[float] | None,
    trace_file: Path, requests: int, rate_scale: float, skip_longer: bool, cached_share: float | None,
    cache_tokens: int | None, replicas: int | None, policy: str, no_cache: bool, min_rate: float, max_ttft_s: float,
    no_ttft_limit: bool, ttft_percentile: float, with_frontier: bool, rates: list[float] | None, max_modelled: float,
    report: Path | None, as_json: bool, **study_options: Any,
) -> None:  # fmt: skip
    """The cheapest deployment of MODEL that serves a trace within limits of tokens/s/user and time to first token.

    One pool that prefills and decodes, or a pool for each with its own parallelism, in whole replicas; every GPU is
    paid. Waits follow from the trace's own arrivals. Says which limit binds, and what lifting each would save.

    \b
    Examples:
      tokenfab deploy deepseek-v3 --trace mooncake_conversation.jsonl --gpu h200
      tokenfab deploy deepseek-v3 --trace mooncake_conversation.jsonl --gpu h200,gb200 --frontier
      tokenfab deploy gpt-oss-120b --trace azure_llm_2023_code.csv --gpu h100,b200 --min-tokens-per-s-per-user 150 \\
               --max-ttft-s 0.5 --ttft-percentile 0.95 --rate-scale 20
    """
    from ..bench.models import load_model
    from ..bench.tables import console
    from ..costing.study import study
    from ..costing.workload import deploy_view as view
    from ..costing.workload.cheapest import Search
    from ..costing.workload.demand import Cache, read_demand
    from ..costing.workload.deploy import Limits
    from ..costing.workload.frontier import frontier
    from ..costing.workload.pools import options

    if rates is not None and not with_frontier:
        raise ValueError("rates: expected with --frontier")
    limits = Limits(min_rate, None if no_ttft_limit else max_ttft_s, ttft_percentile)
    cache = Cache(cached_share, replicas, cache_tokens, policy, no_cache)
    with Progress("trace", as_json) as bar:
        demand = read_demand(
            trace_file, load_model(model), cache, requests, rate_scale, skip_longer=skip_longer,
            progress=lambda done, total: bar.update(done, total, "bytes"),
        )  # fmt: skip
    load = demand.workload
    plan = study(model, gpus, stacks, parallels, batches, context=load.context, **study_options)
    with Progress("pools", as_json) as bar:
        offered = options(plan, load, lambda what: bar.advance(len(plan.sweep), what), max_modelled)
    search, counted = Search(load, offered), count(1)
    with Progress("search", as_json) as bar:
        walk = None
        if with_frontier:
            walk = frontier(
                search, limits, rates, advance=lambda what: bar.update(done := next(counted), done + 1, what)
            )
        found = view.answer(plan.sweep.model, demand, limits, search, walk)
    tables = [view.deploy_table(found), *([view.frontier_table(found)] if walk is not None else [])]
    if report is not None:
        from ..costing.report.workload_views import write_deployment

        write_deployment(report, found, tables, view.deploy_lines(found))
        click.echo(f"report: {report}", err=True)
    if as_json:
        print_json(view.deploy_document(found))
        return
    out = console()
    for table in tables:
        out.print(table)
    for line in view.deploy_lines(found):
        out.print(line, soft_wrap=True)
