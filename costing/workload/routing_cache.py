"""Replicas' caches of B blocks, least recent out first, deepest first within a request.

A request that touches its path makes all of it the most recent, so what an older request still owns of its own path is
the end of it: the beginning was touched since by those who share it. So blocks are not kept in order, requests are:
each owns ``path[start:end]``, found by its first block; a touch takes the beginning from whoever owned it, an eviction
takes the end from the oldest. Who holds a block is a set of bits, smaller or equal from block to block of a path.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from .traces import Chunk

_BYTE = 8
_SPARE_ENTRIES = 64

_Owner = list  # [path, start, end]: what a request owns of its path


class Paths:
    """The blocks of a chunk's requests, numbered as by ``BlockIndex``; each path is made when it is asked for."""

    def __init__(self, chunk: Chunk, numbers: np.ndarray, num_ids: int) -> None:
        import numpy as np

        self.num_ids = num_ids
        self._starts = chunk.blocks()[1].tolist()
        self._blocks = array("i")
        self._blocks.frombytes(numbers.astype(np.intc).tobytes())

    def __iter__(self) -> Iterator[array[int]]:
        blocks = self._blocks
        return (blocks[start:end] for start, end in pairwise(self._starts))


class Caches:
    """``blocks`` per replica; None: endless."""

    def __init__(self, replicas: int, blocks: int | None) -> None:
        self.replicas, self.blocks = replicas, blocks
        self.sizes = [0] * replicas
        self._holders: bytearray | list[int] = bytearray() if replicas <= _BYTE else []
        self._owners: list[dict[int, _Owner]] = [{} for _ in range(replicas)]  # by the first block owned
        self._queues: list[deque[_Owner]] = [deque() for _ in range(replicas)]

    def reserve(self, num_ids: int) -> None:
        """Room for blocks numbered below ``num_ids``."""
        self._holders.extend([0] * (num_ids - len(self._holders)))

    def depth(self, replica: int, path: array[int]) -> int:
        """Leading blocks that the replica holds."""
        holders, bit, depth = self._holders, 1 << replica, 0
        for block in path:
            if not holders[block] & bit:
                break
            depth += 1
        return depth

    def depths(self, path: array[int]) -> list[int]:
        """Leading blocks that each replica holds."""
        depths = [0] * self.replicas
        if not self._holders[path[0]]:
            return depths
        found = map(self._holders.__getitem__, path)
        sets = bytes(found) if self.replicas <= _BYTE else list(found)
        held, depth = sets[0], 0
        while held:
            depth += sets.count(held)
            after = sets[depth] if depth < len(sets) else 0
            gone = held ^ after
            while gone:
                bit = gone & -gone
                depths[bit.bit_length() - 1] = depth
                gone ^= bit
            held = after
        return depths

    def touch(self, replica: int, path: array[int], depth: int) -> None:
        """A request, of which ``depth`` leading blocks hit, becomes the most recent."""
        holders, bit, size = self._holders, 1 << replica, len(path)
        for block in path[depth:]:
            holders[block] |= bit
        self.sizes[replica] += size - depth
        if self.blocks is None:
            return
        owners, at = self._owners[replica], 0
        while at < depth:
            owner = owners.pop(path[at])
            theirs, _, end = owner
            shared = min(end, depth)
            if theirs[shared - 1] != path[shared - 1]:  # an id names its prefix: else all before it are the same
                shared = _common(theirs, path, at, shared)
            owner[1] = at = shared
            if at < end:
                owners[theirs[at]] = owner
            else:
                owner[0] = None
        queue, ours = self._queues[replica], [path, 0, size]
        owners[path[0]] = ours
        queue.append(ours)
        excess = self.sizes[replica] - self.blocks
        if excess > 0:
            self._evict(replica, excess)
        if len(queue) > 2 * len(owners) + _SPARE_ENTRIES:  # most own nothing any more
            self._queues[replica] = deque(owner for owner in queue if owner[1] < owner[2])

    def _evict(self, replica: int, excess: int) -> None:
        holders, bit, owners, queue = self._holders, 1 << replica, self._owners[replica], self._queues[replica]
        self.sizes[replica] -= excess
        while excess:
            path, start, end = oldest = queue[0]
            cut = max(start, end - excess)
            if cut == start:
                queue.popleft()
                if start == end:
                    continue
                del owners[path[start]]
            oldest[2] = cut
            excess -= end - cut
            for block in path[cut:end]:
                holders[block] ^= bit


def _common(theirs: array[int], ours: array[int], low: int, high: int) -> int:
    """How many leading blocks are the same: at least ``low``, fewer than ``high``."""
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if theirs[middle - 1] == ours[middle - 1] else (low, middle)
    return low
