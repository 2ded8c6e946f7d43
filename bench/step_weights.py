"""The weights of a decode step: what tensors a model has, and each of them in the format and layout its kernel reads.

A tensor has a role. Of a GQA layer: attention_norm (h,), qkv ((H + 2 Hk) D, h) [+ qkv_bias], q_norm and k_norm (D,),
sinks (H,), o (h, H D) [+ o_bias]. Of MLA: q_kv_a (q_lora + kv_lora + rope, h), or without q_lora all heads' queries
in its place, q_a_norm, q_b (H (nope + rope), q_lora), kv_a_norm, kv_b (H (nope + v), kv_lora), o (h, H v). Of FFNs:
ffn_norm, gate_up (2 I, h), gate rows first, down (h, I), router (E, h) [+ router_bias], correction_bias (E,) float32,
shared_gate_up, shared_down, and per expert experts.{e}.gate_up [_bias], experts.{e}.down [_bias]. Of the model:
embedding, final_norm, lm_head. BF16 where nothing else is said.

Random weights: seeded by role and layer, normal. A matrix has deviation K^-1/2, so that what it makes of values of
deviation 1 has deviation 1 again; norms 1 + 0.25 n; biases 0.1 n; embedding and sinks n. Router logits then differ
from token to token by about 1, and tokens spread over the experts.

Errors: ``ValueError`` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ..kernels.codec import QuantizedTensor, dequantize, quantize
from ..kernels.grouped_experts import KERNEL_OF
from ..kernels.kv_cache import KvCache, MlaCache
from ..kernels.moe_weights import GroupedWeight, prepare_experts
from .deployment import Precision
from .model_config import DenseFfn, GqaAttention, Layer, ModelConfig, MoeFfn

ARCHITECTURES = ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM")
LINEARS = {"bf16": "bf16", "fp8_block": "fp8_group", "nvfp4": "nvfp4"}
"""Formats of linear layers that a step has kernels for, and of their activations."""

NVFP4_ACTIVATION_SCALE = 2.0**-4
"""Of every NVFP4 activation: values up to 168 do not saturate."""

FLOAT32_ROLES = ("correction_bias",)

Shape = tuple[int, ...]
Kind = tuple[object, object]


class Source(Protocol):
    """Where weights come from."""

    def tensor(self, layer: int | None, role: str, shape: Shape) -> torch.Tensor:
        """The tensor of a role, of this shape, on the step's device; ``layer`` None for the model's own."""
        ...


@dataclass(frozen=True)
class RandomSource:
    """Random weights; see the module."""

    seed: int
    device: torch.device

    def tensor(self, layer: int | None, role: str, shape: Shape) -> torch.Tensor:
        generator = torch.Generator(device=self.device)
        generator.manual_seed(zlib.crc32(f"{self.seed}/{layer}/{role}".encode()))
        values = torch.randn(shape, generator=generator, device=self.device)
        if role.endswith("_norm"):
            values = 1 + 0.25 * values
        elif role.endswith("_bias"):
            values = 0.1 * values
        elif role not in ("embedding", "sinks"):
            values = values * shape[-1] ** -0.5
        return values if role in FLOAT32_ROLES else values.to(torch.bfloat16)


# -- roles -----------------------------------------------------------------------------------------


def attention_roles(layer: Layer, hidden: int) -> dict[str, Shape]:
    """Roles and shapes of a layer's attention, its norm with it."""
    attention = layer.attention
    made: dict[str, Shape] = {"attention_norm": (hidden,)}
    if isinstance(attention, GqaAttention):
        heads, width = attention.num_heads + 2 * attention.num_kv_heads, attention.head_dim
        made["qkv"], made["o"] = (heads * width, hidden), (hidden, attention.num_heads * width)
        if attention.has_bias:
            made["qkv_bias"], made["o_bias"] = (heads * width,), (hidden,)
        if attention.has_qk_norm:
            made["q_norm"] = made["k_norm"] = (width,)
        return made | ({"sinks": (attention.num_heads,)} if attention.has_sinks else {})
    query, rank = attention.num_heads * (attention.nope_dim + attention.rope_dim), attention.kv_lora_rank
    first = query if attention.q_lora_rank is None else attention.q_lora_rank
    made["q_kv_a"] = (first + rank + attention.rope_dim, hidden)
    if attention.q_lora_rank is not None:
        made["q_a_norm"], made["q_b"] = (first,), (query, first)
    made["kv_a_norm"] = (rank,)
    made["kv_b"] = (attention.num_heads * (attention.nope_dim + attention.v_dim), rank)
    return made | {"o": (hidden, attention.num_heads * attention.v_dim)}


def ffn_roles(layer: Layer, hidden: int) -> dict[str, Shape]:
    """Roles and shapes of a layer's FFN and its norm, without the routed experts."""
    ffn = layer.ffn
    made: dict[str, Shape] = {"ffn_norm": (hidden,)}
    if isinstance(ffn, DenseFfn):
        return made | {"gate_up": (2 * ffn.intermediate_size, hidden), "down": (hidden, ffn.intermediate_size)}
    made["router"] = (ffn.num_experts, hidden)
    if ffn.has_bias:
        made["router_bias"] = (ffn.num_experts,)
    if ffn.router.has_bias:
        made["correction_bias"] = (ffn.num_experts,)
    if ffn.shared_intermediate_size:
        made["shared_gate_up"] = (2 * ffn.shared_intermediate_size, hidden)
        made["shared_down"] = (hidden, ffn.shared_intermediate_size)
    return made


def expert_roles(ffn: MoeFfn, hidden: int) -> dict[str, Shape]:
    """Roles, without "experts.{e}.", and shapes of one routed expert."""
    made: dict[str, Shape] = {"gate_up": (2 * ffn.intermediate_size, hidden), "down": (hidden, ffn.intermediate_size)}
    if ffn.has_bias:
        made |= {"gate_up_bias": (2 * ffn.intermediate_size,), "down_bias": (hidden,)}
    return made


def end_roles(model: ModelConfig) -> dict[str, Shape]:
    """Roles and shapes of what stands before and behind the layers."""
    matrix = (model.vocab_size, model.hidden_size)
    made: dict[str, Shape] = {"embedding": matrix, "final_norm": (model.hidden_size,)}
    return made if model.tied_embeddings else made | {"lm_head": matrix}


# -- in the formats that kernels read --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer, prepared.

    Attributes:
        tensors: norms, biases, router, MLA's up-projections k_up (H, nope, kv_lora) and v_up (H, v, kv_lora).
        linears: qkv, q_kv_a, q_b, o, gate_up, down. experts, shared: (gate-up, down).
        cache: what it has cached, its own.
        plain: float32 values of all matrices as stored, by role, experts stacked; empty unless asked for.
    """

    tensors: dict[str, torch.Tensor]
    linears: dict[str, QuantizedTensor]
    experts: tuple[GroupedWeight, GroupedWeight] | None
    shared: tuple[GroupedWeight, GroupedWeight] | None
    cache: KvCache | MlaCache
    plain: dict[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Weights and cache."""
        total = sum(part.nbytes for part in self.tensors.values()) + self.cache.pages.nbytes
        for stored in self.linears.values():
            total += sum(part.nbytes for part in (stored.data, stored.scale) if part is not None)
        return total + sum(weight.num_bytes for pair in (self.experts, self.shared) for weight in pair or ())


def check_step(model: ModelConfig, precision: Precision, device: torch.device) -> None:
    """Refuse a model or precision that a step has no kernels for.

    Raises:
        ValueError: naming ``model`` or ``precision``, and what there is.
    """
    if model.architecture not in ARCHITECTURES:
        raise ValueError(f"model: expected one of {', '.join(ARCHITECTURES)}; got {model.architecture} ({model.name})")
    if LINEARS.get(precision.linear) != precision.linear_activation:
        known = ", ".join(f"{weight} x {activation}" for weight, activation in LINEARS.items())
        got = f"{precision.linear} x {precision.linear_activation} ({precision.name})"
        raise ValueError(f"precision: expected linear layers of {known}; got {got}")
    ffns = [layer.ffn for layer, _ in model.layers if isinstance(layer.ffn, MoeFfn)]
    pairs = {(precision.experts, precision.experts_activation)} if ffns else set()
    if any(ffn.shared_intermediate_size for ffn in ffns):  # it reads what the routed experts read
        pairs.add((precision.linear, precision.experts_activation))
    for weight, activation in pairs:
        if not any(key[:2] == (weight, activation) for key in KERNEL_OF):
            raise ValueError(
                f"precision: expected experts that a kernel has; got {weight} x {activation} ({precision.name})"
            )
    formats = (precision.linear, precision.experts_activation)
    if "nvfp4" in formats and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 10:
        raise ValueError(
            f"precision: expected compute capability 10 or more for {precision.name}; got that of {device}"
        )


def prepare_layer(
    source: Source, index: int, layer: Layer, hidden: int, precision: Precision, cache: KvCache | MlaCache, *,
    is_plain: bool = False, held: range | None = None,
) -> LayerWeights:  # fmt: skip
    """Layer ``index`` from ``source``. ``is_plain``: keep ``plain`` too, which takes four bytes per value.

    ``held``: the experts that this rank has; all by default.
    """
    tensors: dict[str, torch.Tensor] = {}
    linears: dict[str, QuantizedTensor] = {}
    plain: dict[str, torch.Tensor] = {}
    shared: dict[str, QuantizedTensor] = {}
    for role, shape in (attention_roles(layer, hidden) | ffn_roles(layer, hidden)).items():
        values = source.tensor(index, role, shape)
        if role in ("qkv", "q_kv_a", "q_b", "o", "gate_up", "down"):
            stored = linears[role] = quantize(values, precision.linear)
        elif role.startswith("shared_"):
            stored = shared[role] = quantize(values, precision.linear)
        else:
            stored = None
            tensors[role] = values.contiguous()
        if is_plain:
            plain[role] = values.float() if stored is None else dequantize(stored)
    if "kv_b" in tensors:
        attention = layer.attention
        assert not isinstance(attention, GqaAttention)
        both = tensors.pop("kv_b").view(attention.num_heads, attention.nope_dim + attention.v_dim, -1)
        tensors["k_up"] = both[:, : attention.nope_dim].contiguous()
        tensors["v_up"] = both[:, attention.nope_dim :].contiguous()
    experts, shared_pair = None, None
    if isinstance(layer.ffn, MoeFfn):
        held = range(layer.ffn.num_experts) if held is None else held
        experts = _experts(source, index, layer.ffn, hidden, precision, plain if is_plain else None, held)
        if shared:
            shared_pair = _shared(shared, precision)
    return LayerWeights(tensors, linears, experts, shared_pair, cache, plain)


def _pieces(stored: QuantizedTensor) -> dict[str, torch.Tensor]:
    parts = {"data": stored.data, "scale": stored.scale, "global_scale": stored.global_scale}
    return {name: part for name, part in parts.items() if part is not None}


def _grouped(
    weight: str, activation: str, parts: dict[str, torch.Tensor], is_gated: bool, bias: torch.Tensor | None = None
) -> GroupedWeight:
    layout = next(layout for w, x, layout in KERNEL_OF if (w, x) == (weight, activation))
    scale = NVFP4_ACTIVATION_SCALE if activation == "nvfp4" else None
    return prepare_experts(weight, parts, is_gated=is_gated, layout=layout, bias=bias, activation_scale=scale)


def _shared(stored: dict[str, QuantizedTensor], precision: Precision) -> tuple[GroupedWeight, GroupedWeight]:
    upper, lower = (
        _grouped(precision.linear, precision.experts_activation,
                 {name: part[None] for name, part in _pieces(stored[role]).items()}, role == "shared_gate_up")
        for role in ("shared_gate_up", "shared_down")
    )  # fmt: skip
    return upper, lower


def _experts(
    source: Source, index: int, ffn: MoeFfn, hidden: int, precision: Precision, plain: dict[str, torch.Tensor] | None,
    held: range,
) -> tuple[GroupedWeight, GroupedWeight]:  # fmt: skip
    """Expert by expert, so that only one is ever there in BF16."""
    roles, made = expert_roles(ffn, hidden), []
    for role, is_gated in (("gate_up", True), ("down", False)):
        stacked: dict[str, torch.Tensor] = {}
        biases: list[torch.Tensor] = []
        for place, expert in enumerate(held):
            stored = quantize(source.tensor(index, f"experts.{expert}.{role}", roles[role]), precision.experts)
            for name, part in _pieces(stored).items():
                if place == 0:
                    stacked[name] = part.new_empty((len(held), *part.shape))
                stacked[name][place] = part
            if ffn.has_bias:
                biases.append(source.tensor(index, f"experts.{expert}.{role}_bias", roles[f"{role}_bias"]))
            if plain is not None:
                values = dequantize(stored)
                plain.setdefault(f"experts.{role}", values.new_empty((len(held), *values.shape)))[place] = values
        bias = torch.stack(biases).float() if biases else None
        if plain is not None and bias is not None:
            plain[f"experts.{role}_bias"] = bias
        made.append(_grouped(precision.experts, precision.experts_activation, stacked, is_gated, bias))
    return made[0], made[1]


# -- as many layers as fit -------------------------------------------------------------------------


def kind_of(layer: Layer) -> Kind:
    """Layers of equal kind have tensors of the same shapes: the window is no part of it."""
    attention = layer.attention
    return replace(attention, window=None) if isinstance(attention, GqaAttention) else attention, layer.ffn


def rotate(kinds: list[Kind], fitted: dict[Kind, list[int]]) -> list[int]:
    """For each layer the one whose weights it uses: the j-th layer of a kind those of the (j mod n)-th of the n fitted.

    With layers of one kind that is layer i mod n.
    """
    seen: dict[Kind, int] = {}
    made = []
    for kind in kinds:
        place = seen[kind] = seen.get(kind, -1) + 1
        made.append(fitted[kind][place % len(fitted[kind])])
    return made


def fit_layers(
    layers: list[Layer], make: Callable[[int], LayerWeights], budget_bytes: float
) -> tuple[dict[int, LayerWeights], list[int]]:
    """(weights by layer that has its own, for each layer the one whose weights it uses).

    One layer of each kind first, then the others in order while they fit.

    Raises:
        ValueError: not even one layer of each kind fits in ``budget_bytes``.
    """
    kinds = [kind_of(layer) for layer in layers]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    sizes: dict[Any, int] = {}
    made: dict[int, LayerWeights] = {}
    left = budget_bytes
    for index in (*first, *(i for i in range(len(layers)) if i not in first)):
        kind = kinds[index]
        if kind in sizes and sizes[kind] > left:
            break
        made[index] = make(index)
        sizes[kind] = made[index].num_bytes
        left -= sizes[kind]
        if left < 0:
            needed = budget_bytes - left
            raise ValueError(
                f"max_weight_bytes: expected at least {needed:.0f} for one layer of each kind; got {budget_bytes}"
            )
    fitted = {kind: sorted(i for i in made if kinds[i] == kind) for kind in set(kinds)}
    return made, rotate(kinds, fitted)
