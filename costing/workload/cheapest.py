"""The cheapest deployment that serves a trace within limits of latency, and which limit it pays for.

Every GPU, stack, parallelism and batch is a candidate, aggregated (one pool does both) or disaggregated (a pool for
prefill, one for decode, each with its own parallelism). Candidates are taken in the order of what they cost at least,
and no further than the best bill, so the queue of few is simulated and none that could be cheaper is left out. Of two
that cost the same the one with more tokens/s/user is taken.

The binding limit is the one that costs most: without it, all others kept, the bill would fall furthest. Several limits
may bind together, none of them alone: then lifting one saves nothing, lifting all does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..sweep import Parallel
from .deploy import DecodePool, Limits, PrefillPool, Served, Workload
from .fleet import aggregated, disaggregated, least_bill

TOKENS_PER_S_PER_USER, TTFT, MEMORY, WHOLE_REPLICAS, TOGETHER, NONE = (
    "tokens/s/user", "time to first token", "memory", "whole replicas", "several together", "none",
)  # fmt: skip

LEAST_SAVED = 0.005
"""A limit that costs less than this share of the bill does not bind."""


def lift(limits: Limits, name: str) -> Limits:
    """The limits without one of them; without any for ``TOGETHER``.

    Raises:
        ValueError: an unknown limit.
    """
    lifted = {
        TOKENS_PER_S_PER_USER: {"min_tokens_per_s_per_user": 0.0},
        TTFT: {"max_ttft_s": None},
        MEMORY: {"needs_memory": False},
        WHOLE_REPLICAS: {"needs_whole_replicas": False},
    }
    if name == TOGETHER:
        return replace(limits, **{key: value for each in lifted.values() for key, value in each.items()})
    if name not in lifted:
        raise ValueError(f"limit: expected one of {', '.join((*lifted, TOGETHER))}; got {name!r}")
    return replace(limits, **lifted[name])


@dataclass(frozen=True)
class Options:
    """What one GPU and stack offers; pools that do not fit too, so that memory can be seen to bind.

    ``left_out``: what is not offered, and why.
    """

    gpu: str
    stack: str
    prefill: Sequence[PrefillPool]
    decode: Sequence[DecodePool]
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Choice:
    """The cheapest way to serve within limits. ``saved``: by limit, the share of the bill that lifting it saves."""

    option: Options
    served: Served
    binding: str
    saved: dict[str, float]


@dataclass
class Search:
    """Looks for the cheapest among ``options``; what it has found once it does not look for again."""

    workload: Workload
    options: Sequence[Options]
    _found: dict[tuple[int | None, Limits], tuple[int, Served] | None] = field(default_factory=dict)

    def cheapest(self, limits: Limits, only: int | None = None) -> tuple[int, Served] | None:
        """The least bill within the limits, and of which of the options; of option ``only`` alone where given."""
        key = (only, limits)
        if key not in self._found:
            places = range(len(self.options)) if only is None else [only]
            self._found[key] = _cheapest(self.workload, {index: self.options[index] for index in places}, limits)
        return self._found[key]

    def choose(self, limits: Limits, only: int | None = None) -> Choice | None:
        """The cheapest within the limits, and which of them binds; None where nothing is."""
        best = self.cheapest(limits, only)
        if best is None:
            return None
        index, served = best
        saved: dict[str, float] = {}
        for name in (TOKENS_PER_S_PER_USER, TTFT, MEMORY, WHOLE_REPLICAS, TOGETHER):
            fewer = lift(limits, name)
            without = best if fewer == limits else self.cheapest(fewer, only)
            assert without is not None
            saved[name] = max(0.0, 1 - without[1].usd_per_hour / served.usd_per_hour)
        together = saved.pop(TOGETHER)
        binding = max(saved, key=saved.__getitem__)
        if saved[binding] <= LEAST_SAVED:
            binding = TOGETHER if together > LEAST_SAVED else NONE
        return Choice(self.options[index], served, binding, saved)

    def failing(self, limits: Limits, only: int | None = None) -> list[str]:
        """Which limits cannot be held: those without which, all others kept, something serves; ``TOGETHER`` where only
        lifting several helps; nothing where nothing serves at all."""
        names = (TOKENS_PER_S_PER_USER, TTFT, MEMORY)
        found = [name for name in names if self.cheapest(lift(limits, name), only)]
        return found or ([TOGETHER] if self.cheapest(lift(limits, TOGETHER), only) else [])

    def reach(self, limits: Limits, only: int | None = None) -> tuple[float | None, float | None]:
        """Of what fits: the most tokens/s/user of any step, and the least seconds of prefill at the percentile, nothing
        waiting; None where nothing fits."""
        import numpy as np

        offered = self.options if only is None else [self.options[only]]
        steps = [each for option in offered for each in option.decode if each.fits or not limits.needs_memory]
        pools = [each for option in offered for each in option.prefill if each.fits or not limits.needs_memory]
        return (
            max((each.tokens_per_s_per_user for each in steps), default=None),
            min((float(np.quantile(each.service_s, limits.ttft_percentile)) for each in pools), default=None),
        )


def cheapest(workload: Workload, options: Iterable[Options], limits: Limits) -> Served | None:
    """The least bill within the limits; None where nothing is."""
    found = Search(workload, list(options)).cheapest(limits)
    return None if found is None else found[1]


def choose(workload: Workload, options: Sequence[Options], limits: Limits) -> Choice | None:
    """The cheapest within the limits, and which of them binds; None where nothing is."""
    return Search(workload, options).choose(limits)


def _cheapest(workload: Workload, options: dict[int, Options], limits: Limits) -> tuple[int, Served] | None:
    candidates = [each for index, option in options.items() for each in _candidates(workload, index, option, limits)]
    best: tuple[int, Served] | None = None
    for each in sorted(candidates, key=lambda each: (each.least_bill, -each.decode.tokens_per_s_per_user)):
        most, rate = (math.inf, 0.0) if best is None else (best[1].usd_per_hour, best[1].tokens_per_s_per_user)
        if each.least_bill > most:
            break
        if each.least_bill == most and each.decode.tokens_per_s_per_user <= rate:
            continue
        if each.is_split:
            served = disaggregated(workload, each.prefill, each.decode, limits, math.nextafter(most, math.inf))
        else:
            served = aggregated(workload, each.prefill, each.decode, limits)
        if served is not None and (served.usd_per_hour, -served.tokens_per_s_per_user) < (most, -rate):
            best = each.option, served
    return best


@dataclass(frozen=True)
class _Candidate:
    """A pair of pools, and what they cost at least."""

    least_bill: float
    option: int
    prefill: PrefillPool
    decode: DecodePool
    is_split: bool


def _candidates(workload: Workload, index: int, option: Options, limits: Limits) -> Iterator[_Candidate]:
    """Every way to serve that one GPU and stack offers, but those that cannot be whatever the number of GPUs."""
    # one pool has one parallelism; whether it fits is a question to its decode part, which holds the whole batch
    same = {Parallel.of(each.deployment): each for each in option.prefill}
    for decode in option.decode:
        if limits.needs_memory and not decode.fits:
            continue
        one = same.get(Parallel.of(decode.deployment))
        pairs = [(one, False)] if one is not None else []
        pairs += [(each, True) for each in option.prefill if each.fits or not limits.needs_memory]
        for prefill, is_split in pairs:
            bill = least_bill(workload, prefill, decode, limits, is_split=is_split)
            if bill is not None:
                yield _Candidate(bill, index, prefill, decode, is_split)
