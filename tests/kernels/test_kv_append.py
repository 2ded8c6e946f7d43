"""RoPE, quantize and append against plain torch, byte for byte; every byte that is not a token's own stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenfab.kernels import append_tiles, kv_append
from tokenfab.kernels.append_runs import grid_matrix, make_cos_sin
from tokenfab.kernels.attention_reference import append_kv_ref, rope_ref
from tokenfab.kernels.inputs import random_matrix
from tokenfab.kernels.kv_append import append_kv
from tokenfab.kernels.kv_cache import KvCache, empty_kv_cache, read_ref
from tokenfab.kernels.kv_layout import KV_FORMATS, KvLayout
from tokenfab.kernels.reference import rms_norm_bounds

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN and infinity
NAN, INF = float("nan"), float("inf")
STYLES = ("half", "interleaved")
MAX_POSITIONS = 50


def make_cache(
    format: str, head_dim: int, page_size: int, num_kv_heads: int, device: torch.device, num_pages: int = 3
) -> KvCache:
    """Pages of random bytes; factors that are no powers of two and differ."""
    scales = {"k_scale": 0.037, "v_scale": 0.07} if format in ("fp8", "nvfp4") else {}
    cache = empty_kv_cache(KvLayout(format, head_dim, page_size), num_pages, num_kv_heads, device, **scales)
    generator = torch.Generator().manual_seed(3)
    cache.pages.copy_(torch.randint(0, 256, cache.pages.shape, generator=generator, dtype=torch.uint8))
    return cache


def twin(cache: KvCache) -> KvCache:
    return KvCache(cache.layout, cache.pages.clone(), cache.factors)


def within_nan(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows of a wider matrix of NaN."""
    wide = torch.full((x.shape[0] + 1, x.shape[1] + 24), NAN, dtype=x.dtype, device=device)
    inner = wide[: x.shape[0], 8 : 8 + x.shape[1]]
    inner.copy_(x)
    return inner


def make_slots(num_tokens: int, page_size: int, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Places of three pages, shuffled; the second token has none. The first tokens share a page."""
    generator = torch.Generator().manual_seed(num_tokens)
    near = torch.randperm(page_size, generator=generator)[: (num_tokens + 1) // 2] + page_size
    far = torch.randperm(page_size, generator=generator)[: num_tokens // 2] + 2 * page_size * (num_tokens % 2)
    slots = torch.cat((near, far))
    if num_tokens > 1:
        slots[1] = -1
    return slots.to(device, dtype)


def assert_same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Equal bits."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    differ = (got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)).nonzero()
    assert not len(differ), f"{what}: {len(differ)} bytes differ, first at {differ[0].tolist()}"


def check(
    cache: KvCache, num_tokens: int, num_heads: int, device: torch.device, *, rotary_dim: int | None = None,
    has_norms: bool = False, index_dtype: torch.dtype = torch.int64, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """Appends strided inputs into ``cache``; q and all bytes of the pages are those of the reference."""
    layout, kv_heads = cache.layout, cache.num_kv_heads
    width = (num_heads + 2 * kv_heads) * layout.head_dim
    make = grid_matrix if has_norms else random_matrix
    qkv = within_nan(make(num_tokens, width, num_tokens + num_heads, torch.device("cpu")), device)
    if has_norms:
        for place, name in enumerate(("q_norm", "k_norm")):
            options[name] = random_matrix(1, layout.head_dim, place, device)[0]
    cos_sin = make_cos_sin(MAX_POSITIONS, rotary_dim or layout.head_dim, device, base=100.0)
    generator = torch.Generator().manual_seed(num_tokens)
    positions = torch.randint(0, MAX_POSITIONS, (num_tokens,), generator=generator).to(device, index_dtype)
    positions[0] = 0
    slots = make_slots(num_tokens, layout.page_size, device, index_dtype)
    expected = twin(cache)
    want = append_kv_ref(qkv, positions, cos_sin, expected, slots, num_heads, **options)
    buffer = torch.full((num_tokens, num_heads + 1, layout.head_dim + 8), NAN, dtype=torch.bfloat16, device=device)
    q_out = buffer[:, :num_heads, : layout.head_dim]
    got = append_kv(qkv, positions, cos_sin, cache, slots, num_heads, q_out=q_out, **options)
    assert got is q_out
    assert_same(got, want, "q")
    assert_same(cache.pages, expected.pages, "pages")
    assert buffer[:, num_heads:].isnan().all()
    assert buffer[:, :, layout.head_dim :].isnan().all()
    return got


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_equals_the_reference(format: str, head_dim: int, device: torch.device) -> None:
    check(make_cache(format, head_dim, 32, 2, device), 5, 6, device)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_page_sizes(format: str, page_size: int, device: torch.device) -> None:
    check(make_cache(format, 64, page_size, 1, device), 6, 1, device, style="interleaved", index_dtype=torch.int32)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rotary_dim", [16, 32, 64, 96, 126])
def test_partial_rotation(rotary_dim: int, style: str, device: torch.device) -> None:
    for format, has_norms in (("bf16", True), ("nvfp4", False)):
        check(make_cache(format, 128, 16, 1, device), 3, 2, device, rotary_dim=rotary_dim, style=style,
              has_norms=has_norms)  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("format", KV_FORMATS)
def test_norms(format: str, style: str, device: torch.device) -> None:
    """Of values whose squares sum exactly, in any order."""
    check(make_cache(format, 128, 16, 2, device), 3, 4, device, style=style, has_norms=True)


@pytest.mark.parametrize("kept", ["q_norm", "k_norm"])
def test_either_norm_alone(kept: str, device: torch.device) -> None:
    options = {kept: random_matrix(1, 64, 1, device)[0]}
    cache = make_cache("bf16", 64, 16, 1, device)
    expected = twin(cache)
    arguments = (grid_matrix(1, 3 * 64, 2, device), torch.tensor([7], device=device), make_cos_sin(9, 64, device))
    slots = torch.tensor([20], device=device)
    want = append_kv_ref(*arguments, expected, slots, 1, eps=0.5, **options)
    assert_same(append_kv(*arguments, cache, slots, 1, eps=0.5, **options), want, "q")
    assert_same(cache.pages, expected.pages, "pages")


def test_norm_of_random_values(device: torch.device) -> None:
    """At position 0 q is its norm: within what the sum's order allows."""
    cache, q_norm = make_cache("bf16", 128, 16, 1, device), random_matrix(1, 128, 5, device)[0]
    qkv = random_matrix(20, 4 * 128, 6, device)
    none = torch.full((20,), -1, device=device)
    q = append_kv(qkv, torch.zeros_like(none), make_cos_sin(1, 128, device), cache, none, 2, q_norm=q_norm)
    heads = qkv[:, :256].reshape(-1, 128)
    low, high = rms_norm_bounds(heads.cpu(), q_norm.cpu(), 1e-6)
    got = q.reshape(-1, 128).cpu()
    assert ((low <= got) & (got <= high)).all()
    assert (low == high).float().mean() > 0.98


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (12, 3), (20, 20), (17, 1)])
def test_numbers_of_heads(num_heads: int, num_kv_heads: int, device: torch.device) -> None:
    """Where heads fill no power of two, and where programs take several."""
    check(make_cache("fp8_row", 64, 16, num_kv_heads, device), 2, num_heads, device)
    check(make_cache("mxfp4", 64, 16, num_kv_heads, device), 2, num_heads, device)


@pytest.mark.parametrize("style", STYLES)
def test_the_rotation_is_that_of_complex_numbers(style: str, device: torch.device) -> None:
    """Neither by this kernel's formula nor in its precision."""
    qkv, cos_sin = random_matrix(9, 3 * 64, 8, device), make_cos_sin(40, 32, device)
    positions = torch.arange(3, 30, 3, device=device)
    cache = make_cache("bf16", 64, 16, 1, device)
    q = append_kv(qkv, positions, cos_sin, cache, torch.arange(9, device=device), 1, style=style)[:, 0]
    x = qkv[:, :64].double().cpu()
    pairs = x[:, :32].view(9, 2, 16).mT if style == "half" else x[:, :32].view(9, 16, 2)
    angles = positions.cpu().double()[:, None] * 1e4 ** (-torch.arange(16).double() / 16)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(9, 16).double(), angles)
    )
    want = torch.cat(((turned.mT if style == "half" else turned).reshape(9, 32), x[:, 32:]), dim=1)
    got = q.double().cpu()
    assert ((got - want).abs() <= 2.0**-8 * want.abs() + 2.0**-20 * pairs.abs().max()).all()
    assert torch.equal(got[:, 32:], x[:, 32:])
    assert_same(q, rope_ref(qkv[:, :64], positions, cos_sin, style), "q")


@pytest.mark.parametrize("style", STYLES)
def test_zeros_keep_their_sign(style: str, device: torch.device) -> None:
    """Position 0 turns by nothing: sines of +0."""
    signs = torch.tensor([0.0, -0.0, 1.0, -1.0], device=device).bfloat16()
    qkv = torch.cat([part.reshape(1, -1) for part in torch.meshgrid(signs, signs, indexing="ij")] * 6, dim=1)
    cache, zero = make_cache("bf16", 64, 16, 1, device), torch.tensor([0], device=device)
    expected = twin(cache)
    want = append_kv_ref(qkv, zero, make_cos_sin(1, 64, device), expected, zero, 1, style=style)
    assert_same(append_kv(qkv, zero, make_cos_sin(1, 64, device), cache, zero, 1, style=style), want, "q")
    assert_same(cache.pages, expected.pages, "pages")


@pytest.mark.parametrize("format", KV_FORMATS)
def test_r09_the_unusual_stays_in_its_token(format: str, device: torch.device) -> None:
    """NaN, infinity, zeros and sizes beyond the format: as the reference reads, others' bytes as without them."""
    base = random_matrix(10, 3 * 64, 4, device)
    qkv = base.clone()
    for token, (place, value) in enumerate(((0, NAN), (40, INF), (63, -INF), (7, 3e38), (9, 2e-38))):
        qkv[token, 64 + place] = value
        qkv[token, 128 + place] = value
    qkv[5, 64:] = 0
    qkv[6, 64:] = -0.0
    qkv[7, 64:] *= 1e-30
    qkv[8, 128 + 5], qkv[8, 128 + 45] = 4e10, 8e10  # the largest scale of mxfp4 that is stored, and the next
    positions, slots = torch.arange(10, device=device), torch.arange(10, device=device) * 3 % 16
    cos_sin = make_cos_sin(10, 64, device)
    cache, plain = make_cache(format, 64, 16, 1, device), make_cache(format, 64, 16, 1, device)
    expected = twin(cache)
    want = append_kv_ref(qkv, positions, cos_sin, expected, slots, 1)
    q = append_kv(qkv, positions, cos_sin, cache, slots, 1)
    pairs = zip((q, *read_ref(cache, slots)), (want, *read_ref(expected, slots)), strict=True)
    assert all(((got == right) | (got.isnan() & right.isnan())).all() for got, right in pairs)
    if format in ("fp8", "mxfp4", "nvfp4"):  # a NaN is one code there
        assert_same(cache.pages, expected.pages, "pages")
    append_kv(base, positions, cos_sin, plain, slots, 1)
    others = [part[9:].cpu() for cache_ in (cache, plain) for part in read_ref(cache_, slots)]
    assert torch.equal(others[0], others[2])
    assert torch.equal(others[1], others[3])


@pytest.mark.parametrize("format", KV_FORMATS)
def test_tokens_of_one_page(
    format: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, reverse_programs: Callable[[], None]
) -> None:
    """8 tokens of one page, 2 heads, programs of one head; the order of the programs does not show."""
    monkeypatch.setattr(append_tiles, "VALUES_PER_PROGRAM", 64)
    qkv, slots = random_matrix(8, 6 * 64, 4, device), torch.randperm(8, device=device) + 20
    arguments = (qkv, torch.arange(8, device=device), make_cos_sin(8, 64, device))
    cache, again = make_cache(format, 64, 16, 2, device), make_cache(format, 64, 16, 2, device)
    expected = twin(cache)
    want = append_kv_ref(*arguments, expected, slots, 2)
    assert_same(append_kv(*arguments, cache, slots, 2), want, "q")
    assert_same(cache.pages, expected.pages, "pages")
    reverse_programs()
    assert_same(append_kv(*arguments, again, slots, 2), want, "q")
    assert_same(again.pages, expected.pages, "pages")


@pytest.mark.parametrize("format", KV_FORMATS)
def test_r04_offsets_beyond_int32(format: str, device: torch.device) -> None:
    """Pages, rows of qkv and of q that lie 2^31 and more bytes or values off. Only the touched memory exists."""
    layout = KvLayout(format, 64, 16)
    num_pages = (5 << 30) // (2 * layout.record_bytes)
    pages = torch.empty(num_pages, 2, layout.record_bytes, dtype=torch.uint8, device=device)
    cache = KvCache(layout, pages, torch.tensor([0.5, 0.25], device=device) if format == "nvfp4" else
                    torch.ones(2, device=device))  # fmt: skip
    last = (num_pages - 1) * 16
    slots = torch.tensor([last + 5, 3, last // 2], device=device)
    where = (slots // 16).tolist()
    stride = 1 << 30
    qkv = torch.empty(2 * stride + 512, dtype=torch.bfloat16, device=device).as_strided((3, 6 * 64), (stride, 1))
    q_out = torch.empty(2 * stride + 512, dtype=torch.bfloat16, device=device).as_strided((3, 2, 64), (stride, 64, 1))
    qkv.copy_(random_matrix(3, 6 * 64, 1, device))
    small = KvCache(layout, torch.zeros(3, 2, layout.record_bytes, dtype=torch.uint8, device=device), cache.factors)
    for page in where:
        pages[page] = 0
    positions, cos_sin = torch.tensor([1, 2, 3], device=device), make_cos_sin(4, 64, device)
    near = torch.arange(3, device=device) * 16 + slots % 16
    want = append_kv_ref(qkv.clone(), positions, cos_sin, small, near, 2)
    assert_same(append_kv(qkv, positions, cos_sin, cache, slots, 2, q_out=q_out), want, "q")
    assert_same(pages[where], small.pages, "pages")


def test_far_positions(device: torch.device) -> None:
    """A row of cos_sin beyond 2^31 values."""
    rows = (1 << 31) // 16 + 2
    cos_sin = torch.empty(rows, 16, device=device)
    cos_sin[-1], near = make_cos_sin(6, 16, device)[-1], make_cos_sin(6, 16, device)
    qkv, none = random_matrix(1, 3 * 64, 1, device), torch.tensor([-1], device=device)
    cache = make_cache("bf16", 64, 16, 1, device)
    want = rope_ref(qkv[:, :64], torch.tensor([5], device=device), near, "half")
    assert_same(append_kv(qkv, none + rows, cos_sin, cache, none, 1)[:, 0], want, "q")


def test_no_tokens(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_append, "_append_kv_kernel", None)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    qkv = torch.empty(0, 4 * 64, dtype=torch.bfloat16, device=device)
    q = append_kv(qkv, nothing, make_cos_sin(1, 64, device), make_cache("fp8", 64, 16, 1, device), nothing, 2)
    assert (q.shape, q.dtype) == ((0, 2, 64), torch.bfloat16)


def test_nothing_waits_for_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a value was read from the device")

    cache, qkv = make_cache("nvfp4", 64, 16, 1, device), random_matrix(2, 3 * 64, 1, device)
    arguments = (
        qkv,
        torch.arange(2, device=device),
        make_cos_sin(2, 64, device),
        cache,
        torch.arange(2, device=device),
    )
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    append_kv(*arguments, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format", KV_FORMATS)
def test_r17_replays_in_a_cuda_graph(format: str, device: torch.device) -> None:
    cache, qkv = make_cache(format, 128, 16, 2, device), random_matrix(4, 8 * 128, 1, device)
    positions, slots, cos_sin = (
        torch.arange(4, device=device),
        torch.arange(4, device=device),
        make_cos_sin(9, 128, device),
    )
    q = torch.empty(4, 4, 128, dtype=torch.bfloat16, device=device)
    append_kv(qkv, positions, cos_sin, cache, slots, 4, q_out=q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_kv(qkv, positions, cos_sin, cache, slots, 4, q_out=q)
    qkv.copy_(random_matrix(4, 8 * 128, 2, device))
    positions += 3
    slots += 20
    expected = twin(cache)
    graph.replay()
    want = append_kv_ref(qkv, positions, cos_sin, expected, slots, 4)
    assert_same(q, want, "q")
    assert_same(cache.pages, expected.pages, "pages")


# -- errors ----------------------------------------------------------------------------------------

QKV = torch.ones(3, 4 * 64, dtype=torch.bfloat16)
THREE = torch.arange(3)
COS_SIN = make_cos_sin(4, 64, "cpu")
CACHE = empty_kv_cache(KvLayout("fp8", 64, 16), 1, 1, "cpu")
OUT = torch.ones(3, 2, 64, dtype=torch.bfloat16)
FINE: dict[str, Any] = {
    "qkv": QKV, "positions": THREE, "cos_sin": COS_SIN, "cache": CACHE, "slots": THREE, "num_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("cache", {"cache": CACHE.pages}),
        ("num_heads", {"num_heads": 0}),
        ("num_heads", {"num_heads": 2.0}),
        ("num_heads", {"cache": empty_kv_cache(KvLayout("fp8", 64, 16), 1, 3, "cpu")}),
        ("qkv", {"qkv": [1.0]}),
        ("qkv", {"qkv": QKV[0]}),
        ("qkv", {"qkv": QKV[:, :192]}),
        ("qkv", {"qkv": QKV.float()}),
        ("qkv", {"qkv": QKV.to("meta")}),
        ("qkv", {"qkv": QKV.repeat(1, 2)[:, ::2]}),
        ("positions", {"positions": [0, 1, 2]}),
        ("positions", {"positions": THREE[:2]}),
        ("positions", {"positions": THREE.float()}),
        ("positions", {"positions": THREE.to("meta")}),
        ("slots", {"slots": THREE.short()}),
        ("slots", {"slots": torch.arange(6)[::2]}),
        ("slots", {"slots": THREE[:, None]}),
        ("cos_sin", {"cos_sin": COS_SIN.bfloat16()}),
        ("cos_sin", {"cos_sin": COS_SIN[:, :14].contiguous()}),
        ("cos_sin", {"cos_sin": COS_SIN[:, :33].contiguous()}),
        ("cos_sin", {"cos_sin": COS_SIN[:, :32]}),
        ("cos_sin", {"cos_sin": COS_SIN[0]}),
        ("cos_sin", {"cos_sin": COS_SIN[:0]}),
        ("cos_sin", {"cos_sin": make_cos_sin(4, 128, "cpu")}),
        ("style", {"style": "neox"}),
        ("eps", {"eps": 0.0}),
        ("eps", {"eps": 1}),
        ("q_norm", {"q_norm": torch.ones(64)}),
        ("k_norm", {"k_norm": torch.ones(128, dtype=torch.bfloat16)}),
        ("k_norm", {"k_norm": torch.ones(128, dtype=torch.bfloat16)[::2]}),
        ("q_out", {"q_out": OUT.float()}),
        ("q_out", {"q_out": OUT[:2]}),
        ("q_out", {"q_out": OUT.mT.contiguous().mT}),
        ("q_out", {"q_out": OUT[:1].expand(3, 2, 64)}),
        ("q_out", {"q_out": OUT[:, :1].expand(3, 2, 64)}),
        ("q_out", {"q_out": QKV[:, :128].unflatten(1, (2, 64))}),
    ],
)
def test_wrong_arguments(argument: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the argument, what was expected and what came; nothing is launched."""
    monkeypatch.setattr(kv_append, "_append_kv_kernel", None)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*; got "):
        append_kv(**(FINE | changes))
