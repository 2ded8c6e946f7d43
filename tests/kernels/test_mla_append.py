"""RoPE, quantize and append of MLA against plain torch, byte for byte; every byte that is not a token's own stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenfab.kernels import append_tiles, mla_append
from tokenfab.kernels.append_runs import grid_matrix, make_cos_sin
from tokenfab.kernels.attention_reference import append_mla_ref
from tokenfab.kernels.inputs import random_matrix
from tokenfab.kernels.kv_cache import MlaCache, empty_mla_cache, read_mla_ref
from tokenfab.kernels.kv_layout import MLA_FORMATS, PAGE_SIZES, MlaLayout
from tokenfab.kernels.mla_append import append_mla

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN and infinity
NAN, INF = float("nan"), float("inf")


def make_cache(
    format: str, device: torch.device, page_size: int = 16, rank: int = 512, rope_dim: int = 64, num_pages: int = 3
) -> MlaCache:
    """Pages of random bytes; a factor that is no power of two."""
    layout = MlaLayout(format, rank, rope_dim, page_size)
    cache = empty_mla_cache(layout, num_pages, device, scale=0.037 if format == "fp8" else 1.0)
    generator = torch.Generator().manual_seed(3)
    cache.pages.copy_(torch.randint(0, 256, cache.pages.shape, generator=generator, dtype=torch.uint8))
    return cache


def twin(cache: MlaCache) -> MlaCache:
    return MlaCache(cache.layout, cache.pages.clone(), cache.factors)


def assert_same(got: torch.Tensor | None, want: torch.Tensor | None, what: str) -> None:
    """Equal bits."""
    assert got is not None
    assert want is not None
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    differ = (got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)).nonzero()
    assert not len(differ), f"{what}: {len(differ)} bytes differ, first at {differ[0].tolist()}"


def views(num_tokens: int, num_heads: int, layout: MlaLayout, device: torch.device, *, is_grid: bool = False) -> Any:
    """latent, rope, q_rope: views of larger matrices whose rest is NaN, as matmuls leave them."""
    rank, rope_dim = layout.kv_lora_rank, layout.rope_dim
    both = torch.full((num_tokens, rank + rope_dim + 40), NAN, dtype=torch.bfloat16, device=device)
    latent, rope = both[:, 8 : 8 + rank], both[:, rank + 32 : rank + 32 + rope_dim]
    latent.copy_((grid_matrix if is_grid else random_matrix)(num_tokens, rank, 1, device))
    rope.copy_(4 * random_matrix(num_tokens, rope_dim, 2, device))
    q = torch.full((num_tokens, max(1, num_heads), rope_dim + 128), NAN, dtype=torch.bfloat16, device=device)
    q_rope = q[:, :num_heads, 128:]
    q_rope.copy_(random_matrix(num_tokens, num_heads * rope_dim, 3, device).view(num_tokens, num_heads, rope_dim))
    return latent, rope, q_rope


def check(
    cache: MlaCache, num_heads: int, device: torch.device, *, has_norm: bool = False,
    index_dtype: torch.dtype = torch.int64, **options: Any,
) -> None:  # fmt: skip
    """Appends five tokens, the second nowhere; q and all bytes of the pages are those of the reference."""
    layout, size = cache.layout, cache.layout.page_size
    latent, rope, q_rope = views(5, num_heads, layout, device, is_grid=has_norm)
    if has_norm:
        options["norm"] = random_matrix(1, layout.kv_lora_rank, 4, device)[0]
    arguments = (latent, rope, torch.tensor([0, 3, 17, 8, 8], device=device, dtype=index_dtype),
                 make_cos_sin(18, layout.rope_dim, device, base=100.0))  # fmt: skip
    slots = torch.tensor([2 * size + 3, -1, 5, size - 1, 2 * size], device=device, dtype=index_dtype)
    expected = twin(cache)
    want = append_mla_ref(*arguments, expected, slots, q_rope=q_rope if num_heads else None, **options)
    full = torch.full((5, max(1, num_heads), layout.kv_lora_rank + layout.rope_dim), NAN, dtype=torch.bfloat16,
                      device=device)  # fmt: skip
    if num_heads:
        q_out = full[:, :, layout.kv_lora_rank :]
        assert append_mla(*arguments, cache, slots, q_rope=q_rope, q_out=q_out, **options) is q_out
        assert_same(q_out, want, "q")
    else:
        assert append_mla(*arguments, cache, slots, **options) is None
    assert_same(cache.pages, expected.pages, "pages")
    assert full[:, :, : layout.kv_lora_rank].isnan().all()


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("format", MLA_FORMATS)
def test_equals_the_reference(format: str, style: str, has_norm: bool, device: torch.device) -> None:
    check(make_cache(format, device), 3, device, style=style, has_norm=has_norm)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("format", MLA_FORMATS)
def test_page_sizes(format: str, page_size: int, device: torch.device) -> None:
    check(make_cache(format, device, page_size), 0, device, index_dtype=torch.int32)


@pytest.mark.parametrize(("rank", "rope_dim"), [(256, 32), (256, 64), (512, 32)])
def test_widths(rank: int, rope_dim: int, device: torch.device) -> None:
    check(make_cache("fp8_row", device, 32, rank, rope_dim), 2, device, has_norm=True)


@pytest.mark.parametrize("num_heads", [1, 16, 17, 40])
def test_numbers_of_heads(num_heads: int, device: torch.device) -> None:
    check(make_cache("fp8", device), num_heads, device)


def test_one_scale_covers_both_parts(device: torch.device) -> None:
    """The largest value in the latent, then in the rope part."""
    cache, zero = make_cache("fp8_row", device), torch.tensor([0, 0], device=device)
    latent, rope = (torch.ones(2, width, dtype=torch.bfloat16, device=device) for width in (512, 64))
    latent[0, 511] = rope[1, 63] = -56.0
    append_mla(latent, rope, zero, make_cos_sin(1, 64, device), cache, torch.tensor([4, 5], device=device))
    scales = cache.pages[0, 0, cache.layout.scales :].view(torch.float32)
    assert scales[4:6].tolist() == [0.125, 0.125]
    assert (read_mla_ref(cache, torch.tensor([4, 5], device=device)).cpu() == torch.cat((latent, rope), 1).cpu()).all()


def test_eps_and_the_default_style(device: torch.device) -> None:
    cache, norm = make_cache("bf16", device), random_matrix(1, 512, 1, device)[0]
    expected = twin(cache)
    arguments = (*views(2, 1, cache.layout, device, is_grid=True)[:2], torch.tensor([3, 4], device=device),
                 make_cos_sin(5, 64, device))  # fmt: skip
    slots = torch.tensor([1, 2], device=device)
    append_mla(*arguments, cache, slots, norm=norm, eps=0.25)
    append_mla_ref(*arguments, expected, slots, norm=norm, eps=0.25, style="interleaved")
    assert_same(cache.pages, expected.pages, "pages")


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_r09_the_unusual_stays_in_its_token(format: str, device: torch.device) -> None:
    cache = make_cache(format, device)
    latent, rope = random_matrix(6, 512, 1, device), random_matrix(6, 64, 2, device)
    for token, (part, value) in enumerate(((latent, NAN), (rope, NAN), (latent, INF), (rope, -INF))):
        part[token, 9] = value
    latent[4], rope[4] = 0, 0
    slots, positions = torch.arange(6, device=device), torch.arange(6, device=device)
    expected, cos_sin = twin(cache), make_cos_sin(6, 64, device)
    append_mla(latent, rope, positions, cos_sin, cache, slots)
    append_mla_ref(latent, rope, positions, cos_sin, expected, slots)
    got, want = read_mla_ref(cache, slots), read_mla_ref(expected, slots)
    assert ((got == want) | (got.isnan() & want.isnan())).all()
    assert want[4:].isfinite().all()


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_tokens_of_one_page_in_any_order(
    format: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, reverse_programs: Callable[[], None]
) -> None:
    monkeypatch.setattr(append_tiles, "VALUES_PER_PROGRAM", 64)
    cache, again = make_cache(format, device), make_cache(format, device)
    latent, rope, q_rope = views(16, 2, cache.layout, device)
    arguments = (latent, rope, torch.arange(16, device=device), make_cos_sin(16, 64, device))
    slots, expected = torch.randperm(16, device=device) + 16, twin(cache)
    want = append_mla_ref(*arguments, expected, slots, q_rope=q_rope)
    assert_same(append_mla(*arguments, cache, slots, q_rope=q_rope), want, "q")
    assert_same(cache.pages, expected.pages, "pages")
    reverse_programs()
    assert_same(append_mla(*arguments, again, slots, q_rope=q_rope), want, "q")
    assert_same(again.pages, expected.pages, "pages")


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_r04_offsets_beyond_int32(format: str, device: torch.device) -> None:
    """Pages, tokens and heads that lie 2^31 and more bytes or values off. Only the touched memory exists."""
    layout = MlaLayout(format, 256, 32, 16)
    num_pages = (5 << 30) // layout.record_bytes
    pages = torch.empty(num_pages, 1, layout.record_bytes, dtype=torch.uint8, device=device)
    cache = MlaCache(layout, pages, torch.ones(1, device=device))
    slots = torch.tensor([(num_pages - 1) * 16 + 5, 3, num_pages // 2 * 16], device=device)
    where = (slots // 16).tolist()
    far = 1 << 30
    flat = [torch.empty(2 * far + 512, dtype=torch.bfloat16, device=device) for _ in range(2)]
    latent, rope = flat[0].as_strided((3, 256), (far, 1)), flat[0].as_strided((3, 32), (far, 1), 256)
    q_rope, q_out = flat[0].as_strided((3, 1, 32), (far, 32, 1), 300), flat[1].as_strided((3, 1, 32), (far, 32, 1))
    for x, width in ((latent, 256), (rope, 32), (q_rope[:, 0], 32)):
        x.copy_(random_matrix(3, width, width, device))
    small = MlaCache(layout, torch.zeros(3, 1, layout.record_bytes, dtype=torch.uint8, device=device), cache.factors)
    for page in where:
        pages[page] = 0
    positions, cos_sin = torch.tensor([1, 2, 3], device=device), make_cos_sin(4, 32, device)
    near = torch.arange(3, device=device) * 16 + slots % 16
    parts = [x.clone(memory_format=torch.contiguous_format) for x in (latent, rope, q_rope)]
    want = append_mla_ref(*parts[:2], positions, cos_sin, small, near, q_rope=parts[2])
    got = append_mla(latent, rope, positions, cos_sin, cache, slots, q_rope=q_rope, q_out=q_out)
    assert_same(got, want, "q")
    assert_same(pages[where], small.pages, "pages")


def test_no_tokens(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_append, "_append_mla_kernel", None)
    cache, none = make_cache("fp8", device), torch.empty(0, dtype=torch.int64, device=device)
    latent, rope, q_rope = (x[:0] for x in views(1, 2, cache.layout, device))
    q = append_mla(latent, rope, none, make_cos_sin(1, 64, device), cache, none, q_rope=q_rope)
    assert q is not None
    assert q.shape == (0, 2, 64)
    assert append_mla(latent, rope, none, make_cos_sin(1, 64, device), cache, none) is None


def test_nothing_waits_for_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a value was read from the device")

    cache, two = make_cache("fp8_row", device), torch.arange(2, device=device)
    latent, rope, q_rope = views(2, 1, cache.layout, device)
    cos_sin = make_cos_sin(2, 64, device)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    append_mla(latent, rope, two, cos_sin, cache, two, q_rope=q_rope)


# -- errors ----------------------------------------------------------------------------------------

LATENT = torch.ones(3, 512, dtype=torch.bfloat16)
ROPE = torch.ones(3, 64, dtype=torch.bfloat16)
Q = torch.ones(3, 2, 64, dtype=torch.bfloat16)
THREE = torch.arange(3)
CACHE = empty_mla_cache(MlaLayout("fp8", 512, 64, 16), 1, "cpu")
FINE: dict[str, Any] = {
    "latent": LATENT, "rope": ROPE, "positions": THREE, "cos_sin": make_cos_sin(4, 64, "cpu"), "cache": CACHE,
    "slots": THREE, "q_rope": Q,
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("cache", {"cache": CACHE.pages}),
        ("latent", {"latent": [1.0]}),
        ("latent", {"latent": LATENT[0]}),
        ("latent", {"latent": LATENT[:, :256]}),
        ("latent", {"latent": LATENT.half()}),
        ("latent", {"latent": LATENT.repeat(1, 2)[:, ::2]}),
        ("latent", {"latent": LATENT.to("meta")}),
        ("rope", {"rope": ROPE[:2]}),
        ("rope", {"rope": ROPE[:, :32]}),
        ("rope", {"rope": ROPE.float()}),
        ("positions", {"positions": THREE[:2]}),
        ("slots", {"slots": THREE.float()}),
        ("cos_sin", {"cos_sin": make_cos_sin(4, 32, "cpu")}),
        ("cos_sin", {"cos_sin": make_cos_sin(4, 64, "cpu").double()}),
        ("style", {"style": ""}),
        ("eps", {"eps": NAN}),
        ("norm", {"norm": torch.ones(64, dtype=torch.bfloat16)}),
        ("norm", {"norm": torch.ones(512)}),
        ("q_rope", {"q_rope": Q[:, 0]}),
        ("q_rope", {"q_rope": Q[:, :0]}),
        ("q_rope", {"q_rope": Q[:2]}),
        ("q_rope", {"q_rope": Q.float()}),
        ("q_out", {"q_rope": None, "q_out": Q}),
        ("q_out", {"q_out": Q}),
        ("q_out", {"q_out": Q[:2].clone()}),
        ("q_out", {"q_out": Q[:1].clone().expand(3, 2, 64)}),
    ],
)
def test_wrong_arguments(argument: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the argument, what was expected and what came; nothing is launched."""
    monkeypatch.setattr(mla_append, "_append_mla_kernel", None)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*; got "):
        append_mla(**(FINE | changes))
