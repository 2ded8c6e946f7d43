"""What was measured here, as a stack: records of tokenfab's own kernels answer the ops of a decode plan.

``RecordedData.time(ask, gpu)`` answers as ``PublishedData.time`` does, with provenances of its own: ``measured here``
(a recorded shape), ``interpolated here`` (between recorded shapes, by ``interpolation``: time is affine in the roofline
floor), ``modelled`` (beyond the last one, its efficiency held). Without a record of the same op, formats and fixed
sizes there is no answer: what takes its place is the caller's to choose and to name.

Which records count: those of the house's kernels (recipe ``tokenfab``) on this GPU, valid, under the L2 policy of a
decode step. Of several versions of a kernel at one shape the newest counts (by its last record), of its tiles those
with the most processes, of these the fastest; the time is the median over processes. A source says all of this, and
what a reader must know: GPU, commit, date, processes, noise, flags, and whether the kernel has changed since.

Units: seconds per call. Errors: ``NoRecords`` naming the folder; ``RecordError`` as in ``records``. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from ..kernels.registry import KERNELS, OPS
from .gpus import Gpu
from .interpolation import Grid, look_up
from .published import INTERPOLATED_HERE, MEASURED_HERE, MODELLED, PROVENANCES, PublishedData, Stack, Timing
from .record import Environment, Record
from .records import RecordStore
from .summaries import Summary, kernel_hash, summaries

RECORDED = Path(__file__).with_name("recorded")
"""Folder of the records that come with the package."""

OWN = "tokenfab"
"""The stack's name, and the recipe of the house's kernels in a record."""


class NoRecords(ValueError):
    """No record of tokenfab's kernels on a GPU; names the folder."""


@dataclass(frozen=True)
class Ask:
    """A call of a plan, put to the records.

    Attributes:
        op, formats: as in a record's point. fixed: sizes that must be the same.
        axes: sizes to interpolate along, with the values asked for.
        floor_s: roofline floor at other values of ``axes``.
        caveat: why even the recorded shape is only a model of this call.
    """

    op: str
    formats: tuple[tuple[str, str], ...]
    fixed: tuple[tuple[str, int], ...]
    axes: tuple[tuple[str, int], ...]
    floor_s: Callable[[Gpu, tuple[float, ...]], float] = field(compare=False)
    caveat: str = ""

    @property
    def name(self) -> str:
        return f"{self.op}/{'-'.join(value for _, value in self.formats)}"


@dataclass(frozen=True)
class RecordedRow:
    """One shape: what counts of its records. ``num_versions``, ``num_tiles``: of which it was chosen."""

    summary: Summary
    environment: Environment
    recorded_unix_s: float
    num_versions: int
    num_tiles: int

    @property
    def time_s(self) -> float:
        assert self.summary.time_s is not None  # invalid records are no rows
        return self.summary.time_s

    @property
    def name(self) -> str:
        return f"{self.summary.point.op}/{'-'.join(_formats(self.summary.point.formats))}"

    @property
    def date(self) -> str:
        return datetime.fromtimestamp(self.recorded_unix_s, UTC).date().isoformat()

    @cached_property
    def source(self) -> str:
        """Kernel, GPU, commit, date, processes, noise, flags; then what it was chosen of."""
        at, summary = self.environment, self.summary
        commit = "no commit" if at.git_sha is None else at.git_sha[:9] + (" with changes" if at.git_dirty else "")
        count = f"{summary.num_processes} process{'es' if summary.num_processes > 1 else ''}"
        noise = "noise not known" if summary.noise is None else f"noise {summary.noise:.1%}"
        facts = [f"{OWN} {self.name} on {at.name}", commit, self.date, count, noise, *summary.flags]
        if summary.is_quick:
            facts.append("a quick first look")
        if self.num_versions > 1:
            facts.append(f"newest of {self.num_versions} versions of the kernel")
        if self.num_tiles > 1:
            facts.append(f"fastest of {self.num_tiles} tiles")
        if not self.is_current:
            facts.append("the kernel has changed since")
        return ", ".join(facts)

    @property
    def is_current(self) -> bool:
        """Whether the source is still what was measured."""
        point = self.summary.point
        kernels = [each for each in KERNELS if each.op == point.op and each.formats == point.formats]
        return any(kernel_hash(each, self.environment) == point.kernel_hash for each in kernels)


class RecordedData:
    """The records of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: of ``*.jsonl`` as ``tokenfab lab`` and ``tokenfab bench`` write them; None for the package's."""
        self.folder = RECORDED if folder is None else folder
        self._grids: dict[tuple[object, ...], tuple[Grid, list[RecordedRow]] | None] = {}

    # -- what is there -----------------------------------------------------------------------------

    @cached_property
    def records(self) -> list[Record]:
        """All records of the folder, file by file.

        Raises:
            RecordError: a file that is not what it should be.
        """
        files = sorted(self.folder.glob("*.jsonl")) if self.folder.is_dir() else []
        return [record for file in files for record in RecordStore(self.folder, file.name).records()]

    @cached_property
    def _by_gpu(self) -> dict[str, list[RecordedRow]]:
        own = [record for record in self.records if record.point.recipe == OWN and _is_decoding(record)]
        return {gpu: _rows([r for r in own if r.point.gpu == gpu]) for gpu in {r.point.gpu for r in own}}

    def rows(self, gpu: Gpu) -> list[RecordedRow]:
        """What counts on ``gpu``, a row per shape.

        Raises:
            NoRecords: nothing does.
        """
        found = self._by_gpu.get(gpu.name)
        if not found:
            others = sorted(name for name, rows in self._by_gpu.items() if rows)
            has = f"some of {', '.join(others)} only" if others else "none"
            raise NoRecords(
                f"records: expected valid records of tokenfab's kernels on {gpu.name} in {self.folder}; got {has}. "
                f"`tokenfab lab --out {self.folder}` on that GPU makes them"
            )
        return found

    def stack(self, gpu: Gpu, spec: str, published: PublishedData) -> RecordedStack:
        """``tokenfab`` or ``tokenfab+vllm[@VERSION]`` on this GPU: the rest then from that stack's published tables.

        Raises:
            NoRecords: no record on this GPU. ValueError: not of that form; as ``PublishedData.stack``.
        """
        own, plus, rest = spec.partition("+")
        if own != OWN or (plus and not rest):
            raise ValueError(f"stack: expected {OWN} or {OWN}+STACK; got {spec!r}")
        version = max(row.date for row in self.rows(gpu))
        other = published.stack(gpu, rest) if rest else None
        if other is None:
            return RecordedStack(OWN, version, self, None)
        return RecordedStack(f"{OWN}+{other.name}", f"{version}+{other.version}", self, other)

    # -- answers -----------------------------------------------------------------------------------

    def time(self, ask: Ask, gpu: Gpu) -> Timing | None:
        """The time of one call, with its provenance; None without a record of its op, formats and fixed sizes."""
        found = self._grid(ask, gpu)
        if found is None:
            return None
        grid, rows = found
        names = [name for name, _ in ask.axes]
        answer = look_up(grid, tuple(value for _, value in ask.axes), lambda at: ask.floor_s(gpu, at), names)
        row = rows[answer.kernel]
        place = ", ".join(f"{name}={row.summary.point.shape[name]}" for name in names)
        notes = [f"between rows, the nearest {place}"] if answer.how == "between" else []
        notes += [note for note in (answer.note, ask.caveat) if note]
        provenance = {"exact": MEASURED_HERE, "between": INTERPOLATED_HERE, "beyond": MODELLED}[answer.how]
        source = row.source + (f" ({'; '.join(notes)})" if notes else "")
        return Timing(answer.time_s, MODELLED if ask.caveat else provenance, source)

    def _grid(self, ask: Ask, gpu: Gpu) -> tuple[Grid, list[RecordedRow]] | None:
        names = tuple(name for name, _ in ask.axes)
        key = (gpu.name, ask.op, ask.formats, ask.fixed, names)
        if key not in self._grids:
            wanted = dict(ask.fixed)
            rows = [
                row for row in self.rows(gpu)
                if row.summary.point.op == ask.op and row.summary.point.formats == dict(ask.formats)
                and {k: v for k, v in row.summary.point.shape.items() if k not in names} == wanted
            ]  # fmt: skip
            columns = [np.array([row.summary.point.shape[name] for row in rows]) for name in names]
            times = np.array([row.time_s for row in rows])
            self._grids[key] = (Grid.from_rows(columns, times, np.arange(len(rows))), rows) if rows else None
        return self._grids[key]


@dataclass(frozen=True)
class RecordedStack(Stack):
    """tokenfab's kernels as a stack; ``version`` is the date of the newest record. ``rest``: whose published rows
    answer where there is no record; None: the roofline does."""

    data: RecordedData = field(compare=False, repr=False)
    rest: Stack | None

    @property
    def provenances(self) -> tuple[str, ...]:
        return (MEASURED_HERE, INTERPOLATED_HERE, MODELLED) if self.rest is None else PROVENANCES


def find_stack(gpu: Gpu, spec: str, published: PublishedData, recorded: RecordedData) -> Stack:
    """A stack by name: a published one, ``tokenfab``, or ``tokenfab+`` a published one.

    Raises:
        ValueError: an unknown name or version; nothing of it on this GPU.
    """
    if spec.partition("+")[0] == OWN:
        return recorded.stack(gpu, spec, published)
    return published.stack(gpu, spec)


def _formats(formats: dict[str, str]) -> list[str]:
    return [formats[part] for part in ("weight", "activation") if part in formats]


def _is_decoding(record: Record) -> bool:
    """Whether it is of one op, with L2 as a step leaves it: weights out of it, what a quantizer reads just written."""
    if record.point.op not in OPS:  # a whole step, a copy
        return False
    return record.point.l2_policy == ("cold_weights" if "weight" in record.point.formats else "hot")


def _rows(records: Sequence[Record]) -> list[RecordedRow]:
    by_shape: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if not record.invalid:
            point = record.point
            key = (point.op, *sorted(point.formats.items()), *sorted(point.shape.items()))
            by_shape.setdefault(key, []).append(record)
    return [_row(group) for group in by_shape.values()]


def _row(group: Sequence[Record]) -> RecordedRow:
    newest = max(group, key=lambda record: record.recorded_unix_s).point.kernel_hash
    tiles = summaries(record for record in group if record.point.kernel_hash == newest)
    most = max(each.num_processes for each in tiles)
    best = min((each for each in tiles if each.num_processes == most), key=lambda each: each.time_s or 0.0)
    last = max(
        (record for record in group if record.point == best.point), key=lambda record: record.recorded_unix_s
    )  # fmt: skip
    num_versions = len({record.point.kernel_hash for record in group})
    return RecordedRow(best, last.environment, last.recorded_unix_s, num_versions, len(tiles))
