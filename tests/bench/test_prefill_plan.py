"""The prefill plan: which ops, with which shapes, how often; and what cached tokens add."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.bench.decode_plan import OpCall, decode_plan
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.memory import DoesNotFit
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import BatchedMatmul, Collective, Experts, Gemm, Op, Streaming
from tokenfab.bench.prefill_ops import (
    ContextAllToAll,
    ContextAttention,
    ContextExperts,
    ContextModule,
    IndexContext,
    MlaContext,
    SparseContext,
    causal_pairs,
)
from tokenfab.bench.prefill_plan import merge_context_block, prefill_plan

FP8_BLOCK = ("fp8_block", "fp8_group")
H100 = get_gpu("h100")


def deploy(gpus: int, tp: int, ep: int, precision: str, **kw: Any) -> Deployment:
    # batch and context are decoding's: a pass does not use them
    return Deployment(gpus, tp, ep, get_precision(precision), kw.pop("batch", 7.0), kw.pop("context", 123), **kw)


def plan_of(model: str, deployment: Deployment, new: int, cached: int = 0, sequences: int = 1) -> tuple[OpCall, ...]:
    return prefill_plan(
        load_model(model), get_gpu("h200"), deployment, new_tokens=new, cached_tokens=cached, sequences=sequences,
        check_memory=False,
    )  # fmt: skip


def listed(calls: tuple[OpCall, ...]) -> list[tuple[str, Op, int]]:
    return [(call.name, call.op, call.calls_per_step) for call in calls]


def total(calls: tuple[OpCall, ...], *names: str) -> float:
    """Flops of all calls with these names."""
    return sum(call.op.flops * call.calls_per_step for call in calls if call.name in names)


# --- golden plans ----------------------------------------------------------------------------------------------


def test_deepseek_v3_on_eight_gpus() -> None:
    rows, hidden = 3 * 1000, 7168

    def streaming(values_per_row: int, rows: int = rows) -> Streaming:
        return Streaming(2.0 * values_per_row * rows)

    def linear(n: int, k: int, rows: int = rows) -> Gemm:
        return Gemm(rows, n, k, *FP8_BLOCK)

    route = (rows, hidden, 8, 256, 8)
    attention = MlaContext(3, 1000, 128, 128, 64, 128, "fp8")
    assert listed(plan_of("deepseek-v3", deploy(8, 1, 8, "fp8"), 1000, 500, 3)) == [
        ("embedding", streaming(2 * hidden), 1),
        ("attention_norm", streaming(4 * hidden), 61),
        ("q_kv_a_proj", linear(2112, hidden), 61),
        ("q_kv_a_norm", streaming(2 * (1536 + 512)), 61),
        ("q_b_proj", linear(24576, 1536), 61),
        ("rope_append", streaming(2 * (128 * 64 + 576)), 61),
        # latents up to 128 heads x (nope 128 + v 128); those of the 3 x 500 cached tokens too
        ("kv_b_proj", linear(32768, 512), 61),
        ("attention", attention, 61),
        ("cached_kv_b_proj", linear(32768, 512, 3 * 500), 61),
        ("cached_attention", replace(attention, cached_tokens=500), 61),
        ("o_proj", linear(hidden, 128 * 128), 61),
        ("ffn_norm", streaming(4 * hidden), 61),
        ("dense_gate_up", linear(2 * 18432, hidden), 3),
        ("dense_swiglu", streaming(3 * 18432), 3),
        ("dense_down", linear(hidden, 18432), 3),
        ("router", Gemm(rows, 256, hidden), 58),
        ("router_top_k", streaming(2 * 256), 58),
        ("shared_gate_up", linear(4096, hidden), 58),
        ("shared_swiglu", streaming(3 * 2048), 58),
        ("shared_down", linear(hidden, 2048), 58),
        ("dispatch", ContextAllToAll("dispatch", *route, "fp8_group"), 58),
        ("experts", ContextExperts(8 * rows, hidden, 2048, 8, 256, 8, 1, *FP8_BLOCK, "balanced", True), 58),
        ("combine", ContextAllToAll("combine", *route, "bf16"), 58),
        ("final_norm", streaming(4 * hidden), 1),
        # logits of the last token of each prompt
        ("lm_head", Gemm(3, 129280, hidden), 1),
        ("sampling", streaming(2 * 129280, 3), 1),
    ]


def test_gpt_oss_windows_and_tensor_parallel() -> None:
    plan = plan_of("gpt-oss-120b", deploy(2, 2, 1, "mxfp4"), 300, 1000, 4)
    calls = {call.name: (call.op, call.calls_per_step) for call in plan}
    attention = ContextAttention(4, 300, 32, 4, 64, None, "bf16")
    assert calls["attention"] == (attention, 18)
    assert calls["cached_attention"] == (replace(attention, cached_tokens=1000), 18)
    assert calls["window_attention"] == (replace(attention, window=128), 18)
    assert calls["cached_window_attention"] == (replace(attention, window=128, cached_tokens=1000), 18)
    assert calls["attention_all_reduce"] == (Collective("all_reduce", 4 * 300 * 2880, 2), 36)
    assert calls["lm_head"] == (Gemm(4, 201088 // 2, 2880), 1)
    assert calls["logits_all_gather"] == (Collective("all_gather", 4 * 201088, 2), 1)
    assert isinstance(calls["experts"][0], ContextExperts)


def test_sparse_layers_score_every_pair_and_attend_to_the_chosen() -> None:
    plan = plan_of("deepseek-v3.2", deploy(8, 1, 8, "fp8"), 3000, 1000)
    calls = {call.name: call.op for call in plan}
    sparse = SparseContext(1, 3000, 128, 512, 64, 2048, "fp8")
    assert calls["attention"] == sparse
    assert calls["cached_attention"] == replace(sparse, cached_tokens=1000)
    assert calls["index_scores"] == IndexContext(1, 3000, 64, 128)
    assert calls["cached_index_scores"] == IndexContext(1, 3000, 64, 128, 1000)
    assert calls["absorbed_q_bmm"] == BatchedMatmul("pre", 128, 3000, 512, 128)
    assert "kv_b_proj" not in calls
    # 3000 x 1000 more scores; attention gains only where fewer than 2048 new tokens were there to choose
    assert calls["cached_index_scores"].flops == 2 * 64 * 128 * 3000 * 1000
    more = sum(min(1000 + i, 2048) - min(i, 2048) for i in range(1, 3001))
    assert calls["cached_attention"].flops == 2 * 128 * (576 + 512) * more


def test_the_same_layers_as_a_decode_step() -> None:
    """With one new token behind none and as many sequences, only attention and the heads' kinds differ."""
    deployment = deploy(4, 2, 4, "fp8", batch=8.0, context=1)
    prefill = plan_of("qwen3-30b-a3b", deployment, 1, 0, 16)
    decode = decode_plan(load_model("qwen3-30b-a3b"), get_gpu("h200"), deployment)
    for ours, theirs in zip(prefill, decode, strict=True):
        assert (ours.name, ours.calls_per_step, ours.block) == (theirs.name, theirs.calls_per_step, theirs.block)
        assert ours.op.flops == theirs.op.flops
        if not isinstance(ours.op, ContextAllToAll):
            assert ours.op.bytes == theirs.op.bytes


# --- counts by hand --------------------------------------------------------------------------------------------


def test_bytes_and_flops_of_a_gqa_layer() -> None:
    # 2 prompts of 3 new tokens, 4 query heads on 2 KV heads of 8: pairs 1 + 2 + 3
    op = ContextAttention(2, 3, 4, 2, 8, None, "fp8")
    assert op.flops == 2 * (1 + 2 + 3) * 4 * 8 * 2 * 2  # prompts x pairs x heads x d x (QK and PV) x multiply-add
    assert op.bytes == 2 * 3 * (2 * 2 * 8 * 1 + 2 * 4 * 8 * 2)  # K and V in FP8, q and out in BF16
    cached = replace(op, cached_tokens=5)
    assert cached.flops == 2 * (3 * 5) * 4 * 8 * 2 * 2
    assert cached.bytes == 2 * 5 * 2 * 2 * 8  # K and V of five tokens; q and out are the other op's
    # a window of 4: the queries see 3, 2 and 1 of the cached tokens
    windowed = replace(cached, window=4)
    assert windowed.flops == 2 * (3 + 2 + 1) * 4 * 8 * 2 * 2
    assert windowed.bytes == 2 * 3 * 2 * 2 * 8
    assert op.rate == "fp8"


def test_bytes_and_flops_of_an_mla_layer() -> None:
    # 2 prompts of 3 new tokens, 4 heads of nope 8 + rope 4, v 6
    op = MlaContext(2, 3, 4, 8, 4, 6)
    assert op.flops == 2 * 6 * 4 * 2 * (8 + 4 + 6)
    # q 4 x 12, k 4 x 8 + 4 shared, v and out 4 x 6, all BF16
    assert op.bytes == 2 * 3 * (48 + 36 + 24 + 24) * 2
    cached = replace(op, cached_tokens=5)
    assert cached.flops == 2 * 15 * 4 * 2 * 18
    assert cached.bytes == 2 * 5 * (36 + 24) * 2


def test_bytes_of_sparse_attention_and_its_scores() -> None:
    op = SparseContext(2, 3, 4, 16, 8, 2, "fp8")
    assert op.flops == 2 * (1 + 2 + 2) * 4 * 2 * (16 + 8 + 16)
    assert op.bytes == 2 * 3 * (24 * 1 + 4 * (24 + 16) * 2)
    assert replace(op, cached_tokens=5).flops == 2 * 1 * 4 * 2 * 40  # only the first query had fewer than 2
    assert replace(op, cached_tokens=5).bytes == 2 * 5 * 24
    scores = IndexContext(2, 3, 4, 16)
    assert scores.flops == 2 * 6 * 4 * 2 * 16
    assert scores.bytes == 2 * (3 * (16 + 4) + 6 * 4 * 2)


@given(
    new=st.integers(1, 40), cached=st.integers(0, 40), window=st.one_of(st.none(), st.integers(1, 50)),
)  # fmt: skip
def test_pairs_are_those_of_a_mask(new: int, cached: int, window: int | None) -> None:
    reach = window or 10**9
    mask = sum(1 for q in range(cached, cached + new) for k in range(q + 1) if q - k < reach)
    assert causal_pairs(new, cached, window) == mask
    op = ContextAttention(1, new, 1, 1, 1, window)
    over_cached = sum(1 for q in range(cached, cached + new) for k in range(cached) if q - k < reach)
    found = replace(op, cached_tokens=cached).flops / 4 if cached else 0
    assert found == over_cached
    assert op.flops / 4 + found == mask


@pytest.mark.parametrize("model", ["deepseek-v3", "deepseek-v3.2", "gpt-oss-120b", "qwen3-30b-a3b"])
@pytest.mark.parametrize(("new", "cached"), [(1000, 3000), (4000, 1), (1, 5000)])
def test_attention_with_a_cache_is_the_whole_less_the_cached_part(model: str, new: int, cached: int) -> None:
    names = ("attention", "window_attention", "index_scores", *(
        f"cached_{name}" for name in ("attention", "window_attention", "index_scores")
    ))  # fmt: skip
    deployment = deploy(8, 1, 8, "fp8" if "seek" in model else "bf16")

    def flops(new: int, cached: int = 0) -> float:
        return total(plan_of(model, deployment, new, cached, 2), *names)

    assert flops(new, cached) == flops(cached + new) - flops(cached)


@pytest.mark.parametrize("model", ["deepseek-v3", "gpt-oss-120b"])
def test_chunks_sum_to_the_whole(model: str) -> None:
    """But for what every chunk pays again: logits, and MLA's projection of cached latents."""
    deployment = deploy(8, 1, 8, "fp8" if "seek" in model else "bf16")
    again = ("lm_head", "cached_kv_b_proj")

    def flops(new: int, cached: int = 0) -> float:
        calls = plan_of(model, deployment, new, cached)
        return total(calls, *({call.name for call in calls} - set(again)))

    assert flops(512) + flops(1024, 512) + flops(64, 1536) == pytest.approx(flops(1600), rel=1e-12)
    if model == "deepseek-v3":
        calls = plan_of(model, deployment, 1024, 512)
        assert total(calls, "cached_kv_b_proj") == 61 * 2 * 512 * 32768 * 512


def test_high_throughput_dispatch_sends_a_token_once_to_each_rank() -> None:
    # top-2 of 8 experts over 4 ranks: a rank is missed with chance (6 x 5) / (8 x 7)
    op = ContextAllToAll("dispatch", 10, 100, 2, 8, 4, "bf16")
    ranks = 4 * (1 - 30 / 56)
    assert op.sent_bytes == pytest.approx(10 * ranks * 200)
    assert op.link_s(H100) == pytest.approx(10 * ranks * 200 * 3 / 4 / H100.link_bytes_per_s)
    assert op.bytes == pytest.approx(10 * 200 * (1 + ranks))
    # over 16 ranks of two nodes one copy crosses where the other node holds a chosen expert: 1 - (8 x 7) / (16 x 15)
    wide = ContextAllToAll("dispatch", 10, 100, 2, 16, 16, "bf16")
    assert wide.link_s(H100) == pytest.approx(10 * 200 * (1 - 56 / 240) / H100.scale_out_bytes_per_s)


def test_module_holds_the_block_without_the_cached_part() -> None:
    calls = plan_of("deepseek-v3", deploy(8, 1, 8, "fp8"), 1000, 500)
    merged = merge_context_block(calls, "fp8_block")
    (module,) = [call for call in merged if isinstance(call.op, ContextModule)]
    block = [call.op for call in calls if call.block == "mla"]
    assert module.op.flops == sum(op.flops for op in block)
    assert module.op.floor_s(H100) == pytest.approx(sum(op.floor_s(H100) for op in block))
    assert module.calls_per_step == 61
    assert {"cached_kv_b_proj", "cached_attention"} < {call.name for call in merged}
    assert sum(c.op.flops * c.calls_per_step for c in merged) == pytest.approx(
        sum(c.op.flops * c.calls_per_step for c in calls)
    )
    assert not any(isinstance(call.op, Experts) and call.block == "mla" for call in calls)


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_tokens": 0}, "new_tokens: expected a whole number of at least 1; got 0"),
        ({"new_tokens": 1.5}, "new_tokens: expected a whole number"),
        ({"new_tokens": float("nan")}, "new_tokens: expected a whole number"),
        ({"new_tokens": float("inf")}, "new_tokens: expected a whole number"),
        ({"cached_tokens": -1}, "cached_tokens: expected a whole number of at least 0; got -1"),
        ({"sequences": 0}, "sequences: expected a whole number of at least 1; got 0"),
        ({"new_tokens": 100_000, "cached_tokens": 100_000}, "context: expected at most deepseek-v3's 163840 tokens"),
    ],
)
def test_bad_counts_are_refused(changes: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"new_tokens": 100, **changes}
    with pytest.raises(ValueError, match=message):
        prefill_plan(load_model("deepseek-v3"), get_gpu("h200"), deploy(8, 1, 8, "fp8"), **asked)


def test_prompts_must_fit_beside_the_weights() -> None:
    model, gpu, deployment = load_model("deepseek-v3"), get_gpu("h200"), deploy(8, 1, 8, "fp8")
    prefill_plan(model, gpu, deployment, new_tokens=8192, cached_tokens=100_000, sequences=4)
    with pytest.raises(DoesNotFit, match="memory: deepseek-v3 in fp8 on 8 x h200"):
        prefill_plan(model, gpu, deployment, new_tokens=8192, cached_tokens=100_000, sequences=40)
    with pytest.raises(ValueError, match="h100 has no FP4 matrix units"):
        prefill_plan(model, H100, deploy(8, 1, 8, "nvfp4"), new_tokens=8192)
