"""The device that the timing core drives: a clock, CUDA graphs, events, NVML.

The timing core takes its device as a parameter, so it can be driven by a virtual one. The real one is
``cuda_device.CudaDevice``; this module needs no torch.

Units: seconds, bytes, Hz, W, J; temperatures in degrees Celsius, as NVML gives them.

Errors: ``NoGpu`` without a GPU; ``MethodUnavailable`` where the GPU, its driver or the kernel cannot do
what the method needs. There is no second method to fall back to.

Source: CUDA runtime API (events resolve about 0.5 us), NVML API reference (clock event reasons, total
energy counter), nvbench (the timed work is enqueued behind other work, so that its launch is not timed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

THROTTLES = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""NVML clock event reasons under which a block is not the kernel's own speed. The other reasons are
idleness (0x01), chosen clocks (0x02, 0x10, 0x100) and the top of the boost range (0x200, 0x400)."""

THROTTLE_MASK = sum(THROTTLES)


class DeviceError(RuntimeError):
    """The device cannot do what was asked."""


class NoGpu(DeviceError):
    """There is no GPU to measure on."""


class MethodUnavailable(DeviceError):
    """The measuring method needs something that this GPU, driver or kernel does not offer."""


class DeviceProperties(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which GPU, and under what software. ``name`` is the driver's, ``l2_bytes`` the size of the L2 cache."""

    name: str
    uuid: str
    l2_bytes: int
    driver: str
    cuda: str
    torch: str
    triton: str


class DeviceState(NamedTuple):
    """One NVML reading. ``throttle_bits``: NVML's clock event reasons, all of them."""

    sm_clock_hz: float
    throttle_bits: int
    temperature_c: float
    power_w: float


class Replay(NamedTuple):
    """Event times of one block: of the timed replay, and of all that was enqueued for it."""

    time_s: float
    total_s: float


class Graph(Protocol):
    """Calls captured once, replayed at will."""

    def launch(self) -> None:
        """Enqueues one replay and returns without waiting."""
        ...

    def replay(self, in_flight: Callable[[], None] | None = None) -> Replay:
        """Enqueues a lead-in replay and a timed one between events, waits, and returns their times.

        The lead-in hides the launch of the timed replay behind running work, and leaves clocks and L2
        as a replay leaves them, whatever ran before (an anchor, a flush). ``in_flight`` is called while
        the device works: an idle GPU drops its clocks and its throttle bits.
        """
        ...


class Device(Protocol):
    """What the timing core needs of a GPU. Buffers are tensors, or tuples, lists or dicts of such, or None."""

    @property
    def properties(self) -> DeviceProperties: ...

    def capture(self, calls: Sequence[Callable[[], None]]) -> Graph:
        """A graph of these calls, in order. Raises ``MethodUnavailable`` where one cannot be captured."""
        ...

    def synchronize(self) -> None:
        """Waits for all work on all streams."""
        ...

    def wall_s(self) -> float:
        """A monotonic clock on the wall."""
        ...

    def state(self) -> DeviceState: ...

    def energy_j(self) -> float:
        """Energy the board has drawn since some moment in the past."""
        ...

    def flush_l2(self) -> None:
        """Evicts L2 by reading another buffer: writing one would leave dirty lines to be written back later."""
        ...

    def regions(self, buffers: Any) -> list[tuple[int, int]]:
        """(address, bytes) of each tensor."""
        ...

    def poison(self, buffers: Any) -> None:
        """Fills with 0xFF bytes: NaN in FP64, FP32, FP16, BF16, both FP8s and E8M0."""
        ...

    def all_finite(self, buffers: Any) -> bool:
        """Whether no value is NaN or infinite. Packed and integer tensors have none."""
        ...

    def all_zero(self, buffers: Any) -> bool:
        """Whether every byte is zero."""
        ...
