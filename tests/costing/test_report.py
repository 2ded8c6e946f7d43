"""The report in a real browser with the network off: no error, data in every plot, nothing hostile alive."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenfab.costing.prices import stated_price
from tokenfab.costing.report import cheapest_frontier, write_report
from tokenfab.costing.study import StudyResult, run_study, study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


def figures(path: Path) -> dict[str, Any]:
    text = path.read_text()
    start = text.index("const figures = ") + len("const figures = ")
    return json.JSONDecoder().raw_decode(text[start:])[0]


def test_plots_hold_the_points(report: Path, studies: list[StudyResult]) -> None:
    found = figures(report)
    assert set(found) == {f"{kind}-{n}" for kind in ("throughput", "cost", "breakdown") for n in (0, 1)}
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield launched
        launched.close()


def opened(browser: Any, path: Path, width: int, height: int) -> tuple[Any, list[str]]:
    page = browser.new_context(viewport={"width": width, "height": height}, offline=True).new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 6")
    return page, errors


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser_with_the_network_off(browser: Any, report: Path, width: int, height: int) -> None:
    page, errors = opened(browser, report, width, height)
    counts = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.data.map(t => t.x.length))")
    assert len(counts) == 6
    assert all(len(traces) > 3 and all(traces) for traces in counts)
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
    hostile = StudyResult(replace(study_0.sweep, model=model), points, [])
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
