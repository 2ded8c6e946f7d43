"""A search over tiles for people and for machines: floors before any launch, verdicts after measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .tables import plain_table
from .targets import Target
from .tune import Timed, Trials, Verdict
from .tune_prune import Candidate, Pruned, name_of

SCHEMA_VERSION = 1
SHOWN = 12
"""Survivors in a table, unless all are asked for."""


def _us(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1e6:.2f}"


def shape_text(target: Target) -> str:
    return " x ".join(str(value) for _, value in target.fields)


def floors_table(pruned: Pruned, gpu: str, show_all: bool) -> Table:
    """The survivors by their floors, which are no times."""
    rows, shown = [], pruned.survivors if show_all else pruned.survivors[:SHOWN]
    default = pruned.default
    if default is not None and default not in shown:
        shown = (*shown, default)
    for each in shown:
        compiled, spent = each.inspections[0].compiled, each.instructions_per_value
        assert compiled is not None
        floors = {"bytes": each.bytes_s, "matrix": each.matrix_s, "issue": each.issue_s}
        cells = [_us(floor) + ("*" if name == each.binds else " ") for name, floor in floors.items()]
        rows.append((
            pruned.survivors.index(each) + 1, name_of(each.tile) + (" (default)" if each is default else ""), *cells,
            "?" if spent is None else f"{spent:.2f}", compiled.registers, f"{compiled.shared_bytes / 1024:.0f}",
            each.ctas_per_sm, each.programs, f"{each.waves:.2f}", f"{each.bytes_in_flight / 1024:.0f}",
        ))  # fmt: skip
    places = ", ".join(pruned.target.places[:3])
    title = (
        f"{pruned.target.kernel.name} {shape_text(pruned.target)} ({places}) on {gpu}\n"
        f"{len(pruned.survivors)} of {len(pruned.survivors) + len(pruned.dropped)} tiles are left, by their floors: "
        "least us of one call, * the one that binds. Nothing here is a time."
    )
    columns = ("", "block_m x n x k, warps, stages", "bytes us", "matrix us", "issue us", "i/v", "regs", "KiB", "CTAs",
               "programs", "waves", "KiB in flight")  # fmt: skip
    return plain_table(title, columns, rows, left=2)


def dropped_lines(pruned: Pruned, show_all: bool) -> list[str]:
    """What was dropped: every tile with its reason, or how many for which kind of reason, with an example each."""
    if show_all:
        return [f"dropped: {name_of(each.tile)}: {each.reason}" for each in pruned.dropped]
    first = {each.reason.split(":")[0]: each for each in reversed(pruned.dropped)}
    counts = Counter(each.reason.split(":")[0] for each in pruned.dropped)
    return [f"dropped {count}: {first[kind].reason} ({name_of(first[kind].tile)})" for kind, count in counts.items()]


def _candidate_dict(each: Candidate) -> dict[str, Any]:
    compiled = each.inspections[0].compiled
    assert compiled is not None
    return {
        "tile": asdict(each.tile), "floor_s": each.floor_s, "binds": each.binds, "bytes_s": each.bytes_s,
        "matrix_s": each.matrix_s, "issue_s": each.issue_s, "instructions_per_value": each.instructions_per_value,
        "registers": compiled.registers, "shared_bytes": compiled.shared_bytes, "ctas_per_sm": each.ctas_per_sm,
        "programs": each.programs, "waves": each.waves, "bytes_in_flight": each.bytes_in_flight,
    }  # fmt: skip


def _timed_dict(timed: Timed | None) -> dict[str, Any] | None:
    return None if timed is None else asdict(timed)


def pruned_dict(pruned: Pruned) -> dict[str, Any]:
    target = pruned.target
    return {
        "op": target.kernel.op, "formats": target.kernel.formats, "shape": target.shape, "places": target.places,
        "kernel": pruned.place.kernel, "arch": pruned.place.arch, "default": asdict(pruned.place.default),
        "survivors": [_candidate_dict(each) for each in pruned.survivors],
        "dropped": [{"tile": asdict(each.tile), "reason": each.reason} for each in pruned.dropped],
    }  # fmt: skip


def measured_dict(trials: Trials, verdict: Verdict) -> dict[str, Any]:
    """What was measured of a target, and the verdict."""
    rounds = [
        {"round": at.name, "tile": asdict(tile), "ratios": trials.ratios(tile, at), "fault": trials.fault(tile)}
        for index, at in enumerate(trials.rounds)
        for tile in trials.entrants(index)
    ]
    return {
        "rounds": rounds, "default_timed": _timed_dict(verdict.default), "best_timed": _timed_dict(verdict.best),
        "gain": verdict.gain, "noise": verdict.noise, "saved_s": verdict.saved_s,
        "adopted": asdict(verdict.adopted) if verdict.adopted else None, "reason": verdict.reason,
    }  # fmt: skip


def document(gpu: str, targets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "gpu": gpu, "targets": list(targets)}


def verdicts_table(title: str, found: Sequence[tuple[Pruned, Trials, Verdict]]) -> Table:
    """One row per target: the default and the best other tile, medians over processes, and what follows."""
    rows = []
    for pruned, trials, verdict in found:
        default, best = verdict.default, verdict.best
        out = sum(bool(trials.fault(each.tile)) for each in pruned.survivors)
        rows.append((
            pruned.target.kernel.name, shape_text(pruned.target), name_of(pruned.place.default),
            name_of(best.tile) if best else "-", ("adopted: " if verdict.adopted else "kept: ") + verdict.reason,
            _us(default.time_s) if default else "-", _us(best.time_s) if best else "-",
            "-" if verdict.gain is None else f"{verdict.gain:+.1%}",
            "-" if verdict.noise is None else f"{verdict.noise:.1%}", out,
        ))  # fmt: skip
    columns = (
        "kernel",
        "shape",
        "default",
        "best other",
        "verdict",
        "default us",
        "best us",
        "gain",
        "noise",
        "faulty",
    )
    return plain_table(title, columns, rows, left=5)


def fault_lines(found: Sequence[tuple[Pruned, Trials, Verdict]]) -> list[str]:
    """Tiles that are out for what they did on the GPU."""
    return [
        f"out: {pruned.target.kernel.name} {shape_text(pruned.target)} {name_of(each.tile)}: {trials.fault(each.tile)}"
        for pruned, trials, _ in found
        for each in pruned.survivors
        if trials.fault(each.tile)
    ]
