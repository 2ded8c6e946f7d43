"""The ``tokenfab`` command. Parses, calls, prints; holds no logic."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import __version__
from .commands.compare import compare, gate
from .commands.deploy import deploy
from .commands.explain import explain
from .commands.fleet import ray_option, spreading
from .commands.imports import imports
from .commands.kernels import bench, inspect
from .commands.lab import doctor, lab
from .commands.levers import scale, speculate
from .commands.options import (
    batch_option,
    data_option,
    gpu_option,
    model_options,
    parallel_option,
    records_option,
    report_option,
    stack_option,
    stacks_option,
)  # fmt: skip
from .commands.ranks import ranks
from .commands.request import request
from .commands.routing import routing
from .commands.shared import Group, comma, json_option, price_file_option, price_options, print_json, show
from .commands.tco import interval, sensitivity, tco
from .commands.tune import tune

# Rooms are imported inside the commands: `tokenfab models` must not wait for pyarrow or plotly.


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tokenfab")
def cli() -> None:
    """Dollars per million tokens, kernel by kernel.

    tokenfab turns a model, a GPU and a way to serve it into the ops of one decode step, times each op with
    published measurements of vLLM's, SGLang's and TensorRT-LLM's kernels, and prices the sum. Every figure
    says whether it was measured, interpolated or modelled.

    \b
    Start here:
      tokenfab cost deepseek-v3                          which GPU, stack and batch is cheapest
      tokenfab step deepseek-v3 --gpu h200 --batch 64    one deployment, op by op
      tokenfab deploy deepseek-v3 --gpu h200 --trace T   the cheapest that serves a trace within limits
      tokenfab explain --claim nvidia-35x                a published claim, figure by figure
      tokenfab published check                           how far interpolation can be trusted
      tokenfab inspect gemm --arch sm_90                 tokenfab's own kernels, compiled: no GPU needed
      tokenfab bench gemm                                the same, measured on this machine's GPU
      tokenfab tune gemm --gpu h100                      which tile a shape wants: by floors, or measured
      tokenfab lab --minutes 10                          all kernels checked, and what weighs most measured
      tokenfab compare before.jsonl after.jsonl          what changed, and what it costs
      tokenfab gate inspection                           whether a build's kernels got worse: no GPU needed
    """


cli.add_command(inspect)
cli.add_command(bench)
cli.add_command(tune)
cli.add_command(lab)
cli.add_command(doctor)
cli.add_command(compare)
cli.add_command(deploy)
cli.add_command(gate)
cli.add_command(imports)
cli.add_command(speculate)
cli.add_command(scale)
cli.add_command(tco)
cli.add_command(explain)
cli.add_command(interval)
cli.add_command(ranks)
cli.add_command(request)
cli.add_command(routing)
cli.add_command(sensitivity)


@cli.command()
@click.option("--precisions", is_flag=True, help="List the precisions instead.")
@json_option
def models(precisions: bool, as_json: bool) -> None:
    """The shipped models: shapes, parameters, KV cache.

    Any other model of a known architecture works by the path of its config.json.
    """
    from .bench.deployment import PRECISIONS
    from .bench.models import load_model, shipped_models
    from .costing import lists
    from .costing.document import model_dict

    if precisions:
        rows = list(PRECISIONS.values())
        show(as_json, lambda: [asdict(row) for row in rows], lambda: lists.precisions_table(rows))
        return
    found = [load_model(name) for name in shipped_models()]
    show(as_json, lambda: [model_dict(model) for model in found], lambda: lists.models_table(found))


@cli.command()
@json_option
def gpus(as_json: bool) -> None:
    """The known GPUs: datasheet peaks, memory, links, and where each row is from."""
    from .bench.gpus import GPUS
    from .costing.lists import gpus_table

    rows = list(GPUS.values())
    show(as_json, lambda: [asdict(row) for row in rows], lambda: gpus_table(rows))


@cli.command()
@click.option("--gpu", help="Only this GPU.")
@price_file_option
@json_option
def prices(gpu: str | None, price_file: Path | None, as_json: bool) -> None:
    """The price book: $/GPU-hour and kW by tier, each with date and source."""
    from .costing.lists import prices_table
    from .costing.prices import PriceBook

    rows = PriceBook.read(price_file).of(gpu)
    show(as_json, lambda: [asdict(row) for row in rows], lambda: prices_table(rows))


@cli.command()
@click.option("--tokens-per-s", type=float, required=True, help="Tokens/s of one GPU (or of all, with their price).")
@click.option("--usd-per-gpu-hour", type=float, required=True, help="Price of that GPU (or of all) per hour.")
@click.option("--kw", type=float, help="All-in power in kW, for tokens/s/MW and J/token.")
@json_option
def price(tokens_per_s: float, usd_per_gpu_hour: float, kw: float | None, as_json: bool) -> None:
    """The plain formula: $/M tokens = $/GPU-h / (tokens/s x 3600) x 1e6.

    \b
    Example:
      tokenfab price --tokens-per-s 93.2 --usd-per-gpu-hour 1.41
    """
    from .costing.cost import plain_price
    from .costing.tables import plain_price_lines

    result = plain_price(tokens_per_s, usd_per_gpu_hour, kw)
    show(as_json, lambda: result, lambda: "\n".join(plain_price_lines(result)))


@cli.command()
@click.argument("model")
@gpu_option
@stack_option
@parallel_option
@batch_option
@model_options
@price_options
@data_option
@records_option
@json_option
def step(model: str, gpu: str, stack: str, parallel: str | None, batch: float, as_json: bool, **options: Any) -> None:
    """One decode step of MODEL on one GPU of a deployment, op by op, in time and dollars.

    \b
    Examples:
      tokenfab step deepseek-v3 --gpu h200 --stack sglang --parallel dp8-ep8 --batch 64
      tokenfab step ./my-model/config.json --gpu b200 --stack trtllm --precision fp8
    """
    from .costing.document import document
    from .costing.levers.common_draws import CommonDraws
    from .costing.study import price_step, study
    from .costing.tables import step_summary, step_table

    plan = study(model, [gpu], [stack], [parallel] if parallel else None, [batch], **options)
    cost = price_step(plan)
    name, draws = plan.sweep.model.name, CommonDraws(plan.data)
    show(
        as_json,
        lambda: document(name, [cost], draws=draws),
        lambda: step_table(cost),
        lambda: step_summary(cost, draws),
    )


@cli.command()
@click.argument("models", nargs=-1, required=True)
@comma("--gpu", "gpus", "h100, h200, b200, b300, gb200, gb300 by default.")
@stacks_option
@comma("--parallel", "parallels", "tp8, dp8-ep8, tp2-dp4-ep8, dp8-ep8-ag (all-gather), ...; a range by default.")
@comma("--batch", "batches", "Sequences per GPU; powers of two that fit by default.", item=float)
@model_options
@price_options
@click.option("--min-tokens-per-s-per-user", "min_rate", type=click.FloatRange(0), default=20, show_default=True,
              help="Interactivity the best points must reach.")  # fmt: skip
@click.option("--max-modelled", type=click.FloatRange(0, 1), default=0.25, show_default=True,
              help="Rank only points with at most this share of their time modelled.")  # fmt: skip
@click.option("--all", "show_all", is_flag=True, help="Print every point, not only the best of each GPU and stack.")
@report_option
@data_option
@records_option
@ray_option
@json_option
def cost(models: tuple[str, ...], gpus: list[str] | None, stacks: list[str], parallels: list[str] | None,
         batches: list[float] | None, min_rate: float, max_modelled: float, show_all: bool, report: Path | None,
         ray: str | None, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Price MODELS over GPUs, stacks, parallelisms and batches; print the cheapest that are fast enough.

    \b
    Examples:
      tokenfab cost deepseek-v3 --gpu h100,h200,b200 --stack vllm,sglang,trtllm
      tokenfab cost gpt-oss-120b --min-tokens-per-s-per-user 100 --report out/report.html
    """
    from .costing.document import document
    from .costing.levers.common_draws import CommonDraws
    from .costing.study import run_study, study
    from .costing.tables import print_study

    if as_json and len(models) > 1:
        raise ValueError(f"--json: expected one model; got {len(models)}")
    plans = [study(model, gpus, stacks, parallels, batches, **options) for model in models]
    with spreading(ray) as spread:
        results = [run_study(plan, show_progress=not as_json, spread=spread) for plan in plans]
    if as_json:
        found = results[0]
        print_json(document(found.model.name, found.points, found.skipped, CommonDraws(found.data)))
    else:
        for result in results:
            print_study(result, min_rate, max_modelled, show_all)
    if report is not None:
        from .costing.report.cost_view import write_report

        write_report(report, results, min_rate, max_modelled)
        click.echo(f"report: {report}", err=as_json)


@cli.group(cls=Group)
def published() -> None:
    """The published kernel measurements: what is there, what one op takes, how well they interpolate."""


@published.command("tables")
@gpu_option
@data_option
@json_option
def published_tables(gpu: str, published_data: Path | None, as_json: bool) -> None:
    """Which tables there are for a GPU, per stack: version, rows, kernels."""
    from .bench.gpus import get_gpu
    from .bench.published import PublishedData
    from .bench.published_inventory import inventory
    from .costing.tables import inventory_table

    rows = inventory(PublishedData(published_data), get_gpu(gpu))
    show(as_json, lambda: rows, lambda: inventory_table(rows))


@published.command("check")
@comma("--gpu", "gpus", "See `tokenfab gpus`.", default="h100,h200,b200,b300,gb200,gb300", show_default=True)
@stacks_option
@data_option
@json_option
def published_check(gpus: list[str], stacks: list[str], published_data: Path | None, as_json: bool) -> None:
    """Leave-one-out error of interpolation, per table: median and 95th percentile on the decode range."""
    from .costing.study import run_check
    from .costing.tables import check_summary, errors_table

    errors = run_check(gpus, stacks, published_data, show_progress=not as_json)
    show(as_json, lambda: [asdict(row) for row in errors], lambda: errors_table(errors), lambda: check_summary(errors))


@published.command("op")
@click.argument("kind", metavar="KIND",
                type=click.Choice(["gemm", "moe", "attention", "mla", "context_attention", "mla_context"]))  # fmt: skip
@click.argument("shape", nargs=-1, required=True)
@gpu_option
@stacks_option
@data_option
@json_option
def published_op(
    kind: str, shape: tuple[str, ...], gpu: str, stacks: list[str], published_data: Path | None, as_json: bool
) -> None:
    """The time of one op. SHAPE is a list of FIELD=VALUE; a missing or unknown field is named.

    KIND: gemm, moe, attention, mla; of a prefill pass context_attention, mla_context.

    \b
    Examples:
      tokenfab published op gemm m=64 n=7168 k=16384 weight=fp8_block activation=fp8_group --gpu h100
      tokenfab published op moe num_tokens=128 hidden=7168 inter=2048 top_k=8 num_experts=256 ep=8 \\
               weight=fp8_block activation=fp8_group --gpu h100
      tokenfab published op attention batch=16 length=8192 num_heads=64 num_kv_heads=8 head_dim=128 --gpu h200
      tokenfab published op mla batch=32 length=32768 num_heads=128 kv_lora_rank=512 rope_dim=64 --gpu h100
    """
    from .bench.published import PublishedData
    from .bench.published_inventory import op_timings
    from .costing.tables import timings_table

    rows = op_timings(PublishedData(published_data), kind, shape, gpu, stacks)
    show(as_json, lambda: rows, lambda: timings_table(rows))


def main() -> None:
    """Entry point of the console script."""
    cli.main(args=sys.argv[1:], prog_name="tokenfab")


if __name__ == "__main__":
    main()
