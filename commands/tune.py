"""``tokenfab tune``: tiles of a kernel at a model's shapes, by floors without a GPU, by measurement on one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .fleet import ray_option
from .kernels import format_option
from .shared import Progress, UserError, comma, json_option, path_type, price_options, print_json

if TYPE_CHECKING:
    from ..bench.device import DeviceProperties
    from ..bench.gpus import Gpu
    from ..bench.targets import Target
    from ..bench.tune import Trials, Verdict
    from ..bench.tune_prune import Pruned
    from ..costing.prices import Price

FIRST_PASS = 0.6
"""Of the time budget, for the pass with the search itself; the finals in fresh processes share the rest."""


@click.command()
@click.argument("op", metavar="[gemm|moe|attention|mla]")
@comma("--model", "models", "Whose shapes; see `tokenfab models`.", default="deepseek-v3", show_default=True)
@format_option
@comma("--batch", "batches", "Tokens per GPU and step.", default="64", show_default=True, item=int)
@comma("--context", "contexts", "Cached tokens of each sequence, for attention.", default="8192", show_default=True,
       item=int)  # fmt: skip
@click.option("--shape", "shapes", multiple=True, metavar="NAME=N,...",
              help="A shape of OP (m=64,n=7168,k=2048) in place of the models'; may be given again.")  # fmt: skip
@click.option("--gpu", help="Which row of `tokenfab gpus` to compile for; by default this machine's GPU.")
@click.option("--arch", help="Refuse a GPU of another architecture (sm_90); the GPU tells it by itself.")
@click.option("--jobs", type=click.IntRange(1), help="Compilations at a time; by default one per core.")
@click.option("--no-cache", is_flag=True, help="Compile all anew.")
@click.option("--floors", "only_floors", is_flag=True, help="Stop after the pruning, on a GPU too.")
@click.option("--all", "show_all", is_flag=True, help="Print every tile, and every one dropped with its reason.")
@click.option("--budget-minutes", type=click.FloatRange(min=0, min_open=True),
              help="Time for measuring: best floors first; a second run goes on where it ended.")  # fmt: skip
@click.option("--processes", type=click.IntRange(3), default=3, show_default=True,
              help="Fresh processes of the final; their spread is the noise.")  # fmt: skip
@click.option("--out", type=path_type, default="records", show_default=True, help="Folder of the records.")
@click.option("--table", type=path_type, metavar="FILE", help="Table of tuned tiles; OUT/tuned-GPU.json by default.")
@click.option("--kernel", metavar="FILE.py:FUNCTION",
              help="A kernel of your own instead: chooses among its TILES. Runs that file.")  # fmt: skip
@ray_option
@price_options
@click.option("--pass", "this_pass", type=click.IntRange(1), hidden=True)
@click.option("--pass-budget", "pass_budget_s", type=float, hidden=True)
@json_option
def tune(
    op: str, models: list[str], formats: list[str] | None, batches: list[int], contexts: list[int],
    shapes: tuple[str, ...], gpu: str | None, arch: str | None, jobs: int | None, no_cache: bool, only_floors: bool,
    show_all: bool, budget_minutes: float | None, processes: int, out: Path, table: Path | None, kernel: str | None,
    ray: str | None, tier: str, book: str | None, price_file: Path | None, usd_per_gpu_hour: float | None,
    this_pass: int | None, pass_budget_s: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Search the tiles of OP's kernels at the shapes of models, and keep what is faster beyond the noise.

    Every tile that a kernel can have is compiled ahead of time; those that spill, do not fit, lack the native matrix
    instruction or waste instruction issue are dropped, each with its reason, and the rest are ranked by their floors.
    Without a GPU that is all. On one, the rest are checked and timed by successive halving beside the default tile, the
    finalists in several fresh processes; a tile that is faster beyond the noise is written to a table with its
    provenance, and what it saves is priced. Every measurement is appended to OUT/GPU-tune.jsonl; a second run goes on
    where the first ended. Experts are tuned under balanced load.

    \b
    Examples:
      tokenfab tune gemm --format fp8_block --model deepseek-v3 --batch 64 --gpu h100
      tokenfab tune moe --format mxfp4-bf16 --model gpt-oss-120b --batch 16,64 --budget-minutes 20
      tokenfab tune gemm --format mxfp4-bf16 --shape m=64,n=7168,k=2048 --gpu h200 --all
      tokenfab tune gemm --format fp8_block --shape m=64,n=7168,k=2048 --kernel mine.py:my_kernel
      tokenfab tune moe --format mxfp4-bf16 --model gpt-oss-120b --ray auto --gpu h100
    """
    from ..bench.targets import shape_fields
    from ..bench.tune_prune import prune
    from ..bench.tune_space import TUNED_OPS

    if op not in TUNED_OPS:
        raise ValueError(f"op: expected one of {', '.join(TUNED_OPS)}; got {op!r}")
    asked = [shape_fields(op, text) for text in shapes]
    budget_s = None if budget_minutes is None else 60 * budget_minutes
    if ray is not None:
        from .fleet_tune import tune_on_ray

        if kernel or jobs:
            raise UserError(f"{'kernel' if kernel else 'jobs'}: expected none with --ray")
        tune_on_ray(
            ray, lambda row: _targets(op, formats, models, batches, contexts, row, asked), gpu, arch, not no_cache,
            only_floors, show_all, budget_s, processes, out, table,
            lambda row: _price(row, usd_per_gpu_hour, tier, book, price_file), as_json,
        )  # fmt: skip
        return
    properties, row, why_no_gpu = _device(gpu, this_pass is None)
    check_arch(arch, row)
    options = [op, "--gpu", row.name, "--out", str(out)]
    for flag, values in (("--model", models), ("--format", formats), ("--batch", batches), ("--context", contexts)):
        options += [flag, ",".join(map(str, values))] if values else []
    options += [part for text in shapes for part in ("--shape", text)] + (["--jobs", str(jobs)] if jobs else [])
    if kernel is not None:
        from .tune_user import conclude_user, find_user_targets, measure_user, no_gpu

        own = find_user_targets(op, formats, kernel, models, batches, contexts, row, asked)
        if this_pass is not None:
            measure_user(own, row, out, this_pass, pass_budget_s, _clock)
        elif properties is None:
            no_gpu(own, why_no_gpu)
        else:
            _run_passes([*options, "--kernel", kernel], processes, budget_s)
            conclude_user(own, properties, row, out, processes,
                          lambda: _price(row, usd_per_gpu_hour, tier, book, price_file), as_json)  # fmt: skip
        return
    targets = _targets(op, formats, models, batches, contexts, row, asked)
    pruned = []
    try:
        with Progress("compiling", quiet=as_json or this_pass is not None) as progress:
            for index, target in enumerate(targets, start=1):
                name = f"{index}/{len(targets)} {target.kernel.name}"
                pruned.append(prune(
                    target, row, jobs=jobs, use_cache=not no_cache,
                    progress=lambda done, total, _, name=name: progress.update(done, total, name),
                ))  # fmt: skip
    except RuntimeError as error:  # no Triton
        raise UserError(str(error)) from error
    if this_pass is not None:
        _measure(pruned, row, out, this_pass, pass_budget_s)
        return
    if not as_json:
        print_floors(pruned, row, show_all)
    if properties is None or only_floors:
        finish_without(pruned, row, why_no_gpu, as_json)
        return
    _run_passes(options, processes, budget_s)
    conclude(pruned, properties, row, out, table or out / f"tuned-{row.name}.json", processes,
              lambda: _price(row, usd_per_gpu_hour, tier, book, price_file), as_json)  # fmt: skip


def check_arch(arch: str | None, row: Gpu) -> None:
    """Raises ``ValueError`` for a GPU of another architecture than asked for."""
    own = "sm_" + row.compute_capability.replace(".", "")
    if arch not in (None, own):
        raise ValueError(f"arch: expected {own}, as {row.name} has; got {arch}")


def _targets(
    op: str, formats: list[str] | None, models: Sequence[str], batches: Sequence[int], contexts: Sequence[int],
    row: Gpu, asked: Sequence[Any],
) -> list[Target]:  # fmt: skip
    """What is tuned: the house's kernels at the models' shapes, or at those asked for.

    Raises:
        ValueError: none of them.
    """
    from ..bench.targets import find_targets

    targets = [
        target for target in find_targets(op, formats, models, batches, row, contexts, shapes=asked)
        if not target.kernel.library and not target.shape.get("load") and (asked or target.places != ("compared",))
    ]  # fmt: skip
    if not targets:
        raise ValueError(f"format, model: expected a shape that one of {op}'s kernels has; got none")
    return targets


def _device(gpu: str | None, may_do_without: bool) -> tuple[DeviceProperties | None, Gpu, str]:
    """(this machine's GPU, the row to compile for, why nothing is measured). Another GPU's row is compiled for only."""
    from ..bench.campaign import gpu_of
    from ..bench.cuda_device import CudaDevice
    from ..bench.device import NoGpu
    from ..bench.gpus import get_gpu

    try:
        properties = CudaDevice().properties
    except NoGpu as error:
        if not may_do_without:
            raise
        if gpu is None:
            raise UserError(f"{error}. Without one, say with --gpu which to compile for") from error
        return None, get_gpu(gpu), str(error)
    return properties, gpu_of(properties, gpu), ""


def print_floors(pruned: Sequence[Pruned], row: Gpu, show_all: bool) -> None:
    from ..bench.tables import console
    from ..bench.tune_show import dropped_lines, floors_table

    out = console()
    for each in pruned:
        out.print(floors_table(each, row.title, show_all))
        for line in dropped_lines(each, show_all):
            out.print(line, soft_wrap=True)
        out.print()


def finish_without(pruned: Sequence[Pruned], row: Gpu, why: str, as_json: bool) -> None:
    from ..bench.tune_show import document, pruned_dict

    if as_json:
        print_json(document(row.name, [pruned_dict(each) for each in pruned]))
    else:
        click.echo(f"Ranked by floors only; nothing was timed. {why}".strip())


# -- on a GPU --------------------------------------------------------------------------------------


def _run_passes(options: Sequence[str], processes: int, budget_s: float | None) -> None:
    """Each pass in a fresh process: the first searches, all of them run the final."""
    start_s = time.monotonic()
    for number in range(1, processes + 1):
        command = [sys.executable, "-m", "tokenfab", "tune", *options, "--pass", str(number)]
        if budget_s is not None:
            left_s = max(0.0, budget_s - (time.monotonic() - start_s))
            share = FIRST_PASS if number == 1 else 1 / (processes - number + 1)
            command += ["--pass-budget", str(share * left_s)]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode:
            raise click.exceptions.Exit(done.returncode)


def _measure(pruned: Sequence[Pruned], row: Gpu, out: Path, number: int, budget_s: float | None) -> None:
    """One pass over the targets; a target that ends early leaves its time to those after it."""
    from ..bench.cuda_device import CudaDevice
    from ..bench.records import RecordStore
    from ..bench.tune import run_search
    from ..bench.tune_prune import name_of
    from ..bench.tune_show import shape_text

    device, store = CudaDevice(), RecordStore(out, f"{row.name}-tune.jsonl")
    end_s = None if budget_s is None else time.monotonic() + budget_s
    with Progress(f"pass {number}", quiet=False) as progress:
        for index, each in enumerate(pruned):
            is_over = _clock(end_s, len(pruned) - index)
            name = f"{each.target.kernel.name} {shape_text(each.target)}"
            searched = run_search(
                each, device, row, store, process=number, is_over=is_over,
                done=lambda done, total, at, tile, name=name: progress.update(
                    done, total, f"{name} {at.name} round {name_of(tile)}"
                ),
            )  # fmt: skip
            for tile, reason in searched.skipped.items():
                click.echo(f"skipped: {name} {name_of(tile)}: {reason}", err=True)
            if not searched.is_whole:
                click.echo(f"time is up: {name}: some tiles were not measured; a second run goes on there", err=True)


def _clock(end_s: float | None, targets_left: int) -> Callable[[float], bool]:
    """Whether a share of a target's part of the time until ``end_s`` is spent."""
    start_s = time.monotonic()

    def is_over(share: float) -> bool:
        return end_s is not None and time.monotonic() - start_s >= share * (end_s - start_s) / targets_left

    return is_over


def conclude(
    pruned: Sequence[Pruned], properties: DeviceProperties, row: Gpu, out: Path, path: Path, processes: int,
    price: Callable[[], Price | None], as_json: bool,
) -> None:  # fmt: skip
    """Decides from the records, writes the table, prints both and what the gain is worth."""
    from ..bench.record import environment
    from ..bench.records import RecordStore
    from ..bench.tables import console
    from ..bench.tune import ROUNDS, Trials, decide
    from ..bench.tune_show import document, fault_lines, measured_dict, pruned_dict, verdicts_table
    from ..bench.tune_table import place_key, row_of, update_table

    store, here = RecordStore(out, f"{row.name}-tune.jsonl"), environment(properties)
    records = list(store.records())
    found: list[tuple[Pruned, Trials, Verdict]] = []
    for each in pruned:
        trials = Trials(each, row, here, ROUNDS, records)
        found.append((each, trials, decide(trials, processes)))
    adopted = [row_of(each, verdict, trials, store.path) for each, trials, verdict in found if verdict.adopted]
    withdrawn = [place_key(each) for each, _, verdict in found if verdict.gain is not None and not verdict.adopted]
    update_table(path, row, adopted, withdrawn)
    worth = [_worth(each, verdict, row, price) for each, _, verdict in found]
    if as_json:
        rows = [
            pruned_dict(each) | measured_dict(trials, verdict) | {"worth": places}
            for (each, trials, verdict), places in zip(found, worth, strict=True)
        ]  # fmt: skip
        print_json(document(row.name, rows))
        return
    printed = console()
    printed.print(verdicts_table(f"{row.title}, {store.path}", found))
    lines = [_worth_line(each, place) for (each, _, _), places in zip(found, worth, strict=True) for place in places]
    for line in [*fault_lines(found), *lines]:
        printed.print(line, soft_wrap=True)
    printed.print(f"{len(adopted)} of {len(found)} shapes have a tuned tile in {path}", soft_wrap=True)


def _price(
    row: Gpu, usd_per_gpu_hour: float | None, tier: str, book: str | None, price_file: Path | None
) -> Price | None:
    """The price asked for, or the book's; None where the book has none of this GPU and none was asked for."""
    from ..costing.prices import DEFAULT_TIER, PriceBook, price_lookup

    is_asked = usd_per_gpu_hour is not None or book is not None or price_file is not None or tier != DEFAULT_TIER
    if not is_asked and all((each.gpu, each.tier) != (row.name, tier) for each in PriceBook.read().prices):
        return None
    return price_lookup(usd_per_gpu_hour, tier, book, price_file)(row.name)


def _worth(each: Pruned, verdict: Verdict, row: Gpu, price: Callable[[], Price | None]) -> list[dict[str, Any]]:
    """What an adopted tile saves at each place of the shape: per step, per token and per million tokens."""
    from ..bench.places import places_of
    from ..costing.kernel_price import usd_per_mtok

    if verdict.adopted is None:
        return []
    stated = price()
    models = dict.fromkeys(place.split(" ")[0] for place in each.target.places if " " in place)
    return [
        {
            "model": place.model, "name": place.name, "calls_per_step": place.calls_per_step,
            "saved_s_per_step": verdict.saved_s * place.calls_per_step,
            "saved_gpu_s_per_mtok": 1e6 * verdict.saved_s * place.calls_per_step / place.tokens_per_step,
            "saved_usd_per_mtok": None if stated is None else usd_per_mtok(verdict.saved_s, place, stated),
            "price": None if stated is None else stated.describe(),
        }
        for place in places_of(each.target.kernel.op, each.target.shape, models, row)
    ]  # fmt: skip


def _worth_line(each: Pruned, place: dict[str, Any]) -> str:
    from ..bench.tune_show import shape_text

    dollars = place["saved_usd_per_mtok"]
    priced = "no price of this GPU is known" if dollars is None else f"${dollars:.4g} per million ({place['price']})"
    return (
        f"worth: {place['model']} {place['name']} ({each.target.kernel.name} {shape_text(each.target)}): "
        f"{1e6 * place['saved_s_per_step']:.2f} us per step of {place['calls_per_step']} calls, "
        f"{place['saved_gpu_s_per_mtok']:.4g} GPU-seconds per million tokens, {priced}"
    )
