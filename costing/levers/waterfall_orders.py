"""How soft a waterfall's attribution is: one change's factor over all orders in which the changes can be made.

    average = exp(mean over orders of log factor)       (the Shapley value of log $/M: averages multiply to the total)

Two changes that help each other credit whichever comes last. With n changes there are 2^n points and n! orders: every
point is priced once, and the mean weighs each change of each point by the number of orders through it. Orders through
a point that cannot be (FP4 before a GPU that has it) are no orders, and are counted.

Units: factors of dollars per million output tokens. Errors: ``ValueError``; ``Impossible`` where no order can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .waterfall import Waterfall, changed, changed_groups, waterfall
from .waterfall_point import GROUPS, Impossible, Point, Priced, Pricer

MAX_CHANGES = 10

Order = tuple[tuple[str, ...], ...]
"""Changes one after the other, each of one group or of several at once."""


@dataclass(frozen=True)
class Softness:
    """One change's factor: in the order shown, on average over all orders, and the least and most of any."""

    name: str
    shown: float
    average: float
    least: float
    most: float


@dataclass(frozen=True)
class Orders:
    """``possible`` of ``all`` orders can be; ``points`` were priced, ``impossible`` says why others were not."""

    possible: int
    all: int
    points: int
    softness: tuple[Softness, ...]
    impossible: tuple[str, ...]


def parse_order(text: str | None, start: Point, end: Point) -> Order:
    """``"price,gpu,precision+batch"``: those first, in that order (``+``: at once); the rest in the default order.

    Raises:
        ValueError: a name that is unknown, does not change between the two points, or comes twice.
    """
    differ = changed_groups(start, end)
    steps = [tuple(part.strip() for part in step.split("+")) for step in (text.split(",") if text else ())]
    seen: list[str] = []
    for name in (name for step in steps for name in step):
        if name not in GROUPS:
            raise ValueError(f"order: expected some of {', '.join(GROUPS)}; got {name!r}")
        if name not in differ:
            raise ValueError(f"order: expected what changes ({', '.join(differ) or 'nothing does'}); got {name!r}")
        if name in seen:
            raise ValueError(f"order: expected every name once; got {name!r} twice")
        seen.append(name)
    return (*steps, *((name,) for name in differ if name not in seen))


@dataclass(frozen=True)
class _Lattice:
    """All points between two: ``at(mask)`` has made the changes of the bits of ``mask``; None where it cannot be."""

    pricer: Pricer
    start: Point
    end: Point
    steps: Order
    found: dict[int, Priced | str]

    @property
    def full(self) -> int:
        return 2 ** len(self.steps) - 1

    def at(self, mask: int) -> Priced | None:
        if mask not in self.found:
            groups = [group for bit, step in enumerate(self.steps) if mask >> bit & 1 for group in step]
            try:
                self.found[mask] = self.pricer(changed(self.start, self.end, groups))
            except Impossible as error:
                names = " + ".join(groups) or "the start"
                self.found[mask] = f"{names}: {error}"
        found = self.found[mask]
        return None if isinstance(found, str) else found

    def next_masks(self, mask: int) -> list[tuple[int, int]]:
        """(bit, mask with it) of the changes not made yet."""
        return [(bit, mask | 1 << bit) for bit in range(len(self.steps)) if not mask >> bit & 1]


def possible_order(pricer: Pricer, start: Point, end: Point, wanted: Order) -> Order | None:
    """``wanted`` if every point on its way can be; else the first that can, earlier changes of ``wanted`` first."""
    lattice = _Lattice(pricer, start, end, wanted, {})
    dead: set[int] = set()

    def rest(mask: int) -> list[int] | None:
        if mask == lattice.full:
            return []
        for bit, after in lattice.next_masks(mask):
            if after not in dead and lattice.at(after) is not None:
                found = rest(after)
                if found is not None:
                    return [bit, *found]
        dead.add(mask)
        return None

    found = rest(0)
    return None if found is None else tuple(wanted[bit] for bit in found)


def ordered_waterfall(pricer: Pricer, start: Point, end: Point, order: str | None = None) -> Waterfall:
    """The waterfall in the asked order; in the default one, or the nearest to it that can be, where none is asked.

    Raises:
        Impossible: an asked order through a point that cannot be (names one that works), or no order at all.
        ValueError: an order of unknown names.
    """
    wanted = parse_order(order, start, end)
    _check_number(wanted)
    for each in (start, end):
        pricer(each)
    if (start.request is None) != (end.request is None):
        return waterfall(pricer, start, end, wanted)  # refuses them
    works = possible_order(pricer, start, end, wanted)
    if works == wanted:
        return waterfall(pricer, start, end, wanted)
    try:
        waterfall(pricer, start, end, wanted)
    except Impossible as error:
        if works is None:
            raise Impossible(
                f"order: no order of {order_text(wanted)} can be; the first fails at {error}. Make some of the changes "
                f"at once, as in --order {'+'.join(name for step in wanted for name in step)}"
            ) from None
        if order is not None:
            raise Impossible(f"order: {error}. An order that can be: {order_text(works)}") from None
    assert works is not None
    return waterfall(pricer, start, end, works)


def order_text(order: Sequence[Sequence[str]]) -> str:
    """As ``parse_order`` reads it."""
    return ",".join("+".join(step) for step in order)


def _check_number(order: Order) -> None:
    if len(order) > MAX_CHANGES:
        raise ValueError(f"order: expected at most {MAX_CHANGES} changes; got {len(order)}")


def all_orders(pricer: Pricer, shown: Waterfall, advance: Callable[[int, int], None] = lambda done, of: None) -> Orders:
    """Every change's factor over all orders that can be. ``advance(done, of)`` after each point.

    Raises:
        ValueError: too many changes.
    """
    steps = shown.order
    _check_number(steps)
    lattice = _Lattice(pricer, shown.start.point, shown.end.point, steps, {})
    number = lattice.full + 1
    usd: list[float | None] = []
    for mask in range(number):
        point = lattice.at(mask)
        usd.append(None if point is None else point.usd_per_mtok)
        advance(mask + 1, number)
    to, back = _ways(lattice, usd)
    possible = to[lattice.full]
    logs, least, most = [0.0] * len(steps), [math.inf] * len(steps), [-math.inf] * len(steps)
    for mask in range(number):
        for bit, after in lattice.next_masks(mask):
            through = to[mask] * back[after]
            if not through:
                continue
            before_usd, after_usd = usd[mask], usd[after]
            assert before_usd is not None
            assert after_usd is not None
            factor = after_usd / before_usd
            logs[bit] += through / possible * math.log(factor)
            least[bit], most[bit] = min(least[bit], factor), max(most[bit], factor)
    softness = tuple(
        Softness("+".join(step), _shown(shown, index), math.exp(logs[index]), least[index], most[index])
        for index, step in enumerate(steps)
    )
    impossible = tuple(found for found in lattice.found.values() if isinstance(found, str))
    return Orders(possible, math.factorial(len(steps)), number - len(impossible), softness, impossible)


def _ways(lattice: _Lattice, usd: Sequence[float | None]) -> tuple[list[int], list[int]]:
    """Of every point, the number of orders from the start to it, and from it to the end."""
    number = lattice.full + 1
    to, back = [0] * number, [0] * number
    to[0] = back[lattice.full] = 1
    for mask in range(number):  # a change sets a bit: every point comes after those it is reached from
        for _, after in lattice.next_masks(mask):
            if usd[after] is not None:
                to[after] += to[mask]
    for mask in reversed(range(number)):
        if usd[mask] is not None:
            back[mask] += sum(back[after] for _, after in lattice.next_masks(mask))
    return to, back


def _shown(shown: Waterfall, index: int) -> float:
    before = shown.points[index - 1] if index else shown.start
    return shown.points[index].usd_per_mtok / before.usd_per_mtok
