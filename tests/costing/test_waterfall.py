"""Waterfalls: factors multiply to the total, in any order; each against a count of its own."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import cache
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import Gpu, get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import Op
from tokenfab.bench.prefill_time import prefill_time
from tokenfab.bench.published import PublishedData
from tokenfab.bench.step_time import published_step
from tokenfab.costing.levers.acceptance import Acceptance
from tokenfab.costing.levers.speculative import Drafter, Speculation, most_sequences
from tokenfab.costing.levers.waterfall import SPLIT, changed_groups, waterfall
from tokenfab.costing.levers.waterfall_orders import (
    all_orders,
    order_text,
    ordered_waterfall,
    parse_order,
    possible_order,
)
from tokenfab.costing.levers.waterfall_point import GROUPS, Impossible, Point, Pricer
from tokenfab.costing.levers.waterfall_view import waterfall_document, waterfall_lines, waterfall_table
from tokenfab.costing.prices import PriceBook, stated_price
from tokenfab.costing.study import study
from tokenfab.costing.sweep import Parallel
from tokenfab.costing.workload.request_pools import predict
from tokenfab.costing.workload.serving import Request

BOOK = PriceBook.read()
MODEL = "qwen3-30b-a3b"


@cache
def pricer(model: str = MODEL) -> Pricer:
    return Pricer(load_model(model), PublishedData())


def point(gpu: str = "h100", parallel: str = "tp2", batch: float = 16, **more: object) -> Point:
    values: dict[str, object] = {
        "gpu": get_gpu(gpu), "stack": "vllm", "price": BOOK.look_up(gpu), "precision": get_precision("bf16"),
        "parallel": Parallel.parse(parallel), "batch_per_gpu": batch,
    }  # fmt: skip
    return Point(**(values | more))  # type: ignore[arg-type]


H200 = point(
    "h200", "dp8-ep8", 64, stack="sglang", precision=get_precision("fp8"),
    price=BOOK.look_up("h200", "own_hyperscaler", "2026-02"),
)  # fmt: skip
GB300 = point(
    "gb300", "dp8-ep8-ag", 256, stack="trtllm", precision=get_precision("nvfp4"), drafts=1, acceptance_length=1.8,
    price=BOOK.look_up("gb300", "own_hyperscaler", "2026-02"),
)  # fmt: skip
"""DeepSeek-R1's two ends, unlike in everything but the context."""

points = st.builds(
    lambda gpu, parallel, batch, stack, precision, price, context, drafts, kept, load: point(
        gpu, parallel, batch, stack=stack, precision=get_precision(precision), price=stated_price(gpu, price),
        context=context, drafts=drafts, acceptance_length=1 + drafts * kept, load=load,
    ),
    st.sampled_from(["h100", "h200", "b200"]), st.sampled_from(["tp1", "tp2", "tp4-ep4", "dp2-ep2", "dp4-ep4-ag"]),
    st.sampled_from([1, 8, 24, 40]), st.sampled_from(["vllm", "sglang", "trtllm"]), st.sampled_from(["bf16", "fp8"]),
    st.floats(0.1, 10), st.sampled_from([1024, 3000, 4096]), st.integers(0, 3), st.floats(0, 1),
    st.sampled_from(["balanced", "power_law_1.2"]),
)  # fmt: skip


requests = st.sampled_from(
    [None, Request(3000, 0, 500), Request(500, 100, 2000), Request(9000, 8000, 1), Request(20000, 500, 300)]
)
prefills = st.sampled_from([None, *map(Parallel.parse, ("tp1", "tp4", "dp2-ep2-ag"))])


def seconds_by_hand(at: Point, model: str = MODEL) -> tuple[float, float]:
    """GPU-seconds per output token: (decode, prefill), from what one replica does in a second or a pass."""
    data, config = pricer(model).data, load_model(model)

    def deployment(split: Parallel, batch: float) -> Deployment:
        return Deployment(
            split.gpus, split.attention_tp, split.expert_parallel, at.precision, batch, at.context, 1 + at.drafts,
            at.acceptance_length, load=at.load, exchange="all_gather" if split.all_gather else "all_to_all",
        )  # fmt: skip

    stack, decode = data.stack(at.gpu, at.stack), deployment(at.parallel, at.batch_per_gpu)
    ops = list(published_step(data, config, at.gpu, stack, decode).ops)
    if at.drafts:
        ops += Drafter.of(at.drafter, config, at.precision).ops(data, at.gpu, stack, decode, at.drafts)
    replica_tokens = decode.sequences * decode.attention_dp * at.acceptance_length
    decode_s = decode.gpus * sum(op.time_s for op in ops) / replica_tokens
    if at.request is None:
        return decode_s, 0.0
    split = at.prefill_parallel or at.parallel
    prompts = max(1, 8192 // at.request.new_tokens)
    start, passes_s = at.request.cached_tokens, 0.0
    while start < at.request.input_tokens:  # chunks of 8192 tokens, each over those before it
        new = min(8192, at.request.input_tokens - start)
        one = deployment(split, 1 / split.attention_tp)
        passed = prefill_time(
            data, config, at.gpu, stack, one, new_tokens=new, cached_tokens=start, sequences=prompts
        )  # fmt: skip
        passes_s, start = passes_s + passed.time_s, start + new
    return decode_s, split.gpus * passes_s / (prompts * split.attention_dp * at.request.output_tokens)


def usd_by_hand(at: Point, model: str = MODEL) -> float:
    return at.price.usd_per_gpu_hour * sum(seconds_by_hand(at, model)) / 3600 * 1e6


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(points, points, requests, prefills, prefills, st.randoms(use_true_random=False))
def test_factors_multiply_to_the_total_in_any_order(
    start: Point, end: Point, request: Request | None, prefill: Parallel | None, other: Parallel | None, random: Random
) -> None:
    start = replace(start, request=request, prefill_parallel=prefill if request else None)
    end = replace(end, request=request, prefill_parallel=other if request else None)
    order = [(group,) for group in changed_groups(start, end)]
    random.shuffle(order)
    found = waterfall(pricer(), start, end, order)
    assert found.product == pytest.approx(found.total, rel=1e-9)
    assert found.total == pytest.approx(usd_by_hand(end) / usd_by_hand(start), rel=1e-9)
    assert found.end.point == end
    assert set(found.unchanged) | {group for step in order for group in step} == set(GROUPS)
    at, usd = start, found.start.usd_per_mtok
    for step, after in zip(order, found.points, strict=True):
        at = replace(at, **{name: getattr(end, name) for name in GROUPS[step[0]]})
        assert after.point == at
        own = [f for f in found.factors if f.name == step[0] or (step[0] == "gpu" and f.name.startswith("gpu: "))]
        assert len(own) == (4 if step[0] == "gpu" else 1)
        assert own[0].usd_before == usd
        assert math.prod(f.factor for f in own) == pytest.approx(usd_by_hand(at) / usd, rel=1e-9)
        usd = own[-1].usd_after
    json.dumps(waterfall_document(found, all_orders(pricer(), found)), allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(points, st.floats(0.01, 100))
def test_a_price_is_exactly_its_ratio(start: Point, usd: float) -> None:
    end = replace(start, price=stated_price(start.gpu.name, usd))
    found = ordered_waterfall(pricer(), start, end)
    assert found.total == pytest.approx(usd / start.price.usd_per_gpu_hour, rel=1e-14)
    assert [factor.name for factor in found.factors] == ([] if end == start else ["price"])


def test_what_changes_nothing_is_exactly_one() -> None:
    start = point()
    same = ordered_waterfall(pricer(), start, start)
    assert same.factors == ()
    assert same.total == same.product == 1.0
    version = pricer().data.stack(get_gpu("h100"), "vllm").version
    other_name = replace(
        start, stack=f"vllm@{version}", price=replace(start.price, tier="own_neocloud"), batch_per_gpu=24
    )
    found = ordered_waterfall(pricer(), start, other_name)
    assert {f.name: f.factor for f in found.factors} | {"batch": 1.0} == {"price": 1.0, "stack": 1.0, "batch": 1.0}
    assert found.total != 1.0


def floor_by_hand(op: Op, gpu: Gpu, parts: tuple[Op, ...] = ()) -> float:
    if parts:
        return sum(floor_by_hand(part, gpu) for part in parts)
    times = [op.bytes / gpu.memory_bytes_per_s, op.link_s(gpu)]
    if op.flops:
        times.append(op.flops / getattr(gpu, f"{op.rate}_flops_per_s"))
    return max(times)


def test_the_gpu_is_split_by_the_roofline() -> None:
    start = replace(H200, batch_per_gpu=96, parallel=Parallel.parse("dp16-ep16"))  # over two domains, then in one
    end = replace(start, gpu=GB300.gpu)
    found = ordered_waterfall(pricer("deepseek-r1"), start, end)
    assert [f.name for f in found.factors] == [f"gpu: {name}" for name in SPLIT]
    assert [f.modelled for f in found.factors] == [True, True, True, False]
    old, new = start.gpu, end.gpu
    bandwidth = replace(old, memory_bytes_per_s=new.memory_bytes_per_s)
    compute = replace(
        bandwidth, bf16_flops_per_s=new.bf16_flops_per_s, fp8_flops_per_s=new.fp8_flops_per_s,
        fp4_flops_per_s=new.fp4_flops_per_s,
    )  # fmt: skip
    step = found.start.step
    times = [
        sum(
            op.time_s * floor_by_hand(op.call.op, gpu) / floor_by_hand(op.call.op, old) for op in step.ops
        ) for gpu in (old, bandwidth, compute, new)
    ]  # fmt: skip
    assert times[0] == pytest.approx(step.step_s)
    ratios = [after / before for before, after in itertools.pairwise(times)]
    assert [f.factor for f in found.factors[:3]] == pytest.approx(ratios, rel=1e-12)
    assert all(ratio < 0.99 for ratio in ratios)
    assert found.factors[3].factor == pytest.approx(found.end.step.step_s / times[3], rel=1e-12)


REQUEST = Request(4000, 1000, 500)


def test_drafts_are_priced_with_what_makes_them() -> None:
    """As ``speculate`` prices them, verify step and drafts; what makes drafts takes memory."""
    drafted = replace(H200, drafts=3, acceptance_length=2.9)
    priced = pricer("deepseek-r1")(drafted)
    data, config = pricer("deepseek-r1").data, load_model("deepseek-r1")
    kept = Acceptance.of_lengths([3], [2.9])
    stack = data.stack(drafted.gpu, "sglang")
    like = Speculation(data, config, drafted.gpu, stack, H200.deployment(), drafted.price, kept, [3]).cost(3, 64)
    assert priced.usd_per_mtok == pytest.approx(like.usd_per_mtok_output, rel=1e-12)
    assert priced.tokens_per_s_per_user == pytest.approx(like.tokens_per_s_per_user, rel=1e-12)
    plain = pricer("deepseek-r1")(replace(drafted, drafter="ngram"))
    assert plain.usd_per_mtok < priced.usd_per_mtok
    drafter = Drafter.of("mtp", config, drafted.precision)
    most = most_sequences(config, drafted.gpu, drafted.deployment(), drafter)
    pricer("deepseek-r1")(replace(drafted, batch_per_gpu=most))
    with pytest.raises(Impossible, match=f"with what makes drafts holds {most} sequences"):
        pricer("deepseek-r1")(replace(drafted, batch_per_gpu=most + 1))


@pytest.mark.parametrize("apart", [None, Parallel.parse("tp4"), Parallel.parse("dp2-ep2-ag")])
def test_all_gpus_are_paid_for(apart: Parallel | None) -> None:
    """At a load: requests x GPU-seconds of each pool are its GPUs; the dollars of all over all output tokens."""
    at = point(batch=24, request=REQUEST, prefill_parallel=apart)
    priced, requests_per_s = pricer()(at), 7.0
    decode_s, prefill_s = (each * REQUEST.output_tokens for each in seconds_by_hand(at))
    decode_gpus, prefill_gpus = requests_per_s * decode_s, requests_per_s * prefill_s
    assert prefill_gpus > 0.05 * decode_gpus
    usd_per_hour = at.price.usd_per_gpu_hour * (decode_gpus + prefill_gpus)
    tokens_per_hour = requests_per_s * REQUEST.output_tokens * 3600
    assert priced.usd_per_mtok == pytest.approx(usd_per_hour / tokens_per_hour * 1e6, rel=1e-12)
    assert priced.prefill_per_decode_gpu == pytest.approx(prefill_gpus / decode_gpus, rel=1e-9)
    assert priced.tokens_per_s_per_gpu == pytest.approx(tokens_per_hour / 3600 / (decode_gpus + prefill_gpus))
    alone = 1 / priced.step.step_s
    waits = alone if apart else alone * decode_s / (decode_s + prefill_s)
    assert priced.tokens_per_s_per_user == pytest.approx(waits, rel=1e-12)
    without = pricer()(replace(at, request=None, prefill_parallel=None))
    assert without.usd_per_mtok == pytest.approx(priced.usd_per_mtok * decode_s / (decode_s + prefill_s))
    assert without.denominator == "output tokens (decode GPUs only)"
    assert priced.denominator == "output tokens (prefill and decode GPUs)"
    assert any(each.startswith("prefill: ") for each in without.omitted)
    assert not any(each.startswith("prefill: ") for each in priced.omitted)
    assert sum(priced.coverage.values()) == pytest.approx(1)
    shares = {kind: 0.0 for kind in priced.coverage}
    assert priced.prefill is not None
    for kind in shares:
        shares[kind] += decode_s / (decode_s + prefill_s) * priced.step.coverage()[kind]
        shares[kind] += prefill_s / (decode_s + prefill_s) * priced.prefill.coverage()[kind]
    assert priced.coverage == pytest.approx(shares)
    assert priced.interval(pricer().data) is None
    assert without.interval(pricer().data) is not None


def test_disaggregation_is_a_change_like_another() -> None:
    start = point(batch=24, request=REQUEST)
    end = replace(start, prefill_parallel=Parallel.parse("tp1"), batch_per_gpu=40)
    found = ordered_waterfall(pricer(), start, end)
    assert [factor.name for factor in found.factors] == ["disaggregation", "batch"]
    assert found.factors[0].factor == pytest.approx(
        sum(seconds_by_hand(replace(end, batch_per_gpu=24))) / sum(seconds_by_hand(start)), rel=1e-9
    )
    same = replace(start, prefill_parallel=start.parallel)  # GPUs of their own, split alike: as dear, users wait less
    alike = ordered_waterfall(pricer(), start, same)
    assert [factor.factor for factor in alike.factors] == [1.0]
    assert alike.end.tokens_per_s_per_user > alike.start.tokens_per_s_per_user
    with pytest.raises(ValueError, match="request: expected input and output tokens at both ends, or at none"):
        ordered_waterfall(pricer(), point(), start)
    with pytest.raises(ValueError, match="request: expected input and output tokens with GPUs that prefill; got none"):
        point(prefill_parallel=Parallel.parse("tp1"))


def brute_force(start: Point, end: Point, groups: tuple[str, ...]) -> tuple[int, dict[str, list[float]]]:
    """Every order walked on its own: the factors of each change in those that can be."""
    factors: dict[str, list[float]] = {group: [] for group in groups}
    possible = 0
    for order in itertools.permutations(groups):
        try:
            found = waterfall(pricer("deepseek-r1"), start, end, [(group,) for group in order])
        except Impossible:
            continue
        possible += 1
        usd = [found.start.usd_per_mtok, *(each.usd_per_mtok for each in found.points)]
        for index, group in enumerate(order):
            factors[group].append(usd[index + 1] / usd[index])
    return possible, factors


@pytest.mark.parametrize("groups", [("gpu", "precision", "batch"), ("price", "gpu", "stack", "precision", "batch")])
def test_mean_over_orders_against_walking_each(groups: tuple[str, ...]) -> None:
    end = replace(H200, **{name: getattr(GB300, name) for group in groups for name in GROUPS[group]})
    possible, factors = brute_force(H200, end, groups)
    found = ordered_waterfall(pricer("deepseek-r1"), H200, end)
    orders = all_orders(pricer("deepseek-r1"), found)
    assert 0 < possible < math.factorial(len(groups))  # FP4 before the GPU cannot be
    assert (orders.possible, orders.all) == (possible, math.factorial(len(groups)))
    assert orders.points + len(orders.impossible) == 2 ** len(groups)
    assert all("h200 has no FP4 matrix units" in why or "GiB more than" in why for why in orders.impossible)
    for each in orders.softness:
        walked = factors[each.name]
        assert each.average == pytest.approx(math.exp(sum(map(math.log, walked)) / possible), rel=1e-9)
        assert (each.least, each.most) == pytest.approx((min(walked), max(walked)), rel=1e-12)
        assert each.least <= each.shown <= each.most
    assert math.prod(each.average for each in orders.softness) == pytest.approx(found.total, rel=1e-9)


def test_the_way_back_puts_precision_before_the_gpu() -> None:
    found = ordered_waterfall(pricer("deepseek-r1"), GB300, H200)
    order = [name for step in found.order for name in step]
    assert order.index("precision") < order.index("gpu")
    there = ordered_waterfall(pricer("deepseek-r1"), H200, GB300)
    assert found.total * there.total == pytest.approx(1, rel=1e-12)
    assert [name for step in there.order for name in step] == [
        name for name in GROUPS if name not in ("context", "disaggregation")
    ]


def test_an_order_that_cannot_be_names_one_that_can() -> None:
    with pytest.raises(Impossible) as caught:
        ordered_waterfall(pricer("deepseek-r1"), H200, GB300, "price,precision,gpu")
    message = str(caught.value)
    assert "order: precision: precision: nvfp4 is nvfp4 x nvfp4; h200 has no FP4 matrix units" in message
    works = message.rsplit("can be: ", 1)[1]
    found = ordered_waterfall(pricer("deepseek-r1"), H200, GB300, works)
    assert order_text(found.order) == works


def test_changes_that_can_only_be_made_at_once() -> None:
    """One sequence on eight GPUs is no whole number of dp8's; 192 with the KV heads doubled do not fit tp8."""
    start, end = (
        point(parallel=parallel, batch=batch, context=24576) for parallel, batch in (("tp8", 0.125), ("dp8-ep8", 24))
    )
    assert changed_groups(start, end) == ("parallel", "batch")
    assert possible_order(pricer(), start, end, (("parallel",), ("batch",))) is None
    with pytest.raises(Impossible, match=r"no order of parallel,batch can be; .* --order parallel\+batch$"):
        ordered_waterfall(pricer(), start, end)
    together = ordered_waterfall(pricer(), start, end, "parallel+batch")
    assert [factor.name for factor in together.factors] == ["parallel+batch"]
    assert together.factors[0].change_from == "tp8 (8 GPUs, in a domain of 8); 0.125 sequences/GPU"
    assert together.total == pytest.approx(usd_by_hand(end) / usd_by_hand(start), rel=1e-12)
    longer = replace(end, context=8192)  # here the batch fits tp8 before the split, at the shorter context
    found = ordered_waterfall(pricer(), start, longer)
    assert order_text(found.order) == "context,batch,parallel"
    orders = all_orders(pricer(), found)  # parallel and batch alone can be, but no order comes through them
    assert (orders.possible, orders.all, orders.points) == (1, 6, 5)
    for each in orders.softness:
        assert each.least == each.most == each.shown == pytest.approx(each.average, rel=1e-12)
    with pytest.raises(Impossible, match="batch_per_gpu: expected a whole number of sequences"):
        ordered_waterfall(pricer(), start, replace(end, batch_per_gpu=0.5))  # an end that cannot be


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("price,speed", "order: expected some of price, gpu, .*; got 'speed'"),
        ("gpu,stack", "order: expected what changes .*; got 'stack'"),
        ("gpu,price,gpu", "order: expected every name once; got 'gpu' twice"),
        ("gpu,,price", "order: expected some of .*; got ''"),
    ],
)
def test_orders_that_are_none(text: str, message: str) -> None:
    end = replace(point(), gpu=get_gpu("h200"), price=BOOK.look_up("h200"))
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_order(text, point(), end)
    with pytest.raises(ValueError, match="order: expected each of price, gpu once; got gpu"):
        waterfall(pricer(), point(), end, [("gpu",)])
    assert parse_order("gpu", point(), end) == (("gpu",), ("price",))
    assert parse_order(None, point(), end) == (("price",), ("gpu",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drafts": -1}, "drafts: expected a whole number of 0 or more; got -1"),
        ({"drafts": 1.5}, "drafts: expected a whole number of 0 or more; got 1.5"),
        ({"drafts": 1, "acceptance_length": 2.5}, r"acceptance_length: expected 1 to 2 \(1 \+ drafts\); got 2.5"),
        ({"drafts": 1, "acceptance_length": 0.9}, "acceptance_length: expected 1 to 2"),
        ({"acceptance_length": math.nan}, "acceptance_length: expected 1 to 1"),
        ({"acceptance_length": 1.5}, "acceptance_length: expected 1 to 1"),
    ],
)
def test_r28_absurd_points_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(point(), **values)


def test_provenance_order_and_operating_points_are_shown() -> None:
    found = ordered_waterfall(pricer("deepseek-r1"), H200, GB300)
    orders = all_orders(pricer("deepseek-r1"), found)
    for factor, after in zip(found.factors[4:], found.points[1:], strict=False):
        assert factor.coverage_after == after.coverage
    assert found.factors[0].coverage_before == found.start.coverage == pytest.approx(found.start.step.coverage())
    lines = "\n".join(waterfall_lines(found, orders, (), (20.0, 40.0)))
    for part in (
        "from: deepseek-r1 on H200 SXM, sglang 0.5.14, fp8 (KV fp8), 8 GPUs, attention DP8, EP8, all-to-all, 64 "
        "sequences/GPU, 4096 tokens of context, balanced load, no drafts, decode GPUs only",
        "attention DP8, EP8, all-gather, 256 sequences/GPU, 4096 tokens of context, balanced load, 1 mtp draft, 1.8",
        "from the cheapest at >= 20 tokens/s/user, to the cheapest at >= 40 tokens/s/user",
        "price $2.652/GPU-h: own_hyperscaler, 2026-02-01: SemiAnalysis InferenceX",
        "placeholder in the source",
        "times cheaper, at these two operating points",
        "order: price,gpu,stack,precision,parallel,drafts,batch",
        "the same at both ends: decode GPUs only; 4096 tokens of context, balanced load",
        "drafting: the first pass also appends",
    ):  # fmt: skip
        assert part in lines
    back = ordered_waterfall(pricer("deepseek-r1"), GB300, H200)
    (total,) = [line for line in waterfall_lines(back, all_orders(pricer("deepseek-r1"), back)) if "total: " in line]
    assert f"{back.total:.3g} times dearer" in total
    assert back.total > 1
    assert "each the cheapest found at its given batch" in total
    assert waterfall_table(found, orders).row_count == len(found.factors) + 1  # the GPU's four once more, together
    document = waterfall_document(found, orders, (), (20.0, None))
    assert math.prod(row["ratio"] for row in document["factors"]) == pytest.approx(document["ratio"], rel=1e-9)
    assert document["factors"][-1]["cumulative"] == pytest.approx(document["ratio"], rel=1e-9)
    assert document["times_cheaper"] * document["ratio"] == pytest.approx(1)
    assert document["from_min_tokens_per_s_per_user"] == 20.0
    assert document["to_min_tokens_per_s_per_user"] is None


@pytest.mark.parametrize("apart", [None, "dp2-ep2-ag"])
def test_a_request_costs_what_the_request_command_says(apart: str | None) -> None:
    """The same pools through another door: ``request_pools.predict``."""
    lengths, split = Request(20000, 2000, 300), "tp2"
    at = point(parallel=split, batch=8, context=lengths.context, request=lengths)
    at = replace(at, prefill_parallel=Parallel.parse(apart) if apart else None)
    priced = pricer()(at)
    decode, prefill = (
        study(MODEL, ["h100"], ["vllm"], [each], [8], precision="bf16", context=lengths.context)
        for each in (split, apart or split)
    )
    said = predict(decode, prefill if apart else None, lengths)
    assert priced.usd_per_mtok == pytest.approx(said.serving.bill.usd_per_mtok_output, rel=1e-9)
    total = said.serving.bill.usd_per_mtok_total
    assert priced.usd_per_mtok_total == pytest.approx(total, rel=1e-9)
    found = ordered_waterfall(pricer(), at, at)
    lines = "\n".join(waterfall_lines(found, all_orders(pricer(), found)))
    assert f"${total:.4g}/M of input and output tokens" in lines
    assert priced.tokens_per_s_per_user == pytest.approx(said.tokens_per_s_per_user, rel=1e-9)
    assert priced.prefill_per_decode_gpu == pytest.approx(said.serving.prefill_gpus_per_decode_gpu, rel=1e-9)
    assert priced.prefill is not None
    assert len(priced.prefill.passes) == 3
