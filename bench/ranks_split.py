"""What one rank of a deployment holds: which heads, channels, experts and rows of the vocabulary, and of which weights.

Two deployments run (see ``decode_plan``):

- attention data parallel, experts spread, an all-to-all (dpN-epN): a rank has all of the attention, dense and shared
  weights, sequences of its own, and E / N experts;
- attention tensor parallel (tpN, tpN-epN): all ranks have the same sequences; a rank has H / N heads, their KV heads
  (replicated where N is more), I / N channels of dense and shared FFNs, V / N rows of the LM head, and its experts:
  E / e of them, I / (N / e) channels of each. Biases behind a sum over ranks are rank 0's.

Slices are of the weights before they are quantized, along whole blocks of their format, so that a slice has the values
that the whole one has.

Errors: ``ValueError`` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kernels.formats import get_format
from ..kernels.kv_cache import KvCache, MlaCache
from .deployment import Deployment, check_divides
from .model_config import DenseFfn, GqaAttention, Layer, MoeFfn
from .step_model import StepModel
from .step_weights import Shape, Source, attention_roles, expert_roles, ffn_roles


@dataclass(frozen=True)
class Split:
    """One rank's part of a deployment.

    Raises:
        ValueError: a deployment that does not run here, or no rank of it.
    """

    deployment: Deployment
    rank: int

    def __post_init__(self) -> None:
        given = self.deployment
        if not 0 <= self.rank < given.gpus:
            raise ValueError(f"rank: expected 0 to {given.gpus - 1}; got {self.rank}")
        if not (given.attention_dp == 1 or (given.attention_tp == 1 and given.dispatches)):
            raise ValueError(f"parallel: expected tpN, tpN-epN or dpN-epN; got {given.describe()}")

    @property
    def ways(self) -> int:
        """Of attention, dense FFNs and LM head."""
        return self.deployment.attention_tp

    @property
    def place(self) -> int:
        """Of this rank among them."""
        return self.rank % self.ways

    @property
    def expert_ways(self) -> tuple[int, int]:
        """(ways each expert is split, this rank's place among them)."""
        ways = self.deployment.expert_tp
        return ways, self.rank % ways

    def held(self, ffn: MoeFfn) -> range:
        """This rank's experts."""
        local = ffn.num_experts // self.deployment.expert_parallel
        first = self.rank // self.deployment.expert_tp * local
        return range(first, first + local)

    def kv_heads(self, attention: GqaAttention) -> range:
        """This rank's, of those of the whole model."""
        count = max(1, attention.num_kv_heads // self.ways)
        first = self.place * attention.num_kv_heads // self.ways
        return range(first, first + count)

    # -- shapes ------------------------------------------------------------------------------------

    def model(self, model: StepModel) -> StepModel:
        """The layers as this rank computes them.

        Raises:
            ValueError: heads, experts or widths that do not divide, or a slice through a block of a format.
        """
        check_divides(model.config, self.deployment)
        self._check_blocks(model)
        return replace(model, layers=tuple(self._layer(layer) for layer in model.layers))

    def _layer(self, layer: Layer) -> Layer:
        attention, ffn = layer.attention, layer.ffn
        heads = attention.num_heads // self.ways
        if isinstance(attention, GqaAttention):
            attention = replace(attention, num_heads=heads, num_kv_heads=len(self.kv_heads(attention)))
        else:
            attention = replace(attention, num_heads=heads)
        if isinstance(ffn, DenseFfn):
            return Layer(attention, replace(ffn, intermediate_size=ffn.intermediate_size // self.ways))
        inter = ffn.intermediate_size // self.expert_ways[0]
        shared = ffn.shared_intermediate_size // self.ways
        return Layer(attention, replace(ffn, intermediate_size=inter, shared_intermediate_size=shared))

    def _check_blocks(self, model: StepModel) -> None:
        precision = self.deployment.precision
        hidden = model.config.hidden_size
        for layer in dict.fromkeys(model.layers):
            cut = self._layer(layer)
            whole, mine = _shapes(layer, hidden), _shapes(cut, hidden)
            for role, shape in whole.items():
                if len(shape) != 2 or role == "kv_b":  # which stays BF16
                    continue
                format = precision.experts if role.startswith("expert.") else precision.linear
                block = get_format(format).block or (1, 1)
                for axis in range(2):
                    part = _run(role, mine[role], axis, cut)
                    if mine[role][axis] != shape[axis] and part % block[axis]:
                        raise ValueError(
                            f"parallel: expected slices of whole blocks of {block[axis]} ({format}); "
                            f"{model.config.name}'s {role} would have {part} on a rank"
                        )

    # -- weights -----------------------------------------------------------------------------------

    def slice(self, full: torch.Tensor, role: str, layer: Layer) -> torch.Tensor:
        """This rank's part of a tensor of a layer of the whole model."""
        expert = role.startswith("experts.")
        name = role.split(".")[-1]
        ways, place = self.expert_ways if expert else (self.ways, self.place)
        if ways == 1:
            return full
        attention = layer.attention
        if name in ("qkv", "qkv_bias"):
            assert isinstance(attention, GqaAttention)
            return self._heads(full, attention)
        if name == "q_kv_a" and getattr(attention, "q_lora_rank", None) is None:
            assert not isinstance(attention, GqaAttention)
            tail = attention.kv_lora_rank + attention.rope_dim
            return torch.cat((_part(full[:-tail], ways, place), full[-tail:]))
        if name in ("q_b", "kv_b", "sinks"):
            return _part(full, ways, place)
        if name.startswith(("gate_up", "shared_gate_up")):  # their biases too
            gate, up = full.chunk(2)
            return torch.cat((_part(gate, ways, place), _part(up, ways, place)))
        if name in ("o", "down", "shared_down"):
            return _part(full, ways, place, axis=1)
        if name in ("o_bias", "down_bias"):
            return full if place == 0 else torch.zeros_like(full)
        return full

    def _heads(self, full: torch.Tensor, attention: GqaAttention) -> torch.Tensor:
        heads = full.unflatten(0, (-1, attention.head_dim))
        q, k, v = heads.split((attention.num_heads, attention.num_kv_heads, attention.num_kv_heads))
        kv = self.kv_heads(attention)
        return torch.cat((_part(q, self.ways, self.place), k[kv.start : kv.stop], v[kv.start : kv.stop])).flatten(0, 1)

    def heads_of(self, cache: KvCache | MlaCache, layer: Layer) -> KvCache | MlaCache:
        """This rank's heads of a cache of the whole model; latents are every rank's."""
        if self.ways == 1 or not isinstance(cache, KvCache):
            return cache
        assert isinstance(layer.attention, GqaAttention)
        kv = self.kv_heads(layer.attention)
        return KvCache(cache.layout, cache.pages[:, kv.start : kv.stop].contiguous(), cache.factors)

    def ends(self, ends: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its rows of the LM head; the rest is every rank's."""
        if self.ways == 1:
            return ends
        head = ends.get("lm_head", ends["embedding"])
        return ends | {"lm_head": _part(head, self.ways, self.place).contiguous()}


def _part(full: torch.Tensor, ways: int, place: int, axis: int = 0) -> torch.Tensor:
    return full.chunk(ways, dim=axis)[place]


def _run(role: str, shape: Shape, axis: int, layer: Layer) -> int:
    """Rows or columns of a rank that stand together in the whole tensor, at least a divisor of them."""
    attention = layer.attention
    if axis == 0 and role.endswith("gate_up"):
        return shape[0] // 2
    if axis == 0 and role == "qkv":
        assert isinstance(attention, GqaAttention)
        return math.gcd(attention.num_heads, attention.num_kv_heads) * attention.head_dim
    if axis == 0 and role == "q_kv_a" and not isinstance(attention, GqaAttention):
        return attention.num_heads * (attention.nope_dim + attention.rope_dim)
    return shape[axis]


def _shapes(layer: Layer, hidden: int) -> dict[str, Shape]:
    """Roles and shapes of a layer, one expert's as "expert.gate_up" and so on."""
    made = attention_roles(layer, hidden) | ffn_roles(layer, hidden)
    if isinstance(layer.ffn, MoeFfn):
        made |= {f"expert.{role}": shape for role, shape in expert_roles(layer.ffn, hidden).items()}
    return made


@dataclass(frozen=True)
class SplitSource:
    """The weights of one rank, from a source of the whole model's: each tensor is made whole, then cut."""

    source: Source
    split: Split
    model: StepModel

    def tensor(self, layer: int | None, role: str, shape: Shape) -> Any:
        if layer is None:  # ``Split.ends`` cuts these
            return self.source.tensor(None, role, shape)
        whole = self.model.layers[layer]
        name = f"expert.{role.split('.')[-1]}" if role.startswith("experts.") else role
        full = self.source.tensor(layer, role, _shapes(whole, self.model.config.hidden_size)[name])
        part = self.split.slice(full, role, whole).contiguous()
        if tuple(part.shape) != tuple(shape):
            raise ValueError(f"{role}: expected {tuple(shape)} on rank {self.split.rank}; got {tuple(part.shape)}")
        return part
