"""``tokenfab tune --kernel``: which of the tiles that a user's file offers is the fastest, by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .shared import Progress, UserError, print_json

if TYPE_CHECKING:
    from ..bench.device import DeviceProperties
    from ..bench.gpus import Gpu
    from ..bench.targets import Target
    from ..bench.tune import Trials, Verdict
    from ..costing.prices import Price

Clock = Callable[[float | None, int], Callable[[float], bool]]


def find_user_targets(
    op: str, formats: list[str] | None, place: str, models: Sequence[str], batches: Sequence[int],
    contexts: Sequence[int], row: Gpu, asked: Sequence[Any],
) -> list[Target]:  # fmt: skip
    """The user's kernel at the shapes of the models, or at those asked for.

    Raises:
        ValueError: as ``load_user_kernel``; fewer than two tiles; no shape.
    """
    from ..bench.targets import find_targets
    from ..bench.tune_user import user_contest
    from ..bench.user_kernel import base_kernel, load_user_kernel

    kernel = load_user_kernel(place, base_kernel(op, formats))
    targets = [
        target for target in find_targets(op, formats, models, batches, row, contexts, extra=[kernel], shapes=asked)
        if target.kernel is kernel and (asked or target.places != ("compared",))
    ]  # fmt: skip
    if not targets:
        raise ValueError(f"format, model: expected a shape for {place}; got none")
    for target in targets:
        user_contest(target)
    return targets


def measure_user(
    targets: Sequence[Target], row: Gpu, out: Path, number: int, budget_s: float | None, clock: Clock
) -> None:
    """One pass over the targets in this process."""
    from ..bench.cuda_device import CudaDevice
    from ..bench.records import RecordStore
    from ..bench.tune_show import shape_text
    from ..bench.tune_user import run_user_search, tile_name

    device, store = CudaDevice(), RecordStore(out, f"{row.name}-tune.jsonl")
    end_s = None if budget_s is None else time.monotonic() + budget_s
    with Progress(f"pass {number}", quiet=False) as progress:
        for index, target in enumerate(targets):
            name = f"{target.kernel.name} {shape_text(target)}"
            searched = run_user_search(
                target, device, row, store, process=number, is_over=clock(end_s, len(targets) - index),
                done=lambda done, total, at, tile, name=name: progress.update(
                    done, total, f"{name} {at.name} round {tile_name(tile)}"
                ),
            )  # fmt: skip
            for tile, reason in searched.skipped.items():
                click.echo(f"skipped: {name} {tile_name(tile)}: {reason}", err=True)


def conclude_user(
    targets: Sequence[Target], properties: DeviceProperties, row: Gpu, out: Path, processes: int,
    price: Callable[[], Price | None], as_json: bool,
) -> None:  # fmt: skip
    """Decides from the records, and prints what to put first in ``TILES`` and what it is worth."""
    from ..bench.record import environment
    from ..bench.records import RecordStore
    from ..bench.tables import console, plain_table
    from ..bench.tune import ROUNDS, Trials, decide
    from ..bench.tune_show import shape_text
    from ..bench.tune_user import tile_name, user_contest

    store = RecordStore(out, f"{row.name}-tune.jsonl")
    records, here, stated = list(store.records()), environment(properties), price()
    listed, rows, lines = [], [], []
    for target in targets:
        contest = user_contest(target)
        trials = Trials(contest, row, here, ROUNDS, records)
        verdict = decide(trials, processes)
        faults = {tile_name(tile): fault for tile in contest.tiles if (fault := trials.fault(tile))}
        worth = _worth(target, verdict, row, stated)
        listed.append({
            "kernel": target.kernel.name, "shape": target.shape, "default": dict(contest.tiles[0]),
            "adopted": None if verdict.adopted is None else dict(verdict.adopted),
            "gain": verdict.gain, "noise": verdict.noise, "reason": verdict.reason, "faults": faults, "worth": worth,
        })  # fmt: skip
        rows.append(_row(target, trials, verdict, shape_text(target)))
        lines += [f"out: {shape_text(target)} {name}: {fault}" for name, fault in faults.items()]
        lines += [f"worth: {place}: {saved}" for place, saved in worth.items()]
    if as_json:
        print_json({"schema_version": 1, "gpu": row.name, "rows": listed})
        return
    printed = console()
    columns = ("kernel", "shape", "first of TILES", "best other", "verdict", "first us", "best us", "gain", "noise")
    printed.print(plain_table(f"{row.title}, {store.path}", columns, rows, left=5))
    for line in [*lines, "The table of tuned tiles is tokenfab's own: put the fastest first in TILES"]:
        printed.print(line, soft_wrap=True)


def _row(target: Target, trials: Trials, verdict: Verdict, shape: str) -> tuple[str, ...]:
    from ..bench.tune_user import tile_name, user_contest

    default, best = verdict.default, verdict.best
    first = tile_name(user_contest(target).tiles[0])
    return (
        target.kernel.name, shape, first, tile_name(best.tile) if best else "-",
        ("faster: " if verdict.adopted else "kept: ") + verdict.reason,
        f"{default.time_s * 1e6:.2f}" if default else "-", f"{best.time_s * 1e6:.2f}" if best else "-",
        "-" if verdict.gain is None else f"{verdict.gain:+.1%}",
        "-" if verdict.noise is None else f"{verdict.noise:.1%}",
    )  # fmt: skip


def _worth(target: Target, verdict: Verdict, row: Gpu, price: Price | None) -> dict[str, str]:
    """What the gain saves where the shape stands."""
    from ..bench.places import places_of
    from ..costing.kernel_price import usd_per_mtok

    if verdict.adopted is None:
        return {}
    models = dict.fromkeys(place.split(" ")[0] for place in target.places if " " in place)
    return {
        str(place): "no price of this GPU is known" if price is None
        else f"${usd_per_mtok(verdict.saved_s, place, price):.4g} per million tokens ({price.describe()})"
        for place in places_of(target.kernel.op, target.shape, models, row)
    }  # fmt: skip


def no_gpu(targets: Sequence[Target], why: str) -> None:
    """Nothing can be pruned or ranked without running the file's kernels."""
    count = len(targets[0].kernel.tiles)  # type: ignore[attr-defined]
    raise UserError(
        f"kernel: what foreign code compiles to is not known before it runs, so its {count} tiles cannot be ranked by "
        f"floors; `tokenfab bench --kernel ... --check` says whether the first is right. {why}"
    )
