"""Speculative decoding: what drafts save and cost, by number of drafts and batch.

    step = verify step (1 + drafts tokens per sequence, its own ops) + drafts x draft pass (one token per sequence)
    $/M  = $/GPU-h x step / (kept tokens x sequences per GPU) / 3600 x 1e6        kept tokens: see ``acceptance``

While weights and cache dominate a step, verifying several tokens takes hardly longer than making one; once its matrix
products do, every rejected token is paid in full. In between lies the *break-even batch*: beyond it drafts cost more.

A draft is made by
    mtp     multi-token prediction: one more decoder layer, like the model's last, behind norms of its two inputs and a
            BF16 projection 2h x h, with the model's embedding and LM head
    ngram   looked up in the text: no GPU time (the host's is left out)
    MODEL   another model, whole, on the same GPUs with the same split
Weights and cache of what drafts must fit beside the model's own.

Units: seconds, dollars per million output tokens of decode GPUs, sequences per GPU. Errors: ``ValueError`` naming the
field, ``DoesNotFit`` where no batch fits with drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...bench.decode_plan import OMITTED, OpCall
from ...bench.deployment import Deployment, Precision, get_precision
from ...bench.memory import DoesNotFit, kv_bytes_per_sequence, memory, weight_bytes
from ...bench.models import load_model
from ...bench.ops import Gemm, Streaming
from ...bench.published import model_timing
from ...bench.step_time import StepTime, TimedOp, step_time
from ..cost import StepCost
from .acceptance import Acceptance, check_drafts
from .break_even import BreakEven, ladder, last_false

if TYPE_CHECKING:
    import numpy as np

    from ...bench.gpus import Gpu
    from ...bench.model_config import ModelConfig
    from ...bench.published import PublishedData, Stack
    from ..prices import Price
    from ..study import Study

MTP, NGRAM = "mtp", "ngram"
DRAFT = "draft_"
"""Begins the name of every op that drafts."""

_BF16_BYTES = 2.0

SPECULATION_OMITTED = (
    *OMITTED,
    "drafting: the first pass also appends the kept tokens to the draft's own cache, priced as one token; choosing "
    "among drafts and host time",
)
"""What is in neither side of the comparison."""


@dataclass(frozen=True)
class Drafter:
    """What makes drafts. ``model``: what one draft pass runs, None for nothing; ``precision`` its formats."""

    kind: str
    model: ModelConfig | None
    precision: Precision | None
    hidden_size: int = 0

    @classmethod
    def of(cls, kind: str, model: ModelConfig, precision: Precision) -> Drafter:
        """``"mtp"``, ``"ngram"``, or a model's name or config.json.

        Raises:
            ValueError: an unknown model, or one whose checkpoint has a precision tokenfab does not know.
        """
        if kind == NGRAM:
            return cls(kind, None, None)
        if kind == MTP:
            layer = replace(model, name=f"{model.name} MTP", layers=((model.layers[-1][0], 1),))
            return cls(kind, layer, precision, model.hidden_size)
        other = load_model(kind)
        own = precision if other.native_precision is None else get_precision(other.native_precision)
        return cls(other.name, other, own)

    def describe(self) -> str:
        if self.model is None:
            return "n-gram drafts: no GPU time"
        if self.kind == MTP:
            return (
                "multi-token prediction: one decoder layer like the model's last, projection and LM head per draft; "
                "whether a checkpoint has such a layer is not checked"
            )
        return f"drafts by {self.model.name} in {self.precision.name if self.precision else '?'}"

    def deployment(self, verify: Deployment) -> Deployment:
        """One draft pass beside a verify step: one token per sequence, same split."""
        assert self.precision is not None
        return replace(verify, precision=self.precision, tokens_per_step=1, kept_tokens_per_step=1.0)

    def bytes(self, verify: Deployment) -> tuple[float, float]:
        """(weights, cache of one sequence) that drafting holds on one GPU."""
        if self.model is None:
            return 0.0, 0.0
        deployment = self.deployment(verify)
        weights = weight_bytes(self.model, deployment)
        if self.kind == MTP:  # embedding and LM head are the model's
            ends = weight_bytes(replace(self.model, layers=()), deployment)
            weights += (2 * self.hidden_size**2 + 2 * self.hidden_size) * _BF16_BYTES - ends
        tokens = verify.context + verify.tokens_per_step
        cache = kv_bytes_per_sequence(self.model, tokens, deployment.precision, deployment.attention_tp)
        return weights, cache

    def ops(self, data: PublishedData, gpu: Gpu, stack: Stack, verify: Deployment, drafts: int) -> list[TimedOp]:
        """The ops of ``drafts`` passes, one after the other.

        Raises:
            ValueError: a split or precision that does not suit the drafting model.
        """
        if self.model is None:
            return []
        deployment = self.deployment(verify)
        passed = list(step_time(data, self.model, gpu, stack, deployment, check_memory=False).ops)
        passed += [_time(data, gpu, stack, call) for call in self._more(deployment.rows)]
        return [_times(op, drafts) for op in passed]

    def _more(self, rows: Any) -> list[OpCall]:
        """What a draft pass runs beside its model's step; ``rows`` may be an array."""
        if self.kind != MTP:
            return []
        hidden = self.hidden_size
        norms = Streaming(2 * 2 * hidden * _BF16_BYTES * rows)  # the embedding and the hidden state, in and out
        return [OpCall("norms", norms, 1), OpCall("projection", Gemm(rows, hidden, 2 * hidden), 1)]

    def pass_s(
        self, data: PublishedData, gpu: Gpu, stack: Stack, verify: Deployment, sequences: Sequence[int]
    ) -> np.ndarray:
        """Seconds of one draft pass at many batches of a published stack: as ``ops``, all at once."""
        import numpy as np

        from ...bench.published_many import times
        from ...bench.step_table import StepTable

        if self.model is None:
            return np.zeros(len(sequences))
        table = StepTable(self.model, [self.deployment(verify)], [sequences])
        total_s = table.totals(data, gpu, stack).step_s
        for call in self._more(np.array(sequences)):
            total_s = total_s + times(data, call.op, gpu, stack)[0]
        return total_s


def _time(data: PublishedData, gpu: Gpu, stack: Stack, call: OpCall) -> TimedOp:
    """One op outside a plan: by the stack's published rows, or those it fills up with, or the roofline."""
    published = getattr(stack, "rest", stack)
    if published is None:
        timing = model_timing(call.op, gpu, "no record of a kernel of tokenfab's")
    else:
        timing = data.time(call.op, gpu, published)
    return TimedOp(call, timing.time_s, call.op.floor_s(gpu), timing.provenance, timing.source)


def _times(op: TimedOp, drafts: int) -> TimedOp:
    call = OpCall(DRAFT + op.call.name, op.call.op, op.call.calls_per_step * drafts, op.call.block)
    return replace(op, call=call, time_s=op.time_s * drafts, floor_s=op.floor_s * drafts)


def most_sequences(model: ModelConfig, gpu: Gpu, verify: Deployment, drafter: Drafter | None) -> int:
    """The most sequences per attention group that fit, with what drafts; 0 where weights alone do not."""
    one = memory(model, gpu, replace(verify, batch_per_gpu=1 / verify.attention_tp))
    weights, cache = drafter.bytes(verify) if drafter else (0.0, 0.0)
    free = one.capacity_bytes - one.weights_bytes - one.reserve_bytes - weights
    return max(0, int(free // (one.kv_bytes + cache)))


@dataclass(frozen=True)
class SpeculationPoint:
    """One batch: without drafts, and with each number that fits."""

    plain: StepCost
    drafted: dict[int, StepCost]

    @property
    def batch_per_gpu(self) -> float:
        return self.plain.step.deployment.batch_per_gpu

    @property
    def best_drafts(self) -> int:
        """The cheapest number of drafts; 0 for none."""
        costs = {0: self.plain.usd_per_mtok_output}
        costs.update((drafts, cost.usd_per_mtok_output) for drafts, cost in self.drafted.items())
        return min(costs, key=lambda drafts: costs[drafts])


class Speculation:
    """A model on one GPU, stack and split, with and without drafts."""

    def __init__(
        self,
        data: PublishedData,
        model: ModelConfig,
        gpu: Gpu,
        stack: Stack,
        deployment: Deployment,
        price: Price,
        acceptance: Acceptance,
        drafts: Sequence[int],
        kind: str = MTP,
    ) -> None:
        """``deployment``: GPUs, split, precision and context; its batch does not matter.

        Raises:
            ValueError: no drafts, one that is no number, or of which no acceptance is known; not even one sequence
                fits with drafts.
        """
        if not drafts:
            raise ValueError("drafts: expected at least one number of drafts; got none")
        for each in drafts:
            check_drafts(each)
        if len(set(drafts)) != len(drafts):
            raise ValueError(f"drafts: expected different numbers; got {', '.join(map(str, drafts))}")
        self.data, self.model, self.gpu, self.stack, self.price = data, model, gpu, stack, price
        self.acceptance, self.drafts = acceptance, tuple(sorted(drafts))
        self.kept = {each: acceptance.kept_tokens(each) for each in self.drafts}
        self.drafter = Drafter.of(kind, model, deployment.precision)
        self._base = replace(deployment, tokens_per_step=1, kept_tokens_per_step=1.0)
        self._costs: dict[tuple[int, int], StepCost] = {}
        if self.most(self.drafts[0]) < 1:
            weights = self.drafter.bytes(self._deployment(self.drafts[0], 1))[0]
            raise DoesNotFit(
                f"memory: {model.name} in {deployment.precision.name} on {deployment.gpus} x {gpu.name} with "
                f"{weights / 1024**3:.1f} GiB of weights that draft holds not one sequence of {deployment.context} "
                "tokens per attention group; name more GPUs"
            )

    def _deployment(self, drafts: int, sequences: int) -> Deployment:
        return replace(
            self._base,
            batch_per_gpu=sequences / self._base.attention_tp,
            tokens_per_step=1 + drafts,
            kept_tokens_per_step=self.kept[drafts] if drafts else 1.0,
        )

    def most(self, drafts: int) -> int:
        """The most sequences per attention group that fit; without drafts nothing that drafts is held."""
        return most_sequences(
            self.model, self.gpu, self._deployment(drafts, 1), self.drafter if drafts else None
        )  # fmt: skip

    def cost(self, drafts: int, sequences: int) -> StepCost:
        """A step with so many drafts (0: none) of so many sequences per attention group."""
        key = (drafts, sequences)
        if key not in self._costs:
            deployment = self._deployment(drafts, sequences)
            step = step_time(self.data, self.model, self.gpu, self.stack, deployment, check_memory=False)
            if drafts:
                more = self.drafter.ops(self.data, self.gpu, self.stack, deployment, drafts)
                step = StepTime(self.model, self.gpu, self.stack, deployment, (*step.ops, *more))
            self._costs[key] = StepCost(step, self.price)
        return self._costs[key]

    def _seconds(self, drafts: int, sequences: list[int]) -> list[float]:
        """The step with so many drafts at many batches."""
        from ...bench.recorded import RecordedStack

        if isinstance(self.stack, RecordedStack):
            return [self.cost(drafts, each).step.step_s for each in sequences]
        from ...bench.step_table import StepTable

        verify = self._deployment(drafts, 1)
        found = StepTable(self.model, [verify], [sequences]).totals(self.data, self.gpu, self.stack).step_s
        if drafts:
            found = found + drafts * self.drafter.pass_s(self.data, self.gpu, self.stack, verify, sequences)
        return found.tolist()

    def points(self, batches: Sequence[float] | None = None) -> list[SpeculationPoint]:
        """Both sides at every batch (sequences per GPU) that fits without drafts; powers of two for None.

        Raises:
            ValueError: no batch, one that is no whole number of sequences per group, or none that fits.
        """
        most = self.most(0)
        asked = [each / self._base.attention_tp for each in ladder(most)] if batches is None else list(batches)
        if not asked:
            raise ValueError("batch: expected at least one; got none")
        found = []
        for batch in sorted(set(asked)):
            sequences = replace(self._base, batch_per_gpu=batch).sequences
            if sequences <= most:
                drafted = {each: self.cost(each, sequences) for each in self.drafts if sequences <= self.most(each)}
                found.append(SpeculationPoint(self.cost(0, sequences), drafted))
        if not found:
            raise DoesNotFit(
                f"memory: no batch fits: {self.model.name} on {self._base.gpus} x {self.gpu.name} holds "
                f"{most / self._base.attention_tp:g} sequences/GPU of {self._base.context} tokens"
            )
        return found

    @cached_property
    def break_evens(self) -> list[BreakEven]:
        """One for each number of drafts that fits at all."""
        return [self._break_even(drafts) for drafts in self.drafts if self.most(drafts)]

    def _break_even(self, drafts: int) -> BreakEven:
        def are_dearer(sequences: list[int]) -> list[bool]:
            drafted, plain = self._seconds(drafts, sequences), self._seconds(0, sequences)
            return [one / self.kept[drafts] > other for one, other in zip(drafted, plain, strict=True)]

        most, tp = self.most(drafts), self._base.attention_tp
        last, first, crossings = last_false(are_dearer, most)
        return BreakEven(
            drafts, last / tp if 0 < last < most else None, first / tp if first else None, most / tp, crossings
        )


def speculation(plan: Study, acceptance: Acceptance, drafts: Sequence[int], kind: str = MTP) -> list[Speculation]:
    """One for each GPU and stack of a study with one split.

    Raises:
        ValueError: as ``Speculation``; an unknown stack.
    """
    from ...bench.recorded import find_stack

    sweep = plan.sweep
    found = []
    for gpu in sweep.gpus:
        for spec in sweep.stacks:
            stack = find_stack(gpu, spec, plan.data, plan.recorded)
            deployment = sweep.deployment(sweep.parallels[0], 1)
            price = plan.price(gpu)
            found.append(Speculation(plan.data, sweep.model, gpu, stack, deployment, price, acceptance, drafts, kind))
    return found
