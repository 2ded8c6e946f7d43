"""One decode step of a whole model on one GPU: every buffer allocated up front, one list of launches.

From token ids to logits and the next token, for a batch of sequences that have ``length`` tokens cached and bring one
more: embedding; per layer RMSNorm + quantize (the residual added on the way), QKV, [norms,] RoPE, quantize and
append, paged attention over one plan for all layers with the same window, quantize, O, RMSNorm, router, experts, or a
dense gated FFN; final norm, LM head, argmax. MLA in absorbed form. Kernels of tokenfab wherever the registry has one
for the op; torch for BF16 linear layers, router, LM head, embedding, MLA's matmuls per head, argmax and biases beside
quantized weights: each ``StepOp.runs_on`` says which.

Nothing waits for the device and nothing depends on data on the host, so ``launch`` can be captured in one CUDA graph.
Launching again computes the same: the new token is appended to its own slot, and nothing else is kept.

Where the weights of all layers do not fit, a layer uses those, and the cache, of another (``step_weights.rotate``).
Layers with a sliding window hold the whole cache here, and read their window.

Precisions: bf16; fp8; mxfp4 and mxfp4_mxfp8 where the linear layers stay BF16; nvfp4 from compute capability 10. Not
fp8_tensor, which no expert kernel has.

Errors: ``ValueError`` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import math

import torch

from ..kernels.attention_runs import random_bytes, random_table
from ..kernels.kv_cache import KvCache, MlaCache, empty_kv_cache, empty_mla_cache
from ..kernels.kv_layout import KvLayout, MlaLayout
from .deployment import Precision
from .model_config import GqaAttention, Layer, ModelConfig, MoeFfn
from .step_alone import OneRank
from .step_layers import lay_out
from .step_model import StepModel, step_model_of
from .step_state import DecodeStep, require
from .step_weights import LayerWeights, RandomSource, Source, check_step, end_roles, fit_layers, prepare_layer

PAGE_SIZE = 64

KV_SCALE = 2.0**-6
"""Of caches in FP8, whose values up to 7 do not saturate; ``attention_runs.random_bytes`` fills them for it."""

MAX_BATCH = 4096


def build_step(
    model: StepModel | ModelConfig, precision: Precision, *, batch: int, length: int,
    device: torch.device | str = "cuda", source: Source | None = None, seed: int = 0,
    max_weight_bytes: float = math.inf, capacity: int | None = None,
    page_size: int = PAGE_SIZE, kv_scale: float = KV_SCALE, is_plain: bool = False, ranks: OneRank | None = None,
) -> DecodeStep:  # fmt: skip
    """A step of ``batch`` sequences, each with ``length`` tokens cached, which are random.

    Args:
        source: of the weights; random ones from ``seed`` if None.
        max_weight_bytes: of all weights and caches together: as many layers as fit have their own.
        capacity: the most tokens of a sequence, the new one among them; length + 1 if None.
        kv_scale: of caches in FP8.
        is_plain: keep what ``step_reference`` needs, four bytes per weight.
        ranks: what this rank holds and does among several (``ranks_step.ManyRanks``); by default it is the only one.

    Raises:
        ValueError: a model or precision without kernels, sizes out of range, or not one layer of each kind that fits.
    """
    model = model if isinstance(model, StepModel) else step_model_of(model)
    place = torch.device(device)
    check_step(model.config, precision, place)
    capacity = length + 1 if capacity is None else capacity
    require(1 <= batch <= MAX_BATCH, "batch", f"1 to {MAX_BATCH}", batch)
    require(0 <= length < capacity, "length", f"0 to {capacity - 1}, below the capacity", length)
    most = model.config.max_context
    require(capacity <= most, "capacity", f"at most {model.config.name}'s {most} tokens", capacity)
    ranks, whole = ranks or OneRank(), model
    model = ranks.model(whole)
    source = ranks.source(RandomSource(seed, place) if source is None else source, whole)
    table = random_table(batch, -(-capacity // page_size), seed, place)
    step = DecodeStep(model, precision, table, capacity, page_size)
    step.seek(length)
    ends = {role: source.tensor(None, role, shape).contiguous() for role, shape in end_roles(model.config).items()}
    step.ends = ranks.ends(model.config, ends)
    left = max_weight_bytes - sum(part.nbytes for part in step.ends.values())

    def make(index: int) -> LayerWeights:
        layer, hidden = model.layers[index], model.config.hidden_size
        cache = _empty_cache(step, whole.layers[index], kv_scale)
        random_bytes(cache.pages.view(-1, cache.pages.shape[-1]), precision.kv, (seed * 4096 + index) << 16)
        held = ranks.held(layer.ffn) if isinstance(layer.ffn, MoeFfn) else None
        cache = ranks.heads_of(cache, whole, index)
        return prepare_layer(source, index, layer, hidden, precision, cache, is_plain=is_plain, held=held)

    made, uses = fit_layers(list(model.layers), make, left)
    step.layers = [made[index] for index in uses]
    lay_out(step, ranks)
    return step


def _empty_cache(step: DecodeStep, layer: Layer, scale: float) -> KvCache | MlaCache:
    attention, kv, size = layer.attention, step.precision.kv, step.page_size
    scale = scale if kv == "fp8" else 1.0
    pages = step.page_table.numel()
    if isinstance(attention, GqaAttention):
        layout = KvLayout(kv, attention.head_dim, size)
        return empty_kv_cache(layout, pages, attention.num_kv_heads, step.device, k_scale=scale, v_scale=scale)
    latent = MlaLayout(kv, attention.kv_lora_rank, attention.rope_dim, size)
    return empty_mla_cache(latent, pages, step.device, scale=scale)
