"""Tables of tuned tiles: one JSON file per GPU, each row with what it was measured against and under which software.

A row is used on the GPU model that the table is of, with the Triton that it was measured with, while the kernel's
sources are those that were measured, and at its own shape only; anywhere else the default of ``tiles.py`` stands. A row
whose gain is not beyond its noise cannot be made. Files are replaced as a whole: a writer killed at any moment leaves
the old table or the new one.

Units: seconds per call; gain and noise are relative; ``recorded_unix_s`` in seconds since 1970.

Errors: ``TableError`` begins with the file's name: not to be read, no JSON, cut short, a NaN, an unknown field, another
GPU's, a row that contradicts itself; ``NewerTableError`` for one written by a later version.
"""

from __future__ import annotations

import fcntl
import math
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec

from ..kernels.registry import KERNELS, Kernel
from ..kernels.tiles import Tile
from ..kernels.tuned import TunedTile, use_tuned
from .device import DeviceProperties
from .gpus import Gpu
from .measurement import Positive, Whole
from .noise import MIN_PROCESSES
from .record import Digest, Environment, Text
from .summaries import kernel_hash
from .tune import Trials, Verdict
from .tune_prune import Pruned
from .tune_space import Place, candidates, place_of

SCHEMA_VERSION = 1
MAX_BYTES = 16 << 20
SHIPPED = Path(__file__).with_name("tuned")
"""Tables that come with the package, ``GPU.json``."""


class TableError(ValueError):
    """A table of tuned tiles that is not what it should be; names the file."""


class NewerTableError(TableError):
    """A table written by a later version of tokenfab."""


class TunedRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tile that was faster than the default at one shape.

    Attributes:
        op, formats, shape: of the registry's kernel. kernel, format: of its tile in ``tiles.py``.
        tile, default_tile: as ``tiles.Tile``.
        time_s, default_time_s: medians over processes. gain: 1 - their paired ratio.
        noise: (max - min) / median between processes, at least that of a kernel timed twice.
        kernel_hash: of the sources measured. records: the file that holds the measurements.
    """

    op: Text
    formats: dict[Text, Text]
    kernel: Text
    format: Text
    arch: Text
    shape: dict[Text, Whole]
    tile: dict[Text, Whole]
    default_tile: dict[Text, Whole]
    time_s: Positive
    default_time_s: Positive
    gain: Positive
    noise: Positive
    processes: Annotated[int, msgspec.Meta(ge=MIN_PROCESSES)]
    environment: Environment
    recorded_unix_s: float
    kernel_hash: Digest
    records: Text

    def __post_init__(self) -> None:
        if not (self.noise < self.gain < 1):
            raise ValueError(f"gain: expected more than the noise of {self.noise} and less than 1; got {self.gain}")
        if not math.isfinite(self.time_s) or not math.isfinite(self.default_time_s):
            raise ValueError(f"time_s: expected finite times; got {self.time_s} and {self.default_time_s}")

    @property
    def place(self) -> str:
        """What no other row of a table shares."""
        return _place(self.op, self.formats, self.arch, self.shape)


def _place(op: str, formats: dict[str, str], arch: str, shape: dict[str, int]) -> str:
    return msgspec.json.encode([op, formats, arch, shape], order="deterministic").decode()


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema_version: int
    gpu: Text
    tiles: tuple[TunedRow, ...]


class _Version(msgspec.Struct):
    schema_version: int


def row_of(pruned: Pruned, verdict: Verdict, trials: Trials, records: Path) -> TunedRow:
    """The row of a verdict that adopts a tile.

    Raises:
        ValueError: it adopts none.
    """
    if verdict.adopted is None or verdict.best is None or verdict.default is None:
        raise ValueError(f"verdict: expected one that adopts a tile; got {verdict.reason}")
    assert verdict.gain is not None
    assert verdict.noise is not None
    target, place = pruned.target, pruned.place
    return TunedRow(
        op=target.kernel.op, formats=target.kernel.formats, kernel=place.kernel, format=place.format, arch=place.arch,
        shape=target.shape, tile=asdict(verdict.adopted), default_tile=asdict(place.default),
        time_s=verdict.best.time_s, default_time_s=verdict.default.time_s, gain=verdict.gain, noise=verdict.noise,
        processes=len(verdict.best.ratios), environment=trials.here, recorded_unix_s=time.time(),
        kernel_hash=kernel_hash(target.kernel, trials.here), records=records.name,
    )  # fmt: skip


# -- files -----------------------------------------------------------------------------------------


def read_table(path: Path, gpu: Gpu) -> Table:
    """The table of a file; an empty one where there is none.

    Raises:
        NewerTableError, TableError: as the module says.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Table(schema_version=SCHEMA_VERSION, gpu=gpu.name, tiles=())
    except OSError as error:
        raise TableError(f"{path}: expected a file that can be read; {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise TableError(f"{path}: expected at most {MAX_BYTES} bytes")
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise NewerTableError(
                f"{path}: expected schema_version {SCHEMA_VERSION}; got {version}, of a later tokenfab"
            )
        table = msgspec.json.decode(data, type=Table)
    except NewerTableError:
        raise
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: {error}") from None
    if table.schema_version != SCHEMA_VERSION:
        raise TableError(f"{path}: schema_version: expected {SCHEMA_VERSION}; got {table.schema_version}")
    if table.gpu != gpu.name:
        raise TableError(f"{path}: gpu: expected {gpu.name}; got {table.gpu}")
    places = [row.place for row in table.tiles]
    if len(set(places)) < len(places):
        raise TableError(f"{path}: tiles: expected one row per place; got {max(places, key=places.count)} twice")
    return table


def update_table(path: Path, gpu: Gpu, adopted: Iterable[TunedRow], withdrawn: Iterable[str] = ()) -> Table:
    """Puts rows into a table, each in place of an older one, and takes those out whose ``TunedRow.place`` is withdrawn.

    Writers wait for each other; no file is made for a table without rows.

    Raises:
        NewerTableError, TableError: the file that is there is no table of this GPU; it is left as it is.
    """
    new = {row.place: row for row in adopted}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        old = read_table(path, gpu)
        gone = {*new, *withdrawn}
        rows = (*(row for row in old.tiles if row.place not in gone), *new.values())
        table = Table(schema_version=SCHEMA_VERSION, gpu=gpu.name, tiles=rows)
        if table != old:
            _replace(path, msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n", folder)
    finally:
        os.close(folder)
    return table


def _replace(path: Path, data: bytes, folder: int) -> None:
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    os.fsync(folder)


# -- use -------------------------------------------------------------------------------------------


def _kernel_of(row: TunedRow) -> Kernel | None:
    return next((each for each in KERNELS if (each.op, each.formats) == (row.op, row.formats)), None)


def stale_reason(row: TunedRow, properties: DeviceProperties) -> str:
    """Why a row is not used here: another GPU, Triton or version of the kernel than measured; "" if it is."""
    kernel = _kernel_of(row)
    if kernel is None:
        return f"no kernel for {row.op} in {'-'.join(row.formats.values())}"
    if row.kernel_hash != kernel_hash(kernel, properties):
        return "the kernel's sources have changed"
    for name in ("name", "triton"):
        then, now = getattr(row.environment, name), getattr(properties, name)
        if then != now:
            return f"measured on {then}, not {now}" if name == "name" else f"measured with Triton {then}, not {now}"
    return ""


def valid_rows(path: Path, gpu: Gpu, properties: DeviceProperties) -> list[TunedTile]:
    """The tiles of a table that hold on this device, for ``kernels.tuned.use_tuned``; none where there is no file.

    Left out, too: a row against a default that ``tiles.py`` no longer has, and shapes that a launch cannot tell apart
    (experts under two loads) where their tiles differ.

    Raises:
        NewerTableError, TableError: as ``read_table``; a shape or tile that its kernel does not have.
    """
    found: dict[object, set[TunedTile]] = {}
    for row in read_table(path, gpu).tiles:
        if not stale_reason(row, properties):
            place, tile = _checked(row, path)
            if asdict(place.default) == row.default_tile:
                tuned = place.tuned(tile)
                found.setdefault(tuned.key, set()).add(tuned)
    return [tuned for same in found.values() if len(same) == 1 for tuned in same]


def tuned_here(gpu: Gpu, properties: DeviceProperties, path: Path | None = None) -> AbstractContextManager[None]:
    """Lets kernels take the tuned tiles that hold on this device: of a table, or of the one that the package has.

    Raises:
        NewerTableError, TableError: as ``valid_rows``.
    """
    return use_tuned(valid_rows(path or SHIPPED / f"{gpu.name}.json", gpu, properties))


def _checked(row: TunedRow, path: Path) -> tuple[Place, Tile]:
    kernel = _kernel_of(row)
    assert kernel is not None
    try:
        place, tile = place_of(kernel, row.shape, row.arch), Tile(**row.tile)
        is_known = tile in candidates(place)[0] and (place.kernel, place.format) == (row.kernel, row.format)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise TableError(f"{path}: {row.place}: {error!r}") from None
    if not is_known:
        raise TableError(f"{path}: {row.place}: expected a tile that {place.kernel} {place.format} has; got {tile}")
    return place, tile


def place_key(pruned: Pruned) -> str:
    """``TunedRow.place`` of a target, adopted or not."""
    kernel, place = pruned.target.kernel, pruned.place
    return _place(kernel.op, kernel.formats, place.arch, pruned.target.shape)
