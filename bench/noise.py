"""Noise: the interval of a median, the same kernel timed twice, the spread between processes.

Units: whatever the samples have; differences and noise are relative. Errors: ``ValueError`` for too few
samples and for ones that are not finite.

Source: order-statistic intervals: David and Nagaraja, Order Statistics, 7.1; nvbench (noise is part of the
result).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import median

import msgspec

CONFIDENCE = 0.95
MAX_A_A = 0.01
"""The same kernel timed twice may differ by this; beyond it the machine was not steady."""
MIN_PROCESSES = 3


class Interval(msgspec.Struct, frozen=True):
    """A confidence interval."""

    low: float
    high: float


@lru_cache(maxsize=4096)
def _rank(num_samples: int, confidence: float) -> int:
    """Largest r with P(r <= Binomial(n, 1/2) <= n - r) >= confidence; 0 without one."""
    limit = (int((1 - confidence) / 2 * 2**53) << num_samples) >> 53  # of 2**n equally likely outcomes
    tail, term, rank = 0, 1, 0
    while tail + term <= limit:
        tail += term
        rank += 1
        term = term * (num_samples - rank + 1) // rank
    return rank


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The interval between order statistics r and n - r + 1 that holds the median with at least ``confidence``,
    whatever the distribution, for independent samples.

    Raises:
        ValueError: fewer samples than any such interval needs (6 at 95 %), or one that is not finite.
    """
    if not all(map(math.isfinite, samples)):
        raise ValueError("samples: expected finite numbers; got NaN or infinity among them")
    rank = _rank(len(samples), confidence)
    if rank < 1:
        raise ValueError(f"samples: expected enough for an interval at {confidence:g}; got {len(samples)}")
    ordered = sorted(samples)
    return Interval(ordered[rank - 1], ordered[len(ordered) - rank])


def is_precise(samples: Sequence[float], max_ci: float) -> bool:
    """Whether both ends of the median's interval are within ``max_ci`` of it, relatively."""
    if _rank(len(samples), CONFIDENCE) < 1:
        return False
    middle, interval = median(samples), median_interval(samples)
    return max(interval.high - middle, middle - interval.low) <= max_ci * middle


def a_a_difference(first_s: Sequence[float], second_s: Sequence[float]) -> float:
    """|median(first) / median(second) - 1| of two timings of the same kernel: beyond ``MAX_A_A`` both are void.

    Raises:
        ValueError: no samples in one of them.
    """
    if not first_s or not second_s:
        raise ValueError(f"samples: expected some of both; got {len(first_s)} and {len(second_s)}")
    return abs(median(first_s) / median(second_s) - 1)


def process_noise(times_s: Sequence[float]) -> float:
    """(max - min) / median of one kernel's times in fresh processes: the noise floor of any comparison.

    Raises:
        ValueError: fewer than three processes, or a time that is not finite and positive.
    """
    if len(times_s) < MIN_PROCESSES:
        raise ValueError(f"times_s: expected one per process, at least {MIN_PROCESSES}; got {len(times_s)}")
    if not all(0 < time_s < math.inf for time_s in times_s):
        raise ValueError(f"times_s: expected finite times > 0; got {list(times_s)!r}")
    return (max(times_s) - min(times_s)) / median(times_s)
