"""One process of the lab: a pass over points, or whole decode steps, within a deadline.

A ``Deadline`` is asked before each point whether what the point will take (learned from the points before it) still
fits. A record is on disk before the next point begins: a process that is killed loses the point it was at, and the
next one goes on from there. A ``Journal`` names the points that were begun and not ended: a point whose process died is
not begun again in the same run, so that one kernel cannot take the rest down with it.

Units: seconds on a monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .campaign import Outcome, run_targets
from .deployment import PRECISIONS
from .device import Device, MethodUnavailable
from .gpus import Gpu
from .measurement import Settings
from .models import load_model
from .records import RecordStore
from .targets import Target

if TYPE_CHECKING:
    from .step_measure import StepResult

LAB_SETTINGS = Settings(max_warm_up_s=1.5, budget_s=2.0, energy_s=None)
"""Minutes are few: a fifth of the usual timing per point, no energy loop. The records say so."""

_REMEMBERED = 5
_BUFFERS_S = 2.0


class Deadline:
    """A moment that no work may go beyond."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``seconds`` from now on ``clock``.

        Raises:
            ValueError: not a positive number.
        """
        if not 0 < seconds < float("inf"):
            raise ValueError(f"seconds: expected a positive number; got {seconds}")
        self.clock, self.at_s = clock, clock() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self.at_s - self.clock())

    def allows(self, cost_s: float) -> bool:
        """Whether work of this length still fits."""
        return self.clock() + cost_s <= self.at_s


class PointCost:
    """What a point will take on the wall: the longest of its op's last few; before any, what the settings allow."""

    def __init__(self, settings: Settings) -> None:
        warm_up_s = 2 * settings.max_warm_up_s  # of the anchor and of the kernel
        self._first_s = warm_up_s + settings.budget_s + (settings.energy_s or 0.0) + _BUFFERS_S
        self._seen: dict[str, deque[float]] = {}

    def expect(self, op: str) -> float:
        return max(self._seen[op]) if op in self._seen else self._first_s

    def learn(self, op: str, took_s: float) -> None:
        self._seen.setdefault(op, deque(maxlen=_REMEMBERED)).append(took_s)

    def expect_all(self, ops: Sequence[str]) -> float:
        """Of points still to do, by the mean of their ops; for an estimate to show."""
        return sum(sum(self._seen[op]) / len(self._seen[op]) if op in self._seen else self._first_s for op in ops)


class Journal:
    """Which points were begun and which ended, in one run of the lab, across its processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """A new run begins."""
        self.path.unlink(missing_ok=True)

    def write(self, event: str, key: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([event, key]) + "\n")

    def died(self) -> set[str]:
        """Points that were begun and not ended: the process died at them. A torn last line names none."""
        if not self.path.exists():
            return set()
        open_keys: set[str] = set()
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                event, key = json.loads(line)
            except ValueError:
                continue
            (open_keys.add if event == "begin" else open_keys.discard)(key)
        return open_keys


@dataclass
class PassResult:
    """What a pass did. ``left``: targets that time did not suffice for; ``died``: whose process had died."""

    measured: int = 0
    old: int = 0
    skipped: list[Outcome] = field(default_factory=list)
    left: list[Target] = field(default_factory=list)
    died: list[Target] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """Where a pass is: targets behind it, of how many, and the seconds that the rest and the deadline leave."""

    done: int
    total: int
    outcome: Outcome
    rest_s: float
    left_s: float


def target_key(target: Target) -> str:
    return f"{target.kernel.name} " + " ".join(f"{name}={value}" for name, value in target.fields)


def measure_pass(
    targets: Sequence[Target],
    device: Device,
    gpu: Gpu,
    store: RecordStore,
    number: int,
    deadline: Deadline,
    *,
    settings: Settings = LAB_SETTINGS,
    journal: Journal | None = None,
    buffers_on: Any = "cuda",
    progress: Callable[[Progress], None] = lambda progress: None,
    is_orphan: Callable[[], bool] = lambda: False,
) -> PassResult:
    """Brings each target to records of ``number`` processes, in this order, as long as the deadline allows.

    ``is_orphan``: whether who asked for the pass is gone; asked before each target.
    """
    result, cost = PassResult(), PointCost(settings)
    dead = journal.died() if journal else set()
    was_old = False

    def fitting() -> Iterator[Target]:
        for index, target in enumerate(targets):
            key = target_key(target)
            if key in dead:
                result.died.append(target)
                continue
            if is_orphan() or not deadline.allows(cost.expect(target.kernel.op)):
                result.left = list(targets[index:])
                return
            if journal:
                journal.write("begin", key)
            begun_s = deadline.clock()
            yield target
            if not was_old:
                cost.learn(target.kernel.op, deadline.clock() - begun_s)
            if journal:
                journal.write("end", key)

    def done(outcome: Outcome) -> None:
        nonlocal was_old
        was_old = outcome.is_old
        result.old += outcome.is_old
        result.measured += outcome.record is not None
        if outcome.skipped:
            result.skipped.append(outcome)
        behind = result.old + result.measured + len(result.skipped) + len(result.died)
        rest = [target.kernel.op for target in targets[behind:]]
        progress(Progress(behind, len(targets), outcome, cost.expect_all(rest), deadline.left_s))

    run_targets(
        fitting(), device, gpu, store, processes=number, settings=settings, buffers_on=buffers_on, done=done
    )  # fmt: skip
    return result


# -- whole decode steps ----------------------------------------------------------------------------

STEP_MEMORY = 0.8
"""Of the GPU's free memory, what a step's weights and caches may take; the rest is for copies of small weights."""

_FIRST_STEP_S = 60.0
"""Building and timing a step, before any was."""


def measure_steps(
    models: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    device: Device,
    gpu: Gpu,
    store: RecordStore,
    deadline: Deadline,
    *,
    results: Path,
    journal: Journal | None = None,
    settings: Settings = LAB_SETTINGS,
    buffers_on: Any = "cuda",
    max_weight_bytes: float | None = None,
    is_orphan: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda text: None,
) -> int:
    """Times whole decode steps of ``models`` in their checkpoints' precisions, smallest model first, and, while there
    is time, each of their ops alone; how many were timed.

    A record of the whole step goes to ``store``; the step beside the sum of its ops is a line of ``results``. What is
    recorded of the same sources is not done again. A step that this GPU cannot do is told, and stops no other.

    Args:
        max_weight_bytes: None: ``STEP_MEMORY`` of what is free.
    """
    import torch

    from .decode_step import build_step
    from .step_cases import op_groups
    from .step_measure import measure_step, step_hash, time_ops

    version, known = step_hash(device.properties), set()
    for record in store.records():
        if record.point.op == "decode_step" and record.point.kernel_hash == version:
            shape = record.point.shape
            known.add((record.point.tile["model"], shape["batch"], shape["length"]))
    dead, count, longest_s = journal.died() if journal else set(), 0, _FIRST_STEP_S
    op_s = PointCost(settings).expect("")
    for config in sorted((load_model(name) for name in models), key=lambda model: model.num_parameters):
        precision = PRECISIONS[config.native_precision or "bf16"]
        for batch, length in itertools.product(sorted(batches, reverse=True), sorted(contexts)):
            key = f"{config.name} {precision.name} {batch} x {length}"
            if (config.name, batch, length) in known or key in dead:
                continue
            if is_orphan() or not deadline.allows(longest_s):
                return count
            if journal:
                journal.write("begin", key)
            begun_s = deadline.clock()
            try:
                if max_weight_bytes is None:
                    torch.cuda.empty_cache()
                    most = STEP_MEMORY * torch.cuda.mem_get_info()[0]
                else:
                    most = max_weight_bytes
                step = build_step(
                    config, precision, batch=batch, length=length, device=buffers_on, max_weight_bytes=most
                )  # fmt: skip
                result = measure_step(step, device, gpu, store=store, settings=settings, has_ops=False)
                longest_s = max(deadline.clock() - begun_s, longest_s if count else 0.0)
                if deadline.allows(op_s * len(op_groups(step))):
                    result = replace(result, ops=tuple(time_ops(step, device, gpu, settings)))
                del step
                append_line(results, json.dumps(step_dict(result), allow_nan=False).encode())
                count += 1
                tell(f"{key}: {describe_step(result)}")
            except (ValueError, MethodUnavailable, MemoryError) as error:
                tell(f"{key}: skipped: {error}")
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":
                    raise
                tell(f"{key}: skipped: memory: {str(error).splitlines()[0]}")
            if journal:
                journal.write("end", key)
    return count


def step_dict(result: StepResult) -> dict[str, Any]:
    """A step beside its ops, for a line of JSON."""
    names = ("model", "precision", "batch", "length", "layers", "distinct_layers", "whole_s", "floor_s", "sum_s",
             "gap_s", "tokens_per_s_per_gpu", "omitted")  # fmt: skip
    ops = [asdict(op) for op in result.ops]
    return {name: getattr(result, name) for name in names} | {"ops": ops, "invalid": list(result.record.invalid)}


def describe_step(result: StepResult) -> str:
    if result.whole_s is None:
        return f"invalid: {result.record.invalid[0]}"
    sum_s, gap_s = result.sum_s, result.gap_s
    beside = "" if sum_s is None or gap_s is None else f", ops {sum_s * 1e3:.2f} ms, gap {gap_s * 1e3:+.2f} ms"
    layers = f"{result.distinct_layers} of {result.layers} layers distinct"
    return f"{result.whole_s * 1e3:.2f} ms, {result.tokens_per_s_per_gpu:,.0f} tokens/s/GPU{beside}; {layers}"


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of ``measure_steps``; a last one without an end is left out.

    Raises:
        ValueError: a line that is no JSON object; names file and line.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object; {error}") from None
    return found


def append_line(path: Path, line: bytes) -> None:
    """Behind the last whole line: what a killed writer left is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.read_bytes() if path.exists() else b""
    if there and not there.endswith(b"\n"):
        os.truncate(path, there.rfind(b"\n") + 1)
    with path.open("ab") as file:
        file.write(line + b"\n")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process of a lab measures into this folder: a killed one's child may still end its point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
