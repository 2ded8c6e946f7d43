"""Whole decode steps over two ranks against one rank's, and what must be seen when a part of them is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tokenfab.bench import ranks_split
from tokenfab.bench.deployment import PRECISIONS, Deployment
from tokenfab.bench.ranks_check import RankCheck, check_ranks
from tokenfab.bench.ranks_group import RankGroup
from tokenfab.bench.ranks_ops import COMMUNICATION
from tokenfab.bench.step_model import StepModel
from tokenfab.tests.bench.ranks_layer_cases import changed
from tokenfab.tests.bench.step_models import deepseek, gpt_oss, qwen

_RIGHT_TENSOR = ranks_split.SplitSource.tensor
SPLITS = {"dp2-ep2": (1, 2), "tp2": (2, 1), "tp2-ep2": (2, 2)}


_LAYER = qwen(1).layers[0]
ONE_KV_HEAD = replace(qwen(1), layers=(replace(_LAYER, attention=replace(_LAYER.attention, num_kv_heads=1)),))


def deployed(split: str, precision: str) -> Deployment:
    tp, ep = SPLITS[split]
    return Deployment(2, tp, ep, PRECISIONS[precision], 2.0, 40)


def checked(group: RankGroup, model: StepModel, split: str, precision: str = "bf16") -> RankCheck:
    return check_ranks(group, model, deployed(split, precision), split)


def is_right(group: RankGroup, model: StepModel, split: str, precision: str) -> bool:
    found = checked(group, model, split, precision)
    expected = {"dispatch", "combine"} if split == "dp2-ep2" else {"attention_all_reduce", "logits_all_gather"}
    is_whole = expected <= set(found.communication) <= set(COMMUNICATION) and len(found.worst) == 2
    promised = True if split == "dp2-ep2" else None
    if group.rank == 0 and not found.passed:
        print(found, flush=True)
    return found.passed and is_whole and found.same_bits is promised and 0 < max(found.worst) < 1


def is_seen(group: RankGroup, split: str, owner: Any, name: str, value: Any, model: StepModel | None = None) -> bool:
    """With the change, some rank's error is beyond the tolerance, or its bits are others."""
    with changed(owner, name, value):
        found = checked(group, model or qwen(1), split)
    return any(problem.startswith(("rank", "bits")) for problem in found.problems)


def _other_heads(self: Any, full: torch.Tensor, attention: Any) -> torch.Tensor:
    """Keys of the other rank's heads."""
    heads = full.unflatten(0, (-1, attention.head_dim))
    q, k, v = heads.split((attention.num_heads, attention.num_kv_heads, attention.num_kv_heads))
    other = 1 - self.place
    parts = (q.chunk(2)[self.place], k.chunk(2)[other], v.chunk(2)[self.place])
    return torch.cat(parts).flatten(0, 1)


def _others_held(self: Any, ffn: Any) -> range:
    """Experts of the other rank, under their own numbers: an exchange would not find them."""
    local = ffn.num_experts // 2
    return range((1 - self.rank) * local, (2 - self.rank) * local)


def _no_sum(self: Any, x: torch.Tensor) -> None:
    return


def _next_expert(self: Any, layer: int | None, role: str, shape: Any) -> Any:
    """The weights of another expert under this one's number."""
    if role.startswith("experts."):
        _, expert, name = role.split(".")
        role = f"experts.{int(expert) ^ 1}.{name}"
    return _RIGHT_TENSOR(self, layer, role, shape)


def _slice_with(change: Callable[[ranks_split.Split, torch.Tensor, str, Any], torch.Tensor | None]) -> Any:
    right = ranks_split.Split.slice

    def wrong(self: ranks_split.Split, full: torch.Tensor, role: str, layer: Any) -> torch.Tensor:
        made = change(self, full, role, layer)
        return right(self, full, role, layer) if made is None else made

    return wrong


def _bias_on_all(self: Any, full: torch.Tensor, role: str, layer: Any) -> torch.Tensor | None:
    return full if role == "o_bias" else None


def _gate_up_as_one(self: Any, full: torch.Tensor, role: str, layer: Any) -> torch.Tensor | None:
    """Half of all rows, so that a rank has the gate and the other the up projection."""
    return full.chunk(2)[self.rank] if role.startswith("experts.") and role.endswith("gate_up") else None


def refuses_wrong_experts(group: RankGroup) -> bool:
    with changed(ranks_split.Split, "held", _others_held):
        try:
            checked(group, qwen(1), "dp2-ep2")
        except ValueError as error:
            return str(error).startswith("first_expert: expected")
    return False


def logits_are_mixed_up(group: RankGroup) -> bool:
    right = RankGroup.all_gather

    def wrong(self: RankGroup, out: torch.Tensor, x: torch.Tensor) -> None:
        right(self, out, x)
        out.copy_(torch.cat(out.chunk(2)[::-1]))

    return is_seen(group, "tp2", RankGroup, "all_gather", wrong)


def cache_is_of_other_heads(group: RankGroup) -> bool:
    right = ranks_split.Split.heads_of

    def wrong(self: ranks_split.Split, cache: Any, layer: Any) -> Any:
        return right(replace(self, rank=1 - self.rank), cache, layer)

    return is_seen(group, "tp2", ranks_split.Split, "heads_of", wrong)


CASES: dict[str, Callable[[RankGroup], bool]] = {
    "dp2-ep2 qwen bf16": partial(is_right, model=qwen(1), split="dp2-ep2", precision="bf16"),
    "dp2-ep2 deepseek fp8": partial(is_right, model=deepseek(), split="dp2-ep2", precision="fp8"),
    "dp2-ep2 gpt-oss mxfp4": partial(is_right, model=gpt_oss(1), split="dp2-ep2", precision="mxfp4"),
    "tp2 qwen bf16": partial(is_right, model=qwen(1), split="tp2", precision="bf16"),
    "tp2 deepseek bf16": partial(is_right, model=deepseek(), split="tp2", precision="bf16"),
    "tp2-ep2 deepseek fp8": partial(is_right, model=deepseek(None, "m"), split="tp2-ep2", precision="fp8"),
    "tp2-ep2 gpt-oss mxfp4": partial(is_right, model=gpt_oss(1), split="tp2-ep2", precision="mxfp4"),
    "tp2, one KV head for both": partial(is_right, model=ONE_KV_HEAD, split="tp2", precision="bf16"),
    "seen: no sums": partial(is_seen, split="tp2", owner=RankGroup, name="all_reduce", value=_no_sum),
    "seen: weights of other experts": partial(
        is_seen, split="tp2-ep2", owner=ranks_split.SplitSource, name="tensor", value=_next_expert
    ),
    "seen: keys of other heads": partial(
        is_seen, split="tp2", owner=ranks_split.Split, name="_heads", value=_other_heads
    ),
    "seen: caches of other heads": cache_is_of_other_heads,
    "seen: a bias on every rank": partial(
        is_seen,
        split="tp2",
        owner=ranks_split.Split,
        name="slice",
        value=_slice_with(_bias_on_all),
        model=gpt_oss(1),
    ),
    "seen: gate and up on a rank each": partial(
        is_seen, split="tp2", owner=ranks_split.Split, name="slice", value=_slice_with(_gate_up_as_one)
    ),
    "seen: logits mixed up": logits_are_mixed_up,
    "refused: another rank's experts": refuses_wrong_experts,
}
