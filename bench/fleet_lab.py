"""The lab over the GPUs of a cluster: every kernel's check, the heaviest points first, whole steps, two more passes.

As ``lab_session`` does it on one machine, each item on some GPU: items that the deadline does not allow are left, and
the same call goes on there. Sanitizers and their tools are a machine's own, and are left to it.

Units: seconds. Errors: as ``fleet_sweep``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.registry import Kernel, Shape
from .campaign import Outcome
from .fleet import Lost
from .fleet_seat import NotMeasured, Stepped, StepWork, unpack
from .fleet_sweep import CALL_S, Fleet, limit_s, sweep_targets
from .lab import LAB_SETTINGS, Deadline, PointCost, append_line
from .lab_checks import MODEST_SHAPES, REPEATS, CheckFile, KernelCheck, kernels_of
from .lab_session import CHECK_SHARE, NUM_PASSES, STEP_SHARE
from .measurement import Settings
from .records import RecordStore
from .targets import Target

STAGES = ("check", "measure", "step")


@dataclass
class Session:
    """What came of it. ``lost``: items that took workers down or raised; ``left``: that time did not suffice for."""

    checks: int = 0
    steps: int = 0
    lost: list[str] = field(default_factory=list)
    left: int = 0


def run_lab(
    fleet: Fleet, targets: Sequence[Target], steps: Sequence[StepWork], store: RecordStore, checks: CheckFile,
    step_results: Path, deadline: Deadline, *, stages: Sequence[str] = STAGES, settings: Settings = LAB_SETTINGS,
    kernels: Sequence[Kernel] | None = None, begin: Callable[[str, int], None] = lambda stage, total: None,
    done: Callable[[Outcome], None] = lambda outcome: None, tell: Callable[[str], None] = lambda text: None,
) -> Session:  # fmt: skip
    """All stages in their order, each within its share of the time.

    Args:
        targets: the heaviest first. kernels: to check; None: those that this GPU has.
        begin: called with each stage and its items. done: with each point's outcome.
    """
    session, total_s = Session(), deadline.left_s
    expected_s = PointCost(settings).expect("")
    kept_s = STEP_SHARE * total_s if "step" in stages else 0.0

    def measure(first: int, last: int, kept_s: float) -> None:
        swept = sweep_targets(
            fleet, targets, store, processes=last, first=first, settings=settings, done=done,
            allows=lambda _: deadline.allows(kept_s + expected_s),
            begin=lambda number, total: begin(f"pass {number}", total),
        )  # fmt: skip
        session.lost += [f"{each.target.kernel.name} {each.skipped}" for each in swept.lost]
        session.left = len(swept.left)

    if "check" in stages:
        until_s = deadline.left_s - CHECK_SHARE * total_s if "measure" in stages else 0.0
        run_checks(fleet, checks, kernels_of(fleet.row) if kernels is None else kernels, session,
                   lambda: deadline.left_s > until_s, begin, tell)  # fmt: skip
    if "measure" in stages and deadline.left_s > kept_s:
        measure(1, 1, kept_s)
    if "step" in stages and deadline.left_s > 0:
        run_steps(fleet, steps, store, step_results, session, deadline, begin, tell)
    if "measure" in stages and deadline.allows(expected_s):
        measure(2, NUM_PASSES, 0.0)
    return session


def run_checks(
    fleet: Fleet, file: CheckFile, kernels: Sequence[Kernel], session: Session, allows: Callable[[], bool],
    begin: Callable[[str, int], None], tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Every kernel at modest shapes that has no result of its version on this GPU model's software."""
    fleet.open()
    known = {(check.kernel, tuple(check.shape.items())): check for check in file.read()}
    versions = dict(zip(kernels, fleet.ask("versions", [kernel.name for kernel in kernels]), strict=True))
    items: list[tuple[Kernel, Shape]] = [
        (kernel, shape)
        for kernel in kernels
        for shape in MODEST_SHAPES[kernel.op]
        if not _is_known(known.get((kernel.name, tuple(shape.items()))), versions[kernel])
    ]
    begin("check", len(items))

    def checked(item: tuple[Kernel, Shape], made: tuple[str, tuple[str, ...] | NotMeasured] | Lost) -> None:
        kernel, shape = item
        version, found = (versions[kernel], made) if isinstance(made, Lost) else made
        problems = () if isinstance(found, NotMeasured) else (found.reason,) if isinstance(found, Lost) else found
        skipped = ""
        if isinstance(found, NotMeasured):
            problems, skipped = ((found.reason,), "") if found.is_spoiled else ((), found.reason)
        check = KernelCheck(
            how="lab", kernel=kernel.name, shape=dict(shape), version=version, problems=problems, skipped=skipped
        )
        file.append(check)
        session.checks += 1
        tell(f"check {check.kernel} {' x '.join(map(str, check.shape.values()))}: {check.verdict}")

    left = fleet.drive(
        items, lambda seat, item: seat.call("check", item[0].name, dict(item[1]), REPEATS, timeout_s=CALL_S), checked,
        lambda _: allows(),
    )  # fmt: skip
    session.left += len(left)


def _is_known(check: KernelCheck | None, version: str) -> bool:
    """A version names one GPU; over a fleet any GPU of the same software will do."""
    return check is not None and _software(check.version) == _software(version)


def _software(version: str) -> list[str]:
    parts = version.split(" ")
    return [parts[0], *parts[2:]]


def run_steps(
    fleet: Fleet, steps: Sequence[StepWork], store: RecordStore, results: Path, session: Session, deadline: Deadline,
    begin: Callable[[str, int], None], tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Whole decode steps, each with its ops alone, that have no record of the same sources."""
    fleet.open()
    (version,) = fleet.ask("step_version")
    known = {
        (record.point.tile["model"], record.point.shape["batch"], record.point.shape["length"])
        for record in store.records()
        if record.point.op == "decode_step" and record.point.kernel_hash == version
    }
    items = [each for each in steps if (each.model, each.batch, each.length) not in known]
    begin("step", len(items))

    def arrived(item: StepWork, made: Stepped | NotMeasured | Lost) -> None:
        if not isinstance(made, Stepped):
            session.lost.append(f"step {item.name}: {made.reason}")
            tell(session.lost[-1])
            return
        for packed in made.records:
            store.append(unpack(packed))
        for line in made.lines:
            append_line(results, line)
        session.steps += len(made.records)
        for text in made.told:
            tell(f"step {text}")

    left = fleet.drive(
        items,
        lambda seat, item: seat.call("step", item, max(1.0, deadline.left_s), timeout_s=limit_s(LAB_SETTINGS) + 900),
        arrived, lambda _: deadline.allows(60.0),
    )  # fmt: skip
    session.left += len(left)
