"""Valid records of a given time, for tests of what reads them: one per point and process, nothing measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from tokenfab.bench.record import Record
from tokenfab.bench.summaries import kernel_hash
from tokenfab.kernels.registry import KERNELS
from tokenfab.tests.bench.made_records import ENVIRONMENT, MEASUREMENT, POINT

NUM_BLOCKS = 24
MAY, JUNE = 1.7775e9, 1.7805e9
"""29 April and 3 June 2026."""


@cache
def current_hash(op: str, formats: tuple[tuple[str, str], ...]) -> str:
    """Of the kernel as it is now."""
    return next(kernel_hash(k, ENVIRONMENT) for k in KERNELS if k.op == op and k.formats == dict(formats))


def recorded(
    op: str,
    formats: Mapping[str, str],
    shape: Mapping[str, int],
    time_s: float,
    process: str = "one",
    unix_s: float = JUNE,
    ratio: float | None = None,
    throttled: bool = False,
    environment: Mapping[str, Any] | None = None,
    **point: Any,
) -> Record:
    """``ratio``: to an anchor beside it. ``throttled``: in every block. Others change the point."""
    policy = point.pop("l2_policy", "cold_weights" if "weight" in formats else "hot")
    calls = 2 * (int(3e-3 / time_s) + 1)
    block = msgspec.structs.replace(
        MEASUREMENT.blocks[0], time_s=time_s, events_s=2 * calls * time_s, wall_s=2 * calls * time_s + 1e-5,
        anchor_s=None if ratio is None else time_s / ratio, throttle_bits=0x40 if throttled else 0,
    )  # fmt: skip
    measurement = msgspec.structs.replace(
        MEASUREMENT, l2_policy=policy, l2_bytes=1, num_sets=1 if policy == "hot" else 2, num_calls=calls,
        weight_bytes=1000, activation_bytes=100, flops=0.0, compute_floor_s=0.0,
        blocks=tuple(msgspec.structs.replace(block, graph=index % 2) for index in range(NUM_BLOCKS)),
        anchor=None if ratio is None else "cuBLAS",
    )  # fmt: skip
    facts: dict[str, Any] = {
        "op": op, "formats": dict(formats), "shape": dict(shape), "recipe": "tokenfab", "l2_policy": policy,
        "tile": {"block_m": 16}, "gpu": "h100",
    } | point  # fmt: skip
    if "kernel_hash" not in facts:
        facts["kernel_hash"] = current_hash(op, tuple(formats.items())) if facts["recipe"] == "tokenfab" else "f" * 64
    here = msgspec.structs.replace(ENVIRONMENT, **(environment or {}))
    record = Record.of(msgspec.structs.replace(POINT, **facts), measurement, here, recorded_unix_s=unix_s)
    return msgspec.structs.replace(record, process=process)


def invalid(record: Record) -> Record:
    """The same, found wrong after timing."""
    check = record.measurement.check
    assert check is not None
    measurement = msgspec.structs.replace(record.measurement, check=msgspec.structs.replace(check, after_error=9.0))
    made = Record.of(record.point, measurement, record.environment, recorded_unix_s=record.recorded_unix_s)
    return msgspec.structs.replace(made, process=record.process)
