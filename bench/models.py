"""Models by name: ``ModelConfig`` read from a Hugging Face ``config.json``.

``load_model("deepseek-v3")`` takes a shipped model; ``load_model("path/to/config.json")`` (or its
folder) any other of a known architecture. An unknown architecture is refused by name.

Sources: the configs published with the models; GLM-4.5's is written from its published shapes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec

from .model_config import (
    Attention,
    DenseFfn,
    GqaAttention,
    Layer,
    MlaAttention,
    ModelConfig,
    MoeFfn,
    Router,
    SparseIndexer,
)

SHIPPED = Path(__file__).with_suffix("")
"""Folder of the shipped ``config.json`` files."""

Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**24)]
Factor = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class _Raw(msgspec.Struct, kw_only=True):
    hidden_size: Size
    vocab_size: Size
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    num_attention_heads: Size
    num_key_value_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size = 131072
    tie_word_embeddings: bool = False
    quantization_config: dict[str, Any] | None = None
    num_experts_per_tok: Size
    head_dim: Size | None = None

    def gqa(self, **kwargs: Any) -> GqaAttention:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
            self.num_key_value_heads,
        )
        head_dim = self.head_dim
        if head_dim is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                "num_attention_heads",
                f"a divisor of hidden_size = {self.hidden_size}",
                self.num_attention_heads,
            )
            head_dim = self.hidden_size // self.num_attention_heads
        return GqaAttention(self.num_attention_heads, self.num_key_value_heads, head_dim, **kwargs)

    def layers(self) -> list[Layer]:
        raise NotImplementedError


class _Mixtral(_Raw, kw_only=True):
    num_local_experts: Size
    sliding_window: Size | None = None

    def layers(self) -> list[Layer]:
        moe = _moe(self, self.num_local_experts, self.intermediate_size, 0, Router("softmax_top_k", True))
        return [Layer(self.gqa(window=self.sliding_window), moe)] * self.num_hidden_layers


class _Qwen3Moe(_Raw, kw_only=True):
    num_experts: Size
    moe_intermediate_size: Size
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[Count] = []
    attention_bias: bool = False

    def layers(self) -> list[Layer]:
        attention = self.gqa(has_qk_norm=True, has_bias=self.attention_bias)
        moe = _moe(self, self.num_experts, self.moe_intermediate_size, 0, Router("softmax", self.norm_topk_prob))
        dense = DenseFfn(self.intermediate_size)
        sparse = [
            index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0
            for index in range(self.num_hidden_layers)
        ]
        return [Layer(attention, moe if is_moe else dense) for is_moe in sparse]


class _GptOss(_Raw, kw_only=True):
    num_local_experts: Size
    layer_types: list[str]
    sliding_window: Size
    attention_bias: bool = True

    def layers(self) -> list[Layer]:
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            "layer_types",
            f"{self.num_hidden_layers} entries (num_hidden_layers)",
            len(self.layer_types),
        )
        full = self.gqa(has_sinks=True, has_bias=self.attention_bias)
        kinds = {"full_attention": full, "sliding_attention": replace(full, window=self.sliding_window)}
        moe = _moe(
            self, self.num_local_experts, self.intermediate_size, 0, Router("softmax_top_k", True), has_bias=True
        )
        for kind in self.layer_types:
            _require(kind in kinds, "layer_types", f"one of {', '.join(kinds)}", kind)
        return [Layer(kinds[kind], moe) for kind in self.layer_types]


class _MiniMaxM2(_Raw, kw_only=True):
    num_local_experts: Size
    shared_intermediate_size: Count = 0
    use_qk_norm: bool = False
    scoring_func: str = "softmax"
    use_routing_bias: bool = False

    def layers(self) -> list[Layer]:
        router = Router(self.scoring_func, True, has_bias=self.use_routing_bias)
        moe = _moe(self, self.num_local_experts, self.intermediate_size, self.shared_intermediate_size, router)
        return [Layer(self.gqa(has_qk_norm=self.use_qk_norm), moe)] * self.num_hidden_layers


class _Llama4Text(_Raw, kw_only=True):
    num_local_experts: Size
    intermediate_size_mlp: Size
    interleave_moe_layer_step: Size
    attention_chunk_size: Size | None = None
    no_rope_layer_interval: Size = 4
    attention_bias: bool = False
    use_qk_norm: bool = False

    def layers(self) -> list[Layer]:
        full = self.gqa(has_bias=self.attention_bias, has_qk_norm=self.use_qk_norm)
        # chunked attention on the layers with RoPE; every fourth layer has none and sees all tokens
        local = replace(full, window=self.attention_chunk_size)
        moe = _moe(
            self, self.num_local_experts, self.intermediate_size, self.intermediate_size, Router("sigmoid", False)
        )
        dense = DenseFfn(self.intermediate_size_mlp)
        return [
            Layer(
                full if (index + 1) % self.no_rope_layer_interval == 0 else local,
                moe if (index + 1) % self.interleave_moe_layer_step == 0 else dense,
            )
            for index in range(self.num_hidden_layers)
        ]


class _Llama4(msgspec.Struct):
    text_config: _Llama4Text
    quantization_config: dict[str, Any] | None = None

    def text(self) -> _Llama4Text:
        self.text_config.quantization_config = self.quantization_config or self.text_config.quantization_config
        return self.text_config


class _SharedExpertMoe(_Raw, kw_only=True):
    """What DeepSeek-V3 and GLM-4.5 share: dense first layers, shared experts, grouped sigmoid routing."""

    moe_intermediate_size: Size
    n_routed_experts: Size
    n_shared_experts: Count
    first_k_dense_replace: Count = 0
    moe_layer_freq: Size = 1
    n_group: Size = 1
    topk_group: Size = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Factor = 1.0
    scoring_func: str = "sigmoid"

    def attention(self) -> Attention:
        raise NotImplementedError

    def layers(self) -> list[Layer]:
        attention, dense = self.attention(), DenseFfn(self.intermediate_size)
        _require(self.topk_group <= self.n_group, "topk_group", f"at most n_group = {self.n_group}", self.topk_group)
        router = Router(
            self.scoring_func, self.norm_topk_prob, True, self.n_group, self.topk_group, self.routed_scaling_factor
        )
        moe = _moe(
            self,
            self.n_routed_experts,
            self.moe_intermediate_size,
            self.n_shared_experts * self.moe_intermediate_size,
            router,
        )
        return [
            Layer(attention, moe if index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0 else dense)
            for index in range(self.num_hidden_layers)
        ]


class _DeepseekV3(_SharedExpertMoe, kw_only=True):
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    q_lora_rank: Size | None = None

    def attention(self, indexer: SparseIndexer | None = None) -> Attention:
        return MlaAttention(
            self.num_attention_heads,
            self.q_lora_rank,
            self.kv_lora_rank,
            self.qk_nope_head_dim,
            self.qk_rope_head_dim,
            self.v_head_dim,
            indexer,
        )


class _DeepseekV32(_DeepseekV3, kw_only=True):
    index_n_heads: Size
    index_head_dim: Size
    index_topk: Size

    def attention(self, indexer: SparseIndexer | None = None) -> Attention:
        return super().attention(indexer or SparseIndexer(self.index_n_heads, self.index_head_dim, self.index_topk))


class _Glm4Moe(_SharedExpertMoe, kw_only=True):
    attention_bias: bool = False
    use_qk_norm: bool = False

    def attention(self) -> Attention:
        return self.gqa(has_bias=self.attention_bias, has_qk_norm=self.use_qk_norm)


ARCHITECTURES: dict[str, type[msgspec.Struct]] = {
    "DeepseekV3ForCausalLM": _DeepseekV3,
    "DeepseekV32ForCausalLM": _DeepseekV32,
    "Glm4MoeForCausalLM": _Glm4Moe,
    "GptOssForCausalLM": _GptOss,
    "Llama4ForCausalLM": _Llama4Text,
    "Llama4ForConditionalGeneration": _Llama4,
    "MiniMaxM2ForCausalLM": _MiniMaxM2,
    "MixtralForCausalLM": _Mixtral,
    "Qwen3MoeForCausalLM": _Qwen3Moe,
}


class _Head(msgspec.Struct):
    architectures: list[str]


def _require(condition: bool, field: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{field}: expected {expected}; got {got}")


def _moe(raw: _Raw, experts: int, inter: int, shared: int, router: Router, has_bias: bool = False) -> MoeFfn:
    top_k = raw.num_experts_per_tok
    _require(top_k <= experts, "num_experts_per_tok", f"at most the {experts} experts", top_k)
    _require(experts % router.num_groups == 0, "n_group", f"a divisor of the {experts} experts", router.num_groups)
    return MoeFfn(experts, top_k, inter, shared, router, has_bias)


def _native_precision(quantization: dict[str, Any] | None) -> str | None:
    if quantization is None:
        return "bf16"
    method = quantization.get("quant_method")
    if method == "fp8" and quantization.get("weight_block_size") == [128, 128]:
        return "fp8"
    return "mxfp4" if method == "mxfp4" else None


def model_from_config(text: str | bytes, name: str) -> ModelConfig:
    """A ``ModelConfig`` from the text of a ``config.json``.

    Raises:
        ValueError: not JSON, an unknown architecture (the known ones are listed), or a missing
            or absurd field; the message names the model and the field.
    """
    try:
        architectures = msgspec.json.decode(text, type=_Head).architectures
        known = [item for item in architectures if item in ARCHITECTURES]
        _require(bool(known), "architectures", f"one of {', '.join(ARCHITECTURES)}", architectures)
        raw: Any = msgspec.json.decode(text, type=ARCHITECTURES[known[0]])
        raw = raw.text() if isinstance(raw, _Llama4) else raw
        layers = raw.layers()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(f"model {name}: {error}") from None
    return ModelConfig(
        name=name,
        architecture=known[0],
        hidden_size=raw.hidden_size,
        vocab_size=raw.vocab_size,
        max_context=raw.max_position_embeddings,
        tied_embeddings=raw.tie_word_embeddings,
        layers=tuple(Counter(layers).items()),
        native_precision=_native_precision(raw.quantization_config),
    )


def shipped_models() -> list[str]:
    """Names of the models that come with tokenfab."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


@lru_cache(maxsize=64)
def _shipped(name: str) -> ModelConfig:
    return model_from_config((SHIPPED / f"{name}.json").read_bytes(), name)


def load_model(name: str) -> ModelConfig:
    """A shipped model by name, or any ``config.json`` by path (the file or its folder).

    Raises:
        ValueError: neither a shipped name nor a readable config of a known architecture.
    """
    if name.lower() in shipped_models():
        return _shipped(name.lower())
    path = Path(name)
    try:
        path = path / "config.json" if name and path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"model: expected one of {', '.join(shipped_models())}, or the path of a config.json; got {name!r}"
            )
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"model: cannot read {name!r}: {error.strerror}") from None
    return model_from_config(text, path.resolve().parent.name if path.name == "config.json" else path.stem)
