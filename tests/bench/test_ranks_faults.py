"""A rank that dies, raises, hangs or never comes: an error on all ranks within the timeout, and no hang."""

from __future__ import annotations

import pytest
from tokenfab.tests.bench.ranks_launch import Ended, by_themselves, torchrun

CHILD = "tokenfab.tests.bench.ranks_fault_child"
TIMEOUT_S = 10
STARTING_S = 240
"""What two processes may take to import torch on a machine that has other things to do."""

pytest.importorskip("torch")


def failed(how: str, timeout_s: float = TIMEOUT_S) -> list[Ended]:
    return by_themselves([CHILD, how, str(timeout_s)], timeout_s=STARTING_S)


def test_r29_a_rank_that_dies_between_dispatch_and_combine() -> None:
    """Nobody else ends rank 0: its connections do."""
    waiting, died = failed("layer dies", 60)
    assert died.code == 3
    assert waiting.code == 2, waiting.output
    assert "error: rank 0: in all_to_all: another rank died or gave no answer: " in waiting.output


def test_r29_a_rank_that_raises_tells_the_others_why() -> None:
    waiting, raised = failed("raises", 60)
    assert (waiting.code, raised.code) == (2, 2), waiting.output + raised.output
    assert "error: weights: expected some; got none" in raised.output
    reason = "rank 0: in all_to_all: rank 1 failed: ValueError: weights: expected some; got none"
    assert reason in waiting.output


def test_r29_a_rank_that_hangs_is_given_up() -> None:
    waiting, hanging = by_themselves([CHILD, "hangs", str(TIMEOUT_S)], killed=[1], timeout_s=STARTING_S)
    assert hanging.code is None  # killed by the test; under a launcher by that
    assert waiting.code == 2, waiting.output
    assert "error: rank 0: in all_to_all: another rank died or gave no answer: " in waiting.output


def test_r29_a_process_that_cannot_raise_is_ended() -> None:
    """As one that waits inside of a GPU for a rank that is gone."""
    waiting, _ = by_themselves([CHILD, "stuck", str(TIMEOUT_S)], killed=[1], timeout_s=STARTING_S)
    assert waiting.code == 70, waiting.output
    assert f"error: rank 0: in replay: no answer from the other ranks in {TIMEOUT_S} s" in waiting.output


def test_r29_a_rank_that_never_comes() -> None:
    (alone,) = by_themselves([CHILD, "dies", str(TIMEOUT_S)], started=[0], timeout_s=STARTING_S)
    assert alone.code == 2, alone.output
    assert f"error: rank 0: expected 2 ranks within {TIMEOUT_S} s; " in alone.output


def test_r29_torchrun_ends_with_an_error_too() -> None:
    ended = torchrun([CHILD, "dies", "60"], timeout_s=STARTING_S)
    assert ended.code == 1, ended.output
    assert "exitcode  : 3" in ended.output


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", None, "RANK: expected the environment of a launcher; got none. One line: torchrun"),
        ("RANK", "two", "RANK: expected a whole number; got 'two'"),
        ("RANK", "4", "RANK: expected less than WORLD_SIZE = 2; got 4"),
        ("MASTER_ADDR", "", "MASTER_ADDR: expected the environment of a launcher; got none"),
    ],
)
def test_r29_what_the_environment_lacks(
    name: str, value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenfab.bench.ranks_group import launched

    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, text in whole.items():
        monkeypatch.setenv(variable, text)
    assert launched().rank == 1
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        launched()
