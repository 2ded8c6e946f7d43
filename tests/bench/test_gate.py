"""The gate on time: what fails, what passes, and what is never taken for a pass."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from tokenfab.bench.gate import FAIL, INCONCLUSIVE, PASS, GateResult, gate, gate_in_cycles
from tokenfab.bench.noise import Interval
from tokenfab.bench.sample import Sample
from tokenfab.bench.sides import Side
from tokenfab.tests.bench.made_samples import OTHER_HASH, anchored, processes, sample, side

BASE = side(processes(50e-6), processes(20e-6, m=16), label="baseline")


def reasons(result: GateResult) -> list[str]:
    return [*result.problems, *(row.reason for row in result.rows if row.result == "inconclusive")]


def test_nothing_changed_passes() -> None:
    result = gate(BASE, side(processes(50.2e-6, kernel_hash=OTHER_HASH), processes(19.9e-6, m=16)))
    assert (result.result, result.exit_code) == ("pass", PASS)
    assert [row.word for row in result.rows] == ["same", "same"]


def test_a_regression_fails_and_names_kernel_and_cost() -> None:
    result = gate(BASE, side(processes(55e-6), processes(20e-6, m=16)))
    assert (result.result, result.exit_code) == ("fail", FAIL)
    (failed,) = [row for row in result.rows if row.result == "fail"]
    assert (failed.name, failed.shape, failed.word) == ("gemm/fp8_block-fp8_group", "64 x 7168 x 16384", "slower")
    ((place, lost),) = failed.seconds_per_token
    assert (str(place), place.calls_per_step, place.tokens_per_step) == ("deepseek-v3 o_proj", 61, 64)
    assert lost == pytest.approx(5e-6 * 61 / 64, rel=1e-3)


@pytest.mark.parametrize(("factor", "result"), [(1.02, "pass"), (1.029, "pass"), (1.04, "fail"), (0.5, "pass")])
def test_the_margin_is_3_percent(factor: float, result: str) -> None:
    rows = gate(side(processes(1.0)), side(processes(factor))).rows
    assert [row.result for row in rows] == [result]


def test_noise_widens_the_margin() -> None:
    noisy = side(processes(1.0, noise=0.04)), side(processes(1.1, noise=0.04))
    assert gate(*noisy).result == "pass"
    assert gate(*noisy).rows[0].word == "unsure"
    assert "reaches across the margin" in gate(*noisy).rows[0].reason


def test_many_small_losses_fail_the_model() -> None:
    """Each point loses 2 %, less than its margin; the model loses 2 %, more than its own."""
    base = side(*(processes(50e-6, m=m) for m in (16, 64)), label="baseline")
    result = gate(base, side(*(processes(51e-6, m=m) for m in (16, 64))))
    assert [row.result for row in result.rows] == ["pass", "pass"]
    assert [(each.model, each.tokens_per_step, each.result) for each in result.totals] == [
        ("deepseek-v3", 16, "fail"), ("deepseek-v3", 64, "fail")
    ]  # fmt: skip
    assert result.exit_code == FAIL
    total = result.totals[1]
    assert total.before_s == pytest.approx(50e-6 * 61 / 64, rel=1e-3)
    assert total.after_s == pytest.approx(51e-6 * 61 / 64, rel=1e-3)
    assert total.limit_s == pytest.approx(0.01 * total.before_s)
    assert gate(base, side(*(processes(51e-6, m=m) for m in (16, 64))), total_margin=0.03).result == "pass"


def test_totals_add_kernels_of_one_step() -> None:
    """A loss in one and a gain in another of the same weight cancel."""
    base = side(processes(50e-6), processes(50e-6, shape={"m": 64, "n": 24576, "k": 1536}))
    shapes = {"m": 64, "n": 24576, "k": 1536}
    even = gate(base, side(processes(51e-6), processes(49e-6, shape=shapes)))
    (total,) = even.totals
    assert total.num_kernels == 2
    assert total.after_s == pytest.approx(total.before_s, rel=1e-3)
    assert even.result == "pass"
    both = gate(base, side(processes(51e-6), processes(51e-6, shape=shapes)))
    assert both.totals[0].result == "fail"


# -- inconclusive ----------------------------------------------------------------------------------


def test_r24_a_missing_point_is_no_pass() -> None:
    result = gate(BASE, side(processes(50e-6)))
    assert (result.result, result.exit_code) == ("inconclusive", INCONCLUSIVE)
    assert reasons(result) == ["in the baseline, but not measured now: renamed or left out"]


def test_r24_a_renamed_point_is_no_pass() -> None:
    result = gate(BASE, side(processes(50e-6), processes(20e-6, m=17)))
    assert result.exit_code == INCONCLUSIVE
    assert reasons(result) == [
        "in the baseline, but not measured now: renamed or left out",
        "measured now, but not in the baseline: renamed or new",
    ]
    renamed = side(processes(50e-6, name="b::test"), processes(20e-6, m=16))
    assert gate(BASE, renamed).exit_code == INCONCLUSIVE


def test_r24_another_gpu_is_no_pass() -> None:
    other = side(processes(50e-6, device="NVIDIA H200"), processes(20e-6, m=16, device="NVIDIA H200"))
    result = gate(BASE, other)
    assert result.exit_code == INCONCLUSIVE
    assert reasons(result)[0].startswith("GPU: expected the baseline's; got NVIDIA H100")
    assert gate(BASE, side(processes(50e-6, gpu="h200"), processes(20e-6, m=16, gpu="h200"))).exit_code == INCONCLUSIVE


def test_r24_another_machine_compares_by_the_anchor_only() -> None:
    moved = side(processes(50e-6, uuid="GPU-2"), processes(20e-6, m=16, uuid="GPU-2"))
    assert "another GPU of the same model" in reasons(gate(BASE, moved))[0]
    base = side(anchored(50e-6, 100e-6))
    assert gate(base, side(anchored(50e-6, 100e-6, uuid="GPU-2"))).result == "pass"
    assert gate(base, side(anchored(60e-6, 100e-6, uuid="GPU-2"))).result == "fail"


def test_r24_few_processes_are_no_pass() -> None:
    few = side(processes(50e-6, num=2), processes(20e-6, m=16))
    assert reasons(gate(BASE, few)) == ["now: 2 processes where 3 are needed"]
    assert reasons(gate(few, BASE)) == ["baseline: 2 processes where 3 are needed"]


def test_r24_invalid_measurements_are_no_pass() -> None:
    wrong = side([sample(None, name) for name in "abc"], processes(20e-6, m=16))
    assert reasons(gate(BASE, wrong)) == ["now: no valid time: check: wrong"]
    assert gate(BASE, wrong).exit_code == INCONCLUSIVE


def test_r24_a_torn_file_is_no_pass() -> None:
    torn = Side("baseline", BASE.samples, torn=("the last line has no end",))
    result = gate(torn, side(processes(50e-6), processes(20e-6, m=16)))
    assert (result.exit_code, reasons(result)) == (INCONCLUSIVE, ["baseline: the last line has no end"])


def test_r24_nothing_in_common_is_no_pass() -> None:
    result = gate(BASE, side(processes(1.0, m=1)))
    assert result.exit_code == INCONCLUSIVE
    assert "expected a point that is on both" in reasons(result)[0]


def test_throttled_times_need_an_anchor() -> None:
    def throttled(samples: list[Sample]) -> list[Sample]:
        return [msgspec.structs.replace(each, flags=("throttled",)) for each in samples]

    assert reasons(gate(side(processes(1.0)), side(throttled(processes(1.0))))) == [
        "throttled, and no anchor beside both"
    ]
    assert gate(side(anchored(1.0, 2.0)), side(throttled(anchored(1.0, 2.0)))).result == "pass"


def test_a_failure_outweighs_what_is_inconclusive() -> None:
    assert gate(BASE, side(processes(55e-6))).exit_code == FAIL


def test_stacks_and_margins_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^baseline: expected measurements; got published:vllm"):
        gate(Side("published:vllm", stack="vllm"), BASE)
    with pytest.raises(ValueError, match=r"^total_margin: expected more than 0"):
        gate(BASE, BASE, total_margin=0.0)


# -- cycles ----------------------------------------------------------------------------------------


def cycles(*factors: float) -> tuple[GateResult, list[tuple[int, int | None]]]:
    """The gate where the point of m = 64 is so much slower in each cycle."""
    asked: list[tuple[int, int | None]] = []

    def measure(cycle: int, keys: frozenset[str] | None) -> Side:
        asked.append((cycle, None if keys is None else len(keys)))
        groups = [processes(50e-6 * factors[cycle - 1])]
        return side(*groups, *([processes(20e-6, m=16)] if keys is None else []))

    return gate_in_cycles(BASE, measure, len(factors)), asked


def test_a_failure_must_be_confirmed() -> None:
    result, asked = cycles(1.1, 1.1, 1.1)
    assert result.result == "fail"
    assert asked == [(1, None), (2, 1), (3, 1)]
    assert len(result.rows) == 2
    assert len(result.totals) == 2
    result, asked = cycles(1.1, 1.0, 1.1)
    assert (result.result, asked) == ("pass", [(1, None), (2, 1)])
    result, asked = cycles(1.0, 1.1, 1.1)
    assert (result.result, asked) == ("pass", [(1, None)])


def test_a_failure_of_the_sum_is_measured_again_too() -> None:
    assert cycles(1.02, 1.02)[0].result == "fail"
    assert cycles(1.02, 1.0)[0].result == "pass"


def test_the_gate_is_right_about_noisy_runs() -> None:
    """100 runs of an unchanged kernel and of one that lost 5 %, processes 0.5 % apart."""
    random = np.random.default_rng(3)

    def noisy(time_s: float) -> Side:
        times = [time_s * math.exp(0.005 * random.standard_normal()) for _ in range(3)]
        near = [Interval(0.9995 * each, 1.0005 * each) for each in times]
        return side([sample(each, f"p{i}", interval_s=near[i]) for i, each in enumerate(times)])

    def counted(factor: float) -> dict[str, int]:
        found: dict[str, int] = {}
        for _ in range(100):
            base = noisy(50e-6)
            result = gate_in_cycles(base, lambda cycle, keys: noisy(factor * 50e-6), 3).result
            found[result] = found.get(result, 0) + 1
        return found

    assert counted(1.0).get("pass", 0) >= 95
    assert counted(1.08).get("fail", 0) >= 95


def test_documents_hold_no_infinity() -> None:
    result: Any = gate(BASE, side(processes(55e-6)))
    assert all(math.isfinite(value) for total in result.totals for value in (total.low_s, total.limit_s, total.after_s))
