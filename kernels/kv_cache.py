"""Paged KV caches: what one is, how it is read and written in plain torch, and a check of its page tables.

``write_ref`` and ``read_ref`` are the ground truth of the kernels that append to a cache and attend over it: the bytes
of ``kv_layout.py``, through ``codec.py``. A page table is (B, max_pages) int32, entry i of a row the page of tokens
i x page_size on; a slot is page x page_size + place in the page, -1 for a token that is not stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import require, seen
from .codec import decode_e2m1, decode_e4m3, decode_e8m0, encode_e4m3, quantize, unpack_fp4
from .formats import get_format
from .kv_layout import MXFP4_MAX_BYTE, MXFP4_NAN, NVFP4_BIAS, NVFP4_NAN, KvLayout, MlaLayout

_SIGN_BITS = (15, 12, 14, 13)
_SIZE_SHIFTS = (6, 3, 9, 0)
"""Of value v in half a word of K; see ``kv_layout.py``."""


@dataclass(frozen=True, eq=False)
class KvCache:
    """K and V of one layer.

    Attributes:
        layout: where the bytes of a record lie.
        pages: uint8 (num_pages, num_kv_heads, record_bytes), contiguous, 16-byte aligned.
        factors: float32 (2,), of K and V: the scale of fp8, the global scale of nvfp4; ones elsewhere.

    Raises:
        ValueError: naming the part, what was expected and what came.
    """

    layout: KvLayout
    pages: torch.Tensor
    factors: torch.Tensor

    def __post_init__(self) -> None:
        _check_parts(self.pages, self.factors, self.layout.record_bytes, 2)

    @property
    def num_kv_heads(self) -> int:
        return self.pages.shape[1]


@dataclass(frozen=True, eq=False)
class MlaCache:
    """The latent and rope parts of one MLA layer.

    Attributes:
        layout: where the bytes of a record lie.
        pages: uint8 (num_pages, 1, record_bytes), contiguous, 16-byte aligned.
        factors: float32 (1,): the scale of fp8; one elsewhere.

    Raises:
        ValueError: naming the part, what was expected and what came.
    """

    layout: MlaLayout
    pages: torch.Tensor
    factors: torch.Tensor

    def __post_init__(self) -> None:
        _check_parts(self.pages, self.factors, self.layout.record_bytes, 1)
        require(self.pages.shape[1] == 1, "pages", "one record per page", tuple(self.pages.shape))


def _check_parts(pages: torch.Tensor, factors: torch.Tensor, record_bytes: int, num_factors: int) -> None:
    good = pages.dtype == torch.uint8 and pages.dim() == 3 and pages.shape[-1] == record_bytes and pages.is_contiguous()
    require(good, "pages", f"contiguous uint8 (num_pages, heads, {record_bytes})", seen(pages))
    require(pages.data_ptr() % 16 == 0, "pages", "16-byte alignment", pages.data_ptr() % 16)
    good = factors.dtype == torch.float32 and tuple(factors.shape) == (num_factors,) and factors.device == pages.device
    good = good and factors.is_contiguous()
    require(
        good,
        "factors",
        f"contiguous float32 ({num_factors},) on {pages.device}",
        f"{seen(factors)} on {factors.device}",
    )


def empty_kv_cache(
    layout: KvLayout, num_pages: int, num_kv_heads: int, device: torch.device | str, *,
    k_scale: float = 1.0, v_scale: float = 1.0,
) -> KvCache:  # fmt: skip
    """An unwritten cache. ``k_scale``, ``v_scale``: of fp8 and nvfp4, from calibration; 1 elsewhere."""
    pages = torch.empty(num_pages, num_kv_heads, layout.record_bytes, dtype=torch.uint8, device=device)
    return KvCache(layout, pages, _factors(layout.format, [k_scale, v_scale], device))


def empty_mla_cache(layout: MlaLayout, num_pages: int, device: torch.device | str, *, scale: float = 1.0) -> MlaCache:
    """An unwritten cache. ``scale``: of fp8, from calibration; 1 elsewhere."""
    pages = torch.empty(num_pages, 1, layout.record_bytes, dtype=torch.uint8, device=device)
    return MlaCache(layout, pages, _factors(layout.format, [scale], device))


def _factors(format: str, scales: list[float], device: torch.device | str) -> torch.Tensor:
    has_one = get_format(format).scale_per == "tensor" or get_format(format).tensor_scale
    for scale in scales:
        require(has_one or scale == 1, "scale", f"1 ({format})", scale)
        require(2.0**-100 <= scale <= 2.0**100, "scale", "a number from 2^-100 to 2^100", scale)
    return torch.tensor(scales, dtype=torch.float32, device=device)


# -- one vector ------------------------------------------------------------------------------------


def encode_ref(x: torch.Tensor, format: str, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes and scales of vectors (N, D) BF16: as stored, but for where they lie.

    Returns: codes BF16 or uint8 E4M3 (N, D), or uint8 E2M1 0..15 (N, D); scales float32 (N, 1), uint8 (N, D / block),
    or None.
    """
    row = get_format(format)
    if format == "bf16":
        return x, None
    if format == "fp8":
        return encode_e4m3(x.float() / factor), None
    stored = quantize(x, format, global_scale=factor) if row.tensor_scale else quantize(x, format)
    assert stored.scale is not None
    if format == "fp8_row":
        return stored.data.view(torch.uint8), stored.scale
    if format == "mxfp4":
        scale = stored.scale.masked_fill(stored.scale > MXFP4_MAX_BYTE, MXFP4_NAN)
    else:
        mantissa, exponent = torch.frexp(stored.scale.float())  # in [1/2, 1)
        byte = ((exponent - 1 + NVFP4_BIAS) << 3) | ((2 * mantissa - 1) * 8).nan_to_num().to(torch.int32)
        scale = byte.masked_fill(stored.scale.float().isnan(), NVFP4_NAN).to(torch.uint8)
    return unpack_fp4(stored.data), scale


def decode_ref(codes: torch.Tensor, scale: torch.Tensor | None, format: str, factor: torch.Tensor) -> torch.Tensor:
    """Float64 values (N, D) of what ``encode_ref`` returns."""
    row = get_format(format)
    if format == "bf16":
        return codes.double()
    if row.element == "e4m3":
        return decode_e4m3(codes).double() * (factor.double() if scale is None else scale.double())
    assert scale is not None
    assert row.block is not None
    if format == "mxfp4":
        each = decode_e8m0(scale.masked_fill(scale > MXFP4_MAX_BYTE, 255)).double()
    else:
        each = torch.exp2((scale >> 3).double() - NVFP4_BIAS) * (1 + (scale & 7).double() / 8) * factor.double()
        each = each.masked_fill(scale == NVFP4_NAN, float("nan"))
    return decode_e2m1(codes).double() * each.repeat_interleave(row.block[1], dim=1)


# -- FP4: where codes lie in words and bytes -------------------------------------------------------


def _pack_k(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (N, D) -> uint8 (N, D / 2), words of 8 channels."""
    each = codes.view(codes.shape[0], codes.shape[1] // 8, 4, 2).to(torch.int32)  # word, v, half
    halves = torch.zeros_like(each[:, :, 0])
    for v in range(4):
        halves |= ((each[:, :, v] >> 3) << _SIGN_BITS[v]) | ((each[:, :, v] & 7) << _SIZE_SHIFTS[v])
    return torch.stack((halves & 0xFF, halves >> 8), dim=-1).to(torch.uint8).flatten(1)


def _unpack_k(data: torch.Tensor) -> torch.Tensor:
    parts = data.view(data.shape[0], data.shape[1] // 4, 2, 2).to(torch.int32)  # word, half, byte
    halves = parts[..., 0] | (parts[..., 1] << 8)
    each = [(((halves >> _SIGN_BITS[v]) & 1) << 3) | ((halves >> _SIZE_SHIFTS[v]) & 7) for v in range(4)]
    return torch.stack(each, dim=2).flatten(1).to(torch.uint8)


def _pack_v(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (N, D) -> uint8 (N, D / 2)."""
    low, high = codes.chunk(2, dim=1)
    return ((low >> 3) << 7) | ((low & 7) << 3) | ((high >> 3) << 6) | (high & 7)


def _unpack_v(data: torch.Tensor) -> torch.Tensor:
    low = ((data >> 7) << 3) | ((data >> 3) & 7)
    return torch.cat((low, (((data >> 6) & 1) << 3) | (data & 7)), dim=1)


# -- records ---------------------------------------------------------------------------------------


def _offsets(layout: KvLayout | MlaLayout, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """Bytes (N, n) of each part of the tokens at these places of their pages."""
    here = places[:, None]

    def rows(start: int, count: int) -> torch.Tensor:
        return start + here * count + torch.arange(count, device=places.device)

    if isinstance(layout, MlaLayout):
        size = layout.element_bytes
        parts = {"k": rows(0, layout.kv_lora_rank * size), "rope": rows(layout.rope_codes, layout.rope_dim * size)}
        return parts | ({"k_scale": rows(layout.scales, 4)} if layout.format == "fp8_row" else {})
    row, size = get_format(layout.format), layout.page_size
    item = 2 if layout.format == "bf16" else 1
    channels = torch.arange(layout.codes_bytes // size, device=places.device)
    v_codes = layout.v_codes + (channels // item * size + here) * item + channels % item
    parts = {"k": rows(0, layout.codes_bytes // size), "v": v_codes}
    if not layout.scales_bytes:
        return parts
    count = layout.scales_bytes // size
    blocks = torch.arange(count, device=places.device)
    by_block = layout.v_scales + blocks * size + here
    v_scales = rows(layout.v_scales, count) if row.block is None else by_block
    return parts | {"k_scale": rows(layout.k_scales, count), "v_scale": v_scales}


def _as_bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous().view(torch.uint8)


def write_ref(cache: KvCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Quantize k and v (T, num_kv_heads, head_dim) BF16 and store them at ``slots`` (T,)."""
    layout = cache.layout
    kept = (slots >= 0).nonzero().flatten()
    where = slots[kept].long()
    offsets = _offsets(layout, where % layout.page_size)
    is_fp4 = get_format(layout.format).packing is not None
    for head in range(cache.num_kv_heads):
        for name, x, pack, factor in (("k", k, _pack_k, 0), ("v", v, _pack_v, 1)):
            codes, scale = encode_ref(x[kept, head], layout.format, cache.factors[factor])
            index = ((where // layout.page_size)[:, None], head)
            cache.pages[(*index, offsets[name])] = _as_bytes(pack(codes) if is_fp4 else codes)
            if scale is not None:
                cache.pages[(*index, offsets[f"{name}_scale"])] = _as_bytes(scale)


def read_ref(cache: KvCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V at ``slots`` (T,), dequantized: float64 (T, num_kv_heads, head_dim) each."""
    layout = cache.layout
    offsets = _offsets(layout, slots.long() % layout.page_size)
    pages = (slots.long() // layout.page_size)[:, None]
    found: list[list[torch.Tensor]] = [[], []]
    for head in range(cache.num_kv_heads):
        for index, (name, unpack) in enumerate((("k", _unpack_k), ("v", _unpack_v))):
            raw = cache.pages[pages, head, offsets[name]]
            codes = raw.view(torch.bfloat16) if layout.format == "bf16" else raw
            codes = unpack(codes) if get_format(layout.format).packing else codes
            scale = cache.pages[pages, head, offsets[f"{name}_scale"]] if layout.scales_bytes else None
            scale = scale.view(torch.float32) if scale is not None and layout.format == "fp8_row" else scale
            found[index].append(decode_ref(codes, scale, layout.format, cache.factors[index]))
    return torch.stack(found[0], dim=1), torch.stack(found[1], dim=1)


def write_mla_ref(cache: MlaCache, latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor) -> None:
    """Quantize latent (T, kv_lora_rank) and rope (T, rope_dim) BF16, as one vector per token, and store them."""
    layout = cache.layout
    kept = (slots >= 0).nonzero().flatten()
    where = slots[kept].long()
    offsets, pages = _offsets(layout, where % layout.page_size), (where // layout.page_size)[:, None]
    codes, scale = encode_ref(torch.cat((latent, rope), dim=1)[kept], layout.format, cache.factors[0])
    cache.pages[pages, 0, offsets["k"]] = _as_bytes(codes[:, : layout.kv_lora_rank])
    cache.pages[pages, 0, offsets["rope"]] = _as_bytes(codes[:, layout.kv_lora_rank :])
    if scale is not None:
        cache.pages[pages, 0, offsets["k_scale"]] = _as_bytes(scale)


def read_mla_ref(cache: MlaCache, slots: torch.Tensor) -> torch.Tensor:
    """Latent and rope at ``slots`` (T,), dequantized: float64 (T, kv_lora_rank + rope_dim)."""
    layout = cache.layout
    offsets = _offsets(layout, slots.long() % layout.page_size)
    pages = (slots.long() // layout.page_size)[:, None]
    raw = [cache.pages[pages, 0, offsets[name]] for name in ("k", "rope")]
    codes = torch.cat([part.view(torch.bfloat16) if layout.format == "bf16" else part for part in raw], dim=1)
    scale = cache.pages[pages, 0, offsets["k_scale"]].view(torch.float32) if layout.format == "fp8_row" else None
    return decode_ref(codes, scale, layout.format, cache.factors[0])


def slots_of(page_table: torch.Tensor, length: int, page_size: int) -> torch.Tensor:
    """Slots (length,) of the first tokens of one sequence, whose row of the page table is given."""
    tokens = torch.arange(length, device=page_table.device)
    return page_table[tokens // page_size].long() * page_size + tokens % page_size


# -- the debug check -------------------------------------------------------------------------------


def check_pages(
    cache: KvCache | MlaCache, page_table: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor | None = None, *,
    shared_pages: int = 0,
) -> None:  # fmt: skip
    """For debugging, since it waits for the device: that every page of every sequence exists and is its own.

    Args:
        lengths: (B,) cached tokens. slots: (T,), those to be written next, -1 for none.
        shared_pages: so many first pages of every sequence may be those of others (a common prefix).

    Raises:
        ValueError: naming the sequence or token: a page id out of range, a page of two sequences, a length that the
            table cannot hold, a slot out of range or written twice.
    """
    num_pages, size = cache.pages.shape[0], cache.layout.page_size
    owners: dict[int, int] = {}
    for sequence, (pages, length) in enumerate(zip(page_table.tolist(), lengths.tolist(), strict=True)):
        used = -(-length // size)
        require(0 <= used <= len(pages), f"lengths[{sequence}]", f"0 to {len(pages) * size} tokens", length)
        for place, page in enumerate(pages[:used]):
            argument = f"page_table[{sequence}, {place}]"
            require(0 <= page < num_pages, argument, f"a page id from 0 to {num_pages - 1}", page)
            if place >= shared_pages:
                require(page not in owners, argument, f"a page that only sequence {sequence} has",
                        f"page {page}, also of sequence {owners.get(page)}")  # fmt: skip
                owners[page] = sequence
    written: dict[int, int] = {}
    for token, slot in enumerate([] if slots is None else slots.tolist()):
        require(-1 <= slot < num_pages * size, f"slots[{token}]", f"-1 to {num_pages * size - 1}", slot)
        require(slot not in written, f"slots[{token}]", "a slot written once",
                f"slot {slot}, also of token {written.get(slot)}")  # fmt: skip
        if slot >= 0:
            written[slot] = token
