"""Interpolation by way of the roofline: exact where it should be, honest where it cannot be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.bench.interpolation import Grid, look_up, predict_inner, weight


def grid_of(axes: list[list[float]], time_s: np.ndarray) -> Grid:
    mesh = np.meshgrid(*[np.array(axis, float) for axis in axes], indexing="ij")
    kernel = np.zeros(time_s.size, dtype=np.int32)
    return Grid.from_rows([m.ravel() for m in mesh], time_s.ravel(), kernel)


def test_row_is_returned_as_it_is() -> None:
    grid = grid_of([[1, 2, 4]], np.array([3.0, 5.0, 11.0]))
    answer = look_up(grid, (2,), lambda at: at[0], ("m",))
    assert (answer.time_s, answer.how) == (5.0, "exact")


@given(
    st.floats(1e-6, 1e-3), st.floats(1.0, 5.0), st.floats(1.0, 64.0),
)  # fmt: skip
def test_affine_function_of_the_floor_is_exact(constant: float, slope: float, at: float) -> None:
    """A launch-bound constant plus a bandwidth-bound slope: what real kernels do."""

    def floor(point: tuple[float, ...]) -> float:
        return 1e-6 * point[0] ** 1.7

    axis = [1.0, 2.0, 8.0, 64.0]
    grid = grid_of([axis], np.array([constant + slope * floor((x,)) for x in axis]))
    assert look_up(grid, (at,), floor, ("m",)).time_s == pytest.approx(constant + slope * floor((at,)), rel=1e-9)


def test_flat_floor_uses_the_logarithm_of_the_coordinate() -> None:
    """At small m the weights dominate: the floor is the same on both sides."""
    grid = grid_of([[1, 16]], np.array([10.0, 18.0]))
    assert look_up(grid, (4,), lambda at: 1.0, ("m",)).time_s == pytest.approx(14.0)


def test_bilinear_product_is_exact_in_two_axes() -> None:
    axes = [[1.0, 4.0, 16.0], [128.0, 1024.0]]
    times = np.array([[5 + 2 * a * b for b in axes[1]] for a in axes[0]])
    answer = look_up(grid_of(axes, times), (3.0, 500.0), lambda at: at[0] * at[1], ("batch", "length"))
    assert answer.time_s == pytest.approx(5 + 2 * 3 * 500)
    assert answer.how == "between"


@pytest.mark.parametrize(("at", "held"), [(32.0, "m=16"), (0.5, "m=1")])
def test_beyond_the_last_row_holds_its_efficiency_and_says_so(at: float, held: str) -> None:
    grid = grid_of([[1, 16]], np.array([2.0, 40.0]))
    answer = look_up(grid, (at,), lambda point: point[0], ("m",))
    assert answer.time_s == pytest.approx(at * (2.5 if at > 1 else 2.0))
    assert answer.how == "beyond"
    assert held in answer.note


def test_hole_is_never_filled_silently() -> None:
    """A cell that ran out of memory when it was measured: nothing is interpolated across it."""
    times = np.array([[1.0, 2.0], [2.0, np.nan]])
    full = grid_of([[1, 2], [10, 20]], np.nan_to_num(times, nan=9.0))
    grid = Grid(full.axes, times, np.where(np.isnan(times), -1, 0))
    answer = look_up(grid, (1.9, 19.0), lambda at: at[0] * at[1], ("batch", "length"))
    assert answer.how == "beyond"
    assert math.isfinite(answer.time_s)
    assert answer.kernel == 0


def test_ragged_rows_use_their_own_coordinates() -> None:
    """Batch 1 was measured at lengths 10 and 40, batch 2 at 10, 20 and 40: no cell (1, 20), yet no hole either."""
    columns = [np.array([1, 1, 2, 2, 2]), np.array([10, 40, 10, 20, 40])]
    times = columns[0] * columns[1] * 1.0
    grid = Grid.from_rows(columns, times, np.zeros(5, dtype=np.int32))
    answer = look_up(grid, (1, 25), lambda at: at[0] * at[1], ("batch", "length"))
    assert (answer.time_s, answer.how) == (25, "between")
    assert look_up(grid, (1.5, 30), lambda at: at[0] * at[1], ("batch", "length")).time_s == pytest.approx(45)
    assert look_up(grid, (1, 20), lambda at: at[0] * at[1], ("batch", "length")).how == "between"


def test_of_several_kernels_the_fastest_counts_and_is_named() -> None:
    column = np.array([8, 8, 16, 16])
    grid = Grid.from_rows([column], np.array([3.0, 2.0, 4.0, 5.0]), np.array([0, 1, 0, 1], dtype=np.int32))
    assert [look_up(grid, (m,), lambda at: 1.0, ("m",)).time_s for m in (8, 16)] == [2.0, 4.0]
    assert [look_up(grid, (m,), lambda at: 1.0, ("m",)).kernel for m in (8, 16)] == [1, 0]


def test_prediction_at_once_agrees_with_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    axis, times = np.array([1, 2, 3, 8, 64]), rng.uniform(1, 2, (5, 3))
    floors = np.sort(rng.uniform(1, 2, (5, 3)), axis=0)
    floors[1:3, 0] = floors[0, 0]  # a flat stretch
    predicted = predict_inner(axis, times, floors, 0)
    for row in range(1, 4):
        for column in range(3):
            upper = weight(axis[row - 1], axis[row + 1], axis[row], *floors[[row - 1, row + 1, row], column])
            low, high = times[row - 1, column], times[row + 1, column]
            assert predicted[row - 1, column] == pytest.approx(low + (high - low) * upper)
