"""What one kernel's time costs per million tokens, in the steps that run it.

    $/M tokens = time_s x calls per step / tokens per step x $/GPU-h / 3600 x 1e6

Units: seconds per call, dollars per million output tokens of one decode GPU.
"""

from __future__ import annotations

import math

from ..bench.places import Place
from .prices import Price


def usd_per_mtok(time_s: float, place: Place, price: Price) -> float:
    """Dollars per million output tokens that ``time_s`` per call costs at ``place``; negative for time saved.

    Raises:
        ValueError: a time that is not finite.
    """
    if not math.isfinite(time_s):
        raise ValueError(f"time_s: expected a finite number; got {time_s}")
    return time_s * place.calls_per_step / place.tokens_per_step * price.usd_per_gpu_hour / 3600 * 1e6
