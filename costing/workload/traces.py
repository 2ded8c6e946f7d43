"""Traces of requests, read as a stream of columns: Mooncake's JSON lines and Azure's LLM inference CSV.

    Mooncake  {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [block, ...]}
    Azure     TIMESTAMP,ContextTokens,GeneratedTokens        date and time, up to 9 decimals of a second

Which it is decides the content, not the name; gzip is read too. A Mooncake id names a block of 512 tokens and all
before it; the last block may be partial, so there are ceil(input_length / 512) ids (true of every request of the
published traces). An Azure trace says nothing of prefixes: what would hit a cache is unknown, which is not 0.

Memory is that of a chunk, whatever the length of the file. Times are seconds since the first request.

Errors: ``ValueError`` naming file, line and field: a field missing, unknown, not a whole number, negative, not finite
or 0; timestamps out of order or of two units; ids that do not match the length; a line cut short, a blank one, a line
of another schema; an empty trace. What cannot be seen: a CSV cut inside its last number (the published files end
without a newline), and a file all of whose milliseconds are seconds.

Sources: kvcache-ai/Mooncake (FAST'25 traces), Azure/AzurePublicDataset (LLM inference 2023 and 2024).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from .deploy import Workload

BLOCK_TOKENS = 512
"""Tokens of one block of a Mooncake trace."""

CHUNK_BYTES = 4 << 20
MOONCAKE, AZURE = "mooncake", "azure"
AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")

NO_PREFIXES = "an Azure trace has no prefix information: its hit rate is unknown, which is not 0"


@dataclass(frozen=True)
class Chunk:
    """Some requests in order, as columns.

    Attributes:
        first_request: the number of the first one in its trace, from 0.
        arrival_s: since the first request of the trace.
        block_ids, block_starts: blocks of request ``i`` are ``block_ids[block_starts[i] : block_starts[i + 1]]``;
            None where the trace has no prefix information.
    """

    first_request: int
    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    block_ids: np.ndarray | None = None
    block_starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and starts.

        Raises:
            ValueError: the trace has no prefix information.
        """
        if self.block_ids is None or self.block_starts is None:
            raise ValueError(f"hash_ids: {NO_PREFIXES}")
        return self.block_ids, self.block_starts


@dataclass(frozen=True)
class TraceFile:
    """A trace on disk. ``chunks()`` reads it from the start, each time."""

    path: Path
    format: str
    zone: bool = False

    @property
    def has_prefixes(self) -> bool:
        return self.format == MOONCAKE

    def where(self, request: int) -> str:
        """The line of a request, as errors name it."""
        return f"{self.path}: line {request + (1 if self.format == MOONCAKE else 2)}"

    def chunks(
        self, progress: Callable[[int, int], None] = lambda done, total: None, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Chunk]:
        """The requests, some at a time; ``progress`` gets bytes read and bytes of the file.

        Raises:
            ValueError: see the module.
        """
        from .trace_readers import decompressed, read_azure, read_mooncake, readable
        from .trace_rules import Rules

        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes: expected at least 1; got {chunk_bytes}")
        total = self.path.stat().st_size
        rules, any_request = Rules(self), False
        read = read_mooncake if self.format == MOONCAKE else read_azure
        with readable(self.path), self.path.open("rb") as raw:
            for chunk in read(self, decompressed(raw), chunk_bytes):
                if len(chunk):
                    any_request = True
                    yield rules.checked(chunk)
                progress(raw.tell(), total)
        if not any_request:
            raise ValueError(f"{self.path}: an empty trace: expected at least one request")


def open_trace(path: Path | str) -> TraceFile:
    """A trace of either format, told by its first line.

    Raises:
        ValueError: unreadable, empty, or of neither format; the message says what is missing or unknown.
    """
    from .trace_readers import decompressed, readable

    path = Path(path)
    with readable(path), path.open("rb") as raw:
        stream = decompressed(raw)
        first, second = stream.readline(1 << 16), stream.readline(1 << 16)
    if not first.strip():
        raise ValueError(f"{path}: an empty trace: expected Mooncake JSON lines or an Azure CSV")
    if first.lstrip()[:1] == b"{":
        return TraceFile(path, MOONCAKE)
    header = first.decode("utf-8-sig", "replace").strip()
    names = [name.strip().strip('"') for name in header.split(",")]
    if names == list(AZURE_FIELDS):
        stamp = second.split(b",")[0].strip().strip(b'"')
        return TraceFile(path, AZURE, re.search(rb"(\d[+-]\d\d:?\d\d|Z)$", stamp) is not None)
    known = set(names) & set(AZURE_FIELDS)
    if known:
        missing = [name for name in AZURE_FIELDS if name not in names]
        unknown = [name for name in names if name not in AZURE_FIELDS]
        trouble = [f"missing field {', '.join(missing)}"] if missing else []
        trouble += [f"unknown field {', '.join(unknown)}"] if unknown else []
        detail = "; ".join(trouble) or "its fields in another order"
        raise ValueError(f"{path}: line 1: {detail}: expected {','.join(AZURE_FIELDS)}; got {header[:80]!r}")
    raise ValueError(
        f'{path}: line 1: expected Mooncake JSON lines ({{"timestamp": ...) or the header {",".join(AZURE_FIELDS)}; '
        f"got {header[:60]!r}"
    )


# -- the whole of it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """All requests of a trace, in columns as of ``Chunk``."""

    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    block_ids: np.ndarray | None = None
    block_starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @cached_property
    def has_prefixes(self) -> bool:
        return self.block_ids is not None

    def workload(self, cached_tokens: np.ndarray) -> Workload:
        """As a load to serve. ``cached_tokens``: of each request, such as ``Routed.cached_tokens``; zeros state that
        there is no prefix cache, they are never assumed.

        Raises:
            ValueError: another number of them than of requests, and what ``Workload`` refuses.
        """
        from .deploy import Workload

        return Workload(self.arrival_s, self.input_tokens, cached_tokens, self.output_tokens)


def read_trace(source: TraceFile | Path | str, progress: Callable[[int, int], None] | None = None) -> Trace:
    """The whole trace: 24 bytes per request and 8 per block.

    Raises:
        ValueError: see the module.
    """
    found = source if isinstance(source, TraceFile) else open_trace(source)
    return whole(found.chunks(progress) if progress else found.chunks())


def whole(chunks: Iterable[Chunk]) -> Trace:
    """Chunks put together.

    Raises:
        ValueError: no chunk.
    """
    import numpy as np

    parts = list(chunks)
    if not parts:
        raise ValueError("trace: expected at least one request; got none")
    ids = starts = None
    if parts[0].block_ids is not None:
        blocks = [part.blocks() for part in parts]
        ids = np.concatenate([each for each, _ in blocks])
        counts = np.concatenate([np.diff(each) for _, each in blocks])
        starts = np.concatenate(([0], np.cumsum(counts)))
    return Trace(
        np.concatenate([part.arrival_s for part in parts]), np.concatenate([part.input_tokens for part in parts]),
        np.concatenate([part.output_tokens for part in parts]), ids, starts,
    )  # fmt: skip
