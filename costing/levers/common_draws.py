"""The interval of many costs at once: every point priced with the same draws, each spread's factors computed once.

The model is that of ``intervals`` (errors of one cause and table are one draw, all others independent), at the cost's
own price. Points that share draws can be compared: what moves one moves the other.

Units: dollars per million output tokens of decode GPUs. Errors: ``ValueError``.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import TYPE_CHECKING

from ...bench.decode_plan import step_tokens
from ..cost import StepCost
from .calibration import Calibration, Spread
from .intervals import OpError, Percentiles, check_whole, op_errors, percentiles

if TYPE_CHECKING:
    import numpy as np

    from ...bench.published import PublishedData

SAMPLES = 10_000
MIN_SAMPLES = 100


class CommonDraws:
    """Intervals of points timed by ``data``. Same seed, same intervals, whatever else is priced."""

    def __init__(
        self, data: PublishedData, samples: int = SAMPLES, seed: int = 0, calibration: Calibration | None = None
    ) -> None:
        """
        Raises:
            ValueError: fewer than ``MIN_SAMPLES``, a seed below 0.
        """
        check_whole("samples", samples, MIN_SAMPLES)
        check_whole("seed", seed, 0)
        self._data, self._samples, self._seed = data, samples, seed
        self._calibration = calibration or Calibration.read()
        self._factors: dict[tuple[str, str, tuple[Spread, ...]], np.ndarray] = {}
        self._found: dict[int, tuple[StepCost, Percentiles]] = {}

    def at_price(self, cost: StepCost) -> Percentiles:
        """5th, 50th and 95th percentile of the cost's $/M at its own price.

        Raises:
            ValueError: a time without a known cause.
        """
        if id(cost) not in self._found:  # the cost is kept, so that its id stays its own
            self._found[id(cost)] = cost, self._percentiles(cost)
        return self._found[id(cost)][1]

    def _percentiles(self, cost: StepCost) -> Percentiles:
        import numpy as np

        time_s: dict[tuple[str, str, tuple[Spread, ...]], float] = defaultdict(float)
        for error in op_errors(cost, self._data, self._calibration):
            time_s[error.cause, error.table, error.spreads] += error.timed.time_s
            if (error.cause, error.table, error.spreads) not in self._factors:
                self._factors[error.cause, error.table, error.spreads] = self._draw(error)
        total_s = np.zeros(self._samples)
        for key, seconds in time_s.items():
            total_s += seconds * self._factors[key]
        per_s = cost.price.usd_per_gpu_hour * 1e6 / (3600 * step_tokens(cost.step.deployment)[0])
        return percentiles(per_s * total_s)

    def _draw(self, error: OpError) -> np.ndarray:
        """true / said of every sample; the draw depends on cause and table alone."""
        import numpy as np

        key = zlib.crc32(f"{error.cause}/{error.table}".encode())
        return error.factor(np.random.default_rng([self._seed, key]).random(self._samples))
