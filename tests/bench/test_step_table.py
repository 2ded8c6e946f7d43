"""Many steps at once: every total equals that of the step alone, over kinds of models, stacks, splits and batches."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenfab.bench.deployment import Deployment, check_divides, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.interpolation import BETWEEN, BEYOND, EXACT, Grid, look_up, look_up_many
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import Collective, Gemm
from tokenfab.bench.published import PUBLISHED_PROVENANCES, PublishedData
from tokenfab.bench.published_many import times
from tokenfab.bench.step_table import StepTable, SummedStep
from tokenfab.bench.step_time import StepTime, published_step

BATCHES = [1, 2, 3, 8, 17, 64, 129, 512, 3000]


def splits(name: str, precision: str) -> list[Deployment]:
    """Every way over up to 32 GPUs that the model allows, one and three tokens per step, even and uneven load."""
    found, model = [], load_model(name)
    ways = itertools.product(
        (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 8, 16, 32), ("all_to_all", "all_gather"), ("balanced", "power_law_1.2"),
        (1, 3),
    )  # fmt: skip
    for tp, dp, ep, exchange, load, tokens in ways:
        if tp * dp <= 32 and (tp * dp) % ep == 0:
            one = Deployment(
                tp * dp, tp, ep, get_precision(precision), 1 / tp, 4096, tokens, load=load, exchange=exchange
            )
            try:
                check_divides(model, one)
            except ValueError:
                continue
            found.append(one)
    return found


@pytest.mark.parametrize(
    ("gpu_name", "name"),
    [
        *itertools.product(
            ("h100", "gb200"),
            ("deepseek-v3 fp8", "deepseek-v3.2 fp8", "gpt-oss-120b mxfp4", "qwen3-235b-a22b bf16", "glm-4.5 fp8",
             "llama-4-maverick fp8_tensor"),
        ),
        ("b300", "deepseek-v3 nvfp4"),
    ],
)  # fmt: skip
def test_totals_are_those_of_the_step_alone(published: PublishedData, gpu_name: str, name: str) -> None:
    """MLA by parts and as a module, sparse MLA, windows, GQA, shapes that no table has."""
    name, precision = name.split()
    gpu, model, draw = get_gpu(gpu_name), load_model(name), random.Random(name + precision + gpu_name)
    ways = splits(name, precision)
    chosen = draw.sample(ways, 30)
    table = StepTable(model, chosen, [BATCHES] * len(chosen))
    for stack in (published.stack(gpu, each) for each in ("vllm", "sglang", "trtllm")):
        totals = table.totals(published, gpu, stack)
        for place in draw.sample(range(len(chosen) * len(BATCHES)), 25):
            one, sequences = chosen[place // len(BATCHES)], BATCHES[place % len(BATCHES)]
            deployment = replace(one, batch_per_gpu=sequences / one.attention_tp)
            alone = published_step(published, model, gpu, stack, deployment, check_memory=False)
            assert totals.step_s[place] == pytest.approx(alone.step_s, rel=1e-12)
            assert totals.floor_s[place] == pytest.approx(alone.floor_s, rel=1e-12)
            assert totals.shares[:, place] == pytest.approx(list(alone.coverage().values()), abs=1e-12)


def test_a_summed_step_has_its_ops_when_asked(published: PublishedData) -> None:
    gpu, model = get_gpu("h200"), load_model("deepseek-v3")
    stack, deployment = published.stack(gpu, "sglang"), Deployment(8, 1, 8, get_precision("fp8"), 16, 4096)
    alone = published_step(published, model, gpu, stack, deployment)
    totals = (1.5, 0.5, (0.25, 0.25, 0.5))
    summed = SummedStep(model, gpu, stack, deployment, data=published, totals=totals)
    assert (summed.step_s, summed.floor_s) == (1.5, 0.5)
    assert summed.coverage() == {"measured": 0.25, "interpolated": 0.25, "modelled": 0.5}
    assert "ops" not in vars(summed)
    assert summed.ops == alone.ops
    assert isinstance(summed, StepTime)
    changed = replace(summed, ops=alone.ops[:3])  # totals of other ops are not kept
    assert changed.step_s == sum(op.time_s for op in alone.ops[:3])
    assert changed.floor_s == sum(op.floor_s for op in alone.ops[:3])
    assert sum(changed.coverage().values()) == pytest.approx(1)


def test_a_split_that_cannot_be_is_refused() -> None:
    model, one = load_model("deepseek-v3"), Deployment(6, 1, 6, get_precision("fp8"), 1, 4096)
    with pytest.raises(ValueError, match="expert_parallel: expected a divisor of deepseek-v3's 256 experts; got 6"):
        StepTable(model, [one], [[1]])
    for batches in ([], [0, 1]):
        with pytest.raises(ValueError, match="sequences: expected at least one, from 1 on"):
            StepTable(model, [replace(one, gpus=8, expert_parallel=8)], [batches])


def floor_of(axes: tuple[Any, ...]) -> Any:
    """Flat up to 40 on the first axis, then rising; linear in the others."""
    first, *others = axes
    return np.maximum(first, 40.0) * 1e-3 + sum((place + 2.0) * axis for place, axis in enumerate(others))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([0.0, 0.4, 0.7]))
def test_many_places_of_a_ragged_grid(seed: int, num_axes: int, missing: float) -> None:
    """On rows, between, beyond and in holes, against one at a time."""
    rng = np.random.default_rng(seed)
    axes = [np.sort(rng.choice(np.arange(1, 200), rng.integers(2, 6), replace=False)) for _ in range(num_axes)]
    columns = [each.ravel() for each in np.meshgrid(*axes, indexing="ij")]
    kept = rng.random(columns[0].size) >= missing
    kept[0] = True
    rows = [column[kept] for column in columns]
    grid = Grid.from_rows(rows, rng.random(kept.sum()) + 0.1, np.zeros(kept.sum(), dtype=np.int32))
    at = tuple(rng.choice(np.concatenate([column, rng.integers(1, 250, 10)]), 40).astype(float) for column in columns)
    time_s, codes = look_up_many(grid, at, floor_of)
    for place in range(40):
        alone = look_up(grid, tuple(float(axis[place]) for axis in at), floor_of, "abc"[:num_axes])
        if np.isnan(time_s[place]):  # the caller's to fill
            assert alone.how == "beyond"
        else:
            assert time_s[place] == pytest.approx(float(alone.time_s), rel=1e-12)
        assert {EXACT: "exact", BETWEEN: "between", BEYOND: "beyond"}[codes[place]] == alone.how


def test_holes_are_filled_one_by_one(tree: Any) -> None:
    """Rows of m at two widths that share no m: between the widths there is a hole on every side."""
    root, write = tree
    write("h100_sxm/gemm/vllm/2.0/gemm_perf", {
        "gemm_dtype": "bfloat16", "m": [1, 64, 64], "n": [64, 64, 4096], "k": [64, 64, 64],
        "latency": [0.01, 0.02, 0.05], "kernel_source": "k"})  # fmt: skip
    data = PublishedData(root)
    gpu = get_gpu("h100")
    stack = data.stack(gpu, "vllm")
    sizes = [(1, 64), (1, 2048), (32, 4096), (64, 4096), (64, 500), (200, 9000)]
    m, n = (np.array(column) for column in zip(*sizes, strict=True))
    many = Gemm(m, n, np.full_like(m, 64))  # type: ignore[arg-type]
    time_s, codes = times(data, many, gpu, stack)
    for place, (rows, width) in enumerate(sizes):
        alone = data.time(Gemm(rows, width, 64), gpu, stack)
        assert time_s[place] == pytest.approx(float(alone.time_s), rel=1e-12)
        assert alone.provenance == PUBLISHED_PROVENANCES[codes[place]]


def test_each_size_takes_the_first_table_that_has_it(tree: Any) -> None:
    """Custom all-reduce up to 4,000 elements, NCCL up to a million: beyond the one, the other is no model."""
    root, write = tree
    sizes = {"op_name": "all_reduce", "num_gpus": 2, "kernel_source": "k"}
    write(
        "h100_sxm/comm/vllm/2.0/custom_allreduce_perf", {**sizes, "message_size": [1000, 4000], "latency": [1.0, 2.0]}
    )
    write("h100_sxm/comm/nccl/1.0/nccl_perf",
          {**sizes, "nccl_dtype": "half", "message_size": [2000, 1_000_000], "latency": [9.0, 30.0]})  # fmt: skip
    data, gpu = PublishedData(root), get_gpu("h100")
    stack, elements = data.stack(gpu, "vllm"), [1000, 3000, 4000, 5000, 1_000_000, 2_000_000]
    time_s, codes = times(data, Collective("all_reduce", np.array(elements), 2), gpu, stack)  # type: ignore[arg-type]
    for place, each in enumerate(elements):
        alone = data.time(Collective("all_reduce", each, 2), gpu, stack)
        assert time_s[place] == pytest.approx(float(alone.time_s), rel=1e-12)
        assert alone.provenance == PUBLISHED_PROVENANCES[codes[place]]
    assert time_s[:3].max() <= 2e-3 * (1 + 1e-9)
    assert time_s[3] > 9e-3  # NCCL's, not the other's last row held
    assert [PUBLISHED_PROVENANCES[code] for code in codes] == [
        "measured", "interpolated", "measured", "interpolated", "measured", "modelled",
    ]  # fmt: skip
