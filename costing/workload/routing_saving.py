"""What tokens found in a cache save: prefill that is not done, less what reading the cached ones still costs.

    saved = sum over requests of (T(input, 0) - T(new, cached)) x GPUs of an attention group x $/GPU-hour / 3600

T: seconds of a prefill pass of one prompt per attention group (``pools.pass_times``, from published kernels), a replica
being one attention group. Attention over cached tokens is always in T(new, cached), and always modelled: a cached token
is never free. Short prompts that share a pass cost less than here, with and without a cache. Idle time is not in it.

Units: seconds, dollars; $/M says of which tokens. Errors: ``ValueError`` naming the field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...bench.gpus import GIB
from ...bench.memory import kv_bytes_per_sequence, memory
from ...bench.prefill_time import PrefillTime, prefill_time
from ...bench.recorded import find_stack
from ..cost import StepCost
from ..study import Study, price_step
from .deploy import Workload
from .pools import PassTimes, check_lengths, pass_times
from .request_pools import decode_point
from .routing import Pace
from .traces import BLOCK_TOKENS

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Saving:
    """Dollars of a trace's prefill, without a cache and with it.

    ``usd_over_cached``: the part of ``usd_with`` that reads cached tokens. ``shares``: of ``usd_with`` by provenance.
    """

    usd_without: float
    usd_with: float
    usd_over_cached: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    shares: dict[str, float]

    @property
    def usd(self) -> float:
        return self.usd_without - self.usd_with

    @property
    def share(self) -> float:
        """Of the prefill bill without a cache."""
        return self.usd / self.usd_without

    @property
    def usd_per_mtok_input(self) -> float:
        """Saved, over all input tokens, cached or not."""
        return self.usd / self.input_tokens * 1e6

    @property
    def usd_per_mtok_output(self) -> float:
        """Saved, over output tokens."""
        return self.usd / self.output_tokens * 1e6

    @property
    def prefill_usd_per_mtok_input(self) -> tuple[float, float]:
        """Without a cache and with it, over all input tokens."""
        return self.usd_without / self.input_tokens * 1e6, self.usd_with / self.input_tokens * 1e6

    @property
    def usd_per_mtok_new(self) -> float:
        """What a token that is prefilled costs."""
        return (self.usd_with - self.usd_over_cached) / (self.input_tokens - self.cached_tokens) * 1e6

    @property
    def usd_per_mtok_cached(self) -> float | None:
        """What a cached token still costs; None where none is."""
        return self.usd_over_cached / self.cached_tokens * 1e6 if self.cached_tokens else None


def saving(
    without_s: np.ndarray, new_s: np.ndarray, over_cached_s: np.ndarray, inputs: np.ndarray, cached: np.ndarray,
    outputs: np.ndarray, gpus: float, usd_per_gpu_hour: float, shares: dict[str, float] | None = None,
) -> Saving:  # fmt: skip
    """From the seconds of every request's prefill: all of it without a cache; with one, of its new tokens and over its
    cached ones. ``gpus``: that such a second takes.

    Raises:
        ValueError: arrays of other lengths or none; a time, price or number that is not positive; as many cached tokens
            as input; cached tokens that cost nothing, or time over cached tokens where none are.
    """
    import numpy as np

    arrays = {"without_s": without_s, "new_s": new_s, "over_cached_s": over_cached_s, "inputs": inputs,
              "cached": cached, "outputs": outputs}  # fmt: skip
    if len({len(each) for each in arrays.values()}) != 1 or not len(inputs):
        sizes = {name: len(each) for name, each in arrays.items()}
        raise ValueError(f"saving: expected one value per request, and some; got {sizes}")
    for name, value in (("gpus", gpus), ("usd_per_gpu_hour", usd_per_gpu_hour)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive number; got {value}")
    for name in ("without_s", "new_s", "outputs"):
        if not (np.isfinite(arrays[name]) & (arrays[name] > 0)).all():
            raise ValueError(f"{name}: expected positive numbers")
    if (cached < 0).any() or (cached >= inputs).any():
        raise ValueError("cached: expected 0 or more and fewer than the input tokens of each request")
    if not np.isfinite(over_cached_s).all() or ((over_cached_s > 0) != (cached > 0)).any():
        raise ValueError("over_cached_s: expected a positive time where tokens are cached, never free, and 0 elsewhere")
    usd_per_s = gpus * usd_per_gpu_hour / 3600
    over = float(over_cached_s.sum()) * usd_per_s
    return Saving(
        float(without_s.sum()) * usd_per_s, float(new_s.sum()) * usd_per_s + over, over, int(inputs.sum()),
        int(cached.sum()), int(outputs.sum()), dict(shares or {}),
    )  # fmt: skip


@dataclass(frozen=True)
class Prefiller:
    """One model, GPU, stack and parallelism that prefills a trace's requests; ``step``: what it decodes at."""

    study: Study
    step: StepCost

    @classmethod
    def of(cls, study: Study) -> Prefiller:
        """Raises:
        ValueError: what cannot be, or does not fit.
        """
        return cls(study, price_step(study))

    def tokens_in(self, num_bytes: float) -> int:
        """Cached tokens that so many bytes of one GPU hold: of a sequence at the study's context.

        Raises:
            ValueError: not even a block.
        """
        deployment = self.step.step.deployment
        per_sequence = kv_bytes_per_sequence(
            self.study.sweep.model, deployment.context, deployment.precision, deployment.attention_tp
        )
        tokens = int(num_bytes / per_sequence * deployment.context)
        if tokens < BLOCK_TOKENS:
            raise ValueError(
                f"cache: expected room for a block of {BLOCK_TOKENS} tokens beside {deployment.batch_per_gpu:g} "
                f"sequences/GPU of {deployment.context} tokens; {tokens} fit in {num_bytes / GIB:.3g} GiB"
            )
        return tokens

    @property
    def cache_tokens(self) -> int:
        """Per attention group, in the memory that weights, reserve and the batch's own KV cache leave.

        Raises:
            ValueError: not even a block fits.
        """
        sweep = self.study.sweep
        return self.tokens_in(-memory(sweep.model, sweep.gpus[0], self.step.step.deployment).shortfall_bytes)

    def time(self, new: int, cached: int) -> PrefillTime:
        """Of one prompt per attention group."""
        sweep, deployment = self.study.sweep, self.step.step.deployment
        gpu = sweep.gpus[0]
        stack = find_stack(gpu, sweep.stacks[0], self.study.data, self.study.recorded)
        one = replace(deployment, batch_per_gpu=1 / deployment.attention_tp)
        return prefill_time(
            self.study.data, sweep.model, gpu, stack, one, new_tokens=new, cached_tokens=cached, check_memory=False
        )

    def pace(self, input_tokens: int) -> Pace:
        """Of an attention group at prompts of so many tokens without a cache, and at the step's decode rate."""
        return Pace(input_tokens / self.time(input_tokens, 0).time_s, self.step.tokens_per_s_per_user)

    def savings(self, inputs: np.ndarray, outputs: np.ndarray, cached: Sequence[np.ndarray]) -> list[Saving]:
        """What each of several outcomes of caching saves on the same requests.

        Raises:
            ValueError: a request longer than the model's context.
        """
        import numpy as np

        check_lengths(self.study.sweep.model, _load(inputs, np.zeros_like(inputs), outputs))
        times = pass_times(self.time, _extremes(inputs, cached), self.study.sweep.model.max_context)
        without_s, _ = times.of(inputs, np.zeros_like(inputs))
        return [self._saving(times, without_s, inputs, outputs, each.astype(inputs.dtype)) for each in cached]

    def _saving(
        self, times: PassTimes, without_s: np.ndarray, inputs: np.ndarray, outputs: np.ndarray, cached: np.ndarray
    ) -> Saving:
        import numpy as np

        new = inputs - cached
        new_s, _ = times.of(new, np.zeros_like(new))
        all_s, shares = times.of(new, cached)
        over_cached_s = np.where(cached > 0, all_s - new_s, 0.0)
        return saving(
            without_s, new_s, over_cached_s, inputs, cached, outputs, self.step.step.deployment.attention_tp,
            self.step.price.usd_per_gpu_hour, shares,
        )  # fmt: skip

    def describe(self) -> str:
        return decode_point(self.step)


def _load(inputs: np.ndarray, cached: np.ndarray, outputs: np.ndarray) -> Workload:
    import numpy as np

    return Workload(np.arange(len(inputs), dtype=float), inputs, cached, outputs)


def _extremes(inputs: np.ndarray, cached: Sequence[np.ndarray]) -> Workload:
    """Few requests whose lengths span those of all, with and without cached tokens."""
    import numpy as np

    pairs = [(int(inputs.min()), 0), (int(inputs.max()), 0)]
    for each in cached:
        new, hits = inputs - each, np.flatnonzero(each > 0)
        pairs += [(int(new.min()), 0), (int(new.max()), 0)]
        if len(hits):
            pairs += [(int(new[hits].min()), int(each[hits].min())), (int(new[hits].max()), int(each[hits].max()))]
    new, held = np.array(pairs).T
    return _load(new + held, held, np.ones_like(new))
