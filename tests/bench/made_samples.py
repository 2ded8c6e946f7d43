"""Samples to compare: of one kernel in several processes."""

from __future__ import annotations

from typing import Any

import msgspec
from tokenfab.bench.noise import Interval
from tokenfab.bench.record import Point, source_hash
from tokenfab.bench.sample import Sample
from tokenfab.bench.sides import Side

POINT = Point(
    op="gemm", shape={"m": 64, "n": 7168, "k": 16384}, formats={"weight": "fp8_block", "activation": "fp8_group"},
    recipe="tokenfab", l2_policy="cold_weights", kernel_hash=source_hash({"kernel": "one"}), tile={"block_m": 64},
    gpu="h100",
)  # fmt: skip
OTHER_HASH = source_hash({"kernel": "two"})


def sample(time_s: float | None, process: str = "p", **changes: Any) -> Sample:
    """One process. Fields of the point (``m`` as well) change it, others the sample."""
    if "m" in changes:
        changes["shape"] = POINT.shape | {"m": changes.pop("m")}
    mine = {name: changes.pop(name) for name in list(changes) if name in Point.__struct_fields__}
    fields: dict[str, Any] = {
        "point": msgspec.structs.replace(POINT, **mine), "process": process, "recorded_unix_s": 1.0,
        "device": "NVIDIA H100 80GB HBM3", "uuid": "GPU-1", "driver": "580", "torch": "2.11.0", "triton": "3.6.0",
        "git_sha": "a" * 40, "time_s": time_s,
        "interval_s": None if time_s is None else Interval(0.9995 * time_s, 1.0005 * time_s),
        "invalid": () if time_s is not None else ("check: wrong",),
    }  # fmt: skip
    return Sample(**(fields | changes))


def processes(time_s: float, noise: float = 0.002, num: int = 3, **changes: Any) -> list[Sample]:
    """So many processes around a time, ``noise`` apart."""
    return [sample(time_s * (1 + (i - (num - 1) / 2) * noise), f"p{i}", **changes) for i in range(num)]


def anchored(time_s: float, anchor_s: float, **changes: Any) -> list[Sample]:
    """Beside an anchor."""
    return [
        msgspec.structs.replace(
            each, anchor="torch.matmul", ratio=(each.time_s or 0) / anchor_s,
            ratio_interval=Interval(0.9995 * time_s / anchor_s, 1.0005 * time_s / anchor_s),
        )
        for each in processes(time_s, **changes)
    ]  # fmt: skip


def side(*groups: list[Sample], **changes: Any) -> Side:
    return Side(changes.pop("label", "side"), tuple(each for group in groups for each in group), **changes)
