"""The cheapest deployment against a search through all of them, and the limit that binds by lifting each."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.costing.prices import stated_price
from tokenfab.costing.workload.deploy import (
    MEMORY,
    NONE,
    TOKENS_PER_S_PER_USER,
    TTFT,
    WHOLE_REPLICAS,
    DecodePool,
    Limits,
    Options,
    PrefillPool,
    Workload,
    aggregated,
    cheapest,
    choose,
    disaggregated,
)
from tokenfab.costing.workload.queueing import waits_s

FP8 = get_precision("fp8")


def deployment(gpus: int, tp: int = 1, batch: float = 8) -> Deployment:
    return Deployment(gpus, tp, gpus, FP8, batch, 4096)


def decode(gpus: int, batch: float, step_s: float, usd: float = 2.0, *, tp: int = 1, fits: bool = True) -> DecodePool:
    """A step of so many seconds."""
    made: Any = SimpleNamespace(
        step=SimpleNamespace(deployment=deployment(gpus, tp, batch), step_s=step_s),
        price=stated_price("h100", usd), tokens_per_s_per_user=1 / step_s,
    )  # fmt: skip
    return DecodePool(made, fits)


def prefill(workload: Workload, gpus: int, s_per_token: float, usd: float = 2.0, *, tp: int = 1) -> PrefillPool:
    return PrefillPool(deployment(gpus, tp), workload.new_tokens * s_per_token, usd, 0.0)


@pytest.fixture
def workload() -> Workload:
    generator = np.random.default_rng(1)
    size = 4000
    inputs = generator.integers(200, 8000, size)
    return Workload(
        np.cumsum(generator.exponential(0.05, size)), inputs, inputs // 4, generator.integers(10, 900, size)
    )


def test_an_aggregated_pool_by_hand(workload: Workload) -> None:
    one, step = prefill(workload, 4, 1e-4), decode(4, 16, 0.02)
    rate = (len(workload.arrival_s) - 1) / (workload.arrival_s[-1] - workload.arrival_s[0])
    service = (workload.input_tokens - workload.cached_tokens).mean() * 1e-4
    output_s = workload.output_tokens.mean() * 0.02 / 16
    groups = rate * (service + output_s)
    served = aggregated(workload, one, step, Limits())
    assert served is not None
    assert served.decode_replicas == math.ceil(groups / 4)
    assert served.prefill_replicas == 0
    assert served.gpus == 4 * served.decode_replicas
    assert served.tokens_per_s_per_user == pytest.approx(50 * (1 - rate * service / (4 * served.decode_replicas)))
    assert served.usd_per_hour == 2.0 * served.gpus
    assert served.load == pytest.approx(groups / (4 * served.decode_replicas))
    per_request = served.usd_per_hour / 3600 / rate
    assert served.usd_per_mtok_output == pytest.approx(per_request / workload.output_tokens.mean() * 1e6)
    assert served.usd_per_mtok_total == pytest.approx(
        per_request / (workload.input_tokens + workload.output_tokens).mean() * 1e6
    )
    ttft = waits_s(workload.arrival_s, one.service_s, 4 * int(served.decode_replicas)) + one.service_s + 0.02
    assert served.ttft_s == pytest.approx(np.quantile(ttft, 0.9))


def test_a_faster_user_leaves_less_time_for_prefill(workload: Workload) -> None:
    one, step = prefill(workload, 4, 2e-4), decode(4, 64, 0.02)
    free, held = (aggregated(workload, one, step, Limits(rate)) for rate in (0.0, 45.0))
    assert free is not None
    assert held is not None
    assert free.tokens_per_s_per_user < 45 <= held.tokens_per_s_per_user
    fewer = replace(held, decode_replicas=held.decode_replicas - 1)
    groups = 4 * fewer.decode_replicas
    assert 50 * (1 - workload.requests_per_s * one.mean_s / groups) < 45  # one replica less does not do
    assert aggregated(workload, one, step, Limits(50.0)) is None


def test_two_pools_by_hand(workload: Workload) -> None:
    one, step = prefill(workload, 2, 1e-4, usd=3.0, tp=2), decode(8, 16, 0.02)
    served = disaggregated(workload, one, step, Limits(), 0.25)
    assert served is not None
    rate, output_s = workload.requests_per_s, workload.output_tokens.mean() * 0.02 / 16
    assert served.prefill_replicas == math.ceil(rate * one.mean_s)
    assert served.decode_replicas == math.ceil(rate * output_s / 8)
    assert served.gpus == 2 * served.prefill_replicas + 8 * served.decode_replicas
    assert served.usd_per_hour == 3.0 * 2 * served.prefill_replicas + 2.0 * 8 * served.decode_replicas
    assert served.tokens_per_s_per_user == 50
    ttft = waits_s(workload.arrival_s, one.service_s, int(served.prefill_replicas)) + one.service_s + 0.25
    assert served.ttft_s == pytest.approx(np.quantile(ttft, 0.9))


@pytest.mark.parametrize("max_ttft_s", [1.0, 0.8, 0.7, 0.6])
def test_the_fewest_replicas_that_hold_the_time_to_first_token(workload: Workload, max_ttft_s: float) -> None:
    one, step = prefill(workload, 1, 1e-4), decode(1, 64, 0.02)
    served = disaggregated(workload, one, step, Limits(0.0, max_ttft_s))
    assert served is not None
    assert served.ttft_s <= max_ttft_s

    def holds(replicas: int) -> bool:
        ttft = waits_s(workload.arrival_s, one.service_s, replicas) + one.service_s
        return bool(np.quantile(ttft, 0.9) <= max_ttft_s)

    assert next(n for n in range(1, 1000) if holds(n) and n >= workload.requests_per_s * one.mean_s) == (
        served.prefill_replicas
    )
    assert disaggregated(workload, one, step, Limits(0.0, 0.1)) is None  # the prefill itself takes longer


def options(workload: Workload, seed: int) -> list[Options]:
    generator = np.random.default_rng(seed)
    found = []
    for usd in (2.0, 3.0):
        splits = [(1, 1), (4, 1), (4, 4), (8, 2)]
        prefills = [prefill(workload, g, generator.uniform(0.5, 2) * 1e-4 / tp, usd, tp=tp) for g, tp in splits]
        decodes = [
            decode(g, batch, generator.uniform(0.005, 0.02) * (1 + batch / 32) / tp, usd, tp=tp, fits=batch < 64)
            for g, tp in splits for batch in (4, 16, 32, 64)
        ]  # fmt: skip
        found.append(Options(prefills, decodes, 0.05))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [Limits(), Limits(30.0), Limits(0.0, 0.8), Limits(60.0, 0.6, 0.95)])
def test_the_cheapest_is_that_of_a_search_through_all(workload: Workload, seed: int, limits: Limits) -> None:
    bills = []
    for option in options(workload, seed):
        for one in option.prefill:
            for step in option.decode:
                if not step.fits:
                    continue
                bills.append(disaggregated(workload, one, step, limits, option.hand_over_s))
                same = (one.deployment.gpus, one.deployment.attention_tp)
                if same == (step.deployment.gpus, step.deployment.attention_tp):
                    bills.append(aggregated(workload, one, step, limits))
    least = min((served.usd_per_hour for served in bills if served), default=None)
    found = cheapest(workload, options(workload, seed), limits)
    assert (found and found.usd_per_hour) == least
    if found:
        assert found.tokens_per_s_per_user >= limits.min_tokens_per_s_per_user
        assert found.decode.fits


def test_the_binding_limit_is_named(workload: Workload) -> None:
    # a small batch is fast and dear, a large one slow and cheap, a larger one does not fit
    one = prefill(workload, 1, 1e-5)
    steps = [decode(1, 1, 0.01), decode(1, 32, 0.04), decode(1, 256, 0.2, fits=False)]
    offered = [Options([one], steps, 0.0)]

    def binding(limits: Limits) -> str:
        choice = choose(workload, offered, limits)
        assert choice is not None
        assert choice.binding == NONE or choice.saved[choice.binding] == max(choice.saved.values())
        return choice.binding

    assert binding(Limits(80.0)) == TOKENS_PER_S_PER_USER
    assert binding(Limits(0.0)) == MEMORY
    slow = [Options([prefill(workload, 1, 1e-4)], [decode(1, 256, 0.01)], 0.0)]
    tight = choose(workload, slow, Limits(0.0, 0.6))
    assert tight is not None
    assert tight.binding == TTFT
    loose = choose(workload, slow, Limits())
    assert loose is not None
    assert loose.saved[TTFT] == loose.saved[MEMORY] == loose.saved[TOKENS_PER_S_PER_USER] == 0.0
    wide = [Options([prefill(workload, 64, 1e-4)], [decode(64, 256, 0.01)], 0.0)]
    much = choose(workload, wide, Limits())
    assert much is not None
    assert much.binding == WHOLE_REPLICAS
    assert much.saved[WHOLE_REPLICAS] == pytest.approx(1 - much.served.load, abs=1e-9)
    assert choose(workload, slow, Limits(1e6)) is None


def test_nothing_binds_where_nothing_saves(workload: Workload) -> None:
    exact = workload.requests_per_s * workload.mean_output_tokens / 40  # 40 groups, less what prefill takes
    step_s = 256 / exact * (1 - 1e-3)
    choice = choose(workload, [Options([prefill(workload, 1, 1e-12)], [decode(1, 256, step_s)], 0.0)], Limits())
    assert choice is not None
    assert choice.served.decode_replicas == 40
    assert choice.binding == NONE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(-1.0), "min_tokens_per_s_per_user: expected 0 or more; got -1.0"),
        (lambda: Limits(math.nan), "min_tokens_per_s_per_user: expected 0 or more; got nan"),
        (lambda: Limits(0.0, 0.0), "max_ttft_s: expected more than 0; got 0.0"),
        (lambda: Limits(0.0, math.inf), "max_ttft_s: expected more than 0; got inf"),
        (lambda: Limits(ttft_percentile=1.0), "ttft_percentile: expected a share between 0 and 1; got 1.0"),
        (lambda: made([], [], [], []), r"trace: expected at least two requests; got \[0, 0, 0, 0\]"),
        (lambda: made([0, 1], [2, 2], [0], [1, 1]), r"trace: expected at least two requests; got \[2, 2, 1, 2\]"),
        (lambda: made([1, 0], [2, 2], [0, 0], [1, 1]), "trace: expected finite timestamps in order"),
        (lambda: made([1, 1], [2, 2], [0, 0], [1, 1]), "trace: .* all have one timestamp"),
        (lambda: made([0, 1], [2, 2], [2, 0], [1, 1]), "trace: expected 1 or more new and output tokens"),
        (lambda: made([0, 1], [2, 2], [0, -1], [1, 1]), "trace: expected 1 or more new and output tokens"),
        (lambda: made([0, 1], [2, 2], [0, 0], [1, 0]), "trace: expected 1 or more new and output tokens"),
    ],
)
def test_what_cannot_be_is_said(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def made(*columns: list[int]) -> Workload:
    return Workload(*(np.array(column, dtype=float) for column in columns))
