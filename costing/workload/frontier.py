"""Cost against interactivity: for every speed that users may be promised, the cheapest deployment and what binds it.

A point is what is cheapest from its limit of tokens/s/user up to what it reaches: between the two nothing else is
cheaper. The next limit lies just above what the last point reaches, or at a step above the last limit, whichever is
more; the walk ends at a limit that nothing meets, and says which limits fail there. A point that another beats, or
equals, in both dollars and tokens/s/user is dropped.

Units: tokens/s/user, dollars per hour of the whole fleet. Errors: ``ValueError`` naming the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .cheapest import Choice, Search
from .deploy import Limits, Served

DEFAULT_STEP = 1.15
JUST_ABOVE = 1 + 1e-6
"""More than what floating point leaves of an exact fit."""


@dataclass(frozen=True)
class Unmet:
    """A limit of tokens/s/user that nothing meets, and the limits that fail: see ``Search.failing``."""

    min_tokens_per_s_per_user: float
    failing: tuple[str, ...]


@dataclass(frozen=True)
class FrontierPoint:
    """The cheapest from ``min_tokens_per_s_per_user`` up to what it reaches."""

    min_tokens_per_s_per_user: float
    choice: Choice

    @property
    def served(self) -> Served:
        return self.choice.served


@dataclass(frozen=True)
class Frontier:
    """Points from the slowest and cheapest to the fastest and dearest. ``limits``: all but the one that varies."""

    limits: Limits
    points: tuple[FrontierPoint, ...]
    unmet: tuple[Unmet, ...]


def undominated(points: Iterable[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """The points that no other beats or equals in both dollars and tokens/s/user, cheapest first."""
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda each: (-each.served.tokens_per_s_per_user, each.served.usd_per_hour)):
        if not kept or point.served.usd_per_hour < kept[-1].served.usd_per_hour:
            kept.append(point)
    return tuple(reversed(kept))


def frontier(
    search: Search,
    limits: Limits,
    rates: Sequence[float] | None = None,
    step: float = DEFAULT_STEP,
    advance: Callable[[str], None] = lambda what: None,
) -> Frontier:
    """Every limit of ``rates``, or a walk from none up to one that nothing meets, in steps of ``step`` or more.

    ``advance`` is called before each limit.

    Raises:
        ValueError: a rate that is not 0 or more, no rate, a step of 1 or less.
    """
    if not (math.isfinite(step) and step > 1):
        raise ValueError(f"step: expected more than 1; got {step}")
    if rates is not None and not rates:
        raise ValueError("rates: expected at least one limit of tokens/s/user; got none")
    points: list[FrontierPoint] = []
    unmet: list[Unmet] = []

    def at(rate: float) -> Choice | None:
        advance(f"at {rate:.3g} tokens/s/user")
        asked = replace(limits, min_tokens_per_s_per_user=rate)
        choice = search.choose(asked)
        if choice is None:
            unmet.append(Unmet(rate, tuple(search.failing(asked))))
        else:
            points.append(FrontierPoint(rate, choice))
        return choice

    if rates is not None:
        for rate in sorted(set(rates)):
            at(rate)
    else:
        rate = 0.0
        while (choice := at(rate)) is not None:
            reached = choice.served.tokens_per_s_per_user
            rate = max(reached * JUST_ABOVE, rate * step)
    return Frontier(limits, undominated(points), tuple(unmet))
