"""Times between measured rows, by way of the roofline.

Between two rows the *inefficiency* (time / floor) is taken as linear in 1 / floor, which is the
same as: time is an affine function of the roofline floor. A launch-bound kernel keeps its constant,
a bandwidth-bound one its slope, and a kernel that is both is exact in between. Where the floor does
not change between two rows (small m: the weights dominate) the time is linear in the logarithm of
the coordinate. Beyond the last row the nearest row's efficiency is held, and the answer says so.

On the published tables this beats interpolating log efficiency or log time along every axis but one;
``tokenfab published check`` prints what it comes to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

FLAT_FLOOR = 0.02
"""Two floors closer than this (relative) count as equal."""

Floor = Callable[[tuple[float, ...]], float]
"""The roofline floor, in seconds, at given coordinates."""


@dataclass(frozen=True)
class Grid:
    """Rows that differ only in their coordinates.

    Attributes:
        axes: sorted distinct values of each coordinate.
        time_s: one time per cell, NaN where there is no row. Shape: the axes' lengths.
        kernel: index of the row's kernel name, -1 where there is no row. Same shape.
    """

    axes: tuple[np.ndarray, ...]
    time_s: np.ndarray
    kernel: np.ndarray

    @cached_property
    def is_dense(self) -> bool:
        """Whether every cell has a row."""
        return bool(np.isfinite(self.time_s).all())

    @cached_property
    def neighbours(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """For each axis, by the cells of the axes before it: the next index at or above each that has rows, and the
        next below; -1 where there is none. One index more than the axis has: above its end."""
        found = []
        for depth in range(self.time_s.ndim):
            has_rows = np.isfinite(self.time_s).any(axis=tuple(range(depth + 1, self.time_s.ndim)))
            length = self.time_s.shape[depth]
            places = np.arange(length)
            above = np.where(has_rows, places, length)
            above = np.minimum.accumulate(above[..., ::-1], axis=-1)[..., ::-1]
            below = np.maximum.accumulate(np.where(has_rows, places, -1), axis=-1)
            end = np.full((*has_rows.shape[:-1], 1), -1)
            found.append(
                (np.concatenate([np.where(above == length, -1, above), end], -1), np.concatenate([end, below], -1))
            )
        return tuple(found)

    @classmethod
    def from_rows(cls, columns: Sequence[np.ndarray], time_s: np.ndarray, kernel: np.ndarray) -> Grid:
        """A grid of rows; of several at one place (different kernels) the fastest."""
        axes = tuple(np.unique(column) for column in columns)
        cells = tuple(np.searchsorted(axis, column) for axis, column in zip(axes, columns, strict=True))
        shape = tuple(len(axis) for axis in axes)
        times = np.full(shape, np.nan)
        kernels = np.full(shape, -1, dtype=np.int32)
        slowest_first = np.argsort(-time_s, kind="stable")  # the fastest is written last
        cells = tuple(cell[slowest_first] for cell in cells)
        times[cells] = time_s[slowest_first]
        kernels[cells] = kernel[slowest_first]
        return cls(axes, times, kernels)


@dataclass(frozen=True)
class Answer:
    """A time from a grid: ``how`` is "exact", "between" rows, or "beyond" the last one."""

    time_s: float
    how: str
    kernel: int
    note: str = ""


def weight(low: float, high: float, at: float, floor_low: float, floor_high: float, floor_at: float) -> float:
    """Weight of the upper row at coordinate ``at`` between ``low`` and ``high``."""
    if abs(floor_high - floor_low) > FLAT_FLOOR * floor_low:
        return (floor_at - floor_low) / (floor_high - floor_low)
    return math.log(at / low) / math.log(high / low)


def predict_inner(axis: np.ndarray, time_s: np.ndarray, floor_s: np.ndarray, position: int) -> np.ndarray:
    """Every inner value of an axis predicted from its two neighbours, by the rule of ``weight``, at once."""
    times, floors = np.moveaxis(time_s, position, 0), np.moveaxis(floor_s, position, 0)
    logs = np.log(axis.astype(float))
    by_coordinate = ((logs[1:-1] - logs[:-2]) / (logs[2:] - logs[:-2])).reshape(-1, *[1] * (times.ndim - 1))
    step = floors[2:] - floors[:-2]
    is_flat = np.abs(step) <= FLAT_FLOOR * floors[:-2]
    upper = np.where(is_flat, by_coordinate, (floors[1:-1] - floors[:-2]) / np.where(is_flat, 1, step))
    return np.moveaxis(times[:-2] + (times[2:] - times[:-2]) * upper, 0, position)


def look_up(grid: Grid, at: tuple[float, ...], floor: Floor, names: Sequence[str]) -> Answer:
    """The time at ``at``. ``names`` are the coordinates' names, for the note."""
    inside = tuple(min(max(value, float(axis[0])), float(axis[-1])) for value, axis in zip(at, grid.axes, strict=True))
    time_s = _between(grid, inside, floor, ())
    nearest = _nearest_row(grid, inside)
    kernel = int(grid.kernel[nearest])
    if math.isfinite(time_s) and inside == at:
        on_rows = all(value == axis[index] for value, axis, index in zip(at, grid.axes, nearest, strict=True))
        return Answer(time_s, "exact" if on_rows else "between", kernel)
    anchor = inside
    if not math.isfinite(time_s):  # a hole in the table: hold the nearest row's efficiency
        anchor = tuple(float(axis[index]) for axis, index in zip(grid.axes, nearest, strict=True))
        time_s = float(grid.time_s[nearest])
    place = ", ".join(
        f"{name}={value:g}" for name, value, wanted in zip(names, anchor, at, strict=True) if value != wanted
    )
    return Answer(time_s * floor(at) / floor(anchor), "beyond", kernel, f"efficiency of the last row ({place}) held")


EXACT, BETWEEN, BEYOND = range(3)
"""Codes of ``look_up_many`` for ``Answer.how``."""

Arrays = tuple[np.ndarray, ...]


def look_up_many(grid: Grid, at: Arrays, floor: Callable[[Arrays], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The times and codes at many places, as ``look_up`` gives them one by one; NaN in a table's holes, which it fills.

    ``floor`` takes and gives arrays.
    """
    inside = tuple(np.clip(value, axis[0], axis[-1]) for value, axis in zip(at, grid.axes, strict=True))
    time_s = _between_many(grid, inside, floor, ())
    is_found = np.isfinite(time_s)
    is_inside = np.logical_and.reduce([value == wanted for value, wanted in zip(inside, at, strict=True)])
    cells = tuple(np.searchsorted(axis, value) for axis, value in zip(grid.axes, inside, strict=True))
    on_axes = [axis[cell] == value for axis, cell, value in zip(grid.axes, cells, at, strict=True)]
    on_rows = np.logical_and.reduce(on_axes) & np.isfinite(grid.time_s[cells])
    codes = np.where(is_inside & is_found, np.where(on_rows, EXACT, BETWEEN), BEYOND)
    if not is_inside.all():
        beyond = time_s * floor(at) / floor(inside)
        time_s = np.where(is_inside, time_s, beyond)
    return time_s, codes


def _between_many(grid: Grid, at: Arrays, floor: Callable[[Arrays], np.ndarray], cell: Arrays) -> np.ndarray:
    """``_between`` at many places; ``cell``: their indices on the axes before."""
    depth = len(cell)
    if depth == len(grid.axes):
        return grid.time_s[cell]
    axis, value = grid.axes[depth], at[depth]
    index = np.searchsorted(axis, value)
    up, down = grid.neighbours[depth]
    above, below = up[(*cell, index)], down[(*cell, index)]
    high = _between_many(grid, at, floor, (*cell, above))
    is_row = axis[above] == value
    is_lost = (above < 0) | (~is_row & (below < 0))
    if not is_row.all():
        low = _between_many(grid, at, floor, (*cell, below))
        low_at, high_at = axis[below].astype(float), axis[above].astype(float)
        before = tuple(grid.axes[position][rows] for position, rows in enumerate(cell))
        after = at[depth + 1 :]
        floor_low, floor_high, floor_at = (floor((*before, place, *after)) for place in (low_at, high_at, value))
        step = floor_high - floor_low
        is_flat = np.abs(step) <= FLAT_FLOOR * floor_low
        with np.errstate(divide="ignore", invalid="ignore"):
            by_coordinate = np.log(value / low_at) / np.log(high_at / low_at)
            upper = np.where(is_flat, by_coordinate, (floor_at - floor_low) / np.where(is_flat, 1, step))
            high = np.where(is_row, high, low + (high - low) * upper)
    return np.where(is_lost, np.nan, high)


def _between(grid: Grid, at: tuple[float, ...], floor: Floor, cell: tuple[int, ...]) -> float:
    """Interpolate the axes after ``cell`` at ``at``, those of ``cell`` on their rows; NaN where rows lack on a side."""
    depth = len(cell)
    if depth == len(grid.axes):
        return float(grid.time_s[cell])
    axis, value = grid.axes[depth], at[depth]
    index = int(np.searchsorted(axis, value))
    if grid.is_dense:
        above, below = index, index - 1
    else:  # each row of a ragged table has coordinates of its own
        rows = np.flatnonzero(np.isfinite(grid.time_s[cell]).any(axis=tuple(range(1, grid.time_s.ndim - depth))))
        place = int(np.searchsorted(rows, index))
        if place == len(rows):
            return math.nan
        above, below = int(rows[place]), int(rows[place - 1]) if place else -1
    high_time = _between(grid, at, floor, (*cell, above))
    if axis[above] == value:
        return high_time
    if below < 0:
        return math.nan
    low_time = _between(grid, at, floor, (*cell, below))
    low, high = float(axis[below]), float(axis[above])
    before = tuple(float(grid.axes[position][row]) for position, row in enumerate(cell))
    after = at[depth + 1 :]
    upper = weight(
        low, high, value, floor((*before, low, *after)), floor((*before, high, *after)), floor((*before, value, *after))
    )
    return low_time + (high_time - low_time) * upper


def _nearest_row(grid: Grid, at: tuple[float, ...]) -> tuple[int, ...]:
    """The measured cell nearest to ``at``, in log coordinates."""
    near = tuple(int(np.argmin(np.abs(np.log(axis / value)))) for axis, value in zip(grid.axes, at, strict=True))
    if np.isfinite(grid.time_s[near]):
        return near
    cells = np.argwhere(np.isfinite(grid.time_s))
    logs = [
        np.log(axis / value)[cells[:, position]]
        for position, (axis, value) in enumerate(zip(grid.axes, at, strict=True))
    ]
    best = cells[np.argmin(sum(np.square(log) for log in logs))]
    return tuple(int(index) for index in best)
