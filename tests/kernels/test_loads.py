"""The published loads: what their definitions promise, and draws as the collector's own functions make them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tokenfab.kernels.loads import balanced, load_logits, power_law, power_law_counts
from tokenfab.kernels.routing import route
from tokenfab.kernels.routing_rule import Routing

SHAPES = [(1, 8, 2), (2, 9, 4), (3, 8, 2), (7, 160, 6), (64, 128, 4), (300, 256, 8), (130, 512, 10), (50, 7, 7)]


def counts_of(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    assert all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    assert ids.dtype == torch.int32
    assert ids.is_contiguous()
    return torch.bincount(ids.flatten(), minlength=num_experts)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_balanced_names_distinct_experts(tokens: int, experts: int, top_k: int) -> None:
    ids = balanced(tokens, experts, top_k)
    assert ids.shape == (tokens, top_k)
    counts = counts_of(ids, experts)
    assert counts.numel() == experts
    if experts % top_k == 0:
        assert counts.max() - counts.min() <= 1


def test_balanced_by_hand() -> None:
    assert balanced(4, 8, 2).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert balanced(5, 8, 2).tolist()[4] == [4, 0]
    assert balanced(2, 8, 2).tolist() == [[0, 4], [2, 6]]  # two tokens stretched over four
    assert balanced(2, 9, 4).tolist() == [[0, 3, 6, 1], [1, 4, 7, 0]]  # 0, then 1, would come twice
    assert balanced(0, 8, 2).shape == (0, 2)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
@pytest.mark.parametrize("alpha", [1.01, 1.2])
def test_power_law_keeps_its_sums(tokens: int, experts: int, top_k: int, alpha: float) -> None:
    for seed in range(3):
        counts = power_law_counts(tokens, experts, top_k, alpha, seed=seed)
        assert counts.sum() == tokens * top_k
        assert 0 <= counts.min() <= counts.max() <= tokens
        ids = power_law(tokens, experts, top_k, alpha, seed=seed)
        assert ids.shape == (tokens, top_k)
        assert torch.equal(counts_of(ids, experts), counts)


def test_draws_are_the_collectors() -> None:
    """Counts that the collector's function gave with torch's generator at the same seed."""
    assert power_law_counts(16, 8, 2, 1.2, num_ranks=2, seed=1).tolist() == [6, 2, 2, 6, 1, 7, 2, 6]
    expected = [8, 24, 14, 64, 14, 41, 4, 4, 12, 24, 9, 10, 3, 4, 6, 15]  # one at the limit of 64
    assert power_law_counts(64, 16, 4, 1.01, num_ranks=4, seed=0).tolist() == expected
    # what the limit of 3 cuts off is given out before rounding's excess is taken back
    expected = [1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 1, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert power_law_counts(3, 32, 4, 1.2, num_ranks=2, seed=2).tolist() == expected


@pytest.mark.parametrize("num_ranks", [2, 8, 32])
def test_rank_0_has_most(num_ranks: int) -> None:
    for seed in range(5):
        sums = power_law_counts(128, 128, 8, 1.2, num_ranks=num_ranks, seed=seed).view(num_ranks, -1).sum(1)
        assert sums[0] == sums.max()


def test_power_law_is_skewed_as_its_density() -> None:
    """x^-alpha on [1, 0.8 T]: the median and the mean of its draws, before any limit."""
    alpha, high = 1.2, 0.8 * 4000
    counts = torch.cat([power_law_counts(4000, 1024, 8, alpha, seed=seed) for seed in range(8)]).double()
    median = (1 - 0.5 * (1 - high ** (1 - alpha))) ** (1 / (1 - alpha))
    mean = (1 - alpha) / (2 - alpha) * (high ** (2 - alpha) - 1) / (high ** (1 - alpha) - 1)
    assert float(counts.median() / counts.mean()) == pytest.approx(median / mean, rel=0.15)
    steeper = power_law_counts(4000, 1024, 8, 3.0, seed=0).double()
    assert steeper.std() < counts.std()


def test_seeds_differ_and_repeat() -> None:
    one, again, other = (power_law(64, 128, 8, 1.01, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_logits_choose_their_load(device: torch.device) -> None:
    ids = power_law(12, 160, 6, 1.2, seed=5)
    chosen, weights = route(load_logits(ids, 160).to(device), Routing(160, 6))
    assert torch.equal(chosen.cpu(), ids.sort(dim=1).values)
    assert (weights == weights[0, 0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": -1}, "num_tokens: expected 0 or more; got -1"),
        ({"num_experts": 0}, "num_experts: expected 1 or more; got 0"),
        ({"top_k": 9}, "top_k: expected 1 to num_experts = 8; got 9"),
        ({"alpha": 1.0}, "alpha: expected above 0, not 1; got 1.0"),
        ({"num_ranks": 3}, "num_ranks: expected a divisor of the 8 experts; got 3"),
        ({"num_ranks": 0}, "num_ranks: expected a divisor of the 8 experts; got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        power_law(**({"num_tokens": 4, "num_experts": 8, "top_k": 2, "alpha": 1.2} | arguments))
