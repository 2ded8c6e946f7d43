"""How a router chooses experts, as data. Standard library only.

Rule:    choice = logits, or sigmoid(logits) + bias; the ``top_k`` experts of largest choice, of the
         ``kept_groups`` best groups where there are groups (score of a group: the sum of its two largest
         choices; a group is num_experts / num_groups consecutive experts). Ties go to the smaller index.
         weight = softmax(logits) or sigmoid(logits) of a chosen expert, never with the bias; then, with
         ``renormalize``, over the sum of the chosen ones (sigmoid: + 1e-20); then times ``scaling_factor``.

Softmax keeps order, so choosing by logits is choosing by softmax without its rounding; and a renormalized
softmax is the softmax of the chosen logits. One rule thus covers softmax before top-k (Qwen3) and
after it (gpt-oss).

What models state, by their configs' words:
    Mixtral, Qwen3 (norm_topk_prob), gpt-oss     softmax, renormalize
    Qwen2-MoE (norm_topk_prob false)             softmax
    DeepSeek-V3 (n_group 8, topk_group 4)        sigmoid, bias, renormalize, groups, scaling 2.5
    Kimi-K2, GLM-4.5 (n_group 1)                 sigmoid, bias, renormalize, scaling
    MiniMax-M2                                   sigmoid, bias, renormalize
    Llama-4 (top 1)                              sigmoid
The bias of gpt-oss's router is part of its linear layer: it is in the logits.

Source:  Hugging Face transformers' modelling code of these models. Experts outside the kept groups cannot be
         chosen here, as in vLLM and SGLang, which mask them with -inf; DeepSeek-V3's class in transformers
         masks with 0: different only where a kept choice is negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCORINGS = ("softmax", "sigmoid")

MAX_EXPERTS = 1024
"""32 logits per thread of one warp."""

MAX_TOP_K = 16

SUM_FLOOR = 1e-20
"""Added to the sum that sigmoid weights are divided by, as DeepSeek's code does: all zero stays zero."""


@dataclass(frozen=True)
class Routing:
    """One router's rule; see the module.

    Attributes:
        scoring: "softmax" or "sigmoid".
        renormalize: weights of a token sum to ``scaling_factor``.
        has_bias: a bias per expert corrects the choice, not the weights; sigmoid only.
        num_groups, kept_groups: sigmoid only; 1 and 1: no groups.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    has_bias: bool = False
    num_groups: int = 1
    kept_groups: int = 1
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{field}: expected {expected}; got {getattr(self, field)!r}")

        require(1 <= self.num_experts <= MAX_EXPERTS, "num_experts", f"1 to {MAX_EXPERTS}")
        require(self.scoring in SCORINGS, "scoring", f"one of {', '.join(SCORINGS)}")
        require(not self.has_bias or self.scoring == "sigmoid", "has_bias", "False with softmax")
        require(self.num_groups == 1 or self.scoring == "sigmoid", "num_groups", "1 with softmax")
        divides = self.num_groups >= 1 and self.num_experts % self.num_groups == 0
        require(divides, "num_groups", f"a divisor of the {self.num_experts} experts")
        two_each = self.num_groups == 1 or self.group_size >= 2
        require(two_each, "num_groups", f"two or more of the {self.num_experts} experts in each group")
        require(1 <= self.kept_groups <= self.num_groups, "kept_groups", f"1 to num_groups = {self.num_groups}")
        most = min(MAX_TOP_K, self.kept_groups * self.group_size)
        require(1 <= self.top_k <= most, "top_k", f"1 to {most}, of the experts in the kept groups")
        is_factor = math.isfinite(self.scaling_factor) and self.scaling_factor > 0
        require(is_factor, "scaling_factor", "a finite number above 0")

    @property
    def group_size(self) -> int:
        """Experts of one group."""
        return self.num_experts // self.num_groups
