"""MXFP8, MXFP4 and NVFP4 on both sides, MXFP4 by MXFP8: every scale, NaN, split-K, poison, bad input.

Values over all shapes: ``test_registry.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels import block_scaled_matmul as module
from tokenfab.kernels.block_scaled_matmul import OPERANDS, block_scaled_matmul
from tokenfab.kernels.codec import QuantizedTensor, dequantize, pack_fp4, quantize
from tokenfab.kernels.formats import get_format
from tokenfab.kernels.inputs import exact_operand
from tokenfab.kernels.tiles import Tile

FORMATS = list(OPERANDS)
PAIRS = [*((name, name) for name in FORMATS), ("mxfp4", "mxfp8")]  # weights, activations


@pytest.fixture(autouse=True)
def native(device: torch.device, request: pytest.FixtureRequest) -> None:
    is_old = device.type == "cuda" and torch.cuda.get_device_capability()[0] < 10
    if is_old and "nvfp4" in request.node.name:
        pytest.skip("NVFP4 on both sides needs a Blackwell GPU")


def make_operand(format: str, rows: int, columns: int, seed: int) -> QuantizedTensor:
    return exact_operand(format, rows, columns, seed, torch.device("cpu"))


def multiply(x: QuantizedTensor, w: QuantizedTensor, device: torch.device, **options: Any) -> torch.Tensor:
    assert x.scale is not None
    assert w.scale is not None
    factor = None
    if x.global_scale is not None and w.global_scale is not None:
        factor = (x.global_scale * w.global_scale).to(device)
    operands = (t.to(device) for t in (x.data, w.data, x.scale, w.scale))
    y = block_scaled_matmul(
        *operands, w.format.name, x_format=x.format.name, global_scale=factor, **{"out_dtype": torch.float32} | options
    )
    return y.cpu().double()


def expect(x: QuantizedTensor, w: QuantizedTensor) -> torch.Tensor:
    return dequantize(x).double() @ dequantize(w).double().T


@pytest.mark.parametrize("format", FORMATS)
def test_every_scale_is_exact(format: str, device: torch.device) -> None:
    """One row of weights per scale byte, against a token of ones: 2^-127 to 2^127, or all of E4M3."""
    row = get_format(format)
    scales = list(range(1, 0x7F)) if format == "nvfp4" else list(range(20, 235))
    columns, per = 32, 32 // (16 if format == "nvfp4" else 32)
    scale = torch.tensor(scales, dtype=torch.uint8)[:, None].repeat(1, per)
    one = pack_fp4(torch.full((len(scales), columns), 2, dtype=torch.uint8)) if row.packing else None
    data = one if one is not None else torch.ones(len(scales), columns).to(torch.float8_e4m3fn)
    scale = scale.view(torch.float8_e4m3fn) if format == "nvfp4" else scale
    one_scale = torch.tensor(1.0) if row.tensor_scale else None
    w = QuantizedTensor(row, data, scale, one_scale, (len(scales), columns))
    x = quantize(torch.ones(1, columns), format, **({"global_scale": 1.0} if row.tensor_scale else {}))
    assert torch.equal(multiply(x, w, device), expect(x, w))
    assert expect(x, w).unique().numel() == len(scales)


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4"])
def test_r09_a_nan_scale_reaches_its_row_and_no_other(format: str, device: torch.device) -> None:
    x, w = (make_operand(format, rows, 64, seed=rows) for rows in (4, 40))
    assert x.scale is not None
    expected = expect(x, w)
    x.scale[1, 1] = 255
    y = multiply(x, w, device)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize(("format", "x_format"), PAIRS)
@pytest.mark.parametrize("m", [5, 70])
@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_split_k_sums_every_part_once(format: str, x_format: str, m: int, split_k: int, device: torch.device) -> None:
    x, w = (make_operand(name, rows, 1792, seed=rows) for name, rows in ((x_format, m), (format, 130)))
    workspace = torch.full((split_k * m * 130 + 7,), float("nan"), device=device)
    y = multiply(x, w, device, split_k=split_k, workspace=workspace)
    assert torch.equal(y, expect(x, w))
    assert workspace[split_k * m * 130 :].isnan().all()


def test_many_bands_of_tiles(device: torch.device) -> None:
    """19 tiles of tokens: two bands of 8 and a short one; 3 of rows."""
    x, w = (make_operand("mxfp8", rows, 128, seed=rows) for rows in (19 * 16 - 3, 70))
    out = torch.full((19 * 16 - 3, 70), float("nan"), device=device)
    assert torch.equal(multiply(x, w, device, tile=Tile(16, 32, 128, 4, 2), out=out), expect(x, w))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [3, 70])
def test_r03_poison_outside_is_neither_read_nor_written(format: str, m: int, device: torch.device) -> None:
    """0xFF (NaN as E4M3 and E8M0) beyond the last row and column of all four inputs; NaN around y."""
    x, w = (make_operand(format, rows, 160, seed=rows) for rows in (m, 70))

    def framed(tensor: torch.Tensor | None) -> torch.Tensor:
        assert tensor is not None
        rows, columns = tensor.shape
        frame = torch.full((rows + 3, columns + 16), 0xFF, dtype=torch.uint8)
        frame[:rows, :columns] = tensor.view(torch.uint8)
        return frame.view(tensor.dtype).to(device)[:rows, :columns]

    factor = torch.tensor(0.25, device=device) if format == "nvfp4" else None
    out = torch.full((m, 96), float("nan"), device=device)
    y = block_scaled_matmul(framed(x.data), framed(w.data), framed(x.scale), framed(w.scale), format,
                            global_scale=factor, out_dtype=torch.float32, out=out[:, :70])  # fmt: skip
    assert torch.equal(y.cpu().double(), expect(x, w))
    assert out[:, 70:].isnan().all()


def test_no_tokens(device: torch.device) -> None:
    x, w = (make_operand("mxfp8", rows, 64, seed=1) for rows in (0, 40))
    assert multiply(x, w, device).shape == (0, 40)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """As on sm_120, where MXFP4 is expanded beside MXFP8; the codes per element of each launch's operands."""
    seen: list[set[int]] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                seen.append({options["PACK_A"], options["PACK_B"]})
                kernel[grid](*arguments, **options)

            return launch

    kernel = module._block_scaled_kernel
    monkeypatch.setattr(module, "_block_scaled_kernel", Recorder())
    monkeypatch.setattr(module, "arch_of", lambda _: "sm_120")
    return seen


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 256, 256), (3, 300, 320), (64, 96, 1056), (65, 257, 160), (200, 131, 288)]
)
def test_expanded_mxfp4_by_mxfp8(
    m: int, n: int, k: int, is_exact: bool, packs: list[set[int]], device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(n)
    x, w = (
        make_operand(name, rows, k, rows) if is_exact else quantize(torch.randn(rows, k, generator=generator) * 3, name)
        for name, rows in (("mxfp8", m), ("mxfp4", n))
    )
    out = torch.full((m, n), float("nan"), device=device)
    y, expected = multiply(x, w, device, out=out), expect(x, w)
    assert packs == [{1, 8}]
    bound = 4e-6 * (dequantize(x).double().abs() @ dequantize(w).double().abs().T)
    assert torch.equal(y, expected) if is_exact else ((y - expected).abs() <= bound).all()


@pytest.mark.parametrize("m", [64, 96])
def test_every_expanded_code_under_every_scale_is_exact(m: int, packs: list[set[int]], device: torch.device) -> None:
    """One-hot tokens read the weights back: 16 codes at each place of a word, on either side of the instruction."""
    scales = torch.arange(20, 235, dtype=torch.uint8)[:, None].repeat(1, m // 32)
    codes = torch.stack([torch.arange(m).add(row).remainder(16).to(torch.uint8) for row in range(len(scales))])
    w = QuantizedTensor(get_format("mxfp4"), pack_fp4(codes), scales, None, (len(scales), m))
    ones = torch.full((m, m // 32), 127, dtype=torch.uint8)
    x = QuantizedTensor(get_format("mxfp8"), torch.eye(m).to(torch.float8_e4m3fn), ones, None, (m, m))
    assert torch.equal(multiply(x, w, device), dequantize(w).double().T)
    assert packs == [{1, 8}]


@pytest.mark.parametrize("m", [5, 70])
def test_expanded_parts_of_k_are_summed_once(m: int, packs: list[set[int]], device: torch.device) -> None:
    x, w = (make_operand(name, rows, 416, rows) for name, rows in (("mxfp8", m), ("mxfp4", 70)))
    assert torch.equal(multiply(x, w, device, split_k=3), expect(x, w))
    assert packs == [{1, 8}]


@pytest.mark.parametrize(("columns", "start"), [(96, 0), (98, 0), (96, 2), (96, 4)])
def test_rows_to_be_expanded_stand_on_a_grid_of_words(
    columns: int, start: int, packs: list[set[int]], device: torch.device
) -> None:
    """Rows of 80 bytes inside wider ones of 0xFF, from byte ``start``."""
    x, w = (make_operand(name, rows, 160, rows) for name, rows in (("mxfp8", 5), ("mxfp4", 70)))
    frame = torch.full((72, columns), 0xFF, dtype=torch.uint8, device=device)
    frame[:70, start : start + 80] = w.data.to(device)
    assert x.scale is not None
    assert w.scale is not None
    operands = (x.data.to(device), frame[:70, start : start + 80], x.scale.to(device), w.scale.to(device))
    options: dict[str, Any] = {"x_format": "mxfp8", "out_dtype": torch.float32}
    if columns % 4 or start % 4:
        with pytest.raises(ValueError, match=f"w: expected rows on a grid of 4 bytes; got offset {start}, stride"):
            block_scaled_matmul(*operands, "mxfp4", **options)
        return
    y = block_scaled_matmul(*operands, "mxfp4", **options)
    assert torch.equal(y.cpu().double(), expect(x, w))
    assert packs == [{1, 8}]


@pytest.mark.parametrize(("format", "x_format"), [("mxfp4", "mxfp4"), ("mxfp8", "mxfp8")])
def test_no_other_pair_is_expanded(format: str, x_format: str, packs: list[set[int]], device: torch.device) -> None:
    x, w = (make_operand(name, rows, 64, rows) for name, rows in ((x_format, 3), (format, 40)))
    assert torch.equal(multiply(x, w, device), expect(x, w))
    assert packs == [{2 if format == "mxfp4" else 1}]


CODES, BYTES = torch.zeros(2, 64).to(torch.float8_e4m3fn), torch.full((2, 2), 127, dtype=torch.uint8)
MXFP8 = {"x": CODES, "w": CODES, "x_scale": BYTES, "w_scale": BYTES, "format": "mxfp8"}
PACKED, SCALES = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 4).to(torch.float8_e4m3fn)
NVFP4 = {"x": PACKED, "w": PACKED, "x_scale": SCALES, "w_scale": SCALES, "format": "nvfp4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (MXFP8 | {"format": "fp8"}, "format: expected one of mxfp8, mxfp4, nvfp4; got 'fp8'"),
        (MXFP8 | {"x": PACKED}, "x: expected torch.float8_e4m3fn, two axes; got torch.uint8"),
        (MXFP8 | {"w": CODES[0]}, "w: expected torch.float8_e4m3fn, two axes"),
        (MXFP8 | {"w_scale": SCALES}, "w_scale: expected torch.uint8, two axes; got torch.float8_e4m3fn"),
        (MXFP8 | {"x_scale": BYTES.t()}, "x_scale: expected a contiguous last axis"),
        (MXFP8 | {"x": CODES[:, :48]}, "x: expected K a multiple of 32; got K = 48"),
        (MXFP8 | {"w": CODES[:, :32]}, "w: expected K = 64, as x; got K = 32"),
        (MXFP8 | {"x_scale": BYTES[:1]}, r"x_scale: expected \(2, 2\)"),
        (MXFP8 | {"global_scale": torch.ones(())}, "global_scale: expected None for mxfp8"),
        (NVFP4, "global_scale: expected float32 of one value for nvfp4; got None"),
        (NVFP4 | {"global_scale": torch.ones(2)}, "global_scale: expected float32 of one value on cpu"),
        (MXFP8 | {"x_format": "mxfp4"}, "x_format: expected mxfp8; got 'mxfp4'"),
        (MXFP8 | {"format": "mxfp4", "x_format": "nvfp4"}, "x_format: expected mxfp4 or mxfp8; got 'nvfp4'"),
        (MXFP8 | {"out_dtype": torch.float16}, "out_dtype: expected bfloat16 or float32"),
        (MXFP8 | {"out": torch.empty(2, 3, dtype=torch.bfloat16)}, "out: expected"),
        (MXFP8 | {"split_k": 2}, "split_k: expected 1 to 1; got 2"),
    ],
)
def test_bad_input_before_any_launch(arguments: dict[str, Any], message: str) -> None:
    """Refused on the host: no tensor here needs to be on a GPU."""
    with pytest.raises(ValueError, match=message):
        block_scaled_matmul(**arguments)
