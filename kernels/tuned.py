"""Measured tiles in place of those of ``tiles.py``: who has a table for this very GPU hands its rows to ``use_tuned``.

This room knows no GPU by name and reads no file. Whoever calls ``use_tuned`` vouches that the rows were measured on the
GPU at hand, with this Triton and with these sources of the kernel (``bench.tune_table.valid_rows`` does); ``find_tile``
then gives a row's tile where kernel, format, architecture and every size asked for are the row's, and its own
everywhere else: a tile is used at the shape it was measured at, since nothing says that it is faster at another.

Sizes: those that the launch itself knows. Dense matmuls: tokens, n, k. Experts: tokens (the class of load that
``choose_tile`` asks for), rows (tokens x experts per token, of all ranks), experts, local_experts, hidden, inter; how
the rows spread over experts is not known before the launch. Attention: tokens (query rows per KV head), batch,
kv_heads, window, max_tokens (what the page table has room for); MLA: tokens, batch, max_tokens.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tiles import Tile

Sizes = tuple[tuple[str, int], ...]
_Key = tuple[str, str, str, Sizes]

_ACTIVE: ContextVar[Mapping[_Key, Tile]] = ContextVar("tuned_tiles")


def sizes_of(sizes: Mapping[str, int]) -> Sizes:
    """The same for equal mappings, whatever their order."""
    return tuple(sorted(sizes.items()))


@dataclass(frozen=True)
class TunedTile:
    """One tile and the only place where it is used: kernel and format as in ``tiles.py``; ``sizes`` by ``sizes_of``."""

    kernel: str
    format: str
    arch: str
    sizes: Sizes
    tile: Tile

    @property
    def key(self) -> _Key:
        return self.kernel, self.format, self.arch, self.sizes


@contextmanager
def use_tuned(rows: Iterable[TunedTile]) -> Iterator[None]:
    """Lets ``find_tile`` give these tiles until the block ends; those of an outer block are not seen in it.

    A launch captured in a CUDA graph keeps the tile it was captured with.

    Raises:
        ValueError: two rows for one place.
    """
    found: dict[_Key, Tile] = {}
    for row in rows:
        if row.key in found:
            raise ValueError(f"rows: expected one tile per place; got two for {row.kernel} {row.format} {row.sizes}")
        found[row.key] = row.tile
    token = _ACTIVE.set(found)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def tuned_tile(kernel: str, format: str, arch: str, sizes: Mapping[str, int]) -> Tile | None:
    """The tile in use for exactly these sizes; None without one."""
    active = _ACTIVE.get(None)
    return active.get((kernel, format, arch, sizes_of(sizes))) if active else None
