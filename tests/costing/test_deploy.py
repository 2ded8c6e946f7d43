"""What serves a trace, against hand counts, an event simulation and a search through all; limits by lifting each."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenfab.costing.workload.cheapest import (
    MEMORY,
    NONE,
    TOGETHER,
    TOKENS_PER_S_PER_USER,
    TTFT,
    WHOLE_REPLICAS,
    Options,
    Search,
    cheapest,
    choose,
    lift,
)
from tokenfab.costing.workload.deploy import (
    Limits,
    PrefillPool,
    Workload,
)
from tokenfab.costing.workload.fleet import aggregated, disaggregated, ttft_s
from tokenfab.tests.costing.made_up_pools import decode, load, options, prefill


def simulated_ttft(
    workload: Workload, pool: PrefillPool, groups: int, more_s: np.ndarray | float, place_s: np.ndarray, places: int
) -> np.ndarray:
    """An event simulation: requests arrive, prefill, are handed over and wait for a place of decode."""
    more = np.broadcast_to(more_s, workload.arrival_s.shape)
    events = [(float(at), 2, index, "arrives") for index, at in enumerate(workload.arrival_s)]
    heapq.heapify(events)
    queues: dict[str, deque[int]] = {"prefill": deque(), "place": deque()}
    free, first = {"prefill": groups, "place": places}, np.zeros(len(workload.arrival_s))
    while events:
        now, _, index, what = heapq.heappop(events)
        if what == "arrives":
            queues["prefill"].append(index)
        elif what == "prefilled":
            free["prefill"] += 1
            heapq.heappush(events, (now + more[index], 2, index, "handed over"))
        elif what == "handed over":
            queues["place"].append(index)
        else:
            free["place"] += 1
        while queues["prefill"] and free["prefill"]:
            one = queues["prefill"].popleft()
            free["prefill"] -= 1
            heapq.heappush(events, (now + pool.service_s[one], 1, one, "prefilled"))
        while queues["place"] and free["place"]:
            one = queues["place"].popleft()
            free["place"] -= 1
            first[one] = now
            heapq.heappush(events, (now + place_s[one], 0, one, "done"))
    return first - workload.arrival_s


@pytest.fixture
def workload() -> Workload:
    return load()


def test_the_mean_context_is_that_of_a_step() -> None:
    """10 steps at 100 to 110 tokens and 30 at 1000 to 1030, half of which is cached."""
    assert made([0, 1], [100, 1000], [0, 500], [10, 30]).context == round((10 * 105 + 30 * 1015) / 40)


@pytest.mark.parametrize(("batch", "step_s"), [(16, 0.02), (2, 0.0027)])
def test_an_aggregated_pool_by_hand(workload: Workload, batch: int, step_s: float) -> None:
    one, step = prefill(workload, 4, 1e-4), decode(4, batch, step_s)
    rate = (len(workload.arrival_s) - 1) / (workload.arrival_s[-1] - workload.arrival_s[0])
    service = (workload.input_tokens - workload.cached_tokens).mean() * 1e-4
    output_s = workload.output_tokens.mean() * step_s / batch
    groups = rate * (service + output_s)
    served = aggregated(workload, one, step, Limits())
    assert served is not None
    assert served.decode_replicas == math.ceil(groups / 4)
    assert served.prefill_replicas == 0
    assert served.gpus == 4 * served.decode_replicas
    assert served.tokens_per_s_per_user == pytest.approx(
        (1 / step_s) * (1 - rate * service / (4 * served.decode_replicas))
    )
    assert served.usd_per_hour == 2.0 * served.gpus
    assert served.prefill_load + served.decode_load == pytest.approx(groups / (4 * served.decode_replicas))
    per_request = served.usd_per_hour / 3600 / rate
    assert served.usd_per_mtok_output == pytest.approx(per_request / workload.output_tokens.mean() * 1e6)
    assert served.usd_per_mtok_total == pytest.approx(
        per_request / (workload.input_tokens + workload.output_tokens).mean() * 1e6
    )
    busy = workload.output_tokens * step_s / (1 - rate * service / (4 * served.decode_replicas))
    groups = 4 * int(served.decode_replicas)
    ttft = simulated_ttft(workload, one, groups, step_s, busy, batch * groups)
    assert served.ttft_s == pytest.approx(np.quantile(ttft, 0.9), rel=1e-9)
    of_prefill = service / (service + output_s)
    assert served.prefill_load == pytest.approx(rate * service / groups)
    assert served.shares == pytest.approx(
        {"interpolated": of_prefill, "measured": 0.75 * (1 - of_prefill), "modelled": 0.25 * (1 - of_prefill)}
    )


@pytest.mark.parametrize(("groups", "places"), [(8, 130), (10, 170), (300, 160), (7, 100_000)])
def test_every_request_s_time_to_first_token_is_that_of_a_simulation(
    workload: Workload, groups: int, places: int
) -> None:
    one = prefill(workload, 1, 1e-4, hand_over_s=0.5)
    busy = workload.output_tokens * 0.02
    found = ttft_s(workload, one, groups, one.hand_over_s, busy, places)
    assert found == pytest.approx(simulated_ttft(workload, one, groups, one.hand_over_s, busy, places), rel=1e-9)


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
    one, step = prefill(workload, 2, 1e-4, usd=3.0, tp=2, hand_over_s=0.25), decode(8, 16, 0.02)
    served = disaggregated(workload, one, step, Limits())
    assert served is not None
    rate, output_s = workload.requests_per_s, workload.output_tokens.mean() * 0.02 / 16
    assert served.prefill_replicas == math.ceil(rate * one.mean_s)
    assert served.decode_replicas == math.ceil(rate * output_s / 8)
    assert served.gpus == 2 * served.prefill_replicas + 8 * served.decode_replicas
    assert served.usd_per_hour == 3.0 * 2 * served.prefill_replicas + 2.0 * 8 * served.decode_replicas
    assert served.tokens_per_s_per_user == 50
    places = 16 * 8 * int(served.decode_replicas)
    more, busy = 0.125 * (1 + workload.input_tokens / workload.input_tokens.mean()), workload.output_tokens * 0.02
    ttft = simulated_ttft(workload, one, int(served.prefill_replicas), more, busy, places)
    assert served.ttft_s == pytest.approx(np.quantile(ttft, 0.9), rel=1e-9)
    assert served.prefill_load == pytest.approx(rate * one.mean_s / served.prefill_replicas)
    assert served.decode_load == pytest.approx(rate * output_s / (8 * served.decode_replicas))
    per_request = served.usd_per_hour / 3600 / rate
    assert served.usd_per_mtok_output == pytest.approx(per_request / workload.output_tokens.mean() * 1e6)
    gpu_s = 2 * one.mean_s, output_s  # a prefill group has two GPUs
    assert served.shares["interpolated"] == pytest.approx(gpu_s[0] / sum(gpu_s))
    assert sum(served.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("max_ttft_s", [1.0, 0.8, 0.7, 0.6])
@pytest.mark.parametrize(("batch", "step_s"), [(64, 0.02), (8, 0.005), (2, 0.004)])
def test_the_sizes_that_hold_the_time_to_first_token_and_cost_least(
    workload: Workload, max_ttft_s: float, batch: int, step_s: float
) -> None:
    one, step = prefill(workload, 1, 1e-4, usd=3.0, hand_over_s=0.02), decode(2, batch, step_s)
    served = disaggregated(workload, one, step, Limits(0.0, max_ttft_s))
    assert served is not None
    assert served.ttft_s <= max_ttft_s
    busy = workload.output_tokens * step_s
    least_p = math.ceil(workload.requests_per_s * one.mean_s)
    least_d = math.ceil(workload.requests_per_s * busy.mean() / batch / 2)
    found = int(served.prefill_replicas), int(served.decode_replicas)
    sizes = itertools.product(range(least_p, found[0] + 3), range(least_d, found[1] + 3))
    bill = min(
        3.0 * p + 4.0 * d for p, d in sizes
        if 3.0 * p + 4.0 * d <= served.usd_per_hour
        and np.quantile(simulated_ttft(workload, one, p, one.hand_over_s, busy, 2 * d * batch), 0.9) <= max_ttft_s
    )  # fmt: skip
    assert served.usd_per_hour == bill == 3.0 * found[0] + 4.0 * found[1]
    assert disaggregated(workload, one, step, Limits(0.0, max_ttft_s), bill) is None  # not below itself
    again = disaggregated(workload, one, step, Limits(0.0, max_ttft_s), bill + 0.01)
    assert again is not None
    assert again.usd_per_hour == bill
    assert disaggregated(workload, one, step, Limits(0.0, 0.1)) is None  # the prefill itself takes longer


@pytest.mark.parametrize("max_ttft_s", [2.0, 1.0, 0.8])
def test_one_pool_is_as_large_as_the_time_to_first_token_needs(workload: Workload, max_ttft_s: float) -> None:
    one, step = prefill(workload, 2, 1e-4), decode(2, 4, 0.01)
    served = aggregated(workload, one, step, Limits(20.0, max_ttft_s))
    assert served is not None
    work = workload.requests_per_s * one.mean_s

    def holds(replicas: int) -> bool:
        left = 1 - work / (2 * replicas)
        busy = workload.output_tokens * 0.01 / left
        ttft = simulated_ttft(workload, one, 2 * replicas, 0.01, busy, 8 * replicas)
        return 100 * left >= 20 and bool(np.quantile(ttft, 0.9) <= max_ttft_s)

    assert holds(int(served.decode_replicas))
    least = math.ceil((work + workload.requests_per_s * workload.output_tokens.mean() * 0.01 / 4) / 2)
    assert not any(holds(replicas) for replicas in range(least, int(served.decode_replicas)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [Limits(), Limits(30.0), Limits(0.0, 0.8), Limits(60.0, 0.6, 0.95)])
def test_the_cheapest_is_that_of_a_search_through_all(workload: Workload, seed: int, limits: Limits) -> None:
    bills = []
    for option in options(workload, seed):
        for one in option.prefill:
            for step in option.decode:
                if not step.fits:
                    continue
                if one.fits:
                    bills.append(disaggregated(workload, one, step, limits))
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
    offered = [Options("h100", "made up", [one], steps)]

    def binding(limits: Limits) -> str:
        choice = choose(workload, offered, limits)
        assert choice is not None
        assert choice.binding == NONE or choice.saved[choice.binding] == max(choice.saved.values())
        return choice.binding

    assert binding(Limits(80.0)) == TOKENS_PER_S_PER_USER
    assert binding(Limits(0.0)) == MEMORY
    slow = [Options("h100", "made up", [prefill(workload, 1, 1e-4)], [decode(1, 256, 0.01)])]
    tight = choose(workload, slow, Limits(0.0, 0.6))
    assert tight is not None
    assert tight.binding == TTFT
    loose = choose(workload, slow, Limits())
    assert loose is not None
    assert loose.saved[TTFT] == loose.saved[MEMORY] == loose.saved[TOKENS_PER_S_PER_USER] == 0.0
    wide = [Options("h100", "made up", [prefill(workload, 64, 1e-4)], [decode(64, 256, 0.01)])]
    much = choose(workload, wide, Limits())
    assert much is not None
    assert much.binding == WHOLE_REPLICAS
    assert much.saved[WHOLE_REPLICAS] == pytest.approx(1 - much.served.prefill_load - much.served.decode_load)
    assert choose(workload, slow, Limits(1e6)) is None


def test_what_lifting_saves_is_the_bill_without_the_limit(workload: Workload) -> None:
    offered, limits = options(workload, 7), Limits(60.0, 0.6, 0.95)
    choice = choose(workload, offered, limits)
    assert choice is not None
    assert set(choice.saved) == {TOKENS_PER_S_PER_USER, TTFT, MEMORY, WHOLE_REPLICAS}
    for name, saved in choice.saved.items():
        without = cheapest(workload, offered, lift(limits, name))
        assert without is not None
        assert saved == pytest.approx(1 - without.usd_per_hour / choice.served.usd_per_hour)
        assert saved >= 0
    assert choice.binding == max(choice.saved, key=choice.saved.__getitem__)
    assert choice.option in offered


def test_of_two_that_cost_the_same_the_faster_is_taken(workload: Workload) -> None:
    one = prefill(workload, 1, 1e-4)
    for steps in ([decode(8, 64, 0.02), decode(8, 32, 0.01), decode(8, 128, 0.04)],) * 2:
        found = cheapest(workload, [Options("h100", "made up", [one], steps)], Limits())
        assert found is not None
        assert found.decode is steps[1]  # 8 groups of each
        steps.reverse()


def test_a_tie_that_waits_make_is_the_faster_s_too(workload: Workload) -> None:
    one = prefill(workload, 4, 1e-5)  # not as wide as either: no pool can do both
    full, roomy = decode(1, 256, 0.0275), decode(2, 256, 0.02)  # the first would do alone if no one minded to wait
    offered = [Options("h100", "made up", [one], [full, roomy])]
    free, held = (cheapest(workload, offered, Limits(0.0, most)) for most in (None, 0.2))
    assert free is not None
    assert free.decode is full
    alone = disaggregated(workload, one, full, Limits(0.0, 0.2))
    assert held is not None
    assert alone is not None
    assert held.usd_per_hour == alone.usd_per_hour > free.usd_per_hour
    assert held.decode is roomy


def test_what_does_not_fit_serves_only_where_memory_is_lifted(workload: Workload) -> None:
    one, step = prefill(workload, 2, 1e-5), decode(1, 64, 0.01)
    for offered in (
        Options("h100", "prefill", [replace(one, fits=False)], [step]),
        Options("h100", "decode", [one], [replace(step, fits=False)]),
    ):
        assert cheapest(workload, [offered], Limits()) is None
        assert cheapest(workload, [offered], lift(Limits(), MEMORY)) is not None


def test_limits_may_bind_together(workload: Workload) -> None:
    # either limit alone needs the dear pool: the cheap one is slow and prefills too long
    cheap = prefill(workload, 1, 1e-3, usd=0.01), decode(1, 256, 0.1, usd=0.01)
    dear = prefill(workload, 4, 1e-5, usd=2.0), decode(4, 256, 0.01, usd=2.0)
    offered = [Options("h100", "cheap", [cheap[0]], [cheap[1]]), Options("h100", "dear", [dear[0]], [dear[1]])]
    choice = choose(workload, offered, replace(Limits(50.0, 1.0), needs_whole_replicas=False))
    assert choice is not None
    assert choice.option.stack == "dear"
    assert max(choice.saved.values()) == 0
    assert choice.binding == TOGETHER


def test_what_cannot_be_met_is_named(workload: Workload) -> None:
    one, step = prefill(workload, 1, 1e-4), decode(1, 64, 0.02)
    search = Search(workload, [Options("h100", "made up", [one], [step, decode(1, 8, 0.001, fits=False)])])
    assert search.failing(Limits(60.0)) == [TOKENS_PER_S_PER_USER, MEMORY]
    assert search.failing(Limits(0.0, 0.1)) == [TTFT]
    assert search.failing(Limits(60.0, 0.1)) == [TOGETHER]
    assert Search(workload, [Options("h100", "none", [], [])]).failing(Limits()) == []
    assert search.choose(Limits(60.0)) is None


def test_nothing_binds_where_nothing_saves(workload: Workload) -> None:
    exact = workload.requests_per_s * workload.mean_output_tokens / 40  # 40 groups, less what prefill takes
    step_s = 256 / exact * (1 - 1e-3)
    choice = choose(
        workload, [Options("h100", "made up", [prefill(workload, 1, 1e-12)], [decode(1, 256, step_s)])], Limits()
    )
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
        (lambda: made([0, 1], [2, math.nan], [0, 0], [1, 1]), "trace: expected finite numbers of tokens"),
        (lambda: made([0, math.inf], [2, 2], [0, 0], [1, 1]), "trace: expected finite timestamps in order"),
        (lambda: lift(Limits(), "weather"), "limit: expected one of tokens/s/user, .*; got 'weather'"),
    ],
)
def test_r28_absurd_loads_and_limits_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def made(*columns: list[float]) -> Workload:
    return Workload(*(np.array(column, dtype=float) for column in columns))


def scheduled(workload: Workload, pool: PrefillPool, groups: int, step_s: float, batch: int) -> tuple[float, float]:
    """One pool, iteration by iteration: a group that ends a step prefills the next request in line where it has a
    place, else it steps all that it decodes. Returns the 90th percentile of TTFT and the mean seconds per token."""
    events = [(0.0, group) for group in range(groups)]
    line: deque[int] = deque()
    decoding: list[dict[int, int]] = [{} for _ in range(groups)]
    first, end, ahead = np.zeros(len(workload.arrival_s)), np.zeros(len(workload.arrival_s)), 0
    left = len(first)
    while left:
        now, group = heapq.heappop(events)
        while ahead < len(first) and workload.arrival_s[ahead] <= now:
            line.append(ahead)
            ahead += 1
        mine = decoding[group]
        if line and len(mine) < batch:
            one = line.popleft()
            now += pool.service_s[one]
            first[one], mine[one] = now, int(workload.output_tokens[one])
        elif mine:
            now += step_s
            for one in list(mine):
                mine[one] -= 1
                if not mine[one]:
                    end[one] = now
                    left -= 1
                    del mine[one]
        else:
            now = max(now, workload.arrival_s[ahead]) if ahead < len(first) else now + step_s
        heapq.heappush(events, (now, group))
    per_token = (end - first).sum() / workload.output_tokens.sum()
    return float(np.quantile(first - workload.arrival_s, 0.9)), float(per_token)


@pytest.mark.parametrize(("batch", "step_s", "rate"), [(64, 0.02, 25.0), (128, 0.03, 15.0), (64, 0.03, 25.0)])
def test_one_pool_is_near_a_scheduler_that_goes_step_by_step(batch: int, step_s: float, rate: float) -> None:
    workload = load(2500)
    one, step = prefill(workload, 1, 1e-4), decode(1, batch, step_s)
    served = aggregated(workload, one, step, Limits(rate))
    assert served is not None
    ttft_s, s_per_token = scheduled(workload, one, int(served.decode_replicas), step_s, batch)
    assert 0.9 / s_per_token <= served.tokens_per_s_per_user <= 1 / s_per_token
    # a whole step under way is counted; on average half a one is
    assert ttft_s <= served.ttft_s <= ttft_s + 1.5 * step_s
