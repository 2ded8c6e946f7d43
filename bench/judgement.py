"""Two sets of times of one kernel: the same, faster, slower, or unsure.

    d = mean(log b) - mean(log a),  over the processes of each side
    interval = d +- t(0.975, n_a + n_b - 2) s sqrt(1 / n_a + 1 / n_b)
    margin = max(the margin asked, 3 s)

``slower`` where the whole interval lies above the margin, ``faster`` below its negative; else ``same`` where it lies
within 3 % (or the margin, where that is more); else ``unsure``. One sample is one process: what moves between
processes (clocks, where memory lies) is not seen by more blocks of the same process. s, the noise, pools both sides,
and is at least what the blocks' own intervals leave open, so that processes that agree by luck do not make the
interval narrow.

Units: ratios are b / a; margins and noise relative. Errors: ``ValueError`` for times that are not finite and positive.

Source: Student's t for two samples of one variance (any textbook); equivalence by an interval within a margin:
Schuirmann 1987; noise of processes rather than of repetitions: Kalibera and Jones, Rigorous Benchmarking, 2013.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .noise import MIN_PROCESSES, Interval

Word = Literal["same", "faster", "slower", "unsure"]

COMPARE_MARGIN = 0.01
"""Differences that do not matter where kernels are compared."""
GATE_MARGIN = 0.03
"""Differences that fail no build; and what "the same" surely stays within."""
NOISE_FACTOR = 3.0
_NORMAL_95 = 1.96
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Two-sided 95 % quantiles of Student's t, 1 to 30 degrees of freedom; beyond, the last, which is wider."""


@dataclass(frozen=True)
class Judgement:
    """What came of a comparison.

    Attributes:
        ratio, interval: b / a and its 95 % interval; None where too few processes are there.
        margin: what the interval was held against.
        noise: standard deviation between processes, relative; None where too few are there.
        reason: why it is ``unsure``; "" otherwise.
    """

    word: Word
    ratio: float
    interval: Interval | None
    margin: float
    noise: float | None
    reason: str = ""


def judge(
    a: Sequence[float], b: Sequence[float], margin: float = COMPARE_MARGIN, within: Sequence[Interval] = (),
    fixed: str = "",
) -> Judgement:  # fmt: skip
    """``b`` against ``a``: one value per process (seconds, or ratios to the anchor beside them).

    Args:
        within: the values' own intervals within their processes, of both sides.
        fixed: "a" or "b": that side is one number without processes (published), taken as it is.

    Raises:
        ValueError: an empty side, a value that is not finite and positive, a margin that is not in (0, 1).
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin: expected more than 0 and less than 1; got {margin}")
    sides = {"a": a, "b": b}
    for name, values in sides.items():
        if not values or not all(0 < value < math.inf for value in values):
            raise ValueError(f"{name}: expected finite values > 0, at least one; got {list(values)!r}")
    logs = {name: [math.log(value) for value in values] for name, values in sides.items()}
    difference = sum(logs["b"]) / len(b) - sum(logs["a"]) / len(a)
    moving = [each for name, each in logs.items() if name != fixed]
    if min(map(len, moving)) < MIN_PROCESSES:
        counts = " and ".join(str(len(each)) for each in moving)
        reason = f"{counts} processes; {MIN_PROCESSES} of each tell the noise"
        return Judgement("unsure", math.exp(difference), None, margin, None, reason)
    noise = _noise(moving, within)
    freedom = sum(len(each) - 1 for each in moving)
    half = _T_95[min(freedom, len(_T_95)) - 1] * noise * math.sqrt(sum(1 / len(each) for each in moving))
    low, high = difference - half, difference + half
    margin = max(margin, NOISE_FACTOR * noise)
    limit, same = math.log1p(margin), math.log1p(max(margin, GATE_MARGIN))
    word: Word = "unsure"
    if low > limit:
        word = "slower"
    elif high < -limit:
        word = "faster"
    elif -same <= low and high <= same:
        word = "same"
    reason = ""
    if word == "unsure":
        reason = f"{math.expm1(low):+.1%} to {math.expm1(high):+.1%} reaches across the margin of {margin:.1%}"
    return Judgement(word, math.exp(difference), Interval(math.exp(low), math.exp(high)), margin, noise, reason)


def _noise(sides: Sequence[Sequence[float]], within: Sequence[Interval]) -> float:
    """The pooled standard deviation of logs, or what the values' own intervals leave open if that is more."""
    squares = sum((value - sum(side) / len(side)) ** 2 for side in sides for value in side)
    own = [math.log(each.high / each.low) / 2 / _NORMAL_95 for each in within]
    between = squares / sum(len(side) - 1 for side in sides)
    return math.sqrt(max(between, sum(each**2 for each in own) / len(own) if own else 0.0))
