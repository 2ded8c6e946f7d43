"""What one call of an expert layer must do at least, by the load that is really drawn. See ``moe_runs.py`` for shapes.

Weights: those of the experts that some token chose, and no others. Imports torch only when asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

Shape = Mapping[str, int]


def local_experts(shape: Shape) -> int:
    """Experts of one rank."""
    return shape["num_experts"] // shape["ep"]


def draw_ids(shape: Shape, seed: int) -> Any:
    """(T, k) ids of the shape's load; a power law's counts are one fixed draw, whatever the seed.

    The tokens of a power law are shuffled by the seed, so that new inputs route anew at the same load.
    """
    import torch

    from .loads import balanced, power_law

    sizes = (shape["num_tokens"], shape["num_experts"], shape["top_k"])
    ids = power_law(*sizes, shape["load"] / 100, num_ranks=shape["ep"]) if shape["load"] else balanced(*sizes)
    return ids[torch.randperm(ids.shape[0], generator=torch.Generator().manual_seed(seed))]


def touched(shape: Shape) -> tuple[int, int]:
    """(experts of rank 0 that some token chose, rows of theirs)."""
    return _touched(tuple(sorted(shape.items())))


@lru_cache(maxsize=4096)
def _touched(items: tuple[tuple[str, int], ...]) -> tuple[int, int]:
    shape = dict(items)
    ids = draw_ids(shape, 0)
    mine = ids[ids < local_experts(shape)]
    return int(mine.unique().numel()), int(mine.numel())
