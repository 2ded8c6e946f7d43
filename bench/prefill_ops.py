"""Ops that only a prefill pass has: causal attention over many new tokens, and what goes with large batches of rows.

``batch`` prompts bring ``new_tokens`` each. With ``cached_tokens`` = 0 an attention op is the new tokens' attention
over one another; with more it is the same queries' attention over so many cached tokens *alone*, so that a pass with a
cached prefix is two ops whose flops sum to those of attention over all of it:

    pairs(new, cached, window) = sum over p in cached+1 .. cached+new of min(p, window)

``bytes`` and ``flops`` as in ``ops``: operands once, multiply-adds times two; the masked half is not counted.
Units: bytes, flops and seconds for one call on one GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kernels.formats import get_format
from .arrays import largest, smallest
from .gpus import Gpu
from .ops import ExpertAllToAll, Experts, Module, Op, index_key_bytes

_BF16_BYTES = 2.0


def causal_pairs(new_tokens: int, cached_tokens: int = 0, window: int | None = None) -> float:
    """Query-key pairs of ``new_tokens`` queries behind ``cached_tokens``, each seeing its last ``window`` tokens."""

    def up_to(tokens: int) -> float:
        growing = tokens if window is None else smallest(tokens, window)
        return growing * (growing + 1) / 2 + (tokens - growing) * (window or 0)

    return up_to(cached_tokens + new_tokens) - up_to(cached_tokens)


@dataclass(frozen=True)
class _Context(Op):
    """Base of attention in prefill."""

    batch: int
    new_tokens: int
    num_heads: int

    def _pairs(self, cached_tokens: int, window: int | None) -> float:
        """Pairs per prompt: among new tokens, or those with cached ones alone."""
        within = causal_pairs(self.new_tokens, 0, window)
        return causal_pairs(self.new_tokens, cached_tokens, window) - within if cached_tokens else within

    def _place(self, cached_tokens: int) -> str:
        over = f" over {cached_tokens} cached" if cached_tokens else ""
        return f"{self.batch} x {self.new_tokens}{over}, {self.num_heads}"


@dataclass(frozen=True)
class ContextAttention(_Context):
    """GQA in prefill."""

    kind = "context_attention"
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    kv_format: str = "bf16"
    cached_tokens: int = 0

    @property
    def pairs(self) -> float:
        return self._pairs(self.cached_tokens, self.window)

    @property
    def bytes(self) -> float:
        read = self.new_tokens
        if self.cached_tokens:  # the first query sees the window but for itself
            read = self.cached_tokens if self.window is None else min(self.cached_tokens, self.window - 1)
        kv = self.batch * read * 2 * self.num_kv_heads * self.head_dim * get_format(self.kv_format).bytes_per_value
        if self.cached_tokens:  # queries and output are those of the other op
            return kv
        return kv + 2 * self.batch * self.new_tokens * self.num_heads * self.head_dim * _BF16_BYTES

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.num_heads * self.head_dim * self.pairs

    @property
    def rate(self) -> str:
        return get_format(self.kv_format).matrix_rate

    def shape(self) -> str:
        window = f", window {self.window}" if self.window is not None else ""
        place = self._place(self.cached_tokens)
        return f"{place}/{self.num_kv_heads} heads x {self.head_dim}{window}, {self.kv_format} KV"


@dataclass(frozen=True)
class MlaContext(_Context):
    """MLA in prefill, not absorbed: keys of nope + rope and values of v per head, projected up from the latents before.

    ``kv_format``: of the cache. Keys and values are BF16; products run at the cache's rate, as Blackwell's kernels do.
    """

    kind = "mla_context"
    nope_dim: int
    rope_dim: int
    v_dim: int
    kv_format: str = "bf16"
    cached_tokens: int = 0

    @property
    def pairs(self) -> float:
        return self._pairs(self.cached_tokens, None)

    @property
    def bytes(self) -> float:
        heads, tokens = self.num_heads, self.cached_tokens or self.new_tokens
        key_value = tokens * (heads * (self.nope_dim + self.v_dim) + self.rope_dim)
        query_and_out = 0 if self.cached_tokens else tokens * heads * (self.nope_dim + self.rope_dim + self.v_dim)
        return self.batch * (key_value + query_and_out) * _BF16_BYTES

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.num_heads * (self.nope_dim + self.rope_dim + self.v_dim) * self.pairs

    @property
    def rate(self) -> str:
        return get_format(self.kv_format).matrix_rate

    def shape(self) -> str:
        return f"{self._place(self.cached_tokens)} heads, {self.kv_format} KV"


@dataclass(frozen=True)
class SparseContext(_Context):
    """DSA in prefill, absorbed: every query over the ``top_k`` latents that its indexer chose, or all if fewer."""

    kind = "sparse_context"
    kv_lora_rank: int
    rope_dim: int
    top_k: int
    kv_format: str = "bf16"
    cached_tokens: int = 0

    @property
    def pairs(self) -> float:
        return self._pairs(self.cached_tokens, self.top_k)

    @property
    def bytes(self) -> float:
        latent, tokens = self.kv_lora_rank + self.rope_dim, self.cached_tokens or self.new_tokens
        read = tokens * latent * get_format(self.kv_format).bytes_per_value
        query_and_out = 0 if self.cached_tokens else tokens * self.num_heads * (latent + self.kv_lora_rank)
        return self.batch * (read + query_and_out * _BF16_BYTES)

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.num_heads * (2 * self.kv_lora_rank + self.rope_dim) * self.pairs

    @property
    def rate(self) -> str:
        return get_format(self.kv_format).matrix_rate

    def shape(self) -> str:
        return f"{self._place(self.cached_tokens)} heads, top-{self.top_k}, {self.kv_format} KV"


@dataclass(frozen=True)
class IndexContext(_Context):
    """DSA's indexer in prefill: FP8 scores of every pair, written and read once by the choice of the best."""

    kind = "index_context"
    head_dim: int
    cached_tokens: int = 0

    @property
    def pairs(self) -> float:
        return self._pairs(self.cached_tokens, None)

    @property
    def bytes(self) -> float:
        keys = (self.cached_tokens or self.new_tokens) * index_key_bytes(self.head_dim)
        return self.batch * (keys + 2 * 4.0 * self.pairs)

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.num_heads * self.head_dim * self.pairs

    @property
    def rate(self) -> str:
        return "fp8"

    def shape(self) -> str:
        return f"{self._place(self.cached_tokens)} heads x {self.head_dim}"


ContextOp = ContextAttention | MlaContext | SparseContext | IndexContext


@dataclass(frozen=True)
class ContextModule(Module):
    """A whole MLA attention block of a prefill pass, without cached tokens."""

    kind = "mla_context_module"
    attention: MlaContext | SparseContext
    parts: tuple[Op, ...]
    gemm_format: str

    def shape(self) -> str:
        return f"{self.attention.shape()}, {self.gemm_format} projections"


@dataclass(frozen=True)
class CachedPart(Module):
    """What a sparse block of a prefill pass does over cached tokens alone, beside the ``module`` of its new ones."""

    kind = "cached_part"
    module: ContextModule
    parts: tuple[Op, ...]

    def shape(self) -> str:
        return self.parts[-1].shape()

    @property
    def cached_tokens(self) -> int:
        return next(part.cached_tokens for part in self.parts if isinstance(part, SparseContext | IndexContext))


@dataclass(frozen=True)
class SparseModule(Module):
    """A whole sparse block with its cached tokens: a table's row of another ``step``."""

    kind = "mla_context_module"
    module: ContextModule
    parts: tuple[Op, ...]

    @classmethod
    def of(cls, cached: CachedPart) -> SparseModule:
        return cls(cached.module, (*cached.module.parts, *cached.parts))

    def shape(self) -> str:
        return self.module.shape()


@dataclass(frozen=True)
class ContextExperts(Experts):
    """Experts with a prefill pass's many rows each: stacks run other kernels than in decoding."""


@dataclass(frozen=True)
class ContextAllToAll(ExpertAllToAll):
    """The all-to-all of a prefill pass ("high throughput"): a token goes once to each rank that has experts for it.

    ``num_tokens`` are those of this rank. The floor sends one copy to every other GPU of the domain that holds one of
    the token's experts, and one to every other domain, for experts drawn uniformly without return.
    """

    kind = "context_all_to_all"

    def _reached(self, parts: float) -> float:
        """Of ``parts`` equal shares of the experts, how many hold at least one of a token's ``top_k``."""
        held, all_experts = self.num_experts / parts, self.num_experts
        missed = math.prod((all_experts - held - i) / (all_experts - i) for i in range(int(self.top_k)))
        return parts * (1 - max(0.0, missed))

    @property
    def token_bytes(self) -> float:
        return self.hidden * get_format(self.payload).bytes_per_value

    @property
    def sent_bytes(self) -> float:
        """All copies, wherever they go."""
        return self.num_tokens * self._reached(self.ep) * self.token_bytes

    @property
    def bytes(self) -> float:
        return self.num_tokens * self.token_bytes + self.sent_bytes

    def link_s(self, gpu: Gpu) -> float:
        inside = min(self.ep, gpu.scale_up_gpus)
        domains = self.ep / inside
        up = self.sent_bytes * (inside - 1) / self.ep / gpu.link_bytes_per_s
        copies = self._reached(domains) * (domains - 1) / domains
        out = self.num_tokens * self.token_bytes * copies / gpu.scale_out_bytes_per_s
        return largest(up, out)
