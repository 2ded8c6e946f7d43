"""Benching targets one after the other, each appended to the records at once; what is there already is not redone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .device import Device, DeviceProperties, MethodUnavailable
from .gpus import DEVICE_NAMES, GPUS, Gpu, get_gpu
from .measurement import Settings
from .peers import absence
from .record import Point, Record, environment
from .records import RecordStore
from .summaries import kernel_hash
from .targets import Target
from .timing import measure


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


def measure_target(
    target: Target, device: Device, gpu: Gpu, *, settings: Settings | None = None, has_anchor: bool = True,
    buffers_on: Any = "cuda",
) -> Record:  # fmt: skip
    """Measures one target in this process, beside its anchor.

    Raises:
        MethodUnavailable: it cannot be timed so. What torch raises where memory does not suffice.
    """
    from .cases import make_anchor, make_case

    point = point_of(target, gpu, device.properties, target.kernel.load().tile(target.shape, buffers_on))
    case = make_case(target.kernel, target.shape, gpu, buffers_on)
    l2_bytes = device.properties.l2_bytes
    anchor = make_anchor(target.kernel, target.shape, l2_bytes, buffers_on) if has_anchor else None
    measured = measure(case, device, l2_policy=point.l2_policy, anchor=anchor, settings=settings)
    return Record.of(point, measured, environment(device.properties))


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
    outcomes = []
    for target in targets:
        outcome = _run_target(
            target, device, gpu, store, processes=processes, settings=settings, has_anchor=has_anchor,
            buffers_on=buffers_on,
        )  # fmt: skip
        outcomes.append(outcome)
        done(outcome)
    return outcomes


def _run_target(
    target: Target, device: Device, gpu: Gpu, store: RecordStore, *, processes: int, settings: Settings | None,
    has_anchor: bool, buffers_on: Any,
) -> Outcome:  # fmt: skip
    reason = absence(target.kernel)
    if reason:
        return Outcome(target, skipped=reason)
    try:
        tile = target.kernel.load().tile(target.shape, buffers_on)
        if store.done(point_of(target, gpu, device.properties, tile), processes):
            return Outcome(target, is_old=True)
        record = measure_target(target, device, gpu, settings=settings, has_anchor=has_anchor, buffers_on=buffers_on)
        store.append(record)
        return Outcome(target, record)
    except (MethodUnavailable, MemoryError) as error:
        return Outcome(target, skipped=str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; this module does not import it
            raise
        return Outcome(target, skipped=f"memory: {str(error).splitlines()[0]}")
