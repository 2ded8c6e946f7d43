"""Pricing, comparing and gating where torch and Triton are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenfab.tests.commands.test_compare_commands import write

BLOCKED = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from tokenfab.__main__ import cli
cli.main(sys.argv[1:], prog_name="tokenfab")
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("records") / "h100.jsonl")


@pytest.mark.parametrize(
    "command",
    [
        "cost deepseek-v3 --gpu h100 --stack tokenfab+vllm,vllm --parallel dp32-ep32 --batch 64 --records FOLDER",
        "step deepseek-v3 --gpu h100 --stack tokenfab --parallel dp32-ep32 --batch 64 --records FOLDER",
        "compare FOLDER FOLDER",
        "compare published:vllm FOLDER",
        "gate times FOLDER FOLDER",
        "prices --gpu h100",
    ],
)
def test_commands_run_without_torch(command: str, records: Path) -> None:
    runs_without("torch,triton", command.replace("FOLDER", str(records.parent)))


@pytest.mark.parametrize("command", ["models", "models --precisions", "gpus", "prices", "--help", "bench --help"])
def test_lists_and_help_wait_for_no_numpy(command: str) -> None:
    """A quarter of a second, which a shell's user would feel."""
    runs_without("torch,triton,numpy,pyarrow", command)


def runs_without(modules: str, command: str) -> None:
    arguments = [sys.executable, "-c", BLOCKED, modules, *command.split()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
