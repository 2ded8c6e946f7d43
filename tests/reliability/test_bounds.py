"""Row 1: no kernel of the registry touches memory beside its buffers, on either side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tokenfab.kernels.registry import KERNELS


def run(*arguments: str) -> tuple[int, list[str], str]:
    """(exit status, printed lines, errors) of a child with guarded buffers."""
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("guarded.py")), *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return child.returncode, child.stdout.splitlines(), child.stderr


def test_r01_out_of_bounds() -> None:
    status, lines, errors = run("kernels")
    assert status == 0, f"{lines[-1:]} and then:\n{errors[-3000:]}"
    ended = [line.split()[1:] for line in lines if line.startswith("ended ")]
    assert [row[:2] for row in ended] == [[kernel.name, side] for kernel in KERNELS for side in ("end", "start")]
    assert all(int(count) >= 2 for _, _, count in ended)  # inputs, outputs and what the wrapper allocates


@pytest.mark.parametrize(
    ("planted", "lines"),
    [
        ("planted-end", ["begin end"]),
        ("planted-start", ["begin end", "ended end 2", "begin start"]),
    ],
)
def test_r01_one_element_too_far_is_caught(planted: str, lines: list[str]) -> None:
    """Behind the end of a buffer at the end of its pages; before the start of one at their start."""
    status, printed, errors = run(planted)
    assert printed == lines, errors
    assert status == -signal.SIGSEGV
