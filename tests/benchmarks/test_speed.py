"""The tool's own speed: what a person waits for, start of Python included."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

GPUS, STACKS = "h100,h200,b200,b300,gb200,gb300", "vllm,sglang,trtllm"
BATCHES, PARALLELS = "1,2,4,8,16,32,64,128,256,512", "tp8,dp8-ep8,dp16-ep16"


def tokenfab(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "tokenfab", *args], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.benchmark(group="command")
def test_models(benchmark: Any) -> None:
    benchmark.pedantic(tokenfab, ("models",), rounds=5, warmup_rounds=1)
    assert benchmark.stats.stats.min <= 0.5


@pytest.mark.benchmark(group="command")
def test_cost_of_one_model_over_the_field(benchmark: Any) -> None:
    """6 GPUs x 3 stacks x 10 batches x 3 parallelisms."""
    args = ("cost", "deepseek-v3", "--gpu", GPUS, "--stack", STACKS, "--batch", BATCHES, "--parallel", PARALLELS)
    benchmark.pedantic(tokenfab, args, rounds=3, warmup_rounds=1)
    assert benchmark.stats.stats.min <= 3.0
