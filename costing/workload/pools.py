"""What may serve a trace: pools for prefill and for decode of one model, on every GPU, stack and parallelism asked.

A decode pool is a step at the trace's mean context, of every batch, fitting or not. A prefill pool is the time of every
request's prefill on one attention group, while the other groups prefill one as long:

    prefill_s(new, cached) = of the new tokens alone, between lengths a factor of sqrt(2) apart
                           + of the new over the cached ones, between lengths a factor of 2 apart, new x cached

both by a power law between two lengths, which is exact for what goes with one power of a length. ``exact_service_s`` is
what they stand for; measured times of the grid count as interpolated ones between its lengths. The part over cached
tokens is of one attention group, so it is computed once for a width of it.

    hand_over_s = bytes of a request's KV cache on one GPU / link / efficiency + latency      always modelled

over the scale-up link where that joins more GPUs than one server, else over the scale-out link; every GPU of a group
sends its own part. Weights, a batch at the mean context and the longest request alone must fit.

Units: seconds, tokens. Errors: ``ValueError`` naming the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...bench.deployment import Deployment, check_divides, check_precision
from ...bench.gpus import Gpu
from ...bench.memory import kv_bytes_per_sequence, largest_batch, memory
from ...bench.model_config import GqaAttention, ModelConfig
from ...bench.prefill_plan import CACHED
from ...bench.prefill_time import PrefillTime, prefill_time
from ...bench.published import (
    INTERPOLATED,
    INTERPOLATED_HERE,
    MEASURED,
    MEASURED_HERE,
    MODEL_EFFICIENCY,
    MODEL_LINK_OVERHEAD_S,
    MODELLED,
    Stack,
)
from ...bench.recorded import NoRecords, find_stack
from ...bench.step_time import step_time
from ..cost import StepCost
from ..prices import Price
from ..study import Study
from ..sweep import DEFAULT_MAX_MODELLED
from .cheapest import Options
from .deploy import DecodePool, PrefillPool, Workload

if TYPE_CHECKING:
    import numpy as np

NEW_RATIO, CACHED_RATIO = math.sqrt(2), 2.0
MOST_SEQUENCES = 512

_BETWEEN = {MEASURED: INTERPOLATED, MEASURED_HERE: INTERPOLATED_HERE}


# -- the time of prefills --------------------------------------------------------------------------


def lengths(tokens: np.ndarray, ratio: float) -> np.ndarray:
    """From the least to the most, in steps of ``ratio`` or less."""
    import numpy as np

    low, high = int(tokens.min()), int(tokens.max())
    steps = math.ceil(math.log(high / low) / math.log(ratio))
    return np.unique(np.rint(np.geomspace(low, high, steps + 1)).astype(int))


def between(grid: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """``values``, one per length of ``grid``, at other lengths; linear in the logarithm of the length. Values that are
    rows have one column per length asked for."""
    import numpy as np

    if len(grid) == 1:
        return np.broadcast_to(values[0], at.shape)
    logs, columns = np.log(grid), np.arange(len(at))
    below = np.clip(np.searchsorted(grid, at, side="right") - 1, 0, len(grid) - 2)
    upper = (np.log(at) - logs[below]) / (logs[below + 1] - logs[below])
    if values.ndim == 1:
        return values[below] * (1 - upper) + values[below + 1] * upper
    return values[below, columns] * (1 - upper) + values[below + 1, columns] * upper


@dataclass(frozen=True)
class PassTimes:
    """Times of passes of one prompt per attention group, by provenance: ``new_s`` by new tokens, ``over_cached_s`` by
    new and cached tokens. All tuples are as long as ``new``, those of ``over_cached_s`` hold one per ``cached``."""

    new: np.ndarray
    new_s: dict[str, np.ndarray]
    coarse_new: np.ndarray
    cached: np.ndarray
    over_cached_s: dict[str, np.ndarray]

    def of(self, new: np.ndarray, cached: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """The time of every request, and shares of their sum by provenance."""
        import numpy as np

        found, parts = self._of_new(new)
        has_cached = np.flatnonzero(cached > 0)
        if len(has_cached):
            more, more_parts = self._over_cached(new[has_cached], cached[has_cached])
            found[has_cached] += more
            parts = {kind: parts.get(kind, 0.0) + more_parts.get(kind, 0.0) for kind in {**parts, **more_parts}}
        total = sum(parts.values())
        return found, {kind: part / total for kind, part in parts.items()}

    def _of_new(self, new: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        import numpy as np

        whole = np.sum(list(self.new_s.values()), axis=0)
        found = np.exp(between(self.new, np.log(whole), new))
        return found, {
            kind: float((found * between(self.new, each / whole, new)).sum()) for kind, each in self.new_s.items()
        }

    def _over_cached(self, new: np.ndarray, cached: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        import numpy as np

        if not self.over_cached_s:
            return np.zeros(len(new)), {}
        whole = np.sum(list(self.over_cached_s.values()), axis=0)

        def at(values: np.ndarray) -> np.ndarray:
            return between(self.coarse_new, np.stack([between(self.cached, row, cached) for row in values]), new)

        found = np.exp(at(np.log(np.maximum(whole, _NO_TIME_S))))
        shares = {kind: at(each / np.maximum(whole, _NO_TIME_S)) for kind, each in self.over_cached_s.items()}
        return found, {kind: float((found * share).sum()) for kind, share in shares.items()}


_NO_TIME_S = 1e-12
"""What stands for no time where a logarithm is taken."""


def _by_provenance(passes: Sequence[PrefillTime], *, is_cached: bool) -> dict[str, np.ndarray]:
    """Time of every pass by provenance: of the ops over cached tokens, or of the others."""
    import numpy as np

    found: dict[str, np.ndarray] = {}
    for index, one in enumerate(passes):
        for op in one.ops:
            if op.call.name.startswith(CACHED) == is_cached:
                kind = _BETWEEN.get(op.provenance, op.provenance)
                found.setdefault(kind, np.zeros(len(passes)))[index] += op.time_s
    return found


def exact_service_s(time: Callable[[int, int], PrefillTime], new: np.ndarray, cached: np.ndarray) -> np.ndarray:
    """Of every request by a pass of its own lengths: what ``PassTimes`` stands for."""
    import numpy as np

    return np.array([time(int(n), int(c)).time_s for n, c in zip(new, cached, strict=True)])


def pass_times(
    time: Callable[[int, int], PrefillTime], workload: Workload, max_context: int,
    over_cached: dict[str, np.ndarray] | None = None,
) -> PassTimes:  # fmt: skip
    """``time(new, cached)`` on grids over the lengths of a trace; ``over_cached``: where they are known already.

    No request is at the corner of most new and most cached tokens, where both are beyond the context: as many cached
    ones as the context has room for stand for them, in proportion.
    """
    import numpy as np

    new, cached = workload.new_tokens, workload.cached_tokens
    has_cached = cached > 0
    fine = lengths(new, NEW_RATIO)
    new_s = _by_provenance([time(int(n), 0) for n in fine], is_cached=False)
    if not has_cached.any():
        empty = np.empty(0, dtype=int)
        return PassTimes(fine, new_s, empty, empty, {})
    coarse, cached = lengths(new[has_cached], CACHED_RATIO), lengths(cached[has_cached], CACHED_RATIO)
    if over_cached is None:
        room = np.minimum(cached[None, :], max_context - 1 - coarse[:, None])
        passes = [time(int(n), int(c)) for n, row in zip(coarse, room, strict=True) for c in row]
        over_cached = {
            kind: each.reshape(room.shape) * (cached / room)
            for kind, each in _by_provenance(passes, is_cached=True).items()
        }
    return PassTimes(fine, new_s, coarse, cached, over_cached)


# -- pools -----------------------------------------------------------------------------------------


def hand_over_s(model: ModelConfig, gpu: Gpu, deployment: Deployment, input_tokens: np.ndarray) -> np.ndarray:
    """Of every request's KV cache from one pool to another, each GPU of a group its own part; modelled.

    Exact for any length: bytes are linear between the windows of a model's layers.
    """
    import numpy as np

    windows = {layer.attention.window for layer, _ in model.layers if isinstance(layer.attention, GqaAttention)}
    most = int(input_tokens.max())
    knots = sorted({0, most, *(window for window in windows if window is not None and window < most)})
    precision, tp = deployment.precision, deployment.attention_tp
    num_bytes = np.interp(input_tokens, knots, [kv_bytes_per_sequence(model, each, precision, tp) for each in knots])
    joins_servers = gpu.scale_up_gpus > gpu.node_gpus
    link = gpu.link_bytes_per_s if joins_servers else gpu.scale_out_bytes_per_s
    return num_bytes / link / MODEL_EFFICIENCY + MODEL_LINK_OVERHEAD_S


def check_lengths(model: ModelConfig, workload: Workload) -> None:
    """Refuse a trace with requests longer than the model's context.

    Raises:
        ValueError: saying how many.
    """
    total = workload.input_tokens + workload.output_tokens
    longer = int((total > model.max_context).sum())
    if longer:
        raise ValueError(
            f"trace: expected requests of at most {model.name}'s {model.max_context} tokens; {longer} of {len(total)} "
            f"are longer, up to {int(total.max())}"
        )


@dataclass(frozen=True)
class _Place:
    """One GPU, stack and parallelism, for one trace."""

    study: Study
    workload: Workload
    gpu: Gpu
    stack: Stack
    price: Price
    one: Deployment

    @property
    def longest_fits(self) -> bool:
        """Weights and the longest request alone."""
        longest = int((self.workload.input_tokens + self.workload.output_tokens).max())
        alone = replace(self.one, context=longest)
        return memory(self.study.sweep.model, self.gpu, alone).shortfall_bytes <= 0

    def time(self, new: int, cached: int) -> PrefillTime:
        return prefill_time(
            self.study.data, self.study.sweep.model, self.gpu, self.stack, self.one, new_tokens=new,
            cached_tokens=cached, check_memory=False,
        )  # fmt: skip

    def prefill(self, over_cached: dict[str, np.ndarray] | None) -> tuple[PrefillPool, PassTimes]:
        """``over_cached``: of another parallelism with attention groups as wide."""
        times = pass_times(self.time, self.workload, self.study.sweep.model.max_context, over_cached)
        service_s, shares = times.of(self.workload.new_tokens, self.workload.cached_tokens)
        moved_s = hand_over_s(self.study.sweep.model, self.gpu, self.one, self.workload.input_tokens)
        pool = PrefillPool(self.one, service_s, moved_s, self.price.usd_per_gpu_hour, shares, self.longest_fits)
        return pool, times

    def decode(self) -> list[DecodePool]:
        """Every batch asked for; powers of two, and the largest that fits, by default."""
        sweep, tp, longest_fits = self.study.sweep, self.one.attention_tp, self.longest_fits
        most = largest_batch(sweep.model, self.gpu, self.one)
        if sweep.batches is None:
            sizes = {2**power for power in range(10)} | ({most} if 0 < most < MOST_SEQUENCES else set())
        else:
            sizes = {batch * tp for batch in sweep.batches}
        pools = []
        for size in sorted(sizes):
            deployment = replace(self.one, batch_per_gpu=size / tp)
            step = step_time(self.study.data, sweep.model, self.gpu, self.stack, deployment, check_memory=False)
            pools.append(DecodePool(StepCost(step, self.price), longest_fits and size <= most))
        return pools


def options(
    study: Study,
    workload: Workload,
    advance: Callable[[str], None] = lambda what: None,
    max_modelled: float = DEFAULT_MAX_MODELLED,
) -> list[Options]:
    """What every GPU and stack of ``study`` offers; decode steps with more than ``max_modelled`` of their time modelled
    are left out, and said so. Prefills are not: attention over cached tokens, and over more than the tables' longest
    prompts, is modelled on every stack. ``advance`` is called before each GPU, stack and parallelism.

    Raises:
        ValueError: a request longer than the model's context, an unknown stack, a missing price, nothing at all.
    """
    check_lengths(study.sweep.model, workload)
    if study.sweep.context != workload.context:
        raise ValueError(f"context: expected the trace's mean of {workload.context}; got {study.sweep.context}")
    found: list[Options] = []
    for gpu in study.sweep.gpus:
        price = study.price(gpu)
        for spec in study.sweep.stacks:
            try:
                stack = find_stack(gpu, spec, study.data, study.recorded)
            except NoRecords as error:
                found.append(Options(gpu.name, spec, [], [], [str(error)]))
                continue
            found.append(_option(study, workload, gpu, stack, price, advance, max_modelled))
    if not any(option.prefill and option.decode for option in found):
        raise ValueError(f"{study.sweep.model.name}: nothing can serve: {'; '.join(found[0].left_out)}")
    return found


def _option(
    study: Study, workload: Workload, gpu: Gpu, stack: Stack, price: Price, advance: Callable[[str], None],
    max_modelled: float,
) -> Options:  # fmt: skip
    prefill: list[PrefillPool] = []
    decode: list[DecodePool] = []
    left_out: list[str] = []
    over_cached: dict[int, dict[str, np.ndarray]] = {}
    too_modelled = 0
    for parallel in study.sweep.parallels:
        advance(f"{gpu.name} {stack.name} {parallel}")
        one = study.sweep.deployment(parallel, 1 / parallel.attention_tp)
        try:
            check_divides(study.sweep.model, one)
            check_precision(gpu, study.sweep.precision)
        except ValueError as error:
            left_out.append(f"{parallel}: {error}")
            continue
        place = _Place(study, workload, gpu, stack, price, one)
        pool, times = place.prefill(over_cached.get(one.attention_tp))
        over_cached[one.attention_tp] = times.over_cached_s
        prefill.append(pool)
        steps = place.decode()
        known = [step for step in steps if step.cost.step.coverage()[MODELLED] <= max_modelled]
        decode += known
        too_modelled += len(steps) - len(known)
    if too_modelled:
        left_out.append(f"{too_modelled} decode steps with more than {max_modelled:.0%} of their time modelled")
    return Options(gpu.name, str(stack), prefill, decode, left_out)
