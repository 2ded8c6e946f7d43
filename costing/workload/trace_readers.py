"""The two formats, a chunk at a time, and what a line that is not of them says of itself."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec

from .traces import AZURE_FIELDS, Chunk, TraceFile

# -- Mooncake --------------------------------------------------------------------------------------

_Tokens = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
_BlockId = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]


class _Row(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    timestamp: int | float
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: list[_BlockId]


def read_mooncake(trace: TraceFile, stream: IO[bytes], chunk_bytes: int) -> Iterator[Chunk]:
    decoder = msgspec.json.Decoder(_Row)
    rest, request, kind = b"", 0, None
    while True:
        data = stream.read(chunk_bytes)
        lines, newline, after = (rest + data).rpartition(b"\n")
        if not data:
            lines, newline, after = after, b"", b""
        rest = after
        if not lines and not newline:
            if not data:
                return
            continue
        rows = _rows(trace, decoder, lines, request)
        kind = _same_kind(trace, rows, request, kind)
        yield _mooncake_chunk(rows, request)
        request += len(rows)


def _rows(trace: TraceFile, decoder: msgspec.json.Decoder[_Row], lines: bytes, request: int) -> list[_Row]:
    """One row a line. Line by line only to find the one at fault."""
    try:
        rows = decoder.decode_lines(lines)
        if len(rows) == lines.count(b"\n") + 1:
            return rows
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    for offset, line in enumerate(lines.split(b"\n")):
        where = trace.where(request + offset)
        if not line.strip():
            raise ValueError(f"{where}: a blank line; expected a request")
        try:
            decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: {_said(line, error)}") from None
    raise ValueError(f"{trace.where(request)}: expected one request a line")


def _said(line: bytes, error: Exception) -> str:
    """What is wrong with a line, its field named."""
    try:
        found = json.loads(line)
    except ValueError:
        return f"truncated or malformed JSON: {error}; got {line[-60:].decode('utf-8', 'replace')!r}"
    if isinstance(found, dict):
        for field, value in found.items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"{field}: expected a finite number; got {value}"
    return str(error)


def _same_kind(trace: TraceFile, rows: list[_Row], request: int, kind: type | None) -> type | None:
    """All timestamps are whole numbers, or all have a decimal point.

    Raises:
        ValueError: both kinds in one file.
    """
    kinds = {type(row.timestamp) for row in rows}
    if kind is None and rows:
        kind = type(rows[0].timestamp)
    if kinds - {kind}:
        at = next(index for index, row in enumerate(rows) if type(row.timestamp) is not kind)
        raise ValueError(
            f"{trace.where(request + at)}: timestamp: mixed units: {rows[at].timestamp!r} where the trace began with "
            f"{'whole numbers' if kind is int else 'decimals'}"
        )
    return kind


def _mooncake_chunk(rows: list[_Row], request: int) -> Chunk:
    import numpy as np

    size = len(rows)
    counts = np.fromiter((len(row.hash_ids) for row in rows), np.int64, size)
    ids = np.fromiter(chain.from_iterable(row.hash_ids for row in rows), np.int64, int(counts.sum()))
    return Chunk(
        request,
        np.array([row.timestamp for row in rows], np.float64),
        np.fromiter((row.input_length for row in rows), np.int64, size),
        np.fromiter((row.output_length for row in rows), np.int64, size),
        ids,
        np.concatenate(([0], np.cumsum(counts))),
    )


# -- Azure -----------------------------------------------------------------------------------------


def read_azure(trace: TraceFile, stream: IO[bytes], chunk_bytes: int) -> Iterator[Chunk]:
    import numpy as np
    import pyarrow as pa
    from pyarrow import csv

    stamp, context, generated = AZURE_FIELDS
    types = {stamp: pa.timestamp("ns", "UTC" if trace.zone else None), context: pa.int64(), generated: pa.int64()}
    request, start_ns = 0, None
    try:
        batches = csv.open_csv(
            stream,
            read_options=csv.ReadOptions(block_size=max(chunk_bytes, 1 << 12), use_threads=False),
            parse_options=csv.ParseOptions(ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
        )
        for batch in batches:
            stamps = batch.column(0).cast(pa.int64()).to_numpy()
            if start_ns is None and len(stamps):
                start_ns = int(stamps[0])
            times = (stamps - (start_ns or 0)) / 1e9
            if len(times) and times.min() < 0:  # before the first: out of order, not negative
                at = int(np.argmax(times < 0))
                got, first = batch.column(0)[at].as_py(), trace.where(request + at)
                raise ValueError(f"{first}: {stamp}: expected times in order; got {got} before the first request")
            yield Chunk(
                request, times, batch.column(1).to_numpy().astype(np.int64), batch.column(2).to_numpy().astype(np.int64)
            )
            request += batch.num_rows
    except pa.ArrowInvalid as error:
        raise ValueError(f"{trace.path}: {_arrow_said(str(error))}") from None


def _arrow_said(error: str) -> str:
    """Arrow's message, with our names for line and field."""
    found = re.search(r"In CSV column #(\d+): Row #(\d+): (.*)", error, re.DOTALL)
    if found:
        return f"line {found[2]}: {AZURE_FIELDS[int(found[1])]}: {found[3]}"
    found = re.search(r"Row #(\d+): Expected \d+ columns, got (\d+): ?(.*)", error, re.DOTALL)
    if found:
        got = f"{found[2]} fields (truncated, or another schema): {found[3][:60].strip()!r}"
        return f"line {found[1]}: expected {','.join(AZURE_FIELDS)}; got {got}"
    return error


# -- bytes -----------------------------------------------------------------------------------------


def decompressed(raw: IO[bytes]) -> IO[bytes]:
    """The bytes, out of gzip where they are in it."""
    start = raw.read(2)
    raw.seek(0)
    return gzip.open(raw, "rb") if start == b"\x1f\x8b" else raw  # pyright: ignore[reportReturnType]


class readable:
    """Turns what a disk or gzip refuses into one error with the path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
            raise ValueError(f"{self.path}: truncated or damaged gzip: {error}") from None
        if isinstance(error, OSError):
            raise ValueError(f"trace: cannot read {self.path}: {error.strerror or error}") from None
