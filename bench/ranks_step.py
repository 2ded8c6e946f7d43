"""A decode step on several ranks: the ops of one rank, with communication between them where the decode plan has it.

The same launches as on one rank (``step_layers``), over this rank's slices (``ranks_split``): attention, dense FFNs,
LM head and experts by tokenfab's kernels, communication by torch.distributed (``ranks_ops``).

- dpN-epN: every rank has its own sequences and caches; expert layers exchange tokens. Nothing else is sent. Its
  logits have the bits of one rank that holds all experts and decodes the same sequences, with the same tiles.
- tpN, tpN-epN: all ranks have the same sequences; partial sums behind o_proj, dense and expert layers are reduced in
  BF16, logits are gathered. No bits are promised: it is held to the tolerance of a layer.

Errors: ``ValueError`` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..kernels.registry import Work
from . import step_ops as ops
from .decode_plan import OpCall, decode_plan
from .decode_step import PAGE_SIZE, build_step
from .deployment import Deployment
from .gpus import Gpu
from .ranks_group import RankGroup
from .ranks_ops import COMMUNICATION, Exchange, all_reduce, exchanged_experts, gather_logits, make_exchange
from .ranks_split import Split, SplitSource
from .step_alone import OneRank
from .step_ops import Place, StepOp
from .step_state import DecodeStep
from .step_weights import RandomSource, Source

if TYPE_CHECKING:
    from ..kernels.kv_cache import KvCache, MlaCache
    from ..kernels.moe_layer import MoeLayer
    from .model_config import ModelConfig, MoeFfn
    from .step_model import StepModel


class ManyRanks(OneRank):
    """This rank of a deployment; see ``OneRank`` for what it is asked.

    Attributes:
        exchanges: of the step's expert layers, by their shape.
    """

    def __init__(self, group: RankGroup, deployment: Deployment, capacity: int | None = None) -> None:
        if deployment.gpus != group.size:
            raise ValueError(f"parallel: expected {group.size} GPUs, one for each rank; got {deployment.gpus}")
        if capacity is not None and not deployment.dispatches:
            raise ValueError(f"capacity: expected none without an exchange ({deployment.describe()}); got {capacity}")
        self.group, self.deployment, self.capacity = group, deployment, capacity
        self.split = Split(deployment, group.rank)
        self.exchanges: dict[MoeFfn, Exchange] = {}

    # -- what this rank holds ----------------------------------------------------------------------

    def model(self, model: StepModel) -> StepModel:
        return self.split.model(model)

    def source(self, source: Source, model: StepModel) -> Source:
        return SplitSource(source, self.split, model)

    def held(self, ffn: MoeFfn) -> range:
        return self.split.held(ffn)

    def heads_of(self, cache: KvCache | MlaCache, model: StepModel, index: int) -> KvCache | MlaCache:
        return self.split.heads_of(cache, model.layers[index])

    def ends(self, config: ModelConfig, ends: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.split.ends(ends)

    # -- what it does between launches -------------------------------------------------------------

    def reduced(self, step: DecodeStep, place: Place, y: torch.Tensor) -> torch.Tensor:
        if self.split.ways == 1:
            return y
        return self._sum(step, place, y)

    def _sum(self, step: DecodeStep, place: Place, y: torch.Tensor) -> torch.Tensor:
        out = step.buffer("sum", *y.shape)
        step.ops.append(all_reduce(place, self.group, y, out))
        return out

    def experts(
        self, step: DecodeStep, index: int, ffn: MoeFfn, layer: MoeLayer, x: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        if not self.deployment.dispatches:
            y = super().experts(step, index, ffn, layer, x, logits)
            op = step.ops[-1]
            step.ops[-1] = replace(op, work=lambda: self._heaviest(op))
            return y if self.group.size == 1 else self._sum(step, Place("experts_all_reduce", index), y)
        if ffn not in self.exchanges:
            made = self.exchanges[ffn] = make_exchange(self.group, layer, step.batch, capacity=self.capacity)
            step.buffers |= {f"exchange_{len(self.exchanges)}.{name}": part for name, part in made.buffers.items()}
        out = step.buffer("ffn", step.batch, x.shape[1])
        step.ops += exchanged_experts(self.exchanges[ffn], layer, index, x, logits, out)
        return out

    def _heaviest(self, op: StepOp) -> Work:
        """Of all ranks: where loads differ, the slowest has most to do."""
        mine = op.work()
        weights, moved, flops = self.group.most(mine.weight_bytes, mine.activation_bytes, mine.flops)
        return Work(int(weights), int(moved), flops)

    def head(self, step: DecodeStep, weight: torch.Tensor, x: torch.Tensor) -> None:
        if self.split.ways == 1:
            super().head(step, weight, x)
            return
        part = step.buffer("logits_part", step.batch, weight.shape[0])
        gathered = step.buffer("logits_gathered", self.group.size * step.batch, weight.shape[0])
        step.ops.append(ops.torch_linear(Place("lm_head"), weight, x, part))
        step.ops.append(gather_logits(Place("logits_all_gather"), self.group, part, gathered, step.logits))

    # -- afterwards --------------------------------------------------------------------------------

    def check_overflow(self) -> None:
        """All ranks together.

        Raises:
            ValueError: on all of them, if some exchange so far had more rows than its capacity.
        """
        worst = max((exchange.overflowed() for exchange in self.exchanges.values()), default=0.0)
        if worst:
            given = next(iter(self.exchanges.values())).capacity
            raise ValueError(f"capacity: expected {given + int(worst)} rows or more for this routing; got {given}")


def build_rank_step(
    model: StepModel, ranks: ManyRanks, *, length: int | None = None, seed: int = 0, page_size: int = PAGE_SIZE,
    max_weight_bytes: float = math.inf, source: Source | None = None,
) -> DecodeStep:  # fmt: skip
    """This rank's step of ``ranks.deployment``: its sequences, their context, its precision.

    Args:
        length: tokens that each sequence has cached; the deployment's context by default.
        seed: of weights, the same on all ranks; caches of ranks with sequences of their own differ.
        max_weight_bytes: on this rank, the same on all.

    Raises:
        ValueError: as ``build_step`` and ``ranks_split``.
    """
    given, group = ranks.deployment, ranks.group
    if given.tokens_per_step != 1:
        raise ValueError(f"tokens_per_step: expected 1; got {given.tokens_per_step}")
    own = group.rank if given.attention_dp > 1 else 0
    step = build_step(
        model, given.precision, batch=given.sequences, length=given.context if length is None else length,
        device=group.device, source=source or RandomSource(seed, group.device), seed=seed + own,
        max_weight_bytes=max_weight_bytes, page_size=page_size, ranks=ranks,
    )  # fmt: skip
    step.token_seed = own
    return step


def planned_communication(model: ModelConfig, gpu: Gpu, deployment: Deployment) -> dict[str, OpCall]:
    """The decode plan's communication, by name: what a step of ``build_rank_step`` must contain, as often."""
    calls = decode_plan(model, gpu, deployment, check_memory=False)
    return {call.name: call for call in calls if call.name in COMMUNICATION}
