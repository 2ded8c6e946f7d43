"""The decode plan: which ops, with which shapes, how often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tokenfab.bench.decode_plan import OpCall, decode_plan, merge_mla_block, step_tokens
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.memory import DoesNotFit, weight_bytes
from tokenfab.bench.model_config import GqaAttention, ModelConfig, MoeFfn
from tokenfab.bench.model_config import MlaAttention as MlaShape
from tokenfab.bench.models import load_model, shipped_models
from tokenfab.bench.ops import (
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

FP8_BLOCK = ("fp8_block", "fp8_group")


def deploy(gpus: int, tp: int, ep: int, precision: str, batch: float = 1, context: int = 4096, **kw: Any) -> Deployment:
    return Deployment(gpus, tp, ep, get_precision(precision), batch, context, **kw)


def plan_of(model: str | ModelConfig, deployment: Deployment, gpu: str = "h200", **kw: Any) -> tuple[OpCall, ...]:
    config = load_model(model) if isinstance(model, str) else model
    return decode_plan(config, get_gpu(gpu), deployment, **kw)


def listed(calls: tuple[OpCall, ...]) -> list[tuple[str, Op, int]]:
    return [(call.name, call.op, call.calls_per_step) for call in calls]


def calls_named(calls: tuple[OpCall, ...], name: str) -> list[tuple[Op, int]]:
    return [(call.op, call.calls_per_step) for call in calls if call.name == name]


def names(calls: tuple[OpCall, ...]) -> dict[str, int]:
    """Calls per step by name; a name with two shapes counts both."""
    counted: Counter[str] = Counter()
    for call in calls:
        counted[call.name] += call.calls_per_step
    return dict(counted)


DSV3_EP8 = deploy(8, 1, 8, "fp8", 32, 4096)


# --- golden plans ----------------------------------------------------------------------------------------------


def test_deepseek_v3_on_eight_h200_data_parallel_attention() -> None:
    rows, hidden = 32, 7168

    def streaming(values_per_row: int) -> Streaming:
        return Streaming(2.0 * values_per_row * rows)  # BF16

    def linear(n: int, k: int) -> Gemm:
        return Gemm(rows, n, k, *FP8_BLOCK)

    route = (rows, hidden, 8, 256, 8)
    assert listed(plan_of("deepseek-v3", DSV3_EP8)) == [
        ("embedding", streaming(2 * hidden), 1),
        ("attention_norm", streaming(4 * hidden), 61),
        # q_lora 1536 + kv_lora 512 + rope 64
        ("q_kv_a_proj", linear(2112, hidden), 61),
        ("q_kv_a_norm", streaming(2 * (1536 + 512)), 61),
        # 128 heads x (nope 128 + rope 64)
        ("q_b_proj", linear(24576, 1536), 61),
        ("rope_append", streaming(2 * (128 * 64 + 576)), 61),
        ("absorbed_q_bmm", BatchedMatmul("pre", 128, rows, 512, 128), 61),
        ("attention", MlaAttention(32, 4096, 128, 512, 64, "fp8", 1, None), 61),
        ("absorbed_v_bmm", BatchedMatmul("post", 128, rows, 128, 512), 61),
        ("o_proj", linear(hidden, 128 * 128), 61),
        ("ffn_norm", streaming(4 * hidden), 61),
        # the first three layers
        ("dense_gate_up", linear(2 * 18432, hidden), 3),
        ("dense_swiglu", streaming(3 * 18432), 3),
        ("dense_down", linear(hidden, 18432), 3),
        # the other 58
        ("router", Gemm(rows, 256, hidden), 58),
        ("router_top_k", streaming(2 * 256), 58),
        ("shared_gate_up", linear(4096, hidden), 58),
        ("shared_swiglu", streaming(3 * 2048), 58),
        ("shared_down", linear(hidden, 2048), 58),
        ("dispatch", ExpertAllToAll("dispatch", *route, "fp8_group"), 58),
        # the rows of all eight ranks reach the experts
        ("experts", Experts(8 * rows, hidden, 2048, 8, 256, 8, 1, *FP8_BLOCK, "balanced", True), 58),
        ("combine", ExpertAllToAll("combine", *route, "bf16"), 58),
        ("final_norm", streaming(4 * hidden), 1),
        ("lm_head", Gemm(rows, 129280, hidden), 1),
        ("sampling", streaming(2 * 129280), 1),
    ]


def test_gpt_oss_120b_on_one_gpu() -> None:
    rows, hidden = 16, 2880

    def streaming(values_per_row: int) -> Streaming:
        return Streaming(2.0 * values_per_row * rows)

    plan = plan_of("gpt-oss-120b", deploy(1, 1, 1, "mxfp4", rows, 8192), "h100")
    attention = PagedAttention(16, 8192, 64, 8, 64, None, "bf16", 1)
    assert listed(plan) == [
        ("embedding", streaming(2 * hidden), 1),
        ("attention_norm", streaming(4 * hidden), 36),
        # (64 + 2 x 8) heads x 64
        ("qkv_proj", Gemm(rows, 5120, hidden), 36),
        ("rope_append", streaming(2 * 5120), 36),
        ("window_attention", replace(attention, window=128), 18),
        ("o_proj", Gemm(rows, hidden, 4096), 36),
        ("ffn_norm", streaming(4 * hidden), 36),
        ("router", Gemm(rows, 128, hidden), 36),
        ("router_top_k", streaming(2 * 128), 36),
        ("experts", Experts(rows, hidden, 2880, 4, 128, 1, 1, "mxfp4", "bf16", "balanced"), 36),
        ("attention", attention, 18),
        ("final_norm", streaming(4 * hidden), 1),
        ("lm_head", Gemm(rows, 201088, hidden), 1),
        ("sampling", streaming(2 * 201088), 1),
    ]


@pytest.mark.parametrize(
    ("expert_parallel", "expert_tp"),
    [(8, 1), (1, 8), (2, 4)],
)
def test_qwen3_30b_tensor_parallel_over_eight(expert_parallel: int, expert_tp: int) -> None:
    # 4 sequences per GPU: the group serves 32, and every rank computes all 32 rows
    rows, hidden = 32, 2048
    plan = plan_of("qwen3-30b-a3b", deploy(8, 8, expert_parallel, "fp8", 4, 2048), "h100")
    # 4 query heads; 4 KV heads over 8 GPUs: one each, replicated
    assert calls_named(plan, "qkv_proj") == [(Gemm(rows, (4 + 2) * 128, hidden, *FP8_BLOCK), 48)]
    assert calls_named(plan, "attention") == [(PagedAttention(32, 2048, 4, 1, 128, None, "fp8", 1), 48)]
    assert calls_named(plan, "o_proj") == [(Gemm(rows, hidden, 4 * 128, *FP8_BLOCK), 48)]
    experts = Experts(rows, hidden, 768, 8, 128, expert_parallel, expert_tp, *FP8_BLOCK, "balanced")
    assert calls_named(plan, "experts") == [(experts, 48)]
    # the router is replicated, the head split
    assert calls_named(plan, "router") == [(Gemm(rows, 128, hidden), 48)]
    assert calls_named(plan, "lm_head") == [(Gemm(rows, 151936 // 8, hidden), 1)]
    # tokens are replicated: all-reduces, nothing dispatched
    collectives = [(call.name, call.op, call.calls_per_step) for call in plan if isinstance(call.op, Collective)]
    assert collectives == [
        ("attention_all_reduce", Collective("all_reduce", rows * hidden, 8), 48),
        ("experts_all_reduce", Collective("all_reduce", rows * hidden, 8), 48),
        ("logits_all_gather", Collective("all_gather", rows * 151936, 8), 1),
    ]
    assert not any(isinstance(call.op, ExpertAllToAll) for call in plan)


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 4), (2, 2), (4, 1), (8, 1), (16, 1)])
def test_heads_of_a_tensor_parallel_rank(tp: int, kv_heads: int) -> None:
    (call,) = calls_named(plan_of("qwen3-30b-a3b", deploy(tp, tp, 1, "bf16")), "attention")
    op = call[0]
    assert isinstance(op, PagedAttention)
    assert (op.num_heads, op.num_kv_heads) == (32 // tp, kv_heads)


def test_deepseek_v3_tensor_parallel_over_eight() -> None:
    # 16 heads each, the latent and its projection whole on every rank
    rows, hidden = 8, 7168
    plan = plan_of("deepseek-v3", deploy(8, 8, 8, "fp8", 1))
    assert calls_named(plan, "q_kv_a_proj") == [(Gemm(rows, 2112, hidden, *FP8_BLOCK), 61)]
    assert calls_named(plan, "q_b_proj") == [(Gemm(rows, 16 * 192, 1536, *FP8_BLOCK), 61)]
    assert calls_named(plan, "absorbed_q_bmm") == [(BatchedMatmul("pre", 16, rows, 512, 128), 61)]
    assert calls_named(plan, "attention") == [(MlaAttention(rows, 4096, 16, 512, 64, "fp8"), 61)]
    assert calls_named(plan, "o_proj") == [(Gemm(rows, hidden, 16 * 128, *FP8_BLOCK), 61)]
    assert calls_named(plan, "dense_gate_up") == [(Gemm(rows, 2 * 18432 // 8, hidden, *FP8_BLOCK), 3)]
    assert calls_named(plan, "dense_down") == [(Gemm(rows, hidden, 18432 // 8, *FP8_BLOCK), 3)]
    assert calls_named(plan, "shared_gate_up") == [(Gemm(rows, 2 * 2048 // 8, hidden, *FP8_BLOCK), 58)]
    assert calls_named(plan, "shared_down") == [(Gemm(rows, hidden, 2048 // 8, *FP8_BLOCK), 58)]
    reduces = {call.name: call.calls_per_step for call in plan if isinstance(call.op, Collective)}
    assert reduces == {
        "attention_all_reduce": 61,
        "dense_all_reduce": 3,
        "experts_all_reduce": 58,
        "logits_all_gather": 1,
    }


@pytest.mark.parametrize(("batch", "sent"), [(16, 16), (16.5, 17)])
def test_a_tensor_parallel_group_shares_the_sending(batch: float, sent: int) -> None:
    # two ranks hold the same rows: each sends half of them, rounded up, and gathers the results
    rows, hidden = round(2 * batch), 7168
    plan = plan_of("deepseek-v3", deploy(8, 2, 8, "fp8", batch))
    route = (sent, hidden, 8, 256, 8)
    assert calls_named(plan, "dispatch") == [(ExpertAllToAll("dispatch", *route, "fp8_group"), 58)]
    assert calls_named(plan, "combine") == [(ExpertAllToAll("combine", *route, "bf16"), 58)]
    assert calls_named(plan, "group_all_gather") == [(Collective("all_gather", rows * hidden, 2), 58)]
    # four groups of different rows
    experts = Experts(4 * rows, hidden, 2048, 8, 256, 8, 1, *FP8_BLOCK, "balanced", True)
    assert calls_named(plan, "experts") == [(experts, 58)]
    assert calls_named(plan, "attention") == [(MlaAttention(rows, 4096, 64, 512, 64, "fp8"), 61)]
    assert calls_named(plan, "attention_all_reduce") == [(Collective("all_reduce", rows * hidden, 2), 61)]
    assert "experts_all_reduce" not in names(plan)


@pytest.mark.parametrize(
    ("tp", "ep", "exchange"),
    # experts split by tensor parallelism, or an exchange by all-gather
    [(1, 1, "all_to_all"), (1, 4, "all_to_all"), (2, 4, "all_to_all"), (1, 8, "all_gather"), (2, 8, "all_gather")],
)
def test_data_parallel_attention_that_gathers_all_tokens(tp: int, ep: int, exchange: str) -> None:
    hidden, rows = 4096, 16 * tp
    plan = plan_of("mixtral-8x7b", deploy(8, tp, ep, "bf16", 16, exchange=exchange))
    everywhere = 8 // tp * rows
    gather, scatter = (Collective(kind, everywhere * hidden, 8) for kind in ("all_gather", "reduce_scatter"))
    assert calls_named(plan, "tokens_all_gather") == [(gather, 32)]
    assert calls_named(plan, "experts_reduce_scatter") == [(scatter, 32)]
    # every rank has the tokens of all groups: nothing is dispatched
    experts = Experts(everywhere, hidden, 14336, 2, 8, ep, 8 // ep, "bf16", "bf16", "balanced", False)
    assert calls_named(plan, "experts") == [(experts, 32)]
    assert not any(isinstance(call.op, ExpertAllToAll) for call in plan)
    assert ("group_all_gather" in names(plan)) == (tp > 1)


def test_dispatch_in_place_of_the_gather() -> None:
    counts = names(plan_of("mixtral-8x7b", deploy(8, 1, 8, "bf16", 16)))
    assert (counts["dispatch"], counts["experts"], counts["combine"]) == (32, 32, 32)
    assert not {"tokens_all_gather", "experts_reduce_scatter", "group_all_gather"} & set(counts)


@pytest.mark.parametrize("name", shipped_models())
def test_one_gpu_talks_to_no_other(name: str) -> None:
    plan = plan_of(name, deploy(1, 1, 1, "bf16"), check_memory=False)
    assert all(call.op.link_s(get_gpu("h200")) == 0 for call in plan)
    assert not any(isinstance(call.op, Collective | ExpertAllToAll) for call in plan)


def test_kimi_k2() -> None:
    plan = plan_of("kimi-k2", deploy(16, 1, 16, "fp8", 8), "h200")
    assert calls_named(plan, "q_b_proj") == [(Gemm(8, 64 * 192, 1536, *FP8_BLOCK), 61)]
    assert calls_named(plan, "o_proj") == [(Gemm(8, 7168, 64 * 128, *FP8_BLOCK), 61)]
    assert calls_named(plan, "dense_gate_up") == [(Gemm(8, 2 * 18432, 7168, *FP8_BLOCK), 1)]
    experts = Experts(8 * 16, 7168, 2048, 8, 384, 16, 1, *FP8_BLOCK, "balanced", True)
    assert calls_named(plan, "experts") == [(experts, 60)]


def test_deepseek_v32_indexer() -> None:
    plan = plan_of("deepseek-v3.2", deploy(8, 1, 8, "fp8", 16, 32768))
    assert calls_named(plan, "index_q_proj") == [(Gemm(16, 64 * 128, 1536, *FP8_BLOCK), 61)]
    # the key and the heads' weights, BF16
    assert calls_named(plan, "index_k_proj") == [(Gemm(16, 128 + 64, 7168), 61)]
    assert calls_named(plan, "index_scores") == [(IndexScores(16, 32768, 64, 128, 1), 61)]
    assert calls_named(plan, "attention") == [(MlaAttention(16, 32768, 128, 512, 64, "fp8", 1, 2048), 61)]
    # and nothing else: without them it is DeepSeek-V3
    others = [call for call in listed(plan) if not call[0].startswith("index_") and call[0] != "attention"]
    v3 = plan_of("deepseek-v3", deploy(8, 1, 8, "fp8", 16, 32768))
    assert others == [call for call in listed(v3) if call[0] != "attention"]


def test_llama4_maverick() -> None:
    plan = plan_of("llama-4-maverick", deploy(8, 8, 8, "fp8", 1, 100_000))
    attention = PagedAttention(8, 100_000, 5, 1, 128, None, "fp8", 1)
    assert calls_named(plan, "window_attention") == [(replace(attention, window=8192), 36)]
    assert calls_named(plan, "attention") == [(attention, 12)]
    assert calls_named(plan, "dense_gate_up") == [(Gemm(8, 2 * 16384 // 8, 5120, *FP8_BLOCK), 24)]
    assert calls_named(plan, "shared_gate_up") == [(Gemm(8, 2 * 8192 // 8, 5120, *FP8_BLOCK), 24)]
    assert calls_named(plan, "experts") == [(Experts(8, 5120, 8192, 1, 128, 8, 1, *FP8_BLOCK, "balanced"), 24)]


def test_mla_without_a_query_latent() -> None:
    # the first GEMM then makes all of q beside the latent
    model = load_model("deepseek-v3")
    layers = tuple(
        (replace(layer, attention=replace(layer.attention, q_lora_rank=None)), count)
        for layer, count in model.layers
        if isinstance(layer.attention, MlaShape)
    )
    plan = plan_of(replace(model, layers=layers), DSV3_EP8)
    assert calls_named(plan, "q_kv_a_proj") == [(Gemm(32, 128 * 192 + 576, 7168, *FP8_BLOCK), 61)]
    assert not {"q_b_proj", "q_kv_a_norm"} & set(names(plan))


def test_the_load_reaches_the_experts() -> None:
    ((op, _),) = calls_named(plan_of("deepseek-v3", replace(DSV3_EP8, load="power_law_1.2")), "experts")
    assert isinstance(op, Experts)
    assert op.load == "power_law_1.2"


@pytest.mark.parametrize(
    ("precision", "linear", "experts", "kv", "payload"),
    [
        ("bf16", ("bf16", "bf16"), ("bf16", "bf16"), "bf16", "bf16"),
        ("fp8_tensor", ("fp8", "fp8"), ("fp8", "fp8"), "fp8", "fp8"),
        ("mxfp4_mxfp8", ("bf16", "bf16"), ("mxfp4", "mxfp8"), "fp8", "mxfp8"),
        ("nvfp4", ("nvfp4", "nvfp4"), ("nvfp4", "nvfp4"), "fp8", "nvfp4"),
    ],
)
def test_formats_by_role(
    precision: str, linear: tuple[str, str], experts: tuple[str, str], kv: str, payload: str
) -> None:
    plan = plan_of("deepseek-v3", deploy(8, 1, 8, precision), "gb300")
    formats: dict[str, set[tuple[str, ...]]] = {}
    for call in plan:
        op = call.op
        if isinstance(op, Gemm | Experts):
            formats.setdefault(call.name, set()).add((op.weight, op.activation))
        elif isinstance(op, MlaAttention):
            formats.setdefault(call.name, set()).add((op.kv_format,))
        elif isinstance(op, ExpertAllToAll):
            formats.setdefault(call.name, set()).add((op.payload,))
        elif isinstance(op, BatchedMatmul):
            formats.setdefault(call.name, set()).add((op.weight,))
    projections = ("q_kv_a_proj", "q_b_proj", "o_proj")
    ffns = ("dense_gate_up", "dense_down", "shared_gate_up", "shared_down")
    assert formats == {
        **{name: {linear} for name in (*projections, *ffns)},
        "experts": {experts},
        "attention": {(kv,)},
        "dispatch": {(payload,)},
        # BF16 in every precision
        "combine": {("bf16",)},
        "router": {("bf16", "bf16")},
        "lm_head": {("bf16", "bf16")},
        "absorbed_q_bmm": {("bf16",)},
        "absorbed_v_bmm": {("bf16",)},
    }


# --- conservation ----------------------------------------------------------------------------------------------

WEIGHT_OPS = (Gemm, BatchedMatmul, Experts)


def weights_read(model: ModelConfig, deployment: Deployment) -> float:
    """Weight bytes of one step: what is left of the matmuls' bytes when their rows go to zero.

    Where every expert is touched, bytes = weights + rows x constant, so 2 x bytes(B) - bytes(2B) = weights.
    """

    def matmul_bytes(batch: float) -> float:
        calls = decode_plan(model, get_gpu("gb300"), replace(deployment, batch_per_gpu=batch), check_memory=False)
        return sum(call.op.bytes * call.calls_per_step for call in calls if isinstance(call.op, WEIGHT_OPS))

    batch = deployment.batch_per_gpu
    return 2 * matmul_bytes(batch) - matmul_bytes(2 * batch)


@pytest.mark.parametrize(
    ("name", "split", "precision", "tolerance"),
    [
        # gpt-oss has biases in every matrix, 0.04 % of it
        *((name, (1, 1, 1), "bf16", 5e-4 if "gpt-oss" in name else 1e-5) for name in shipped_models()),
        ("gpt-oss-120b", (1, 1, 1), "mxfp4", 1.5e-3),
        ("gpt-oss-120b", (8, 8, 1), "mxfp4", 1.5e-3),
        ("deepseek-v3", (8, 1, 8), "fp8", 1e-4),
        ("deepseek-v3", (8, 1, 8), "nvfp4", 1e-4),
        ("kimi-k2", (16, 1, 8), "fp8", 1e-4),
        # KV heads split, and replicated over twice and four times as many GPUs
        ("qwen3-30b-a3b", (4, 4, 4), "fp8", 1e-4),
        ("qwen3-30b-a3b", (8, 8, 1), "bf16", 1e-4),
        ("qwen3-30b-a3b", (16, 16, 16), "fp8", 3e-4),  # norms weigh more beside a sixteenth
        ("qwen3-235b-a22b", (8, 2, 8), "fp8", 1e-4),
        ("mixtral-8x22b", (8, 2, 4), "bf16", 1e-4),
        ("llama-4-maverick", (8, 8, 8), "fp8", 1e-4),
        ("glm-4.5", (8, 4, 8), "nvfp4", 1e-4),
        ("minimax-m2.5", (8, 8, 2), "fp8", 1e-4),
        # the indexer's key projection is BF16; every rank of a TP group holds the whole q_a and kv_a projection
        ("deepseek-v3.2", (8, 1, 8), "fp8", 1e-4),
        ("deepseek-v3.2", (8, 8, 8), "fp8", 2e-4),
        ("deepseek-v3", (8, 8, 8), "fp8", 1e-4),
    ],
)
def test_a_full_step_reads_the_weights_it_holds(
    name: str, split: tuple[int, int, int], precision: str, tolerance: float
) -> None:
    # Held but not read by a matmul: the embedding, of which a step gathers a few rows, and norms and biases,
    # which are in the tolerance. 512 rows per group touch every expert of every model.
    model = load_model(name)
    deployment = deploy(*split, precision, 512 / split[1])
    embedding = 2 * model.vocab_size * model.hidden_size / split[1]
    held = weight_bytes(model, deployment) - embedding
    assert weights_read(model, deployment) == pytest.approx(held, rel=tolerance)


@pytest.mark.parametrize("name", shipped_models())
def test_flops_are_two_per_active_parameter(name: str) -> None:
    # the embedding multiplies nothing; norms and biases are in the tolerance
    model = load_model(name)
    calls = plan_of(name, deploy(1, 1, 1, "bf16", 64), check_memory=False)
    flops = sum(call.op.flops * call.calls_per_step for call in calls if isinstance(call.op, WEIGHT_OPS))
    multiplied = model.num_active_parameters - model.vocab_size * model.hidden_size
    assert flops == pytest.approx(2 * 64 * multiplied, rel=1e-3)


@pytest.mark.parametrize("name", ["qwen3-235b-a22b", "gpt-oss-120b", "mixtral-8x7b", "llama-4-maverick"])
def test_a_split_computes_what_one_gpu_would(name: str) -> None:
    # 4-way attention TP and experts over 4: routers are replicated (0.3 % at most), all else is split evenly
    one = plan_of(name, deploy(1, 1, 1, "bf16", 64), check_memory=False)
    four = plan_of(name, deploy(4, 4, 2, "bf16", 16), check_memory=False)

    def flops(calls: tuple[OpCall, ...]) -> float:
        return sum(call.op.flops * call.calls_per_step for call in calls if call.name != "router")

    assert 4 * flops(four) == pytest.approx(flops(one), rel=1e-12)


@pytest.mark.parametrize("name", shipped_models())
def test_every_layer_has_one_attention_and_one_ffn(name: str) -> None:
    model = load_model(name)
    counts = names(plan_of(name, deploy(1, 1, 1, "bf16"), check_memory=False))
    moe = sum(count for layer, count in model.layers if isinstance(layer.ffn, MoeFfn))
    assert counts.get("attention", 0) + counts.get("window_attention", 0) == model.num_layers
    assert counts["o_proj"] == counts["attention_norm"] == counts["ffn_norm"] == model.num_layers
    assert (counts["experts"], counts["router"]) == (moe, moe)
    assert counts.get("dense_down", 0) == model.num_layers - moe
    assert counts["lm_head"] == counts["embedding"] == counts["sampling"] == 1


# --- tokens per step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "precision"),
    [("deepseek-v3", (8, 1, 8), "fp8"), ("deepseek-v3.2", (8, 1, 8), "fp8"), ("gpt-oss-120b", (2, 2, 2), "mxfp4")],
)
def test_drafts_multiply_rows_but_not_the_cache(name: str, split: tuple[int, int, int], precision: str) -> None:
    one = deploy(*split, precision, 16, 8192)
    four = replace(one, tokens_per_step=4, kept_tokens_per_step=2.5)
    plain, verify = plan_of(name, one), plan_of(name, four)
    assert [(call.name, call.calls_per_step) for call in plain] == [(call.name, call.calls_per_step) for call in verify]
    for before, after in zip(plain, verify, strict=True):
        op = before.op
        # four rows per sequence in every op but the attention, which reads the same cache for four queries
        expected: Op
        if isinstance(op, PagedAttention | MlaAttention | IndexScores):
            expected = replace(op, q_len=4)
        elif isinstance(op, Gemm | BatchedMatmul):
            expected = replace(op, m=4 * op.m)
        elif isinstance(op, Experts | ExpertAllToAll):
            expected = replace(op, num_tokens=4 * op.num_tokens)
        elif isinstance(op, Streaming):
            expected = Streaming(4 * op.num_bytes)
        else:
            assert isinstance(op, Collective)
            expected = replace(op, num_elements=4 * op.num_elements)
        assert after.op == expected


@pytest.mark.parametrize(
    ("tp", "batch", "tokens", "kept", "per_gpu"),
    [(1, 32, 1, 1.0, 32), (1, 32, 4, 2.5, 80), (8, 0.5, 4, 2.0, 1.0), (2, 1.5, 1, 1.0, 1.5)],
)
def test_tokens_of_a_step(tp: int, batch: float, tokens: int, kept: float, per_gpu: float) -> None:
    deployment = deploy(8, tp, 8, "fp8", batch, tokens_per_step=tokens, kept_tokens_per_step=kept)
    assert step_tokens(deployment) == (per_gpu, kept)


# --- the MLA block ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2"])
def test_merging_replaces_the_block_by_the_sum_of_its_parts(name: str) -> None:
    gpu = get_gpu("h200")
    plan = plan_of(name, DSV3_EP8)
    merged = merge_mla_block(plan, "fp8_block")
    block = [
        "q_kv_a_proj", "q_kv_a_norm", "q_b_proj", "rope_append",
        *(["index_q_proj", "index_k_proj", "index_scores"] if name == "deepseek-v3.2" else []),
        "absorbed_q_bmm", "attention", "absorbed_v_bmm", "o_proj",
    ]  # fmt: skip
    assert [call.name for call in plan if call.block == "mla"] == block
    # everything else is there, in its place
    assert [call for call in merged if call.name != "attention_module"] == [c for c in plan if c.name not in block]
    assert [call.name for call in merged][:3] == ["embedding", "attention_norm", "attention_module"]
    (module,) = [call for call in merged if call.name == "attention_module"]
    assert module.calls_per_step == 61
    assert isinstance(module.op, AttentionModule)
    assert module.op.parts == tuple(call.op for call in plan if call.name in block)
    assert module.op.gemm_format == "fp8_block"
    assert (module.op.attention, 61) == calls_named(plan, "attention")[0]
    for quantity in (lambda op: op.bytes, lambda op: op.flops, lambda op: op.floor_s(gpu)):
        before, after = (sum(quantity(c.op) * c.calls_per_step for c in calls) for calls in (plan, merged))
        assert after == pytest.approx(before, rel=1e-12)


def test_a_plan_without_mla_stays_as_it_is() -> None:
    plan = plan_of("gpt-oss-120b", deploy(1, 1, 1, "mxfp4", 4))
    assert merge_mla_block(plan, "bf16") == plan
    assert not any(call.block == "mla" for call in plan)


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_deployment_that_does_not_fit_is_refused_unless_told() -> None:
    with pytest.raises(DoesNotFit, match=r"16 x h100$"):
        plan_of("deepseek-v3", DSV3_EP8, "h100")
    assert plan_of("deepseek-v3", DSV3_EP8, "h100", check_memory=False) == plan_of("deepseek-v3", DSV3_EP8, "h200")


@pytest.mark.parametrize("check_memory", [True, False])
@pytest.mark.parametrize(
    ("deployment", "message"),
    [
        (deploy(8, 1, 8, "nvfp4"), r"^precision: nvfp4 .* h200 has no FP4 matrix units$"),
        (
            deploy(8, 1, 8, "fp8", context=163841),
            r"^context: expected at most deepseek-v3's 163840 tokens; got 163841$",
        ),
        (deploy(12, 1, 12, "fp8"), r"^expert_parallel: expected a divisor of deepseek-v3's 256 experts; got 12$"),
    ],
)
def test_a_plan_the_model_or_gpu_cannot_run_is_refused(
    deployment: Deployment, message: str, check_memory: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of("deepseek-v3", deployment, check_memory=check_memory)


def test_window_and_full_layers_share_all_but_the_attention() -> None:
    # gpt-oss's two kinds of layer differ in their window alone: one entry each for the other ops
    model = load_model("gpt-oss-20b")
    windows = [layer.attention.window for layer, _ in model.layers if isinstance(layer.attention, GqaAttention)]
    assert windows == [128, None]
    counts = Counter(call.name for call in plan_of(model, deploy(1, 1, 1, "mxfp4")))
    assert set(counts.values()) == {1}
