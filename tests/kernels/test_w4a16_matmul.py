"""W4A16: exact on representable inputs, exact decoding of every code and scale, poison, tails, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tokenfab.kernels.codec import dequantize
from tokenfab.kernels.fp4_weights import Fp4Weight, prepare_fp4_weight
from tokenfab.kernels.inputs import exact_operand, random_matrix, random_operand
from tokenfab.kernels.tiles import find_tile
from tokenfab.kernels.w4a16_matmul import w4a16_matmul

BLOCK = {"mxfp4": 32, "nvfp4": 16}
TILE = find_tile("w4a16", "mxfp4", "sm_90", 16)


def e2m1(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64))


def make_weight(
    format: str, rows: int, columns: int, seed: int = 0, *, is_exact: bool = False, device: Any = "cpu"
) -> tuple[Fp4Weight, torch.Tensor]:
    """A prepared weight and its dequantized float64 (N, K)."""
    stored = (exact_operand if is_exact else random_operand)(format, rows, columns, seed, torch.device(device))
    assert stored.scale is not None
    prepared = prepare_fp4_weight(stored.data, stored.scale, format, stored.global_scale)
    return prepared, dequantize(stored).double().cpu()


def tokens(rows: int, columns: int, seed: int) -> torch.Tensor:
    return exact_operand("bf16", rows, columns, seed, torch.device("cpu")).data


SHAPES = [(1, 256, 128), (3, 300, 320), (16, 511, 416), (64, 96, 1056), (65, 257, 256), (130, 70, 160)]


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("block_m", "block_n", "block_k"), [(16, 256, 256), (16, 128, 128), (64, 128, 256)])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_every_tile_is_exact(
    format: str, block_m: int, block_n: int, block_k: int, m: int, n: int, k: int, device: torch.device
) -> None:
    weight, values = make_weight(format, n, k, seed=m, is_exact=True, device=device)
    x, tile = tokens(m, k, seed=n), replace(TILE, block_m=block_m, block_n=block_n, block_k=block_k)
    y = w4a16_matmul(x.to(device), weight, out_dtype=torch.float32, tile=tile)
    assert torch.equal(y.cpu().double(), x.double() @ values.T)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_every_code_times_every_scale_is_exact(format: str, device: torch.device) -> None:
    """One-hot tokens read the decoded weights back: all 16 codes under every scale, bit for bit."""
    block = BLOCK[format]
    scales = list(range(1, 255)) if format == "mxfp4" else list(range(0x7F))
    rows, columns = len(scales), 32
    codes = np.tile(np.concatenate([np.arange(16), np.arange(16)[::-1]]), (rows, 1))
    packed = torch.from_numpy((codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8))
    column = torch.tensor(scales, dtype=torch.uint8)[:, None].repeat(1, columns // block)
    if format == "mxfp4":
        column = (column.int() // 2 + 40).to(torch.uint8)  # 40..167: what one tensor can hold
        weight = prepare_fp4_weight(packed.to(device), column.to(device), format)
        factors = torch.exp2(column.double() - 127)
    else:
        weight = prepare_fp4_weight(
            packed.to(device), column.view(torch.float8_e4m3fn).to(device), format, torch.ones(()).to(device)
        )
        factors = column.view(torch.float8_e4m3fn).double()
    y = w4a16_matmul(torch.eye(columns).bfloat16().to(device), weight, out_dtype=torch.float32)
    assert torch.equal(y.cpu().double(), (e2m1(codes) * factors.repeat_interleave(block, dim=1)).T)


@pytest.mark.parametrize("split_k", [2, 3, 5, 9])
def test_split_k_sums_every_part_once(split_k: int, device: torch.device) -> None:
    weight, values = make_weight("mxfp4", 300, 1056, is_exact=True, device=device)
    x = tokens(5, 1056, seed=1)
    workspace = torch.full((split_k * 5 * 300 + 7,), float("nan"), device=device)
    y = w4a16_matmul(x.to(device), weight, out_dtype=torch.float32, split_k=split_k, workspace=workspace)
    assert torch.equal(y.cpu().double(), x.double() @ values.T)
    assert workspace[split_k * 5 * 300 :].isnan().all()


def test_r16_batch_size_does_not_change_a_row(device: torch.device) -> None:
    """With one tile and one part of k a token's result is bit-equal whoever stands beside it."""
    weight, _ = make_weight("nvfp4", 256, 512, device=device)
    x = random_matrix(33, 512, 4, torch.device("cpu")).to(device)
    options: dict[str, Any] = {"out_dtype": torch.float32, "tile": TILE, "split_k": 1}
    alone = torch.cat([w4a16_matmul(x[i : i + 1], weight, **options) for i in range(33)])
    together = w4a16_matmul(x, weight, **options)
    if device.type == "cpu":  # NumPy's matmul orders sums by shape
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    else:
        assert torch.equal(alone, together)


def test_r03_poison_outside_is_neither_read_nor_written(device: torch.device) -> None:
    """NaN around x and y: between strided rows, beyond the last column, in the output."""
    weight, values = make_weight("mxfp4", 70, 160, is_exact=True, device=device)
    x = tokens(3, 160, seed=5)
    wide = torch.full((6, 176), float("nan"), dtype=torch.bfloat16, device=device)
    wide[0:6:2, :160] = x.to(device)
    out = torch.full((3, 96), float("nan"), dtype=torch.float32, device=device)
    y = w4a16_matmul(wide[0:6:2, :160], weight, out_dtype=torch.float32, out=out[:, :70])
    assert torch.equal(y.cpu().double(), x.double() @ values.T)
    assert out[:, 70:].isnan().all()


def test_r08_zero_scales_zero_blocks_and_extreme_ranges(device: torch.device) -> None:
    packed = torch.full((2, 16), 0x77, dtype=torch.uint8)
    zero = torch.zeros(2, 2, dtype=torch.float8_e4m3fn)
    weight = prepare_fp4_weight(packed.to(device), zero.to(device), "nvfp4", torch.ones(()).to(device))
    assert (w4a16_matmul(torch.ones(1, 32, dtype=torch.bfloat16, device=device), weight) == 0).all()
    # a block of zeros may carry any scale; the others keep the widest range of E8M0
    codes = torch.tensor([[0x00] * 16, [0x22] * 16, [0x22] * 16], dtype=torch.uint8)
    scale = torch.tensor([[255 - 1], [254], [3]], dtype=torch.uint8)
    weight = prepare_fp4_weight(codes.to(device), scale.to(device), "mxfp4")
    x = torch.zeros(1, 32, dtype=torch.bfloat16, device=device)
    x[0, 0] = 2.0**-100
    y = w4a16_matmul(x, weight, out_dtype=torch.float32).cpu()
    assert y.tolist() == [[0.0, 2.0**27, 0.0]]  # 2^-224 is below float32


def test_no_tokens(device: torch.device) -> None:
    weight, _ = make_weight("mxfp4", 64, 64, device=device)
    assert w4a16_matmul(torch.empty(0, 64, dtype=torch.bfloat16, device=device), weight).shape == (0, 64)


GOOD_X = torch.zeros(2, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "changes", "message"),
    [
        (GOOD_X.float(), {}, r"x: expected bfloat16 \(M, K\); got torch.float32"),
        (GOOD_X[0], {}, r"x: expected bfloat16 \(M, K\)"),
        (GOOD_X[:, :32], {}, "x: expected K = 64; got K = 32"),
        (GOOD_X.t().contiguous().t(), {}, "x: expected a contiguous last axis"),
        (torch.zeros(4, 67, dtype=torch.bfloat16)[:, :64], {}, "x: expected rows 16 bytes apart"),
        (GOOD_X, {"out_dtype": torch.float16}, "out_dtype: expected bfloat16 or float32; got torch.float16"),
        (GOOD_X, {"tile": replace(TILE, block_m=8)}, "tile: expected 16 to 128 tokens, .* got Tile.block_m=8"),
        (GOOD_X, {"tile": replace(TILE, block_n=64)}, "tile: expected 16 to 128 tokens, 128 or 256 of n and k"),
        (GOOD_X, {"tile": replace(TILE, block_k=64)}, "tile: expected 16 to 128 tokens, 128 or 256 of n and k"),
        (GOOD_X, {"tile": replace(TILE, num_warps=8)}, "tile: expected .* 4 warps"),
        (GOOD_X, {"split_k": 0}, "split_k: expected 1 to 1; got 0"),
        (GOOD_X, {"split_k": 2}, "split_k: expected 1 to 1; got 2"),
        (GOOD_X, {"out": torch.empty(2, 63, dtype=torch.bfloat16)}, "out: expected"),
    ],
)
def test_bad_input_before_any_launch(
    x: torch.Tensor, changes: dict[str, Any], message: str, device: torch.device
) -> None:
    weight, _ = make_weight("mxfp4", 64, 64, device=device)
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    strided = x if device.type == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    with pytest.raises(ValueError, match=message):
        w4a16_matmul(strided, weight, **moved)


@pytest.mark.parametrize(
    ("packed", "scale", "format", "global_scale", "message"),
    [
        (torch.zeros(4, 16), torch.zeros(4, 1), "mxfp4", None, r"packed: expected uint8 \(N, K / 2\)"),
        (torch.zeros(4, 20, dtype=torch.uint8), torch.zeros(4, 1), "mxfp4", None, "K a multiple of 32"),
        (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 1), "mxfp4", None, "scale: expected torch.uint8"),
        (
            torch.zeros(4, 16, dtype=torch.uint8),
            torch.zeros(4, 2, dtype=torch.uint8),
            "mxfp4",
            None,
            r"scale: expected .*\(4, 1\)",
        ),
        (torch.zeros(4, 16, dtype=torch.uint8), torch.full((4, 1), 255, dtype=torch.uint8), "mxfp4", None, "NaN"),
        (
            torch.zeros(4, 16, dtype=torch.uint8),
            torch.zeros(4, 1, dtype=torch.uint8),
            "fp4",
            None,
            "format: expected mxfp4 or nvfp4",
        ),
        (
            torch.zeros(4, 16, dtype=torch.uint8),
            torch.zeros(4, 2).to(torch.float8_e4m3fn),
            "nvfp4",
            None,
            "global_scale",
        ),
        (
            torch.zeros(4, 16, dtype=torch.uint8),
            torch.full((4, 2), -1.0).to(torch.float8_e4m3fn),
            "nvfp4",
            torch.ones(()),
            "0 or more",
        ),
        (
            torch.full((2, 16), 0x22, dtype=torch.uint8),
            torch.tensor([[254], [0]], dtype=torch.uint8),
            "mxfp4",
            None,
            "within 252",
        ),
    ],
)
def test_bad_weights_are_refused(
    packed: torch.Tensor, scale: torch.Tensor, format: str, global_scale: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_fp4_weight(packed, scale, format, global_scale)
