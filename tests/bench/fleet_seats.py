"""GPUs of a cluster that are objects of the tests' process: what they are asked is written down."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli
from tokenfab.bench import fleet_ray
from tokenfab.bench.fleet import AnchorTime, GpuReport, SeatDied, fingerprint
from tokenfab.bench.fleet_seat import Hello, SeatSpec
from tokenfab.bench.fleet_sweep import Fleet
from tokenfab.bench.gpus import get_gpu
from tokenfab.tests.bench.fake_device import FakeDevice

H100 = get_gpu("h100")
PROPERTIES = FakeDevice().properties


@dataclass
class Gpus:
    """Seats on two GPUs; what they do is written down. ``answers``: method to what it gives."""

    answers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    count: int = 2
    log: list[tuple[str, int, Any]] = field(default_factory=list)
    made: int = 0
    slow: set[str] = field(default_factory=set)
    faulty: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    # as much of a cluster as the commands ask for

    def gpu_models(self) -> dict[str, int]:
        return {"h100": self.count} if self.count else {}

    def num_cpus(self) -> int:
        return 2

    def spread(self, function: str, jobs: Any) -> Any:
        raise AssertionError("nothing compiles here")

    def seats(
        self, gpu: str, actor: str, *arguments: Any, most: int | None = None, expected: int | None = None
    ) -> list[GpuSeat]:
        assert gpu == "h100"
        assert actor == "tokenfab.bench.fleet_seat:Seat"
        with self.lock:
            free = [uuid for uuid in (f"GPU-{n}" for n in range(self.count)) if uuid not in self.busy][:most]
            self.busy |= set(free)
            self.made += len(free)
            return [GpuSeat(self, uuid, self.made - index) for index, uuid in enumerate(free)]


class GpuSeat:
    def __init__(self, gpus: Gpus, uuid: str, number: int) -> None:
        self.gpus, self.uuid, self.number, self.is_alive = gpus, uuid, number, True

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        assert self.is_alive, "a seat that died is not asked again"
        assert timeout_s > 0
        with self.gpus.lock:
            self.gpus.log.append((method, self.number, arguments))
        if method == "hello":
            factor = 1.2 if self.uuid in self.gpus.slow else 1.0
            anchors = (AnchorTime("copy", factor * 1e-4, factor * 0.999e-4, factor * 1.001e-4),)
            problem = "anchor copy: check: wrong" if self.uuid in self.gpus.faulty else ""
            return Hello(GpuReport(self.uuid, "here", anchors, problem), PROPERTIES)
        try:
            return self.gpus.answers[method](self, *copy.deepcopy(arguments))  # as if it travelled
        except SeatDied:
            self.close()
            raise

    def close(self) -> None:
        self.is_alive = False
        with self.gpus.lock:
            self.gpus.busy.discard(self.uuid)


def fleet_of(gpus: Gpus) -> Fleet:
    return Fleet(gpus, H100, SeatSpec("h100", fingerprint()))


def invoker(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., Result]:
    """A command with ``--ray auto`` on such a cluster, its records in a folder."""

    def run(gpus: Gpus, *arguments: str) -> Result:
        @contextmanager
        def connected(address: str) -> Iterator[Gpus]:
            assert address == "auto"
            yield gpus

        monkeypatch.setattr(fleet_ray, "connect", connected)
        return CliRunner().invoke(cli, [*arguments, "--ray", "auto", "--out", str(folder)])

    return run
