"""Benching targets one after the other, each appended to the records at once; what is there already is not redone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..kernels.registry import Kernel
from .device import Device, DeviceProperties, MethodUnavailable
from .gpus import GPUS, Gpu, get_gpu
from .measurement import Settings
from .noise import MIN_PROCESSES, process_noise
from .record import Point, Record, environment, source_hash
from .records import RecordStore
from .targets import Target
from .timing import measure

DEVICE_NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA GeForce RTX 5090": "rtx_5090",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100_pcie",
    "NVIDIA H20": "h20",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx_pro_6000",
}
"""Names as the driver gives them, exactly."""


def gpu_of(properties: DeviceProperties, name: str | None = None) -> Gpu:
    """The row of ``gpus.py`` for a device, or the one called ``name``.

    Raises:
        ValueError: a device whose name is not known; it must be said which GPU it is.
    """
    if name is not None:
        return get_gpu(name)
    known = DEVICE_NAMES.get(properties.name)
    if known is None:
        raise ValueError(f"gpu: expected the name of one of {', '.join(GPUS)} for {properties.name!r}; got none")
    return get_gpu(known)


@dataclass(frozen=True)
class Outcome:
    """What came of a target: a record, or why there is none. ``is_old``: it was recorded before."""

    target: Target
    record: Record | None = None
    skipped: str = ""
    is_old: bool = False


def kernel_hash(kernel: Kernel, properties: DeviceProperties) -> str:
    """Names a version of the kernel: its sources; of a library's kernel the library's version as well."""
    sources: dict[str, str | bytes] = dict(kernel.source_texts())
    if kernel.library:
        sources["torch"] = properties.torch
    return source_hash(sources)


def point_of(target: Target, gpu: Gpu, properties: DeviceProperties, tile: dict[str, int]) -> Point:
    kernel = target.kernel
    return Point(
        op=kernel.op,
        shape=target.shape,
        formats=kernel.formats,
        recipe=kernel.library or "tokenfab",
        l2_policy=target.l2_policy,  # pyright: ignore[reportArgumentType]
        kernel_hash=kernel_hash(kernel, properties),
        tile=dict(tile),
        gpu=gpu.name,
    )


def run_targets(
    targets: Iterable[Target],
    device: Device,
    gpu: Gpu,
    store: RecordStore,
    *,
    processes: int = 1,
    settings: Settings | None = None,
    has_anchor: bool = True,
    buffers_on: Any = "cuda",
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Measures each target that has records of fewer than ``processes`` processes, and records it.

    What one target cannot do (a kernel too small to be timed out of L2, memory that does not suffice) is said in
    its outcome and stops no other.
    """
    from .cases import make_anchor, make_case

    outcomes = []
    here = environment(device.properties)
    for target in targets:
        tile = target.kernel.load().tile(target.shape, buffers_on)
        point = point_of(target, gpu, device.properties, tile)
        if store.done(point, processes):
            outcome = Outcome(target, is_old=True)
        else:
            try:
                case = make_case(target.kernel, target.shape, gpu, buffers_on)
                l2_bytes = device.properties.l2_bytes
                anchor = make_anchor(target.kernel, target.shape, l2_bytes, buffers_on) if has_anchor else None
                measured = measure(case, device, l2_policy=point.l2_policy, anchor=anchor, settings=settings)
                record = Record.of(point, measured, here)
                store.append(record)
                outcome = Outcome(target, record)
            except (MethodUnavailable, MemoryError) as error:
                outcome = Outcome(target, skipped=str(error))
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":  # torch's; this module does not import it
                    raise
                outcome = Outcome(target, skipped=f"memory: {str(error).splitlines()[0]}")
        outcomes.append(outcome)
        done(outcome)
    return outcomes


@dataclass(frozen=True)
class Summary:
    """One point over its processes. Times and rates are None where no measurement was valid."""

    point: Point
    num_processes: int
    time_s: float | None
    noise: float | None
    bytes_per_s: float | None
    flops_per_s: float | None
    roofline_fraction: float | None
    anchor: str | None
    anchor_ratio: float | None
    flags: tuple[str, ...]
    invalid: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        shown = {name: value for name, value in vars(self).items() if name != "point"}
        shape = {"op": self.point.op, **self.point.formats, "library": self.point.recipe, **self.point.shape}
        return {**shape, "gpu": self.point.gpu, "l2_policy": self.point.l2_policy, **shown}


def summaries(records: Iterable[Record]) -> list[Summary]:
    """One per point, in the order of their first records."""
    by_key: dict[str, list[Record]] = {}
    for record in records:
        by_key.setdefault(record.point.key, []).append(record)
    return [_summary(group) for group in by_key.values()]


def _summary(group: Sequence[Record]) -> Summary:
    valid = [record for record in group if record.time_s is not None]
    times = [record.time_s for record in valid if record.time_s is not None]
    ratios = [record.anchor_ratio for record in valid if record.anchor_ratio is not None]
    time_s, facts = median(times) if times else None, group[0].measurement
    return Summary(
        point=group[0].point,
        num_processes=len({record.process for record in valid}),
        time_s=time_s,
        noise=process_noise(times) if len(times) >= MIN_PROCESSES else None,
        bytes_per_s=facts.bytes / time_s if time_s else None,
        flops_per_s=facts.flops / time_s if time_s else None,
        roofline_fraction=facts.floor_s / time_s if time_s else None,
        anchor=facts.anchor,
        anchor_ratio=median(ratios) if ratios else None,
        flags=tuple(dict.fromkeys(flag for record in valid for flag in record.flags)),
        invalid=() if valid else group[-1].invalid,
    )
