"""Served results in dollars, and the distance to the kernels: by hand, and against the step and the pass themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.memory import largest_batch
from tokenfab.bench.models import load_model
from tokenfab.bench.prefill_time import prefill_time
from tokenfab.bench.published import PublishedData
from tokenfab.bench.recorded import RecordedData
from tokenfab.costing.imports.allowed import Allowed, Tables, allowed
from tokenfab.costing.imports.bill import Bill, bills
from tokenfab.costing.imports.read import read_results
from tokenfab.costing.imports.served import Given, Served, completed_by
from tokenfab.costing.prices import Price, price_lookup, stated_price
from tokenfab.costing.study import price_step, study
from tokenfab.costing.sweep import Parallel
from tokenfab.tests.costing.imports_files import DATA, changed, set_at, write

VLLM = Given(gpu="h200", num_gpus=8, parallel=Parallel(8), precision="fp8")
POOLS = ("inferencex_agg_bmk.json", 1)


def record(name: str, given: Given = Given(), index: int = 0) -> Served:  # noqa: B008
    return completed_by(read_results(DATA / name)[index], given)


def priced(served: Served, usd_per_gpu_hour: float | None = None) -> Bill:
    (bill,) = bills([served], price_lookup(usd_per_gpu_hour), None)
    return bill


def step_usd(model: str, gpu: str, stack: str, parallel: str, batch: float, usd: float, **options: Any) -> float:
    """$/M output tokens of decode GPUs by the step itself."""
    plan = study(model, [gpu], [stack], [parallel], [batch], usd, **options)
    return price_step(plan).usd_per_mtok_output


@pytest.fixture(scope="module")
def tables(published: PublishedData) -> Tables:
    return Tables(published, RecordedData())


def allow(served: Served, tables: Tables, usd: float = 1.0, prefill_usd: float | None = None) -> Allowed:
    assert served.gpu is not None
    price = stated_price(served.gpu, usd)
    return allowed(served, price, price if prefill_usd is None else stated_price(served.gpu, prefill_usd), tables)


def by(tables: Tables) -> Callable[[Served, Price, Price], Allowed]:
    return lambda served, own, prefill: allowed(served, own, prefill, tables)


def test_golden_dollars_of_one_pool() -> None:
    """8 x $2.90 = $23.20/h; 1,000 output and 3,000 total tokens/s."""
    bill = priced(record("vllm_serve.json", VLLM))
    assert bill.usd_per_hour == pytest.approx(23.20)
    assert bill.usd_per_mtok_output == pytest.approx(6.4444, abs=5e-5)
    assert bill.usd_per_mtok_total == pytest.approx(2.1481, abs=5e-5)
    assert bill.usd_per_mtok_input is None  # one pool makes both
    assert bill.usd_per_mtok_output_inferencex is None
    assert bill.tokens_per_s_per_user == pytest.approx(499 / 29.75)


def test_golden_dollars_of_two_pools_count_the_prefill_gpus() -> None:
    """28 x $4: $112/h over 14,000 output and 126,000 total tokens/s; 20 x $4 over 112,000 input tokens/s.

    InferenceX: $4 / (14,000 / 8 decode GPUs x 3600) x 1e6 = $0.635, without the 20 prefill GPUs.
    """
    bill = priced(record(*POOLS[:1], index=POOLS[1]))
    assert bill.usd_per_mtok_output == pytest.approx(2.2222, abs=5e-5)
    assert bill.usd_per_mtok_total == pytest.approx(0.24691, abs=5e-6)
    assert bill.usd_per_mtok_input == pytest.approx(0.19841, abs=5e-6)
    assert bill.usd_per_mtok_output_inferencex == pytest.approx(0.63492, abs=5e-6)
    assert bill.usd_per_mtok_output_decode_gpus == pytest.approx(0.63492, abs=5e-6)
    whole = (bill.usd_per_mtok_output_decode_gpus, bill.prefill_usd_per_hour / (14_000 * 3600) * 1e6)
    assert sum(whole) == pytest.approx(bill.usd_per_mtok_output)


def test_pools_of_two_gpus_have_two_prices() -> None:
    """20 GB200 at $4 and 8 H100 at $2: $96/h."""

    def mixed(raw: dict[str, Any]) -> None:
        raw |= {"prefill_hw": "gb200", "decode_hw": "h100"}

    from tokenfab.costing.imports import inferencex

    served = inferencex.read("x", changed(*POOLS[:1], mixed, POOLS[1]))
    assert (served.gpu, served.prefill_gpu) == ("h100", "gb200")
    bill = priced(completed_by(served, Given()))
    assert bill.usd_per_hour == pytest.approx(96)
    assert bill.usd_per_mtok_output == pytest.approx(96 / (14_000 * 3600) * 1e6)
    assert bill.usd_per_mtok_output_inferencex == pytest.approx(2 / (1750 * 3600) * 1e6)


def test_cheapest_first_and_a_missing_price_is_an_error() -> None:
    records = [record(name, index=index) for name, index in (("inferencex_agg_bmk.json", 0), POOLS)]
    found = bills(records, price_lookup(), None)
    assert [bill.served.num_gpus for bill in found] == [28, 8]
    with pytest.raises(ValueError, match="no rent_3yr price for l40s"):
        bills([replace(records[0], gpu="l40s")], price_lookup(), None)
    with pytest.raises(ValueError, match="usd_per_gpu_hour"):
        bills(records, price_lookup(-1.0), None)


def test_decode_is_the_step_at_the_operating_point(tables: Tables) -> None:
    """64 in flight on one TP8 replica: the price of that step, input + half the output cached."""
    served = replace(record("vllm_serve.json", VLLM), mean_in_flight=None)
    found = allow(served, tables, 2.9)
    assert found.decode_usd_per_mtok == pytest.approx(
        step_usd("deepseek-r1", "h200", "vllm", "tp8", 8, 2.9, context=1250)
    )
    assert (found.step.deployment.sequences, found.step.deployment.context) == (64, 1250)
    assert found.tokens_per_s == pytest.approx(64 / found.step.step_s)


def test_decode_of_a_pool_is_priced_on_its_own_gpus(tables: Tables) -> None:
    found = allow(record(*POOLS[:1], index=POOLS[1]), tables, 4.0)
    expected = step_usd("deepseek-r1", "gb200", "trtllm", "dp8-ep8", 64, 4.0, precision="nvfp4", context=8704)
    assert found.decode_usd_per_mtok == pytest.approx(expected)


@pytest.mark.parametrize(
    ("in_flight", "num_gpus", "parallel", "sequences"),
    [
        (64, 8, Parallel(8), 64),
        (64, 16, Parallel(8), 32),  # two replicas
        (60.2, 8, Parallel(1, 8, 8), 8),  # the fullest of eight groups
        (64.0000000001, 8, Parallel(1, 8, 8), 8),
        (3, 8, Parallel(1, 8, 8), 1),  # fewer than groups
        (30, 8, Parallel(2, 4, 8), 8),
    ],
)
def test_sequences_per_group(
    tables: Tables, in_flight: float, num_gpus: int, parallel: Parallel, sequences: int
) -> None:
    served = replace(record("vllm_serve.json", VLLM), mean_in_flight=in_flight, num_gpus=num_gpus, parallel=parallel)
    found = allow(served, tables)
    assert found.step.deployment.sequences == sequences
    assert found.tokens_per_s == pytest.approx(in_flight / found.step.step_s)
    assert found.decode_usd_per_mtok == pytest.approx(num_gpus / (in_flight / found.step.step_s * 3600) * 1e6)


def test_only_what_fits_decodes(tables: Tables) -> None:
    served = replace(record("vllm_serve.json", VLLM), mean_in_flight=50_000.0)
    found = allow(served, tables)
    most = largest_batch(load_model("deepseek-r1"), get_gpu("h200"), found.step.deployment)
    assert found.step.deployment.sequences == most
    assert found.tokens_per_s == pytest.approx(most / found.step.step_s)
    assert any(f"{most} of them fit" in note for note in found.notes)


def test_prefill_is_the_pass_on_the_pool_that_prefills(tables: Tables) -> None:
    """By hand: GPU-seconds of a prompt x $ per GPU-second / output tokens."""
    served = record(*POOLS[:1], index=POOLS[1])
    found = allow(served, tables, 4.0, 7.2)
    deployment = replace(
        found.step.deployment, gpus=4, attention_tp=1, expert_parallel=4, batch_per_gpu=1
    )  # fmt: skip
    one = prefill_time(
        tables.data, load_model("deepseek-r1"), get_gpu("gb200"), found.step.stack, deployment, new_tokens=8192,
        check_memory=False,
    )  # fmt: skip
    assert found.prefill is not None
    assert found.prefill.sequences == 1
    assert found.prefill_usd_per_mtok == pytest.approx(one.time_s * (7.2 / 3600) / 1024 * 1e6)


@pytest.mark.parametrize(("inputs", "in_flight", "prompts"), [(1000, 64, 8), (1000, 5, 5), (8192, 64, 1), (9000, 4, 1)])
def test_short_prompts_share_a_pass(tables: Tables, inputs: float, in_flight: float, prompts: int) -> None:
    served = replace(record("vllm_serve.json", VLLM), input_tokens_mean=inputs, mean_in_flight=in_flight)
    found = allow(served, tables, 3.6)
    assert found.prefill is not None
    assert found.prefill_usd_per_mtok is not None
    assert (found.prefill.sequences, found.prefill.new_tokens) == (prompts, inputs)
    gpu_s = 8 * found.prefill.time_s / prompts  # one group of all eight
    assert found.prefill_usd_per_mtok == pytest.approx(gpu_s * 1e-3 / 500 * 1e6)
    assert found.usd_per_mtok_output == found.decode_usd_per_mtok + found.prefill_usd_per_mtok


def test_a_prefill_pool_that_is_not_known_leaves_decode_alone(tables: Tables) -> None:
    given = replace(VLLM, num_gpus=12, prefill_gpus=4)
    found = allow(record("vllm_serve.json", given), tables)
    assert (found.prefill, found.prefill_usd_per_mtok) == (None, None)
    assert found.usd_per_mtok_output == found.decode_usd_per_mtok
    assert any("decode only" in note and "--prefill-parallel" in note for note in found.notes)
    known = allow(record("vllm_serve.json", replace(given, prefill_parallel=Parallel(4))), tables)
    assert known.prefill is not None
    assert known.prefill.deployment.attention_tp == 4
    assert known.decode_usd_per_mtok == found.decode_usd_per_mtok


@pytest.mark.parametrize(
    ("name", "given", "index"),
    [
        ("vllm_serve.json", VLLM, 0),
        ("vllm_append.jsonl", Given(model="deepseek-r1"), 1),
        ("sglang.jsonl", Given(gpu="h100"), 0),
        ("trtllm_bench.json", Given(), 0),
        ("profile_export_aiperf.json", Given(gpu="h200", num_gpus=2, parallel=Parallel(2), precision="bf16"), 0),
        ("inferencex_agg_bmk.json", Given(), 0),
        ("inferencex_agg_bmk.json", Given(), 1),
    ],
)
def test_the_split_adds_up(tables: Tables, name: str, given: Given, index: int) -> None:
    tables = replace(tables, stack="vllm") if name.startswith("profile") else tables
    (bill,) = bills([record(name, given, index)], price_lookup(), by(tables))
    found, served = bill.allowed, bill.usd_per_mtok_output
    assert bill.not_allowed is None
    assert found is not None
    assert bill.decode_gap_usd_per_mtok is not None
    assert bill.outside_decode_usd_per_mtok is not None
    assert bill.gap_usd_per_mtok is not None
    assert bill.times_allowed is not None
    parts = (found.decode_usd_per_mtok, bill.decode_gap_usd_per_mtok, bill.outside_decode_usd_per_mtok)
    assert sum(parts) == pytest.approx(served, rel=1e-12)
    assert bill.gap_usd_per_mtok + found.usd_per_mtok_output == pytest.approx(served, rel=1e-12)
    assert bill.times_allowed * found.usd_per_mtok_output == pytest.approx(served, rel=1e-12)
    assert sum(found.coverage().values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in found.coverage().values())
    assert found.prefill is not None


def test_the_decode_gap_by_hand(tables: Tables) -> None:
    """At a TPOT of the step itself there is no gap; at the step + 10 ms, 60 in flight on 8 x $3.60/h wait for it."""
    served = replace(record("vllm_serve.json", VLLM), mean_in_flight=60.0)
    step_s = allow(served, tables).step.step_s
    for more_s in (0.0, 0.010):
        assert served.tpot is not None
        slower = replace(served, tpot=replace(served.tpot, mean_s=step_s + more_s))
        (bill,) = bills([slower], price_lookup(3.6), by(tables))
        assert bill.decode_gap_usd_per_mtok == pytest.approx(8 * 1e-3 * more_s / 60 * 1e6, abs=1e-9)
    (bill,) = bills([replace(served, tpot=None)], price_lookup(3.6), by(tables))
    assert (bill.decode_gap_usd_per_mtok, bill.outside_decode_usd_per_mtok) == (None, None)
    assert bill.gap_usd_per_mtok is not None


def test_the_decode_gap_of_a_pool_is_on_its_own_gpus() -> None:
    """8 decode GPUs at $4, 512 in flight, 34.162 ms per token: $32/3600 x 34.162e-3 / 512 per token."""
    bill = priced(record(*POOLS[:1], index=POOLS[1]))
    assert bill.at_tpot_usd_per_mtok == pytest.approx(32 / 3600 * 34.162e-3 / 512 * 1e6)


def test_coverage_is_of_dollars(tables: Tables) -> None:
    found = allow(record("sglang.jsonl", Given(gpu="h100")), tables)
    assert found.prefill is not None
    decode, prefill = found.step.coverage(), found.prefill.coverage()
    assert abs(decode["interpolated"] - prefill["interpolated"]) > 0.02  # else the weights would not show
    part = found.decode_usd_per_mtok / found.usd_per_mtok_output
    for kind, share in found.coverage().items():
        assert share == pytest.approx(decode[kind] * part + prefill[kind] * (1 - part))


def test_drafts_are_verified_and_kept(tables: Tables) -> None:
    given = Given(model="deepseek-r1")
    served = replace(record("vllm_append.jsonl", given, 1), mean_in_flight=64.0)
    found = allow(served, tables, 2.9)
    options = {"precision": "fp8", "context": 2200, "tokens_per_step": 2, "kept_tokens": 1.85}
    assert found.decode_usd_per_mtok == pytest.approx(
        step_usd("deepseek-r1", "h200", "vllm", "dp8-ep8", 8, 2.9, **options)
    )


REASONS = [
    ({"known_model": None}, "model"),
    ({"gpu": "mi355x"}, "no published kernel times for mi355x"),
    ({"framework": "atom"}, "stack: no tables of 'atom'"),
    ({"precision": "int4"}, "precision: 'int4'"),
    ({"parallel": None, "parallel_note": "pp 2 is not in tokenfab's plan"}, "pp 2"),
    ({"mean_in_flight": None, "concurrency_limit": None, "estimated_in_flight": None}, "concurrency"),
    ({"speculative": True}, "--tokens-per-step and --kept-tokens"),
    ({"num_gpus": 1, "parallel": Parallel()}, "memory: deepseek-r1"),
    ({"parallel": Parallel(3)}, "attention_tp"),
    ({"input_tokens_mean": 200_000.0}, "context"),
]


@pytest.mark.parametrize(("change", "reason"), REASONS)
def test_what_the_kernels_cannot_say_is_said_and_the_served_price_stands(
    tables: Tables, change: dict[str, Any], reason: str
) -> None:
    served = replace(record("vllm_serve.json", VLLM), **change)
    (bill,) = bills([served], price_lookup(2.0), by(tables))
    assert bill.allowed is None
    assert reason in str(bill.not_allowed)
    assert bill.usd_per_mtok_output > 0
    assert (bill.gap_usd_per_mtok, bill.times_allowed, bill.decode_gap_usd_per_mtok) == (None, None, None)


def test_the_stack_is_the_servers_unless_asked(tables: Tables) -> None:
    served = record("inferencex_agg_bmk.json")
    assert str(allow(served, tables).step.stack).startswith("sglang")
    assert str(allow(served, replace(tables, stack="vllm")).step.stack).startswith("vllm")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["import", *arguments])


def path(name: str) -> str:
    return str(DATA / name)


def test_command_document() -> None:
    result = run(path("inferencex_agg_bmk.json"), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.output, parse_constant=pytest.fail)
    first, second = document["results"]
    assert first["usd_per_mtok_output_all_gpus"] < second["usd_per_mtok_output_all_gpus"]
    assert first["usd_per_mtok_output_all_gpus"] == pytest.approx(2.2222, abs=5e-5)
    assert first["served"]["prefill_gpus"] == 20
    assert first["served"]["stated"]["output_tput_per_gpu"] == 1750
    assert first["kernels_allow"]["precision"] == "nvfp4"
    assert sum(first["kernels_allow"]["coverage"].values()) == pytest.approx(1)
    assert second["served"]["parallel"] == "tp8"
    assert not any("prefill: every figure" in text for text in document["omitted"])
    assert document["refused"] == []


def test_command_for_people_names_denominators_and_operating_points() -> None:
    result = run(path("inferencex_agg_bmk.json"))
    text = " ".join(result.output.split())
    for phrase in (
        "over all GPUs", "input: prefill GPUs alone", "20 + 8 gb200", "8,192 / 1,024", "$/M out InferenceX", "2.222",
        "0.635", "divides output tokens by the 8 decode GPUs alone", "over all 28 they cost $2.222/M", "July 2026",
        "64 x 8704", "step per kept token", "left out of the kernels", "stated limit 512 over 8",
    ):  # fmt: skip
        assert phrase in text, phrase


def test_command_with_options_and_without_kernels() -> None:
    options = ("--gpu", "h200", "--num-gpus", "8")
    missing = run(path("vllm_serve.json"), *options)
    assert missing.exit_code == 2
    assert "precision: the file does not say; give --precision" in missing.output
    plain = run(path("vllm_serve.json"), *options, "--no-kernels", "--usd-per-gpu-hour", "1.8", "--json")
    (result,) = json.loads(plain.output)["results"]
    assert result["usd_per_mtok_output_all_gpus"] == pytest.approx(4.0)  # 8 x 1.80 / 3.6
    assert (result["kernels_allow"], result["no_kernels_figure"]) == (None, None)
    assert json.loads(plain.output)["omitted"] == []
    whole = run(path("vllm_serve.json"), *options, "--precision", "fp8", "--parallel", "tp8")
    assert "measured mean in flight" in whole.output
    assert "6.444" in whole.output
    conflict = run(path("trtllm_bench.json"), "--gpu", "h100")
    assert (conflict.exit_code, "the file says b200; --gpu says h100" in conflict.output) == (2, True)


def test_command_prices_several_tools_in_one_table() -> None:
    names = ("vllm_append.jsonl", "sglang.jsonl", "profile_export_aiperf_telemetry.json", "profile_export.jsonl")
    result = run(*map(path, names[:2]), "--gpu", "h200", "--no-kernels", "--json")
    assert result.exit_code == 0, result.output
    prices = [row["usd_per_mtok_output_all_gpus"] for row in json.loads(result.output)["results"]]
    assert len(prices) == 4
    assert prices == sorted(prices)
    more = run(*map(path, names[2:]), "--gpu", "h200", "--num-gpus", "2", "--no-kernels")
    assert more.exit_code == 0, more.output
    assert "read as aiperf: profile_export_aiperf_telemetry.json, profile_export.jsonl" in more.output
    assert "1 requests failed" in more.output


def test_command_leaves_out_refused_results_only_if_asked(tmp_path: Any) -> None:
    good = changed("inferencex_agg_bmk.json", lambda raw: None)
    bad = changed("inferencex_agg_bmk.json", lambda raw: set_at(raw, "isl", ...))
    file = str(write(tmp_path / "rows.jsonl", good, bad))
    refused = run(file)
    assert (refused.exit_code, "rows.jsonl:2" in refused.output, "isl" in refused.output) == (2, True, True)
    listed = run(file, "--skip-refused", "--no-kernels")
    assert listed.exit_code == 0
    assert "refused: " in listed.output
    only = run(str(write(tmp_path / "bad.json", bad)), "--skip-refused")
    assert (only.exit_code, "every result is refused" in only.output) == (2, True)


def test_failed_requests_and_a_price_below_the_kernels_are_said() -> None:
    result = run(path("vllm_append.jsonl"), "--model", "deepseek-r1", "--no-kernels")
    assert "2 requests failed: their tokens do not count, their time does" in result.output
    cheap = replace(record("vllm_serve.json", VLLM), output_tokens_per_s=9000.0, total_tokens_per_s=27_000.0)
    price = Price("h200", "stated", 1.0, None, "", "now", "given")
    from tokenfab.costing.imports import view

    tables = Tables(PublishedData(), RecordedData())
    (bill,) = bills([cheap], lambda gpu: price, by(tables))
    assert any("served for less than the tables allow" in line for line in view.notes([bill]))
