"""How much slower than usual this machine is right now: what a limit of seconds is multiplied by.

A shared host may run at a third of its pace for minutes; a limit that a quiet machine meets says nothing of code then.
"""

from __future__ import annotations

import statistics
import time

USUAL_S = 0.25
"""The loop below, on an undisturbed core of 2 to 3 GHz with CPython 3.11."""


def slowness() -> float:
    """1 on a machine that is as fast as usual, or faster; 2 on one at half that pace."""
    return max(1.0, statistics.median(_loop_s() for _ in range(5)) / USUAL_S)


def _loop_s() -> float:
    start, total = time.perf_counter(), 0
    for number in range(3_000_000):
        total += number * number
    assert total > 0
    return time.perf_counter() - start
