"""A sweep times its points together: each equals the point alone, and what cannot be is told as before."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.memory import largest_batch
from tokenfab.bench.published import PublishedData
from tokenfab.bench.step_table import SummedStep
from tokenfab.bench.step_time import step_time
from tokenfab.costing.study import run_study, study
from tokenfab.costing.sweep import Parallel

SPLITS = ["tp1", "tp2", "tp8", "tp4-ep4", "dp8-ep8", "tp2-dp4-ep8", "dp16-ep16", "dp4-ep4-ag", "tp3", "dp64-ep64"]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("deepseek-v3", {}),
        ("deepseek-v3.2", {"load": "power_law_1.01"}),
        ("gpt-oss-120b", {"tokens_per_step": 4, "kept_tokens": 2.5}),
        ("qwen3-235b-a22b", {"precision": "fp8", "kv_format": "bf16", "context": 16000}),
    ],
)
@pytest.mark.parametrize("batches", [None, [1, 3.5, 20, 700]])
def test_every_point_is_that_of_its_deployment(
    published: PublishedData, model: str, options: dict[str, object], batches: list[float] | None
) -> None:
    plan = study(model, ["h200", "gb200"], ["vllm", "sglang", "trtllm"], SPLITS, batches, **options)  # type: ignore[arg-type]
    result = run_study(plan)
    assert all(isinstance(point.step, SummedStep) for point in result.points)
    for point in random.Random(model).sample(result.points, 40):
        step = point.step
        alone = step_time(published, plan.sweep.model, step.gpu, step.stack, step.deployment)  # and it fits
        assert step.step_s == pytest.approx(alone.step_s, rel=1e-12)
        assert step.floor_s == pytest.approx(alone.floor_s, rel=1e-12)
        assert step.coverage() == pytest.approx(alone.coverage(), abs=1e-12)
        kept = step.deployment.kept_tokens_per_step
        assert point.tokens_per_s_per_user == pytest.approx(kept / alone.step_s, rel=1e-12)
        assert step.ops == alone.ops


def test_a_gpu_without_the_units_is_skipped_beside_one_that_has_them() -> None:
    result = run_study(study("deepseek-v3", ["h200", "b200"], ["trtllm"], ["tp8", "dp8-ep8"], [8], precision="nvfp4"))
    assert {point.step.gpu.name for point in result.points} == {"b200"}
    assert {(row.gpu, row.parallel) for row in result.skipped} == {("h200", "tp8"), ("h200", "dp8-ep8")}
    assert all("h200 has no FP4 matrix units" in row.reason for row in result.skipped)


def test_points_come_gpu_by_gpu_and_batch_by_batch() -> None:
    result = run_study(study("qwen3-30b-a3b", ["h200", "h100"], ["trtllm", "vllm"], ["tp2", "tp1"], [4, 1, 2]))
    places = [
        (p.step.gpu.name, p.step.stack.name, p.step.deployment.attention_tp, p.step.deployment.batch_per_gpu)
        for p in result.points
    ]
    assert places == [
        (gpu, stack, tp, batch)
        for gpu in ("h200", "h100") for stack in ("trtllm", "vllm") for tp in (2, 1) for batch in (4, 1, 2)
    ]  # fmt: skip


def test_a_changed_gpu_of_the_same_name_is_planned_anew() -> None:
    """What fits depends on the GPU, not on its name alone."""
    plan = study("qwen3-30b-a3b", ["h100"], ["vllm"], ["tp1"], [1, 32], precision="bf16")
    small = replace(get_gpu("h100"), memory_bytes=70 * 1024**3)
    both = replace(plan, sweep=replace(plan.sweep, gpus=[get_gpu("h100"), small]))
    most = {point.step.gpu.memory_bytes: point.step.deployment.batch_per_gpu for point in run_study(both).points}
    assert most[get_gpu("h100").memory_bytes] > most[small.memory_bytes]


def test_the_very_last_sequence_that_fits_is_priced() -> None:
    plan = study("qwen3-30b-a3b", ["h100"], ["vllm"], ["tp1"], [1], precision="bf16")
    most = largest_batch(plan.sweep.model, plan.sweep.gpus[0], plan.sweep.deployment(Parallel(), 1))
    both = replace(plan, sweep=replace(plan.sweep, batches=[most, most + 1]))
    assert [point.step.deployment.batch_per_gpu for point in run_study(both).points] == [most]
