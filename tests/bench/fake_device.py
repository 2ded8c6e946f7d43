"""A GPU that is not there: a virtual clock, an L2 that evicts, noise, drift, throttling, streams.

Buffers have a size that is only modelled and a few values that are computed with, so that a kernel can be
right or wrong. Time passes only when the device works. No test sleeps.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenfab.bench.case import Anchor, Case
from tokenfab.bench.device import DeviceProperties, DeviceState, Replay
from tokenfab.bench.measurement import Measurement, Settings
from tokenfab.bench.timing import measure

MIB = 1 << 20
BANDWIDTH = 3e12
L2_SPEED_UP = 4.0
LAUNCH_S = 1e-6
THROTTLED = 0x40
IDLE = 0x01
NAN = math.nan


class Buffer:
    """``num_bytes`` of which only ``values`` exist."""

    _next = 4096

    def __init__(self, num_bytes: int, values: Sequence[float], address: int | None = None) -> None:
        self.num_bytes, self.values = num_bytes, list(values)
        self.address = Buffer._next if address is None else address
        Buffer._next += num_bytes


@dataclass
class Launch:
    """One kernel on the fake device.

    ``reads``, ``writes``: buffers that go through L2. ``work_s``: time beside the memory's. ``pinned``: held
    in L2 by the kernel. ``off_stream``: not between the events. ``effect``: what it does to values.
    """

    reads: Sequence[Buffer]
    writes: Sequence[Buffer]
    effect: Callable[[], None]
    work_s: float = LAUNCH_S
    pinned: bool = False
    off_stream: bool = False


class _Graph:
    def __init__(self, device: FakeDevice, launches: list[Launch]) -> None:
        self.device, self.launches = device, launches
        self.known: dict[tuple[Buffer, ...], tuple[float, float, OrderedDict[Buffer, None]]] = {}

    def launch(self) -> None:
        self.device.replay(self)

    def replay(self, in_flight: Callable[[], None] | None = None) -> Replay:
        lead_in_s, time_s = self.device.replay(self), self.device.replay(self)
        self.device.in_flight = True
        if in_flight is not None:
            in_flight()
        self.device.synchronize()
        return Replay(time_s, lead_in_s + time_s)


@dataclass
class FakeDevice:
    """Attributes are knobs, and below them what was seen.

    noise: sigma of the lognormal factor on a replay. outliers: share of replays that take 1.5 times as long.
    warming_s: time constant of a start-up that is 1 + ``warming`` too slow. drift: slowdown per second.
    throttled: whether the clock is held down (0.7 of itself) at a moment. scale: any further factor on time.
    """

    l2_bytes: int = 50 * MIB
    seed: int = 0
    noise: float = 0.004
    outliers: float = 0.01
    warming: float = 0.0
    warming_s: float = 0.3
    drift: float = 0.0
    throttled: Callable[[float], bool] = lambda now_s: False
    scale: Callable[[FakeDevice], float] = lambda device: 1.0
    graph_scale: Callable[[int], float] = lambda index: 1.0
    wake_up_s: float = 30e-6
    wall_rate: float = 1.0
    power_w: float = 500.0
    has_energy: bool = True
    now_s: float = 0.0
    lag_s: float = 0.0
    drawn_j: float = 0.0
    num_captures: int = 0
    num_launches: int = 0
    in_flight: bool = False
    log: list[str] = field(default_factory=list)
    hits: int = 0
    misses: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.l2: OrderedDict[Buffer, None] = OrderedDict()
        self.capturing: list[Launch] | None = None
        self.graphs: list[_Graph] = []

    @property
    def properties(self) -> DeviceProperties:
        return DeviceProperties(
            name="fake", uuid="GPU-fake", l2_bytes=self.l2_bytes, driver="0", cuda="0", torch="0", triton="0"
        )

    # -- work --------------------------------------------------------------------------------------

    def enqueue(self, launch: Launch) -> None:
        self.num_launches += 1
        if self.capturing is not None:
            self.capturing.append(launch)
            return
        launch.effect()
        self._pass(self._busy_s([launch])[0])

    def capture(self, calls: Sequence[Callable[[], None]]) -> _Graph:
        self.capturing, self.num_captures = [], self.num_captures + 1
        for call in calls:
            call()
        graph = _Graph(self, self.capturing)
        self.capturing = None
        self.graphs.append(graph)
        return graph

    def replay(self, graph: _Graph) -> float:
        before = tuple(self.l2)
        if before not in graph.known:
            busy_s, off_s = self._busy_s(graph.launches)
            graph.known[before] = busy_s, off_s, self.l2.copy()
        busy_s, off_s, after = graph.known[before]
        self.l2 = after.copy()
        for launch in graph.launches:
            launch.effect()
        factor = math.exp(self.noise * self.random.standard_normal())
        factor *= 1.5 if self.random.random() < self.outliers else 1.0
        factor *= 1 + self.warming * math.exp(-self.now_s / self.warming_s) + self.drift * self.now_s
        factor *= self.scale(self) * self.graph_scale(self.graphs.index(graph))
        factor /= 0.7 if self.throttled(self.now_s) else 1.0
        time_s = (busy_s + LAUNCH_S) * factor
        self.lag_s += off_s
        self._pass(time_s)
        return time_s

    def _pass(self, time_s: float) -> None:
        self.now_s += time_s
        self.drawn_j += self.power_w * time_s

    def _busy_s(self, launches: Sequence[Launch]) -> tuple[float, float]:
        """Time on the stream and off it, going through L2 buffer by buffer: the least recently used goes first, and
        one as large as L2 or larger leaves nothing behind."""
        on_s = off_s = 0.0
        for launch in launches:
            time_s = launch.work_s
            for buffer in (*launch.reads, *launch.writes):
                hit = launch.pinned or buffer in self.l2
                self.hits, self.misses = self.hits + hit, self.misses + (not hit)
                time_s += buffer.num_bytes / BANDWIDTH / (L2_SPEED_UP if hit else 1.0)
                if not launch.pinned:
                    self._touch(buffer)
            on_s, off_s = (on_s, off_s + time_s) if launch.off_stream else (on_s + time_s, off_s)
        return on_s, off_s

    def _touch(self, buffer: Buffer) -> None:
        self.l2.pop(buffer, None)
        if buffer.num_bytes >= self.l2_bytes:
            self.l2.clear()
            return
        self.l2[buffer] = None
        held = sum(other.num_bytes for other in self.l2)
        while held > self.l2_bytes:
            held -= self.l2.popitem(last=False)[0].num_bytes

    # -- the rest of a device ----------------------------------------------------------------------

    def synchronize(self) -> None:
        self._pass(self.lag_s)
        self.lag_s = 0.0
        self.in_flight = False
        self.now_s += self.wake_up_s

    def wall_s(self) -> float:
        return self.now_s * self.wall_rate

    def state(self) -> DeviceState:
        self.log.append("state")
        if not self.in_flight:
            return DeviceState(345e6, IDLE, 60.0, 100.0)
        hot = self.throttled(self.now_s)
        return DeviceState(1.3e9 if hot else 1.98e9, THROTTLED if hot else 0, 60.0, self.power_w)

    def energy_j(self) -> float:
        self.log.append("energy")
        return self.drawn_j if self.has_energy else 0.0

    def flush_l2(self) -> None:
        self.log.append("flush")
        self.l2.clear()

    def regions(self, buffers: Any) -> list[tuple[int, int]]:
        return [(buffer.address, buffer.num_bytes) for buffer in _buffers(buffers)]

    def poison(self, buffers: Any) -> None:
        for buffer in _buffers(buffers):
            buffer.values[:] = [NAN] * len(buffer.values)

    def all_finite(self, buffers: Any) -> bool:
        return all(map(math.isfinite, (value for buffer in _buffers(buffers) for value in buffer.values)))

    def all_zero(self, buffers: Any) -> bool:
        return not any(value for buffer in _buffers(buffers) for value in buffer.values)


def _buffers(buffers: Any) -> Iterator[Buffer]:
    if isinstance(buffers, tuple | list):
        for part in buffers:
            yield from _buffers(part)
    elif buffers is not None:
        yield buffers


WEIGHT_BYTES = 48_000_000
"""16 us at 3 TB/s, R = 7 with an L2 of 50 MiB."""
ACTIVATION_BYTES = 600_000
OUTPUT_BYTES = 600_000


def product(weights: Buffer, activations: Buffer) -> list[float]:
    """The fake kernel's y = x . sum(w)."""
    total = sum(weights.values)
    return [x * total for x in activations.values]


def honest(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    """A kernel that reads what it needs and writes the right values."""

    def effect() -> None:
        output.values[:] = product(weights, activations)

    device.enqueue(Launch([weights, activations], [output], effect))


def relative_error(weights: Buffer, activations: Buffer, output: Buffer) -> float:
    expected = product(weights, activations)
    return max(abs(got - want) / abs(want) for got, want in zip(output.values, expected, strict=True))


Kernel = Callable[[FakeDevice, Buffer, Buffer, Buffer], None]


def random_buffer(num_bytes: int, seed: int) -> Buffer:
    return Buffer(num_bytes, np.random.default_rng(seed).uniform(0.5, 1.5, 2).tolist())


def refresh(activations: Buffer, seed: int) -> None:
    activations.values[:] = random_buffer(0, seed).values


def make_case(device: FakeDevice, kernel: Kernel = honest, **changes: Any) -> Case:
    """The honest case, changed; its sizes by ``weight_bytes`` and ``activation_bytes`` (half of it output)."""
    weight_bytes = changes.get("weight_bytes", WEIGHT_BYTES)
    activation_bytes = changes.get("activation_bytes", ACTIVATION_BYTES + OUTPUT_BYTES)
    arguments: dict[str, Any] = {
        "launch": lambda weights, activations, output: kernel(device, weights, activations, output),
        "make_weights": lambda seed: random_buffer(weight_bytes, seed),
        "make_activations": lambda seed: random_buffer(activation_bytes - activation_bytes // 2, seed),
        "make_output": lambda: Buffer(activation_bytes // 2, [0.0, 0.0]),
        "refresh": refresh,
        "error": relative_error,
        "tolerance": 1e-6,
        "checksum": lambda buffer: tuple(buffer.values),
        "weight_bytes": weight_bytes,
        "activation_bytes": activation_bytes,
        "flops": 1e9,
        "compute_floor_s": 1e-6,
        "memory_bytes_per_s": BANDWIDTH,
    }
    return Case(**(arguments | changes))


NO_ENERGY = Settings(energy_s=None)


def run(kernel: Kernel = honest, device: FakeDevice | None = None, **arguments: Any) -> Measurement:
    """A measurement, without energy unless ``settings`` say so; what ``measure`` does not take changes the case."""
    device = device or FakeDevice()
    options = {name: arguments.pop(name) for name in ("l2_policy", "anchor", "settings", "seed") if name in arguments}
    return measure(make_case(device, kernel, **arguments), device, **{"settings": NO_ENERGY, **options})


def words(measurement: Measurement) -> list[str]:
    """The first word of each reason."""
    return [reason.split(":")[0] for reason in measurement.invalid]


def copy_anchor(device: FakeDevice, num_bytes: int = 30_000_000) -> Anchor:
    source, target = Buffer(num_bytes, [1.0]), Buffer(num_bytes, [1.0])
    return Anchor("copy", lambda: device.enqueue(Launch([source], [target], lambda: None)))
