"""Ops of a decode step: what each must read, compute and send, from its shape alone.

An op is a frozen shape. ``bytes`` counts the HBM traffic no kernel can avoid (each operand once,
each result once), ``flops`` the multiply-adds times two, ``link_bytes`` what one GPU must send to
others. ``floor_s(gpu)`` is the roofline: the slowest of the three at the GPU's datasheet peak. A
measured time below it means that operands stayed in L2.

Sizes may be NumPy arrays too: then every figure is an array, one value per size (``step_table``).

Units: bytes, flops and seconds for one call on one GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..kernels.formats import get_format, matrix_rate
from .arrays import expm1, largest, smallest
from .gpus import Gpu

_BF16_BYTES = 2.0


@dataclass(frozen=True)
class Op:
    """Base of all ops. Subclasses give ``bytes``, and where they have any ``flops`` or ``link_bytes``."""

    kind: ClassVar[str]

    @property
    def bytes(self) -> float:
        raise NotImplementedError

    @property
    def flops(self) -> float:
        return 0.0

    @property
    def rate(self) -> str:
        """The matrix rate at which ``flops`` run."""
        return "bf16"

    def link_s(self, gpu: Gpu) -> float:
        """Least time on the links between GPUs."""
        return 0.0

    def floor_s(self, gpu: Gpu) -> float:
        """Roofline: max(bytes / bandwidth, flops / matrix peak, bytes sent / link)."""
        flops = self.flops
        has_none = isinstance(flops, float) and not flops
        matrix_s = 0.0 if has_none else flops / gpu.matrix_flops_per_s(self.rate)
        return largest(self.bytes / gpu.memory_bytes_per_s, matrix_s, self.link_s(gpu))

    def shape(self) -> str:
        """The shape for a reader."""
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class Gemm(Op):
    """y (m x n) = x (m x k) . w (n x k)^T, BF16 output."""

    kind = "gemm"
    m: int
    n: int
    k: int
    weight: str = "bf16"
    activation: str = "bf16"

    @property
    def bytes(self) -> float:
        weight, activation = get_format(self.weight), get_format(self.activation)
        return (
            self.n * self.k * weight.bytes_per_value
            + self.m * self.k * activation.bytes_per_value
            + self.m * self.n * _BF16_BYTES
        )

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def rate(self) -> str:
        return matrix_rate(get_format(self.weight), get_format(self.activation))

    def shape(self) -> str:
        return f"{self.m} x {self.n} x {self.k}"


@dataclass(frozen=True)
class BatchedMatmul(Op):
    """One small matmul per head: MLA's absorbed projections. ``stage`` is "pre" or "post"."""

    kind = "mla_bmm"
    stage: str
    num_heads: int
    m: int
    n: int
    k: int
    weight: str = "bf16"

    @property
    def bytes(self) -> float:
        weight = get_format(self.weight).bytes_per_value
        return self.num_heads * (self.n * self.k * weight + self.m * (self.n + self.k) * _BF16_BYTES)

    @property
    def flops(self) -> float:
        return 2.0 * self.num_heads * self.m * self.n * self.k

    def shape(self) -> str:
        return f"{self.num_heads} heads, {self.m} x {self.n} x {self.k}"


@dataclass(frozen=True)
class Experts(Op):
    """Both expert GEMMs, SwiGLU between them, of one rank of an expert-parallel group.

    ``num_tokens`` are the tokens of the whole group; this rank holds ``num_experts / ep`` experts,
    each split ``tp`` ways. ``load`` is "balanced" (tokens spread evenly: at most as many experts
    touched as there are rows) or "power_law_A" (touched experts estimated as for uniform random
    draws with replacement). ``dispatched``: only the tokens that chose this rank's experts arrive,
    through an all-to-all; otherwise all of the group's tokens are on every rank.
    """

    kind = "moe"
    num_tokens: int
    hidden: int
    inter: int
    top_k: int
    num_experts: int
    ep: int = 1
    tp: int = 1
    weight: str = "bf16"
    activation: str = "bf16"
    load: str = "balanced"
    dispatched: bool = False

    @property
    def rows(self) -> float:
        """Token-expert pairs this rank computes, on average."""
        return self.num_tokens * self.top_k / self.ep

    @property
    def touched_experts(self) -> float:
        held = self.num_experts / self.ep
        if self.load == "balanced" or self.num_experts == 1:
            return smallest(held, self.rows)
        return held * -expm1(self.num_tokens * self.top_k * math.log1p(-1 / self.num_experts))

    @property
    def bytes(self) -> float:
        weights = self.touched_experts * 3 * self.hidden * self.inter / self.tp
        read_once = smallest(self.num_tokens, self.rows) * self.hidden
        activation = get_format(self.activation).bytes_per_value + _BF16_BYTES
        return weights * get_format(self.weight).bytes_per_value + read_once * activation

    @property
    def flops(self) -> float:
        return 6.0 * self.rows * self.hidden * self.inter / self.tp

    @property
    def rate(self) -> str:
        return matrix_rate(get_format(self.weight), get_format(self.activation))

    def shape(self) -> str:
        split = f", tp {self.tp}" if self.tp > 1 else ""
        return (
            f"{self.num_tokens} tokens, {self.num_experts} x ({self.hidden}, {self.inter}) "
            f"top-{self.top_k}, ep {self.ep}{split}"
        )


@dataclass(frozen=True)
class PagedAttention(Op):
    """GQA decode: ``batch`` sequences of ``length`` cached tokens, ``q_len`` new tokens each."""

    kind = "attention"
    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    kv_format: str = "bf16"
    q_len: int = 1

    @property
    def kv_tokens(self) -> int:
        """Cached tokens read per sequence."""
        return self.length if self.window is None else smallest(self.length, self.window)

    @property
    def bytes(self) -> float:
        kv = self.batch * self.kv_tokens * 2 * self.num_kv_heads * self.head_dim
        query_and_out = 2 * self.batch * self.q_len * self.num_heads * self.head_dim
        return kv * get_format(self.kv_format).bytes_per_value + query_and_out * _BF16_BYTES

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.q_len * self.num_heads * self.head_dim * self.kv_tokens

    @property
    def rate(self) -> str:
        return get_format(self.kv_format).matrix_rate

    def shape(self) -> str:
        window = f", window {self.window}" if self.window is not None else ""
        return (
            f"{self.batch} x {self.length}, {self.num_heads}/{self.num_kv_heads} heads x {self.head_dim}"
            f"{window}, {self.kv_format} KV"
        )


@dataclass(frozen=True)
class MlaAttention(Op):
    """Absorbed MLA decode over one latent per token; ``top_k`` tokens of it where it is sparse."""

    kind = "mla"
    batch: int
    length: int
    num_heads: int
    kv_lora_rank: int
    rope_dim: int
    kv_format: str = "bf16"
    q_len: int = 1
    top_k: int | None = None

    @property
    def kv_tokens(self) -> int:
        return self.length if self.top_k is None else smallest(self.length, self.top_k)

    @property
    def bytes(self) -> float:
        latent = self.kv_lora_rank + self.rope_dim
        # every query of a sparse layer picks its own tokens
        reads = self.batch * self.kv_tokens * (1 if self.top_k is None else self.q_len)
        query_and_out = self.batch * self.q_len * self.num_heads * (latent + self.kv_lora_rank)
        return reads * latent * get_format(self.kv_format).bytes_per_value + query_and_out * _BF16_BYTES

    @property
    def flops(self) -> float:
        per_pair = 2.0 * self.num_heads * (2 * self.kv_lora_rank + self.rope_dim)
        return per_pair * self.batch * self.q_len * self.kv_tokens

    @property
    def rate(self) -> str:
        return get_format(self.kv_format).matrix_rate

    def shape(self) -> str:
        sparse = f", top-{self.top_k}" if self.top_k is not None else ""
        return f"{self.batch} x {self.length}, {self.num_heads} heads{sparse}, {self.kv_format} KV"


@dataclass(frozen=True)
class IndexScores(Op):
    """DSA's indexer: FP8 scores of every cached token, and the choice of the best ``top_k``."""

    kind = "index_scores"
    batch: int
    length: int
    num_heads: int
    head_dim: int
    q_len: int = 1

    @property
    def bytes(self) -> float:
        keys = self.batch * self.length * index_key_bytes(self.head_dim)
        scores = self.batch * self.q_len * self.length * 4.0
        return keys + 2 * scores

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.q_len * self.num_heads * self.head_dim * self.length

    @property
    def rate(self) -> str:
        return "fp8"

    def shape(self) -> str:
        return f"{self.batch} x {self.length}, {self.num_heads} heads x {self.head_dim}"


def index_key_bytes(head_dim: int) -> float:
    """Bytes of one cached indexer key: FP8 values and one FP32 scale per token and layer."""
    return head_dim + 4.0


@dataclass(frozen=True)
class Streaming(Op):
    """An op bound by memory alone: norms, RoPE and append, SwiGLU, embedding, sampling."""

    kind = "streaming"
    num_bytes: float

    @property
    def bytes(self) -> float:
        return self.num_bytes

    def shape(self) -> str:
        return f"{self.num_bytes / 1e6:.3g} MB"


@dataclass(frozen=True)
class Collective(Op):
    """ "all_reduce", "all_gather" or "reduce_scatter" of ``num_elements`` BF16 values over ``num_gpus``.

    The floor lets every value enter and leave a GPU once (reduction in the switch).
    """

    kind = "collective"
    op: str
    num_elements: int
    num_gpus: int

    @property
    def bytes(self) -> float:
        return 2 * self.num_elements * _BF16_BYTES

    def link_s(self, gpu: Gpu) -> float:
        share = 1.0 if self.op == "all_reduce" else (self.num_gpus - 1) / self.num_gpus
        sent = self.num_elements * _BF16_BYTES * share
        if self.num_gpus <= gpu.scale_up_gpus:
            return sent / gpu.link_bytes_per_s
        return sent / gpu.scale_out_bytes_per_s

    def shape(self) -> str:
        return f"{self.num_elements} BF16 over {self.num_gpus} GPUs"


@dataclass(frozen=True)
class ExpertAllToAll(Op):
    """Expert-parallel "dispatch" or "combine": every token to its ``top_k`` experts' ranks, or back.

    ``num_tokens`` are those of this rank; ``payload`` the format on the wire. The floor sends one
    copy per chosen expert, the share outside the scale-up domain over the scale-out link.
    """

    kind = "all_to_all"
    phase: str
    num_tokens: int
    hidden: int
    top_k: int
    num_experts: int
    ep: int
    payload: str = "bf16"

    @property
    def sent_bytes(self) -> float:
        return self.num_tokens * self.top_k * self.hidden * get_format(self.payload).bytes_per_value

    @property
    def bytes(self) -> float:
        return 2 * self.sent_bytes

    def link_s(self, gpu: Gpu) -> float:
        inside = min(self.ep, gpu.scale_up_gpus)
        up = self.sent_bytes * (inside - 1) / self.ep / gpu.link_bytes_per_s
        out = self.sent_bytes * (self.ep - inside) / self.ep / gpu.scale_out_bytes_per_s
        return largest(up, out)

    def shape(self) -> str:
        return f"{self.num_tokens} tokens x {self.hidden}, top-{self.top_k}, ep {self.ep}, {self.payload}"


class Module(Op):
    """Several ops that a stack's table times as one. Its floor is the parts' sum."""

    parts: tuple[Op, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    def floor_s(self, gpu: Gpu) -> float:
        return sum(part.floor_s(gpu) for part in self.parts)


@dataclass(frozen=True)
class AttentionModule(Module):
    """A whole MLA attention block of a decode step."""

    kind = "mla_module"
    attention: MlaAttention
    parts: tuple[Op, ...]
    gemm_format: str

    def shape(self) -> str:
        return f"{self.attention.shape()}, {self.gemm_format} projections"
