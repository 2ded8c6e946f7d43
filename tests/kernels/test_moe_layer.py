"""A whole expert layer against float64, in every format: shared experts, slices, gpt-oss, wrong weights, bad input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tokenfab.kernels.codec import dequantize
from tokenfab.kernels.inputs import random_operand
from tokenfab.kernels.moe_layer import MoeLayer, empty_moe_workspace, moe_layer
from tokenfab.kernels.moe_reference import combine_ref, down_ref, gate_up_ref, round_h
from tokenfab.kernels.moe_weights import prepare_experts
from tokenfab.kernels.reference import error
from tokenfab.kernels.routing_reference import route_ref
from tokenfab.kernels.routing_rule import Routing

# weights, x, h, layout
FORMATS = {
    "bf16": ("bf16", "bf16", "bf16", "stored"),
    "fp8_row": ("fp8_row", "fp8_row", "fp8_row", "stored"),
    "fp8_block": ("fp8_block", "fp8_group", "fp8_group", "stored"),
    "mxfp4-bf16": ("mxfp4", "bf16", "bf16", "w4a16"),
    "nvfp4-bf16": ("nvfp4", "bf16", "bf16", "w4a16"),
    "mxfp4-fp8_group": ("mxfp4", "fp8_group", "fp8_group", "w4a8"),
    "mxfp4-fp8_row": ("mxfp4", "fp8_row", "fp8_row", "w4a8"),
    "mxfp8": ("mxfp8", "mxfp8", "mxfp8", "stored"),
    "mxfp4-mxfp8": ("mxfp4", "mxfp8", "mxfp8", "stored"),
    "mxfp4-mxfp4": ("mxfp4", "mxfp4", "mxfp4", "stored"),
    "nvfp4-nvfp4": ("nvfp4", "nvfp4", "nvfp4", "stored"),
}
HIDDEN, INTER, EXPERTS, TOP_K = 160, 96, 6, 2
X_SCALE, H_SCALE = 2.0**-8, 2.0**-4
ROUTING = Routing(EXPERTS, TOP_K)


@pytest.fixture(autouse=True)
def native(device: torch.device, request: pytest.FixtureRequest) -> None:
    is_old = device.type == "cuda" and torch.cuda.get_device_capability()[0] < 10
    if is_old and "nvfp4-nvfp4" in request.node.name:
        pytest.skip("NVFP4 on both sides needs a Blackwell GPU")


@dataclass
class Made:
    """A layer and the float64 values of its weights."""

    layer: MoeLayer
    upper: torch.Tensor
    lower: torch.Tensor
    h_format: str


def weights_of(format: str, rows: int, columns: int, experts: range, seed: int) -> tuple[dict[str, torch.Tensor], Any]:
    each = [random_operand(format, rows, columns, seed + e, torch.device("cpu")) for e in experts]
    names = [name for name in ("data", "scale", "global_scale") if getattr(each[0], name) is not None]
    parts = {name: torch.stack([getattr(q, name) for q in each]) for name in names}
    return parts, torch.stack([dequantize(q).double() for q in each])


def make_layer(name: str, device: torch.device, experts: range = range(EXPERTS), seed: int = 0, **options: Any) -> Made:
    weight, x_format, h_format, layout = FORMATS[name]
    is_nvfp4 = x_format == "nvfp4"
    made, values = [], []
    for is_gated, rows, columns, scale in ((True, 2 * INTER, HIDDEN, X_SCALE), (False, HIDDEN, INTER, H_SCALE)):
        parts, dequantized = weights_of(weight, rows, columns, experts, seed + (0 if is_gated else 100))
        extra: dict[str, Any] = {"activation_scale": scale} if is_nvfp4 else {}
        moved = {part: tensor.to(device) for part, tensor in parts.items()}
        made.append(prepare_experts(weight, moved, is_gated=is_gated, layout=layout, **extra))
        values.append(dequantized)
    if is_nvfp4:
        options = {"x_scale": X_SCALE, "h_scale": H_SCALE} | options
    options = {"routing": ROUTING} | options
    layer = MoeLayer(gate_up=made[0], down=made[1], x_format=x_format, h_format=h_format,
                     first_expert=experts.start, **options)  # fmt: skip
    return Made(layer, *values, h_format)


def make_inputs(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    return x, torch.randn(tokens, EXPERTS, generator=generator).bfloat16()


def expect(made: Made, x: torch.Tensor, logits: torch.Tensor, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rows) in float64, what is rounded on the way rounded. ``changes``: other weights."""
    layer, upper, lower = made.layer, changes.get("upper", made.upper), changes.get("lower", made.lower)
    ids, weights = route_ref(logits, layer.routing)
    scales = [None if s is None else torch.tensor(s) for s in (layer.x_scale, layer.h_scale)]
    values = round_h(x.double(), layer.x_format, scales[0])
    upper_bias, lower_bias = (None if w.bias is None else w.bias.cpu() for w in (layer.gate_up, layer.down))
    h = gate_up_ref(values, ids, upper, layer.activation, upper_bias, layer.first_expert)
    rows = down_ref(round_h(h, made.h_format, scales[1]), ids, weights, lower, lower_bias, layer.first_expert)
    return combine_ref(rows, layer.routing.top_k), rows


def run(made: Made, x: torch.Tensor, logits: torch.Tensor, device: torch.device, **options: Any) -> torch.Tensor:
    out = torch.full((x.shape[0], HIDDEN), float("nan"), device=device)
    return moe_layer(x.to(device), logits.to(device), made.layer, out=out, **options).cpu()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 13, 65])
def test_layer_in_every_format(name: str, tokens: int, device: torch.device) -> None:
    made, (x, logits) = make_layer(name, device), make_inputs(tokens)
    expected, rows = expect(made, x, logits)
    assert error(run(made, x, logits, device), expected) <= 1
    workspace = empty_moe_workspace(made.layer, tokens, device)
    workspace.rows.fill_(float("nan"))
    assert error(run(made, x, logits, device, workspace=workspace), expected) <= 1
    ids, _ = route_ref(logits, ROUTING)
    for expert in range(EXPERTS):  # an expert that is wrong hides behind the others in a token's sum
        of_expert = (ids.flatten() == expert).nonzero().flatten()
        assert error(workspace.rows.cpu()[of_expert], rows[of_expert]) <= 1


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_experts_are_caught(name: str, device: torch.device) -> None:
    """A lost expert, gate and up swapped, a neighbour's weights, one weight block x 1.2: all beyond the tolerance."""
    made, (x, logits) = make_layer(name, device), make_inputs(40)
    y = run(made, x, logits, device)
    lost, neighbour, scaled = made.lower.clone(), made.upper.clone(), made.lower.clone()
    lost[2] = 0
    neighbour[1] = made.upper[0]
    scaled[3, :32] *= 1.2
    swapped = torch.cat(made.upper.chunk(2, dim=1)[::-1], dim=1)
    for change in ({"lower": lost}, {"upper": neighbour}, {"lower": scaled}, {"upper": swapped}):
        assert error(y, expect(made, x, logits, **change)[0]) > 1


@pytest.mark.parametrize("name", ["bf16", "fp8_block", "mxfp4-bf16", "mxfp4-fp8_group"])
def test_ranks_add_up_to_the_whole(name: str, device: torch.device) -> None:
    x, logits = make_inputs(17)
    parts = [
        run(make_layer(name, device, experts), x, logits, device) for experts in (range(2), range(2, 3), range(3, 6))
    ]
    expected, _ = expect(make_layer(name, device), x, logits)
    assert error(sum(parts, torch.zeros(17, HIDDEN)), expected) <= 1


@pytest.mark.parametrize("name", ["bf16", "fp8_block", "mxfp4-bf16", "mxfp8"])
def test_shared_expert_is_added(name: str, device: torch.device) -> None:
    made = make_layer(name, device)
    shared = make_layer(name, device, range(1), seed=500, routing=Routing(1, 1))
    both = replace(made.layer, shared_gate_up=shared.layer.gate_up, shared_down=shared.layer.down)
    x, logits = make_inputs(21)
    routed, _ = expect(made, x, logits)
    alone, _ = expect(shared, x, torch.zeros(21, 1))
    y = run(Made(both, made.upper, made.lower, made.h_format), x, logits, device)
    assert error(y, routed + alone) <= 1
    assert error(y, routed) > 1


def test_gpt_oss_layer_from_its_checkpoints_order(device: torch.device) -> None:
    """Interleaved gate and up rows with biases, MXFP4, the clamped activation; another order is wrong."""
    generator = torch.Generator().manual_seed(1)
    upper_bias, lower_bias = (torch.randn(EXPERTS, rows, generator=generator) for rows in (2 * INTER, HIDDEN))
    upper, upper_values = weights_of("mxfp4", 2 * INTER, HIDDEN, range(EXPERTS), 0)
    lower, lower_values = weights_of("mxfp4", HIDDEN, INTER, range(EXPERTS), 100)
    x, logits = make_inputs(19)

    def layer(order: str) -> MoeLayer:
        gate_up = prepare_experts("mxfp4", {n: p.to(device) for n, p in upper.items()}, is_gated=True, layout="w4a16",
                                  gate_up_order=order, bias=upper_bias.to(device))  # fmt: skip
        down = prepare_experts("mxfp4", {n: p.to(device) for n, p in lower.items()}, is_gated=False, layout="w4a16",
                               bias=lower_bias.to(device))  # fmt: skip
        return MoeLayer(ROUTING, gate_up, down, activation="swiglu_oai")

    values = torch.cat([upper_values[:, 0::2], upper_values[:, 1::2]], dim=1)
    right = Made(layer("interleaved"), values, lower_values, "bf16")
    expected, _ = expect(right, x, logits)
    assert error(run(right, x, logits, device), expected) <= 1
    for order in ("gate_up", "up_gate"):
        assert error(run(Made(layer(order), values, lower_values, "bf16"), x, logits, device), expected) > 1


@pytest.mark.parametrize(("format", "layout"), [("bf16", "stored"), ("mxfp4", "w4a16"), ("nvfp4", "w4a16")])
def test_orders_of_gate_and_up_give_the_same_weight(format: str, layout: str) -> None:
    parts, _ = weights_of(format, 2 * INTER, HIDDEN, range(2), 3)

    def reorder(order: str) -> dict[str, torch.Tensor]:
        gate, up = (dict(zip(parts, (p.chunk(2, dim=1)[i] if p.dim() > 1 else p for p in parts.values()), strict=True))
                    for i in (0, 1))  # fmt: skip
        pair = (up, gate) if order == "up_gate" else (gate, up)
        if order == "interleaved":
            return {n: torch.stack([gate[n], up[n]], 2).flatten(1, 2) if p.dim() > 1 else p for n, p in parts.items()}
        return {n: torch.cat([pair[0][n], pair[1][n]], 1) if p.dim() > 1 else p for n, p in parts.items()}

    whole = prepare_experts(format, parts, is_gated=True, layout=layout)
    for order in ("up_gate", "interleaved"):
        other = prepare_experts(format, reorder(order), is_gated=True, layout=layout, gate_up_order=order)
        assert all(torch.equal(other.parts[n].view(torch.uint8), p.view(torch.uint8)) for n, p in whole.parts.items())


def test_no_tokens(device: torch.device) -> None:
    x, logits = make_inputs(0)
    assert run(make_layer("fp8_block", device), x, logits, device).shape == (0, HIDDEN)


def test_r17_a_layer_is_captured_and_replayed(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    made, (x, logits) = make_layer("fp8_block", device), make_inputs(24)
    x, logits = x.to(device), logits.to(device)
    workspace, out = empty_moe_workspace(made.layer, 24, device), torch.empty(24, HIDDEN, device=device)
    moe_layer(x, logits, made.layer, workspace=workspace, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe_layer(x, logits, made.layer, workspace=workspace, out=out)
    other_x, other_logits = make_inputs(24, seed=5)
    x.copy_(other_x)
    logits.copy_(other_logits)
    graph.replay()
    assert error(out.cpu(), expect(made, other_x, other_logits)[0]) <= 1


def test_bad_input_before_any_launch(device: torch.device) -> None:
    made, (x, logits) = make_layer("bf16", device), make_inputs(4)
    x, logits = x.to(device), logits.to(device)
    with pytest.raises(ValueError, match=r"x: expected bfloat16 \(T, 160\), contiguous; got torch.float32"):
        moe_layer(x.float(), logits, made.layer)
    with pytest.raises(ValueError, match="x: expected bfloat16"):
        moe_layer(x[:, :128], logits, made.layer)
    with pytest.raises(ValueError, match=r"logits: expected \(4, 6\)"):
        moe_layer(x, logits[:3], made.layer)
    with pytest.raises(ValueError, match="workspace: expected one for 4 tokens; got 5"):
        moe_layer(x, logits, made.layer, workspace=empty_moe_workspace(made.layer, 5, device))
    with pytest.raises(ValueError, match="out: expected BF16 or FP32"):
        moe_layer(x, logits, made.layer, out=torch.empty(4, HIDDEN, dtype=torch.float16, device=device))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_format": "fp8_row"}, "x_format: x: expected one of"),
        ({"h_format": "mxfp4"}, "h_format: x: expected one of"),
        ({"first_expert": 1}, r"first_expert: expected experts within 0..6; got 7"),
        ({"routing": Routing(5, 2)}, r"first_expert: expected experts within 0..5; got 6"),
        ({"swap": True}, "gate_up, down: expected a gated and a down weight"),
        ({"lone": True}, "shared_down: expected both or none; got one"),
    ],
)
def test_layers_that_contradict_themselves(changes: dict[str, Any], message: str, device: torch.device) -> None:
    layer, changes = make_layer("bf16", device).layer, dict(changes)
    if changes.pop("swap", False):
        changes = {"gate_up": layer.down, "down": layer.gate_up}
    if changes.pop("lone", False):
        changes = {"shared_gate_up": layer.gate_up}
    with pytest.raises(ValueError, match=message):
        replace(layer, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "w4a4"}, "layout: expected stored, w4a16 or w4a8"),
        ({"layout": "w4a16"}, "format: expected an FP4 format for w4a16; got bf16"),
        ({"gate_up_order": "up"}, "gate_up_order: expected one of gate_up, up_gate, interleaved"),
        ({"bias": torch.zeros(2, 5)}, r"bias: expected \(E, R\) = \(2, 8\)"),
        ({"activation_scale": 1.0}, "activation_scale: expected None for bf16"),
        ({"parts": {"data": torch.zeros(8, 4)}}, r"parts: expected data \(E, R, K\)"),
        ({"parts": {"data": torch.zeros(2, 7, 4, dtype=torch.bfloat16)}}, "parts: expected an even number of rows"),
        ({"parts": {"data": torch.zeros(2, 8, 4)}}, "data: expected torch.bfloat16"),
        ({"format": "fp8_block", "gate_up_order": "interleaved", "parts": {
            "data": torch.zeros(2, 256, 128).to(torch.float8_e4m3fn), "scale": torch.ones(2, 2, 1)}},
         "gate_up_order: expected gate_up for fp8_block, whose scales cover 128 rows; got interleaved"),
    ],
)  # fmt: skip
def test_bad_weights_are_refused(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"format": "bf16", "parts": {"data": torch.zeros(2, 8, 4, dtype=torch.bfloat16)}}
    with pytest.raises(ValueError, match=message):
        prepare_experts(**(good | {"is_gated": True} | arguments))
