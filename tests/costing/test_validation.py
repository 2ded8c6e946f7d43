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
REQUEST = re.compile(
    r"```\n(?P<command>tokenfab request .*?)\n```.*?"
    r"Published \*\*(?P<published>[\d.]+)\*\* input tokens/s/GPU; predicted \*\*(?P<predicted>[\d.]+)\*\* input "
    r"tokens/s/GPU; ratio \*\*(?P<ratio>[\d.]+)\*\*(?P<rest>.*?)(?=\n## |\Z)",
    re.S,
)
REQUESTS = [match.groupdict() for match in REQUEST.finditer(PAGE.read_text())]


def test_page_has_at_least_four_published_results() -> None:
    assert len(CASES) >= 4
    table = re.findall(r"^\| .*? \| (\d+) \| (\d+) \| ([\d.]+) \|$", PAGE.read_text(), re.M)
    assert len(REQUESTS) >= 2
    assert table == [(case["published"], case["predicted"], case["ratio"]) for case in (*CASES, *REQUESTS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["command"].split("--gpu ")[1].split()[0])
def test_command_gives_the_figures(case: dict[str, str]) -> None:
    result = CliRunner().invoke(cli, [*shlex.split(case["command"])[1:], "--json"])
    assert result.exit_code == 0, result.output
    (point,) = json.loads(result.output)["points"]
    assert f"{point['tokens_per_s_per_gpu']:.0f}" == case["predicted"]
    assert f"{point['tokens_per_s_per_user']:.1f}" == case["user"]
    assert f"{point['tokens_per_s_per_gpu'] / float(case['published']):.2f}" == case["ratio"]


@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case["published"])
def test_request_gives_the_figures(case: dict[str, str]) -> None:
    result = CliRunner().invoke(cli, [*shlex.split(case["command"])[1:], "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    rate = found["input_tokens_per_s_per_gpu"]
    assert f"{rate:.0f}" == case["predicted"]
    assert f"{rate / float(case['published']):.2f}" == case["ratio"]
    dollars = re.findall(r"\$\*\*([\d.]+)\*\*", case["rest"])
    names = ("usd_per_mtok_output_decode_gpus_only", "usd_per_mtok_output", "usd_per_mtok_total")
    known = {f"{found[name]:.3g}" for name in names}
    assert dollars
    assert set(dollars) <= known
