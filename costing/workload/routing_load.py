"""Routers that look: at which replica holds how much of a request, and at what is active on each. See ``routing``."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from .routing_cache import Caches, Paths
from .traces import BLOCK_TOKENS, Chunk

if TYPE_CHECKING:
    from .routing import Router

UNEVEN_REQUESTS, UNEVEN_RATIO, MATCHED = 64, 1.5, 0.3
"""Of cache_aware: when load is uneven, and the share of a prompt that must be cached to follow it."""


class Load:
    """What is active on the replicas, as time passes."""

    def __init__(self, router: Router) -> None:
        self.router = router
        size = router.replicas
        self.given = [0] * size
        self.active_requests = [0] * size
        self._waiting_tokens = [0] * size
        self._active_blocks = [0] * size
        self._costs = [0.0] * size  # of what is active
        self._prefill_free_s = [0.0] * size
        self._prefilled: list[tuple[float, int, int]] = []  # heaps: time, replica, tokens or blocks
        self._finished: list[tuple[float, int, int]] = []

    def _weigh(self, replica: int) -> None:
        waiting, active = self._waiting_tokens[replica], self._active_blocks[replica]
        self._costs[replica] = self.router.prefill_weight * waiting + active * BLOCK_TOKENS

    def until(self, now_s: float) -> None:
        """What ends by ``now_s`` is no load any more."""
        prefilled, finished = self._prefilled, self._finished
        while prefilled and prefilled[0][0] <= now_s:
            _, replica, tokens = heapq.heappop(prefilled)
            self._waiting_tokens[replica] -= tokens
            self._weigh(replica)
        while finished and finished[0][0] <= now_s:
            _, replica, blocks = heapq.heappop(finished)
            self._active_blocks[replica] -= blocks
            self.active_requests[replica] -= 1
            self._weigh(replica)

    def admit(self, replica: int, now_s: float, new_tokens: int, output_tokens: int, blocks: int) -> None:
        """A request on a replica: prefilled after those before it, then decoded."""
        pace = self.router.pace
        prefilled_s = max(now_s, self._prefill_free_s[replica]) + new_tokens / pace.prefill_tokens_per_s
        self._prefill_free_s[replica] = prefilled_s
        heapq.heappush(self._prefilled, (prefilled_s, replica, new_tokens))
        heapq.heappush(self._finished, (prefilled_s + output_tokens / pace.tokens_per_s_per_user, replica, blocks))
        self._waiting_tokens[replica] += new_tokens
        self._active_blocks[replica] += blocks
        self._weigh(replica)
        self.active_requests[replica] += 1
        self.given[replica] += 1

    def least_cost(self, depths: list[int], input_tokens: int) -> int:
        """Of kv_aware; what all replicas would add is left out."""
        weight, most = self.router.prefill_weight, input_tokens // BLOCK_TOKENS
        credit, whole = weight * BLOCK_TOKENS, weight * input_tokens
        costs = [
            cost - (depth * credit if depth <= most else whole)
            for cost, depth in zip(self._costs, depths, strict=True)
        ]  # fmt: skip
        least = min(costs)
        if costs.count(least) == 1:
            return costs.index(least)
        return min((each for each, cost in enumerate(costs) if cost == least), key=self.given.__getitem__)

    def longest_match(self, depths: list[int], input_tokens: int, sizes: list[int]) -> int:
        """Of cache_aware."""
        load, given, replicas = self.active_requests, self.given, range(len(depths))
        most, few = max(load), min(load)
        if most - few > UNEVEN_REQUESTS and most > UNEVEN_RATIO * few:
            return min(replicas, key=lambda each: (load[each], given[each]))
        if min(max(depths) * BLOCK_TOKENS, input_tokens) > MATCHED * input_tokens:
            return min(replicas, key=lambda each: (-depths[each], load[each], given[each]))
        return min(replicas, key=lambda each: (sizes[each], given[each]))

    def route(self, chunk: Chunk, paths: Paths, caches: Caches) -> tuple[list[int], list[int]]:
        """The replica of each request, and how many leading blocks hit there; the caches are touched."""
        looks_at_cost = self.router.policy == "kv_aware"
        chosen: list[int] = []
        found: list[int] = []
        times, inputs, outputs = chunk.arrival_s.tolist(), chunk.input_tokens.tolist(), chunk.output_tokens.tolist()
        for path, now_s, tokens, output in zip(paths, times, inputs, outputs, strict=True):
            self.until(now_s)
            depths = caches.depths(path)
            if looks_at_cost:
                replica = self.least_cost(depths, tokens)
            else:
                replica = self.longest_match(depths, tokens, caches.sizes)
            depth = depths[replica]
            self.admit(replica, now_s, tokens - min(depth * BLOCK_TOKENS, tokens - 1), output, len(path))
            caches.touch(replica, path, depth)
            chosen.append(replica)
            found.append(depth)
        return chosen, found
