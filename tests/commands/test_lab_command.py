"""What ``tokenfab lab`` says at its end on a machine that has a GPU and little else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenfab.bench import published
from tokenfab.commands.lab import _summary
from tokenfab.tests.commands.test_compare_commands import write


def lost(*arguments: Any) -> Any:
    raise published.PublishedDataError("published data: not installed")


def test_without_records_the_summary_still_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _summary(tmp_path, "h100", False)
    said = capsys.readouterr()
    assert "0 of 0 shapes behind" in said.out
    assert said.err.startswith("warning: ")
    assert str(tmp_path) in said.err


def test_without_published_tables_ours_stand_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "h100.jsonl")
    _summary(tmp_path, "h100", True)
    assert [rival["name"] for rival in json.loads(capsys.readouterr().out)["rows"][0]["rivals"]][:1] == ["vllm"]
    monkeypatch.setattr(published, "PublishedData", lost)
    _summary(tmp_path, "h100", True)
    said = capsys.readouterr()
    (row,) = json.loads(said.out)["rows"]
    assert (row["rivals"], row["best"]) == ([], None)
    assert "warning: no published rows beside ours: published data: not installed" in said.err
