"""What the decode plan needs to know of a model: attention, FFN and layer shapes, counted.

Parameter counts include embedding and LM head, not multi-token-prediction layers. Layer rules
follow Hugging Face ``transformers``' modelling code of each architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GqaAttention:
    """Grouped-query attention. ``window``: tokens a query sees, None for all of them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    has_sinks: bool = False
    has_bias: bool = False
    has_qk_norm: bool = False

    def num_parameters(self, hidden_size: int) -> int:
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = query + 2 * key_value if self.has_bias else 0
        norm = 2 * self.head_dim if self.has_qk_norm else 0
        return hidden_size * (2 * query + 2 * key_value) + bias + norm

    @property
    def kv_values_per_token(self) -> int:
        """Cached values per token and layer, all heads."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class SparseIndexer:
    """DeepSeek sparse attention: a small FP8 scorer picks ``top_k`` cached tokens per query."""

    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True)
class MlaAttention:
    """Multi-head latent attention: one latent of ``kv_lora_rank + rope_dim`` per token, all heads."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    indexer: SparseIndexer | None = None

    def num_parameters(self, hidden_size: int) -> int:
        query_width = self.num_heads * (self.nope_dim + self.rope_dim)
        query = hidden_size * query_width
        if self.q_lora_rank is not None:
            query = (hidden_size + query_width + 1) * self.q_lora_rank
        latent = hidden_size * (self.kv_lora_rank + self.rope_dim) + self.kv_lora_rank
        out = self.num_heads * self.v_dim * hidden_size
        return query + latent + self.absorbed_parameters + out + self.indexer_parameters(hidden_size)

    @property
    def absorbed_parameters(self) -> int:
        """The up-projections of k and v, which decoding folds into q and the output."""
        return self.kv_lora_rank * self.num_heads * (self.nope_dim + self.v_dim)

    def replicated_parameters(self, hidden_size: int) -> int:
        """What every rank of a tensor-parallel group holds whole: the down-projections and their norms."""
        down = self.kv_lora_rank + self.rope_dim + (self.q_lora_rank or 0)
        return hidden_size * down + self.kv_lora_rank + (self.q_lora_rank or 0)

    def indexer_parameters(self, hidden_size: int) -> int:
        if self.indexer is None:
            return 0
        heads, dim = self.indexer.num_heads, self.indexer.head_dim
        return (self.q_lora_rank or hidden_size) * heads * dim + hidden_size * (dim + heads) + 2 * dim

    @property
    def kv_values_per_token(self) -> int:
        return self.kv_lora_rank + self.rope_dim


Attention = GqaAttention | MlaAttention


@dataclass(frozen=True)
class DenseFfn:
    """Gated MLP: 2 I x h, then h x I."""

    intermediate_size: int

    def num_parameters(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.intermediate_size


@dataclass(frozen=True)
class Router:
    """How experts are chosen: scoring, expert groups (``num_groups``, ``kept_groups``), scale."""

    scoring: str
    renormalize: bool
    has_bias: bool = False
    num_groups: int = 1
    kept_groups: int = 1
    scaling_factor: float = 1.0


@dataclass(frozen=True)
class MoeFfn:
    """Routed experts of ``intermediate_size`` and one shared expert of ``shared_intermediate_size``."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int
    router: Router
    has_bias: bool = False

    def expert_bias_parameters(self, hidden_size: int) -> int:
        return 2 * self.intermediate_size + hidden_size if self.has_bias else 0

    def expert_parameters(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.intermediate_size + self.expert_bias_parameters(hidden_size)

    def shared_parameters(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.shared_intermediate_size

    def router_parameters(self, hidden_size: int) -> int:
        return self.num_experts * (hidden_size + (1 if self.router.has_bias or self.has_bias else 0))

    def num_parameters(self, hidden_size: int) -> int:
        routed = self.num_experts * self.expert_parameters(hidden_size)
        return routed + self.shared_parameters(hidden_size) + self.router_parameters(hidden_size)


Ffn = DenseFfn | MoeFfn


@dataclass(frozen=True)
class Layer:
    attention: Attention
    ffn: Ffn


@dataclass(frozen=True)
class ModelConfig:
    """A model as the decode plan needs it.

    Attributes:
        layers: (layer, how many of them), order of first appearance.
        native_precision: the precision of the published checkpoint ("bf16", "fp8", "mxfp4"),
            None where ``quantization_config`` is of a kind tokenfab does not know.
    """

    name: str
    architecture: str
    hidden_size: int
    vocab_size: int
    max_context: int
    tied_embeddings: bool
    layers: tuple[tuple[Layer, int], ...]
    native_precision: str | None

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)

    @property
    def num_parameters(self) -> int:
        return self._count(lambda ffn: ffn.num_parameters(self.hidden_size))

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token touches, embedding and head included."""
        return self._count(self._active)

    def kv_values_per_token(self) -> int:
        """Cached values per token over all layers, windows not applied."""
        return sum(layer.attention.kv_values_per_token * count for layer, count in self.layers)

    def _active(self, ffn: Ffn) -> int:
        if isinstance(ffn, DenseFfn):
            return ffn.num_parameters(self.hidden_size)
        routed = ffn.top_k * ffn.expert_parameters(self.hidden_size)
        return routed + ffn.shared_parameters(self.hidden_size) + ffn.router_parameters(self.hidden_size)

    def _count(self, ffn_parameters: Callable[[Any], int]) -> int:
        ends = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2) + self.hidden_size
        return ends + sum(
            count
            * (layer.attention.num_parameters(self.hidden_size) + ffn_parameters(layer.ffn) + 2 * self.hidden_size)
            for layer, count in self.layers
        )
