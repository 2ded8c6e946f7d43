"""Sweeps: every point that fits, the best of them, and why the others are not there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tokenfab.bench.memory import largest_batch
from tokenfab.bench.published import PROVENANCES, PublishedData
from tokenfab.bench.records import RecordStore
from tokenfab.costing.document import document
from tokenfab.costing.levers.common_draws import CommonDraws
from tokenfab.costing.report.cost_view import write_report
from tokenfab.costing.study import StudyResult, choose_precision, price_step, run_study, study
from tokenfab.costing.sweep import Parallel, best_points, frontier
from tokenfab.costing.tables import points_table, skipped_lines
from tokenfab.tests.bench.recorded_points import recorded


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp1", Parallel()),
        ("tp8", Parallel(8)),
        ("TP8-EP8", Parallel(8, 1, 8)),
        ("dp8-ep8", Parallel(1, 8, 8)),
        ("tp2-dp4-ep8", Parallel(2, 4, 8)),
        ("dp8-ep8-ag", Parallel(1, 8, 8, all_gather=True)),
    ],
)
def test_notation_round_trip(text: str, expected: Parallel) -> None:
    assert Parallel.parse(text) == expected
    assert Parallel.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "8", "tp0", "tp-8", "tp8-tp4", "pp2", "dp4-ep3", "tp8 ep8", "ag", "tp12345"])
def test_notation_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="parallel: expected"):
        Parallel.parse(text)


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return run_study(
        study("qwen3-30b-a3b", ["h100", "h200"], ["vllm", "trtllm"], ["tp1", "tp2", "tp3", "dp4-ep4-ag"], None)
    )


def test_all_that_fits_and_nothing_else(result: StudyResult) -> None:
    places = {(p.step.gpu.name, p.step.stack.name, str(Parallel.of(p.step.deployment))) for p in result.points}
    expected = set(itertools.product(("h100", "h200"), ("vllm", "trtllm"), ("tp1", "tp2", "dp4-ep4-ag")))
    assert places == expected
    assert {row.parallel for row in result.skipped} == {"tp3"}
    assert all("divisor" in row.reason for row in result.skipped)
    for point in result.points:
        deployment = point.step.deployment
        assert deployment.sequences <= largest_batch(point.step.model, point.step.gpu, deployment)


def test_best_is_the_cheapest_that_is_fast_enough(result: StudyResult) -> None:
    best = best_points(result.points, 60.0, 1.0)
    assert len(best) == 4
    assert [p.usd_per_mtok_output for p in best] == sorted(p.usd_per_mtok_output for p in best)
    for winner in best:
        rivals = [
            p.usd_per_mtok_output
            for p in result.points
            if (p.step.gpu, p.step.stack) == (winner.step.gpu, winner.step.stack) and p.tokens_per_s_per_user >= 60
        ]
        assert winner.usd_per_mtok_output == min(rivals)
    assert best_points(result.points, 1e9) == []


def test_points_that_are_mostly_modelled_do_not_rank(result: StudyResult) -> None:
    limit = sorted(p.step.coverage()["modelled"] for p in result.points)[len(result.points) // 2]
    assert all(p.step.coverage()["modelled"] <= limit for p in best_points(result.points, 0, limit))


def test_frontier_against_brute_force(result: StudyResult) -> None:
    points = result.points
    kept = frontier(points)
    not_beaten = [
        p
        for p in points
        if not any(
            q.tokens_per_s_per_user >= p.tokens_per_s_per_user
            and q.tokens_per_s_per_gpu >= p.tokens_per_s_per_gpu
            and q is not p
            and (q.tokens_per_s_per_user, q.tokens_per_s_per_gpu) != (p.tokens_per_s_per_user, p.tokens_per_s_per_gpu)
            for q in points
        )
    ]
    assert {id(p) for p in kept} <= {id(p) for p in not_beaten}
    as_pairs = {(p.tokens_per_s_per_user, p.tokens_per_s_per_gpu) for p in not_beaten}
    assert {(p.tokens_per_s_per_user, p.tokens_per_s_per_gpu) for p in kept} == as_pairs


def test_batches_beyond_memory_are_left_out_and_a_hopeless_sweep_says_why() -> None:
    found = run_study(study("mixtral-8x22b", ["h200"], ["vllm"], ["tp4"], [1, 16, 4096]))
    assert [p.step.deployment.batch_per_gpu for p in found.points] == [1, 16]
    most = largest_batch(found.model, found.points[0].step.gpu, found.points[0].step.deployment) // 4
    edge = run_study(study("mixtral-8x22b", ["h200"], ["vllm"], ["tp4"], [most, most + 1]))
    assert [p.step.deployment.batch_per_gpu for p in edge.points] == [most]
    with pytest.raises(
        ValueError, match="no point can be: memory: no batch fits: deepseek-v3 in fp8 at 4096 tokens on 8 x h100"
    ):
        run_study(study("deepseek-v3", ["h100"], ["vllm"], ["dp8-ep8"], None))


def test_skipped_points_are_told_in_few_lines() -> None:
    found = run_study(
        study("deepseek-v3", ["h100", "h200"], ["sglang"], ["tp8", "dp8-ep8", "dp16-ep16", "dp6-ep6"], None)
    )
    assert skipped_lines(found.skipped) == [
        "no batch fits on h100 at tp8, dp8-ep8",
        "dp6-ep6: expert_parallel: expected a divisor of deepseek-v3's 256 experts; got 6",
    ]


def test_defaults_are_the_checkpoints_precision_and_the_fewest_gpus() -> None:
    plan = study("deepseek-v3", ["h200"], ["sglang"], None, [32])
    assert plan.sweep.precision.name == "fp8"
    assert price_step(plan).step.deployment.gpus == 8
    assert choose_precision(plan.sweep.model, "fp8", "bf16").name == "fp8+bf16_kv"
    with pytest.raises(ValueError, match="kv_format: expected bf16 or fp8; got 'mxfp4'"):
        choose_precision(plan.sweep.model, None, "mxfp4")


def test_r27_missing_price_fails_before_the_work(published: PublishedData) -> None:
    with pytest.raises(ValueError, match="no rent_3yr price for l40s"):
        study("qwen3-30b-a3b", ["l40s"], ["vllm"], None, None)
    assert (
        study("qwen3-30b-a3b", ["l40s"], ["vllm"], None, None, usd_per_gpu_hour=0.9)
        .price(study("qwen3-30b-a3b", ["h100"], None, None, None).sweep.gpus[0])
        .usd_per_gpu_hour
        == 0.9
    )


def test_published_data_must_be_a_tree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with query_versions\.yaml"):
        study("qwen3-30b-a3b", ["h100"], ["vllm"], None, None, published_data=tmp_path)


@pytest.fixture
def own_records(tmp_path: Path) -> Path:
    """The experts of Qwen3-30B-A3B at 64 and 128 tokens: most of a step's time."""
    formats = {"weight": "fp8_block", "activation": "fp8_group"}
    sizes = {"hidden": 2048, "inter": 768, "top_k": 8, "num_experts": 128, "ep": 1, "load": 0}
    for tokens, time_s in ((64, 3e-4), (128, 3.2e-4)):
        RecordStore(tmp_path, "h100.jsonl").append(recorded("moe", formats, {"num_tokens": tokens, **sizes}, time_s))
    return tmp_path


def test_records_of_tokenfabs_kernels_are_a_stack_beside_the_published(own_records: Path) -> None:
    found = run_study(
        study("qwen3-30b-a3b", ["h100", "h200"], ["tokenfab", "tokenfab+vllm", "vllm"], ["tp1"], [64, 96],
              precision="fp8", records=own_records)
    )  # fmt: skip
    places = {(p.step.gpu.name, p.step.stack.name, p.step.deployment.batch_per_gpu): p for p in found.points}
    h100 = {("h100", name, batch) for name in ("tokenfab", "tokenfab+vllm") for batch in (64, 96)}
    assert set(places) == h100 | {(gpu, "vllm", batch) for gpu in ("h100", "h200") for batch in (64, 96)}
    assert {(row.gpu, row.stack, row.parallel) for row in found.skipped} == {
        ("h200", "tokenfab", "all"), ("h200", "tokenfab+vllm", "all"),
    }  # fmt: skip
    own, mixed = (places["h100", name, 64] for name in ("tokenfab", "tokenfab+vllm"))
    experts = 48 * 3e-4
    assert own.step.coverage()["measured here"] == pytest.approx(experts / own.step.step_s)
    assert mixed.step.coverage()["measured here"] == pytest.approx(experts / mixed.step.step_s)
    assert mixed.step.coverage()["measured"] > 0
    assert places["h100", "tokenfab", 96].step.coverage()["interpolated here"] > 0.3
    (line,) = skipped_lines(found.skipped)
    assert line.startswith(f"all: records: expected valid records of tokenfab's kernels on h200 in {own_records}")


def test_a_study_without_a_record_says_where_it_looked(tmp_path: Path) -> None:
    for price in (run_study, price_step):
        with pytest.raises(ValueError, match=rf"kernels on h100 in {tmp_path}; got none"):
            price(study("qwen3-30b-a3b", ["h100"], ["tokenfab"], ["tp1"], [64], records=tmp_path))


def test_every_provenance_is_in_table_document_and_report(own_records: Path, tmp_path: Path) -> None:
    found = run_study(
        study("qwen3-30b-a3b", ["h100"], ["vllm", "tokenfab+vllm"], ["tp1"], [64, 128], precision="fp8",
              records=own_records)
    )  # fmt: skip
    draws = CommonDraws(found.data)
    table = points_table("title", found.points, draws)
    heads = [str(column.header) for column in table.columns]
    shares = list(table.columns[heads.index("here/meas/interp here/interp/model")].cells)
    assert all(str(cell).count("/") == 4 for cell in shares)
    assert str(shares[0]).startswith("0%/")
    assert not str(shares[2]).startswith("0%/")
    two = points_table("title", found.points[:2], draws)
    assert "meas/interp/model" in [str(column.header) for column in two.columns]
    rows = document("qwen3-30b-a3b", found.points, draws=draws)["points"]
    for row, point in zip(rows, found.points, strict=True):
        at = draws.at_price(point)
        assert (row["usd_per_mtok_output_p5"], row["usd_per_mtok_output_p95"]) == (at.p5, at.p95)
        assert at.p5 < row["usd_per_mtok_output"] < at.p95
    documents = {(p["stack"], p["batch_per_gpu"]): p for p in rows}
    assert set(documents["vllm", 64]["coverage"]) == {"measured", "interpolated", "modelled"}
    mixed = documents["tokenfab+vllm", 64]
    assert set(mixed["coverage"]) == set(PROVENANCES)
    assert {op["provenance"] for op in mixed["ops"] if op["op"] == "experts"} == {"measured here"}
    write_report(tmp_path / "report.html", [found], 1.0, 1.0)
    text = (tmp_path / "report.html").read_text()
    figures = json.JSONDecoder().raw_decode(text[text.index("const figures = ") + len("const figures = ") :])[0]
    shapes = {trace["name"].split(", ")[1]: trace["marker"]["pattern"]["shape"]
              for trace in figures["breakdown-0"]["data"]}  # fmt: skip
    assert shapes["measured here"] == "."
    assert len(set(shapes.values())) == len(shapes)
    assert "Dotted: measured here" in text
    assert {"h100 vllm", "h100 tokenfab+vllm"} <= {trace["name"] for trace in figures["cost-0"]["data"]}
