"""Ranks as processes on this machine: by torchrun, or each by itself; none outlives a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

CHILD = "tokenfab.tests.bench.ranks_child"


@dataclass(frozen=True)
class Ended:
    """``code``: None where the process had to be killed."""

    code: int | None
    output: str
    wall_s: float


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def _end(process: subprocess.Popen[str], until_s: float) -> Ended:
    begin_s = time.monotonic()
    try:
        output, _ = process.communicate(timeout=max(0.1, until_s - begin_s))
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate()
        code = None
    return Ended(code, output, time.monotonic() - begin_s)


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and all that it started: they are one session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def torchrun(arguments: Sequence[str], *, ranks: int = 2, timeout_s: float = 400, **environment: str) -> Ended:
    """``torchrun --nproc-per-node RANKS -m ARGUMENTS``, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    process = _start([*command, *arguments], _environment(**environment))
    try:
        return _end(process, time.monotonic() + timeout_s)
    finally:
        _kill(process)


def by_themselves(
    arguments: Sequence[str], *, ranks: int = 2, started: Sequence[int] | None = None, killed: Sequence[int] = (),
    timeout_s: float = 120,
) -> list[Ended]:  # fmt: skip
    """Each of ``started`` as Slurm would start it: with nobody who ends the others when one dies.

    ``killed``: ranks that would never end; once all others have.
    """
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    begin_s, processes = time.monotonic(), list[subprocess.Popen[str]]()
    try:
        for rank in range(ranks) if started is None else started:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            environment = _environment(MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in names.items()})
            processes.append(_start([sys.executable, "-m", *arguments], environment))
        until_s = begin_s + timeout_s
        ends = {rank: _end(process, until_s) for rank, process in enumerate(processes) if rank not in killed}
        return [ends[rank] if rank in ends else _end(process, 0.0) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            _kill(process)
