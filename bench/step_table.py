"""Many decode steps of one model at once: every split and batch of a sweep on one GPU and stack.

A ``StepTable`` plans each split once, with all its batches as arrays, and puts ops that differ only in size together;
the plans depend on no GPU and no stack. ``totals`` asks for the times of all of them with one look-up per table and
adds up, per step and in the plan's order: a total equals ``published_step``'s to rounding. A ``SummedStep`` is such a
total as a ``StepTime``: its ops are worked out, one by one as ever, only when somebody asks for them.

Units: seconds. Errors: as ``decode_plan``, but of memory: what does not fit is the caller's to leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from .decode_plan import OpCall, Plan, merge_mla_block, planned
from .deployment import Deployment, check_divides
from .gpus import Gpu
from .model_config import ModelConfig
from .ops import Gemm, MlaAttention, Op
from .published import PUBLISHED_PROVENANCES, PublishedData, Stack
from .published_many import MODELLED_CODE, mapped, times
from .published_tables import MLA
from .step_time import StepTime, TimedOp, published_step


class _Batches:
    """A deployment at several batches: what depends on the batch is an array, the rest is the deployment's own."""

    def __init__(self, one: Deployment, sequences: Sequence[int]) -> None:
        self._one = one
        self.sequences = np.array(sequences, dtype=np.int64)
        self.rows = self.sequences * one.tokens_per_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._one, name)


def _parts(op: Op) -> tuple[tuple[Any, ...], list[np.ndarray]]:
    """(what ops of one family share, the arrays in which they differ)."""
    shared: list[Any] = [type(op)]
    arrays: list[np.ndarray] = []
    for value in vars(op).values():
        inner = value if isinstance(value, tuple) else (value,) if isinstance(value, Op) else ()
        if isinstance(value, np.ndarray):
            arrays.append(value)
        elif inner and isinstance(inner[0], Op):
            for part in inner:
                family, more = _parts(part)
                shared.append(family)
                arrays += more
        else:
            shared.append(value)
    return tuple(shared), arrays


@dataclass
class _ManyPlan(Plan):
    """Collects calls whose sizes are arrays; the same op under the same name is one entry."""

    entries: dict[tuple[Any, ...], list[Any]] = field(default_factory=dict)

    def add(self, name: str, op: Op, count: int, block: str = "") -> None:
        family, arrays = _parts(op)
        key = (name, block, family, *(array.tobytes() for array in arrays))
        self.entries.setdefault(key, [name, op, 0, block])[2] += count

    def planned(self) -> tuple[OpCall, ...]:
        planned(self)
        return tuple(OpCall(*entry) for entry in self.entries.values())


@dataclass
class _Family:
    """Ops of one kind and formats, from all plans: their sizes end to end."""

    op: Op
    columns: list[list[np.ndarray]] = field(default_factory=list)
    length: int = 0

    def add(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Take sizes in; their places."""
        self.columns.append(arrays)
        self.length += len(arrays[0])
        return np.arange(self.length - len(arrays[0]), self.length)

    @cached_property
    def distinct(self) -> tuple[Op, np.ndarray]:
        """(the op at its distinct sizes, the distinct one of every place)."""
        stacked = np.array([np.concatenate(column) for column in zip(*self.columns, strict=True)], dtype=np.float64)
        _, first, of_place = np.unique(stacked, axis=1, return_index=True, return_inverse=True)
        merged = iter([np.concatenate(column)[first] for column in zip(*self.columns, strict=True)])
        return mapped(self.op, lambda _: next(merged)), of_place.reshape(-1)


class _Ops:
    """The ops of all plans, either as they are or with MLA blocks merged."""

    def __init__(self, plans: Sequence[tuple[OpCall, ...]], num_batches: Sequence[int]) -> None:
        families: dict[tuple[Any, ...], _Family] = {}
        step, calls, of_family, names = [], [], [], []
        start = 0
        for plan, length in zip(plans, num_batches, strict=True):
            for call in plan:
                op = call.op
                if isinstance(op, Gemm):  # one family for all matrices
                    size = np.asarray(op.m)
                    op = replace(op, n=np.full_like(size, op.n), k=np.full_like(size, op.k))  # type: ignore[arg-type]
                family, arrays = _parts(op)
                found = families.setdefault(family, _Family(op))
                of_family.append((found, found.add(arrays)))
                step.append(np.arange(start, start + length))
                calls.append(np.full(length, call.calls_per_step))
                names.append((call.name, length))
            start += length
        self._floors: dict[Gpu, np.ndarray] = {}
        self.families = list(families.values())
        offsets = dict(zip(map(id, self.families), np.cumsum([0, *(f.length for f in self.families)]), strict=False))
        self.num_steps = start
        self.step, self.calls = np.concatenate(step), np.concatenate(calls)
        self.place = np.concatenate([offsets[id(family)] + places for family, places in of_family])
        self.is_experts = np.concatenate([np.full(length, name == "experts") for name, length in names])
        self.is_top_k = np.concatenate([np.full(length, name == "router_top_k") for name, length in names])

    def times(self, data: PublishedData, gpu: Gpu, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, provenance) of one call of every op, in the order of ``place``."""
        found = []
        for family in self.families:
            op, of_place = family.distinct
            time_s, codes = times(data, op, gpu, stack)
            found.append((time_s[of_place], codes[of_place]))
        return np.concatenate([each[0] for each in found]), np.concatenate([each[1] for each in found])

    def floors(self, gpu: Gpu) -> np.ndarray:
        """The roofline floor of one call of every op; of no stack."""
        if gpu not in self._floors:
            found = [np.asarray(f.distinct[0].floor_s(gpu))[f.distinct[1]] for f in self.families]
            self._floors = {gpu: np.concatenate(found)}  # a sweep asks for one GPU's after another's
        return self._floors[gpu]


@dataclass(frozen=True)
class Totals:
    """Of every step of a table: seconds, roofline seconds, and the share of time of each published provenance."""

    step_s: np.ndarray
    floor_s: np.ndarray
    shares: np.ndarray


class StepTable:
    """Splits of one model, each with its batches (sequences per attention group).

    All splits share precision, context, load and tokens per step; ``deployments`` are one of each, of any batch.
    """

    def __init__(
        self, model: ModelConfig, deployments: Sequence[Deployment], sequences: Sequence[Sequence[int]]
    ) -> None:
        """
        Raises:
            ValueError: a split that does not divide, or one without a batch.
        """
        for deployment, batches in zip(deployments, sequences, strict=True):
            check_divides(model, deployment)
            if not len(batches) or min(batches) < 1:
                raise ValueError(f"sequences: expected at least one, from 1 on; got {list(batches)}")
        self.model, self._linear = model, deployments[0].precision.linear if deployments else ""
        self._num_batches = [len(batches) for batches in sequences]
        self.starts = [0, *np.cumsum(self._num_batches).tolist()]
        """Where the steps of each split begin."""
        self._plans = [
            _ManyPlan(model, _Batches(one, batches)).planned()  # type: ignore[arg-type]
            for one, batches in zip(deployments, sequences, strict=True)
        ]

    @cached_property
    def _as_planned(self) -> _Ops:
        return _Ops(self._plans, self._num_batches)

    @cached_property
    def _merged(self) -> _Ops:
        return _Ops([merge_mla_block(plan, self._linear) for plan in self._plans], self._num_batches)

    def _ops(self, data: PublishedData, gpu: Gpu, stack: Stack) -> _Ops:
        """As ``step_time._as_tabled`` chooses."""
        attention = next((call.op for call in self._plans[0] if isinstance(call.op, MlaAttention)), None)
        if attention is None or (attention.top_k is None and data.has_table(gpu, stack, MLA)):
            return self._as_planned
        return self._merged

    def totals(self, data: PublishedData, gpu: Gpu, stack: Stack) -> Totals:
        """Every step of every split on one GPU and published stack."""
        ops = self._ops(data, gpu, stack)
        time_s, codes = ops.times(data, gpu, stack)
        time_s, codes, floor_s = time_s[ops.place], codes[ops.place], ops.floors(gpu)[ops.place]
        # a row of the experts contains the choice of experts
        is_tabled = np.bincount(ops.step[ops.is_experts & (codes != MODELLED_CODE)], minlength=ops.num_steps) > 0
        is_left = ~(ops.is_top_k & is_tabled[ops.step])

        def summed(values: np.ndarray, which: np.ndarray) -> np.ndarray:
            return np.bincount(ops.step[which], weights=values[which], minlength=ops.num_steps)

        time_s = ops.calls * time_s
        total_s = summed(time_s, is_left)
        share = time_s / total_s[ops.step]
        shares = [summed(share, is_left & (codes == code)) for code in range(len(PUBLISHED_PROVENANCES))]
        return Totals(total_s, summed(ops.calls * floor_s, is_left), np.array(shares))


class SummedStep(StepTime):
    """A step whose totals are known; its ops come when they are asked for."""

    _data: PublishedData | None
    _totals: tuple[float, float, tuple[float, ...]] | None

    def __init__(
        self,
        model: ModelConfig,
        gpu: Gpu,
        stack: Stack,
        deployment: Deployment,
        ops: tuple[TimedOp, ...] | None = None,
        *,
        data: PublishedData | None = None,
        totals: tuple[float, float, tuple[float, ...]] | None = None,
    ) -> None:
        """``totals``: seconds, roofline seconds, shares. With ``ops`` (a changed copy) it is a plain ``StepTime``."""
        known: dict[str, Any] = {"model": model, "gpu": gpu, "stack": stack, "deployment": deployment}
        self.__dict__.update(known, _data=data, _totals=None if ops is not None else totals)
        if ops is not None:
            self.__dict__["ops"] = ops

    @cached_property
    def ops(self) -> tuple[TimedOp, ...]:  # type: ignore[override]
        assert self._data is not None
        return published_step(self._data, self.model, self.gpu, self.stack, self.deployment, check_memory=False).ops

    @property
    def step_s(self) -> float:
        return StepTime.step_s.fget(self) if self._totals is None else self._totals[0]  # type: ignore[misc]

    @property
    def floor_s(self) -> float:
        return StepTime.floor_s.fget(self) if self._totals is None else self._totals[1]  # type: ignore[misc]

    def coverage(self) -> dict[str, float]:
        if self._totals is None:
            return super().coverage()
        return dict(zip(PUBLISHED_PROVENANCES, self._totals[2], strict=True))
