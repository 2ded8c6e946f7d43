"""Searching all splits, and what a scale-up domain is worth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, cast

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench.domain import with_domain
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.step_time import step_time
from tokenfab.costing.levers.parallelism import (
    SCALE_BATCHES,
    Scale,
    all_parallels,
    domain_worth,
    gpu_counts,
    search,
)
from tokenfab.costing.study import Study, study
from tokenfab.costing.sweep import Parallel


def plan_of(model: str, gpus: list[str], stacks: list[str], **options: Any) -> Study:
    return study(model, gpus, stacks, None, None, **options)


@pytest.fixture(scope="module")
def wide() -> Scale:
    plan = plan_of("deepseek-v3", ["gb200", "h200"], ["sglang", "trtllm"])
    return search(plan, 32, [1, 8, 32, 64, 128, 256, 512], domains=(8, 72))


@pytest.mark.parametrize(
    ("most", "domain", "counts"),
    [
        (72, 72, [1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 36, 64, 72]),
        (16, 8, [1, 2, 4, 8, 16]),
        (40, 8, [1, 2, 4, 8, 16, 24, 32, 40]),
        (1, 72, [1]),
        (150, 72, [1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 36, 64, 72, 128, 144]),
    ],
)
def test_numbers_of_gpus(most: int, domain: int, counts: list[int]) -> None:
    assert gpu_counts(most, domain) == counts


def test_every_split_that_divides_and_no_other() -> None:
    """Qwen3-30B: 32 heads over 4 KV heads, 128 experts of 768, a vocabulary of 151,936."""
    expected = set()
    for gpus in (1, 2, 3, 4, 6, 8, 9, 12, 16, 18):
        for tp in range(1, gpus + 1):
            for ep in range(1, gpus + 1):
                if gpus % tp or gpus % ep or 32 % tp or 151936 % tp or 128 % ep or 768 % (gpus // ep):
                    continue
                if 4 % tp and tp % 4:
                    continue
                expected.add((tp, gpus // tp, ep, False))
                if tp < gpus and ep == gpus:
                    expected.add((tp, gpus // tp, ep, True))
    sweep = plan_of("qwen3-30b-a3b", ["gb200"], ["vllm"]).sweep
    found = all_parallels(sweep, gpu_counts(18, 72))
    assert {(p.attention_tp, p.attention_dp, p.expert_parallel, p.all_gather) for p in found} == expected
    assert len(found) == len(expected)
    assert any(p.gpus == 12 for p in found)


def test_every_split_and_batch_that_fits_is_priced() -> None:
    plan = plan_of("qwen3-30b-a3b", ["h100"], ["vllm"], load="power_law_1.2")
    found = search(plan, 4, [0.5, 1, 16])
    places = {(str(Parallel.of(p.step.deployment)), p.step.deployment.batch_per_gpu) for p in found.points}
    one_gpu = {("tp1", 1.0), ("tp1", 16.0)}
    assert one_gpu <= places
    assert ("tp2", 0.5) in places
    assert ("dp2-ep2", 0.5) not in places  # half a sequence of its own
    assert ("dp2-ep2-ag", 1.0) in places
    for point in found.points:
        assert point.step.deployment.load == "power_law_1.2"
        alone = step_time(plan.data, plan.sweep.model, point.step.gpu, point.step.stack, point.step.deployment)
        assert point.step.step_s == pytest.approx(alone.step_s, rel=1e-12)
    splits = {Parallel.of(p.step.deployment) for p in found.points}
    assert splits == set(found.sweep.parallels)


def test_imbalance_costs(wide: Scale) -> None:
    uneven = search(plan_of("deepseek-v3", ["gb200"], ["trtllm"], load="power_law_1.2"), 32, [256])
    for split in ("dp8-ep8", "dp32-ep32"):
        prices = [
            next(p.usd_per_mtok_output for p in found.points
                 if str(Parallel.of(p.step.deployment)) == split and p.step.gpu.name == "gb200"
                 and p.step.stack.name == "trtllm" and p.step.deployment.batch_per_gpu == 256)
            for found in (wide, uneven)
        ]  # fmt: skip
        assert prices[1] > 1.02 * prices[0]


def test_best_and_pareto_against_brute_force(wide: Scale) -> None:
    for gpu, gpus in (("gb200", 8), ("gb200", 32), ("h200", 16)):
        known = [
            p for p in wide.points
            if p.step.gpu.name == gpu and p.step.deployment.gpus == gpus and p.step.coverage()["modelled"] <= 0.25
        ]  # fmt: skip
        fast = [p for p in known if p.tokens_per_s_per_user >= 20]
        best = wide.best(gpu, 20, 0.25, gpus)
        assert best is not None
        assert best.usd_per_mtok_output == min(p.usd_per_mtok_output for p in fast)
        rest = {
            (p.tokens_per_s_per_user, p.usd_per_mtok_output)
            for p in known
            if not any(
                q.tokens_per_s_per_user >= p.tokens_per_s_per_user
                and q.usd_per_mtok_output <= p.usd_per_mtok_output
                and (q.tokens_per_s_per_user, q.usd_per_mtok_output) != (p.tokens_per_s_per_user, p.usd_per_mtok_output)
                for q in known
            )
        }
        curve = wide.pareto(gpu, gpus, 0.25)
        assert {(p.tokens_per_s_per_user, p.usd_per_mtok_output) for p in curve} == rest
    assert wide.best("gb200", 1e9) is None
    assert wide.counts("h200") == [8, 16, 32]


def test_a_smaller_domain_is_never_cheaper_and_wide_ep_is_what_it_loses(wide: Scale) -> None:
    worths = domain_worth(wide, [10, 20, 50])
    assert [(w.gpu.name, w.min_tokens_per_s_per_user) for w in worths] == [
        (gpu, rate) for gpu in ("gb200", "h200") for rate in (10, 20, 50)
    ]
    for worth in worths:
        assert list(worth.by_domain) == [8, 72]
        assert worth.worth(worth.gpu.scale_up_gpus) == 1.0
        small, large = worth.by_domain[8], worth.by_domain[72]
        assert small is not None
        assert large is not None
        assert small.usd_per_mtok_output >= large.usd_per_mtok_output
        assert small.price.usd_per_gpu_hour == large.price.usd_per_gpu_hour
        for cost in (small, large):
            assert cost.tokens_per_s_per_user >= worth.min_tokens_per_s_per_user
    at_20 = worths[1]
    factor = at_20.worth(8)
    assert factor is not None
    assert 1.5 < factor < 2.5
    own = at_20.by_domain[72]
    assert own is not None
    assert own.step.deployment.gpus > 8


def test_what_crosses_a_cut_is_modelled(wide: Scale) -> None:
    for point in wide.points:
        if point.step.gpu.name != "gb200@8" or point.step.deployment.gpus <= 8:
            continue
        if str(Parallel.of(point.step.deployment)) == "dp32-ep32" and point.step.stack.name == "trtllm":
            for op in point.step.ops:
                if op.call.name in ("dispatch", "combine"):
                    assert op.provenance == "modelled"
                    assert "domain of 8" in op.source
            return
    pytest.fail("no point crosses the cut")


def test_points_within_the_cut_are_the_same(wide: Scale) -> None:
    def of(gpu: str) -> dict[Any, float]:
        return {
            (Parallel.of(p.step.deployment), p.step.stack, p.step.deployment.batch_per_gpu): p.step.step_s
            for p in wide.points
            if p.step.gpu.name == gpu and p.step.deployment.gpus <= 8
        }

    own, cut = of("gb200"), of("gb200@8")
    assert own
    assert own == cut


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: search(plan, 0), "max_gpus: expected a whole number from 1 to 1024; got 0"),
        (lambda plan: search(plan, cast("int", 2.5)), "max_gpus: expected a whole number"),
        (lambda plan: search(plan, 8, []), "batch: expected at least one; got none"),
        (lambda plan: search(plan, 8, [-1]), "batch: expected more than 0 sequences per GPU; got -1"),
        (lambda plan: search(plan, 8, [math.nan]), "batch: expected more than 0 sequences per GPU; got nan"),
        (lambda plan: search(plan, 8, domains=[0]), "domain: expected a whole number of GPUs"),
        (lambda plan: search(plan, 2), "deepseek-v3: no point can be: memory: no batch fits"),
    ],
)
def test_r28_absurd_searches_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(plan_of("deepseek-v3", ["h100"], ["vllm"]))


def test_a_batch_that_no_group_can_share_is_told() -> None:
    plan = plan_of("qwen3-30b-a3b", ["h100"], ["vllm"])
    found = search(plan, 2, [0.5])
    assert {str(Parallel.of(p.step.deployment)) for p in found.points} == {"tp2", "tp2-ep2"}
    assert all("batch: no batch is a whole number of sequences" in row.reason for row in found.skipped)
    assert len(SCALE_BATCHES) == 20


def test_progress_is_told_once_per_gpu_and_stack() -> None:
    told: list[tuple[int, int, str]] = []
    plan = plan_of("qwen3-30b-a3b", ["h100"], ["vllm", "sglang"])
    search(plan, 4, [8], [8, 72], lambda done, total, what: told.append((done, total, what)))
    assert told == [(1, 4, "h100 vllm"), (2, 4, "h100 sglang"), (3, 4, "h100@72 vllm"), (4, 4, "h100@72 sglang")]


def test_a_domain_of_the_gpus_own_size_is_no_other() -> None:
    found = search(plan_of("qwen3-30b-a3b", ["h100"], ["vllm"]), 2, [8], [8])
    assert found.sweep.gpus == [get_gpu("h100")]
    assert domain_worth(found, [1]) == []
    assert replace(with_domain(get_gpu("h100"), 16), scale_up_gpus=8) != get_gpu("h100")


def run(*args: str) -> Any:
    return CliRunner().invoke(cli, ["scale", "deepseek-v3", "--stack", "trtllm", *args])


def test_command_prints_tables_and_document() -> None:
    args = ("--gpu", "gb200", "--max-gpus", "16", "--batch", "16,64,256", "--domain", "8")
    result = run(*args)
    assert result.exit_code == 0, result.output
    for text in ("cheapest at >= 20 tokens/s/user", "Pareto frontier", "in another scale-up domain", "8 ", "72 (own)",
                 "million output tokens of decode GPUs", "over 3, 6, 9, 12 GPUs", "left out:", "fp8"):  # fmt: skip
        assert text in result.output
    document = json.loads(run(*args, "--json").stdout)
    assert {row["gpu"] for row in document["best"]} == {"gb200"}
    by_domain = {row["min_tokens_per_s_per_user"]: row["by_domain"] for row in document["domain_worth"]}
    assert by_domain[20]["72"]["usd_per_mtok_to_own_domains"] == 1
    assert by_domain[20]["8"]["usd_per_mtok_to_own_domains"] >= 1
    assert document["gpus_without_split"] == [3, 6, 9, 12]
    assert document["denominator"] == "output tokens of decode GPUs"
    assert not {"NaN", "Infinity"} & set(json.dumps(document).split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gpu", "l40s"), "price: no rent_3yr price for l40s"),
        (("--gpu", "gb200", "--max-gpus", "0"), "max_gpus: expected"),
        (("--gpu", "gb200", "--domain", "0"), "domain: expected"),
        (("--gpu", "gb200", "--batch", ""), "batch: expected at least one"),
        (("--gpu", "gb200", "--load", "even"), "load: expected one of balanced"),
        (("--gpu", "gb200", "--context", "1000000"), "context: expected at most deepseek-v3's"),
        (("--gpu", ""), "gpu: expected at least one"),
    ],
)
def test_r28_bad_input_is_one_line(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
