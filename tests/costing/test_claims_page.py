"""docs/claims.md is true to the letter: its commands print what it quotes, and every bold figure is in their output."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli

PAGE = (Path(__file__).parents[2] / "docs" / "claims.md").read_text()
BLOCKS = re.findall(r"^```\n\$ (tokenfab .*?)\n(.*?)\n```$", PAGE, re.S | re.M)
SECTIONS = re.split(r"^## ", PAGE, flags=re.M)
NUMBER = re.compile(r"(?<![\d.,])\d[\d,]*(?:\.\d+)?(?![\d,]*\.?\d)")


@cache
def printed(command: str) -> tuple[str, ...]:
    result = CliRunner().invoke(cli, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    return tuple(line.rstrip() for line in result.output.splitlines() if line.strip())


@pytest.mark.parametrize(("command", "quoted"), BLOCKS, ids=range(len(BLOCKS)))
def test_quoted_lines_are_the_commands_in_order(command: str, quoted: str) -> None:
    lines = iter(printed(command))
    for line in quoted.splitlines():
        assert line == "..." or line in lines, line  # `in` goes on from the last line found


def figures(text: str) -> set[str]:
    return {found.replace(",", "") for found in NUMBER.findall(text)}


@pytest.mark.parametrize("section", SECTIONS[1:], ids=lambda section: section.splitlines()[0])
def test_bold_figures_are_in_their_sections_output(section: str) -> None:
    blocks = re.findall(r"^```\n\$ (tokenfab .*?)\n", section, re.M)
    output = figures("\n".join(line for command in blocks for line in printed(command)))
    prose = re.sub(r"```.*?```", "", section, flags=re.S)
    assert figures(" ".join(re.findall(r"\*\*([\d.,]+)\*\*", prose))) <= output


def test_the_summary_has_a_section_for_every_figure() -> None:
    rows = re.findall(r"^\| .* \| ([\d.]+) \| \[(\d)\]\(#(\S+)\) \|$", SECTIONS[0], re.M)
    assert len(rows) >= 8
    for figure, number, anchor in rows:
        section = next(each for each in SECTIONS[1:] if each.startswith(f"{number}. "))
        heading = re.sub(r"[^\w\- ]", "", section.splitlines()[0].lower()).replace(" ", "-")
        assert anchor == heading
        assert f"**{figure}**" in section
    assert any(float(figure) >= 35 for figure, _, _ in rows)
    assert any(2.5 <= float(figure) <= 3.5 for figure, _, _ in rows)


def test_there_is_something_to_hold_the_page_to() -> None:
    assert len(BLOCKS) >= 8
    assert sum(len(re.findall(r"\*\*[\d.]+\*\*", section)) for section in SECTIONS[1:]) >= 15
