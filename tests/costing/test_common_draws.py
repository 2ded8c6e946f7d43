"""Intervals of many points: those of ``interval``, drawn once for all."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tokenfab.bench.published import PublishedData
from tokenfab.costing.levers.common_draws import CommonDraws
from tokenfab.costing.levers.intervals import interval
from tokenfab.costing.study import run_study, study


def test_intervals_are_those_of_one_at_a_time(published: PublishedData) -> None:
    plan = study("deepseek-v3", ["h200", "gb300"], None, ["dp8-ep8", "tp8"], [8, 96])
    points = run_study(plan).points
    draws = CommonDraws(published, samples=40_000)
    assert len(points) >= 8
    for point in points:
        found, alone = draws.at_price(point), interval(point, data=published, samples=40_000, seed=5).at_price
        for low, high in ((found.p5, alone.p5), (found.p50, alone.p50), (found.p95, alone.p95)):
            assert low == pytest.approx(high, rel=0.01)
        width, other = (math.log(each.p95 / each.p5) for each in (found, alone))
        assert width == pytest.approx(other, rel=0.05)


def test_draws_do_not_depend_on_what_else_is_priced(published: PublishedData) -> None:
    points = run_study(study("gpt-oss-120b", ["h100"], ["vllm", "trtllm"], ["tp2"], [4, 16])).points
    forth, back = CommonDraws(published, samples=500), CommonDraws(published, samples=500)
    found = [forth.at_price(point) for point in points]
    assert found == [back.at_price(point) for point in reversed(points)][::-1]
    assert CommonDraws(published, samples=500, seed=1).at_price(points[0]) != found[0]


@pytest.mark.parametrize(("options", "words"), [({"samples": 10}, "samples: .* 100; got 10"), ({"seed": -1}, "seed")])
def test_r28_absurd_draws_are_named(published: PublishedData, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CommonDraws(published, **options)
