"""What a cache saves, by hand and against passes of each request's own lengths; the command end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench.memory import kv_bytes_per_sequence, memory
from tokenfab.commands.routing import routing
from tokenfab.costing.study import Study, study
from tokenfab.costing.workload.routing import Pace, Router, simulate
from tokenfab.costing.workload.routing_saving import Prefiller, Saving, saving
from tokenfab.costing.workload.routing_view import compare, parse_cache_tokens, routing_lines
from tokenfab.costing.workload.synthetic import Mix, synthetic_requests, write_mooncake
from tokenfab.costing.workload.traces import open_trace, read_trace

SMALL = Mix(requests_per_s=3, applications=3, open_sessions=20, text_tokens=1500)


def saved(*given: Any) -> Saving:
    values: list[Any] = [np.array(each) if isinstance(each, list) else each for each in given]
    return saving(*values)


def plan(context: int, gpu: str = "h200", **more: Any) -> Study:
    return study("gpt-oss-120b", [gpu], ["vllm"], ["tp2"], [24], context=context, **more)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "chats.jsonl"
    write_mooncake(path, synthetic_requests(300, seed=8, mix=SMALL))
    return path


def test_saving_by_hand() -> None:
    """Two requests; 4 GPUs at $1.80: 0.002 $/s."""
    found = saved([5.0, 3.0], [2.0, 3.0], [0.5, 0.0], [1000, 600], [600, 0], [100, 300], 4, 1.8)
    assert found.usd_without == pytest.approx(0.016)
    assert found.usd_with == pytest.approx(0.011)
    assert found.usd == pytest.approx(0.005)
    assert found.share == pytest.approx(5 / 16)
    assert found.usd_per_mtok_input == pytest.approx(0.005 / 1600 * 1e6)
    assert found.usd_per_mtok_output == pytest.approx(0.005 / 400 * 1e6)
    assert found.prefill_usd_per_mtok_input == pytest.approx((10.0, 6.875))
    assert found.usd_per_mtok_new == pytest.approx(0.010 / 1000 * 1e6)
    assert found.usd_per_mtok_cached == pytest.approx(0.001 / 600 * 1e6)


def test_nothing_cached_saves_nothing() -> None:
    found = saved([5.0], [5.0], [0.0], [1000], [0], [100], 1, 2.0)
    assert (found.usd, found.share, found.usd_per_mtok_cached) == (0, 0, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({2: [0.0]}, "over_cached_s: .*never free"),
        ({2: [math.nan]}, "over_cached_s"),
        ({4: [0]}, "over_cached_s: .*0 elsewhere"),
        ({0: [0.0]}, "without_s: expected positive"),
        ({1: [math.inf]}, "new_s: expected positive"),
        ({5: [0]}, "outputs: expected positive"),
        ({4: [1000]}, "cached: expected 0 or more and fewer"),
        ({4: [-1]}, "cached: expected 0 or more"),
        ({3: [1000, 5]}, "saving: expected one value per request"),
        ({6: 0}, "gpus: expected a positive number; got 0"),
        ({7: -2.0}, "usd_per_gpu_hour: expected a positive number; got -2"),
        ({7: math.inf}, "usd_per_gpu_hour"),
    ],
)
def test_saving_refuses(change: dict[int, Any], words: str) -> None:
    given: list[Any] = [[5.0], [2.0], [0.5], [1000], [600], [100], 1, 2.0]
    for position, value in change.items():
        given[position] = value
    with pytest.raises(ValueError, match=words):
        saved(*given)


def test_against_a_pass_of_every_request(trace: Path) -> None:
    """Grids of lengths against passes of each request's own lengths; GPUs of the group, price, and never free."""
    requests = read_trace(trace)
    prefiller = Prefiller.of(plan(5000, usd_per_gpu_hour=3.0))
    (routed,) = simulate(open_trace(trace), [Router("sticky", 2, 400)])
    cached = routed.cached_tokens.astype(np.int64)
    (found,) = prefiller.savings(requests.input_tokens, requests.output_tokens, [cached])
    usd_per_s = 2 * 3.0 / 3600  # TP2: two GPUs prefill a prompt
    lengths = list(zip(requests.input_tokens.tolist(), cached.tolist(), strict=True))
    without = sum(prefiller.time(tokens, 0).time_s for tokens, _ in lengths) * usd_per_s
    passes = [prefiller.time(tokens - hit, hit) for tokens, hit in lengths]
    assert found.usd_without == pytest.approx(without, rel=0.02)
    assert found.usd_with == pytest.approx(sum(each.time_s for each in passes) * usd_per_s, rel=0.02)
    over = sum(each.cached_s for each in passes) * usd_per_s
    assert found.usd_over_cached == pytest.approx(over, rel=0.1)
    assert found.cached_tokens == int(cached.sum()) > 0.3 * found.input_tokens
    assert found.usd_per_mtok_cached is not None
    assert 0 < found.usd_per_mtok_cached < found.usd_per_mtok_new
    assert 0 < found.share < found.cached_tokens / found.input_tokens
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["modelled"] > 0


def test_longer_prefixes_cached_save_more_yet_each_costs(trace: Path) -> None:
    requests = read_trace(trace)
    prefiller = Prefiller.of(plan(5000))
    tokens = requests.input_tokens
    found = prefiller.savings(tokens, requests.output_tokens, [tokens * 0, tokens // 4, tokens // 2, tokens - 1])
    usd = [each.usd for each in found]
    assert usd[0] == pytest.approx(0, abs=1e-12)
    assert usd == sorted(usd)
    assert all(each.usd_over_cached > 0 for each in found[1:])
    assert found[-1].usd < found[-1].usd_without


def test_the_cache_is_what_memory_leaves() -> None:
    prefiller = Prefiller.of(plan(5000))
    model, deployment = prefiller.study.sweep.model, prefiller.step.step.deployment
    need = memory(model, prefiller.study.sweep.gpus[0], deployment)
    free = need.capacity_bytes - need.weights_bytes - need.reserve_bytes - need.kv_bytes
    more = kv_bytes_per_sequence(model, 5000, deployment.precision, 2) * prefiller.cache_tokens / 5000
    assert 0.999 * free < more <= free
    almost_full = replace(deployment, reserve_bytes=deployment.reserve_bytes + int(free) - 100)
    full = replace(prefiller, step=replace(prefiller.step, step=replace(prefiller.step.step, deployment=almost_full)))
    with pytest.raises(
        ValueError, match=r"cache: expected room for a block of 512 tokens beside 24 sequences.*; \d\d? fit in"
    ):
        _ = full.cache_tokens


def test_cache_in_bytes(trace: Path) -> None:
    found = compare(trace, ["sticky"], [4096], 4, cache_bytes=[2**30, 2**31], plan=plan)
    assert found.prefiller is not None
    deployment = found.prefiller.step.step.deployment
    model, context = found.prefiller.study.sweep.model, deployment.context
    per_token = kv_bytes_per_sequence(model, context, deployment.precision, 2) / context
    sizes = [each.router.cache_blocks for each in found.routed]
    assert sizes[0] == 8
    assert sizes[1:] == pytest.approx([2**30 / per_token / 512, 2**31 / per_token / 512], rel=1e-3)
    for size in (-1.0, 0.0, 1000.0, float("nan")):
        with pytest.raises(ValueError, match="cache"):
            compare(trace, ["sticky"], [], 4, cache_bytes=[size], plan=plan)
    with pytest.raises(ValueError, match="cache_bytes: expected a model and a GPU"):
        compare(trace, ["sticky"], [4096], 4, cache_bytes=[2**30])


def test_comparison(trace: Path) -> None:
    found = compare(trace, ["random", "sticky"], [4096, None], 4)
    assert [(each.router.policy, each.router.cache_blocks) for each in found.routed] == [
        ("random", 8), ("random", None), ("sticky", 8), ("sticky", None),
    ]  # fmt: skip
    assert found.savings == ()
    assert found.pace == Pace()
    assert any("DeepSeek's service, one 8-GPU H800 node" in text for text in routing_lines(found))
    priced = compare(trace, ["sticky"], [], 4, plan=plan)
    assert priced.prefiller is not None
    assert priced.routed[0].router.cache_blocks == priced.prefiller.cache_tokens // 512
    mean = round(float(read_trace(trace).input_tokens.mean()))
    assert priced.pace.prefill_tokens_per_s == pytest.approx(mean / priced.prefiller.time(mean, 0).time_s)
    assert priced.pace.tokens_per_s_per_user == priced.prefiller.step.tokens_per_s_per_user
    requests = read_trace(trace)
    workload = requests.workload(np.zeros_like(requests.input_tokens))
    assert priced.prefiller.step.step.deployment.context == workload.context


def test_cache_tokens() -> None:
    assert parse_cache_tokens("endless") is None
    assert parse_cache_tokens("512") == 512
    for text in ("511", "-5", "1e6", "", "inf", "nan"):
        with pytest.raises(ValueError, match="cache_tokens: expected at least the 512 of a block, or endless"):
            parse_cache_tokens(text)


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["routing", *map(str, arguments)])


def test_table(trace: Path) -> None:
    result = run(trace, "--cache-tokens", "20480,endless", "--policy", "random,kv_aware", "--replicas", 4)
    assert result.exit_code == 0, result.output
    for words in ("random", "kv_aware", "20,480", "endless", "of bound", "imbalance", "not counted: answers",
                  "cached over all input tokens", "blocks of 512 tokens"):  # fmt: skip
        assert words in result.output
    (routed,) = simulate(open_trace(trace), [Router("kv_aware", 4, 40)])
    assert f"{routed.hit_rate:.1%}" in result.output
    assert f"{routed.imbalance:.2f}" in result.output


def test_json_and_dollars(trace: Path) -> None:
    result = run(trace, "--model", "gpt-oss-120b", "--gpu", "h200", "--parallel", "tp2", "--batch", 24,
                 "--policy", "sticky,round_robin", "--replicas", 2, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["requests"], found["block_tokens"]) == (300, 512)
    assert "gpt-oss-120b on H200" in found["serving"]["operating_point"]
    for router in found["routers"]:
        dollars = router["saving"]
        before, after = (dollars[f"prefill_usd_per_mtok_input_{name}_cache"] for name in ("without", "with"))
        assert dollars["saved_usd_per_mtok_input"] == pytest.approx(before - after)
        assert before > after > 0
        assert 0 < dollars["usd_per_mtok_cached"] < dollars["usd_per_mtok_new"]
        assert dollars["saved_usd"] / found["output_tokens"] * 1e6 == pytest.approx(
            dollars["saved_usd_per_mtok_output"]
        )
        assert sum(router["requests_of"]) == 300
        assert 0 < router["hit_rate"] <= found["bound_hit_rate"]


def test_sizes_in_json(trace: Path) -> None:
    result = run(trace, "--cache-tokens", "20480,endless", "--policy", "kv_aware,sticky", "--seed", 3, "--json")
    found = json.loads(result.output)
    assert [each["cache_tokens"] for each in found["routers"]] == [20_480, None, 20_480, None]
    assert [each["prefill_weight"] for each in found["routers"]] == [1, 1, None, None]
    assert {(each["seed"], each["replicas"], each["saving"]) for each in found["routers"]} == {(3, 8, None)}
    assert found["serving"] is None


def test_dollars_in_the_table_name_their_tokens(trace: Path) -> None:
    result = run(trace, "--model", "gpt-oss-120b", "--gpu", "h200", "--parallel", "tp2", "--policy", "sticky")
    assert result.exit_code == 0, result.output
    for words in ("$/M input", "with cache", "$/M new", "$/M cached", "per million input tokens (cached or not)",
                  "always modelled", "a replica is one attention group", "sequences/GPU x"):  # fmt: skip
        assert words in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "cache_tokens: expected sizes of a cache, or a model and a GPU"),
        (["--cache-tokens", "100"], "cache_tokens: expected at least the 512"),
        (["--cache-tokens", "5000", "--policy", "best"], "policy: expected one of random"),
        (["--cache-tokens", "5000", "--policy", ""], "policy: expected at least one"),
        (["--cache-tokens", "5000", "--replicas", "0"], "replicas: expected 1 to 1024"),
        (["--cache-tokens", "5000", "--prefill-weight", "-1"], "prefill_weight: expected 0 or more"),
        (["--cache-tokens", "5000", "--tokens-per-s-per-user", "3"], "prefill_tokens_per_s: expected it and"),
        (["--cache-tokens", "5000", "--tokens-per-s-per-user", "3", "--prefill-tokens-per-s", "-1"],
         "prefill_tokens_per_s: expected a positive number; got -1"),
        (["--model", "gpt-oss-120b"], "model: expected --model and --gpu, or neither"),
        (["--cache-gib", "5"], "cache_bytes: expected a model and a GPU"),
        (["--gpu", "h200"], "model: expected --model and --gpu, or neither"),
        (["--model", "gpt-oss-120b", "--gpu", "h200", "--usd-per-gpu-hour", "-1"], "usd_per_gpu_hour"),
    ],
)  # fmt: skip
def test_one_line_for_bad_input(trace: Path, arguments: list[str], words: str) -> None:
    result = run(trace, *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_an_azure_trace_has_no_hit_rate(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    result = run(path, "--cache-tokens", 5000)
    assert result.exit_code == 2
    assert "unknown, which is not 0" in result.output


def test_help_names_every_policy() -> None:
    assert routing.help is not None
    result = run("--help")
    for words in ("Dynamo", "SGLang", "endless", "kv_aware,sticky"):
        assert words in result.output
