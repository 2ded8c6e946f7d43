"""Ray clusters of this machine for tests: small, on free ports, with temporary files of their own, and ended whatever
happens."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from . import fleet_fakes

_STORE_BYTES = 80 << 20
_SOON = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 6}
"""A node that is killed counts as dead within seconds."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """What hangs fails."""

    def fail(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def cluster(folder: Path, *nodes: dict[str, Any]) -> Iterator[Any]:
    """Nodes as ``ray start`` would make them, the first the head; the workers find ``fleet_fakes``'s folder."""
    pytest.importorskip("ray", reason="needs the extra: pip install '.[ray]'")
    variables = {fleet_fakes.FOLDER: str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    from ray.cluster_utils import Cluster

    made = None
    # not below tmp_path: its sockets' names must be shorter than 108 bytes
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))
    try:
        head, *others = ({"object_store_memory": _STORE_BYTES, **node} for node in nodes)
        own = {"include_dashboard": False, "temp_dir": str(temporary), "_system_config": _SOON}
        made = Cluster(initialize_head=True, head_node_args={**own, **head})
        for node in others:
            made.add_node(**node)
        yield made
    finally:
        if made is not None:
            made.shutdown()
        _remove(temporary)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _remove(folder: Path) -> None:
    """Processes that are ending may still write."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return
