"""Intervals: against closed forms on made-up spreads, against the tables on the shipped ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tokenfab.bench.decode_plan import OpCall
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import Collective, Op, PagedAttention
from tokenfab.bench.published import PublishedData, Stack
from tokenfab.bench.published_check import grids, table_probes
from tokenfab.bench.published_tables import queries
from tokenfab.bench.records import RecordStore
from tokenfab.bench.step_time import StepTime, TimedOp
from tokenfab.commands.tco import interval as interval_command
from tokenfab.costing.cost import StepCost
from tokenfab.costing.levers import left_out
from tokenfab.costing.levers.calibration import (
    LEVELS,
    SHIPPED_ERRORS,
    Calibration,
    Spread,
    calibrate,
    coverage,
    spread_of,
)
from tokenfab.costing.levers.intervals import (
    MODEL,
    CostInterval,
    PriceRange,
    interval,
    op_errors,
    price_range_of,
    process_spread,
)
from tokenfab.costing.levers.left_out import (
    BEYOND,
    BORROWED,
    CAUSES,
    INTERPOLATION,
    NOISE,
    REPLICATED,
    ROOFLINE,
    all_errors,
    borrow,
)
from tokenfab.costing.prices import PriceBook, stated_price
from tokenfab.costing.study import price_step, run_study, study
from tokenfab.tests.bench.recorded_points import recorded

GPUS = ("h100", "h200", "b200", "b300", "gb200", "gb300")
H100 = get_gpu("h100")
Z95 = NormalDist().inv_cdf(0.95)


def normal(cause: str, sigma: float, table: str = "") -> Spread:
    values = tuple(NormalDist().inv_cdf(level) * sigma for level in LEVELS)
    return Spread(cause, "", table, "", 1, values)


def calibration(**sigmas: float) -> Calibration:
    """A log-normal error of every cause, 0 where not given."""
    return Calibration("0", {}, tuple(normal(cause, sigmas.get(cause, 0.0)) for cause in CAUSES))


SOURCES = {
    "measured": "sglang 0.5.14 {}: kernel",
    "interpolated": "sglang 0.5.14 {}: kernel",
    "modelled": "sglang 0.5.14 {}: kernel (efficiency of the last row (n=65536) held)",
}


def made_cost(*ops: tuple[str, str, float], usd_per_gpu_hour: float = 3.6) -> StepCost:
    """A step of (provenance, table, seconds); at 1 s and one sequence it costs $1000/M."""
    timed = tuple(
        TimedOp(OpCall(f"op{index}", Collective("all_reduce", 4096, 2), 1), time_s, time_s / 2, provenance,
                SOURCES[provenance].format(table))
        for index, (provenance, table, time_s) in enumerate(ops)
    )  # fmt: skip
    deployment = Deployment(1, 1, 1, get_precision("bf16"), 1, 1024)
    step = StepTime(load_model("qwen3-30b-a3b"), H100, Stack("sglang", "0.5.14"), deployment, timed)
    return StepCost(step, stated_price("h100", usd_per_gpu_hour))


# -- closed forms --------------------------------------------------------------------------------


def test_one_op_has_its_own_spread(published: PublishedData) -> None:
    found = interval(made_cost(("measured", "gemm", 1.0)), data=published, calibration=calibration(noise=0.2))
    expected = [1000 * math.exp(z * 0.2) for z in (-Z95, 0, Z95)]
    at = found.at_price
    assert [at.p5, at.p50, at.p95] == pytest.approx(expected, rel=0.01)
    assert found.usd_per_mtok_output == at  # a stated price is certain
    assert found.price_range is None
    assert found.variance_share == pytest.approx({"noise": 1, "interpolation": 0, "model": 0, "price": 0})


def width(found: CostInterval) -> float:
    return math.log(found.at_price.p95 / found.at_price.p5) / (2 * Z95)


def test_ops_of_one_table_err_together_and_of_two_apart(published: PublishedData) -> None:
    sigmas, halves = calibration(noise=0.1), ("measured", "gemm", 0.5)
    same = made_cost(halves, halves)
    assert width(interval(same, data=published, calibration=sigmas)) == pytest.approx(0.1, rel=0.02)
    apart = interval(same, data=published, calibration=sigmas, correlated=False)
    assert width(apart) == pytest.approx(0.1 / math.sqrt(2), rel=0.05)
    other = made_cost(halves, ("measured", "moe", 0.5))
    assert width(interval(other, data=published, calibration=sigmas)) == pytest.approx(0.1 / math.sqrt(2), rel=0.05)
    causes = made_cost(halves, ("modelled", "gemm", 0.5))
    both = calibration(noise=0.1, beyond=0.1)
    assert width(interval(causes, data=published, calibration=both)) == pytest.approx(0.1 / math.sqrt(2), rel=0.05)


def test_variance_is_split_by_cause(published: PublishedData) -> None:
    """Var ~ (share x sigma)^2, and of a log-uniform price ln(high / low)^2 / 12."""
    cost = made_cost(("measured", "gemm", 0.5), ("interpolated", "moe", 0.3), ("modelled", "gemm", 0.2))
    sigmas = calibration(noise=0.02, interpolation=0.05, beyond=0.1)
    found = interval(cost, data=published, calibration=sigmas, price_range=(3.6, 3.8))
    expected = {NOISE: 0.01**2, INTERPOLATION: 0.015**2, MODEL: 0.02**2, "price": math.log(3.8 / 3.6) ** 2 / 12}
    total = sum(expected.values())
    assert sum(found.variance_share.values()) == pytest.approx(1, abs=1e-12)
    for cause, share in found.variance_share.items():
        assert share == pytest.approx(expected[cause] / total, rel=0.06), cause
    assert sum(part.time_share for part in found.parts) == pytest.approx(1)
    assert sum(part.variance_share for part in found.parts) == pytest.approx(1)
    assert [(part.cause, part.table) for part in found.parts] == [
        ("model", "gemm"), ("interpolation", "moe"), ("noise", "gemm"),
    ]  # fmt: skip


def test_price_is_log_uniform_over_its_range(published: PublishedData) -> None:
    cost = made_cost(("measured", "gemm", 1.0))
    found = interval(cost, data=published, calibration=calibration(), price_range=(1.0, 4.0))
    expected = [1e6 / 3600 * 4**level for level in (0.05, 0.5, 0.95)]
    usd = found.usd_per_mtok_output
    assert [usd.p5, usd.p50, usd.p95] == pytest.approx(expected, rel=0.01)
    assert (found.at_price.p5, found.at_price.p95) == pytest.approx((1000, 1000))
    assert found.variance_share["price"] == pytest.approx(1)


def test_nothing_uncertain_is_a_point(published: PublishedData) -> None:
    found = interval(made_cost(("measured", "gemm", 1.0)), data=published, calibration=calibration())
    assert found.at_price.p5 == found.at_price.p95 == pytest.approx(1000)
    assert set(found.variance_share.values()) == {0.0}


def test_same_seed_same_interval(published: PublishedData) -> None:
    cost = made_cost(("measured", "gemm", 1.0), ("modelled", "moe", 0.5))
    one, two, other = (interval(cost, data=published, samples=1000, seed=seed) for seed in (3, 3, 4))
    assert one == two
    assert one.at_price != other.at_price
    assert other.at_price.p50 == pytest.approx(one.at_price.p50, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 99}, "samples: expected a whole number of at least 100; got 99"),
        ({"samples": 1e5}, "samples: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number of at least 0; got -1"),
        ({"price_range": (0.0, 1.0)}, "price_range: expected 0 < low <= high"),
        ({"price_range": (-1.0, 1.0)}, "price_range"),
        ({"price_range": (3.0, 2.0)}, "price_range: .*got 3.0 to 2.0"),
        ({"price_range": (math.nan, 2.0)}, "price_range"),
        ({"price_range": (1.0, math.inf)}, "price_range"),
    ],
)
def test_r28_absurd_requests_are_named(published: PublishedData, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        interval(made_cost(("measured", "gemm", 1.0)), data=published, **options)


# -- prices --------------------------------------------------------------------------------------


def test_price_range_is_the_books_without_placeholders() -> None:
    book = PriceBook.read()
    span = price_range_of(book.look_up("gb300", "rent_3yr"))
    assert span is not None
    assert (span.low_usd_per_gpu_hour, span.high_usd_per_gpu_hour) == (2.31, 5.0)
    assert "own_hyperscaler of 2026-07-01 to rent_3yr of 2026-07-01, of 3 prices" in span.source
    old = price_range_of(book.look_up("h200", "rent_3yr", "2026-02"))
    assert old is not None
    assert (old.low_usd_per_gpu_hour, old.high_usd_per_gpu_hour) == (1.22, 2.9)
    assert price_range_of(stated_price("h200", 2.9)) is None


# -- real steps ----------------------------------------------------------------------------------

PLACES = [
    ("deepseek-v3", ["h200", "gb300"], None, None), ("gpt-oss-120b", ["h100"], None, None),
    ("deepseek-v3.2", ["b200"], None, None), ("qwen3-30b-a3b", ["gb200"], "nvfp4", None),
]  # fmt: skip


def test_every_published_time_has_one_cause(published: PublishedData) -> None:
    expected = {"measured": {NOISE}, "interpolated": {INTERPOLATION}, "modelled": {MODEL}}
    seen: dict[str, set[str]] = {}
    for model, gpus, precision, _ in PLACES:
        plan = study(model, gpus, None, ["tp8", "tp4-ep4", "dp8-ep8", "dp4-ep4-ag", "dp32-ep32"], [4, 24, 128],
                     precision=precision)  # fmt: skip
        for point in run_study(plan).points:
            errors = op_errors(point, published)
            assert len(errors) == len(point.step.ops)
            for error in errors:
                assert error.cause in expected[error.timed.provenance], error.timed.source
                seen.setdefault(error.cause, set()).update(each.cause for each in error.spreads)
    assert seen == {
        NOISE: {NOISE}, INTERPOLATION: {INTERPOLATION}, MODEL: {BEYOND, BORROWED, ROOFLINE, REPLICATED},
    }  # fmt: skip


def spreads(cost: StepCost, name: str, published: PublishedData) -> list[tuple[str, str, str, str]]:
    (error,) = [each for each in op_errors(cost, published) if each.timed.call.name == name]
    return [(each.cause, each.stack, each.table, each.axis) for each in error.spreads]


def test_an_interpolated_op_errs_along_the_axes_it_lies_between(published: PublishedData) -> None:
    on = price_step(study("deepseek-v3", ["h200"], ["sglang"], ["dp8-ep8"], [64]))
    off = price_step(study("deepseek-v3", ["h200"], ["sglang"], ["dp8-ep8"], [48], context=5000))
    assert spreads(on, "q_b_proj", published) == [(INTERPOLATION, "sglang", "gemm", "n")]
    assert spreads(on, "dense_down", published) == [(INTERPOLATION, "sglang", "gemm", "k")]
    assert spreads(on, "o_proj", published) == [(NOISE, "", "", "")]  # no GEMM row is there twice
    assert spreads(on, "attention", published) == [(NOISE, "sglang", "generation_mla", "")]
    assert spreads(off, "attention", published) == [
        (INTERPOLATION, "sglang", "generation_mla", "batch_size"),
        (INTERPOLATION, "sglang", "generation_mla", "kv_length"),
    ]
    assert spreads(on, "lm_head", published) == [(BEYOND, "sglang", "gemm", "")]
    assert spreads(on, "final_norm", published) == [(ROOFLINE, "sglang", "mla_bmm", "")]


def test_models_of_other_shapes_and_of_replicated_rows(published: PublishedData) -> None:
    vllm = price_step(study("deepseek-v3", ["h200"], ["vllm"], ["dp8-ep8"], [64]))
    assert spreads(vllm, "experts", published) == [(REPLICATED, "sglang", "moe", "ep8")]
    wide = price_step(study("deepseek-v3", ["gb300"], ["trtllm"], ["dp32-ep32"], [128]))
    assert spreads(wide, "dispatch", published)[0][0] == BORROWED
    found = interval(wide, data=published, samples=20_000)
    assert found.variance_share[MODEL] > 5 * found.variance_share[NOISE]


def test_more_modelled_is_less_sure(published: PublishedData) -> None:
    sglang, vllm = (
        interval(price_step(study("deepseek-v3", ["h200"], [stack], ["dp8-ep8"], [64])), data=published, samples=20_000)
        for stack in ("sglang", "vllm")
    )
    assert width(vllm) > 3 * width(sglang)
    for found in (sglang, vllm):
        assert found.usd_per_mtok_output.p5 < found.usd_per_mtok_output.p50 < found.usd_per_mtok_output.p95
        assert found.at_price.p5 < found.cost.usd_per_mtok_output < found.at_price.p95


def test_a_source_that_says_nothing_is_an_error(published: PublishedData) -> None:
    cost = made_cost(("modelled", "gemm", 1.0))
    timed = cost.step.ops[0]
    for source in ("by hand", "sglang 0.5.14 gemm: kernel"):
        changed = TimedOp(timed.call, timed.time_s, timed.floor_s, "modelled", source)
        bad = StepCost(StepTime(cost.step.model, H100, cost.step.stack, cost.step.deployment, (changed,)), cost.price)
        with pytest.raises(ValueError, match="source: expected"):
            op_errors(bad, published)


def test_records_have_the_noise_of_their_processes(tmp_path: Path, published: PublishedData) -> None:
    """Three processes of 100, 102 and 104 us: a range of 3.9 %."""
    store, formats = RecordStore(tmp_path, "h100.jsonl"), {"weight": "fp8_block", "activation": "fp8_group"}
    for process, time_us in (("one", 100), ("two", 102), ("three", 104)):
        for m in (16, 64):
            shape = {"m": m, "n": 5120, "k": 2048}
            store.append(recorded("gemm", formats, shape, time_us * 1e-6, process))
    for batch, cause, low in ((64, NOISE, 0.04 / 1.02 / 1.693 * Z95), (32, INTERPOLATION, None), (128, MODEL, None)):
        cost = price_step(
            study("qwen3-30b-a3b", ["h100"], ["tokenfab+vllm"], ["tp1"], [batch], precision="fp8", records=tmp_path)
        )
        own = {each.timed.call.name: each for each in op_errors(cost, published) if "tokenfab" in each.timed.source}
        error = own["qkv_proj"]
        assert (error.cause, error.table) == (cause, "tokenfab gemm")
        if low is not None:
            assert math.log(float(error.factor(0.95))) == pytest.approx(low, rel=0.02)
        others = [each for each in op_errors(cost, published) if each.timed.source.startswith("vllm")]
        assert others
        assert all(not each.table.startswith("tokenfab") for each in others)


def test_process_noise_of_nothing_is_no_spread() -> None:
    assert set(process_spread("gemm", 0.0).log_quantiles) == {0.0}


# -- the calibration -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Calibration:
    found = Calibration.read()
    if found.version != metadata.version("aiconfigurator-core"):
        pytest.skip(f"errors.json is of aiconfigurator-core {found.version}; another is installed")
    return found


def only(monkeypatch: pytest.MonkeyPatch, keep: Callable[[Op], bool]) -> None:
    probes = [probe for _, _, group in table_probes() for probe in group if keep(probe)]
    monkeypatch.setattr(left_out, "_probes", lambda: probes)


def assert_alike(again: Sequence[Spread], shipped: Calibration, cause: str, tables: set[str]) -> None:
    before = {(s.stack, s.table, s.axis): s for s in shipped.spreads if s.cause == cause and s.table in tables}
    after = {(s.stack, s.table, s.axis): s for s in again}
    assert set(before) == set(after), cause
    for key, spread in after.items():
        assert spread.rows == before[key].rows, key
        assert spread.log_quantiles == pytest.approx(before[key].log_quantiles, rel=1e-3, abs=1e-6), key


def test_shipped_file_can_be_made_again(
    shipped: Calibration, published: PublishedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of it: MLA's and the collectives' tables for all causes that probes reach, and the replicated rows."""
    only(monkeypatch, lambda probe: probe.kind in ("mla", "collective"))
    tables = {"generation_mla", "custom_allreduce"}
    for cause in (INTERPOLATION, BEYOND, BORROWED, ROOFLINE):
        again = calibrate(published, GPUS, [cause])
        assert {each.table for each in again} == tables, cause
        assert_alike(again, shipped, cause, tables)
    assert_alike(calibrate(published, GPUS, [REPLICATED]), shipped, REPLICATED, {"moe"})


def test_repeats_are_rows_alike_but_for_their_time(
    shipped: Calibration, published: PublishedData, tree: tuple[Path, Any]
) -> None:
    """SGLang's MLA on GB200 was measured twice; by hand: 2.0 and 2.2 ms are +-ln(1.1) / sqrt(2)."""
    root, write = tree
    write("h100_sxm/gemm/vllm/2.0/gemm_perf", {"gemm_dtype": "fp8", "m": [1, 1, 2, 2], "n": 64, "k": 64,
                                              "latency": [2.0, 2.2, 4.0, 4.0]})  # fmt: skip
    data = PublishedData(root)
    ((table, _, errors),) = left_out.repeat_errors(data, H100, data.stack(H100, "vllm"))
    assert table == "gemm"
    assert sorted(errors) == pytest.approx([-math.log(1.1) / math.sqrt(2), 0, 0, math.log(1.1) / math.sqrt(2)])
    noise = shipped.find(NOISE, "sglang", "generation_mla")
    assert noise.rows > 10_000
    assert 0.005 < noise.log_quantiles[LEVELS.index(0.95)] < 0.05
    assert noise.log_quantiles[LEVELS.index(0.05)] == pytest.approx(-noise.log_quantiles[LEVELS.index(0.95)], rel=0.01)


def test_ninety_percent_intervals_hold_ninety_percent_of_a_gpu_left_out(shipped: Calibration) -> None:
    assert set(shipped.coverage) == set(GPUS)
    assert all(0.85 <= share <= 0.95 for share in shipped.coverage.values()), shipped.coverage


def test_coverage_is_of_rows_held_out(
    shipped: Calibration, published: PublishedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On MLA's and attention's tables of three GPUs; and empirical quantiles come nearer to 90 % than log-normals."""
    only(monkeypatch, lambda probe: probe.kind == "mla" or (isinstance(probe, PagedAttention) and probe.head_dim == 64))
    gpus = ("h100", "h200", "b300")
    shares = coverage(published, gpus)
    assert all(0.75 < share < 0.99 for share in shares.values()), shares
    errors: dict[str, dict[tuple[str, ...], list[np.ndarray]]] = {gpu: {} for gpu in gpus}
    for _, gpu, *key, part in all_errors(published, gpus, [INTERPOLATION]):
        errors[gpu].setdefault(tuple(key), []).append(part)
    inside = {"empirical": [0, 0], "median": [0, 0]}
    for gpu in gpus:
        for key, parts in errors[gpu].items():
            rows = np.concatenate([row for other in gpus if other != gpu for row in errors[other].get(key, [])])
            held, sigma = np.concatenate(parts), float(np.median(np.abs(rows))) / NormalDist().inv_cdf(0.75)
            for name, (low, high) in {
                "empirical": np.quantile(rows, (0.05, 0.95)), "median": (-Z95 * sigma, Z95 * sigma),
            }.items():  # fmt: skip
                inside[name][0] += int(((held >= low) & (held <= high)).sum())
                inside[name][1] += len(held)
    held_share = {name: held / total for name, (held, total) in inside.items()}
    total = sum(len(np.concatenate(parts)) for gpu in gpus for parts in errors[gpu].values())
    weighted = sum(
        share * sum(map(len, (row for parts in errors[gpu].values() for row in parts))) for gpu, share in shares.items()
    )
    assert weighted / total == pytest.approx(held_share["empirical"], abs=0.003)
    assert abs(held_share["empirical"] - 0.9) < abs(held_share["median"] - 0.9) / 2


def test_interpolation_error_is_what_is_there_over_what_was_said(tree: tuple[Path, Any]) -> None:
    """Row 2 lies 10 % above the line that its neighbours make: true / said is 1.1."""
    root, write = tree
    sizes = [b * 10**7 for b in (1, 2, 3)]
    write(
        "h100_sxm/comm/vllm/2.0/custom_allreduce_perf",
        {"op_name": "all_reduce", "num_gpus": 2, "message_size": sizes, "latency": [1.0, 2.2, 3.0]},
    )
    data = PublishedData(root)
    found = [errors for table, _, errors in left_out.interpolation_errors(data, H100, data.stack(H100, "vllm"))
             if table == "custom_allreduce"]  # fmt: skip
    assert np.concatenate(found) == pytest.approx([math.log(1.1)])
    ((_, _, beyond),) = left_out.beyond_errors(data, H100, data.stack(H100, "vllm"))
    assert beyond == pytest.approx([math.log(3.0 / (2.2 * 3 / 2))], rel=1e-3)


@pytest.mark.parametrize("kind", ["all_reduce", "attention"])
def test_a_borrowed_time_is_what_the_tables_answer_without_the_shape(tree: tuple[Path, Any], kind: str) -> None:
    root, write = tree
    op: Op
    if kind == "all_reduce":
        op = Collective("all_reduce", 3 * 10**7, 4)
        write(
            "h100_sxm/comm/vllm/2.0/custom_allreduce_perf",
            {"op_name": "all_reduce", "num_gpus": 2, "message_size": [10**7, 4 * 10**7], "latency": [1.0, 4.0]},
        )
    else:
        op = PagedAttention(16, 3000, 8, 2, 128, None, "bf16")
        write("h100_sxm/attention/vllm/2.0/generation_attention_perf", {
            "kv_cache_dtype": "bfloat16", "head_dim": 128, "window_size": 0, "num_heads": 8, "num_key_value_heads": 1,
            "batch_size": 16, "isl": 1, "step": [1023, 2047, 4095], "latency": [1.0, 1.5, 3.0]})  # fmt: skip
    data = PublishedData(root)
    stack = data.stack(H100, "vllm")
    (query, *_) = queries(op, H100, "vllm")
    ((grid, near),) = grids(data, H100, stack, query, None)
    answer = data.time(op, H100, stack)
    assert answer.provenance == "modelled"
    assert borrow(query, H100, grid, near) == pytest.approx(answer.time_s, rel=1e-12)


def test_unknown_tables_get_the_pool(shipped: Calibration) -> None:
    pool = shipped.find(NOISE, "vllm", "gemm")
    members = [each for each in shipped.spreads if each.cause == NOISE]
    assert (pool.stack, pool.table) == ("", "")
    assert pool.rows == sum(each.rows for each in members)
    tops = [each.log_quantiles[LEVELS.index(0.95)] for each in members]
    assert min(tops) < pool.log_quantiles[LEVELS.index(0.95)] < max(tops)
    exact = shipped.find(INTERPOLATION, "vllm", "gemm", "m")
    assert (exact.stack, exact.axis) == ("vllm", "m")
    over_stacks = shipped.find(INTERPOLATION, "", "gemm", "m")
    assert over_stacks.rows == sum(each.rows for each in shipped.spreads if (each.table, each.axis) == ("gemm", "m"))
    with pytest.raises(ValueError, match="cause: expected one of noise"):
        shipped.find("luck")


def test_spreads_need_finite_errors() -> None:
    with pytest.raises(ValueError, match="errors: expected finite"):
        spread_of(NOISE, "", "", "", [])
    with pytest.raises(ValueError, match="errors: expected finite"):
        spread_of(NOISE, "", "", "", [np.array([0.1, math.nan])])


def test_r28_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    whole = json.loads(SHIPPED_ERRORS.read_text())
    falling = json.loads(SHIPPED_ERRORS.read_text())
    falling["spreads"][0]["log_quantiles"].reverse()
    short = json.loads(SHIPPED_ERRORS.read_text())
    short["spreads"][0]["log_quantiles"].pop()
    few = {**whole, "spreads": [each for each in whole["spreads"] if each["cause"] != NOISE]}
    for index, (text, words) in enumerate([
        ("{", "calibration: "), (json.dumps({**whole, "schema_version": 2}), "expected schema 1"),
        (json.dumps({**whole, "levels": [0.5]}), "its levels"), (json.dumps(falling), "rising quantiles"),
        (json.dumps(short), "rising quantiles"), (json.dumps(few), "expected spreads of noise; got none"),
    ]):  # fmt: skip
        path = tmp_path / f"{index}.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            Calibration.read(path)
    with pytest.raises(ValueError, match="calibration: cannot read"):
        Calibration.read(tmp_path / "none.json")


# -- the command ---------------------------------------------------------------------------------

ARGS = ("deepseek-v3", "--gpu", "h200", "--stack", "sglang", "--parallel", "dp8-ep8", "--batch", "64")


def run(*args: str) -> Any:
    return CliRunner().invoke(interval_command, [*ARGS, *args])


def test_command_prints_the_interval_with_its_operating_point(published: PublishedData) -> None:
    result = run("--json", "--samples", "5000", "--seed", "7")
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    cost = price_step(study("deepseek-v3", ["h200"], ["sglang"], ["dp8-ep8"], [64]))
    found = interval(cost, samples=5000, seed=7, data=published)
    assert document["usd_per_mtok_output"] == pytest.approx(vars(found.usd_per_mtok_output))
    assert document["usd_per_mtok_output_at_price"] == pytest.approx(vars(found.at_price))
    assert document["variance_share"] == pytest.approx(found.variance_share)
    assert document["point"]["batch_per_gpu"] == 64
    assert document["calibration"]["version"] == found.calibration
    text = " ".join(run().output.split())
    for words in (
        "million output tokens of decode GPUs", "64 sequences/GPU x 4096 tokens", "rent_3yr", "median",
        "aiconfigurator-core", "95% measured", "one draw per table", "in no interval: launch gaps",
    ):  # fmt: skip
        assert words in text, words


def test_command_takes_a_price_range() -> None:
    document = json.loads(run("--json", "--samples", "1000", "--price-low", "2", "--price-high", "3").output)
    span = document["price_range"]
    assert (span["low_usd_per_gpu_hour"], span["high_usd_per_gpu_hour"]) == (2, 3)
    stated = json.loads(run("--json", "--samples", "1000", "--usd-per-gpu-hour", "2").output)
    assert stated["price_range"] is None
    for bad in (("--price-low", "2"), ("--price-low", "3", "--price-high", "2"), ("--samples", "5")):
        assert isinstance(run(*bad).exception, ValueError), bad


def test_range_of_prices_is_checked() -> None:
    with pytest.raises(ValueError, match="price_range"):
        PriceRange(2.0, math.nan, "given")
