"""Measuring a baseline's points anew on this machine's GPU, for the gate: each pass a fresh process.

Errors: ``ValueError`` for a point whose kernel is not in the registry, ``NoGpu`` without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from ..kernels.registry import KERNELS, Kernel
from .campaign import Outcome, gpu_of, run_targets
from .device import Device
from .measurement import Settings
from .peers import COPY, PEERS
from .record import Point
from .records import RecordStore
from .sides import Side
from .targets import Target
from .user_kernel import load_user_kernel


def baseline_targets(baseline: Side, keys: Collection[str] | None = None, extra: Sequence[Kernel] = ()) -> list[Target]:
    """What to measure for a baseline: each of its points once, or those with these keys.

    ``extra``: kernels beside the registry's, for points of the reader's own.

    Raises:
        ValueError: a point whose op, formats and recipe no kernel has.
    """
    points = {sample.point.key: sample.point for sample in baseline.samples}
    wanted = [point for key, point in points.items() if keys is None or key in keys]
    found = {(_kernel(point, extra).name, tuple(point.shape.items())): point for point in wanted}
    return [Target(_kernel(point, extra), tuple(point.shape.items()), ("baseline",)) for point in found.values()]


def _kernel(point: Point, extra: Sequence[Kernel]) -> Kernel:
    for kernel in (*KERNELS, *PEERS, COPY, *extra):
        recipe = kernel.library or "tokenfab"
        if (kernel.op, kernel.formats, recipe) == (point.op, point.formats, point.recipe):
            return kernel
    formats = "-".join(point.formats.values())
    raise ValueError(f"baseline: expected a kernel for {point.op}/{formats}@{point.recipe}; the registry has none")


def user_kernels(baseline: Side, place: str) -> list[Kernel]:
    """The reader's own kernel at ``place``, "FILE.py:FUNCTION", for each op and format that a baseline has it in.

    Raises:
        ValueError: the baseline has no point of it; as ``load_user_kernel``, which executes the file.
    """
    recipe = f"user:{place.rpartition(':')[2]}"
    mine = {(each.point.op, tuple(each.point.formats.items())) for each in baseline.samples
            if each.point.recipe == recipe}  # fmt: skip
    if not mine:
        got = ", ".join(sorted({sample.point.recipe for sample in baseline.samples}))
        raise ValueError(f"kernel: expected points of {recipe} in {baseline.label}; got {got}")
    bases = [kernel for kernel in KERNELS if (kernel.op, tuple(kernel.formats.items())) in mine]
    return [load_user_kernel(place, base) for base in bases]


def measure_pass(
    targets: Iterable[Target], device: Device, folder: Path, number: int, gpu: str | None = None,
    settings: Settings | None = None, done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """One pass over the points in this process, appended to the folder's records of this GPU."""
    row = gpu_of(device.properties, gpu)
    store = RecordStore(folder, f"{row.name}.jsonl")
    return run_targets(targets, device, row, store, processes=number, settings=settings, done=done)
