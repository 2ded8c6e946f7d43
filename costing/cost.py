"""From a step's time to dollars: pure functions, and the attribution of dollars to ops.

    $/M tokens = $/GPU-h / (tokens/s/GPU x 3600) x 1e6

The denominator is always named: here it is *output tokens of decode GPUs*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..bench.decode_plan import step_tokens
from ..bench.step_time import StepTime, TimedOp
from .prices import Price


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive number; got {value}")
    return value


def usd_per_mtok(tokens_per_s: float, usd_per_hour: float) -> float:
    """Dollars per million tokens at ``tokens_per_s`` for ``usd_per_hour`` (both per GPU, or both in all).

    Raises:
        ValueError: either is not a positive number.
    """
    return _positive("usd_per_hour", usd_per_hour) / (_positive("tokens_per_s", tokens_per_s) * 3600) * 1e6


def tokens_per_s_for(usd_per_mtok: float, usd_per_hour: float) -> float:
    """The throughput that a price per million tokens implies: the inverse of ``usd_per_mtok``."""
    return _positive("usd_per_hour", usd_per_hour) / (_positive("usd_per_mtok", usd_per_mtok) * 3600) * 1e6


def tokens_per_s_per_mw(tokens_per_s_per_gpu: float, kw_per_gpu: float) -> float:
    """Tokens per second and megawatt of all-in power."""
    return _positive("tokens_per_s_per_gpu", tokens_per_s_per_gpu) / (_positive("kw_per_gpu", kw_per_gpu) / 1e3)


def joules_per_token(tokens_per_s_per_gpu: float, kw_per_gpu: float) -> float:
    """All-in energy per token."""
    return _positive("kw_per_gpu", kw_per_gpu) * 1e3 / _positive("tokens_per_s_per_gpu", tokens_per_s_per_gpu)


def plain_price(tokens_per_s: float, usd_per_hour: float, kw: float | None = None) -> dict[str, float]:
    """The plain formula's results: $/M tokens, and with the power tokens/s/MW and J/token.

    Raises:
        ValueError: a value that is not a positive number.
    """
    result = {
        "tokens_per_s": tokens_per_s,
        "usd_per_gpu_hour": usd_per_hour,
        "usd_per_mtok": usd_per_mtok(tokens_per_s, usd_per_hour),
    }
    if kw is not None:
        result["tokens_per_s_per_mw"] = tokens_per_s_per_mw(tokens_per_s, kw)
        result["joules_per_token"] = joules_per_token(tokens_per_s, kw)
    return result


@dataclass(frozen=True)
class OpCost:
    """One op's part of a step and of a million tokens' price.

    ``saving_usd_per_mtok``: what a kernel at its roofline would save; 0 where the published time
    is below the floor (operands warm in L2).
    """

    timed: TimedOp
    share: float
    usd_per_mtok: float
    saving_usd_per_mtok: float


SUSPECT_SHARE, SUSPECT_OF_FLOOR = 0.1, 0.05


@dataclass(frozen=True)
class StepCost:
    """A decode step with its price."""

    step: StepTime
    price: Price

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return step_tokens(self.step.deployment)[0] / self.step.step_s

    @property
    def tokens_per_s_per_user(self) -> float:
        return step_tokens(self.step.deployment)[1] / self.step.step_s

    @property
    def usd_per_mtok_output(self) -> float:
        return usd_per_mtok(self.tokens_per_s_per_gpu, self.price.usd_per_gpu_hour)

    @property
    def tokens_per_s_per_mw(self) -> float | None:
        kw = self.price.kw_per_gpu
        return None if kw is None else tokens_per_s_per_mw(self.tokens_per_s_per_gpu, kw)

    @property
    def joules_per_token(self) -> float | None:
        kw = self.price.kw_per_gpu
        return None if kw is None else joules_per_token(self.tokens_per_s_per_gpu, kw)

    def ops(self) -> list[OpCost]:
        """Every microsecond has a price: the ops' costs sum to the total."""
        usd_per_s = self.usd_per_mtok_output / self.step.step_s
        return [
            OpCost(
                op, op.time_s / self.step.step_s, op.time_s * usd_per_s, max(0.0, op.time_s - op.floor_s) * usd_per_s
            )
            for op in self.step.ops
        ]

    def suspects(self) -> list[OpCost]:
        """Ops that take a tenth of the step or more at a twentieth of their roofline or less.

        Such a row is a fact about the stack's path (host time, a fallback kernel), not the kernel's limit.
        """
        return [
            op
            for op in self.ops()
            if op.share >= SUSPECT_SHARE and op.timed.floor_s <= SUSPECT_OF_FLOOR * op.timed.time_s
        ]
