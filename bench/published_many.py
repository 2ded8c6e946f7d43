"""The times of many ops at once: ``PublishedData.time`` for an op whose sizes are arrays.

The same tables, rules and order of answers as ``published``, with one look-up per table instead of one per op: a sweep
asks for ten thousands. Only time and provenance come back; the source in words is ``PublishedData.time``'s to give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .domain import anchor
from .gpus import Gpu
from .interpolation import BEYOND, look_up_many
from .ops import Collective, ExpertAllToAll, Module, Op
from .published import MODEL_EFFICIENCY, MODELLED, PUBLISHED_PROVENANCES, PublishedData, Stack, model_overhead_s
from .published_tables import Query, one_token, queries

MODELLED_CODE = PUBLISHED_PROVENANCES.index(MODELLED)

Times = tuple[np.ndarray, np.ndarray]
"""Seconds, and indices into ``PUBLISHED_PROVENANCES``."""


def mapped(op: Op, change: Callable[[np.ndarray], Any]) -> Op:
    """The op with every array in it changed, those of a module's parts too."""
    changes: dict[str, Any] = {}
    for name, value in vars(op).items():
        if isinstance(value, np.ndarray):
            changes[name] = change(value)
        elif isinstance(value, Op):
            changes[name] = mapped(value, change)
        elif isinstance(value, tuple) and value and isinstance(value[0], Op):
            changes[name] = tuple(mapped(part, change) for part in value)
    return replace(op, **changes) if changes else op


def times(data: PublishedData, op: Op, gpu: Gpu, stack: Stack) -> Times:
    """The time and provenance of one call at each size."""
    near = anchor(op, gpu)
    if near is not None:
        found_s, _ = times(data, *near, stack)
        rise_s = np.maximum(0.0, op.floor_s(gpu) - near[0].floor_s(near[1]))
        return found_s + rise_s / MODEL_EFFICIENCY, np.full(found_s.shape, MODELLED_CODE)
    single = one_token(op)
    found = _answer(data, single, gpu, stack)
    floor_s = np.asarray(op.floor_s(gpu))
    modelled = np.full(floor_s.shape, MODELLED_CODE)
    if found is None:
        return floor_s / MODEL_EFFICIENCY + model_overhead_s(op), modelled
    time_s, codes = found
    if single is not op:
        time_s, codes = time_s * floor_s / single.floor_s(gpu), modelled
    for place in np.flatnonzero(np.isnan(time_s)):  # in a hole of a table the nearest row is searched for
        answer = data.time(mapped(op, lambda array, place=place: array[place].item()), gpu, stack)
        time_s[place], codes[place] = answer.time_s, PUBLISHED_PROVENANCES.index(answer.provenance)
    return time_s, codes


def _answer(data: PublishedData, op: Op, gpu: Gpu, stack: Stack) -> Times | None:
    """As ``PublishedData`` answers: the first that is no model, else the first, else a borrowed one."""
    asked = queries(op, gpu, stack.name)
    best: Times | None = None
    for query in asked:
        answer = _from_tables(data, query, gpu, stack)
        if answer is None:
            continue
        best = answer if best is None else best
        is_better = (best[1] == MODELLED_CODE) & (answer[1] != MODELLED_CODE)
        best = (np.where(is_better, answer[0], best[0]), np.where(is_better, answer[1], best[1]))
        if (best[1] != MODELLED_CODE).all():
            return best
    for query in asked if best is None else ():
        best = best or _borrowed(data, query, op, gpu, stack)
    return best


def _from_tables(data: PublishedData, query: Query, gpu: Gpu, stack: Stack) -> Times | None:
    """The first version that has rows of this very shape."""
    for _, path in data.files(gpu, stack, query.table):
        grid = data.rows(path, query.table).grid((*query.exact, *query.near))
        if grid is None:
            continue
        at = tuple(np.broadcast_arrays(*query.axes))
        time_s, codes = look_up_many(grid, at, _floor(query, query.near, gpu))
        if query.caveat:
            codes = np.full(codes.shape, BEYOND)
        more = None if query.plus is None else _from_tables(data, query.plus, gpu, stack)
        if query.plus is None or more is None:
            return (time_s, codes) if query.plus is None else None
        return time_s + more[0], np.maximum(codes, more[1])
    return None


def _floor(query: Query, near: tuple[float, ...], gpu: Gpu) -> Callable[[Any], np.ndarray]:
    """The roofline floor at arrays of coordinates, with the fields ``near``."""
    return lambda axes: np.asarray(query.at(near, axes).floor_s(gpu))


def _borrowed(data: PublishedData, query: Query, op: Op, gpu: Gpu, stack: Stack) -> Times | None:
    """A model from the nearest published shape; None where there is none."""
    if not query.near or query.plus is not None or isinstance(op, Module):
        return None
    for _, path in data.files(gpu, stack, query.table):
        rows = data.rows(path, query.table)
        near = rows.nearest(query)
        if near is None:
            continue
        grid = rows.grid((*query.exact, *near))
        assert grid is not None
        at = tuple(np.broadcast_arrays(*query.axes))
        floor = _floor(query, near, gpu)
        time_s, codes = look_up_many(grid, at, floor)
        floor_s, near_floor_s = op.floor_s(gpu), floor(at)
        if isinstance(op, Collective | ExpertAllToAll):
            time_s = time_s + np.maximum(0.0, floor_s - near_floor_s) / MODEL_EFFICIENCY
        else:
            time_s = time_s * floor_s / near_floor_s
        return time_s, np.full(codes.shape, MODELLED_CODE)
    return None
