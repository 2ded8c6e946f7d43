"""Blocks of a trace: dense numbers for its ids, the check that an id names one prefix, what an endless cache would hit.

An id stands for its block and all before it, so whatever request it is in, the same id precedes it (true of every
request of the published traces). Then a cache that evicts no block before those that follow it holds whole prefixes
only, and a request hits the first blocks of its own that are there.

Memory: 8 bytes per id, and 12 more where ids do not count up from 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .traces import BLOCK_TOKENS, Chunk

if TYPE_CHECKING:
    import numpy as np

_UNSEEN, _FIRST = -2, -1
_SPARSE, _SLACK = 4, 1 << 20


class BlockIndex:
    """Grows with the chunks of one trace, in their order. ``where``: its name in errors; a request is a line."""

    def __init__(self, where: str = "trace") -> None:
        import numpy as np

        self.where = where
        self.num_ids = 0
        self.blocks = 0
        self._before = np.full(1 << 16, _UNSEEN, np.int32)
        self._first = np.empty(1 << 16, np.int32)
        self._known: tuple[np.ndarray, np.ndarray] | None = None  # sorted ids and their numbers; None: ids are numbers

    def add(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the chunk's blocks, and how many leading blocks of each request were in the trace before it.

        Raises:
            ValueError: an id that follows different blocks in two places, or is twice in one request.
        """
        import numpy as np

        ids, starts = chunk.blocks()
        self.blocks += len(ids)
        numbers = self._numbers(ids)
        self._grow()
        before = np.empty(len(numbers), np.int32)
        before[1:] = numbers[:-1]
        before[starts[:-1]] = _FIRST
        unseen = np.flatnonzero(self._before[numbers] == _UNSEEN)
        found, order = numbers[unseen], np.arange(len(unseen))
        self._first[found[::-1]] = order[::-1]  # of several, the last value assigned stays: where it is first
        new = unseen[self._first[found] == order]
        self._before[numbers[new]] = before[new]
        wrong = np.flatnonzero(self._before[numbers] != before)
        if len(wrong):
            at = int(wrong[0])
            request = int(np.searchsorted(starts, at, side="right")) - 1
            raise ValueError(
                f"{self.where}: line {chunk.first_request + request + 1}: hash_ids: {ids[at]} follows another block "
                "than before; expected an id to name its whole prefix"
            )
        is_new = np.zeros(len(numbers), np.int64)
        is_new[new] = 1
        return numbers, np.diff(starts) - np.add.reduceat(is_new, starts[:-1])

    def _grow(self) -> None:
        import numpy as np

        if self.num_ids > len(self._before):
            more = np.full(max(self.num_ids, 2 * len(self._before)) - len(self._before), _UNSEEN, np.int32)
            self._before = np.concatenate((self._before, more))
            self._first = np.empty(len(self._before), np.int32)

    def _numbers(self, ids: np.ndarray) -> np.ndarray:
        """The ids themselves while they count up from about 0; numbers given in order of size from then on."""
        import numpy as np

        largest = int(ids.max()) + 1
        if self._known is None:
            if largest <= _SPARSE * self.blocks + _SLACK:
                self.num_ids = max(self.num_ids, largest)
                return ids
            so_far = np.arange(self.num_ids)
            self._known = (so_far, so_far.astype(np.int32))
        known, numbers = self._known
        found, inverse = np.unique(ids, return_inverse=True)
        at = np.searchsorted(known, found)
        absent = np.ones(len(found), bool)
        inside = at < len(known)
        absent[inside] = known[at[inside]] != found[inside]
        given = np.arange(self.num_ids, self.num_ids + int(absent.sum()), dtype=np.int32)
        self.num_ids += len(given)
        known = np.insert(known, at[absent], found[absent])
        numbers = np.insert(numbers, at[absent], given)
        self._known = (known, numbers)
        return numbers[np.searchsorted(known, found)][inverse].astype(np.int64)


def cached_tokens(leading_blocks: np.ndarray, input_tokens: np.ndarray) -> np.ndarray:
    """Tokens of so many leading blocks, at most all but the last one of the prompt: its logits must be computed.

    vLLM keeps to the same: a full hit computes the last token (``KVCacheManager.get_computed_blocks``).
    """
    import numpy as np

    return np.minimum(leading_blocks * BLOCK_TOKENS, input_tokens - 1)
