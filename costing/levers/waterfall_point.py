"""A point of a waterfall: everything that decides a $/M, its times and its price.

    GPU-seconds per output token = step / (kept tokens x sequences per GPU)                                    decode
                                 + passes x GPUs of an attention group / (prompts of a pass x output tokens)   prefill
    $/M output tokens = $/GPU-h / 3600 x GPU-seconds per output token x 1e6

The second term is there where the lengths of a request are stated; without them every figure is of decode GPUs only.
*Aggregated*, the same GPUs do both, and a user's tokens wait while they prefill: tokens/s/user = kept tokens / step x
the share of time that decoding has. *Disaggregated*, GPUs of their own prefill, with a split of their own, as many as
the load needs: they are paid for, and the user does not wait. Passes are those of ``request_pools``.
A step with drafts verifies them and makes the next ones (``speculative``).

Units: seconds, dollars per million output tokens. Errors: ``ValueError``; ``Impossible`` for a point that cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from ...bench.decode_plan import OMITTED as DECODE_OMITTED
from ...bench.deployment import Deployment, Precision
from ...bench.gpus import Gpu
from ...bench.memory import DoesNotFit
from ...bench.prefill_plan import OMITTED as PREFILL_OMITTED
from ...bench.step_time import StepTime, TimedOp, step_time
from ..cost import StepCost, usd_per_mtok
from ..prices import Price
from ..study import Study
from ..sweep import Parallel, Sweep
from ..workload.request_pools import PrefillWork, prefill_work
from ..workload.serving import Request
from .speculative import MTP, SPECULATION_OMITTED, Drafter, most_sequences

if TYPE_CHECKING:
    from ...bench.model_config import ModelConfig
    from ...bench.published import PublishedData, Stack
    from ...bench.recorded import RecordedData
    from .intervals import Percentiles

GROUPS: dict[str, tuple[str, ...]] = {
    "price": ("price",),
    "gpu": ("gpu",),
    "stack": ("stack",),
    "precision": ("precision",),
    "parallel": ("parallel",),
    "drafts": ("drafts", "acceptance_length", "acceptance_source", "drafter"),
    "disaggregation": ("prefill_parallel",),
    "batch": ("batch_per_gpu",),
    "context": ("context", "load", "request"),
}
"""What changes together, in the default order: the GPU before the precision that only it has, before the split that
only its domain makes worth it; the batch after all that make room for it."""

INTERVAL_SAMPLES = 20_000


_Time = TypeVar("_Time", StepTime, PrefillWork)


class Impossible(ValueError):
    """A point of the waterfall that cannot be."""


@dataclass(frozen=True)
class Point:
    """Everything that decides a $/M.

    Attributes:
        stack: a name or NAME@VERSION. precision: with its KV format.
        parallel: how one replica's GPUs split the model.
        batch_per_gpu: sequences per GPU. context: cached tokens per sequence of a decode step.
        drafts: tokens proposed per step, by ``drafter``. acceptance_length: tokens kept per step, 1 to 1 + drafts;
            ``acceptance_source`` says who says so.
        load: expert load.
        request: its lengths; None: decode GPUs only.
        prefill_parallel: split of the GPUs that only prefill; None: the same GPUs do both.
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
    acceptance_source: str = ""
    drafter: str = MTP
    load: str = "balanced"
    request: Request | None = None
    prefill_parallel: Parallel | None = None

    def __post_init__(self) -> None:
        if self.drafts != int(self.drafts) or self.drafts < 0:
            raise ValueError(f"drafts: expected a whole number of 0 or more; got {self.drafts}")
        if not 1 <= self.acceptance_length <= 1 + self.drafts:
            raise ValueError(
                f"acceptance_length: expected 1 to {1 + self.drafts} (1 + drafts); got {self.acceptance_length}"
            )
        if self.prefill_parallel is not None and self.request is None:
            raise ValueError("request: expected input and output tokens with GPUs that prefill; got none")

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
            return f"{self.parallel} ({self._domains(self.parallel)})"
        if group == "drafts":
            return self._drafts()
        if group == "disaggregation":
            return self._serving()
        if group == "batch":
            return f"{self.batch_per_gpu:g} sequences/GPU"
        return f"{self.context} tokens of context, {self.load} load{self._request()}"

    def _drafts(self) -> str:
        if not self.drafts:
            return "no drafts"
        many = "drafts" if self.drafts > 1 else "draft"
        source = f" ({self.acceptance_source})" if self.acceptance_source else ""
        return f"{self.drafts} {self.drafter} {many}, {self.acceptance_length:g} kept/step{source}"

    def _serving(self) -> str:
        if self.request is None:
            return "decode GPUs only"
        if self.prefill_parallel is None:
            return "the same GPUs prefill"
        return f"own GPUs prefill ({self.prefill_parallel}: {self._domains(self.prefill_parallel)})"

    def _domains(self, split: Parallel) -> str:
        """ "16 GPUs, over 2 domains of 8"."""
        gpus, size = split.gpus, self.gpu.scale_up_gpus
        text = f"{gpus} GPU" + ("s" if gpus > 1 else "")
        return (
            f"{text}, in a domain of {size}" if gpus <= size else f"{text}, over {-(-gpus // size)} domains of {size}"
        )

    def _request(self) -> str:
        if self.request is None:
            return ""
        cached = f" ({self.request.cached_tokens} cached)" if self.request.cached_tokens else ""
        return f", {self.request.input_tokens} tokens in{cached}, {self.request.output_tokens} out"


@dataclass(frozen=True)
class Priced:
    """A point with its times and its $/M. ``prefill``: None without a request."""

    point: Point
    step: StepTime
    prefill: PrefillWork | None = None

    @cached_property
    def ops(self) -> tuple[tuple[TimedOp, float], ...]:
        """Every op, of decode steps and of prefill, with its GPU-seconds per output token."""
        kept = self.point.acceptance_length * self.point.batch_per_gpu
        decode = tuple((op, op.time_s / kept) for op in self.step.ops)
        if self.prefill is None or self.point.request is None:
            return decode
        passes = self.prefill.passes
        each = passes[0].deployment.attention_tp / (self.prefill.prompts * self.point.request.output_tokens)
        return (*decode, *((op, op.time_s * each) for passed in passes for op in passed.ops))

    @cached_property
    def gpu_s_per_token(self) -> float:
        """GPU-seconds per output token, of all GPUs."""
        return sum(time_s for _, time_s in self.ops)

    @property
    def decode_gpu_s_per_token(self) -> float:
        return sum(time_s for _, time_s in self.ops[: len(self.step.ops)])

    @property
    def prefill_per_decode_gpu(self) -> float:
        """GPUs that prefill for one that decodes, whatever the load; in one pool, the ratio of the times."""
        return self.gpu_s_per_token / self.decode_gpu_s_per_token - 1

    @property
    def usd_per_mtok(self) -> float:
        """Dollars per million output tokens, of all GPUs."""
        return usd_per_mtok(1 / self.gpu_s_per_token, self.point.price.usd_per_gpu_hour)

    @property
    def usd_per_mtok_total(self) -> float | None:
        """Dollars per million input (cached or not) and output tokens; None without a request."""
        request = self.point.request
        return None if request is None else self.usd_per_mtok * request.output_tokens / request.total_tokens

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Output tokens, of all GPUs."""
        return 1 / self.gpu_s_per_token

    @property
    def tokens_per_s_per_user(self) -> float:
        alone = self.point.acceptance_length / self.step.step_s
        if self.point.prefill_parallel is not None:
            return alone
        return alone * self.decode_gpu_s_per_token / self.gpu_s_per_token

    @cached_property
    def coverage(self) -> dict[str, float]:
        """Share of the GPU time by provenance."""
        shares: dict[str, float] = dict.fromkeys(self.step.stack.provenances, 0.0)
        for op, time_s in self.ops:
            shares[op.provenance] = shares.get(op.provenance, 0.0) + time_s / self.gpu_s_per_token
        return shares

    @property
    def denominator(self) -> str:
        if self.prefill is None:
            return "output tokens (decode GPUs only)"
        return "output tokens (prefill and decode GPUs)"

    @property
    def omitted(self) -> tuple[str, ...]:
        """What no figure of the point contains."""
        decode = SPECULATION_OMITTED if self.point.drafts else DECODE_OMITTED
        if self.prefill is None:
            return decode
        left = [each for each in decode if not each.startswith("prefill: ")]
        return tuple(dict.fromkeys((*left, *PREFILL_OMITTED, "limits on the time to the first token")))

    def interval(self, data: PublishedData) -> Percentiles | None:
        """5th, 50th and 95th percentile of the $/M at this price: what the tables' errors make of it.

        None with prefill in it, whose tables' errors are not calibrated.
        """
        from .intervals import interval

        if self.prefill is not None:
            return None
        return interval(StepCost(self.step, self.point.price), samples=INTERVAL_SAMPLES, data=data).at_price

    def describe(self) -> str:
        """The operating point in full."""
        point, deployment = self.point, self.step.deployment
        return (
            f"{self.step.model.name} on {point.gpu.title}, {self.step.stack}, {point.show('precision')}, "
            f"{deployment.describe()}, {point.show('batch')}, {point.show('context')}, {point.show('drafts')}, "
            f"{point.show('disaggregation')}"
        )


class Pricer:
    """Prices points of one model, each step and each prefill pass only once; a price changes no time."""

    def __init__(self, model: ModelConfig, data: PublishedData, recorded: RecordedData | None = None) -> None:
        from ...bench.recorded import RecordedData

        self.model, self.data, self.recorded = model, data, recorded or RecordedData()
        self._steps: dict[tuple[Any, ...], StepTime | str] = {}
        self._works: dict[tuple[Any, ...], PrefillWork | str] = {}

    def __call__(self, point: Point) -> Priced:
        """The point priced.

        Raises:
            Impossible: it does not divide or fit, or the GPU has no such units or tables; says why.
        """
        key = (
            point.gpu.name, point.stack, point.precision, point.parallel, point.batch_per_gpu, point.context,
            point.load, point.drafts, point.acceptance_length, point.drafter,
        )  # fmt: skip
        step = _kept(self._steps, key, self._step, point)
        if point.request is None:
            return Priced(point, step)
        split = point.prefill_parallel or point.parallel
        return Priced(point, step, self.prefill(point, split))

    def prefill(self, point: Point, split: Parallel) -> PrefillWork:
        """The passes of the point's request on GPUs split like that.

        Raises:
            Impossible: it does not divide or fit, or the GPU has no such units or tables; says why.
        """
        key = (point.gpu.name, point.stack, point.precision, split, point.load, point.request)
        return _kept(self._works, key, self._work, replace(point, prefill_parallel=split))

    def _stack(self, point: Point) -> Stack:
        from ...bench.recorded import find_stack

        return find_stack(point.gpu, point.stack, self.data, self.recorded)

    def _step(self, point: Point) -> StepTime:
        stack, deployment = self._stack(point), point.deployment()
        if not point.drafts:
            return step_time(self.data, self.model, point.gpu, stack, deployment)
        drafter = Drafter.of(point.drafter, self.model, point.precision)
        step = step_time(self.data, self.model, point.gpu, stack, deployment)
        most = most_sequences(self.model, point.gpu, deployment, drafter)
        if deployment.sequences > most:
            raise DoesNotFit(
                f"memory: {self.model.name} with what makes drafts holds {most} sequences per attention group on "
                f"{deployment.gpus} x {point.gpu.name}; {deployment.sequences} were asked"
            )
        drafting = drafter.ops(self.data, point.gpu, stack, deployment, point.drafts)
        return replace(step, ops=(*step.ops, *drafting))

    def _work(self, point: Point) -> PrefillWork:
        request, split = point.request, point.prefill_parallel
        assert request is not None
        assert split is not None
        sweep = Sweep(
            self.model, [point.gpu], (point.stack,), [split], point.precision, request.context, load=point.load
        )  # fmt: skip
        return prefill_work(Study(sweep, self.data, lambda _: point.price, self.recorded), request)


def _kept(
    memo: dict[tuple[Any, ...], _Time | str], key: tuple[Any, ...], make: Callable[[Point], _Time], point: Point
) -> _Time:
    """From the memo, where failures are kept too."""
    if key not in memo:
        try:
            memo[key] = make(point)
        except ValueError as error:
            memo[key] = str(error)
    found = memo[key]
    if isinstance(found, str):
        raise Impossible(found)
    return found
