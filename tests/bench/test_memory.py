"""Deployments and memory: refused splits, bytes per GPU, what fits and the largest batch."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenfab.bench.deployment import (
    PRECISIONS,
    Deployment,
    Precision,
    check_divides,
    check_precision,
    get_precision,
)
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.memory import (
    DoesNotFit,
    check_fits,
    kv_bytes_per_sequence,
    largest_batch,
    memory,
    smallest_gpu_count,
    weight_bytes,
)
from tokenfab.bench.model_config import MoeFfn
from tokenfab.bench.models import load_model, shipped_models

GIB = 1024**3


def deploy(gpus: int, tp: int, ep: int, precision: str, batch: float = 1, context: int = 4096, **kw: Any) -> Deployment:
    return Deployment(gpus, tp, ep, get_precision(precision), batch, context, **kw)


DSV3_EP8 = deploy(8, 1, 8, "fp8", 32, 4096)


# --- deployment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "tp", "ep", "dp", "expert_tp", "text"),
    [
        (1, 1, 1, 1, 1, "1 GPU"),
        (8, 8, 1, 1, 8, "8 GPUs, attention TP8, expert TP8"),
        (8, 1, 8, 8, 1, "8 GPUs, attention DP8, EP8, all-to-all"),
        (8, 2, 8, 4, 1, "8 GPUs, attention TP2, attention DP4, EP8, all-to-all"),
        (8, 4, 2, 2, 4, "8 GPUs, attention TP4, attention DP2, EP2, expert TP4"),
        (144, 1, 144, 144, 1, "144 GPUs, attention DP144, EP144, all-to-all"),
    ],
)
def test_splits(gpus: int, tp: int, ep: int, dp: int, expert_tp: int, text: str) -> None:
    deployment = deploy(gpus, tp, ep, "fp8")
    assert (deployment.attention_dp, deployment.expert_tp) == (dp, expert_tp)
    assert deployment.describe() == text


def test_tokens_travel_only_between_attention_groups_to_whole_experts() -> None:
    assert DSV3_EP8.dispatches
    assert not replace(DSV3_EP8, attention_tp=8).dispatches  # one group: every rank has all tokens
    assert not replace(DSV3_EP8, expert_parallel=4).dispatches  # split experts
    gathers = replace(DSV3_EP8, exchange="all_gather")
    assert not gathers.dispatches
    assert gathers.describe() == "8 GPUs, attention DP8, EP8, all-gather"


@pytest.mark.parametrize(
    ("tp", "batch", "tokens", "sequences", "rows"),
    [(1, 32, 1, 32, 32), (2, 32, 1, 64, 64), (8, 0.125, 1, 1, 1), (8, 1.625, 4, 13, 52), (1, 7, 3, 7, 21)],
)
def test_sequences_and_rows_of_an_attention_group(
    tp: int, batch: float, tokens: int, sequences: int, rows: int
) -> None:
    deployment = deploy(8, tp, 8, "fp8", batch, tokens_per_step=tokens)
    assert (deployment.sequences, deployment.rows) == (sequences, rows)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"gpus": 0}, "gpus"),
        ({"gpus": -8}, "gpus"),
        ({"attention_tp": 0}, "attention_tp"),
        ({"attention_tp": 3}, "attention_tp"),
        ({"attention_tp": 16}, "attention_tp"),
        ({"expert_parallel": 0}, "expert_parallel"),
        ({"expert_parallel": 5}, "expert_parallel"),
        ({"batch_per_gpu": 0}, "batch_per_gpu"),
        ({"batch_per_gpu": -1}, "batch_per_gpu"),
        ({"batch_per_gpu": 0.5}, "batch_per_gpu"),  # half a sequence on a group of one GPU
        ({"batch_per_gpu": float("nan")}, "batch_per_gpu"),
        ({"attention_tp": 2, "batch_per_gpu": 0.25}, "batch_per_gpu"),
        ({"context": 0}, "context"),
        ({"context": -4096}, "context"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"kept_tokens_per_step": 0.5}, "kept_tokens_per_step"),
        ({"kept_tokens_per_step": 1.5}, "kept_tokens_per_step"),  # keeps more than it makes
        ({"tokens_per_step": 4, "kept_tokens_per_step": 4.01}, "kept_tokens_per_step"),
        ({"kept_tokens_per_step": float("nan")}, "kept_tokens_per_step"),
        ({"reserve_bytes": -1}, "reserve_bytes"),
        ({"load": "uniform"}, "load"),
        ({"exchange": "broadcast"}, "exchange"),
    ],
)
def test_r27_an_absurd_deployment_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    got = re.escape(str(changes[field]))
    with pytest.raises(ValueError, match=rf"^{field}: expected .+; got {got}$"):
        replace(DSV3_EP8, **changes)


@pytest.mark.parametrize(("tokens", "kept"), [(1, 1.0), (4, 1.0), (4, 2.5), (4, 4.0)])
def test_kept_tokens_in_range(tokens: int, kept: float) -> None:
    deployment = replace(DSV3_EP8, tokens_per_step=tokens, kept_tokens_per_step=kept)
    assert deployment.kept_tokens_per_step == kept


# each refused by field, expected and got
@pytest.mark.parametrize(
    ("model", "deployment", "message"),
    [
        ("mixtral-8x22b", deploy(32, 32, 1, "bf16"), "attention_tp: expected a divisor of .* 48 heads; got 32"),
        (
            "mixtral-8x22b",
            deploy(6, 6, 1, "bf16"),
            "attention_tp: expected .* the vocabulary of 32000; got 6",
        ),
        (
            "mixtral-8x22b",
            deploy(12, 1, 12, "bf16"),
            "expert_parallel: expected a divisor of mixtral-8x22b's 8 experts; got 12",
        ),
        ("deepseek-v3", deploy(12, 1, 12, "fp8"), "expert_parallel: expected a divisor of .* 256 experts; got 12"),
        ("qwen3-30b-a3b", deploy(5, 1, 1, "bf16"), "gpus / expert_parallel: expected .* expert width 768; got 5"),
        ("qwen3-30b-a3b", deploy(1, 1, 1, "bf16", context=40961), "context: expected at most .* 40960 .*; got 40961"),
    ],
)
def test_a_split_that_does_not_divide_is_refused(model: str, deployment: Deployment, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_divides(load_model(model), deployment)


def test_kv_heads_must_split_or_replicate_evenly() -> None:
    # 48 heads / 16, 8 KV heads replicated twice: fine. With a vocabulary of 48 x k, 12 divides the heads but
    # neither divides nor is a multiple of 8
    model = replace(load_model("mixtral-8x22b"), vocab_size=48 * 1000)
    check_divides(model, deploy(16, 16, 1, "bf16"))
    with pytest.raises(ValueError, match=r"^attention_tp: expected a divisor or a multiple of .* 8 KV heads; got 12$"):
        check_divides(model, deploy(12, 12, 4, "bf16"))


@pytest.mark.parametrize(
    ("model", "deployment"),
    [
        ("qwen3-30b-a3b", deploy(1, 1, 1, "bf16", context=40960)),  # the longest context it has
        ("qwen3-30b-a3b", deploy(8, 8, 1, "bf16")),  # 4 KV heads over 8 GPUs
        ("qwen3-235b-a22b", deploy(16, 16, 16, "fp8")),
        ("deepseek-v3", deploy(128, 128, 128, "fp8")),
        ("kimi-k2", deploy(48, 1, 48, "fp8")),
    ],
)
def test_splits_that_divide(model: str, deployment: Deployment) -> None:
    check_divides(load_model(model), deployment)


# --- precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        # linear, its activation, experts, theirs, KV, dispatch
        ("bf16", ("bf16", "bf16", "bf16", "bf16", "bf16", "bf16")),
        ("fp8", ("fp8_block", "fp8_group", "fp8_block", "fp8_group", "fp8", "fp8_group")),
        ("fp8_tensor", ("fp8", "fp8", "fp8", "fp8", "fp8", "fp8")),
        ("mxfp4", ("bf16", "bf16", "mxfp4", "bf16", "bf16", "bf16")),
        ("mxfp4_mxfp8", ("bf16", "bf16", "mxfp4", "mxfp8", "fp8", "mxfp8")),
        ("nvfp4", ("nvfp4", "nvfp4", "nvfp4", "nvfp4", "fp8", "nvfp4")),
    ],
)
def test_formats_by_role(name: str, formats: tuple[str, ...]) -> None:
    row = get_precision(name)
    assert formats == (
        row.linear, row.linear_activation, row.experts, row.experts_activation, row.kv, row.dispatch,
    )  # fmt: skip


def test_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^precision: expected one of .*; got 'int4'$") as error:
        get_precision("int4")
    assert all(known in str(error.value) for known in PRECISIONS)


@pytest.mark.parametrize(
    ("gpu", "runs"),
    [
        ("a100", {"bf16", "mxfp4"}),  # W4A16 needs BF16 units only
        ("h100", {"bf16", "fp8", "fp8_tensor", "mxfp4", "mxfp4_mxfp8"}),
        ("b200", set(PRECISIONS)),
    ],
)
def test_a_precision_without_matrix_units_is_refused(gpu: str, runs: set[str]) -> None:
    for name, precision in PRECISIONS.items():
        if name in runs:
            check_precision(get_gpu(gpu), precision)
        else:
            with pytest.raises(ValueError, match=rf"^precision: {name} is .*; {gpu} has no (FP8|FP4) matrix units$"):
                check_precision(get_gpu(gpu), precision)


def test_nvfp4_on_h100_names_the_missing_unit() -> None:
    with pytest.raises(ValueError, match=r"^precision: nvfp4 is nvfp4 x nvfp4; h100 has no FP4 matrix units$"):
        check_precision(get_gpu("h100"), get_precision("nvfp4"))


def test_the_experts_alone_can_be_refused() -> None:
    mixed = Precision("mixed", "bf16", "bf16", "nvfp4", "nvfp4", "bf16", "bf16", "NVFP4 experts, the rest BF16")
    with pytest.raises(ValueError, match="h100 has no FP4 matrix units"):
        check_precision(get_gpu("h100"), mixed)


# --- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_models())
def test_one_bf16_gpu_holds_two_bytes_per_parameter(name: str) -> None:
    model = load_model(name)
    held = weight_bytes(model, deploy(1, 1, 1, "bf16"))
    # all but the final norm
    assert held == pytest.approx(2 * model.num_parameters - 2 * model.hidden_size, rel=1e-12)


def test_tied_embeddings_are_held_once() -> None:
    model = load_model("qwen3-30b-a3b")
    tied = replace(model, tied_embeddings=True)
    saved = weight_bytes(model, deploy(4, 4, 4, "fp8")) - weight_bytes(tied, deploy(4, 4, 4, "fp8"))
    assert saved == 2 * 151936 * 2048 / 4


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_published_mxfp4_checkpoints(name: str, gib: float) -> None:
    # the gpt-oss model card's checkpoint sizes
    assert weight_bytes(load_model(name), deploy(1, 1, 1, "mxfp4")) / GIB == pytest.approx(gib, rel=0.002)


def test_deepseek_v3_weights_on_eight_gpus() -> None:
    # a published estimator says about 97 GiB for FP8, EP8, attention DP8
    held = weight_bytes(load_model("deepseek-v3"), DSV3_EP8)
    assert held / GIB == pytest.approx(97, rel=0.05)
    # by hand, in parameters: attention is on every GPU, its absorbed up-projections in BF16
    hidden, layers, moe = 7168, 61, 58
    absorbed = 512 * 128 * (128 + 128)
    attention = (hidden + 128 * 192) * 1536 + hidden * 576 + 128 * 128 * hidden
    expert = 3 * hidden * 2048
    fp8 = layers * attention + 3 * 3 * hidden * 18432 + moe * (expert + 256 // 8 * expert)
    bf16 = layers * absorbed + moe * 256 * hidden + 2 * 129280 * hidden
    assert held == pytest.approx(fp8 * 8.001953125 / 8 + bf16 * 2, rel=1e-4)


def test_experts_are_split_over_all_gpus_however() -> None:
    model = load_model("mixtral-8x7b")
    by_expert, by_width = (weight_bytes(model, deploy(8, 1, ep, "bf16")) for ep in (8, 1))
    assert by_expert == by_width
    experts = 32 * 8 * 3 * 4096 * 14336 * 2
    whole = weight_bytes(model, deploy(1, 1, 1, "bf16"))
    assert whole - by_expert == pytest.approx(experts * 7 / 8, rel=1e-12)


@pytest.mark.parametrize(("tp", "kv_heads_held"), [(1, 4), (2, 2), (4, 1), (8, 1), (16, 1), (32, 1)])
def test_kv_projections_are_replicated_beyond_the_kv_heads(tp: int, kv_heads_held: int) -> None:
    model = load_model("qwen3-30b-a3b")
    hidden, layers = 2048, 48
    attention = (2 * 32 // tp + 2 * kv_heads_held) * 128 * hidden  # q, o, k and v
    experts = 128 * 3 * hidden * 768 // tp
    router, ends = 128 * hidden, 2 * 151936 * hidden // tp
    expected = 2 * (layers * (attention + experts + router) + ends)
    # norms, which are not split or counted here, are within 1e-4
    assert weight_bytes(model, deploy(tp, tp, 1, "bf16")) == pytest.approx(expected, rel=5e-4)


# --- KV cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "precision", "tp", "num_bytes"),
    [
        # DeepSeek-V3: 61 x 576 values
        ("deepseek-v3", "bf16", 1, 70_272),
        ("deepseek-v3", "fp8", 1, 35_136),
        ("deepseek-v3", "fp8", 8, 35_136),  # every rank of a TP group stores the latent
        ("kimi-k2", "nvfp4", 1, 35_136),  # FP8 cache
        # DSA also caches an FP8 key of 128 with an FP32 scale per layer
        ("deepseek-v3.2", "fp8", 1, 35_136 + 61 * 132),
        ("deepseek-v3.2", "bf16", 8, 70_272 + 61 * 132),
        # 48 layers x 2 x 4 heads x 128
        ("qwen3-30b-a3b", "bf16", 1, 98_304),
        ("qwen3-30b-a3b", "fp8", 1, 49_152),
        ("qwen3-30b-a3b", "fp8", 2, 24_576),
        ("qwen3-30b-a3b", "fp8", 4, 12_288),
        ("qwen3-30b-a3b", "fp8", 8, 12_288),  # one KV head each, replicated
        ("qwen3-30b-a3b", "fp8", 32, 12_288),
        ("mixtral-8x7b", "bf16", 8, 32 * 2 * 128 * 2),
    ],
)
def test_kv_bytes_per_token(model: str, precision: str, tp: int, num_bytes: int) -> None:
    for context in (1, 1000):
        held = kv_bytes_per_sequence(load_model(model), context, get_precision(precision), tp)
        assert held == context * num_bytes


@pytest.mark.parametrize(
    ("model", "context", "values"),
    [
        # 18 layers of 128 tokens and 18 of all, 2 x 8 x 64 values each
        ("gpt-oss-120b", 100, 36 * 100 * 1024),
        ("gpt-oss-120b", 128, 36 * 128 * 1024),
        ("gpt-oss-120b", 129, (18 * 128 + 18 * 129) * 1024),
        ("gpt-oss-120b", 131072, (18 * 128 + 18 * 131072) * 1024),
        # 36 layers of 8192-token chunks and 12 of all, 2 x 8 x 128 values each
        ("llama-4-maverick", 8192, 48 * 8192 * 2048),
        ("llama-4-maverick", 100_000, (36 * 8192 + 12 * 100_000) * 2048),
    ],
)
def test_windows_cap_the_cache(model: str, context: int, values: int) -> None:
    assert kv_bytes_per_sequence(load_model(model), context, get_precision("bf16")) == 2 * values


def test_memory_of_a_deployment() -> None:
    model, gpu = load_model("deepseek-v3"), get_gpu("h200")
    deployment = replace(DSV3_EP8, tokens_per_step=3)
    held = memory(model, gpu, deployment)
    # 32 sequences of the context and this step's tokens
    assert held.kv_bytes == 32 * (4096 + 3) * 35_136
    assert held.reserve_bytes == 4 * GIB
    assert held.capacity_bytes == 141 * GIB
    assert held.weights_bytes == weight_bytes(model, deployment)
    total = held.weights_bytes + held.kv_bytes + 4 * GIB
    assert held.shortfall_bytes == pytest.approx(total - 141 * GIB)
    # the latent of a TP group's sequences is on each of its GPUs
    group = memory(model, gpu, replace(deployment, attention_tp=8, batch_per_gpu=4))
    assert group.kv_bytes == held.kv_bytes


# --- what fits -------------------------------------------------------------------------------------------------


def test_deepseek_v3_in_fp8_does_not_fit_eight_h100() -> None:
    model, gpu = load_model("deepseek-v3"), get_gpu("h100")
    with pytest.raises(DoesNotFit, match=r"deepseek-v3 in fp8 on 8 x h100 needs .* 16 x h100$") as error:
        check_fits(model, gpu, DSV3_EP8)
    need = memory(model, gpu, DSV3_EP8)
    figures = [float(figure) for figure in re.findall(r"([\d.]+) GiB", str(error.value))]
    expected = [need.weights_bytes, need.kv_bytes, need.reserve_bytes, need.shortfall_bytes, need.capacity_bytes]
    assert figures == pytest.approx([value / GIB for value in expected], abs=0.05)
    assert need.shortfall_bytes > 0
    assert check_fits(model, gpu, replace(DSV3_EP8, gpus=16, expert_parallel=16)).shortfall_bytes <= 0


def test_deepseek_v3_in_fp8_fits_eight_h200() -> None:
    model, gpu = load_model("deepseek-v3"), get_gpu("h200")
    assert check_fits(model, gpu, DSV3_EP8) == memory(model, gpu, DSV3_EP8)


def test_no_number_of_gpus_holds_a_cache_that_does_not_split() -> None:
    # attention data parallel: each GPU keeps its own 1000 sequences of 131072 tokens
    deployment = deploy(8, 1, 8, "fp8", 1000, 131072)
    assert smallest_gpu_count(load_model("deepseek-v3"), get_gpu("h200"), deployment) is None
    with pytest.raises(DoesNotFit, match=r"; no number of h200 up to 1024 fits at this batch and context$"):
        check_fits(load_model("deepseek-v3"), get_gpu("h200"), deployment)


@pytest.mark.parametrize(
    ("model", "gpu", "deployment", "smallest"),
    [
        ("deepseek-v3", "h100", DSV3_EP8, 16),
        ("deepseek-v3", "h200", deploy(8, 8, 1, "fp8", 4, 4096), 8),
        ("qwen3-235b-a22b", "h100", deploy(4, 4, 1, "bf16", 1, 4096), 8),
        ("mixtral-8x7b", "l40s", deploy(1, 1, 1, "bf16", 8, 4096), 4),
        ("kimi-k2", "b200", deploy(8, 1, 8, "fp8", 16, 8192), 6),  # 192.7 GB of 193.3
        # one GPU grows into attention data parallel: split by TP, the latent of every sequence would be on each GPU
        ("deepseek-v3", "h100", deploy(1, 1, 1, "fp8", 64, 16384), 32),
        # split experts stay split: three ways of 512, where 128 experts would not divide
        ("qwen3-235b-a22b", "b200", deploy(2, 1, 1, "bf16", 1, 4096), 3),
    ],
)
def test_the_smallest_number_of_gpus_is_the_smallest(
    model: str, gpu: str, deployment: Deployment, smallest: int
) -> None:
    config, card = load_model(model), get_gpu(gpu)
    assert smallest_gpu_count(config, card, deployment) == smallest
    is_tp = deployment.attention_dp == 1 and deployment.gpus > 1

    def fits(gpus: int) -> bool:
        split = {"attention_tp": gpus} if is_tp else {}
        split |= {"expert_parallel": gpus} if deployment.expert_tp == 1 else {}
        try:
            candidate = replace(deployment, gpus=gpus, **split)
            check_divides(config, candidate)
            check_fits(config, card, candidate)
        except ValueError:
            return False
        return True

    assert [gpus for gpus in range(1, smallest + 1) if fits(gpus)] == [smallest]


LOADED = [
    ("deepseek-v3", "h200", (8, 1, 8), "fp8", 4096),
    ("deepseek-v3.2", "h200", (8, 1, 8), "fp8", 32768),
    ("deepseek-v3", "h200", (8, 8, 8), "fp8", 4096),
    ("kimi-k2", "gb200", (72, 1, 24), "fp8", 8192),
    ("deepseek-r1", "b200", (8, 2, 8), "nvfp4", 16384),
    ("qwen3-30b-a3b", "h100", (1, 1, 1), "bf16", 2048),
    ("qwen3-30b-a3b", "h100", (8, 8, 1), "fp8", 8192),  # KV heads replicated
    ("qwen3-235b-a22b", "h200", (8, 4, 8), "fp8", 8192),
    ("gpt-oss-120b", "h100", (1, 1, 1), "mxfp4", 4096),  # windows
    ("gpt-oss-120b", "h100", (2, 2, 2), "mxfp4", 131072),
    ("llama-4-maverick", "h200", (8, 8, 1), "fp8", 200_000),
    ("mixtral-8x7b", "h100", (2, 2, 1), "bf16", 4096),
    ("glm-4.5", "h200", (8, 8, 8), "fp8", 10_000),
]


@pytest.mark.parametrize(("name", "gpu", "split", "precision", "context"), LOADED)
@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_the_largest_batch_fits_and_one_more_does_not(
    name: str, gpu: str, split: tuple[int, int, int], precision: str, context: int, tokens_per_step: int
) -> None:
    model, card = load_model(name), get_gpu(gpu)
    deployment = deploy(*split, precision, 7, context, tokens_per_step=tokens_per_step)
    tp = deployment.attention_tp
    most = largest_batch(model, card, deployment)
    assert most >= 1
    check_fits(model, card, replace(deployment, batch_per_gpu=most / tp))
    with pytest.raises(DoesNotFit):
        check_fits(model, card, replace(deployment, batch_per_gpu=(most + 1) / tp))


@settings(deadline=None, max_examples=60)
@given(case=st.sampled_from(LOADED), context=st.integers(1, 40_000), reserve=st.integers(0, 8 * GIB))
def test_the_largest_batch_is_exact_at_any_context(
    case: tuple[str, str, tuple[int, int, int], str, int], context: int, reserve: int
) -> None:
    name, gpu, split, precision, _ = case
    model, card = load_model(name), get_gpu(gpu)
    deployment = deploy(*split, precision, 1, min(context, model.max_context), reserve_bytes=reserve)
    most = largest_batch(model, card, deployment)
    one_more = replace(deployment, batch_per_gpu=(most + 1) / deployment.attention_tp)
    assert memory(model, card, one_more).shortfall_bytes > 0
    if most:
        exact = replace(deployment, batch_per_gpu=most / deployment.attention_tp)
        assert memory(model, card, exact).shortfall_bytes <= 0


def test_no_batch_fits_where_the_weights_do_not() -> None:
    assert largest_batch(load_model("deepseek-v3"), get_gpu("h100"), DSV3_EP8) == 0


@pytest.mark.parametrize(("reserve_gib", "most"), [(31, 0), (29, 1), (26, 2)])
def test_the_cache_of_one_long_sequence_may_not_fit(reserve_gib: int, most: int) -> None:
    # 46.9 GiB of weights and 3.07 GiB for a million tokens, of which 36 layers of 48 keep 8192
    model, gpu = load_model("llama-4-maverick"), get_gpu("h100")
    deployment = deploy(8, 8, 8, "fp8", 1, 1_048_576, reserve_bytes=reserve_gib * GIB)
    assert largest_batch(model, gpu, deployment) == most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_per_gpu": float("inf")}, "batch_per_gpu: expected more than 0"),
        ({"batch_per_gpu": float("nan")}, "batch_per_gpu: expected more than 0"),
        ({"batch_per_gpu": 1e-7}, "batch_per_gpu: expected a whole number of sequences"),
        ({"context": 4096.5}, "context: expected a whole number; got 4096.5"),
    ],
)
def test_numbers_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DSV3_EP8, **changes)


def test_expert_biases_stay_bf16() -> None:
    """gpt-oss keeps them out of the MXFP4 blocks: 36 layers x 128 experts x (2 x 2880 + 2880) values."""
    model = load_model("gpt-oss-120b")
    layers = []
    for layer, count in model.layers:
        assert isinstance(layer.ffn, MoeFfn)
        assert layer.ffn.has_bias
        layers.append((replace(layer, ffn=replace(layer.ffn, has_bias=False)), count))
    bare = replace(model, layers=tuple(layers))
    one = deploy(1, 1, 1, "mxfp4", 1)
    routers = 36 * 128 * 2
    assert weight_bytes(model, one) - weight_bytes(bare, one) == 36 * 128 * 3 * 2880 * 2 + routers
