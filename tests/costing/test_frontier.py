"""Cost against interactivity: against a search through all pairs of pools at every limit, and limits really lifted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from tokenfab.costing.workload.cheapest import MEMORY, TOGETHER, TOKENS_PER_S_PER_USER, TTFT, Choice, Search, lift
from tokenfab.costing.workload.deploy import Limits, Workload
from tokenfab.costing.workload.fleet import aggregated, disaggregated
from tokenfab.costing.workload.frontier import Frontier, FrontierPoint, frontier, undominated
from tokenfab.tests.costing.made_up_pools import decode, load, options, prefill


@pytest.fixture(scope="module")
def workload() -> Workload:
    return load(1500)


def cheapest_of_all(workload: Workload, seed: int, limits: Limits) -> float | None:
    """The least bill of any pair of pools, each sized alone."""
    bills = []
    for option in options(workload, seed):
        for one, step in itertools.product(option.prefill, option.decode):
            if not step.fits:
                continue
            if one.fits:
                bills.append(disaggregated(workload, one, step, limits))
            if (one.deployment.gpus, one.deployment.attention_tp) == (
                step.deployment.gpus, step.deployment.attention_tp,
            ):  # fmt: skip
                bills.append(aggregated(workload, one, step, limits))
    return min((served.usd_per_hour for served in bills if served), default=None)


@pytest.mark.parametrize(("seed", "max_ttft_s"), [(0, 0.8), (1, None), (2, 0.6)])
def test_no_deployment_is_below_the_frontier(workload: Workload, seed: int, max_ttft_s: float | None) -> None:
    limits = Limits(0.0, max_ttft_s)
    found = frontier(Search(workload, options(workload, seed)), limits, step=1 + 1e-6)
    fastest = found.points[-1].served.tokens_per_s_per_user
    for rate in (0.0, 5.0, 15.0, 30.0, 31.0, 47.0, 60.0, 99.0, fastest):
        least = cheapest_of_all(workload, seed, replace(limits, min_tokens_per_s_per_user=rate))
        of_frontier = [p.served.usd_per_hour for p in found.points if p.served.tokens_per_s_per_user >= rate]
        assert min(of_frontier, default=None) == least
    for slower, faster in itertools.pairwise(found.points):  # just above what one reaches the next is the cheapest
        above = slower.served.tokens_per_s_per_user * (1 + 1e-6)
        least = cheapest_of_all(workload, seed, replace(limits, min_tokens_per_s_per_user=above))
        assert faster.served.usd_per_hour == least
    beyond = found.unmet[-1].min_tokens_per_s_per_user
    assert beyond > fastest
    assert cheapest_of_all(workload, seed, replace(limits, min_tokens_per_s_per_user=beyond)) is None


@pytest.fixture(scope="module")
def walked(workload: Workload) -> tuple[Search, Frontier]:
    search = Search(workload, options(workload, 3))
    return search, frontier(search, Limits(0.0, 0.8))


def test_faster_is_dearer_and_every_point_holds_its_limits(walked: tuple[Search, Frontier]) -> None:
    _, found = walked
    assert len(found.points) >= 3
    for slower, faster in itertools.pairwise(found.points):
        assert faster.served.tokens_per_s_per_user > slower.served.tokens_per_s_per_user
        assert faster.served.usd_per_hour > slower.served.usd_per_hour
        assert faster.served.usd_per_mtok_output > slower.served.usd_per_mtok_output
        assert faster.min_tokens_per_s_per_user > slower.served.tokens_per_s_per_user
        assert faster.min_tokens_per_s_per_user >= slower.min_tokens_per_s_per_user * 1.15
    for point in found.points:
        assert point.served.tokens_per_s_per_user >= point.min_tokens_per_s_per_user
        assert point.served.ttft_s <= 0.8
        assert point.served.decode.fits


def test_the_limit_named_is_the_one_that_costs_most(walked: tuple[Search, Frontier]) -> None:
    search, found = walked
    named = set()
    for point in found.points:
        limits = replace(found.limits, min_tokens_per_s_per_user=point.min_tokens_per_s_per_user)
        without = {name: search.cheapest(lift(limits, name)) for name in point.choice.saved}
        saved = {name: 1 - best[1].usd_per_hour / point.served.usd_per_hour for name, best in without.items() if best}
        assert saved == pytest.approx(point.choice.saved)
        binding = point.choice.binding
        named.add(binding)
        assert binding == TOGETHER or saved[binding] == max(saved.values()) > 0.005
    assert TOKENS_PER_S_PER_USER in named
    assert len(named) > 1


def test_what_nothing_meets_is_named(walked: tuple[Search, Frontier], workload: Workload) -> None:
    search, found = walked
    assert [each.failing for each in found.unmet] == [(TOKENS_PER_S_PER_USER,)]
    unmet = replace(found.limits, min_tokens_per_s_per_user=found.unmet[0].min_tokens_per_s_per_user)
    assert search.cheapest(unmet) is None
    for name in found.unmet[0].failing:
        assert search.cheapest(lift(unmet, name)) is not None
    nothing = frontier(search, Limits(0.0, 1e-3))
    assert nothing.points == ()
    assert [each.failing for each in nothing.unmet] == [(TTFT,)]


def test_the_next_limit_is_just_above_what_is_reached(walked: tuple[Search, Frontier]) -> None:
    class Recording(Search):
        def choose(self, limits: Limits, only: int | None = None) -> Choice | None:
            found = super().choose(limits, only)
            steps.append((limits.min_tokens_per_s_per_user, found and found.served.tokens_per_s_per_user))
            return found

    steps: list[tuple[float, float | None]] = []
    search, walk = walked
    frontier(Recording(search.workload, search.options), walk.limits, step=1 + 1e-9)
    assert steps[0][0] == 0
    assert steps[-1][1] is None
    for (_, reached), (limit, _) in itertools.pairwise(steps):
        assert reached is not None
        assert reached < limit <= reached * (1 + 1e-5)


def test_a_wide_step_asks_less(walked: tuple[Search, Frontier]) -> None:
    search, walk = walked
    wide = frontier(search, walk.limits, step=3.0)
    limits = [point.min_tokens_per_s_per_user for point in wide.points] + [wide.unmet[0].min_tokens_per_s_per_user]
    assert all(higher >= 3 * lower for lower, higher in itertools.pairwise(limits))
    assert len(wide.points) < len(walk.points)


def test_limits_asked_for(walked: tuple[Search, Frontier]) -> None:
    search, walk = walked
    asked: list[str] = []
    found = frontier(search, walk.limits, [1e6, 40.0, 20.0, 40.0], advance=asked.append)
    assert len(asked) == 3
    assert [point.min_tokens_per_s_per_user for point in found.points] in ([20.0, 40.0], [20.0], [40.0])
    assert [each.min_tokens_per_s_per_user for each in found.unmet] == [1e6]
    for wrong, message in (
        ({"rates": []}, "rates: expected at least one limit of tokens/s/user; got none"),
        ({"rates": [-1.0]}, "min_tokens_per_s_per_user: expected 0 or more; got -1.0"),
        ({"step": 1.0}, "step: expected more than 1; got 1.0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            frontier(search, walk.limits, **wrong)  # type: ignore[arg-type]


def test_points_that_another_beats_or_equals_are_dropped(workload: Workload) -> None:
    search = Search(workload, options(workload, 0))
    choice = search.choose(Limits())
    assert choice is not None

    def point(rate: float, usd: float) -> FrontierPoint:
        served = replace(choice.served, tokens_per_s_per_user=rate, usd_per_hour=usd)
        return FrontierPoint(0.0, replace(choice, served=served))

    offered = [(20, 5), (30, 5), (30, 6), (25, 7), (40, 8), (10, 4), (9, 4)]
    kept = undominated([point(*each) for each in offered])
    assert [(each.served.tokens_per_s_per_user, each.served.usd_per_hour) for each in kept] == [
        (10, 4), (30, 5), (40, 8),
    ]  # fmt: skip


def test_how_far_one_gets(workload: Workload) -> None:
    one = prefill(workload, 1, 1e-4)
    search = Search(workload, options(workload, 0)[:1])
    fastest, least_s = search.reach(Limits(ttft_percentile=0.5))
    of_all = search.options[0]
    assert fastest == max(each.tokens_per_s_per_user for each in of_all.decode if each.fits)
    assert least_s == pytest.approx(
        min(sorted(each.service_s)[749:751][0] for each in of_all.prefill if each.fits), rel=2e-3
    )
    nothing = replace(of_all, prefill=[replace(one, fits=False)], decode=[decode(1, 4, 0.01, fits=False)])
    assert Search(workload, [nothing]).reach(Limits()) == (None, None)
    assert Search(workload, [nothing]).failing(Limits()) == [MEMORY]
