"""From a trace on disk to a load to serve: how many of its requests, how fast, and what of them a cache holds.

What is cached comes from one of

    endless   one endless cache of prefixes that all replicas share: an upper bound; the default where a trace has them
    fleet     ``routing``'s simulation of so many replicas with caches of so many tokens each, under a policy
    share     a stated share of every prompt
    none      nothing; the default of a trace that says nothing of prefixes, and said so

always with at least one token of every prompt left to compute. Only the first requests of a long trace are read.

Errors: ``ValueError`` naming the field, and what ``traces`` and ``routing`` refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...bench.model_config import ModelConfig
from .deploy import Workload
from .traces import BLOCK_TOKENS, NO_PREFIXES, Chunk, TraceFile, open_trace, whole

if TYPE_CHECKING:
    import numpy as np

DEFAULT_REQUESTS = 20_000
DEFAULT_POLICY = "kv_aware"


@dataclass(frozen=True)
class Cache:
    """What holds prefixes. At most one of: a stated share, replicas with so many tokens each, none at all."""

    share: float | None = None
    replicas: int | None = None
    tokens_per_replica: int | None = None
    policy: str = DEFAULT_POLICY
    is_off: bool = False

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share < 1:
            raise ValueError(f"cached_share: expected 0 or more and less than 1; got {self.share}")
        if (self.replicas is None) != (self.tokens_per_replica is None):
            raise ValueError(
                f"cache: expected replicas and tokens per replica together; got {self.replicas} and "
                f"{self.tokens_per_replica}"
            )
        if self.tokens_per_replica is not None and self.tokens_per_replica < BLOCK_TOKENS:
            raise ValueError(
                f"cache_tokens: expected a block of {BLOCK_TOKENS} tokens or more; got {self.tokens_per_replica}"
            )
        if sum((self.share is not None, self.replicas is not None, self.is_off)) > 1:
            raise ValueError("cache: expected one of a cached share, replicas with a cache each, no cache; got several")


@dataclass(frozen=True)
class Demand:
    """A load and where it is from. ``notes``: what was made of the trace, and what its reader should know.

    ``caches``: how many were simulated, if any.
    """

    workload: Workload
    trace: Path
    cached: str
    notes: tuple[str, ...]
    caches: int | None = None

    @property
    def cached_share(self) -> float:
        """Of all input tokens."""
        return float(self.workload.cached_tokens.sum() / self.workload.input_tokens.sum())


def read_demand(
    path: Path,
    model: ModelConfig,
    cache: Cache | None = None,
    requests: int = DEFAULT_REQUESTS,
    rate_scale: float = 1.0,
    *,
    skip_longer: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Demand:
    """The first ``requests`` of a trace, ``rate_scale`` times as fast.

    ``skip_longer``: leave out, and count, requests longer than the model's context; without it they are an error of
    whoever serves the load.

    Raises:
        ValueError: a trace that is not as it must be, fewer than two requests, a scale or number that is not positive.
    """
    import numpy as np

    if requests < 2:
        raise ValueError(f"requests: expected at least 2; got {requests}")
    if not (math.isfinite(rate_scale) and rate_scale > 0):
        raise ValueError(f"rate_scale: expected a positive number; got {rate_scale}")
    source = open_trace(path)
    chunks = list(_first(source.chunks(progress), requests + 1))
    trace = whole(chunks)
    is_cut = len(trace) > requests
    cached, said = _cached(source, chunks, trace.input_tokens, cache or Cache())
    kept = np.arange(len(trace)) < requests
    notes = [f"the first {requests:,} requests of the trace; it has more"] if is_cut else []
    longer = kept & (trace.input_tokens + trace.output_tokens > model.max_context)
    if skip_longer and longer.any():
        notes.append(f"left out: {int(longer.sum())} requests longer than {model.name}'s {model.max_context:,} tokens")
        kept &= ~longer
    arrival = trace.arrival_s[kept]
    if len(arrival):
        arrival = (arrival - arrival[0]) / rate_scale
    if rate_scale != 1:
        notes.append(f"arrivals {rate_scale:g} times as fast as in the trace")
    workload = Workload(arrival, trace.input_tokens[kept], cached[kept], trace.output_tokens[kept])
    at_once = 1 - len(np.unique(arrival)) / len(arrival)
    if at_once > 0.1:
        notes.append(
            f"{at_once:.0%} of the requests have the time of the one before: the trace's clock ticks, and what it "
            "bundles waits for one another here"
        )
    return Demand(workload, path, said, tuple(notes), cache.replicas if cache else None)


def _first(chunks: Iterator[Chunk], requests: int) -> Iterator[Chunk]:
    """Chunks with so many requests together."""
    for chunk in chunks:
        left = requests - chunk.first_request
        yield chunk if len(chunk) <= left else _cut(chunk, left)
        if len(chunk) >= left:
            return


def _cut(chunk: Chunk, size: int) -> Chunk:
    ids = starts = None
    if chunk.block_ids is not None and chunk.block_starts is not None:
        starts = chunk.block_starts[: size + 1]
        ids = chunk.block_ids[: starts[-1]]
    return Chunk(
        chunk.first_request, chunk.arrival_s[:size], chunk.input_tokens[:size], chunk.output_tokens[:size], ids, starts
    )


def _cached(source: TraceFile, chunks: list[Chunk], inputs: np.ndarray, cache: Cache) -> tuple[np.ndarray, str]:
    """Cached tokens of every request, and where they are from."""
    import numpy as np

    if cache.is_off:
        return np.zeros_like(inputs), "no prefix cache"
    if cache.share is not None:
        found = np.minimum(np.floor(inputs * cache.share).astype(inputs.dtype), inputs - 1)
        return found, f"a stated {cache.share:.1%} of every prompt"
    if not source.has_prefixes:
        if cache.replicas is not None:
            raise ValueError(f"hash_ids: {NO_PREFIXES}")
        return np.zeros_like(inputs), f"none counted: {NO_PREFIXES}; --cached-share states one"
    if cache.replicas is None or cache.tokens_per_replica is None:
        return _endless(source, chunks), "one endless cache of prefixes that all replicas share: an upper bound"
    from .routing import Router, Simulation

    router = Router(cache.policy, cache.replicas, cache.tokens_per_replica // BLOCK_TOKENS)
    simulation = Simulation([router], str(source.path))
    for chunk in chunks:
        simulation.add(chunk)
    return simulation.results()[0].cached_tokens.astype(inputs.dtype), (
        f"{cache.policy} routing over {cache.replicas} replicas with caches of {cache.tokens_per_replica:,} tokens each"
    )


def _endless(source: TraceFile, chunks: list[Chunk]) -> np.ndarray:
    import numpy as np

    from .routing_blocks import BlockIndex, cached_tokens

    index = BlockIndex(str(source.path))
    return np.concatenate([cached_tokens(index.add(chunk)[1], chunk.input_tokens) for chunk in chunks])
