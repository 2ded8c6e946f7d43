"""``tokenfab tune --ray``: candidates compiled on every CPU of a cluster, those that are left measured on its GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fleet import FleetProgress, finish, row_of, tell

if TYPE_CHECKING:
    from ..bench.device import DeviceProperties
    from ..bench.fleet import Lost
    from ..bench.gpus import Gpu
    from ..bench.targets import Target
    from ..bench.tune import Searched
    from ..bench.tune_prune import Pruned
    from ..costing.prices import Price


def tune_on_ray(
    address: str, find: Callable[[Gpu], list[Target]], gpu: str | None, arch: str | None, use_cache: bool,
    only_floors: bool, show_all: bool, budget_s: float | None, processes: int, out: Path, table: Path | None,
    price: Callable[[Gpu], Price | None], as_json: bool,
) -> None:  # fmt: skip
    """As ``tune`` does it on one machine. Exit code 1 where a search ended without all its tiles."""
    from ..bench.fleet_compile import compile_on
    from ..bench.fleet_ray import connect
    from ..bench.tune_prune import prune
    from .tune import check_arch, conclude, finish_without, print_floors

    properties: DeviceProperties | None = None
    missing = 0
    with connect(address) as cluster:
        row = row_of(cluster, gpu)
        check_arch(arch, row)
        pruned: list[Pruned] = []
        targets = find(row)
        with FleetProgress(f"compiling on {cluster.num_cpus()} CPUs", quiet=as_json) as progress:
            for index, target in enumerate(targets, start=1):
                progress.begin(f"compiling {index}/{len(targets)} {target.kernel.name}", 0)
                pruned.append(prune(
                    target, row, use_cache=use_cache, compile_all=compile_on(cluster.spread),
                    progress=lambda done, total, each: progress.advance(total, "", not each.cached),
                ))  # fmt: skip
        has_gpus = cluster.gpu_models().get(row.name, 0) > 0
        if has_gpus and not only_floors:
            properties, missing = _measure(cluster, row, gpu is not None, pruned, out, budget_s, processes, as_json)
    if not as_json:
        print_floors(pruned, row, show_all)
    if properties is None:
        finish_without(pruned, row, "" if has_gpus else f"The cluster names no {row.name}.", as_json)
        return
    conclude(
        pruned, properties, row, out, table or out / f"tuned-{row.name}.json", processes, lambda: price(row), as_json
    )
    finish(missing, 0)


def _measure(
    cluster: Any, row: Gpu, is_named: bool, pruned: list[Pruned], out: Path, budget_s: float | None, processes: int,
    as_json: bool,
) -> tuple[DeviceProperties | None, int]:  # fmt: skip
    """The passes; the GPUs' properties and how many searches of the last pass have no end."""
    from ..bench.fleet import Lost
    from ..bench.fleet_sweep import Fleet, make_spec
    from ..bench.fleet_tune import tune_on
    from ..bench.records import RecordStore
    from ..bench.tune_prune import name_of
    from ..bench.tune_show import shape_text

    store, spec = RecordStore(out, f"{row.name}-tune.jsonl"), make_spec(row.name, is_named=is_named)
    with Fleet(cluster, row, spec, out, tell) as fleet, FleetProgress("pass", quiet=as_json) as progress:

        def done(each: Pruned, searched: Searched | Lost) -> None:
            name = f"{each.target.kernel.name} {shape_text(each.target)}"
            progress.advance(len(pruned), name)
            if isinstance(searched, Lost):
                tell(f"skipped: {name}: {searched.reason}")
                return
            for tile, reason in searched.skipped.items():
                tell(f"skipped: {name} {name_of(tile)}: {reason}")
            if not searched.is_whole:
                tell(f"time is up: {name}: some tiles were not measured; a second run goes on there")

        missing = tune_on(
            fleet, pruned, store, processes=processes, budget_s=budget_s, done=done,
            begin=lambda number: progress.begin(f"pass {number} on {len(fleet.seats)} GPUs", len(pruned)),
        )  # fmt: skip
        return fleet.properties, missing
