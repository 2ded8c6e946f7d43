"""Pools and loads made up for tests of what serves a trace."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.costing.prices import stated_price
from tokenfab.costing.workload.cheapest import Options
from tokenfab.costing.workload.deploy import DecodePool, PrefillPool, Workload

FP8 = get_precision("fp8")


def deployment(gpus: int, tp: int = 1, batch: float = 8) -> Deployment:
    return Deployment(gpus, tp, gpus, FP8, batch, 4096)


def decode(gpus: int, batch: float, step_s: float, usd: float = 2.0, *, tp: int = 1, fits: bool = True) -> DecodePool:
    """A step of so many seconds."""
    made: Any = SimpleNamespace(
        step=SimpleNamespace(
            deployment=deployment(gpus, tp, batch), step_s=step_s, coverage=lambda: {"measured": 0.75, "modelled": 0.25}
        ),
        price=stated_price("h100", usd), tokens_per_s_per_user=1 / step_s,
    )  # fmt: skip
    return DecodePool(made, fits)


def prefill(
    workload: Workload, gpus: int, s_per_token: float, usd: float = 2.0, *, tp: int = 1, hand_over_s: float = 0.0,
) -> PrefillPool:  # fmt: skip
    """Half a hand-over is the same for all, half goes with a request's input."""
    inputs = workload.input_tokens
    hand_over = hand_over_s * (1 + inputs / inputs.mean()) / 2
    return PrefillPool(deployment(gpus, tp), workload.new_tokens * s_per_token, hand_over, usd, {"interpolated": 1.0})


def load(size: int = 4000) -> Workload:
    """20 requests/s for as long as it takes."""
    generator = np.random.default_rng(1)
    inputs = generator.integers(200, 8000, size)
    return Workload(
        np.cumsum(generator.exponential(0.05, size)), inputs, inputs // 4, generator.integers(10, 900, size)
    )


def options(workload: Workload, seed: int) -> list[Options]:
    """Two GPUs at two prices, each with four parallelisms; some pools do not fit."""
    generator = np.random.default_rng(seed)
    found = []
    for usd in (2.0, 3.0):
        splits = [(1, 1), (4, 1), (4, 4), (8, 2)]
        prefills = [
            prefill(workload, g, generator.uniform(0.5, 2) * 1e-4 / tp, usd, tp=tp, hand_over_s=0.05)
            for g, tp in splits
        ]  # fmt: skip
        decodes = [
            decode(g, batch, generator.uniform(0.005, 0.02) * (1 + batch / 32) / tp, usd, tp=tp, fits=batch < 64)
            for g, tp in splits for batch in (4, 16, 32, 64)
        ]  # fmt: skip
        found.append(Options("h100", f"at ${usd}", [*prefills[:-1], replace(prefills[-1], fits=usd > 2)], decodes))
    return found
