"""A step and its ops on a virtual clock: what they cost is known, so the sum and the gap are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenfab.bench import step_cases
from tokenfab.bench.cuda_device import TorchBuffers
from tokenfab.bench.decode_step import build_step
from tokenfab.bench.deployment import PRECISIONS
from tokenfab.bench.device import DeviceProperties, DeviceState, Replay
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.measurement import Settings
from tokenfab.bench.records import RecordStore
from tokenfab.bench.step_cases import appended_bytes, make_op_case, make_step_case, op_groups
from tokenfab.bench.step_measure import OMITTED, OpTime, StepResult, measure_step, step_point, time_ops
from tokenfab.bench.step_ops import StepOp
from tokenfab.bench.step_state import DecodeStep
from tokenfab.bench.timing import measure
from tokenfab.tests.bench.fake_device import FakeDevice, make_case
from tokenfab.tests.bench.step_models import deepseek, gpt_oss, qwen

H100 = get_gpu("h100")
FAST = Settings(min_warm_up_s=0.5, max_warm_up_s=0.6, budget_s=0.5, max_ci=0.05, energy_s=None)
COST_S = {"attention": 7e-3, "window_attention": 5e-3, "experts": 11e-3, "qkv_proj": 3e-3}
"""Of a launch; 1 ms of any other op."""

BETWEEN_S = 0.25e-3
"""Between two launches."""


class _Graph:
    """Calls of one launch each, over several sets with one output: the last one's result is what a launch leaves, and
    only that is computed; a replay only takes the time that the first was counted to take, times their number."""

    def __init__(self, device: Clock, calls: Sequence[Callable[[], None]]) -> None:
        self.device, self.calls = device, list(calls)
        what = getattr(self.calls[0], "func", None)  # the case's launch, the same in all captures
        if what not in device.costs_s:
            device.log.clear()
            self.calls[0]()
            between_s = BETWEEN_S * (len(device.log) - 1)
            device.costs_s[what] = sum(COST_S.get(name, 1e-3) for name in device.log) + between_s
        self.time_s = device.costs_s[what] * len(self.calls)

    def launch(self) -> None:
        self.calls[-1]()
        self.device.now_s += self.time_s

    def replay(self, in_flight: Callable[[], None] | None = None) -> Replay:
        if in_flight is not None:
            in_flight()
        self.device.now_s += 2 * self.time_s
        return Replay(self.time_s, 2 * self.time_s)


class Clock(TorchBuffers):
    """The CPU with a clock that advances by ``COST_S`` and ``BETWEEN_S``; ``log``: ops as they run."""

    def __init__(self, l2_bytes: int = 64) -> None:
        super().__init__()
        self.now_s, self.log, self.costs_s = 0.0, list[str](), dict[Any, float]()
        self.properties = DeviceProperties(
            name="NVIDIA H100 80GB HBM3", uuid="GPU-0", l2_bytes=l2_bytes, driver="1", cuda="1", torch="1", triton="1"
        )

    def capture(self, calls: Sequence[Callable[[], None]]) -> Any:
        return _Graph(self, calls)

    def synchronize(self) -> None: ...

    def wall_s(self) -> float:
        return self.now_s

    def state(self) -> DeviceState:
        return DeviceState(1.7e9, 0, 40.0, 300.0)

    def energy_j(self) -> float:
        return 300 * self.now_s

    def flush_l2(self) -> None: ...


def replace_run(step: DecodeStep, change: Callable[[StepOp], Callable[[Any], None]]) -> None:
    step.ops = [dataclasses.replace(op, run=change(op)) for op in step.ops]


def logged(device: Clock) -> Callable[[StepOp], Callable[[Any], None]]:
    def change(op: StepOp) -> Callable[[Any], None]:
        def run(weights: Any) -> None:
            device.log.append(op.name)
            op.run(weights)

        return run

    return change


@pytest.fixture
def clock(device: torch.device) -> Clock:
    if device.type != "cpu":
        pytest.skip("a virtual clock over the interpreter; a GPU has its own")
    return Clock()


def make(model: Any, precision: str, clock: Clock, **changes: Any) -> DecodeStep:
    options: dict[str, Any] = {"batch": 2, "length": 5, "page_size": 16, "is_plain": True} | changes
    step = build_step(model, PRECISIONS[precision], device="cpu", **options)
    replace_run(step, logged(clock))
    return step


def measured(step: DecodeStep, clock: Clock, **changes: Any) -> StepResult:
    return measure_step(step, clock, H100, settings=FAST, op_settings=FAST, **changes)  # type: ignore[arg-type]


# -- whole, sum and gap ----------------------------------------------------------------------------


def test_whole_sum_and_gap(clock: Clock, tmp_path: Path) -> None:
    step = make(gpt_oss(1), "mxfp4", clock, batch=1)
    store = RecordStore(tmp_path, "h100.jsonl")
    result = measured(step, clock, store=store)
    count = len(step.ops)
    sum_s = sum(COST_S.get(op.name, 1e-3) for op in step.ops)
    assert result.record.invalid == ()
    assert result.whole_s == pytest.approx(sum_s + BETWEEN_S * (count - 1))
    assert result.sum_s == pytest.approx(sum_s)
    assert result.gap_s == pytest.approx(BETWEEN_S * (count - 1))
    assert result.tokens_per_s_per_gpu == pytest.approx(1 / (sum_s + BETWEEN_S * (count - 1)))
    by_name = {op.name: op for op in result.ops}
    assert by_name["experts"].calls == 1
    assert by_name["experts"].time_s == pytest.approx(11e-3)
    assert by_name["window_attention"].time_s == pytest.approx(5e-3)
    assert sum(op.calls for op in result.ops) == count
    assert by_name["qkv_proj"].runs_on == "torch: addmm"
    assert by_name["qkv_proj"].l2_policy == "cold_weights"
    assert by_name["sampling"].l2_policy == "hot"
    assert result.omitted == OMITTED
    assert all(0 < op.floor_s < 1e-6 for op in result.ops)
    (record,) = store.records()
    assert record.point == step_point(step, H100, clock.properties)
    assert record.point.op == "decode_step"
    assert record.point.shape == {"batch": 1, "length": 5, "layers": 1, "distinct_layers": 1, "q_len": 1}
    assert record.point.formats["experts"] == "mxfp4"
    assert record.point.tile["model"] == "tiny-gpt-oss"
    assert record.time_s == result.whole_s
    check = record.measurement.check
    assert check is not None
    assert check.passed
    assert 0.01 < (check.before_error or 0) < 1  # against plain torch, not against itself alone


def test_inputs_are_as_before_when_ops_have_been_timed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(qwen(1), "fp8", clock)
    step.launch()
    kept = {"sampling", "embedding", "o_quantize", "attention_plan"}
    few = [group for group in op_groups(step) if group[0].name in kept]
    monkeypatch.setattr("tokenfab.bench.step_measure.op_groups", lambda step: few)
    timed = time_ops(step, clock, H100, FAST)  # type: ignore[arg-type]
    assert {op.name: op.time_s is not None for op in timed} == dict.fromkeys(kept, True)
    before = step.logits.clone()
    step.launch()
    assert torch.equal(step.logits, before)


def test_bytes_and_floors_count_what_a_step_reads(clock: Clock) -> None:
    step = make(qwen(1), "fp8", clock, batch=1, length=39)
    case = make_step_case(step, H100, 64)
    dense, each = 128 * (8 * 64 + 4 * 64), 3 * 64 * 128  # qkv and o; an expert, of which one token takes two
    values = dense + 2 * each
    scales = 4 * (4 + 2) + 2 * each * 4 / 128**2
    cached = 40 * 2 * 2 * 64
    norms = 2 * (128 + 128 + 128 + 64 + 64) + 4 * 64 + 8
    bf16 = 2 * 128 * (64 + 1 + 4)  # head, one row of the embedding, router
    assert case.weight_bytes == pytest.approx(values + scales + cached + norms + bf16, abs=8)
    attention = 4 * 40 * 4 * 64
    assert case.flops == 2 * values + 2 * 128 * (64 + 4) + attention
    slow, fast = H100.bf16_flops_per_s, H100.fp8_flops_per_s
    assert fast is not None
    assert case.compute_floor_s == pytest.approx((2 * values + attention) / fast + 2 * 128 * 68 / slow)


def test_repeated_layers_are_said(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = make(gpt_oss(), "bf16", clock, batch=1, is_plain=False)
    budget = sum(part.nbytes for part in sizes.ends.values()) + sizes.layers[0].num_bytes
    step = make(gpt_oss(), "bf16", clock, batch=1, max_weight_bytes=budget, is_plain=False)
    fake = FakeDevice(noise=0.0005)
    other = measure(make_case(fake), fake, l2_policy="hot", settings=Settings(energy_s=None))
    monkeypatch.setattr("tokenfab.bench.step_measure.measure", lambda *args, **options: other)
    result = measured(step, clock, has_ops=False)
    assert (result.layers, result.distinct_layers) == (2, 1)
    assert result.record.point.shape["distinct_layers"] == 1
    assert result.omitted == (*OMITTED, "weights: 1 of 2 layers have their own, the others use these")
    assert (result.ops, result.sum_s, result.gap_s) == ((), None, None)
    assert result.whole_s == other.time_s
    with pytest.raises(ValueError, match="model: expected a step whose own weights and caches are 5 x 1000000"):
        make_step_case(step, H100, 1_000_000)


def test_a_sum_without_one_of_its_ops_is_none(clock: Clock) -> None:
    timed = OpTime("experts", "tokenfab: moe_layer", 2, "hot", 3e-3, 1e-3)
    untimed = dataclasses.replace(timed, name="router", time_s=None, reasons=("too small",))
    result = StepResult("m", "fp8", 4, 5, 2, 2, 8e-3, 1e-3, (timed,), (), None)  # type: ignore[arg-type]
    assert (result.sum_s, result.gap_s) == (6e-3, pytest.approx(2e-3))
    assert dataclasses.replace(result, ops=(timed, untimed)).sum_s is None
    assert dataclasses.replace(result, ops=(timed, untimed)).gap_s is None
    assert dataclasses.replace(result, whole_s=None).gap_s is None


# -- what is wrong has no time ---------------------------------------------------------------------


def spoiled(step: DecodeStep, name: str, after: Callable[[StepOp], Any]) -> None:
    def change(op: StepOp) -> Callable[[Any], None]:
        def run(weights: Any) -> None:
            op.run(weights)
            if op.name == name:
                after(op)

        return run

    replace_run(step, change)


@pytest.mark.parametrize("fault", ["wrong", "weights"])
def test_a_wrong_step_has_no_time(clock: Clock, fault: str) -> None:
    step = make(qwen(1), "bf16", clock)
    if fault == "wrong":
        spoiled(step, "experts", lambda op: op.outputs["y"].mul_(1.2))
    else:
        spoiled(step, "final_norm", lambda op: op.weights["weight"].add_(1.0))
    result = measured(step, clock, has_ops=False)
    assert result.whole_s is None
    assert result.tokens_per_s_per_gpu is None
    assert any("error" in reason or "inputs changed" in reason for reason in result.record.invalid)


SKIPPED = [("lm_head", "not finite"), ("o_proj", "got nan"), ("sampling", "next_token is none")]


@pytest.mark.parametrize(("name", "message"), SKIPPED)
def test_a_launch_that_is_skipped_is_seen(clock: Clock, name: str, message: str) -> None:
    """What it left the last time would do, were it not poisoned."""
    step = make(qwen(1), "bf16", clock, is_plain=False)
    seen: set[tuple[int, ...]] = set()

    def change(op: StepOp) -> Callable[[Any], None]:
        def run(weights: Any) -> None:
            key = tuple(step.token_ids.tolist())
            if op.name == name and key in seen:
                return  # "cached"
            op.run(weights)
            seen.update({key} if op.name == name else ())

        return run

    replace_run(step, change)
    result = measured(step, clock, has_ops=False)
    assert result.whole_s is None
    assert message in result.record.invalid[0]


def test_an_op_that_differs_from_its_eager_launch_has_no_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(qwen(1), "fp8", clock)
    step.launch()
    (group,) = [group for group in op_groups(step) if group[0].name == "o_quantize"]
    runs = 0

    def run(weights: Any) -> None:
        nonlocal runs
        runs += 1
        group[0].run(weights)
        if runs % 2:
            group[0].outputs["data"].view(torch.uint8)[0, 0] ^= 1

    broken = [dataclasses.replace(group[0], run=run)]
    monkeypatch.setattr("tokenfab.bench.step_measure.op_groups", lambda step: [broken])
    (timed,) = time_ops(step, clock, H100, FAST)  # type: ignore[arg-type]
    assert timed.time_s is None
    assert "data differs from that of an eager launch" in timed.reasons[0]


# -- rings, and the token that a step appends ------------------------------------------------------


def test_an_ops_ring_is_what_the_layers_have_and_then_copies(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(qwen(2), "bf16", clock)
    step.launch()
    groups = {group[0].name: group for group in op_groups(step)}
    case, policy = make_op_case(step, groups["attention"], H100, 64)
    first, second, third = (case.make_weights(seed) for seed in range(3))
    assert policy == "cold_weights"
    assert first["pages"] is step.layers[0].cache.pages
    assert second["pages"] is step.layers[1].cache.pages
    assert second["page_table"] is not first["page_table"]  # the same in both layers: a set has its own
    assert torch.equal(third["pages"], first["pages"])
    assert third["pages"] is not first["pages"]
    step_cases.make_op_case(step, groups["embedding"], H100, 64)
    monkeypatch.setattr(step_cases, "MAX_COPIED_BYTES", 0)
    assert make_op_case(step, groups["embedding"], H100, 64)[1] == "hot"
    monkeypatch.setattr(step_cases, "MAX_RING", 1)
    assert make_op_case(step, groups["router"], H100, 64)[1] == "hot"


@pytest.mark.parametrize(("model", "precision"), [(qwen, "bf16"), (qwen, "fp8"), (deepseek, "fp8")])
def test_the_appended_token_and_no_other_is_left_out(clock: Clock, model: Any, precision: str) -> None:
    step = make(model(), precision, clock, is_plain=False)
    case = make_step_case(step, H100, 64)
    weights = case.make_weights(0)
    before = case.checksum(weights)
    cache = step.layers[0].cache
    page, place = divmod(int(step.slots[1]), 16)
    bytes_ = appended_bytes(cache, place)
    assert bytes_.numel() == cache.pages.shape[2] // 16
    kept = cache.pages.clone()
    cache.pages[page, 0, bytes_] ^= 1
    assert case.checksum(weights) == before
    assert not torch.equal(cache.pages, kept)  # put back as they were
    other = sorted(set(range(cache.pages.shape[2])) - set(bytes_.tolist()))[5]
    cache.pages[page, 0, other] ^= 1
    assert case.checksum(weights) != before
