"""The plain formula and its golden cases; dollars attributed to ops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.published import PublishedData
from tokenfab.bench.step_time import published_step
from tokenfab.costing.cost import (
    StepCost,
    joules_per_token,
    plain_price,
    tokens_per_s_for,
    tokens_per_s_per_mw,
    usd_per_mtok,
)
from tokenfab.costing.prices import PriceBook, stated_price

DAY_S = 86_400


def test_deepseek_day_closes() -> None:
    """deepseek-ai/open-infra-index, day 6: 226.75 nodes at 8 x $2, 608e9 tokens in, 168e9 out, $87,072."""
    node_days = 608e9 / (73.7e3 * DAY_S) + 168e9 / (14.8e3 * DAY_S)
    assert node_days == pytest.approx(226.9, abs=0.05)
    node_usd_per_hour = 8 * PriceBook.read().look_up("h800", "rent").usd_per_gpu_hour
    assert usd_per_mtok(73.7e3, node_usd_per_hour) == pytest.approx(0.060, abs=0.0005)
    assert usd_per_mtok(14.8e3, node_usd_per_hour) == pytest.approx(0.300, abs=0.0005)
    day_usd_per_hour = 226.75 * node_usd_per_hour
    assert day_usd_per_hour * 24 == pytest.approx(87_072, abs=0.5)
    assert usd_per_mtok((608e9 + 168e9) / DAY_S, day_usd_per_hour) == pytest.approx(0.112, abs=0.0005)
    assert usd_per_mtok(168e9 / DAY_S, day_usd_per_hour) == pytest.approx(0.518, abs=0.0005)


def test_claimed_h200_price_needs_93_tokens_per_s() -> None:
    """NVIDIA's table (2026-04-15) says 90 tokens/s/GPU and $4.20; at $1.41 that is 93.2."""
    assert usd_per_mtok(93.2, 1.41) == pytest.approx(4.20, abs=0.005)
    assert tokens_per_s_for(4.20, 1.41) == pytest.approx(93.2, abs=0.1)
    assert tokens_per_s_per_mw(93.2, 1.73) == pytest.approx(54e3, rel=0.005)


def test_sglang_on_96_gpus_implies_its_price() -> None:
    """LMSYS (2025-05-05): 22.3k output tokens/s per node and $0.20/M imply $2.007 per GPU-hour."""
    assert usd_per_mtok(22.3e3 / 8, 2.007) == pytest.approx(0.20, abs=0.0005)


@given(st.floats(1e-3, 1e9), st.floats(1e-3, 1e6))
def test_price_and_throughput_are_inverse(tokens_per_s: float, usd_per_hour: float) -> None:
    price = usd_per_mtok(tokens_per_s, usd_per_hour)
    assert tokens_per_s_for(price, usd_per_hour) == pytest.approx(tokens_per_s, rel=1e-12)
    # watts are joules per second: 1 kW for 1 token/s is 1000 J per token
    assert joules_per_token(tokens_per_s, 1.0) * tokens_per_s == pytest.approx(1000)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_r27_absurd_values_are_errors_never_free_or_infinite(value: float) -> None:
    for call in (
        lambda: usd_per_mtok(value, 1.0),
        lambda: usd_per_mtok(1.0, value),
        lambda: tokens_per_s_for(value, 1.0),
        lambda: tokens_per_s_per_mw(1.0, value),
        lambda: joules_per_token(value, 1.0),
        lambda: plain_price(1.0, 1.0, value),
    ):
        with pytest.raises(ValueError, match="expected a positive number"):
            call()


@pytest.fixture(scope="module")
def cost(published: PublishedData) -> StepCost:
    gpu = get_gpu("h200")
    deployment = Deployment(8, 1, 8, get_precision("fp8"), 64, 4096)
    step = published_step(published, load_model("deepseek-v3"), gpu, published.stack(gpu, "sglang"), deployment)
    return StepCost(step, PriceBook.read().look_up("h200", "rent_3yr"))


def test_throughput_and_price_follow_from_the_step(cost: StepCost) -> None:
    assert cost.tokens_per_s_per_gpu == pytest.approx(64 / cost.step.step_s)
    assert cost.tokens_per_s_per_user == pytest.approx(1 / cost.step.step_s)
    assert cost.usd_per_mtok_output == pytest.approx(2.90 / 3600 * cost.step.step_s / 64 * 1e6)
    assert cost.joules_per_token == pytest.approx(1370 * cost.step.step_s / 64)


def test_every_microsecond_has_a_price(cost: StepCost) -> None:
    ops = cost.ops()
    assert sum(op.usd_per_mtok for op in ops) == pytest.approx(cost.usd_per_mtok_output, rel=1e-12)
    assert sum(op.share for op in ops) == pytest.approx(1, rel=1e-12)
    for op in ops:
        at_floor = (op.timed.time_s - op.timed.floor_s) / cost.step.step_s * cost.usd_per_mtok_output
        assert op.saving_usd_per_mtok == pytest.approx(max(0, at_floor))


def test_row_below_its_floor_saves_nothing(cost: StepCost) -> None:
    """Weights that stayed in L2: no kernel at its roofline would make it cheaper."""
    first, *rest = cost.step.ops
    warm = replace(cost, step=replace(cost.step, ops=(replace(first, floor_s=2 * first.time_s), *rest)))
    assert warm.ops()[0].saving_usd_per_mtok == 0


def test_kept_tokens_not_drafted_ones_are_sold(published: PublishedData) -> None:
    gpu = get_gpu("h200")
    deployment = Deployment(8, 1, 8, get_precision("fp8"), 64, 4096, tokens_per_step=2, kept_tokens_per_step=1.8)
    step = published_step(published, load_model("deepseek-v3"), gpu, published.stack(gpu, "trtllm"), deployment)
    found = StepCost(step, stated_price("h200", 2.0))
    assert found.tokens_per_s_per_gpu == pytest.approx(64 * 1.8 / step.step_s)
    assert found.tokens_per_s_per_user == pytest.approx(1.8 / step.step_s)
    assert found.joules_per_token is None


def test_row_far_from_its_roofline_is_pointed_out(published: PublishedData) -> None:
    """vLLM's block-scaled GEMM on GB300 takes 454 us where its roofline is 4 us."""
    gpu = get_gpu("gb300")
    deployment = Deployment(8, 8, 1, get_precision("fp8"), 2, 4096)
    step = published_step(published, load_model("deepseek-v3"), gpu, published.stack(gpu, "vllm"), deployment)
    names = [op.timed.call.name for op in StepCost(step, stated_price("gb300", 5.0)).suspects()]
    assert "shared_gate_up" in names
    assert "experts" not in names
