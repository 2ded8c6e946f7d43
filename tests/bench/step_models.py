"""Tiny models of each kind that a decode step has: each part of the large ones, at least sizes that kernels take."""

from __future__ import annotations

from dataclasses import replace

from tokenfab.bench.model_config import (
    DenseFfn,
    GqaAttention,
    Layer,
    MlaAttention,
    ModelConfig,
    MoeFfn,
    Router,
)
from tokenfab.bench.step_model import Numerics, StepModel, Yarn

_GQA = GqaAttention(4, 2, 64)
_MLA = MlaAttention(4, 64, 256, 32, 32, 32)


def _model(name: str, architecture: str, layers: list[Layer], numerics: Numerics, is_tied: bool = False) -> StepModel:
    counted = tuple((layer, layers.count(layer)) for layer in dict.fromkeys(layers))
    config = ModelConfig(name, architecture, 128, 64, 256, is_tied, counted, "bf16")
    return StepModel(config, tuple(layers), numerics)


def qwen(num_layers: int = 2) -> StepModel:
    layer = Layer(replace(_GQA, has_qk_norm=True), MoeFfn(4, 2, 64, 0, Router("softmax", True)))
    return _model("tiny-qwen", "Qwen3MoeForCausalLM", [layer] * num_layers, Numerics(0.1, 100.0), is_tied=True)


def gpt_oss(num_layers: int = 2) -> StepModel:
    full = replace(_GQA, has_sinks=True, has_bias=True)
    ffn = MoeFfn(4, 2, 96, 0, Router("softmax_top_k", True), has_bias=True)
    layers = [Layer(full if index % 2 else replace(full, window=7), ffn) for index in range(num_layers)]
    yarn = Yarn(factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, truncate=False)
    return _model("tiny-gpt-oss", "GptOssForCausalLM", layers, Numerics(1e-5, 150.0, yarn))


def deepseek(q_lora_rank: int | None = 64, layers: str = "dm") -> StepModel:
    """``layers``: d for a dense FFN, m for experts."""
    attention = replace(_MLA, q_lora_rank=q_lora_rank)
    moe = MoeFfn(8, 2, 64, 64, Router("sigmoid", True, True, 4, 2, 2.5))
    kinds = {"d": Layer(attention, DenseFfn(128)), "m": Layer(attention, moe)}
    yarn = Yarn(factor=8.0, original_max_position_embeddings=32, beta_fast=8.0, mscale=1.0, mscale_all_dim=1.0)
    return _model("tiny-deepseek", "DeepseekV3ForCausalLM", [kinds[k] for k in layers], Numerics(1e-6, 100.0, yarn))
