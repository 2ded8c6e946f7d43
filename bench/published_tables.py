"""Which published table answers for which op, and how its columns map to the op's shape.

Facts about ``aiconfigurator-core``'s tables (0.12.0, Apache-2.0), checked against its collectors:
``latency`` is in milliseconds except in the all-to-all tables (microseconds); ``isl + step`` is the
KV length; MoE ``num_tokens`` are those of the whole expert-parallel group and the row contains the
top-k choice. With ``moe_ep_size`` > 1, vLLM's and SGLang's MoE rows ran all of the group's tokens on
the one rank measured (their time grows with the group's tokens at any ep); SGLang's wide-EP table
and TensorRT-LLM's rows ran only the tokens that stay. All-to-all ``num_tokens`` are those of one
rank; ``message_size`` of both the custom all-reduce and NCCL tables counts *elements*, not bytes;
DeepEP tables without ``ep_size`` ran one rank per GPU of ``node_num`` nodes. Attention and MLA rows ran
one query token per sequence: for a step that verifies drafts they are only a model (``one_token``); GEMM,
MoE and all-to-all rows count rows, and B sequences of q tokens are just B q of them. Timing replays a CUDA
graph over the same buffers without an L2 flush: small weights may be warm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .gpus import Gpu
from .ops import (
    AttentionModule,
    BatchedMatmul,
    Collective,
    ExpertAllToAll,
    Experts,
    Gemm,
    IndexScores,
    MlaAttention,
    Op,
    PagedAttention,
    Streaming,
)

KV_LENGTH = "kv_length"
"""Virtual column: isl + step."""

CACHED_ROWS = "step + 1"
"""Virtual column: the tokens cached before a prefill, and one, so that it has a logarithm."""

MS, US = 1e-3, 1e-6


@dataclass(frozen=True)
class Table:
    """A Parquet table of one file name.

    Attributes:
        exact: columns that must match. near: shape columns that must match for a measured or
            interpolated answer; a model may borrow from the nearest shape.
        axes: columns to interpolate along.
        latency: the time's column, or several to add as ``a+b``, in units of ``unit_s`` seconds.
    """

    family: str
    file: str
    exact: tuple[str, ...]
    near: tuple[str, ...]
    axes: tuple[str, ...]
    latency: str = "latency"
    unit_s: float = MS

    @property
    def name(self) -> str:
        return self.file.removesuffix("_perf")


@dataclass(frozen=True)
class Query:
    """An op put to a table: the columns' values, and the op at other values of near and axes.

    ``plus``: a second row whose time belongs to the op too. ``caveat``: why even the exact row is
    only a model of this op.
    """

    table: Table
    exact: tuple[Any, ...]
    near: tuple[float, ...]
    axes: tuple[float, ...]
    at: Callable[[tuple[float, ...], tuple[float, ...]], Op]
    plus: Query | None = None
    caveat: str = ""


GEMM = Table("gemm", "gemm_perf", ("gemm_dtype",), (), ("m", "n", "k"))
MOE = Table(
    "moe", "moe_perf", ("moe_dtype", "distribution"),
    ("hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size", "moe_tp_size"), ("num_tokens",),
)  # fmt: skip
WIDE_EP_MOE = Table(
    "moe", "wideep_generation_moe_perf", ("moe_dtype", "distribution"),
    ("hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size"), ("num_tokens",),
)  # fmt: skip
ATTENTION = Table(
    "attention", "generation_attention_perf", ("kv_cache_dtype", "head_dim", "window_size"),
    ("num_heads", "num_key_value_heads"), ("batch_size", KV_LENGTH),
)  # fmt: skip
MLA = Table("mla", "generation_mla_perf", ("kv_cache_dtype",), ("num_heads",), ("batch_size", KV_LENGTH))
MODULE_KEYS = ("model", "gemm_type", "kv_cache_dtype")
MLA_MODULE = Table("mla", "mla_generation_module_perf", MODULE_KEYS, ("num_heads",), ("batch_size", KV_LENGTH))
DSA_MODULE = Table(
    "sparse_attention", "dsa_generation_module_perf", ("op_name", *MODULE_KEYS), ("num_heads",),
    ("batch_size", KV_LENGTH),
)  # fmt: skip
MLA_BMM = Table("mla_bmm", "mla_bmm_perf", ("op_name", "bmm_dtype"), ("num_heads",), ("num_tokens",))
ALL_REDUCE = Table("comm", "custom_allreduce_perf", ("op_name",), ("num_gpus",), ("message_size",))
NCCL = Table("comm", "nccl_perf", ("op_name", "nccl_dtype"), ("num_gpus",), ("message_size",))
_ROUTE = ("hidden_size", "topk", "num_experts")
ALL_TO_ALL = Table(
    "comm", "moe_a2a_perf", ("comm_backend", "phase", "comm_dtype"), (*_ROUTE, "ep_size"), ("num_tokens",), unit_s=US
)
NVLINK_ALL_TO_ALL = Table(
    "comm", "trtllm_alltoall_perf", ("op_name", "kernel_source", "moe_dtype"), (*_ROUTE, "moe_ep_size"), ("num_tokens",)
)
DEEPEP = {
    phase: Table(
        "comm", "wideep_deepep_ll_perf", (), ("hidden_size", "num_topk", "num_experts", "node_num"), ("num_token",),
        latency=f"{phase}_avg_t_us", unit_s=US,
    )
    for phase in ("dispatch", "combine")
}  # fmt: skip
TABLES = (
    GEMM, MOE, WIDE_EP_MOE, ATTENTION, MLA, MLA_MODULE, DSA_MODULE, MLA_BMM, ALL_REDUCE, NCCL,
    ALL_TO_ALL, NVLINK_ALL_TO_ALL, *DEEPEP.values(),
)  # fmt: skip
"""Every table that a decode step reads; those of prefill alone are in ``prefill_tables``."""

GEMM_DTYPES = {"bf16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4"}
MOE_DTYPES = {
    ("bf16", "bf16"): "bfloat16", ("fp8", "fp8"): "fp8", ("fp8_block", "fp8_group"): "fp8_block",
    ("mxfp4", "bf16"): "w4a16_mxfp4", ("mxfp4", "mxfp8"): "w4a8_mxfp4_mxfp8", ("nvfp4", "nvfp4"): "nvfp4",
}  # fmt: skip
KV_DTYPES = {"bf16": "bfloat16", "fp8": "fp8"}
DEEPSEEK_LATENT = (512, 64)
DEEPSEEK_HIDDEN = 7168


def one_token(op: Op) -> Op:
    """The op with one query token per sequence, as the tables' attention rows have it; itself where it has no more.

    A row times (floor / floor of one token) is the model of several tokens: K and V are read once, flops grow with
    the tokens, the row's efficiency is held. On rows that do the same work (q x as many heads over the same K and V)
    this is right to a median of 4 % at 2 tokens; where a kernel runs out of its fast tiles it is too kind.
    """
    if isinstance(op, PagedAttention | MlaAttention | IndexScores):
        return op if op.q_len == 1 else replace(op, q_len=1)
    if not isinstance(op, AttentionModule) or op.attention.q_len == 1:
        return op
    tokens = op.attention.q_len

    def one(part: Op) -> Op:
        if isinstance(part, Gemm | BatchedMatmul):
            return replace(part, m=part.m // tokens)
        return Streaming(part.num_bytes / tokens) if isinstance(part, Streaming) else one_token(part)

    return AttentionModule(replace(op.attention, q_len=1), tuple(one(part) for part in op.parts), op.gemm_format)


def queries(op: Op, gpu: Gpu, stack: str) -> list[Query]:
    """The tables that may answer for ``op`` in ``stack``, best first; empty where none can.

    Attention with several query tokens has no row: ask for ``one_token`` of it.
    """
    if one_token(op) is not op:
        return []
    make = _QUERIES.get(type(op))
    if make is None:
        from .prefill_tables import PREFILL_QUERIES  # which builds on this module

        make = PREFILL_QUERIES.get(type(op))
    return make(op, gpu, stack) if make else []


def _gemm(op: Gemm, gpu: Gpu, stack: str) -> list[Query]:
    dtype = GEMM_DTYPES.get(op.weight)
    if dtype is None:
        return []

    def at(near: tuple[float, ...], axes: tuple[float, ...]) -> Gemm:
        return Gemm(axes[0], axes[1], axes[2], op.weight, op.activation)  # type: ignore[arg-type]

    return [Query(GEMM, (dtype,), (), (op.m, op.n, op.k), at)]


def at_fields(
    op: Op, near: tuple[str, ...], axes: tuple[str, ...]
) -> Callable[[tuple[float, ...], tuple[float, ...]], Op]:
    """``op`` with the fields ``near`` and ``axes`` set to other values."""

    def at(near_values: tuple[float, ...], axis_values: tuple[float, ...]) -> Op:
        fields: Mapping[str, Any] = dict(zip((*near, *axes), (*near_values, *axis_values), strict=True))
        return replace(op, **fields)

    return at


def moe_queries(op: Experts, gpu: Gpu, stack: str) -> list[Query]:
    dtype = MOE_DTYPES.get((op.weight, op.activation))
    if dtype is None:
        return []
    fields = ("hidden", "inter", "top_k", "num_experts", "ep", "tp")
    shape = (op.hidden, op.inter, op.top_k, op.num_experts, op.ep, op.tp)
    axes = (op.num_tokens,)
    if not op.dispatched or stack == "trtllm":  # its rows scale with the tokens that stay on the rank
        return [Query(MOE, (dtype, op.load), shape, axes, at_fields(op, fields, ("num_tokens",)))]
    replicated = Query(
        MOE, (dtype, op.load), shape, axes, at_fields(op, fields, ("num_tokens",)),
        caveat="an upper estimate: the row ran all of the group's tokens through this rank",
    )  # fmt: skip
    if stack == "vllm":
        return [replicated]
    load = {"balanced": "uniform"}.get(op.load, op.load)
    return [Query(WIDE_EP_MOE, (dtype, load), shape[:5], axes, at_fields(op, fields[:5], ("num_tokens",))), replicated]


def _attention(op: PagedAttention, gpu: Gpu, stack: str) -> list[Query]:
    dtype = KV_DTYPES.get(op.kv_format)
    if dtype is None:
        return []
    at = at_fields(op, ("num_heads", "num_kv_heads"), ("batch", "length"))
    exact = (dtype, op.head_dim, op.window or 0)
    return [Query(ATTENTION, exact, (op.num_heads, op.num_kv_heads), (op.batch, op.length), at)]


def _mla(op: MlaAttention, gpu: Gpu, stack: str) -> list[Query]:
    dtype = KV_DTYPES.get(op.kv_format)
    if dtype is None or (op.kv_lora_rank, op.rope_dim) != DEEPSEEK_LATENT or op.top_k is not None:
        return []
    return [
        Query(MLA, (dtype,), (op.num_heads,), (op.batch, op.length), at_fields(op, ("num_heads",), ("batch", "length")))
    ]


def _module(op: AttentionModule, gpu: Gpu, stack: str) -> list[Query]:
    attention = op.attention
    kv, gemm = KV_DTYPES.get(attention.kv_format), GEMM_DTYPES.get(op.gemm_format)
    hidden = next(part.k for part in op.parts if isinstance(part, Gemm))
    is_deepseek = (attention.kv_lora_rank, attention.rope_dim) == DEEPSEEK_LATENT and hidden == DEEPSEEK_HIDDEN
    if kv is None or gemm is None or not is_deepseek:
        return []

    def at(near: tuple[float, ...], axes: tuple[float, ...]) -> Op:
        return scale_module(op, near[0], axes[0], axes[1])

    near, axes = (attention.num_heads,), (attention.batch, attention.length)
    if attention.top_k is None:
        return [Query(MLA_MODULE, ("deepseek-ai/DeepSeek-V3", gemm, kv), near, axes, at)]
    exact = ("dsa_generation_module", "deepseek-ai/DeepSeek-V3.2", gemm, kv)
    return [Query(DSA_MODULE, exact, near, axes, at)]


def scale_module(module: AttentionModule, num_heads: float, batch: float, length: float) -> AttentionModule:
    """The module at another batch and length. Heads are not rescaled: they must match exactly."""
    attention = module.attention
    if num_heads != attention.num_heads:
        raise ValueError(f"num_heads: expected {attention.num_heads}; got {num_heads}")
    ratio = batch / attention.batch

    def scaled(part: Op) -> Op:
        if isinstance(part, Gemm | BatchedMatmul):
            return replace(part, m=part.m * ratio)  # type: ignore[arg-type]
        if isinstance(part, Streaming):
            return Streaming(part.num_bytes * ratio)
        return replace(part, batch=batch, length=length)  # type: ignore[call-arg]

    parts = tuple(scaled(part) for part in module.parts)
    return AttentionModule(replace(attention, batch=batch, length=length), parts, module.gemm_format)  # type: ignore[arg-type]


def _bmm(op: BatchedMatmul, gpu: Gpu, stack: str) -> list[Query]:
    if op.weight != "bf16" or {op.n, op.k} != {128, 512}:
        return []
    at = at_fields(op, ("num_heads",), ("m",))
    return [Query(MLA_BMM, (f"mla_gen_{op.stage}", "bfloat16"), (op.num_heads,), (op.m,), at)]


def _collective(op: Collective, gpu: Gpu, stack: str) -> list[Query]:
    at = at_fields(op, ("num_gpus",), ("num_elements",))
    nccl = Query(NCCL, (op.op, "half"), (op.num_gpus,), (op.num_elements,), at)
    if op.op != "all_reduce":
        return [nccl]
    return [Query(ALL_REDUCE, (op.op,), (op.num_gpus,), (op.num_elements,), at), nccl]


def _all_to_all(op: ExpertAllToAll, gpu: Gpu, stack: str) -> list[Query]:
    near, axes = (op.hidden, op.top_k, op.num_experts, op.ep), (op.num_tokens,)
    at = at_fields(op, ("hidden", "top_k", "num_experts", "ep"), ("num_tokens",))
    if stack == "vllm":
        return [Query(ALL_TO_ALL, ("deepep_ll", op.phase, "default"), near, axes, at)]
    if stack == "sglang":
        nodes = (*near[:3], op.ep / gpu.node_gpus)
        return [Query(DEEPEP[op.phase], (), nodes, axes, lambda n, a: at((*n[:3], n[3] * gpu.node_gpus), a))]
    wire = {"fp8": "fp8", "fp8_group": "fp8", "nvfp4": "nvfp4", "mxfp8": "fp8"}.get(op.payload, "bfloat16")

    def nvlink(phase: str, plus: Query | None = None) -> Query:
        exact = (f"alltoall_{phase}", "NVLinkTwoSided", wire)
        return Query(NVLINK_ALL_TO_ALL, exact, near, axes, at, plus)

    return [
        nvlink(op.phase, nvlink("prepare") if op.phase == "dispatch" else None),
        Query(ALL_TO_ALL, ("trtllm_deepep_ll", op.phase, wire), near, axes, at),
    ]


_QUERIES: dict[type[Op], Callable[[Any, Gpu, str], list[Query]]] = {
    Gemm: _gemm, Experts: moe_queries, PagedAttention: _attention, MlaAttention: _mla, AttentionModule: _module,
    BatchedMatmul: _bmm, Collective: _collective, ExpertAllToAll: _all_to_all,
}  # fmt: skip
