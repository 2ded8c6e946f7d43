"""Expert loads of the published MoE tables, drawn again: which experts each token chooses. On the host.

``balanced``: token t, slot j: expert (t + j ceil(E / k)) mod E; with fewer than ceil(E / k) tokens, t stretched over
    them: floor(t ceil(E / k) / T) for t.
``power_law``: a number per expert from the density x^-alpha on [1, 0.8 T], or on [0.01, 2] where T k <= E; scaled to
    a sum of T k, rounded, at most T each. What that limit cuts off, then what rounding left, is given to the
    ranks in turn, each time to the rank's emptiest expert, or taken from its fullest. The fullest rank changes
    places with rank 0, which the tables time. Experts by descending rows, each repeated as often as it has
    rows, fill slot 0 of all tokens, then slot 1, ...: so an expert stands once in a token.

Ids are (T, k) int32, k distinct experts in each token.

Source:  ai-dynamo/aiconfigurator (NVIDIA, Apache-2.0), the collector's ``balanced_logits`` and
         ``power_law_logits_v3``: the definition behind "balanced" and "power_law_ALPHA" in its MoE tables. Their
         draws were not seeded, so a table's latency is that of some draw, the mean of five for vLLM's.
"""

from __future__ import annotations

import numpy as np
import torch

from .checks import require


def _check(num_tokens: int, num_experts: int, top_k: int) -> None:
    require(num_tokens >= 0, "num_tokens", "0 or more", num_tokens)
    require(num_experts >= 1, "num_experts", "1 or more", num_experts)
    require(1 <= top_k <= num_experts, "top_k", f"1 to num_experts = {num_experts}", top_k)


def balanced(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """Every expert chosen equally often, where T k divides by E and E by k.

    Where (k - 1) ceil(E / k) >= E, as with 9 experts and k = 4, the definition names an expert twice; that
    slot takes the token's smallest expert not named, as a top-k of the collector's logits would.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check(num_tokens, num_experts, top_k)
    stride = -(-num_experts // top_k)
    tokens = np.arange(num_tokens)
    if num_tokens < stride:
        tokens = tokens * stride // max(num_tokens, 1)
    ids = (tokens[:, None] + np.arange(top_k)[None, :] * stride) % num_experts
    if (top_k - 1) * stride >= num_experts:
        for row in ids:
            named = set(row.tolist())
            unnamed = (expert for expert in range(num_experts) if expert not in named)
            _, first = np.unique(row, return_index=True)
            for slot in sorted(set(range(top_k)) - set(first.tolist())):
                row[slot] = next(unnamed)
    return torch.from_numpy(ids.astype(np.int32))


def power_law_counts(
    num_tokens: int, num_experts: int, top_k: int, alpha: float, *, num_ranks: int = 1, seed: int = 0
) -> torch.Tensor:
    """Rows of each expert, (E,) int64: they sum to T k, none above T; rank 0 has most.

    Args:
        alpha: exponent of the density, not 1; the tables have 1.01 and 1.2.
        num_ranks: expert-parallel ranks of E / num_ranks consecutive experts.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check(num_tokens, num_experts, top_k)
    require(alpha > 0 and alpha != 1, "alpha", "above 0, not 1", alpha)
    is_even = num_ranks >= 1 and num_experts % num_ranks == 0
    require(is_even, "num_ranks", f"a divisor of the {num_experts} experts", num_ranks)
    rows = num_tokens * top_k
    low, high = (1.0, num_tokens * 0.8) if rows > num_experts else (0.01, 2.0)
    uniform = torch.rand(num_experts, generator=torch.Generator().manual_seed(seed))
    power = 1 - alpha  # float32 from here, as the collector draws
    drawn = ((high**power - low**power) * uniform + low**power) ** (1 / power)
    rounded = torch.round(drawn / drawn.sum() * rows).long().view(num_ranks, -1).numpy()
    counts = np.minimum(rounded, num_tokens)
    _adjust(counts, int((rounded - counts).sum()), num_tokens)
    _adjust(counts, rows - int(counts.sum()), num_tokens)
    fullest = int(counts.sum(1).argmax())
    counts[[0, fullest]] = counts[[fullest, 0]]
    return torch.from_numpy(counts.reshape(-1))


def _adjust(counts: np.ndarray, missing: int, most: int) -> None:
    """Bring the sum of (ranks, experts) counts up by ``missing``, or down, one row of one rank at a time."""
    step = 1 if missing > 0 else -1
    while missing:
        left = missing
        for rank in counts:
            expert = rank.argmin() if step > 0 else rank.argmax()
            if missing and 0 <= rank[expert] + step <= most:
                rank[expert] += step
                missing -= step
        if missing == left:  # every expert is full: rounding had made too many
            return


def power_law(
    num_tokens: int, num_experts: int, top_k: int, alpha: float, *, num_ranks: int = 1, seed: int = 0
) -> torch.Tensor:
    """Ids of one draw of ``power_law_counts``; arguments and errors are its own."""
    counts = power_law_counts(num_tokens, num_experts, top_k, alpha, num_ranks=num_ranks, seed=seed)
    order = torch.argsort(counts, descending=True, stable=True)
    return order.repeat_interleave(counts[order]).view(top_k, num_tokens).T.contiguous().int()


def load_logits(ids: torch.Tensor, num_experts: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Router logits (T, E) that choose these experts: the softmax of a one at each, as the collector feeds."""
    ones = torch.zeros(ids.shape[0], num_experts, dtype=torch.bfloat16).scatter_(1, ids.long(), 1.0)
    return torch.softmax(ones, dim=1).to(dtype)
