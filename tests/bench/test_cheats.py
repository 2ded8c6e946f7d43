"""Kernels that cheat, times that cannot be, speeds without a check: none gets a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from tokenfab.bench.measurement import Check, InvalidMeasurement, Measurement
from tokenfab.tests.bench.fake_device import (
    BANDWIDTH,
    NAN,
    WEIGHT_BYTES,
    Buffer,
    FakeDevice,
    Kernel,
    Launch,
    copy_anchor,
    honest,
    product,
    random_buffer,
    relative_error,
    run,
    words,
)


@pytest.fixture(scope="module")
def valid() -> Measurement:
    """A valid measurement with an anchor, to be altered with ``msgspec.structs.replace``."""
    device = FakeDevice()
    measurement = run(device=device, anchor=copy_anchor(device))
    assert measurement.invalid == ()
    return measurement


class Cheat:
    """A kernel that can be told apart from an honest one only by what the core checks."""

    def __init__(self) -> None:
        self.calls = self.runs = 0
        self.kept: dict[Any, list[float]] = {}


def _launch(weights: Buffer, activations: Buffer, output: Buffer, effect: Callable[[], None], **changes: Any) -> Launch:
    return Launch([weights, activations], [output], effect, **changes)


def constant(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    """Reads all it should, and writes what was right for the first inputs."""
    kept = product(weights, activations)
    device.enqueue(_launch(weights, activations, output, lambda: output.values.__setitem__(slice(None), kept)))


def cached() -> Kernel:
    """Keeps outputs by address of the inputs, and launches nothing for ones it has seen."""
    seen: set[int] = set()

    def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        if weights.address not in seen:
            seen.add(weights.address)
            honest(device, weights, activations, output)

    return kernel


def cached_copy() -> Kernel:
    """Keeps outputs by address, and copies: fast, and right until the inputs change."""
    kept: dict[int, list[float]] = {}

    def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        if weights.address not in kept:
            kept[weights.address] = product(weights, activations)
        values = kept[weights.address]
        device.enqueue(Launch([weights], [output], lambda: output.values.__setitem__(slice(None), values)))

    return kernel


def other_stream(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    honest(device, weights, activations, output)
    other = random_buffer(WEIGHT_BYTES // 8, 0)
    device.enqueue(Launch([other], [], lambda: None, off_stream=True))


def writes_inputs(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    def effect() -> None:
        output.values[:] = product(weights, activations)
        weights.values.reverse()  # as good an input as before

    device.enqueue(_launch(weights, activations, output, effect))


def writes_activations(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    def effect() -> None:
        output.values[:] = product(weights, activations)
        activations.values[0] *= 1.0000001

    device.enqueue(_launch(weights, activations, output, effect))


def after(num_runs: int, spoil: Callable[[Buffer], None]) -> Kernel:
    """Right for so many runs, then spoilt."""
    cheat = Cheat()

    def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        def effect() -> None:
            cheat.runs += 1
            output.values[:] = product(weights, activations)
            if cheat.runs > num_runs:
                spoil(output)

        device.enqueue(_launch(weights, activations, output, effect))

    return kernel


def spoil_nan(output: Buffer) -> None:
    output.values[1] = NAN


def spoil_infinity(output: Buffer) -> None:
    output.values[0] = math.inf


def spoil_value(output: Buffer) -> None:
    output.values[0] *= 1.01


def too_fast(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    def effect() -> None:
        output.values[:] = product(weights, activations)

    device.enqueue(Launch([], [output], effect, work_s=5e-6))


def pinned(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    """Holds its weights in L2, whatever rotates."""

    def effect() -> None:
        output.values[:] = product(weights, activations)

    device.enqueue(_launch(weights, activations, output, effect, pinned=True))


def unwritten(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    device.enqueue(_launch(weights, activations, output, lambda: None))


def unwritten_tail(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    def effect() -> None:
        output.values[0] = product(weights, activations)[0]

    device.enqueue(_launch(weights, activations, output, effect))


def empty_graph(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    if device.capturing is None:
        honest(device, weights, activations, output)


def every_other() -> Kernel:
    cheat = Cheat()

    def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        cheat.calls += 1
        if cheat.calls % 2:
            honest(device, weights, activations, output)

    return kernel


def one_set() -> Kernel:
    """Reads the first weights it saw, always: they stay in L2, and the answer is that of another set."""
    first: list[Buffer] = []

    def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        first.append(weights)
        honest(device, first[0], activations, output)

    return kernel


def wrong_in_capture(which: int) -> Kernel:
    """Wrong in one capture only."""

    def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        number = device.num_captures if device.capturing is not None else 0

        def effect() -> None:
            output.values[:] = product(weights, activations)
            if number == which:
                spoil_value(output)

        device.enqueue(_launch(weights, activations, output, effect))

    return kernel


CHEATS: list[tuple[str, Kernel, str]] = [
    ("constant", constant, "check: on new inputs: error"),
    ("cached", cached(), "check: before timing, call 7: the output is not finite, or not all written"),
    ("cached copy", cached_copy(), "check: on new inputs: error"),
    ("other stream", other_stream, "wall: "),
    ("writes weights", writes_inputs, "check: inputs changed"),
    ("writes activations", writes_activations, "check: inputs changed"),
    ("nan in timing", after(1000, spoil_nan), "check: after timing: an output is not finite"),
    ("infinity in timing", after(1000, spoil_infinity), "check: after timing: an output is not finite"),
    ("wrong in timing", after(1000, spoil_value), "check: after timing: error 0.01, more than the tolerance 1e-06"),
    ("right only once", after(1, spoil_value), "check: before timing, call 6: error 0.01"),
    ("wrong at once", after(0, spoil_value), "check: before timing, call 0: error 0.01"),
    ("beats the floor", too_fast, "floor: "),
    ("persisting L2", pinned, "floor: "),
    ("output unwritten", unwritten, "check: before timing, call 0: the output is not finite, or not all written"),
    ("tail unwritten", unwritten_tail, "check: before timing, call 0: the output is not finite, or not all written"),
    ("nothing captured", empty_graph, "check: captured: an output is not finite"),
    ("every other call", every_other(), "check: before timing, call 1: the output is not finite"),
    ("one set of weights", one_set(), "check: before timing, call 6: error"),
    ("first timed capture wrong", wrong_in_capture(3), "check: after timing: error"),
    ("second timed capture wrong", wrong_in_capture(4), "check: after timing: error"),
]


@pytest.mark.parametrize(("name", "kernel", "reason"), CHEATS, ids=[name for name, _, _ in CHEATS])
def test_r19_cheats_are_found_out(name: str, kernel: Kernel, reason: str) -> None:
    measurement = run(kernel)
    assert any(found.startswith(reason) for found in measurement.invalid), measurement.invalid
    # the one check that names it is enough: none is caught by another's luck
    assert {found.split(":")[0] for found in measurement.invalid} <= {reason.split(":")[0], "blocks"}
    for result in ("time_s", "interval_s", "roofline_fraction", "anchor_ratio", "anchor_ratio_interval"):
        with pytest.raises(InvalidMeasurement, match=r"^no time: "):
            getattr(measurement, result)


def test_nothing_is_timed_before_the_check_has_passed() -> None:
    device = FakeDevice()
    measurement = run(unwritten, device)
    assert measurement.blocks == ()
    assert device.now_s < 0.01
    assert measurement.warm_up is None


def test_reference_left_in_memory_is_of_no_use() -> None:
    # the kernel copies the last reference that the check computed
    answers: list[list[float]] = []

    def error(weights: Buffer, activations: Buffer, output: Buffer) -> float:
        answers.append(product(weights, activations))
        return relative_error(weights, activations, output)

    def thief(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        def effect() -> None:
            output.values[:] = answers[-1] if answers else product(weights, activations)

        device.enqueue(_launch(weights, activations, output, effect))

    assert words(run(thief, error=error, l2_policy="hot")) == ["check"]


@pytest.mark.parametrize("error", [NAN, math.inf, -1.0])
def test_an_error_that_is_no_error_fails_the_check(error: float) -> None:
    # NaN planted in the reference makes every comparison with it false
    measurement = run(error=lambda *buffers: error)
    assert measurement.invalid[0].startswith("check: before timing, call 0: expected a finite error >= 0; got")
    assert measurement.check is not None
    assert measurement.check.before_error is None


def test_check_may_raise_instead() -> None:
    def error(*buffers: Buffer) -> float:
        raise AssertionError("1 of 2 values differ")

    assert run(error=error).invalid[0] == "check: before timing, call 0: 1 of 2 values differ"


def test_check_takes_the_tolerance_itself() -> None:
    assert run(error=lambda *buffers: 0.5, tolerance=0.5).invalid == ()
    assert words(run(error=lambda *buffers: 0.5, tolerance=0.4999)) == ["check", "blocks"]


def test_errors_are_kept() -> None:
    errors = iter([0.1, 0.3, 0.2, 0.15, 0.4, 0.35, 0.5])
    check = run(error=lambda *buffers: next(errors), tolerance=1.0).check
    assert check is not None
    assert (check.before_error, check.after_error, check.refreshed_error) == (0.3, 0.4, 0.5)


def test_every_output_of_cold_all_is_checked() -> None:
    def first_output_only(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        # in a graph, the sets between first and last are left out
        index = seen.setdefault(output.address, len(seen))
        if device.capturing is None or index in (0, 6):
            honest(device, weights, activations, output)

    seen: dict[int, int] = {}
    assert run(first_output_only, l2_policy="cold_all").invalid[0].startswith("check: captured: an output is not")


@pytest.mark.parametrize("wrong", [0, 6])
def test_first_and_last_output_of_cold_all_are_compared(wrong: int) -> None:
    seen: dict[int, int] = {}

    def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        index = seen.setdefault(output.address, len(seen))
        factor = 1.01 if device.capturing is not None and index == wrong else 1.0

        def effect() -> None:
            output.values[:] = [factor * value for value in product(weights, activations)]

        device.enqueue(_launch(weights, activations, output, effect))

    assert run(kernel, l2_policy="cold_all").invalid[0].startswith("check: captured: error 0.01")


def test_refresh_must_refresh() -> None:
    with pytest.raises(ValueError, match=r"^refresh: expected other data in the activations"):
        run(refresh=lambda activations, seed: None)


@pytest.mark.parametrize(("rate", "reasons"), [(0.5, ["wall"]), (0.95, ["wall"]), (1.0, []), (1.1, ["wall"])])
def test_wall_and_events_must_agree(rate: float, reasons: list[str]) -> None:
    assert words(run(device=FakeDevice(wall_rate=rate))) == reasons


def test_a_slow_wake_up_is_no_disagreement_until_it_is() -> None:
    assert run(device=FakeDevice(wake_up_s=90e-6)).invalid == ()
    assert words(run(device=FakeDevice(wake_up_s=300e-6))) == ["wall"]


# -- floors ------------------------------------------------------------------------------------------


def reads(share: float) -> Kernel:
    """An honest answer from only a share of the bytes."""

    def kernel(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
        def effect() -> None:
            output.values[:] = product(weights, activations)

        device.enqueue(Launch([], [], effect, work_s=share * WEIGHT_BYTES / BANDWIDTH))

    return kernel


@pytest.mark.parametrize(
    ("policy", "share", "weight_bytes", "activation_bytes", "words_expected", "flags"),
    [
        # 48 MB of weights: the floor of weights is 16 us, of all bytes 16.4 us
        ("cold_all", 1.05, WEIGHT_BYTES, 1_200_000, [], ()),
        ("cold_all", 1.01, WEIGHT_BYTES, 1_200_000, ["floor"], ()),
        ("cold_weights", 1.01, WEIGHT_BYTES, 1_200_000, [], ("l2_resident",)),
        ("cold_weights", 0.98, WEIGHT_BYTES, 1_200_000, ["floor"], ()),
        ("cold_weights", 1.9, WEIGHT_BYTES, 48_000_000, [], ("l2_resident",)),
        ("cold_weights", 1.9, WEIGHT_BYTES, 53_000_000, ["floor"], ()),
        ("hot", 0.5, WEIGHT_BYTES, 1_200_000, [], ("l2_resident",)),
        ("hot", 0.98, WEIGHT_BYTES, 4_500_000, ["floor"], ()),
        ("hot", 0.05, WEIGHT_BYTES, 1_200_000, ["floor"], ()),
    ],
)  # fmt: skip
def test_floor_by_policy(
    policy: Any, share: float, weight_bytes: int, activation_bytes: int, words_expected: list[str], flags: Any
) -> None:
    measurement = run(
        reads(share),
        FakeDevice(noise=0.0005, outliers=0),
        l2_policy=policy,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
    )
    assert words(measurement) == words_expected
    assert measurement.flags == flags


def test_r20_floors_of_a_measurement(valid: Measurement) -> None:
    assert valid.bytes == 49_200_000
    assert valid.floor_s == pytest.approx(16.4e-6)
    assert valid.hard_floor_s == pytest.approx(16e-6)
    assert msgspec.structs.replace(valid, compute_floor_s=17e-6).floor_s == 17e-6
    slow = msgspec.structs.replace(valid, compute_floor_s=18e-6)
    assert slow.hard_floor_s == 18e-6
    assert words(slow) == ["floor"]


# -- a speed without a check -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [None, Check(tolerance=1.0, before_error=None), Check(tolerance=1.0, before_error=1.5)],
)
def test_blocks_without_a_passed_check_cannot_be_constructed(valid: Measurement, check: Check | None) -> None:
    with pytest.raises(ValueError, match=r"^(check|before_error): expected .* beside .*timed blocks"):
        msgspec.structs.replace(valid, check=check)


@pytest.mark.parametrize(
    "change",
    [
        {"after_error": None}, {"refreshed_error": None}, {"after_error": 2.0}, {"refreshed_error": 2.0},
        {"problems": ("something",)},
    ],
)  # fmt: skip
def test_a_check_is_passed_only_as_a_whole(valid: Measurement, change: dict[str, Any]) -> None:
    passed = Check(tolerance=1.0, before_error=0.5, after_error=0.5, refreshed_error=0.5)
    assert passed.passed
    assert not msgspec.structs.replace(passed, **change).passed
    measurement = msgspec.structs.replace(valid, check=msgspec.structs.replace(passed, **change))
    assert words(measurement) == ["check"]
    assert next(iter(change)) == "problems" or "(before, after, refreshed)" in measurement.invalid[0]


def test_facts_that_are_no_facts_are_refused(valid: Measurement) -> None:
    for field in ("flops", "compute_floor_s", "memory_bytes_per_s"):
        for value in (NAN, math.inf, -1.0):
            with pytest.raises(ValueError, match=rf"^{field}: expected"):
                msgspec.structs.replace(valid, **{field: value})
    with pytest.raises(ValueError, match=r"^memory_bytes_per_s: expected > 0"):
        msgspec.structs.replace(valid, memory_bytes_per_s=0.0)
    with pytest.raises(ValueError, match=r"^bytes: expected > 0"):
        msgspec.structs.replace(valid, l2_policy="hot", num_sets=1, weight_bytes=0, activation_bytes=0)
    for value in (0.0, NAN, math.inf, -1e-6):
        with pytest.raises(ValueError, match=r"^time_s: expected > 0 and finite"):
            msgspec.structs.replace(valid.blocks[0], time_s=value)
    with pytest.raises(ValueError, match=r"^tolerance: expected finite"):
        Check(tolerance=math.inf, before_error=0.0)
