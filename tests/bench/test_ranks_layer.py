"""Expert layers over two ranks by torchrun, on gloo and Triton's interpreter: see ``ranks_layer_cases.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenfab.tests.bench.ranks_launch import CHILD, torchrun

NAMES = (
    "even bf16", "even fp8", "even mxfp4", "even mxfp4 x mxfp8", "even nvfp4", "groups, bias and a shared expert",
    "three loads, one after the other", "uneven tokens", "all to one rank", "all to one expert",
    "a rank that receives nothing", "a rank without tokens", "a rank without tokens or rows", "beyond the capacity",
    "up to the capacity", "sum of experts", "sum of channels", "seen: dispatch of a rank lost",
    "seen: combine of a rank lost", "seen: blocks swapped", "seen: no routing weight", "seen: another rank's experts",
    "seen: experts one off", "seen: other slots", "seen: no sum of experts", "seen: no sum of channels",
    "seen: a rank lost in the sum", "seen: a scaled sum",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bool]]:
    """What came of the cases, on each rank."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("ranks")
    ended = torchrun([CHILD, "layers", str(folder)])
    assert ended.code == 0, ended.output
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, found: list[dict[str, bool]]) -> None:
    assert [each[name] for each in found] == [True, True]


def test_no_case_is_left_out(found: list[dict[str, bool]]) -> None:
    assert list(found[0]) == list(found[1]) == list(NAMES)
