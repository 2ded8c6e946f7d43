"""A trace as a load to serve, what users are promised, the pools that may serve it, and what came of it.

``fleet`` says how many of a pool a load needs, ``cheapest`` which pools. Units: seconds, dollars; $/M says of which
tokens. Errors: ``ValueError`` naming the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ...bench.deployment import Deployment
    from ..cost import StepCost


OMITTED = (
    "launch gaps between kernels, scheduler and other host time",
    "a prefill pass shared by several short prompts: each takes an attention group for itself",
    "imbalance between prompts that an expert-parallel deployment's groups prefill side by side",
    "memory and links that a cache of prefixes takes; peaks of memory beyond a batch at the mean context",
    "faster steps while a batch is not full; spare GPUs for failures and for growth",
    "overlap: communication and the hand-over of the KV cache are added, never hidden behind compute",
)
"""What a deployment's bill and times do not contain, shown beside them."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival, as arrays of equal length; ``cached`` tokens are part of ``input``."""

    arrival_s: np.ndarray
    input_tokens: np.ndarray
    cached_tokens: np.ndarray
    output_tokens: np.ndarray

    def __post_init__(self) -> None:
        import numpy as np

        arrays = (self.arrival_s, self.input_tokens, self.cached_tokens, self.output_tokens)
        if len({len(each) for each in arrays}) != 1 or len(self.arrival_s) < 2:
            raise ValueError(f"trace: expected at least two requests; got {[len(each) for each in arrays]}")
        if not np.isfinite(self.arrival_s).all() or (np.diff(self.arrival_s) < 0).any():
            raise ValueError("trace: expected finite timestamps in order")
        if self.arrival_s[-1] <= self.arrival_s[0]:
            raise ValueError("trace: expected requests over some time; all have one timestamp")
        if not all(np.isfinite(each).all() for each in arrays[1:]):
            raise ValueError("trace: expected finite numbers of tokens")
        new = self.input_tokens - self.cached_tokens
        if (self.cached_tokens < 0).any() or (new < 1).any() or (self.output_tokens < 1).any():
            raise ValueError("trace: expected 1 or more new and output tokens and 0 or more cached ones per request")

    @cached_property
    def requests_per_s(self) -> float:
        """Arrivals after the first over the time that they took."""
        return (len(self.arrival_s) - 1) / float(self.arrival_s[-1] - self.arrival_s[0])

    @cached_property
    def new_tokens(self) -> np.ndarray:
        return self.input_tokens - self.cached_tokens

    @cached_property
    def context(self) -> int:
        """Cached tokens of a decode step on average: input + half the output, weighted by the steps of a request."""
        mean = float((self.output_tokens * (self.input_tokens + self.output_tokens / 2)).sum())
        return max(1, round(mean / float(self.output_tokens.sum())))

    @cached_property
    def mean_output_tokens(self) -> float:
        return float(self.output_tokens.mean())


@dataclass(frozen=True)
class Limits:
    """What a user is promised, and what hardware imposes: the last two are lifted only to see what they cost.

    ``max_ttft_s`` holds at ``ttft_percentile``; None: no limit. Without ``needs_whole_replicas`` a pool is billed for
    its work, or for whole attention groups where it takes more of them to hold the time to first token.
    """

    min_tokens_per_s_per_user: float = 0.0
    max_ttft_s: float | None = None
    ttft_percentile: float = 0.9
    needs_memory: bool = True
    needs_whole_replicas: bool = True

    def __post_init__(self) -> None:
        rate, ttft = self.min_tokens_per_s_per_user, self.max_ttft_s
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"min_tokens_per_s_per_user: expected 0 or more; got {rate}")
        if ttft is not None and not (math.isfinite(ttft) and ttft > 0):
            raise ValueError(f"max_ttft_s: expected more than 0; got {ttft}")
        if not 0 < self.ttft_percentile < 1:
            raise ValueError(f"ttft_percentile: expected a share between 0 and 1; got {self.ttft_percentile}")


@dataclass(frozen=True, eq=False)
class PrefillPool:
    """How one parallelism prefills.

    ``service_s`` of every request of the trace on one attention group; ``hand_over_s`` of its KV cache to another pool.
    ``shares``: of the time by provenance. ``fits``: weights and the longest request, in the GPUs' memory.
    """

    deployment: Deployment
    service_s: np.ndarray
    hand_over_s: np.ndarray
    usd_per_gpu_hour: float
    shares: dict[str, float]
    fits: bool = True

    @cached_property
    def mean_s(self) -> float:
        return float(self.service_s.mean())

    @property
    def usd_per_group_hour(self) -> float:
        return self.deployment.attention_tp * self.usd_per_gpu_hour


@dataclass(frozen=True, eq=False)
class DecodePool:
    """A decode step of one parallelism and batch. ``fits``: in the GPUs' memory."""

    cost: StepCost
    fits: bool = True

    @property
    def deployment(self) -> Deployment:
        return self.cost.step.deployment

    @cached_property
    def step_s(self) -> float:
        return self.cost.step.step_s

    @cached_property
    def tokens_per_s_per_user(self) -> float:
        return self.cost.tokens_per_s_per_user

    @property
    def s_per_token(self) -> float:
        """Seconds that one sequence waits for one token that is kept."""
        return self.step_s / self.deployment.kept_tokens_per_step

    def group_s_per_request(self, output_tokens: float) -> float:
        """Seconds of one attention group that a request's output takes, the batch full."""
        return output_tokens * self.s_per_token / self.deployment.sequences

    @property
    def usd_per_group_hour(self) -> float:
        return self.deployment.attention_tp * self.cost.price.usd_per_gpu_hour


@dataclass(frozen=True)
class Served:
    """A deployment that serves the trace. ``prefill_replicas`` is 0 where one pool does both.

    ``usd_per_mtok_output``, ``usd_per_mtok_total``: over output tokens, and over input and output; every GPU is paid.
    ``ttft_s`` at the asked percentile. ``prefill_load``, ``decode_load``: shares of the pool's time that work takes;
    of one pool the two add up. ``shares``: by provenance, of the busy GPU-time.
    """

    decode: DecodePool
    prefill: PrefillPool
    prefill_replicas: float
    decode_replicas: float
    tokens_per_s_per_user: float
    ttft_s: float
    prefill_load: float
    decode_load: float
    usd_per_hour: float
    usd_per_mtok_output: float
    usd_per_mtok_total: float
    shares: dict[str, float]

    @property
    def is_disaggregated(self) -> bool:
        return self.prefill_replicas > 0

    @property
    def gpus(self) -> float:
        """Of all pools; whole but where ``needs_whole_replicas`` was lifted."""
        decode = self.decode_replicas * self.decode.deployment.gpus
        return decode + self.prefill_replicas * self.prefill.deployment.gpus
