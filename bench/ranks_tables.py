"""A step on several ranks, and the check of one, for people and as a document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .tables import number, plain_table

if TYPE_CHECKING:
    from .ranks_check import RankCheck
    from .ranks_measure import RankedStep


def ranks_table(result: RankedStep) -> Any:
    """Op by op: communication by its plan's name, the rest by their kernel's."""
    total = result.whole_s
    rows = []
    for op in result.ops:
        all_s = None if op.time_s is None else op.calls * op.time_s
        rows.append((
            op.name, op.runs_on, op.calls, number(None if op.time_s is None else op.time_s * 1e6),
            number(op.floor_s * 1e6), "-" if op.time_s is None else f"{op.floor_s / op.time_s:.0%}",
            "-" if all_s is None or total is None else f"{all_s / total:.1%}",
        ))  # fmt: skip
    title = (
        f"{result.model} {result.precision}, {result.parallel}, batch {result.batch:g} per GPU, {result.length} cached "
        "tokens: each op alone, on the slowest rank"
    )
    return plain_table(title, ("op", "runs on", "calls", "us", "floor us", "of floor", "of step"), rows, left=2)


def ranks_lines(result: RankedStep) -> list[str]:
    """The step beside its ops, rank by rank."""
    if result.whole_s is None:
        return [f"no time: {reason}" for reason in result.records[0].invalid]
    lines = [
        f"step: {number(result.whole_s * 1e3)} ms on the slowest of {result.ranks} ranks, "
        f"{number(result.tokens_per_s_per_gpu)} output tokens/s/GPU at batch {result.batch:g} per GPU and "
        f"{result.length} cached tokens; floor {number(result.floor_s * 1e3)} ms of memory and matrix units"
    ]
    sum_s, gap_s, sent_s = result.sum_s, result.gap_s, result.communication_s
    if sum_s is not None and gap_s is not None:
        lines.append(f"ops alone: {number(sum_s * 1e3)} ms together, the step {gap_s * 1e3:+.3f} ms")
    if sent_s is not None:
        share = sent_s / result.whole_s
        lines.append(f"communication: {number(sent_s * 1e3)} ms by {result.backend}, {share:.1%} of the step")
    for rank, (rank_s, gpu) in enumerate(zip(result.rank_s, result.gpus, strict=True)):
        lines.append(f"rank {rank}: {number(rank_s * 1e3, 4)} ms, {gpu}")
    if result.padding is not None:
        lines.append(f"exchange: padded, {number(result.padding)} rows sent per row that has a token")
    if result.distinct_layers < result.layers:
        lines.append(f"layers: {result.distinct_layers} of {result.layers} have weights of their own")
    return [*lines, *(f"left out: {each}" for each in result.omitted)]


def ranks_dict(result: RankedStep) -> dict[str, Any]:
    """One document."""
    from dataclasses import asdict

    names = ("model", "parallel", "precision", "ranks", "backend", "batch", "length", "layers", "distinct_layers",
             "whole_s", "rank_s", "gpus", "floor_s", "sum_s", "gap_s", "communication_s", "tokens_per_s_per_gpu",
             "padding", "omitted", "timed_ops")  # fmt: skip
    ops = [asdict(op) for op in result.ops]
    found = {name: getattr(result, name) for name in names}
    return found | {"ops": ops, "invalid": list(result.records[0].invalid), "flags": list(result.records[0].flags)}


def check_lines(check: RankCheck, where: str) -> list[str]:
    """What was compared, and what came of it."""
    bits = {True: "the bits of one rank's", False: "other bits than one rank's", None: "no bits are promised"}
    sent = ", ".join(f"{count} x {name}" for name, count in check.communication.items()) or "none"
    lines = [
        f"{check.model} {check.precision}, {check.parallel} on {check.ranks} ranks ({check.backend}), cut to "
        f"{check.layers} small layer{'s' if check.layers > 1 else ''}, {where}",
        f"against one rank: {bits[check.same_bits]}; error at most {max(check.worst):.0%} of the tolerance of a layer "
        f"({check.tolerance:g} of what it adds)",
        f"communication, as in the decode plan: {sent}",
    ]
    verdict = [f"wrong: {problem}" for problem in check.problems] or ["right"]
    return [*lines, *verdict, "correctness alone: nothing was timed"]
