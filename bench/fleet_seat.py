"""The worker that holds one GPU: it looks which GPU it is on, runs the anchors, then measures what it is asked for.

A ``Seat`` is made on a node with the driver's ``SeatSpec`` and does one thing at a time. Records go back as the
compressed line that they are kept as, made in this process: its name, its GPU and its software are in them. It keeps
no file. What a point cannot do is ``NotMeasured``; what may have cost the process its device is ``NotMeasured`` too,
and spoils it, so that the driver takes another.

Errors: ``FleetError`` where this is not the GPU, or not the code, that the sweep is of.
"""

from __future__ import annotations

import os
import platform
import tempfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kernels.registry import KERNELS, Kernel
from .campaign import measure_target, point_of
from .device import Device, DeviceError, DeviceProperties, MethodUnavailable
from .fleet import AnchorTime, FleetError, GpuReport, check_same, fingerprint
from .gpus import DEVICE_NAMES, get_gpu
from .measurement import Settings
from .peers import ANCHORS, COPY, PEERS, absence
from .record import Record, decode, encode
from .records import RecordStore
from .targets import Target

if TYPE_CHECKING:
    from .case import Anchor
    from .tune_space import Place

ANCHOR_SETTINGS = Settings(max_warm_up_s=2.0, budget_s=2.0, energy_s=None)
"""Until the median is known to 0.25 %, or for two seconds."""

_DOES_NOT_FIT = ("OutOfMemoryError", "OutOfResources")
"""torch's and Triton's, by name."""

_KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (*KERNELS, *PEERS, COPY)}


def cuda() -> tuple[Device, Any]:
    """The GPU that Ray gave to this process."""
    from .cuda_device import CudaDevice

    return CudaDevice(), "cuda"


@dataclass(frozen=True)
class Point:
    """A kernel at a shape, by name: a kernel itself does not travel."""

    kernel: str
    fields: tuple[tuple[str, int], ...]
    places: tuple[str, ...] = ()

    @classmethod
    def of(cls, target: Target) -> Point:
        """Raises ``FleetError`` for a kernel that is in no registry: its file may not be on the nodes."""
        if target.kernel.name not in _KERNELS:
            raise FleetError(f"kernel: expected one of the registry's on a cluster; got {target.kernel.name}")
        return cls(target.kernel.name, target.fields, target.places)

    @property
    def target(self) -> Target:
        return Target(_KERNELS[self.kernel], self.fields, self.places)


DEFAULT_ANCHORS = (
    Point(COPY.name, (("num_bytes", 1 << 28),)),
    Point(ANCHORS[0].name, (("m", 4096), ("n", 4096), ("k", 4096))),
)
"""Bandwidth, and cuBLAS in BF16: what is slow in memory, clocks or power shows in one of the two."""


@dataclass(frozen=True)
class SeatSpec:
    """What the driver tells every worker.

    Attributes:
        gpu: a row of ``gpus``. fingerprint: of the driver's sources.
        device: "module:function" that gives the device and where torch puts buffers.
        tuned: text of a table of tuned tiles; None for the package's.
    """

    gpu: str
    fingerprint: str
    device: str = f"{__name__}:cuda"
    anchors: tuple[Point, ...] = DEFAULT_ANCHORS
    anchor_settings: Settings = ANCHOR_SETTINGS
    tuned: str | None = None
    is_named: bool = False
    """Whether the user said which GPU it is: then a name that the driver does not know may be it."""


@dataclass(frozen=True)
class Hello:
    """A worker's first words. ``records``: of its anchors, packed."""

    report: GpuReport
    properties: DeviceProperties | None
    records: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class NotMeasured:
    """Why a point has no record. ``is_spoiled``: the process must not be used again."""

    reason: str
    is_spoiled: bool = False


@dataclass(frozen=True)
class StepWork:
    """A whole decode step of a model in its checkpoint's precision."""

    model: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch} x {self.length}"


@dataclass(frozen=True)
class Stepped:
    """What ``lab.measure_steps`` left: records, packed; lines of its results; and what it told."""

    records: tuple[bytes, ...]
    lines: tuple[bytes, ...]
    told: tuple[str, ...]


def pack(record: Record) -> bytes:
    return zlib.compress(encode(record))


def unpack(packed: bytes) -> Record:
    return decode(zlib.decompress(packed).rstrip(b"\n"), "a worker's record")


class Seat:
    """One process on one GPU."""

    def __init__(self, spec: SeatSpec) -> None:
        self._spec, self._row = spec, get_gpu(spec.gpu)
        self._device: Device | None = None
        self._buffers_on: Any = None
        self._open = ExitStack()
        self._tuning: dict[Point, Anchor] = {}

    def node(self) -> str:
        return f"{platform.node()} ({os.getpid()})"

    # -- who is there ------------------------------------------------------------------------------

    def hello(self) -> Hello:
        """Opens the device and runs the anchors. A GPU that cannot be used says why in its report."""
        spec, node = self._spec, platform.node()
        check_same("tokenfab's sources", spec.fingerprint, fingerprint(), node)
        module, _, name = spec.device.partition(":")
        try:
            device, self._buffers_on = getattr(import_module(module), name)()
        except DeviceError as error:
            return Hello(GpuReport(f"no GPU in process {os.getpid()}", node, (), f"device: {error}"), None)
        self._device, properties = device, device.properties
        known = DEVICE_NAMES.get(properties.name, spec.gpu if spec.is_named else None)
        if known != spec.gpu:
            problem = f"model: expected {spec.gpu}; this is {properties.name!r}"
            return Hello(GpuReport(properties.uuid, node, (), problem), properties)
        self._use_tuned(properties)
        anchors, records, problem = [], [], ""
        for point in spec.anchors:
            made = self._attempt(lambda point=point: self._anchor(point))
            if isinstance(made, NotMeasured) or made.time_s is None:
                why = made.reason if isinstance(made, NotMeasured) else made.invalid[0]
                problem = problem or f"anchor {point.kernel}: {why}"
                continue
            assert made.interval_s is not None
            anchors.append(AnchorTime(point.kernel, made.time_s, made.interval_s.low, made.interval_s.high))
            records.append(pack(made))
        return Hello(GpuReport(properties.uuid, node, tuple(anchors), problem), properties, tuple(records))

    def _use_tuned(self, properties: DeviceProperties) -> None:
        from .tune_table import tuned_here

        with tempfile.TemporaryDirectory() as folder:
            path = None
            if self._spec.tuned is not None:
                path = Path(folder, "tuned.json")
                path.write_text(self._spec.tuned)
            self._open.enter_context(tuned_here(self._row, properties, path))

    def _anchor(self, point: Point) -> Record:
        return measure_target(
            point.target, self.device, self._row, settings=self._spec.anchor_settings, has_anchor=False,
            buffers_on=self._buffers_on,
        )  # fmt: skip

    @property
    def device(self) -> Device:
        if self._device is None:
            raise FleetError("seat: expected hello before anything else")
        return self._device

    # -- points ------------------------------------------------------------------------------------

    def keys(self, points: list[Point]) -> list[str | NotMeasured]:
        """The key that each point's record will have here."""
        return [self._attempt(lambda point=point: self._key(point)) for point in points]

    def _key(self, point: Point) -> str | NotMeasured:
        target = point.target
        reason = absence(target.kernel)
        if reason:
            return NotMeasured(reason)
        tile = target.kernel.load().tile(target.shape, self._buffers_on)
        return point_of(target, self._row, self.device.properties, tile).key

    def measure(self, point: Point, settings: Settings) -> bytes | NotMeasured:
        """A record, packed, as ``campaign.run_targets`` would have appended it."""
        made = self._attempt(
            lambda: measure_target(point.target, self.device, self._row, settings=settings, buffers_on=self._buffers_on)
        )
        return made if isinstance(made, NotMeasured) else pack(made)

    def measure_tile(self, point: Point, place: Place, tile: Any, key: Any, settings: Settings) -> bytes | NotMeasured:
        """A record, packed, of a kernel under one tile beside its default, as ``tune.run_search`` would have made it.

        ``key``: the record's point.
        """
        made = self._attempt(lambda: self._tile(point, place, tile, key, settings))
        return made if isinstance(made, NotMeasured) else pack(made)

    def _tile(self, point: Point, place: Place, tile: Any, key: Any, settings: Settings) -> Record:
        from .record import environment
        from .tune import default_anchor, measure_tile
        from .tune_prune import Pruned

        pruned, properties = Pruned(point.target, place, (), ()), self.device.properties
        if point not in self._tuning:
            self._tuning = {point: default_anchor(pruned, properties.l2_bytes, self._buffers_on)}
        anchor = self._tuning[point]
        found = measure_tile(pruned, tile, self.device, self._row, anchor, settings, self._buffers_on)
        return Record.of(key, found, environment(properties))

    # -- the lab -----------------------------------------------------------------------------------

    def check(
        self, kernel: str, shape: Mapping[str, int], repeats: int
    ) -> tuple[str, tuple[str, ...] | NotMeasured]:  # fmt: skip
        """The version that is checked here, and what ``lab_checks.verify`` finds wrong with it."""
        from .lab_checks import verify

        found = self._attempt(
            lambda: verify(
                _KERNELS[kernel], dict(shape), self._row, self.device, repeats=repeats, buffers_on=self._buffers_on
            )
        )
        return self.versions([kernel])[0], found

    def versions(self, kernels: list[str]) -> list[str]:
        """As ``lab_checks.version_of``, of this GPU."""
        from .lab_checks import version_of

        return [version_of(_KERNELS[kernel], self.device.properties) for kernel in kernels]

    def step_version(self) -> list[str]:
        """The hash of a step's record, alone in a list."""
        from .step_measure import step_hash

        return [step_hash(self.device.properties)]

    def step(self, work: StepWork, seconds: float) -> Stepped | NotMeasured:
        """A whole decode step and its ops, as ``lab.measure_steps`` does one, within ``seconds``."""
        from .lab import Deadline, measure_steps

        def measured() -> Stepped:
            told: list[str] = []
            with tempfile.TemporaryDirectory() as folder:
                store, results = RecordStore(Path(folder), "step.jsonl"), Path(folder, "steps.ndjson")
                measure_steps(
                    [work.model], [work.batch], [work.length], self.device, self._row, store, Deadline(seconds),
                    results=results, buffers_on=self._buffers_on, tell=told.append,
                )  # fmt: skip
                lines = results.read_bytes().splitlines() if results.exists() else []
                return Stepped(tuple(pack(record) for record in store.records()), tuple(lines), tuple(told))

        return self._attempt(measured)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; ``NotMeasured`` for what stops only this point, or this process."""
        try:
            return work()
        except (MethodUnavailable, MemoryError) as error:
            return NotMeasured(str(error))
        except FleetError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is said of its point
            line = (str(error).splitlines() or [""])[0]
            fits = type(error).__name__ not in _DOES_NOT_FIT
            reason = f"raised: {type(error).__name__}: {line}" if fits else f"memory: {line}"
            return NotMeasured(reason, is_spoiled=fits)
