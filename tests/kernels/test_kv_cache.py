"""Paged KV caches in plain torch: layout, codec, round trips, and the check of page tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenfab.kernels.codec import dequantize, quantize
from tokenfab.kernels.formats import get_format
from tokenfab.kernels.inputs import random_matrix
from tokenfab.kernels.kv_cache import (
    KvCache,
    MlaCache,
    check_pages,
    decode_ref,
    empty_kv_cache,
    empty_mla_cache,
    encode_ref,
    read_mla_ref,
    read_ref,
    slots_of,
    write_mla_ref,
    write_ref,
)
from tokenfab.kernels.kv_layout import KV_FORMATS, MLA_FORMATS, PAGE_SIZES, KvLayout, MlaLayout

NAN, INF = float("nan"), float("inf")
FACTORED = ("fp8", "nvfp4")


def factors_of(format: str, first: float = 0.37, second: float = 0.75) -> tuple[float, float]:
    return (first, second) if format in FACTORED else (1.0, 1.0)


def filled(cache: Any) -> Any:
    """The cache, its pages random bytes."""
    generator = torch.Generator().manual_seed(11)
    cache.pages.copy_(torch.randint(0, 256, cache.pages.shape, generator=generator, dtype=torch.uint8))
    return cache


def oracle(x: torch.Tensor, format: str, factor: float) -> torch.Tensor:
    """Float64 values of BF16 rows by the codec alone."""
    if format == "bf16":
        return x.double()
    if format == "fp8":
        codes = (x.float() / torch.tensor(factor)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.double() * torch.tensor(factor).double()
    stored = quantize(x, format, global_scale=factor) if format == "nvfp4" else quantize(x, format)
    if format == "mxfp4":
        return dequantize(stored).double()
    one = torch.ones((), dtype=torch.float32)
    plain = dequantize(type(stored)(stored.format, stored.data, stored.scale, one if format == "nvfp4" else None,
                                    stored.shape)).double()  # fmt: skip
    if format == "nvfp4":
        return plain * torch.tensor(factor).double()
    assert stored.scale is not None
    return stored.data.double() * stored.scale.double()


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    differ = (got != want) & ~(got.isnan() & want.isnan())
    assert not differ.any(), differ.nonzero()[:3]


# -- layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_parts_lie_one_behind_the_other(format: str, head_dim: int, page_size: int) -> None:
    layout, row = KvLayout(format, head_dim, page_size), get_format(format)
    scales = {"bf16": 0, "fp8": 0, "fp8_row": 4, "mxfp4": head_dim // 32, "nvfp4": head_dim // 16}[format] * page_size
    codes = page_size * head_dim * row.element_bits // 8
    assert (layout.v_codes, layout.k_scales, layout.v_scales) == (codes, 2 * codes, 2 * codes + scales)
    assert layout.record_bytes == 2 * (codes + scales)
    assert layout.record_bytes % 16 == layout.v_codes % 16 == layout.k_scales % 16 == layout.v_scales % 16 == 0
    assert layout.bits_per_value == row.element_bits + 8 * scales / page_size / head_dim


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_parts_of_a_latent_page(format: str) -> None:
    layout, size = MlaLayout(format, 512, 64, 32), 2 if format == "bf16" else 1
    assert (layout.rope_codes, layout.scales) == (32 * 512 * size, 32 * 576 * size)
    assert layout.record_bytes == 32 * (576 * size + (4 if format == "fp8_row" else 0))
    assert layout.bits_per_value == 8 * size + (32 / 576 if format == "fp8_row" else 0)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("format", lambda: KvLayout("mxfp8", 128, 16)),
        ("head_dim", lambda: KvLayout("fp8", 96, 16)),
        ("page_size", lambda: KvLayout("fp8", 128, 8)),
        ("format", lambda: MlaLayout("nvfp4", 512, 64, 16)),
        ("kv_lora_rank", lambda: MlaLayout("fp8", 384, 64, 16)),
        ("rope_dim", lambda: MlaLayout("fp8", 512, 128, 16)),
        ("page_size", lambda: MlaLayout("fp8", 512, 64, 48)),
        ("scale", lambda: empty_kv_cache(KvLayout("fp8_row", 64, 16), 1, 1, "cpu", k_scale=2.0)),
        ("scale", lambda: empty_kv_cache(KvLayout("nvfp4", 64, 16), 1, 1, "cpu", v_scale=0.0)),
        ("scale", lambda: empty_mla_cache(MlaLayout("fp8", 512, 64, 16), 1, "cpu", scale=NAN)),
        ("pages", lambda: KvCache(KvLayout("fp8", 64, 16), torch.zeros(1, 1, 2047, dtype=torch.uint8), torch.ones(2))),
        ("pages", lambda: KvCache(KvLayout("fp8", 64, 16), torch.zeros(1, 1, 2048, dtype=torch.int8), torch.ones(2))),
        ("pages", lambda: KvCache(KvLayout("fp8", 64, 16),
                                  torch.zeros(2049, dtype=torch.uint8)[1:].view(1, 1, 2048), torch.ones(2))),
        ("pages", lambda: MlaCache(MlaLayout("fp8", 512, 64, 16), torch.zeros(1, 2, 9216, dtype=torch.uint8),
                                   torch.ones(1))),
        ("factors", lambda: KvCache(KvLayout("fp8", 64, 16), torch.zeros(1, 1, 2048, dtype=torch.uint8),
                                    torch.ones(1))),
        ("factors", lambda: KvCache(KvLayout("fp8", 64, 16), torch.zeros(1, 1, 2048, dtype=torch.uint8),
                                    torch.ones(2).double())),
    ],
)  # fmt: skip
def test_wrong_parts(argument: str, make: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*; got "):
        make()


def test_bytes_of_one_token_in_fp4() -> None:
    """By hand, as the tables of ``kv_layout.py`` say: token 3 of a page of 16, head 0."""
    cache = empty_kv_cache(KvLayout("mxfp4", 64, 16), 1, 1, "cpu")
    cache.pages.zero_()
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    k = torch.cat([values, -values, values.flip(0), -values.flip(0)]).repeat(2)
    v = torch.cat([torch.full((32,), 6.0), torch.full((32,), -3.0) * 2])
    write_ref(cache, k.bfloat16().view(1, 1, 64), v.bfloat16().view(1, 1, 64), torch.tensor([3]))
    page = cache.pages[0, 0]
    words = page[3 * 32 : 4 * 32].view(torch.int32)
    # channels 0, 2, 4, 6 in the low half: codes 0, 2, 4, 6; 1, 3, 5, 7 in the high one
    low, high = (0 << 6) | (2 << 3) | (4 << 9) | 6, (1 << 6) | (3 << 3) | (5 << 9) | 7
    assert int(words[0]) & 0xFFFFFFFF == low | high << 16
    assert int(words[1]) & 0xFFFFFFFF == (low | high << 16) | 0xF000F000
    v_codes = page[512:1024].view(32, 16)
    assert (v_codes[:, 3] == (7 << 3) | (1 << 6) | 7).all()
    assert int(v_codes.count_nonzero()) == 32
    assert page[1024:1056].view(16, 2)[3].tolist() == [127, 127]
    assert page[1056:1088].view(2, 16)[:, 3].tolist() == [127, 127]
    assert int(page.count_nonzero()) == int(page[96:128].count_nonzero()) + 32 + 2 + 2  # and nothing else


# -- codec -----------------------------------------------------------------------------------------


def edge_rows(width: int) -> torch.Tensor:
    """Rows with something unusual each, BF16."""
    base = random_matrix(1, width, 5, torch.device("cpu"))[0].float()
    rows = [base, torch.zeros(width), -torch.zeros(width)]
    for special, place in ((NAN, 0), (INF, width - 1), (-INF, 3), (3e38, width // 2), (1e30, 0)):
        row = base.clone()
        row[place] = special
        rows.append(row)
    rows += [base.sign() * size for size in (1e-38, 2.0**-127, 1e-30, 1e-12, 1e-3, 448.0, 1e5)]
    return torch.stack(rows).bfloat16()


@pytest.mark.parametrize("format", KV_FORMATS)
def test_the_codec_of_vectors_is_that_of_matrices(format: str) -> None:
    factor = factors_of(format)[0]
    for x in (random_matrix(9, 128, 3, torch.device("cpu")), edge_rows(128)):
        codes, scale = encode_ref(x, format, torch.tensor(factor))
        got, want = decode_ref(codes, scale, format, torch.tensor(factor)), oracle(x, format, factor)
        if format == "mxfp4":  # what is stored reaches 2^33
            large = x.abs().float().view(-1, 4, 32).amax(2).nan_to_num(INF) >= 2.0**36
            assert got.view(-1, 4, 32)[large].isnan().all()
            got, want = (part.view(-1, 4, 32)[~large] for part in (got, want))
        same(got, want)


@pytest.mark.parametrize("format", KV_FORMATS)
def test_values_keep_their_size(format: str) -> None:
    """No scale is lost: within half a step of the format of what was written."""
    x = random_matrix(20, 128, 7, torch.device("cpu"))
    step = {"bf16": 0.0, "fp8": 2.0**-4, "fp8_row": 2.0**-4, "mxfp4": 0.25, "nvfp4": 0.25}[format]
    factor = factors_of(format, 0.25)[0]
    codes, scale = encode_ref(x, format, torch.tensor(factor))
    got = decode_ref(codes, scale, format, torch.tensor(factor))
    row_max = x.double().abs().amax(1, keepdim=True)
    assert ((got - x.double()).abs() <= step * x.double().abs() + {"mxfp4": 0.27, "nvfp4": 0.1}.get(format, 2.0**-9)
            * row_max).all()  # fmt: skip
    size = got.square().sum().sqrt() / x.double().square().sum().sqrt()
    assert abs(float(size) - 1) < 0.05


def test_bytes_of_every_scale() -> None:
    """Every E8M0 and E4M3 scale that blocks may have: its byte, and what it reads as."""
    amax = torch.exp2(torch.arange(-133, 128).double()).float().bfloat16()
    x = torch.zeros(len(amax), 32, dtype=torch.bfloat16)
    x[:, 7] = amax
    _, scale = encode_ref(x, "mxfp4", torch.tensor(1.0))
    assert scale is not None
    want = torch.arange(-133, 128) - 2 + 127
    want = torch.where(want > 160, 161, want.clamp(min=0))
    assert scale.flatten().tolist() == want.tolist()
    codes = torch.arange(1, 0x7F, dtype=torch.uint8)
    each = codes.view(torch.float8_e4m3fn).float()
    x = torch.zeros(len(each), 16, dtype=torch.bfloat16)
    x[:, 2] = (6 * each).bfloat16()
    keep = x[:, 2].float() == 6 * each
    assert keep.all()
    _, scale = encode_ref(x, "nvfp4", torch.tensor(1.0))
    assert scale is not None
    sixes = torch.full((len(each), 16), 7, dtype=torch.uint8)
    same(decode_ref(sixes, scale, "nvfp4", torch.tensor(1.0))[:, :1], 6 * each.double()[:, None])
    assert all(low < high for low, high in pairwise(scale.flatten().tolist()))


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_what_is_written_is_read(format: str, head_dim: int, page_size: int, device: torch.device) -> None:
    """Each token and head its own values, in any order, and -1 not at all."""
    k_scale, v_scale = factors_of(format)
    layout = KvLayout(format, head_dim, page_size)
    cache = filled(empty_kv_cache(layout, 3, 2, device, k_scale=k_scale, v_scale=v_scale))
    before = cache.pages.clone()
    slots = torch.tensor([2 * page_size + 1, 0, -1, page_size - 1, page_size, 2 * page_size], device=device)
    k, v = (random_matrix(6, 2 * head_dim, seed, device).view(6, 2, head_dim) for seed in (1, 2))
    write_ref(cache, k, v, slots)
    kept = slots >= 0
    for got, x, factor in zip(read_ref(cache, slots[kept]), (k, v), (k_scale, v_scale), strict=True):
        want = oracle(x[kept].reshape(-1, head_dim).cpu(), format, factor)
        same(got.cpu().reshape(-1, head_dim), want)
    per_token = layout.record_bytes // page_size
    changed = (cache.pages != before).sum()
    assert 0.9 * 5 * 2 * per_token < changed <= 5 * 2 * per_token


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_a_latent_is_read_as_written(format: str, device: torch.device) -> None:
    factor = factors_of(format)[0]
    layout = MlaLayout(format, 256, 32, 16)
    cache = filled(empty_mla_cache(layout, 2, device, scale=factor))
    before = cache.pages.clone()
    slots = torch.tensor([17, -1, 3, 31], device=device)
    latent, rope = random_matrix(4, 256, 1, device), 8 * random_matrix(4, 32, 2, device)
    write_mla_ref(cache, latent, rope, slots)
    kept = slots >= 0
    want = oracle(torch.cat((latent, rope), dim=1)[kept].cpu(), format, factor)
    same(read_mla_ref(cache, slots[kept]).cpu(), want)
    per_token = layout.record_bytes // 16
    assert 0.9 * 3 * per_token < (cache.pages != before).sum() <= 3 * per_token


def test_slots_follow_the_page_table() -> None:
    table = torch.tensor([5, 2, 7], dtype=torch.int32)
    assert slots_of(table, 34, 16).tolist() == [*range(80, 96), *range(32, 48), 112, 113]
    assert slots_of(table, 0, 16).tolist() == []


# -- page tables -----------------------------------------------------------------------------------

CACHE = empty_kv_cache(KvLayout("fp8", 64, 16), 6, 1, "cpu")


def test_good_page_tables() -> None:
    table = torch.tensor([[0, 3, 99], [5, 2, 4]], dtype=torch.int32)  # what is beyond the length is not read
    check_pages(CACHE, table, torch.tensor([17, 48]), torch.tensor([-1, 0, -1, 95]))
    check_pages(CACHE, table[:0], torch.tensor([], dtype=torch.int64))
    check_pages(CACHE, table, torch.tensor([0, 0]))
    common = torch.tensor([[1, 0], [1, 2]], dtype=torch.int32)
    check_pages(CACHE, common, torch.tensor([32, 20]), shared_pages=1)
    check_pages(empty_mla_cache(MlaLayout("fp8", 512, 64, 16), 1, "cpu"), torch.tensor([[0]]), torch.tensor([16]))


@pytest.mark.parametrize(
    ("table", "lengths", "slots", "shared", "message"),
    [
        ([[6]], [1], None, 0, r"page_table\[0, 0\]: expected a page id from 0 to 5; got 6"),
        ([[0, -1]], [17], None, 0, r"page_table\[0, 1\]: expected a page id from 0 to 5; got -1"),
        ([[0, 1]], [33], None, 0, r"lengths\[0\]: expected 0 to 32 tokens; got 33"),
        ([[0, 1], [2, 3]], [32, -17], None, 0, r"lengths\[1\]: expected 0 to 32 tokens; got -17"),
        ([[0, 1], [2, 1]], [32, 17], None, 0, r"page_table\[1, 1\]: .* only sequence 1 has; got page 1,"),
        ([[0, 0]], [17], None, 0, r"page_table\[0, 1\]: expected a page that only sequence 0 has"),
        ([[0, 1], [0, 1]], [32, 32], None, 1, r"page_table\[1, 1\]"),
        ([[6], [6]], [1, 1], None, 1, r"page_table\[0, 0\]"),
        ([[0]], [1], [96], 0, r"slots\[0\]: expected -1 to 95; got 96"),
        ([[0]], [1], [-2], 0, r"slots\[0\]: expected -1 to 95; got -2"),
        ([[0]], [1], [7, 3, 7], 0, r"slots\[2\]: expected a slot written once; got slot 7, also of token 0"),
    ],
)  # fmt: skip
def test_r07_bad_page_tables(table: Any, lengths: Any, slots: Any, shared: int, message: str) -> None:
    given = None if slots is None else torch.tensor(slots)
    with pytest.raises(ValueError, match=message):
        check_pages(CACHE, torch.tensor(table), torch.tensor(lengths), given, shared_pages=shared)
