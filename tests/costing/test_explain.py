"""``tokenfab explain``: the ends it chooses against a sweep, equal interactivity, errors in one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.published import PublishedData
from tokenfab.costing.levers.waterfall_ends import (
    SEARCHED_SEQUENCES,
    Found,
    cheapest,
    find_points,
    make_side,
    mismatched,
    ratios,
)
from tokenfab.costing.levers.waterfall_point import Pricer
from tokenfab.costing.levers.waterfall_view import mismatched_table, ratios_table
from tokenfab.costing.study import run_study, study
from tokenfab.costing.sweep import Parallel
from tokenfab.costing.workload.serving import Request

MODEL = "qwen3-30b-a3b"
SPLITS = ("tp1", "tp2", "dp2-ep2-ag")


def explain(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, ["explain", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["explain", *arguments])
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    return result.output


def side_options(**more: Any) -> dict[str, Any]:
    none = dict.fromkeys(
        ("stack", "precision", "kv_format", "batch", "acceptance", "book", "usd_per_gpu_hour", "price_file", "context",
         "request", "prefill_parallel")
    )  # fmt: skip
    fixed = {
        "parallel": SPLITS, "drafts": 0, "drafter": "mtp", "tier": "rent_3yr", "load": "balanced",
        "serving": "aggregated",
    }  # fmt: skip
    return none | fixed | more


@pytest.fixture(scope="module")
def pricer() -> Pricer:
    return Pricer(load_model(MODEL), PublishedData())


@pytest.fixture(scope="module")
def sides(pricer: Pricer) -> tuple[Found, Found]:
    found = [find_points(pricer, make_side(pricer.model, "from", gpu, **side_options())) for gpu in ("h100", "b200")]
    return found[0], found[1]


def test_all_that_fits_is_tried_and_priced_as_a_sweep_does(pricer: Pricer, sides: tuple[Found, Found]) -> None:
    asked = sorted({s / tp for s in SEARCHED_SEQUENCES for tp in (1, 2)})
    swept: dict[tuple[object, ...], float] = {}
    for split in SPLITS:
        whole = [batch for batch in asked if split == "tp2" or batch == int(batch)]
        result = run_study(study(MODEL, ["h100"], None, [split], whole))
        for p in result.points:
            if p.step.deployment.sequences in SEARCHED_SEQUENCES:
                place = (p.step.stack.name, split, p.step.deployment.batch_per_gpu)
                swept[place] = p.usd_per_mtok_output
    own = {(p.point.stack, str(p.point.parallel), p.point.batch_per_gpu): p.usd_per_mtok for p in sides[0].points}
    assert own.keys() == swept.keys()
    assert own == pytest.approx(swept, rel=1e-12)


@pytest.mark.parametrize("limit", [0.0, 30.0, 80.0, 200.0])
@pytest.mark.parametrize("max_modelled", [0.1, 0.25, 1.0])
def test_both_sides_are_the_cheapest_at_the_same_interactivity(
    sides: tuple[Found, Found], limit: float, max_modelled: float
) -> None:
    (row,) = ratios(*sides, [limit], max_modelled)
    for found, chosen in zip(sides, (row.before, row.after), strict=True):
        fit = [
            p.usd_per_mtok
            for p in found.points
            if p.step.step_s <= (1 / limit if limit else math.inf) and p.step.coverage()["modelled"] <= max_modelled
        ]
        assert (chosen.usd_per_mtok if chosen else None) == min(fit, default=None)
    if row.before and row.after:
        assert row.factor == pytest.approx(row.before.usd_per_mtok / row.after.usd_per_mtok)
        per_gpu = row.after.tokens_per_s_per_gpu / row.before.tokens_per_s_per_gpu
        assert row.throughput == pytest.approx(per_gpu)
        price = row.after.point.price.usd_per_gpu_hour / row.before.point.price.usd_per_gpu_hour
        assert row.factor == pytest.approx(per_gpu / price)


def test_a_side_that_is_never_so_fast_has_no_ratio(sides: tuple[Found, Found]) -> None:
    (row,) = ratios(*sides, [1e5], 1.0)
    assert (row.before, row.after, row.factor, row.throughput) == (None, None, None, None)
    ratios_table(sides, [row])
    matrix = mismatched(*sides, [20, 100, 1e5], 1.0)
    assert [[each.factor is None for each in line] for line in matrix] == [
        [False, False, True], [False, False, True], [True] * 3
    ]  # fmt: skip
    assert matrix[1][0].factor > matrix[0][0].factor  # type: ignore[operator]  # the faster the start, the dearer it is
    assert matrix[0][1].min_before == 20
    assert matrix[0][1].min_after == 100
    mismatched_table(matrix)
    slow, fast = cheapest(sides[0], 20, 1.0), cheapest(sides[0], 100, 1.0)
    assert slow is not None
    assert fast is not None
    assert matrix[1][0].factor == pytest.approx(
        fast.usd_per_mtok / slow.usd_per_mtok * (matrix[0][0].factor or math.nan)
    )


ENDS = ("--model", MODEL, "--from", "h100", "--to", "b200", "--from-parallel", "tp1,tp2", "--to-parallel", "tp1,tp2")


def test_the_document_is_whole() -> None:
    document = explain(
        *ENDS, "--min-tokens-per-s-per-user", "60", "--from-tier", "own_neocloud", "--to-book", "2026-02"
    )
    assert document["from"]["tokens_per_s_per_user"] >= 60
    assert document["to"]["tokens_per_s_per_user"] >= 60
    assert document["from"]["usd_per_gpu_hour"] == 1.55
    assert document["to"]["usd_per_gpu_hour"] == 2.9
    assert "2026-07-01" in document["from"]["price_source"]
    assert "2026-02-01" in document["to"]["price_source"]
    assert math.prod(row["ratio"] for row in document["factors"]) == pytest.approx(document["ratio"], rel=1e-9)
    assert document["to"]["usd_per_mtok_output"] / document["from"]["usd_per_mtok_output"] == pytest.approx(
        document["ratio"], rel=1e-12
    )
    for end in ("from", "to"):
        span = document[end]["usd_per_mtok_output_at_price"]
        assert 0 < span["p5"] <= span["p50"] <= span["p95"]
        assert span["p5"] <= document[end]["usd_per_mtok_output"] * 1.05
        assert sum(document[end]["coverage"].values()) == pytest.approx(1)
    assert document["denominator"] == "output tokens (decode GPUs only)"
    assert document["points"][-1]["operating_point"] == document["to"]["operating_point"]
    assert document["orders"]["possible"] <= document["orders"]["all"]


def test_given_batches_are_kept_and_limits_of_each_side_hold() -> None:
    document = explain(
        "--model", MODEL, "--from", "h100", "--to", "h100", "--from-batch", "16", "--to-batch", "48",
        "--from-parallel", "tp1", "--to-parallel", "tp1", "--from-stack", "vllm", "--to-stack", "vllm",
        "--from-usd-per-gpu-hour", "2", "--to-usd-per-gpu-hour", "3",
    )  # fmt: skip
    assert [row["factor"] for row in document["factors"]] == ["price", "batch"]
    assert document["factors"][0]["ratio"] == pytest.approx(1.5, rel=1e-14)
    assert document["from"]["batch_per_gpu"] == 16
    assert document["to"]["batch_per_gpu"] == 48
    assert document["from_min_tokens_per_s_per_user"] is document["to_min_tokens_per_s_per_user"] is None
    apart = explain(*ENDS, "--from-min-tokens-per-s-per-user", "150", "--to-min-tokens-per-s-per-user", "30")
    assert apart["from"]["tokens_per_s_per_user"] >= 150
    assert 30 <= apart["to"]["tokens_per_s_per_user"] < 150
    assert (apart["from_min_tokens_per_s_per_user"], apart["to_min_tokens_per_s_per_user"]) == (150, 30)


def test_drafts_are_kept_tokens_of_a_longer_step() -> None:
    document = explain(
        "--model", MODEL, "--from", "h100", "--to", "h100", "--from-batch", "8", "--to-batch", "8", "--to-drafts", "1",
        "--from-parallel", "tp1", "--to-parallel", "tp1", "--from-stack", "vllm", "--to-stack", "vllm",
        "--to-acceptance", "1.85", "--max-modelled", "1",
    )  # fmt: skip
    (row,) = document["factors"]
    assert row["factor"] == "drafts"
    assert 1 / 1.85 < row["ratio"] < 1.3
    assert document["to"]["acceptance_length"] == 1.85
    assert document["to"]["acceptance_source"] == "stated"
    assert any(what.startswith("drafting: ") for what in document["omitted"])
    named = explain(
        *ENDS, "--to-drafts", "3", "--to-acceptance", "qwen3.5-397b-mtp", "--max-modelled", "1",
        "--min-tokens-per-s-per-user", "60",
    )  # fmt: skip
    assert named["to"]["acceptance_length"] == 3.39
    assert "InferenceX" in named["to"]["acceptance_source"]
    assert named["to"]["tokens_per_s_per_user"] >= 60


def test_a_request_has_prefill_in_every_figure(pricer: Pricer) -> None:
    lengths = ("--input-tokens", "2000", "--cached-tokens", "500", "--output-tokens", "400", "--max-modelled", "1")
    apart = ("--to-serving", "disaggregated", "--to-prefill-parallel", "tp1,tp2,tp4")
    document = explain(*ENDS, *lengths, *apart, "--min-tokens-per-s-per-user", "50")
    assert document["denominator"] == "output tokens (prefill and decode GPUs)"
    assert {row["factor"] for row in document["factors"]} >= {"price", "gpu: kernels", "disaggregation"}
    assert document["from"]["context"] == document["to"]["context"] == 2200
    assert document["from"]["prefill_parallel"] is None
    assert document["from"]["usd_per_mtok_output_at_price"] is None
    assert document["to"]["prefill_gpus_per_decode_gpu"] > 0
    for end in ("from", "to"):
        assert document[end]["tokens_per_s_per_user"] >= 50
    result = CliRunner().invoke(cli, ["explain", *ENDS, *lengths, *apart])
    assert result.exit_code == 0, result.output
    assert "GPUs prefill for each that decodes, paid for" in result.output
    assert "of it prefill" in result.output
    assert "/M of input and output tokens" in result.output


def test_the_cheapest_split_prefills(pricer: Pricer) -> None:
    request, asked = Request(2000, 500, 400), ["tp1", "tp2", "tp4-ep4", "tp8"]
    side = make_side(
        pricer.model, "to", "h100",
        **side_options(request=request, serving="disaggregated", prefill_parallel=asked, stack=["vllm"], batch=8),
    )  # fmt: skip
    found = find_points(pricer, side, 1.0)
    (chosen,) = {str(priced.point.prefill_parallel) for priced in found.points}
    alike = {}
    for split in asked:
        only = replace(side, prefill_parallels=(Parallel.parse(split),))
        alike[split] = min(priced.usd_per_mtok for priced in find_points(pricer, only, 1.0).points)
    assert chosen == min(alike, key=lambda split: alike[split])
    assert min(priced.usd_per_mtok for priced in found.points) == min(alike.values())
    assert len(set(alike.values())) == len(asked)
    large = Pricer(load_model("deepseek-r1"), pricer.data)
    with pytest.raises(ValueError, match="prefill_parallel: tp1: memory"):
        find_points(large, replace(side, prefill_parallels=(Parallel(),), parallels=(Parallel(8, 1, 8),)), 1.0)


def test_ratios_and_the_matrix_of_unlike_interactivity() -> None:
    document = explain(*ENDS, "--at", "20,100,100000", "--mismatched", "--max-modelled", "1")
    rows = document["rows"]
    assert [row["min_tokens_per_s_per_user"] for row in rows] == [20, 100, 100000]
    assert rows[0]["times_cheaper"] == pytest.approx(
        rows[0]["from"]["usd_per_mtok_output"] / rows[0]["to"]["usd_per_mtok_output"]
    )
    assert rows[2]["times_cheaper"] is rows[2]["from"] is rows[2]["to"] is None
    assert document["mismatched"][1][0]["from_min_tokens_per_s_per_user"] == 100
    assert document["mismatched"][1][0]["to_min_tokens_per_s_per_user"] == 20
    assert document["mismatched"][1][1]["times_cheaper"] == rows[1]["times_cheaper"]
    result = CliRunner().invoke(cli, ["explain", *ENDS, "--at", "20,100", "--mismatched"])
    assert result.exit_code == 0
    assert "no such point" not in result.output
    assert "left out:" in result.output
    assert "none with more than 25% of its time modelled" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--claim", "nvidia-35x", "--model", MODEL), "model: expected none with claim; got qwen3-30b-a3b"),
        (("--claim", "nvidia-35x", "--order", "gpu"), "order: expected none with claim; got gpu"),
        ((*ENDS, "--at", "20", "--order", "gpu"), "order: expected none with at; got gpu"),
        ((*ENDS, "--at", "20", "--report", "x.html"), "report: expected none with at; got x.html"),
        (
            (*ENDS, "--at", "20", "--to-min-tokens-per-s-per-user", "5"),
            "to_min_tokens_per_s_per_user: expected none with at; got 5.0",
        ),
        (
            (*ENDS, "--to-batch", "20", "--to-min-tokens-per-s-per-user", "5"),
            "to_min_tokens_per_s_per_user: expected none with to_batch; got 5.0",
        ),
        (
            (*ENDS, "--from-batch", "8", "--to-batch", "8", "--min-tokens-per-s-per-user", "30"),
            "min_tokens_per_s_per_user: expected none where both batches are given; got 30",
        ),
        ((*ENDS, "--mismatched"), "mismatched: expected tokens/s/user with it, as in --at 20,40,80; got none"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments: tuple[str, ...], message: str) -> None:
    assert refused(*arguments) == f"error: {message}\n"


def test_r28_what_cannot_be_is_one_line() -> None:
    one = ("--from-stack", "vllm", "--to-stack", "vllm", "--from-parallel", "tp2", "--to-parallel", "tp2")
    assert refused("--model", MODEL, "--from", "h100") == (
        "error: to: expected --model, --from and --to, or --claim; got none\n"
    )
    assert "gpu: expected one of" in refused("--model", MODEL, "--from", "h100", "--to", "h1000")
    assert "from_acceptance: expected the tokens kept per step with from_drafts 2; got none" in refused(
        *ENDS, "--from-drafts", "2"
    )
    assert "acceptance_length: expected 1 to 3 (1 + drafts); got 0.5" in refused(
        *ENDS, "--from-drafts", "2", "--from-acceptance", "0.5"
    )
    assert "usd_per_gpu_hour: expected a positive number; got -1.0" in refused(*ENDS, "--from-usd-per-gpu-hour", "-1")
    assert "price: no rent price for b200" in refused(*ENDS, "--to-tier", "rent")
    assert "tokens_per_s_per_user: expected limits of 0 or more; got -5.0" in refused(
        *ENDS, "--min-tokens-per-s-per-user", "-5"
    )
    assert "tokens_per_s_per_user: expected limits of 0 or more; got nan" in refused(*ENDS, "--at", "20,nan")
    assert "max_modelled: expected a share of 0 to 1; got 1.5" in refused(*ENDS, "--max-modelled", "1.5")
    assert "max_modelled: expected a share that some point of h100 keeps; got 0, and the best known has" in refused(
        *ENDS, *one, "--max-modelled", "0"
    )
    fast = refused(*ENDS, *one, "--min-tokens-per-s-per-user", "99999", "--max-modelled", "1")
    assert "min_tokens_per_s_per_user: expected at most the" in fast
    assert "that h100 reaches; got 99999" in fast
    assert "output_tokens: expected both input and output tokens; got none" in refused(*ENDS, "--input-tokens", "9")
    assert "input_tokens: expected them with cached_tokens 9; got none" in refused(*ENDS, "--cached-tokens", "9")
    assert "to_serving: expected input and output tokens with disaggregated; got none" in refused(
        *ENDS, "--to-serving", "disaggregated"
    )
    assert "to_serving: expected aggregated or disaggregated; got 'both'" in refused(*ENDS, "--to-serving", "both")
    assert "to_prefill_parallel: expected to_serving disaggregated with it; got aggregated" in refused(
        *ENDS, "--to-prefill-parallel", "tp2"
    )
    assert "acceptance: expected one of deepseek-v3-mtp-low" in refused(
        *ENDS, "--to-drafts", "1", "--to-acceptance", "nobody"
    )
    assert "order: expected some of price, gpu" in refused(*ENDS, *one, "--order", "speed")
    assert "h100: no point can be: tp1: precision: nvfp4 is nvfp4 x nvfp4; h100 has no FP4 matrix units" in refused(
        *ENDS, "--from-precision", "nvfp4"
    )
    assert "expected a divisor" in refused(*ENDS, "--from-parallel", "tp3")
    assert get_gpu("h100").fp4_flops_per_s is None
