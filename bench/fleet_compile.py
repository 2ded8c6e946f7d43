"""Compilation on any CPU of a cluster: the worker's end, and ``Compile`` for ``inspect`` on the driver's.

The driver keeps the answers in its own cache, so they must be what it would have compiled itself: a worker refuses
where its sources, its Triton, its assemblers or its Python are others, and takes over the driver's variables that
decide what a compiler makes. A file named in an answer lies in the driver's folder of the package by then.

Errors: ``FleetError`` naming the node.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import zlib
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

from .fleet import FleetError, Job, Lost, Spread, check_same, fingerprint
from .inspect import Compile, Numbered
from .inspect_cache import compiler_environment, toolchain
from .inspect_child import Children

WORKER = f"{__name__}:compile_point"
"""What runs on the nodes."""


def _package() -> str:
    """The folder of the package as its modules name it, links unresolved."""
    return str(Path(__file__).absolute().parents[1])


# -- the worker's end ------------------------------------------------------------------------------


@lru_cache
def _toolchain() -> dict[str, str]:
    return toolchain()


@lru_cache
def _children() -> Children:
    """One compiling process is kept from point to point, as long as the module is the same."""
    return Children()


def compile_point(payload: dict[str, Any]) -> bytes:
    """The answer of ``Child.ask`` as compressed JSON: small, so that it travels with the message that it is done."""
    node = platform.node()
    try:
        there = _toolchain()
    except RuntimeError as error:
        raise FleetError(f"ray: {error}, on {node}") from None
    check_same("tokenfab's sources", payload["fingerprint"], fingerprint(), node)
    check_same("Triton and its assemblers", payload["toolchain"], there, node)
    check_same("Python", payload["python"], sys.version, node)
    for name in compiler_environment().keys() - payload["environment"].keys():
        del os.environ[name]
    os.environ.update(payload["environment"])
    answer = _children().ask(payload["job"], payload["timeout_s"])
    return zlib.compress(json.dumps({"answer": answer, "package": _package()}).encode())


# -- the driver's end ------------------------------------------------------------------------------


def compile_on(spread: Spread, timeout_s: float = 300.0) -> Compile:
    """Compiles on a cluster. A point that takes its workers down is a finding, as one that takes its process down."""

    def compile_all(waiting: Sequence[Numbered]) -> Generator[Numbered, None, None]:
        if not waiting:
            return
        common = {
            "timeout_s": timeout_s, "fingerprint": fingerprint(), "toolchain": toolchain(), "python": sys.version,
            "environment": compiler_environment(),
        }  # fmt: skip
        jobs = [Job(str(index), f"{job['function']} {job['arch']}", {"job": job, **common}) for index, job in waiting]
        with closing(spread(WORKER, jobs)) as answers:
            for job, packed in answers:
                yield int(job.key), _read(packed)

    return compile_all


def _read(packed: bytes | Lost) -> dict[str, Any]:
    if isinstance(packed, Lost):
        return {"failure": "abort", "text": packed.reason}
    made = json.loads(zlib.decompress(packed))
    answer, there, here = made["answer"], made["package"] + os.sep, _package() + os.sep
    if answer.get("dependencies"):
        answer["dependencies"] = {
            here + path.removeprefix(there) if path.startswith(there) else path: digest
            for path, digest in answer["dependencies"].items()
        }
    return answer
