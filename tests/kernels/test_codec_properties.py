"""Properties of the matrix codec that hold for any input, the pinned edge cases, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenfab.kernels import codec
from tokenfab.kernels.codec import QuantizedTensor, decode_e2m1, decode_e4m3, dequantize, quantize, unpack_fp4
from tokenfab.kernels.formats import BF16, FORMATS, FP8_ROW, NVFP4, SCALE_RULES, get_format

NAN, INF = float("nan"), float("inf")
SCALED = [name for name in FORMATS if name != "bf16"]
MX = ["mxfp8", "mxfp4"]
NAMES_AND_RULES = [(name, rule) for name in FORMATS for rule in (SCALE_RULES if name in MX else (None,))]


def bits(part: torch.Tensor | None) -> list[int]:
    """The bits of a tensor; every float32 or bfloat16 NaN alike."""
    if part is None:
        return []
    if part.dtype in (torch.float32, torch.bfloat16):
        part = part.float().masked_fill(part.isnan(), NAN)
    kinds = {1: torch.uint8, 4: torch.int32}
    return part.contiguous().view(kinds[part.element_size()]).flatten().tolist()


def assert_same(got: QuantizedTensor, want: QuantizedTensor) -> None:
    assert (got.format, got.shape) == (want.format, want.shape)
    for part in ("data", "scale", "global_scale"):
        assert bits(getattr(got, part)) == bits(getattr(want, part)), part


def codes(q: QuantizedTensor) -> torch.Tensor:
    """The (R, C) codes as bytes."""
    return unpack_fp4(q.data) if q.format.packing else q.data.view(torch.uint8)


def rows_of(q: QuantizedTensor, rows: list[int]) -> tuple[list[int], list[int]]:
    """Codes and scales of some rows."""
    scale = q.scale
    assert scale is not None
    return bits(q.data[rows]), bits(scale[rows] if q.format.scale_per != "tensor" else scale)


@st.composite
def matrices(draw: st.DrawFn, columns: int = 64) -> torch.Tensor:
    """1 to 6 rows, each with its own power of two, some entries zero."""
    exponents = draw(st.lists(st.integers(-30, 30), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(len(exponents), columns, generator=generator) * 2.0 ** torch.tensor(exponents)[:, None]
    return x * (torch.rand(x.shape, generator=generator) < draw(st.sampled_from([1.0, 0.5, 0.02])))


# --- exact where it can be ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rule"), NAMES_AND_RULES)
def test_representable_values_come_back_bit_for_bit(name: str, rule: str | None) -> None:
    """Every code in every scale group, under powers of two (nvfp4: under every block scale)."""
    form, shape = get_format(name), (256, 256)
    if name == "bf16":
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(shape)
        assert bits(quantize(x, name).data) == bits(x)
        assert bits(dequantize(quantize(x, name))) == bits(x.float())
        return
    code = torch.arange(16 if form.packing else 256, dtype=torch.uint8)
    if not form.packing:
        code[[0x7F, 0xFF]] = 0x7E
    per_row = torch.arange(256)[:, None]
    code = code[(per_row + torch.arange(256)) % len(code)]  # each group of 16 or more E2M1 codes holds a 6
    code[:, ::32] = 7 if form.packing else 0xFE  # and each group of E4M3 codes a -448
    values = decode_e2m1(code) if form.packing else decode_e4m3(code)
    global_scale = None
    if name == "nvfp4":
        block = torch.arange(1, 0x7F, dtype=torch.uint8)[(per_row + torch.arange(16)) % 0x7E]
        scale, global_scale = block.view(torch.float8_e4m3fn), torch.tensor(2.0**-20)
        each = decode_e4m3(scale).repeat_interleave(16, 1) * global_scale
    elif form.scale == "e8m0":
        scale = ((per_row + torch.arange(8)) % 200 + 20).to(torch.uint8)
        each = codec.decode_e8m0(scale).repeat_interleave(32, 1)
    else:
        scale = 2.0 ** torch.arange(256).reshape(shape[0], 1).float().sub(128).clamp(-12, 90)
        twice = torch.tensor([1.0, 2.0])
        scale = {
            "fp8": scale[140, 0],
            "fp8_row": scale.clamp(min=2**-45),
            "fp8_block": scale[120:140:10] * twice,
            "fp8_group": scale * twice,
        }[name]
        scale = scale.expand(form.scale_shape(*shape) or ()).contiguous()
        each = scale if form.block is None else torch.kron(scale, torch.ones(form.block))
    x = values * each
    q = quantize(x, form, scale_rule=rule)
    assert bits(codes(q)) == bits(code)
    assert bits(q.scale) == bits(scale)
    assert bits(q.global_scale) == bits(global_scale)
    assert bits(dequantize(q)) == bits(x)


@settings(max_examples=30, deadline=None)
@given(x=matrices(), name=st.sampled_from(SCALED), rule=st.sampled_from(SCALE_RULES))
def test_quantizing_again_changes_nothing(x: torch.Tensor, name: str, rule: str) -> None:
    if name == "nvfp4":  # a block scale rounded to a subnormal E4M3 may round elsewhere the second time
        x = x.sign() * x.abs().clamp(min=float(x.abs().max()) * 2**-10)
    once = dequantize(quantize(x, name, scale_rule=rule if name in MX else None))
    twice = dequantize(quantize(once, name, scale_rule=rule if name in MX else None))
    if name in MX:
        assert bits(twice) == bits(once)
    else:  # an FP32 scale is recomputed from 448 * scale, rounded
        torch.testing.assert_close(twice, once, rtol=2**-21, atol=0)


# --- what does not depend on what --------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(x=matrices(), name=st.sampled_from([name for name in SCALED if name != "fp8_block"]), data=st.data())
def test_permuting_rows_permutes_the_result(x: torch.Tensor, name: str, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(x))))
    q, permuted = quantize(x, name), quantize(x[order], name)
    assert rows_of(permuted, list(range(len(x)))) == rows_of(q, list(order))
    assert bits(permuted.global_scale) == bits(q.global_scale)


@settings(max_examples=40, deadline=None)
@given(
    x=matrices(columns=160),
    name=st.sampled_from(["fp8_row", "fp8_group", "mxfp8", "mxfp4", "nvfp4"]),
    bad=st.sampled_from([NAN, INF, -INF, 3e38, 1e-45]),
    at=st.integers(0, 2**20),
)
def test_r09_a_bad_row_leaves_the_others_alone(x: torch.Tensor, name: str, bad: float, at: int) -> None:
    row, column = at % len(x), at % x.shape[1]
    spoilt = x.clone()
    spoilt[row, column] = bad
    fixed = 1.0 if name == "nvfp4" else None
    others = [i for i in range(len(x)) if i != row]
    q, spoilt_q = quantize(x, name, global_scale=fixed), quantize(spoilt, name, global_scale=fixed)
    assert rows_of(spoilt_q, others) == rows_of(q, others)
    block = get_format(name).block
    if block:  # and the other blocks of its row
        far = torch.arange(x.shape[1]) // block[1] != column // block[1]
        assert bits(codes(spoilt_q)[row, far]) == bits(codes(q)[row, far])


def test_a_bad_value_stays_in_its_128x128_block() -> None:
    x = torch.randn(300, 300)
    spoilt = x.clone()
    spoilt[130, 127] = NAN
    q, spoilt_q = quantize(x, "fp8_block"), quantize(spoilt, "fp8_block")
    assert spoilt_q.scale is not None
    assert spoilt_q.scale.isnan().nonzero().tolist() == [[1, 0]]
    changed = (codes(q) != codes(spoilt_q)).nonzero()
    assert changed.amin(0).tolist() == [128, 0]
    assert changed.amax(0).tolist() == [255, 127]


@pytest.mark.parametrize("shape", [(1, 1), (129, 127), (130, 257), (3, 128), (0, 5)])
@pytest.mark.parametrize("name", ["fp8_group", "fp8_block"])
def test_a_tail_block_is_a_block_padded_with_zeros(name: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = torch.zeros(-(-shape[0] // 128) * 128, -(-shape[1] // 128) * 128)
    whole[: shape[0], : shape[1]] = x
    q, padded = quantize(x, name), quantize(whole, name)
    assert q.scale is not None
    assert padded.scale is not None
    assert bits(q.data) == bits(padded.data[: shape[0], : shape[1]])
    assert bits(q.scale) == bits(padded.scale[: len(q.scale)])
    assert bits(dequantize(q)) == bits(dequantize(padded)[: shape[0], : shape[1]])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_strides_do_not_matter(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(64, 96).to(dtype)
    want = quantize(x.float(), name)
    assert_same(quantize(x, get_format(name)), want)
    assert_same(quantize(x.t().contiguous().t(), name), want)
    assert want.data.is_contiguous()
    assert_same(quantize(torch.zeros(0, 96, dtype=dtype), name), quantize(torch.zeros(0, 96), name))


# --- the unusual -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALED)
def test_r08_zeros_keep_their_sign_and_divide_nothing(name: str) -> None:
    x = torch.zeros(2, 32)
    x[1] = -0.0
    q = quantize(x, name)
    minus = 8 if q.format.packing else 0x80
    assert codes(q).tolist() == [[0] * 32, [minus] * 32]
    clamp = torch.tensor(q.format.amax_clamp or 0.0)
    least = {"f32": clamp / torch.tensor(448.0), "e8m0": torch.tensor(0, dtype=torch.uint8)}
    want = least.get(q.format.scale, torch.tensor(2.0**-9).to(torch.float8_e4m3fn))
    assert q.scale is not None
    assert set(bits(q.scale)) == set(bits(want))
    assert bits(q.global_scale) == (bits(torch.tensor(2.0**-118)) if name == "nvfp4" else [])
    assert bits(dequantize(q)) == bits(x)


@pytest.mark.parametrize("name", SCALED)
def test_nan_makes_its_scale_group_nan(name: str) -> None:
    x = torch.full((1, 32), 3.0)
    x[0, 4] = -NAN
    for rule in SCALE_RULES if name in MX else (None,):
        q = quantize(x, name, scale_rule=rule)
        assert dequantize(q).isnan().all()
        assert set(bits(codes(q))) <= {7 if q.format.packing else 0x7F} | ({0} if name == "nvfp4" else set())
    if name == "nvfp4":
        got = dequantize(quantize(x, name, global_scale=0.5))
        assert got[0, :16].isnan().all()
        assert (got[0, 16:] == 3).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", SCALED)
def test_inf_does_what_is_written(name: str, sign: int) -> None:
    x = torch.full((1, 32), 3.0)
    x[0, 4] = sign * INF
    for rule in SCALE_RULES if name in MX else (None,):
        got = dequantize(quantize(x, name, scale_rule=rule))
        if name in MX:
            assert got[0].tolist() == [0] * 4 + [sign * INF] + [0] * 27
        else:
            assert got.isnan().all()
    if name == "nvfp4":  # 6 x 448 x the global scale, and 3 is less than a quarter of 448 / 2
        got = dequantize(quantize(x, name, global_scale=0.5))
        assert got[0].tolist() == [0] * 4 + [sign * 1344] + [0] * 11 + [3] * 16


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("size", [2.0**-149, 2.0**-127, 1e-30, 1e30, 1e38])
def test_r08_tiny_and_huge_values_stay_finite(name: str, size: float) -> None:
    x = torch.full((2, 32), size)
    for rule in SCALE_RULES if name in MX else (None,):
        got = dequantize(quantize(x, name, scale_rule=rule))
        assert got.isfinite().all()
        assert ((got >= 0) & (got <= size * 1.25)).all()
        if size >= 1e30 or (name in MX and size != 2.0**-149):
            assert (got >= size * 0.75).all()


def test_amax_clamp_is_selectable() -> None:
    x = torch.full((1, 128), 1e-6)
    default, lower = quantize(x, "fp8_group"), quantize(x, "fp8_group", amax_clamp=1e-10)
    assert default.scale is not None
    assert lower.scale is not None
    assert bits(default.scale) == bits(torch.tensor([[1e-4]]) / torch.tensor(448.0))
    assert bits(lower.scale) == bits(torch.tensor([[1e-6]]) / torch.tensor(448.0))


# --- what is refused ---------------------------------------------------------------------------

U8, F32 = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 32)
E4M3 = F32.to(torch.float8_e4m3fn)
REFUSED: list[tuple[Any, str]] = [
    (lambda: codec.encode_e4m3(F32.double()), "x: expected a tensor of torch.float32 or .*; got torch.float64"),
    (lambda: codec.encode_e2m1(U8), "x: expected .*; got torch.uint8"),
    (lambda: codec.encode_e2m1([1.0]), "x: expected .*; got list"),  # type: ignore[arg-type]
    (lambda: codec.decode_e4m3(F32), "codes: expected a tensor of torch.uint8 or .*; got torch.float32"),
    (lambda: codec.decode_e2m1(U8 + 16), "codes: expected 0..15; got 16"),
    (lambda: codec.decode_e8m0(F32), "codes: expected a tensor of torch.uint8; got torch.float32"),
    (lambda: codec.pack_fp4(U8[:, :3]), "codes: expected an even last axis; got shape (2, 3)"),
    (lambda: codec.pack_fp4(U8 + 255), "codes: expected 0..15; got 255"),
    (lambda: codec.unpack_fp4(F32), "packed: expected .*; got torch.float32"),
    (lambda: codec.unpack_fp4(U8[0, 0]), "packed: expected at least one axis; got shape ()"),
    (lambda: codec.encode_e8m0(F32, 240.0, "floor"), "element_max: expected one of [448.0, 6.0]; got 240.0"),
    (lambda: codec.encode_e8m0(F32, 6.0, "ceil"), "rule: expected one of floor, rceil, even; got 'ceil'"),
    (lambda: codec.encode_e8m0(U8, 6.0, "floor"), "amax: expected .*; got torch.uint8"),
    (lambda: quantize(F32, "int4"), "format: expected one of .*; got 'int4'"),
    (lambda: quantize(U8, "fp8"), "x: expected .*; got torch.uint8"),
    (lambda: quantize(F32[0], "fp8"), "x: expected (rows, columns) with columns >= 1; got (32,)"),
    (lambda: quantize(F32[:, :0], "fp8"), "x: expected (rows, columns) with columns >= 1; got (2, 0)"),
    (lambda: quantize(F32[:, :31], "mxfp4"), "x: expected columns divisible by 32 (mxfp4); got (2, 31)"),
    (lambda: quantize(F32[:, :24], "nvfp4"), "x: expected columns divisible by 16 (nvfp4); got (2, 24)"),
    (lambda: quantize(F32, "mxfp8", scale_rule="ceil"), "rule: expected one of floor, rceil, even; got 'ceil'"),
    (lambda: quantize(F32, "nvfp4", scale_rule="floor"), "scale_rule: expected None (nvfp4); got 'floor'"),
    (lambda: quantize(F32, "mxfp4", global_scale=1.0), "global_scale: expected None (mxfp4); got float"),
    (lambda: quantize(F32, "nvfp4", global_scale=0.0), "global_scale: expected one finite number >= 2^-118; got 0.0"),
    (lambda: quantize(F32, "nvfp4", global_scale=NAN), "global_scale: expected one finite number >= 2^-118; got nan"),
    (lambda: quantize(F32, "nvfp4", global_scale=F32[0]), "global_scale: expected one finite number .*"),
    (lambda: quantize(F32, "mxfp4", amax_clamp=1.0), "amax_clamp: expected None (mxfp4); got 1.0"),
    (lambda: quantize(F32, "fp8", amax_clamp=0.0), "amax_clamp: expected finite and >= 2^-117; got 0.0"),
    (lambda: quantize(F32, "fp8", amax_clamp=NAN), "amax_clamp: expected finite and >= 2^-117; got nan"),
    (lambda: QuantizedTensor("fp8", E4M3, F32[0, 0], None, (2, 32)), "format: expected a Format; got 'fp8'"),  # type: ignore[arg-type]
    (lambda: QuantizedTensor(FP8_ROW, U8, F32[:, :1], None, (2, 32)),
     "data: expected torch.float8_e4m3fn (2, 32) (fp8_row); got torch.uint8 (2, 32)"),
    (lambda: QuantizedTensor(FP8_ROW, E4M3, F32[:, 0], None, (2, 32)),
     "scale: expected torch.float32 (2, 1) (fp8_row); got torch.float32 (2,)"),
    (lambda: QuantizedTensor(FP8_ROW, E4M3, None, None, (2, 32)), "scale: expected .*; got None"),
    (lambda: QuantizedTensor(FP8_ROW, E4M3, F32[:, :1], F32[0, 0], (2, 32)), "global_scale: expected None .*"),
    (lambda: QuantizedTensor(NVFP4, U8[:, :16], E4M3[:, :2], None, (2, 32)), "global_scale: expected .*; got None"),
    (lambda: QuantizedTensor(NVFP4, U8, E4M3[:, :2], F32[0, 0], (2, 32)), "data: expected torch.uint8 (2, 16) .*"),
    (lambda: QuantizedTensor(BF16, F32.bfloat16(), F32[:, :1], None, (2, 32)), "scale: expected None (bf16); .*"),
    (lambda: QuantizedTensor(BF16, F32.bfloat16(), None, None, (64,)), "shape: expected (rows, columns) .*"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_bad_input_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message).replace(r"\.\*", ".*") + "$"):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "rule"), NAMES_AND_RULES)
def test_cuda_equals_cpu(name: str, rule: str | None) -> None:
    x = torch.randn(300, 384) * 2.0 ** torch.linspace(-149, 125, 300)[:, None]
    x[5, 7], x[9, 300], x[11] = NAN, INF, 0.0
    for fixed in (None, 0.37) if name == "nvfp4" else (None,):
        want, got = (quantize(each, name, scale_rule=rule, global_scale=fixed) for each in (x, x.cuda()))
        on_cpu = (part if part is None else part.cpu() for part in (got.data, got.scale, got.global_scale))
        assert_same(QuantizedTensor(got.format, *on_cpu, got.shape), want)  # type: ignore[arg-type]
        assert bits(dequantize(got).cpu()) == bits(dequantize(want))
