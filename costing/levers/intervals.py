"""How sure a price per million tokens is: its 5th, 50th and 95th percentile, and what the width is made of.

    $/M = price x sum over ops of time_s x exp(e) / tokens,   e = log(true / said), price log-uniform over its range

Every op has one cause of error, by its provenance: a *measured* time repeats to within the noise of the tables (or of
the record's processes), an *interpolated* one has the left-out error of its table along the axes that it lies between
rows of (which contains that noise), a *modelled* one that of its kind of model. The spreads are empirical quantiles of
``calibration``; a model's may lie to one side, so the median may differ from the cost's own figure.

Errors of ops answered by one table are taken as one and the same draw (comonotone: the widest interval), those of
different tables and causes as independent; ``correlated=False`` is the other extreme. What a sum of kernels leaves out
(``OMITTED``) is in no interval.

Units: dollars per million output tokens of decode GPUs. Errors: ``ValueError``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from ...bench.decode_plan import step_tokens
from ...bench.published import INTERPOLATED, INTERPOLATED_HERE, MEASURED, MEASURED_HERE
from ..cost import StepCost, usd_per_mtok
from ..prices import PriceBook
from .calibration import LEVELS, Calibration, Spread
from .left_out import BEYOND, BORROWED, INTERPOLATION, NOISE, REPLICATED, ROOFLINE

if TYPE_CHECKING:
    import numpy as np

    from ...bench.gpus import Gpu
    from ...bench.ops import Op
    from ...bench.published import PublishedData, Stack
    from ...bench.step_time import TimedOp
    from ..prices import Price

MODEL, PRICE = "model", "price"
SHARES = (NOISE, INTERPOLATION, MODEL, PRICE)
"""What an interval's width is split into."""

MIN_SAMPLES = 100
RANGE_OF_THREE = 1.693
"""Mean range of three normal draws over their sigma (order statistics): a record's noise is a range of processes."""

_TABLE_OF_KIND = {
    "gemm": "gemm", "mla_bmm": "mla_bmm", "streaming": "mla_bmm", "moe": "moe", "attention": "generation_attention",
    "mla": "generation_mla", "mla_module": "mla_generation_module", "collective": "nccl", "all_to_all": "moe_a2a",
    "index_scores": "",
}  # fmt: skip
"""Whose spread an op without a table has. Norms and other streams: that of the smallest kernels that are published, the
absorbed projections (one launch, bound by memory). Index scores: all tables pooled."""

_TABLE_ROW = re.compile(r"(\S+) \S+ (\w+): ")
_BORROWED_ROW = re.compile(r"(?:roofline at the efficiency of )?(\S+) \S+ (\w+) at ")
_OWN_ROW = re.compile(r"tokenfab (\w+)/")


@dataclass(frozen=True)
class PriceRange:
    """Where a GPU's price lies, per GPU-hour, and who says so. Drawn log-uniform."""

    low_usd_per_gpu_hour: float
    high_usd_per_gpu_hour: float
    source: str

    def __post_init__(self) -> None:
        low, high = self.low_usd_per_gpu_hour, self.high_usd_per_gpu_hour
        if not 0 < low <= high < math.inf:
            raise ValueError(f"price_range: expected 0 < low <= high, in $/GPU-h; got {low} to {high}")


@dataclass(frozen=True)
class Percentiles:
    """5th, 50th and 95th, in dollars per million output tokens of decode GPUs."""

    p5: float
    p50: float
    p95: float


@dataclass(frozen=True)
class OpError:
    """How far one op's time may be off. ``spreads`` add up in the exponent; ``table``: with whose ops it errs alike."""

    timed: TimedOp
    cause: str
    table: str
    spreads: tuple[Spread, ...]

    def factor(self, probability: np.ndarray | float) -> np.ndarray:
        """true / said at a probability between 0 and 1."""
        import numpy as np

        return np.exp(sum(np.interp(probability, LEVELS, each.log_quantiles) for each in self.spreads))

    @property
    def basis(self) -> str:
        """What the spread was calibrated on."""
        names = (
            " ".join(filter(None, (each.cause, each.stack, each.table or "of all tables", each.axis)))
            for each in self.spreads
        )
        return " + ".join(names)


@dataclass(frozen=True)
class Part:
    """The ops of one cause and table: their share of the step's time, and of the variance of all times."""

    cause: str
    table: str
    time_share: float
    variance_share: float
    basis: str


@dataclass(frozen=True)
class CostInterval:
    """A cost with its interval.

    Attributes:
        usd_per_mtok_output: with the price drawn from ``price_range``. at_price: at the cost's own price.
        variance_share: of the variance of log $/M, by cause; sums to 1 (all 0 where nothing varies).
        parts: the kernels' share of it by table, largest first.
        calibration: version of the published data that the spreads are from.
    """

    cost: StepCost
    usd_per_mtok_output: Percentiles
    at_price: Percentiles
    variance_share: dict[str, float]
    parts: tuple[Part, ...]
    price_range: PriceRange | None
    correlated: bool
    samples: int
    seed: int
    calibration: str


def price_range_of(price: Price, book: PriceBook | None = None) -> PriceRange | None:
    """The lowest to the highest price of the GPU over the book's tiers and dates; placeholders are left out.

    None where ``price`` is not the book's (a stated one): it is then certain until a range is given.
    """
    book = book or PriceBook.read()
    if price not in book.prices:
        return None
    rows = [row for row in book.of(price.gpu) if row == price or "placeholder" not in row.note]
    low, high = (end(rows, key=lambda row: row.usd_per_gpu_hour) for end in (min, max))
    names = [f"{row.tier} of {row.date}" for row in (low, high)]
    source = f"{names[0]} to {names[1]}, of {len(rows)} prices of {price.gpu} in the book"
    return PriceRange(low.usd_per_gpu_hour, high.usd_per_gpu_hour, source)


def interval(
    cost: StepCost,
    *,
    samples: int = 100_000,
    seed: int = 0,
    price_range: tuple[float, float] | PriceRange | None = None,
    correlated: bool = True,
    data: PublishedData | None = None,
    calibration: Calibration | None = None,
) -> CostInterval:
    """The interval of a cost. Same seed, same interval.

    Args:
        price_range: (low, high) in $/GPU-h; None: the book's for its prices, none for a stated one.
        correlated: errors of ops of one table are one draw; False: every op has its own.
        data: the published tables the cost came from; None for the installed package's.
        calibration: None for the shipped one.

    Raises:
        ValueError: fewer than ``MIN_SAMPLES``, a seed below 0, a range that is none, a time without a known cause.
    """
    import numpy as np

    check_whole("samples", samples, MIN_SAMPLES)
    check_whole("seed", seed, 0)
    span = _range(cost.price, price_range)
    calibration = calibration or Calibration.read()
    errors = op_errors(cost, data, calibration)
    generator = np.random.default_rng(seed)
    price = np.full(samples, cost.price.usd_per_gpu_hour)
    if span is not None:
        low, high = math.log(span.low_usd_per_gpu_hour), math.log(span.high_usd_per_gpu_hour)
        price = np.exp(generator.uniform(low, high, samples))

    groups: dict[tuple[str, ...], list[OpError]] = defaultdict(list)
    for index, error in enumerate(errors):
        groups[error.cause, error.table, "" if correlated else str(index)].append(error)
    total_s = np.zeros(samples)
    variance: dict[tuple[str, str], float] = defaultdict(float)
    for key, members in groups.items():
        group_s, draw = np.zeros(samples), generator.random(samples)
        by_spread: dict[tuple[Spread, ...], list[OpError]] = defaultdict(list)
        for error in members:
            by_spread[error.spreads].append(error)
        for alike in by_spread.values():
            group_s += sum(error.timed.time_s for error in alike) * alike[0].factor(draw)
        total_s += group_s
        variance[key[0], key[1]] += float(np.var(group_s))

    per_s = 1e6 / (3600 * step_tokens(cost.step.deployment)[0])
    of_times = float(np.var(np.log(total_s)))
    of_price = float(np.var(np.log(price)))
    return CostInterval(
        cost,
        percentiles(price * total_s * per_s),
        percentiles(cost.price.usd_per_gpu_hour * total_s * per_s),
        _shares(variance, of_times, of_price),
        _parts(errors, variance, cost.step.step_s),
        span,
        correlated,
        samples,
        seed,
        calibration.version,
    )


def check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}; got {value!r}")


def _range(price: Price, given: tuple[float, float] | PriceRange | None) -> PriceRange | None:
    if isinstance(given, PriceRange):
        return given
    return price_range_of(price) if given is None else PriceRange(*given, "given")


def percentiles(values: np.ndarray) -> Percentiles:
    import numpy as np

    return Percentiles(*(float(value) for value in np.quantile(values, (0.05, 0.5, 0.95))))


def _shares(variance: dict[tuple[str, str], float], of_times: float, of_price: float) -> dict[str, float]:
    """Independent draws: variances of a sum add up, and so do those of the logs of a product."""
    shares: dict[str, float] = dict.fromkeys(SHARES, 0.0)
    total, seconds = of_times + of_price, sum(variance.values())
    if total <= 0:
        return shares
    shares[PRICE] = of_price / total
    for (cause, _), each in variance.items() if seconds else ():
        shares[cause] += of_times / total * each / seconds
    return shares


def _parts(errors: list[OpError], variance: dict[tuple[str, str], float], step_s: float) -> tuple[Part, ...]:
    total = sum(variance.values())
    parts = []
    for (cause, table), each in variance.items():
        members = [error for error in errors if (error.cause, error.table) == (cause, table)]
        time_s = sum(error.timed.time_s for error in members)
        basis = "; ".join(dict.fromkeys(error.basis for error in members))
        parts.append(Part(cause, table, time_s / step_s, each / total if total else 0.0, basis))
    return tuple(sorted(parts, key=lambda part: -part.variance_share))


# -- what each op's error is ---------------------------------------------------------------------


def op_errors(
    cost: StepCost, data: PublishedData | None = None, calibration: Calibration | None = None
) -> list[OpError]:
    """The error of every op of a step, in the step's order.

    Raises:
        ValueError: a time whose source says nothing of how it was made.
    """
    from ...bench.published import PublishedData

    calibration = calibration or Calibration.read()
    data = data or PublishedData()
    step = cost.step
    stack = getattr(step.stack, "rest", None) or step.stack
    return [_op_error(timed, step.gpu, stack, data, calibration) for timed in step.ops]


def _op_error(timed: TimedOp, gpu: Gpu, stack: Stack, data: PublishedData, calibration: Calibration) -> OpError:
    source, op = timed.source, timed.call.op
    own = _OWN_ROW.match(source)
    if own is not None:
        return _own_error(timed, own[1], calibration)
    if source.startswith("roofline / "):
        table = _TABLE_OF_KIND[op.kind]
        return OpError(timed, MODEL, f"roofline {op.kind}", (calibration.find(ROOFLINE, stack.name, table),))
    row = _TABLE_ROW.match(source)
    borrowed = None if row else _BORROWED_ROW.match(source)
    if borrowed is not None:
        return OpError(timed, MODEL, borrowed[2], (calibration.find(BORROWED, borrowed[1], borrowed[2]),))
    if row is None:
        raise ValueError(f"source: expected a table's row, a borrowed shape or a roofline; got {source!r}")
    name, table = row[1], row[2]
    if timed.provenance == MEASURED:
        return OpError(timed, NOISE, table, (calibration.find(NOISE, name, table),))
    if timed.provenance == INTERPOLATED:
        axes = _between(op, gpu, stack, data, table)
        return OpError(
            timed, INTERPOLATION, table, tuple(calibration.find(INTERPOLATION, name, table, a) for a in axes)
        )
    return OpError(timed, MODEL, table, _model_spreads(timed, name, table, calibration))


def _model_spreads(timed: TimedOp, stack: str, table: str, calibration: Calibration) -> tuple[Spread, ...]:
    """Of a row that only models the op: it ran more than the op does, or lies before it, or both."""
    spreads = []
    if "ran all of the group's tokens" in timed.source:
        ep = getattr(timed.call.op, "ep", 1)
        spreads.append(calibration.find(REPLICATED, "sglang", "moe", f"ep{ep:g}"))
    if "efficiency of the last row" in timed.source:
        spreads.append(calibration.find(BEYOND, stack, table))
    if "ran one query token" in timed.source:  # as from another shape, by the floors' ratio
        spreads.append(calibration.find(BORROWED, stack, table))
    if not spreads:
        raise ValueError(f"source: expected why the row is only a model; got {timed.source!r}")
    return tuple(spreads)


def _between(op: Op, gpu: Gpu, stack: Stack, data: PublishedData, table: str) -> tuple[str, ...]:
    """The axes of ``table`` that have no row at the op's own value; ("",) where that cannot be told."""
    from ...bench.published_tables import queries

    for query in queries(op, gpu, stack.name):
        for part in filter(None, (query, query.plus)):
            for _, path in data.files(gpu, stack, part.table) if part.table.name == table else ():
                grid = data.rows(path, part.table).grid((*part.exact, *part.near))
                if grid is None:
                    continue
                columns = zip(part.table.axes, part.axes, grid.axes, strict=True)
                off = tuple(name for name, value, axis in columns if value not in axis)
                if off:
                    return off
                break
    return ("",)


def _own_error(timed: TimedOp, op: str, calibration: Calibration) -> OpError:
    """Of tokenfab's records: the spread of their processes; between and beyond rows, that of published tables."""
    table = {"moe": "moe", "gemm": "gemm", "attention": "generation_attention", "mla": "generation_mla"}.get(op, "")
    name = f"tokenfab {op}"
    if timed.provenance == MEASURED_HERE:
        noise = re.search(r"noise ([\d.]+)%", timed.source)
        spread = process_spread(op, float(noise[1]) / 100) if noise else calibration.find(NOISE, "", table)
        return OpError(timed, NOISE, name, (spread,))
    if timed.provenance == INTERPOLATED_HERE:
        return OpError(timed, INTERPOLATION, name, (calibration.find(INTERPOLATION, "", table),))
    return OpError(timed, MODEL, name, _model_spreads(timed, "", table, calibration))


def process_spread(op: str, noise: float) -> Spread:
    """A record's noise, (max - min) / median of its processes, as a normal spread of the log of its time.

    sigma = noise / 1.693: the range of three; with more processes sigma is smaller still.
    """
    normal = NormalDist(0, noise / RANGE_OF_THREE) if noise > 0 else None
    values = tuple(normal.inv_cdf(level) if normal else 0.0 for level in LEVELS)
    return Spread(NOISE, "tokenfab", op, "processes", 0, values)


def at_probability(cost: StepCost, errors: list[OpError], probability: float) -> float:
    """$/M with ``errors`` at one probability together and all other ops as said."""
    changed_s = sum(error.timed.time_s * (float(error.factor(probability)) - 1) for error in errors)
    tokens = step_tokens(cost.step.deployment)[0]
    return usd_per_mtok(tokens / (cost.step.step_s + changed_s), cost.price.usd_per_gpu_hour)
