"""Ops: bytes, flops, link traffic and the roofline floor.

Floors marked "published" stand beside measured kernel times of vLLM, SGLang and TensorRT-LLM in the
aiconfigurator-core 0.12.0 tables.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenfab.bench.gpus import Gpu, get_gpu
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
    index_key_bytes,
)

H100, H200 = get_gpu("h100"), get_gpu("h200")
FP8_BLOCK = ("fp8_block", "fp8_group")
BLOCK = 8.001953125 / 8  # bytes of a value with one FP32 scale per 128 x 128
GROUP = 8.25 / 8  # with one per 1 x 128
MXFP4 = 4.25 / 8


# --- published floors ------------------------------------------------------------------------------------------

GQA_64_8 = PagedAttention(16, 8192, 64, 8, 128)


@pytest.mark.parametrize(
    ("gpu", "op", "floor_us"),
    [
        # 117 MB of weights / 3.35 TB/s is 35.1 us; rows in and out add 2 MB
        (H100, Gemm(64, 7168, 16384, *FP8_BLOCK), 35.4),
        # compute-bound at 1979 TFLOP/s
        (H100, Gemm(4096, 7168, 16384, *FP8_BLOCK), 486),
        # DeepSeek-V3 EP8, 128 tokens balanced
        (H100, Experts(128, 7168, 2048, 8, 256, 8, 1, *FP8_BLOCK), 421),
        # Qwen3-30B, 64 tokens
        (H100, Experts(64, 2048, 768, 8, 128, 1, 1, *FP8_BLOCK), 180),
        # gpt-oss-120b, MXFP4 weights x BF16
        (H100, Experts(64, 2880, 2880, 4, 128, 1, 1, "mxfp4", "bf16"), 505),
        (H200, Experts(128, 2880, 2880, 4, 128, 1, 1, "mxfp4", "bf16"), 352),
        # paged GQA decode
        (H100, GQA_64_8, 160),
        (H100, replace(GQA_64_8, kv_format="fp8"), 80),
        (H100, PagedAttention(128, 2048, 32, 8, 128, kv_format="fp8"), 160),
        (H200, replace(GQA_64_8, kv_format="fp8"), 56),
    ],
)
def test_published_floors(gpu: Gpu, op: Op, floor_us: float) -> None:
    assert op.floor_s(gpu) * 1e6 == pytest.approx(floor_us, rel=0.01)


def test_weights_of_the_fp8_gemm() -> None:
    weights = replace(Gemm(64, 7168, 16384, *FP8_BLOCK), m=0)
    assert weights.bytes == pytest.approx(117.44e6, rel=3e-4)
    assert weights.floor_s(H100) * 1e6 == pytest.approx(35.1, rel=2e-3)


def test_moe_weights() -> None:
    # 32 experts of an EP8 rank x 3 x 7168 x 2048
    op = Experts(128, 7168, 2048, 8, 256, 8, 1, *FP8_BLOCK)
    assert op.bytes == pytest.approx(1.41e9, rel=3e-3)


# time x rate that published kernels reach is the flops: 729 us at 1320 TF (GEMM); 511 us at 572 TF, 482 at 606 and
# 415 at 704 (MLA, 128 heads, b32 x 32768)
@pytest.mark.parametrize(
    ("op", "time_s", "flops_per_s"),
    [
        (Gemm(4096, 7168, 16384, *FP8_BLOCK), 729e-6, 1320e12),
        (MlaAttention(32, 32768, 128, 512, 64), 511e-6, 572e12),
        (MlaAttention(32, 32768, 128, 512, 64), 482e-6, 606e12),
        (MlaAttention(32, 32768, 128, 512, 64, "fp8"), 415e-6, 704e12),
    ],
)
def test_published_flops(op: Op, time_s: float, flops_per_s: float) -> None:
    assert op.flops == pytest.approx(time_s * flops_per_s, rel=2e-3)


# --- bytes and flops, by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "num_bytes", "flops", "rate"),
    [
        # weights + rows in + BF16 rows out
        (Gemm(3, 256, 512), 2 * (256 * 512 + 3 * 512 + 3 * 256), 2 * 3 * 256 * 512, "bf16"),
        (
            Gemm(3, 256, 512, *FP8_BLOCK),
            256 * 512 * BLOCK + 3 * 512 * GROUP + 3 * 256 * 2,
            2 * 3 * 256 * 512,
            "fp8",
        ),
        (Gemm(3, 256, 512, "nvfp4", "nvfp4"), (256 + 3) * 512 * 4.5 / 8 + 3 * 256 * 2, 2 * 3 * 256 * 512, "fp4"),
        (
            BatchedMatmul("pre", 128, 4, 512, 128),
            128 * 2 * (512 * 128 + 4 * (512 + 128)),
            2 * 128 * 4 * 512 * 128,
            "bf16",
        ),
        # 2 tokens x top-2 over 8 experts touch 4 of them; rows in once, BF16 rows out once
        (
            Experts(2, 64, 32, 2, 8, 1, 1, "mxfp4", "mxfp8"),
            4 * 3 * 64 * 32 * MXFP4 + 2 * 64 * (8.25 / 8 + 2),
            6 * 4 * 64 * 32,
            "fp8",
        ),
        # split two ways each over two ranks: 16 rows of 32 on 4 experts, half of each
        (
            Experts(16, 64, 32, 2, 8, 2, 2, "bf16", "bf16"),
            4 * 3 * 64 * 16 * 2 + 16 * 64 * 4,
            6 * 16 * 64 * 16,
            "bf16",
        ),
        # K and V of each KV head; queries in and outputs out
        (
            PagedAttention(2, 100, 8, 2, 64),
            2 * 100 * (2 * 2 * 64) * 2 + 2 * (2 * 8 * 64) * 2,
            4 * 2 * 8 * 64 * 100,
            "bf16",
        ),
        (
            PagedAttention(2, 100, 8, 2, 64, kv_format="fp8"),
            2 * 100 * (2 * 2 * 64) + 2 * (2 * 8 * 64) * 2,
            4 * 2 * 8 * 64 * 100,
            "fp8",
        ),
        # one latent for all heads; q of 576 and out of 512 per head; scores over 576 and values over 512
        (
            MlaAttention(2, 100, 16, 512, 64, "fp8"),
            2 * 100 * 576 + 2 * 16 * (576 + 512) * 2,
            2 * 16 * (576 + 512) * 2 * 100,
            "fp8",
        ),
        # FP8 key + FP32 scale per token; FP32 scores written and read
        (IndexScores(2, 100, 64, 128), 2 * 100 * (128 + 4) + 2 * (2 * 100 * 4), 2 * 2 * 64 * 128 * 100, "fp8"),
        (Streaming(1234.0), 1234.0, 0, "bf16"),
        # BF16 in and out of memory
        (Collective("all_reduce", 1000, 8), 4000, 0, "bf16"),
        (ExpertAllToAll("dispatch", 10, 64, 4, 32, 8, "fp8_group"), 2 * 10 * 4 * 64 * GROUP, 0, "bf16"),
    ],
)
def test_bytes_and_flops(op: Op, num_bytes: float, flops: float, rate: str) -> None:
    assert op.bytes == pytest.approx(num_bytes, rel=1e-12)
    assert op.flops == pytest.approx(flops, rel=1e-12)
    assert op.rate == rate


def test_index_key_bytes() -> None:
    assert index_key_bytes(128) == 132


def test_the_window_caps_what_is_read_and_computed() -> None:
    full, window = PagedAttention(4, 8192, 64, 8, 64), PagedAttention(4, 8192, 64, 8, 64, window=128)
    assert window.kv_tokens == 128
    as_if_short = PagedAttention(4, 128, 64, 8, 64)
    assert (window.bytes, window.flops) == (as_if_short.bytes, as_if_short.flops)
    assert full.flops == 64 * window.flops
    # a context shorter than the window is read whole
    assert PagedAttention(4, 100, 64, 8, 64, window=128).bytes == PagedAttention(4, 100, 64, 8, 64).bytes


def test_a_sparse_latent_is_read_up_to_its_top_k() -> None:
    sparse = MlaAttention(4, 32768, 128, 512, 64, "fp8", top_k=2048)
    dense = MlaAttention(4, 2048, 128, 512, 64, "fp8")
    assert (sparse.bytes, sparse.flops) == (dense.bytes, dense.flops)
    assert replace(sparse, length=1000).kv_tokens == 1000
    # each of several queries picks its own tokens: unlike dense MLA, everything grows with q_len
    assert replace(sparse, q_len=3).bytes == 3 * sparse.bytes


@pytest.mark.parametrize(
    ("op", "cache_bytes", "query_bytes"),
    [
        (PagedAttention(4, 1000, 64, 8, 128), 4 * 1000 * 2 * 8 * 128 * 2, 4 * 2 * 64 * 128 * 2),
        (MlaAttention(4, 1000, 128, 512, 64), 4 * 1000 * 576 * 2, 4 * 128 * (576 + 512) * 2),
    ],
)
@pytest.mark.parametrize("q_len", [1, 2, 8])
def test_the_cache_is_read_once_however_many_queries(
    op: PagedAttention | MlaAttention, cache_bytes: int, query_bytes: int, q_len: int
) -> None:
    verify = replace(op, q_len=q_len)
    assert verify.bytes == cache_bytes + q_len * query_bytes
    assert verify.flops == q_len * op.flops


def test_index_keys_are_read_once_however_many_queries() -> None:
    op = IndexScores(2, 100, 64, 128, q_len=3)
    assert op.bytes == 2 * 100 * 132 + 3 * 2 * (2 * 100 * 4)
    assert op.flops == 3 * replace(op, q_len=1).flops


# --- experts ---------------------------------------------------------------------------------------------------


def test_rows_of_a_rank() -> None:
    assert Experts(128, 7168, 2048, 8, 256, 8).rows == 128
    assert Experts(1, 7168, 2048, 8, 256, 8).rows == 1
    assert Experts(1, 7168, 2048, 8, 256, 16).rows == 0.5  # on average


@pytest.mark.parametrize(
    ("num_tokens", "ep", "touched"),
    [
        (1, 1, 8),
        (1, 8, 1),
        (4, 1, 32),
        (31, 1, 248),
        (32, 1, 256),
        (33, 1, 256),
        (1000, 1, 256),
        (32, 8, 32),
        (9, 8, 9),
    ],
)
def test_balanced_loading_touches_an_expert_per_row(num_tokens: int, ep: int, touched: int) -> None:
    assert Experts(num_tokens, 7168, 2048, 8, 256, ep).touched_experts == touched


@pytest.mark.parametrize("load", ["power_law_1.01", "power_law_1.2"])
@pytest.mark.parametrize(("num_tokens", "top_k", "experts", "ep"), [(1, 8, 256, 1), (1, 1, 2, 1), (64, 8, 256, 8)])
@pytest.mark.parametrize("scale", [1, 100])
def test_uniform_random_loading(num_tokens: int, top_k: int, experts: int, ep: int, load: str, scale: int) -> None:
    # each of T k draws misses one expert with probability 1 - 1/E
    num_tokens *= scale
    expected = Fraction(experts, ep) * (1 - (1 - Fraction(1, experts)) ** (num_tokens * top_k))
    op = Experts(num_tokens, 64, 32, top_k, experts, ep, load=load)
    assert op.touched_experts == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64, 256])
def test_uniform_random_loading_is_close_to_distinct_choices(num_tokens: int) -> None:
    # a router picks k *different* experts per token: the exact mean is E (1 - (1 - k/E)^T), one token touches 8
    exact = 256 * (1 - (1 - 8 / 256) ** num_tokens)
    assert Experts(num_tokens, 64, 32, 8, 256, load="power_law_1.2").touched_experts == pytest.approx(exact, rel=0.015)


def test_random_loading_touches_fewer_than_balanced() -> None:
    balanced = Experts(16, 7168, 2048, 8, 256)
    assert balanced.touched_experts == 128
    assert 100 < replace(balanced, load="power_law_1.2").touched_experts < 128


# --- links and the floor ---------------------------------------------------------------------------------------


def test_expert_parallel_bound_of_the_deepseek_paper() -> None:
    # arXiv 2505.09343: 32 tokens to 9 experts of hidden 7000, 1 byte out and 2 bytes back, all over a 50 GB/s NIC:
    # (1 + 2) x 32 x 9 x 7000 / 50e9 = 120.96 us per layer. With 4000 ranks of one GPU, 1/4000 stays at home.
    lone = replace(H100, scale_up_gpus=1, scale_out_bytes_per_s=50e9)
    shape = (32, 7000, 9, 256, 4000)
    dispatch, combine = ExpertAllToAll("dispatch", *shape, "fp8"), ExpertAllToAll("combine", *shape, "bf16")
    total_s = dispatch.link_s(lone) + combine.link_s(lone)
    assert total_s * 1e6 == pytest.approx(120.96 * (1 - 1 / 4000), rel=1e-12)
    assert combine.link_s(lone) == pytest.approx(2 * dispatch.link_s(lone), rel=1e-12)
    assert dispatch.floor_s(lone) == dispatch.link_s(lone)
    # 61 layers of two micro-batches: 14.76 ms per token, at most 67 tokens/s/user
    assert int(1 / (2 * 61 * total_s)) == 67


@pytest.mark.parametrize(
    ("ep", "inside", "outside"),
    [(1, 0, 0), (2, 1 / 2, 0), (8, 7 / 8, 0), (16, 7 / 16, 8 / 16), (144, 7 / 144, 136 / 144)],
)
def test_all_to_all_leaves_the_domain_for_ranks_beyond_it(ep: int, inside: float, outside: float) -> None:
    op = ExpertAllToAll("dispatch", 64, 7168, 8, 256, ep, "fp8")
    sent = 64 * 8 * 7168
    assert op.sent_bytes == sent
    # H100: 450 GB/s to 8 GPUs, 50 GB/s beyond; the two links work at the same time
    expected = max(sent * inside / 450e9, sent * outside / 50e9)
    assert op.link_s(H100) == pytest.approx(expected, rel=1e-12)


def test_both_links_of_an_all_to_all_can_bound() -> None:
    op = ExpertAllToAll("combine", 64, 7168, 8, 256, 16)
    slow_nvlink = replace(H100, link_bytes_per_s=1e9)
    assert op.link_s(slow_nvlink) == pytest.approx(64 * 8 * 7168 * 2 * 7 / 16 / 1e9, rel=1e-12)
    assert op.link_s(H100) == pytest.approx(64 * 8 * 7168 * 2 * 8 / 16 / 50e9, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "num_gpus", "bandwidth"),
    [("h100", 2, 450e9), ("h100", 8, 450e9), ("h100", 9, 50e9), ("h800", 8, 200e9), ("gb200", 72, 900e9),
     ("gb200", 73, 100e9)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_collectives(kind: str, name: str, num_gpus: int, bandwidth: float) -> None:
    # an all-reduce in the switch sends every value once; the others keep the GPU's own share
    share = 1 if kind == "all_reduce" else 1 - 1 / num_gpus
    op = Collective(kind, 1 << 20, num_gpus)
    assert op.link_s(get_gpu(name)) == pytest.approx(2 * (1 << 20) * share / bandwidth, rel=1e-12)


def test_the_floor_is_the_slowest_of_memory_matrix_units_and_links() -> None:
    op = Gemm(64, 4096, 4096, *FP8_BLOCK)
    ends_s = op.bytes / 3.35e12
    assert op.floor_s(H100) == pytest.approx(ends_s, rel=1e-12)
    slow_units = replace(H100, fp8_flops_per_s=1e12)
    assert op.floor_s(slow_units) == pytest.approx(2 * 64 * 4096 * 4096 / 1e12, rel=1e-12)
    reduce = Collective("all_reduce", 1 << 20, 8)
    assert reduce.floor_s(H100) == reduce.link_s(H100) > reduce.bytes / 3.35e12
    fast_link = replace(H100, link_bytes_per_s=1e18)
    assert reduce.floor_s(fast_link) == pytest.approx((4 << 20) / 3.35e12, rel=1e-12)


def test_the_matrix_floor_runs_at_the_rate_of_the_wider_operand() -> None:
    # compute-bound: W4A16 at 989 TF, W4A8 at 1979 TF; an H100 has no FP4 units
    shape = (8192, 8192, 8192)
    flops = 2 * 8192**3
    assert Gemm(*shape, "mxfp4", "bf16").floor_s(H100) == pytest.approx(flops / 989e12, rel=1e-12)
    assert Gemm(*shape, "mxfp4", "mxfp8").floor_s(H100) == pytest.approx(flops / 1979e12, rel=1e-12)
    assert Gemm(*shape, "nvfp4", "nvfp4").floor_s(get_gpu("b200")) == pytest.approx(flops / 9000e12, rel=1e-12)
    with pytest.raises(ValueError, match="h100 has no FP4 matrix units"):
        Gemm(*shape, "nvfp4", "nvfp4").floor_s(H100)


def test_streaming_and_collectives_need_no_matrix_units() -> None:
    assert Streaming(3.35e6).floor_s(H100) == pytest.approx(1e-6, rel=1e-12)
    assert Gemm(1, 1, 1).link_s(H100) == 0


def test_a_module_is_the_sum_of_its_parts() -> None:
    attention = MlaAttention(32, 4096, 128, 512, 64, "fp8")
    # one part bound by memory, one by compute: the sum of floors is more than the floor of the sums
    parts = (attention, Gemm(8192, 8192, 8192, *FP8_BLOCK), Streaming(1e9))
    module = AttentionModule(attention, parts, "fp8_block")
    assert module.bytes == sum(part.bytes for part in parts)
    assert module.flops == sum(part.flops for part in parts)
    assert module.floor_s(H100) == sum(part.floor_s(H100) for part in parts)
    assert module.floor_s(H100) > max(module.bytes / 3.35e12, module.flops / 1979e12)


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (Gemm(64, 7168, 16384), "64 x 7168 x 16384"),
        (BatchedMatmul("pre", 128, 32, 512, 64), "128 heads, 32 x 512 x 64"),
        (Experts(128, 7168, 2048, 8, 256, 4, 2), "128 tokens, 256 x (7168, 2048) top-8, ep 4, tp 2"),
        (Experts(128, 7168, 2048, 8, 256, 4), "128 tokens, 256 x (7168, 2048) top-8, ep 4"),
        (PagedAttention(16, 8192, 64, 8, 128), "16 x 8192, 64/8 heads x 128, bf16 KV"),
        (PagedAttention(16, 8192, 64, 8, 64, 128, "fp8"), "16 x 8192, 64/8 heads x 64, window 128, fp8 KV"),
        (MlaAttention(32, 4096, 128, 512, 64, "fp8", top_k=2048), "32 x 4096, 128 heads, top-2048, fp8 KV"),
        (IndexScores(32, 4096, 64, 128), "32 x 4096, 64 heads x 128"),
        (Streaming(1.5e6), "1.5 MB"),
        (Collective("all_reduce", 4096, 8), "4096 BF16 over 8 GPUs"),
        (ExpertAllToAll("dispatch", 32, 7168, 8, 256, 16, "fp8"), "32 tokens x 7168, top-8, ep 16, fp8"),
    ],
)
def test_shapes_for_a_reader(op: Op, text: str) -> None:
    assert op.shape() == text


# no "ep" for the all-to-all: past the scale-up domain it takes traffic off the inner link, so a floor may fall
OPS: list[tuple[Op, tuple[str, ...]]] = [
    (Gemm(64, 1024, 512, *FP8_BLOCK), ("m", "n", "k")),
    (BatchedMatmul("pre", 128, 32, 512, 128), ("num_heads", "m", "n", "k")),
    (Experts(32, 2048, 768, 8, 128, 2, 2, *FP8_BLOCK), ("num_tokens", "hidden", "inter", "top_k", "num_experts")),
    (
        Experts(32, 2048, 768, 8, 128, 1, 1, *FP8_BLOCK, "power_law_1.2"),
        ("num_tokens", "hidden", "inter", "top_k", "num_experts"),
    ),
    (PagedAttention(8, 1024, 32, 4, 128, 2048, "fp8", 2), ("batch", "length", "num_heads", "num_kv_heads", "q_len")),
    (MlaAttention(8, 1024, 128, 512, 64, "fp8", 2), ("batch", "length", "num_heads", "kv_lora_rank", "q_len")),
    (IndexScores(8, 1024, 64, 128, 2), ("batch", "length", "num_heads", "head_dim", "q_len")),
    (Collective("all_gather", 4096, 4), ("num_elements", "num_gpus")),
    (ExpertAllToAll("dispatch", 32, 2048, 8, 128, 4, "fp8"), ("num_tokens", "hidden", "top_k")),
]


@settings(deadline=None, max_examples=200)
@given(
    case=st.sampled_from(OPS),
    data=st.data(),
    gpu=st.sampled_from(["h100", "h20", "b200", "gb300"]),
)
def test_more_work_is_never_faster(case: tuple[Op, tuple[str, ...]], data: st.DataObject, gpu: str) -> None:
    op, fields = case
    start = {field: data.draw(st.integers(1, 4), field) * getattr(op, field) for field in fields}
    op = replace(op, **start)
    field = data.draw(st.sampled_from(fields), "grown")
    larger = replace(op, **{field: getattr(op, field) * data.draw(st.integers(2, 9), "factor")})
    floor_s, larger_s = op.floor_s(get_gpu(gpu)), larger.floor_s(get_gpu(gpu))
    assert 0 < floor_s <= larger_s * (1 + 1e-12)
    assert op.bytes <= larger.bytes
    assert op.flops <= larger.flops
    assert math.isfinite(larger_s)
