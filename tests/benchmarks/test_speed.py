"""The tool's own speed: what a person waits for, start of Python included."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pace import slowness
from tokenfab.bench.record import encode
from tokenfab.tests.bench.made_records import RECORD

GPUS, STACKS = "h100,h200,b200,b300,gb200,gb300", "vllm,sglang,trtllm"
BATCHES, PARALLELS = "1,2,4,8,16,32,64,128,256,512", "tp8,dp8-ep8,dp16-ep16"


def tokenfab(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "tokenfab", *args], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.benchmark(group="command")
def test_models(benchmark: Any) -> None:
    benchmark.pedantic(tokenfab, ("models",), rounds=5, warmup_rounds=1)
    assert benchmark.stats.stats.min <= 0.5 * slowness()


@pytest.mark.benchmark(group="command")
def test_cost_of_one_model_over_the_field(benchmark: Any) -> None:
    """6 GPUs x 3 stacks x 10 batches x 3 parallelisms."""
    args = ("cost", "deepseek-v3", "--gpu", GPUS, "--stack", STACKS, "--batch", BATCHES, "--parallel", PARALLELS)
    benchmark.pedantic(tokenfab, args, rounds=3, warmup_rounds=1)
    assert benchmark.stats.stats.min <= 3.0 * slowness()


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """100 points in three processes."""
    path, point = tmp_path / "h100.jsonl", RECORD.point
    with path.open("wb") as file:
        for m, process in itertools.product(range(100), "abc"):
            changed = msgspec.structs.replace(point, shape={"m": m + 1, "n": 7168, "k": 16384}, gpu="h100")
            file.write(encode(msgspec.structs.replace(RECORD, point=changed, process=process)))
    return path


@pytest.mark.benchmark(group="command")
def test_comparing_600_records(benchmark: Any, records: Path) -> None:
    benchmark.pedantic(tokenfab, ("compare", str(records), str(records)), rounds=3, warmup_rounds=1)
    assert benchmark.stats.stats.min <= 2.0 * slowness()


@pytest.mark.benchmark(group="command")
def test_listing_what_would_be_measured(benchmark: Any) -> None:
    args = ("bench", "gemm", "--list", "--gpu", "h100", "--model", "deepseek-v3,qwen3-30b-a3b,gpt-oss-120b")
    benchmark.pedantic(tokenfab, args, rounds=3, warmup_rounds=1)
    assert benchmark.stats.stats.min <= 2.0 * slowness()
