"""How a trace is served: what one pool, or a pool for prefill and one for decode, needs, takes and costs.

A pool is as many whole replicas as the trace needs; each attention group of it is a server that prefills one request at
a time, and offers as many places of decode as its batch has:

    work          prefill    requests/s x prefill_s                                                groups
                  decode     requests/s x output_tokens x step_s / (batch x kept tokens per step)  groups
    one pool      groups >= both; prefills go first, so tokens/s/user = kept / step_s x (1 - prefill / groups)
    two pools     prefill groups >= prefill, decode groups >= decode; tokens/s/user = kept / step_s

and more until the percentile of time to first token holds, on the trace's own arrivals, first come, first served:

    TTFT = wait for a group + prefill + hand-over of the KV cache (one pool: the step under way) + wait for a place

Stated, not modelled: a step takes as long as with a full batch at the trace's mean context (where it is not full, steps
are faster and users with them); a fleet of one size serves the trace from end to end. Every output token takes a place
for its part of a step, the first too. Left out: ``OMITTED``.

Units: seconds, dollars; $/M says of which tokens. Errors: ``ValueError`` naming the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .deploy import DecodePool, Limits, PrefillPool, Served, Workload
from .queueing import waits_s

if TYPE_CHECKING:
    import numpy as np

# -- time to first token ---------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _prefilled_s(workload: Workload, pool: PrefillPool, groups: int) -> np.ndarray:
    """From a request's arrival to the end of its prefill."""
    return waits_s(workload.arrival_s, pool.service_s, groups) + pool.service_s


def ttft_s(
    workload: Workload, pool: PrefillPool, groups: int, more_s: np.ndarray | float, place_s: np.ndarray, places: int
) -> np.ndarray:
    """Of every request: wait for a group, prefill, ``more_s``, wait for a place; ``place_s``: how long it keeps it."""
    import numpy as np

    found = _prefilled_s(workload, pool, groups) + more_s
    ready = workload.arrival_s + found
    order = np.argsort(ready, kind="stable")
    found[order] += waits_s(ready[order], place_s[order], places)
    return found


def _quantile(times_s: np.ndarray, percentile: float) -> float:
    import numpy as np

    return float(np.quantile(times_s, percentile))


# -- sizes of a pool -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Size:
    """How many attention groups a pool may have: ``least``, ``least + unit``, ...; and how many of them are paid."""

    needed: float
    per_replica: int
    is_whole: bool

    @classmethod
    def of(cls, needed: float, pool: PrefillPool | DecodePool, limits: Limits) -> _Size:
        return cls(needed, pool.deployment.attention_dp, limits.needs_whole_replicas)

    @property
    def unit(self) -> int:
        return self.per_replica if self.is_whole else 1

    @property
    def least(self) -> int:
        """What floating point adds to an exact fit is not a replica."""
        return self.unit * max(1, math.ceil(self.needed / self.unit - 1e-9))

    def paid(self, groups: int) -> float:
        return groups if self.is_whole or groups > self.least else self.needed


def _fewest(size: _Size, holds: Callable[[int], bool], most: int) -> int | None:
    """The fewest groups that hold, by doubling, then halving; None if ``most`` do not. More groups are taken never to
    serve later."""
    if holds(size.least):
        return size.least
    if most <= size.least or not holds(most):
        return None
    low, high = 0, 1
    while not holds(size.least + high * size.unit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(size.least + middle * size.unit) else (middle, high)
    return size.least + high * size.unit


# -- one pool, two pools ---------------------------------------------------------------------------


def _work(workload: Workload, prefill: PrefillPool, decode: DecodePool) -> tuple[float, float]:
    """Groups that prefill and decode keep busy."""
    rate = workload.requests_per_s
    return rate * prefill.mean_s, rate * decode.group_s_per_request(workload.mean_output_tokens)


def _size_of_one(workload: Workload, prefill: PrefillPool, decode: DecodePool, limits: Limits) -> _Size | None:
    """Of one pool for both; None where its step is too slow for a user however many groups share the prefills."""
    full, limit = decode.tokens_per_s_per_user, limits.min_tokens_per_s_per_user
    if full <= limit:
        return None
    prefill_work, decode_work = _work(workload, prefill, decode)
    return _Size.of(max(prefill_work + decode_work, prefill_work / (1 - limit / full)), decode, limits)


def aggregated(workload: Workload, prefill: PrefillPool, decode: DecodePool, limits: Limits) -> Served | None:
    """One pool does both; prefills go first, so decode steps wait for them. None where a limit cannot be held."""
    size = _size_of_one(workload, prefill, decode, limits)
    if size is None:
        return None
    full, (prefill_work, _) = decode.tokens_per_s_per_user, _work(workload, prefill, decode)
    place_s, sequences = workload.output_tokens * decode.s_per_token, decode.deployment.sequences

    def left(groups: int) -> float:
        """Share of time that prefill leaves."""
        return 1 - prefill_work / size.paid(groups)

    def ttft(groups: int) -> float:
        slowed_s = place_s / left(groups)
        times_s = ttft_s(workload, prefill, groups, decode.step_s, slowed_s, groups * sequences)
        return _quantile(times_s, limits.ttft_percentile)

    groups: int | None = size.least
    if limits.max_ttft_s is not None:
        limit_s = limits.max_ttft_s
        groups = _fewest(size, lambda groups: ttft(groups) <= limit_s, len(place_s))
    if groups is None:
        return None
    return _served(workload, prefill, decode, (0.0, size.paid(groups)), full * left(groups), ttft(groups))


def disaggregated(
    workload: Workload, prefill: PrefillPool, decode: DecodePool, limits: Limits, below_usd_per_hour: float = math.inf
) -> Served | None:
    """A pool for each, of the sizes that cost least together; None where a limit cannot be held below that bill."""
    if decode.tokens_per_s_per_user < limits.min_tokens_per_s_per_user:
        return None
    prefill_work, decode_work = _work(workload, prefill, decode)
    size_p, size_d = _Size.of(prefill_work, prefill, limits), _Size.of(decode_work, decode, limits)
    place_s, sequences = workload.output_tokens * decode.s_per_token, decode.deployment.sequences
    all_at_once, best_usd = len(place_s), below_usd_per_hour

    def usd(groups_p: int, groups_d: int) -> float:
        return size_p.paid(groups_p) * prefill.usd_per_group_hour + size_d.paid(groups_d) * decode.usd_per_group_hour

    def ttft(groups_p: int, groups_d: int) -> float:
        times_s = ttft_s(workload, prefill, groups_p, prefill.hand_over_s, place_s, groups_d * sequences)
        return _quantile(times_s, limits.ttft_percentile)

    def decode_groups(groups_p: int, paid_p: int) -> int | None:
        """The fewest with so many groups for prefill that, beside ``paid_p`` of them, stay below the best bill."""
        if math.isinf(best_usd):
            most = all_at_once
        else:
            free = (best_usd - usd(paid_p, size_d.least)) / (size_d.unit * decode.usd_per_group_hour)
            most = size_d.least + size_d.unit * max(0, math.ceil(free) - 1)
        limit_s = limits.max_ttft_s
        return _fewest(size_d, lambda groups_d: limit_s is None or ttft(groups_p, groups_d) <= limit_s, most)

    groups_p = _prefill_groups(workload, prefill, size_p, limits.max_ttft_s, limits.ttft_percentile)
    if groups_p is None or usd(groups_p, size_d.least) >= best_usd:
        return None
    fewest_d = decode_groups(all_at_once, groups_p)  # of any number for prefill: nothing waits for one
    found: tuple[int, int] | None = None
    while fewest_d is not None and usd(groups_p, fewest_d) < best_usd:
        groups_d = decode_groups(groups_p, groups_p)
        if groups_d is not None and usd(groups_p, groups_d) < best_usd:
            found, best_usd = (groups_p, groups_d), usd(groups_p, groups_d)
        groups_p += size_p.unit
    if found is None:
        return None
    paid = size_p.paid(found[0]), size_d.paid(found[1])
    return _served(workload, prefill, decode, paid, decode.tokens_per_s_per_user, ttft(*found))


@lru_cache(maxsize=4096)
def _prefill_groups(
    workload: Workload, prefill: PrefillPool, size: _Size, max_ttft_s: float | None, percentile: float
) -> int | None:
    """The fewest of a pool of its own that hold the time to first token if a place is always free."""
    if max_ttft_s is None:
        return size.least

    def holds(groups: int) -> bool:
        return _quantile(_prefilled_s(workload, prefill, groups) + prefill.hand_over_s, percentile) <= max_ttft_s

    return _fewest(size, holds, len(prefill.service_s))


def least_bill(
    workload: Workload, prefill: PrefillPool, decode: DecodePool, limits: Limits, *, is_split: bool
) -> float | None:
    """Dollars per hour that one pool, or two, cost at least, no wait for a place counted; None where none will do."""
    if not is_split:
        size = _size_of_one(workload, prefill, decode, limits)
        return size and size.paid(size.least) * decode.usd_per_group_hour
    if decode.tokens_per_s_per_user < limits.min_tokens_per_s_per_user:
        return None
    prefill_work, decode_work = _work(workload, prefill, decode)
    size_p, size_d = _Size.of(prefill_work, prefill, limits), _Size.of(decode_work, decode, limits)
    groups_p = _prefill_groups(workload, prefill, size_p, limits.max_ttft_s, limits.ttft_percentile)
    if groups_p is None:
        return None
    return size_p.paid(groups_p) * prefill.usd_per_group_hour + size_d.paid(size_d.least) * decode.usd_per_group_hour


def _served(
    workload: Workload, prefill: PrefillPool, decode: DecodePool, paid_groups: tuple[float, float], rate: float,
    ttft_s: float,
) -> Served:  # fmt: skip
    groups_p, groups_d = paid_groups
    work_p, work_d = _work(workload, prefill, decode)
    usd_per_hour = groups_p * prefill.usd_per_group_hour + groups_d * decode.usd_per_group_hour
    usd_per_request = usd_per_hour / 3600 / workload.requests_per_s
    tokens = float((workload.input_tokens + workload.output_tokens).mean())
    busy = (
        (prefill.shares, work_p * prefill.deployment.attention_tp),
        (decode.cost.step.coverage(), work_d * decode.deployment.attention_tp),
    )
    gpus = sum(each for _, each in busy)
    kinds = dict.fromkeys(kind for shares, _ in busy for kind in shares)
    return Served(
        decode, prefill, groups_p / prefill.deployment.attention_dp, groups_d / decode.deployment.attention_dp,
        rate, ttft_s, work_p / (groups_p or groups_d), work_d / groups_d, usd_per_hour,
        usd_per_request / workload.mean_output_tokens * 1e6, usd_per_request / tokens * 1e6,
        {kind: sum(shares.get(kind, 0.0) * each for shares, each in busy) / gpus for kind in kinds},
    )  # fmt: skip
