"""Ours against the field: what was measured here beside the published rows of the serving stacks and the libraries.

A row is one shape of one kernel of tokenfab's on one GPU, from the records alone: the median over its processes.
Beside it the same op at the same shape: each stack's published row on that GPU, measured or interpolated, never
modelled; and the libraries' kernels measured here, in the same records. Ratio: our time / the least of theirs; above 1
ours is behind. Every row is shown, those behind first, furthest behind at the top.

Where a stack has no rows in our formats (MXFP4 weights of dense layers), its BF16 rows stand beside ours, and the
format is named: another precision, the same layer. Published rows replay a graph over the same buffers, so that small
weights may be warm in L2, ours never; the note under the table says so.

Units: seconds per call. Errors: ``NoRecords``; ``ValueError`` naming the file whose markers are not as they should be.
Needs no torch.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from ..kernels.registry import KERNELS
from .gpus import GPUS, Gpu, get_gpu
from .point_ops import op_of
from .published import MODELLED, STACKS, PublishedData, PublishedDataError
from .published_tables import GEMM_DTYPES, KV_DTYPES, MOE_DTYPES
from .record import Point, Record
from .recorded import OWN, RecordedData, RecordedRow
from .records import RecordStore
from .summaries import Summary, summaries
from .targets import peers_of

AGREE = 0.01
"""Two runs agree where the median of their differences in ratio to the anchor is within this."""

NOTE = (
    "Ours: median of the processes, weights out of L2. Published: a graph over the same buffers, small weights may be "
    "warm in L2. Ratio: our time / the best of the others; above 1 ours is behind."
)
_MARKER = re.compile(r"<!-- field:([a-z0-9_]+) -->")


@dataclass(frozen=True)
class Rival:
    """Another kernel's time. ``kind``: "published" (``source``: the row), or "measured here" (the library)."""

    name: str
    kind: str
    format: str
    time_s: float
    source: str


@dataclass(frozen=True)
class FieldRow:
    """One shape. ``floor_fraction``: roofline / our time."""

    op: str
    format: str
    shape: dict[str, int]
    time_s: float
    floor_fraction: float
    num_processes: int
    noise: float | None
    flags: tuple[str, ...]
    source: str
    rivals: tuple[Rival, ...]

    @property
    def best(self) -> Rival | None:
        return min(self.rivals, key=lambda rival: rival.time_s, default=None)

    @property
    def ratio(self) -> float | None:
        """Our time / the least of theirs; None without any."""
        return None if self.best is None else self.time_s / self.best.time_s

    def as_dict(self) -> dict[str, Any]:
        best = self.best
        return {**asdict(self), "best": None if best is None else best.name, "ratio": self.ratio}


def field_rows(recorded: RecordedData, published: PublishedData | None, gpu: Gpu) -> list[FieldRow]:
    """All shapes of ours on ``gpu``, furthest behind first, those without a rival last.

    ``published``: None where the tables are not installed; then the libraries measured here are the only rivals.

    Raises:
        NoRecords: nothing of ours is recorded there.
    """
    rows = recorded.rows(gpu)
    libraries = [each for each in summaries(r for r in recorded.records if r.point.gpu == gpu.name)
                 if each.point.recipe != OWN and not each.point.recipe.startswith("user:") and each.time_s]  # fmt: skip
    found = [_field_row(row, libraries, published, gpu) for row in rows]
    return sorted(found, key=lambda row: (row.ratio is None, -(row.ratio or 0.0), row.op, row.format))


def _field_row(row: RecordedRow, libraries: Sequence[Summary], published: PublishedData | None, gpu: Gpu) -> FieldRow:
    summary, point = row.summary, row.summary.point
    assert summary.roofline_fraction is not None
    rivals = [
        Rival(each.point.recipe, "measured here", _format(each.point), each.time_s or 0.0, each.point.recipe)
        for each in libraries
        if (each.point.op, each.point.shape, each.point.l2_policy) == (point.op, point.shape, point.l2_policy)
        and _is_beside(point, each.point)
    ]  # fmt: skip
    return FieldRow(
        op=point.op, format=_format(point), shape=dict(point.shape), time_s=row.time_s,
        floor_fraction=summary.roofline_fraction, num_processes=summary.num_processes, noise=summary.noise,
        flags=summary.flags, source=row.source, rivals=(*_published(point, published, gpu), *rivals),
    )  # fmt: skip


def _format(point: Point) -> str:
    return "-".join(point.formats[part] for part in ("weight", "activation") if part in point.formats)


def _is_beside(ours: Point, library: Point) -> bool:
    """Whether the bench sets this library's kernel beside ours: the same matrix rate of the activations."""
    own = [kernel for kernel in KERNELS if kernel.op == ours.op and kernel.formats == ours.formats]
    return any(peer.library == library.recipe and peer.formats == library.formats for peer in peers_of(own))


def _published(point: Point, published: PublishedData | None, gpu: Gpu) -> list[Rival]:
    """The stacks' rows at this shape, in our formats or else in BF16."""
    beside = _with_rows(point)
    op = op_of(beside) if beside else None
    if beside is None or op is None or published is None:
        return []
    found = []
    for name in STACKS:
        try:
            timing = published.time(op, gpu, published.stack(gpu, name))
        except PublishedDataError:
            continue  # no tables of this stack for this GPU
        if timing.provenance != MODELLED:
            source = f"{timing.source} ({timing.provenance})"
            found.append(Rival(name, "published", _format(beside), timing.time_s, source))
    return found


def _with_rows(point: Point) -> Point | None:
    """The point in formats that published tables have; None for ops that they do not."""
    weight, activation = (point.formats.get(part, "") for part in ("weight", "activation"))
    plain = {"weight": "bf16", "activation": "bf16"}
    if point.op == "gemm":
        return point if weight in GEMM_DTYPES and activation != "bf16" else _with(point, plain)
    if point.op == "moe":
        return point if (weight, activation) in MOE_DTYPES else _with(point, plain)
    if point.op in ("attention", "mla"):
        return point if weight in KV_DTYPES else _with(point, plain)
    return None


def _with(point: Point, formats: dict[str, str]) -> Point:
    return msgspec.structs.replace(point, formats=formats)


# -- to read ---------------------------------------------------------------------------------------


def document(gpu: Gpu, rows: Sequence[FieldRow]) -> dict[str, Any]:
    """The machine-readable field of one GPU."""
    return {"gpu": gpu.name, "note": NOTE, "behind": num_behind(rows), "rows": [row.as_dict() for row in rows]}


def num_behind(rows: Iterable[FieldRow]) -> int:
    return sum(row.ratio is not None and row.ratio > 1 for row in rows)


COLUMNS = ("kernel", "shape", "us", "noise", "processes", "of floor", *STACKS, "measured here", "best", "ratio")


def cells(row: FieldRow) -> tuple[str, ...]:
    """A row for a table. A published time has its format beside it where that is not ours."""
    here = [rival for rival in row.rivals if rival.kind == "measured here"]
    stacks = {rival.name: _time(rival, row) for rival in row.rivals if rival.kind == "published"}
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}" + (" behind" if row.ratio > 1 else "")
    best = "-" if row.best is None else f"{row.best.name}, {row.best.kind}"
    return (
        f"{row.op}/{row.format}", " x ".join(map(str, row.shape.values())),
        f"{row.time_s * 1e6:.2f}" + "".join(f" {flag}" for flag in row.flags),
        "-" if row.noise is None else f"{row.noise:.1%}", str(row.num_processes), f"{row.floor_fraction:.0%}",
        *(stacks.get(name, "-") for name in STACKS),
        ", ".join(f"{rival.name} {_time(rival, row)}" for rival in here) or "-", best, ratio,
    )  # fmt: skip


def _time(rival: Rival, row: FieldRow) -> str:
    other = "" if rival.format == row.format else f" ({rival.format})"
    return f"{rival.time_s * 1e6:.2f}{other}"


def markdown(gpu: Gpu, rows: Sequence[FieldRow]) -> str:
    """The field as a Markdown table, with where it is from. Records are the only input: the same give the same text."""
    lines = [
        f"{gpu.title}: {len(rows)} shapes, {num_behind(rows)} behind. Times in us; {', '.join(STACKS)}: published.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows),
        "",
        NOTE,
    ]
    return "\n".join(lines)


def write_field(path: Path, recorded: RecordedData, published: PublishedData) -> list[str]:
    """Puts the field of each GPU between ``<!-- field:GPU -->`` and ``<!-- /field:GPU -->`` of a file; the GPUs' names.

    The file is replaced whole, or not at all.

    Raises:
        ValueError: no such markers, one without its end, an unknown GPU; NoRecords: a GPU without records.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: expected a file to write the field into; {error.strerror}") from None
    names = _MARKER.findall(text)
    if not names:
        known = ", ".join(sorted({record.point.gpu for record in recorded.records} & set(GPUS))) or "h100"
        raise ValueError(f"{path}: expected lines <!-- field:GPU --> and <!-- /field:GPU -->, GPU of {known}; got none")
    for name in names:
        begin, end = f"<!-- field:{name} -->", f"<!-- /field:{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise ValueError(f"{path}: expected {begin} once, and {end} once behind it")
        gpu = get_gpu(name)
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{markdown(gpu, field_rows(recorded, published, gpu))}\n{end}{tail}"
    _replace(path, text)
    return names


def _replace(path: Path, text: str) -> None:
    mode = path.stat().st_mode
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode & 0o777)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# -- two runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Two runs of the same points. Differences: \\|ratio / other ratio - 1\\| of ratios to the anchor."""

    num_points: int
    median_difference: float
    worst_difference: float
    worst_point: str

    @property
    def agrees(self) -> bool:
        return self.median_difference <= AGREE


def agreement(first: Path, second: Path) -> Agreement:
    """How far two files of records are apart in their points' ratios to the anchor, each the median of its processes.

    Points are those of the same kernel, tile, shape and GPU, valid and with an anchor in both.

    Raises:
        ValueError: no such point. RecordError: a file that is not what it should be.
    """
    one, other = _ratios(first), _ratios(second)
    common = [key for key in one if key in other]
    if not common:
        raise ValueError(f"records: expected points with an anchor in both {first} and {second}; got none in common")
    differences = {key: abs(one[key] / other[key] - 1) for key in common}
    worst = max(common, key=differences.__getitem__)
    return Agreement(len(common), median(differences.values()), differences[worst], worst)


def _ratios(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ValueError(f"records: expected a file of records; got {path}")
    records: Iterable[Record] = RecordStore(path.parent, path.name).records()
    return {each.point.key: each.anchor_ratio for each in summaries(records) if each.anchor_ratio is not None}
