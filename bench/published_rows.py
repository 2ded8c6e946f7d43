"""The rows of one published Parquet file: read once, grouped by what must match, as grids to interpolate in.

Units: seconds. Errors: ``PublishedDataError`` naming the file.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .interpolation import Grid
from .published_tables import CACHED_ROWS, KV_LENGTH, Query, Table

_SCANS = 8


class PublishedDataError(ValueError):
    """The published tables are missing, truncated or not what they should be."""


class Rows:
    """One Parquet file's rows, grouped by key; grids are built when first asked for."""

    def __init__(self, path: Path, table: Table) -> None:
        self.path, self.table = path, table
        self._grids: dict[tuple[Any, ...], Grid] = {}
        self._shapes: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        self._num_scans = 0
        self._load()

    def _load(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = self.table
        keys = [*table.exact, *table.near]
        virtual = {KV_LENGTH: ("isl", "step"), CACHED_ROWS: ("step",)}
        axes = [column for axis in table.axes for column in virtual.get(axis, (axis,))]
        wanted = list(dict.fromkeys([*keys, *axes, "kernel_source", *table.latency.split("+")]))
        try:
            with pq.ParquetFile(self.path, read_dictionary=[*table.exact, "kernel_source"]) as file:
                missing = sorted(set(wanted) - set(file.schema_arrow.names))
                if missing:
                    raise PublishedDataError(f"{self.path}: expected column {missing[0]!r}; not in this Parquet file")
                self._index(file.read(columns=wanted), keys)
        except KeyError as error:  # of the columns to read as codes
            name = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
            raise PublishedDataError(f"{self.path}: expected column {name!r}; not in this Parquet file") from None
        except (pa.ArrowException, OSError, BufferError) as error:
            reason = str(error).splitlines()[0]
            raise PublishedDataError(
                f"{self.path}: expected a whole Parquet file of {table.name} rows; {reason}"
            ) from None

    def _index(self, data: Any, keys: list[str]) -> None:
        table = self.table
        times = [_numbers(data[part].combine_chunks()).astype(np.float64) for part in table.latency.split("+")]
        time_s = np.sum(times, axis=0) * table.unit_s
        absurd = int(np.count_nonzero(~(np.isfinite(time_s) & (time_s > 0))))
        if absurd or not len(time_s):
            got = f"{absurd} rows that are not" if absurd else "no rows"
            raise PublishedDataError(f"{self.path}: expected positive {table.latency}; got {got}")
        code = np.zeros(len(time_s), dtype=np.int64)
        self._codes: list[dict[Any, int]] = []
        for column in keys:
            encoded = _encoded(data[column])
            values = encoded.dictionary.to_pylist()
            code = code * len(values) + _numbers(encoded.indices)
            self._codes.append({value: index for index, value in enumerate(values)})
        kernels = _encoded(data["kernel_source"])
        self.kernel_names: list[str] = kernels.dictionary.to_pylist()
        self._code, self._time_s, self._kernel = code, time_s, _numbers(kernels.indices)
        self._axes = [self._axis(data, axis) for axis in table.axes]

    @staticmethod
    def _axis(data: Any, axis: str) -> np.ndarray:
        if axis == KV_LENGTH:
            return _numbers(data["isl"].combine_chunks()) + _numbers(data["step"].combine_chunks())
        if axis == CACHED_ROWS:
            return _numbers(data["step"].combine_chunks()) + 1
        return _numbers(data[axis].combine_chunks())

    def grid(self, key: tuple[Any, ...]) -> Grid | None:
        """The rows of ``key`` (exact, then near columns), None without any."""
        if key in self._grids:
            return self._grids[key]
        code = 0
        for value, codes in zip(key, self._codes, strict=True):
            if value not in codes:
                return None
            code = code * len(codes) + codes[value]
        rows = self._rows_of(code)
        if not len(rows):
            return None
        grid = Grid.from_rows([axis[rows] for axis in self._axes], self._time_s[rows], self._kernel[rows])
        self._grids[key] = grid
        return grid

    def _rows_of(self, code: int) -> np.ndarray:
        """The rows of a key, as they stand in the file. Most files are asked for two, and sorting pays from some on."""
        self._num_scans += 1
        if self._num_scans <= _SCANS:
            return np.flatnonzero(self._code == code)
        order, sorted_code = self._sorted
        return order[slice(*np.searchsorted(sorted_code, [code, code + 1]))]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self._code, kind="stable")
        return order, self._code[order]

    def nearest(self, query: Query) -> tuple[Any, ...] | None:
        """The shape with rows nearest to the query's, in log coordinates; None where its exact columns have none."""
        fixed = len(query.exact)
        if query.exact not in self._shapes:
            self._shapes[query.exact] = [key[fixed:] for key in self.keys if key[:fixed] == query.exact]
        shapes = self._shapes[query.exact]
        if not shapes:
            return None
        logs = np.abs(np.log(np.array(shapes, dtype=float) / np.array(query.near, dtype=float))).sum(axis=1)
        return shapes[int(np.argmin(logs))]

    @property
    def num_rows(self) -> int:
        return len(self._time_s)

    @cached_property
    def keys(self) -> list[tuple[Any, ...]]:
        """Every key that has rows."""
        values = [list(codes) for codes in self._codes]
        found = []
        for code in np.unique(self._code):
            key, rest = [], int(code)
            for column in reversed(values):
                rest, index = divmod(rest, len(column))
                key.append(column[index])
            found.append(tuple(reversed(key)))
        return found


def _encoded(column: Any) -> Any:
    """A column as codes and their values: as the file has it, where that is so; it takes a quarter of the time."""
    has_codes = hasattr(column.type, "value_type")
    return column.unify_dictionaries().combine_chunks() if has_codes else column.combine_chunks().dictionary_encode()


def _numbers(column: Any) -> np.ndarray:
    """An Arrow array as NumPy. Not ``to_numpy``: it imports pandas, 0.3 s."""
    return np.from_dlpack(column)
