"""--report of the levers' and workloads' commands: figures are the documents', in a browser with the network off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pages import figures, opened
from tokenfab.__main__ import cli
from tokenfab.costing.workload.synthetic import synthetic_requests, write_mooncake
from tokenfab.tests.costing.imports_files import DATA

COMMANDS: dict[str, list[str]] = {
    "explain": ["explain", "--model", "deepseek-r1", "--from", "h200", "--from-stack", "trtllm", "--from-parallel",
                "dp8-ep8-ag", "--to", "gb300", "--to-stack", "trtllm", "--to-precision", "nvfp4", "--to-parallel",
                "dp8-ep8-ag"],
    "routing": ["routing", "TRACE", "--cache-tokens", "100000,endless", "--policy", "random,sticky"],
    "deploy": ["deploy", "gpt-oss-120b", "--trace", "TRACE", "--gpu", "h100", "--stack", "vllm", "--parallel",
               "tp2,tp4", "--batch", "8,64", "--max-modelled", "1", "--frontier"],
    "scale": ["scale", "gpt-oss-120b", "--gpu", "h100", "--stack", "vllm", "--max-gpus", "4", "--batch", "4,32",
              "--domain", "2"],
    "import": ["import", str(DATA / "inferencex_agg_bmk.json")],
}  # fmt: skip


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "trace.jsonl"
    write_mooncake(path, synthetic_requests(300, seed=3))
    return path


@pytest.fixture(scope="module")
def reported(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Page and document of every command."""
    folder = tmp_path_factory.mktemp("reports")
    found = {}
    for name, words in COMMANDS.items():
        path = folder / "new" / f"{name}.html"
        args = [str(trace) if word == "TRACE" else word for word in words]
        done = CliRunner().invoke(cli, [*args, "--report", str(path), "--json"])
        assert done.exit_code == 0, done.output
        assert f"report: {path}" in done.stderr
        found[name] = path, json.loads(done.stdout)
    return found


def bars(path: Path) -> dict[str, tuple[float, float]]:
    """Bottom and top of every bar of the first figure."""
    return {
        x: (base, base + y)
        for trace in figures(path)["plot-0"]["data"]
        for x, base, y in zip(trace["x"], trace["base"], trace["y"], strict=True)
    }


def test_explain_draws_every_factor_between_its_prices(reported: dict[str, tuple[Path, Any]]) -> None:
    path, document = reported["explain"]
    found = bars(path)
    assert set(found) == {"from", "to", *(each["factor"] for each in document["factors"])}
    for each in document["factors"]:
        ends = (each["usd_per_mtok_output_before"], each["usd_per_mtok_output_after"])
        assert found[each["factor"]] == pytest.approx((min(ends), max(ends)))
    assert found["from"][1] == pytest.approx(document["from"]["usd_per_mtok_output"])
    assert found["to"][1] == pytest.approx(document["to"]["usd_per_mtok_output"])
    crossed = {
        x for trace in figures(path)["plot-0"]["data"] if trace["marker"]["pattern"]["shape"] == "x" for x in trace["x"]
    }
    assert crossed == {each["factor"] for each in document["factors"] if each["what_if_by_roofline"]}
    assert f"{document['times_cheaper']:.3g} times cheaper at these two operating points" in path.read_text()
    dearer = {x for trace in figures(path)["plot-0"]["data"] if trace["name"].startswith("dearer") for x in trace["x"]}
    assert dearer == {each["factor"] for each in document["factors"] if each["ratio"] > 1}


def test_routing_draws_hit_rates_and_the_bound(reported: dict[str, tuple[Path, Any]]) -> None:
    path, document = reported["routing"]
    figure = figures(path)["plot-0"]
    drawn = {
        (trace["name"].startswith("endless"), x, y)
        for trace in figure["data"]
        for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert drawn == {(row["cache_tokens"] is None, row["policy"], row["hit_rate"]) for row in document["routers"]}
    assert figure["layout"]["shapes"][0]["y0"] == document["bound_hit_rate"]


def test_deploy_draws_the_frontier_and_what_binds(reported: dict[str, tuple[Path, Any]]) -> None:
    path, document = reported["deploy"]
    along, *marks = figures(path)["plot-0"]["data"]
    points = document["frontier"]["points"]
    assert len(points) > 1
    assert along["x"] == [point["tokens_per_s_per_user"] for point in points]
    assert along["y"] == [point["usd_per_mtok_output"] for point in points]
    drawn = {(mark["name"], x) for mark in marks for x in mark["x"]}
    assert drawn == {(f"binds: {point['binding']}", point["tokens_per_s_per_user"]) for point in points}


def test_scale_draws_a_line_for_every_number_of_gpus(reported: dict[str, tuple[Path, Any]]) -> None:
    path, document = reported["scale"]
    lines = {trace["name"]: (trace["x"], trace["y"]) for trace in figures(path)["plot-0"]["data"]}
    expected = {
        f"{row['gpus']} GPUs": tuple(
            [point[field] for point in row["points"]] for field in ("tokens_per_s_per_user", "usd_per_mtok_output")
        )
        for row in document["pareto"]
        if row["points"]
    }
    assert lines == expected
    assert len(lines) > 1


def test_import_splits_the_served_price(reported: dict[str, tuple[Path, Any]]) -> None:
    path, document = reported["import"]
    rows = [row for row in document["results"] if row["kernels_allow"]]
    data = figures(path)["plot-0"]["data"]
    totals = [sum(parts) for parts in zip(*(trace["x"] for trace in data), strict=True)]
    assert totals == pytest.approx([row["usd_per_mtok_output_all_gpus"] for row in rows])
    assert data[0]["x"] == [row["kernels_allow"]["decode_usd_per_mtok_output"] for row in rows]


def test_in_a_browser_with_the_network_off(browser: Any, reported: dict[str, tuple[Path, Any]]) -> None:
    for name, (path, _) in reported.items():
        for width, height in ((1280, 900), (390, 844)):
            page, errors = opened(browser, path, width, height)
            marks = page.evaluate(
                "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('path.point, .point path').length)"
            )
            assert all(mark > 1 for mark in marks), name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.evaluate("document.querySelectorAll('table tr').length") > 1, name
            assert errors == [], name
            page.close()
