"""What the values of every trace keep to, whichever its format."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .traces import AZURE_FIELDS, BLOCK_TOKENS, MOONCAKE, MOONCAKE_FIELDS, Chunk, TraceFile

if TYPE_CHECKING:
    import numpy as np

_UNITS = 1000
_UNITS_SLACK = 0.01
_UNITS_REQUESTS = 100
"""Milliseconds after seconds: a time 1000 times the one before it, to a hundredth, past so many requests."""


class Rules:
    """Checks of values, over the chunks of one file; turns times into seconds since the first request."""

    def __init__(self, trace: TraceFile) -> None:
        self.trace = trace
        self.fields = MOONCAKE_FIELDS if trace.format == MOONCAKE else AZURE_FIELDS
        self.first: float | None = None
        self.last = -math.inf

    def _refuse(self, chunk: Chunk, bad: np.ndarray, field: str, what: Callable[[int], str]) -> None:
        import numpy as np

        found = np.flatnonzero(bad)
        if len(found):
            at = int(found[0])
            raise ValueError(f"{self.trace.where(chunk.first_request + at)}: {field}: {what(at)}")

    def checked(self, chunk: Chunk) -> Chunk:
        import numpy as np

        stamp, in_name, out_name = self.fields
        times, inputs, outputs = chunk.arrival_s, chunk.input_tokens, chunk.output_tokens
        self._refuse(chunk, ~np.isfinite(times) | (times < 0), stamp,
                     lambda at: f"expected a finite time of 0 or more; got {_plain(times[at])}")  # fmt: skip
        self._refuse(chunk, inputs < 1, in_name, lambda at: f"expected 1 or more; got {inputs[at]}")
        self._refuse(chunk, outputs < 1, out_name, lambda at: f"expected 1 or more; got {outputs[at]}")
        before = np.concatenate(([self.last], times[:-1]))

        def order(at: int) -> str:
            hint = "" if _ratio(times[at], before[at]) is None else " (seconds after milliseconds?)"
            return f"expected times in order; got {_plain(times[at])} after {_plain(before[at])}{hint}"

        self._refuse(chunk, times < before, stamp, order)
        if self.trace.format == MOONCAKE:
            jumps = (before > 0) & (np.abs(times / np.where(before > 0, before, 1) / _UNITS - 1) < _UNITS_SLACK)
            jumps &= np.arange(len(times)) + chunk.first_request >= _UNITS_REQUESTS
            self._refuse(
                chunk, jumps, stamp,
                lambda at: f"mixed units: {_plain(before[at])}, then {_plain(times[at])}, {_UNITS} times as much",
            )  # fmt: skip
        if chunk.block_ids is not None:
            ids, starts = chunk.blocks()
            counts = np.diff(starts)
            expected = -(-inputs // BLOCK_TOKENS)
            self._refuse(
                chunk, counts != expected, "hash_ids",
                lambda at: f"expected ceil(input_length / {BLOCK_TOKENS}) = {expected[at]} ids for "
                f"{inputs[at]} tokens; got {counts[at]}",
            )  # fmt: skip
            if (ids < 0).any():
                self._refuse(chunk, np.add.reduceat(ids < 0, starts[:-1]) > 0, "hash_ids",
                             lambda at: "expected ids of 0 or more; got a negative one")  # fmt: skip
        if self.first is None:
            self.first = float(times[0])
        self.last = float(times[-1])
        scale = 1e-3 if self.trace.format == MOONCAKE else 1.0
        return Chunk(
            chunk.first_request, (times - self.first) * scale, inputs, outputs, chunk.block_ids, chunk.block_starts
        )  # fmt: skip


def _ratio(now: float, before: float) -> float | None:
    """``before / now`` where that is about the ratio of two units; None otherwise."""
    ratio = before / now if now > 0 else math.inf
    return ratio if abs(ratio / _UNITS - 1) < _UNITS_SLACK else None


def _plain(value: float) -> str:
    return f"{value:.15g}"
