"""Which published table answers for which op of a prefill pass.

Facts about ``aiconfigurator-core``'s context tables (0.12.0, Apache-2.0), checked against its collectors: ``isl`` is
the new tokens of each of ``batch_size`` prompts and ``step`` the tokens cached before them, which is 0 in all rows but
some of the sparse (DSA) modules'; latencies are in milliseconds. Over an FP8 cache some stacks ran matrix products in
FP8 and in BF16: the faster of both counts. ``context_mla`` ran MLA not absorbed, but in SGLang's
rows on Hopper absorbed, over three times the flops: there it is an upper estimate. ``wideep_context_mla`` (SGLang),
``mla_context_module`` and ``dsa_context_module`` are whole attention blocks, and come first.

SGLang's ``wideep_context_moe`` counts the tokens of the whole expert-parallel group and ran those that chose the rank's
experts. For vLLM no row ran dispatched experts: a row of as many token-expert pairs on one GPU that holds all experts
stands in, and is a model. DeepEP's high-throughput ("normal") rows have 20 SMs, DeepEP's own default; dispatch is FP8,
combine BF16; the time is transmission plus notification.

Attention over cached tokens is in no table but those rows of another ``step``, of which SGLang's are many and the other
stacks' stop at 128: ``prefill_time`` takes the difference of such rows, or models it, and says how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .gpus import Gpu
from .ops import BatchedMatmul, Experts, Gemm, Op, Streaming
from .prefill_ops import (
    ContextAllToAll,
    ContextAttention,
    ContextExperts,
    ContextModule,
    IndexContext,
    MlaContext,
    SparseContext,
    SparseModule,
)
from .published_tables import (
    ALL_TO_ALL,
    CACHED_ROWS,
    DEEPSEEK_HIDDEN,
    DEEPSEEK_LATENT,
    GEMM_DTYPES,
    KV_DTYPES,
    MODULE_KEYS,
    MOE,
    MOE_DTYPES,
    NVLINK_ALL_TO_ALL,
    US,
    Query,
    Table,
    at_fields,
    moe_queries,
)

_LENGTHS = ("batch_size", "isl")
CONTEXT_ATTENTION = Table(
    "attention", "context_attention_perf", ("kv_cache_dtype", "head_dim", "window_size"),
    ("num_heads", "num_key_value_heads"), _LENGTHS,
)  # fmt: skip
CONTEXT_MLA = Table("mla", "context_mla_perf", ("kv_cache_dtype",), ("num_heads",), _LENGTHS)
CONTEXT_MODULE = Table("mla", "mla_context_module_perf", MODULE_KEYS, ("num_heads",), _LENGTHS)
WIDE_EP_MLA = Table("mla", "wideep_context_mla_perf", ("mla_dtype", "kv_cache_dtype"), ("num_heads",), _LENGTHS)
DSA_CONTEXT_MODULE = Table(
    "sparse_attention", "dsa_context_module_perf", ("op_name", "step", *MODULE_KEYS), ("num_heads",), _LENGTHS
)
DSA_CACHED_MODULE = Table(
    "sparse_attention", "dsa_context_module_perf", ("op_name", *MODULE_KEYS), ("num_heads",), (*_LENGTHS, CACHED_ROWS)
)
WIDE_EP_CONTEXT_MOE = Table(
    "moe", "wideep_context_moe_perf", ("moe_dtype", "distribution"),
    ("hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size"), ("num_tokens",),
)  # fmt: skip
DEEPEP_NORMAL = {
    phase: Table(
        "comm", "wideep_deepep_normal_perf", (f"{phase}_sms",), ("hidden_size", "num_topk", "num_experts", "node_num"),
        ("num_token",), latency=f"{phase}_transmit_us+{phase}_notify_us", unit_s=US,
    )
    for phase in ("dispatch", "combine")
}  # fmt: skip
PREFILL_TABLES = (
    CONTEXT_ATTENTION, CONTEXT_MLA, CONTEXT_MODULE, WIDE_EP_MLA, DSA_CONTEXT_MODULE, DSA_CACHED_MODULE,
    WIDE_EP_CONTEXT_MOE,
    *DEEPEP_NORMAL.values(),
)  # fmt: skip
"""Every table only a prefill pass reads."""

DEEPEP_SMS = 20

ABSORBED = "an upper estimate: the row ran absorbed attention"
FP8_CACHE = "the row appended to an FP8 cache"
ALL_EXPERTS = "the row ran as many token-expert pairs on one GPU with all experts"


def _attention(op: ContextAttention, gpu: Gpu, stack: str) -> list[Query]:
    kv = KV_DTYPES.get(op.kv_format)
    if kv is None or op.cached_tokens:
        return []
    at = at_fields(op, ("num_heads", "num_kv_heads"), ("batch", "new_tokens"))
    near, axes = (op.num_heads, op.num_kv_heads), (op.batch, op.new_tokens)
    return [Query(CONTEXT_ATTENTION, (kv, op.head_dim, op.window or 0), near, axes, at)]


def _mla(op: MlaContext, gpu: Gpu, stack: str) -> list[Query]:
    kv = KV_DTYPES.get(op.kv_format)
    if kv is None or op.cached_tokens or (op.nope_dim, op.rope_dim, op.v_dim) != (128, 64, 128):
        return []
    at = at_fields(op, ("num_heads",), ("batch", "new_tokens"))
    caveat = ABSORBED if stack == "sglang" and gpu.compute_capability == "9.0" else ""
    return [Query(CONTEXT_MLA, (kv,), (op.num_heads,), (op.batch, op.new_tokens), at, caveat=caveat)]


def _module(op: ContextModule, gpu: Gpu, stack: str) -> list[Query]:
    attention = op.attention
    kv, gemm = KV_DTYPES.get(attention.kv_format), GEMM_DTYPES.get(op.gemm_format)
    hidden = next(part.k for part in op.parts if isinstance(part, Gemm))
    if isinstance(attention, MlaContext):
        is_deepseek = (attention.nope_dim, attention.rope_dim, attention.v_dim) == (128, 64, 128)
    else:
        is_deepseek = (attention.kv_lora_rank, attention.rope_dim) == DEEPSEEK_LATENT
    if kv is None or gemm is None or not is_deepseek or hidden != DEEPSEEK_HIDDEN:
        return []

    def at(near: tuple[float, ...], axes: tuple[float, ...]) -> Op:
        if near[0] != attention.num_heads:
            raise ValueError(f"num_heads: expected {attention.num_heads}; got {near[0]}")
        return scale_context_module(op, axes[0], axes[1])

    near, axes = (attention.num_heads,), (attention.batch, attention.new_tokens)
    if isinstance(attention, SparseContext):
        exact = ("dsa_context_module", 0, "deepseek-ai/DeepSeek-V3.2", gemm, kv)
        return [Query(DSA_CONTEXT_MODULE, exact, near, axes, at)]
    if stack == "sglang":
        return [Query(WIDE_EP_MLA, (gemm, "fp8"), near, axes, at, caveat="" if kv == "fp8" else FP8_CACHE)]
    return [Query(CONTEXT_MODULE, ("deepseek-ai/DeepSeek-V3", gemm, kv), near, axes, at)]


def _sparse_module(op: SparseModule, gpu: Gpu, stack: str) -> list[Query]:
    (query,) = _module(op.module, gpu, stack) or (None,)
    cached = [part for part in op.parts if isinstance(part, SparseContext | IndexContext) and part.cached_tokens]
    if query is None or not cached:
        return []
    length = cached[0].cached_tokens

    def at(near: tuple[float, ...], axes: tuple[float, ...]) -> Op:
        batch, new, tokens = axes[0], axes[1], axes[2] - 1
        module = query.at(near, (batch, new))
        assert isinstance(module, ContextModule)
        over = [replace(part, batch=batch, new_tokens=new, cached_tokens=tokens) for part in cached if tokens]  # type: ignore[arg-type]
        return SparseModule(module, (*module.parts, *over))

    exact = (query.exact[0], *query.exact[2:])  # but for the step
    return [Query(DSA_CACHED_MODULE, exact, query.near, (*query.axes, length + 1), at)]


def scale_context_module(module: ContextModule, batch: float, new_tokens: float) -> ContextModule:
    """The module with another number of prompts and of new tokens each. Heads are not rescaled."""
    attention = module.attention
    rows = batch * new_tokens / (attention.batch * attention.new_tokens)

    def scaled(part: Op) -> Op:
        if isinstance(part, Gemm | BatchedMatmul):
            return replace(part, m=part.m * rows)  # type: ignore[arg-type]
        if isinstance(part, Streaming):
            return Streaming(part.num_bytes * rows)
        return scale_attention(part, batch, new_tokens)

    parts = tuple(scaled(part) for part in module.parts)
    whole = scale_attention(attention, batch, new_tokens)
    return ContextModule(whole, parts, module.gemm_format)  # type: ignore[arg-type]


def scale_attention(op: Op, batch: float, new_tokens: float) -> Op:
    """An attention op of a prefill pass with another number of prompts and of new tokens each."""
    if isinstance(op, ContextAttention | MlaContext | SparseContext | IndexContext):
        return replace(op, batch=batch, new_tokens=new_tokens)  # type: ignore[arg-type]
    if isinstance(op, ContextModule):
        return scale_context_module(op, batch, new_tokens)
    raise ValueError(f"op: expected attention of a prefill pass; got {op.kind}")


def _experts(op: ContextExperts, gpu: Gpu, stack: str) -> list[Query]:
    dtype = MOE_DTYPES.get((op.weight, op.activation))
    if dtype is None:
        return []
    if not op.dispatched or stack == "trtllm":
        return moe_queries(op, gpu, stack)
    axes, shape = (op.num_tokens,), (op.hidden, op.inter, op.top_k, op.num_experts)
    fields = ("hidden", "inter", "top_k", "num_experts", "ep")
    found = []
    if stack == "sglang":
        load = {"balanced": "uniform"}.get(op.load, op.load)
        at = at_fields(op, fields, ("num_tokens",))
        found = [Query(WIDE_EP_CONTEXT_MOE, (dtype, load), (*shape, op.ep), axes, at)]
    alone = Experts(
        op.num_tokens, op.hidden, op.inter, op.top_k, op.num_experts, 1, op.tp, op.weight, op.activation, op.load
    )
    at_alone = at_fields(alone, (*fields, "tp"), ("num_tokens",))
    pairs = (op.num_tokens / op.ep,)
    return [*found, Query(MOE, (dtype, op.load), (*shape, 1, op.tp), pairs, at_alone, caveat=ALL_EXPERTS)]


def _all_to_all(op: ContextAllToAll, gpu: Gpu, stack: str) -> list[Query]:
    near, axes = (op.hidden, op.top_k, op.num_experts, op.ep), (op.num_tokens,)
    at = at_fields(op, ("hidden", "top_k", "num_experts", "ep"), ("num_tokens",))
    if stack == "vllm":
        return [Query(ALL_TO_ALL, ("deepep_ht", op.phase, "default"), near, axes, at)]
    if stack == "sglang":
        nodes = (*near[:3], op.ep / gpu.node_gpus)
        spread: Callable[[tuple[float, ...], tuple[float, ...]], Op]
        spread = lambda n, a: at((*n[:3], n[3] * gpu.node_gpus), a)  # noqa: E731
        return [Query(DEEPEP_NORMAL[op.phase], (DEEPEP_SMS,), nodes, axes, spread)]
    wire = {"fp8": "fp8", "fp8_group": "fp8", "nvfp4": "nvfp4", "mxfp8": "fp8"}.get(op.payload, "bfloat16")

    def nvlink(phase: str, plus: Query | None = None) -> Query:
        return Query(NVLINK_ALL_TO_ALL, (f"alltoall_{phase}", "NVLinkTwoSided", wire), near, axes, at, plus)

    return [
        nvlink(op.phase, nvlink("prepare") if op.phase == "dispatch" else None),
        Query(ALL_TO_ALL, ("trtllm_deepep_ht", op.phase, wire), near, axes, at),
    ]


PREFILL_QUERIES: dict[type[Op], Callable[[Any, Gpu, str], list[Query]]] = {
    ContextAttention: _attention, MlaContext: _mla, ContextModule: _module, ContextExperts: _experts,
    ContextAllToAll: _all_to_all, SparseModule: _sparse_module,
}  # fmt: skip
