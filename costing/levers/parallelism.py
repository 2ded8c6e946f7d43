"""How to spread a model over GPUs, and what a large scale-up domain is worth.

Every way to split attention (tensor x data parallel) and experts (expert x tensor parallel) over every number of GPUs
up to a limit is a candidate, with all-to-all or all-gather between them, at every batch that fits; times are the
published ones (``bench.step_table``), with the expert load that the tables were measured under. Numbers of GPUs are the
powers of two, the divisors of the scale-up domain and its multiples: what the model's heads and experts do not divide
over is left out.

The worth of a domain is the price of the same GPU, at the same $/GPU-h, in a domain of another size, each with its own
best split at equal interactivity (``bench.domain`` says what stays measured: links between domains are modelled).

Units: $/M output tokens of decode GPUs, tokens/s/user. Errors: ``ValueError`` naming the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ...bench.deployment import check_divides
from ...bench.domain import native, with_domain
from ...bench.gpus import Gpu
from ..cost import StepCost
from ..study import Study
from ..sweep import DEFAULT_MAX_MODELLED, Parallel, Skipped, Sweep, frontier, run_sweep

SCALE_BATCHES = (
    *(0.125, 0.25, 0.5, 1, 2, 4, 6, 8, 12, 16),
    *(24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
)  # fmt: skip
"""Sequences per GPU that a search tries; fractions where a tensor-parallel group shares one sequence."""

MAX_GPUS = 1024


def gpu_counts(max_gpus: int, domain: int) -> list[int]:
    """Powers of two, divisors of the domain and multiples of it, up to ``max_gpus``.

    Raises:
        ValueError: ``max_gpus`` is no whole number from 1 to ``MAX_GPUS``.
    """
    if isinstance(max_gpus, bool) or max_gpus != int(max_gpus) or not 1 <= max_gpus <= MAX_GPUS:
        raise ValueError(f"max_gpus: expected a whole number from 1 to {MAX_GPUS}; got {max_gpus}")
    powers = {2**power for power in range(11)}
    divisors = {count for count in range(1, domain + 1) if domain % count == 0}
    multiples = set(range(domain, max_gpus + 1, domain)) if domain > 1 else set()
    return sorted(count for count in powers | divisors | multiples if count <= max_gpus)


def all_parallels(sweep: Sweep, counts: Sequence[int]) -> list[Parallel]:
    """Every split over these numbers of GPUs that the model allows.

    Raises:
        ValueError: a context, load or number of tokens that no split can have.
    """
    check_divides(sweep.model, sweep.deployment(Parallel(), 1))  # one GPU divides all: what it lacks, every split does
    found = []
    for gpus in counts:
        for tp in _divisors(gpus):
            for ep in _divisors(gpus):
                plain = Parallel(tp, gpus // tp, ep)
                try:
                    check_divides(sweep.model, sweep.deployment(plain, 1 / tp))
                except ValueError:  # a search looks at many splits that no model allows
                    continue
                found.append(plain)
                if gpus > tp and ep == gpus:
                    found.append(replace(plain, all_gather=True))
    return found


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


@dataclass(frozen=True)
class Scale:
    """All points of a search."""

    sweep: Sweep
    points: list[StepCost]
    skipped: list[Skipped]
    no_split: tuple[int, ...] = ()
    """Numbers of GPUs over which the model cannot be split."""

    def best(
        self, gpu: str, min_rate: float, max_modelled: float = DEFAULT_MAX_MODELLED, gpus: int | None = None
    ) -> StepCost | None:
        """The cheapest point of a GPU that is fast enough and known well enough; None without one."""
        found = [
            point
            for point in self.points
            if point.step.gpu.name == gpu
            and gpus in (None, point.step.deployment.gpus)
            and point.tokens_per_s_per_user >= min_rate
            and point.step.coverage()["modelled"] <= max_modelled
        ]
        return min(found, key=lambda point: point.usd_per_mtok_output, default=None)

    def counts(self, gpu: str) -> list[int]:
        """The numbers of GPUs on which anything fits."""
        return sorted({point.step.deployment.gpus for point in self.points if point.step.gpu.name == gpu})

    def pareto(self, gpu: str, gpus: int, max_modelled: float = DEFAULT_MAX_MODELLED) -> list[StepCost]:
        """Of one number of GPUs, the points no other beats in both tokens/s/user and $/M, slowest user first."""
        return frontier(
            point for point in self.points
            if point.step.gpu.name == gpu and point.step.deployment.gpus == gpus
            and point.step.coverage()["modelled"] <= max_modelled
        )  # fmt: skip


def search(
    plan: Study,
    max_gpus: int,
    batches: Iterable[float] | None = None,
    domains: Sequence[int] = (),
    advance: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Scale:
    """Every split and batch of a study's model on its GPUs, each also in scale-up domains of ``domains``.

    ``advance`` is told of every (GPU, stack) done, of how many.

    Raises:
        ValueError: a limit or domain that is no number, no batch, nothing that fits.
    """
    sizes = tuple(SCALE_BATCHES if batches is None else batches)
    if not sizes:
        raise ValueError("batch: expected at least one; got none")
    for size in sizes:
        if not (math.isfinite(size) and size > 0):
            raise ValueError(f"batch: expected more than 0 sequences per GPU; got {size}")
    wanted = list(
        dict.fromkeys(each for gpu in plan.sweep.gpus for each in (gpu, *(with_domain(gpu, size) for size in domains)))
    )
    points: list[StepCost] = []
    skipped: list[Skipped] = []
    parallels: list[Parallel] = []
    no_split: set[int] = set()
    total = len(wanted) * len(plan.sweep.stacks)
    # GPUs whose domains allow the same numbers of GPUs are planned together
    groups: dict[tuple[int, ...], list[Gpu]] = {}
    for gpu in wanted:
        groups.setdefault(tuple(gpu_counts(max_gpus, native(gpu).scale_up_gpus)), []).append(gpu)
    for counts, gpus in groups.items():
        sweep = replace(plan.sweep, gpus=gpus, batches=None)
        parallels = all_parallels(sweep, counts)
        no_split |= set(counts) - {parallel.gpus for parallel in parallels}
        done: dict[str, None] = {}

        def tell(what: str, done: dict[str, None] = done) -> None:
            name = what.rpartition(" ")[0]
            if name not in done:
                done[name] = None
                advance(len(done), total, name)

        part = replace(sweep, parallels=parallels, batches=sizes, whole_only=True)
        result = run_sweep(part, plan.data, lambda gpu: plan.price(native(gpu)), tell, plan.recorded)
        points += result.points
        skipped += result.skipped
    if not points:
        reason = skipped[0].reason if skipped else f"no split of {plan.sweep.model.name} over {max_gpus} GPUs or fewer"
        raise ValueError(f"{plan.sweep.model.name}: no point can be: {reason}")
    searched = replace(plan.sweep, gpus=wanted, parallels=parallels, batches=sizes, whole_only=True)
    return Scale(searched, points, skipped, tuple(sorted(no_split)))


@dataclass(frozen=True)
class DomainWorth:
    """The cheapest point of one GPU at one interactivity, by the size of its scale-up domain; None: none is so fast."""

    gpu: Gpu
    min_tokens_per_s_per_user: float
    by_domain: dict[int, StepCost | None]

    def worth(self, domain: int) -> float | None:
        """$/M in a domain of this size over $/M in the GPU's own; above 1: the own one is worth that factor."""
        other, own = self.by_domain[domain], self.by_domain[self.gpu.scale_up_gpus]
        return None if other is None or own is None else other.usd_per_mtok_output / own.usd_per_mtok_output


def domain_worth(found: Scale, rates: Sequence[float], max_modelled: float = 1.0) -> list[DomainWorth]:
    """For every GPU that was searched in several domains, and every interactivity."""
    by_gpu: dict[str, list[Gpu]] = {}
    for gpu in found.sweep.gpus:
        by_gpu.setdefault(native(gpu).name, []).append(gpu)
    return [
        DomainWorth(
            native(gpus[0]),
            rate,
            {
                gpu.scale_up_gpus: found.best(gpu.name, rate, max_modelled)
                for gpu in sorted(gpus, key=lambda each: each.scale_up_gpus)
            },
        )
        for gpus in by_gpu.values()
        if len(gpus) > 1
        for rate in rates
    ]
