"""The experts' two matmuls: exact sums in every format, edges of routing, poison, quantized h, slices, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenfab.kernels.codec import QuantizedTensor, dequantize, quantize
from tokenfab.kernels.grouped_experts import KERNEL_OF, QUANTIZING, as_bf16, choose_tile, down, gate_up, grouped_tile
from tokenfab.kernels.grouped_parts import ACTIVATIONS, combine
from tokenfab.kernels.inputs import exact_operand, random_operand
from tokenfab.kernels.moe_reference import combine_ref, down_ref, gate_up_ref
from tokenfab.kernels.moe_schedule import Schedule, schedule
from tokenfab.kernels.moe_weights import GroupedWeight, prepare_experts
from tokenfab.kernels.tiles import Tile

PAIRS = list(KERNEL_OF)
HIDDEN, INTER, EXPERTS, TOP_K = 160, 96, 5, 2
X_GLOBAL = 0.5


@pytest.fixture(autouse=True)
def native(device: torch.device, request: pytest.FixtureRequest) -> None:
    is_old = device.type == "cuda" and torch.cuda.get_device_capability()[0] < 10
    if is_old and "nvfp4-nvfp4" in request.node.name:
        pytest.skip("NVFP4 on both sides needs a Blackwell GPU")


@dataclass
class Experts:
    """Prepared weights and their dequantized float64."""

    w: GroupedWeight
    values: torch.Tensor


def make_experts(
    pair: tuple[str, str, str], rows: int, columns: int, *, is_gated: bool, seed: int = 0, experts: int = EXPERTS,
    device: Any = "cpu", is_exact: bool = True, **options: Any,
) -> Experts:  # fmt: skip
    """Stacked operands of all experts, each from a seed of its own."""
    weight, activation, layout = pair
    make = exact_operand if is_exact else random_operand
    each = [make(weight, rows, columns, seed + e, torch.device("cpu")) for e in range(experts)]
    parts = {
        name: torch.stack([part for q in each if (part := getattr(q, name)) is not None])
        for name in ("data", "scale", "global_scale")
        if getattr(each[0], name) is not None
    }
    if layout == "stored" and weight == "nvfp4" and activation == "nvfp4":
        options = {"activation_scale": X_GLOBAL} | options
    moved = {name: part.to(device) for name, part in parts.items()}
    w = prepare_experts(weight, moved, is_gated=is_gated, layout=layout, **options)
    return Experts(w, torch.stack([dequantize(q).double() for q in each]))


def make_x(activation: str, rows: int, columns: int, seed: int, device: torch.device, *, is_exact: bool = True) -> Any:
    """An operand on the device, and its float64 values."""
    if is_exact:
        x = exact_operand(activation, rows, columns, seed, torch.device("cpu"))
    else:
        options = {"global_scale": X_GLOBAL} if activation == "nvfp4" else {}
        x = quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), activation, **options)
    return to(x, device), dequantize(x).double()


def to(x: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    parts = (None if part is None else part.to(device) for part in (x.data, x.scale, x.global_scale))
    return QuantizedTensor(x.format, *parts, x.shape)


def plan_of(
    ids: torch.Tensor, device: torch.device, block_m: int = 16, first: int = 0, experts: int = EXPERTS
) -> Schedule:
    return schedule(ids.to(device=device, dtype=torch.int32), experts, block_m, first_expert=first)


def random_ids(tokens: int, seed: int, experts: int = EXPERTS, top_k: int = TOP_K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]).to(torch.int32)


def by_row(h: torch.Tensor, plan: Schedule) -> torch.Tensor:
    """h by position -> by row, NaN where there is none."""
    rows = torch.full_like(h, float("nan"))
    position = plan.position.long()
    rows[position >= 0] = h[position[position >= 0]]
    return rows.cpu()


def run_gate_up(x: QuantizedTensor, w: GroupedWeight, plan: Schedule, top_k: int, **options: Any) -> torch.Tensor:
    """FP32 h by row, its buffer poisoned."""
    out = torch.full((plan.position.numel(), w.num_channels), float("nan"), device=w.device)
    h = gate_up(x, w, plan, top_k=top_k, out=out, **options)
    assert isinstance(h, torch.Tensor)
    held = int(plan.expert_offsets[-1])
    assert h[held:].isnan().all()  # positions without a row are not written
    return by_row(h, plan)


def close(got: torch.Tensor, expected: torch.Tensor, relative: float = 4e-6) -> None:
    """As near as exp in float32 allows, and NaN in the same places."""
    torch.testing.assert_close(got.double(), expected, rtol=relative, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(("tokens", "block_m"), [(1, 16), (7, 16), (41, 32), (80, 64)])
def test_r11_gate_up_sums_are_exact(
    pair: tuple[str, str, str], tokens: int, block_m: int, device: torch.device
) -> None:
    """Sums are exact on these inputs: only the sigmoid is rounded. 96 channels and 160 columns divide no tile."""
    experts = make_experts(pair, 2 * INTER, HIDDEN, is_gated=True, device=device)
    x, values = make_x(pair[1], tokens, HIDDEN, tokens, device)
    ids = random_ids(tokens, seed=tokens)
    block_m = min(block_m, 32) if pair[2] == "w4a8" else block_m
    h = run_gate_up(x, experts.w, plan_of(ids, device, block_m), TOP_K)
    close(h, gate_up_ref(values, ids, experts.values, "silu"))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(("tokens", "block_m"), [(1, 16), (7, 16), (41, 32), (80, 64)])
def test_r11_down_is_exact(pair: tuple[str, str, str], tokens: int, block_m: int, device: torch.device) -> None:
    experts = make_experts(pair, HIDDEN + 3, INTER, is_gated=False, device=device)
    h, values = make_x(pair[1], tokens * TOP_K, INTER, tokens, device)
    ids = random_ids(tokens, seed=tokens)
    plan = plan_of(ids, device, min(block_m, 32) if pair[2] == "w4a8" else block_m)
    routing = torch.exp2(torch.randint(-2, 2, (tokens, TOP_K), generator=torch.Generator().manual_seed(1)).float())
    out = torch.full((tokens * TOP_K, HIDDEN + 3), float("nan"), device=device)
    y = down(h, experts.w, plan, routing.to(device), out=out)
    h_by_row = values[plan.position.long().cpu()]
    assert torch.equal(y.cpu().double(), down_ref(h_by_row, ids, routing, experts.values))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_bias_and_gpt_oss_activation(pair: tuple[str, str, str], device: torch.device) -> None:
    """Sums on both sides of the clamps; biases that differ between gate and up, and between experts."""
    generator = torch.Generator().manual_seed(3)
    bias = torch.randint(-8, 9, (EXPERTS, 2 * INTER), generator=generator).float() / 4
    experts = make_experts(pair, 2 * INTER, HIDDEN, is_gated=True, device=device, bias=bias.to(device))
    x, values = make_x(pair[1], 9, HIDDEN, 1, device)
    ids = random_ids(9, seed=2)
    expected = gate_up_ref(values, ids, experts.values, "swiglu_oai", bias)
    close(run_gate_up(x, experts.w, plan_of(ids, device), TOP_K, activation="swiglu_oai"), expected, 1e-5)
    bias = torch.randint(-8, 9, (EXPERTS, HIDDEN), generator=generator).float()
    lower = make_experts(pair, HIDDEN, INTER, is_gated=False, device=device, bias=bias.to(device))
    h, values = make_x(pair[1], 9 * TOP_K, INTER, 5, device)
    plan, routing = plan_of(ids, device), torch.full((9, TOP_K), 0.5)
    y = down(h, lower.w, plan, routing.to(device), out=torch.empty(18, HIDDEN, device=device))
    expected = down_ref(values[plan.position.long().cpu()], ids, routing, lower.values, bias)
    assert torch.equal(y.cpu().double(), expected)


BF16 = ("bf16", "bf16", "stored")
LOADS = {
    "all tokens to one expert": torch.full((37, 1), 3),
    "one expert twice": torch.tensor([[1, 1], [4, 4], [1, 4]]),
    "padding": torch.tensor([[-1, 2], [-1, -1], [0, -1]]),
    "beyond the last": torch.tensor([[5, 2], [1000, 0], [2**31 - 1, -(2**31)]]),
    "nobody": torch.full((4, 2), -1),
    "every expert": torch.arange(5).repeat(3, 1),
}


@pytest.mark.parametrize("ids", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("pair", [BF16, ("mxfp4", "bf16", "w4a16"), ("fp8_block", "fp8_group", "stored")], ids="-".join)
def test_r05_edges_of_routing(pair: tuple[str, str, str], ids: torch.Tensor, device: torch.device) -> None:
    """Rows of no expert stay poisoned in h and y, and add nothing to a token."""
    tokens, top_k = ids.shape
    upper = make_experts(pair, 2 * INTER, HIDDEN, is_gated=True, device=device)
    lower = make_experts(BF16, HIDDEN, INTER, is_gated=False, device=device, seed=9)
    x, values = make_x(pair[1], tokens, HIDDEN, 7, device)
    plan = plan_of(ids, device)
    h = run_gate_up(x, upper.w, plan, top_k)
    expected = gate_up_ref(values, ids, upper.values, "silu")
    close(h, expected)
    h_in = torch.full((tokens * top_k, INTER), float("nan"), dtype=torch.bfloat16, device=device)
    gate_up(x, upper.w, plan, top_k=top_k, out=h_in)
    rows = torch.full((tokens * top_k, HIDDEN), float("nan"), device=device)
    down(as_bf16(h_in), lower.w, plan, torch.ones(tokens, top_k, device=device), out=rows)
    h_rounded = by_row(h_in, plan).double()
    expected = down_ref(h_rounded, ids, torch.ones(tokens, top_k), lower.values)
    torch.testing.assert_close(rows.cpu().double(), expected, rtol=1e-5, atol=1e-2, equal_nan=True)
    y = combine(rows, plan.position, top_k, torch.full((tokens, HIDDEN), float("nan"), device=device))
    torch.testing.assert_close(y.cpu().double(), combine_ref(expected, top_k), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("pair", [p for p in PAIRS if p[1] not in ("mxfp4", "nvfp4")], ids="-".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_r09_nan_in_a_token_reaches_its_own_rows_only(
    activation: str, pair: tuple[str, str, str], device: torch.device
) -> None:
    """Token 2 is another rank's, token 4 shares its expert and its block of rows with others."""
    experts = make_experts(pair, 2 * INTER, HIDDEN, is_gated=True, device=device)
    x, values = make_x(pair[1], 6, HIDDEN, 1, device)
    ids = torch.tensor([[0, 1], [1, 3], [-1, 7], [3, 0], [1, 0], [0, 3]])
    for token in (2, 4):
        x.data.view(torch.uint8)[token] = 0xFF
    h = run_gate_up(x, experts.w, plan_of(ids, device), TOP_K, activation=activation)
    expected = gate_up_ref(values, ids, experts.values, activation)
    expected[4 * TOP_K : 5 * TOP_K] = float("nan")
    close(h, expected, 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_gate_or_up_alone_stays_nan(activation: str, device: torch.device) -> None:
    """A clamp must not turn it into its limit: channel 3 by its gate, channel 7 by its up."""
    bias = torch.zeros(EXPERTS, 2 * INTER)
    bias[:, 3], bias[:, INTER + 7] = float("nan"), float("nan")
    experts = make_experts(BF16, 2 * INTER, HIDDEN, is_gated=True, device=device, bias=bias.to(device))
    x, values = make_x("bf16", 4, HIDDEN, 1, device)
    ids = random_ids(4, seed=1)
    h = run_gate_up(x, experts.w, plan_of(ids, device), TOP_K, activation=activation)
    close(h, gate_up_ref(values, ids, experts.values, activation, bias), 1e-5)
    assert (h.isnan().any(dim=0).nonzero().flatten() == torch.tensor([3, 7])).all()


def test_the_width_of_gpt_oss(device: torch.device) -> None:
    """2880 columns are 22 and a half tiles of 128, 2880 channels 11 and a quarter of 256."""
    pair = ("mxfp4", "bf16", "w4a16")
    ids = torch.tensor([[0], [1], [0]])
    plan = plan_of(ids, device, experts=2)
    experts = make_experts(pair, 2 * INTER, 2880, is_gated=True, experts=2, device=device)
    x, values = make_x("bf16", 3, 2880, 1, device)
    close(run_gate_up(x, experts.w, plan, 1), gate_up_ref(values, ids, experts.values, "silu"))
    lower = make_experts(pair, 2880, INTER, is_gated=False, experts=2, device=device)
    h, values = make_x("bf16", 3, INTER, 2, device)
    ones = torch.ones(3, 1)
    y = down(h, lower.w, plan, ones.to(device), out=torch.empty(3, 2880, device=device))
    assert torch.equal(y.cpu().double(), down_ref(values[plan.position.long().cpu()], ids, ones, lower.values))


def test_no_tokens(device: torch.device) -> None:
    experts = make_experts(BF16, 2 * INTER, HIDDEN, is_gated=True, device=device)
    ids = torch.empty(0, TOP_K, dtype=torch.int32)
    x = as_bf16(torch.empty(0, HIDDEN, dtype=torch.bfloat16, device=device))
    h = gate_up(x, experts.w, plan_of(ids, device), top_k=TOP_K)
    assert isinstance(h, torch.Tensor)
    assert h.shape == (0, INTER)


@pytest.mark.parametrize("pair", [p for p in PAIRS if KERNEL_OF[p] in QUANTIZING], ids="-".join)
@pytest.mark.parametrize("inter", [96, 160, 256])
def test_quantized_h_is_the_codecs(pair: tuple[str, str, str], inter: int, device: torch.device) -> None:
    """h written in fp8_group equals BF16 h put through the codec, bit for bit; tails and positions without rows too."""
    experts = make_experts(pair, 2 * inter, HIDDEN, is_gated=True, device=device, is_exact=False, experts=3)
    x, _ = make_x(pair[1], 11, HIDDEN, 3, device, is_exact=False)
    ids = random_ids(11, seed=4, experts=4)
    plan = plan_of(ids, device, experts=3)
    plain = gate_up(x, experts.w, plan, top_k=TOP_K, out=torch.zeros(22, inter, dtype=torch.bfloat16, device=device))
    assert isinstance(plain, torch.Tensor)
    expected = quantize(plain, "fp8_group")
    assert expected.scale is not None
    poison = torch.full((22, inter), 0x7F, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scale = torch.full(expected.scale.shape, float("nan"), device=device)
    written = QuantizedTensor(expected.format, poison, scale, None, (22, inter))
    gate_up(x, experts.w, plan, top_k=TOP_K, out=written)
    held = int(plan.expert_offsets[-1])
    assert 0 < held < 22
    assert torch.equal(written.data.view(torch.uint8)[:held], expected.data.view(torch.uint8)[:held])
    assert torch.equal(scale[:held], expected.scale[:held])
    assert (written.data.view(torch.uint8)[held:] == 0x7F).all()
    assert scale[held:].isnan().all()


@pytest.mark.parametrize("pair", [BF16, ("nvfp4", "bf16", "w4a16"), ("mxfp4", "fp8_group", "w4a8")], ids="-".join)
def test_slices_of_experts_add_up(pair: tuple[str, str, str], device: torch.device) -> None:
    """Ranks that hold experts 0-1, 2 and 3-4: their sums are all experts', each row computed by one of them."""
    ids = random_ids(13, seed=8)
    x, values = make_x(pair[1], 13, HIDDEN, 2, device)
    whole = make_experts(pair, 2 * INTER, HIDDEN, is_gated=True)
    parts = []
    for first, count in ((0, 2), (2, 1), (3, 2)):
        part = make_experts(pair, 2 * INTER, HIDDEN, is_gated=True, seed=first, experts=count, device=device)
        plan = plan_of(ids, device, first=first, experts=count)
        parts.append(run_gate_up(x, part.w, plan, TOP_K))
    assert (sum((~part.isnan()).int() for part in parts) == 1).all()
    close(sum(part.nan_to_num(0.0) for part in parts), gate_up_ref(values, ids, whole.values, "silu"))  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_routing(data: st.DataObject, device: torch.device) -> None:
    tokens, top_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    flat = data.draw(st.lists(st.integers(-2, EXPERTS + 1), min_size=tokens * top_k, max_size=tokens * top_k))
    ids, block_m = torch.tensor(flat).reshape(tokens, top_k), data.draw(st.sampled_from([16, 32]))
    experts = make_experts(BF16, 2 * 32, 32, is_gated=True, device=device)
    x, values = make_x("bf16", tokens, 32, 5, device)
    close(
        run_gate_up(x, experts.w, plan_of(ids, device, block_m), top_k),
        gate_up_ref(values, ids, experts.values, "silu"),
    )


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_r15_order_of_programs_does_not_matter(
    pair: tuple[str, str, str], device: torch.device, reverse_programs: Callable[[], None]
) -> None:
    experts = make_experts(pair, 2 * INTER, HIDDEN, is_gated=True, device=device, is_exact=False)
    x, _ = make_x(pair[1], 21, HIDDEN, 2, device, is_exact=False)
    plan = plan_of(random_ids(21, seed=6), device)
    first = run_gate_up(x, experts.w, plan, TOP_K)
    reverse_programs()
    assert torch.equal(first.nan_to_num(7.0), run_gate_up(x, experts.w, plan, TOP_K).nan_to_num(7.0))


def test_combine_adds_slots_in_order_and_reads_only_what_is_there(device: torch.device) -> None:
    rows = torch.tensor([2.0**24, 1.0, -(2.0**24), float("nan")], device=device).repeat_interleave(33).reshape(4, 33)
    position = torch.tensor([0, 1, 2, -1], dtype=torch.int32, device=device)
    y = combine(rows, position, 4, torch.full((1, 33), float("nan"), device=device))
    assert (y == 0.0).all()  # 2^24 + 1 is 2^24 in float32; another order would give 1


def test_block_m_is_twice_the_average(device: torch.device) -> None:
    w = make_experts(BF16, 64, 32, is_gated=True).w
    assert [choose_tile(w, "bf16", rows, 32).block_m for rows in (1, 256, 257, 512, 4096)] == [16, 16, 32, 32, 64]


def test_w4a8_with_a_base_per_128_columns_in_one_expert(device: torch.device) -> None:
    """Blocks of a row 20 octaves apart: a base per 128 columns for all experts."""
    pair = ("mxfp4", "fp8_group", "w4a8")
    parts = [exact_operand("mxfp4", 2 * INTER, 384, e, torch.device("cpu")) for e in range(2)]
    assert parts[1].scale is not None
    parts[1].scale[5, 4:] += 20
    parts[1].scale[2 * INTER - 1, :8] += 18
    stacked = {name: torch.stack([getattr(q, name) for q in parts]).to(device) for name in ("data", "scale")}
    w = prepare_experts("mxfp4", stacked, is_gated=True, layout="w4a8")
    assert w.parts["base"].shape[:2] == (2, 3)
    x, values = make_x(pair[1], 6, 384, 1, device)
    ids = torch.tensor([[0], [1], [1], [0], [1], [1]])
    h = run_gate_up(x, w, plan_of(ids, device, experts=2), 1)
    close(h, gate_up_ref(values, ids, torch.stack([dequantize(q).double() for q in parts]), "silu"))


GOOD = {"top_k": TOP_K}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": "down"}, "w: expected gate and up rows; got a down weight"),
        ({"activation": "gelu"}, "activation: expected one of silu, swiglu_oai; got 'gelu'"),
        ({"top_k": 3}, "top_k: expected 8 rows of x's 4 tokens; got 3"),
        ({"x": "fp8_row"}, "x: expected one of bf16 .stored. x bf16, .*; got bf16 .stored. x fp8_row"),
        ({"columns": 128}, "x: expected K = 160; got K = 128"),
        ({"experts": 4}, "plan: expected 5 local experts, as w; got 4"),
        ({"out": torch.empty(8, 95, dtype=torch.bfloat16)}, r"out: expected torch.bfloat16 or torch.float32 \(8, 96\)"),
        ({"out": torch.empty(8, 96, dtype=torch.float16)}, "out: expected torch.bfloat16 or torch.float32"),
        ({"block_m": 8}, "plan: expected block_m of 16, 32, 64; got 8"),
        ({"tile": Tile(32, 256, 128, 4, 3)}, "tile: expected block_m = 16, as the plan"),
        ({"tile": Tile(16, 256, 64, 4, 3)}, "tile: expected block_k = 128"),
        ({"strided": True}, "x: expected contiguous; got stride"),
    ],
)
def test_bad_input_before_any_launch(changes: dict[str, Any], message: str, device: torch.device) -> None:
    changes = dict(changes)
    is_gated = changes.pop("w", "") != "down"
    w = make_experts(BF16, 2 * INTER, HIDDEN, is_gated=is_gated, device=device).w
    x, _ = make_x(changes.pop("x", "bf16"), 4, changes.pop("columns", HIDDEN), 0, device)
    if changes.pop("strided", False):
        x = replace(x, data=torch.zeros(4, 2 * HIDDEN, dtype=torch.bfloat16, device=device)[:, ::2])
    plan = plan_of(random_ids(4, 0), device, changes.pop("block_m", 16), experts=changes.pop("experts", EXPERTS))
    moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        gate_up(x, w, plan, **(GOOD | moved))


def test_bad_input_of_down(device: torch.device) -> None:
    w = make_experts(BF16, HIDDEN, INTER, is_gated=False, device=device).w
    upper = make_experts(BF16, 2 * INTER, HIDDEN, is_gated=True, device=device).w
    h, _ = make_x("bf16", 8, INTER, 0, device)
    plan, routing = plan_of(random_ids(4, 0), device), torch.ones(4, TOP_K, device=device)
    with pytest.raises(ValueError, match="w: expected a down weight; got gate and up rows"):
        down(h, upper, plan, routing)
    with pytest.raises(ValueError, match="h: expected 8 rows; got 6 rows"):
        down(make_x("bf16", 6, INTER, 0, device)[0], w, plan, routing)
    with pytest.raises(ValueError, match="routing: expected float32, 8 values"):
        down(h, w, plan, routing.double())
    with pytest.raises(ValueError, match="x: expected one of"):
        grouped_tile(w, "mxfp4", 16)
