"""How good interpolation between published rows is: leave one out, predict it, compare.

For every grid of a table and each of its axes, each inner value of the axis is held out with all
its rows and predicted from the rows on either side. The gap bridged is therefore about twice the
one a real query meets, so the error is an upper estimate. Where an axis is dense around tile edges
(GEMM m: 64, 65) the held-out rows include the steps themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .decode_plan import decode_plan, merge_mla_block
from .deployment import Deployment, get_precision
from .gpus import Gpu, get_gpu
from .interpolation import Grid, predict_inner
from .models import load_model
from .ops import AttentionModule, Collective, ExpertAllToAll, Experts, Gemm, MlaAttention, Op, PagedAttention
from .published import PublishedData, Stack
from .published_tables import GEMM_DTYPES, KV_DTYPES, MOE_DTYPES, Query, queries

MAX_TOKENS = 512
"""Rows with more tokens (or sequences) than this are prefill's, not decoding's."""


@dataclass(frozen=True)
class TableError:
    """Error of one table along one axis. ``median`` and ``p95`` of |predicted / measured - 1|."""

    gpu: str
    stack: str
    table: str
    variant: str
    held_out: str
    num_rows: int
    median: float
    p95: float


def check_tables(data: PublishedData, gpu: Gpu, stack: Stack) -> Iterator[TableError]:
    """The error of every decode table of one stack on one GPU, per variant and axis."""
    for table, variant, probes in table_probes():
        errors: dict[str, list[np.ndarray]] = {}
        for probe in probes:
            for column, ratio in held_out(data, gpu, stack, probe):
                errors.setdefault(column, []).append(np.abs(ratio - 1))
        for column, parts in errors.items():
            error = np.concatenate(parts)
            if len(error):
                median, p95 = np.percentile(error, [50, 95])
                yield TableError(gpu.name, str(stack), table, variant, column, len(error), float(median), float(p95))


def held_out(data: PublishedData, gpu: Gpu, stack: Stack, probe: Op) -> Iterator[tuple[str, np.ndarray]]:
    """(axis, predicted / measured of its held-out rows) for every grid of the first table that may answer ``probe``."""
    query = next(iter(queries(probe, gpu, stack.name)), None)
    if query is None:
        return
    only = query.near if isinstance(probe, AttentionModule) else None
    for grid, near in grids(data, gpu, stack, query, only):
        floor_s = floors(grid, query, near, gpu)
        for axis, column in enumerate(query.table.axes):
            yield column, _held_out(grid, floor_s, axis)


def table_probes() -> Iterator[tuple[str, str, list[Op]]]:
    """(table, variant, ops that name the grids to check)."""
    for weight in GEMM_DTYPES:
        yield "gemm", weight, [Gemm(1, 4096, 4096, weight, {"fp8_block": "fp8_group"}.get(weight, weight))]
    for weight, activation in MOE_DTYPES:
        for load in ("balanced", "power_law_1.01"):
            experts = Experts(1, 2048, 768, 8, 128, 1, 1, weight, activation, load)
            yield "moe", f"{weight} x {activation}, {load}", [experts]
    for kv in KV_DTYPES:
        paged: list[Op] = [
            PagedAttention(1, 1024, 8, 1, head_dim, window, kv)
            for head_dim, window in ((64, None), (64, 128), (128, None), (128, 8192))
        ]
        yield "generation_attention", f"{kv} KV", paged
        yield "generation_mla", f"{kv} KV", [MlaAttention(1, 1024, 128, 512, 64, kv)]
    for name, model in (("mla_generation_module", "deepseek-v3"), ("dsa_generation_module", "deepseek-v3.2")):
        for precision in ("bf16", "fp8", "nvfp4"):
            yield name, precision, [_module(model, precision)]
    yield "all_reduce", "bf16", [Collective("all_reduce", 4096, 2)]
    for phase in ("dispatch", "combine"):
        yield "all_to_all", phase, [ExpertAllToAll(phase, 16, 7168, 8, 256, 8, "bf16")]


def _module(model: str, precision: str) -> AttentionModule:
    """The attention block of a model on one GPU, all heads."""
    deployment = Deployment(1, 1, 1, get_precision(precision), 1, 1024)
    calls = decode_plan(load_model(model), get_gpu("gb300"), deployment, check_memory=False)
    (module,) = [
        call.op for call in merge_mla_block(calls, deployment.precision.linear) if call.name == "attention_module"
    ]
    assert isinstance(module, AttentionModule)
    return module


def grids(
    data: PublishedData, gpu: Gpu, stack: Stack, query: Query, only: tuple[float, ...] | None
) -> Iterator[tuple[Grid, tuple[float, ...]]]:
    """Every grid with the query's exact columns (and the shape ``only``), of the newest version that has any."""
    fixed = len(query.exact)
    for _, path in data.files(gpu, stack, query.table):
        rows = data.rows(path, query.table)
        keys = [key for key in rows.keys if key[:fixed] == query.exact and only in (None, key[fixed:])]
        for key in keys:
            grid = rows.grid(key)
            assert grid is not None
            yield grid, key[fixed:]
        if keys:
            return


def floors(grid: Grid, query: Query, near: tuple[float, ...], gpu: Gpu) -> np.ndarray:
    """The roofline floor of every cell."""
    sizes: tuple[Any, ...] = tuple(np.meshgrid(*grid.axes, indexing="ij"))  # ops take arrays too
    return np.broadcast_to(query.at(near, sizes).floor_s(gpu), grid.time_s.shape)


def _held_out(grid: Grid, floor_s: np.ndarray, axis: int) -> np.ndarray:
    """predicted / measured of the inner values of ``axis``, rows of decoding only."""
    if len(grid.axes[axis]) < 3:
        return np.empty(0)
    predicted = predict_inner(grid.axes[axis], grid.time_s, floor_s, axis)
    inner = [slice(None)] * grid.time_s.ndim
    inner[axis] = slice(1, -1)
    measured = grid.time_s[tuple(inner)]
    # the first axis counts tokens, sequences or elements
    tokens = np.broadcast_to(grid.axes[0].reshape(-1, *[1] * (measured.ndim - 1)), grid.time_s.shape)[tuple(inner)]
    ratio = predicted / measured
    return ratio[np.isfinite(ratio) & (tokens <= MAX_TOKENS if grid.axes[0][-1] < 1e6 else np.isfinite(ratio))]
