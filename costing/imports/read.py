"""Which tool wrote a file, by its content, and the records in it.

A document is a tool's if it has most of the fields that only this tool writes; one that is no tool's, or two tools', is
refused. A tool is one adapter module: the fields it is known by, and ``read``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from . import aiperf, inferencex, sglang, trtllm, vllm
from .checks import documents
from .served import AIPERF, INFERENCEX, SGLANG, TRTLLM, VLLM, Served

Reader = Callable[[str, dict[str, Any]], Served]


def _of_api(where: str, raw: dict[str, Any]) -> Served:
    return inferencex.read(where, inferencex.flat(where, raw))


_KINDS: tuple[tuple[str, tuple[str, ...], int, Reader], ...] = (
    (VLLM, vllm.MARKERS, 3, vllm.read),
    (SGLANG, sglang.MARKERS, 4, sglang.read),
    (TRTLLM, trtllm.MARKERS, 3, trtllm.read),
    (AIPERF, aiperf.MARKERS, 5, aiperf.read),
    (INFERENCEX, inferencex.MARKERS, 5, inferencex.read),
    (f"{INFERENCEX} API", inferencex.API_MARKERS, 4, _of_api),
)
"""Tool, the fields it is known by, how many of them must be there, its reader."""


def detect(where: str, raw: Any) -> Reader:
    """The reader of a document.

    Raises:
        ValueError: no known tool's, or more than one's.
    """
    found = []
    if isinstance(raw, dict):
        found = [(tool, read) for tool, markers, least, read in _KINDS if sum(m in raw for m in markers) >= least]
    if len(found) == 1:
        return found[0][1]
    what = f"fields of {' and '.join(tool for tool, _ in found)}" if found else "none of them"
    raise ValueError(
        f"{where}: format: expected the result of {', '.join(tool for tool, *_ in _KINDS[:-1])}; got {what}"
    )


def is_request_record(raw: Any) -> bool:
    """Whether a document is one request of AIPerf's ``profile_export.jsonl``."""
    return isinstance(raw, dict) and set(aiperf.RECORD_MARKERS) <= set(raw)


def read_results(path: Path, refused: Callable[[str], None] | None = None) -> list[Served]:
    """Every record of a file.

    Args:
        refused: called with the reason of each document that is refused, instead of refusing the file.

    Raises:
        ValueError: unreadable, of no known tool, or a document that is refused.
    """
    found = documents(path)
    first = next(found)
    everything: Iterator[tuple[str, Any]] = chain([first], found)
    if is_request_record(first[1]):
        return [aiperf.read_records(str(path), everything)]
    records = []
    for where, raw in everything:
        try:
            records.append(detect(where, raw)(where, raw))
        except ValueError as error:
            if refused is None:
                raise
            refused(str(error))
    return records
