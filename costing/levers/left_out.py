"""Errors of published times, from the published tables themselves: rows, shapes and tables left out and said again.

Each maker yields (table, axis, log(measured / said)) of one stack on one GPU; what they are is in ``calibration``. Rows
of decoding only (``bench.published_check.MAX_TOKENS``). Needs the published data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ...bench.gpus import Gpu
    from ...bench.ops import Op
    from ...bench.published import PublishedData, Stack
    from ...bench.published_tables import Query

NOISE, INTERPOLATION, BEYOND, BORROWED, ROOFLINE, REPLICATED = CAUSES = (
    "noise", "interpolation", "beyond", "borrowed", "roofline", "replicated",
)  # fmt: skip

MAX_SHAPES = 16
"""Shapes per table and format that the models are calibrated on, evenly spaced."""

Errors = tuple[str, str, str, str, str, "np.ndarray"]
"""(cause, GPU, stack, table, axis, log(measured / said))."""


def all_errors(data: PublishedData, gpus: Sequence[str], causes: Iterable[str] = CAUSES) -> Iterator[Errors]:
    """What the spreads are made of, by GPU."""
    from ...bench.gpus import get_gpu
    from ...bench.published import STACKS

    makers = {
        NOISE: repeat_errors, INTERPOLATION: interpolation_errors, BEYOND: beyond_errors, BORROWED: borrowed_errors,
        ROOFLINE: roofline_errors, REPLICATED: replicated_errors,
    }  # fmt: skip
    for cause in causes:
        for name in gpus:
            gpu = get_gpu(name)
            for stack in (data.stack(gpu, spec) for spec in STACKS):
                for table, axis, errors in makers[cause](data, gpu, stack):
                    if len(errors):
                        yield cause, name, stack.name, table, axis, errors


TableErrors = Iterator[tuple[str, str, "np.ndarray"]]
"""(table, axis, log(measured / said))."""


def repeat_errors(data: PublishedData, gpu: Gpu, stack: Stack) -> TableErrors:
    """Rows of one file alike in everything but their time, once each way."""
    import numpy as np
    import pyarrow.parquet as pq

    from ...bench.published_tables import TABLES

    for table in {each.file: each for each in TABLES}.values():
        if table.file == "wideep_deepep_ll_perf":  # several times a row
            continue
        for _, path in data.files(gpu, stack, table)[:1]:
            rows = pq.read_table(path)
            keys = [name for name in rows.column_names if name not in (table.latency, "power", "transmit_us")]
            pairs = rows.group_by(keys).aggregate([(table.latency, "min"), (table.latency, "max"), ([], "count_all")])
            times = pairs.filter(np.asarray(pairs["count_all"]) == 2)
            low, high = (np.asarray(times[f"{table.latency}_{end}"], dtype=float) for end in ("min", "max"))
            half = np.log(high / low) / math.sqrt(2)
            yield table.name, "", np.concatenate([half, -half])


def interpolation_errors(data: PublishedData, gpu: Gpu, stack: Stack) -> TableErrors:
    """Rows left out along each axis."""
    import numpy as np

    from ...bench.published_check import held_out
    from ...bench.published_tables import queries

    for probe in _probes():
        for query in queries(probe, gpu, stack.name)[:1]:
            for axis, ratio in held_out(data, gpu, stack, probe):
                yield query.table.name, axis, -np.log(ratio[ratio > 0])


def beyond_errors(data: PublishedData, gpu: Gpu, stack: Stack) -> TableErrors:
    """The last decode row of each axis, its predecessor's efficiency held."""
    import numpy as np

    for _, query, grid, floor_s, _ in _decode_grids(data, gpu, stack):
        for position in range(grid.ndim):
            if grid.shape[position] >= 2:
                last, before = (np.moveaxis(grid / floor_s, position, 0)[row] for row in (-1, -2))
                errors = np.log(last / before).ravel()
                yield query.table.name, "", errors[np.isfinite(errors)]


def roofline_errors(data: PublishedData, gpu: Gpu, stack: Stack) -> TableErrors:
    """Decode rows against the model that is used where there is no table."""
    import numpy as np

    from ...bench.published import MODEL_EFFICIENCY, model_timing

    for probe, query, grid, floor_s, _ in _decode_grids(data, gpu, stack, MAX_SHAPES):
        overhead_s = model_timing(probe, gpu, "").time_s - probe.floor_s(gpu) / MODEL_EFFICIENCY
        errors = np.log(grid / (floor_s / MODEL_EFFICIENCY + overhead_s)).ravel()
        yield query.table.name, "", errors[np.isfinite(errors)]


def borrowed_errors(data: PublishedData, gpu: Gpu, stack: Stack) -> TableErrors:
    """Shapes left out, a subset: modelled from the nearest other shape, as ``PublishedData`` would without them."""
    import numpy as np

    from ...bench.ops import AttentionModule
    from ...bench.published_tables import queries

    for probe in _probes():
        for query in queries(probe, gpu, stack.name)[:1]:
            if query.near and query.plus is None and not isinstance(probe, AttentionModule):
                yield query.table.name, "", np.array(list(_left_out(data, gpu, stack, query)))


def _left_out(data: PublishedData, gpu: Gpu, stack: Stack, query: Query) -> Iterator[float]:
    """log(measured / modelled) at three rows of up to ``MAX_SHAPES`` shapes."""
    import numpy as np

    from ...bench.published_check import grids

    found = {near: grid for grid, near in grids(data, gpu, stack, query, None)}
    shapes = list(found)
    if len(shapes) < 2:
        return
    logs = np.log(np.array(shapes, dtype=float))
    for index in _spaced(len(shapes), MAX_SHAPES):
        distance = np.abs(logs - logs[index]).sum(axis=1)
        distance[index] = np.inf
        neighbour = shapes[int(np.argmin(distance))]
        grid = found[shapes[index]]
        cells = np.argwhere(np.isfinite(grid.time_s) & _is_decoding(grid.axes, grid.time_s.shape))
        for row in _spaced(len(cells), 3):
            axes = tuple(float(axis[cell]) for axis, cell in zip(grid.axes, cells[row], strict=True))
            said_s = borrow(replace(query, axes=axes, near=shapes[index]), gpu, found[neighbour], neighbour)
            yield math.log(float(grid.time_s[tuple(cells[row])]) / said_s)


def borrow(query: Query, gpu: Gpu, grid: Any, neighbour: tuple[float, ...]) -> float:
    """Seconds of a query's op by the efficiency of a neighbouring shape (or for communication, its time)."""
    from ...bench.interpolation import look_up
    from ...bench.ops import Collective, ExpertAllToAll
    from ...bench.published import MODEL_EFFICIENCY

    op, other = query.at(query.near, query.axes), query.at(neighbour, query.axes)
    found = look_up(grid, query.axes, lambda axes: query.at(neighbour, axes).floor_s(gpu), query.table.axes)
    rise_s = op.floor_s(gpu) - other.floor_s(gpu)
    if isinstance(op, Collective | ExpertAllToAll):
        return found.time_s + max(0.0, rise_s) / MODEL_EFFICIENCY
    return found.time_s * op.floor_s(gpu) / other.floor_s(gpu)


def replicated_errors(data: PublishedData, gpu: Gpu, stack: Stack) -> TableErrors:
    """SGLang's wide-EP rows over its rows that ran every token on the rank, same shape, format and tokens."""
    import numpy as np

    from ...bench.ops import Experts
    from ...bench.published_check import grids
    from ...bench.published_tables import MOE, WIDE_EP_MOE, queries

    probe = Experts(128, 7168, 2048, 8, 256, 8, 1, "fp8_block", "fp8_group", "balanced", True)
    asked = {query.table: query for query in queries(probe, gpu, stack.name)}
    if not {MOE, WIDE_EP_MOE} <= set(asked):
        return
    whole = {near: grid for grid, near in grids(data, gpu, stack, asked[MOE], None)}
    for wide, near in grids(data, gpu, stack, asked[WIDE_EP_MOE], None):
        other = whole.get((*near, 1))
        if other is not None:
            tokens, ours, theirs = np.intersect1d(wide.axes[0], other.axes[0], return_indices=True)
            errors = np.log(wide.time_s[ours] / other.time_s[theirs])
            yield MOE.name, f"ep{near[4]:g}", errors[np.isfinite(errors) & (tokens > 0)]


def _decode_grids(
    data: PublishedData, gpu: Gpu, stack: Stack, most: int | None = None
) -> Iterator[tuple[Op, Query, Any, Any, tuple[float, ...]]]:
    """(probe, query, times, floors, shape): grids cut to decode rows; of ``most`` shapes per probe, evenly spaced."""
    from ...bench.ops import AttentionModule
    from ...bench.published_check import MAX_TOKENS, floors, grids
    from ...bench.published_tables import queries

    for probe in _probes():
        for query in queries(probe, gpu, stack.name)[:1]:
            only = query.near if isinstance(probe, AttentionModule) else None
            found = list(grids(data, gpu, stack, query, only))
            for index in _spaced(len(found), most or len(found)):
                grid, near = found[index]
                axes = grid.axes
                rows = len(axes[0]) if axes[0][-1] >= 1e6 else int((axes[0] <= MAX_TOKENS).sum())
                if rows:
                    yield probe, query, grid.time_s[:rows], floors(grid, query, near, gpu)[:rows], near


def _is_decoding(axes: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Cells of at most the decode range's tokens; all where the first axis counts elements."""
    import numpy as np

    from ...bench.published_check import MAX_TOKENS

    inside = (axes[0] <= MAX_TOKENS) | (axes[0][-1] >= 1e6)
    return np.broadcast_to(inside.reshape(-1, *[1] * (len(shape) - 1)), shape)


def _spaced(count: int, most: int) -> list[int]:
    """At most ``most`` indices of ``count``, evenly spaced."""
    return sorted({round(step * (count - 1) / max(1, most - 1)) for step in range(most)}) if count else []


def _probes() -> list[Op]:
    """Ops that name the tables: those of ``published_check`` and the ones it does not hold out."""
    from ...bench.ops import BatchedMatmul, Collective, Experts
    from ...bench.published_check import table_probes

    wide = [Experts(128, 7168, 2048, 8, 256, 8, 1, w, a, "balanced", True) for w, a in (("bf16", "bf16"),
            ("fp8_block", "fp8_group"))]  # fmt: skip
    more: list[Op] = [
        *wide, BatchedMatmul("pre", 128, 64, 512, 128), BatchedMatmul("post", 128, 64, 128, 512),
        Collective("all_gather", 4096, 2), Collective("reduce_scatter", 4096, 2),
    ]  # fmt: skip
    return [probe for _, _, probes in table_probes() for probe in probes] + more
