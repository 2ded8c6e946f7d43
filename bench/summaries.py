"""What records say of a point over its processes, and what names a version of a kernel. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..kernels.registry import Kernel
from .device import DeviceProperties
from .measurement import Settings
from .noise import MIN_PROCESSES, process_noise
from .peers import version_sources
from .record import Point, Record, source_hash

QUICK = Settings(max_warm_up_s=1.0, warm_up_tolerance=0.02, max_ci=0.02, budget_s=0.5, energy_s=None)
"""For the edit loop: a first look, from one process. Records with these settings say "quick", and lie apart."""

QUICK_FOLDER = "quick"
"""In that of the records, so that no other run takes a first look for a measurement."""


def kernel_hash(kernel: Kernel, properties: DeviceProperties) -> str:
    """Names a version of the kernel: its sources; of a library's kernel the library's version as well."""
    return source_hash({**kernel.source_texts(), **version_sources(kernel, properties.torch)})


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
    floor_s: float
    is_quick: bool = False

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
        floor_s=facts.floor_s,
        is_quick=any(record.measurement.settings == QUICK for record in group),
    )
