"""Tiles of the routed rows' schedule (``moe_schedule``), with their reasons. Standard library only."""

from __future__ import annotations

CHUNK = 128
"""Rows one program ranks, each against all: 128 comparisons per thread of 4 warps."""

SLOTS = 32
"""Blocks one program finds, each against the ends of all experts' blocks: 256 comparisons per thread at 1024."""

COUNT_TILE = 512
"""Ids counted at once: 4 per thread."""

ONE_LAUNCH_ROWS = 4096
"""512 tokens of 8 experts. Up to here each program counts all ids itself, in 8 steps at most; it saves two launches."""

CHUNK_TILE, EXPERT_TILE = 128, 8
"""Tile of the sums over chunks: 32 bytes of each row, the least a GPU reads, for many programs of few steps."""
