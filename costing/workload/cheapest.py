"""The cheapest deployment that serves a trace within limits of latency, and which limit it pays for.

Every GPU, stack, parallelism and batch is a candidate, aggregated (one pool does both) or disaggregated (a pool for
prefill, one for decode, each with its own parallelism). Candidates are taken in the order of what they cost at least,
and no further than the best bill, so the queue of few is simulated and none that could be cheaper is left out.

The binding limit is the one that costs most: without it, all others kept, the bill would fall furthest. Several limits
may bind together, none of them alone: then lifting one saves nothing, lifting all does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    _found: dict[tuple[int, Limits], Served | None] = field(default_factory=dict)

    def cheapest_of(self, index: int, limits: Limits) -> Served | None:
        """Of one GPU and stack; None where none serves within the limits."""
        key = (index, limits)
        if key not in self._found:
            self._found[key] = _cheapest_of(self.workload, self.options[index], limits)
        return self._found[key]

    def cheapest(self, limits: Limits, only: int | None = None) -> tuple[int, Served] | None:
        """The least bill, and of which of the options; of option ``only`` alone where given."""
        places = range(len(self.options)) if only is None else [only]
        found = [(index, served) for index in places if (served := self.cheapest_of(index, limits))]
        return min(found, key=lambda each: each[1].usd_per_hour, default=None)

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


def cheapest(workload: Workload, options: Iterable[Options], limits: Limits) -> Served | None:
    """The least bill within the limits; None where nothing is."""
    found = Search(workload, list(options)).cheapest(limits)
    return found and found[1]


def choose(workload: Workload, options: Sequence[Options], limits: Limits) -> Choice | None:
    """The cheapest within the limits, and which of them binds; None where nothing is."""
    return Search(workload, options).choose(limits)


def _cheapest_of(workload: Workload, option: Options, limits: Limits) -> Served | None:
    decode = [each for each in option.decode if each.fits or not limits.needs_memory]
    prefill = [each for each in option.prefill if each.fits or not limits.needs_memory]
    # one pool has one parallelism; whether it fits is a question to its decode part, which holds the whole batch
    both = {Parallel.of(each.deployment): each for each in option.prefill}
    candidates: list[tuple[float, int, bool, PrefillPool, DecodePool]] = []

    def offer(pool: PrefillPool, each: DecodePool, is_split: bool) -> None:
        bill = least_bill(workload, pool, each, limits, is_split=is_split)
        if bill is not None:
            candidates.append((bill, len(candidates), is_split, pool, each))

    for each in decode:
        same = both.get(Parallel.of(each.deployment))
        if same is not None:
            offer(same, each, False)
        for pool in prefill:
            offer(pool, each, True)
    best: Served | None = None
    for bill, _, is_split, pool, each in sorted(candidates, key=lambda one: one[:2]):
        if best is not None and best.usd_per_hour <= bill:
            break
        if is_split:
            found = disaggregated(workload, pool, each, limits, *([best.usd_per_hour] if best else []))
        else:
            found = aggregated(workload, pool, each, limits)
        if found is not None and (best is None or found.usd_per_hour < best.usd_per_hour):
            best = found
    return best
