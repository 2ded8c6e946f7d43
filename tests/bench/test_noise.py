"""The interval of a median, and the spread between processes."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from tokenfab.bench.noise import is_precise, median_interval, process_noise
from tokenfab.tests.bench.fake_device import NAN


@pytest.mark.parametrize("num_samples", [6, 7, 8, 9, 17, 20, 21, 50, 99, 100, 1001])
def test_interval_is_the_tightest_pair_of_order_statistics(num_samples: int) -> None:
    interval = median_interval(list(range(num_samples)))
    below = int(interval.low)
    assert interval.high == num_samples - 1 - below

    def coverage(outside: int) -> Fraction:
        tail = sum(math.comb(num_samples, k) for k in range(outside + 1))
        return 1 - Fraction(2 * tail, 2**num_samples)

    assert coverage(below) >= Fraction(95, 100)
    assert coverage(below + 1) < Fraction(95, 100)


@pytest.mark.parametrize("num_samples", [0, 1, 5])
def test_no_interval_from_too_few_samples(num_samples: int) -> None:
    assert not is_precise([1.0] * num_samples, 0.01)
    with pytest.raises(ValueError, match=r"^samples: expected enough .*; got " + str(num_samples)):
        median_interval([1.0] * num_samples)


def test_no_interval_from_nan() -> None:
    with pytest.raises(ValueError, match=r"^samples: expected finite"):
        median_interval([1.0] * 20 + [NAN])


def test_precision_looks_at_both_ends() -> None:
    # 20 samples: the interval is from the 6th to the 15th
    tight = [1.0] * 20
    assert is_precise(tight, 0.0025)
    assert not is_precise([*([0.99] * 6), *([1.0] * 14)], 0.0025)
    assert not is_precise([*([1.0] * 14), *([1.01] * 6)], 0.0025)
    assert is_precise([*([0.9] * 5), *([1.0] * 10), *([1.1] * 5)], 0.0025)
    assert is_precise([*([0.998] * 10), *([1.002] * 10)], 0.0025)


@pytest.mark.parametrize("num_samples", [20, 41, 100])
def test_interval_holds_the_median_as_often_as_it_says(num_samples: int) -> None:
    random = np.random.default_rng(num_samples)
    samples = np.exp(0.01 * random.standard_normal((3000, num_samples)))
    samples *= np.where(random.random(samples.shape) < 0.02, 1.5, 1.0)
    true = math.exp(0.01 * NormalDist().inv_cdf(0.5 / 0.98))
    intervals = [median_interval(row.tolist()) for row in samples]
    coverage = sum(interval.low <= true <= interval.high for interval in intervals) / len(intervals)
    assert 0.945 <= coverage <= 0.985


def test_spread_between_processes() -> None:
    assert process_noise([1.0, 1.02, 0.99]) == pytest.approx(0.03)
    with pytest.raises(ValueError, match=r"^times_s: expected one per process, at least 3; got 2"):
        process_noise([1.0, 1.0])
    with pytest.raises(ValueError, match=r"^times_s: expected finite"):
        process_noise([1.0, 1.0, NAN])
