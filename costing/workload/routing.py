"""Prefix caching over replicas, simulated: a trace's requests, where a router sends them, what they find cached.

A replica is whatever has a cache of its own: a server, or one data-parallel rank of it. Its cache holds B blocks:

    hit      a request hits its leading blocks that the chosen replica holds; none after the first that is absent
    touch    then all its blocks become the most recent, the last one first, so that its first is the most recent
    evict    beyond B, the least recent block goes: the oldest request's, of these the deepest

as vLLM frees a request's blocks in reverse order ("the last block ... should be evicted first", design/prefix_caching)
and SGLang's radix tree evicts least recent leaves. Blocks count as held once the request is routed; those in use can
be evicted too; answers are not cached, for a trace does not say which blocks they become.

Policies, of which a hash is splitmix64:

    random       hash of (seed, number of the request) mod N
    round_robin  number of the request mod N
    sticky       hash of the id of its second block (of the first where it has one) mod N: requests with 1024 tokens in
                 common go together. A trace has no session; its first block is often the system prompt of everyone
    kv_aware     NVIDIA Dynamo's router at its defaults (lib/kv-router/src/scheduling/selector.rs): least of
                 weight x (tokens waiting for prefill + new tokens) / 512 + blocks of active requests, this one's too
    cache_aware  the gateway of SGLang and of vLLM at its defaults (policies/cache_aware.rs): the longest cached prefix
                 where that is more than 0.3 of the prompt, else the replica that caches least; where load is uneven
                 (active requests max - min > 64 and max > 1.5 x min), the fewest active requests

vLLM's production-stack (routing_logic.py) has a third, not simulated: the longest cached prefix where it is all of the
prompt but 2000 tokens, else by session.

Ties go to the replica that was given the fewest requests, then to the first. Dynamo counts blocks that active requests
share once, here each counts; the gateway guesses what is cached, here it knows. What is active follows from a stated
pace: prefills run one after another on a replica at ``prefill_tokens_per_s``, an answer then takes its tokens /
``tokens_per_s_per_user``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .routing_blocks import BlockIndex, cached_tokens
from .routing_cache import Caches, Paths
from .routing_load import Load
from .traces import BLOCK_TOKENS, Chunk, TraceFile

if TYPE_CHECKING:
    import numpy as np

RANDOM, ROUND_ROBIN, STICKY, KV_AWARE, CACHE_AWARE = POLICIES = (
    "random", "round_robin", "sticky", "kv_aware", "cache_aware",
)  # fmt: skip

STICKY_BLOCKS = 2
MAX_REPLICAS = 1024


@dataclass(frozen=True)
class Pace:
    """How fast a replica works, for what a router sees as its load.

    The default is one 8-GPU H800 node of DeepSeek's service (open-infra-index, day 6): 73.7k input tokens/s of which
    56.3 % hit the cache, 20 to 22 tokens/s per user.
    """

    prefill_tokens_per_s: float = 73_700 * (1 - 0.563)
    tokens_per_s_per_user: float = 21.0

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_s", "tokens_per_s_per_user"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number; got {value}")


@dataclass(frozen=True)
class Router:
    """One policy over replicas with caches of ``cache_blocks`` each; None: endless ones.

    ``prefill_weight``: of kv_aware, what a block to prefill weighs against an active one (Dynamo's default is 1).
    """

    policy: str
    replicas: int
    cache_blocks: int | None
    pace: Pace = field(default_factory=Pace)
    seed: int = 0
    prefill_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}; got {self.policy!r}")
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise ValueError(f"replicas: expected 1 to {MAX_REPLICAS}; got {self.replicas}")
        if self.cache_blocks is not None and self.cache_blocks < 1:
            raise ValueError(f"cache_blocks: expected at least 1, of {BLOCK_TOKENS} tokens; got {self.cache_blocks}")
        if not (math.isfinite(self.prefill_weight) and self.prefill_weight >= 0):
            raise ValueError(f"prefill_weight: expected 0 or more; got {self.prefill_weight}")


@dataclass(frozen=True)
class Routed:
    """What a router made of a trace.

    Attributes:
        cached_tokens: of each request, at most all but its last token.
        requests_of, prefilled_tokens_of: by replica.
        bound_tokens, bound_blocks: what one endless cache for all replicas would hit.
    """

    router: Router
    cached_tokens: np.ndarray
    input_tokens: int
    blocks: int
    hit_blocks: int
    requests_of: np.ndarray
    prefilled_tokens_of: np.ndarray
    bound_tokens: int
    bound_blocks: int

    @property
    def requests(self) -> int:
        return len(self.cached_tokens)

    @property
    def hit_rate(self) -> float:
        """Cached over all input tokens."""
        return int(self.cached_tokens.sum()) / self.input_tokens

    @property
    def hit_rate_blocks(self) -> float:
        return self.hit_blocks / self.blocks

    @property
    def bound(self) -> float:
        """The hit rate, in tokens, of one endless cache."""
        return self.bound_tokens / self.input_tokens

    @property
    def of_bound(self) -> float | None:
        """Of the tokens that could hit, those that did; None where none could."""
        return int(self.cached_tokens.sum()) / self.bound_tokens if self.bound_tokens else None

    @property
    def imbalance(self) -> float:
        """Prefilled tokens of the busiest replica over the mean."""
        return float(self.prefilled_tokens_of.max() / self.prefilled_tokens_of.mean())


def simulate(
    trace: TraceFile, routers: Sequence[Router], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Routed]:
    """What each router makes of the trace, which is read once.

    Raises:
        ValueError: no router, a trace that is not as it must be or has no prefix information.
    """
    simulation = Simulation(routers, str(trace.path))
    for chunk in trace.chunks(progress):
        simulation.add(chunk)
    return simulation.results()


class Simulation:
    """Routers side by side over the chunks of one trace."""

    def __init__(self, routers: Sequence[Router], where: str = "trace") -> None:
        if not routers:
            raise ValueError("routers: expected at least one; got none")
        self.index = BlockIndex(where)
        self.states = [_State(router) for router in routers]
        self.input_tokens = self.bound_tokens = self.bound_blocks = 0

    def add(self, chunk: Chunk) -> None:
        """The next requests.

        Raises:
            ValueError: no prefix information, or ids that do not name prefixes.
        """
        numbers, seen = self.index.add(chunk)
        self.input_tokens += int(chunk.input_tokens.sum())
        self.bound_blocks += int(seen.sum())
        self.bound_tokens += int(cached_tokens(seen, chunk.input_tokens).sum())
        paths = Paths(chunk, numbers, self.index.num_ids)
        for state in self.states:
            state.add(chunk, paths)

    def results(self) -> list[Routed]:
        """Raises:
        ValueError: no request was added.
        """
        import numpy as np

        if not self.input_tokens:
            raise ValueError("trace: expected at least one request; got none")
        return [
            Routed(
                state.router, np.concatenate(state.cached), self.input_tokens, self.index.blocks, state.hit_blocks,
                state.requests_of, state.prefilled_tokens_of, self.bound_tokens, self.bound_blocks,
            )
            for state in self.states
        ]  # fmt: skip


class _State:
    """One router's caches and load between chunks."""

    def __init__(self, router: Router) -> None:
        import numpy as np

        self.router = router
        self.caches = Caches(router.replicas, router.cache_blocks)
        self.cached: list[np.ndarray] = []
        self.hit_blocks = 0
        self.requests_of = np.zeros(router.replicas, np.int64)
        self.prefilled_tokens_of = np.zeros(router.replicas, np.int64)
        self.load = Load(router) if router.policy in (KV_AWARE, CACHE_AWARE) else None

    def add(self, chunk: Chunk, paths: Paths) -> None:
        import numpy as np

        self.caches.reserve(paths.num_ids)
        if self.load is not None:
            chosen, depths = self.load.route(chunk, paths, self.caches)
        else:
            chosen, depths = blind_choice(self.router, chunk).tolist(), []
            for replica, path in zip(chosen, paths, strict=True):
                depth = self.caches.depth(replica, path)
                self.caches.touch(replica, path, depth)
                depths.append(depth)
        leading = np.array(depths, np.int64)
        cached = cached_tokens(leading, chunk.input_tokens)
        self.cached.append(cached.astype(np.int32))
        self.hit_blocks += int(leading.sum())
        size = self.router.replicas
        self.requests_of += np.bincount(chosen, minlength=size)
        new = np.bincount(chosen, weights=chunk.input_tokens - cached, minlength=size)
        self.prefilled_tokens_of += new.astype(np.int64)


def blind_choice(router: Router, chunk: Chunk) -> np.ndarray:
    """The replica of each request, for policies that look at neither caches nor load."""
    import numpy as np

    numbers = np.arange(chunk.first_request, chunk.first_request + len(chunk), dtype=np.uint64)
    if router.policy == ROUND_ROBIN:
        keys = numbers
    elif router.policy == RANDOM:
        keys = splitmix64(numbers + splitmix64(np.array([router.seed], np.uint64)))
    else:
        ids, starts = chunk.blocks()
        last = np.minimum(np.diff(starts), STICKY_BLOCKS) - 1
        keys = splitmix64(ids[starts[:-1] + last].astype(np.uint64))
    return (keys % np.uint64(router.replicas)).astype(np.int64)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The hash of Vigna's splitmix64, of unsigned 64-bit numbers."""
    import numpy as np

    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
