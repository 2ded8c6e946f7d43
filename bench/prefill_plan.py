"""The prefill plan: model + deployment + prompts -> the ops of one prefill pass on one GPU.

Each attention group runs ``sequences`` prompts of ``new_tokens`` new tokens behind ``cached_tokens`` cached ones, at
the same time as every other group of the deployment: M = sequences x new_tokens rows. The ops are the decode plan's at
that M, with causal attention in the place of decode attention; logits for the last token of each prompt only.

Cached tokens are not free. What the new tokens do with them are calls of their own, whose names begin with ``cached_``:
attention over them, and in MLA, which prefills without absorption, the projection of their latents up to keys and
values again. (Absorbed attention over them has fewer flops below some 170 new tokens; the plan does not turn to it.) A
sparse (DSA) layer attends to latents, absorbed, and scores all of them.

A deployment's batch, context, tokens per step and kept tokens are those of decoding and are not used. Memory: weights,
reserve (activations of the pass among it) and the KV cache of these prompts and one token more.

What a sum over the plan leaves out is in ``OMITTED``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .decode_plan import OpCall, Plan, planned
from .deployment import Deployment, check_divides, check_precision
from .gpus import Gpu
from .memory import check_fits
from .model_config import GqaAttention, MlaAttention, ModelConfig, SparseIndexer
from .ops import BatchedMatmul, Gemm
from .prefill_ops import (
    ContextAllToAll,
    ContextAttention,
    ContextExperts,
    ContextModule,
    IndexContext,
    MlaContext,
    SparseContext,
)

OMITTED = (
    "launch gaps between kernels, scheduler and other host time",
    "waiting for a pass, and transfer of the KV cache to other GPUs",
    "imbalance between prompts of one pass and between expert-parallel ranks beyond the load named in the deployment",
    "overlap: communication is added, never hidden behind compute",
)
"""What the sum of kernels does not contain, shown beside every total."""

CACHED = "cached_"
"""Begins the name of every call that is there for cached tokens alone."""


@dataclass
class _PrefillPlan(Plan):
    """``deployment`` is that of the pass: its rows are the new tokens."""

    new_tokens: int = 1
    cached_tokens: int = 0
    experts = ContextExperts
    all_to_all = ContextAllToAll

    @property
    def head_rows(self) -> int:
        return self.deployment.sequences

    def attend(self, name: str, attention: GqaAttention, heads: int, kv_heads: int, count: int) -> None:
        op = ContextAttention(
            self.deployment.sequences, self.new_tokens, heads, kv_heads, attention.head_dim, attention.window,
            self.deployment.precision.kv,
        )  # fmt: skip
        self.add(name, op, count)
        cached = replace(op, cached_tokens=self.cached_tokens)
        if self.cached_tokens and cached.flops:  # a window of one token sees none of them
            self.add(CACHED + name, cached, count)

    def attend_latents(self, attention: MlaAttention, heads: int, count: int, block: str) -> None:
        if attention.indexer is not None:
            self._attend_sparse(attention, attention.indexer, heads, count, block)
            return
        sequences, precision = self.deployment.sequences, self.deployment.precision
        op = MlaContext(
            sequences, self.new_tokens, heads, attention.nope_dim, attention.rope_dim, attention.v_dim, precision.kv
        )
        width = heads * (attention.nope_dim + attention.v_dim)
        self.linear("kv_b_proj", width, attention.kv_lora_rank, count, block)
        self.add("attention", op, count, block)
        if self.cached_tokens:
            rows = sequences * self.cached_tokens
            up = Gemm(rows, width, attention.kv_lora_rank, precision.linear, precision.linear_activation)
            self.add(CACHED + "kv_b_proj", up, count)
            self.add(CACHED + "attention", replace(op, cached_tokens=self.cached_tokens), count)

    def _attend_sparse(
        self, attention: MlaAttention, indexer: SparseIndexer, heads: int, count: int, block: str
    ) -> None:
        rows, rank = self.deployment.rows, attention.kv_lora_rank
        self.add("absorbed_q_bmm", BatchedMatmul("pre", heads, rows, rank, attention.nope_dim), count, block)
        op = SparseContext(
            self.deployment.sequences, self.new_tokens, heads, rank, attention.rope_dim, indexer.top_k,
            self.deployment.precision.kv,
        )  # fmt: skip
        self.add("attention", op, count, block)
        cached = replace(op, cached_tokens=self.cached_tokens)
        if self.cached_tokens and cached.flops:  # 0 where every new token already has as many new ones as it may choose
            self.add(CACHED + "attention", cached, count)
        self.add("absorbed_v_bmm", BatchedMatmul("post", heads, rows, attention.v_dim, rank), count, block)

    def score_index(self, indexer: SparseIndexer, count: int, block: str) -> None:
        op = IndexContext(self.deployment.sequences, self.new_tokens, indexer.num_heads, indexer.head_dim)
        self.add("index_scores", op, count, block)
        if self.cached_tokens:
            self.add(CACHED + "index_scores", replace(op, cached_tokens=self.cached_tokens), count)


def prefill_plan(
    model: ModelConfig, gpu: Gpu, deployment: Deployment, *, new_tokens: int, cached_tokens: int = 0,
    sequences: int = 1, check_memory: bool = True,
) -> tuple[OpCall, ...]:  # fmt: skip
    """The ops of one prefill pass on one GPU; ``calls_per_step`` of a call are those of the pass.

    Args:
        new_tokens: of each prompt, computed in this pass. cached_tokens: of each prompt, already in the KV cache.
        sequences: prompts of one attention group.

    Raises:
        ValueError: counts out of range, a split that does not divide, prompts beyond the model's context, a precision
            the GPU lacks.
        DoesNotFit: weights, KV cache and reserve exceed the GPU's memory (with ``check_memory``).
    """
    for name, value, least in (
        ("new_tokens", new_tokens, 1), ("cached_tokens", cached_tokens, 0), ("sequences", sequences, 1),
    ):  # fmt: skip
        if not (value >= least and value < 2**53 and value == int(value)):
            raise ValueError(f"{name}: expected a whole number of at least {least}; got {value}")
    rows = replace(
        deployment, batch_per_gpu=sequences / deployment.attention_tp, context=cached_tokens + new_tokens,
        tokens_per_step=new_tokens, kept_tokens_per_step=1.0,
    )  # fmt: skip
    check_divides(model, rows)
    check_precision(gpu, rows.precision)
    if check_memory:
        check_fits(model, gpu, replace(rows, tokens_per_step=1))
    return planned(_PrefillPlan(model, rows, new_tokens=new_tokens, cached_tokens=cached_tokens))


def merge_context_block(calls: tuple[OpCall, ...], gemm_format: str) -> tuple[OpCall, ...]:
    """The plan with every MLA attention block, without what is there for cached tokens, as one ``ContextModule``."""
    parts = [call for call in calls if call.block == "mla"]
    if not parts:
        return calls
    attention = next(call.op for call in parts if isinstance(call.op, MlaContext | SparseContext))
    module = ContextModule(attention, tuple(call.op for call in parts), gemm_format)
    merged: list[OpCall] = []
    for call in calls:
        if call.block != "mla":
            merged.append(call)
        elif call is parts[0]:
            merged.append(OpCall("attention_module", module, call.calls_per_step))
    return tuple(merged)
