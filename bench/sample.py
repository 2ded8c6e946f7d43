"""One measurement as comparisons and gates see it: a record without its blocks, the same from any kind of file.

Units: seconds per call. Errors: ``SampleError``, naming file and place, for what is no such measurement.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from .noise import Interval
from .record import Point, Record


class SampleError(ValueError):
    """A file of measurements that is not what it should be; names the file."""


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kernel at one shape in one process. A time and its interval are None exactly where it is ``invalid``.

    Attributes:
        name: the test that measured it; "" for a record.
        device, uuid, driver, torch, triton, git_sha: of the record's environment.
        anchor, ratio, ratio_interval: the kernel interleaved with this one, and the time relative to its.
    """

    name: str = ""
    point: Point
    process: str
    recorded_unix_s: float
    device: str
    uuid: str
    driver: str
    torch: str
    triton: str
    git_sha: str | None
    time_s: float | None
    interval_s: Interval | None
    anchor: str | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    flags: tuple[str, ...] = ()
    invalid: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("time_s", "ratio"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field}: expected a finite number > 0; got {value}")
        for field in ("interval_s", "ratio_interval"):
            each = getattr(self, field)
            if each is not None and not 0 < each.low <= each.high < math.inf:
                raise ValueError(f"{field}: expected 0 < low <= high; got {each.low} to {each.high}")
        if (self.time_s is None) != bool(self.invalid) or (self.time_s is None) != (self.interval_s is None):
            raise ValueError(f"time_s: expected one exactly if nothing is invalid; got {self.time_s!r}")

    @classmethod
    def of(cls, record: Record, name: str = "") -> Sample:
        """What a record says."""
        environment, measurement = record.environment, record.measurement
        return cls(
            name=name, point=record.point, process=record.process, recorded_unix_s=record.recorded_unix_s,
            device=environment.name, uuid=environment.uuid, driver=environment.driver, torch=environment.torch,
            triton=environment.triton, git_sha=environment.git_sha, time_s=record.time_s,
            interval_s=record.interval_s, anchor=measurement.anchor, ratio=record.anchor_ratio,
            ratio_interval=None if record.invalid else measurement.anchor_ratio_interval, flags=record.flags,
            invalid=record.invalid,
        )  # fmt: skip

    @classmethod
    def read(cls, fields: Any, where: str) -> Sample:
        """The sample that ``to_dict`` wrote.

        Raises:
            SampleError: beginning with ``where``.
        """
        try:
            return msgspec.convert(fields, cls)
        except (ValueError, TypeError) as error:
            raise SampleError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return msgspec.to_builtins(self)

    def facet(self, field: str) -> str:
        """One of ``FACETS`` as text."""
        own = {
            "op": self.point.op, "recipe": self.point.recipe, "gpu": self.point.gpu, "kernel": self.point.kernel_hash,
            "commit": self.git_sha or "", "weight": self.point.formats.get("weight", ""),
            "activation": self.point.formats.get("activation", ""),
        }  # fmt: skip
        return own[field] if field in own else str(getattr(self, field))


FACETS = ("op", "weight", "activation", "recipe", "gpu", "commit", "kernel", "driver", "torch", "triton", "uuid")
"""What samples may be selected by; ``commit`` and ``kernel`` by their beginning."""
