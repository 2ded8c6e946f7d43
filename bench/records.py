"""Files of records: one JSON line per point and process, appended, never changed.

A line is written with one ``write`` and one ``fsync`` under an exclusive lock on the file, so that a writer
killed at any moment leaves every older line whole, and writers in other processes wait for each other. What a
killed writer leaves is a last line without an end: readers skip it with a ``TornRecordWarning``, and the next
writer moves it to ``NAME.torn`` with the same warning (or ends it, if only its end is missing).

Errors: ``RecordError`` and ``NewerSchemaError``, naming file and line, as in ``record``.

Source: POSIX.1-2017 ``write`` (O_APPEND) and ``fsync``; flock(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .record import MAX_LINE_BYTES, NewerSchemaError, Point, Record, RecordError, decode, encode

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}\.jsonl")


class TornRecordWarning(UserWarning):
    """The last line has no end: its writer was killed. Names the file, the line and where its bytes are."""


class RecordStore:
    """One file of records in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        """``name``: the file's, like ``h100.jsonl``; made by the first ``append``.

        Raises:
            ValueError: a name that is not a plain one ending in ``.jsonl``, or that is a link.
        """
        if not _NAME.fullmatch(name) or ".." in name:
            raise ValueError(f"name: expected a plain file name ending in .jsonl; got {name!r}")
        self.path = folder / name
        if self.path.is_symlink():
            raise ValueError(f"name: expected a file of its own; got {name!r}, a symbolic link")
        self._done: dict[str, set[str]] = {}
        self._invalid: dict[str, set[str]] = {}
        self._read_to = (0, 0)

    # -- reading -----------------------------------------------------------------------------------

    def records(self) -> Iterator[Record]:
        """Every record, in order, one line in memory at a time. None where there is no file.

        Raises:
            NewerSchemaError, RecordError: at the line they name; those before it were given.
        """
        for record, _ in self._records((0, 0)):
            yield record

    def done(self, point: Point, processes: int = 1, *, count_invalid: bool = True) -> bool:
        """Whether ``point`` has records of so many processes. Reads what was appended since the last question.

        ``count_invalid``: whether a measurement found invalid is one. It names the kernel's source, so a new
        attempt at the same source will most likely be invalid too.

        Raises:
            NewerSchemaError, RecordError: the file cannot be read whole, so nothing is known.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._read_to[0]:
            self._done, self._invalid, self._read_to = {}, {}, (0, 0)
        for record, place in self._records(self._read_to):
            self._read_to = place
            into = self._invalid if record.invalid else self._done
            into.setdefault(record.point.key, set()).add(record.process)
        found = self._done.get(point.key, set())
        if count_invalid:
            found = found | self._invalid.get(point.key, set())
        return len(found) >= processes

    def _records(self, start: tuple[int, int]) -> Iterator[tuple[Record, tuple[int, int]]]:
        """(record, (offset, line number) behind it), from such a place on. Lines added meanwhile are not read."""
        try:
            file = os.fdopen(self._open(os.O_RDONLY | os.O_NONBLOCK), "rb")
        except FileNotFoundError:
            return
        offset, number = start
        with file:
            with _locked(file.fileno(), fcntl.LOCK_SH):
                end, tail = self._torn(file.fileno())
            file.seek(offset)
            while offset < end:
                line = file.readline(MAX_LINE_BYTES)
                offset, number = offset + len(line), number + 1
                where = f"{self.path}:{number}"
                if not line.endswith(b"\n"):
                    raise RecordError(f"{where}: expected lines shorter than {MAX_LINE_BYTES} bytes")
                yield decode(line, where), (offset, number)
        if tail and _is_whole(tail):
            yield decode(tail, f"{self.path}:{number + 1}"), (offset, number)  # to be read again when it has its end
        elif tail:
            _warn_torn(f"{self.path}:{number + 1}: the last line has no end; its {len(tail)} bytes are skipped")

    def _torn(self, descriptor: int) -> tuple[int, bytes]:
        """Where whole lines end, and what is behind them. Under a lock, so that no writer is at it."""
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return size, b""
        start = max(0, size - MAX_LINE_BYTES)
        tail = os.pread(descriptor, size - start, start)
        begin = tail.rfind(b"\n") + 1
        if begin == 0 and start > 0:
            raise RecordError(f"{self.path}: expected lines shorter than {MAX_LINE_BYTES} bytes; got a longer last one")
        return start + begin, tail[begin:]

    # -- writing -----------------------------------------------------------------------------------

    def append(self, record: Record) -> None:
        """Adds a line. When this returns, the line is on disk; if it raises or is killed, the older lines are.

        Raises:
            ValueError: a record that could not be read back.
            OSError: as the system says (a full disk); the file is then as it was.
        """
        line = encode(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._open(os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            with _locked(descriptor, fcntl.LOCK_EX):
                size = self._repair(descriptor)
                _write(descriptor, line, size)
                if size == 0:
                    _sync_folder(self.path.parent)
        finally:
            os.close(descriptor)

    def _open(self, how: int) -> int:
        """Opens the file itself: no link, pipe or device in its place."""
        try:
            descriptor = os.open(self.path, how | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            raise
        except OSError as error:
            expected = "a file that is no link" if error.errno == errno.ELOOP else "a file that can be opened"
            raise RecordError(f"{self.path}: expected {expected}; {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise RecordError(f"{self.path}: expected a regular file")
        return descriptor

    def _repair(self, descriptor: int) -> int:
        """Ends or moves aside what a killed writer left, and returns the size of the whole lines."""
        end, tail = self._torn(descriptor)
        if not tail:
            return end
        if _is_whole(tail):
            _write(descriptor, b"\n", end + len(tail))
            return end + len(tail) + 1
        aside = self.path.with_name(self.path.name + ".torn")
        other = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            _write(other, tail + b"\n", os.fstat(other).st_size)
        finally:
            os.close(other)
        _sync_folder(self.path.parent)
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
        _warn_torn(f"{self.path}: the last line had no end; its {len(tail)} bytes are in {aside.name}")
        return end


@contextmanager
def _locked(descriptor: int, how: int) -> Iterator[None]:
    fcntl.flock(descriptor, how)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _write(descriptor: int, data: bytes, size: int) -> None:
    """One write and one fsync; on any failure the file is cut back to ``size``."""
    try:
        written = os.write(descriptor, data)
        if written != len(data):
            raise OSError(f"disk full: {written} of {len(data)} bytes were written")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _sync_folder(folder: Path) -> None:
    """So that the name of a new file is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_whole(line: bytes) -> bool:
    try:
        decode(line, "last line")
    except NewerSchemaError:
        return True
    except RecordError:
        return False
    return True


def _warn_torn(message: str) -> None:
    warnings.warn(message, TornRecordWarning, stacklevel=2)
