"""Expert layers, decode steps and their measurement over two ranks, by torchrun on gloo: see ``ranks_*_cases.py``.

Layers and steps run on Triton's interpreter beside one rank that has all of it; measuring on virtual clocks. A case
that begins with "seen" makes something wrong and must find it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenfab.tests.bench.ranks_launch import CHILD, torchrun

NAMES = {
    "layers": (
        "even bf16", "even fp8", "even mxfp4", "even mxfp4 x mxfp8", "even nvfp4", "groups, bias and a shared expert",
        "three loads, one after the other", "uneven tokens", "all to one rank", "all to one expert",
        "a rank that receives nothing", "a rank without tokens", "a rank without tokens or rows", "beyond the capacity",
        "up to the capacity", "sum of experts", "sum of channels", "seen: dispatch of a rank lost",
        "seen: combine of a rank lost", "seen: blocks swapped", "seen: no routing weight",
        "seen: another rank's experts", "seen: experts one off", "seen: other slots", "seen: no sum of experts",
        "seen: no sum of channels", "seen: a rank lost in the sum", "seen: a scaled sum",
    ),
    "steps": (
        "dp2-ep2 qwen bf16", "dp2-ep2 deepseek fp8", "dp2-ep2 gpt-oss mxfp4", "tp2 qwen bf16", "tp2 deepseek bf16",
        "tp2-ep2 deepseek fp8", "tp2-ep2 gpt-oss mxfp4", "tp2, one KV head for both", "seen: no sums",
        "seen: weights of other experts",
        "seen: keys of other heads", "seen: caches of other heads", "seen: a bias on every rank",
        "seen: gate and up on a rank each", "seen: logits mixed up",
        "refused: another rank's experts",
    ),
    "measure": (
        "a step and its ops on the slowest rank",
        "a rank that is wrong",
        "a step of sums, one rank throttled",
        "throttled by what holds any rank down",
        "two ranks on one GPU",
        "GPUs of two kinds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("group", NAMES)
def test_every_case_is_right_on_both_ranks(group: str, tmp_path: Path) -> None:
    """All cases of a group in one launch: starting two processes takes longer than most of them."""
    pytest.importorskip("torch")
    ended = torchrun([CHILD, group, str(tmp_path)])
    assert ended.code == 0, ended.output
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert [name for name, is_right in found.items() if is_right is not True] == [], ended.output
        assert list(found) == list(NAMES[group])
