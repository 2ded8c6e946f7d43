"""Two sides set beside each other, point by point: what is the same, faster, slower, or not known.

Points of the two sides are one where op, shape, formats, recipe, L2 policy and GPU agree, except in what a side was
selected by and, where each side is of one GPU alone, the GPU. The kernel's source, its tile and the software may
differ: they are what is compared. Where one side holds several versions of a point's kernel, the newest counts.

Both sides timed beside the same anchor on the same kind of GPU are compared by their ratios to it: clocks move both.
Otherwise by their times.

Units: seconds per call. Errors: ``ValueError`` where nothing can be set beside anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from .gpus import Gpu, get_gpu
from .judgement import COMPARE_MARGIN, Judgement, judge
from .noise import Interval
from .ops import Op
from .point_ops import op_of
from .published import Timing
from .record import Point
from .sample import Sample
from .sides import Side

Identity = tuple[tuple[str, str], ...]
PublishedTime = Callable[[Op, Gpu, str], Timing]
"""(op, GPU, "vllm" or "vllm@0.19.0") to the published row's time."""


@dataclass(frozen=True)
class Version:
    """The newest version of one kernel at one shape on one side.

    Attributes:
        samples: valid ones, one per process. invalid: why others are none.
        num_older: measurements of other versions of the kernel, left out.
        published_s: instead of samples, a published row's time; ``source`` says which.
    """

    point: Point
    samples: tuple[Sample, ...] = ()
    invalid: tuple[str, ...] = ()
    num_older: int = 0
    published_s: float | None = None
    source: str = ""

    @property
    def time_s(self) -> float | None:
        """Median over processes; None without a valid one."""
        if self.published_s is not None:
            return self.published_s
        times = [sample.time_s for sample in self.samples if sample.time_s is not None]
        return median(times) if times else None

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(flag for sample in self.samples for flag in sample.flags))


@dataclass(frozen=True)
class Comparison:
    """One point on both sides.

    Attributes:
        basis: "time", or "ratio to" the anchor.
        judgement: None where a side has no valid time; ``notes`` say why, and what else a reader must know.
    """

    a: Version
    b: Version
    basis: str
    judgement: Judgement | None
    notes: tuple[str, ...]

    @property
    def word(self) -> str:
        return "unsure" if self.judgement is None else self.judgement.word

    @property
    def name(self) -> str:
        """Op, formats, recipe: of both sides where they differ."""
        names = [point_name(each.point) for each in (self.a, self.b)]
        return names[0] if names[0] == names[1] else " -> ".join(names)


@dataclass(frozen=True)
class Compared:
    """Every pair, and what has no counterpart on the other side."""

    pairs: tuple[Comparison, ...]
    only_a: tuple[Version, ...]
    only_b: tuple[Version, ...]


def point_name(point: Point) -> str:
    """ "gemm/mxfp4-bf16@library"."""
    formats = "-".join(filter(None, (point.formats.get(part) for part in ("weight", "activation"))))
    return f"{point.op}/{formats}" + ("" if point.recipe == "tokenfab" else f"@{point.recipe}")


def compare(a: Side, b: Side, *, margin: float = COMPARE_MARGIN, published: PublishedTime | None = None) -> Compared:
    """Each point of ``a`` beside the same point of ``b``.

    Args:
        published: looks a published row up; needed where a side is a stack.

    Raises:
        ValueError: both sides are stacks, or no point is on both.
    """
    if a.stack and b.stack:
        raise ValueError(f"sides: expected measurements on one side at least; got {a.label} and {b.label}")
    dropped = a.selected | b.selected | _gpu_apart(a, b)
    dropped |= {"weight", "activation"} if dropped & {"weight", "activation"} else set()
    versions_a, versions_b = versions(a.samples, dropped), versions(b.samples, dropped)
    if a.stack or b.stack:
        assert published is not None
        own, stack = (versions_b, a.stack) if a.stack else (versions_a, b.stack)
        rows = {key: row for key, each in own.items() if (row := _published(each.point, stack, published))}
        versions_a, versions_b = (rows, own) if a.stack else (own, rows)
    pairs = [_compare(versions_a[key], versions_b[key], margin) for key in versions_a if key in versions_b]
    if not pairs:
        raise ValueError(
            f"sides: expected a point that is on both; got {len(versions_a)} points in {a.label} and "
            f"{len(versions_b)} others in {b.label}"
        )
    return Compared(
        tuple(pairs),
        tuple(each for key, each in versions_a.items() if key not in versions_b),
        tuple(each for key, each in versions_b.items() if key not in versions_a),
    )


def _gpu_apart(a: Side, b: Side) -> frozenset[str]:
    """Whether two whole sides are of a GPU each: then GPUs are what is compared."""
    gpus = [{sample.point.gpu for sample in side.samples} for side in (a, b)]
    return frozenset({"gpu"} if all(len(each) == 1 for each in gpus) and gpus[0] != gpus[1] else ())


def identity(sample: Sample, dropped: Iterable[str] = ()) -> Identity:
    """What must agree for two samples to be of the same point."""
    point = sample.point
    fields = {
        "name": sample.name, "op": point.op, "l2_policy": point.l2_policy, "recipe": point.recipe, "gpu": point.gpu,
        **{part: point.formats.get(part, "") for part in ("weight", "activation")},
        **{f"shape.{name}": str(value) for name, value in sorted(point.shape.items())},
    }  # fmt: skip
    return tuple((field, value) for field, value in fields.items() if field not in set(dropped))


def versions(samples: Iterable[Sample], dropped: Iterable[str] = ()) -> dict[Identity, Version]:
    """The newest version of each point, in the order of their first samples.

    Raises:
        ValueError: samples that differ in a field that was dropped without one being selected.
    """
    groups: dict[Identity, list[Sample]] = {}
    told = [field for field in ("weight", "activation", "recipe", "gpu") if field in set(dropped)]
    for sample in samples:
        group = groups.setdefault(identity(sample, dropped), [])
        for field in told:
            if group and group[0].facet(field) != sample.facet(field):
                got = f"{group[0].facet(field)} and {sample.facet(field)}"
                raise ValueError(f"{field}: expected one of each side at a point; got {got}: select :{field}=VALUE")
        group.append(sample)
    return {key: _newest(group) for key, group in groups.items()}


def _newest(group: Sequence[Sample]) -> Version:
    newest = max(group, key=lambda sample: sample.recorded_unix_s)
    same = [sample for sample in group if sample.point == newest.point]
    valid: dict[str, Sample] = {sample.process: sample for sample in same if not sample.invalid}  # its last word
    invalid = tuple(dict.fromkeys(reason for sample in same for reason in sample.invalid))
    return Version(newest.point, tuple(valid.values()), invalid, len(group) - len(same))


def _published(point: Point, stack: str, published: PublishedTime) -> Version | None:
    op = op_of(point)
    if op is None:
        return None
    timing = published(op, get_gpu(point.gpu), stack)
    return Version(point, published_s=timing.time_s, source=f"{timing.provenance}: {timing.source}")


def _compare(a: Version, b: Version, margin: float) -> Comparison:
    notes = []
    for label, side in (("A", a), ("B", b)):
        if side.num_older:
            notes.append(f"{label}: {side.num_older} of older versions left out")
        if side.flags:
            notes.append(f"{label}: {', '.join(side.flags)}")
        if side.published_s is not None:
            notes.append(f"{label}: {side.source}; its noise is unknown")
        elif side.time_s is None:
            notes.append(f"{label}: no valid time: {'; '.join(side.invalid)}")
    if a.time_s is None or b.time_s is None:
        return Comparison(a, b, "time", None, tuple(notes))
    basis, values_a, values_b, within = _values(a, b)
    fixed = "a" if a.published_s is not None else "b" if b.published_s is not None else ""
    judgement = judge(values_a, values_b, margin, within, fixed)
    if judgement.reason:
        notes.append(judgement.reason)
    return Comparison(a, b, basis, judgement, tuple(notes))


def _values(a: Version, b: Version) -> tuple[str, list[float], list[float], list[Interval]]:
    samples = (*a.samples, *b.samples)
    anchors = {sample.anchor for sample in samples}
    alike = len(anchors) == 1 and None not in anchors and a.point.gpu == b.point.gpu
    if alike and a.samples and b.samples and all(sample.ratio is not None for sample in samples):
        ratios = [[sample.ratio for sample in side.samples if sample.ratio is not None] for side in (a, b)]
        within = [sample.ratio_interval for sample in samples if sample.ratio_interval is not None]
        return f"ratio to {anchors.pop()}", ratios[0], ratios[1], within
    times = [
        [side.published_s] if side.published_s is not None
        else [sample.time_s for sample in side.samples if sample.time_s is not None]
        for side in (a, b)
    ]  # fmt: skip
    return "time", times[0], times[1], [each.interval_s for each in samples if each.interval_s is not None]
