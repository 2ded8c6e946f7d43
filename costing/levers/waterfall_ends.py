"""The two ends of a waterfall: the cheapest point of each side at an interactivity, and their ratio over it.

Equal interactivity: on both sides the cheapest of all points (stack, precision, split, batch) that give a user at least
so many tokens per second. A side that has none there says so: a ratio against nothing is no number. Points with more
of their time modelled than ``max_modelled`` do not count, as in ``tokenfab cost``.

Units: dollars per million output tokens, tokens/s/user. Errors: ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...bench.deployment import Precision
from ...bench.gpus import Gpu, get_gpu
from ...bench.memory import largest_batch
from ...bench.model_config import ModelConfig
from ..prices import Price, price_lookup
from ..study import choose_precision
from ..sweep import DEFAULT_MAX_MODELLED, DEFAULT_PARALLEL, DEFAULT_STACKS, Parallel
from .waterfall import Impossible, Point, Priced, Pricer

SEARCHED_PARALLEL = (*DEFAULT_PARALLEL, "dp64-ep64")
SEARCHED_SEQUENCES = (
    1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
)  # fmt: skip
"""Sequences of one attention group that are tried, where no batch is given."""


@dataclass(frozen=True)
class Side:
    """What is known of one side. ``stacks``, ``precisions``, ``parallels``: each is tried.

    ``batch_per_gpu``: None tries ``SEARCHED_SEQUENCES`` up to what fits.
    """

    gpu: Gpu
    price: Price
    precisions: tuple[Precision, ...]
    stacks: tuple[str, ...] = DEFAULT_STACKS
    parallels: tuple[Parallel, ...] = tuple(Parallel.parse(text) for text in SEARCHED_PARALLEL)
    batch_per_gpu: float | None = None
    context: int = 4096
    drafts: int = 0
    acceptance_length: float = 1.0
    load: str = "balanced"

    def __len__(self) -> int:
        return len(self.precisions) * len(self.stacks) * len(self.parallels)

    def points(self) -> Iterator[Point]:
        """One point per (precision, stack, split), at one sequence per attention group or the given batch."""
        for precision in self.precisions:
            for stack in self.stacks:
                for parallel in self.parallels:
                    batch = self.batch_per_gpu or 1 / parallel.attention_tp
                    yield Point(
                        self.gpu, stack, self.price, precision, parallel, batch, self.context, self.drafts,
                        self.acceptance_length, self.load,
                    )  # fmt: skip


def make_side(
    model: ModelConfig, name: str, gpu: str, *, stack: Sequence[str] | None, precision: Sequence[str] | None,
    kv_format: Sequence[str] | None, parallel: Sequence[str] | None, batch: float | None, drafts: int,
    acceptance: float | None, tier: str, book: str | None, usd_per_gpu_hour: float | None,
    price_file: Path | None, context: int, load: str,
) -> Side:  # fmt: skip
    """A side from names; None means the default of that option. ``name``: "from" or "to", for messages.

    Raises:
        ValueError: an unknown name, a missing price, drafts without an acceptance length.
    """
    if drafts and acceptance is None:
        raise ValueError(f"{name}_acceptance: expected the tokens kept per step with {name}_drafts {drafts}; got none")
    found = get_gpu(gpu)
    precisions = tuple(
        dict.fromkeys(choose_precision(model, each, kv) for each in precision or (None,) for kv in kv_format or (None,))
    )
    side = Side(
        found, price_lookup(usd_per_gpu_hour, tier, book, price_file)(found.name), precisions,
        tuple(stack or DEFAULT_STACKS), batch_per_gpu=batch, context=context, drafts=drafts,
        acceptance_length=acceptance or 1.0, load=load,
    )  # fmt: skip
    return replace(side, parallels=tuple(Parallel.parse(each) for each in parallel)) if parallel else side


@dataclass(frozen=True)
class Found:
    """All points of a side that can be, and why others cannot."""

    side: Side
    points: tuple[Priced, ...]
    reasons: tuple[str, ...]


def find_points(pricer: Pricer, side: Side, advance: Callable[[int, str], None] = lambda of, what: None) -> Found:
    """Prices every point of a side. ``advance(of, what)`` before each (precision, stack, split).

    Raises:
        ValueError: none can be; says why the first cannot.
    """
    points: list[Priced] = []
    reasons: dict[str, None] = {}
    for first in side.points():
        advance(len(side), f"{first.gpu.name} {first.stack} {first.parallel}")
        try:
            points += _batches(pricer, side, first)
        except ValueError as error:
            reasons[f"{first.parallel}: {error}"] = None
    if not points:
        raise ValueError(f"{side.gpu.name}: no point can be: {next(iter(reasons), 'nothing to try')}")
    return Found(side, tuple(points), tuple(reasons))


def _batches(pricer: Pricer, side: Side, first: Point) -> list[Priced]:
    if side.batch_per_gpu is not None:
        return [pricer(first)]
    pricer(first)  # says why where not even one sequence can be
    most = largest_batch(pricer.model, side.gpu, first.deployment())
    found = []
    for sequences in SEARCHED_SEQUENCES:
        if sequences <= most:
            try:
                found.append(pricer(replace(first, batch_per_gpu=sequences / first.parallel.attention_tp)))
            except Impossible:
                break  # by rounding of the largest batch
    return found


def cheapest(
    found: Found, min_tokens_per_s_per_user: float = 0.0, max_modelled: float = DEFAULT_MAX_MODELLED
) -> Priced | None:
    """The cheapest point that is fast enough and known well enough; None without one."""
    fit = [
        point
        for point in found.points
        if point.tokens_per_s_per_user >= min_tokens_per_s_per_user and point.coverage()["modelled"] <= max_modelled
    ]
    return min(fit, key=lambda point: point.usd_per_mtok, default=None)


def _need_cheapest(found: Found, min_tokens_per_s_per_user: float, max_modelled: float) -> Priced:
    """As ``cheapest``.

    Raises:
        ValueError: none; says how fast the side can be.
    """
    best = cheapest(found, min_tokens_per_s_per_user, max_modelled)
    if best is not None:
        return best
    known = [point for point in found.points if point.coverage()["modelled"] <= max_modelled]
    if not known:
        raise ValueError(
            f"max_modelled: expected a share that some point of {found.side.gpu.name} keeps; got {max_modelled:g}, and "
            f"the best known has {min(point.coverage()['modelled'] for point in found.points):.0%} modelled"
        )
    fastest = max(point.tokens_per_s_per_user for point in known)
    raise ValueError(
        f"min_tokens_per_s_per_user: expected at most the {fastest:.1f} that {found.side.gpu.name} reaches; got "
        f"{min_tokens_per_s_per_user:g}"
    )


def chosen_ends(
    found: Sequence[Found], limits: Sequence[float], max_modelled: float
) -> tuple[list[Priced], tuple[float | None, ...]]:
    """The cheapest point of each side at its limit in tokens/s/user. A side whose batch is given has no limit (None).

    Raises:
        ValueError: a limit below 0, a share outside 0 to 1, a side without such a point.
    """
    check_limits(limits)
    check_share(max_modelled)
    own = tuple(
        None if each.side.batch_per_gpu is not None else limit for each, limit in zip(found, limits, strict=True)
    )  # fmt: skip
    return [_need_cheapest(each, limit or 0.0, max_modelled) for each, limit in zip(found, own, strict=True)], own


def check_share(max_modelled: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: not between 0 and 1.
    """
    if not 0 <= max_modelled <= 1:
        raise ValueError(f"max_modelled: expected a share of 0 to 1; got {max_modelled}")


@dataclass(frozen=True)
class Ratio:
    """Both sides at an interactivity of their own. A side is None where it has no point so fast."""

    min_before: float
    min_after: float
    before: Priced | None
    after: Priced | None

    @property
    def factor(self) -> float | None:
        """How many times cheaper a token is after."""
        if self.before is None or self.after is None:
            return None
        return self.before.usd_per_mtok / self.after.usd_per_mtok

    @property
    def throughput(self) -> float | None:
        """How many times more tokens/s one GPU gives after."""
        if self.before is None or self.after is None:
            return None
        return self.after.tokens_per_s_per_gpu / self.before.tokens_per_s_per_gpu


def check_limits(limits: Sequence[float]) -> tuple[float, ...]:
    """Limits in tokens/s/user.

    Raises:
        ValueError: none, or one that is not a number of 0 or more.
    """
    if not limits:
        raise ValueError("tokens_per_s_per_user: expected some limits; got none")
    for limit in limits:
        if not (math.isfinite(limit) and limit >= 0):
            raise ValueError(f"tokens_per_s_per_user: expected limits of 0 or more; got {limit}")
    return tuple(limits)


def ratios(before: Found, after: Found, limits: Sequence[float], max_modelled: float) -> list[Ratio]:
    """Same interactivity on both sides, one row per limit."""
    check_share(max_modelled)
    return [
        Ratio(limit, limit, cheapest(before, limit, max_modelled), cheapest(after, limit, max_modelled))
        for limit in check_limits(limits)
    ]


def mismatched(before: Found, after: Found, limits: Sequence[float], max_modelled: float) -> list[list[Ratio]]:
    """Every interactivity of one side against every one of the other: a row per limit of ``before``."""
    limits = check_limits(limits)
    sides = [(cheapest(before, limit, max_modelled), cheapest(after, limit, max_modelled)) for limit in limits]
    return [
        [Ratio(limits[row], limits[column], sides[row][0], sides[column][1]) for column in range(len(limits))]
        for row in range(len(limits))
    ]
