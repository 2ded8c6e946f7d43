"""Measuring a baseline's points anew on this machine's GPU, for the gate: each pass a fresh process.

Errors: ``ValueError`` for a point whose kernel is not in the registry, ``NoGpu`` without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from ..kernels.registry import KERNELS, Kernel
from .campaign import Outcome, gpu_of, run_targets
from .device import Device
from .measurement import Settings
from .peers import COPY, PEERS
from .record import Point
from .records import RecordStore
from .sides import Side, read_side
from .targets import Target


def baseline_targets(baseline: Side, keys: Collection[str] | None = None) -> list[Target]:
    """What to measure for a baseline: each of its points once, or those with these keys.

    Raises:
        ValueError: a point whose op, formats and recipe no kernel has.
    """
    points = {sample.point.key: sample.point for sample in baseline.samples}
    wanted = [point for key, point in points.items() if keys is None or key in keys]
    found = {(_kernel(point).name, tuple(point.shape.items())): point for point in wanted}
    return [Target(_kernel(point), tuple(point.shape.items()), ("baseline",)) for point in found.values()]


def _kernel(point: Point) -> Kernel:
    recipes = {"": "tokenfab"}
    for kernel in (*KERNELS, *PEERS, COPY):
        recipe = recipes.get(kernel.library, kernel.library)
        if (kernel.op, kernel.formats, recipe) == (point.op, point.formats, point.recipe):
            return kernel
    formats = "-".join(point.formats.values())
    raise ValueError(f"baseline: expected a kernel for {point.op}/{formats}@{point.recipe}; the registry has none")


def measure_pass(
    targets: Iterable[Target], device: Device, folder: Path, number: int, gpu: str | None = None,
    settings: Settings | None = None, done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """One pass over the points in this process, appended to the folder's records of this GPU."""
    row = gpu_of(device.properties, gpu)
    store = RecordStore(folder, f"{row.name}.jsonl")
    return run_targets(targets, device, row, store, processes=number, settings=settings, done=done)


def measured_side(folder: Path) -> Side:
    """What the passes recorded, as a side."""
    return read_side(str(folder))
