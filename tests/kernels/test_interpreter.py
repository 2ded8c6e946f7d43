"""Each repair of Triton's interpreter is proven, and what it cannot do fails loudly."""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU needs no interpreter")


def edge_values(largest: float) -> torch.Tensor:
    """Random values of all sizes, every midpoint neighbourhood of small ones, signs of zero, subnormals, overflow."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, generator=generator) * torch.exp2(torch.randint(-30, 12, (4000,), generator=generator))
    ticks = torch.arange(0, 40, dtype=torch.float32) / 32
    around = torch.cat([torch.nextafter(ticks, torch.tensor(value)) for value in (-1.0, 1.0)])
    special = torch.tensor([0.0, -0.0, largest, -largest, largest * 1.04, largest * 4, 1e-40, 2.0**-9, 2.0**-10])
    values = torch.cat([spread, ticks, -ticks, around, special])
    return torch.nn.functional.pad(values, (0, 8192 - len(values)))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    ("dtype", "oracle", "largest"),
    [
        (torch.bfloat16, ml_dtypes.bfloat16, 3e38),
        (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, 448.0),
        (torch.float8_e5m2, ml_dtypes.float8_e5m2, 57344.0),
    ],
)
def test_casts_round_to_nearest_even_and_fp8_saturates(dtype: torch.dtype, oracle: Any, largest: float) -> None:
    x = edge_values(largest)
    y = torch.empty(len(x), dtype=dtype)
    _cast_kernel[(1,)](x, y, len(x))
    expected = x.numpy() if dtype == torch.bfloat16 else np.clip(x.numpy(), -largest, largest)
    bits = {torch.bfloat16: np.uint16}.get(dtype, np.uint8)
    view = torch.int16 if dtype == torch.bfloat16 else torch.uint8
    assert (y.view(view).numpy().view(bits) == expected.astype(oracle).view(bits)).all()
    back = torch.empty(len(x))
    _cast_kernel[(1,)](y, back, len(x))
    assert torch.equal(back, y.float())


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    place = offs[:, None] * N + offs[None, :]
    tl.store(c_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dot_multiplies_values_not_bit_patterns(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    c = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, c, 64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@triton.jit
def _dot_scaled_kernel(a_ptr, a_scale_ptr, b_ptr, c_ptr, M: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    offs, half, blocks = tl.arange(0, M), tl.arange(0, K // 2), tl.arange(0, K // BLOCK)
    a = tl.load(a_ptr + offs[:, None] * (K // 2) + half[None, :])
    scale = tl.load(a_scale_ptr + offs[:, None] * (K // BLOCK) + blocks[None, :])
    b = tl.load(b_ptr + tl.arange(0, K)[:, None] * M + offs[None, :])
    tl.store(c_ptr + offs[:, None] * M + offs[None, :], tl.dot_scaled(a, scale, "e2m1", b, None, "bf16"))


@pytest.mark.parametrize("block", [32, 16])
def test_dot_scaled_reads_e8m0_and_e4m3_scales(block: int) -> None:
    generator = torch.Generator().manual_seed(2)
    size, k = 32, 64
    packed = torch.randint(0, 256, (size, k // 2), dtype=torch.uint8, generator=generator)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(size, k)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    if block == 32:
        scale = torch.randint(120, 135, (size, k // block), dtype=torch.uint8, generator=generator)
        factors = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    else:
        scale = torch.randn(size, k // block, generator=generator).abs().to(torch.float8_e4m3fn)
        factors = scale.float().numpy()
    b = torch.randn(k, size, generator=generator).bfloat16()
    c = torch.empty(size, size)
    _dot_scaled_kernel[(1,)](packed, scale, b, c, size, k, block)
    expected = (values * factors.repeat(block, axis=1)).astype(np.float64) @ b.double().numpy()
    torch.testing.assert_close(c.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-4)


@triton.jit
def _asm_kernel(a_ptr, b_ptr, s_ptr, c_ptr, N: tl.constexpr, IS_PRMT: tl.constexpr):
    offs = tl.arange(0, N)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    if IS_PRMT:
        c = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, tl.load(s_ptr + offs)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        c = tl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    tl.store(c_ptr + offs, c)


def words(*bytes_: int) -> int:
    return int(np.uint32(sum(byte << (8 * place) for place, byte in enumerate(bytes_))).view(np.int32))


def test_ptx_prmt() -> None:
    """PTX ISA, prmt default mode: bytes 0..3 of a, 4..7 of b; the nibble's bit 3 replicates the byte's sign."""
    a, b = words(0x10, 0x91, 0x12, 0x13), words(0x24, 0x25, 0xA6, 0x27)
    cases = {0x3210: a, 0x7654: b, 0x0000: words(0x10, 0x10, 0x10, 0x10), 0x5410: words(0x10, 0x91, 0x24, 0x25),
             0xE961: words(0x91, 0xA6, 0xFF, 0xFF), 0x8: words(0x00, 0x10, 0x10, 0x10)}  # fmt: skip
    selectors = torch.tensor([*list(cases), 0, 0], dtype=torch.int32)
    result = torch.empty(8, dtype=torch.int32)
    full = [torch.full((8,), value, dtype=torch.int32) for value in (a, b)]
    _asm_kernel[(1,)](*full, selectors, result, 8, True)
    assert result[:6].tolist() == list(cases.values())


def test_ptx_mul_bf16x2() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(128, generator=generator).bfloat16() for _ in range(2))
    a[:4] = torch.tensor([2.0**-130, -(2.0**-133), 0.0, -0.0]).bfloat16()
    b[:4] = torch.tensor([2.0**126, 2.0**126, 3.0, 3.0]).bfloat16()
    result = torch.empty(64, dtype=torch.int32)
    _asm_kernel[(1,)](a.view(torch.int32), b.view(torch.int32), a.view(torch.int32), result, 64, False)
    assert torch.equal(result.view(torch.int16), (a.double() * b.double()).bfloat16().view(torch.int16))


@triton.jit
def _unknown_asm_kernel(x_ptr):
    tl.store(x_ptr, tl.inline_asm_elementwise("brev.b32 $0, $1;", "=r,r", [tl.load(x_ptr)], tl.int32, True, 1))


@triton.jit
def _bf16_arithmetic_kernel(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x + x)


def test_what_is_not_repaired_raises() -> None:
    """Triton wraps what a kernel raises; the reason is in the message or in its cause."""
    for launch, reason in (
        (lambda: _unknown_asm_kernel[(1,)](torch.zeros(1, dtype=torch.int32)), "no emulation of this inline assembly"),
        (lambda: _bf16_arithmetic_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), 16), "convert to float32 first"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            launch()
        assert reason in f"{caught.value} {caught.value.__cause__}"


@triton.jit
def _twice(x, SHOULD_RAISE: tl.constexpr):
    if SHOULD_RAISE:
        tl.static_assert(False, "as asked")
    return x + x


@triton.jit
def _nested_kernel(x_ptr, y_ptr, N: tl.constexpr, SHOULD_RAISE: tl.constexpr):
    offs = tl.arange(0, N)
    narrow = tl.load(x_ptr + offs)  # int8, then int32 and float32 of the same shape
    wide = _twice(narrow.to(tl.int32), SHOULD_RAISE)
    tl.store(y_ptr + offs, _twice(wide.to(tl.float32) / 8, SHOULD_RAISE) + tl.sum(wide, axis=0))


def test_a_launch_leaves_the_language_as_it_was() -> None:
    """Also one that raises; device functions find it patched, and types of one shape are told apart."""
    before = {name: getattr(tl, name) for name in ("arange", "load", "store", "static_assert", "range")}
    x, y = torch.arange(100, 116, dtype=torch.int8), torch.empty(16)
    for should_raise in (False, True, False):
        y.zero_()
        if should_raise:
            with pytest.raises(Exception, match="as asked"):
                _nested_kernel[(1,)](x, y, 16, should_raise)
        else:
            _nested_kernel[(1,)](x, y, 16, should_raise)
            assert torch.equal(y, x.float() / 2 + 2 * x.sum())  # 2 x 115 does not fit into int8
        assert {name: getattr(tl, name) for name in before} == before


def test_a_launch_patches_each_module_of_the_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    once: Any = interpreter._patch_lang
    patched = []
    monkeypatch.setattr(
        once, "original", lambda fn, original=once.original: patched.append(fn.__name__) or original(fn)
    )
    x, y = torch.arange(16, dtype=torch.int8), torch.empty(16)
    for launches in (1, 2):
        _nested_kernel[(1,)](x, y, 16, False)
        assert patched == launches * ["_nested_kernel", "sum"]  # Triton's own functions name tl.core
