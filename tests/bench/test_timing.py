"""The timing core on a device with a virtual clock: rotation, warm-up, blocks, throttling, anchor, energy."""

from __future__ import annotations

import math
from functools import partial
from statistics import NormalDist, median
from typing import Any

import msgspec
import pytest
from tokenfab.bench.device import MethodUnavailable
from tokenfab.bench.measurement import Block, Measurement, Settings, num_rotated_sets
from tokenfab.bench.noise import a_a_difference
from tokenfab.bench.timing import measure
from tokenfab.tests.bench.fake_device import (
    BANDWIDTH,
    L2_SPEED_UP,
    LAUNCH_S,
    NAN,
    THROTTLED,
    WEIGHT_BYTES,
    Buffer,
    FakeDevice,
    Launch,
    copy_anchor,
    honest,
    make_case,
    random_buffer,
    run,
    words,
)

COLD_S = LAUNCH_S + WEIGHT_BYTES / BANDWIDTH
"""The honest kernel with cold weights; its activations and output add 0.1 us from L2."""


@pytest.fixture(scope="module")
def valid() -> Measurement:
    """A valid measurement with an anchor, to be altered with ``msgspec.structs.replace``."""
    device = FakeDevice()
    measurement = run(device=device, anchor=copy_anchor(device))
    assert measurement.invalid == ()
    return measurement


# -- L2 policies and rotation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "weights", "activations", "sets"),
    [
        ("hot", 1, 0, 1),
        ("cold_weights", 100, 0, 51),
        ("cold_weights", 100, 400, 51),
        ("cold_weights", 99, 0, 52),
        ("cold_weights", 101, 0, 51),
        ("cold_weights", 10_000, 0, 2),
        ("cold_all", 100, 0, 51),
        ("cold_all", 100, 400, 11),
        ("cold_all", 0, 500, 11),
    ],
)
def test_sets_in_the_ring(policy: str, weights: int, activations: int, sets: int) -> None:
    assert num_rotated_sets(policy, 1000, weights, activations) == sets


def test_nothing_to_rotate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^l2_policy: expected hot or cold_all"):
        num_rotated_sets("cold_weights", 1000, 0, 500)
    with pytest.raises(ValueError, match=r"^l2_policy: expected one of hot, cold_weights, cold_all; got 'cold'"):
        num_rotated_sets("cold", 1000, 1, 500)


def call_s(device: FakeDevice, num_sets: int, num_calls: int) -> float:
    """Per call, of a graph over a ring; the steady state of the fake L2."""
    rows = [random_buffer(WEIGHT_BYTES // 4, seed) for seed in range(num_sets)]
    activations, output = random_buffer(1000, 0), Buffer(1000, [0.0, 0.0])
    graph = device.capture(
        [lambda i=i: honest(device, rows[i % num_sets], activations, output) for i in range(num_calls)]
    )
    return median(graph.replay().time_s for _ in range(9)) / num_calls


def test_fake_l2_is_warm_where_calls_are_no_multiple_of_the_ring() -> None:
    # what the core must never do, and why: 24 sets of 12 MB are asked for, but a replay visits four
    device = FakeDevice(noise=0, outliers=0)
    num_sets = num_rotated_sets("cold_weights", device.l2_bytes, WEIGHT_BYTES // 4, 0)
    cold_s = call_s(device, num_sets, 4 * num_sets)
    assert cold_s == pytest.approx(LAUNCH_S + WEIGHT_BYTES / 4 / BANDWIDTH, rel=0.02)
    assert call_s(device, num_sets, 4) < 0.6 * cold_s
    # one call too many: the last call of a replay leaves in L2 what the next replay's first call reads
    assert call_s(device, num_sets, num_sets + 1) < 0.985 * cold_s


@pytest.mark.parametrize("policy", ["hot", "cold_weights", "cold_all"])
@pytest.mark.parametrize("weight_bytes", [2_000_000, 5_000_001, 52_428_800, 400_000_000])
def test_ring_really_rotates(policy: Any, weight_bytes: int) -> None:
    device, seen = FakeDevice(noise=0.001), []

    def noted(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        seen.append((weights, activations, output))
        honest(device, weights, activations, output)

    measurement = run(noted, device, l2_policy=policy, weight_bytes=weight_bytes)
    assert measurement.invalid == ()
    assert measurement.num_calls % measurement.num_sets == 0
    # the last capture is one of the two that are timed
    timed = seen[-measurement.num_calls :]
    weights, activations, outputs = (len(set(column)) for column in zip(*timed, strict=True))
    assert weights == measurement.num_sets
    assert activations == outputs == (measurement.num_sets if policy == "cold_all" else 1)
    assert timed[measurement.num_sets :] == timed[: -measurement.num_sets]
    device.hits = device.misses = 0
    for _ in range(2):
        device._busy_s(device.graphs[-1].launches)
    hits_per_call = device.hits / (2 * measurement.num_calls)
    resident = {"hot": 3, "cold_weights": 2, "cold_all": 0}[policy] if weight_bytes < device.l2_bytes else 0
    # but for a first round after the flush, all that does not rotate is in L2 and nothing that rotates
    assert hits_per_call == pytest.approx(resident, abs=0.1 if resident else 0)


def test_kernel_without_weights() -> None:
    def doubled(device: FakeDevice, weights: None, activations: Buffer, output: Buffer) -> None:
        def effect() -> None:
            output.values[:] = [2 * x for x in activations.values]

        device.enqueue(Launch([activations], [output], effect))

    def error(weights: None, activations: Buffer, output: Buffer) -> float:
        return max(abs(got - 2 * x) for got, x in zip(output.values, activations.values, strict=True))

    changes: dict[str, Any] = {
        "make_weights": lambda seed: None,
        "error": error,
        "weight_bytes": 0,
        "activation_bytes": 20_000_000,
    }
    device = FakeDevice()
    measurement = measure(make_case(device, **changes, launch=partial(doubled, device)), device, l2_policy="cold_all")
    assert measurement.num_sets == 15
    assert measurement.time_s == pytest.approx(LAUNCH_S + 20e6 / BANDWIDTH, rel=0.03)


def test_time_is_that_of_the_policy() -> None:
    cold, hot = run(), run(l2_policy="hot")
    assert cold.time_s == pytest.approx(COLD_S, rel=0.02)
    assert hot.time_s == pytest.approx(LAUNCH_S + WEIGHT_BYTES / BANDWIDTH / L2_SPEED_UP, rel=0.03)
    assert cold.roofline_fraction == pytest.approx(cold.floor_s / cold.time_s)
    assert 0.9 < cold.roofline_fraction < 1


def test_l2_is_flushed_before_cold_blocks_only() -> None:
    cold, hot = FakeDevice(), FakeDevice()
    assert cold.log.count("flush") == 0
    measurement = run(device=cold)
    assert cold.log.count("flush") == len(measurement.blocks)
    run(device=hot, l2_policy="hot")
    assert "flush" not in hot.log


def test_hot_stays_hot_beside_an_anchor_that_evicts_it() -> None:
    device = FakeDevice()
    with_anchor = run(device=device, l2_policy="hot", anchor=copy_anchor(device, 60_000_000))
    assert with_anchor.time_s == pytest.approx(run(l2_policy="hot").time_s, rel=0.01)


def test_kernel_too_small_to_be_cold_is_refused() -> None:
    with pytest.raises(MethodUnavailable, match=r"^l2_policy: cold_weights needs 262145 buffer sets, more than"):
        run(weight_bytes=1000)
    with pytest.raises(MethodUnavailable, match=r"^replay_s: \d+ calls are needed"):
        run(weight_bytes=1_000_000, l2_policy="hot", settings=Settings(energy_s=None, max_calls=1000))


@pytest.mark.parametrize(("field", "value"), [("num_sets", 6), ("num_sets", 8), ("num_calls", 260), ("num_calls", 6)])
def test_warm_ring_cannot_be_recorded(valid: Measurement, field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected .*; got {value}$"):
        msgspec.structs.replace(valid, **{field: value})


def test_buffers_that_share_memory_are_refused() -> None:
    shared = random_buffer(WEIGHT_BYTES, 0)
    with pytest.raises(ValueError, match=r"^make_\*: expected buffers of their own"):
        run(make_weights=lambda seed: shared)
    with pytest.raises(ValueError, match=r"^make_\*: expected buffers of their own"):
        run(make_weights=lambda seed: Buffer(WEIGHT_BYTES, [1.0], address=1 << 50 | seed * (WEIGHT_BYTES - 1)))
    inside = random_buffer(2 * WEIGHT_BYTES, 0)
    with pytest.raises(ValueError, match=r"^make_\*: expected buffers of their own"):
        run(
            l2_policy="hot",
            make_weights=lambda seed: inside,
            make_output=lambda: Buffer(600_000, [0.0, 0.0], address=inside.address + WEIGHT_BYTES),
        )


def test_buffers_smaller_than_claimed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^weights: expected .* 48000000 bytes claimed; got 47999999"):
        run(make_weights=lambda seed: random_buffer(WEIGHT_BYTES - 1, seed))
    with pytest.raises(ValueError, match=r"^activations and output: expected .*; got 600010"):
        run(make_output=lambda: Buffer(10, [0.0, 0.0]))


@pytest.mark.parametrize("name", ["make_weights", "make_activations"])
def test_zeros_are_refused(name: str) -> None:
    changes: dict[str, Any] = {name: lambda seed: Buffer(WEIGHT_BYTES, [0.0, 0.0])}
    with pytest.raises(ValueError, match=rf"^{name}: expected realistic data; got zeros"):
        run(**changes)


def test_every_set_and_every_seed_has_its_own_data() -> None:
    made: list[list[int]] = []
    for seed in (0, 1):
        made.append([])
        run(seed=seed, make_weights=lambda s: (made[-1].append(s), random_buffer(WEIGHT_BYTES, s))[1])
    assert len(set(made[0]) | set(made[1])) == 14
    with pytest.raises(ValueError, match=r"^seed: expected >= 0; got -1"):
        run(seed=-1)


# -- warm-up, blocks, throttling ---------------------------------------------------------------------


def test_warm_up_goes_on_until_the_time_is_flat() -> None:
    quick, slow = run(), run(device=FakeDevice(warming=0.3, warming_s=0.8))
    assert quick.warm_up is not None
    assert slow.warm_up is not None
    assert quick.warm_up.is_flat
    assert 0.5 <= quick.warm_up.duration_s < 0.6
    first = median(block.time_s for block in slow.blocks[:10])
    last = median(block.time_s for block in slow.blocks[-10:])
    assert first == pytest.approx(last, rel=0.02)
    assert slow.time_s == pytest.approx(COLD_S, rel=0.03)


def test_warm_up_uses_the_kernel_until_its_time_limit() -> None:
    device = FakeDevice(drift=0.2)
    measurement = run(device=device, settings=Settings(energy_s=None, budget_s=0.1))
    assert measurement.warm_up is not None
    assert not measurement.warm_up.is_flat
    assert 3.0 <= measurement.warm_up.duration_s < 3.5
    assert measurement.warm_up.num_blocks > 100
    assert "not_flat" in measurement.flags
    assert measurement.invalid == ()


def test_replays_last_long_enough() -> None:
    for weight_bytes in (3_000_000, 48_000_000, 12_000_000_000):
        measurement = run(weight_bytes=weight_bytes)
        assert median(block.time_s for block in measurement.blocks) * measurement.num_calls >= 3.9e-3


def test_clocks_that_rise_while_measuring_leave_replays_long_enough() -> None:
    # 5 times slower when cold: the number of calls is chosen on a warm device
    measurement = run(device=FakeDevice(warming=4.0, warming_s=0.1))
    assert measurement.invalid == ()
    assert measurement.time_s * measurement.num_calls >= 3.5e-3


def test_a_replay_too_short_is_invalid(valid: Measurement) -> None:
    settings = Settings(energy_s=None, replay_s=0.02, min_replay_s=0.01)
    short = msgspec.structs.replace(valid, settings=settings)
    assert words(short) == ["replay"]


def test_blocks_until_the_interval_is_narrow() -> None:
    for noise in (0.0005, 0.004, 0.01):
        measurement = run(device=FakeDevice(noise=noise, seed=3))
        interval, time_s = measurement.interval_s, measurement.time_s
        assert len(measurement.blocks) >= 20
        assert max(interval.high / time_s - 1, 1 - interval.low / time_s) <= 0.0025
        assert "imprecise" not in measurement.flags
    assert len(measurement.blocks) > 30
    assert len(run(device=FakeDevice(noise=0.0, outliers=0.0)).blocks) == 20


def test_measured_interval_holds_the_median_as_often_as_it_says() -> None:
    # one call lasts 4 ms; stopping once the interval is narrow enough costs little coverage
    weight_bytes, inside, lengths = 12_000_000_000, 0, []
    quantile = NormalDist().inv_cdf(0.5 / 0.99)
    for seed in range(500):
        device = FakeDevice(seed=seed, noise=0.006)
        measurement = run(device=device, weight_bytes=weight_bytes, memory_bytes_per_s=4e12)
        assert measurement.num_calls == 2
        call_s = LAUNCH_S + measurement.bytes / BANDWIDTH
        true = (call_s + LAUNCH_S / 2) * math.exp(0.006 * quantile)
        interval = measurement.interval_s
        inside += interval.low <= true <= interval.high
        lengths.append(len(measurement.blocks))
    assert 0.92 <= inside / 500 <= 0.98
    assert 20 < median(lengths) < 100


def test_budget_ends_it_and_the_result_says_so() -> None:
    device = FakeDevice(noise=0.03)
    measurement = run(device=device, settings=Settings(energy_s=None, budget_s=1.0))
    spent_s = sum(block.wall_s for block in measurement.blocks)
    assert 0.8 < spent_s < 1.1
    assert "imprecise" in measurement.flags


def test_never_fewer_than_twenty_blocks_whatever_the_budget() -> None:
    assert len(run(settings=Settings(energy_s=None, budget_s=1e-9), device=FakeDevice(noise=0.03)).blocks) == 20


def test_every_block_has_its_clocks() -> None:
    for block in run().blocks:
        assert block.sm_clock_hz == 1.98e9
        assert block.throttle_bits == 0  # an idle device would say 1
        assert block.temperature_c == 60
        assert block.power_w == 500
        # a lead-in and a timed replay lie between the events, and the wall sees both
        assert 1.3 * 4e-3 < block.events_s < block.wall_s < block.events_s + 200e-6


def test_throttled_blocks_are_dropped() -> None:
    # held down for 20 ms in every 100 ms: warm-up is flat all the same
    device = FakeDevice(noise=0.002, throttled=lambda now_s: 0.03 < now_s % 0.1 < 0.05)
    measurement = run(device=device)
    dropped = [block for block in measurement.blocks if block.is_throttled]
    assert 0 < len(dropped) <= 20
    assert all(block.throttle_bits & THROTTLED and block.sm_clock_hz == 1.3e9 for block in dropped)
    assert len(measurement.kept) == len(measurement.blocks) - len(dropped) >= 20
    assert measurement.flags == ()
    assert measurement.time_s == pytest.approx(COLD_S, rel=0.01)


def test_too_many_throttled_blocks_are_kept_and_said() -> None:
    device = FakeDevice(noise=0.0005, throttled=lambda now_s: True)
    measurement = run(device=device)
    assert len(measurement.blocks) == 21
    assert measurement.kept == measurement.blocks
    assert measurement.flags == ("throttled",)
    assert measurement.time_s == pytest.approx(COLD_S / 0.7, rel=0.01)


@pytest.mark.parametrize(("num_throttled", "flags"), [(20, ()), (21, ("throttled",))])
def test_discards_are_capped(valid: Measurement, num_throttled: int, flags: tuple[str, ...]) -> None:
    steady = [msgspec.structs.replace(valid.blocks[i % 2], time_s=2e-5) for i in range(60)]
    blocks = tuple(
        msgspec.structs.replace(block, throttle_bits=0x8) if i < num_throttled else block
        for i, block in enumerate(steady)
    )
    measurement = msgspec.structs.replace(valid, blocks=blocks)
    assert measurement.flags == flags
    assert len(measurement.kept) == (60 if flags else 40)


@pytest.mark.parametrize(
    ("bits", "is_throttled"),
    [(0, False), (1, False), (2, False), (0x100, False), (0x400, False), (4, True), (0x20, True), (0x81, True)],
)
def test_which_reasons_throttle(valid: Measurement, bits: int, is_throttled: bool) -> None:
    assert msgspec.structs.replace(valid.blocks[0], throttle_bits=bits).is_throttled is is_throttled


def test_too_few_unthrottled_blocks_are_invalid(valid: Measurement) -> None:
    assert words(msgspec.structs.replace(valid, blocks=valid.blocks[:19])) == ["blocks"]
    assert words(msgspec.structs.replace(valid, blocks=())) == ["blocks"]


# -- anchor, A/A, energy -----------------------------------------------------------------------------


def test_ratio_to_the_anchor_is_steadier_than_the_time() -> None:
    # clocks that wander by a third over half a second
    def wander(device: FakeDevice) -> float:
        return 1.17 + 0.17 * math.sin(12 * device.now_s)

    anchor_s, device = LAUNCH_S + 60e6 / BANDWIDTH, FakeDevice(noise=0.002, scale=wander)
    measurement = run(device=device, anchor=copy_anchor(device), settings=Settings(energy_s=None, budget_s=2.0))
    times = [block.time_s for block in measurement.blocks]
    assert max(times) / min(times) > 1.3
    if measurement.invalid:  # half of the captures may differ by more than 1 % in so restless a device
        assert words(measurement) == ["a_a"]
    ratios = [block.time_s / (block.anchor_s or NAN) for block in measurement.blocks]
    assert median(ratios) == pytest.approx(COLD_S / anchor_s, rel=0.01)


def test_anchor_beside_every_block(valid: Measurement) -> None:
    assert valid.anchor == "copy"
    assert all(block.anchor_s is not None for block in valid.blocks)
    assert valid.anchor_ratio == pytest.approx(COLD_S / (LAUNCH_S + 60e6 / BANDWIDTH), rel=0.01)
    interval = valid.anchor_ratio_interval
    assert interval is not None
    assert interval.low <= (valid.anchor_ratio or 0) <= interval.high
    plain = run()
    assert (plain.anchor, plain.anchor_ratio, plain.anchor_ratio_interval) == (None, None, None)
    with pytest.raises(ValueError, match=r"^anchor_s: expected one per block"):
        msgspec.structs.replace(valid, anchor=None)


def test_anchor_comes_first_in_every_other_pair_of_blocks() -> None:
    device, order = FakeDevice(), []

    def note(graph: Any, replay: Any) -> Any:
        return lambda *in_flight: (order.append(device.graphs.index(graph)), replay(*in_flight))[1]

    capture = device.capture

    def noted(calls: Any) -> Any:
        graph = capture(calls)
        graph.replay = note(graph, graph.replay)
        return graph

    device.capture = noted  # type: ignore[method-assign]
    measurement = run(device=device, anchor=copy_anchor(device))
    anchor, kernel, again = 2, len(device.graphs) - 2, len(device.graphs) - 1
    blocks = order[-2 * len(measurement.blocks) :]
    assert blocks[:8] == [anchor, kernel, anchor, again, kernel, anchor, again, anchor]
    assert [block.graph for block in measurement.blocks[:4]] == [0, 1, 0, 1]


def test_same_kernel_twice_is_the_same() -> None:
    first, second = run(device=FakeDevice(seed=1)), run(device=FakeDevice(seed=2))
    assert a_a_difference([b.time_s for b in first.kept], [b.time_s for b in second.kept]) < 0.005
    assert a_a_difference([1.0, 1.02, 1.5], [1.0]) == pytest.approx(0.02)
    with pytest.raises(ValueError, match=r"^samples: expected some of both; got 1 and 0"):
        a_a_difference([1.0], [])


@pytest.mark.parametrize(("scale", "reasons"), [(1.005, []), (1.02, ["a_a"]), (0.98, ["a_a"])])
def test_captures_that_differ_invalidate_the_measurement(scale: float, reasons: list[str]) -> None:
    # 0: checked, 1: for the estimate, 2 and 3: timed
    device = FakeDevice(noise=0.001, graph_scale=lambda index: scale if index == 3 else 1.0)
    measurement = run(device=device, settings=Settings(energy_s=None, budget_s=1.0))
    assert words(measurement) == reasons


def test_no_a_a_check_without_both_captures(valid: Measurement) -> None:
    one = tuple(msgspec.structs.replace(block, graph=0) for block in valid.blocks)
    assert words(msgspec.structs.replace(valid, blocks=one)) == ["a_a"]


def test_energy_has_a_loop_of_its_own() -> None:
    device = FakeDevice()
    measurement = run(device=device, anchor=copy_anchor(device), settings=Settings(energy_s=2.0))
    energy = measurement.energy
    assert energy is not None
    assert 2.0 <= energy.duration_s < 2.3
    # the loop reads nothing but the counter, and it draws what the kernel draws
    first = device.log.index("energy")
    assert device.log[first : first + 2] == ["energy", "energy"]
    assert device.log.count("state") == len(measurement.blocks)
    assert "state" not in device.log[first:]
    assert energy.energy_j == pytest.approx(500 * COLD_S, rel=0.02)
    assert energy.power_w == pytest.approx(500, rel=0.02)
    assert energy.num_calls * COLD_S == pytest.approx(energy.duration_s, rel=0.05)


def test_no_energy_where_none_is_asked_for_and_no_guess_where_none_is_counted() -> None:
    device = FakeDevice()
    assert run(device=device).energy is None
    assert "energy" not in device.log
    with pytest.raises(MethodUnavailable, match=r"^energy_j: expected the counter to advance"):
        run(device=FakeDevice(has_energy=False), settings=Settings())


@pytest.mark.parametrize(
    "change",
    [
        {"energy_s": 0.5}, {"min_blocks": 19}, {"min_replay_s": 1e-3}, {"replay_s": 1e-3}, {"min_warm_up_s": 0.1},
        {"max_warm_up_s": 0.4}, {"max_ci": 0.0}, {"max_ci": NAN}, {"budget_s": 0.0}, {"budget_s": math.inf},
        {"max_discards": -1}, {"max_discards": 10**6}, {"warm_up_tolerance": 1.0}, {"max_calls": 0},
    ],
)  # fmt: skip
def test_settings_that_would_not_measure_are_refused(change: dict[str, Any]) -> None:
    (field,) = change
    with pytest.raises(ValueError, match=rf"^{field}: expected .*; got "):
        Settings(**change)


def test_block_needs_no_anchor() -> None:
    block = Block(
        graph=0, time_s=1e-5, events_s=8e-3, wall_s=8.1e-3, anchor_s=None,
        sm_clock_hz=1e9, throttle_bits=0, temperature_c=50.0, power_w=400.0,
    )  # fmt: skip
    assert msgspec.json.decode(msgspec.json.encode(block), type=Block) == block
