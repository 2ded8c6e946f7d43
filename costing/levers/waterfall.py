"""From one $/M to another, factor by factor.

    factor = $/M after one change / $/M before it;   the product of all factors = $/M at the end / $/M at the start

A waterfall starts at one ``Point`` and makes its fields those of another, group by group (``GROUPS``), in an order:
every other field is as it stands at that place. What a group is worth depends on the order (``waterfall_orders`` says
by how much), the product does not. A group whose fields are equal is no change: its factor is 1.

The change of GPU is split by the roofline: the ops of the point before it, each scaled by its floor on a GPU with the
new one's bandwidth, then also its matrix peaks, then also its links; what is left to the time that the new GPU's tables
give is ``kernels``: how near its roofline a GPU's kernels come. The first three are modelled.

Units: dollars per million output tokens. Errors: ``ValueError``; ``Impossible`` for a point that cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...bench.gpus import Gpu
from .waterfall_point import GROUPS, Impossible, Point, Priced, Pricer

BANDWIDTH, COMPUTE, LINKS, KERNELS = SPLIT = ("bandwidth", "compute", "links", "kernels")
"""What the change of GPU is split into, in this order."""


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
        ValueError: an order that is not one of all changed groups; prefill in the $/M of one end alone.
        Impossible: a point on the way that cannot be; names the change and why.
    """
    if (start.request is None) != (end.request is None):
        raise ValueError("request: expected input and output tokens at both ends, or at none; got them at one")
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
        before.coverage,
        after.coverage,
    )


def _gpu_factors(before: Priced, after: Priced) -> list[Factor]:
    """The change of GPU in four: three what-ifs by roofline, and what the new GPU's tables leave of it."""
    old, new = before.point.gpu, after.point.gpu
    stages = {
        BANDWIDTH: ("memory_bytes_per_s",),
        COMPUTE: ("bf16_flops_per_s", "fp8_flops_per_s", "fp4_flops_per_s"),
        LINKS: ("link_bytes_per_s", "scale_up_gpus", "scale_out_bytes_per_s"),
    }
    shares, said = before.coverage, before.usd_per_mtok
    factors, gpu, usd = [], old, said
    for name, names in stages.items():
        gpu = replace(gpu, **{field: getattr(new, field) for field in names})
        time_s = sum(time_s * timed.call.op.floor_s(gpu) / timed.call.op.floor_s(old) for timed, time_s in before.ops)
        next_usd = said * time_s / before.gpu_s_per_token
        what = (_specification(old, name), _specification(new, name))
        factors.append(Factor(f"gpu: {name}", *what, usd, next_usd, shares, shares, modelled=True))
        usd = next_usd
    kernels = (f"{old.title}'s share of roofline", f"{new.title}'s")
    return [*factors, Factor(f"gpu: {KERNELS}", *kernels, usd, after.usd_per_mtok, shares, after.coverage)]


def _specification(gpu: Gpu, name: str) -> str:
    if name == BANDWIDTH:
        return f"{gpu.memory_bytes_per_s / 1e12:g} TB/s"
    if name == COMPUTE:
        peaks = (gpu.bf16_flops_per_s, gpu.fp8_flops_per_s, gpu.fp4_flops_per_s)
        return "/".join("-" if peak is None else f"{peak / 1e12:g}" for peak in peaks) + " TFLOP/s BF16/FP8/FP4"
    return f"{gpu.link_bytes_per_s / 1e9:g} GB/s x {gpu.scale_up_gpus}"
