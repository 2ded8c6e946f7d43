"""A decode step timed whole, and each of its ops alone, by the one method of ``timing.py``.

The whole step is one call under ``hot`` with one set of buffers: it moves far more than L2 holds, so it finds its
weights and caches out of it as serving does, and the floor counts all bytes. A step that moves less than 5 x L2 is
refused.

An op alone runs over the step's own buffers. Its weights go round a ring of what the step's layers have for it, and
copies where these do not suffice (``cold_weights``); under ``hot`` where they are too small for a ring: norms,
quantizers, RoPE's tables, the embedding's few rows. Its activations stay as the op before left them, as in the step.

What is checked. Whole, at any size: the graph's logits against a second, eager run onto poisoned buffers, on the
inputs timed and on new ones. Whole, made with ``is_plain`` (small sizes): besides, each layer against plain torch in
float64 over the same dequantized weights (``step_reference.check_layers``). An op alone: its outputs, poisoned before
each run, against an eager run on the same inputs; against its own reference each kernel is timed by ``campaign.py``.

The sum is calls x time over the ops; the gap, whole - sum, is what stands between them: launches inside of the graph,
what one op leaves in L2 for the next, clocks.

Units: seconds. Errors: ``ValueError`` naming the argument; as ``timing.measure``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.registry import KERNELS
from .case import Case
from .device import Device, DeviceProperties, MethodUnavailable
from .gpus import Gpu
from .measurement import L2Policy, Measurement, Settings
from .record import Point, Record, environment, source_hash
from .records import RecordStore
from .step_cases import make_op_case, make_step_case, op_groups
from .step_state import DecodeStep
from .timing import measure

OMITTED = (
    "host time: scheduling, the lengths and pages of the next step, detokenizing",
    "prefill",
    "communication between GPUs",
    "sampling other than of the likeliest token",
)
"""What neither the whole step nor the sum of its ops contains."""


@dataclass(frozen=True)
class OpTime:
    """An op alone. ``time_s``: of one call; None where there is no time to be believed, ``reasons`` say why."""

    name: str
    runs_on: str
    calls: int
    l2_policy: str
    time_s: float | None
    floor_s: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """A step beside its ops.

    Attributes:
        whole_s: of a step; None where the measurement is invalid, see ``record.invalid``.
        distinct_layers: layers with weights of their own, of ``layers``.
        omitted: what is in neither figure, and what the sum lacks.
        record: of the whole step.
    """

    model: str
    precision: str
    batch: int
    length: int
    layers: int
    distinct_layers: int
    whole_s: float | None
    floor_s: float
    ops: tuple[OpTime, ...]
    omitted: tuple[str, ...]
    record: Record

    @property
    def sum_s(self) -> float | None:
        """calls x time over all ops; None where one has no time, or none was timed."""
        times = [None if op.time_s is None else op.calls * op.time_s for op in self.ops]
        known = [time_s for time_s in times if time_s is not None]
        return sum(known) if known and len(known) == len(times) else None

    @property
    def gap_s(self) -> float | None:
        """whole - sum: positive where the step takes longer than its ops."""
        sum_s = self.sum_s
        return None if self.whole_s is None or sum_s is None else self.whole_s - sum_s

    @property
    def tokens_per_s_per_gpu(self) -> float | None:
        return None if self.whole_s is None else self.batch / self.whole_s


# -- timing -------------------------------------------------------------------------------------


def time_ops(step: DecodeStep, device: Device, gpu: Gpu, settings: Settings | None = None) -> list[OpTime]:
    """Every op of the step alone; ``step`` must have been launched. What cannot be timed has reasons."""
    timed = []
    for group in op_groups(step):
        op = group[0]
        kept = {name: part.clone() for name, part in op.inputs.items()}
        case, policy = make_op_case(step, group, gpu, device.properties.l2_bytes)
        floor_s = max((case.weight_bytes + case.activation_bytes) / case.memory_bytes_per_s, case.compute_floor_s)
        time_s, reasons = _time(case, policy, device, settings)
        for name, part in op.inputs.items():
            part.copy_(kept[name])
        timed.append(OpTime(op.name, op.runs_on, len(group), policy, time_s, floor_s, reasons))
    return timed


def _time(
    case: Case, policy: L2Policy, device: Device, settings: Settings | None
) -> tuple[float | None, tuple[str, ...]]:
    try:
        measured = measure(case, device, l2_policy=policy, settings=settings)
    except (MethodUnavailable, torch.OutOfMemoryError) as raised:
        return None, (str(raised).splitlines()[0],)
    return (None, measured.invalid) if measured.invalid else (measured.time_s, ())


# -- both, recorded --------------------------------------------------------------------------------


def step_hash(properties: DeviceProperties) -> str:
    """Names a version of all that a step may launch: every kernel's sources, the step's own, and torch."""
    folder = Path(__file__).parent
    sources: dict[str, str | bytes] = {"torch": properties.torch}
    for kernel in KERNELS:
        sources |= kernel.source_texts()
    for path in (folder / "decode_step.py", *sorted(folder.glob("step_*.py"))):
        sources[f"bench/{path.name}"] = path.read_bytes()
    return source_hash(sources)


def step_point(step: DecodeStep, gpu: Gpu, properties: DeviceProperties) -> Point:
    """The key of the whole step's record; the model is part of how it is cut up."""
    roles = ("linear", "linear_activation", "experts", "experts_activation", "kv")
    return Point(
        op="decode_step",
        shape={"batch": step.batch, "length": max(step.cached), "layers": step.num_layers,
               "distinct_layers": step.distinct_layers, "q_len": 1},
        formats={role: getattr(step.precision, role) for role in roles},
        recipe="tokenfab",
        l2_policy="hot",
        kernel_hash=step_hash(properties),
        tile={"model": step.model.config.name, "page_size": step.page_size},
        gpu=gpu.name,
    )  # fmt: skip


def measure_step(
    step: DecodeStep, device: Device, gpu: Gpu, *, store: RecordStore | None = None, settings: Settings | None = None,
    op_settings: Settings | None = None, has_ops: bool = True, done: Callable[[Record], None] = lambda record: None,
) -> StepResult:  # fmt: skip
    """Times a step whole, records it, and then times each op alone.

    Args:
        store: where the record goes at once. done: called with it, before the ops.
        settings, op_settings: of the whole, and of each op.
        has_ops: whether ops are timed; without them there is neither sum nor gap.

    Raises:
        ValueError: a step of which too much would stay in L2. MethodUnavailable: as ``timing.measure``.
    """
    case = make_step_case(step, gpu, device.properties.l2_bytes)
    measured: Measurement = measure(case, device, l2_policy="hot", settings=settings)
    record = Record.of(step_point(step, gpu, device.properties), measured, environment(device.properties))
    if store is not None:
        store.append(record)
    done(record)
    timed = time_ops(step, device, gpu, op_settings) if has_ops else []
    omitted: list[str] = list(OMITTED)
    if step.distinct_layers < step.num_layers:
        omitted.append(
            f"weights: {step.distinct_layers} of {step.num_layers} layers have their own, the others use these"
        )
    omitted += [f"{op.name}: {op.reasons[0]}" for op in timed if op.reasons]
    config = step.model.config
    return StepResult(
        config.name, step.precision.name, step.batch, max(step.cached), step.num_layers, step.distinct_layers,
        record.time_s, measured.floor_s, tuple(timed), tuple(omitted), record,
    )  # fmt: skip
