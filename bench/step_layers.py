"""A decode step as a list of launches: the layers of a model, op by op, over the step's buffers.

Errors: ``ValueError`` of what the kernels do not have.
"""

from __future__ import annotations

import torch

from ..kernels.codec import QuantizedTensor
from ..kernels.formats import BF16
from ..kernels.kv_cache import KvCache, MlaCache
from ..kernels.moe_layer import MoeLayer
from ..kernels.routing_rule import Routing
from . import step_ops as ops
from .deployment import Precision
from .model_config import DenseFfn, GqaAttention, Layer, MlaAttention, MoeFfn
from .step_alone import OneRank
from .step_ops import Place
from .step_state import DecodeStep
from .step_weights import LINEARS, NVFP4_ACTIVATION_SCALE, LayerWeights


def lay_out(step: DecodeStep, ranks: OneRank | None = None) -> None:
    """All ops, in order; two buffers take turns as the residual, so that no op changes what it reads."""
    ranks = ranks or OneRank()
    config, eps = step.model.config, step.model.numerics.rms_eps
    hidden = config.hidden_size
    residuals = [step.buffer(f"residual_{turn}", step.batch, hidden) for turn in range(2)]
    widths = {_turning(layer) for layer in step.model.layers}
    tables = {width: step.model.numerics.cos_sin(step.capacity, width, step.device) for width in widths}
    for layer in step.model.layers:
        step.attending(layer.attention)
    step.ops.append(ops.embedding(Place("embedding"), step.ends["embedding"], step.token_ids, residuals[0]))
    y: torch.Tensor | None = None

    def norm(place: Place, weight: torch.Tensor, format: str) -> QuantizedTensor:
        """Normalised residual, after y is added to it."""
        nonlocal y
        out = step.operand(place.name, hidden, format)
        if y is None:
            step.ops.append(ops.norm(place, residuals[0], weight, eps, out))
        else:
            step.ops.append(ops.norm(place, y, weight, eps, out, (residuals[0], residuals[1])))
            residuals.reverse()
        return out

    linear_format = LINEARS[step.precision.linear]
    for index, (layer, weights) in enumerate(zip(step.model.layers, step.layers, strict=True)):
        x = norm(Place("attention_norm", index), weights.tensors["attention_norm"], linear_format)
        if isinstance(layer.attention, GqaAttention):
            o = _gqa(step, index, layer.attention, weights, x, tables[_turning(layer)])
        else:
            o = _mla(step, index, layer.attention, weights, x, tables[_turning(layer)])
        y = _linear(step, Place("o_proj", index), "o", weights, o, "o")
        y = ranks.reduced(step, Place("attention_all_reduce", index), y)
        ffn_norm, ffn = (Place("ffn_norm", index), weights.tensors["ffn_norm"]), layer.ffn
        if isinstance(ffn, DenseFfn):
            y = _dense(step, index, weights, norm(*ffn_norm, linear_format))
            y = ranks.reduced(step, Place("dense_all_reduce", index), y)
        else:
            y = _moe(step, index, ffn, weights, norm(*ffn_norm, "bf16").data, ranks)
    last = norm(Place("final_norm"), step.ends["final_norm"], "bf16")
    ranks.head(step, step.ends.get("lm_head", step.ends["embedding"]), last.data)
    step.ops.append(ops.sampling(Place("sampling"), step.logits, step.next_token))


def _turning(layer: Layer) -> int:
    """Channels that RoPE turns."""
    attention = layer.attention
    return attention.head_dim if isinstance(attention, GqaAttention) else attention.rope_dim


def _linear(
    step: DecodeStep, place: Place, role: str, weights: LayerWeights, x: QuantizedTensor, out: str
) -> torch.Tensor:
    """A linear layer into the buffer ``out``."""
    weight = weights.linears[role]
    rows, bias = weight.shape[0], weights.tensors.get(f"{role}_bias")
    y, unbiased = step.buffer(out, step.batch, rows), None
    if bias is not None and weight.format.name != "bf16":
        unbiased = step.buffer(f"{out}_unbiased", step.batch, rows)
    step.ops += ops.linear(place, weight, x, y, step.workspace(), bias=bias, unbiased=unbiased)
    return y


def _quantized(step: DecodeStep, place: Place, x: torch.Tensor) -> QuantizedTensor:
    """x in the format of linear layers' activations."""
    format = LINEARS[step.precision.linear]
    if format == "bf16":
        return QuantizedTensor(BF16, x, None, None, (x.shape[0], x.shape[1]))
    out = step.operand(place.name, x.shape[1], format)
    step.ops.append(ops.to_format(place, x, out))
    return out


def _gqa(
    step: DecodeStep,
    index: int,
    attention: GqaAttention,
    weights: LayerWeights,
    x: QuantizedTensor,
    table: torch.Tensor,
) -> QuantizedTensor:
    batch, heads, width = step.batch, attention.num_heads, attention.head_dim
    cache = weights.cache
    assert isinstance(cache, KvCache)
    qkv = _linear(step, Place("qkv_proj", index), "qkv", weights, x, "qkv")
    q = step.buffer("q", batch, heads, width)
    norms = {name: weights.tensors[name] for name in ("q_norm", "k_norm") if name in weights.tensors}
    eps = step.model.numerics.rms_eps
    step.ops.append(ops.rope_append(Place("rope_append", index), qkv, cache, step.tokens, table, eps, q, norms))
    out, lse = step.buffer("attention", batch, heads, width), step.buffer("lse", batch, heads, dtype=torch.float32)
    name = "attention" if attention.window is None else "window_attention"
    shared, sinks = step.attending(attention), weights.tensors.get("sinks")
    step.ops.append(ops.gqa_attention(Place(name, index), q, cache, shared, sinks, out, lse))
    return _quantized(step, Place("o_quantize", index), out.view(batch, heads * width))


def _mla(
    step: DecodeStep,
    index: int,
    attention: MlaAttention,
    weights: LayerWeights,
    x: QuantizedTensor,
    table: torch.Tensor,
) -> QuantizedTensor:
    batch, heads, rank = step.batch, attention.num_heads, attention.kv_lora_rank
    cache, eps = weights.cache, step.model.numerics.rms_eps
    assert isinstance(cache, MlaCache)
    first = _linear(step, Place("q_kv_a_proj", index), "q_kv_a", weights, x, "q_kv_a")
    q, latent, rope = first.split((first.shape[1] - rank - attention.rope_dim, rank, attention.rope_dim), dim=1)
    if attention.q_lora_rank is not None:
        low = step.operand("q_a_norm", attention.q_lora_rank, LINEARS[step.precision.linear])
        step.ops.append(ops.norm(Place("q_a_norm", index), q, weights.tensors["q_a_norm"], eps, low))
        q = _linear(step, Place("q_b_proj", index), "q_b", weights, low, "q_b")
    q = q.unflatten(1, (heads, attention.nope_dim + attention.rope_dim))
    absorbed = step.buffer("absorbed_q", batch, heads, rank + attention.rope_dim)
    step.ops.append(
        ops.per_head(Place("absorbed_q_bmm", index), q[:, :, : attention.nope_dim], weights.tensors["k_up"],
                     absorbed[:, :, :rank], is_transposed=False),
    )  # fmt: skip
    step.ops.append(
        ops.mla_append(Place("rope_append", index), latent, rope, q[:, :, attention.nope_dim :], cache, step.tokens,
                       table, eps, absorbed[:, :, rank:], weights.tensors["kv_a_norm"])
    )  # fmt: skip
    mixed, lse = step.buffer("latent_o", batch, heads, rank), step.buffer("lse", batch, heads, dtype=torch.float32)
    scale = step.model.numerics.score_scale(attention)
    shared = step.attending(attention)
    step.ops.append(ops.latent_attention(Place("attention", index), absorbed, cache, shared, scale, mixed, lse))
    out = step.buffer("attention", batch, heads, attention.v_dim)
    step.ops.append(
        ops.per_head(Place("absorbed_v_bmm", index), mixed, weights.tensors["v_up"], out, is_transposed=True)
    )
    return _quantized(step, Place("o_quantize", index), out.view(batch, heads * attention.v_dim))


def _dense(step: DecodeStep, index: int, weights: LayerWeights, x: QuantizedTensor) -> torch.Tensor:
    gate_up = _linear(step, Place("dense_gate_up", index), "gate_up", weights, x, "gate_up")
    h = step.operand("dense_swiglu", gate_up.shape[1] // 2, LINEARS[step.precision.linear])
    step.ops.append(ops.swiglu(Place("dense_swiglu", index), gate_up, h))
    return _linear(step, Place("dense_down", index), "down", weights, h, "ffn")


def _moe(
    step: DecodeStep, index: int, ffn: MoeFfn, weights: LayerWeights, x: torch.Tensor, ranks: OneRank
) -> torch.Tensor:
    tensors = weights.tensors
    logits = step.buffer("router_logits", step.batch, ffn.num_experts)
    router = ops.torch_linear(Place("router", index), tensors["router"], x, logits, tensors.get("router_bias"))
    step.ops.append(router)
    layer = moe_layer_of(step.model.config.architecture, ffn, weights, step.precision, ranks.held(ffn).start)
    return ranks.experts(step, index, ffn, layer, x, logits)


def routing_of(ffn: MoeFfn) -> Routing:
    """The rule of a model's router: softmax over the chosen experts is a renormalized one over all."""
    router = ffn.router
    scoring = "softmax" if router.scoring.startswith("softmax") else router.scoring
    return Routing(
        ffn.num_experts, ffn.top_k, scoring, router.renormalize, router.has_bias, router.num_groups, router.kept_groups,
        router.scaling_factor,
    )  # fmt: skip


def activation_of(architecture: str) -> str:
    """The experts' activation, as ``grouped_parts`` calls it."""
    return "swiglu_oai" if architecture == "GptOssForCausalLM" else "silu"


def moe_layer_of(
    architecture: str, ffn: MoeFfn, weights: LayerWeights, precision: Precision, first_expert: int = 0
) -> MoeLayer:
    """The expert layer of a layer's weights, which hold the experts from ``first_expert`` on."""
    assert weights.experts is not None
    shared = weights.shared or (None, None)
    format = precision.experts_activation
    scale = NVFP4_ACTIVATION_SCALE if format == "nvfp4" else None
    return MoeLayer(
        routing_of(ffn), *weights.experts, x_format=format, h_format=format, activation=activation_of(architecture),
        bias=weights.tensors.get("correction_bias"), first_expert=first_expert, shared_gate_up=shared[0],
        shared_down=shared[1], x_scale=scale, h_scale=scale,
    )  # fmt: skip
