"""The batch beyond which drafts cost more, found by looking at every batch that fits.

Units: sequences per GPU in a result, whole sequences per attention group in the search.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

EVERY = 512
"""Up to so many sequences per attention group the break-even is looked for one by one."""


@dataclass(frozen=True)
class BreakEven:
    """Beyond which batch a number of drafts costs more.

    Attributes:
        batch_per_gpu: the largest batch at which drafts cost no more, where all beyond that fit cost more; None where
            drafts cost no more at the largest that fits, or more at every one.
        first_dearer_per_gpu: the smallest batch at which drafts cost more; None where there is none.
        largest_batch_per_gpu: the most that fits with drafts.
        crossings: how often the cheaper side changes over the batches looked at; more than one: tables have steps.
    """

    drafts: int
    batch_per_gpu: float | None
    first_dearer_per_gpu: float | None
    largest_batch_per_gpu: float
    crossings: int

    @property
    def is_never_dearer(self) -> bool:
        """Whether drafts cost no more at every batch that fits."""
        return self.first_dearer_per_gpu is None

    def describe(self) -> str:
        drafts = f"{self.drafts} draft" + ("s" if self.drafts > 1 else "")
        most = f"{self.largest_batch_per_gpu:g} sequences/GPU"
        if self.first_dearer_per_gpu is None:
            return f"{drafts}: never cost more within what fits, {most}"
        if self.crossings == 0:
            return f"{drafts}: cost more at every batch that fits, {most} at most"
        if self.batch_per_gpu is None:
            return f"{drafts}: cost more in places from {self.first_dearer_per_gpu:g} on, but not at what fits, {most}"
        more = f" (and in places from {self.first_dearer_per_gpu:g} on)" if self.crossings > 1 else ""
        return f"{drafts}: cost more beyond {self.batch_per_gpu:g} sequences/GPU{more}"


def ladder(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    steps = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return steps if steps and steps[-1] == most else [*steps, most]


def _scanned(most: int) -> list[int]:
    """Every whole number up to ``EVERY``, then steps of 2 %, and ``most``."""
    steps = list(range(1, min(most, EVERY) + 1))
    while steps[-1] < most:
        steps.append(min(most, steps[-1] + steps[-1] // 50))
    return steps


def last_false(are_true: Callable[[list[int]], list[bool]], most: int) -> tuple[int, int, int]:
    """(the last whole number up to ``most`` of which ``are_true`` says no, the first of which yes, changes seen).

    0 for a number that is not there. Exact up to ``EVERY``; beyond, the last is where there is one change in the gap
    after the last no among the numbers looked at, and the first is one of those.
    """
    steps = _scanned(most)
    seen = are_true(steps)
    first = steps[seen.index(True)] if any(seen) else 0
    crossings = sum(before != after for before, after in itertools.pairwise(seen))
    if all(seen):
        return 0, first, crossings
    place = len(seen) - 1 - seen[::-1].index(False)
    if place == len(seen) - 1:
        return most, first, crossings
    low, high = steps[place], steps[place + 1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if are_true([middle])[0] else (middle, high)
    return low, first, crossings
