"""The README is true to the letter: its commands run, and the output it quotes is theirs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M)
BLOCKS = [block for language, block in FENCED if not language]
COMMANDS = [
    line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("tokenfab ")
]
NEEDS_MORE = [
    line.split("#")[0].split(">")[0].strip()
    for language, block in FENCED
    if language == "sh"
    for line in block.splitlines()
    if line.startswith("tokenfab ")
]
"""A GPU, or files of the reader's."""
QUOTED = [block for block in BLOCKS if block.startswith("$ tokenfab ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str) -> None:
    result = CliRunner().invoke(cli, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", NEEDS_MORE)
def test_commands_for_a_gpu_are_understood(command: str) -> None:
    """Every word but the work: the command's own parser takes its arguments."""
    context = click.Context(cli)
    command_group: click.Command = cli
    words = shlex.split(command)[1:]
    while isinstance(command_group, click.Group):
        _, found, words = command_group.resolve_command(context, words)
        assert found is not None
        command_group = found
    command_group.make_context("tokenfab", words)


@pytest.mark.parametrize("block", QUOTED)
def test_quoted_output_is_the_commands(block: str) -> None:
    command, *expected = block.splitlines()
    result = CliRunner().invoke(cli, shlex.split(command)[2:])
    assert [line.rstrip() for line in result.output.splitlines() if line.strip()] == expected


def test_there_is_something_to_hold_it_to() -> None:
    assert len(COMMANDS) >= 7
    assert len(QUOTED) >= 1
    targets = re.findall(r"\]\((docs/[^)]+)\)", TEXT)
    assert set(targets) >= {"docs/cost.png", "docs/gates.md", "docs/own_kernel.md", "docs/reliability.md"}
    assert len(NEEDS_MORE) >= 10
    assert all((ROOT / target).is_file() for target in targets)


def test_ratios_are_those_of_the_validation_page() -> None:
    page = (ROOT / "docs" / "validation.md").read_text()
    ratios = re.findall(r"ratio \*\*([\d.]+)\*\*", page)
    assert f"DeepSeek's day (ratio\n{ratios[0]}), SGLang on 96 H100 ({ratios[1]})" in TEXT


def test_interpolation_figures_are_what_the_check_prints() -> None:
    result = CliRunner().invoke(cli, ["published", "check"])
    (line,) = [line for line in result.output.splitlines() if "held-out rows" in line]
    checks, rows, medians, p95s = re.findall(
        r"[\d,]+(?= checks)|[\d,]+(?= held)|(?<=5 % in )\d+|(?<=20 % in )\d+", line
    )
    assert f"{int(rows.replace(',', '')) / 1e6:.1f} million rows" in " ".join(TEXT.split())
    assert f"in {checks} checks" in " ".join(TEXT.split())
    assert f"at most 5 % in {medians} of them" in " ".join(TEXT.split())
    assert f"percentile at most 20 % in {p95s}" in " ".join(TEXT.split())
