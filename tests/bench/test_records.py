"""Files of records: nothing lost by kill -9, a full disk or eight writers; nothing believed that is not so."""

from __future__ import annotations

import os
import re
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenfab.bench import record as record_module
from tokenfab.bench import records as records_module
from tokenfab.bench.measurement import Settings
from tokenfab.bench.record import Record, RecordError, decode, encode
from tokenfab.bench.records import RecordStore, TornRecordWarning
from tokenfab.bench.timing import measure
from tokenfab.tests.bench.fake_device import FakeDevice, make_case
from tokenfab.tests.bench.made_records import ENVIRONMENT, LINE, POINT, RECORD, WRONG, numbered


def numbers(store: RecordStore) -> list[int]:
    return [record.point.shape["m"] for record in store.records()]


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "recorded", "h100.jsonl")


@pytest.fixture(autouse=True)
def torn_is_expected_only_where_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TornRecordWarning)
        yield


def test_append_and_read(store: RecordStore) -> None:
    assert list(store.records()) == []
    for number in range(5):
        store.append(numbered(number))
    assert list(store.records()) == [numbered(number) for number in range(5)]
    assert [path.name for path in store.path.parent.iterdir()] == ["h100.jsonl"]


def test_reading_is_streaming(store: RecordStore) -> None:
    for number in range(3):
        store.append(numbered(number))
    reading = store.records()
    assert next(reading) == numbered(0)
    store.append(numbered(3))
    # what is added while reading is for the next reader
    assert [record.point.shape["m"] for record in reading] == [1, 2]


@pytest.mark.parametrize(
    "name",
    ["", "a", ".jsonl", "../a.jsonl", "a/b.jsonl", "/a.jsonl", "a..jsonl", "a.jsonl\n", "a\0.jsonl", "-a.jsonl",
     ".hidden.jsonl", "a" * 200 + ".jsonl", "a.JSONL", "a.pickle", "a\\b.jsonl", "é.jsonl"],
)  # fmt: skip
def test_r26_names_that_are_no_plain_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^name: expected a plain file name ending in \.jsonl; got "):
        RecordStore(tmp_path, name)


def test_r26_links_pipes_and_folders_are_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target.jsonl"
    target.write_bytes(LINE)
    (tmp_path / "link.jsonl").symlink_to(target)
    with pytest.raises(ValueError, match=r"^name: expected a file of its own; got 'link.jsonl', a symbolic link"):
        RecordStore(tmp_path, "link.jsonl")
    late, pipe, folder = (RecordStore(tmp_path, name) for name in ("late.jsonl", "pipe.jsonl", "folder.jsonl"))
    late.path.symlink_to(target)
    os.mkfifo(pipe.path)
    folder.path.mkdir()
    for store, expected in ((late, "a file that is no link"), (pipe, "a regular file"), (folder, "a ")):
        for use in (lambda store=store: list(store.records()), lambda store=store: store.append(RECORD)):
            with pytest.raises(RecordError, match=rf"^{re.escape(str(store.path))}: expected {expected}"):
                use()
    assert target.read_bytes() == LINE


def test_r23_torn_line_is_reported_skipped_and_moved_aside(store: RecordStore) -> None:
    for number in range(2):
        store.append(numbered(number))
    torn = encode(numbered(2))[:1000]
    with store.path.open("ab") as file:
        file.write(torn)
    said = rf"^{re.escape(str(store.path))}:3: the last line has no end; its 1000 bytes are skipped"
    with pytest.warns(TornRecordWarning, match=said):
        assert numbers(store) == [0, 1]
    with pytest.warns(TornRecordWarning, match=r"the last line had no end; its 1000 bytes are in h100\.jsonl\.torn"):
        store.append(numbered(3))
    assert numbers(store) == [0, 1, 3]
    aside = store.path.with_name("h100.jsonl.torn")
    assert aside.read_bytes() == torn + b"\n"
    with store.path.open("ab") as file:
        file.write(b"{")
    with pytest.warns(TornRecordWarning):
        store.append(numbered(4))
    assert aside.read_bytes() == torn + b"\n{\n"
    assert numbers(store) == [0, 1, 3, 4]


def test_line_that_only_lacks_its_end_is_kept(store: RecordStore) -> None:
    store.append(numbered(0))
    with store.path.open("ab") as file:
        file.write(encode(numbered(1))[:-1])
    assert numbers(store) == [0, 1]
    assert store.done(numbered(1).point)
    store.append(numbered(2))
    assert numbers(store) == [0, 1, 2]
    assert store.done(numbered(1).point)
    assert not store.done(numbered(1).point, processes=2)
    assert store.done(numbered(2).point)
    assert not store.path.with_name("h100.jsonl.torn").exists()


def test_r23_huge_lines_are_refused(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(numbered(1))
    first = store.path.stat().st_size
    monkeypatch.setattr(records_module, "MAX_LINE_BYTES", first + 10)
    monkeypatch.setattr(record_module, "MAX_LINE_BYTES", first + 10)
    store.append(numbered(2))
    assert numbers(store) == [1, 2]
    with pytest.raises(ValueError, match=rf"^record: expected a line shorter than {first + 10} bytes; got"):
        encode(numbered(10**12))
    with store.path.open("ab") as file:
        file.write(b"x" * (first + 10) + b"\n")
    with pytest.raises(RecordError, match=rf"{re.escape(str(store.path))}:3: expected lines shorter than"):
        list(store.records())
    store.path.write_bytes(LINE + b"x" * (first + 1000))
    for use in (lambda: list(store.records()), lambda: store.append(numbered(3))):
        with pytest.raises(RecordError, match="got a longer last one"):
            use()
    assert store.path.stat().st_size == len(LINE) + first + 1000


# -- kill -9, full disk, many writers ----------------------------------------------------------------


class DyingOs:
    """``os``, whose system call number ``left`` kills the process: before it, or in the middle of a write."""

    CALLS = ("open", "write", "fsync", "ftruncate", "fstat", "pread", "close")

    def __init__(self, left: int, share: float) -> None:
        self._left, self._share = left, share

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*arguments: Any) -> Any:
            if self._left == 0:
                if name == "write":
                    os.write(arguments[0], arguments[1][: int(len(arguments[1]) * self._share)])
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
            return real(*arguments)

        return call


def in_child(action: Callable[[], None]) -> int:
    """Runs ``action`` in a fork; its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            warnings.simplefilter("ignore")
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


TWO = encode(numbered(0)) + encode(numbered(1))
BEFORE = [
    ("no file", b"", [], b""),
    ("two lines", TWO, [0, 1], b""),
    ("torn line", TWO + LINE[:500], [0, 1], LINE[:500]),
    ("only a torn line", LINE[:500], [], LINE[:500]),
    ("line without end", TWO[:-1], [0, 1], b""),
]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize(("before", "old", "torn"), [row[1:] for row in BEFORE], ids=[row[0] for row in BEFORE])
def test_r21_kill_at_each_step_loses_nothing(
    tmp_path: Path, before: bytes, old: list[int], torn: bytes, share: float
) -> None:
    outcomes = set()

    def killed_at(step: int) -> bool:
        """Whether the append had a step of this number to be killed at."""
        store = RecordStore(tmp_path / str(step), "h100.jsonl")
        if before:
            store.path.parent.mkdir()
            store.path.write_bytes(before)

        def append() -> None:
            records_module.os = DyingOs(step, share)  # type: ignore[attr-defined]
            store.append(numbered(7))

        status = in_child(append)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TornRecordWarning)
            left = numbers(store)
            assert left in (old, [*old, 7])
            outcomes.add(len(left))
            assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
            store.append(numbered(8))
        assert numbers(store) == [*left, 8]
        # a torn line is somewhere still, to its last byte
        aside = store.path.with_name("h100.jsonl.torn")
        assert torn in (aside.read_bytes() if aside.exists() else b"")
        return status != 0

    steps = 0
    while killed_at(steps):
        steps += 1
    assert 6 <= steps < 40
    assert outcomes == {len(old), len(old) + 1}


def test_r21_full_disk_leaves_the_file_as_it_was(store: RecordStore) -> None:
    store.append(numbered(0))
    before = store.path.read_bytes()

    def append() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 700, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="disk full: 700 of "):
            store.append(numbered(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            store.append(numbered(1))

    assert in_child(append) == 0
    assert store.path.read_bytes() == before


def test_r21_failed_sync_is_no_success(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(numbered(0))

    def fail(descriptor: int) -> None:
        raise OSError("input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(records_module.os, "fsync", fail)
        with pytest.raises(OSError, match="input/output error"):
            store.append(numbered(1))
    assert numbers(store) == [0]


def test_a_line_is_one_write_and_one_sync_under_a_lock(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def note(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(module, name, call)

    for name in ("write", "fsync"):
        note(records_module.os, name)
    note(records_module.fcntl, "flock")
    store.append(numbered(0))
    # the second sync is the folder's, for the new file's name
    assert calls == ["flock", "write", "fsync", "fsync", "flock"]
    calls.clear()
    store.append(numbered(1))
    assert calls == ["flock", "write", "fsync", "flock"]


def test_r22_eight_writers_lose_nothing(store: RecordStore) -> None:
    def write(writer: int) -> None:
        for number in range(20):
            store.append(numbered(100 * writer + number))

    children = []
    for writer in range(8):
        child = os.fork()
        if child == 0:
            try:
                write(writer)
            finally:
                os._exit(0)
        children.append(child)
    seen = 0
    while children:
        # a reader among them sees whole lines only: a torn one would be an error here
        count = len(numbers(store))
        assert count >= seen
        seen = count
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
    expected = [100 * writer + number for writer in range(8) for number in range(20)]
    got = numbers(store)
    assert sorted(got) == expected
    for writer in range(8):
        assert [number for number in got if number // 100 == writer] == expected[20 * writer : 20 * writer + 20]


# -- resuming ----------------------------------------------------------------------------------------


def test_done_counts_processes(store: RecordStore) -> None:
    point = numbered(1).point
    assert not store.done(point)
    for process in ("one", "one", "two"):
        store.append(numbered(1, process))
    store.append(numbered(2, "three"))
    assert store.done(point)
    assert store.done(point, processes=2)
    assert not store.done(point, processes=3)
    assert not store.done(numbered(3).point)


def test_done_may_count_valid_measurements_only(store: RecordStore) -> None:
    store.append(Record.of(POINT, WRONG, ENVIRONMENT))
    assert store.done(POINT)
    assert not store.done(POINT, count_invalid=False)
    store.append(msgspec.structs.replace(RECORD, process="other"))
    assert store.done(POINT, count_invalid=False)
    assert store.done(POINT, processes=2)
    assert not store.done(POINT, processes=2, count_invalid=False)


def test_done_tells_l2_policies_apart(store: RecordStore) -> None:
    device = FakeDevice(noise=0.0005)
    hot = measure(make_case(device), device, l2_policy="hot", settings=Settings(energy_s=None))
    point = msgspec.structs.replace(POINT, l2_policy="hot")
    store.append(Record.of(point, hot, ENVIRONMENT))
    assert store.done(point)
    assert not store.done(POINT)


def test_done_reads_only_what_is_new(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def noted(line: bytes, where: str) -> Record:
        read.append(where.rsplit(":", 1)[1])
        return decode(line, where)

    monkeypatch.setattr(records_module, "decode", noted)
    for number in range(3):
        store.append(numbered(number))
        assert store.done(numbered(number).point)
    assert read == ["1", "2", "3"]
    # a file cut short from outside is read anew
    store.path.write_bytes(encode(numbered(0)))
    assert not store.done(numbered(2).point)
    store.path.unlink()
    assert not store.done(numbered(0).point)


@pytest.mark.parametrize("killed_after", [0, 1, 5, 11])
def test_r21_resumed_run_gives_the_same_set(tmp_path: Path, killed_after: int) -> None:
    plan = [(numbered(number).point, process) for process in ("one", "two", "three") for number in range(4)]

    def run(store: RecordStore, limit: int = 100) -> int:
        """The measuring loop; stops as if killed after so many records, in the middle of the next."""
        written = 0
        for point, process in plan:
            if store.done(point, processes=1 + ("one", "two", "three").index(process)):
                continue
            if written == limit:
                with store.path.open("ab") as file:
                    file.write(encode(numbered(point.shape["m"], process))[:77])
                break
            store.append(numbered(point.shape["m"], process))
            written += 1
        return written

    def found(store: RecordStore) -> list[tuple[str, str]]:
        return sorted((record.point.key, record.process) for record in store.records())

    whole, broken = RecordStore(tmp_path, "whole.jsonl"), RecordStore(tmp_path, "broken.jsonl")
    assert run(whole) == 12
    assert run(broken, killed_after) == killed_after
    with pytest.warns(TornRecordWarning):
        assert run(RecordStore(tmp_path, "broken.jsonl")) == 12 - killed_after
    assert found(broken) == found(whole)
    assert run(RecordStore(tmp_path, "broken.jsonl")) == 0
