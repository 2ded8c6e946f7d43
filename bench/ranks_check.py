"""Whether a step on several ranks computes what one rank does: at cut sizes, on GPUs or on Triton's interpreter.

The model keeps its kinds of layers, its router's rule, biases, sinks and windows, its formats; its widths, heads,
experts and vocabulary are cut to what an interpreter can run in seconds. Each rank makes its own step, and beside it
the step of one rank that holds the whole model and decodes the same sequences. Then:

- each layer's residual stream and the logits against plain torch in float64, given the streams before
  (``step_reference.check_layers``), at the house's tolerance for a layer;
- with an exchange (dpN-epN), the same bits as the one rank, in every stream and in the logits;
- communication: the ops that the decode plan has, as often.

Nothing is timed. Errors: ``ValueError`` as ``ranks_step``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..kernels.routing_reference import route_ref
from .decode_step import build_step
from .deployment import Deployment
from .gpus import get_gpu
from .model_config import DenseFfn, GqaAttention, Layer, MoeFfn
from .ranks_group import RankGroup
from .ranks_ops import COMMUNICATION
from .ranks_step import ManyRanks, build_rank_step, planned_communication
from .step_cases import layer_tolerance
from .step_layers import routing_of
from .step_model import StepModel
from .step_ops import StepOp
from .step_reference import check_layers
from .step_state import DecodeStep
from .step_weights import RandomSource

LENGTHS = (0, 17, 40)
"""Cached tokens of the sequences: none, beyond a page, on several pages."""

PAGE_SIZE = 16
_TRIES, _NOISE = 32, 0.03
_HIDDEN, _WIDTH, _CONTEXT = 128, 128, 128


@dataclass(frozen=True)
class RankCheck:
    """What came of a check; the same on all ranks.

    Attributes:
        worst: of each rank, the largest error of a layer or of the logits, as a share of the tolerance.
        same_bits: as one rank's, on every rank; None where no bits are promised.
        communication: ops of a step, by name.
        problems: what is wrong, in words; empty for a step that is right.
    """

    model: str
    parallel: str
    precision: str
    ranks: int
    backend: str
    layers: int
    tolerance: float
    worst: tuple[float, ...]
    same_bits: bool | None
    communication: dict[str, int]
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def cut_model(model: StepModel, deployment: Deployment) -> StepModel:
    """See the module: one layer of each kind, in order."""
    layers = tuple(dict.fromkeys(_cut_layer(layer, deployment) for layer in model.layers))
    counted = tuple((layer, 1) for layer in layers)
    vocab = 32 * deployment.gpus
    config = replace(model.config, hidden_size=_HIDDEN, vocab_size=vocab, max_context=_CONTEXT, layers=counted)
    return StepModel(config, layers, model.numerics)


def _cut_layer(layer: Layer, deployment: Deployment) -> Layer:
    attention, ffn, ways = layer.attention, layer.ffn, deployment.attention_tp
    if isinstance(attention, GqaAttention):
        kv_heads = min(attention.num_kv_heads, 2 * ways)
        window = None if attention.window is None else min(attention.window, 7)
        cut = replace(attention, num_heads=4 * ways, num_kv_heads=kv_heads, window=window)
    else:
        q_lora = None if attention.q_lora_rank is None else _WIDTH
        cut = replace(attention, num_heads=2 * ways, q_lora_rank=q_lora, kv_lora_rank=256, nope_dim=32, rope_dim=32,
                      v_dim=64)  # fmt: skip
    if isinstance(ffn, DenseFfn):
        return Layer(cut, DenseFfn(_WIDTH * ways))
    experts = max(8, 4 * deployment.expert_parallel)
    has_groups = ffn.router.num_groups > 1
    router = replace(ffn.router, num_groups=2 if has_groups else 1, kept_groups=1)
    shared = _WIDTH * ways if ffn.shared_intermediate_size else 0
    inter = _WIDTH * deployment.expert_tp
    return Layer(cut, replace(ffn, num_experts=experts, top_k=min(ffn.top_k, 2), intermediate_size=inter,
                              shared_intermediate_size=shared, router=router))  # fmt: skip


def cut_deployment(deployment: Deployment) -> Deployment:
    """With as many sequences in an attention group as ``LENGTHS``."""
    return replace(deployment, batch_per_gpu=len(LENGTHS) / deployment.attention_tp, context=max(LENGTHS))


def make_steps(group: RankGroup, model: StepModel, deployment: Deployment) -> tuple[ManyRanks, DecodeStep, DecodeStep]:
    """(ranks, this rank's step, one rank's with the same sequences) of a cut model."""
    ranks = ManyRanks(group, deployment)
    step = build_rank_step(model, ranks, length=max(LENGTHS), page_size=PAGE_SIZE)
    own = step.token_seed
    one = build_step(
        model, deployment.precision, batch=len(LENGTHS), length=max(LENGTHS), device=group.device,
        source=RandomSource(0, group.device), seed=own, page_size=PAGE_SIZE, is_plain=True,
    )  # fmt: skip
    for each in (step, one):
        each.seek(LENGTHS)
    tokens = group.numbers(_clear_tokens(one, own))
    mine = torch.tensor(tokens[group.rank if deployment.attention_dp > 1 else 0], dtype=torch.int64)
    for each in (step, one):
        each.token_ids.copy_(mine)
    return ranks, step, one


def _clear_tokens(one: DecodeStep, seed: int) -> list[float]:
    """Tokens whose experts one rank chooses clearly.

    Rounding decides between experts that are as good as equal, and then a right step is far from another right one.

    Raises:
        ValueError: none found, which no random weights explain.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_TRIES):
        one.token_ids.copy_(torch.randint(one.model.config.vocab_size, (one.batch,), generator=generator))
        clear: list[bool] = []

        def look(op: StepOp, clear: list[bool] = clear) -> None:
            if op.name == "router" and op.layer is not None:
                clear.append(_is_clear(one, op.layer, op.outputs["y"].cpu().float()))

        one.launch(look)
        if all(clear):
            return [float(token) for token in one.token_ids.tolist()]
    raise ValueError(f"tokens: expected some whose experts are chosen clearly; got none in {_TRIES} tries")


def _is_clear(one: DecodeStep, layer: int, logits: torch.Tensor) -> bool:
    """Whether the choice stays under noise of ``_NOISE`` of the logits' size."""
    ffn, bias = one.model.layers[layer].ffn, one.layers[layer].tensors.get("correction_bias")
    assert isinstance(ffn, MoeFfn)
    routing, bias = routing_of(ffn), None if bias is None else bias.cpu()
    chosen = route_ref(logits, routing, bias)[0].sort(dim=1).values
    generator = torch.Generator().manual_seed(layer)
    size = _NOISE * logits.square().mean().sqrt()
    for _ in range(_TRIES):
        noisy = logits + size * torch.randn(logits.shape, generator=generator)
        if not torch.equal(route_ref(noisy, routing, bias)[0].sort(dim=1).values, chosen):
            return False
    return True


def check_ranks(group: RankGroup, model: StepModel, deployment: Deployment, parallel: str) -> RankCheck:
    """Checks a deployment of a model at cut sizes; on all ranks together, with one verdict.

    Raises:
        ValueError: as ``ManyRanks`` and ``build_step``.
    """
    small, given = cut_model(model, deployment), cut_deployment(deployment)
    ranks, step, one = make_steps(group, small, given)
    step.poison()
    streams, alone = step.launch_with_streams(), one.launch_with_streams()
    ranks.check_overflow()
    same: bool | None = None
    if deployment.dispatches:
        pairs = zip([*streams, step.logits, step.next_token], [*alone, one.logits, one.next_token], strict=True)
        same = group.every(all(torch.equal(got, expected) for got, expected in pairs))
    one.logits.copy_(step.logits)
    tolerance = layer_tolerance(one)
    worst = tuple(row[0] for row in group.numbers([_largest(check_layers(one, streams)) / tolerance]))
    found = Counter(op.name for op in step.ops if op.name in COMMUNICATION)
    calls = planned_communication(small.config, get_gpu("b300"), given)  # any GPU: the plan's names do not depend on it
    planned = {name: call.calls_per_step for name, call in calls.items()}
    wrong = [(rank, error) for rank, error in enumerate(worst) if not error <= 1]
    problems = [f"rank {rank}: error {error:.3g} of the tolerance" for rank, error in wrong]
    if same is False:
        problems.append("bits: other than one rank's")
    if dict(found) != planned:
        problems.append(f"communication: expected {planned}, as in the decode plan; got {dict(found)}")
    return RankCheck(
        model.config.name, parallel, given.precision.name, group.size, group.backend, len(small.layers), tolerance,
        worst, same, dict(found), tuple(problems),
    )  # fmt: skip


def _largest(errors: list[float]) -> float:
    """NaN counts as more than any."""
    return max(float("inf") if error != error else error for error in errors)
