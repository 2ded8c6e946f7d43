"""The worker's end of a compilation on a cluster, in this process: a real compiler, other folders, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Generator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tokenfab.bench import fleet_compile
from tokenfab.bench.fleet import FleetError, Job
from tokenfab.bench.fleet_compile import compile_on, compile_point
from tokenfab.bench.inspect import inspect
from tokenfab.bench.inspect_child import Children
from tokenfab.kernels.registry import find_points

POINTS = find_points("quantize")[:1]


def here(function: str, jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
    """A cluster of this process, whose payloads travel as JSON."""
    module, _, name = function.partition(":")
    for job in jobs:
        yield job, getattr(import_module(module), name)(json.loads(json.dumps(job.payload)))


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """The worker's compiling processes, ended."""
    made = Children()
    monkeypatch.setattr(fleet_compile, "_children", lambda: made)
    yield
    made.close()


def test_a_worker_compiles_what_one_machine_compiles(tmp_path: Path, children: None) -> None:
    pytest.importorskip("triton", reason="compiles with Triton")
    there = inspect(POINTS, ["sm_90"], cache_dir=tmp_path, compile_all=compile_on(here))
    again = inspect(POINTS, ["sm_90"], cache_dir=tmp_path)
    alone = inspect(POINTS, ["sm_90"], use_cache=False, cache_dir=tmp_path, jobs=1)
    assert there[0].compiled is not None
    assert there[0].compiled.registers > 0
    assert [each.cached for each in (there[0], again[0], alone[0])] == [False, True, False]
    assert there[0].compiled == again[0].compiled == alone[0].compiled


def payload(**changes: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def keep(function: str, jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        found.extend(job.payload for job in jobs)
        yield from ()

    job = {**POINTS[0].compiler_inputs(), "arch": "sm_90"}
    list(compile_on(keep)([(0, job)]))
    return {**found[0], **changes}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"fingerprint": "0"}, "tokenfab's sources"), ({"toolchain": {"triton": "1.0"}}, "Triton and its assemblers"),
        ({"python": "2.7"}, "Python"),
    ],
)  # fmt: skip
def test_r30_another_compiler_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(FleetError, match=f"ray: expected {what} on .* as where the sweep was started"):
        compile_point(payload(**changes))


class Asked:
    """Says in what environment it was asked, and names a file of the package."""

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        own = {name: value for name, value in os.environ.items() if name.startswith("TRITON_FLEET")}
        files = {fleet_compile._package() + "/kernels/a.py": "hash", "/srv/mine.py": "other"}
        return {"facts": {"environment": own, "timeout_s": timeout_s}, "dependencies": files}


def test_the_drivers_variables_decide_and_its_folders_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_FLEET_SAME", "driver's")
    asked = payload()
    monkeypatch.setenv("TRITON_FLEET_SAME", "worker's")
    monkeypatch.setenv("TRITON_FLEET_ONLY_HERE", "1")
    monkeypatch.setattr(fleet_compile, "_children", Asked)
    with monkeypatch.context() as patch:
        patch.setattr(fleet_compile, "_package", lambda: "/opt/node/tokenfab")
        packed = compile_point(asked)
    answer = fleet_compile._read(packed)
    assert answer["facts"] == {"environment": {"TRITON_FLEET_SAME": "driver's"}, "timeout_s": 300.0}
    assert answer["dependencies"] == {fleet_compile._package() + "/kernels/a.py": "hash", "/srv/mine.py": "other"}
    assert "package" in json.loads(zlib.decompress(packed))


def test_r30_a_compiling_process_whose_worker_was_killed_leaves_no_folder() -> None:
    code = (
        "import sys, time; from tokenfab.bench.inspect_child import Child\n"
        "print(Child('m')._folder, flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        folder = Path(worker.stdout.readline().strip())
        assert folder.is_dir()
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.communicate(timeout=30)
    end_s = time.monotonic() + 60
    while folder.exists():
        assert time.monotonic() < end_s, f"{folder} is still there"
        time.sleep(0.1)
