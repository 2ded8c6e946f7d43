"""A step over two ranks on virtual clocks, one slower than the other: what both must agree on, and what is recorded."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from tokenfab.bench import ranks_measure
from tokenfab.bench.decode_plan import decode_plan
from tokenfab.bench.device import DeviceState
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.ranks_group import RankGroup
from tokenfab.bench.ranks_measure import OVERLAP, RankDevice, RankedStep, check_alike, measure_ranks
from tokenfab.bench.ranks_ops import COMMUNICATION
from tokenfab.bench.ranks_step import ManyRanks, build_rank_step
from tokenfab.bench.records import RecordStore
from tokenfab.bench.step_cases import op_groups
from tokenfab.tests.bench.ranks_step_cases import deployed
from tokenfab.tests.bench.step_models import qwen
from tokenfab.tests.bench.test_step_measure import BETWEEN_S, COST_S, FAST, Clock, logged, replace_run

H100 = get_gpu("h100")
OWN_S = {"dispatch": (3e-3, 4e-3), "combine": (2e-3, 2e-3), "experts": (20e-3, 14e-3), "qkv_proj": (3e-3, 5e-3)}
"""Of a launch, on rank 0 and on rank 1: neither is the slower in all."""

TIMED = ("qkv_proj", "experts", *COMMUNICATION)
"""Of the ops: all that communicate, and two that do not."""


class RankClock(Clock):
    """``bits``: why the clocks are held down. ``wrong_after``: answers of ``all_finite`` that are true."""

    def __init__(self, rank: int, bits: int = 0, wrong_after: float = math.inf, name: str = "") -> None:
        super().__init__()
        self.bits, self.left = bits, wrong_after
        changes = {"name": name} if name else {}
        self.properties = msgspec.structs.replace(self.properties, uuid=f"GPU-{rank}", **changes)

    def state(self) -> DeviceState:
        return super().state()._replace(throttle_bits=self.bits)

    def all_finite(self, buffers: Any) -> bool:
        self.left -= 1
        return self.left >= 0 and super().all_finite(buffers)


def measured(
    group: RankGroup, clock: RankClock, split: str = "dp2-ep2", ops: str = "none", folder: Path | None = None
) -> tuple[RankedStep, list[str]]:
    """(the result, the step's ops)."""
    given = deployed(split, "bf16")
    ranks = ManyRanks(group, given)
    step = build_rank_step(qwen(1), ranks, length=5, page_size=16)
    for name, both in OWN_S.items():
        COST_S[name] = both[group.rank]
    replace_run(step, logged(clock))
    ranks_measure.op_groups = lambda step: [group for group in op_groups(step) if group[0].name in TIMED]
    store = None if folder is None else RecordStore(folder, "h100.jsonl")
    made = measure_ranks(
        step, ranks, RankDevice(clock, group), H100, split, store=store, settings=FAST, op_settings=FAST,
        ops=ops,
    )  # fmt: skip
    return made, [op.name for op in step.ops]


def _sum_s(names: list[str], rank: int) -> float:
    def cost_s(name: str) -> float:
        return OWN_S[name][rank] if name in OWN_S else COST_S.get(name, 1e-3)

    return sum(map(cost_s, names)) + BETWEEN_S * (len(names) - 1)


def slowest_rank(group: RankGroup) -> bool:
    with tempfile.TemporaryDirectory() as name:
        made, ops = measured(group, RankClock(group.rank), ops="all", folder=Path(name))
        stored = list(RecordStore(Path(name), "h100.jsonl").records())
    whole_s = [_sum_s(ops, rank) for rank in range(2)]
    by_name = {op.name: op for op in made.ops}
    given = deployed("dp2-ep2", "bf16")
    planned = {call.name: call.op for call in decode_plan(qwen(1).config, H100, given, check_memory=False)}
    holds = {
        "whole": made.whole_s is not None and math.isclose(made.whole_s, max(whole_s), rel_tol=1e-9),
        "each rank": all(math.isclose(*pair, rel_tol=1e-9) for pair in zip(made.rank_s, whole_s, strict=True)),
        "order": whole_s[0] > whole_s[1],
        "rate": math.isclose(made.tokens_per_s_per_gpu or 0, 2 / max(whole_s)),
        "gpus": made.gpus == ("GPU-0", "GPU-1"),
        "slowest of each op": all(
            math.isclose(by_name[name].time_s or 0, max(both), rel_tol=1e-9) for name, both in OWN_S.items()
        ),
        "communication": [op.name for op in made.ops if op.is_communication] == ["dispatch", "combine"],
        "its sum": math.isclose(made.communication_s or 0, 4e-3 + 2e-3),
        "its floors": all(by_name[name].floor_s == planned[name].floor_s(H100) for name in ("dispatch", "combine")),
        "overlap": OVERLAP in made.omitted and not any(each.startswith("communication") for each in made.omitted),
        "ops": [op.name for op in made.ops] == ["qkv_proj", "dispatch", "experts", "combine"],
        "their sum": math.isclose(made.sum_s or 0, sum(max(both) for both in OWN_S.values())),
        "names": [record.point.op for record in made.records] == ["ranks_step", "dispatch", "combine"],
        "valid": all(record.invalid == () for record in made.records),
        "shape": made.records[1].point.shape == {"num_tokens": 2, "hidden": 128, "top_k": 2, "num_experts": 4, "ep": 2},
        "payload": made.records[1].point.formats == {"payload": "bf16"},
        "backend": made.records[0].point.tile["backend"] == "gloo" and made.records[0].point.shape["ranks"] == 2,
        "parallel": made.records[0].point.tile["parallel"] == "dp2-ep2",
        "written once": [record.point for record in stored]
        == ([record.point for record in made.records] if group.rank == 0 else []),
        "padding": made.padding == 2.0,
    }
    blocks = [block.time_s for block in made.records[0].measurement.blocks]
    holds["blocks"] = math.isclose(median(blocks), max(whole_s), rel_tol=1e-9)
    if not all(holds.values()):
        print(group.rank, [name for name, each in holds.items() if not each], made, flush=True)
    return all(holds.values())


def wrong(group: RankGroup) -> bool:
    """Rank 1 alone, at its third look: no rank has a time, and none waits."""
    looks = 2.0 if group.rank else math.inf
    made, _ = measured(group, RankClock(group.rank, wrong_after=looks))
    return made.whole_s is None and made.rank_s == () and made.records[0].invalid != ()


def throttled_sums(group: RankGroup) -> bool:
    """Rank 1's clocks alone are held down, and both say so."""
    clock = RankClock(group.rank, bits=0x40 if group.rank else 0)
    made, _ = measured(group, clock, split="tp2", ops="communication")
    found = [op.name for op in made.ops if op.is_communication]
    points = {record.point.op: record.point.shape for record in made.records}
    return (
        found == ["attention_all_reduce", "experts_all_reduce", "logits_all_gather"]
        and points["attention_all_reduce"] == {"num_elements": 4 * 128, "num_gpus": 2}
        and points["logits_all_gather"] == {"num_elements": 4 * 64, "num_gpus": 2}
        and made.padding is None
        and all(record.invalid == () for record in made.records)
        and all(record.flags.count("throttled") == 1 for record in made.records)
        and made.whole_s is not None
        and made.sum_s is None  # of communication alone there is no sum of a step
        and made.communication_s is not None
    )


def throttled_by_any(group: RankGroup) -> bool:
    """Each rank's clocks are held down by another cause: both are said on both."""
    clock = RankClock(group.rank, bits=1 << group.rank)
    return RankDevice(clock, group).state().throttle_bits == 0b11


def _refuses(group: RankGroup, clock: RankClock, message: str) -> bool:
    try:
        check_alike(group, clock.properties)
    except ValueError as error:
        return str(error) == message
    return False


CASES: dict[str, Callable[[RankGroup], bool]] = {
    "a step and its ops on the slowest rank": slowest_rank,
    "a rank that is wrong": wrong,
    "a step of sums, one rank throttled": throttled_sums,
    "throttled by what holds any rank down": throttled_by_any,
    "two ranks on one GPU": lambda group: _refuses(
        group, RankClock(7), "GPU: expected one for each rank; got GPU-7 on 2 ranks"
    ),
    "GPUs of two kinds": lambda group: _refuses(
        group, RankClock(group.rank, name="AB"[group.rank]), "GPU: expected one kind on all ranks; got A, B"
    ),
}
