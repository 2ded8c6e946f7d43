"""Which targets to measure first where time is short: those that weigh most in the models' steps.

    worth = calls per step x roofline floor of one call, summed over the places of the shape in the chosen models' steps

The libraries' kernels come right behind the first of ours at the same shape, so that what is finished can be compared;
a copy comes first, since it tells at once whether the machine is what it should be; shapes that are no model's come
last.

Units: seconds of a step. Imports torch (what experts are touched, and at which rate a GPU multiplies).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .gpus import Gpu
from .peers import COPY
from .places import places_of
from .targets import Target


@dataclass(frozen=True)
class Weighed:
    """A target and what it weighs."""

    target: Target
    worth_s: float


def floor_s(target: Target, gpu: Gpu) -> float:
    """Roofline of one call: all bytes at peak bandwidth, or flops at the matrix peak."""
    from .cases import compute_floor_s

    work = target.kernel.work(target.shape)
    moved_s = (work.weight_bytes + work.activation_bytes) / gpu.memory_bytes_per_s
    return max(moved_s, compute_floor_s(target.kernel, target.shape, gpu))


def weigh(target: Target, models: Sequence[str], gpu: Gpu) -> float:
    """Seconds of the models' steps that this kernel's roofline takes; 0 for a shape that is no model's."""
    if not any(place.split(" ")[0] in models for place in target.places):
        return 0.0  # "compared", whatever step it could stand in
    calls = sum(place.calls_per_step for place in places_of(target.kernel.op, target.shape, models, gpu))
    return calls * floor_s(target, gpu) if calls else 0.0


def by_worth(targets: Iterable[Target], models: Sequence[str], gpu: Gpu) -> list[Weighed]:
    """A copy, then ours, heaviest first, each shape's libraries behind the first of ours at it; others' shapes last."""
    weighed = sorted((Weighed(target, weigh(target, models, gpu)) for target in targets), key=_rank)
    beside: dict[tuple[str, _Fields], list[Weighed]] = {}
    for each in weighed:
        if each.target.kernel.library:
            beside.setdefault((each.target.kernel.op, each.target.fields), []).append(each)
    ordered = [each for each in weighed if each.target.kernel.op == COPY.op]
    for each in weighed:
        if not each.target.kernel.library:
            ordered += [each, *beside.pop((each.target.kernel.op, each.target.fields), ())]
    return ordered + [each for op, group in beside.items() if op[0] != COPY.op for each in group]


_Fields = tuple[tuple[str, int], ...]


def _rank(each: Weighed) -> tuple[float, str, _Fields]:
    return -each.worth_s, each.target.kernel.name, each.target.fields
