"""Quantize kernels against the codec, bit for bit; fused ones against plain float32 torch, then the codec."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels import codec, fused_quantize, quantize, quantize_tiles
from tokenfab.kernels.codec import QuantizedTensor
from tokenfab.kernels.formats import SCALE_RULES, get_format
from tokenfab.kernels.fused_quantize import rms_norm_quantize, swiglu_quantize
from tokenfab.kernels.quantize import empty_quantized, quantize_activation
from tokenfab.kernels.reference import rms_norm_bounds, rms_norm_ref, swiglu_bounds, swiglu_ref

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN and infinity
FORMATS = ("fp8", "fp8_row", "fp8_group", "mxfp8", "mxfp4", "nvfp4")
DTYPES = (torch.bfloat16, torch.float32)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
POISON = -1  # all bits set: NaN in every float, 255 in every byte
PADDING = 16


def raw(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, as integers."""
    return x.cpu().contiguous().view(INTEGERS[x.element_size()])


def assert_same(got: torch.Tensor | None, want: torch.Tensor | None, what: str) -> None:
    """Equal bits, but for the payload of a float32 or BF16 NaN."""
    if got is None or want is None:
        assert got is want, what
        return
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    differ = raw(got) != raw(want)
    if got.dtype in DTYPES:
        differ &= ~(got.isnan() & want.isnan()).cpu()
    assert not differ.any(), f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {differ.nonzero()[:1]}"


def assert_equal(got: QuantizedTensor, want: QuantizedTensor) -> None:
    assert (got.format, tuple(got.shape)) == (want.format, tuple(want.shape))
    assert_same(got.global_scale, want.global_scale, "global_scale")
    assert_same(got.scale, want.scale, "scale")
    assert_same(got.data, want.data, "data")


def poisoned_part(part: torch.Tensor | None, transposed: bool = False) -> tuple[Any, Any]:
    """A tensor like ``part`` inside a larger buffer of set bits, and that buffer as integers."""
    if part is None:
        return None, None
    if part.dim() == 0:
        buffer = torch.full((), POISON, dtype=torch.int32, device=part.device)
        return buffer.view(part.dtype), None
    rows, columns = part.shape[::-1] if transposed else part.shape
    integers = INTEGERS[part.element_size()]
    fill = 255 if integers == torch.uint8 else POISON
    buffer = torch.full((rows + 2, columns + 2 * PADDING), fill, dtype=integers, device=part.device)
    inner = buffer.view(part.dtype)[1 : 1 + rows, PADDING : PADDING + columns]
    return (inner.t() if transposed else inner), buffer


class Poisoned:
    """An ``out`` whose parts lie in larger poisoned buffers; scales transposed, as some matmuls want them."""

    def __init__(self, format: str, rows: int, columns: int, device: torch.device) -> None:
        plain = empty_quantized(format, rows, columns, device)
        self.data, self.data_buffer = poisoned_part(plain.data)
        self.scale, self.scale_buffer = poisoned_part(plain.scale, transposed=True)
        self.global_scale, _ = poisoned_part(plain.global_scale)
        self.out = QuantizedTensor(plain.format, self.data, self.scale, self.global_scale, (rows, columns))

    def assert_padding_untouched(self) -> None:
        for inner, buffer in ((self.data, self.data_buffer), (self.scale, self.scale_buffer)):
            if buffer is not None:
                inner.view(INTEGERS[inner.element_size()]).fill_(buffer[0, 0])
                assert (buffer == buffer[0, 0]).all()


def within_nan(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` as rows of a larger matrix of NaN, so that a read outside is seen."""
    buffer = torch.full((x.shape[0] + 2, x.shape[1] + 2 * PADDING), NAN, dtype=x.dtype, device=device)
    inner = buffer[1 : 1 + x.shape[0], PADDING : PADDING + x.shape[1]]
    inner.copy_(x)
    return inner


def spread_values(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random values over many binades."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(3 * torch.randn(rows, columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * size


def edge_rows(columns: int) -> torch.Tensor:
    """One row per kind of unusual content, the unusual first or last in it."""
    base = spread_values(1, columns, seed=columns)[0]
    rows = [base, torch.zeros(columns), -torch.zeros(columns)]
    for special, place in ((NAN, 0), (-NAN, -1), (INF, -1), (-INF, 0), (3.3e38, 0), (-3.3e38, -1)):
        row = base.clone()
        row[place] = special
        rows.append(row)
    for size in (1e-45, 2.0**-140, 2.0**-127, 2.0**-126, 2.0**-118, 1e-30, 1e-12, 1e-4, 9e-5, 1e30):
        rows.append(base.sign() * size * torch.linspace(0, 1, columns))
    rows.append(torch.where(torch.arange(columns) % 2 == 0, 448.0, -449.0))
    return torch.stack(rows)


def check(x: torch.Tensor, format: str, device: torch.device, **options: Any) -> None:
    """Quantize strided ``x`` into a poisoned ``out`` and compare with the codec."""
    want = codec.quantize(x, format, **options)
    poisoned = Poisoned(format, *x.shape, device)
    got = quantize_activation(within_nan(x, device), format, out=poisoned.out, **options)
    assert got is poisoned.out
    assert_equal(got, want)
    poisoned.assert_padding_untouched()


# --- plain quantization -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [32, 128, 160, 2880])
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_equals_codec(rows: int, columns: int, format: str, dtype: torch.dtype, device: torch.device) -> None:
    check(spread_values(rows, columns, seed=rows + columns).to(dtype), format, device)


WIDTHS = (1, 2, 16, 33, 48, 127, 129, 1184, 8192 + 160)
WIDTH_CASES = [(name, width) for name in FORMATS for width in WIDTHS if width % get_format(name).column_multiple == 0]


@pytest.mark.parametrize(("format", "columns"), WIDTH_CASES)
def test_odd_widths(columns: int, format: str, device: torch.device) -> None:
    check(spread_values(2, columns), format, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [32, 160])
def test_r08_edges(columns: int, format: str, dtype: torch.dtype, device: torch.device) -> None:
    """Zeros, NaN, infinity, subnormals and the largest values, each in its own scale group and all in one tensor."""
    x = edge_rows(columns).to(dtype)
    check(x, format, device)
    if format in ("fp8", "nvfp4") and columns == 32:  # scales that cover the tensor: each row alone too
        for row in x:
            check(row[None], format, device)


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("format", ["mxfp8", "mxfp4"])
def test_scale_rules(format: str, rule: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Every exponent with every mantissa beside which a rule changes its mind."""
    monkeypatch.setattr(quantize_tiles, "BLOCK_TILE", (8192, 1024, 4))  # fewer programs for the interpreter
    changes = (0x400000, 0x600000, 0x700000, 0x780000)
    mantissas = sorted({0, 1, 0x7FFFFF, *(change + near for change in changes for near in (-1, 0, 1))})
    amax = (torch.arange(256)[:, None] << 23 | torch.tensor(mantissas)[None, :]).to(torch.int32).view(torch.float32)
    blocks = amax.reshape(-1, 1) * torch.linspace(-1, 1, 32)[None, :]
    blocks[:, 5] = amax.flatten()
    check(blocks.reshape(-1, 32 * 32), format, device, scale_rule=rule)


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "nvfp4"])
def test_every_midpoint(format: str, device: torch.device) -> None:
    """With a scale of 1: every code, every midpoint and both neighbours, both signs, and beyond the largest."""
    row = get_format(format)
    codes = torch.arange(0x7F if row.element == "e4m3" else 8, dtype=torch.uint8)
    values = codec.decode_e4m3(codes) if row.element == "e4m3" else codec.decode_e2m1(codes)
    midpoints = (values[1:] + values[:-1]) / 2
    around = torch.cat([values, midpoints])
    bits = around.view(torch.int32)
    near = torch.cat([around, (bits + 1).view(torch.float32), (bits - 1).clamp(min=0).view(torch.float32)])
    near = torch.cat([near, torch.tensor([2.0**-126, 1e-45, row.element_max])])
    near = near[near <= row.element_max]
    near = torch.cat([near, -near])
    assert row.block is not None
    width = row.block[1] - 1
    near = torch.nn.functional.pad(near, (0, -len(near) % width)).reshape(-1, width)
    x = torch.cat([torch.full((len(near), 1), row.element_max), near], dim=1)
    options = {"global_scale": 1.0} if row.tensor_scale else {}
    scale = quantize_activation(x.to(device), format, **options).scale
    assert scale is not None
    assert (raw(scale) == (0x38 if row.tensor_scale else 127)).all()
    check(x, format, device, **options)


@pytest.mark.parametrize("global_scale", [2.0**-118, 0.37, 3.0e38])
def test_given_global_scale(global_scale: float, device: torch.device) -> None:
    """A number and a tensor on the device give the same, whatever the scale; infinity saturates."""
    x = edge_rows(48)
    check(x, "nvfp4", device, global_scale=global_scale)
    given = torch.tensor(global_scale, device=device)
    got = quantize_activation(x.to(device), "nvfp4", global_scale=given)
    assert_equal(got, codec.quantize(x, "nvfp4", global_scale=global_scale))


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_more_tiles_than_partials(format: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The largest value is found in every tile, also where a program of the first pass takes several."""
    monkeypatch.setattr(quantize_tiles, "MAX_PARTIALS", 4)
    monkeypatch.setattr(quantize_tiles, "BLOCK_TILE", (256, 128, 4))
    x = spread_values(11, 160)
    workspace = torch.full((4,), 0x7F7FFFFF, dtype=torch.int32, device=device)
    for row in (0, 5, 10):
        for column in (0, 159):
            y = x.clone()
            y[row, column] = 1e6
            got = quantize_activation(y.to(device), format, workspace=workspace)
            assert_equal(got, codec.quantize(y, format))


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_r03_stale_workspace_is_not_read(format: str, device: torch.device) -> None:
    x = spread_values(3, 160)
    workspace = torch.full((quantize_tiles.MAX_PARTIALS + 3,), 0x7F7FFFFF, dtype=torch.int32, device=device)
    for _ in range(2):
        got = quantize_activation(x.to(device), format, workspace=workspace)
        assert_equal(got, codec.quantize(x, format))


@pytest.mark.parametrize("op", ["quantize", "rms_norm", "swiglu"])
def test_r04_offsets_beyond_int32(op: str, device: torch.device) -> None:
    """Rows 2^30 values apart: the third starts where 32-bit offsets wrap. Only the touched pages exist."""
    rows, stride = 3, 1 << 30

    def far(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((rows - 1) * stride + columns, dtype=dtype, device=device).as_strided(
            (rows, columns), (stride, 1)
        )

    x = far(64, torch.bfloat16)
    x.copy_(spread_values(rows, 64))
    plain = empty_quantized("mxfp8", rows, 32 if op == "swiglu" else 64, device)
    out = QuantizedTensor(plain.format, far(plain.shape[1], plain.data.dtype), plain.scale, None, plain.shape)
    near = x.clone(memory_format=torch.contiguous_format)
    weight = torch.ones(64, device=device)
    if op == "quantize":
        assert_equal(quantize_activation(x, "mxfp8", out=out), codec.quantize(near.cpu(), "mxfp8"))
    elif op == "rms_norm":
        got, _ = rms_norm_quantize(x, weight, 1e-5, "mxfp8", out=out)
        assert_equal(got, rms_norm_quantize(near, weight, 1e-5, "mxfp8")[0])
    else:
        assert_equal(swiglu_quantize(x, "mxfp8", out=out), swiglu_quantize(near, "mxfp8"))


def test_rows_may_repeat(device: torch.device) -> None:
    x = spread_values(1, 64).expand(5, 64)
    assert_equal(quantize_activation(x.to(device).expand(5, 64), "mxfp4"), codec.quantize(x, "mxfp4"))


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """No wrapper reads a value back, which would forbid capture in a CUDA graph."""

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read from the device")

    x, weight = spread_values(2, 64).to(device), torch.ones(64, device=device)
    scale = torch.tensor(1.0, device=device)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for format in FORMATS:
        quantize_activation(x, format)
        rms_norm_quantize(x, weight, 1e-6, format, residual=x)
        swiglu_quantize(x, format)
    quantize_activation(x, "nvfp4", global_scale=scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format", FORMATS)
def test_r17_replays_in_a_cuda_graph(format: str) -> None:
    x = spread_values(5, 160).cuda()
    out = empty_quantized(format, 5, 160, "cuda")
    quantize_activation(x, format, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize_activation(x, format, out=out)
    y = spread_values(5, 160, seed=1)
    x.copy_(y)
    graph.replay()
    assert_equal(out, codec.quantize(y, format))


# --- fused ------------------------------------------------------------------------------------


def exact_values(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Multiples of 1/8 up to 4: their squares sum to the same float32 in every order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-32, 33, (rows, columns), generator=generator) / 8


def assert_within(got: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor]) -> None:
    """``got`` is the BF16 of some value that the stated accuracy allows."""
    low, high = bounds
    outside = (got.cpu() < low) | (got.cpu() > high)
    assert not outside.any(), f"{int(outside.sum())} of {outside.numel()} outside"
    narrow = raw(low.float()) == raw(high.float())
    assert narrow.float().mean() > 0.98  # the bound says which BF16 it is, almost everywhere


@pytest.mark.parametrize("format", ["bf16", *FORMATS])
@pytest.mark.parametrize(("rows", "columns"), [(0, 32), (1, 32), (3, 160), (2, 2880)])
@pytest.mark.parametrize(("dtype", "residual_dtype"), [(torch.float32, None), (torch.bfloat16, torch.bfloat16),
                                                       (torch.bfloat16, torch.float32)])  # fmt: skip
def test_rms_norm(
    dtype: torch.dtype, residual_dtype: torch.dtype | None, rows: int, columns: int, format: str, device: torch.device
) -> None:
    x = exact_values(rows, columns, seed=1).to(dtype)
    if rows > 1:
        x[1] = 0
    weight = (0.5 + torch.rand(columns, generator=torch.Generator().manual_seed(2))).to(dtype)
    residual = None if residual_dtype is None else exact_values(rows, columns, seed=3).to(residual_dtype)
    h = x if residual is None else (x.float() + residual.float()).to(residual_dtype)
    poisoned = Poisoned(format, rows, columns, device)
    strided = None if residual is None else within_nan(residual, device)
    got, updated = rms_norm_quantize(
        within_nan(x, device), weight.to(device), 1e-5, format, residual=strided, out=poisoned.out
    )
    assert got is poisoned.out
    assert_equal(got, codec.quantize(rms_norm_ref(h, weight, 1e-5), format))
    poisoned.assert_padding_untouched()
    assert_same(updated, None if residual is None else h, "residual")


@pytest.mark.parametrize("columns", [1, 33, 2880, 16384])
def test_rms_norm_of_random_values(columns: int, device: torch.device) -> None:
    """The sum of squares has some order: y is the BF16 of a value within the stated bound."""
    rows = 2 if columns > 4096 else 8
    x = spread_values(rows, columns)
    weight = 0.5 + torch.rand(columns, generator=torch.Generator().manual_seed(2))
    got, _ = rms_norm_quantize(x.to(device), weight.to(device), 0.25, "bf16")
    assert_within(got.data, rms_norm_bounds(x, weight, 0.25))


def test_rms_norm_order_of_products(device: torch.device) -> None:
    """(h * inverse) * weight, not h * (inverse * weight): seen in a few of many values."""
    x = exact_values(4, quantize_tiles.MAX_COLUMNS, seed=8)
    weight = 0.5 + torch.rand(x.shape[1], generator=torch.Generator().manual_seed(11))
    inverse = 1 / torch.sqrt((x * x).mean(dim=1, keepdim=True) + torch.tensor(1e-5))
    want = rms_norm_ref(x, weight, 1e-5)
    assert ((x * (inverse * weight)).to(torch.bfloat16) != want).any()
    got, _ = rms_norm_quantize(x.to(device), weight.to(device), 1e-5, "bf16")
    assert_same(got.data, want, "y")


def test_rms_norm_rounds_the_residual_first(device: torch.device) -> None:
    """The updated residual is BF16, what is normalized is that BF16, and it may replace the old one."""
    x, residual = (spread_values(3, 160, seed).to(torch.bfloat16) for seed in (1, 2))
    h = (x.float() + residual.float()).to(torch.bfloat16)
    weight = torch.ones(160, device=device)
    want, _ = rms_norm_quantize(h.to(device), weight, 1e-6, "mxfp8")
    in_place = within_nan(residual, device)
    got, updated = rms_norm_quantize(x.to(device), weight, 1e-6, "mxfp8", residual=in_place, residual_out=in_place)
    assert updated is in_place
    assert_same(updated, h, "residual")
    assert_equal(got, want)


def test_rms_norm_of_nan_and_zero(device: torch.device) -> None:
    x = exact_values(4, 160, seed=4)
    x[1], x[2, 7] = 0, NAN
    got, _ = rms_norm_quantize(x.to(device), torch.ones(160, device=device), 1e-5, "bf16")
    assert_same(got.data, rms_norm_ref(x, torch.ones(160), 1e-5), "y")
    assert (got.data[1] == 0).all()
    assert got.data[2].isnan().all()


@pytest.mark.parametrize("limit", [None, 7.0])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "dtype"), [(0, 32, torch.bfloat16), (1, 32, torch.float32),
                                                        (5, 160, torch.bfloat16), (1, 2880, torch.bfloat16),
                                                        (2, 4096 + 160, torch.float32)])  # fmt: skip
def test_swiglu(
    rows: int, columns: int, dtype: torch.dtype, format: str, limit: float | None, device: torch.device
) -> None:
    """The codes and scales are the codec's for the BF16 result, which the next test proves."""
    gate_up = within_nan(spread_values(rows, 2 * columns).to(dtype), device)
    y = swiglu_quantize(gate_up, "bf16", limit=limit).data
    poisoned = Poisoned(format, rows, columns, device)
    got = swiglu_quantize(gate_up, format, limit=limit, out=poisoned.out)
    assert_equal(got, codec.quantize(y.cpu(), format))
    poisoned.assert_padding_untouched()


@pytest.mark.parametrize(("limit", "alpha"), [(None, None), (7.0, None), (7, 1.702), (2.5, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_values(dtype: torch.dtype, limit: float | None, alpha: float | None, device: torch.device) -> None:
    gate_up = (6 * torch.randn(17, 2 * 160, generator=torch.Generator().manual_seed(5))).to(dtype)
    poisoned = Poisoned("bf16", 17, 160, device)
    got = swiglu_quantize(within_nan(gate_up, device), "bf16", limit=limit, alpha=alpha, out=poisoned.out).data
    assert_within(got, swiglu_bounds(gate_up, limit, 1.702 if alpha is None else alpha))
    poisoned.assert_padding_untouched()


@pytest.mark.parametrize("limit", [None, 7.0])
def test_swiglu_of_special_values(limit: float | None, device: torch.device) -> None:
    """Clamping keeps NaN, and so do the codes; compared with torch where exp is 0, 1 or infinite."""
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e30, -1e30, 200.0, -200.0])
    gate, up = (part.reshape(1, -1) for part in torch.meshgrid(special, special, indexing="ij"))
    gate_up = torch.cat([gate, up], dim=1)
    if limit is not None:  # exp(-1.702 * 7) differs between devices: not compared
        gate_up = gate_up[:, torch.cat([(gate <= 0) | gate.isnan()] * 2, dim=1)[0]]
    got = swiglu_quantize(gate_up.to(device), "bf16", limit=limit).data
    assert_same(got, swiglu_ref(gate_up, limit, 1.702).to(torch.bfloat16), "y")


def test_swiglu_gate_comes_first(device: torch.device) -> None:
    gate_up = torch.cat([torch.full((1, 32), -300.0), torch.full((1, 32), 32.0)], dim=1).to(device)
    assert (swiglu_quantize(gate_up, "bf16").data == 0).all()
    assert (swiglu_quantize(gate_up.flip(1), "bf16").data == 32 * -300).all()


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_fused_options(format: str, device: torch.device) -> None:
    """The scale rule and a given global scale reach the codes."""
    options: dict[str, Any] = {"scale_rule": "rceil"} if format == "mxfp8" else {"global_scale": 0.125}
    x, weight = exact_values(3, 64, seed=6), torch.ones(64)
    got, _ = rms_norm_quantize(x.to(device), weight.to(device), 1e-5, format, **options)
    assert_equal(got, codec.quantize(rms_norm_ref(x, weight, 1e-5), format, **options))
    y = swiglu_quantize(x.to(device), "bf16").data.cpu()
    assert_equal(swiglu_quantize(x.to(device), format, **options), codec.quantize(y, format, **options))


# --- errors -----------------------------------------------------------------------------------

X = torch.ones(4, 64)
W = torch.ones(64)
WIDE = torch.ones(1, quantize_tiles.ROW_TILE[0] * 2 + 1)


def out_of(format: str, rows: int, columns: int) -> QuantizedTensor:
    return empty_quantized(format, rows, columns, "cpu")


def overlapping(format: str) -> QuantizedTensor:
    plain = out_of(format, 4, 64)
    return QuantizedTensor(plain.format, plain.data[:1].expand(4, 64), plain.scale, None, (4, 64))


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("x", lambda: quantize_activation([1.0], "fp8")),
        ("x", lambda: quantize_activation(X.double(), "fp8")),
        ("x", lambda: quantize_activation(X.half(), "fp8")),
        ("x", lambda: quantize_activation(X[0], "fp8")),
        ("x", lambda: quantize_activation(X[:, :0], "fp8")),
        ("x", lambda: quantize_activation(X.t(), "fp8")),
        ("x", lambda: quantize_activation(X[:, ::2], "fp8")),
        ("x", lambda: quantize_activation(X[:, :48], "mxfp8")),
        ("x", lambda: quantize_activation(X[:, :33], "mxfp4")),
        ("x", lambda: quantize_activation(X[:, :40], "nvfp4")),
        ("format", lambda: quantize_activation(X, "fp9")),
        ("format", lambda: quantize_activation(X, "bf16")),
        ("format", lambda: quantize_activation(X, "fp8_block")),
        ("scale_rule", lambda: quantize_activation(X, "fp8", scale_rule="floor")),
        ("scale_rule", lambda: quantize_activation(X, "nvfp4", scale_rule="floor")),
        ("scale_rule", lambda: quantize_activation(X, "mxfp8", scale_rule="ceil")),
        ("global_scale", lambda: quantize_activation(X, "mxfp8", global_scale=1.0)),
        ("global_scale", lambda: quantize_activation(X, "nvfp4", global_scale=0.0)),
        ("global_scale", lambda: quantize_activation(X, "nvfp4", global_scale=INF)),
        ("global_scale", lambda: quantize_activation(X, "nvfp4", global_scale=NAN)),
        ("global_scale", lambda: quantize_activation(X, "nvfp4", global_scale="1")),
        ("global_scale", lambda: quantize_activation(X, "nvfp4", global_scale=torch.ones(1))),
        ("global_scale", lambda: quantize_activation(X, "nvfp4", global_scale=torch.ones((), dtype=torch.float64))),
        ("global_scale", lambda: quantize_activation(X, "nvfp4", global_scale=torch.ones((), device="meta"))),
        ("workspace", lambda: quantize_activation(X, "fp8", workspace=torch.zeros(8, dtype=torch.int32))),
        ("workspace", lambda: quantize_activation(X, "fp8", workspace=torch.zeros(2048))),
        ("out", lambda: quantize_activation(X, "fp8", out=X)),
        ("out", lambda: quantize_activation(X, "fp8", out=out_of("fp8_row", 4, 64))),
        ("out", lambda: quantize_activation(X, "fp8", out=out_of("fp8", 5, 64))),
        ("out", lambda: quantize_activation(X, "fp8", out=empty_quantized("fp8", 4, 64, "meta"))),
        ("out", lambda: quantize_activation(X, "mxfp8", out=overlapping("mxfp8"))),
        ("x", lambda: rms_norm_quantize(X[0], W, 1e-5, "fp8")),
        ("x", lambda: rms_norm_quantize(X[:, :48], W[:48], 1e-5, "mxfp4")),
        ("x", lambda: rms_norm_quantize(WIDE, torch.ones(WIDE.shape[1]), 1e-5, "fp8")),
        ("weight", lambda: rms_norm_quantize(X, None, 1e-5, "fp8")),
        ("weight", lambda: rms_norm_quantize(X, W[:32], 1e-5, "fp8")),
        ("weight", lambda: rms_norm_quantize(X, W.half(), 1e-5, "fp8")),
        ("weight", lambda: rms_norm_quantize(X, torch.ones(128)[::2], 1e-5, "fp8")),
        ("eps", lambda: rms_norm_quantize(X, W, 0.0, "fp8")),
        ("eps", lambda: rms_norm_quantize(X, W, NAN, "fp8")),
        ("format", lambda: rms_norm_quantize(X, W, 1e-5, "fp8_block")),
        ("scale_rule", lambda: rms_norm_quantize(X, W, 1e-5, "bf16", scale_rule="even")),
        ("residual", lambda: rms_norm_quantize(X, W, 1e-5, "fp8", residual=X[:3])),
        ("residual", lambda: rms_norm_quantize(X, W, 1e-5, "fp8", residual=X.half())),
        ("residual_out", lambda: rms_norm_quantize(X, W, 1e-5, "fp8", residual_out=X)),
        ("residual_out", lambda: rms_norm_quantize(X, W, 1e-5, "fp8", residual=X, residual_out=X.bfloat16())),
        ("residual_out", lambda: rms_norm_quantize(X, W, 1e-5, "fp8", residual=X, residual_out=X[:1].expand(4, 64))),
        ("out", lambda: rms_norm_quantize(X, W, 1e-5, "fp8", out=out_of("bf16", 4, 64))),
        ("out", lambda: rms_norm_quantize(X, W, 1e-5, "mxfp8", out=out_of("mxfp8", 4, 32))),
        ("gate_up", lambda: swiglu_quantize(X[:, :33], "fp8")),
        ("gate_up", lambda: swiglu_quantize(X[:, :32], "mxfp8")),
        ("gate_up", lambda: swiglu_quantize(X.half(), "fp8")),
        ("limit", lambda: swiglu_quantize(X, "fp8", limit=0.0)),
        ("limit", lambda: swiglu_quantize(X, "fp8", limit=INF)),
        ("alpha", lambda: swiglu_quantize(X, "fp8", alpha=1.0)),
        ("alpha", lambda: swiglu_quantize(X, "fp8", limit=7.0, alpha=0.0)),
        ("global_scale", lambda: swiglu_quantize(X, "fp8", global_scale=1.0)),
        ("out", lambda: swiglu_quantize(X, "nvfp4", out=out_of("nvfp4", 4, 64))),
    ],
)
def test_wrong_arguments(argument: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the argument, what was expected and what came; nothing is launched."""
    for module, kernel in (
        (quantize, "_amax_kernel"),
        (quantize, "_quantize_kernel"),
        (fused_quantize, "_rms_norm_quantize_kernel"),
        (fused_quantize, "_swiglu_quantize_kernel"),
    ):
        monkeypatch.setattr(module, kernel, None)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*; got "):
        call()
