"""How far the tables of prefill can be interpolated: rows held out and predicted from their neighbours.

As ``tokenfab published check`` does for decoding, on rows of 512 new tokens or more. GEMM, MoE and collective rows of
that size are in the tables of decoding, with the steps at tile edges that its check shows too.
"""

from __future__ import annotations

import numpy as np
import pytest
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import Gpu, get_gpu
from tokenfab.bench.interpolation import predict_inner
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import Module, Op
from tokenfab.bench.prefill_ops import ContextAllToAll, ContextAttention, ContextExperts, ContextModule, MlaContext
from tokenfab.bench.prefill_plan import merge_context_block, prefill_plan
from tokenfab.bench.published import PublishedData, Stack
from tokenfab.bench.published_check import floors, grids
from tokenfab.bench.published_tables import queries

LEAST_TOKENS = 512
FP8 = ("fp8_block", "fp8_group")


def module(model: str) -> Op:
    deployment = Deployment(1, 1, 1, get_precision("fp8"), 1, 1)
    calls = prefill_plan(load_model(model), get_gpu("h100"), deployment, new_tokens=1024, check_memory=False)
    return next(call.op for call in merge_context_block(calls, "fp8_block") if isinstance(call.op, ContextModule))


def errors(data: PublishedData, gpu: Gpu, stack: Stack, probe: Op) -> dict[str, np.ndarray]:
    """|predicted / measured - 1| of inner rows, by the axis along which they were held out."""
    query = queries(probe, gpu, stack.name)[0]
    only = query.near if isinstance(probe, Module) else None
    found: dict[str, list[np.ndarray]] = {}
    for grid, near in grids(data, gpu, stack, query, only):
        floor_s = floors(grid, query, near, gpu)
        sizes = np.meshgrid(*grid.axes, indexing="ij")
        tokens = sizes[0] * sizes[1] if "isl" in query.table.axes else sizes[0]
        for axis, column in enumerate(query.table.axes):
            if len(grid.axes[axis]) < 3:
                continue
            inner = tuple(slice(1, -1) if each == axis else slice(None) for each in range(len(grid.axes)))
            ratio = predict_inner(grid.axes[axis], grid.time_s, floor_s, axis) / grid.time_s[inner]
            found.setdefault(column, []).append(np.abs(ratio[np.isfinite(ratio) & (tokens[inner] >= LEAST_TOKENS)] - 1))
    return {column: np.concatenate(parts) for column, parts in found.items()}


PROBES: list[tuple[str, str, Op]] = [
    *(("h100", stack, ContextAttention(1, 1024, 32, 4, 128)) for stack in ("vllm", "sglang", "trtllm")),
    ("h100", "trtllm", ContextAttention(1, 1024, 32, 4, 128, None, "fp8")),
    ("b200", "vllm", ContextAttention(1, 1024, 8, 1, 64, 128)),
    ("h100", "trtllm", MlaContext(1, 1024, 128, 128, 64, 128)),
    *(("h100", stack, module("deepseek-v3")) for stack in ("vllm", "sglang", "trtllm")),
    ("b200", "trtllm", module("deepseek-v3.2")),
    ("h100", "sglang", ContextExperts(4096, 7168, 2048, 8, 256, 8, 1, *FP8, dispatched=True)),
    ("h100", "sglang", ContextAllToAll("dispatch", 1024, 7168, 8, 256, 8, "fp8_group")),
    ("h100", "sglang", ContextAllToAll("combine", 1024, 7168, 8, 256, 8, "bf16")),
]


@pytest.mark.parametrize(
    ("gpu", "stack", "probe"), PROBES, ids=lambda each: each.kind if isinstance(each, Op) else each
)
def test_held_out_rows_of_prefill(published: PublishedData, gpu: str, stack: str, probe: Op) -> None:
    place = get_gpu(gpu)
    found = errors(published, place, published.stack(place, stack), probe)
    assert found
    for column, error in found.items():
        assert len(error) > 30, column
        assert np.median(error) <= 0.05, column
        assert np.percentile(error, 95) <= 0.20, column


def test_flops_of_the_causal_half_are_the_better_floor(published: PublishedData) -> None:
    """With the whole square as floor, rows would be predicted no better, and half of the work would be made up."""
    place = get_gpu("h100")
    op = ContextAttention(1, 16384, 32, 4, 128)
    timing = published.time(op, place, published.stack(place, "vllm"))
    assert 0.5 < op.floor_s(place) / timing.time_s < 0.75  # 2 x that would be beyond the peak
