"""What an interval of 100,000 samples takes."""

from __future__ import annotations

from typing import Any

import pytest
from pace import slowness
from tokenfab.costing.levers.intervals import interval
from tokenfab.costing.study import price_step, study


@pytest.mark.benchmark(group="interval")
@pytest.mark.parametrize("correlated", [True, False])
def test_interval_of_100_000_samples(benchmark: Any, correlated: bool) -> None:
    plan = study("deepseek-v3", ["gb300"], ["trtllm"], ["dp32-ep32"], [96])
    cost = price_step(plan)
    found = benchmark.pedantic(
        interval, (cost,), {"samples": 100_000, "data": plan.data, "correlated": correlated}, rounds=3, warmup_rounds=1
    )
    assert found.samples == 100_000
    assert benchmark.stats.stats.min <= 2.0 * slowness()
