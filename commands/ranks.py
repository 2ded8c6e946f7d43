"""``tokenfab ranks``: a decode step over several GPUs, one process for each; started by torchrun or Slurm."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from .options import parallel_option
from .shared import Progress, UserError, json_option, path_type, print_json, show


@click.command()
@click.argument("model")
@parallel_option
@click.option("--batch", type=float, default=64, show_default=True, help="Sequences per GPU.")
@click.option("--context", type=click.IntRange(1), default=4096, show_default=True, help="Cached tokens per sequence.")
@click.option("--precision", help="See `tokenfab models --precisions`; the checkpoint's own by default.")
@click.option("--capacity", type=click.IntRange(1), metavar="ROWS",
              help="Rows of a block of the exchange; by default as many as any routing can need.")  # fmt: skip
@click.option("--ops", type=click.Choice(["all", "communication", "none"]), default="all", show_default=True,
              help="Which ops to time alone too.")  # fmt: skip
@click.option("--budget", "budget_s", type=float, default=10.0, show_default=True, help="Seconds of timing the step.")
@click.option("--gpu", help="Which row of `tokenfab gpus` these GPUs are; by default told by their name.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1, 86400), default=300, show_default=True,
              help="Seconds that ranks wait for each other before all end with an error.")  # fmt: skip
@click.option("--out", type=path_type, default="records", show_default=True, help="Folder of the records.")
@click.option("--check", "only_check", is_flag=True,
              help="Compare with one rank at cut sizes; times nothing. Without a GPU, on CPUs.")  # fmt: skip
@json_option
def ranks(
    model: str, parallel: str | None, batch: float, context: int, precision: str | None, capacity: int | None, ops: str,
    budget_s: float, gpu: str | None, timeout_s: float, out: Path, only_check: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure one decode step of MODEL over several GPUs: one process for each, started by torchrun.

    Attention data parallel with experts spread and an all-to-all (dpN-epN, the default), or tensor parallel with
    all-reduces (tpN, tpN-epN); tokenfab's kernels, NCCL between them, the whole step in one CUDA graph. The slowest
    rank is the step; communication is timed and recorded like a kernel, and added, never hidden. Weights are random,
    seeded. A rank that dies or raises ends all with an error. Rank 0 prints, and appends to OUT/GPU.jsonl.

    \b
    Examples:
      torchrun --nproc-per-node 8 -m tokenfab ranks deepseek-v3 --parallel dp8-ep8 --batch 64
      torchrun --nproc-per-node 8 -m tokenfab ranks qwen3-30b-a3b --parallel tp4 --precision bf16
      torchrun --nproc-per-node 2 -m tokenfab ranks gpt-oss-120b --check
    """
    if only_check and not _has_gpu():
        from ..bench.user_check import use_interpreter

        use_interpreter()  # before any kernel is imported
    from ..bench.device import DeviceError, NoGpu
    from ..bench.ranks_group import RankFailed, joined, launched

    if not only_check and not _has_gpu():
        check = f"`torchrun --nproc-per-node 2 -m tokenfab ranks {model} --check` says whether it is right"
        raise NoGpu(f"GPU: expected an NVIDIA GPU for each rank; found none. Without one, {check}")
    import torch

    here = launched()
    count = torch.cuda.device_count()
    if _has_gpu() and here.local_rank >= count:
        raise UserError(f"LOCAL_RANK: expected 0 to {count - 1}, one GPU for each rank; got {here.local_rank}")
    device = torch.device("cuda", here.local_rank) if _has_gpu() else torch.device("cpu")
    given = (model, parallel or f"dp{here.size}-ep{here.size}", batch, context, precision)
    passed = True
    try:
        with joined(device, timeout_s=timeout_s) as group:
            if only_check:
                passed = _check(group, *given, as_json)
            else:
                _measure(group, *given, capacity, ops, budget_s, gpu, out, as_json)
    except (RankFailed, ValueError, DeviceError) as error:
        _end(error)
    if not passed:
        raise click.exceptions.Exit(1)


def _has_gpu() -> bool:
    """Without importing Triton, whose interpreter may yet have to be chosen."""
    try:
        import torch
    except ImportError:
        raise UserError("torch: expected it installed (pip install .[kernels]); found none") from None
    return torch.cuda.is_available() and torch.version.cuda is not None and not os.environ.get("TRITON_INTERPRET")


def _end(error: Exception) -> NoReturn:
    """One line and exit code 2, at once: what a rank left on its GPU may wait for others without end."""
    click.echo(f"error: {' '.join(str(error).split())}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _deployment(
    model: str, parallel: str, batch: float, context: int, precision: str | None, size: int
) -> tuple[Any, Any, str]:
    """(model with its layers in order, deployment, its notation)."""
    from ..bench.deployment import Deployment, get_precision
    from ..bench.step_model import load_step_model
    from ..costing.sweep import Parallel

    found, split = load_step_model(model), Parallel.parse(parallel)
    if split.gpus != size:
        raise ValueError(f"parallel: expected a deployment of {size} GPUs, one for each rank; got {parallel}")
    if found.config.native_precision is None and precision is None:
        raise ValueError(f"precision: expected one with {model}, whose checkpoint has none that is known; got none")
    name = precision or str(found.config.native_precision)
    given = Deployment(
        gpus=split.gpus, attention_tp=split.attention_tp, expert_parallel=split.expert_parallel,
        precision=get_precision(name), batch_per_gpu=batch, context=context,
        exchange="all_gather" if split.all_gather else "all_to_all",
    )  # fmt: skip
    return found, given, str(split)


def _check(
    group: Any, model: str, parallel: str, batch: float, context: int, precision: str | None, as_json: bool
) -> bool:
    import torch

    from ..bench.ranks_check import check_ranks
    from ..bench.ranks_tables import check_lines

    torch.set_num_threads(1)
    found, given, notation = _deployment(model, parallel, batch, context, precision, group.size)
    check = check_ranks(group, found, given, notation)
    if group.rank == 0:
        where = "on GPUs" if group.device.type == "cuda" else "on CPUs by Triton's interpreter"
        if as_json:
            print_json(check.as_dict() | {"where": where})
        else:
            click.echo("\n".join(check_lines(check, where)))
    return check.passed


def _measure(
    group: Any, model: str, parallel: str, batch: float, context: int, precision: str | None, capacity: int | None,
    ops: str, budget_s: float, gpu: str | None, out: Path, as_json: bool,
) -> None:  # fmt: skip
    from ..bench.campaign import gpu_of
    from ..bench.cuda_device import CudaDevice
    from ..bench.measurement import Settings
    from ..bench.ranks_measure import RankDevice, check_alike, measure_ranks, weight_budget
    from ..bench.ranks_step import ManyRanks, build_rank_step
    from ..bench.ranks_tables import ranks_dict, ranks_lines, ranks_table
    from ..bench.records import RecordStore
    from ..bench.step_cases import op_groups

    found, given, notation = _deployment(model, parallel, batch, context, precision, group.size)
    device = RankDevice(CudaDevice(group.device.index), group)
    check_alike(group, device.properties)
    row = gpu_of(device.properties, gpu)
    across = ManyRanks(group, given, capacity)
    step = build_rank_step(found, across, max_weight_bytes=weight_budget(group))
    store = RecordStore(out, f"{row.name}.jsonl")
    with Progress("measuring", quiet=as_json or group.rank > 0) as progress:
        result = measure_ranks(
            step, across, device, row, notation, store=store, settings=Settings(budget_s=budget_s),
            op_settings=Settings(budget_s=min(budget_s, 2.0)), ops=ops,
            done=lambda name: progress.advance(1 + len(op_groups(step)), name),
        )  # fmt: skip
    if group.rank == 0:
        show(as_json, lambda: ranks_dict(result), lambda: ranks_table(result), lambda: ranks_lines(result))
