"""The time of a prefill pass: published rows, what stands in where there is none, and provenance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import Gemm, Op
from tokenfab.bench.prefill_ops import (
    CachedPart,
    ContextAllToAll,
    ContextAttention,
    ContextExperts,
    ContextModule,
    MlaContext,
    SparseModule,
)
from tokenfab.bench.prefill_tables import ALL_EXPERTS, PREFILL_TABLES, scale_attention, scale_context_module
from tokenfab.bench.prefill_time import PrefillTime, prefill_time
from tokenfab.bench.published import INTERPOLATED, MEASURED, MODELLED, PublishedData
from tokenfab.bench.published_tables import queries
from tokenfab.bench.recorded import RecordedData, RecordedStack

H100, H200, B200 = get_gpu("h100"), get_gpu("h200"), get_gpu("b200")
FP8 = ("fp8_block", "fp8_group")


def run(
    data: PublishedData, model: str, gpu: str, stack: str, deployment: Deployment, new: int, cached: int = 0,
    sequences: int = 1,
) -> PrefillTime:  # fmt: skip
    place = get_gpu(gpu)
    return prefill_time(
        data, load_model(model), place, data.stack(place, stack), deployment, new_tokens=new, cached_tokens=cached,
        sequences=sequences,
    )  # fmt: skip


def deploy(gpus: int, tp: int, ep: int, precision: str) -> Deployment:
    return Deployment(gpus, tp, ep, get_precision(precision), 1, 4096)


EP8, EP32 = deploy(8, 1, 8, "fp8"), deploy(32, 1, 32, "fp8")


def named(found: PrefillTime, name: str) -> Any:
    (op,) = [op for op in found.ops if op.call.name == name]
    return op


# Microseconds in aiconfigurator-core 0.12.0, read with pyarrow.
ROWS: list[tuple[str, str, Op, float]] = [
    ("h100", "vllm", ContextAttention(1, 4096, 32, 4, 128), 265.963),
    ("h100", "sglang", ContextAttention(1, 4096, 32, 4, 128), 276.690),
    ("h100", "trtllm", ContextAttention(1, 16384, 32, 4, 128), 4091.685),
    ("h100", "trtllm", MlaContext(1, 4096, 128, 128, 64, 128), 1262.907),
    # of the whole group's tokens; balanced is "uniform" there
    ("h100", "sglang", ContextExperts(131072, 7168, 2048, 8, 256, 32, 1, *FP8, dispatched=True), 3646.926),
    ("h100", "sglang", ContextExperts(65536, 7168, 2048, 8, 256, 8, 1, *FP8, "power_law_1.2", True), 11027.457),
    # per rank; transmission + notification, four nodes
    ("h100", "sglang", ContextAllToAll("dispatch", 4096, 7168, 8, 256, 32, "fp8_group"), 1801.0 + 59.47),
    ("h100", "sglang", ContextAllToAll("combine", 4096, 7168, 8, 256, 32, "bf16"), 3528.0 + 105.73),
    ("h200", "vllm", ContextAllToAll("combine", 4096, 7168, 8, 256, 8, "bf16"), 1452.038),
    ("h200", "trtllm", ContextAllToAll("combine", 4096, 7168, 8, 256, 8, "bf16"), 847.249),
]


@pytest.mark.parametrize(("gpu", "stack", "op", "us"), ROWS)
def test_known_rows(published: PublishedData, gpu: str, stack: str, op: Op, us: float) -> None:
    place = get_gpu(gpu)
    timing = published.time(op, place, published.stack(place, stack))
    assert timing.provenance == MEASURED
    assert timing.time_s * 1e6 == pytest.approx(us, rel=1e-5)


def test_total_is_the_sum_and_every_microsecond_has_a_provenance(published: PublishedData) -> None:
    found = run(published, "deepseek-v3", "h100", "sglang", EP32, 4096)
    stack = published.stack(H100, "sglang")
    total = sum(op.call.calls_per_step * published.time(op.call.op, H100, stack).time_s for op in found.ops)
    assert found.time_s == pytest.approx(total, rel=1e-12)
    assert sum(found.coverage().values()) == pytest.approx(1)
    assert found.coverage()["measured"] > 0.9
    assert found.floor_s < found.time_s
    assert found.new_tokens_per_s_per_gpu == pytest.approx(4096 / found.time_s)
    assert found.cached_s == 0
    assert (found.new_tokens, found.cached_tokens, found.sequences, found.deployment) == (4096, 0, 1, EP32)
    assert "router_top_k" not in [op.call.name for op in found.ops]  # the MoE row contains it


def test_tokens_per_gpu_of_a_tensor_parallel_group(published: PublishedData) -> None:
    found = run(published, "qwen3-235b-a22b", "h200", "vllm", deploy(8, 4, 8, "fp8"), 2048, 0, 3)
    assert found.new_tokens_per_s_per_gpu == pytest.approx(3 * 2048 / 4 / found.time_s)  # two groups on eight GPUs


def test_attention_blocks_are_modules_where_a_table_has_them(published: PublishedData) -> None:
    for gpu, stack, table in (
        ("h200", "vllm", "mla_context_module"), ("h200", "sglang", "wideep_context_mla"),
        ("b200", "trtllm", "mla_context_module"),
    ):  # fmt: skip
        found = named(run(published, "deepseek-v3", gpu, stack, EP8, 4096), "attention_module")
        assert (found.provenance, found.call.calls_per_step) == (MEASURED, 61)
        assert table in found.source
    sparse = named(run(published, "deepseek-v3.2", "h200", "vllm", EP8, 4096), "attention_module")
    assert "dsa_context_module" in sparse.source
    # SGLang's rows of the whole block have FP8 caches
    deployment = replace(EP8, precision=replace(get_precision("fp8"), kv="bf16"))
    stored = named(run(published, "deepseek-v3", "h200", "sglang", deployment, 4096), "attention_module")
    assert stored.provenance == MODELLED
    assert "the row appended to an FP8 cache" in stored.source
    assert stored.time_s == named(run(published, "deepseek-v3", "h200", "sglang", EP8, 4096), "attention_module").time_s
    # with BF16 projections it has only the attention, which on Hopper it ran absorbed
    deployment = deploy(32, 1, 32, "bf16")
    parts = run(published, "deepseek-v3", "h200", "sglang", deployment, 4096)
    assert named(parts, "kv_b_proj").provenance in (MEASURED, INTERPOLATED)
    assert named(parts, "attention").provenance == MODELLED
    assert "upper estimate: the row ran absorbed attention" in named(parts, "attention").source
    blackwell = run(published, "deepseek-v3", "b200", "sglang", deployment, 4096)
    assert named(blackwell, "attention").provenance == MEASURED


def test_attention_over_cached_tokens_is_the_roofline_at_a_measured_efficiency(published: PublishedData) -> None:
    found = run(published, "qwen3-30b-a3b", "h100", "vllm", deploy(1, 1, 1, "bf16"), 1024, 3072)
    stack = published.stack(H100, "vllm")
    cached = named(found, "cached_attention")
    whole = ContextAttention(1, 4096, 32, 4, 128)
    efficiency = whole.floor_s(H100) / published.time(whole, H100, stack).time_s
    # compute bound: 4 x 32 heads x 128 x 1024 x 3072 flops at 989 TFLOP/s
    assert cached.floor_s == pytest.approx(48 * 4 * 32 * 128 * 1024 * 3072 / 989e12)
    assert cached.time_s == pytest.approx(cached.floor_s / efficiency)
    assert cached.provenance == MODELLED
    assert "efficiency of 4096 new tokens in vllm 0.24.0 context_attention" in cached.source
    assert found.cached_s == cached.time_s
    plain = run(published, "qwen3-30b-a3b", "h100", "vllm", deploy(1, 1, 1, "bf16"), 1024)
    assert found.time_s == pytest.approx(plain.time_s + cached.time_s)


def test_cached_tokens_are_never_free(published: PublishedData) -> None:
    for model, gpu, stack, precision in (
        ("deepseek-v3", "h200", "vllm", "fp8"), ("deepseek-v3", "h200", "sglang", "fp8"),
        ("deepseek-v3", "h200", "trtllm", "fp8"), ("deepseek-v3.2", "h200", "sglang", "fp8"),
        ("qwen3-30b-a3b", "h200", "vllm", "bf16"), ("gpt-oss-120b", "h200", "vllm", "mxfp4"),
    ):  # fmt: skip
        times = [
            run(published, model, gpu, stack, deploy(8, 1, 8, precision), 512, cached).time_s
            for cached in (0, 64, 512, 4096, 32768)
        ]
        assert times == sorted(times)
        assert len(set(times)) == 5


def test_mla_pays_for_cached_latents_twice(published: PublishedData) -> None:
    found = run(published, "deepseek-v3", "h200", "trtllm", EP8, 1024, 4096)
    up = named(found, "cached_kv_b_proj")
    assert up.call.op == Gemm(4096, 32768, 512, *FP8)
    assert up.provenance in (MEASURED, INTERPOLATED)
    assert found.cached_s == pytest.approx(up.time_s + named(found, "cached_attention").time_s)


def test_sparse_blocks_with_a_cache_are_rows_less_rows(published: PublishedData) -> None:
    """SGLang timed DSA with tokens cached: milliseconds read with pyarrow, 1 prompt, 128 heads, FP8."""
    for new, cached, with_ms, without_ms in ((4096, 8192, 8.05, 7.17), (2048, 1024, 3.79, 1.04)):
        found = run(published, "deepseek-v3.2", "h200", "sglang", EP8, new, cached)
        over = named(found, "cached_attention")
        assert named(found, "attention_module").time_s / 61 == pytest.approx(without_ms * 1e-3, rel=0.005)
        assert over.time_s / 61 == pytest.approx((with_ms - without_ms) * 1e-3, rel=0.02)
        assert over.provenance == MEASURED
        assert over.source.endswith("less the row without cached tokens")
        assert found.cached_s == over.time_s
        assert "cached_index_scores" not in [op.call.name for op in found.ops]  # in the same row
    between = named(run(published, "deepseek-v3.2", "h200", "sglang", EP8, 4096, 6000), "cached_attention")
    assert between.provenance == INTERPOLATED
    # vLLM's rows stop at 128 cached tokens
    other = run(published, "deepseek-v3.2", "h200", "vllm", EP8, 4096, 8192)
    assert named(other, "cached_attention").provenance == named(other, "cached_index_scores").provenance == MODELLED
    # a cached part of a plan keeps its floor, however it is timed
    floors = [op for op in other.ops if op.call.name.startswith("cached_")]
    ours = named(run(published, "deepseek-v3.2", "h200", "sglang", EP8, 4096, 8192), "cached_attention")
    assert ours.floor_s == pytest.approx(sum(op.floor_s for op in floors))


def test_dispatched_experts_of_vllm_are_a_model_of_as_many_pairs(published: PublishedData) -> None:
    stack = published.stack(H100, "vllm")
    op = ContextExperts(32768, 7168, 2048, 8, 256, 8, 1, *FP8, dispatched=True)
    timing = published.time(op, H100, stack)
    alone = published.time(replace(op, num_tokens=4096, ep=1, dispatched=False), H100, stack)
    assert (timing.provenance, alone.provenance) == (MODELLED, MEASURED)
    assert timing.time_s == alone.time_s
    assert "as many token-expert pairs on one GPU with all experts" in timing.source


def test_beyond_the_last_row_is_a_model(published: PublishedData) -> None:
    stack = published.stack(H100, "vllm")
    last = published.time(ContextAttention(1, 16384, 32, 4, 128), H100, stack)
    beyond = published.time(ContextAttention(1, 32768, 32, 4, 128), H100, stack)
    assert (last.provenance, beyond.provenance) == (MEASURED, MODELLED)
    assert beyond.time_s == pytest.approx(4 * last.time_s, rel=1e-3)


def test_several_prompts_share_a_pass(published: PublishedData) -> None:
    """Two prompts in one pass take less than two passes, and no less than one."""
    one = run(published, "deepseek-v3", "h200", "sglang", EP8, 256)
    two = run(published, "deepseek-v3", "h200", "sglang", EP8, 256, 0, 2)
    assert one.time_s < two.time_s < 2 * one.time_s
    assert named(two, "lm_head").call.op.m == 2


def test_a_module_scales_with_prompts_and_tokens(published: PublishedData) -> None:
    module = named(run(published, "deepseek-v3", "h200", "vllm", EP8, 1024), "attention_module").call.op
    again = named(run(published, "deepseek-v3", "h200", "vllm", EP8, 512, 0, 3), "attention_module").call.op
    assert isinstance(module, ContextModule)
    assert scale_context_module(module, 3, 512) == again
    with pytest.raises(ValueError, match="op: expected attention of a prefill pass; got gemm"):
        scale_attention(Gemm(1, 1, 1), 1, 1)


def test_no_row_is_the_stated_roofline(published: PublishedData) -> None:
    """FP4 caches are in no table."""
    op = ContextAttention(1, 4096, 32, 4, 128, None, "nvfp4")
    timing = published.time(op, B200, published.stack(B200, "vllm"))
    assert timing.time_s == pytest.approx(op.floor_s(B200) / 0.8 + 3e-6)
    assert timing.source == "roofline / 0.8 + 3 us (no published context_attention row)"


def test_of_fp8_and_bf16_products_over_an_fp8_cache_the_faster_counts(published: PublishedData) -> None:
    """TensorRT-LLM ran both: 0.861 and 0.800 ms, read with pyarrow."""
    op = ContextAttention(1, 8192, 32, 4, 128, None, "fp8")
    timing = published.time(op, H200, published.stack(H200, "trtllm"))
    assert (timing.provenance, round(timing.time_s * 1e3, 3)) == (MEASURED, 0.800)


PROBES: list[Op] = [
    ContextAttention(2, 3000, 32, 4, 128), MlaContext(2, 3000, 128, 128, 64, 128),
    ContextExperts(3000, 7168, 2048, 8, 256, 8, 1, *FP8, dispatched=True),
    ContextAllToAll("dispatch", 3000, 7168, 8, 256, 32, "fp8_group"),
]  # fmt: skip


def test_a_query_gives_its_own_op_back(published: PublishedData) -> None:
    """Interpolation goes by the floors of the op at other places; at its own place that is the op's floor."""
    modules = [
        op.call.op
        for model in ("deepseek-v3", "deepseek-v3.2")
        for op in run(published, model, "h200", "sglang", EP8, 3000, 6000, 2).ops
    ]
    sparse = [SparseModule.of(op) for op in modules if isinstance(op, CachedPart)]
    blocks = [op for op in modules if isinstance(op, ContextModule)]
    assert (len(sparse), len(blocks)) == (1, 2)
    for op in (*PROBES, *blocks, *sparse):
        for stack in ("vllm", "sglang", "trtllm"):
            for query in queries(op, H200, stack):
                if query.caveat == ALL_EXPERTS:  # another op by intent
                    continue
                assert query.at(query.near, query.axes).floor_s(H200) == pytest.approx(op.floor_s(H200)), op.kind
    (whole,) = sparse
    (query,) = queries(whole, H200, "sglang")
    without = query.at(query.near, (2, 3000, 1))  # no token cached
    assert without.floor_s(H200) == pytest.approx(whole.module.floor_s(H200))


def test_the_stack_of_our_kernels_only_decodes(published: PublishedData) -> None:
    model, deployment = load_model("qwen3-30b-a3b"), deploy(1, 1, 1, "bf16")
    own = RecordedStack("tokenfab", "2026-11-24", RecordedData(), None)
    with pytest.raises(ValueError, match=r"stack: expected a published one, or tokenfab\+STACK; tokenfab only decodes"):
        prefill_time(published, model, H100, own, deployment, new_tokens=128)
    vllm = published.stack(H100, "vllm")
    found = prefill_time(published, model, H100, replace(own, rest=vllm), deployment, new_tokens=128)
    assert found.stack == vllm
    assert found == prefill_time(published, model, H100, vllm, deployment, new_tokens=128)


def test_tables_are_read_in_their_units(tree: Any) -> None:
    """Milliseconds of attention; microseconds of DeepEP, transmission and notification added."""
    root, write = tree
    write(
        "h100_sxm/attention/vllm/2.0/context_attention_perf",
        {
            "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "head_dim": 128, "window_size": 0, "num_heads": 32,
            "num_key_value_heads": 4, "batch_size": 1, "isl": [512, 1024], "latency": [0.5, 0.75],
        },
    )  # fmt: skip
    columns = {"hidden_size": 7168, "num_topk": 8, "num_experts": 256, "node_num": 4, "num_token": [128, 256]}
    for phase, cost in (("dispatch", 10.0), ("combine", 20.0)):
        columns |= {
            f"{phase}_sms": 20, f"{phase}_transmit_us": [cost, 2 * cost], f"{phase}_notify_us": [0.0, 5.0],
        }  # fmt: skip
    write("h100_sxm/comm/sglang/2.0/wideep_deepep_normal_perf", columns)
    data = PublishedData(root)
    found = data.time(ContextAttention(1, 1024, 32, 4, 128), H100, data.stack(H100, "vllm"))
    assert found.time_s == pytest.approx(0.75e-3)
    sglang = data.stack(H100, "sglang")
    for phase, us in (("dispatch", 25), ("combine", 45)):
        timing = data.time(ContextAllToAll(phase, 256, 7168, 8, 256, 32, "bf16"), H100, sglang)
        assert (timing.provenance, timing.time_s) == (MEASURED, pytest.approx(us * 1e-6))


def test_every_prefill_table_is_there(published: PublishedData) -> None:
    stacks = [published.stack(H200, name) for name in ("vllm", "sglang", "trtllm")]
    for table in PREFILL_TABLES:
        assert any(published.has_table(H200, stack, table) for stack in stacks), table.name
