"""``tokenfab lab --ray``: the lab's stages over the GPUs of a cluster."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .fleet import FleetProgress, row_of, tell

if TYPE_CHECKING:
    from ..bench.campaign import Outcome
    from ..bench.gpus import Gpu


def lab_on_ray(
    address: str, minutes: float, out: Path, models: list[str], batches: list[int], contexts: list[int],
    stages: Sequence[str], gpu: str | None, as_json: bool,
) -> tuple[Gpu, tuple[int, int]]:  # fmt: skip
    """The GPU measured on, and how many items were lost and left."""
    from ..bench.fleet_lab import STAGES, run_lab
    from ..bench.fleet_ray import connect
    from ..bench.fleet_seat import StepWork
    from ..bench.fleet_sweep import Fleet, make_spec
    from ..bench.lab import Deadline
    from ..bench.lab_checks import CheckFile
    from ..bench.lab_order import by_worth
    from ..bench.lab_session import STAGES as ALL_STAGES
    from ..bench.models import load_model
    from ..bench.records import RecordStore
    from ..bench.targets import find_targets

    for stage in stages:
        if stage not in ALL_STAGES:
            raise ValueError(f"stage: expected some of {', '.join(ALL_STAGES)}; got {stage!r}")
    with connect(address) as cluster:
        for stage in set(stages) - set(STAGES):
            tell(f"{stage}: left out over a cluster; `tokenfab lab --stage {stage}` does it on one machine")
        row = row_of(cluster, gpu)
        targets = [
            each.target for each in by_worth(find_targets(None, None, models, batches, row, contexts), models, row)
        ]
        known = sorted((load_model(name) for name in models), key=lambda model: model.num_parameters)
        sizes = itertools.product(known, sorted(batches, reverse=True), sorted(contexts))
        steps = [StepWork(model.name, batch, length) for model, batch, length in sizes]
        spec = make_spec(row.name, is_named=gpu is not None)
        with Fleet(cluster, row, spec, out, tell) as fleet, FleetProgress("lab", quiet=as_json) as progress:

            def done(outcome: Outcome) -> None:
                progress.advance(len(targets), outcome.target.kernel.name, not outcome.is_old)
                if outcome.skipped:
                    tell(f"skipped: {outcome.target.kernel.name} {outcome.target.shape}: {outcome.skipped}")

            session = run_lab(
                fleet, targets, steps, RecordStore(out, f"{row.name}.jsonl"),
                CheckFile(out / "checks" / f"{row.name}.ndjson"), out / "steps" / f"{row.name}.ndjson",
                Deadline(60 * minutes), stages=stages, begin=progress.begin, done=done, tell=tell,
            )  # fmt: skip
    for line in session.lost:
        tell(f"lost: {line}")
    return row, (len(session.lost), session.left)
