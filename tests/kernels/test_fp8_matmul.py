"""W8A8 FP8: exact on representable inputs, rounding only on random ones, tails, poison, split-K, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels.fp8_matmul import SCALINGS, fp8_matmul

FP8 = torch.float8_e4m3fn
# tokens, rows, columns: both kernels, either side of 64 tokens, tails of every tile, one row of 128 and less
SHAPES = [(1, 256, 128), (3, 300, 320), (64, 96, 1056), (65, 257, 144), (200, 131, 272)]


def make_operands(
    scaling: str, m: int, n: int, k: int, seed: int = 0, *, is_exact: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(x, w, x_scale, w_scale) and the dequantized float64 x and w. ``is_exact``: small integers, scales 2^-2..2^2."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        if is_exact:
            return torch.randint(-3, 4, shape, generator=generator).to(torch.float32).to(FP8)
        return torch.randn(shape, generator=generator).mul(40).to(FP8)

    def scales(*shape: int) -> torch.Tensor:
        if is_exact:
            return torch.exp2(torch.randint(-2, 3, shape, generator=generator).float())
        return torch.rand(shape, generator=generator) + 0.05

    x, w, groups, bands = values(m, k), values(n, k), -(-k // 128), -(-n // 128)
    if scaling == "block":
        x_scale, w_scale = scales(m, groups), scales(bands, groups)
        x_factor = x_scale.repeat_interleave(128, 1)[:, :k]
        w_factor = w_scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    else:
        x_scale, w_scale = (scales(1), scales(1)) if scaling == "tensor" else (scales(m), scales(n))
        x_factor, w_factor = x_scale.reshape(-1, 1), w_scale.reshape(-1, 1)
    return [x, w, x_scale, w_scale], x.double() * x_factor.double(), w.double() * w_factor.double()


def to(operands: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [operand.to(device) for operand in operands]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_exact_on_representable_inputs(scaling: str, m: int, n: int, k: int, device: torch.device) -> None:
    operands, x, w = make_operands(scaling, m, n, k, seed=m, is_exact=True)
    y = fp8_matmul(*to(operands, device), scaling, out_dtype=torch.float32)
    assert torch.equal(y.cpu().double(), x @ w.T)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_random_inputs_against_float64(
    scaling: str, m: int, n: int, k: int, out_dtype: torch.dtype, device: torch.device
) -> None:
    """The operands are exact: what is left is accumulation and the output's rounding.

    Hopper's FP8 units keep 13 fraction bits of a running sum, so on a GPU each of a group's steps may lose
    2^-13 of the group's largest partial sum.
    """
    operands, x, w = make_operands(scaling, m, n, k, seed=n)
    y = fp8_matmul(*to(operands, device), scaling, out_dtype=out_dtype).cpu().double()
    expected, magnitude = x @ w.T, x.abs() @ w.abs().T
    bound = (2e-6 if device.type == "cpu" else 5e-4) * magnitude
    if out_dtype == torch.bfloat16:
        bound = bound + expected.abs() * 2.0**-8
    assert ((y - expected).abs() <= bound).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_split_k_sums_every_part_once(scaling: str, split_k: int, device: torch.device) -> None:
    operands, x, w = make_operands(scaling, 5, 300, 1152, is_exact=True)
    workspace = torch.full((split_k * 5 * 300 + 7,), float("nan"), device=device)
    y = fp8_matmul(*to(operands, device), scaling, out_dtype=torch.float32, split_k=split_k, workspace=workspace)
    assert torch.equal(y.cpu().double(), x @ w.T)
    assert workspace[split_k * 5 * 300 :].isnan().all()


@pytest.mark.parametrize("num_programs", [1, 3, 1000])
def test_persistent_programs_cover_every_tile_once(num_programs: int, device: torch.device) -> None:
    """9 bands of rows and 3 of columns: more than one band of 8, a short last one."""
    operands, x, w = make_operands("row", 9 * 64 - 5, 180, 128, is_exact=True)
    out = torch.full((9 * 64 - 5, 180), float("nan"), device=device)
    fp8_matmul(
        *to(operands, device),
        "row",
        out_dtype=torch.float32,
        block_m=64,
        block_n=64,
        num_programs=num_programs,
        out=out,
    )
    assert torch.equal(out.cpu().double(), x @ w.T)


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_poison_outside_is_neither_read_nor_written(m: int, scaling: str, device: torch.device) -> None:
    """NaN beyond the last column and row of both operands and scales, and around the output."""
    n, k = 70, 144
    operands, x, w = make_operands(scaling, m, n, k, is_exact=True)

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
    operands, _, _ = make_operands("block", 2, 129, 256, seed=3, is_exact=True)
    operands[3][:] = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    y = fp8_matmul(*to(operands, device), "block", out_dtype=torch.float32).cpu().double()
    raw = [operands[0].double() * operands[2].double().repeat_interleave(128, 1), operands[1].double()]
    halves = [raw[0][:, :128] @ raw[1][:, :128].T, raw[0][:, 128:] @ raw[1][:, 128:].T]
    assert torch.equal(y[:, 127], halves[0][:, 127] + 2 * halves[1][:, 127])
    assert torch.equal(y[:, 128], 4 * halves[0][:, 128] + 8 * halves[1][:, 128])


def test_nan_in_a_token_stays_in_its_row(device: torch.device) -> None:
    operands, x, w = make_operands("row", 4, 40, 128, is_exact=True)
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
        (ROW | {"split_k": 3}, "split_k: expected 1 to 2; got 3"),
        (ROW | {"split_k": 2, "workspace": torch.empty(9)}, "workspace: expected float32, at least 520 values"),
        (ROW | {"x": X[:1].expand(65, 256), "x_scale": torch.ones(65), "split_k": 2}, "split_k: expected 1 beyond 64"),
    ],
)
def test_bad_input_before_any_launch(arguments: dict[str, Any], message: str) -> None:
    """Refused on the host: no tensor here needs to be on a GPU."""
    with pytest.raises(ValueError, match=message):
        fp8_matmul(**arguments)
