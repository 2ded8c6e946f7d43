"""W8A8 FP8: split-K, persistent programs, poison, block edges, NaN, bad input. Values: ``test_registry.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels.codec import dequantize
from tokenfab.kernels.fp8_matmul import SCALINGS, fp8_matmul
from tokenfab.kernels.inputs import exact_operand
from tokenfab.kernels.matmul_points import FP8_FORMATS
from tokenfab.kernels.tiles import Tile

FP8 = torch.float8_e4m3fn


def make_operands(
    scaling: str, m: int, n: int, k: int, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(x, w, x_scale, w_scale), exact in float32, and the dequantized float64 x and w."""
    weight, activation = FP8_FORMATS[scaling]
    x, w = (exact_operand(format, rows, k, seed + i, torch.device("cpu"))
            for i, (format, rows) in enumerate(((activation, m), (weight, n))))  # fmt: skip
    assert x.scale is not None
    assert w.scale is not None
    return [x.data, w.data, x.scale, w.scale], dequantize(x).double(), dequantize(w).double()


def to(operands: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [operand.to(device) for operand in operands]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_split_k_sums_every_part_once(scaling: str, split_k: int, device: torch.device) -> None:
    operands, x, w = make_operands(scaling, 5, 300, 1152)
    workspace = torch.full((split_k * 5 * 300 + 7,), float("nan"), device=device)
    y = fp8_matmul(*to(operands, device), scaling, out_dtype=torch.float32, split_k=split_k, workspace=workspace)
    assert torch.equal(y.cpu().double(), x @ w.T)
    assert workspace[split_k * 5 * 300 :].isnan().all()


@pytest.mark.parametrize("num_programs", [1, 3, 1000])
def test_persistent_programs_cover_every_tile_once(num_programs: int, device: torch.device) -> None:
    """9 bands of rows and 3 of columns: more than one band of 8, a short last one."""
    operands, x, w = make_operands("row", 9 * 64 - 5, 180, 128)
    out = torch.full((9 * 64 - 5, 180), float("nan"), device=device)
    fp8_matmul(
        *to(operands, device),
        "row",
        out_dtype=torch.float32,
        tile=Tile(64, 64, 128, 4, 2),
        num_programs=num_programs,
        out=out,
    )
    assert torch.equal(out.cpu().double(), x @ w.T)


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_r03_poison_outside_is_neither_read_nor_written(m: int, scaling: str, device: torch.device) -> None:
    """NaN beyond the last column and row of both operands and scales, and around the output."""
    n, k = 70, 144
    operands, x, w = make_operands(scaling, m, n, k)

    def framed(tensor: torch.Tensor, extra: int) -> torch.Tensor:
        frame = torch.full((tensor.shape[0] + 2, tensor.shape[1] + extra), float("nan"), device=device)
        frame = frame.to(tensor.dtype)
        frame[: tensor.shape[0], : tensor.shape[1]] = tensor.to(device)
        return frame[: tensor.shape[0], : tensor.shape[1]]

    x_scale, w_scale = (framed(s, 3) if s.dim() == 2 else s.to(device) for s in operands[2:])
    out = torch.full((m, 96), float("nan"), device=device)
    y = fp8_matmul(framed(operands[0], 16), framed(operands[1], 16), x_scale, w_scale, scaling,
                   out_dtype=torch.float32, out=out[:, :n])  # fmt: skip
    assert torch.equal(y.cpu().double(), x @ w.T)
    assert out[:, n:].isnan().all()


def test_block_scales_change_at_row_and_column_128(device: torch.device) -> None:
    """Worked by hand: rows 127 and 128 of w stand in different blocks."""
    operands, _, _ = make_operands("block", 2, 129, 256, seed=3)
    operands[3][:] = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    y = fp8_matmul(*to(operands, device), "block", out_dtype=torch.float32).cpu().double()
    raw = [operands[0].double() * operands[2].double().repeat_interleave(128, 1), operands[1].double()]
    halves = [raw[0][:, :128] @ raw[1][:, :128].T, raw[0][:, 128:] @ raw[1][:, 128:].T]
    assert torch.equal(y[:, 127], halves[0][:, 127] + 2 * halves[1][:, 127])
    assert torch.equal(y[:, 128], 4 * halves[0][:, 128] + 8 * halves[1][:, 128])


def test_r09_nan_in_a_token_stays_in_its_row(device: torch.device) -> None:
    operands, x, w = make_operands("row", 4, 40, 128)
    operands[0][1, 5] = float("nan")
    y = fp8_matmul(*to(operands, device), "row", out_dtype=torch.float32).cpu().double()
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], (x @ w.T)[[0, 2, 3]])


def test_no_tokens(device: torch.device) -> None:
    operands, _, _ = make_operands("row", 0, 40, 128)
    assert fp8_matmul(*to(operands, device), "row").shape == (0, 40)


X, W = torch.zeros(2, 256).to(FP8), torch.zeros(130, 256).to(FP8)
ROW = {"x": X, "w": W, "x_scale": torch.ones(2), "w_scale": torch.ones(130), "scaling": "row"}
BLOCK = ROW | {"x_scale": torch.ones(2, 2), "w_scale": torch.ones(2, 2), "scaling": "block"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (ROW | {"x": X.float()}, "x: expected float8_e4m3fn, two axes; got torch.float32"),
        (ROW | {"w": W.view(torch.float8_e5m2)}, "w: expected float8_e4m3fn, two axes; got torch.float8_e5m2"),
        (ROW | {"w": W[0]}, "w: expected float8_e4m3fn, two axes"),
        (ROW | {"w": torch.zeros(256, 130).to(FP8).t()}, "w: expected a contiguous last axis"),
        (ROW | {"w": torch.zeros(130, 257).to(FP8)[:, :256]}, "w: expected rows a multiple of 16 bytes apart"),
        (ROW | {"w": W[:, :128]}, "w: expected K = 256, as x; got K = 128"),
        (ROW | {"w": W[:0]}, "w: expected N and K of 1 or more"),
        (ROW | {"scaling": "rows"}, "scaling: expected one of tensor, row, block; got 'rows'"),
        (ROW | {"x_scale": torch.ones(3)}, r"x_scale: expected float32 \(2,\)"),
        (ROW | {"w_scale": torch.ones(130).double()}, r"w_scale: expected float32 \(130,\); got torch.float64"),
        (BLOCK | {"w_scale": torch.ones(4, 1)}, r"w_scale: expected float32 \(2, 2\)"),
        (BLOCK | {"x_scale": torch.ones(2, 2).t()}, "x_scale: expected a contiguous last axis"),
        (ROW | {"out_dtype": torch.float16}, "out_dtype: expected bfloat16 or float32; got torch.float16"),
        (ROW | {"out": torch.empty(2, 131, dtype=torch.bfloat16)}, "out: expected"),
        (ROW | {"tile": Tile(16, 128, 64, 4, 2)}, "tile: expected block_k = 128"),
        (ROW | {"split_k": 3}, "split_k: expected 1 to 2; got 3"),
        (ROW | {"split_k": 2, "workspace": torch.empty(9)}, "workspace: expected float32, at least 520 values"),
        (ROW | {"x": X[:1].expand(65, 256), "x_scale": torch.ones(65), "split_k": 2}, "split_k: expected 1 beyond 64"),
    ],
)
def test_bad_input_before_any_launch(arguments: dict[str, Any], message: str) -> None:
    """Refused on the host: no tensor here needs to be on a GPU."""
    with pytest.raises(ValueError, match=message):
        fp8_matmul(**arguments)
