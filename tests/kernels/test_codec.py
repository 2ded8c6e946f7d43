"""The codec against independent oracles: ml_dtypes for elements, torchao and exact numpy for blocks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tokenfab.kernels import codec
from tokenfab.kernels.codec import QuantizedTensor, dequantize, quantize
from tokenfab.kernels.formats import ELEMENTS, FORMATS, SCALE_RULES, get_format
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
from torchao.quantization.granularity import PerBlock, PerRow, PerTensor
from torchao.quantization.quantize_.workflows import Float8Tensor

Array = np.ndarray[Any, Any]
NAN, INF = float("nan"), float("inf")
ORACLE = {"e4m3": ml_dtypes.float8_e4m3fn, "e2m1": ml_dtypes.float4_e2m1fn, "e8m0": ml_dtypes.float8_e8m0fnu}
CODES = {"e4m3": 256, "e2m1": 16, "e8m0": 256}
ENCODE = {"e4m3": codec.encode_e4m3, "e2m1": codec.encode_e2m1}
DECODE = {"e4m3": codec.decode_e4m3, "e2m1": codec.decode_e2m1, "e8m0": codec.decode_e8m0}
MX = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}
SCALED = [name for name in FORMATS if name != "bf16"]
GRANULARITY = {
    "fp8": PerTensor(),
    "fp8_row": PerRow(),
    "fp8_group": PerBlock((1, 128)),
    "fp8_block": PerBlock((128, 128)),
}


def oracle_values(element: str) -> Array:
    """What every code means, in float64."""
    return np.arange(CODES[element], dtype=np.uint8).view(ORACLE[element]).astype(np.float64)


def oracle_codes(x: Array, element: str) -> Array:
    """Nearest-even, saturating codes of float32 values; NaN as pinned here (ml_dtypes keeps its sign, or says -0)."""
    limit = np.float32(ELEMENTS[element].max)
    with np.errstate(invalid="ignore"):
        codes = np.clip(x, -limit, limit).astype(ORACLE[element]).view(np.uint8)
    return np.where(np.isnan(x), {"e4m3": 0x7F, "e2m1": 7}[element], codes)


def raw(x: torch.Tensor) -> Array:
    """The bits of a tensor, as integers."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).numpy()


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal bits, but for the payload of a float32 NaN."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    equal = raw(got) == raw(want)
    return bool((equal | (got.isnan() & want.isnan()).numpy()).all()) if got.dtype == torch.float32 else equal.all()


# --- elements: every code, every midpoint, every neighbour -------------------------------------


@pytest.mark.parametrize("element", CODES)
def test_r10_every_code_decodes(element: str) -> None:
    got = DECODE[element](torch.arange(CODES[element], dtype=torch.uint8))
    assert got.dtype == torch.float32
    want = oracle_values(element).astype(np.float32)
    np.testing.assert_array_equal(got.numpy(), want)
    np.testing.assert_array_equal(np.signbit(got.numpy())[want == 0], np.signbit(want)[want == 0])


def test_e4m3_decodes_from_either_dtype() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert same(codec.decode_e4m3(codes.view(torch.float8_e4m3fn)), codec.decode_e4m3(codes))


@pytest.mark.parametrize("element", ENCODE)
def test_r10_every_code_midpoint_and_neighbour_encodes(element: str) -> None:
    values = np.unique(np.abs(oracle_values(element)[np.isfinite(oracle_values(element))]))
    assert len(values) == {"e4m3": 127, "e2m1": 8}[element]
    points = np.concatenate((values, (values[1:] + values[:-1]) / 2)).astype(np.float32)
    beyond = [2**-149, 2**-126, 7, 8, 449, 463.9, 464, 464.1, 479, 480, 500, 1e30, np.finfo(np.float32).max, INF]
    points = np.concatenate((points, np.nextafter(points, np.float32(INF)), np.nextafter(points, np.float32(-INF)),
                             np.array(beyond, np.float32)))  # fmt: skip
    points = np.concatenate((points, -points, np.array([NAN, -NAN], np.float32)))
    got = ENCODE[element](torch.from_numpy(points))
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.numpy(), oracle_codes(points, element))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("element", ENCODE)
def test_r10_every_half_precision_value_encodes(element: str, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    np.testing.assert_array_equal(ENCODE[element](x).numpy(), oracle_codes(x.float().numpy(), element))


@pytest.mark.parametrize("element", ENCODE)
def test_random_float32_bits_encode(element: str) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 200_000, dtype=np.uint32)
    near = random.uniform(-9, 9, 200_000).astype(np.float32)
    x = np.concatenate((bits.view(np.float32), near, near * 60))
    np.testing.assert_array_equal(ENCODE[element](torch.from_numpy(x)).numpy(), oracle_codes(x, element))


def test_r10_pinned_ties_signs_and_saturation() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert codec.encode_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert codec.encode_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, -1e-30])
    assert codec.encode_e2m1(special).tolist() == [0, 8, 7, 15, 7, 7, 8]
    assert codec.encode_e4m3(special).tolist() == [0, 0x80, 0x7E, 0xFE, 0x7F, 0x7F, 0x80]
    assert codec.encode_e4m3(torch.tensor([464.0, 1e9, -465.0])).tolist() == [0x7E, 0x7E, 0xFE]


def test_e4m3_saturates_under_an_older_cast() -> None:
    """Up to torch 2.11 the cast gave NaN on overflow; 2.13 saturates and would hide a missing clamp."""

    class OldCast(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.to and torch.float8_e4m3fn in args:
                args = (args[0].masked_fill(args[0].abs() > 464, NAN), *args[1:])
            return func(*args, **(kwargs or {}))

    with OldCast():
        assert torch.tensor(465.0).to(torch.float8_e4m3fn).float().isnan()
        assert codec.encode_e4m3(torch.tensor([465.0, -1e9, INF])).tolist() == [0x7E, 0xFE, 0x7E]


def test_element_zero_lies_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 3, 15], [8, 0, 0, 8]], dtype=torch.uint8)
    assert codec.pack_fp4(codes).tolist() == [[0x21, 0xF3], [0x08, 0x80]]
    assert codec.unpack_fp4(codec.pack_fp4(codes)).tolist() == codes.tolist()
    every = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 32)
    assert torch.equal(codec.pack_fp4(codec.unpack_fp4(every)), every)
    assert codec.pack_fp4(torch.zeros(3, 0, dtype=torch.uint8)).shape == (3, 0)


# --- E8M0 scales -------------------------------------------------------------------------------


def e8m0_probes() -> Array:
    """Random float32 bits, every power of two, every bit pattern where a rule switches, and neighbours."""
    mantissas = np.array([0, 0x400000, 0x600000, 0x700000, 0x780000], np.int64)
    edges = (np.arange(256)[:, None, None] << 23) + mantissas[:, None] + np.arange(-2, 3)
    edges = edges[(edges >= 0) & (edges < 0x7F800000)]
    bits = np.concatenate((edges, np.random.default_rng(1).integers(0, 0x7F800000, 100_000))).astype(np.uint32)
    return bits.view(np.float32)


def exact_e8m0(amax: Array, element: str, rule: str) -> Array:
    """The rules in exact arithmetic: float64 holds every quotient that decides."""
    row, wide = ELEMENTS[element], amax.astype(np.float64)
    if rule == "rceil":
        mantissa, exponent = np.frexp(wide / row.max)
        power = np.where(mantissa == 0.5, exponent - 1, exponent)
    else:
        mantissa, exponent = np.frexp(wide)
        steps = 2.0 ** (row.mantissa_bits + 1)
        if rule == "even":
            mantissa = np.floor(mantissa * steps + 0.5) / steps
        power = exponent - 1 + (mantissa >= 1) - row.max_exponent
    return np.where(amax == 0, 0, np.clip(power + 127, 0, 254)).astype(np.uint8)


@pytest.mark.parametrize("element", ENCODE)
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_r10_every_e8m0_rule(rule: str, element: str) -> None:
    amax, limit = e8m0_probes(), ELEMENTS[element].max
    want = exact_e8m0(amax, element, rule)
    got = codec.encode_e8m0(torch.from_numpy(amax), limit, rule)
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.numpy(), want)
    assert set(want) == set(range(255 - ELEMENTS[element].max_exponent + (rule != "floor")))
    x = torch.zeros(len(amax), 32)
    x[:, 5] = torch.from_numpy(-amax)
    form = next(name for name in MX if get_format(name).element == element)
    theirs = to_mx(x, MX[form], 32, ScaleCalculationMode[rule.upper()])[0].view(torch.uint8).numpy()[:, 0]
    agreed = np.ones_like(amax, dtype=bool)
    if rule == "rceil":  # torchao rounds log2 to float32, and so loses up to 2^-17 above a power of two; exact above
        above = np.frexp(amax.astype(np.float64) / limit)[0] * 2
        agreed = (above == 1) | (above > 1 + 2**-17)
        assert 0.9 < agreed.mean() < 1
    np.testing.assert_array_equal(theirs[agreed], want[agreed])


def test_e8m0_of_the_unusual() -> None:
    amax = torch.tensor([0.0, -0.0, 2**-149, 2**-127, INF, NAN, -NAN, -1.0])
    for limit, emax in ((448.0, 8), (6.0, 2)):
        for rule in SCALE_RULES:
            infinite = 254 if rule == "rceil" else 255 - emax
            want = [0, 0, 0, 0, infinite, 255, 255, 127 - emax]
            assert codec.encode_e8m0(amax, limit, rule).tolist() == want
    below = torch.tensor([np.nextafter(np.float32(2), np.float32(0))])  # bfloat16 would round it up to 2
    assert codec.encode_e8m0(below, 6.0, "floor").tolist() == [125]
    assert codec.encode_e8m0(below, 6.0, "rceil").tolist() == [126]


# --- matrices ----------------------------------------------------------------------------------


def matrix(kind: str, rows: int = 256, columns: int = 256) -> torch.Tensor:
    """A float32 matrix: ``kind`` names what is hard about it."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "bf16":
        return x.bfloat16().float()
    if kind == "ties":  # multiples of 1/4 up to 6: midpoints of E2M1 wherever a block holds a 6
        return torch.randint(-24, 25, (rows, columns), generator=generator) / 4
    if kind == "zeros":
        x[5] = 0
        x[7] = -0.0
        x[:, 32:64] = 0
        x[128:] *= (torch.rand(rows - 128, columns, generator=generator) < 0.05).float()
    elif kind == "outliers":
        x[3] *= 100
        x[9, 11] = 3e3
        x[200] *= 1e-4
    elif kind == "range":  # a different power of two in each row, from subnormal to almost overflowing
        x *= 2.0 ** torch.linspace(-149, 125, rows)[:, None]
    elif kind in ("1e-30", "1e30"):
        x *= float(kind)
    elif kind == "nan_inf":
        x[2, 40] = NAN
        x[4, 100], x[6, 0] = INF, -INF
    return x


KINDS = ("normal", "bf16", "ties", "zeros", "outliers", "range", "1e-30", "1e30")


def spread(scale: Array, q: QuantizedTensor) -> Array:
    """Each value's scale, by its index."""
    if q.format.block is None:
        return np.broadcast_to(scale, q.shape)
    rows, columns = np.indices(q.shape)
    return scale[rows // q.format.block[0], columns // q.format.block[1]]


def stored_codes(q: QuantizedTensor) -> Array:
    """The (R, C) codes as stored, unpacked here."""
    data = q.data.view(torch.uint8).numpy()
    return np.stack((data % 16, data // 16), axis=-1).reshape(q.shape) if q.format.packing else data


def stored_scales(q: QuantizedTensor) -> Array:
    """The scales as stored, decoded by the oracle to float64."""
    assert q.scale is not None
    return q.scale.numpy().astype(np.float64) if q.format.scale == "f32" else (
        oracle_values(q.format.scale)[q.scale.view(torch.uint8).numpy()]
    )  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, "nan_inf"])
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", MX)
def test_mx_equals_torchao(name: str, rule: str, kind: str) -> None:
    x = matrix(kind)
    q = quantize(x, name, scale_rule=rule)
    scale, data = to_mx(x, MX[name], 32, ScaleCalculationMode[rule.upper()])
    assert q.scale is not None
    assert same(q.scale, scale.view(torch.uint8))
    # Where torchao's codes differ: it scales blocks of byte 0 by 2^-126 (floor, even) or 1 (rceil), not by 2^-127,
    # and keeps finite codes in a NaN block. Those follow the exact quotient, and NaN, below.
    theirs = QuantizedTensor(q.format, data, q.scale, None, q.shape)
    spread_scale = spread(q.scale.numpy(), q)
    compared = (spread_scale != 0) & (spread_scale != 255)
    assert compared.mean() > (0.6 if kind in ("zeros", "range", "nan_inf") else 0.999)
    np.testing.assert_array_equal(stored_codes(q)[compared], stored_codes(theirs)[compared])
    with np.errstate(invalid="ignore"):
        exact = np.ldexp(x.numpy(), 127 - spread_scale.astype(np.int32))
    want = oracle_codes(np.where(spread_scale == 255, np.float32(NAN), exact), q.format.element)
    np.testing.assert_array_equal(stored_codes(q), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRANULARITY)
def test_fp8_equals_torchao(name: str, kind: str) -> None:
    x = matrix(kind)
    q = quantize(x, name)
    theirs = Float8Tensor.from_hp(x, granularity=GRANULARITY[name], hp_value_lb=get_format(name).amax_clamp)
    assert q.scale is not None
    assert same(q.scale, theirs.scale.reshape(q.scale.shape))
    assert same(q.data, theirs.qdata)


@pytest.mark.parametrize("given", [None, 1.0, 2.0**-6, 0.37])
@pytest.mark.parametrize("kind", [*KINDS, "nan_inf"])
def test_nvfp4_equals_torchao(kind: str, given: float | None) -> None:
    x = matrix(kind)
    if given is None and kind == "nan_inf":
        x = x.nan_to_num()
    q = quantize(x, "nvfp4", global_scale=given)
    assert q.scale is not None
    assert q.global_scale is not None
    if given is None:
        assert same(q.global_scale, per_tensor_amax_to_scale(x.abs().max()))
    scale, data = nvfp4_quantize(x, 16, q.global_scale)
    amax = x.abs().reshape(256, -1, 16).amax(2)
    wanted = (amax / torch.tensor(6.0) / q.global_scale).numpy()
    # torchao clamps block scales at 2^-6, the smallest normal E4M3, and stores a zero block's scale so; here
    # they go down to 2^-9. Blocks below are compared with the oracle cast, and zero blocks by value.
    compared = ~(wanted < 2**-6)
    if kind not in ("range", "nan_inf") and (given is None or kind != "1e-30"):
        assert compared.mean() > 0.6
    np.testing.assert_array_equal(
        q.scale.view(torch.uint8).numpy()[compared], scale.view(torch.uint8).numpy()[compared]
    )
    theirs = QuantizedTensor(q.format, data, scale, q.global_scale, q.shape)
    finite = spread(compared & ~np.isnan(wanted), q)
    np.testing.assert_array_equal(stored_codes(q)[finite], stored_codes(theirs)[finite])
    zero = (amax == 0).repeat_interleave(16, dim=1)
    assert (dequantize(q)[zero] == 0).all()
    assert (dequantize(theirs)[zero] == 0).all()
    stored = oracle_codes(np.clip(wanted, np.float32(2**-9), np.float32(448)), "e4m3")
    np.testing.assert_array_equal(q.scale.view(torch.uint8).numpy(), stored)
    inverse = np.float32(1) / q.global_scale.numpy() / oracle_values("e4m3")[stored].astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = x.numpy() * spread(inverse, q)
    np.testing.assert_array_equal(stored_codes(q), oracle_codes(scaled, "e2m1"))


def test_nvfp4_block_scales_around_every_midpoint() -> None:
    """Where the order of the two divisions decides: amax / 6 / global next to a midpoint of E4M3."""
    values = np.unique(oracle_values("e4m3")[8:0x7F])  # from 2^-6, torchao's least, to 448
    offsets = np.arange(-2, 3) * 2.0**-23
    targets = ((values[1:] + values[:-1])[:, None] / 2 * (1 + offsets)).ravel()
    for global_scale in np.random.default_rng(3).uniform(0.5, 1, 40).astype(np.float32):
        x = torch.zeros(len(targets), 16)
        x[:, 2] = torch.from_numpy(targets * 6 * np.float64(global_scale))
        q = quantize(x, "nvfp4", global_scale=float(global_scale))
        scale, data = nvfp4_quantize(x, 16, q.global_scale)
        assert q.scale is not None
        assert same(q.scale, scale)
        assert same(q.data, data)


@pytest.mark.parametrize("kind", [*KINDS, "nan_inf"])
@pytest.mark.parametrize("name", SCALED)
def test_dequantize_is_the_product_rounded_once(name: str, kind: str) -> None:
    q = quantize(matrix(kind), name)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = oracle_values(q.format.element)[stored_codes(q)] * spread(stored_scales(q), q)
        if q.global_scale is not None:
            exact = exact * np.float64(q.global_scale.item())
        want = torch.from_numpy(exact.astype(np.float32))
    assert same(dequantize(q), want)


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("name", SCALED)
def test_codes_are_the_nearest(name: str, kind: str) -> None:
    """|x - dequantized| is the distance to the nearest value of the grid, so at most half its step, or saturation."""
    x = matrix(kind)
    for rule in SCALE_RULES if name in MX else (None,):
        q = quantize(x, name, scale_rule=rule)
        scale = spread(stored_scales(q), q) * (1.0 if q.global_scale is None else np.float64(q.global_scale.item()))
        scaled, grid = x.numpy() / scale, np.unique(oracle_values(q.format.element))
        grid = grid[np.isfinite(grid)]
        right = np.clip(np.searchsorted(grid, scaled), 1, len(grid) - 1)
        nearest = np.minimum(np.abs(scaled - grid[right - 1]), np.abs(grid[right] - scaled))
        error = np.abs(scaled - oracle_values(q.format.element)[stored_codes(q)])
        assert (error <= nearest + np.abs(scaled) * 2**-22).all()  # scaling rounds at most three times
        if q.format.scale == "f32" or rule == "rceil":
            assert np.abs(scaled).max() <= q.format.element_max * (1 + 2**-22)  # nothing saturates
