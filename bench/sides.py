"""The sides of a comparison: files of records, runs of pytest-benchmark, or a stack's published rows.

    bench/recorded/h100.jsonl                     a file of records, or a folder of them
    bench/recorded/h100.jsonl:commit=3f2a         those of one commit (fields: ``sample.FACETS``)
    .benchmarks/h100                              pytest-benchmark's JSON, every run in the folder
    published:vllm, published:vllm@0.19.0         the published row of the same op on the same GPU

Errors: ``ValueError`` naming the side; ``RecordError`` and ``SampleError`` naming file and line.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import RecordError
from .records import RecordStore, TornRecordWarning
from .sample import FACETS, Sample, SampleError

PUBLISHED = "published:"
EXTRA = "tokenfab"
"""The key of ``extra_info`` that holds a sample in pytest-benchmark's files."""

_MAX_BYTES = 256 << 20
_AGREE = 1e-3


@dataclass(frozen=True)
class Side:
    """What one side holds.

    Attributes:
        label: as the user wrote it.
        samples: in the files' order; none of a published stack, whose rows are looked up.
        selected: the fields it was selected by.
        stack: of a published side.
        torn: what a killed writer left behind, in words.
    """

    label: str
    samples: tuple[Sample, ...] = ()
    selected: frozenset[str] = frozenset()
    stack: str = ""
    torn: tuple[str, ...] = ()


def read_side(spec: str) -> Side:
    """The side that ``spec`` names.

    Raises:
        ValueError: no such file, an unknown field, nothing selected. RecordError, SampleError: a damaged file.
    """
    if spec.startswith(PUBLISHED):
        return Side(spec, stack=spec.removeprefix(PUBLISHED))
    path, wanted = _parse(spec)
    samples, torn = _read(path)
    kept = [sample for sample in samples if all(_fits(sample, *pair) for pair in wanted.items())]
    if not kept:
        what = ", ".join(f"{field}={value}" for field, value in wanted.items()) or "measurements"
        raise ValueError(f"{spec}: expected {what} among its {len(samples)} measurements; got none")
    return Side(spec, tuple(kept), frozenset(wanted), torn=torn)


def _parse(spec: str) -> tuple[Path, dict[str, str]]:
    text, _, tail = spec.rpartition(":")
    if not text or "=" not in tail:
        return Path(spec), {}
    wanted: dict[str, str] = {}
    for part in tail.split(","):
        field, equals, value = part.partition("=")
        if not equals or field not in FACETS or not value:
            raise ValueError(f"{spec}: expected FIELD=VALUE with a field of {', '.join(FACETS)}; got {part!r}")
        wanted[field] = value
    return Path(text), wanted


def _fits(sample: Sample, field: str, value: str) -> bool:
    found = sample.facet(field)
    return found.startswith(value) if field in ("commit", "kernel") else found == value


def _read(path: Path) -> tuple[list[Sample], tuple[str, ...]]:
    if path.is_dir():
        found = sorted([*path.rglob("*.jsonl"), *path.rglob("*.json")])
        files = [file for file in found if not file.is_symlink()]
        if not files:
            raise ValueError(f"{path}: expected .jsonl records or pytest-benchmark's .json in it; got none")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{path}: expected a file or folder of measurements; got none")
    samples: list[Sample] = []
    torn: list[str] = []
    for file in files:
        if file.suffix == ".json":
            samples += read_benchmarks(file)
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TornRecordWarning)
            samples += [Sample.of(record) for record in RecordStore(file.parent, file.name).records()]
        torn += [str(each.message) for each in caught if issubclass(each.category, TornRecordWarning)]
    return samples, tuple(torn)


def read_benchmarks(file: Path) -> list[Sample]:
    """The samples in a file that pytest-benchmark saved; benchmarks of other kinds in it are left out.

    Raises:
        SampleError: truncated, no JSON, NaN, a time that its own statistics contradict.
    """
    if file.stat().st_size > _MAX_BYTES:
        raise SampleError(f"{file}: expected at most {_MAX_BYTES} bytes; got {file.stat().st_size}")
    try:
        data = json.loads(file.read_bytes(), parse_constant=_no_constant)
        benchmarks = data["benchmarks"]
        entries = [(str(each["fullname"]), each["stats"], each["extra_info"][EXTRA])
                   for each in benchmarks if EXTRA in each["extra_info"]]  # fmt: skip
    except RecursionError:
        raise SampleError(f"{file}: expected pytest-benchmark's JSON; got JSON nested too deeply") from None
    except KeyError as error:
        raise SampleError(f"{file}: expected pytest-benchmark's JSON; {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise SampleError(f"{file}: expected pytest-benchmark's JSON; {error}") from None
    return [_agreed(Sample.read({**fields, "name": name}, f"{file}: {name}"), stats, f"{file}: {name}")
            for name, stats, fields in _mappings(entries, file)]  # fmt: skip


def _mappings(
    entries: Iterable[tuple[str, Any, Any]], file: Path
) -> Iterable[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, stats, fields in entries:
        if not isinstance(stats, dict) or not isinstance(fields, dict):
            raise SampleError(f"{file}: {name}: expected objects in stats and extra_info")
        yield name, stats, fields


def _agreed(sample: Sample, stats: dict[str, Any], where: str) -> Sample:
    middle = stats.get("median")
    if sample.time_s is not None and not (
        isinstance(middle, float | int) and math.isclose(middle, sample.time_s, rel_tol=_AGREE)
    ):
        raise SampleError(f"{where}: median: expected {sample.time_s}, as measured; got {middle!r}")
    return sample


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


__all__ = ["EXTRA", "PUBLISHED", "RecordError", "SampleError", "Side", "read_benchmarks", "read_side"]
