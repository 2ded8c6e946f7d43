"""The decode plan: model + deployment -> the ops of one decode step on one GPU.

Two ways to be expert parallel. With one attention group (``attention_dp == 1``) tokens are
replicated: each rank runs its experts on all of them, then an all-reduce. With several, an
all-to-all dispatches each rank's tokens to the experts' ranks and combines the results; with
``exchange="all_gather"``, or where experts are split by tensor parallelism too, every rank gets all
tokens and the results are reduce-scattered. An op's name says its place in the layer, its ``op.kind`` what it is.

What a sum over the plan leaves out is in ``OMITTED``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

from .deployment import Deployment, check_divides, check_precision
from .gpus import Gpu
from .memory import check_fits
from .model_config import DenseFfn, GqaAttention, MlaAttention, ModelConfig, MoeFfn, SparseIndexer
from .ops import (
    AttentionModule,
    BatchedMatmul,
    Collective,
    ExpertAllToAll,
    Experts,
    Gemm,
    IndexScores,
    Op,
    PagedAttention,
    Streaming,
)
from .ops import MlaAttention as MlaAttentionOp

OMITTED = (
    "launch gaps between kernels, scheduler and other host time",
    "prefill: every figure is for decode GPUs only",
    "imbalance between expert-parallel ranks beyond the load named in the deployment",
    "overlap: communication is added, never hidden behind compute",
)
"""What the sum of kernels does not contain, shown beside every total."""


@dataclass(frozen=True)
class OpCall:
    """An op and how often one GPU runs it in one decode step.

    ``name`` is its place ("attention", "experts", ...). ``block`` groups ops that some stacks'
    tables time as one: ops with the same non-empty block can be replaced by one module row.
    """

    name: str
    op: Op
    calls_per_step: int
    block: str = ""


@dataclass
class Plan:
    """Collects the calls of a decode step; the same op under the same name is one entry.

    A pass of another kind (``prefill_plan``) overrides what it does differently.
    """

    model: ModelConfig
    deployment: Deployment
    calls: dict[tuple[str, Op, str], int] = field(default_factory=lambda: defaultdict(int))
    experts: ClassVar[type[Experts]] = Experts
    all_to_all: ClassVar[type[ExpertAllToAll]] = ExpertAllToAll

    @property
    def head_rows(self) -> int:
        """Rows that get logits."""
        return self.deployment.rows

    def add(self, name: str, op: Op, count: int, block: str = "") -> None:
        self.calls[name, op, block] += count

    def linear(self, name: str, n: int, k: int, count: int, block: str = "") -> None:
        precision = self.deployment.precision
        self.add(name, Gemm(self.deployment.rows, n, k, precision.linear, precision.linear_activation), count, block)

    def bf16(self, name: str, n: int, k: int, count: int, block: str = "", rows: int | None = None) -> None:
        self.add(name, Gemm(self.deployment.rows if rows is None else rows, n, k), count, block)

    def streaming(self, name: str, values_per_row: float, count: int, block: str = "", rows: int | None = None) -> None:
        """``values_per_row``: BF16 values read or written per row."""
        self.add(name, Streaming(2.0 * values_per_row * (self.deployment.rows if rows is None else rows)), count, block)

    def all_reduce(self, name: str, num_gpus: int, count: int) -> None:
        if num_gpus > 1:
            elements = self.deployment.rows * self.model.hidden_size
            self.add(name, Collective("all_reduce", elements, num_gpus), count)

    def attend(self, name: str, attention: GqaAttention, heads: int, kv_heads: int, count: int) -> None:
        """The attention of a GQA layer, between its projections."""
        deployment = self.deployment
        paged = PagedAttention(
            deployment.sequences,
            deployment.context,
            heads,
            kv_heads,
            attention.head_dim,
            attention.window,
            deployment.precision.kv,
            deployment.tokens_per_step,
        )
        self.add(name, paged, count)

    def attend_latents(self, attention: MlaAttention, heads: int, count: int, block: str) -> None:
        """The attention of an MLA layer, between its projections: absorbed."""
        deployment = self.deployment
        shape = (heads, deployment.rows)
        pre = BatchedMatmul("pre", *shape, attention.kv_lora_rank, attention.nope_dim)
        self.add("absorbed_q_bmm", pre, count, block)
        top_k = attention.indexer.top_k if attention.indexer else None
        decode = MlaAttentionOp(
            deployment.sequences,
            deployment.context,
            heads,
            attention.kv_lora_rank,
            attention.rope_dim,
            deployment.precision.kv,
            deployment.tokens_per_step,
            top_k,
        )
        self.add("attention", decode, count, block)
        post = BatchedMatmul("post", *shape, attention.v_dim, attention.kv_lora_rank)
        self.add("absorbed_v_bmm", post, count, block)

    def score_index(self, indexer: SparseIndexer, count: int, block: str) -> None:
        """The scores of a sparse layer's indexer."""
        deployment = self.deployment
        scores = IndexScores(
            deployment.sequences, deployment.context, indexer.num_heads, indexer.head_dim, deployment.tokens_per_step
        )
        self.add("index_scores", scores, count, block)


def decode_plan(
    model: ModelConfig, gpu: Gpu, deployment: Deployment, *, check_memory: bool = True
) -> tuple[OpCall, ...]:
    """The ops of one decode step on one GPU.

    Raises:
        ValueError: a split that does not divide, a context beyond the model's, a precision the GPU lacks.
        DoesNotFit: weights, KV cache and reserve exceed the GPU's memory (with ``check_memory``).
    """
    check_divides(model, deployment)
    check_precision(gpu, deployment.precision)
    if check_memory:
        check_fits(model, gpu, deployment)
    return planned(Plan(model, deployment))


def planned(plan: Plan) -> tuple[OpCall, ...]:
    """The calls of a pass of ``plan.deployment.rows`` rows through the whole model."""
    model, deployment = plan.model, plan.deployment
    hidden, head_rows = model.hidden_size, plan.head_rows
    plan.streaming("embedding", 2 * hidden, 1)
    for layer, count in model.layers:
        # residual in and out, x in, normalised (and quantized) x out
        plan.streaming("attention_norm", 4 * hidden, count)
        if isinstance(layer.attention, GqaAttention):
            _gqa(plan, layer.attention, count)
        else:
            _mla(plan, layer.attention, count)
        plan.all_reduce("attention_all_reduce", deployment.attention_tp, count)
        plan.streaming("ffn_norm", 4 * hidden, count)
        if isinstance(layer.ffn, DenseFfn):
            _gated_ffn(plan, "dense", layer.ffn.intermediate_size // deployment.attention_tp, count)
            plan.all_reduce("dense_all_reduce", deployment.attention_tp, count)
        else:
            _moe(plan, layer.ffn, count)
    plan.streaming("final_norm", 4 * hidden, 1)
    plan.bf16("lm_head", model.vocab_size // deployment.attention_tp, hidden, 1, rows=head_rows)
    if deployment.attention_tp > 1:
        logits = Collective("all_gather", head_rows * model.vocab_size, deployment.attention_tp)
        plan.add("logits_all_gather", logits, 1)
    plan.streaming("sampling", 2 * model.vocab_size, 1, rows=head_rows)
    return tuple(OpCall(name, op, count, block) for (name, op, block), count in plan.calls.items())


def _gqa(plan: Plan, attention: GqaAttention, count: int) -> None:
    deployment, hidden = plan.deployment, plan.model.hidden_size
    heads = attention.num_heads // deployment.attention_tp
    kv_heads = max(1, attention.num_kv_heads // deployment.attention_tp)
    width = (heads + 2 * kv_heads) * attention.head_dim
    plan.linear("qkv_proj", width, hidden, count)
    plan.streaming("rope_append", 2 * width, count)
    plan.attend("attention" if attention.window is None else "window_attention", attention, heads, kv_heads, count)
    plan.linear("o_proj", hidden, heads * attention.head_dim, count)


def _mla(plan: Plan, attention: MlaAttention, count: int) -> None:
    deployment, hidden, block = plan.deployment, plan.model.hidden_size, "mla"
    heads = attention.num_heads // deployment.attention_tp
    latent = attention.kv_lora_rank + attention.rope_dim
    query = heads * (attention.nope_dim + attention.rope_dim)
    if attention.q_lora_rank is None:
        plan.linear("q_kv_a_proj", query + latent, hidden, count, block)
    else:
        plan.linear("q_kv_a_proj", attention.q_lora_rank + latent, hidden, count, block)
        plan.streaming("q_kv_a_norm", 2 * (attention.q_lora_rank + attention.kv_lora_rank), count, block)
        plan.linear("q_b_proj", query, attention.q_lora_rank, count, block)
    # RoPE on the rope part of q and k, append of the latent to the cache
    plan.streaming("rope_append", 2 * (heads * attention.rope_dim + latent), count, block)
    if attention.indexer is not None:
        width = attention.indexer.num_heads * attention.indexer.head_dim
        plan.linear("index_q_proj", width, attention.q_lora_rank or hidden, count, block)
        plan.bf16("index_k_proj", attention.indexer.head_dim + attention.indexer.num_heads, hidden, count, block)
        plan.score_index(attention.indexer, count, block)
    plan.attend_latents(attention, heads, count, block)
    plan.linear("o_proj", hidden, heads * attention.v_dim, count, block)


def _gated_ffn(plan: Plan, name: str, inter: int, count: int) -> None:
    hidden = plan.model.hidden_size
    plan.linear(f"{name}_gate_up", 2 * inter, hidden, count)
    plan.streaming(f"{name}_swiglu", 3 * inter, count)
    plan.linear(f"{name}_down", hidden, inter, count)


def _moe(plan: Plan, moe: MoeFfn, count: int) -> None:
    deployment, hidden = plan.deployment, plan.model.hidden_size
    precision, rows, tp = deployment.precision, deployment.rows, deployment.attention_tp
    plan.bf16("router", moe.num_experts, hidden, count)
    plan.streaming("router_top_k", 2 * moe.num_experts, count, "moe")
    experts = plan.experts(
        rows * deployment.attention_dp,
        hidden,
        moe.intermediate_size,
        moe.top_k,
        moe.num_experts,
        deployment.expert_parallel,
        deployment.expert_tp,
        precision.experts,
        precision.experts_activation,
        deployment.load,
        deployment.dispatches,
    )
    if moe.shared_intermediate_size:
        _gated_ffn(plan, "shared", moe.shared_intermediate_size // tp, count)
    if deployment.attention_dp == 1:
        plan.add("experts", experts, count, "moe")
        plan.all_reduce("experts_all_reduce", deployment.gpus, count)
        return
    # a tensor-parallel attention group shares the sending of its tokens, then gathers the results
    sent = -(-rows // tp)
    if deployment.dispatches:
        route = (sent, hidden, moe.top_k, moe.num_experts, deployment.expert_parallel)
        plan.add("dispatch", plan.all_to_all("dispatch", *route, precision.dispatch), count)
        plan.add("experts", experts, count, "moe")
        plan.add("combine", plan.all_to_all("combine", *route, "bf16"), count)
    else:
        everywhere = rows * deployment.attention_dp * hidden
        plan.add("tokens_all_gather", Collective("all_gather", everywhere, deployment.gpus), count)
        plan.add("experts", experts, count, "moe")
        plan.add("experts_reduce_scatter", Collective("reduce_scatter", everywhere, deployment.gpus), count)
    if tp > 1:
        plan.add("group_all_gather", Collective("all_gather", rows * hidden, tp), count)


def merge_mla_block(calls: tuple[OpCall, ...], gemm_format: str) -> tuple[OpCall, ...]:
    """The plan with every MLA attention block as one ``AttentionModule`` call."""
    parts = [call for call in calls if call.block == "mla"]
    if not parts:
        return calls
    attention = next(call.op for call in parts if isinstance(call.op, MlaAttentionOp))
    module = AttentionModule(attention, tuple(call.op for call in parts), gemm_format)
    merged: list[OpCall] = []
    for call in calls:
        if call.block != "mla":
            merged.append(call)
        elif call is parts[0]:
            merged.append(OpCall("attention_module", module, call.calls_per_step))
    return tuple(merged)


def step_tokens(deployment: Deployment) -> tuple[float, float]:
    """(tokens kept per step and GPU, tokens kept per step and user)."""
    kept = deployment.kept_tokens_per_step
    return kept * deployment.batch_per_gpu, kept
