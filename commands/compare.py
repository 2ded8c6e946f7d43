"""``tokenfab compare`` and ``tokenfab gate``: what changed, what it costs, and whether a build may pass."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from .kernels import format_option
from .shared import Group, Progress, UserError, comma, json_option, path_type, price_options, print_json, show

models_option = comma(
    "--model", "models", "Models whose steps say what a kernel is worth.",
    default="deepseek-v3,qwen3-30b-a3b,gpt-oss-120b", show_default=True,
)  # fmt: skip


def _percent(name: str, default: float, help_text: str) -> Any:
    return click.option(name, type=click.FloatRange(0, 50, min_open=True), default=default, show_default=True,
                        metavar="PERCENT", help=help_text)  # fmt: skip


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@_percent("--margin", 1.0, "A difference is real when it is surely more than this, and than 3 x the noise.")
@models_option
@price_options
@json_option
def compare(a: str, b: str, margin: float, models: list[str], as_json: bool, **options: Any) -> None:
    """Set measurements B beside A, point by point: same, faster, slower or unsure, in us, percent and $/M.

    A and B are files or folders of records (or pytest-benchmark's JSON), each narrowed by
    :FIELD=VALUE[,FIELD=VALUE] with op, weight, activation, recipe, gpu, commit, kernel, driver, torch, triton or
    uuid; or published:STACK[@VERSION]. What the sides are selected by may differ between them; all else must agree.

    \b
    Examples:
      tokenfab compare before.jsonl after.jsonl
      tokenfab compare records/h100.jsonl:commit=3f2a records/h100.jsonl:commit=9c1d
      tokenfab compare records:weight=fp8_block records:weight=mxfp4 --model deepseek-v3
      tokenfab compare records/h100.jsonl records/h200.jsonl
      tokenfab compare published:vllm records/h100.jsonl:recipe=tokenfab
    """
    from ..bench.compare import compare as compare_sides
    from ..bench.published import PublishedData
    from ..bench.sides import read_side
    from ..costing.comparison import comparison_document, comparison_lines, comparison_table
    from ..costing.prices import price_lookup

    price, sides = price_lookup(**options), (read_side(a), read_side(b))
    data = PublishedData() if any(side.stack for side in sides) else None
    compared = compare_sides(
        *sides,
        margin=margin / 100,
        published=data and (lambda op, gpu, stack: data.time(op, gpu, data.stack(gpu, stack))),
    )
    for side in sides:
        for text in side.torn:
            click.echo(f"warning: {text}", err=True)
    show(
        as_json, lambda: comparison_document(compared, models, price),
        lambda: comparison_table(f"A = {a}\nB = {b}", compared, models, price), lambda: comparison_lines(compared),
    )  # fmt: skip


@click.group(cls=Group)
def gate() -> None:
    """Fail a build whose kernels got worse: by measured times, or without a GPU by what they compile to.

    Exit code 0: pass; 1: fail; 2: the command was not understood; 3: inconclusive (a baseline that is missing,
    renamed, torn, of too few processes, of another GPU or toolchain), which is no pass.
    """


@gate.command("times")
@click.argument("baseline")
@click.argument("current", required=False)
@click.option("--measure", is_flag=True, help="Measure the baseline's points on this machine's GPU instead of CURRENT.")
@click.option("--cycles", type=click.IntRange(1), default=3, show_default=True,
              help="With --measure: a failure counts when so many measurements confirm it.")  # fmt: skip
@click.option("--processes", type=click.IntRange(3), default=3, show_default=True, help="Fresh processes per cycle.")
@click.option("--budget", "budget_s", type=float, default=3.0, show_default=True, help="Seconds of timing per point.")
@click.option("--gpu", help="Which row of `tokenfab gpus` this GPU is; by default told by its name.")
@click.option("--out", type=path_type, help="Folder that keeps what was measured; a temporary one by default.")
@click.option("--kernel", metavar="FILE.py:FUNCTION", help="With --measure: a kernel of your own that BASELINE has "
              "points of; runs that file.")  # fmt: skip
@_percent("--margin", 3.0, "A point fails when it is surely slower by more than this, and than 3 x the noise.")
@_percent("--total-margin", 1.0, "The same for the sum of a model's gated kernels, in time and so in $/M.")
@click.option("--pass", "this_pass", type=click.IntRange(1), hidden=True)
@click.option("--keys", type=path_type, hidden=True)
@models_option
@price_options
@json_option
def times(
    baseline: str, current: str | None, measure: bool, cycles: int, processes: int, budget_s: float, gpu: str | None,
    out: Path | None, kernel: str | None, margin: float, total_margin: float, this_pass: int | None,
    keys: Path | None, models: list[str], as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """CURRENT against BASELINE: records, or pytest-benchmark's JSON, as `tokenfab compare` takes them.

    \b
    Examples:
      tokenfab gate times baselines/h100.jsonl records/h100.jsonl
      tokenfab gate times baselines/h100.jsonl --measure
      tokenfab gate times mine.jsonl --measure --kernel mine.py:my_kernel
      tokenfab gate times .benchmarks/baseline/h100 .benchmarks/h100
    """
    from ..bench.gate import GateResult, gate_in_cycles
    from ..bench.gate import gate as gate_sides
    from ..bench.record import RecordError
    from ..bench.sample import SampleError
    from ..bench.sides import Side, read_side
    from ..costing.comparison import gate_document, gate_lines, gate_table
    from ..costing.prices import price_lookup

    if measure == (current is not None):
        raise UserError("current: expected CURRENT or --measure, and not both")
    price = price_lookup(**options)
    limits: dict[str, Any] = {"margin": margin / 100, "total_margin": total_margin / 100, "models": models}
    try:
        before = read_side(baseline)
        if this_pass is not None:
            assert out is not None
            _measure(before, keys, out, this_pass, gpu, budget_s, kernel)
            return
        if measure:
            folder = out or Path(tempfile.mkdtemp(prefix="tokenfab-gate-"))
            again = [*(["--gpu", gpu] if gpu else []), *(["--kernel", kernel] if kernel else [])]

            def measured(cycle: int, wanted: frozenset[str] | None) -> Side:
                place = folder / f"cycle-{cycle}"
                place.mkdir(parents=True)
                chosen = place / "keys.txt"
                chosen.write_text("\n".join(wanted or ()))
                for number in range(1, processes + 1):
                    _run_pass([baseline, "--measure", "--out", str(place), "--pass", str(number), "--keys",
                               str(chosen), "--budget", str(budget_s), *again])  # fmt: skip
                chosen.unlink()
                return read_side(str(place))

            result = gate_in_cycles(before, measured, cycles, **limits)
        else:
            assert current is not None
            result = gate_sides(before, read_side(current), **limits)
    except (RecordError, SampleError) as error:
        result = GateResult(problems=(str(error),))
    except ValueError as error:
        if not str(error).startswith((baseline, str(current))):
            raise
        result = GateResult(problems=(str(error),))
    show(
        as_json, lambda: gate_document(result, price),
        lambda: gate_table(f"{baseline} -> {current or 'measured now'}", result, price),
        lambda: gate_lines(result, price),
    )  # fmt: skip
    raise click.exceptions.Exit(result.exit_code)


def _measure(
    before: Any, keys: Path | None, out: Path, number: int, gpu: str | None, budget_s: float, kernel: str | None
) -> None:
    """One pass, in the process that this command started for it."""
    from ..bench.cuda_device import CudaDevice
    from ..bench.gate_run import baseline_targets, measure_pass, user_kernels
    from ..bench.measurement import Settings

    chosen = frozenset(keys.read_text().split("\n")) - {""} if keys else frozenset()
    targets = baseline_targets(before, chosen or None, user_kernels(before, kernel) if kernel else ())
    with Progress(f"pass {number}", quiet=False) as progress:
        outcomes = measure_pass(
            targets, CudaDevice(), out, number, gpu, Settings(budget_s=budget_s, energy_s=None),
            done=lambda outcome: progress.advance(len(targets), outcome.target.kernel.name),
        )  # fmt: skip
    for outcome in outcomes:
        if outcome.skipped:
            click.echo(f"skipped: {outcome.target.kernel.name}: {outcome.skipped}", err=True)


def _run_pass(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tokenfab", "gate", "times", *arguments], stdout=sys.stderr, check=False
    )
    if done.returncode:
        raise click.exceptions.Exit(done.returncode)


@gate.command("inspection")
@click.argument("baseline", type=path_type, required=False)
@click.option("--op", help="Only the kernels of this op.")
@format_option
@comma("--arch", "archs", "Of sm_90, sm_100, sm_103, sm_120.", default="sm_90,sm_100,sm_120", show_default=True)
@_percent("--max-growth", 5.0, "Of instructions per value, and of the floor that binds.")
@click.option("--write", is_flag=True, help="Write the baseline instead; of --op or --format, replace only these.")
@click.option("--changed", is_flag=True, help="Compile only what BASELINE's points were not made from.")
@click.option("--jobs", type=click.IntRange(1), help="Compilations at a time; by default one per core.")
@json_option
def inspection(
    baseline: Path | None, op: str | None, formats: list[str] | None, archs: list[str], max_growth: float, write: bool,
    changed: bool, jobs: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Compile every kernel ahead of time and hold it against BASELINE; needs Triton, but no GPU.

    Fails on more spills, a kind of matrix instruction that is gone (FP8 that became BF16), a hot loop with more
    instructions per value, or a higher floor. BASELINE is by default the one of the installed Triton that comes
    with tokenfab.

    \b
    Examples:
      tokenfab gate inspection
      tokenfab gate inspection --op gemm --format fp8_block --arch sm_90
      tokenfab gate inspection --changed
      tokenfab gate inspection my-baseline.json --write
    """
    from ..bench.gate import EXIT_CODES
    from ..bench.inspect import inspect as inspect_points
    from ..bench.inspect_cache import toolchain
    from ..bench.inspect_gate import (
        BaselineError,
        InspectRow,
        baseline_of,
        baseline_path,
        judge_inspections,
        lines,
        read_baseline,
        unchanged,
        verdict,
        write_baseline,
    )  # fmt: skip
    from ..bench.inspect_keys import digests
    from ..kernels.compile_point import only, tasks_of
    from ..kernels.registry import find_points

    if write and changed:
        raise click.UsageError("--changed: expected without --write, which compiles all that it writes")
    points = find_points(op, formats)
    try:
        tools = toolchain()
    except RuntimeError as error:
        raise UserError(str(error)) from error
    path = baseline or baseline_path(tools)
    is_whole = op is None and formats is None
    rows: list[InspectRow] = []
    try:
        known = None if write and (is_whole or not path.exists()) else read_baseline(path)
    except BaselineError as error:
        known, rows = None, [InspectRow("baseline", "inconclusive", str(error))]
    found, same = [], {}
    if not rows:
        tasks = tasks_of(points, archs)
        try:
            same = unchanged(known, tools, tasks) if changed and known else {}
            made = digests(tasks) if write else {}
        except RuntimeError as error:
            raise UserError(str(error)) from error
        with Progress("compiling", quiet=as_json) as progress:
            found = inspect_points(
                only((point, arch) for point, arch in tasks if (point.name, arch) not in same), archs, jobs=jobs,
                progress=lambda done, total, each: progress.update(done, total, each.point.name),
            )  # fmt: skip
        if write:
            write_baseline(path, baseline_of(found, tools, known, made))
            click.echo(f"baseline: {path}, {len(found)} points written", err=as_json)
            return
        assert known is not None
        rows = judge_inspections(
            known, found, tools, whole=archs if is_whole else (), same=same, max_growth=max_growth / 100
        )
    if as_json:
        print_json(
            {
                "schema_version": 1, "baseline": str(path), "points": len(found), "unchanged": len(same),
                "rows": [vars(row) for row in rows],
            }
        )  # fmt: skip
    else:
        for line in lines(rows, len(found), len(same)):
            click.echo(line)
    raise click.exceptions.Exit(EXIT_CODES[verdict(rows)])
