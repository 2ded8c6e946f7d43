"""Whole decode steps over two ranks by torchrun, on gloo and Triton's interpreter: see ``ranks_step_cases.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenfab.tests.bench.ranks_launch import CHILD, torchrun

NAMES = (
    "dp2-ep2 qwen bf16", "dp2-ep2 deepseek fp8", "dp2-ep2 gpt-oss mxfp4", "tp2 qwen bf16", "tp2 deepseek bf16",
    "tp2-ep2 deepseek fp8", "tp2-ep2 gpt-oss mxfp4", "tp2, one KV head for both", "seen: no sums",
    "seen: weights of other experts",
    "seen: keys of other heads", "seen: caches of other heads", "seen: a bias on every rank",
    "seen: gate and up on a rank each", "seen: logits mixed up",
    "refused: another rank's experts",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bool]]:
    """What came of the cases, on each rank."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("ranks")
    ended = torchrun([CHILD, "steps", str(folder)])
    assert ended.code == 0, ended.output
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, found: list[dict[str, bool]]) -> None:
    assert [each[name] for each in found] == [True, True]


def test_no_case_is_left_out(found: list[dict[str, bool]]) -> None:
    assert list(found[0]) == list(found[1]) == list(NAMES)
