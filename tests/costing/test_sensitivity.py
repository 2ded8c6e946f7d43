"""Sensitivities: closed forms for what multiplies or divides a price, evaluation again for the rest, ranges."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from click.testing import CliRunner
from tokenfab.commands.tco import sensitivity as sensitivity_command
from tokenfab.costing.levers.intervals import op_errors, price_range_of
from tokenfab.costing.levers.sensitivity import (
    ACCEPTANCE,
    BATCH,
    CONTEXT,
    PRICE,
    UTILISATION,
    Sensitivity,
    SensitivityResult,
    op_group,
    sensitivity,
)
from tokenfab.costing.study import Study, price_step, study

H200_AT_64 = ("deepseek-v3", ["h200"], ["sglang"], ["dp8-ep8"], [64])


@pytest.fixture(scope="module")
def plan() -> Study:
    return study(*H200_AT_64)


@pytest.fixture(scope="module")
def found(plan: Study) -> SensitivityResult:
    return sensitivity(plan)


def row(found: SensitivityResult, name: str) -> Sensitivity:
    (one,) = [each for each in found.rows if each.input == name]
    return one


def test_price_multiplies_and_utilisation_divides(found: SensitivityResult) -> None:
    usd = found.cost.usd_per_mtok_output
    price, used = row(found, PRICE), row(found, UTILISATION)
    assert (price.low, price.base, price.high) == (1.22, 2.9, 2.9)
    assert (price.usd_per_mtok_low, price.usd_per_mtok_high) == pytest.approx((usd * 1.22 / 2.9, usd))
    assert price.elasticity == pytest.approx(1)
    span = price_range_of(found.cost.price)
    assert span is not None
    assert price.range_source == span.source
    assert (used.low, used.base, used.high) == pytest.approx((226.75 / 278, 1, 1))
    assert used.usd_per_mtok_low == pytest.approx(usd * 278 / 226.75)
    assert used.elasticity == pytest.approx(-1)
    assert "DeepSeek's day" in used.range_source


def test_batch_and_context_are_evaluated_again(found: SensitivityResult) -> None:
    def usd(batch: float, context: int) -> float:
        return price_step(study(*H200_AT_64[:4], [batch], context=context)).usd_per_mtok_output

    batch, context = row(found, BATCH), row(found, CONTEXT)
    assert (batch.low, batch.high, batch.range_source) == (32, 128, "half to twice")
    assert (batch.usd_per_mtok_low, batch.usd_per_mtok_high) == pytest.approx((usd(32, 4096), usd(128, 4096)))
    assert (context.low, context.high) == (2048, 8192)
    assert (context.usd_per_mtok_low, context.usd_per_mtok_high) == pytest.approx((usd(64, 2048), usd(64, 8192)))
    for each, sign in ((batch, -1), (context, 1)):
        arc = math.log(each.usd_per_mtok_high / each.usd_per_mtok_low) / math.log(4)
        assert each.elasticity == pytest.approx(arc)
        assert 0 < sign * arc < 1


def test_ranked_by_how_far_the_price_moves(found: SensitivityResult) -> None:
    swings = [abs(each.usd_per_mtok_high - each.usd_per_mtok_low) for each in found.rows]
    assert swings == sorted(swings, reverse=True)
    assert swings == [each.swing_usd_per_mtok for each in found.rows]
    assert {each.input for each in found.rows[:3]} == {PRICE, BATCH, CONTEXT}
    assert all(math.isfinite(value) and value > 0 for value in swings)
    assert all(each.range_source for each in found.rows)


def test_an_op_groups_elasticity_is_its_share(found: SensitivityResult) -> None:
    """The arc lies by the share of the step, nearer the narrower the range."""
    step = found.cost.step
    shares: dict[str, float] = {}
    for op in step.ops:
        name = f"time of {op_group(op.call.op)}"
        shares[name] = shares.get(name, 0.0) + op.time_s / step.step_s
    assert set(shares) == {each.input for each in found.rows if each.input.startswith("time of")}
    assert sum(shares.values()) == pytest.approx(1)
    assert len(shares) == 5
    for name, share in shares.items():
        each = row(found, name)
        assert each.elasticity == pytest.approx(share, rel=0.35), name
        arc = math.log(each.usd_per_mtok_high / each.usd_per_mtok_low) / math.log(each.high / each.low)
        assert each.elasticity == pytest.approx(arc)
        assert each.low < 1 < each.high
        usd = found.cost.usd_per_mtok_output
        assert each.usd_per_mtok_low == pytest.approx(usd * (1 + share * (each.low - 1)))
        assert each.usd_per_mtok_high == pytest.approx(usd * (1 + share * (each.high - 1)))


def test_interpolation_moves_what_is_interpolated(found: SensitivityResult, plan: Study) -> None:
    each = row(found, "interpolation")
    errors = [error for error in op_errors(found.cost, plan.data) if error.timed.provenance == "interpolated"]
    said_s = sum(error.timed.time_s for error in errors)
    high_s = sum(error.timed.time_s * float(error.factor(0.95)) for error in errors)
    assert each.high == pytest.approx(high_s / said_s)
    usd, step_s = found.cost.usd_per_mtok_output, found.cost.step.step_s
    assert each.usd_per_mtok_high == pytest.approx(usd * (step_s - said_s + high_s) / step_s)
    modelled = row(found, "models where no row is")
    assert f"{found.cost.step.coverage()['modelled']:.1%} of the step" in modelled.range_source


def test_acceptance_needs_drafts(found: SensitivityResult) -> None:
    assert found.skipped == {ACCEPTANCE: "one token per step: nothing is drafted"}
    drafted = sensitivity(study(*H200_AT_64[:4], [16], tokens_per_step=2, kept_tokens=1.85))
    each = row(drafted, ACCEPTANCE)
    assert (each.low, each.base, each.high) == (1.79, 1.85, 1.93)
    assert each.usd_per_mtok_low == pytest.approx(drafted.cost.usd_per_mtok_output * 1.85 / 1.79)
    assert each.elasticity == pytest.approx(-1)
    assert "InferenceX" in each.range_source
    low = row(sensitivity(study(*H200_AT_64[:4], [16], tokens_per_step=2, kept_tokens=1.2)), ACCEPTANCE)
    assert (low.low, low.high) == (1.2, 1.93)
    assert "widened to the base" in low.range_source
    three = row(sensitivity(study(*H200_AT_64[:4], [16], tokens_per_step=3, kept_tokens=2)), ACCEPTANCE)
    assert (three.low, three.high) == (1, 3)


def test_ranges_end_where_memory_and_the_model_do() -> None:
    most = row(sensitivity(study("gpt-oss-120b", ["h100"], ["vllm"], ["tp2"], [1], context=131072)), CONTEXT)
    assert (most.low, most.base, most.high) == (65536, 131072, 131072)  # the model's most
    full = sensitivity(study(*H200_AT_64[:4], [200]))
    batch, context = row(full, BATCH), row(full, CONTEXT)
    assert (batch.low, batch.base, batch.high) == (100, 200, 314)
    assert "what fits (314 per attention group)" in batch.range_source
    assert 4096 < context.high < 8192
    price_step(study(*H200_AT_64[:4], [314]))
    price_step(study(*H200_AT_64[:4], [200], context=int(context.high)))
    for batch_per_gpu, tokens in ((315, 4096), (200, int(context.high) + 1)):
        with pytest.raises(ValueError, match="memory"):
            price_step(study(*H200_AT_64[:4], [batch_per_gpu], context=tokens))
    one = row(sensitivity(study(*H200_AT_64[:4], [1])), BATCH)
    assert (one.low, one.high) == (1, 2)  # no half sequence
    split = row(sensitivity(study("gpt-oss-120b", ["h100"], ["vllm"], ["tp2"], [1])), BATCH)
    assert (split.low, split.high) == (0.5, 2)  # one sequence on two GPUs


def test_a_stated_price_does_not_move_until_a_range_is_given() -> None:
    stated = study(*H200_AT_64, usd_per_gpu_hour=2.0)
    assert sensitivity(stated).skipped[PRICE].startswith("a stated price")
    given = row(sensitivity(stated, {PRICE: (1.0, 3.0)}), PRICE)
    assert (given.low, given.base, given.high, given.range_source) == (1, 2, 3, "given")
    assert given.usd_per_mtok_high == pytest.approx(3 * given.usd_per_mtok_low)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({"moon": (1, 2)}, "ranges: expected inputs of price, utilisation"),
        ({PRICE: (-1, 2)}, "ranges: price: expected 0 < low < high; got -1 to 2"),
        ({PRICE: (math.nan, 2)}, "ranges: price"),
        ({PRICE: (1, math.inf)}, "ranges: price"),
        ({UTILISATION: (0, 0.5)}, "ranges: utilisation"),
        ({UTILISATION: (0.5, 1.2)}, "utilisation: expected at most 1; got 1.2"),
        ({BATCH: (64, 32)}, "ranges: batch: expected 0 < low < high"),
        ({BATCH: (32, 100_000)}, "memory"),
        ({CONTEXT: (1024.5, 2048)}, "context: expected whole tokens"),
        ({ACCEPTANCE: (1, 2)}, "acceptance length: one token per step"),
    ],
)
def test_r28_absurd_ranges_are_named(plan: Study, ranges: dict[str, tuple[float, float]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sensitivity(plan, ranges)


def test_r28_acceptance_below_one_is_named() -> None:
    drafted = study(*H200_AT_64[:4], [16], tokens_per_step=2, kept_tokens=1.85)
    for span in ((0.5, 1.5), (1.5, 2.5)):
        with pytest.raises(ValueError, match="acceptance length: expected 1 to 2 tokens per step"):
            sensitivity(drafted, {ACCEPTANCE: span})


ARGS = ("deepseek-v3", "--gpu", "h200", "--stack", "sglang", "--parallel", "dp8-ep8", "--batch", "64")


def run(*args: str) -> Any:
    return CliRunner().invoke(sensitivity_command, [*ARGS, *args])


def test_command_prints_the_tornado(found: SensitivityResult) -> None:
    document = json.loads(run("--json").output)
    assert [each["input"] for each in document["rows"]] == [each.input for each in found.rows]
    assert document["rows"][0]["usd_per_mtok_high"] == pytest.approx(found.rows[0].usd_per_mtok_high)
    assert document["point"]["denominator"] == "output tokens of decode GPUs"
    text = " ".join(run().output.split())
    for words in ("64 sequences/GPU x 4096 tokens", "million output tokens of decode GPUs", "rent_3yr", "#####",
                  "not moved: acceptance length", "left out: launch gaps"):  # fmt: skip
        assert words in text, words


def test_command_takes_ranges() -> None:
    args = ("--json", "--price-low", "1", "--price-high", "3", "--utilisation", "0.4", "0.9", "--batches", "16", "128",
            "--contexts", "1024", "8192")  # fmt: skip
    rows = {each["input"]: (each["low"], each["high"]) for each in json.loads(run(*args).output)["rows"]}
    assert rows[PRICE] == (1, 3)
    assert rows[UTILISATION] == (0.4, 0.9)
    assert rows[BATCH] == (16, 128)
    assert rows[CONTEXT] == (1024, 8192)
    for bad in (("--utilisation", "0.5", "1.5"), ("--price-low", "1"), ("--acceptance", "1", "2")):
        assert isinstance(run(*bad).exception, ValueError), bad
