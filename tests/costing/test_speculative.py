"""Speculative decoding: what a step with drafts is made of, what it costs, and beyond which batch it does not pay."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.__main__ import cli
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.memory import largest_batch
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import Gemm, MlaAttention
from tokenfab.bench.published import MODELLED, PublishedData
from tokenfab.bench.step_time import published_step
from tokenfab.costing.levers.acceptance import Acceptance
from tokenfab.costing.levers.break_even import BreakEven, last_false
from tokenfab.costing.levers.speculative import Drafter, Speculation
from tokenfab.costing.prices import stated_price

MODEL, H200 = load_model("deepseek-v3"), get_gpu("h200")
DP8 = Deployment(8, 1, 8, get_precision("fp8"), 1, 4096)
PRICE = stated_price("h200", 2.9)


def speculate(
    data: PublishedData, drafts: list[int], rate: float = 0.85, kind: str = "mtp", **more: Any
) -> Speculation:
    given = {"model": MODEL, "gpu": H200, "stack": "sglang", "deployment": DP8} | more
    stack = data.stack(given["gpu"], given["stack"])
    return Speculation(
        data, given["model"], given["gpu"], stack, given["deployment"], PRICE, Acceptance.of_rates([rate]), drafts, kind
    )


def test_a_step_is_its_verify_ops_and_one_layer_per_draft(published: PublishedData) -> None:
    found = speculate(published, [3])
    step = found.cost(3, 16).step
    verify = published_step(
        published, MODEL, H200, published.stack(H200, "sglang"),
        replace(DP8, batch_per_gpu=16, tokens_per_step=4, kept_tokens_per_step=3.0),
    )  # fmt: skip
    assert step.ops[: len(verify.ops)] == verify.ops
    drafted = {op.call.name: op for op in step.ops[len(verify.ops) :]}
    assert all(name.startswith("draft_") for name in drafted)
    # one MoE layer and one LM head, three times, at one token per sequence
    attention, projection = drafted["draft_attention"].call, drafted["draft_projection"].call
    assert attention.calls_per_step == 3
    assert isinstance(attention.op, MlaAttention)
    assert (attention.op.batch, attention.op.q_len) == (16, 1)
    assert projection.op == Gemm(16, 7168, 2 * 7168)
    assert drafted["draft_lm_head"].call.op == Gemm(16, 129280, 7168)
    assert drafted["draft_experts"].call.calls_per_step == 3
    assert "draft_dense_gate_up" not in drafted
    assert drafted["draft_norms"].call.op.bytes == 16 * 7168 * 2 * 4  # two vectors in, two out, BF16
    for op in drafted.values():
        stack = published.stack(H200, "sglang")
        if op.call.name != "draft_router_top_k":
            assert op.time_s == pytest.approx(
                op.call.calls_per_step * published.time(op.call.op, H200, stack).time_s, rel=1e-12
            )
        assert op.floor_s == pytest.approx(op.call.calls_per_step * op.call.op.floor_s(H200), rel=1e-12)


def test_dollars_and_rates_of_a_drafted_step(published: PublishedData) -> None:
    found = speculate(published, [1, 3])
    cost = found.cost(3, 16)
    kept = 1 + 0.85 + 0.85**2 + 0.85**3
    step_s = sum(op.time_s for op in cost.step.ops)
    assert cost.tokens_per_s_per_user == pytest.approx(kept / step_s, rel=1e-12)
    assert cost.usd_per_mtok_output == pytest.approx(2.9 * step_s / (kept * 16) / 3600 * 1e6, rel=1e-12)
    plain = found.cost(0, 16)
    assert plain.tokens_per_s_per_user == pytest.approx(1 / plain.step.step_s, rel=1e-12)
    assert {op.provenance for op in cost.step.ops if op.call.name == "attention"} == {MODELLED}
    assert {op.provenance for op in cost.step.ops if op.call.name == "draft_attention"} != {MODELLED}


def test_free_drafts_cost_the_verify_step_alone(published: PublishedData) -> None:
    free, paid = speculate(published, [2], kind="ngram"), speculate(published, [2])
    assert paid.cost(2, 8).step.ops[: len(free.cost(2, 8).step.ops)] == free.cost(2, 8).step.ops
    assert free.cost(2, 8).step.step_s < paid.cost(2, 8).step.step_s
    assert free.most(2) > paid.most(2)


def test_drafts_never_accepted_never_pay(published: PublishedData) -> None:
    found = speculate(published, [1], rate=0.0)
    (break_even,) = found.break_evens
    assert break_even.batch_per_gpu is None
    assert not break_even.is_never_dearer
    assert "cost more at every batch that fits" in break_even.describe()
    assert {point.best_drafts for point in found.points()} == {0}


def test_break_even_is_exact_to_one_sequence(published: PublishedData) -> None:
    found = speculate(published, [1, 3])
    one, three = found.break_evens
    assert one.batch_per_gpu is not None
    assert three.batch_per_gpu is not None
    assert three.batch_per_gpu < one.batch_per_gpu
    for each in (one, three):
        last = int(each.batch_per_gpu or 0)
        assert found.cost(each.drafts, last).usd_per_mtok_output <= found.cost(0, last).usd_per_mtok_output
        assert found.cost(each.drafts, last + 1).usd_per_mtok_output > found.cost(0, last + 1).usd_per_mtok_output
    # every batch beyond it up to what fits, one by one
    for sequences in range(int(one.batch_per_gpu) + 1, found.most(1) + 1):
        assert found.cost(1, sequences).usd_per_mtok_output > found.cost(0, sequences).usd_per_mtok_output
    for point in found.points([1, 16, 128, 256]):
        costs = {0: point.plain.usd_per_mtok_output}
        costs |= {drafts: cost.usd_per_mtok_output for drafts, cost in point.drafted.items()}
        assert costs[point.best_drafts] == min(costs.values())
    assert [point.best_drafts for point in found.points([1, 256])] == [3, 0]


@pytest.mark.parametrize(("kind", "drafts"), [("mtp", 3), ("ngram", 2), ("qwen3-30b-a3b", 1)])
@pytest.mark.parametrize("stack", ["vllm", "trtllm"])
def test_many_batches_are_timed_as_each_alone(published: PublishedData, kind: str, drafts: int, stack: str) -> None:
    found = speculate(published, [drafts], kind=kind, stack=stack)
    sequences = [1, 7, 64, 150]
    for asked in (0, drafts):
        assert found._seconds(asked, sequences) == pytest.approx(
            [found.cost(asked, each).step.step_s for each in sequences], rel=1e-12
        )


def test_never_within_what_fits_is_said(published: PublishedData) -> None:
    gpu = get_gpu("gb200")
    found = speculate(published, [1], gpu=gpu, stack="trtllm")
    (break_even,) = found.break_evens
    assert break_even.is_never_dearer
    assert break_even.batch_per_gpu is None
    assert break_even.describe() == f"1 draft: never cost more within what fits, {found.most(1)} sequences/GPU"


@given(st.integers(1, 30000), st.integers(0, 30000))
def test_last_false_of_a_single_change(most: int, last: int) -> None:
    found, first, crossings = last_false(lambda values: [value > last for value in values], most)
    assert found == min(last, most)
    assert (first == 0) == (last >= most)
    assert crossings == (1 if 0 < last < most else 0)


@given(st.lists(st.booleans(), min_size=1, max_size=500))
def test_last_false_of_any_curve(is_true: list[bool]) -> None:
    found, first, crossings = last_false(lambda values: [is_true[value - 1] for value in values], len(is_true))
    assert found == max((place + 1 for place, each in enumerate(is_true) if not each), default=0)
    assert first == min((place + 1 for place, each in enumerate(is_true) if each), default=0)
    assert crossings == sum(is_true[place] != is_true[place + 1] for place in range(len(is_true) - 1))


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (BreakEven(1, None, None, 64, 0), "1 draft: never cost more within what fits, 64 sequences/GPU"),
        (BreakEven(3, None, 1, 64, 0), "3 drafts: cost more at every batch that fits, 64 sequences/GPU at most"),
        (BreakEven(3, 16.5, 17, 64, 1), "3 drafts: cost more beyond 16.5 sequences/GPU"),
        (BreakEven(3, 16, 2, 64, 3), "3 drafts: cost more beyond 16 sequences/GPU (and in places from 2 on)"),
        (BreakEven(3, None, 8, 64, 2),
         "3 drafts: cost more in places from 8 on, but not at what fits, 64 sequences/GPU"),
    ],
)  # fmt: skip
def test_a_break_even_in_words(found: BreakEven, text: str) -> None:
    assert found.describe() == text
    assert found.is_never_dearer == ("never" in text)


def test_dearer_in_places_is_not_never(published: PublishedData) -> None:
    """gpt-oss-120b's window rows have a step: drafts cost more at some batches, and less again at the largest."""
    model, gpu = load_model("gpt-oss-120b"), get_gpu("h100")
    base = Deployment(1, 1, 1, get_precision("mxfp4"), 1, 4096)
    found = speculate(published, [3], 0.7, "ngram", model=model, gpu=gpu, stack="vllm", deployment=base)
    (each,) = found.break_evens
    dearer = [
        sequences for sequences in range(1, found.most(3) + 1)
        if found.cost(3, sequences).usd_per_mtok_output > found.cost(0, sequences).usd_per_mtok_output
    ]  # fmt: skip
    assert dearer
    assert each.first_dearer_per_gpu == dearer[0]
    assert not each.is_never_dearer
    assert (each.batch_per_gpu is None) == (dearer[-1] < found.most(3))


def test_memory_of_what_drafts_is_hand_counted(published: PublishedData) -> None:
    """DeepSeek-V3's MTP layer: 11.6e9 parameters of its own beside the shared embedding and head."""
    attention = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    experts = 256 * 3 * 7168 * 2048 + 3 * 7168 * 2048 + 256 * 7168 + 256
    projection = 2 * 7168 * 7168 + 2 * 7168
    total = attention + experts + 2 * 7168 + projection
    assert 11.5e9 < total < 11.7e9
    bf16 = Deployment(1, 1, 1, get_precision("bf16"), 1, 4096, tokens_per_step=3, kept_tokens_per_step=1.0)
    weights, cache = Drafter.of("mtp", MODEL, bf16.precision).bytes(bf16)
    assert weights == pytest.approx(2 * total, rel=1e-9)
    assert cache == (4096 + 3) * 576 * 2  # one layer's latent
    assert Drafter.of("ngram", MODEL, bf16.precision).bytes(bf16) == (0.0, 0.0)


def test_what_fits_beside_drafts_is_less(published: PublishedData) -> None:
    found = speculate(published, [1])
    verify = replace(DP8, tokens_per_step=2, kept_tokens_per_step=1.85)
    without = largest_batch(MODEL, H200, verify)
    weights, cache = Drafter.of("mtp", MODEL, DP8.precision).bytes(verify)
    per_sequence = 61 * 576 * 4098
    assert cache == 576 * 4098
    free = without * per_sequence
    # between the sequences that the draft's weights displace and one more, a layer's cache per sequence included
    assert found.most(1) == pytest.approx((free - weights) / (per_sequence + cache), abs=1.2)
    assert found.most(0) == largest_batch(MODEL, H200, DP8)


def test_another_model_drafts_whole(published: PublishedData) -> None:
    model, gpu = load_model("gpt-oss-120b"), get_gpu("h100")
    base = Deployment(2, 2, 1, get_precision("mxfp4"), 1, 4096)
    found = speculate(published, [2], kind="gpt-oss-20b", model=model, gpu=gpu, stack="vllm", deployment=base)
    step = found.cost(2, 8).step
    drafter = published_step(
        published, load_model("gpt-oss-20b"), gpu, published.stack(gpu, "vllm"), replace(base, batch_per_gpu=4)
    )
    drafting = sum(op.time_s for op in step.ops if op.call.name.startswith("draft_"))
    assert drafting == pytest.approx(2 * drafter.step_s, rel=1e-12)
    assert found.drafter.bytes(base)[0] > 5e9  # half of 12 GB of weights on each of two GPUs


@pytest.mark.parametrize(
    ("drafts", "message"),
    [([], "drafts: expected at least one"), ([0], "drafts: expected a whole number from 1"), ([2, 2], "different")],
)
def test_r28_absurd_drafts_are_named(published: PublishedData, drafts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speculate(published, drafts)


def test_what_does_not_fit_is_an_error(published: PublishedData) -> None:
    """DeepSeek-V3 on eight H100 does not fit at all; batches beyond memory neither."""
    with pytest.raises(ValueError, match="memory: deepseek-v3 in fp8 on 8 x h100 with"):
        speculate(published, [1], gpu=get_gpu("h100"))
    with pytest.raises(ValueError, match="memory: no batch fits"):
        speculate(published, [1]).points([4096])
    with pytest.raises(ValueError, match="batch: expected at least one"):
        speculate(published, [1]).points([])


def run(*args: str) -> Any:
    return CliRunner().invoke(cli, ["speculate", "deepseek-v3", "--gpu", "h200", "--stack", "sglang", *args])


def test_command_prints_table_and_document() -> None:
    result = run("--drafts", "1,3", "--acceptance-rate", "0.85", "--batch", "1,64")
    assert result.exit_code == 0, result.output
    for text in ("break-even, 1 draft: cost more beyond", "$/M output", "multi-token prediction", "left out:",
                 "per million output tokens of decode GPUs", "H200 SXM, sglang 0.5.14, fp8"):  # fmt: skip
        assert text in result.output
    result = run("--drafts", "1,3", "--acceptance-length", "1.79,2.49", "--batch", "1,64", "--json")
    document = json.loads(result.stdout)
    assert document["acceptance"]["kept_tokens_per_step"] == {"1": 1.79, "3": 2.49}
    assert [point["batch_per_gpu"] for point in document["points"]] == [1, 64]
    one = document["points"][0]["by_drafts"]["3"]
    assert one["tokens_per_s_per_user"] == pytest.approx(2.49 / one["step_s"])
    assert 0 < one["draft_share"] < 0.2
    assert sum(one["coverage"].values()) == pytest.approx(1)
    assert math.isfinite(document["break_even"][0]["largest_batch_per_gpu"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "acceptance: expected one of --acceptance-rate, --acceptance-length and --acceptance; got 0"),
        (("--acceptance-rate", "0.5", "--acceptance", "glm-5.2"), "and --acceptance; got 2"),
        (("--acceptance-length", "0.5"), "acceptance_length: expected 1 to 2 tokens with 1 draft; got 0.5"),
        (("--acceptance-rate", "1.5"), "acceptance_rate: expected a share between 0 and 1; got 1.5"),
        (("--acceptance-rate", ""), "acceptance: expected rates or lengths"),
        (("--acceptance-rate", "0.5", "--drafts", ""), "drafts: expected at least one"),
        (("--acceptance-rate", "0.5", "--batch", ""), "batch: expected at least one"),
        (("--acceptance-rate", "0.5", "--drafter", "no-such-model"), "no-such-model"),
        (("--acceptance-rate", "0.5", "--gpu", ""), "gpu: expected at least one"),
    ],
)
def test_r28_bad_input_is_one_line(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
