"""What a deployment holds on each GPU, whether it fits, and the largest batch that does.

Per GPU: attention weights / attention_tp, experts / GPUs, dense and shared FFNs / attention_tp,
embedding and LM head / attention_tp, the KV cache of the group's sequences, and a stated reserve.
An MLA latent and its down-projections are not split by tensor parallelism: every rank of the group
stores them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..kernels.formats import get_format
from .deployment import Deployment, Precision, check_divides
from .gpus import Gpu
from .model_config import Attention, DenseFfn, GqaAttention, Layer, ModelConfig
from .ops import index_key_bytes

MAX_SEARCHED_GPUS = 1024
_BF16_BYTES = 2.0


class DoesNotFit(ValueError):
    """A deployment that needs more memory than its GPUs have."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights_bytes: float
    kv_bytes: float
    reserve_bytes: float
    capacity_bytes: float

    @property
    def shortfall_bytes(self) -> float:
        """By how much it does not fit; 0 or less where it does."""
        return self.weights_bytes + self.kv_bytes + self.reserve_bytes - self.capacity_bytes


def _attention_weight_bytes(hidden: int, attention: Attention, deployment: Deployment) -> float:
    """One layer's attention weights on one GPU."""
    tp, linear = deployment.attention_tp, get_format(deployment.precision.linear).bytes_per_value
    if isinstance(attention, GqaAttention):
        parameters = attention.num_parameters(hidden) / tp
        if tp > attention.num_kv_heads:  # KV heads are replicated once the group is wider than they are many
            key_value = 2 * hidden * attention.num_kv_heads * attention.head_dim
            parameters += key_value * (1 / attention.num_kv_heads - 1 / tp)
        return parameters * linear
    indexer = attention.indexer_parameters(hidden)
    whole = attention.replicated_parameters(hidden)
    split = attention.num_parameters(hidden) - whole - indexer - attention.absorbed_parameters
    total = (whole + indexer + split / tp) * linear
    if attention.indexer is not None:  # its key and head-weight projections stay BF16
        narrow = hidden * (attention.indexer.head_dim + attention.indexer.num_heads)
        total += narrow * (_BF16_BYTES - linear)
    return total + attention.absorbed_parameters / tp * _BF16_BYTES  # decoding keeps them in BF16


def _layer_weight_bytes(model: ModelConfig, layer: Layer, deployment: Deployment) -> float:
    """One layer's weights on one GPU."""
    hidden, precision, tp = model.hidden_size, deployment.precision, deployment.attention_tp
    linear = get_format(precision.linear).bytes_per_value
    fixed = _attention_weight_bytes(hidden, layer.attention, deployment) + 2 * hidden * _BF16_BYTES
    ffn = layer.ffn
    if isinstance(ffn, DenseFfn):
        return fixed + ffn.num_parameters(hidden) / tp * linear
    bias = ffn.expert_bias_parameters(hidden)
    expert = (ffn.expert_parameters(hidden) - bias) * get_format(precision.experts).bytes_per_value + bias * _BF16_BYTES
    shared = ffn.shared_parameters(hidden) / tp * linear
    router = ffn.router_parameters(hidden) * _BF16_BYTES
    return fixed + ffn.num_experts * expert / deployment.gpus + shared + router


def weight_bytes(model: ModelConfig, deployment: Deployment) -> float:
    """All weights on one GPU."""
    ends = 2.0 * model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2) / deployment.attention_tp
    return ends + sum(_layer_weight_bytes(model, layer, deployment) * count for layer, count in model.layers)


def kv_bytes_per_sequence(model: ModelConfig, context: int, precision: Precision, attention_tp: int = 1) -> float:
    """Cached bytes of one sequence of ``context`` tokens on one GPU, indexer keys included."""
    total = 0.0
    value_bytes = get_format(precision.kv).bytes_per_value
    for layer, count in model.layers:
        attention = layer.attention
        if isinstance(attention, GqaAttention):
            tokens = context if attention.window is None else min(context, attention.window)
            heads = max(1, attention.num_kv_heads // attention_tp)
            total += count * tokens * 2 * heads * attention.head_dim * value_bytes
        else:
            total += count * context * attention.kv_values_per_token * value_bytes
            if attention.indexer is not None:
                total += count * context * index_key_bytes(attention.indexer.head_dim)
    return total


def memory(model: ModelConfig, gpu: Gpu, deployment: Deployment) -> Memory:
    """Bytes on one GPU of this deployment, fitting or not."""
    tokens = deployment.context + deployment.tokens_per_step
    per_sequence = kv_bytes_per_sequence(model, tokens, deployment.precision, deployment.attention_tp)
    return Memory(
        weights_bytes=weight_bytes(model, deployment),
        kv_bytes=per_sequence * deployment.sequences,
        reserve_bytes=deployment.reserve_bytes,
        capacity_bytes=gpu.memory_bytes,
    )


def check_fits(model: ModelConfig, gpu: Gpu, deployment: Deployment) -> Memory:
    """The memory of a deployment that fits.

    Raises:
        DoesNotFit: naming the shortfall and the smallest number of GPUs that fits.
    """
    need = memory(model, gpu, deployment)
    if need.shortfall_bytes <= 0:
        return need
    smallest = smallest_gpu_count(model, gpu, deployment)
    gib = 1024**3
    remedy = (
        f"the smallest that fits is {smallest} x {gpu.name}"
        if smallest
        else f"no number of {gpu.name} up to {MAX_SEARCHED_GPUS} fits at this batch and context"
    )
    raise DoesNotFit(
        f"memory: {model.name} in {deployment.precision.name} on {deployment.gpus} x {gpu.name} needs "
        f"{need.weights_bytes / gib:.1f} GiB of weights + {need.kv_bytes / gib:.1f} GiB of KV cache + "
        f"{need.reserve_bytes / gib:.1f} GiB of reserve per GPU, {need.shortfall_bytes / gib:.1f} GiB more than its "
        f"{need.capacity_bytes / gib:.1f} GiB; {remedy}"
    )


def smallest_gpu_count(model: ModelConfig, gpu: Gpu, deployment: Deployment) -> int | None:
    """The fewest GPUs, split in the same style, on which the deployment fits; None if none does.

    "The same style": a group that was all tensor parallel stays so, and so does one that was all
    expert parallel; otherwise attention_tp and the expert split are kept.
    """
    for gpus in range(1, MAX_SEARCHED_GPUS + 1):
        tp = gpus if deployment.attention_dp == 1 and deployment.gpus > 1 else deployment.attention_tp
        ep = gpus if deployment.expert_tp == 1 else deployment.expert_parallel
        try:
            candidate = replace(deployment, gpus=gpus, attention_tp=tp, expert_parallel=ep)
            check_divides(model, candidate)
        except ValueError:
            continue
        if memory(model, gpu, candidate).shortfall_bytes <= 0:
            return gpus
    return None


def largest_batch(model: ModelConfig, gpu: Gpu, deployment: Deployment) -> int:
    """The most sequences per attention group that fit; 0 where the weights alone do not."""
    one = memory(model, gpu, replace(deployment, batch_per_gpu=1 / deployment.attention_tp))
    free = one.capacity_bytes - one.weights_bytes - one.reserve_bytes
    return max(0, int(free // one.kv_bytes))
