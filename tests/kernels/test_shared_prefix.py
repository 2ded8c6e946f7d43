"""A shared prefix attended once: as if every sequence had its own copy of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels.attention_reference import paged_attention_ref
from tokenfab.kernels.inputs import random_matrix
from tokenfab.kernels.kv_cache import KvCache, empty_kv_cache, slots_of, write_ref
from tokenfab.kernels.kv_layout import KvLayout
from tokenfab.kernels.reference import error
from tokenfab.kernels.shared_prefix import merge_attention, shared_prefix_attention


def make(
    format: str, prefix: int, rests: list[int], device: torch.device, q_len: int = 1
) -> tuple[KvCache, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cache, prefix's pages, page table of what follows, of the whole, queries): pages of 16, 2 KV heads."""
    used = -(-prefix // 16)
    each = max(-(-rest // 16) for rest in rests) + 1
    cache = empty_kv_cache(KvLayout(format, 64, 16), used + len(rests) * each + 1, 2, device)
    cache.pages.fill_(255)
    order = torch.randperm(cache.pages.shape[0], generator=torch.Generator().manual_seed(3)).to(torch.int32).to(device)
    prefix_pages, tails = order[: used + 1], order[used + 1 :].view(len(rests), each)
    whole = torch.cat((order[:used].repeat(len(rests), 1), tails), dim=1)
    for index, (table, length) in enumerate(((prefix_pages, prefix), *zip(tails, rests, strict=True))):
        k, v = (random_matrix(2 * length, 64, 2 * index + half, device).view(length, 2, 64) for half in (0, 1))
        write_ref(cache, k, v, slots_of(table, length, 16))
    q = random_matrix(len(rests) * q_len * 8, 64, 77, device).view(-1, 8, 64)
    return cache, prefix_pages, tails, whole, q


def ints(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("options", [{}, {"soft_cap": 2.0}, {"sinks": True}, {"split_tokens": 64}], ids=str)
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("format", ["bf16", "fp8_row", "mxfp4"])
def test_as_if_each_had_its_own(format: str, q_len: int, options: dict[str, Any], device: torch.device) -> None:
    prefix, rests = 160, [40, 3, 17, 100, 5]
    cache, prefix_pages, tails, whole, q = make(format, prefix, rests, device, q_len)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 3, 8, device=device)
    o, lse = shared_prefix_attention(
        q, cache, prefix_pages, ints([prefix], device), tails, ints(rests, device), q_len=q_len, **options
    )
    options.pop("split_tokens", None)
    total = ints([prefix + rest for rest in rests], device)
    want, want_lse = paged_attention_ref(q, cache, whole, total, q_len=q_len, **options)
    assert error(o, want) <= 1
    assert error(o.double() * 1.03, want) > 1
    assert (lse.double() - want_lse).abs().max() <= 2e-5 * float(want_lse.abs().max())


def test_nothing_before_or_nothing_after(device: torch.device) -> None:
    """A prefix of length 0 and a rest of length 0 leave what the other pass found; both give zeros."""
    cache, prefix_pages, tails, _, q = make("fp8_row", 48, [20, 33], device)
    alone, _ = paged_attention_ref(q, cache, tails, ints([20, 33], device))
    o, _ = shared_prefix_attention(q, cache, prefix_pages, ints([0], device), tails, ints([20, 33], device))
    assert error(o, alone) <= 1
    table = prefix_pages.repeat(2, 1)
    alone, _ = paged_attention_ref(q, cache, table, ints([48, 48], device))
    o, lse = shared_prefix_attention(q, cache, prefix_pages, ints([48], device), tails, ints([0, 0], device))
    assert error(o, alone) <= 1
    o, lse = shared_prefix_attention(q, cache, prefix_pages, ints([0], device), tails, ints([0, 0], device))
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.isneginf(lse).all()


def test_merge_weighs_by_lse(device: torch.device) -> None:
    o_1, o_2 = torch.full((3, 1, 64), 4.0, device=device), torch.full((3, 1, 64), -2.0, device=device)
    lse_1 = torch.tensor([[0.0], [float("-inf")], [90.0]], device=device)
    lse_2 = torch.tensor([[1.0986123], [5.0], [-90.0]], device=device)
    out, lse = torch.full((3, 1, 64), float("nan"), device=device), torch.full((3, 1), float("nan"), device=device)
    merge_attention(o_1, lse_1, o_2, lse_2, out, lse)
    assert torch.allclose(out[:, 0, 0], torch.tensor([-0.5, -2.0, 4.0], device=device))  # 1 : 3
    assert torch.allclose(lse[:, 0], torch.tensor([1.3862944, 5.0, 90.0], device=device))


def test_what_is_refused(device: torch.device) -> None:
    cache, prefix_pages, tails, _, q = make("bf16", 16, [4], device)
    one = ints([4], device)
    with pytest.raises(ValueError, match=r"prefix_pages: expected contiguous int32 \(max_pages,\)"):
        shared_prefix_attention(q, cache, prefix_pages[None], one, tails, one)
    with pytest.raises(ValueError, match=r"prefix_length: expected int32 \(1,\)"):
        shared_prefix_attention(q, cache, prefix_pages, one.long(), tails, one)
    with pytest.raises(ValueError, match="page_table: expected int32"):
        shared_prefix_attention(q, cache, prefix_pages, one, tails.long(), one)
