"""From one $/M to another, factor by factor.

    factor = $/M after one change / $/M before it;   the product of all factors = $/M at the end / $/M at the start

A ``Point`` is everything that decides a $/M. A waterfall starts at point A and makes its fields B's, group by group
(``GROUPS``), in an order: every other field is as it stands at that place. What a group is worth depends on the order
(``waterfall_orders`` says by how much), the product does not. A group whose fields are equal is a factor of exactly 1.

    $/M output tokens = $/GPU-h / 3600 x GPU-seconds per output token x 1e6

The change of GPU is split by the roofline: the ops of the point before it, each scaled by its floor on a GPU with the
new one's bandwidth, then also its matrix peaks, then also its links; what is left to the time that the new GPU's tables
give is ``kernels``: how near its roofline a GPU's kernels come. The first three are modelled.

Units: dollars per million output tokens. Errors: ``ValueError``; ``Impossible`` for a point that cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ...bench.deployment import Deployment, Precision
from ...bench.gpus import Gpu
from ...bench.step_time import StepTime, TimedOp, step_time
from ..cost import StepCost, usd_per_mtok
from ..prices import Price
from ..sweep import Parallel

if TYPE_CHECKING:
    from ...bench.model_config import ModelConfig
    from ...bench.published import PublishedData
    from ...bench.recorded import RecordedData
    from .intervals import Percentiles

GROUPS: dict[str, tuple[str, ...]] = {
    "price": ("price",),
    "gpu": ("gpu",),
    "stack": ("stack",),
    "precision": ("precision",),
    "parallel": ("parallel",),
    "drafts": ("drafts", "acceptance_length"),
    "batch": ("batch_per_gpu",),
    "context": ("context", "load"),
}
"""What changes together, in the default order: the GPU before the precision that only it has, before the split that
only its domain makes worth it; the batch at the end, where all of them have made room for it."""

BANDWIDTH, COMPUTE, LINKS, KERNELS = SPLIT = ("bandwidth", "compute", "links", "kernels")
"""What the change of GPU is split into, in this order."""


INTERVAL_SAMPLES = 20_000


class Impossible(ValueError):
    """A point of the waterfall that cannot be."""


@dataclass(frozen=True)
class Point:
    """Everything that decides a $/M.

    Attributes:
        stack: a name or NAME@VERSION. precision: with its KV format.
        parallel: how one replica's GPUs split the model.
        batch_per_gpu: sequences per GPU. context: cached tokens per sequence.
        drafts: tokens proposed per step. acceptance_length: tokens kept per step, 1 to 1 + drafts.
        load: expert load.
    """

    gpu: Gpu
    stack: str
    price: Price
    precision: Precision
    parallel: Parallel
    batch_per_gpu: float
    context: int = 4096
    drafts: int = 0
    acceptance_length: float = 1.0
    load: str = "balanced"

    def __post_init__(self) -> None:
        if self.drafts != int(self.drafts) or self.drafts < 0:
            raise ValueError(f"drafts: expected a whole number of 0 or more; got {self.drafts}")
        if not 1 <= self.acceptance_length <= 1 + self.drafts:
            raise ValueError(
                f"acceptance_length: expected 1 to {1 + self.drafts} (1 + drafts); got {self.acceptance_length}"
            )

    def deployment(self) -> Deployment:
        """As the decode plan knows it.

        Raises:
            ValueError: a batch that is no whole number of sequences, and what else a deployment refuses.
        """
        split = self.parallel
        return Deployment(
            split.gpus, split.attention_tp, split.expert_parallel, self.precision, self.batch_per_gpu, self.context,
            1 + self.drafts, self.acceptance_length, load=self.load,
            exchange="all_gather" if split.all_gather else "all_to_all",
        )  # fmt: skip

    def show(self, group: str) -> str:
        """The fields of a group for a reader."""
        if group == "price":
            return f"${self.price.usd_per_gpu_hour:g}/GPU-h ({self.price.tier}, {self.price.date})"
        if group == "gpu":
            return self.gpu.title
        if group == "stack":
            return self.stack
        if group == "precision":
            return f"{self.precision.name} (KV {self.precision.kv})"
        if group == "parallel":
            return f"{self.parallel} ({self.parallel.gpus} GPUs)"
        if group == "drafts":
            return f"{self.drafts} drafts, {self.acceptance_length:g} kept" if self.drafts else "none"
        if group == "batch":
            return f"{self.batch_per_gpu:g} sequences/GPU"
        return f"{self.context} tokens, {self.load} load"


@dataclass(frozen=True)
class Priced:
    """A point with its times and its $/M."""

    point: Point
    step: StepTime

    @property
    def cost(self) -> StepCost:
        return StepCost(self.step, self.point.price)

    @property
    def gpu_s_per_token(self) -> float:
        """GPU-seconds per output token."""
        return sum(time_s for _, time_s in self.ops())

    @property
    def usd_per_mtok(self) -> float:
        """Dollars per million output tokens."""
        return usd_per_mtok(1 / self.gpu_s_per_token, self.point.price.usd_per_gpu_hour)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return 1 / self.gpu_s_per_token

    @property
    def tokens_per_s_per_user(self) -> float:
        return self.cost.tokens_per_s_per_user

    def ops(self) -> list[tuple[TimedOp, float]]:
        """Every op with its GPU-seconds per output token."""
        kept = self.point.acceptance_length * self.point.batch_per_gpu
        return [(op, op.time_s / kept) for op in self.step.ops]

    def coverage(self) -> dict[str, float]:
        """Share of the GPU time by provenance."""
        shares: dict[str, float] = dict.fromkeys(self.step.stack.provenances, 0.0)
        ops = self.ops()
        total = sum(time_s for _, time_s in ops)
        for op, time_s in ops:
            shares[op.provenance] += time_s / total
        return shares

    def interval(self, data: PublishedData) -> Percentiles:
        """5th, 50th and 95th percentile of the $/M at this price: what the tables' errors make of it."""
        from .intervals import interval

        return interval(self.cost, samples=INTERVAL_SAMPLES, data=data).at_price

    def describe(self) -> str:
        """The operating point in full."""
        point, deployment = self.point, self.step.deployment
        drafts = f"{point.drafts} drafts, {point.acceptance_length:g} kept/step" if point.drafts else "no drafts"
        return (
            f"{self.step.model.name} on {point.gpu.title}, {self.step.stack}, {point.precision.name} "
            f"(KV {point.precision.kv}), {deployment.describe()}, {point.batch_per_gpu:g} sequences/GPU x "
            f"{point.context} tokens, {drafts}, {point.load} load"
        )


class Pricer:
    """Prices points of one model, each only once; a price changes no time."""

    def __init__(self, model: ModelConfig, data: PublishedData, recorded: RecordedData | None = None) -> None:
        from ...bench.recorded import RecordedData

        self.model, self.data, self.recorded = model, data, recorded or RecordedData()
        self._steps: dict[tuple[Any, ...], StepTime | str] = {}

    def __call__(self, point: Point) -> Priced:
        """The point priced.

        Raises:
            Impossible: it does not divide or fit, or the GPU has no such units or tables; says why.
        """
        key = tuple(getattr(point, field.name) for field in fields(point) if field.name != "price")
        found = self._steps.get(key)
        if found is None:
            found = self._steps[key] = self._time(point)
        if isinstance(found, str):
            raise Impossible(found)
        return Priced(point, found)

    def _time(self, point: Point) -> StepTime | str:
        from ...bench.recorded import find_stack

        try:
            stack = find_stack(point.gpu, point.stack, self.data, self.recorded)
            return step_time(self.data, self.model, point.gpu, stack, point.deployment())
        except ValueError as error:
            return str(error)


@dataclass(frozen=True)
class Factor:
    """One change. ``usd_before``, ``usd_after``: $/M output tokens; ``modelled``: True where it is a what-if by
    roofline. ``coverage_before``, ``coverage_after``: shares of the GPU time by provenance at both ends."""

    name: str
    change_from: str
    change_to: str
    usd_before: float
    usd_after: float
    coverage_before: Mapping[str, float]
    coverage_after: Mapping[str, float]
    modelled: bool = False

    @property
    def factor(self) -> float:
        return self.usd_after / self.usd_before


@dataclass(frozen=True)
class Waterfall:
    """From ``start`` to ``end``. ``order``: the changes, each a tuple of groups made at once.

    ``factors`` has the changes in that order, the GPU's split in four; ``points``: the point after each change of
    ``order``; ``unchanged``: groups that are equal at both ends.
    """

    start: Priced
    end: Priced
    order: tuple[tuple[str, ...], ...]
    factors: tuple[Factor, ...]
    points: tuple[Priced, ...]
    unchanged: tuple[str, ...]

    @property
    def total(self) -> float:
        """$/M at the end / $/M at the start."""
        return self.end.usd_per_mtok / self.start.usd_per_mtok

    @property
    def product(self) -> float:
        """The factors multiplied."""
        value = 1.0
        for factor in self.factors:
            value *= factor.factor
        return value


def changed_groups(start: Point, end: Point) -> tuple[str, ...]:
    """The groups in which two points differ, in the default order."""
    return tuple(
        group for group, names in GROUPS.items() if any(getattr(start, n) != getattr(end, n) for n in names)
    )  # fmt: skip


def changed(point: Point, end: Point, groups: Sequence[str]) -> Point:
    """``point`` with the fields of ``groups`` as in ``end``."""
    return replace(point, **{name: getattr(end, name) for group in groups for name in GROUPS[group]})


def waterfall(pricer: Pricer, start: Point, end: Point, order: Sequence[Sequence[str]]) -> Waterfall:
    """The waterfall in the given order.

    Raises:
        ValueError: an order that is not one of all changed groups.
        Impossible: a point on the way that cannot be; names the change and why.
    """
    differ = changed_groups(start, end)
    asked = [group for step in order for group in step]
    if sorted(asked) != sorted(differ):
        raise ValueError(f"order: expected each of {', '.join(differ) or 'nothing'} once; got {', '.join(asked)}")
    first = before = pricer(start)
    factors: list[Factor] = []
    points: list[Priced] = []
    for step in order:
        point = changed(before.point, end, step)
        try:
            after = pricer(point)
        except Impossible as error:
            raise Impossible(f"{' + '.join(step)}: {error}") from None
        factors += _gpu_factors(before, after) if tuple(step) == ("gpu",) else [_factor(step, before, after)]
        points.append(after)
        before = after
    unchanged = tuple(group for group in GROUPS if group not in differ)
    return Waterfall(first, before, tuple(tuple(step) for step in order), tuple(factors), tuple(points), unchanged)


def _factor(step: Sequence[str], before: Priced, after: Priced) -> Factor:
    return Factor(
        "+".join(step),
        "; ".join(before.point.show(group) for group in step),
        "; ".join(after.point.show(group) for group in step),
        before.usd_per_mtok,
        after.usd_per_mtok,
        before.coverage(),
        after.coverage(),
    )


def _gpu_factors(before: Priced, after: Priced) -> list[Factor]:
    """The change of GPU in four: three what-ifs by roofline, and what the new GPU's tables leave of it."""
    old, new = before.point.gpu, after.point.gpu
    stages = {
        BANDWIDTH: ("memory_bytes_per_s",),
        COMPUTE: ("bf16_flops_per_s", "fp8_flops_per_s", "fp4_flops_per_s"),
        LINKS: ("link_bytes_per_s", "scale_up_gpus", "scale_out_bytes_per_s"),
    }
    shares, said = before.coverage(), before.usd_per_mtok
    factors, gpu, usd = [], old, said
    for name, names in stages.items():
        gpu = replace(gpu, **{field: getattr(new, field) for field in names})
        time_s = sum(
            time_s * timed.call.op.floor_s(gpu) / timed.call.op.floor_s(old) for timed, time_s in before.ops()
        )  # fmt: skip
        next_usd = said * time_s / before.gpu_s_per_token
        what = (_specification(old, name), _specification(new, name))
        factors.append(Factor(f"gpu: {name}", *what, usd, next_usd, shares, shares, modelled=True))
        usd = next_usd
    kernels = (f"{old.title}'s share of roofline", f"{new.title}'s")
    return [*factors, Factor(f"gpu: {KERNELS}", *kernels, usd, after.usd_per_mtok, shares, after.coverage())]


def _specification(gpu: Gpu, name: str) -> str:
    if name == BANDWIDTH:
        return f"{gpu.memory_bytes_per_s / 1e12:g} TB/s"
    if name == COMPUTE:
        peaks = (gpu.bf16_flops_per_s, gpu.fp8_flops_per_s, gpu.fp4_flops_per_s)
        return "/".join("-" if peak is None else f"{peak / 1e12:g}" for peak in peaks) + " TFLOP/s BF16/FP8/FP4"
    return f"{gpu.link_bytes_per_s / 1e9:g} GB/s x {gpu.scale_up_gpus}"
