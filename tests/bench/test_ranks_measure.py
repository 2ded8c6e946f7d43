"""Measuring over two ranks on a virtual clock, by torchrun and gloo: see ``ranks_measure_cases.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenfab.tests.bench.ranks_launch import CHILD, torchrun

NAMES = (
    "a step and its ops on the slowest rank",
    "a rank that is wrong",
    "a step of sums, one rank throttled",
    "two ranks on one GPU",
    "GPUs of two kinds",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bool]]:
    """What came of the cases, on each rank."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("ranks")
    ended = torchrun([CHILD, "measure", str(folder)])
    assert ended.code == 0, ended.output
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, found: list[dict[str, bool]]) -> None:
    assert [each[name] for each in found] == [True, True]


def test_no_case_is_left_out(found: list[dict[str, bool]]) -> None:
    assert list(found[0]) == list(found[1]) == list(NAMES)
