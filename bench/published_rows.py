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


class PublishedDataError(ValueError):
    """The published tables are missing, truncated or not what they should be."""


class Rows:
    """One Parquet file's rows, grouped by key; grids are built when first asked for."""

    def __init__(self, path: Path, table: Table) -> None:
        self.path, self.table = path, table
        self._grids: dict[tuple[Any, ...], Grid] = {}
        self._shapes: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
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
            with pq.ParquetFile(self.path) as file:
                missing = sorted(set(wanted) - set(file.schema_arrow.names))
                if missing:
                    raise PublishedDataError(f"{self.path}: expected column {missing[0]!r}; not in this Parquet file")
                self._index(file.read(columns=wanted), keys)
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
            encoded = data[column].combine_chunks().dictionary_encode()
            values = encoded.dictionary.to_pylist()
            code = code * len(values) + _numbers(encoded.indices)
            self._codes.append({value: index for index, value in enumerate(values)})
        kernels = data["kernel_source"].combine_chunks().dictionary_encode()
        self.kernel_names: list[str] = kernels.dictionary.to_pylist()
        order = np.argsort(code, kind="stable")
        self._code = code[order]
        self._time_s, self._kernel = time_s[order], _numbers(kernels.indices)[order]
        self._axes = [self._axis(data, axis)[order] for axis in table.axes]

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
        rows = slice(*np.searchsorted(self._code, [code, code + 1]))
        if rows.start == rows.stop:
            return None
        grid = Grid.from_rows([axis[rows] for axis in self._axes], self._time_s[rows], self._kernel[rows])
        self._grids[key] = grid
        return grid

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


def _numbers(column: Any) -> np.ndarray:
    """An Arrow array as NumPy. Not ``to_numpy``: it imports pandas, 0.3 s."""
    return np.from_dlpack(column)
