"""The cheapest deployment that serves a trace within limits of latency, and which limit it pays for.

Every GPU, stack, parallelism and batch is a candidate, aggregated (one pool does both) or disaggregated (a pool for
prefill, one for decode, each with its own parallelism). A pool is as many whole replicas as the trace needs:

    aggregated     groups >= requests/s x (prefill_s + output_tokens x step_s / (sequences x kept tokens))
    disaggregated  prefill groups >= requests/s x prefill_s, decode groups >= the second term

(a group is one attention group, a server of the queue), and more until the percentile of time to first token holds:
wait + prefill + hand-over of the KV cache, on the trace's own arrivals, first come, first served. Tokens/s/user are
kept tokens / step_s, in an aggregated pool times the share of time that prefill leaves. The binding limit is the one
that costs most: without it, all others kept, the bill would fall furthest.

Prefill time is linear between measured lengths; its part over cached tokens goes with new x cached. Not in it: host
time, a pass shared by several short prompts, waiting for a place in the decode batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..sweep import Parallel
from .queueing import waits_s

if TYPE_CHECKING:
    import numpy as np

    from ...bench.deployment import Deployment
    from ..cost import StepCost

TOKENS_PER_S_PER_USER, TTFT, MEMORY, WHOLE_REPLICAS, NONE = (
    "tokens/s/user", "time to first token", "memory", "whole replicas", "none",
)  # fmt: skip

LEAST_SAVED = 0.005
"""A limit that costs less than this share of the bill does not bind."""


@dataclass(frozen=True)
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
        if (np.diff(self.arrival_s) < 0).any() or not np.isfinite(self.arrival_s).all():
            raise ValueError("trace: expected finite timestamps in order")
        if self.arrival_s[-1] <= self.arrival_s[0]:
            raise ValueError("trace: expected requests over some time; all have one timestamp")
        new = self.input_tokens - self.cached_tokens
        if (self.cached_tokens < 0).any() or (new < 1).any() or (self.output_tokens < 1).any():
            raise ValueError("trace: expected 1 or more new and output tokens and 0 or more cached ones per request")

    @property
    def requests_per_s(self) -> float:
        """Arrivals after the first over the time that they took."""
        return (len(self.arrival_s) - 1) / float(self.arrival_s[-1] - self.arrival_s[0])

    @cached_property
    def new_tokens(self) -> np.ndarray:
        return self.input_tokens - self.cached_tokens

    @property
    def context(self) -> int:
        """Cached tokens of a decode step on average: input + half the output, weighted by the steps of a request."""
        mean = float((self.output_tokens * (self.input_tokens + self.output_tokens / 2)).sum())
        return max(1, round(mean / float(self.output_tokens.sum())))

    @property
    def mean_output_tokens(self) -> float:
        return float(self.output_tokens.mean())


@dataclass(frozen=True)
class Limits:
    """What a user is promised, and what hardware imposes: the last two are lifted only to see what they cost.

    ``max_ttft_s`` holds at ``ttft_percentile``; None: no limit.
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


@dataclass(frozen=True)
class PrefillPool:
    """How one parallelism prefills: ``service_s`` of every request of the trace on one attention group."""

    deployment: Deployment
    service_s: np.ndarray
    usd_per_gpu_hour: float
    modelled: float

    @property
    def mean_s(self) -> float:
        return float(self.service_s.mean())


@dataclass(frozen=True)
class DecodePool:
    """A decode step of one parallelism and batch. ``fits``: in the GPUs' memory."""

    cost: StepCost
    fits: bool = True

    @property
    def deployment(self) -> Deployment:
        return self.cost.step.deployment

    @property
    def tokens_per_s_per_user(self) -> float:
        return self.cost.tokens_per_s_per_user

    def group_s_per_request(self, output_tokens: float) -> float:
        """Seconds of one attention group that a request's output takes, the batch full."""
        deployment = self.deployment
        return output_tokens * self.cost.step.step_s / (deployment.sequences * deployment.kept_tokens_per_step)


@dataclass(frozen=True)
class Served:
    """A deployment that serves the trace. ``prefill_replicas`` is 0 where one pool does both.

    ``usd_per_mtok_output``, ``usd_per_mtok_total``: over output tokens, and over input and output; every GPU is paid.
    ``ttft_s`` at the asked percentile; ``load``: the busiest pool's share of time that work takes.
    """

    decode: DecodePool
    prefill: PrefillPool
    prefill_replicas: float
    decode_replicas: float
    tokens_per_s_per_user: float
    ttft_s: float
    load: float
    usd_per_hour: float
    usd_per_mtok_output: float
    usd_per_mtok_total: float

    @property
    def is_disaggregated(self) -> bool:
        return self.prefill_replicas > 0

    @property
    def gpus(self) -> float:
        """Of all pools; whole but where ``needs_whole_replicas`` was lifted."""
        decode = self.decode_replicas * self.decode.deployment.gpus
        return decode + self.prefill_replicas * self.prefill.deployment.gpus


def percentile_ttft_s(
    workload: Workload, service_s: np.ndarray, groups: int, limits: Limits, more_s: float = 0.0
) -> float:
    """Wait + service + ``more_s`` at the limits' percentile, with so many groups."""
    import numpy as np

    ttft_s = waits_s(workload.arrival_s, service_s, groups) + service_s + more_s
    return float(np.quantile(ttft_s, limits.ttft_percentile))


def _replicas(needed_groups: float, per_replica: int, limits: Limits) -> float:
    """Whole replicas; what floating point adds to an exact fit is not a replica."""
    if not limits.needs_whole_replicas:
        return needed_groups / per_replica
    return max(1, math.ceil(needed_groups / per_replica - 1e-9))


def _enough(
    workload: Workload, pool: PrefillPool, least: float, per_replica: int, limits: Limits, more_s: float
) -> tuple[float, float] | None:
    """The fewest replicas from ``least`` on that hold the time to first token, and that time; None if none does.

    Doubling, then halving: more servers never make a first come, first served wait longer.
    """

    def ttft(replicas: float) -> float:
        return percentile_ttft_s(workload, pool.service_s, math.ceil(replicas * per_replica - 1e-9), limits, more_s)

    got = ttft(least)
    if limits.max_ttft_s is None or got <= limits.max_ttft_s:
        return least, got
    if percentile_ttft_s(workload, pool.service_s, len(pool.service_s), limits, more_s) > limits.max_ttft_s:
        return None  # even without a wait
    low, high = math.floor(least), 2 * math.ceil(least)
    while ttft(high) > limits.max_ttft_s:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ttft(middle) <= limits.max_ttft_s else (middle, high)
    return high, ttft(high)


def aggregated(workload: Workload, prefill: PrefillPool, decode: DecodePool, limits: Limits) -> Served | None:
    """One pool does both; prefills go first, so decode steps wait for them. None where a limit cannot be held."""
    rate, groups_per_replica = workload.requests_per_s, decode.deployment.attention_dp
    prefill_load = rate * prefill.mean_s
    work = prefill_load + rate * decode.group_s_per_request(workload.mean_output_tokens)
    full, limit = decode.tokens_per_s_per_user, limits.min_tokens_per_s_per_user
    if full <= limit:
        return None
    least = _replicas(max(work, prefill_load / (1 - limit / full)), groups_per_replica, limits)
    found = _enough(workload, prefill, least, groups_per_replica, limits, decode.cost.step.step_s)
    if found is None:
        return None
    replicas, ttft_s = found
    groups = replicas * groups_per_replica
    return _served(workload, decode, prefill, 0, replicas, full * (1 - prefill_load / groups), ttft_s, work / groups)


def disaggregated(
    workload: Workload, prefill: PrefillPool, decode: DecodePool, limits: Limits, hand_over_s: float = 0.0
) -> Served | None:
    """A pool for each; ``hand_over_s``: of a request's KV cache. None where a limit cannot be held."""
    if decode.tokens_per_s_per_user < limits.min_tokens_per_s_per_user:
        return None
    rate, groups_p, groups_d = workload.requests_per_s, prefill.deployment.attention_dp, decode.deployment.attention_dp
    prefill_work = rate * prefill.mean_s
    decode_work = rate * decode.group_s_per_request(workload.mean_output_tokens)
    found = _enough(workload, prefill, _replicas(prefill_work, groups_p, limits), groups_p, limits, hand_over_s)
    if found is None:
        return None
    prefill_replicas, ttft_s = found
    replicas = _replicas(decode_work, groups_d, limits)
    load = max(prefill_work / (prefill_replicas * groups_p), decode_work / (replicas * groups_d))
    return _served(
        workload, decode, prefill, prefill_replicas, replicas, decode.tokens_per_s_per_user, ttft_s, load
    )  # fmt: skip


def _served(
    workload: Workload, decode: DecodePool, prefill: PrefillPool, prefill_replicas: float, decode_replicas: float,
    tokens_per_s_per_user: float, ttft_s: float, load: float,
) -> Served:  # fmt: skip
    usd_per_hour = decode_replicas * decode.deployment.gpus * decode.cost.price.usd_per_gpu_hour
    usd_per_hour += prefill_replicas * prefill.deployment.gpus * prefill.usd_per_gpu_hour
    usd_per_request = usd_per_hour / 3600 / workload.requests_per_s
    tokens = float((workload.input_tokens + workload.output_tokens).mean())
    return Served(
        decode, prefill, prefill_replicas, decode_replicas, tokens_per_s_per_user, ttft_s, load, usd_per_hour,
        usd_per_request / workload.mean_output_tokens * 1e6, usd_per_request / tokens * 1e6,
    )  # fmt: skip


# -- the cheapest ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What one GPU and stack offers. ``hand_over_s``: of a request's KV cache from a prefill to a decode pool."""

    prefill: Sequence[PrefillPool]
    decode: Sequence[DecodePool]
    hand_over_s: float


@dataclass(frozen=True)
class Choice:
    """The cheapest way to serve within limits. ``saved``: by limit, the share of the bill that lifting it saves."""

    served: Served
    binding: str
    saved: dict[str, float]


def cheapest(workload: Workload, options: Iterable[Options], limits: Limits) -> Served | None:
    """The least bill within the limits; None where nothing is."""
    found = [each for each in (_cheapest_of(workload, option, limits) for option in options) if each]
    return min(found, key=lambda each: each.usd_per_hour, default=None)


def _cheapest_of(workload: Workload, option: Options, limits: Limits) -> Served | None:
    decode = [each for each in option.decode if each.fits or not limits.needs_memory]
    both = {Parallel.of(pool.deployment): pool for pool in option.prefill}
    found = ((both.get(Parallel.of(each.deployment)), each) for each in decode)
    pairs = [(pool, each) for pool, each in found if pool is not None]
    best = _first(pairs, lambda pair, at: aggregated(workload, *pair, at), limits)
    alone = [
        each for each in decode if each.tokens_per_s_per_user >= limits.min_tokens_per_s_per_user
    ]  # a pool of its own: the cheapest to decode, whatever prefills
    if not alone or not option.prefill:
        return best
    output = workload.mean_output_tokens

    def decode_usd(each: DecodePool) -> float:
        groups = workload.requests_per_s * each.group_s_per_request(output)
        replicas = _replicas(groups, each.deployment.attention_dp, limits)
        return replicas * each.deployment.gpus * each.cost.price.usd_per_gpu_hour

    decoder = min(alone, key=decode_usd)
    split = _first(
        [(pool, decoder) for pool in option.prefill],
        lambda pair, at: disaggregated(workload, *pair, at, option.hand_over_s), limits,
    )  # fmt: skip
    return min((each for each in (best, split) if each), key=lambda each: each.usd_per_hour, default=None)


def _first(
    pairs: Sequence[tuple[PrefillPool, DecodePool]],
    serve: Callable[[tuple[PrefillPool, DecodePool], Limits], Served | None], limits: Limits,
) -> Served | None:  # fmt: skip
    """The cheapest of ``pairs``. The bill without a limit of TTFT is a lower bound: the queue is simulated in its order
    and no further than a bound that the best bill is below."""
    free = replace(limits, max_ttft_s=None)
    bounds = sorted(((bound.usd_per_hour, index) for index, pair in enumerate(pairs) if (bound := serve(pair, free))))
    best: Served | None = None
    for bound, index in bounds:
        if best is not None and best.usd_per_hour <= bound:
            break
        found = serve(pairs[index], limits)
        if found is not None and (best is None or found.usd_per_hour < best.usd_per_hour):
            best = found
    return best


def choose(workload: Workload, options: Sequence[Options], limits: Limits) -> Choice | None:
    """The cheapest within the limits, and which of them binds; None where nothing is."""
    served = cheapest(workload, options, limits)
    if served is None:
        return None
    lifted = {
        TOKENS_PER_S_PER_USER: replace(limits, min_tokens_per_s_per_user=0.0),
        TTFT: replace(limits, max_ttft_s=None),
        MEMORY: replace(limits, needs_memory=False),
        WHOLE_REPLICAS: replace(limits, needs_whole_replicas=False),
    }
    saved = {}
    for name, fewer in lifted.items():
        without = cheapest(workload, options, fewer)
        assert without is not None
        saved[name] = max(0.0, 1 - without.usd_per_hour / served.usd_per_hour)
    binding = max(saved, key=saved.__getitem__)
    return Choice(served, binding if saved[binding] > LEAST_SAVED else NONE, saved)
