"""Every attention kernel of the registry over sequences that hold nothing, or end beside a page's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels.mla_attention import mla_attention
from tokenfab.kernels.paged_attention import paged_attention
from tokenfab.kernels.registry import Kernel, find_kernels
from tokenfab.tests.reliability.walk import SHAPES, Case, as_bytes, cache_of, case_of

SPLIT = 128
"""Tokens per piece of the batch-invariant mode: a sequence's bits do not follow from its neighbours."""


def attend(case: Case, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, LSE) of the case's sequences cut to these lengths, one query token each, onto NaN."""
    batch, device = len(lengths), case.device
    q = case.activations["q"][:batch]
    width = case.shape["kv_lora_rank" if case.kernel.op == "mla" else "head_dim"]
    out = torch.full((*q.shape[:2], width), float("nan"), dtype=torch.bfloat16, device=device)
    lse = torch.full(q.shape[:2], float("nan"), device=device)
    table = case.weights["page_table"][:1].repeat(batch, 1)
    options: dict[str, Any] = {"split_tokens": SPLIT, "out": out, "lse": lse}
    held = torch.tensor(lengths, dtype=torch.int32, device=device)
    cache: Any = cache_of(case, case.weights["pages"])
    if case.kernel.op == "mla":
        mla_attention(q, cache, table, held, scale=0.0625, **options)
    else:
        paged_attention(q, cache, table, held, **options)
    return out, lse


@pytest.mark.parametrize("kernel", [*find_kernels("attention"), *find_kernels("mla")], ids=lambda kernel: kernel.name)
def test_r06_no_tokens_and_lengths_beside_a_page(kernel: Kernel, device: torch.device) -> None:
    """Output 0 and LSE -inf of an empty sequence; whatever a neighbour holds, the same bits."""
    case, size = case_of(kernel, device), SHAPES[kernel.op]["page_size"]
    assert case.activations["q"].shape[0] >= 4
    o, lse = attend(case, [0, size - 1, size, size + 1])
    assert (o[0] == 0).all()
    assert torch.isneginf(lse[0]).all()
    assert o[1:].isfinite().all()
    assert lse[1:].isfinite().all()
    for first, second in ((1, 2), (2, 3)):  # one token more is not left out
        assert not torch.equal(lse[first], lse[second])
    full, full_lse = attend(case, [2 * size + 1, size - 1, size, size + 1])
    assert torch.equal(as_bytes(o[1:]), as_bytes(full[1:]))
    assert torch.equal(lse[1:], full_lse[1:])
    empty, _ = attend(case, [0, 0, size, 0])
    assert torch.equal(as_bytes(empty[2]), as_bytes(o[2]))
    assert (empty[[0, 1, 3]] == 0).all()
