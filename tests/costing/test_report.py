"""The report in a real browser with the network off: no error, data in every plot, nothing hostile alive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import drawn, figures, move, opened
from tokenfab.costing.levers.sensitivity import sensitivity
from tokenfab.costing.prices import stated_price
from tokenfab.costing.report.cost_view import cheapest_frontier, write_report
from tokenfab.costing.study import StudyResult, price_step, run_study, study, study_of
from tokenfab.costing.sweep import best_points

HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"


@pytest.fixture(scope="module")
def studies() -> list[StudyResult]:
    gpus, stacks = ["h100", "h200", "b200"], ["vllm", "sglang", "trtllm"]
    return [run_study(study(model, gpus, stacks, None, None)) for model in ("deepseek-v3", "gpt-oss-120b")]


@pytest.fixture(scope="module")
def report(studies: list[StudyResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write_report(path, studies, 20.0, 0.25)
    return path


def test_plots_hold_the_points(report: Path, studies: list[StudyResult]) -> None:
    found = figures(report)
    assert set(found) == {f"{kind}-{n}" for kind in ("throughput", "cost", "breakdown", "moves") for n in (0, 1)}
    ranked = [p for p in studies[0].points if p.step.coverage()["modelled"] <= 0.25]
    drawn = {(x, y) for t in found["cost-0"]["data"][1:] for x, y in zip(t["x"], t["y"], strict=True)}
    assert drawn <= {(p.tokens_per_s_per_user, p.usd_per_mtok_output) for p in ranked}
    over_all = found["cost-0"]["data"][0]
    best = cheapest_frontier(ranked)
    assert over_all["y"] == [p.usd_per_mtok_output for p in best] == sorted(over_all["y"])


def test_bars_sum_to_the_price_and_provenance_is_hatched(report: Path) -> None:
    data = figures(report)["breakdown-0"]["data"]
    totals = [sum(values) for values in zip(*(trace["x"] for trace in data), strict=True)]
    labelled = [float(label.split("$")[1]) for label in data[0]["y"]]
    assert totals == pytest.approx(labelled, rel=0.005)
    for trace in data:
        shape = trace["marker"]["pattern"]["shape"]
        assert shape == {"measured": "", "interpolated": "/", "modelled": "x"}[trace["name"].split(", ")[1]]


def test_what_is_left_out_and_the_prices_are_on_the_page(report: Path) -> None:
    text = report.read_text()
    for phrase in ("launch gaps between kernels", "July 2026 price survey", "Price book used", "overlap"):
        assert phrase in text


def test_page_needs_nothing_from_elsewhere(report: Path) -> None:
    head = report.read_text().split("<script>")[0]
    assert "http://" not in head
    assert "https://" not in head


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser_with_the_network_off(browser: Any, report: Path, width: int, height: int) -> None:
    page, errors = opened(browser, report, width, height)
    counts = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.data.map(t => t.x.length))")
    assert len(counts) == 8
    assert all(len(traces) > 1 and all(traces) for traces in counts)
    marks = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('path.point, .point path').length)"
    )
    assert all(mark > 10 for mark in marks)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []


def test_hover_tells_the_point(browser: Any, report: Path) -> None:
    page, errors = opened(browser, report, 1280, 900)
    page.evaluate("Plotly.Fx.hover('throughput-0', [{curveNumber: 1, pointNumber: 0}])")
    page.wait_for_selector("#throughput-0 .hoverlayer .hovertext")
    text = page.text_content("#throughput-0 .hoverlayer")
    assert "tokens/s/GPU" in text
    assert "measured" in text
    assert errors == []


PRICES = "Object.fromEntries([...document.querySelectorAll('[data-price-of]')].map(i => [i.dataset.priceOf, +i.value]))"


def test_prices_and_utilisation_price_the_page_again(browser: Any, report: Path) -> None:
    page, errors = opened(browser, report, 1280, 900)
    before, rates = drawn(page, "cost-0", "y"), drawn(page, "throughput-0", "y")
    bars, cells = (
        drawn(page, "breakdown-0", "x"),
        page.eval_on_selector_all("[data-usd]", "all => all.map(c => +c.dataset.usd)"),
    )
    book = page.evaluate(PRICES)
    page.fill("[data-price-of=h100]", "2.6525")  # any price, not whole cents
    page.fill("[data-price-of=h200]", str(2 * book["h200"]))
    move(page, "[data-utilisation]", 0.5)
    factor = {gpu: {"h100": 2 * 2.6525 / book["h100"], "h200": 4.0}.get(gpu, 2.0) for gpu in book}
    gpus = page.evaluate("document.getElementById('cost-0').data.map(t => t.meta.gpu)")
    after = drawn(page, "cost-0", "y")
    assert set(gpus[1:]) == set(book)
    for gpu, old, new in zip(gpus[1:], before[1:], after[1:], strict=True):
        assert new == pytest.approx([factor[gpu] * value for value in old], rel=1e-12)
    # the frontier over all is found again among what is drawn
    points = [
        p for xs, ys in zip(drawn(page, "cost-0", "x")[1:], after[1:], strict=True) for p in zip(xs, ys, strict=True)
    ]
    best = [(x, y) for x, y in points if not any(a >= x and b <= y and (a, b) != (x, y) for a, b in points)]
    assert list(zip(drawn(page, "cost-0", "x")[0], after[0], strict=True)) == sorted(set(best))
    assert drawn(page, "throughput-0", "y") == rates  # what a GPU does, it does at any price
    of = page.evaluate("document.getElementById('breakdown-0').data[0].meta.gpus")
    for old, new in zip(bars, drawn(page, "breakdown-0", "x"), strict=True):
        assert new == pytest.approx([factor[gpu] * value for gpu, value in zip(of, old, strict=True)], rel=1e-12)
    labels = page.evaluate("[...document.getElementById('breakdown-0').data[0].y]")
    totals = [sum(values) for values in zip(*drawn(page, "breakdown-0", "x"), strict=True)]
    assert [float(label.split("$")[1]) for label in labels] == pytest.approx(totals, rel=0.005)
    texts = page.eval_on_selector_all("[data-usd]", "all => all.map(c => [c.dataset.gpu, +c.textContent])")
    assert [text for _, text in texts] == [
        round(factor[gpu] * usd, 3) for (gpu, _), usd in zip(texts, cells, strict=True)
    ]
    page.click("#reprice button[type=reset]")
    page.wait_for_function("document.querySelector('#reprice output').value === '100 %'")
    assert drawn(page, "cost-0", "y") == before
    assert errors == []


@pytest.mark.parametrize("wrong", ["-1", "0", ""])
def test_a_wrong_price_prices_nothing(browser: Any, report: Path, wrong: str) -> None:
    page, errors = opened(browser, report, 1280, 900)
    before = drawn(page, "cost-0", "y")
    page.fill("[data-price-of=h100]", wrong)
    assert page.inner_text("#reprice-error") == "expected 0.01 or more: nothing is priced again"
    assert drawn(page, "cost-0", "y") == before
    page.fill("[data-price-of=h100]", "1")
    assert page.inner_text("#reprice-error") == ""
    assert drawn(page, "cost-0", "y") != before
    assert errors == []


def test_r25_hostile_names_are_inert(browser: Any, studies: list[StudyResult], tmp_path: Path) -> None:
    """A model's folder, a price's note: any text may hold markup."""
    study_0 = studies[0]
    price = replace(stated_price("h100", 2.0), source=HOSTILE, note=HOSTILE, tier=HOSTILE)
    model = replace(study_0.sweep.model, name=HOSTILE)
    gpus = {p.step.gpu.name: replace(p.step.gpu, title=HOSTILE + p.step.gpu.name) for p in study_0.points}
    points = [
        replace(p, price=price, step=replace(p.step, model=model, gpu=gpus[p.step.gpu.name])) for p in study_0.points
    ]
    path = tmp_path / "hostile.html"
    hostile = StudyResult(replace(study_0.study, sweep=replace(study_0.sweep, model=model)), points, [])
    write_report(path, [hostile, studies[1]], 20.0, 0.25)
    page, errors = opened(browser, path, 1280, 900)
    assert page.evaluate("window.owned") is None
    assert HOSTILE in page.inner_text("body")
    assert errors == []


def test_unwritable_place_is_an_error(studies: list[StudyResult], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--report: cannot write"):
        write_report(tmp_path / "file" / "report.html", studies, 20.0, 0.25)


def test_no_point_fast_enough_is_said_not_drawn(studies: list[StudyResult], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, studies[:1], 1e6, 0.25)
    assert "No ranked point reaches 1e+06 tokens/s/user" in path.read_text()
    assert set(figures(path)) == {"throughput-0", "cost-0"}


def test_acceptance_length_prices_the_page_again(browser: Any, tmp_path: Path) -> None:
    """A verify step takes as long however many tokens are kept: rates go up with them, dollars down."""
    path = tmp_path / "drafts.html"
    plan = study("deepseek-v3", ["h200"], ["sglang"], None, None, tokens_per_step=4, kept_tokens=2.5)
    write_report(path, [run_study(plan)], 1.0, 1.0)
    page, errors = opened(browser, path)
    assert "4 tokens verified per step, 2.5 of them kept" in page.inner_text("body")
    before = {(plot, axis): drawn(page, plot, axis) for plot in ("cost-0", "throughput-0") for axis in "xy"}
    rates = page.eval_on_selector_all("[data-rate]", "all => all.map(c => +c.textContent)")
    move(page, "[data-kept]", 1)
    for (plot, axis), values in before.items():
        factor = 2.5 if (plot, axis) == ("cost-0", "y") else 1 / 2.5
        for old, new in zip(values, drawn(page, plot, axis), strict=True):
            assert new == pytest.approx([factor * value for value in old], rel=1e-9)
    found = page.eval_on_selector_all("[data-rate]", "all => all.map(c => +c.textContent)")
    assert found == pytest.approx([rate / 2.5 for rate in rates], abs=0.1)
    assert errors == []


def test_without_drafts_there_is_no_acceptance_length(report: Path) -> None:
    assert "acceptance length <span" not in report.read_text()


def test_tornado_goes_from_end_to_end(report: Path, studies: list[StudyResult]) -> None:
    plan = study_of(studies[0].study, best_points(studies[0].points, 20.0)[0])
    rows = sensitivity(plan).rows
    low, high = figures(report)["moves-0"]["data"]
    assert low["y"] == high["y"] == [row.input for row in rows]
    assert [low["base"] + x for x in low["x"]] == pytest.approx([row.usd_per_mtok_low for row in rows])
    assert [high["base"] + x for x in high["x"]] == pytest.approx([row.usd_per_mtok_high for row in rows])
    assert low["base"] == price_step(plan).usd_per_mtok_output
