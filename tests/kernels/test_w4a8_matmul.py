"""W4A8: exact on representable inputs, every code under every octave, wide scales, poison, tails, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels.codec import decode_e2m1, pack_fp4
from tokenfab.kernels.tiles import Tile
from tokenfab.kernels.w4a8_matmul import w4a8_matmul
from tokenfab.kernels.w4a8_weights import OCTAVES, W4A8Weight, prepare_w4a8_weight

FP8 = torch.float8_e4m3fn
# tokens, rows, columns: tails of every tile, an odd number of k tiles, one token
SHAPES = [(1, 256, 128), (3, 300, 320), (16, 511, 416), (64, 96, 1056), (65, 257, 256), (131, 70, 160)]


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return decode_e2m1(codes).double() * torch.exp2(scale.double() - 127).repeat_interleave(32, dim=1)


def make_weight(
    rows: int, columns: int, seed: int = 0, *, is_exact: bool = False, has_group_base: bool = False, device: Any = "cpu"
) -> tuple[W4A8Weight, torch.Tensor]:
    """A prepared weight and its dequantized float64 (N, K). ``is_exact``: small integers under 1/2, 1 and 2.

    ``has_group_base``: scales of neighbouring groups of 128 are more than 11 octaves apart.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    if is_exact:
        codes = torch.tensor([0, 2, 4, 10, 12], dtype=torch.uint8)[codes.long() % 5]
    shape, middle = (rows, columns // 32), 3 if is_exact else OCTAVES
    scale = torch.randint(0, middle, shape, generator=generator) + 127 - middle // 2
    if has_group_base:
        group = torch.arange(shape[1]) // 4
        apart = 6 if is_exact else 7 + torch.arange(rows)[:, None] % 5
        scale += torch.where(group % 2 == 0, -apart, apart)
    scale = scale.to(torch.uint8)
    weight = prepare_w4a8_weight(pack_fp4(codes).to(device), scale.to(device))
    assert weight.has_group_base == (has_group_base and columns > 128)
    return weight, dequantize(codes, scale)


def make_tokens(
    rows: int, columns: int, seed: int, *, is_exact: bool, is_group: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, x_scale) and the dequantized float64 x."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, -(-columns // 128) if is_group else 1)
    if is_exact:
        x = torch.randint(-2, 3, (rows, columns), generator=generator).float().to(FP8)
        scale = torch.exp2(torch.randint(0, 2, shape, generator=generator).float())
    else:
        x = torch.randn(rows, columns, generator=generator).mul(40).to(FP8)
        scale = torch.rand(shape, generator=generator) + 0.05
    factor = scale.repeat_interleave(128, dim=1)[:, :columns] if is_group else scale
    return x, scale, x.double() * factor.double()


def tiling(m: int) -> dict[str, Tile]:
    """A block of tokens that fits, with 256 and with 128 rows."""
    sizes = {1: (16, 256, 256), 3: (16, 128, 256), 16: (16, 256, 128), 64: (64, 128, 128), 65: (32, 256, 128)}
    return {"tile": Tile(*sizes.get(m, (32, 128, 256)), 4, 3)}


@pytest.mark.parametrize("is_group", [False, True])
@pytest.mark.parametrize("has_group_base", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_exact_on_representable_inputs(
    is_group: bool, has_group_base: bool, m: int, n: int, k: int, device: torch.device
) -> None:
    weight, w = make_weight(n, k, seed=m, is_exact=True, has_group_base=has_group_base, device=device)
    codes, scale, x = make_tokens(m, k, seed=n, is_exact=True, is_group=is_group)
    y = w4a8_matmul(codes.to(device), scale.to(device), weight, out_dtype=torch.float32, **tiling(m))
    assert torch.equal(y.cpu().double(), x @ w.T)


@pytest.mark.parametrize("is_group", [False, True])
@pytest.mark.parametrize("has_group_base", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_random_inputs_against_float64(
    is_group: bool, has_group_base: bool, m: int, n: int, k: int, out_dtype: torch.dtype, device: torch.device
) -> None:
    """The operands are exact: what is left is accumulation and the output's rounding.

    Hopper's FP8 units keep 13 fraction bits of a running sum, so on a GPU each of a group's steps may lose
    2^-13 of the group's largest partial sum.
    """
    weight, w = make_weight(n, k, seed=m, has_group_base=has_group_base, device=device)
    codes, scale, x = make_tokens(m, k, seed=n, is_exact=False, is_group=is_group)
    y = w4a8_matmul(codes.to(device), scale.to(device), weight, out_dtype=out_dtype, **tiling(m)).cpu().double()
    expected, magnitude = x @ w.T, x.abs() @ w.abs().T
    bound = (2e-6 if device.type == "cpu" else 5e-4) * magnitude
    if out_dtype == torch.bfloat16:
        bound = bound + expected.abs() * 2.0**-8
    assert ((y - expected).abs() <= bound).all()


def read_back(weight: W4A8Weight, device: torch.device) -> torch.Tensor:
    """The decoded weights, (N, K), through one-hot tokens."""
    eye = torch.eye(weight.num_columns).to(FP8).to(device)
    ones = torch.ones(weight.num_columns, 1, device=device)
    return w4a8_matmul(eye, ones, weight, out_dtype=torch.float32, tile=Tile(32, 256, 128, 4, 3)).cpu().double().T


ALL_CODES = torch.cat([torch.arange(16), torch.arange(16).flip(0)]).to(torch.uint8)


def test_every_code_in_every_octave_is_exact(device: torch.device) -> None:
    """Twelve octaves in each row, differently placed; all 16 codes in each, at both places of a word."""
    rows = 40
    codes = torch.stack([ALL_CODES.repeat(OCTAVES).roll(row) for row in range(rows)])
    octaves = torch.stack([torch.arange(OCTAVES).roll(row) for row in range(rows)])
    scale = (octaves + 100 + torch.arange(rows)[:, None]).to(torch.uint8)
    weight = prepare_w4a8_weight(pack_fp4(codes).to(device), scale.to(device))
    assert not weight.has_group_base
    assert torch.equal(read_back(weight, device), dequantize(codes, scale))


def test_every_scale_is_exact(device: torch.device) -> None:
    """One row per E8M0 byte, 2^-127 to 2^125: beyond, a code of 6 overflows float32."""
    scale = torch.arange(253, dtype=torch.uint8)[:, None]
    codes = ALL_CODES.repeat(253, 1)
    weight = prepare_w4a8_weight(pack_fp4(codes).to(device), scale.to(device))
    assert torch.equal(read_back(weight, device), dequantize(codes, scale))


def test_each_group_of_128_may_have_its_own_base(device: torch.device) -> None:
    """Eleven octaves inside each group, 60 between the first and the last; a tail group of one block."""
    codes = ALL_CODES.repeat(3, 9)
    scale = torch.tensor([30, 41, 35, 30, 71, 60, 65, 66, 90], dtype=torch.uint8).repeat(3, 1)
    weight = prepare_w4a8_weight(pack_fp4(codes).to(device), scale.to(device))
    assert weight.has_group_base
    assert weight.num_rounded == 0
    assert torch.equal(read_back(weight, device), dequantize(codes, scale))


def test_wide_scales_are_refused_or_rounded_and_counted(device: torch.device) -> None:
    """Blocks 12 to 40 octaves below the largest of their group: nearest, to 2^-13 of it, and each change counted."""
    codes = ALL_CODES.repeat(5, 4)
    gaps = torch.tensor([11, 12, 13, 15, 40])
    scale = (torch.tensor([[140, 130, 135, 140]]) - gaps[:, None] * torch.tensor([[0, 0, 0, 1]])).to(torch.uint8)
    packed = pack_fp4(codes).to(device)
    with pytest.raises(ValueError, match="scale: expected blocks at most 11 octaves apart within 128 columns, or"):
        prepare_w4a8_weight(packed, scale.to(device))
    weight = prepare_w4a8_weight(packed, scale.to(device), round_wide=True)
    decoded, expected = read_back(weight, device), dequantize(codes, scale)
    assert weight.num_rounded == int((decoded != expected).sum()) > 0
    assert torch.equal(decoded[:, :96], expected[:, :96])
    assert torch.equal(decoded[0], expected[0])
    assert (decoded - expected).abs().max() <= 2.0 ** (140 - 127 - 13)
    step = 2.0 ** (140 - 127 - 12)  # half a unit of the lowest octave: all multiples up to 4 halves are there
    small = expected[1:, 96:].abs() <= 4 * step
    assert ((decoded - expected)[1:, 96:].abs()[small] <= step / 2).all()
    assert (decoded[4, 96:] == 0).all()


def test_small_codes_far_below_are_exact(device: torch.device) -> None:
    """2, 4 and 6 under a scale 13 octaves down are 0.5, 1 and 1.5 under one 11 octaves down: nothing to refuse."""
    codes = torch.tensor([2, 7], dtype=torch.uint8).repeat(1, 64)
    codes[:, 96:] = torch.tensor([4, 6, 7, 0, 12, 14, 15, 8], dtype=torch.uint8).repeat(1, 4)
    scale = torch.tensor([[127, 127, 127, 114]], dtype=torch.uint8)
    weight = prepare_w4a8_weight(pack_fp4(codes).to(device), scale.to(device))
    expected = dequantize(codes, scale)
    assert torch.equal(read_back(weight, device), expected)


def test_a_block_of_zeros_may_carry_any_scale(device: torch.device) -> None:
    """Its own octave is out of range; those beside it, of rows 8 and 64 further, are none the worse."""
    codes = torch.full((80, 256), 0x2, dtype=torch.uint8)
    codes[::3, 32:64], codes[1::3, 128:] = 0, 8
    scale = torch.full((80, 8), 127, dtype=torch.uint8)
    scale[:, 1::2] = 121
    scale[::3, 1], scale[1::3, 4:6], scale[1::3, 6:] = 254, 250, 0
    weight = prepare_w4a8_weight(pack_fp4(codes).to(device), scale.to(device))
    assert not weight.has_group_base
    assert torch.equal(read_back(weight, device), dequantize(codes, scale))


@pytest.mark.parametrize("is_group", [False, True])
@pytest.mark.parametrize("has_group_base", [False, True])
@pytest.mark.parametrize("split_k", [2, 3, 5, 9])
def test_split_k_sums_every_part_once(split_k: int, has_group_base: bool, is_group: bool, device: torch.device) -> None:
    weight, w = make_weight(300, 1056, is_exact=True, has_group_base=has_group_base, device=device)
    codes, scale, x = make_tokens(5, 1056, seed=1, is_exact=True, is_group=is_group)
    workspace = torch.full((split_k * 5 * 300 + 7,), float("nan"), device=device)
    y = w4a8_matmul(codes.to(device), scale.to(device), weight, out_dtype=torch.float32, split_k=split_k,
                    workspace=workspace)  # fmt: skip
    assert torch.equal(y.cpu().double(), x @ w.T)
    assert workspace[split_k * 5 * 300 :].isnan().all()


def test_two_tiles_per_trip_and_parts_of_them(device: torch.device) -> None:
    """8 tiles of k, two at a time: in parts of 8, 4 and 2, and in parts of 4, 4 where 3 are asked."""
    weight, w = make_weight(70, 1024, is_exact=True, has_group_base=True, device=device)
    codes, scale, x = make_tokens(5, 1024, seed=1, is_exact=True, is_group=True)
    for split_k in (1, 2, 3, 4):
        for block_n in (128, 256):
            y = w4a8_matmul(codes.to(device), scale.to(device), weight, out_dtype=torch.float32, split_k=split_k,
                            tile=Tile(16, block_n, 256, 4, 3))  # fmt: skip
            assert torch.equal(y.cpu().double(), x @ w.T)


def test_r16_batch_size_does_not_change_a_row(device: torch.device) -> None:
    """One tile per token block: a token's result is bit-equal whoever stands beside it."""
    weight, _ = make_weight(256, 512, device=device)
    codes, scale, _ = make_tokens(33, 512, seed=4, is_exact=False, is_group=True)
    codes, scale = codes.to(device), scale.to(device)
    options: dict[str, Any] = {"out_dtype": torch.float32, "split_k": 1}
    alone = torch.cat([w4a8_matmul(codes[i : i + 1], scale[i : i + 1], weight, **options) for i in range(33)])
    together = w4a8_matmul(codes, scale, weight, **options)
    if device.type == "cpu":  # NumPy's matmul orders sums by shape
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=2e-3)
    else:
        assert torch.equal(alone, together)


@pytest.mark.parametrize("is_group", [False, True])
def test_r03_poison_outside_is_neither_read_nor_written(is_group: bool, device: torch.device) -> None:
    """NaN around x, its scales and y: between strided rows, beyond the last column, in the output."""
    weight, w = make_weight(70, 160, is_exact=True, device=device)
    codes, scale, x = make_tokens(3, 160, seed=5, is_exact=True, is_group=is_group)
    wide = torch.full((6, 176), float("nan"), device=device).to(FP8)
    wide[0:6:2, :160] = codes.to(device)
    scales = torch.full((6, 5), float("nan"), device=device)
    scales[0:6:2, : scale.shape[1]] = scale.to(device)
    out = torch.full((3, 96), float("nan"), dtype=torch.float32, device=device)
    y = w4a8_matmul(wide[0:6:2, :160], scales[0:6:2, : scale.shape[1]], weight, out_dtype=torch.float32,
                    out=out[:, :70], split_k=1)  # fmt: skip
    assert torch.equal(y.cpu().double(), x @ w.T)
    assert out[:, 70:].isnan().all()


@pytest.mark.parametrize("where", ["x", "x_scale"])
def test_r09_a_nan_reaches_its_token_and_no_other(where: str, device: torch.device) -> None:
    weight, w = make_weight(70, 160, is_exact=True, device=device)
    codes, scale, x = make_tokens(18, 160, seed=6, is_exact=True, is_group=True)
    (codes if where == "x" else scale)[17, 1] = float("nan")
    y = w4a8_matmul(codes.to(device), scale.to(device), weight, out_dtype=torch.float32).cpu()
    assert y[17].isnan().all()
    assert torch.equal(y[:17].double(), (x @ w.T)[:17])


def test_no_tokens_and_bytes(device: torch.device) -> None:
    weight, _ = make_weight(256, 512, device=device)
    empty = torch.empty(0, 512, device=device).to(FP8)
    assert w4a8_matmul(empty, torch.empty(0, 1, device=device), weight).shape == (0, 256)
    assert weight.num_bytes == 256 * 512 * 4.125 / 8 + 2 * 256
    grouped, _ = make_weight(256, 512, has_group_base=True, device=device)
    assert grouped.num_bytes == 256 * 512 * 4.25 / 8


GOOD_X, ROW = torch.zeros(2, 256).to(FP8), torch.ones(2, 1)


@pytest.mark.parametrize(
    ("x", "changes", "message"),
    [
        (GOOD_X.float(), {}, r"x: expected float8_e4m3fn \(M, K\); got torch.float32"),
        (GOOD_X[0], {}, r"x: expected float8_e4m3fn \(M, K\)"),
        (GOOD_X[:, :32], {}, "x: expected K = 256; got K = 32"),
        (GOOD_X.t().contiguous().t(), {}, "x: expected a contiguous last axis"),
        (torch.zeros(4, 259).to(FP8)[:, :256], {}, "x: expected rows 16 bytes apart"),
        (GOOD_X, {"x_scale": ROW.double()}, r"x_scale: expected float32 \(2, 1\) or \(2, 2\); got torch.float64"),
        (GOOD_X, {"x_scale": ROW[:, 0]}, r"x_scale: expected float32 \(2, 1\) or \(2, 2\)"),
        (GOOD_X, {"x_scale": ROW[:1]}, r"x_scale: expected float32 \(2, 1\) or \(2, 2\)"),
        (GOOD_X, {"x_scale": torch.ones(2, 3)}, r"x_scale: expected float32 \(2, 1\) or \(2, 2\)"),
        (GOOD_X, {"x_scale": torch.ones(2, 4)[:, ::2]}, "x_scale: expected a contiguous last axis"),
        (GOOD_X, {"x_scale": torch.empty_strided((2, 1), (1 << 24, 1), device="meta")}, "x_scale: expected rows less"),
        (GOOD_X, {"out_dtype": torch.float16}, "out_dtype: expected bfloat16 or float32; got torch.float16"),
        (GOOD_X, {"tile": Tile(128, 128, 128, 4, 3)}, "tile: expected 16 or 32 x 128 or 256, or 64 x 128"),
        (GOOD_X, {"tile": Tile(64, 256, 128, 4, 3)}, "tile: expected 16 or 32 x 128 or 256, or 64 x 128"),
        (GOOD_X, {"tile": Tile(16, 256, 512, 4, 3)}, "tile: expected .* 128 or 256 of k"),
        (GOOD_X, {"tile": Tile(16, 256, 128, 8, 3)}, "tile: expected .* 4 warps"),
        (GOOD_X, {"split_k": 0}, "split_k: expected 1 to [12]; got 0"),
        (
            GOOD_X,
            {"split_k": 2, "tile": Tile(16, 256, 128, 4, 3), "workspace": torch.empty(3)},
            "workspace: expected float32, at least 256 values",
        ),
        (GOOD_X, {"out": torch.empty(2, 63, dtype=torch.bfloat16)}, "out: expected"),
    ],
)
def test_bad_input_before_any_launch(
    x: torch.Tensor, changes: dict[str, Any], message: str, device: torch.device
) -> None:
    weight, _ = make_weight(64, 256, device=device)
    arguments = {"x_scale": ROW} | changes
    moved = {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in arguments.items()
    }  # fmt: skip
    strided = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    with pytest.raises(ValueError, match=message):
        w4a8_matmul(strided, moved.pop("x_scale"), weight, **moved)


CODES, BYTES = torch.zeros(4, 32, dtype=torch.uint8), torch.full((4, 2), 127, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CODES.float(), BYTES), r"packed: expected uint8 \(N, K / 2\)"),
        ((CODES[0], BYTES), r"packed: expected uint8 \(N, K / 2\)"),
        ((CODES[:, :20], BYTES), "packed: expected N > 0, K a multiple of 32"),
        ((CODES[:0], BYTES[:0]), "packed: expected N > 0"),
        ((CODES, BYTES.float()), r"scale: expected torch.uint8 \(4, 2\)"),
        ((CODES, BYTES[:, :1]), r"scale: expected torch.uint8 \(4, 2\)"),
        ((CODES, torch.full((4, 2), 255, dtype=torch.uint8)), "scale: expected no NaN"),
        ((CODES, BYTES.repeat(1, 2).view(torch.float8_e4m3fn), "nvfp4"), "format: expected mxfp4 .*; got nvfp4"),
    ],
)
def test_bad_weights_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_w4a8_weight(*arguments)
