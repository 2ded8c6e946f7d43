"""Records to test with: a valid one, what an invalid one is made of, and ones told apart by a number."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from tokenfab.bench.measurement import Measurement, Settings
from tokenfab.bench.record import Environment, Point, Record, encode, source_hash
from tokenfab.bench.timing import measure
from tokenfab.tests.bench.fake_device import FakeDevice, make_case

POINT = Point(
    op="gemm",
    shape={"m": 16, "n": 7168, "k": 2048},
    formats={"weight": "nvfp4", "activation": "fp8"},
    recipe="even",
    l2_policy="cold_weights",
    kernel_hash=source_hash({"kernel": "y = x @ w.T"}),
    tile={"BLOCK_M": 16, "SPLIT_K": 4, "SWAP": True, "LAYOUT": "packed"},
    gpu="h100",
)
ENVIRONMENT = Environment(
    name="NVIDIA H100 80GB HBM3", uuid="GPU-1", l2_bytes=52428800, driver="580.1", cuda="13.0", torch="2.13.0",
    triton="3.9.0", git_sha="a" * 40, git_dirty=False,
)  # fmt: skip


def _measurement(**changes: Any) -> Measurement:
    device = FakeDevice(noise=0.0005)
    return measure(make_case(device, **changes), device, settings=Settings(energy_s=None))


MEASUREMENT = _measurement()
WRONG = _measurement(error=lambda *buffers: math.nan)
RECORD = Record.of(POINT, MEASUREMENT, ENVIRONMENT, recorded_unix_s=1.75e9)
LINE = encode(RECORD)


def numbered(number: int, process: str = "one") -> Record:
    """A record told apart from others by its shape."""
    point = msgspec.structs.replace(POINT, shape={"m": number})
    return msgspec.structs.replace(RECORD, point=point, process=process)
