"""The commands about tokenfab's own kernels: ``inspect`` without a GPU, ``bench`` on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..kernels.registry import OPS
from .fleet import FleetProgress, bench_on_ray, compiling, ray_option
from .shared import Progress as _Progress
from .shared import UserError, comma, json_option, path_type, print_json, show

if TYPE_CHECKING:
    from ..bench.gpus import Gpu
    from ..bench.summaries import Summary
    from ..bench.targets import Target
    from ..bench.user_kernel import UserKernel

format_option = comma(
    "--format", "formats", "WEIGHT-ACTIVATION (mxfp4-bf16), a weight format (mxfp4), or of a quantizer its result's."
)


_COPY = "copy"
"""The op of ``bench.peers.COPY``, whose module is not imported for a help text."""


def _op_argument(ops: Sequence[str]) -> Any:
    return click.argument("op", required=False, metavar=f"[{'|'.join(ops)}]")


@click.command()
@_op_argument(OPS)
@comma("--arch", "archs", "Of sm_90, sm_100, sm_103, sm_120.", default="sm_90,sm_100,sm_120", show_default=True)
@format_option
@comma("--gpu", "gpus", "GPUs for the floors.", default="h100,h200,b200,rtx_pro_6000", show_default=True)
@click.option("--jobs", type=click.IntRange(1), help="Compilations at a time; by default one per core.")
@click.option("--no-cache", is_flag=True, help="Compile all anew.")
@ray_option
@json_option
def inspect(
    op: str | None, archs: list[str], formats: list[str] | None, gpus: list[str], jobs: int | None, no_cache: bool,
    ray: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Compile tokenfab's kernels ahead of time, without a GPU, and say what they cost: those of one op, or all.

    For each tile: registers, spills, shared memory, occupancy, the matrix instructions, and the SASS instructions
    that the hot loop spends per value of the operand that streams from memory (a weight, or what a quantizer reads);
    then, per GPU, the floors of bytes, matrix flops and instruction issue, and the one that binds. Budget:
    instructions per value at which issue would bind. Exit code 1 if anything is wrong: a spill, a missing native
    instruction, a failed compilation.

    \b
    Examples:
      tokenfab inspect gemm --arch sm_90 --format mxfp4
      tokenfab inspect --json > inspect.json
      tokenfab inspect --ray auto
    """
    from ..bench.gpus import get_gpu
    from ..bench.inspect import document, rows
    from ..bench.inspect import inspect as inspect_points
    from ..bench.kernel_tables import inspection_table
    from ..kernels.registry import find_points

    chosen = [get_gpu(name) for name in gpus]
    points = find_points(op, formats)
    try:
        with compiling(ray, jobs) as compile_all, FleetProgress("compiling", as_json, bool(ray)) as progress:
            found = inspect_points(
                points, archs, jobs=jobs, use_cache=not no_cache, compile_all=compile_all,
                progress=lambda done, total, each: progress.advance(total, each.point.name, not each.cached),
            )  # fmt: skip
    except RuntimeError as error:
        raise UserError(str(error)) from error
    if as_json:
        print_json(document(found, chosen))
    else:
        num_wrong = sum(bool(each.findings) for each in found)
        notes = {f"{each.point.name} on {each.arch}: {note}": None for each in found for note in each.notes}
        lines = [f"note: {note}" for note in notes] if len(found) <= 12 else []
        lines.append(f"{len(found)} ways of compiling, {num_wrong} with findings")
        show(False, list, lambda: inspection_table(rows(found, chosen)), lambda: lines)
    if any(each.findings for each in found):
        raise click.exceptions.Exit(1)


@click.command()
@_op_argument((*OPS, _COPY))
@comma("--model", "models", "Whose shapes; see `tokenfab models`.", default="deepseek-v3,qwen3-30b-a3b,gpt-oss-120b",
       show_default=True)  # fmt: skip
@format_option
@comma("--batch", "batches", "Tokens per GPU and step.", default="1,16,64,128,512,4096", show_default=True, item=int)
@comma("--context", "contexts", "Cached tokens of each sequence, for attention.", default="1024,8192,131072",
       show_default=True, item=int)  # fmt: skip
@click.option("--gpu", help="Which row of `tokenfab gpus` this GPU is; by default told by its name.")
@click.option("--processes", type=click.IntRange(1), default=3, show_default=True,
              help="Fresh processes; their spread is the noise floor.")  # fmt: skip
@click.option("--budget", "budget_s", type=float, default=10.0, show_default=True, help="Seconds of timing per point.")
@click.option("--no-energy", is_flag=True, help="Skip the energy loop.")
@click.option("--out", type=path_type, default="records", show_default=True, help="Folder of the records.")
@click.option("--list", "only_list", is_flag=True, help="Print what would be measured; needs no GPU, but --gpu.")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=N,...",
              help="A shape of OP (m=64,n=7168,k=2048) in place of the models'; may be given again.")  # fmt: skip
@click.option("--kernel", metavar="FILE.py:FUNCTION", help="A kernel of your own, beside tokenfab's; runs that file.")
@click.option("--check", "only_check", is_flag=True,
              help="With --kernel: check it at small shapes, or --shape; times nothing, and needs no GPU.")  # fmt: skip
@click.option("--template", "only_template", is_flag=True, help="Print a file to begin a kernel of your own with.")
@click.option("--quick", is_flag=True, help="A first look, for the edit loop: one process, half a second per point.")
@click.option("--tuned", type=path_type, metavar="FILE",
              help="Tiles from this table of `tokenfab tune`, not the package's, where they hold.")  # fmt: skip
@ray_option
@click.option("--pass", "this_pass", type=click.IntRange(1), hidden=True)
@json_option
def bench(
    op: str | None, models: list[str], formats: list[str] | None, batches: list[int], contexts: list[int],
    gpu: str | None, processes: int, budget_s: float, no_energy: bool, out: Path, only_list: bool,
    shapes: tuple[str, ...], kernel: str | None, only_check: bool, only_template: bool, quick: bool,
    tuned: Path | None, ray: str | None, this_pass: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure tokenfab's kernels on this machine's GPU, beside cuBLAS, other libraries and a copy: one op, or all.

    Shapes are those of the models' decode steps. Each point is a CUDA graph of many calls over rotating buffers,
    warmed up until flat, checked before and after, with clocks and throttling read at each block; it is appended
    to OUT/GPU.jsonl at once (a first look to OUT/quick), and a second run resumes where the first ended. Without a GPU
    nothing is timed; see `tokenfab inspect`. Exit code 1 if a kernel of your own is wrong, or gets no time.

    \b
    Examples:
      tokenfab bench gemm --model deepseek-v3 --format fp8_block --batch 1,64
      tokenfab bench --list --gpu h100
      tokenfab bench moe --ray auto --gpu h100
      tokenfab bench gemm --template > mine.py
      tokenfab bench gemm --format fp8_block --kernel mine.py:my_kernel --check
      tokenfab bench gemm --format fp8_block --kernel mine.py:my_kernel --quick --shape m=64,n=7168,k=2048
    """
    from ..bench.gpus import get_gpu
    from ..bench.kernel_tables import summaries_table, targets_table
    from ..bench.targets import find_targets, shape_fields

    if only_template:
        from ..bench.user_template import template

        click.echo(template(op, formats), nl=False)
        return
    if only_check:
        _check(op, formats, kernel, shapes, as_json)
        return
    asked = [shape_fields(op, text) for text in shapes]
    extra = [_load(op, formats, kernel)] if kernel else []

    def find(row: Gpu) -> list[Target]:
        return find_targets(op, formats, models, batches, row, contexts, extra=extra, shapes=asked)

    if only_list:
        if gpu is None:
            raise UserError("gpu: expected --gpu NAME with --list; got none")
        targets = find(get_gpu(gpu))
        listed = [{"kernel": t.kernel.name, **t.shape, "places": t.places, "l2_policy": t.l2_policy} for t in targets]
        show(as_json, lambda: listed, lambda: targets_table(targets), lambda: _absent(op, formats, get_gpu(gpu)))
        return
    from ..bench.campaign import gpu_of, run_targets
    from ..bench.cuda_device import CudaDevice
    from ..bench.device import NoGpu
    from ..bench.measurement import Settings
    from ..bench.records import RecordStore
    from ..bench.summaries import QUICK, QUICK_FOLDER, kernel_hash, summaries
    from ..bench.tune_table import tuned_here

    settings = QUICK if quick else Settings(budget_s=budget_s, energy_s=None if no_energy else 2.0)
    folder = out / QUICK_FOLDER if quick else out
    if ray is not None:
        if kernel:
            raise UserError(
                "kernel: expected none with --ray: a file of one's own is not on the nodes; leave out --ray"
            )
        bench_on_ray(ray, find, gpu, 1 if quick else processes, settings, folder, tuned, as_json)
        return
    try:
        device = CudaDevice()
    except NoGpu as error:
        other = "`--check` says whether it is right" if kernel else (
            f"`tokenfab inspect {op or ''}` compiles the kernels ahead of time"
        )  # fmt: skip
        raise UserError(f"{error}. Without one, {other}") from error
    row, properties = gpu_of(device.properties, gpu), device.properties
    targets = find(row)
    store = RecordStore(folder, f"{row.name}.jsonl")

    def run(number: int) -> None:
        with _Progress(f"pass {number}", quiet=as_json) as progress, tuned_here(row, properties, tuned):
            outcomes = run_targets(
                targets, device, row, store, processes=number, settings=settings,
                done=lambda outcome: progress.advance(len(targets), outcome.target.kernel.name),
            )  # fmt: skip
        for outcome in outcomes:
            if outcome.skipped:
                shape = " x ".join(str(value) for _, value in outcome.target.fields)
                click.echo(f"skipped: {outcome.target.kernel.name} {shape}: {outcome.skipped}", err=True)

    if this_pass is not None:
        run(this_pass)
        return
    for line in _absent(op, formats, row):
        click.echo(line, err=True)
    if quick:
        run(1)
    else:
        del device  # each pass is a process of its own
        again = [op] if op else []
        for flag, values in (("--model", models), ("--format", formats), ("--batch", batches), ("--context", contexts)):
            again += [flag, ",".join(map(str, values))] if values else []
        again += [part for text in shapes for part in ("--shape", text)] + (["--kernel", kernel] if kernel else [])
        again += ["--gpu", row.name, "--budget", str(budget_s), *(["--no-energy"] if no_energy else [])]
        again += ["--tuned", str(tuned)] if tuned else []
        for number in range(1, processes + 1):
            _run_pass([*again, "--out", str(out)], number)
    wanted = [(t.kernel.op, t.kernel.formats, t.shape) for t in targets]
    found = [
        each for each in summaries(store.records())
        if (each.point.op, each.point.formats, each.point.shape) in wanted
    ]  # fmt: skip
    title = f"{row.title}, {store.path}"
    if not (kernel or quick):
        show(as_json, lambda: [each.as_dict() for each in found], lambda: summaries_table(title, found))
        return
    current = {kernel_hash(target.kernel, properties) for target in targets}  # not what the file was before an edit
    _show_beside(title, row, [each for each in found if each.point.kernel_hash in current], models, as_json)
    mine = {kernel_hash(each, properties) for each in extra}
    if mine and not any(each.time_s for each in found if each.point.kernel_hash in mine):
        raise click.exceptions.Exit(1)


def _load(op: str | None, formats: list[str] | None, place: str) -> UserKernel:
    from ..bench.user_kernel import base_kernel, load_user_kernel

    return load_user_kernel(place, base_kernel(op, formats))


def _check(op: str | None, formats: list[str] | None, place: str | None, shapes: Sequence[str], as_json: bool) -> None:
    """``--check``: exit code 1 if the kernel is wrong at some shape."""
    from ..bench.targets import shape_fields
    from ..bench.user_check import SMALL_SHAPES, check_device, check_kernel
    from ..bench.user_kernel import base_kernel
    from ..bench.user_table import checked_dict, checks_table

    if place is None:
        raise UserError("kernel: expected --kernel FILE.py:FUNCTION with --check; got none")
    base = base_kernel(op, formats)
    chosen = [dict(shape_fields(op, text)) for text in shapes] or SMALL_SHAPES[base.op]
    device, buffers_on, where = check_device()  # before the file imports Triton
    checked = check_kernel(_load(op, formats, place), chosen, device, buffers_on)
    note = f"checked {where}: correctness alone, nothing was timed"
    show(as_json, lambda: {"where": where, "checks": [checked_dict(each) for each in checked]},
         lambda: checks_table(f"{place} as {base.name}", checked), lambda: [note])  # fmt: skip
    if not all(each.passed for each in checked):
        raise click.exceptions.Exit(1)


def _absent(op: str | None, formats: list[str] | None, row: Gpu) -> list[str]:
    """Libraries that are not measured here, and why."""
    from ..bench.targets import absent_peers

    return [] if op == _COPY else [f"not here: {name}: {why}" for name, why in absent_peers(op, formats, row).items()]


def _show_beside(title: str, row: Gpu, found: Sequence[Summary], models: Sequence[str], as_json: bool) -> None:
    """The user's kernel, tokenfab's and the libraries', with dollars at the book's price."""
    from ..bench.user_table import kernels_table, place_of, priced
    from ..costing.kernel_price import usd_per_mtok
    from ..costing.prices import price_lookup

    try:
        price = price_lookup()(row.name)
    except ValueError:  # this GPU is in no book: the table stands without dollars, and says so
        price = None
    usd = None if price is None else lambda time_s, place: usd_per_mtok(time_s, place, price)
    note = "no price of this GPU is known" if price is None else (
        f"$/M: dollars per million output tokens that the op costs where it stands in a step, at "
        f"${price.usd_per_gpu_hour:g}/h ({price.describe()})"
    )  # fmt: skip

    def listed() -> list[dict[str, Any]]:
        return [each.as_dict() | {"usd_per_mtok": priced(each, place_of(each, models), usd)} for each in found]

    show(
        as_json, listed, lambda: kernels_table(title, found, models, usd), lambda: [note],
    )  # fmt: skip


def _run_pass(arguments: Sequence[str], number: int) -> None:
    """The same command in a fresh process, for one pass over the points."""
    command = [sys.executable, "-m", "tokenfab", "bench", *arguments, "--pass", str(number)]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise click.exceptions.Exit(done.returncode)
