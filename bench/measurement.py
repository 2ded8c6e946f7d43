"""What was measured, and whether it may be believed.

A ``Measurement`` holds facts: blocks with their clocks, the check of the output, the floors. Its verdict
is derived from them each time it is asked for, so no file and no caller can leave a reason out:
``time_s`` of an invalid measurement raises ``InvalidMeasurement``, and one that has blocks but no check
cannot be constructed, nor one whose buffers do not rotate as its L2 policy says.

Math: time = median over blocks of (event time of a replay / calls in it); its interval is the
distribution-free one between two order statistics. Rotation: R = ceil(5 L2 / bytes) + 1 buffer sets, and
calls per replay a multiple of R; with fewer, a replay visits only a few sets and they stay in L2 (36 % too
fast in FlashInfer #4468; Triton's ``do_bench_cudagraph`` does not evict L2 at all, Triton #8384).

Units: seconds per call, bytes per call, Hz, W, J per call.

Source: FlashInfer #4468, Triton #8384, nvbench (noise is part of the result; throttled samples are
dropped); order-statistic interval: any textbook of nonparametric statistics (David and Nagaraja, 7.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Literal, get_args

import msgspec

from .device import THROTTLE_MASK
from .noise import MAX_A_A, Interval, a_a_difference, is_precise, median_interval

L2Policy = Literal["hot", "cold_weights", "cold_all"]
L2_POLICIES: tuple[str, ...] = get_args(L2Policy)
"""What is out of L2 when a call starts: nothing; weights and KV cache (what decoding sees); everything."""

WALL_SLACK, WALL_SLACK_S = 0.02, 200e-6
"""Wall time may exceed event time by launch and wake-up (about 0.05 ms) and clocks may differ. Beyond
that, work ran where the events do not see it."""

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]


class InvalidMeasurement(RuntimeError):
    """A time was asked of a measurement that has none; the message says why."""


class _Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    def _require(self, field: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{field}: expected {expected}; got {getattr(self, field)!r}")


class Settings(_Facts, frozen=True, kw_only=True):
    """How to measure.

    Attributes:
        replay_s, min_replay_s: a timed replay is made to last the first, and must last the second.
        min_warm_up_s, max_warm_up_s: warm-up ends when two windows of ``min_warm_up_s / 2`` have medians
            within ``warm_up_tolerance`` of each other, or at the maximum.
        min_blocks: blocks at least; then timing ends when the interval's ends are within ``max_ci`` of the
            median, or after ``budget_s`` on the wall.
        max_discards: throttled blocks that are dropped; with more of them none is dropped and the result
            says ``throttled``.
        energy_s: length of the energy loop; None to measure no energy.
        max_calls: calls in one graph at most.
    """

    replay_s: float = 4e-3
    min_replay_s: float = 2e-3
    min_warm_up_s: float = 0.5
    max_warm_up_s: float = 3.0
    warm_up_tolerance: float = 0.005
    min_blocks: int = 20
    max_ci: float = 0.0025
    budget_s: float = 10.0
    max_discards: int = 20
    energy_s: float | None = 2.0
    max_calls: int = 1 << 16

    def __post_init__(self) -> None:
        self._require("min_replay_s", ">= 0.002 (events resolve about 0.5 us)", 2e-3 <= self.min_replay_s < math.inf)
        self._require("replay_s", f">= min_replay_s = {self.min_replay_s}", self.min_replay_s <= self.replay_s < 1)
        self._require("min_warm_up_s", ">= 0.5", 0.5 <= self.min_warm_up_s < math.inf)
        self._require("max_warm_up_s", ">= min_warm_up_s", self.min_warm_up_s <= self.max_warm_up_s < math.inf)
        self._require("warm_up_tolerance", "in (0, 0.05]", 0 < self.warm_up_tolerance <= 0.05)
        self._require("min_blocks", ">= 20", self.min_blocks >= 20)
        self._require("max_ci", "in (0, 0.05]", 0 < self.max_ci <= 0.05)
        self._require("budget_s", "> 0 and finite", 0 < self.budget_s < math.inf)
        self._require("max_discards", "0 to 1000", 0 <= self.max_discards <= 1000)
        self._require("energy_s", ">= 1, or None", self.energy_s is None or 1 <= self.energy_s < math.inf)
        self._require("max_calls", ">= 1", self.max_calls >= 1)


class Block(_Facts, frozen=True, kw_only=True):
    """One sample. ``graph``: which of two captures of the same calls was replayed. ``events_s``: event time
    of all that ``wall_s`` covers. ``anchor_s``: the anchor's time per call beside it. NVML's reading follows."""

    graph: Literal[0, 1]
    time_s: Positive
    events_s: Positive
    wall_s: Positive
    anchor_s: Positive | None
    sm_clock_hz: NotNegative
    throttle_bits: Whole
    temperature_c: float
    power_w: NotNegative

    def __post_init__(self) -> None:
        for field in ("time_s", "events_s", "wall_s", "anchor_s"):
            value = getattr(self, field)
            self._require(field, "> 0 and finite", value is None or 0 < value < math.inf)

    @property
    def is_throttled(self) -> bool:
        return bool(self.throttle_bits & THROTTLE_MASK)


class Check(_Facts, frozen=True, kw_only=True):
    """The output against the reference. An error is None where it was not taken or is not finite.

    Attributes:
        before_error: worst over the calls checked before timing.
        after_error: worst over the timed graphs' own outputs, replayed after timing.
        refreshed_error: the same with new values in the inputs, which no stored output can match.
        problems: what failed, in words.
    """

    tolerance: NotNegative
    before_error: NotNegative | None
    after_error: NotNegative | None = None
    refreshed_error: NotNegative | None = None
    problems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._require("tolerance", "finite and >= 0", 0 <= self.tolerance < math.inf)

    @property
    def passed_before(self) -> bool:
        """Whether timing may begin."""
        return not self.problems and self.is_within(self.before_error)

    @property
    def passed(self) -> bool:
        return self.passed_before and self.is_within(self.after_error) and self.is_within(self.refreshed_error)

    def is_within(self, error: float | None) -> bool:
        """Whether an error was taken and is within the tolerance."""
        return error is not None and 0 <= error <= self.tolerance


class WarmUp(_Facts, frozen=True, kw_only=True):
    """How long the kernel ran before the first block, and whether its time had become flat."""

    duration_s: NotNegative
    num_blocks: Whole
    is_flat: bool


class Energy(_Facts, frozen=True, kw_only=True):
    """Board energy per call (its idle share included), from a loop of its own that lasted ``duration_s``."""

    energy_j: Positive
    duration_s: Positive
    num_calls: Count

    @property
    def power_w(self) -> float:
        return self.energy_j * self.num_calls / self.duration_s


class Measurement(_Facts, frozen=True, kw_only=True):
    """One kernel at one shape, in one process.

    Attributes:
        num_sets, num_calls: buffer sets in the ring; calls in one replay.
        weight_bytes, activation_bytes: what one call must move at least: weights and KV cache;
            activations and output.
        flops: of one call. compute_floor_s: flops / matrix peak.
        memory_bytes_per_s: the GPU's peak bandwidth. l2_bytes: the size of its L2.
        check: None only where there are no blocks.
        anchor: name of the kernel interleaved with this one, None without.
        seed: of the data.
    """

    l2_policy: L2Policy
    num_sets: Count
    num_calls: Count
    weight_bytes: Whole
    activation_bytes: Whole
    flops: NotNegative
    memory_bytes_per_s: Positive
    compute_floor_s: NotNegative
    l2_bytes: Count
    check: Check | None
    warm_up: WarmUp | None
    blocks: tuple[Block, ...]
    energy: Energy | None
    anchor: str | None
    seed: Whole
    settings: Settings

    def __post_init__(self) -> None:
        needed = num_rotated_sets(self.l2_policy, self.l2_bytes, self.weight_bytes, self.activation_bytes)
        self._require("num_sets", f"{needed} under {self.l2_policy}", self.num_sets == needed)
        self._require("num_calls", f"a multiple of num_sets = {self.num_sets}", self.num_calls % self.num_sets == 0)
        for field in ("flops", "memory_bytes_per_s", "compute_floor_s"):
            self._require(field, "finite and not negative", 0 <= getattr(self, field) < math.inf)
        self._require("memory_bytes_per_s", "> 0", self.memory_bytes_per_s > 0)
        self._require("bytes", "> 0: a kernel that moves nothing has no floor", self.bytes > 0)
        if self.blocks and not isinstance(self.check, Check):
            raise ValueError(f"check: expected a Check beside {len(self.blocks)} timed blocks; got {self.check!r}")
        if self.blocks and self.check is not None and not self.check.is_within(self.check.before_error):
            got = self.check.before_error
            raise ValueError(f"before_error: expected <= {self.check.tolerance:g} beside timed blocks; got {got!r}")
        for block in self.blocks:
            if (block.anchor_s is None) != (self.anchor is None):
                raise ValueError(f"anchor_s: expected one per block exactly if anchor is named; got {block.anchor_s!r}")

    # -- floors ------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes

    @property
    def floor_s(self) -> float:
        """Roofline: max(all bytes / peak bandwidth, compute floor)."""
        return max(self.bytes / self.memory_bytes_per_s, self.compute_floor_s)

    @property
    def hard_floor_s(self) -> float:
        """What no kernel beats under this policy: as ``floor_s``, without the bytes that may stay in L2.

        ``hot``: all bytes, if they fit. ``cold_weights``: activations and output, if they fit.
        ``cold_all``: none.
        """
        resident = {"hot": self.bytes, "cold_weights": self.activation_bytes, "cold_all": 0}[self.l2_policy]
        moved = self.bytes - (resident if resident <= self.l2_bytes else 0)
        return max(moved / self.memory_bytes_per_s, self.compute_floor_s)

    # -- verdict -----------------------------------------------------------------------------------

    @property
    def is_throttled(self) -> bool:
        """Whether more blocks were throttled than may be dropped."""
        return sum(block.is_throttled for block in self.blocks) > self.settings.max_discards

    @property
    def kept(self) -> tuple[Block, ...]:
        """The blocks that count: the unthrottled ones, or all where too many were throttled."""
        return self.blocks if self.is_throttled else tuple(block for block in self.blocks if not block.is_throttled)

    @property
    def invalid(self) -> tuple[str, ...]:
        """Why there is no time, each reason as ``word: sentence``; empty for a valid measurement."""
        reasons = []
        if self.check is None:
            reasons.append("check: the output was not checked")
        elif not self.check.passed:
            failed = self.check.problems or (f"errors {self._errors()} against tolerance {self.check.tolerance:g}",)
            reasons += [f"check: {problem}" for problem in failed]
        kept = self.kept
        if len(kept) < self.settings.min_blocks:
            reasons.append(f"blocks: {len(kept)} where {self.settings.min_blocks} are needed")
        if kept:
            reasons += self._time_reasons(kept)
        return tuple(reasons)

    def _errors(self) -> str:
        check = self.check
        errors = () if check is None else (check.before_error, check.after_error, check.refreshed_error)
        return ", ".join("none" if error is None else f"{error:g}" for error in errors) + " (before, after, refreshed)"

    def _time_reasons(self, kept: Sequence[Block]) -> list[str]:
        reasons = []
        time_s = median(block.time_s for block in kept)
        if time_s < self.hard_floor_s:
            reasons.append(f"floor: {time_s:.4g} s beats the {self.l2_policy} floor of {self.hard_floor_s:.4g} s")
        if time_s * self.num_calls < self.settings.min_replay_s:
            reasons.append(f"replay: {time_s * self.num_calls:.4g} s is shorter than {self.settings.min_replay_s:g} s")
        events_s = median(block.events_s for block in kept)
        beyond_s = median(block.wall_s - block.events_s for block in kept)
        if not -WALL_SLACK * events_s <= beyond_s <= WALL_SLACK * events_s + WALL_SLACK_S:
            reasons.append(f"wall: {events_s + beyond_s:.4g} s on the wall, {events_s:.4g} s between the events")
        captures = [[block.time_s for block in kept if block.graph == graph] for graph in (0, 1)]
        difference = a_a_difference(*captures) if all(captures) else math.inf
        if not difference <= MAX_A_A:
            reasons.append(f"a_a: the same calls captured twice differ by {difference:.2%}, more than {MAX_A_A:.0%}")
        return reasons

    @property
    def flags(self) -> tuple[str, ...]:
        """What a reader must be told of a measurement that is valid all the same.

        ``throttled``: clocks were held down in too many blocks. ``imprecise``: the interval is wider than
        asked. ``not_flat``: warm-up ended at its time limit. ``l2_resident``: faster than the roofline of
        all bytes, possible because some stay in L2.
        """
        kept = self.kept
        flags = {"throttled": self.is_throttled, "not_flat": self.warm_up is not None and not self.warm_up.is_flat}
        if kept:
            times_s = [block.time_s for block in kept]
            flags["imprecise"] = not is_precise(times_s, self.settings.max_ci)
            flags["l2_resident"] = self.hard_floor_s <= median(times_s) < self.floor_s
        return tuple(name for name, holds in flags.items() if holds)

    # -- results -----------------------------------------------------------------------------------

    def _valid(self) -> tuple[Block, ...]:
        reasons = self.invalid
        if reasons:
            raise InvalidMeasurement("no time: " + "; ".join(reasons))
        return self.kept

    @property
    def time_s(self) -> float:
        """Median over the kept blocks. Raises ``InvalidMeasurement`` where there is a reason not to believe it."""
        return median(block.time_s for block in self._valid())

    @property
    def interval_s(self) -> Interval:
        """The 95 % interval of ``time_s`` within this process. Raises as ``time_s``."""
        return median_interval([block.time_s for block in self._valid()])

    @property
    def roofline_fraction(self) -> float:
        """floor_s / time_s. Raises as ``time_s``."""
        return self.floor_s / self.time_s

    def _ratios(self) -> list[float]:
        return [block.time_s / block.anchor_s for block in self._valid() if block.anchor_s is not None]

    @property
    def anchor_ratio(self) -> float | None:
        """Median over blocks of time / the anchor's time beside it, None without an anchor. Raises as ``time_s``.

        Clocks move both, so this moves less than either: on a power-capped GPU times moved by 34 %, ratios by 2.7 %.
        """
        ratios = self._ratios()
        return median(ratios) if ratios else None

    @property
    def anchor_ratio_interval(self) -> Interval | None:
        """The 95 % interval of ``anchor_ratio``. Raises as ``time_s``."""
        ratios = self._ratios()
        return median_interval(ratios) if ratios else None


def num_rotated_sets(l2_policy: str, l2_bytes: int, weight_bytes: int, activation_bytes: int) -> int:
    """R = ceil(5 L2 / rotated bytes) + 1; 1 under ``hot``.

    Raises:
        ValueError: an unknown policy, or one that would rotate nothing.
    """
    if l2_policy not in L2_POLICIES:
        raise ValueError(f"l2_policy: expected one of {', '.join(L2_POLICIES)}; got {l2_policy!r}")
    if l2_policy == "hot":
        return 1
    rotated_bytes = weight_bytes + (activation_bytes if l2_policy == "cold_all" else 0)
    if rotated_bytes <= 0:
        raise ValueError(f"l2_policy: expected hot or cold_all for a kernel without weights; got {l2_policy!r}")
    return -(-5 * l2_bytes // rotated_bytes) + 1
