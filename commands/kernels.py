"""The commands about tokenfab's own kernels: ``inspect`` without a GPU, ``bench`` on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..bench.peers import COPY
from ..kernels.registry import OPS
from .shared import UserError, comma, json_option, path_type, print_json, show

format_option = comma(
    "--format", "formats", "WEIGHT-ACTIVATION (mxfp4-bf16), a weight format (mxfp4), or of a quantizer its result's."
)


def _op_argument(ops: Sequence[str]) -> Any:
    return click.argument("op", required=False, metavar=f"[{'|'.join(ops)}]")


@click.command()
@_op_argument(OPS)
@comma("--arch", "archs", "Of sm_90, sm_100, sm_103, sm_120.", default="sm_90,sm_100,sm_120", show_default=True)
@format_option
@comma("--gpu", "gpus", "GPUs for the floors.", default="h100,h200,b200,rtx_pro_6000", show_default=True)
@click.option("--jobs", type=click.IntRange(1), help="Compilations at a time; by default one per core.")
@click.option("--no-cache", is_flag=True, help="Compile all anew.")
@json_option
def inspect(
    op: str | None, archs: list[str], formats: list[str] | None, gpus: list[str], jobs: int | None, no_cache: bool,
    as_json: bool,
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
    """
    from ..bench.gpus import get_gpu
    from ..bench.inspect import document, rows
    from ..bench.inspect import inspect as inspect_points
    from ..bench.kernel_tables import inspection_table
    from ..kernels.registry import find_points

    chosen = [get_gpu(name) for name in gpus]
    points = find_points(op, formats)
    try:
        with _Progress("compiling", quiet=as_json) as progress:
            found = inspect_points(
                points, archs, jobs=jobs, use_cache=not no_cache,
                progress=lambda done, total, inspection: progress.update(done, total, inspection.point.name),
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
@_op_argument((*OPS, COPY.op))
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
@click.option("--pass", "this_pass", type=click.IntRange(1), hidden=True)
@json_option
def bench(
    op: str | None, models: list[str], formats: list[str] | None, batches: list[int], contexts: list[int],
    gpu: str | None, processes: int, budget_s: float, no_energy: bool, out: Path, only_list: bool,
    this_pass: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure tokenfab's kernels on this machine's GPU, beside cuBLAS and a copy: one op, or all.

    Shapes are those of the models' decode steps. Each point is a CUDA graph of many calls over rotating buffers,
    warmed up until flat, checked before and after, with clocks and throttling read at each block; it is appended
    to OUT/GPU.jsonl at once, and a second run resumes where the first ended. Without a GPU nothing is timed; see
    `tokenfab inspect`.

    \b
    Examples:
      tokenfab bench gemm --model deepseek-v3 --format fp8_block --batch 1,64
      tokenfab bench --list --gpu h100
    """
    from ..bench.gpus import get_gpu
    from ..bench.kernel_tables import summaries_table, targets_table
    from ..bench.targets import find_targets

    if only_list:
        if gpu is None:
            raise UserError("gpu: expected --gpu NAME with --list; got none")
        targets = find_targets(op, formats, models, batches, get_gpu(gpu), contexts)
        listed = [{"kernel": t.kernel.name, **t.shape, "places": t.places, "l2_policy": t.l2_policy} for t in targets]
        show(as_json, lambda: listed, lambda: targets_table(targets))
        return
    from ..bench.campaign import gpu_of, run_targets, summaries
    from ..bench.cuda_device import CudaDevice
    from ..bench.device import NoGpu
    from ..bench.measurement import Settings
    from ..bench.records import RecordStore

    try:
        device = CudaDevice()
    except NoGpu as error:
        raise UserError(
            f"{error}. Without one, `tokenfab inspect {op or ''}` compiles the kernels ahead of time"
        ) from error
    row = gpu_of(device.properties, gpu)
    targets = find_targets(op, formats, models, batches, row, contexts)
    store = RecordStore(out, f"{row.name}.jsonl")
    if this_pass is None:
        del device  # each pass is a process of its own
        again = [op] if op else []
        for flag, values in (("--model", models), ("--format", formats), ("--batch", batches), ("--context", contexts)):
            again += [flag, ",".join(map(str, values))] if values else []
        again += ["--gpu", row.name, "--budget", str(budget_s), *(["--no-energy"] if no_energy else [])]
        for number in range(1, processes + 1):
            _run_pass([*again, "--out", str(out)], number)
        wanted = [(t.kernel.op, t.kernel.formats, t.shape) for t in targets]
        found = [
            each for each in summaries(store.records())
            if (each.point.op, each.point.formats, each.point.shape) in wanted
        ]  # fmt: skip
        title = f"{row.title}, {store.path}"
        show(as_json, lambda: [each.as_dict() for each in found], lambda: summaries_table(title, found))
        return
    settings = Settings(budget_s=budget_s, energy_s=None if no_energy else 2.0)
    with _Progress(f"pass {this_pass}", quiet=as_json) as progress:
        outcomes = run_targets(
            targets, device, row, store, processes=this_pass, settings=settings,
            done=lambda outcome: progress.advance(len(targets), outcome.target.kernel.name),
        )  # fmt: skip
    for outcome in outcomes:
        if outcome.skipped:
            shape = " x ".join(str(value) for _, value in outcome.target.fields)
            click.echo(f"skipped: {outcome.target.kernel.name} {shape}: {outcome.skipped}", err=True)


def _run_pass(arguments: Sequence[str], number: int) -> None:
    """The same command in a fresh process, for one pass over the points."""
    command = [sys.executable, "-m", "tokenfab", "bench", *arguments, "--pass", str(number)]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise click.exceptions.Exit(done.returncode)


class _Progress:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, title: str, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
        self._task, self._title = self._bar.add_task(title, total=None), title

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, what: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=f"{self._title} {what}")

    def advance(self, total: int, what: str) -> None:
        self._bar.update(self._task, advance=1, total=total, description=f"{self._title} {what}")
