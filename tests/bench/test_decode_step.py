"""A decode step against plain torch, per model and precision; what must be seen when a part of it is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.bench import step_ops, step_weights
from tokenfab.bench.decode_step import build_step
from tokenfab.bench.deployment import PRECISIONS
from tokenfab.bench.models import load_model
from tokenfab.bench.step_cases import layer_tolerance
from tokenfab.bench.step_layers import lay_out
from tokenfab.bench.step_model import StepModel
from tokenfab.bench.step_reference import check_layers, reference_logits
from tokenfab.bench.step_state import DecodeStep
from tokenfab.bench.step_weights import LayerWeights, RandomSource, check_step, fit_layers, kind_of
from tokenfab.tests.bench.step_models import deepseek, gpt_oss, qwen

CASES = [
    (qwen, "nvfp4"), (gpt_oss, "mxfp4"), (gpt_oss, "mxfp4_mxfp8"), (gpt_oss, "fp8"), (deepseek, "bf16"),
    (deepseek, "fp8"),
]  # fmt: skip
LENGTHS = (0, 17, 40)
"""Cached tokens: none, beyond a page of 16 and gpt-oss's window, on several pages."""


def make(model: StepModel, precision: str, device: Any, **changes: Any) -> DecodeStep:
    options: dict[str, Any] = {"batch": 3, "length": 40, "page_size": 16, "is_plain": True} | changes
    step = build_step(model, PRECISIONS[precision], device=device, **options)
    step.token_ids.copy_(torch.tensor([7, 0, 33][: step.batch]))
    return step


def worst(step: DecodeStep) -> float:
    """The largest of ``check_layers`` as a share of its limit, buffers poisoned before."""
    step.poison()
    return max(check_layers(step, step.launch_with_streams())) / layer_tolerance(step)


def supported(precision: str, device: torch.device) -> None:
    if precision == "nvfp4" and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 10:
        pytest.skip("NVFP4 linear layers need compute capability 10")


# -- right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "precision"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_every_layer_and_the_logits_are_those_of_plain_torch(model: Any, precision: str, device: torch.device) -> None:
    supported(precision, device)
    step = make(model(), precision, device)
    step.seek(LENGTHS)
    assert worst(step) < 1
    logits = step.logits.clone()
    assert torch.equal(step.next_token, logits.argmax(dim=1))
    step.poison()
    step.launch()
    assert torch.equal(step.logits, logits)  # the token is appended where it already stands


@pytest.mark.parametrize("model", [qwen, deepseek])
def test_logits_from_token_ids_on(model: Any, device: torch.device) -> None:
    step = make(model(), "bf16", device)
    step.seek(LENGTHS)
    step.launch()
    expected = reference_logits(step)
    assert (step.logits.double() - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


def test_qwen_in_fp8(device: torch.device) -> None:
    assert worst(make(qwen(1), "fp8", device)) < 1


def test_without_q_lora(device: torch.device) -> None:
    assert worst(make(deepseek(None), "bf16", device, batch=1, length=5)) < 1


def test_the_next_token_may_be_fed_back(device: torch.device) -> None:
    """What one step appends the next one reads."""
    step = make(gpt_oss(), "bf16", device, batch=2, length=15, capacity=20)
    step.launch()
    step.token_ids.copy_(step.next_token)
    step.seek(16)
    assert worst(step) < 1
    pages = step.layers[0].cache.pages.clone()
    step.token_ids.add_(1).remainder_(64)
    step.launch()
    assert not torch.equal(step.layers[0].cache.pages, pages)  # another token in the same place


def test_every_op_says_whose_it_is(device: torch.device) -> None:
    step = make(gpt_oss(), "fp8", device, batch=1, length=3)
    runs_on = {op.name: op.runs_on for op in step.ops}
    by_torch = {name for name, function in runs_on.items() if function.startswith("torch: ")}
    assert by_torch == {"embedding", "router", "lm_head", "sampling", "qkv_proj_bias", "o_proj_bias"}
    assert all(function.startswith("tokenfab: ") for name, function in runs_on.items() if name not in by_torch)
    assert [op.name for op in step.ops].count("attention_plan") == 1  # of all layers with that window
    first = {op.name for op in step.ops if op.layer == 0}
    assert "window_attention" in first
    assert "attention" not in first


def test_real_models_come_with_their_layers_in_order() -> None:
    from tokenfab.bench.step_model import load_step_model, step_model_of

    windows = [getattr(layer.attention, "window", 0) for layer in load_step_model("gpt-oss-20b").layers]
    assert windows == [128, None] * 12
    experts = [hasattr(layer.ffn, "num_experts") for layer in step_model_of(load_model("deepseek-v3")).layers]
    assert experts == [False] * 3 + [True] * 58
    with pytest.raises(ValueError, match="model: expected a shipped model, or a StepModel; got tiny-deepseek"):
        step_model_of(deepseek().config)
    assert step_model_of(qwen().config).layers == qwen().layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_graph_replays_the_step(device: torch.device) -> None:
    step = make(gpt_oss(), "mxfp4", device)
    step.launch()
    eager = step.logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.launch()
    step.poison()
    graph.replay()
    assert torch.equal(step.logits, eager)
    step.token_ids.add_(1)
    graph.replay()
    replayed = step.logits.clone()
    step.launch()
    assert torch.equal(step.logits, replayed)
    assert not torch.equal(replayed, eager)


# -- wrong -----------------------------------------------------------------------------------------


def test_layers_in_another_order_are_seen(device: torch.device) -> None:
    step = make(qwen(), "bf16", device, batch=2)
    step.layers.reverse()  # of the reference: the launches keep theirs
    assert worst(step) > 5


def test_a_lost_residual_is_seen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_ops.rms_norm_quantize

    def lost(x: Any, *args: Any, residual: Any = None, **options: Any) -> Any:
        return right(x, *args, residual=None if residual is None else torch.zeros_like(residual), **options)

    monkeypatch.setattr(step_ops, "rms_norm_quantize", lost)
    assert worst(make(qwen(), "bf16", device, batch=2)) > 5


ROPES = [(gpt_oss, "append_kv", "interleaved"), (deepseek, "append_mla", "half")]


@pytest.mark.parametrize(("model", "name", "style"), ROPES)
def test_rope_of_other_pairs_is_seen(
    model: Any, name: str, style: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(step_ops, name)
    monkeypatch.setattr(step_ops, name, lambda *args, **options: right(*args, **options, style=style))
    assert worst(make(model(), "bf16", device, batch=2)) > 2


def test_a_missing_sink_is_seen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_ops.paged_attention
    monkeypatch.setattr(step_ops, "paged_attention", lambda *args, **options: right(*args, **options | {"sinks": None}))
    assert worst(make(gpt_oss(), "bf16", device, batch=2)) > 2


def test_windows_of_other_layers_are_seen(device: torch.device) -> None:
    step = make(gpt_oss(), "bf16", device, batch=2)
    step.model = StepModel(step.model.config, step.model.layers[::-1], step.model.numerics)
    assert worst(step) > 2


def test_a_wrong_norm_of_keys_is_seen(device: torch.device) -> None:
    step = make(qwen(), "bf16", device, batch=2)
    for layer in step.layers:
        norms = layer.tensors["q_norm"], layer.tensors["k_norm"]
        layer.tensors["q_norm"], layer.tensors["k_norm"] = norms[::-1]
    assert worst(step) > 2


# -- as many layers as fit -------------------------------------------------------------------------


def test_layers_repeat_where_not_all_fit(device: torch.device) -> None:
    whole = make(qwen(3), "bf16", device, batch=2, length=5)
    ends = sum(part.nbytes for part in whole.ends.values())
    step = make(qwen(3), "bf16", device, batch=2, length=5, max_weight_bytes=ends + 2 * whole.layers[0].num_bytes)
    assert (whole.distinct_layers, step.distinct_layers, step.num_layers) == (3, 2, 3)
    assert step.layers[2] is step.layers[0]
    assert worst(step) < 1
    step.layers[2] = step.layers[1]
    assert worst(step) > 5


class _Sized:
    num_bytes = 10


@pytest.mark.parametrize(
    ("kinds", "budget", "own", "uses"),
    [
        ("mmmmm", 25, [0, 1], [0, 1, 0, 1, 0]),
        ("mmmmm", 1000, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ("ddmmmm", 40, [0, 1, 2, 3], [0, 1, 2, 3, 2, 3]),
        ("ddmmmm", 20, [0, 2], [0, 0, 2, 2, 2, 2]),
        ("dmmdmm", 39, [0, 1, 2], [0, 1, 2, 0, 1, 2]),
    ],
)
def test_each_kind_goes_round_its_own(kinds: str, budget: int, own: list[int], uses: list[int]) -> None:
    layers = list(deepseek(layers=kinds).layers)
    made: Any = lambda index: _Sized()  # noqa: E731
    fitted, used = fit_layers(layers, made, budget)
    assert (sorted(fitted), used) == (own, uses)


def test_windows_are_one_kind_and_a_budget_for_none_is_refused() -> None:
    sliding, full = gpt_oss().layers
    assert kind_of(sliding) == kind_of(full)
    made: Any = lambda index: _Sized()  # noqa: E731
    with pytest.raises(ValueError, match="max_weight_bytes: expected at least 20 for one layer of each kind; got 19"):
        fit_layers(list(deepseek().layers), made, 19)


# -- weights ---------------------------------------------------------------------------------------


def test_random_weights_are_seeded_and_spread_tokens_over_experts(device: torch.device) -> None:
    source = RandomSource(3, device)
    matrix = source.tensor(1, "qkv", (64, 256))
    assert torch.equal(matrix, source.tensor(1, "qkv", (64, 256)))
    assert not torch.equal(matrix, source.tensor(2, "qkv", (64, 256)))
    assert not torch.equal(matrix, RandomSource(4, device).tensor(1, "qkv", (64, 256)))
    assert float(matrix.float().std()) == pytest.approx(1 / 16, rel=0.05)
    step = make(qwen(1), "bf16", device, batch=3, length=0)
    step.launch()
    x, logits = step.operands["ffn_normx128xbf16"].data, step.buffers["router_logitsx3x4"]
    assert 0.4 < float(x.float().std()) < 2.5
    assert 0.3 < float(logits.float().std()) < 3
    assert len(set(logits.topk(2, dim=1).indices.sort(dim=1).values.flatten().tolist())) > 2


def test_bytes_of_a_layer_are_what_its_formats_say(device: torch.device) -> None:
    sizes = {}
    for precision in ("bf16", "fp8"):
        layer: LayerWeights = make(qwen(1), precision, device, batch=1, length=15, is_plain=False).layers[0]
        sizes[precision] = layer.num_bytes
        assert layer.plain == {}
    matrices = 128 * (8 * 64 + 4 * 64) + 4 * 3 * 64 * 128  # qkv, o, experts
    others = 2 * (128 + 128 + 64 + 64 + 4 * 128)
    cache = 16 * 2 * 2 * 64
    assert sizes["bf16"] == 2 * matrices + others + 2 * cache
    assert matrices + others + cache < sizes["fp8"] < 1.01 * (matrices + others + cache)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch: expected 1 to 4096; got 0"),
        ({"length": 8, "capacity": 8}, "length: expected 0 to 7, below the capacity; got 8"),
        ({"capacity": 300}, "capacity: expected at most tiny-qwen's 256 tokens; got 300"),
        ({"max_weight_bytes": 1e5}, "max_weight_bytes: expected at least"),
    ],
)
def test_sizes_out_of_range_are_refused(changes: dict[str, Any], message: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=message):
        make(qwen(1), "bf16", device, **changes)


def test_models_and_precisions_without_kernels_are_refused(device: torch.device) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="model: expected one of Qwen3Moe.*; got Glm4MoeForCausalLM"):
        check_step(load_model("glm-4.5"), PRECISIONS["bf16"], cpu)
    with pytest.raises(ValueError, match=r"precision: expected linear layers of .*; got fp8 x fp8 \(fp8_tensor\)"):
        check_step(load_model("qwen3-30b-a3b"), PRECISIONS["fp8_tensor"], cpu)
    with pytest.raises(ValueError, match="precision: expected experts that a kernel has; got bf16 x mxfp8"):
        check_step(load_model("deepseek-v3"), PRECISIONS["mxfp4_mxfp8"], cpu)
    check_step(load_model("gpt-oss-120b"), PRECISIONS["mxfp4_mxfp8"], cpu)


def test_nvfp4_linear_layers_need_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_weights.torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match="precision: expected compute capability 10 or more for nvfp4"):
        check_step(load_model("qwen3-30b-a3b"), PRECISIONS["nvfp4"], torch.device("cuda"))


def test_seek_refuses_other_lengths(device: torch.device) -> None:
    step = make(qwen(1), "bf16", device, length=5)
    with pytest.raises(ValueError, match="cached: expected 3 lengths; got 2"):
        step.seek([1, 2])
    with pytest.raises(ValueError, match="cached: expected lengths from 0 to 5; got"):
        step.seek(6)
    step.seek([0, 5, 3])
    assert step.positions.tolist() == [0, 5, 3]
    assert step.lengths.tolist() == [1, 6, 4]
    page = step.page_table[:, 0].long()
    assert step.slots.tolist() == (page * 16 + torch.tensor([0, 5, 3], device=page.device)).tolist()


def test_a_reference_needs_plain_weights(device: torch.device) -> None:
    step = make(qwen(1), "bf16", device, length=2, is_plain=False)
    with pytest.raises(ValueError, match="step: expected one made with is_plain"):
        reference_logits(step)
    with pytest.raises(ValueError, match="step: expected one made with is_plain"):
        check_layers(step, [])
    assert len(step.ops) == len({id(op) for op in step.ops})
    lay_out(step)  # a second list behind the first: what is there is shared, not allocated anew
    assert len({part.data_ptr() for part in step.buffers.values()}) == len(step.buffers)
