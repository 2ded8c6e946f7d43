"""Pools of real models: prefill between lengths against exact passes, the hand-over by hand, what fits and what not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.memory import kv_bytes_per_sequence, largest_batch
from tokenfab.bench.models import load_model
from tokenfab.bench.prefill_time import prefill_time
from tokenfab.bench.step_time import step_time
from tokenfab.costing.study import Study, study
from tokenfab.costing.sweep import Parallel
from tokenfab.costing.workload.cheapest import Options
from tokenfab.costing.workload.deploy import Workload
from tokenfab.costing.workload.pools import (
    between,
    exact_service_s,
    hand_over_s,
    lengths,
    options,
    pass_times,
)


def trace(size: int = 300, longest: int = 60_000, cached_share: float = 0.5, seed: int = 0) -> Workload:
    """Lengths over three decades; half of the requests with cached tokens."""
    generator = np.random.default_rng(seed)
    inputs = np.rint(np.exp(generator.uniform(np.log(100), np.log(longest), size))).astype(int)
    cached = np.where(generator.random(size) < cached_share, (inputs * generator.uniform(0, 0.95, size)).astype(int), 0)
    return Workload(
        np.cumsum(generator.exponential(0.3, size)), inputs, np.minimum(cached, inputs - 1),
        generator.integers(10, 900, size),
    )  # fmt: skip


def asked(model: str, gpu: str, stack: str, workload: Workload, *parallels: str, **more: Any) -> Study:
    return study(model, [gpu], [stack], list(parallels), more.pop("batches", None), context=workload.context, **more)


@pytest.mark.parametrize(
    ("model", "gpu", "stack", "parallel"),
    [
        ("deepseek-v3", "h200", "sglang", "dp8-ep8"),
        ("deepseek-v3", "gb200", "trtllm", "tp8-ep8"),
        ("deepseek-v3.2", "b200", "sglang", "tp8"),
        ("gpt-oss-120b", "h100", "vllm", "tp2"),
        ("qwen3-235b-a22b", "h200", "vllm", "tp4"),
    ],
)
def test_prefills_between_lengths_are_near_passes_of_their_own(model: str, gpu: str, stack: str, parallel: str) -> None:
    workload = trace(longest=30_000)
    asked_for = asked(model, gpu, stack, workload, parallel)
    found = options(asked_for, workload)[0]
    pool = found.prefill[0]
    data, chip = asked_for.data, get_gpu(gpu)
    stacked = data.stack(chip, stack)
    exact = np.array([
        prefill_time(
            data, load_model(model), chip, stacked, pool.deployment, new_tokens=int(new), cached_tokens=int(cached),
            check_memory=False,
        ).time_s
        for new, cached in zip(workload.new_tokens, workload.cached_tokens, strict=True)
    ])  # fmt: skip
    error = np.abs(pool.service_s / exact - 1)
    assert np.median(error) < 0.015
    assert np.quantile(error, 0.95) < 0.12  # a step at a tile's edge lies between two lengths
    assert pool.mean_s == pytest.approx(exact.mean(), rel=0.015)
    cached = workload.cached_tokens > 0
    assert pool.service_s[cached].sum() == pytest.approx(exact[cached].sum(), rel=0.02)
    assert sum(pool.shares.values()) == pytest.approx(1)
    assert pool.shares["modelled"] > 0
    assert "measured" not in pool.shares  # between lengths nothing is


def made_up(new_power: float, cached_s: float) -> Any:
    """Passes that go with a power of the new tokens, and with new x cached; half of the former measured."""

    def time(new: int, cached: int) -> Any:
        base = 1e-6 * new**new_power
        calls = [("dense", base / 2, "measured"), ("experts", base / 2, "interpolated")]
        calls += [("cached_attention", cached_s * new * cached, "modelled")] if cached else []
        ops = [SimpleNamespace(call=SimpleNamespace(name=n), time_s=t, provenance=p) for n, t, p in calls]
        return SimpleNamespace(ops=ops, time_s=sum(op.time_s for op in ops))

    return time


@pytest.mark.parametrize("power", [1.0, 1.7])
def test_powers_of_lengths_are_exact(power: float) -> None:
    workload, time = trace(), made_up(power, 1e-9)
    times = pass_times(time, workload, 163_840)
    found, shares = times.of(workload.new_tokens, workload.cached_tokens)
    assert found == pytest.approx(exact_service_s(time, workload.new_tokens, workload.cached_tokens), rel=1e-9)
    over_cached = 1e-9 * (workload.new_tokens * workload.cached_tokens).sum()
    base = 1e-6 * (workload.new_tokens**power).sum()
    assert shares == pytest.approx(
        {"interpolated": base / (base + over_cached), "modelled": over_cached / (base + over_cached)}
    )
    assert sum(times.new_s.values()) == pytest.approx(1e-6 * times.new**power)


def test_no_pass_is_longer_than_the_context() -> None:
    workload = trace(longest=60_000)
    most = int((workload.input_tokens + workload.output_tokens).max())
    assert workload.new_tokens.max() + workload.cached_tokens.max() > most  # the corner of the grid
    inner = made_up(1.0, 1e-9)

    def time(new: int, cached: int) -> Any:
        assert 1 <= new + cached < most
        return inner(new, cached)

    found, _ = pass_times(time, workload, most).of(workload.new_tokens, workload.cached_tokens)
    assert found == pytest.approx(exact_service_s(time, workload.new_tokens, workload.cached_tokens), rel=1e-9)


def test_without_cached_tokens_nothing_is_paid_for_them() -> None:
    workload = trace(cached_share=0.0)
    found, shares = pass_times(made_up(1.0, 1.0), workload, 10**6).of(workload.new_tokens, workload.cached_tokens)
    assert found == pytest.approx(1e-6 * workload.new_tokens)
    assert shares == {"interpolated": pytest.approx(1)}


def test_grids_reach_from_end_to_end() -> None:
    grid = lengths(np.array([7, 1000, 90_000]), 2**0.5)
    assert (grid[0], grid[-1]) == (7, 90_000)
    assert (grid[1:] / grid[:-1]).max() < 1.6
    assert list(lengths(np.array([5, 5]), 2.0)) == [5]
    assert list(between(np.array([5]), np.array([3.0]), np.array([5, 5]))) == [3.0, 3.0]
    assert list(between(np.array([1, 4, 16]), np.array([0.0, 1.0, 3.0]), np.array([1, 2, 4, 8, 16]))) == pytest.approx(
        [0, 0.5, 1, 2, 3]
    )


def test_the_hand_over_by_hand() -> None:
    inputs = np.array([100, 4096, 60_000])
    one = asked("deepseek-v3", "h200", "vllm", trace(), "dp8-ep8").sweep.deployment(Parallel.parse("dp8-ep8"), 1)
    moved = 61 * 576 * inputs  # FP8 latents
    assert hand_over_s(load_model("deepseek-v3"), get_gpu("h200"), one, inputs) == pytest.approx(
        moved / 50e9 / 0.8 + 10e-6
    )
    assert hand_over_s(load_model("deepseek-v3"), get_gpu("gb200"), one, inputs) == pytest.approx(
        moved / 900e9 / 0.8 + 10e-6
    )


@pytest.mark.parametrize("parallel", ["tp1", "tp4"])
def test_windows_are_handed_over_too(parallel: str) -> None:
    model, inputs = load_model("gpt-oss-120b"), np.array([1, 100, 128, 129, 5000])
    one = asked("gpt-oss-120b", "h100", "vllm", trace(), parallel).sweep.deployment(Parallel.parse(parallel), 1)
    split = {"tp1": 1, "tp4": 4}[parallel]
    expected = [kv_bytes_per_sequence(model, int(each), one.precision, split) / 50e9 / 0.8 + 10e-6 for each in inputs]
    assert hand_over_s(model, get_gpu("h100"), one, inputs) == pytest.approx(expected)


@pytest.fixture(scope="module")
def offered() -> tuple[Study, Workload, Options]:
    workload = trace()
    asked_for = asked("deepseek-v3", "h200", "sglang", workload, "tp8", "tp2", "tp3", "dp8-ep8", tokens_per_step=2,
                      kept_tokens=1.8)  # fmt: skip
    return asked_for, workload, options(asked_for, workload, max_modelled=1.0)[0]


def test_every_decode_step_is_the_study_s(offered: tuple[Study, Workload, Options]) -> None:
    asked_for, workload, option = offered
    data, gpu, model = asked_for.data, get_gpu("h200"), load_model("deepseek-v3")
    stack = data.stack(gpu, "sglang")
    longest = int((workload.input_tokens + workload.output_tokens).max())
    for pool in option.decode:
        one = pool.deployment
        assert (one.context, one.tokens_per_step, one.kept_tokens_per_step) == (workload.context, 2, 1.8)
        assert pool.step_s == step_time(data, model, gpu, stack, one, check_memory=False).step_s
        assert pool.tokens_per_s_per_user == pytest.approx(1.8 / pool.step_s)
        assert pool.s_per_token == pytest.approx(pool.step_s / 1.8)
        assert pool.group_s_per_request(360) == pytest.approx(200 * pool.step_s / one.sequences)
        assert pool.cost.price.usd_per_gpu_hour == asked_for.price(gpu).usd_per_gpu_hour
        holds_longest = largest_batch(model, gpu, replace(one, context=longest)) >= 1
        assert pool.fits == (one.sequences <= largest_batch(model, gpu, one) and holds_longest)
    splits = {str(Parallel.of(pool.deployment)) for pool in option.decode}
    assert splits == {"tp8", "tp2", "dp8-ep8"}
    # memory can bind: what does not fit is offered too; the largest that fits is there
    assert {pool.fits for pool in option.decode} == {True, False}
    assert not any(pool.fits for pool in option.decode if pool.deployment.gpus == 2)
    of_tp8 = [pool.deployment for pool in option.decode if str(Parallel.of(pool.deployment)) == "tp8"]
    assert largest_batch(model, gpu, of_tp8[0]) in {one.sequences for one in of_tp8}
    assert any("tp3" in line and "divisor" in line for line in option.left_out)


def test_every_prefill_pool_is_priced_and_fits_or_not(offered: tuple[Study, Workload, Options]) -> None:
    _, workload, option = offered
    fits = {str(Parallel.of(pool.deployment)): pool.fits for pool in option.prefill}
    assert fits == {"tp8": True, "tp2": False, "dp8-ep8": True}
    for pool in option.prefill:
        assert pool.usd_per_gpu_hour == 2.9
        assert len(pool.service_s) == len(pool.hand_over_s) == len(workload.arrival_s)
        assert (pool.service_s > 0).all()


def test_batches_asked_for_are_per_gpu() -> None:
    workload = trace()
    found = options(asked("deepseek-v3", "h200", "sglang", workload, "tp8", batches=[2.0]), workload)[0]
    assert [pool.deployment.sequences for pool in found.decode] == [16]


def test_steps_that_are_mostly_modelled_are_left_out() -> None:
    workload = trace()
    few, all_ = (
        options(asked("deepseek-v3", "h200", "vllm", workload, "tp8", "dp8-ep8"), workload, max_modelled=most)[0]
        for most in (0.25, 1.0)
    )
    assert len(few.decode) < len(all_.decode)
    assert all(pool.cost.step.coverage()["modelled"] <= 0.25 for pool in few.decode)
    left = len(all_.decode) - len(few.decode)
    assert f"{left} decode steps with more than 25% of their time modelled" in few.left_out


def test_what_cannot_be_offered_is_said() -> None:
    long = trace(longest=60_000)
    with pytest.raises(
        ValueError, match=r"^trace: expected requests of at most qwen3-30b-a3b's 40960 tokens; \d+ of 300 "
    ):
        options(asked("qwen3-30b-a3b", "h100", "vllm", long, "tp1"), long)
    workload = trace()
    with pytest.raises(ValueError, match=r"^context: expected the trace's mean of \d+; got 4096"):
        options(study("deepseek-v3", ["h200"], ["vllm"], ["tp8"], None), workload)
    with pytest.raises(
        ValueError, match=r"nothing can serve: 11 decode steps with more than 0% of their time modelled$"
    ):
        options(asked("deepseek-v3", "h200", "vllm", workload, "tp8"), workload, max_modelled=0.0)
    with pytest.raises(ValueError, match=r"^deepseek-v3: nothing can serve: tp8: precision: nvfp4"):
        options(asked("deepseek-v3", "h200", "vllm", workload, "tp8", precision="nvfp4"), workload)


def test_the_longest_request_must_fit_alone() -> None:
    """130,000 latents of Kimi-K2 in FP8 take 4.6 GB; beside weights and reserve 16 H100 have 3.4 each."""
    inputs = np.array([1000] * 199 + [130_000])
    outputs = np.array([500] * 199 + [1])
    workload = Workload(np.arange(200.0), inputs, np.zeros(200, int), outputs)
    model, gpu = load_model("kimi-k2"), get_gpu("h100")
    study_ = asked("kimi-k2", "h100", "sglang", workload, "dp16-ep16", batches=[1.0])
    found = options(study_, workload, max_modelled=1.0)[0]
    one = found.decode[0].deployment
    assert one.sequences <= largest_batch(model, gpu, one)
    assert largest_batch(model, gpu, replace(one, context=130_001)) == 0
    assert not found.decode[0].fits
    assert not found.prefill[0].fits
