"""One record: what was measured, on what, in one process; and the line of JSON that it is kept as.

A record never holds what a measurement costs: cost is joined from a dated price table, so that old runs can
be priced anew. ``Point.key`` is what a run resumes by.

Units: as in ``measurement``; ``recorded_unix_s`` in seconds since 1970.

Errors: ``RecordError`` begins with the place it is told, file and line. It is raised for a line that is
truncated, no JSON, has a key twice, a NaN or an infinity, an unknown field, or a speed that its own facts do
not bear out; ``NewerSchemaError`` for one written by a later version. Nothing in a line is ever executed.

Source: RFC 8259 (numbers, duplicate names).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from .device import DeviceProperties
from .measurement import L2Policy, Measurement, Whole
from .noise import Interval

SCHEMA_VERSION = 1
MAX_LINE_BYTES = 16 << 20
"""A record of 1000 blocks is 0.3 MB."""

_TOKEN = secrets.token_hex(6)

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class RecordError(ValueError):
    """A file of records that is not what it should be; names file and line."""


class NewerSchemaError(RecordError):
    """A line written by a later version of tokenfab."""


class _Fields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Point(_Fields, frozen=True, kw_only=True):
    """What was measured: the key of a record.

    Attributes:
        op, shape: as in ``ops``. formats: operand to number format. recipe: how values are quantized.
        kernel_hash: ``source_hash`` of the kernel's source. tile: its configuration. gpu: a name in ``gpus``.
    """

    op: Text
    shape: dict[Text, Whole]
    formats: dict[Text, Text]
    recipe: str
    l2_policy: L2Policy
    kernel_hash: Digest
    tile: dict[Text, bool | Whole | str]
    gpu: Text

    @property
    def key(self) -> str:
        """The same text for equal points, whatever the order of their mappings, and only for those."""
        return msgspec.json.encode(self, order="deterministic").decode()


class Environment(DeviceProperties, frozen=True, kw_only=True):
    """The GPU and the software around it. ``git_sha``: None outside a checkout. ``git_dirty``: changed since."""

    git_sha: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{40,64}$")] | None
    git_dirty: bool


class Record(_Fields, frozen=True, kw_only=True):
    """One line. Made by ``Record.of``; the summary is checked against the measurement whenever one is made or read.

    ``process``: one run of the program; its records are not independent of each other.
    """

    schema_version: int
    process: Text
    recorded_unix_s: float
    point: Point
    environment: Environment
    time_s: float | None
    interval_s: Interval | None
    roofline_fraction: float | None
    anchor_ratio: float | None
    invalid: tuple[str, ...]
    flags: tuple[str, ...]
    measurement: Measurement

    @classmethod
    def of(
        cls, point: Point, measurement: Measurement, environment: Environment, recorded_unix_s: float | None = None
    ) -> Record:
        """The record of a measurement, made now and in this process, valid or not.

        Raises:
            ValueError: the point names another L2 policy than the measurement.
        """
        return cls(
            schema_version=SCHEMA_VERSION,
            process=process_id(),
            recorded_unix_s=time.time() if recorded_unix_s is None else recorded_unix_s,
            point=point,
            environment=environment,
            **_summary(measurement),
            measurement=measurement,
        )

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version: expected {SCHEMA_VERSION}; got {self.schema_version}")
        if self.point.l2_policy != self.measurement.l2_policy:
            got = self.measurement.l2_policy
            raise ValueError(f"l2_policy: expected the point's, {self.point.l2_policy}; got {got} in the measurement")
        if not math.isfinite(self.recorded_unix_s):
            raise ValueError(f"recorded_unix_s: expected a finite number; got {self.recorded_unix_s}")
        for field, expected in _summary(self.measurement).items():
            got = getattr(self, field)
            if field == "invalid":  # sentences may be reworded
                got, expected = ([reason.split(":")[0] for reason in reasons] for reasons in (got, expected))
            if not _agree(got, expected):
                raise ValueError(f"{field}: expected {expected!r}, as measured; got {got!r}")


def _summary(measurement: Measurement) -> dict[str, Any]:
    valid = not measurement.invalid
    return {
        "time_s": measurement.time_s if valid else None,
        "interval_s": measurement.interval_s if valid else None,
        "roofline_fraction": measurement.roofline_fraction if valid else None,
        "anchor_ratio": measurement.anchor_ratio if valid else None,
        "invalid": measurement.invalid,
        "flags": measurement.flags,
    }


def _agree(got: Any, expected: Any) -> bool:
    if isinstance(got, Interval) and isinstance(expected, Interval):
        return _agree(got.low, expected.low) and _agree(got.high, expected.high)
    if isinstance(got, float | int) and isinstance(expected, float):
        return math.isclose(got, expected, rel_tol=1e-9)
    return got == expected


def process_id() -> str:
    """Names this run of the program, and no other: a token of its own and the process's number."""
    return f"{_TOKEN}-{os.getpid()}"


def source_hash(sources: Mapping[str, str | bytes]) -> str:
    """SHA-256 over named sources (a kernel, its helpers, its tile table), whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(sources):
        source = sources[name]
        for part in (name.encode(), source.encode() if isinstance(source, str) else source):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def environment(properties: DeviceProperties, folder: Path | None = None) -> Environment:
    """The environment of this process. ``folder``: a git checkout; None for the one that holds this package."""
    folder = Path(__file__).resolve().parents[1] if folder is None else folder
    sha = _git(folder, "rev-parse", "--verify", "HEAD")
    own = sha is not None and _git(folder, "rev-parse", "--show-prefix") == ""
    dirty = own and _git(folder, "status", "--porcelain") != ""
    return Environment(**msgspec.structs.asdict(properties), git_sha=sha if own else None, git_dirty=dirty)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def encode(record: Record) -> bytes:
    """One line, with its end.

    Raises:
        ValueError: it could not be read back (too long, or a number that JSON has no word for).
    """
    line = msgspec.json.encode(record)
    if len(line) >= MAX_LINE_BYTES:
        raise ValueError(f"record: expected a line shorter than {MAX_LINE_BYTES} bytes; got {len(line)}")
    decode(line, "record")
    return line + b"\n"


def decode(line: bytes, where: str) -> Record:
    """The record on a line. ``where`` begins each error: ``file:line``.

    Raises:
        NewerSchemaError, RecordError: as the module says.
    """
    try:
        fields = json.loads(
            line.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise RecordError(f"{where}: expected a record; got JSON nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"{where}: expected one JSON object; {error}") from None
    if not isinstance(fields, dict):
        raise RecordError(f"{where}: expected one JSON object; got {type(fields).__name__}")
    version = fields.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{where}: expected schema_version {SCHEMA_VERSION} or older; got {version}, of a later tokenfab"
        )
    try:
        return msgspec.json.decode(line, type=Record)
    except (ValueError, OverflowError, RecursionError) as error:
        raise RecordError(f"{where}: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return fields


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond a float")
    return value
