"""docs/validation.md is true to the letter: its commands give its figures."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli

PAGE = Path(__file__).parents[2] / "docs" / "validation.md"
SECTION = re.compile(
    r"```\n(?P<command>tokenfab step .*?)\n```.*?"
    r"Published \*\*(?P<published>[\d.]+)\*\* tokens/s/GPU; predicted \*\*(?P<predicted>[\d.]+)\*\* tokens/s/GPU "
    r"at \*\*(?P<user>[\d.]+)\*\* tokens/s/user; ratio \*\*(?P<ratio>[\d.]+)\*\*",
    re.S,
)
CASES = [match.groupdict() for match in SECTION.finditer(PAGE.read_text())]


def test_page_has_at_least_four_published_results() -> None:
    assert len(CASES) >= 4
    table = re.findall(r"^\| .*? \| (\d+) \| (\d+) \| ([\d.]+) \|$", PAGE.read_text(), re.M)
    assert table == [(case["published"], case["predicted"], case["ratio"]) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["command"].split("--gpu ")[1].split()[0])
def test_command_gives_the_figures(case: dict[str, str]) -> None:
    result = CliRunner().invoke(cli, [*shlex.split(case["command"])[1:], "--json"])
    assert result.exit_code == 0, result.output
    (point,) = json.loads(result.output)["points"]
    assert f"{point['tokens_per_s_per_gpu']:.0f}" == case["predicted"]
    assert f"{point['tokens_per_s_per_user']:.1f}" == case["user"]
    assert f"{point['tokens_per_s_per_gpu'] / float(case['published']):.2f}" == case["ratio"]
