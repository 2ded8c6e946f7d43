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
from ..workload.serving import Request
from .acceptance import get_acceptance
from .speculative import MTP
from .waterfall_point import Impossible, Point, Priced, Pricer

SEARCHED_PARALLEL = (*DEFAULT_PARALLEL, "dp64-ep64")
DEFAULT_CONTEXT = 4096
AGGREGATED, DISAGGREGATED = SERVINGS = ("aggregated", "disaggregated")
SEARCHED_SEQUENCES = (
    1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
)  # fmt: skip
"""Sequences of one attention group that are tried, where no batch is given."""


@dataclass(frozen=True)
class Side:
    """What is known of one side. ``stacks``, ``precisions``, ``parallels``: each is tried.

    ``batch_per_gpu``: None tries ``SEARCHED_SEQUENCES`` up to what fits. ``prefill_parallels``: splits of GPUs that
    only prefill, of which the cheapest is taken; none: the same GPUs do both. The rest as in ``Point``.
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
    acceptance_source: str = ""
    drafter: str = MTP
    load: str = "balanced"
    request: Request | None = None
    prefill_parallels: tuple[Parallel, ...] = ()

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
                        self.acceptance_length, self.acceptance_source, self.drafter, self.load, self.request,
                    )  # fmt: skip


def make_side(
    model: ModelConfig, name: str, gpu: str, *, stack: Sequence[str] | None, precision: Sequence[str] | None,
    kv_format: Sequence[str] | None, parallel: Sequence[str] | None, batch: float | None, drafts: int,
    acceptance: str | None, drafter: str, tier: str, book: str | None, usd_per_gpu_hour: float | None,
    price_file: Path | None, context: int | None, load: str, request: Request | None, serving: str,
    prefill_parallel: Sequence[str] | None,
) -> Side:  # fmt: skip
    """A side from names; None means the default of that option. ``name``: "from" or "to", for messages.

    ``acceptance``: a number or a row of ``acceptance.MEASURED``. ``context``: None is that of the request, or 4096.

    Raises:
        ValueError: an unknown name, a missing price, drafts without an acceptance length, GPUs that prefill without a
            request.
    """
    length, source = _acceptance(name, drafts, acceptance)
    found = get_gpu(gpu)
    precisions = tuple(
        dict.fromkeys(choose_precision(model, each, kv) for each in precision or (None,) for kv in kv_format or (None,))
    )
    if serving not in SERVINGS:
        raise ValueError(f"{name}_serving: expected {' or '.join(SERVINGS)}; got {serving!r}")
    is_apart = serving == DISAGGREGATED
    if prefill_parallel and not is_apart:
        raise ValueError(f"{name}_prefill_parallel: expected {name}_serving {DISAGGREGATED} with it; got {serving}")
    if is_apart and request is None:
        raise ValueError(f"{name}_serving: expected input and output tokens with {DISAGGREGATED}; got none")
    splits = _parallels(prefill_parallel or SEARCHED_PARALLEL)
    price = price_lookup(usd_per_gpu_hour, tier, book, price_file)(found.name)
    return Side(
        found, price, precisions, tuple(stack or DEFAULT_STACKS), _parallels(parallel or SEARCHED_PARALLEL), batch,
        context or (request.context if request else DEFAULT_CONTEXT), drafts, length, source, drafter, load, request,
        splits if is_apart else (),
    )  # fmt: skip


def make_request(input_tokens: int | None, cached_tokens: int, output_tokens: int | None) -> Request | None:
    """A request's lengths; None where none are stated.

    Raises:
        ValueError: one of input and output without the other, or lengths that cannot be.
    """
    if input_tokens is None and output_tokens is None:
        if cached_tokens:
            raise ValueError(f"input_tokens: expected them with cached_tokens {cached_tokens}; got none")
        return None
    if input_tokens is None or output_tokens is None:
        missing = "input_tokens" if input_tokens is None else "output_tokens"
        raise ValueError(f"{missing}: expected both input and output tokens; got none")
    return Request(input_tokens, cached_tokens, output_tokens)


def _parallels(texts: Sequence[str]) -> tuple[Parallel, ...]:
    return tuple(Parallel.parse(text) for text in texts)


def _acceptance(name: str, drafts: int, acceptance: str | None) -> tuple[float, str]:
    """(tokens kept per step, who says so)."""
    if acceptance is None:
        if drafts:
            raise ValueError(
                f"{name}_acceptance: expected the tokens kept per step with {name}_drafts {drafts}; got none"
            )
        return 1.0, ""
    try:
        return float(acceptance), "stated"
    except ValueError:
        row = get_acceptance(acceptance)
        return row.kept_tokens(drafts), row.describe()


@dataclass(frozen=True)
class Found:
    """All points of a side that can be, and why others cannot."""

    side: Side
    points: tuple[Priced, ...]
    reasons: tuple[str, ...]


def find_points(
    pricer: Pricer,
    side: Side,
    max_modelled: float = DEFAULT_MAX_MODELLED,
    advance: Callable[[int, str], None] = lambda of, what: None,
) -> Found:
    """Prices every point of a side. ``advance(of, what)`` before each (precision, stack, split).

    ``max_modelled``: for the split that prefills, as for the points.

    Raises:
        ValueError: none can be; says why the first cannot.
    """
    points: list[Priced] = []
    reasons: dict[str, None] = {}
    splits: dict[tuple[str, str], Parallel] = {}
    for first in side.points():
        advance(len(side), f"{first.gpu.name} {first.stack} {first.parallel}")
        try:
            if side.prefill_parallels:
                key = (first.stack, first.precision.name)
                splits[key] = splits.get(key) or _prefill_split(pricer, side, first, max_modelled)
                first = replace(first, prefill_parallel=splits[key])
            points += _batches(pricer, side, first)
        except ValueError as error:
            reasons[f"{first.parallel}: {error}"] = None
    if not points:
        raise ValueError(f"{side.gpu.name}: no point can be: {next(iter(reasons), 'nothing to try')}")
    return Found(side, tuple(points), tuple(reasons))


def _prefill_split(pricer: Pricer, side: Side, point: Point, max_modelled: float) -> Parallel:
    """The split that takes the fewest GPU-seconds per prompt, of those known well enough where there are any."""
    found: list[tuple[bool, float, int]] = []
    first_reason = ""
    for index, split in enumerate(side.prefill_parallels):
        try:
            passed = pricer.prefill(point, split)
        except Impossible as error:
            first_reason = first_reason or f"{split}: {error}"
            continue
        is_unknown = passed.coverage().get("modelled", 0.0) > max_modelled
        found.append((is_unknown, passed.gpu_s, index))
    if not found:
        raise Impossible(f"prefill_parallel: {first_reason}")
    return side.prefill_parallels[min(found)[2]]


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
        if point.tokens_per_s_per_user >= min_tokens_per_s_per_user and point.coverage["modelled"] <= max_modelled
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
    known = [point for point in found.points if point.coverage["modelled"] <= max_modelled]
    if not known:
        raise ValueError(
            f"max_modelled: expected a share that some point of {found.side.gpu.name} keeps; got {max_modelled:g}, and "
            f"the best known has {min(point.coverage['modelled'] for point in found.points):.0%} modelled"
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
