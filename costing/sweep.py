"""Many deployments priced at once: GPUs x stacks x parallelisms x batches, and the best of them.

Splits and batches are planned once for all GPUs and published stacks, and timed together (``bench.step_table``): a
point's totals are those of ``step_time`` to rounding, its ops come when asked for. What does not divide, has no matrix
units or does not fit is left out before it is timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..bench.deployment import Deployment, Precision, check_divides, check_precision
from ..bench.gpus import Gpu
from ..bench.memory import largest_batch
from ..bench.model_config import ModelConfig
from ..bench.published import PublishedData
from ..bench.recorded import NoRecords, RecordedData, RecordedStack, find_stack
from ..bench.step_time import StepTime, step_time
from .cost import StepCost
from .prices import Price

if TYPE_CHECKING:
    from ..bench.published import Stack
    from ..bench.step_table import StepTable

DEFAULT_PARALLEL = (
    *("tp1", "tp2", "tp4", "tp8", "tp4-ep4", "tp8-ep8"),
    *("dp2-ep2", "dp4-ep4", "dp8-ep8", "dp16-ep16", "dp32-ep32"),
    *("dp2-ep2-ag", "dp4-ep4-ag", "dp8-ep8-ag", "dp16-ep16-ag"),
)
DEFAULT_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DEFAULT_MAX_MODELLED = 0.25
DEFAULT_STACKS = ("vllm", "sglang", "trtllm")
DEFAULT_GPUS = ("h100", "h200", "b200", "b300", "gb200", "gb300")


@dataclass(frozen=True)
class Parallel:
    """Attention TP x DP over the GPUs, experts spread ``expert_parallel`` ways and split by the rest.

    ``all_gather``: tokens reach the experts by all-gather instead of all-to-all.
    """

    attention_tp: int = 1
    attention_dp: int = 1
    expert_parallel: int = 1
    all_gather: bool = False

    @property
    def gpus(self) -> int:
        return self.attention_tp * self.attention_dp

    @classmethod
    def parse(cls, text: str) -> Parallel:
        """``"tp8"``, ``"tp8-ep8"``, ``"dp8-ep8"``, ``"tp2-dp4-ep8"``: what is not named is 1; ``-ag``: all-gather.

        Raises:
            ValueError: not of that form, or experts spread wider than the GPUs.
        """
        fields = {"tp": "attention_tp", "dp": "attention_dp", "ep": "expert_parallel"}
        values: dict[str, int] = {}
        stem = text.lower().removesuffix("-ag")
        for part in stem.split("-"):
            match = re.fullmatch(r"(tp|dp|ep)([1-9]\d{0,3})", part)
            if match is None or fields[match[1]] in values:
                raise ValueError(f"parallel: expected a form like tp8, dp8-ep8 or tp2-dp4-ep8; got {text!r}")
            values[fields[match[1]]] = int(match[2])
        parallel = cls(**values, all_gather=stem != text.lower())
        if parallel.gpus % parallel.expert_parallel:
            raise ValueError(f"parallel: expected ep to divide the {parallel.gpus} GPUs of {text!r}")
        return parallel

    def __str__(self) -> str:
        parts = [("tp", self.attention_tp), ("dp", self.attention_dp), ("ep", self.expert_parallel)]
        text = "-".join(f"{name}{value}" for name, value in parts if value > 1) or "tp1"
        return f"{text}-ag" if self.all_gather else text

    @classmethod
    def of(cls, deployment: Deployment) -> Parallel:
        """The notation of a deployment."""
        gathers = deployment.exchange == "all_gather"
        return cls(deployment.attention_tp, deployment.attention_dp, deployment.expert_parallel, gathers)


@dataclass(frozen=True)
class Skipped:
    """Points that cannot be, and why."""

    gpu: str
    stack: str
    parallel: str
    reason: str


@dataclass(frozen=True)
class Sweep:
    """What to price.

    ``batches``: sequences per GPU; None for powers of two up to what fits. A split over whose attention group a batch
    gives no whole number of sequences is refused, or with ``whole_only`` goes without that batch.
    """

    model: ModelConfig
    gpus: Sequence[Gpu]
    stacks: Sequence[str]
    parallels: Sequence[Parallel]
    precision: Precision
    context: int
    batches: Sequence[float] | None = None
    tokens_per_step: int = 1
    kept_tokens_per_step: float = 1.0
    load: str = "balanced"
    whole_only: bool = False

    def __len__(self) -> int:
        return len(self.gpus) * len(self.stacks) * len(self.parallels)

    def deployment(self, parallel: Parallel, batch_per_gpu: float) -> Deployment:
        return Deployment(
            parallel.gpus,
            parallel.attention_tp,
            parallel.expert_parallel,
            self.precision,
            batch_per_gpu,
            self.context,
            self.tokens_per_step,
            self.kept_tokens_per_step,
            load=self.load,
            exchange="all_gather" if parallel.all_gather else "all_to_all",
        )


@dataclass(frozen=True)
class SweepResult:
    points: list[StepCost]
    skipped: list[Skipped]


def run_sweep(
    sweep: Sweep,
    data: PublishedData,
    price: Callable[[Gpu], Price],
    advance: Callable[[str], None] = lambda what: None,
    recorded: RecordedData | None = None,
) -> SweepResult:
    """Price every point that fits. ``advance`` is called before each (GPU, stack, parallelism).

    ``recorded``: of the stack ``tokenfab``; None for the package's.

    Raises:
        ValueError: an unknown stack or a missing price. What merely does not fit, and a GPU without records, is in
            ``skipped``.
    """
    recorded = recorded or RecordedData()
    points: list[StepCost] = []
    skipped: list[Skipped] = []
    plans = _Plans(sweep)
    for gpu in sweep.gpus:
        gpu_price = price(gpu)
        for spec in sweep.stacks:
            try:
                stack = find_stack(gpu, spec, data, recorded)
            except NoRecords as error:
                skipped.append(Skipped(gpu.name, spec, "all", str(error)))
                continue
            steps = plans.timed(data, gpu, stack)
            for parallel in sweep.parallels:
                advance(f"{gpu.name} {stack.name} {parallel}")
                found = plans.fitting(gpu, parallel)
                if isinstance(found, str):
                    skipped.append(Skipped(gpu.name, spec, str(parallel), found))
                    continue
                points += [StepCost(steps(parallel, deployment), gpu_price) for deployment in found]
    return SweepResult(points, skipped)


class _Plans:
    """The deployments of a sweep: which fit on a GPU, and their steps, planned once for all GPUs and stacks."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._fitting: dict[tuple[Gpu, Parallel], list[Deployment] | str] = {}
        self._deployments: dict[tuple[Parallel, float], Deployment] = {}

    def fitting(self, gpu: Gpu, parallel: Parallel) -> list[Deployment] | str:
        """The batches that fit, smallest first; or why none does: a split that does not divide, a precision the GPU
        lacks, memory."""
        key = (gpu, parallel)
        if key not in self._fitting:
            try:
                self._fitting[key] = self._find(gpu, parallel)
            except ValueError as error:
                self._fitting[key] = str(error)
        return self._fitting[key]

    def _find(self, gpu: Gpu, parallel: Parallel) -> list[Deployment]:
        sweep = self.sweep
        one = sweep.deployment(parallel, 1 / parallel.attention_tp)
        check_divides(sweep.model, one)
        check_precision(gpu, sweep.precision)
        most = largest_batch(sweep.model, gpu, one)
        sizes = self._sizes(parallel)
        if not sizes:
            raise ValueError(
                f"batch: no batch is a whole number of sequences per attention group of {parallel.attention_tp} GPUs"
            )
        sequences = [size for size in sizes if size <= most]
        if not sequences:
            raise ValueError(
                f"memory: no batch fits: {sweep.model.name} in {sweep.precision.name} at {sweep.context} tokens on "
                f"{parallel.gpus} x {gpu.name} holds {most} sequences per attention group"
            )
        return [self._deployment(parallel, one, size) for size in sequences]

    def _sizes(self, parallel: Parallel) -> list[float]:
        """Sequences per attention group, fitting or not."""
        if self.sweep.batches is None:
            return [2**power for power in range(10)]
        sizes = [batch * parallel.attention_tp for batch in self.sweep.batches]
        return [size for size in sizes if not self.sweep.whole_only or size == round(size) >= 1]

    def _deployment(self, parallel: Parallel, one: Deployment, size: float) -> Deployment:
        key = (parallel, size)
        if key not in self._deployments:
            self._deployments[key] = replace(one, batch_per_gpu=size / parallel.attention_tp)
        return self._deployments[key]

    @cached_property
    def _table(self) -> tuple[StepTable, dict[Parallel, dict[int, int]]] | None:
        """Every split and batch that fits on any of the GPUs, and where in the table each is; None without any."""
        from ..bench.step_table import StepTable

        sizes: dict[Parallel, dict[int, Deployment]] = {}
        for gpu in self.sweep.gpus:
            for parallel in self.sweep.parallels:
                found = self.fitting(gpu, parallel)
                if not isinstance(found, str):
                    sizes.setdefault(parallel, {}).update((each.sequences, each) for each in found)
        if not sizes:
            return None
        ones = [next(iter(found.values())) for found in sizes.values()]
        table = StepTable(self.sweep.model, ones, [list(found) for found in sizes.values()])
        places = {
            parallel: {sequences: start + offset for offset, sequences in enumerate(found)}
            for start, (parallel, found) in zip(table.starts, sizes.items(), strict=False)
        }
        return table, places

    def timed(self, data: PublishedData, gpu: Gpu, stack: Stack) -> Callable[[Parallel, Deployment], StepTime]:
        """A function that gives the step of one deployment."""
        model = self.sweep.model
        fits = any(not isinstance(self.fitting(gpu, parallel), str) for parallel in self.sweep.parallels)
        if isinstance(stack, RecordedStack) or not fits or self._table is None:
            return lambda _, deployment: step_time(data, model, gpu, stack, deployment, check_memory=False)
        from ..bench.step_table import SummedStep

        table, places = self._table
        totals = table.totals(data, gpu, stack)
        step_s, floor_s, shares = totals.step_s.tolist(), totals.floor_s.tolist(), totals.shares.T.tolist()

        def step(parallel: Parallel, deployment: Deployment) -> StepTime:
            place = places[parallel][deployment.sequences]
            known = (step_s[place], floor_s[place], tuple(shares[place]))
            return SummedStep(model, gpu, stack, deployment, data=data, totals=known)

        return step


def best_points(
    points: Iterable[StepCost], min_tokens_per_s_per_user: float, max_modelled: float = DEFAULT_MAX_MODELLED
) -> list[StepCost]:
    """The cheapest point of each (GPU, stack) that is fast enough, cheapest first.

    Points with more than ``max_modelled`` of their time modelled do not rank: a model is kinder
    than a measurement, and the cheapest point would be the least known one.
    """
    best: dict[tuple[str, str], StepCost] = {}
    for point in points:
        if point.tokens_per_s_per_user < min_tokens_per_s_per_user or point.step.coverage()["modelled"] > max_modelled:
            continue
        key = (point.step.gpu.name, str(point.step.stack))
        if key not in best or point.usd_per_mtok_output < best[key].usd_per_mtok_output:
            best[key] = point
    return sorted(best.values(), key=lambda point: point.usd_per_mtok_output)


def frontier(points: Iterable[StepCost]) -> list[StepCost]:
    """The points no other beats in both tokens/s/user and tokens/s/GPU, slowest user first."""
    kept: list[StepCost] = []
    for point in sorted(points, key=lambda p: (-p.tokens_per_s_per_user, -p.tokens_per_s_per_gpu)):
        if not kept or point.tokens_per_s_per_gpu > kept[-1].tokens_per_s_per_gpu:
            kept.append(point)
    return kept[::-1]
