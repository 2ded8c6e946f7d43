"""A step on several ranks timed whole, and each of its ops alone, by the one method of ``timing.py``, on all at once.

Every rank runs the same measurement over its own GPU. What decides how it goes on (times, clocks, throttling, whether
an output is right) is agreed on by all, so that all replay the same graphs equally often: a time is that of the slowest
rank, a block is throttled if any rank was, an output is right if it is on all ranks. Between blocks ranks agree over
gloo, which is also where they begin the next block together; inside of a block nothing but the step runs.

The slowest rank is the step: its record (op ``ranks_step``) holds the largest of the ranks' times of each block, and
``RankedStep.rank_s`` each rank's own median. Communication ops get records of their own, under the decode plan's names
and shapes; of all ops the sum is taken, and the gap is what it is on one GPU (``step_measure``). Nothing overlaps:
communication is added.

Units: seconds. Errors: ``ValueError`` naming the argument; ``RankFailed``; as ``timing.measure``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch

from .case import Case
from .device import Device, DeviceProperties, DeviceState, Graph, MethodUnavailable, Replay
from .gpus import Gpu
from .measurement import L2Policy, Measurement, Settings
from .ops import ExpertAllToAll, Op
from .ranks_group import RankGroup
from .ranks_ops import COMMUNICATION
from .ranks_step import ManyRanks, planned_communication
from .record import Point, Record, environment, source_hash
from .records import RecordStore
from .step_cases import make_op_case, make_step_case, op_groups
from .step_measure import OMITTED as ONE_OMITTED
from .step_measure import step_hash, step_point
from .step_state import DecodeStep
from .timing import measure

OVERLAP = "overlap: none, communication is added: each op waits for the one before it"
OMITTED = (*(each for each in ONE_OMITTED if not each.startswith("communication")), OVERLAP)

TIMED_OPS = ("all", "communication", "none")

STEP_MEMORY = 0.8
"""Of what is free on the fullest GPU, for weights and caches; the rest for activations, exchanges, graphs and NCCL."""


class RankDevice:
    """A rank's device as the timing core sees it: what it reads is what all ranks agree on.

    Attributes:
        replays: of every replay so far, each rank's time.
    """

    def __init__(self, own: Device, group: RankGroup) -> None:
        self.own, self.group = own, group
        self.replays: list[list[float]] = []
        self._common_s, self._last_s = 0.0, own.wall_s()

    @property
    def properties(self) -> DeviceProperties:
        return self.own.properties

    def capture(self, calls: Sequence[Callable[[], None]]) -> Graph:
        return _RankGraph(self, self.own.capture(calls))

    def synchronize(self) -> None:
        with self.group.waiting("synchronize"):
            self.own.synchronize()

    def agree(self, *values: float) -> list[list[float]]:
        """The values of all ranks; what this takes does not count on ``wall_s``."""
        begin_s = self.own.wall_s()
        found = self.group.numbers(values)
        self._last_s += self.own.wall_s() - begin_s
        return found

    def wall_s(self) -> float:
        """A clock that all ranks read alike: it advances by the most that any rank's own did."""
        elapsed_s = self.own.wall_s() - self._last_s
        self._last_s += elapsed_s
        self._common_s += max(row[0] for row in self.agree(elapsed_s))
        return self._common_s

    def state(self) -> DeviceState:
        """This GPU's, but throttled by whatever holds any of them down. Asked while they work."""
        own, bits = self.own.state(), 0
        for (each,) in self.group.numbers([float(own.throttle_bits)]):
            bits |= int(each)
        return own._replace(throttle_bits=bits)

    def energy_j(self) -> float:
        return self.own.energy_j()

    def flush_l2(self) -> None:
        self.own.flush_l2()

    def regions(self, buffers: Any) -> list[tuple[int, int]]:
        return self.own.regions(buffers)

    def poison(self, buffers: Any) -> None:
        self.own.poison(buffers)

    def all_finite(self, buffers: Any) -> bool:
        return self.group.every(self.own.all_finite(buffers))

    def all_zero(self, buffers: Any) -> bool:
        """Of every rank: one that no token came to has zeros."""
        return self.group.every(self.own.all_zero(buffers))


class _RankGraph:
    def __init__(self, device: RankDevice, own: Graph) -> None:
        self._device, self._own = device, own

    def launch(self) -> None:
        self._own.launch()

    def replay(self, in_flight: Callable[[], None] | None = None) -> Replay:
        device = self._device
        with device.group.waiting("replay"):
            own = self._own.replay(in_flight)
        rows = device.agree(own.time_s, own.total_s)
        device.replays.append([time_s for time_s, _ in rows])
        return Replay(*(max(column) for column in zip(*rows, strict=True)))


def agreed(case: Case, group: RankGroup) -> Case:
    """The same case, right where it is on all ranks, and unchanged where it is on all."""

    def error(weights: Any, activations: Any, output: Any) -> float:
        try:
            own, why = case.error(weights, activations, output), ""
        except AssertionError as raised:
            own, why = math.inf, str(raised)
        worst = group.most(own if 0 <= own < math.inf else math.inf)[0]
        if worst == math.inf:
            raise AssertionError(why or "the output is wrong on some rank")
        return worst

    def checksum(buffers: Any) -> Hashable:
        digest = hash(case.checksum(buffers)) % (1 << 50)
        return tuple(row[0] for row in group.numbers([float(digest)]))

    return replace(case, error=error, checksum=checksum)


# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankOp:
    """An op alone, on the slowest rank. ``time_s``: of one call; None without one, ``reasons`` say why.

    ``is_communication``: then ``floor_s`` is the decode plan's, of links and memory.
    """

    name: str
    runs_on: str
    calls: int
    is_communication: bool
    time_s: float | None
    floor_s: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankedStep:
    """A step of a deployment beside its ops; the same on all ranks.

    Attributes:
        whole_s: of the slowest rank; None where the measurement is invalid, see ``record.invalid``.
        rank_s: each rank's own median; empty without a valid time. gpus: each rank's GPU, by UUID.
        padding: rows that an exchange sends per row that has a token; None without an exchange.
        records: of the whole step, then of communication. timed_ops: which, of ``TIMED_OPS``.
    """

    model: str
    parallel: str
    precision: str
    ranks: int
    backend: str
    batch: float
    length: int
    layers: int
    distinct_layers: int
    whole_s: float | None
    rank_s: tuple[float, ...]
    gpus: tuple[str, ...]
    floor_s: float
    ops: tuple[RankOp, ...]
    padding: float | None
    omitted: tuple[str, ...]
    records: tuple[Record, ...]
    timed_ops: str

    @property
    def sum_s(self) -> float | None:
        """calls x time over all ops; None where one has no time, or not all were timed."""
        if self.timed_ops != "all":
            return None
        times = [None if op.time_s is None else op.calls * op.time_s for op in self.ops]
        known = [time_s for time_s in times if time_s is not None]
        return sum(known) if known and len(known) == len(times) else None

    @property
    def gap_s(self) -> float | None:
        sum_s = self.sum_s
        return None if self.whole_s is None or sum_s is None else self.whole_s - sum_s

    @property
    def communication_s(self) -> float | None:
        """calls x time over communication; None where one of them has no time, or none was timed."""
        times = [None if op.time_s is None else op.calls * op.time_s for op in self.ops if op.is_communication]
        known = [time_s for time_s in times if time_s is not None]
        return sum(known) if known and len(known) == len(times) else None

    @property
    def tokens_per_s_per_gpu(self) -> float | None:
        return None if self.whole_s is None else self.batch / self.whole_s


# -- measuring -------------------------------------------------------------------------------------


def ranks_hash(properties: DeviceProperties) -> str:
    """As ``step_hash``, with what is between ranks."""
    sources: dict[str, str | bytes] = {"step": step_hash(properties)}
    for path in sorted(Path(__file__).parent.glob("ranks_*.py")):
        sources[f"bench/{path.name}"] = path.read_bytes()
    return source_hash(sources)


def check_alike(group: RankGroup, properties: DeviceProperties) -> tuple[str, ...]:
    """The UUIDs of the ranks' GPUs.

    Raises:
        ValueError: GPUs of several kinds, or one GPU for two ranks; on all ranks.
    """
    names, uuids = group.texts(properties.name), group.texts(properties.uuid)
    if len(set(names)) > 1:
        raise ValueError(f"GPU: expected one kind on all ranks; got {', '.join(sorted(set(names)))}")
    twice = sorted({uuid for uuid in uuids if uuids.count(uuid) > 1})
    if twice:
        raise ValueError(f"GPU: expected one for each rank; got {twice[0]} on {uuids.count(twice[0])} ranks")
    return tuple(uuids)


def measure_ranks(
    step: DecodeStep, ranks: ManyRanks, device: RankDevice, gpu: Gpu, parallel: str, *,
    store: RecordStore | None = None, settings: Settings | None = None, op_settings: Settings | None = None,
    ops: str = "all", done: Callable[[str], None] = lambda name: None,
) -> RankedStep:  # fmt: skip
    """Times a step of ``build_rank_step`` on all ranks, and then each op alone.

    Args:
        store: where rank 0's records go, at once. parallel: the deployment, as ``--parallel`` has it.
        settings, op_settings: of the whole, and of each op; no energy is measured.
        ops: which of them to time alone, of ``TIMED_OPS``. done: called with what was timed last.

    Raises:
        ValueError: as ``make_step_case`` and ``check_alike``; routing beyond the exchange's capacity.
        MethodUnavailable: as ``timing.measure``.
    """
    if ops not in TIMED_OPS:
        raise ValueError(f"ops: expected one of {', '.join(TIMED_OPS)}; got {ops!r}")
    group = ranks.group
    uuids = check_alike(group, device.properties)
    settings = without_energy(settings)
    case = agreed(make_step_case(step, gpu, device.properties.l2_bytes), group)
    ranks.check_overflow()
    device.replays.clear()
    measured = measure(case, device, l2_policy="hot", settings=settings)
    ranks.check_overflow()
    blocks = device.replays[-len(measured.blocks) :] if measured.blocks else []
    record = _keep(_step_point(step, ranks, gpu, device.properties, parallel), measured, device, store)
    done("step")
    rank_s: tuple[float, ...] = ()
    if record.time_s is not None:
        rank_s = tuple(median(column) / measured.num_calls for column in zip(*blocks, strict=True))
    timed, records = [], [record]
    for each in op_groups(step):
        if ops == "none" or (ops == "communication" and each[0].name not in COMMUNICATION):
            continue
        op, kept = _time_op(step, ranks, each, device, gpu, store, without_energy(op_settings))
        timed.append(op)
        records += kept
        done(op.name)
    ranks.check_overflow()
    omitted = list(OMITTED)
    if step.distinct_layers < step.num_layers:
        omitted.append(
            f"weights: {step.distinct_layers} of {step.num_layers} layers have their own, the others use these"
        )
    omitted += [f"{op.name}: {op.reasons[0]}" for op in timed if op.reasons]
    paddings = [exchange.padding for exchange in ranks.exchanges.values()]
    given = ranks.deployment
    return RankedStep(
        step.model.config.name, parallel, step.precision.name, group.size, group.backend, given.batch_per_gpu,
        max(step.cached), step.num_layers, step.distinct_layers, record.time_s, rank_s, uuids, measured.floor_s,
        tuple(timed), max(paddings, default=None), tuple(omitted), tuple(records),
        ops,
    )  # fmt: skip


def without_energy(settings: Settings | None) -> Settings:
    """The same without the energy loop, which ranks would not leave together."""
    return msgspec.structs.replace(settings or Settings(), energy_s=None)


def _keep(point: Point, measured: Measurement, device: RankDevice, store: RecordStore | None) -> Record:
    record = Record.of(point, measured, environment(device.properties))
    if store is not None and device.group.rank == 0:
        store.append(record)
    return record


def _step_point(step: DecodeStep, ranks: ManyRanks, gpu: Gpu, properties: DeviceProperties, parallel: str) -> Point:
    one = step_point(step, gpu, properties)
    return msgspec.structs.replace(
        one,
        op="ranks_step",
        shape=one.shape | {"ranks": ranks.group.size},
        tile=one.tile | {"parallel": parallel} | _exchanged(ranks),
        kernel_hash=ranks_hash(properties),
    )


def _exchanged(ranks: ManyRanks) -> dict[str, bool | int | str]:
    made: dict[str, bool | int | str] = {"backend": ranks.group.backend, "overlap": "none"}
    capacities = [exchange.capacity for exchange in ranks.exchanges.values()]
    return made | ({"exchange": "padded", "capacity": max(capacities)} if capacities else {})


def communication_point(name: str, op: Op, ranks: ManyRanks, gpu: Gpu, properties: DeviceProperties) -> Point:
    """The key of a communication op's record: name and shape are the decode plan's."""
    shape = {field.name: getattr(op, field.name) for field in fields(op)}
    payload = op.payload if isinstance(op, ExpertAllToAll) else "bf16"
    return Point(
        op=name,
        shape={field: value for field, value in shape.items() if isinstance(value, int)},
        formats={"payload": payload},
        recipe="torch.distributed",
        l2_policy="hot",
        kernel_hash=ranks_hash(properties),
        tile=_exchanged(ranks),
        gpu=gpu.name,
    )


def _time_op(
    step: DecodeStep, ranks: ManyRanks, group: list[Any], device: RankDevice, gpu: Gpu, store: RecordStore | None,
    settings: Settings,
) -> tuple[RankOp, list[Record]]:  # fmt: skip
    """One op alone, on all ranks; what it reads is put back."""
    op = group[0]
    call = planned_communication(step.model.config, gpu, ranks.deployment).get(op.name)
    kept = {name: part.clone() for name, part in op.inputs.items()}
    made, policy = make_op_case(step, group, gpu, device.properties.l2_bytes)
    if call is not None:  # the links' floor stands where that of matrix work does: nothing true beats it
        made = replace(made, compute_floor_s=call.op.link_s(gpu))
    case = agreed(made, ranks.group)
    measured, reasons = _measure(case, policy, device, settings)
    for name, part in op.inputs.items():
        part.copy_(kept[name])
    time_s = None if measured is None or measured.invalid else measured.time_s
    floor_s = max((case.weight_bytes + case.activation_bytes) / case.memory_bytes_per_s, case.compute_floor_s)
    records = []
    if call is not None and measured is not None:
        floor_s = call.op.floor_s(gpu)
        point = communication_point(op.name, call.op, ranks, gpu, device.properties)
        records.append(_keep(point, measured, device, store))
    return RankOp(op.name, op.runs_on, len(group), call is not None, time_s, floor_s, reasons), records


def _measure(
    case: Case, policy: L2Policy, device: RankDevice, settings: Settings
) -> tuple[Measurement | None, tuple[str, ...]]:
    try:
        measured = measure(case, device, l2_policy=policy, settings=settings)
    except MethodUnavailable as raised:  # of what all agree on: all are here
        return None, (str(raised).splitlines()[0],)
    return measured, measured.invalid


def weight_budget(group: RankGroup) -> float:
    """Bytes for weights and caches that every rank has free; infinite without a GPU."""
    if group.device.type != "cuda":
        return math.inf
    return STEP_MEMORY * -group.most(-float(torch.cuda.mem_get_info(group.device)[0]))[0]
