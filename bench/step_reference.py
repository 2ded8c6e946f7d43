"""The logits of a decode step in plain torch and float64, from the values that its weights and caches have as stored.

Imports no kernel. What the step rounds on the way is rounded here as well, to BF16 and to the formats of activations
and cache, so that what is left between the two is accumulation, and what that tips over an edge. Attention sequence
by sequence, experts one by one. Nothing of the step is read but its model, weights (``LayerWeights.plain``), token
ids, lengths, page table, and the tokens cached before the new one; what the new token adds to a cache is computed
here.

Source: modelling code of Qwen3-MoE, gpt-oss and DeepSeek-V3 in Hugging Face transformers.
"""

from __future__ import annotations

import itertools

import torch

from ..kernels.attention_reference import attention_ref, rope_ref
from ..kernels.codec import dequantize, quantize
from ..kernels.kv_cache import KvCache, MlaCache, decode_ref, encode_ref, read_mla_ref, read_ref, slots_of
from ..kernels.moe_reference import activation_ref, combine_ref, down_ref, gate_up_ref, round_h
from ..kernels.reference import rms_norm_ref
from ..kernels.routing_reference import route_ref
from .model_config import DenseFfn, GqaAttention, Layer, MlaAttention, MoeFfn
from .step_layers import activation_of, routing_of
from .step_state import DecodeStep
from .step_weights import LINEARS, NVFP4_ACTIVATION_SCALE, LayerWeights


def reference_logits(step: DecodeStep) -> torch.Tensor:
    """Float64 (B, vocab) of ``step.token_ids`` at the lengths that ``step`` stands at.

    Raises:
        ValueError: a step made without ``is_plain``.
    """
    _require_plain(step)
    return _Reference(step).logits()


def check_layers(step: DecodeStep, streams: list[torch.Tensor]) -> list[float]:
    """How far each layer of a step, and last its logits, are from the reference of that layer, given what it was given.

    Layer by layer, because a code that a rounding tips over grows from layer to layer; not so an error.

    Args:
        streams: the residual stream before the first layer and behind each, as ``launch_with_streams`` has it.

    Returns: RMS of the difference over the RMS of what the layer adds to the stream; of logits, over theirs.

    Raises:
        ValueError: a step made without ``is_plain``, or another number of streams than layers + 1.
    """
    _require_plain(step)
    if len(streams) != step.num_layers + 1:
        raise ValueError(f"streams: expected {step.num_layers + 1}; got {len(streams)}")
    reference = _Reference(step)
    errors = [_distance(streams[0].double(), reference.embedded().double(), 0.0)]
    for index, (before, behind) in enumerate(itertools.pairwise(streams)):
        errors.append(_distance(behind.double(), reference.layer(index, before).double(), before.double()))
    errors.append(_distance(step.logits.double(), reference.head(streams[-1]), 0.0))
    return errors


def _distance(got: torch.Tensor, expected: torch.Tensor, base: torch.Tensor | float) -> float:
    scale = (expected - base).square().mean().sqrt()
    return float((got - expected).square().mean().sqrt() / scale)


def _require_plain(step: DecodeStep) -> None:
    if not all(layer.plain for layer in step.layers):
        raise ValueError("step: expected one made with is_plain; got weights in the kernels' layouts only")


def _bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16)


class _Reference:
    def __init__(self, step: DecodeStep) -> None:
        self.step, self.eps = step, step.model.numerics.rms_eps
        self.format = LINEARS[step.precision.linear]

    def logits(self) -> torch.Tensor:
        residual = self.embedded()
        for index in range(self.step.num_layers):
            residual = self.layer(index, residual)
        return self.head(residual)

    def embedded(self) -> torch.Tensor:
        return self.step.ends["embedding"][self.step.token_ids]

    def layer(self, index: int, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream (B, h) BF16 behind a layer, of that before it."""
        layer, weights = self.step.model.layers[index], self.step.layers[index]
        y = self._attention(layer, weights, self._norm(residual, weights, "attention_norm"))
        residual = self._add(residual, y)
        x = self._norm(residual, weights, "ffn_norm")
        if isinstance(layer.ffn, DenseFfn):
            return self._add(residual, self._gated(weights.plain["gate_up"], weights.plain["down"], self._rounded(x)))
        return self._add(residual, self._experts(layer.ffn, weights, x))

    def head(self, residual: torch.Tensor) -> torch.Tensor:
        last = rms_norm_ref(residual, self.step.ends["final_norm"], self.eps).double()
        return last @ self.step.ends.get("lm_head", self.step.ends["embedding"]).double().T

    def _add(self, residual: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _bf16(residual.float() + _bf16(y).float())

    def _norm(self, x: torch.Tensor, weights: LayerWeights, role: str) -> torch.Tensor:
        return rms_norm_ref(x, weights.tensors[role], self.eps)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Float64 of BF16 values as a linear layer reads them."""
        if self.format == "bf16":
            return _bf16(x).double()
        scale = NVFP4_ACTIVATION_SCALE if self.format == "nvfp4" else None
        return dequantize(quantize(_bf16(x), self.format, global_scale=scale)).double()

    def _linear(self, weights: LayerWeights, role: str, x: torch.Tensor) -> torch.Tensor:
        """BF16; x as it is read. A bias beside quantized weights is added to BF16."""
        y, bias = x @ weights.plain[role].double().T, weights.tensors.get(f"{role}_bias")
        if bias is not None:
            y = (y if self.format == "bf16" else _bf16(y).double()) + bias.double()
        return _bf16(y)

    # -- attention ---------------------------------------------------------------------------------

    def _attention(self, layer: Layer, weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        attention = layer.attention
        table = self.step.model.numerics.cos_sin(self.step.capacity, self._turning(attention), x.device)
        if isinstance(attention, GqaAttention):
            mixed = self._gqa(attention, weights, x, table)
        else:
            mixed = self._mla(attention, weights, x, table)
        return self._linear(weights, "o", self._rounded(_bf16(mixed).flatten(1)))

    def _turning(self, attention: GqaAttention | MlaAttention) -> int:
        return attention.head_dim if isinstance(attention, GqaAttention) else attention.rope_dim

    def _gqa(
        self, attention: GqaAttention, weights: LayerWeights, x: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        step, cache = self.step, weights.cache
        assert isinstance(cache, KvCache)
        heads = self._linear(weights, "qkv", self._rounded(x)).unflatten(1, (-1, attention.head_dim))
        q, k, v = heads.split((attention.num_heads, attention.num_kv_heads, attention.num_kv_heads), dim=1)
        if attention.has_qk_norm:
            q, k = (self._head_norm(part, weights.tensors[name]) for part, name in ((q, "q_norm"), (k, "k_norm")))
        q, k = (rope_ref(part, step.positions, table, "half") for part in (q, k))
        new = [
            decode_ref(*encode_ref(part.flatten(0, 1), cache.layout.format, factor), cache.layout.format, factor)
            for part, factor in zip((k, v), cache.factors, strict=True)
        ]
        made = []
        for row, length in enumerate(step.lengths.tolist()):
            slots = slots_of(step.page_table[row], length - 1, cache.layout.page_size)
            past = read_ref(cache, slots) if length > 1 else [new[0].new_zeros(0, k.shape[1], k.shape[2])] * 2
            keys, values = (
                torch.cat((old, part.view(k.shape)[row : row + 1])) for old, part in zip(past, new, strict=True)
            )
            first = 0 if attention.window is None else max(0, length - attention.window)
            scale = step.model.numerics.score_scale(attention)
            made.append(
                attention_ref(q[row], keys, values, first, length, scale, None, weights.tensors.get("sinks"))[0]
            )
        return torch.stack(made)

    def _head_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm_ref(x.flatten(0, 1), weight, self.eps).view(x.shape)

    def _mla(
        self, attention: MlaAttention, weights: LayerWeights, x: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        step, cache, rank = self.step, weights.cache, attention.kv_lora_rank
        assert isinstance(cache, MlaCache)
        first = self._linear(weights, "q_kv_a", self._rounded(x))
        q, latent, rope = first.split((first.shape[1] - rank - attention.rope_dim, rank, attention.rope_dim), dim=1)
        if attention.q_lora_rank is not None:
            low = rms_norm_ref(q, weights.tensors["q_a_norm"], self.eps)
            q = self._linear(weights, "q_b", self._rounded(low))
        q = q.unflatten(1, (attention.num_heads, -1))
        plain, turned = q.split((attention.nope_dim, attention.rope_dim), dim=2)
        absorbed = torch.einsum("bhn,hnr->bhr", plain.double(), weights.tensors["k_up"].double())
        turned = rope_ref(turned, step.positions, table, "interleaved")
        query = torch.cat((_bf16(absorbed), turned), dim=2).double()
        normed = rms_norm_ref(latent, weights.tensors["kv_a_norm"], self.eps)
        token = torch.cat((normed, rope_ref(rope, step.positions, table, "interleaved")), dim=1)
        format, factor = cache.layout.format, cache.factors[0]
        token = decode_ref(*encode_ref(token, format, factor), format, factor)
        made = []
        for row, length in enumerate(step.lengths.tolist()):
            slots = slots_of(step.page_table[row], length - 1, cache.layout.page_size)
            past = read_mla_ref(cache, slots) if length > 1 else token[:0]
            seen = torch.cat((past, token[row : row + 1]))
            p = torch.softmax(query[row] @ seen.T * step.model.numerics.score_scale(attention), dim=1)
            made.append(p @ seen[:, :rank])
        return torch.einsum("bhr,hvr->bhv", _bf16(torch.stack(made)).double(), weights.tensors["v_up"].double())

    # -- FFNs --------------------------------------------------------------------------------------

    def _gated(self, upper: torch.Tensor, lower: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A dense gated FFN of x as it is read: its result of gate and up is BF16 on the way."""
        both = _bf16(x @ upper.double().T).double()
        gate, up = both.chunk(2, dim=1)
        h = activation_ref(gate, up, "silu")
        return self._rounded(h) @ lower.double().T

    def _experts(self, ffn: MoeFfn, weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        plain, format = weights.plain, self.step.precision.experts_activation
        logits = x.double() @ weights.tensors["router"].double().T
        if "router_bias" in weights.tensors:
            logits = logits + weights.tensors["router_bias"].double()
        ids, routing = route_ref(_bf16(logits), routing_of(ffn), weights.tensors.get("correction_bias"))
        scale = torch.tensor(NVFP4_ACTIVATION_SCALE, device=x.device) if format == "nvfp4" else None
        read = round_h(x, format, scale)
        activation = activation_of(self.step.model.config.architecture)
        h = gate_up_ref(read, ids, plain["experts.gate_up"], activation, plain.get("experts.gate_up_bias"))
        rows = down_ref(round_h(h, format, scale), ids, routing, plain["experts.down"], plain.get("experts.down_bias"))
        y = combine_ref(_bf16(rows).double(), ffn.top_k)
        if weights.shared is None:
            return y
        gate, up = (read @ plain["shared_gate_up"].double().T).chunk(2, dim=1)
        h = round_h(activation_ref(gate, up, activation), format, scale)
        return y + _bf16(h @ plain["shared_down"].double().T).double()
