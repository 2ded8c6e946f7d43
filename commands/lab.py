"""What to do with a GPU for some minutes, and what a machine lacks for it: ``lab`` and ``doctor``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .fleet import finish, ray_option
from .shared import UserError, comma, json_option, path_type, price_options, print_json, show
from .weights import weights_report

_JOURNAL, _CHECKS, _STEPS = "journal", "checks", "steps"


@click.command()
@click.option("--out", type=path_type, default="records", show_default=True, help="Where records would go.")
@json_option
def doctor(out: Path, as_json: bool) -> None:
    """Say what of this machine makes measuring possible, trustworthy or neither.

    GPU, driver, clocks, power limit, MIG, persistence, throttling, other processes, versions, tools and the libraries
    to set beside: each ok, warn or fail, with the reason. Changes nothing. Exit code 1 where something fails.

    \b
    Example:
      tokenfab doctor
    """
    from dataclasses import asdict

    from ..bench.doctor import examine, installed_nvml, is_ready
    from ..bench.lab_tables import doctor_table

    found = examine(installed_nvml(), out=out)
    show(as_json, lambda: [asdict(each) for each in found], lambda: doctor_table(found))
    if not is_ready(found):
        raise click.exceptions.Exit(1)


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=10, show_default=True,
              help="Ends by itself within these.")  # fmt: skip
@click.option("--out", type=path_type, default="records", show_default=True, help="Folder of the records.")
@comma("--model", "models", "Whose steps; see `tokenfab models`.", default="deepseek-v3,qwen3-30b-a3b,gpt-oss-120b",
       show_default=True)  # fmt: skip
@comma("--batch", "batches", "Tokens per GPU and step.", default="1,16,64,128", show_default=True, item=int)
@comma("--context", "contexts", "Cached tokens of each sequence, for attention.", default="1024,8192",
       show_default=True, item=int)  # fmt: skip
@comma("--stage", "stages", "Of check, measure, step, sanitize.", default="check,measure,step,sanitize",
       show_default=True)  # fmt: skip
@click.option("--gpu", help="Which row of `tokenfab gpus` this GPU is; by default told by its name.")
@click.option("--list", "only_list", is_flag=True, help="Print the points in their order; needs no GPU, but --gpu.")
@click.option("--field", "field_file", type=path_type, metavar="FILE",
              help="Only write ours against the field between FILE's <!-- field:GPU --> markers.")  # fmt: skip
@click.option("--agree", type=(path_type, path_type), metavar="FILE FILE", default=None,
              help="Only say how far two runs' ratios to the anchor are apart; exit code 1 beyond 1 %.")  # fmt: skip
@click.option("--weights", type=path_type, metavar="DIR",
              help="Only this safetensors checkpoint in each precision: error against BF16, cost.")  # fmt: skip
@comma("--precision", "precisions", "With --weights; see `tokenfab models --precisions`.", default="fp8,mxfp4",
       show_default=True)  # fmt: skip
@click.option("--tokens", "num_tokens", type=click.IntRange(1), default=64, show_default=True,
              help="With --weights: decoded per sequence; sequences are the first of --batch.")  # fmt: skip
@click.option("--token-ids", "token_file", type=path_type, metavar="FILE",
              help="With --weights: a JSON list of lists of token ids, instead of random ones.")  # fmt: skip
@ray_option
@price_options
@click.option("--run", "child", type=(str, int, float, int), hidden=True)
@json_option
def lab(
    minutes: float, out: Path, models: list[str], batches: list[int], contexts: list[int], stages: list[str],
    gpu: str | None, only_list: bool, field_file: Path | None, agree: tuple[Path, Path] | None,
    weights: Path | None, precisions: list[str], num_tokens: int, token_file: Path | None, ray: str | None,
    child: tuple[str, int, float, int] | None, as_json: bool, **prices: Any,
) -> None:  # fmt: skip
    """Use this machine's GPU for some minutes: check every kernel, then measure what weighs most, first.

    Correctness of all kernels; one pass over the points, heaviest in the models' steps first, the libraries' kernels
    beside ours; whole decode steps; two more passes in fresh processes, for the noise; compute-sanitizer where it is
    installed. Each point is on disk before the next begins: stopped at any moment, nothing finished is lost, and the
    same command goes on from there. At the end, ours beside the published rows of vLLM, SGLang and TensorRT-LLM and
    the libraries measured here: every point that is behind, first.

    \b
    Examples:
      tokenfab lab --minutes 10 --out records
      tokenfab lab --list --gpu h100 --model deepseek-v3
      tokenfab lab --field README.md --out records
      tokenfab lab --minutes 10 --ray auto --gpu h100
      tokenfab lab --weights ./gpt-oss-20b --precision fp8,mxfp4 --batch 4
    """
    if weights is not None:
        weights_report(weights, precisions, batches[0], num_tokens, token_file, out, gpu, as_json, prices)
    elif agree is not None:
        _say_agreement(agree, as_json)
    elif field_file is not None:
        _write_field(field_file, out)
    elif only_list:
        _list_points(gpu, models, batches, contexts, as_json)
    elif child is not None:
        _run_child(*child, out=out, models=models, batches=batches, contexts=contexts, gpu=str(gpu))
    elif ray is not None:
        from .fleet_lab import lab_on_ray

        row, missing = lab_on_ray(ray, minutes, out, models, batches, contexts, stages, gpu, as_json)
        _summary(out, row.name, as_json)
        finish(*missing)
    else:
        _session(minutes, out, models, batches, contexts, stages, gpu, as_json)


# -- without a GPU ---------------------------------------------------------------------------------


def _say_agreement(files: tuple[Path, Path], as_json: bool) -> None:
    from dataclasses import asdict

    from ..bench.lab_field import AGREE, agreement

    found = agreement(*files)
    if as_json:
        print_json({**asdict(found), "agrees": found.agrees})
    else:
        click.echo(
            f"{found.num_points} points in both: ratios to the anchor differ by {found.median_difference:.2%} in the "
            f"median (at most {AGREE:.0%} for two runs that agree), {found.worst_difference:.2%} at worst: "
            f"{found.worst_point}"
        )
    if not found.agrees:
        raise click.exceptions.Exit(1)


def _write_field(file: Path, out: Path) -> None:
    from ..bench.lab_field import write_field
    from ..bench.published import PublishedData
    from ..bench.recorded import RecordedData

    names = write_field(file, RecordedData(out), PublishedData())
    click.echo(f"{file}: {', '.join(names)} from the records of {out}", err=True)


def _list_points(gpu: str | None, models: list[str], batches: list[int], contexts: list[int], as_json: bool) -> None:
    from ..bench.gpus import get_gpu
    from ..bench.lab_order import by_worth
    from ..bench.lab_tables import order_table
    from ..bench.targets import find_targets

    if gpu is None:
        raise UserError("gpu: expected --gpu NAME with --list; got none")
    row = get_gpu(gpu)
    points = by_worth(find_targets(None, None, models, batches, row, contexts), models, row)
    listed = [{"kernel": p.target.kernel.name, **p.target.shape, "worth_s": p.worth_s} for p in points]
    show(as_json, lambda: listed, lambda: order_table(points))


# -- on a GPU --------------------------------------------------------------------------------------


def _session(
    minutes: float, out: Path, models: list[str], batches: list[int], contexts: list[int], stages: Sequence[str],
    gpu: str | None, as_json: bool,
) -> None:  # fmt: skip
    from ..bench.campaign import gpu_of
    from ..bench.doctor import FAIL, WITHOUT_GPU, examine, installed_nvml, properties
    from ..bench.lab import Deadline, Journal
    from ..bench.lab_session import run_session
    from ..bench.lab_tables import doctor_table
    from ..bench.tables import console
    from ..bench.targets import find_targets

    deadline = Deadline(60 * minutes)
    nvml = installed_nvml()
    found = examine(nvml, out=out)
    failed = [each for each in found if each.status == FAIL]
    if any(each.name == "GPU" for each in failed):
        reason = next(each.detail for each in failed if each.name == "GPU")
        raise UserError(f"GPU: {reason}; {WITHOUT_GPU}, `tokenfab doctor` says what else is missing")
    if failed:
        raise UserError(f"{failed[0].name}: {failed[0].detail}; `tokenfab doctor` says what else is missing")
    row = gpu_of(properties(nvml), gpu)
    find_targets(None, None, models, batches, row, contexts)  # an unknown model is an error before the work
    if not as_json:
        console().print(doctor_table(found))
    again = ["--out", str(out), "--gpu", row.name]
    for flag, values in (("--model", models), ("--batch", batches), ("--context", contexts)):
        again += [flag, ",".join(map(str, values))]

    def run_child(stage: str, number: int, at_s: float) -> int:
        click.echo(f"{stage}{f' {number}' if number else ''}: until {_minutes(deadline.at_s - at_s)} before the end, "
                   f"{_minutes(deadline.left_s)} left", err=True)  # fmt: skip
        return _start(["--run", stage, str(number), str(at_s), str(os.getpid()), *again], at_s)

    def sanitize() -> None:
        _sanitize(out, row.name, deadline)

    runs = run_session(stages, deadline, Journal(out / _JOURNAL), run_child, sanitize)
    for run in runs:
        if run.code:
            click.echo(f"warning: {run.stage} {run.number or ''}: its process ended with {run.code}", err=True)
    _summary(out, row.name, as_json)


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "tokenfab", "lab", *arguments]


def _start(arguments: Sequence[str], at_s: float) -> int:
    """``tokenfab lab`` in a fresh process; ended by force if it is not done some time after ``at_s``."""
    from ..bench.lab_session import GRACE_S

    process = subprocess.Popen(_command(arguments), stdout=sys.stderr)
    try:
        return process.wait(max(0.0, at_s - time.monotonic()) + GRACE_S)
    except subprocess.TimeoutExpired:
        click.echo("warning: a process that did not end in time was ended; its point is not recorded", err=True)
        return -9
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _run_child(
    stage: str, number: int, at_s: float, parent: int, *, out: Path, models: list[str], batches: list[int],
    contexts: list[int], gpu: str,
) -> None:  # fmt: skip
    """One stage in this process."""
    from ..bench.cuda_device import CudaDevice
    from ..bench.gpus import get_gpu
    from ..bench.lab import Deadline, Journal, alone, measure_pass, measure_steps
    from ..bench.lab_checks import CheckFile, kernels_of, run_checks
    from ..bench.lab_order import by_worth
    from ..bench.records import RecordStore
    from ..bench.targets import find_targets

    row, journal = get_gpu(gpu), Journal(out / _JOURNAL)
    if at_s <= time.monotonic():
        return
    deadline = Deadline(at_s - time.monotonic())
    with alone(out / "lab.lock"):
        device = CudaDevice()
        store = RecordStore(out, f"{row.name}.jsonl")

        def is_orphan() -> bool:
            return os.getppid() != parent

        if stage == "check":
            file = CheckFile(out / _CHECKS / f"{row.name}.ndjson")
            run_checks(
                kernels_of(row), row, device, file, journal=journal,
                allows=lambda: not is_orphan() and deadline.left_s > 0,
                done=lambda check: click.echo(f"check {check.kernel} {_shape(check.shape)}: {check.verdict}", err=True),
            )  # fmt: skip
        elif stage == "measure":
            targets = find_targets(None, None, models, batches, row, contexts)
            points = [each.target for each in by_worth(targets, models, row)]
            result = measure_pass(
                points, device, row, store, number, deadline, journal=journal, is_orphan=is_orphan, progress=_tell
            )  # fmt: skip
            for outcome in result.skipped:
                shape = _shape(outcome.target.shape)
                click.echo(f"skipped: {outcome.target.kernel.name} {shape}: {outcome.skipped}", err=True)
            click.echo(f"pass {number}: {result.measured} measured, {result.old} known, {len(result.left)} left, "
                       f"{len(result.died)} left out because their process died", err=True)  # fmt: skip
        elif stage == "step":
            measure_steps(
                models, batches, contexts, device, row, store, deadline, results=out / _STEPS / f"{row.name}.ndjson",
                journal=journal, is_orphan=is_orphan, tell=lambda text: click.echo(f"step {text}", err=True),
            )  # fmt: skip
        else:
            raise UserError(f"stage: expected check, measure or step; got {stage!r}")


def _tell(progress: Any) -> None:
    """A line per new point: what came of it, how many there are, what the rest would take and what is left."""
    outcome = progress.outcome
    if outcome.is_old:
        return
    if outcome.record is None:
        verdict = f"skipped: {outcome.skipped}"
    elif outcome.record.time_s is None:
        verdict = f"invalid: {outcome.record.invalid[0]}"
    else:
        verdict = f"{outcome.record.time_s * 1e6:.2f} us, {outcome.record.roofline_fraction:.0%} of floor"
    click.echo(
        f"{progress.done}/{progress.total} {outcome.target.kernel.name} {_shape(outcome.target.shape)}: {verdict}; "
        f"the rest about {_minutes(progress.rest_s)}, {_minutes(progress.left_s)} left", err=True,
    )  # fmt: skip


def _sanitize(out: Path, gpu: str, deadline: Any) -> None:
    from ..bench.doctor import find_tool, installed_nvml, properties
    from ..bench.gpus import get_gpu
    from ..bench.lab_checks import CheckFile, kernels_of, run_sanitizers

    tool = find_tool("compute-sanitizer")
    if tool is None:
        click.echo("sanitize: skipped: compute-sanitizer is not installed", err=True)
        return
    row = get_gpu(gpu)
    run_sanitizers(
        kernels_of(row), tool, properties(installed_nvml()), CheckFile(out / _CHECKS / f"{row.name}.ndjson"),
        allows=lambda: deadline.left_s > 0, timeout_s=max(1.0, deadline.left_s),
        done=lambda check: click.echo(f"{check.how} {check.kernel}: {check.verdict}", err=True),
    )  # fmt: skip


def _summary(out: Path, gpu: str, as_json: bool) -> None:
    """Ours against the field, and what the checks found."""
    from ..bench.gpus import get_gpu
    from ..bench.lab import read_steps
    from ..bench.lab_checks import CheckFile
    from ..bench.lab_field import document, field_rows, num_behind
    from ..bench.lab_tables import checks_lines, field_table, steps_lines
    from ..bench.published import PublishedData, PublishedDataError
    from ..bench.recorded import NoRecords, RecordedData

    row = get_gpu(gpu)
    checks = CheckFile(out / _CHECKS / f"{gpu}.ndjson").read()
    try:
        published = PublishedData()
    except PublishedDataError as error:  # a machine with a GPU and little else
        click.echo(f"warning: no published rows beside ours: {error}", err=True)
        published = None
    try:
        rows = field_rows(RecordedData(out), published, row)
    except NoRecords as error:  # the checks and steps have something to say all the same
        click.echo(f"warning: {error}", err=True)
        rows = []
    steps = read_steps(out / _STEPS / f"{gpu}.ndjson")
    lines = [f"{num_behind(rows)} of {len(rows)} shapes behind; records: {out}", *steps_lines(steps),
             *checks_lines(checks)]  # fmt: skip
    data = document(row, rows) | {"checks": [{**_as_dict(check), "verdict": check.verdict} for check in checks]}
    data["steps"] = steps
    show(as_json, lambda: data, lambda: field_table(row, rows), lambda: lines)


def _as_dict(check: Any) -> dict[str, Any]:
    import msgspec

    return msgspec.to_builtins(check)


def _shape(shape: dict[str, int]) -> str:
    return " x ".join(map(str, shape.values()))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
