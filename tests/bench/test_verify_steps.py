"""Steps of several query tokens: attention rows ran one, so theirs is a model; GEMM and expert rows are exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenfab.bench.decode_plan import decode_plan, merge_mla_block
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import AttentionModule, Experts, Gemm, IndexScores, MlaAttention, Op, PagedAttention
from tokenfab.bench.published import MEASURED, MODELLED, PublishedData, model_timing
from tokenfab.bench.published_tables import one_token, queries
from tokenfab.bench.step_time import published_step

H100 = get_gpu("h100")


def module(model: str, tokens: int, sequences: int = 16) -> AttentionModule:
    deployment = Deployment(8, 1, 8, get_precision("fp8"), sequences, 4096, tokens_per_step=tokens)
    calls = merge_mla_block(decode_plan(load_model(model), get_gpu("h200"), deployment), "fp8_block")
    (found,) = [call.op for call in calls if isinstance(call.op, AttentionModule)]
    return found


@pytest.mark.parametrize(
    ("op", "stack", "one_us", "ratio"),
    [
        # 16 x 8192 x 2 x 8 x 128 values of 2 bytes, and 524,288 bytes of query and output per token: bound by memory
        (PagedAttention(16, 8192, 64, 8, 128), "vllm", 185, (536_870_912 + 4 * 524_288) / (536_870_912 + 524_288)),
        # 1,216,872,448 bytes at 3.35 TB/s are 363.2 us; four tokens' 1.168e12 flops at 989 TFLOP/s are 1181.2 us
        (MlaAttention(32, 32768, 128, 512, 64), "sglang", 508,
         (4 * 292_057_776_128 / 989e12) / (1_216_872_448 / 3.35e12)),
    ],
)  # fmt: skip
def test_several_tokens_are_a_model_of_the_one_token_row(
    published: PublishedData, op: PagedAttention | MlaAttention, stack: str, one_us: float, ratio: float
) -> None:
    named = published.stack(H100, stack)
    one, four = published.time(op, H100, named), published.time(replace(op, q_len=4), H100, named)
    assert (one.provenance, four.provenance) == (MEASURED, MODELLED)
    assert one.time_s * 1e6 == pytest.approx(one_us, rel=0.005)
    assert four.time_s / one.time_s == pytest.approx(ratio, rel=1e-9)
    assert four.source == f"{one.source} (the row ran one query token per sequence; x the floors' ratio)"


def test_rows_of_a_gemm_and_of_experts_are_exact(published: PublishedData) -> None:
    """Sixteen sequences of four tokens are 64 rows, whoever they belong to."""
    model, stack = load_model("deepseek-v3"), published.stack(H100, "sglang")
    base = Deployment(16, 1, 16, get_precision("fp8"), 64, 4096)
    plain = published_step(published, model, H100, stack, base)
    verify = published_step(
        published, model, H100, stack, replace(base, batch_per_gpu=16, tokens_per_step=4, kept_tokens_per_step=2.0)
    )
    named = {op.call.name: op for op in verify.ops}
    for op in plain.ops:
        if op.call.name != "attention":
            assert named[op.call.name] == op
    assert {op.provenance for op in verify.ops if op.call.name == "attention"} == {MODELLED}
    assert {op.provenance for op in plain.ops if op.call.name == "attention"} != {MODELLED}


@pytest.mark.parametrize(
    ("model", "gpu", "stack"), [("deepseek-v3", "h200", "vllm"), ("deepseek-v3.2", "b200", "sglang")]
)
def test_a_modules_rows_and_cache_are_counted_apart(published: PublishedData, model: str, gpu: str, stack: str) -> None:
    found, named = get_gpu(gpu), published.stack(get_gpu(gpu), stack)
    one, four = module(model, 1), module(model, 4)
    assert one_token(four) == one
    assert one_token(one) is one
    plain, verify = (published.time(op, found, named) for op in (one, four))
    assert verify.provenance == MODELLED
    parts = sum(part.floor_s(found) for part in four.parts) / sum(part.floor_s(found) for part in one.parts)
    assert verify.time_s == pytest.approx(plain.time_s * parts, rel=1e-12)
    assert 1 < parts < 4  # weights are read once, whatever the tokens


def test_borrowed_heads_and_absent_tables(published: PublishedData) -> None:
    """Twice a model: a shape not in the table, and more tokens than a row ran; and the plain roofline."""
    stack = published.stack(H100, "vllm")
    odd = PagedAttention(16, 8192, 56, 8, 128)
    one, two = published.time(odd, H100, stack), published.time(replace(odd, q_len=2), H100, stack)
    assert (one.provenance, two.provenance) == (MODELLED, MODELLED)
    assert two.time_s / one.time_s == pytest.approx(replace(odd, q_len=2).floor_s(H100) / odd.floor_s(H100))
    none = PagedAttention(16, 8192, 64, 8, 96, q_len=2)
    assert published.time(none, H100, stack) == model_timing(none, H100, "no published attention row")


@pytest.mark.parametrize(
    "op", [Gemm(64, 7168, 2048), Experts(64, 7168, 2048, 8, 256), PagedAttention(4, 100, 8, 1, 128)]
)
def test_one_token_is_the_op_itself(op: Op) -> None:
    assert one_token(op) is op


def test_several_tokens_ask_no_table() -> None:
    for op in (PagedAttention(4, 100, 8, 1, 128, q_len=2), MlaAttention(4, 100, 16, 512, 64, q_len=2)):
        assert queries(op, H100, "vllm") == []
        assert queries(one_token(op), H100, "sglang")
    assert one_token(IndexScores(4, 100, 64, 128, 3)) == IndexScores(4, 100, 64, 128)
