"""What a request costs: published rates to the dollar, and predictions that hide no GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.memory import DoesNotFit
from tokenfab.bench.models import load_model
from tokenfab.bench.prefill_time import prefill_time
from tokenfab.costing.study import Study, study
from tokenfab.costing.workload.request_pools import Predicted, activation_bytes, predict, prefill_work
from tokenfab.costing.workload.serving import (
    CACHED_INPUT,
    DECODE,
    GIVEN,
    NEW,
    PURPOSES,
    Pool,
    Request,
    Serving,
    given_pools,
    serve_given,
)

# DeepSeek's day (deepseek-ai/open-infra-index, day 6, 27-28 Feb 2025): 56.3 % of input hit the cache
DAY = Request(608_000_000_000, 342_304_000_000, 168_000_000_000)
NODES, GPUS, USD = 226.75, 8, 2.0


def day(utilisation: float = 1.0) -> Serving:
    return serve_given(DAY, 73_700, 14_800, GPUS, USD, utilisation)


# --- given rates: the golden day ---------------------------------------------------------------------------------


def test_the_day_in_nodes() -> None:
    nodes = {name: gpus / GPUS for name, gpus in day().gpus_for(1 / 86_400).items()}
    assert nodes["prefill"] == pytest.approx(608e9 / (73.7e3 * 86_400), rel=1e-12)
    assert nodes["decode"] == pytest.approx(168e9 / (14.8e3 * 86_400), rel=1e-12)
    assert (round(nodes["prefill"], 1), round(nodes["decode"], 1), round(sum(nodes.values()), 1)) == (
        95.5,
        131.4,
        226.9,
    )


def test_the_day_to_the_dollar_from_the_published_nodes() -> None:
    """226.75 nodes x 8 x $2 x 24 h; the rates only say what for."""
    paid = day().paid(NODES * GPUS, 24)
    assert (paid.gpu_hours, round(paid.work_gpu_hours)) == (43_536, 43_558)
    bill = paid.bill
    assert bill.usd == pytest.approx(87_072, abs=1e-6)
    assert round(bill.usd_per_mtok_total, 3) == 0.112
    assert round(bill.usd_per_mtok_output, 3) == 0.518
    assert round(bill.usd_per_mtok_input, 3) == 0.060
    assert round(bill.usd_per_mtok_output_decode_gpus_only, 3) == 0.300
    assert bill.usd_per_mtok_output == pytest.approx(87_072 / 168e9 * 1e6)


def test_the_day_from_its_rounded_rates_is_44_dollars_more() -> None:
    """73.7k and 14.8k tokens/s/node are rounded: they need 226.86 nodes and $87,115.61."""
    bill = day().bill
    assert bill.usd == pytest.approx((608e9 / 73.7e3 + 168e9 / 14.8e3) * 8 * 2 / 3600, rel=1e-12)
    assert round(bill.usd, 2) == 87_115.61
    assert [round(value, 3) for value in (
        bill.usd_per_mtok_input, bill.usd_per_mtok_output_decode_gpus_only, bill.usd_per_mtok_total,
    )] == [0.060, 0.300, 0.112]  # fmt: skip
    assert round(bill.usd_per_mtok_output, 4) == 0.5185  # 0.519, where the published nodes give 0.518


def test_every_input_token_of_a_given_rate_weighs_the_same() -> None:
    bill = day().bill
    assert bill.usd_per_mtok_input_new == pytest.approx(bill.usd_per_mtok_input)
    assert bill.usd_per_mtok_input_cached == pytest.approx(bill.usd_per_mtok_input)
    assert bill.share(CACHED_INPUT) == pytest.approx(0.563 * 95.4822 / 226.8636, rel=1e-4)


def test_sglang_on_96_h100_is_20_cents_of_decode_gpus_only() -> None:
    """52.3k input and 22.3k output tokens/s per node (LMSYS, 2025-05-05) at the $2.007 that its 20 cents imply."""
    bill = serve_given(Request(2000, 0, 100), 52_300, 22_300, 8, 2.007).bill
    assert bill.usd_per_mtok_output_decode_gpus_only == pytest.approx(0.20, abs=0.0001)
    # 20 input tokens per output token: their prefill costs eight times as much
    assert bill.usd_per_mtok_output == pytest.approx(0.2 * (1 + 20 * 22.3 / 52.3), rel=1e-3)
    assert bill.usd_per_mtok_input_cached is None


def test_idle_gpus_are_paid_by_all_purposes_alike() -> None:
    full, half = day(), day(0.5)
    assert half.bill.usd == pytest.approx(2 * full.bill.usd)
    for purpose in PURPOSES:
        assert half.bill.share(purpose) == pytest.approx(full.bill.share(purpose))
    assert half.prefill_gpus_per_decode_gpu == full.prefill_gpus_per_decode_gpu
    assert half.gpus_for(1e-5)["decode"] == pytest.approx(2 * full.gpus_for(1e-5)["decode"])


# --- any pools -----------------------------------------------------------------------------------------------------


def pool(name: str, gpu_s_of: dict[str, float], usd: float = 2.0, gpus: float = 8, **shares: float) -> Pool:
    return Pool(name, "somewhere", gpus, usd, "made up", gpu_s_of, shares or {GIVEN: 1.0})


positive = st.floats(1e-6, 1e6)


@given(
    new=positive, cached=positive, decode=positive, prices=st.tuples(positive, positive), split=st.booleans(),
    utilisation=st.floats(0.01, 1), tokens=st.tuples(*[st.integers(1, 10**9)] * 3), rate=st.floats(1e-6, 1e3),
)  # fmt: skip
def test_what_a_request_costs_is_the_sum_of_what_it_is_for(
    new: float, cached: float, decode: float, prices: tuple[float, float], split: bool, utilisation: float,
    tokens: tuple[int, int, int], rate: float,
) -> None:  # fmt: skip
    request = Request(tokens[0] + tokens[1], tokens[1], tokens[2])
    reading = {NEW: new, CACHED_INPUT: cached}
    if split:
        pools = (pool("prefill", reading, prices[0]), pool("decode", {DECODE: decode}, prices[1]))
        expected = ((new + cached) * prices[0] + decode * prices[1]) / 3600 / utilisation
    else:
        pools = (pool("both", {**reading, DECODE: decode}, prices[0]),)
        expected = (new + cached + decode) * prices[0] / 3600 / utilisation
    serving = Serving(request, pools, utilisation)
    for bill in (serving.bill, serving.fleet(rate).bill):
        parts = (
            bill.usd_per_mtok_input_new * request.new_tokens
            + (bill.usd_per_mtok_input_cached or 0) * request.cached_tokens
            + bill.usd_per_mtok_output_decode_gpus_only * request.output_tokens
        ) / 1e6
        assert parts == pytest.approx(bill.usd, rel=1e-9)
        assert bill.usd_per_mtok_output * request.output_tokens / 1e6 == pytest.approx(bill.usd, rel=1e-9)
        assert bill.usd_per_mtok_total * request.total_tokens / 1e6 == pytest.approx(bill.usd, rel=1e-9)
        assert all(math.isfinite(part) and part > 0 for part in bill.usd_of.values())
    assert serving.bill.usd == pytest.approx(expected, rel=1e-9)
    assert sum(serving.shares.values()) == pytest.approx(1)
    assert serving.fleet(rate).bill.usd >= serving.bill.usd * utilisation * (1 - 1e-9)


def test_pools_are_in_balance_and_both_are_paid() -> None:
    # 3 GPU-seconds of prefill at $4 and 12 of decode at $1
    pools = (
        pool("prefill", {NEW: 2, CACHED_INPUT: 1}, 4, 16, measured=1.0),
        pool("decode", {DECODE: 12}, 1, 8, measured=0.5, modelled=0.5),
    )
    serving = Serving(Request(100, 50, 10), pools, 0.5)
    assert serving.prefill_gpus_per_decode_gpu == 0.25
    assert serving.gpus_for(10) == {"prefill": 60, "decode": 240}
    assert serving.bill.usd == pytest.approx((12 + 12) / 3600 / 0.5)
    assert serving.bill.usd_per_mtok_output == pytest.approx(24 / 1800 / 10 * 1e6)
    assert serving.bill.usd_per_mtok_output_decode_gpus_only == pytest.approx(12 / 1800 / 10 * 1e6)
    assert serving.shares == pytest.approx({"measured": 0.75, "modelled": 0.25})  # by dollars, not by seconds
    fleet = serving.fleet(10)
    assert fleet.replicas == {"prefill": 4, "decode": 30}  # 60 / 16 rounded up
    assert fleet.gpus == {"prefill": 64, "decode": 240}
    assert fleet.usd_per_hour == pytest.approx(64 * 4 + 240)
    assert fleet.bill.usd_of[CACHED_INPUT] == pytest.approx(64 * 4 / 3600 / 10 / 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request(100, 100, 10), "cached_tokens: expected fewer than the 100 input tokens"),
        (lambda: Request(100, 101, 10), "cached_tokens: expected fewer than the 100 input tokens"),
        (lambda: Request(100, -1, 10), "cached_tokens: expected a whole number of at least 0; got -1"),
        (lambda: Request(0, 0, 10), "input_tokens: expected a whole number of at least 1; got 0"),
        (lambda: Request(10, 0, 0), "output_tokens: expected a whole number of at least 1; got 0"),
        (lambda: Request(1.5, 0, 1), "input_tokens: expected a whole number"),  # type: ignore[arg-type]
        (lambda: Request(10, 0, math.nan), "output_tokens: expected a whole number"),  # type: ignore[arg-type]
        (lambda: day(0), "utilisation: expected a share above 0 and up to 1; got 0"),
        (lambda: day(1.01), "utilisation: expected a share above 0 and up to 1; got 1.01"),
        (lambda: day(math.nan), "utilisation: expected a share"),
        (lambda: serve_given(DAY, 0, 1, 8, 2), "input_tokens_per_s: expected a positive number; got 0"),
        (lambda: serve_given(DAY, 1, -1, 8, 2), "output_tokens_per_s: expected a positive number; got -1"),
        (lambda: serve_given(DAY, 1, 1, 8, -2), "usd_per_gpu_hour: expected a positive number; got -2"),
        (lambda: serve_given(DAY, 1, 1, 0, 2), "gpus: expected a positive number; got 0"),
        (lambda: serve_given(DAY, 1, math.inf, 8, 2), "output_tokens_per_s: expected a positive number; got inf"),
        (lambda: serve_given(DAY, None, 1, 8, 2), "input_rate: expected it with given rates; got none"),
        (lambda: serve_given(DAY, 1, 1, 8, None), "usd_per_gpu_hour: expected it with given rates; got none"),
        (lambda: day().gpus_for(0), "requests_per_s: expected a positive number; got 0"),
        (lambda: day().fleet(-1), "requests_per_s: expected a positive number; got -1"),
        (lambda: day().paid(1000, 24), "gpus: expected at least the 43,558 GPU-hours of the work; got 24,000"),
        (lambda: day(0.9).paid(1814, 24), "utilisation: expected none with GPUs paid for hours; got 0.9"),
        (lambda: day().paid(1814, None), "gpus: expected the GPUs paid for and the hours; got 1814 and None"),
        (lambda: Serving(DAY, (pool("decode", {DECODE: 1.0}),)), "pools: expected work for decode, prefill of new"),
        (
            lambda: Serving(DAY, (*given_pools(DAY, 1, 1, 8, 1, ""), pool("more", {DECODE: 1.0}))),
            "pools: expected work for",
        ),
        (lambda: pool("decode", {DECODE: 0.0}), "gpu_s_of decode: expected a positive number; got 0"),
    ],
)
def test_r28_bad_input_is_one_clear_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_gpus_paid_together_have_one_price() -> None:
    pools = given_pools(DAY, 73_700, 14_800, 8, 2, "")
    with pytest.raises(ValueError, match=r"gpus: expected one price of all pools .* got \[2, 3\]"):
        Serving(DAY, (pools[0], replace(pools[1], usd_per_gpu_hour=3))).paid(2000, 24)


# --- predicted -----------------------------------------------------------------------------------------------------


def studied(model: str, gpu: str, stack: str, parallel: str, batch: float, request: Request, **kw: Any) -> Study:
    return study(model, [gpu], [stack], [parallel], [batch], context=request.context, **kw)


LONG = Request(4096, 1024, 512)


def served(*, disaggregated: bool, request: Request = LONG, budget: int = 8192, **kw: Any) -> Predicted:
    decode = studied("deepseek-v3", "h200", "sglang", "dp8-ep8", 64, request)
    prefill = studied("deepseek-v3", "h100", "sglang", "dp32-ep32", 1, request) if disaggregated else None
    return predict(decode, prefill, request, token_budget=budget, **kw)


def test_one_pool_is_passes_and_steps_by_hand() -> None:
    found = served(disaggregated=False)
    plan = studied("deepseek-v3", "h200", "sglang", "dp8-ep8", 64, LONG)
    gpu, stack = plan.sweep.gpus[0], plan.data.stack(plan.sweep.gpus[0], "sglang")
    deployment = plan.sweep.deployment(plan.sweep.parallels[0], 1)
    # two prompts of 3072 new tokens fit a pass of 8192
    one = prefill_time(
        plan.data, plan.sweep.model, gpu, stack, deployment, new_tokens=3072, cached_tokens=1024, sequences=2
    )
    step_s = found.decode.step.step_s
    usd_per_gpu_s = plan.price(gpu).usd_per_gpu_hour / 3600
    usd = (one.time_s / 2 + 512 * step_s / 64) * usd_per_gpu_s
    bill = found.serving.bill
    assert bill.usd == pytest.approx(usd, rel=1e-12)
    assert bill.usd_of[CACHED_INPUT] == pytest.approx(one.cached_s / 2 * usd_per_gpu_s, rel=1e-12)
    assert found.decode.step.deployment.context == 4096 + 256
    assert found.first_token_s == one.time_s
    # by turns: what is left of the time after prefill
    busy = one.time_s / 2 / (one.time_s / 2 + 512 * step_s / 64)
    assert found.tokens_per_s_per_user == pytest.approx((1 - busy) / step_s, rel=1e-12)
    assert not found.serving.is_disaggregated
    (pool,) = found.serving.pools
    measured = busy * one.coverage()["measured"] + (1 - busy) * found.decode.step.coverage()["measured"]
    assert pool.shares["measured"] == pytest.approx(measured, rel=1e-12)
    assert sum(found.serving.shares.values()) == pytest.approx(1)


def test_two_pools_pay_for_all_gpus() -> None:
    found = served(disaggregated=True)
    bill, (prefill, decode) = found.serving.bill, found.serving.pools
    assert bill.usd == pytest.approx(
        (prefill.gpu_s * prefill.usd_per_gpu_hour + decode.gpu_s * decode.usd_per_gpu_hour) / 3600, rel=1e-12
    )
    assert prefill.shares == pytest.approx(found.prefill.passes[0].coverage())
    assert decode.shares == found.decode.step.coverage()
    assert (prefill.usd_per_gpu_hour, decode.usd_per_gpu_hour) == (2.0, 2.9)  # each pool its own GPU and price
    assert (prefill.replica_gpus, decode.replica_gpus) == (32, 8)
    alone = found.decode.usd_per_mtok_output
    assert bill.usd_per_mtok_output_decode_gpus_only == pytest.approx(alone, rel=1e-12)
    assert bill.usd_per_mtok_output > 1.3 * alone  # what a figure of decode GPUs hides
    assert found.tokens_per_s_per_user == found.decode.tokens_per_s_per_user
    # 61 layers x 4096 latents of 576 values in FP8 over 50 GB/s
    assert found.hand_over_s == pytest.approx(61 * 4096 * 576 / 50e9 / 0.8 + 10e-6)
    assert found.first_token_s == found.prefill.time_s + found.hand_over_s
    # at the ratio both pools are as busy
    load = found.serving.gpus_for(7)
    assert load["prefill"] / load["decode"] == pytest.approx(found.serving.prefill_gpus_per_decode_gpu)
    requests_per_s = {name: load[name] / each.gpu_s for name, each in (("prefill", prefill), ("decode", decode))}
    assert requests_per_s == pytest.approx({"prefill": 7, "decode": 7})


def test_group_gpus_are_all_paid() -> None:
    """A tensor-parallel group of four takes four GPUs for the pass."""
    request = Request(2048, 0, 64)
    found = prefill_work(studied("qwen3-235b-a22b", "h200", "vllm", "tp4-dp2-ep8", 8, request), request, 2048)
    assert found.gpu_s == pytest.approx(4 * found.time_s)
    assert found.prompts == 1


def test_cached_tokens_cost_less_than_new_ones_but_never_nothing() -> None:
    bills = [
        served(disaggregated=False, request=Request(8192, cached, 64), budget=8192 - cached).serving.bill
        for cached in (0, 256, 2048, 6144)
    ]
    assert bills[0].usd_per_mtok_input_cached is None
    for bill in bills[1:]:
        assert bill.usd_per_mtok_input_cached is not None
        assert 0 < bill.usd_per_mtok_input_cached < bill.usd_per_mtok_input_new
    assert bills[0].usd > bills[1].usd > bills[2].usd > bills[3].usd


def test_long_prompts_are_prefilled_in_chunks() -> None:
    """A chunk's time over earlier tokens is the cached ones' by their share of these tokens."""
    request = Request(10_000, 2_000, 64)
    plan = studied("deepseek-v3", "h200", "trtllm", "dp8-ep8", 8, request)
    found = prefill_work(plan, request, 3000)
    assert [(each.new_tokens, each.cached_tokens, each.sequences) for each in found.passes] == [
        (3000, 2000, 1), (3000, 5000, 1), (2000, 8000, 1),
    ]  # fmt: skip
    first, second, third = found.passes
    cached_s = first.cached_s + second.cached_s * 2 / 5 + third.cached_s * 2 / 8
    assert found.cached_s == pytest.approx(cached_s, rel=1e-12)
    assert found.time_s == pytest.approx(sum(each.time_s for each in found.passes))
    assert sum(found.gpu_s_of().values()) == pytest.approx(found.gpu_s, rel=1e-12)
    for kind, share in found.coverage().items():
        by_time = sum(each.coverage()[kind] * each.time_s for each in found.passes) / found.time_s
        assert share == pytest.approx(by_time, rel=1e-12)
    assert sum(found.coverage().values()) == pytest.approx(1)
    # each chunk projects cached latents up again
    assert found.time_s > prefill_work(plan, request, 8000).time_s


def test_prompts_share_a_pass_as_far_as_budget_and_memory_go() -> None:
    request = Request(300, 0, 64)
    plan = studied("gpt-oss-120b", "h100", "vllm", "tp2", 8, request)
    assert [prefill_work(plan, request, budget).prompts for budget in (1, 299, 300, 900, 1199)] == [1, 1, 1, 3, 3]
    together, apart = prefill_work(plan, request, 2400), prefill_work(plan, request, 300)
    assert together.prompts == 8
    assert together.gpu_s < apart.gpu_s
    long = Request(100_000, 99_900, 64)
    held = prefill_work(studied("gpt-oss-120b", "h100", "vllm", "tp2", 1, long), long, 8192).prompts
    assert 1 < held < 81  # 81 prompts are within the budget; their caches do not fit


def test_activations_of_a_pass_must_fit_the_reserve() -> None:
    model = load_model("deepseek-v3")
    alone = Deployment(8, 1, 8, get_precision("fp8"), 1, 1)
    # residual and input, and the eight rows per token that reach a rank's experts: hidden in, 2048 between
    assert activation_bytes(model, alone, 1000) == 1000 * (2 * 7168 + 8 * (7168 + 2048)) * 2
    split = Deployment(8, 8, 8, get_precision("fp8"), 1, 1)  # one of the eight
    assert activation_bytes(model, split, 1000) == 1000 * (2 * 7168 + 1 * (7168 + 2048)) * 2
    llama = Deployment(8, 8, 8, get_precision("bf16"), 1, 1)  # its dense layers are the widest
    assert activation_bytes(load_model("llama-4-maverick"), llama, 10) == 10 * (2 * 5120 + 3 * 16384 / 8) * 2
    qwen = Deployment(1, 1, 1, get_precision("bf16"), 1, 1)
    assert activation_bytes(load_model("qwen3-30b-a3b"), qwen, 10) == 10 * (2 * 2048 + 8 * (2048 + 768)) * 2
    request = Request(1000, 0, 10)
    plan = studied("deepseek-v3", "h200", "sglang", "dp8-ep8", 8, request)
    assert prefill_work(plan, request, 24_000).prompts == 24
    with pytest.raises(
        ValueError, match=r"token_budget: expected passes .* reserve's 4.0 GiB; 25000 tokens need 4.1 G"
    ):
        prefill_work(plan, request, 25_000)


def test_predictions_refuse_what_cannot_be() -> None:
    decode = studied("deepseek-v3", "h200", "sglang", "dp8-ep8", 64, LONG)
    with pytest.raises(ValueError, match="context: expected the request's 4352; got 4096"):
        predict(replace(decode, sweep=replace(decode.sweep, context=4096)), None, LONG)
    for budget in (0, -5, 1.5):
        with pytest.raises(ValueError, match="token_budget: expected a whole number of at least 1"):
            predict(decode, None, LONG, token_budget=budget)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="utilisation: expected a share"):
        predict(decode, None, LONG, utilisation=1.5)
    huge = Request(160_000, 0, 64)
    small = studied("deepseek-v3", "h100", "sglang", "dp8-ep8", 1, huge)
    with pytest.raises(DoesNotFit, match="memory: deepseek-v3 in fp8 on 8 x h100"):
        prefill_work(small, huge)
