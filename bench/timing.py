"""Timing one kernel at one shape so that the number can be believed.

``measure`` does, in this order and by this one method: build R buffer sets and check the kernel on them;
capture a CUDA graph of K calls, K a multiple of R, twice; replay until the block median is flat; time
blocks, the two captures in turn, an anchor beside each, clocks read at each; run the energy loop; check
again what the timed graphs write, that the inputs are untouched, and that new inputs give new outputs.

No step has a fallback: what the device cannot do raises ``MethodUnavailable``. What the kernel got wrong is
a reason in ``Measurement.invalid``, and then there is no time.

Not seen from one process: the spread between processes. Measure in three or more and see
``noise.process_noise``.

Units: seconds, bytes, J. Source: FlashInfer #4468 and Triton #8384 (rotation), nvbench (blocks, throttling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from .case import Anchor, Case, Checker, make_sets
from .device import Device, DeviceState, Graph, MethodUnavailable
from .measurement import Block, Energy, L2Policy, Measurement, Settings, WarmUp, num_rotated_sets
from .noise import is_precise

_ENERGY_BATCH_S = 0.1
_MAX_CAPTURES = 4
_MARGIN = 1.1
_MIN_WINDOW = 5
_LOOK_GROWTH = 1.25
"""Kept blocks grow by this from one look at the interval to the next: each look is a chance to stop at one that is
narrow by luck, and looks at every block cost 1 % of coverage at 1 % noise in simulation."""


def measure(
    case: Case,
    device: Device,
    *,
    l2_policy: L2Policy = "cold_weights",
    anchor: Anchor | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> Measurement:
    """Times ``case`` on ``device``. The result may be invalid; then it says why and has no time.

    Raises:
        ValueError: the case contradicts itself (overlapping buffers, fewer bytes than it claims, zeros);
            ``l2_policy`` or ``seed`` is none.
        MethodUnavailable: the kernel cannot be captured, or needs more calls per replay than ``max_calls``.
    """
    settings = settings or Settings()
    if seed < 0:
        raise ValueError(f"seed: expected >= 0; got {seed}")
    l2_bytes = device.properties.l2_bytes
    num_sets = num_rotated_sets(l2_policy, l2_bytes, case.weight_bytes, case.activation_bytes)
    if num_sets > settings.max_calls:
        raise MethodUnavailable(
            f"l2_policy: {l2_policy} needs {num_sets} buffer sets, more than max_calls = {settings.max_calls}; "
            "a kernel this small cannot be timed out of L2"
        )
    checker = Checker(case, device, make_sets(case, device, l2_policy, num_sets, seed), seed)
    check, num_calls = checker.before(), num_sets
    warm_up: WarmUp | None = None
    blocks: list[Block] = []
    energy: Energy | None = None
    if check.passed_before:
        anchored = None if anchor is None else _capture(lambda n: [anchor.launch] * n, 1, 1, device, settings)
        graphs, num_calls, warm_up = _capture(checker.calls, num_sets, 2, device, settings)
        blocks = _time_blocks(graphs, num_calls, anchored, device, l2_policy, settings)
        if settings.energy_s is not None:
            energy = _measure_energy(graphs[0], num_calls, device, settings.energy_s)
        check = checker.after(check, graphs)
    return Measurement(
        l2_policy=l2_policy,
        num_sets=num_sets,
        num_calls=num_calls,
        weight_bytes=case.weight_bytes,
        activation_bytes=case.activation_bytes,
        flops=case.flops,
        memory_bytes_per_s=case.memory_bytes_per_s,
        compute_floor_s=case.compute_floor_s,
        l2_bytes=l2_bytes,
        check=check,
        warm_up=warm_up,
        blocks=tuple(blocks),
        energy=energy,
        anchor=None if anchor is None else anchor.name,
        seed=seed,
        settings=settings,
    )


class _Captured(NamedTuple):
    graphs: list[Graph]
    num_calls: int
    warm_up: WarmUp


def _replay_s(graph: Graph) -> float:
    time_s = median(graph.replay().time_s for _ in range(3))
    if not 0 < time_s < math.inf:
        raise MethodUnavailable(f"events: expected a positive time for a replay; got {time_s}")
    return time_s


def _capture(
    calls: Callable[[int], list[Callable[[], None]]], multiple: int, copies: int, device: Device, settings: Settings
) -> _Captured:
    """Graphs of so many calls, a multiple of ``multiple``, that a replay lasts ``replay_s``; all of them warm.

    The number is found anew while a warm device turns out to be faster than the last number was chosen for.
    """
    num_calls, time_s = multiple, _replay_s(device.capture(calls(multiple)))
    for _ in range(_MAX_CAPTURES - 1):
        captured = _capture_calls(calls, multiple, num_calls * settings.replay_s / time_s, copies, device, settings)
        num_calls, time_s = captured.num_calls, _replay_s(captured.graphs[0])
        if time_s >= settings.replay_s:
            return captured
    return _capture_calls(calls, multiple, num_calls * settings.replay_s / time_s, copies, device, settings)


def _capture_calls(
    calls: Callable[[int], list[Callable[[], None]]],
    multiple: int,
    needed: float,
    copies: int,
    device: Device,
    settings: Settings,
) -> _Captured:
    num_calls = multiple * math.ceil(_MARGIN * needed / multiple)
    if num_calls > settings.max_calls:
        raise MethodUnavailable(
            f"replay_s: {num_calls} calls are needed for a replay of {settings.replay_s:g} s, "
            f"more than max_calls = {settings.max_calls}"
        )
    graphs = [device.capture(calls(num_calls)) for _ in range(copies)]
    return _Captured(graphs, num_calls, _warm_up(graphs, device, settings))


def _warm_up(graphs: Sequence[Graph], device: Device, settings: Settings) -> WarmUp:
    """Replays in turn until the medians of two windows in succession agree, or time is up."""
    start_s = now_s = device.wall_s()
    num_blocks, last_s, is_flat = 0, math.inf, False
    while not is_flat and now_s - start_s < settings.max_warm_up_s:
        window_s: list[float] = []
        end_s = now_s + settings.min_warm_up_s / 2
        while now_s < end_s or len(window_s) < _MIN_WINDOW:
            window_s.append(graphs[len(window_s) % len(graphs)].replay().time_s)
            now_s = device.wall_s()
        num_blocks += len(window_s)
        middle_s = median(window_s)
        is_flat = abs(middle_s / last_s - 1) <= settings.warm_up_tolerance
        last_s = middle_s
    return WarmUp(duration_s=now_s - start_s, num_blocks=num_blocks, is_flat=is_flat)


def _time_blocks(
    graphs: Sequence[Graph],
    num_calls: int,
    anchor: _Captured | None,
    device: Device,
    l2_policy: str,
    settings: Settings,
) -> list[Block]:
    """Blocks until the interval is narrow enough or the budget is spent, but never fewer than ``min_blocks``.

    The captures alternate, and every two blocks so does whether the anchor comes first, so that a drift hits
    all of them alike.
    """
    blocks: list[Block] = []
    kept_s: list[float] = []
    num_discards, next_look, start_s = 0, 0.0, device.wall_s()
    while True:
        index = len(blocks)
        before = index // 2 % 2 == 0
        anchor_s = _anchor_s(anchor) if before else None
        if l2_policy != "hot":
            device.flush_l2()
            device.synchronize()
        states: list[DeviceState] = []
        at_s = device.wall_s()
        replay = graphs[index % 2].replay(lambda states=states: states.append(device.state()))
        device.synchronize()
        wall_s = device.wall_s() - at_s
        block = Block(
            graph=0 if index % 2 == 0 else 1,
            time_s=replay.time_s / num_calls,
            events_s=replay.total_s,
            wall_s=wall_s,
            anchor_s=anchor_s if before else _anchor_s(anchor),
            **states[0]._asdict(),
        )
        blocks.append(block)
        num_discards += block.is_throttled
        if not block.is_throttled:
            kept_s.append(block.time_s)
        if num_discards > settings.max_discards:
            kept_s = [block.time_s for block in blocks]
        if len(kept_s) < settings.min_blocks:
            continue
        if device.wall_s() - start_s >= settings.budget_s:
            return blocks
        if len(kept_s) >= next_look:
            if is_precise(kept_s, settings.max_ci):
                return blocks
            next_look = _LOOK_GROWTH * len(kept_s)


def _anchor_s(anchor: _Captured | None) -> float | None:
    return None if anchor is None else anchor.graphs[0].replay().time_s / anchor.num_calls


def _measure_energy(graph: Graph, num_calls: int, device: Device, energy_s: float) -> Energy:
    """Energy per call over a loop of replays alone, enqueued ahead of the GPU: no anchor, no pauses for NVML."""
    batch = max(1, math.ceil(_ENERGY_BATCH_S / _replay_s(graph)))
    device.synchronize()
    start_s, start_j, replays = device.wall_s(), device.energy_j(), 0
    while (duration_s := device.wall_s() - start_s) < energy_s:
        for _ in range(batch):
            graph.launch()
        device.synchronize()
        replays += batch
    drawn_j = device.energy_j() - start_j
    if not 0 < drawn_j < math.inf:
        raise MethodUnavailable(f"energy_j: expected the counter to advance over {duration_s:.3g} s; got {drawn_j} J")
    return Energy(energy_j=drawn_j / (replays * num_calls), duration_s=duration_s, num_calls=replays * num_calls)
