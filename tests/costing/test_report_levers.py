"""The pages of the levers, in a real browser with the network off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pages import drawn, figures, move, opened
from tokenfab.commands.levers import speculate
from tokenfab.costing.levers.acceptance import Acceptance
from tokenfab.costing.levers.speculative import speculation
from tokenfab.costing.report.speculate_view import write_speculation
from tokenfab.costing.study import study

DRAFTS = [1, 3]


@pytest.fixture(scope="module")
def drafts_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "drafts.html"
    plan = study("deepseek-v3", ["h200", "b200"], ["sglang"], ["dp8-ep8"], [32])
    found = speculation(plan, Acceptance.of_rates([0.85]), DRAFTS)
    write_speculation(path, [(each, each.points([8, 64])) for each in found])
    return path


def test_a_line_for_every_number_of_drafts(drafts_page: Path) -> None:
    (plan,) = speculation(
        study("deepseek-v3", ["b200"], ["sglang"], ["dp8-ep8"], [32]), Acceptance.of_rates([0.85]), DRAFTS
    )
    lines = {trace["name"]: trace for trace in figures(drafts_page)["speculation-1"]["data"]}
    assert set(lines) == {"no drafts", "1 draft", "3 drafts"}
    for name, drafts in (("no drafts", 0), ("1 draft", 1), ("3 drafts", 3)):
        assert lines[name]["x"] == [8, 64]
        assert lines[name]["y"] == [plan.cost(drafts, batch).usd_per_mtok_output for batch in (8, 64)]


def test_acceptance_lengths_price_their_own_lines(browser: Any, drafts_page: Path) -> None:
    page, errors = opened(browser, drafts_page)
    before = drawn(page, "speculation-0", "y"), drawn(page, "speculation-1", "y")
    cells = page.eval_on_selector_all("[data-usd]", "all => all.map(c => [+c.dataset.usd, c.dataset.keptOf || ''])")
    kept = 1 + 0.85 + 0.85**2 + 0.85**3
    move(page, "[data-kept='3']", 1)
    for plot, old in enumerate(before):
        new = drawn(page, f"speculation-{plot}", "y")
        assert new[:2] == old[:2]  # none, and 1 draft
        assert new[2] == pytest.approx([usd * kept for usd in old[2]])
    shown = page.eval_on_selector_all("[data-usd]", "all => all.map(c => +c.textContent)")
    assert shown == pytest.approx([usd * (kept if of == "3" else 1) for usd, of in cells], abs=6e-4)
    rates = page.eval_on_selector_all(
        "[data-rate]", "all => all.map(c => [+c.textContent, +c.dataset.rate, c.dataset.keptOf || ''])"
    )
    assert all(math.isclose(text, rate / (kept if of == "3" else 1), abs_tol=0.06) for text, rate, of in rates)
    page.fill("[data-price-of=h200]", "1.45")
    assert drawn(page, "speculation-0", "y")[0] == pytest.approx([usd / 2 for usd in before[0][0]])
    assert drawn(page, "speculation-1", "y")[0] == before[1][0]
    assert errors == []


def test_speculate_writes_its_page(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    args = ["gpt-oss-120b", "--gpu", "h100", "--parallel", "tp2", "--drafts", "2", "--acceptance-rate", "0.7",
            "--batch", "4", "--report", str(path)]  # fmt: skip
    done = CliRunner().invoke(speculate, args)
    assert done.exit_code == 0
    assert f"report: {path}" in done.output
    assert [trace["name"] for trace in figures(path)["speculation-0"]["data"]] == ["no drafts", "2 drafts"]
