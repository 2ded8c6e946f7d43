"""``tokenfab request``: both denominators and all GPUs, as a table and as JSON; refusals in one line."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli

DAY = [
    "--input", "608000000000", "--cached", "342304000000", "--output", "168000000000", "--input-rate", "73700",
    "--output-rate", "14800", "--usd-per-gpu-hour", "2",
]  # fmt: skip
SERVED = [
    "deepseek-v3", "--gpu", "h200", "--stack", "sglang", "--parallel", "dp8-ep8", "--batch", "64", "--input", "4096",
    "--cached", "1024", "--output", "512",
]  # fmt: skip
TWO = [*SERVED, "--disaggregated", "--prefill-gpu", "h100", "--prefill-parallel", "dp32-ep32"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["request", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def document(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json"))


def test_the_day_given_its_rates_and_what_was_paid() -> None:
    paid = document(*DAY, "--paid-gpus", "1814", "--paid-hours", "24")
    assert paid["usd"] == pytest.approx(87_072, abs=1e-6)
    assert sum(paid["usd_of"].values()) == pytest.approx(paid["usd"], rel=1e-9)
    assert round(document(*DAY)["usd"], 2) == 87_115.61
    text = run(*DAY, "--paid-gpus", "1814", "--paid-hours", "24")
    assert "87,072.00" in text
    assert "$0.5183 per million output tokens, all GPUs paid" in text
    assert "$0.1122 per million tokens of input and output, all GPUs paid" in text
    assert "$0.3001 per million output tokens, decode GPUs only, which omits 42% of the bill" in text
    assert "0.727 prefill GPUs per decode GPU; 42.1% of GPUs prefill, 57.9% decode" in text
    assert "paid: 1,814 GPUs x 24 hours = 43,536 GPU-hours, shared out as the rates say, which ask for 43,558" in text
    assert (paid["utilisation"], paid["paid"]["gpu_hours"]) == (None, 43_536)


def test_one_pool_names_its_operating_point_and_every_denominator() -> None:
    text = run(*SERVED)
    for words in (
        "4,096 input tokens (1,024 of them cached) and 512 output tokens, one pool",
        "reading cached tokens",
        "deepseek-v3 on H200 SXM, sglang 0.5.14, fp8, load balanced: 8 GPUs, attention DP8, EP8, all-to-all (dp8-ep8)",
        "2 prompts of 3072 new tokens over 1024 cached per pass and attention group",
        "64 sequences/GPU x 4352 tokens",
        "of the time, ",
        "per million output tokens, all GPUs paid",
        "per million tokens of input and output, all GPUs paid",
        "per million new input tokens",
        "per million cached input tokens",
        "per million output tokens, decode GPUs only, which omits",
        "while at it: ",
        "left out: launch gaps",
    ):
        assert words in text, words


def test_two_pools_in_json() -> None:
    one, two = document(*SERVED), document(*TWO, "--requests-per-s", "100")
    assert (one["is_disaggregated"], two["is_disaggregated"]) == (False, True)
    prefill, decode = two["pools"]
    assert (prefill["pool"], prefill["usd_per_gpu_hour"], prefill["replica_gpus"]) == ("prefill", 2.0, 32)
    assert (decode["pool"], decode["usd_per_gpu_hour"], decode["replica_gpus"]) == ("decode", 2.9, 8)
    work = [sum(pool["gpu_s_of"].values()) for pool in two["pools"]]
    assert two["prefill_gpus_per_decode_gpu"] == pytest.approx(work[0] / work[1])
    assert two["usd"] == pytest.approx((work[0] * 2.0 + work[1] * 2.9) / 3600, rel=1e-12)
    assert two["usd_per_mtok_output"] == pytest.approx(two["usd"] / 512 * 1e6)
    assert two["usd_per_mtok_total"] == pytest.approx(two["usd"] / 4608 * 1e6)
    assert two["usd_per_mtok_output_decode_gpus_only"] == pytest.approx(work[1] * 2.9 / 3600 / 512 * 1e6)
    assert sum(two["usd_of"].values()) == pytest.approx(two["usd"], rel=1e-9)
    assert sum(two["coverage_of_usd"].values()) == pytest.approx(1)
    assert set(two["denominators"]) == {name for name in two if name.startswith("usd_per_mtok")}
    assert one["tokens_per_s_per_user"] < two["tokens_per_s_per_user"]
    (one_pass,) = two["prefill_passes"]
    assert (one_pass["gpu"], one_pass["parallel"], one_pass["prompts"]) == ("h100", "dp32-ep32", 2)
    assert two["first_token_s"] == pytest.approx(one_pass["time_s"] + two["hand_over_s"])
    assert (two["decode_step"]["gpu"], two["decode_step"]["context"], one["hand_over_s"]) == ("h200", 4352, 0)
    fleet = two["fleet"]
    assert fleet["gpus"] == {"prefill": 32 * fleet["replicas"]["prefill"], "decode": 8 * fleet["replicas"]["decode"]}
    assert fleet["usd_per_hour"] == pytest.approx(fleet["gpus"]["prefill"] * 2.0 + fleet["gpus"]["decode"] * 2.9)
    assert fleet["usd_per_mtok_output"] >= two["usd_per_mtok_output"]


def test_each_pool_has_its_own_price() -> None:
    found = document(*TWO, "--usd-per-gpu-hour", "3", "--prefill-usd-per-gpu-hour", "1")
    assert [pool["usd_per_gpu_hour"] for pool in found["pools"]] == [1.0, 3.0]
    work = [sum(pool["gpu_s_of"].values()) for pool in found["pools"]]
    assert found["usd"] == pytest.approx((work[0] + 3 * work[1]) / 3600)


def test_utilisation_price_and_drafts_go_through() -> None:
    full = document(*SERVED, "--usd-per-gpu-hour", "1")
    assert document(*SERVED, "--usd-per-gpu-hour", "3")["usd"] == pytest.approx(3 * full["usd"])
    assert document(*SERVED, "--usd-per-gpu-hour", "1", "--utilisation", "0.5")["usd"] == pytest.approx(2 * full["usd"])
    drafts = document(*SERVED, "--usd-per-gpu-hour", "1", "--tokens-per-step", "2", "--kept-tokens", "1.8")
    assert drafts["usd_of"]["prefill of new tokens"] == pytest.approx(full["usd_of"]["prefill of new tokens"])
    assert drafts["usd_of"]["decode"] < full["usd_of"]["decode"]
    assert "1.8 of 2 tokens kept per step" in drafts["pools"][0]["operating_point"]
    one_each = document(*SERVED, "--usd-per-gpu-hour", "1", "--token-budget", "3072")
    assert "1 prompt of 3072 new tokens" in one_each["pools"][0]["operating_point"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SERVED, "--cached", "4096"], "error: cached_tokens: expected fewer than the 4096 input tokens"),
        ([*SERVED, "--cached", "-1"], "error: cached_tokens: expected a whole number of at least 0; got -1"),
        ([*SERVED, "--output", "0"], "error: output_tokens: expected a whole number of at least 1; got 0"),
        ([*SERVED, "--utilisation", "1.2"], "error: utilisation: expected a share above 0 and up to 1; got 1.2"),
        ([*SERVED, "--usd-per-gpu-hour", "-2"], "error: usd_per_gpu_hour: expected a positive number; got -2.0"),
        ([*SERVED, "--kept-tokens", "0.5"], "error: kept_tokens_per_step: expected between 1 and"),
        ([*SERVED, "--requests-per-s", "0"], "error: requests_per_s: expected a positive number; got 0.0"),
        ([*SERVED, "--token-budget", "0"], "error: token_budget: expected a whole number of at least 1; got 0"),
        ([*SERVED, "--prefill-gpu", "h100"], "error: prefill_gpu: expected --disaggregated with it; got h100"),
        ([*SERVED, "--prefill-usd-per-gpu-hour", "1"], "error: prefill_usd_per_gpu_hour: expected --disaggregated"),
        ([*TWO, "--prefill-usd-per-gpu-hour", "-1"], "error: usd_per_gpu_hour: expected a positive number; got -1.0"),
        ([*SERVED, "--paid-gpus", "10"], "error: paid_gpus: expected --input-rate and --output-rate with it"),
        ([*SERVED, "--stack", "tokenfab"], "error: "),
        ([*SERVED, "--input", "200000"], "error: "),
        (["--input", "10", "--output", "1"], "error: model: expected MODEL and --gpu, or --input-rate and --output"),
        (["deepseek-v3", *DAY], "error: input_rate: expected given rates or MODEL and --gpu; got both"),
        ([*DAY[:-2]], "error: usd_per_gpu_hour: expected it with given rates; got none"),
        ([*DAY, "--output-rate", "0"], "error: output_tokens_per_s: expected a positive number; got 0"),
        (
            [*DAY, "--paid-gpus", "1814", "--paid-hours", "24", "--utilisation", "0.5"],
            "error: utilisation: expected none",
        ),
        ([*DAY, "--paid-gpus", "1000", "--paid-hours", "24"], "error: gpus: expected at least the 43,558 GPU-hours"),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["request", *arguments])
    assert result.exit_code == 2
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1


def test_examples_of_the_help_run() -> None:
    text = CliRunner().invoke(cli, ["request", "--help"]).output
    found = re.findall(r"^ +tokenfab request ((?:.*\\\n)*.*)", text, re.M)
    assert len(found) == 3
    for example in found:
        assert document(*shlex.split(example.replace("\\\n", " ")))["usd"] > 0
