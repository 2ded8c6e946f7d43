"""Reading a benchmark's file with suspicion: JSON, fields, and whether the figures agree with each other.

A figure that another contradicts is refused, not repaired: output tokens / duration against the stated throughput,
requests in flight (rate x latency) against the limit that the load kept to, percentiles against their order, and
times that only a mistaken unit explains. Errors: ``ValueError``, one line: file, field, what was expected, what came.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .served import Served, Spread

T = TypeVar("T")

LEAST, GREATEST = 1e-12, 1e15
"""Of any figure of a result: beyond is no measurement."""

ROUNDING = 0.005
"""Relative: what rounding to two or three digits leaves."""

SLACK_MEASURED, SLACK_ESTIMATED = 1.05, 2.0
"""Of requests in flight over their limit: a tool's own figure; TTFT + TPOT x length, whose means do not multiply."""

LEAST_FILLED = 0.02
"""A closed loop that keeps less than this share of its limit in flight has a latency in the wrong unit."""

LEAST_TPOT_S, GREATEST_TPOT_S = 5e-5, 100.0
"""20,000 tokens/s/user, and a token in 100 s: beyond these a unit is wrong."""

PARTS_OF_E2E = 4.0
"""TTFT + TPOT x length against the end-to-end latency, either way: means do not multiply, units differ by 1000."""

LEAST_TTFT_OF_TPOT = 0.05
"""The first token takes a pass of its own: a TTFT below a twentieth of the TPOT is in another unit."""

_STATISTIC = re.compile(r"(mean|median|p\d+(?:\.\d+)?)")


def documents(path: Path) -> Iterator[tuple[str, Any]]:
    """Where and what of each JSON document of a file: one, a list's items, or one per line (read as it goes).

    Raises:
        ValueError: unreadable, empty, not JSON (the line is named), a key given twice.
    """
    where = str(path)
    try:
        with path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
            if not first:
                raise ValueError(f"{where}: empty")
            if _is_object(first):
                lines.seek(0)
                filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
                head = next(filled)
                following = next(filled, None)
                if following is None:
                    yield where, _parsed(head[1], where)
                    return
                yield f"{where}:{head[0]}", _parsed(head[1], f"{where}:{head[0]}")
                yield f"{where}:{following[0]}", _parsed(following[1], f"{where}:{following[0]}")
                for number, line in filled:
                    yield f"{where}:{number}", _parsed(line, f"{where}:{number}")
                return
            lines.seek(0)
            whole = _parsed(lines.read(), where)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8 text") from None
    if not isinstance(whole, list):
        yield where, whole
        return
    if not whole:
        raise ValueError(f"{where}: empty")
    for index, item in enumerate(whole):
        yield f"{where}[{index}]", item


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _parsed(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{where}: {key}: given twice")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON, or cut off: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON: too deep") from None


@dataclass(frozen=True)
class Source:
    """A document being read, for errors that say where."""

    where: str

    def refuse(self, field: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{self.where}: {field}: expected {expected}; got {got!r}")

    def read(self, raw: Any, schema: type[T]) -> T:
        """The document in its schema; every number of it finite.

        Raises:
            ValueError: a field that is missing, of another type, not finite.
        """
        try:
            return msgspec.convert(raw, schema)
        except msgspec.ValidationError as error:
            raise ValueError(f"{self.where}: {error}") from None

    def positive(self, field: str, value: float) -> float:
        if not LEAST <= value <= GREATEST:
            raise self.refuse(field, "a positive number", value)
        return float(value)

    def count(self, field: str, value: float, least: int = 1) -> int:
        if not least <= value <= GREATEST or value != int(value):
            raise self.refuse(field, f"a whole number of at least {least}", value)
        return int(value)

    def agrees(self, field: str, stated: float, computed: float, how: str) -> float:
        """A stated figure that another way of computing it confirms, within rounding."""
        self.positive(field, stated)
        if abs(stated - computed) > ROUNDING * abs(computed):
            raise self.refuse(field, f"{computed:.6g} = {how}", stated)
        return float(stated)

    def spread(self, raw: Mapping[str, Any], template: str, unit_s: float) -> Spread | None:
        """The statistics of a latency: ``template`` with ``*`` for mean, median, p99, ...; ``unit_s`` of its values.

        None where there are none, or where all are 0, as the tools write a latency that they did not measure.
        """
        before, _, after = template.partition("*")
        found: dict[str, float] = {}
        for key, value in raw.items():
            if not (key.startswith(before) and key.endswith(after)) or len(key) <= len(before) + len(after):
                continue
            name = key[len(before) : len(key) - len(after)]
            if _STATISTIC.fullmatch(name):
                found[name] = self.number(key, value)
        return self.spread_of(found, template, unit_s)

    def number(self, field: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -GREATEST <= value <= GREATEST:
            raise self.refuse(field, "a finite number", value)
        return float(value)

    def spread_of(
        self, found: Mapping[str, float], template: str, unit_s: float, called: Mapping[str, str] | None = None
    ) -> Spread | None:
        """A spread of values by statistic: mean, median, min, max, p99, ... ``called``: the file's words for these.

        Raises:
            ValueError: negative, out of order, a mean that its percentiles do not allow.
        """
        if not any(found.values()):
            return None

        def field(name: str) -> str:
            return template.replace("*", (called or {}).get(name, name))

        percentiles: dict[float, float] = {}
        named: dict[float, str] = {}
        for name, value in found.items():
            if value < 0:
                raise self.refuse(field(name), "0 or more", value)
            if name == "mean":
                continue
            rank = {"median": 50.0, "min": 0.0, "max": 100.0}.get(name)
            rank = float(name[1:]) if rank is None else rank
            if not 0 <= rank <= 100:
                raise self.refuse(field(name), "a percentile of 0 to 100", rank)
            named[rank] = name
            if percentiles.setdefault(rank, value) != value:
                raise self.refuse(field(name), f"{percentiles[rank]:g}, the other figure of percentile {rank:g}", value)
        ordered = sorted(percentiles.items())
        for (low, less), (high, more) in pairwise(ordered):
            if less > more * (1 + 1e-9):
                raise self.refuse(field(named[high]), f"at least {less:g}, which percentile {low:g} is", more)
        mean = found.get("mean")
        if mean is not None:
            # a share of 1 - rank is at or above the percentile (half of it, in few requests): so much is the mean
            least = max((percentiles.get(0.0, 0.0), *(0.5 * (1 - rank / 100) * value for rank, value in ordered)))
            greatest = percentiles.get(100.0, math.inf)
            if not least * (1 - 1e-9) <= mean <= greatest * (1 + 1e-9):
                raise self.refuse(field("mean"), f"between {least:g} and {greatest:g}, by its percentiles", mean)
        return Spread(None if mean is None else mean * unit_s, {rank: value * unit_s for rank, value in ordered})

    def check(self, served: Served, fields: Mapping[str, str]) -> Served:
        """The record, if its latencies and its load can be of one run; with an estimate of what was in flight.

        ``fields``: the file's names for errors.

        Raises:
            ValueError: a latency that another figure contradicts, most often one in another unit.
        """
        tpot = served.tpot.mean_s if served.tpot else None
        ttft = served.ttft.mean_s if served.ttft else None
        tpot_field, ttft_field = fields.get("tpot", "tpot"), fields.get("ttft", "ttft")
        if tpot is not None and not LEAST_TPOT_S <= tpot <= GREATEST_TPOT_S:
            raise self.refuse(
                tpot_field, f"{LEAST_TPOT_S:g} to {GREATEST_TPOT_S:g} s per token (wrong unit?)", f"{tpot:g} s"
            )
        e2e = served.e2e.mean_s if served.e2e else None
        if tpot is not None and ttft is not None and e2e is not None:
            parts = ttft + tpot * max(0.0, served.output_tokens_mean - 1)
            if not 1 / PARTS_OF_E2E <= parts / e2e <= PARTS_OF_E2E:
                raise self.refuse(
                    ttft_field if ttft > e2e else tpot_field,
                    f"TTFT + TPOT x output of about the {e2e:g} s that requests took, not {parts:.3g} s (wrong unit?)",
                    f"{ttft:g} s + {tpot:g} s x {served.output_tokens_mean - 1:g}",
                )
        if tpot is not None and ttft is not None and ttft < LEAST_TTFT_OF_TPOT * tpot:
            raise self.refuse(
                ttft_field,
                f"at least {LEAST_TTFT_OF_TPOT:g} of the mean TPOT of {tpot:g} s (wrong unit?)",
                f"{ttft:g} s",
            )
        if served.acceptance_length is not None and not 1 <= served.acceptance_length <= GREATEST:
            raise self.refuse(fields.get("acceptance", "acceptance_length"), "1 or more", served.acceptance_length)
        limit = served.concurrency_limit
        measured = served.mean_in_flight is not None
        served = replace(served, estimated_in_flight=_estimated_in_flight(served))
        flight = served.mean_in_flight if measured else served.estimated_in_flight
        if flight is None:
            return served
        slack = SLACK_MEASURED if measured else SLACK_ESTIMATED
        if limit is not None and flight > slack * limit:
            raise self.refuse(
                fields.get("limit", "concurrency"),
                f"at least the {flight:.4g} requests in flight that rate x latency imply (wrong unit?)", limit,
            )  # fmt: skip
        if served.completed is not None and flight > slack * served.completed:
            raise self.refuse(
                fields.get("tpot", "latency"),
                f"latencies shorter than the run: {flight:.4g} requests in flight of {served.completed} (wrong unit?)",
                tpot if tpot is not None else "the end-to-end latency",
            )
        if served.request_rate_per_s != math.inf or limit is None or served.completed is None:
            return served
        if flight < LEAST_FILLED * min(limit, served.completed):
            raise self.refuse(
                tpot_field,
                f"latencies that keep the offered {limit:g} requests in flight, not {flight:.3g} (wrong unit?)",
                f"{tpot:g} s" if tpot is not None else None,
            )
        return served


def _estimated_in_flight(served: Served) -> float | None:
    """Request rate x (TTFT + TPOT x the tokens after the first)."""
    if served.completed is None or served.duration_s is None or served.ttft is None or served.tpot is None:
        return None
    if served.ttft.mean_s is None or served.tpot.mean_s is None:
        return None
    decode = served.tpot.mean_s * max(0.0, served.output_tokens_mean - 1)
    return served.completed / served.duration_s * (served.ttft.mean_s + decode)


def mean_in_flight(requests_per_s: float, e2e: Spread | None) -> float | None:
    """Little's law, where the mean end-to-end latency was measured."""
    return None if e2e is None or e2e.mean_s is None else requests_per_s * e2e.mean_s
