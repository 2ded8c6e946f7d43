"""A study: one model priced over what the user asked for. Fills in the defaults, and says what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.deployment import Precision, get_precision
from ..bench.gpus import Gpu, get_gpu
from ..bench.memory import largest_batch
from ..bench.model_config import ModelConfig
from ..bench.models import load_model
from ..bench.published import PublishedData
from ..bench.published_check import TableError, check_tables
from ..bench.recorded import RecordedData, find_stack
from ..bench.step_time import step_time
from ..kernels.formats import get_format
from .cost import StepCost
from .prices import DEFAULT_TIER, Price, PriceBook, stated_price
from .sweep import DEFAULT_GPUS, DEFAULT_PARALLEL, DEFAULT_STACKS, Parallel, Skipped, Sweep, run_sweep

if TYPE_CHECKING:
    from ..bench.fleet import Spread


@dataclass(frozen=True)
class Study:
    """What to price, with what data and prices."""

    sweep: Sweep
    data: PublishedData
    price: Callable[[Gpu], Price]
    recorded: RecordedData
    data_folder: Path | None = None
    """Where ``data`` is from; None for the package's."""


@dataclass(frozen=True)
class StudyResult:
    """A study's points, and what could not be."""

    study: Study
    points: list[StepCost]
    skipped: list[Skipped]

    @property
    def sweep(self) -> Sweep:
        return self.study.sweep

    @property
    def model(self) -> ModelConfig:
        return self.study.sweep.model

    @property
    def data(self) -> PublishedData:
        return self.study.data


def choose_precision(model: ModelConfig, name: str | None, kv_format: str | None) -> Precision:
    """The asked precision, or the checkpoint's own; with another KV format where asked.

    Raises:
        ValueError: unknown names, or a checkpoint whose precision tokenfab does not know.
    """
    if name is None and model.native_precision is None:
        raise ValueError(
            f"precision: {model.name}'s checkpoint has a quantization_config tokenfab does not know; name one"
        )
    precision = get_precision(name or str(model.native_precision))
    if kv_format is None or kv_format == precision.kv:
        return precision
    if get_format(kv_format).name not in ("bf16", "fp8"):
        raise ValueError(f"kv_format: expected bf16 or fp8; got {kv_format!r}")
    return replace(precision, name=f"{precision.name}+{kv_format}_kv", kv=kv_format)


def study(
    model: str,
    gpus: Sequence[str] | None,
    stacks: Sequence[str] | None,
    parallels: Sequence[str] | None,
    batches: Sequence[float] | None,
    usd_per_gpu_hour: float | None = None,
    published_data: Path | None = None,
    *,
    precision: str | None = None,
    kv_format: str | None = None,
    context: int = 4096,
    load: str = "balanced",
    tokens_per_step: int = 1,
    kept_tokens: float = 1.0,
    tier: str = DEFAULT_TIER,
    book: str | None = None,
    price_file: Path | None = None,
    records: Path | None = None,
) -> Study:
    """A study from names; None means the default of that option. ``records``: folder of the stack ``tokenfab``'s.

    Raises:
        ValueError: an unknown name, a price that is missing, no published data.
    """
    config = load_model(model)
    chosen = choose_precision(config, precision, kv_format)
    found = [get_gpu(name) for name in gpus or DEFAULT_GPUS]
    prices = PriceBook.read(price_file)

    def price(gpu: Gpu) -> Price:
        if usd_per_gpu_hour is not None:
            return stated_price(gpu.name, usd_per_gpu_hour)
        return prices.look_up(gpu.name, tier, book)

    for gpu in found:
        price(gpu)  # a missing price is an error before the work, not after
    sweep = Sweep(
        config, found, tuple(stacks or DEFAULT_STACKS), (), chosen, context, batches, tokens_per_step, kept_tokens, load
    )
    splits = [Parallel.parse(text) for text in parallels or DEFAULT_PARALLEL]
    if parallels is None and batches is not None and len(batches) == 1 and len(found) == 1:
        splits = [smallest_parallel(sweep, found[0], batches[0])]
    data, recorded = PublishedData(published_data), RecordedData(records)
    return Study(replace(sweep, parallels=splits), data, price, recorded, published_data)


def smallest_parallel(sweep: Sweep, gpu: Gpu, batch_per_gpu: float) -> Parallel:
    """The fewest GPUs (a power of two), attention data parallel and expert parallel, that hold the batch."""
    for power in range(8):
        parallel = Parallel(1, 2**power, 2**power)
        deployment = sweep.deployment(parallel, 1)
        if largest_batch(sweep.model, gpu, deployment) >= batch_per_gpu:
            return parallel
    return Parallel(1, 128, 128)  # the plan says by how much it does not fit


def price_step(study: Study) -> StepCost:
    """The one point of a study with one of everything.

    Raises:
        ValueError: it cannot be: does not divide, does not fit.
    """
    sweep = study.sweep
    gpu, parallel = sweep.gpus[0], sweep.parallels[0]
    assert sweep.batches is not None
    stack = find_stack(gpu, sweep.stacks[0], study.data, study.recorded)
    deployment = sweep.deployment(parallel, sweep.batches[0])
    return StepCost(step_time(study.data, sweep.model, gpu, stack, deployment), study.price(gpu))


def study_of(study: Study, cost: StepCost) -> Study:
    """The study of one of its points alone.

    Raises:
        ValueError: a stack that the study does not name.
    """
    gpu, deployment = cost.step.gpu, cost.step.deployment
    stacks = {find_stack(gpu, spec, study.data, study.recorded): spec for spec in study.sweep.stacks}
    if cost.step.stack not in stacks:
        raise ValueError(f"stack: expected one of {', '.join(map(str, stacks))}; got {cost.step.stack}")
    sweep = replace(
        study.sweep, gpus=[gpu], stacks=[stacks[cost.step.stack]], parallels=[Parallel.of(deployment)],
        batches=[deployment.batch_per_gpu],
    )  # fmt: skip
    return replace(study, sweep=sweep, price=lambda _: cost.price)


def run_study(study: Study, show_progress: bool = False, spread: Spread | None = None) -> StudyResult:
    """Price every point; with ``spread``, the CPUs of a cluster time them.

    Raises:
        ValueError: nothing fits; the message says why.
    """
    with _progress(show_progress, study.sweep.model.name, len(study.sweep)) as advance:
        if spread is None:
            result = run_sweep(study.sweep, study.data, study.price, advance, study.recorded)
        else:
            from .sweep_spread import run_sweep_on

            result = run_sweep_on(
                spread, study.sweep, study.data, study.price, advance, study.recorded, study.data_folder
            )  # fmt: skip
    if not result.points:
        raise ValueError(f"{study.sweep.model.name}: no point can be: {result.skipped[0].reason}")
    return StudyResult(study, result.points, result.skipped)


def run_check(
    gpus: Sequence[str], stacks: Sequence[str], published_data: Path | None, show_progress: bool = False
) -> list[TableError]:
    """The interpolation error of every table of every stack on every GPU."""
    data = PublishedData(published_data)
    errors: list[TableError] = []
    found = [get_gpu(name) for name in gpus]
    with _progress(show_progress, "check", len(found) * len(stacks)) as advance:
        for gpu in found:
            for spec in stacks:
                advance(f"{gpu.name} {spec}")
                errors += check_tables(data, gpu, data.stack(gpu, spec))
    return errors


@contextmanager
def _progress(show: bool, what: str, total: int) -> Any:
    """A progress bar on standard error where that is a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda text: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=total + 1)

        def advance(text: str) -> None:
            progress.update(task, advance=1, description=f"{what}: {text}")

        yield advance
