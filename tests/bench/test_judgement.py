"""Same, faster, slower or unsure: how often each is said of noisy runs, and what widens or narrows it."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from tokenfab.bench.judgement import COMPARE_MARGIN, GATE_MARGIN, judge
from tokenfab.bench.noise import Interval
from tokenfab.tests.bench.fake_device import FakeDevice, run

NUM_RUNS, PROCESSES = 100, 3
NOISE = 0.005
"""Between processes, a standard deviation; within one, 0.4 % and outliers from the fake device."""


class Pool(NamedTuple):
    times_s: list[float]
    intervals: list[Interval]

    def pair(self, number: int, factor: float) -> tuple[list[float], list[float], list[Interval]]:
        """Three processes beside three others, the others ``factor`` as slow."""
        first = 2 * PROCESSES * number
        a, b = (self.times_s[first + side * PROCESSES :][:PROCESSES] for side in (0, 1))
        return a, [factor * time_s for time_s in b], self.intervals[first:][: 2 * PROCESSES]


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Measurements of one kernel in 600 processes of the fake GPU, by the timing core itself."""
    random = np.random.default_rng(7)
    found = []
    for seed in range(2 * PROCESSES * NUM_RUNS):
        moved = math.exp(NOISE * random.standard_normal())
        found.append(run(device=FakeDevice(seed=seed, scale=lambda device, moved=moved: moved)))
    assert all(not each.invalid for each in found)
    return Pool([each.time_s for each in found], [each.interval_s for each in found])


def words(pool: Pool, factor: float, margin: float) -> Counter[str]:
    judged = []
    for number in range(NUM_RUNS):
        a, b, within = pool.pair(number, factor)
        judged.append(judge(a, b, margin, within).word)
    return Counter(judged)


@pytest.mark.parametrize("margin", [COMPARE_MARGIN, GATE_MARGIN])
def test_the_same_kernel_is_the_same_in_95_of_100_noisy_runs(pool: Pool, margin: float) -> None:
    assert words(pool, 1.0, margin)["same"] >= 95


@pytest.mark.parametrize("margin", [COMPARE_MARGIN, GATE_MARGIN])
def test_a_regression_of_5_percent_is_caught_in_95_of_100_noisy_runs(pool: Pool, margin: float) -> None:
    assert words(pool, 1.05, margin)["slower"] >= 95


def test_a_gain_of_5_percent_is_seen_as_often(pool: Pool) -> None:
    assert words(pool, 1 / 1.05, COMPARE_MARGIN)["faster"] >= 95


def test_a_regression_within_the_margin_fails_no_gate(pool: Pool) -> None:
    assert words(pool, 1.02, GATE_MARGIN)["slower"] <= 1
    assert words(pool, 0.98, GATE_MARGIN)["faster"] <= 1


def test_interval_is_students() -> None:
    a, b = [1.00, 1.01, 0.99], [1.10, 1.11, 1.09]
    judgement = judge(a, b)
    logs = [np.log(a), np.log(b)]
    pooled = math.sqrt(sum(float(each.var(ddof=1)) for each in logs) / 2)
    half = 2.776 * pooled * math.sqrt(2 / 3)
    difference = float(logs[1].mean() - logs[0].mean())
    assert judgement.interval is not None
    assert judgement.interval.low == pytest.approx(math.exp(difference - half))
    assert judgement.interval.high == pytest.approx(math.exp(difference + half))
    assert judgement.ratio == pytest.approx(math.exp(difference))
    assert judgement.noise == pytest.approx(pooled)
    assert judgement.margin == pytest.approx(3 * pooled)
    assert judgement.word == "slower"
    assert judge(b, a).word == "faster"


def test_noise_raises_the_margin() -> None:
    quiet = judge([1.0, 1.0, 1.0], [1.02, 1.02, 1.02])
    assert (quiet.word, quiet.margin) == ("slower", COMPARE_MARGIN)
    loud = judge([0.98, 1.0, 1.02], [1.02, 1.04, 1.06])
    assert loud.word == "unsure"
    assert loud.margin == pytest.approx(0.06, rel=0.03)
    assert loud.reason == "-0.5% to +8.7% reaches across the margin of 5.9%"


def test_the_interval_decides_and_not_its_middle() -> None:
    """2 % apart, 1.2 % the margin: 1.1 % is as likely as 2.9 %, so it is not surely slower; nor surely 3 % apart."""
    a = [0.996, 1.0, 1.004]
    judgement = judge(a, [1.02 * each for each in a])
    assert judgement.margin == pytest.approx(0.012, rel=0.01)
    assert judgement.word == "same"
    assert judge(a, [each / 1.02 for each in a]).word == "same"
    assert judge(a, [each / 1.024 for each in a]).word == "faster"
    assert judge(a, [1.024 * each for each in a]).word == "slower"
    wide = [0.990, 1.0, 1.010]
    assert judge(wide, [1.02 * each for each in wide]).word == "unsure"
    assert judge(wide, [each / 1.02 for each in wide]).word == "unsure"


def test_processes_that_agree_by_luck_are_not_believed_beyond_their_own_intervals() -> None:
    a, b = [1.0, 1.0, 1.0], [1.02, 1.02, 1.02]
    assert judge(a, b).word == "slower"
    wide = [Interval(0.98, 1.02)] * 6
    assert judge(a, b, within=wide).word == "unsure"
    assert judge(a, b, within=wide).noise == pytest.approx(math.log(1.02 / 0.98) / 2 / 1.96)


def test_few_processes_are_unsure_whatever_they_say() -> None:
    judgement = judge([1.0, 1.0], [2.0, 2.0, 2.0])
    assert (judgement.word, judgement.interval, judgement.noise) == ("unsure", None, None)
    assert judgement.ratio == pytest.approx(2.0)
    assert judgement.reason == "2 and 3 processes; 3 of each tell the noise"


def test_a_fixed_side_needs_no_processes_and_adds_no_noise() -> None:
    ours = [1.0, 1.002, 0.998]
    judgement = judge([1.1], ours, fixed="a")
    assert judgement.word == "faster"
    assert judgement.interval is not None
    half = 4.303 * float(np.std(np.log(ours), ddof=1)) / math.sqrt(3)
    assert math.log(judgement.interval.high / judgement.interval.low) == pytest.approx(2 * half)
    assert judge(ours, [1.1], fixed="b").word == "slower"
    assert judge([1.1], ours).word == "unsure"


@pytest.mark.parametrize("bad", [[], [0.0, 1.0, 1.0], [math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0], [-1.0, 1.0, 1.0]])
def test_what_is_no_time_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^b: expected finite values > 0, at least one; got"):
        judge([1.0, 1.0, 1.0], bad)
    with pytest.raises(ValueError, match=r"^a: expected finite values"):
        judge(bad, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.01, math.nan])
def test_margins_are_fractions(margin: float) -> None:
    with pytest.raises(ValueError, match=r"^margin: expected more than 0 and less than 1; got"):
        judge([1.0], [1.0], margin)
