"""What to do with a GPU for some minutes, so that whenever time ends everything finished is of use.

Stages, in this order: every kernel's correctness (``lab_checks``); pass 1 over the points, heaviest first
(``lab_order``); the models' whole decode steps; passes 2 and 3 in fresh processes, whose spread is the noise; checks
that time did not suffice for; the sanitizers. Each stage is a process of its own (``lab``), given until when it may
work; a process that dies at a point is begun again without that point.

Units: seconds on a monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .lab import Deadline, Journal

NUM_PASSES = 3
"""Fresh processes: the fewest whose spread tells the noise."""

STEP_SHARE = 0.2
"""Of the time, kept from pass 1 for the whole decode steps; what they leave is for passes 2 and 3."""

STAGES = ("check", "measure", "step", "sanitize")
CHECK_SHARE = 0.2
"""Of the time, what the checks may take at most before pass 1; what is left of them is done at the end."""

GRACE_S = 10.0
"""How long after its deadline a process may take to end before it is ended."""

RunChild = Callable[[str, int, float], int]
"""(stage, number, at_s): runs it in a fresh process until ``at_s``, and gives the exit code. ``number``: of a pass."""


@dataclass(frozen=True)
class StageRun:
    """One process: when it ended, and how. ``was_again``: after one that died."""

    stage: str
    number: int
    until_s: float
    code: int
    was_again: bool = False


def run_session(
    stages: Sequence[str], deadline: Deadline, journal: Journal, run_child: RunChild,
    sanitize: Callable[[], None] = lambda: None,
) -> list[StageRun]:  # fmt: skip
    """All stages in their order, each within its share of the time; a process that dies at a point is begun again
    without that point.

    Raises:
        ValueError: an unknown stage.
    """
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"stage: expected some of {', '.join(STAGES)}; got {stage!r}")
    journal.clear()
    total_s = deadline.left_s
    kept_s = STEP_SHARE * total_s if "step" in stages else 0.0
    until_s = deadline.at_s
    plan = [("check", 0, deadline.clock() + CHECK_SHARE * total_s if "measure" in stages else until_s)]
    plan += [("measure", 1, until_s - kept_s), ("step", 0, until_s)]
    plan += [("measure", number, until_s) for number in range(2, NUM_PASSES + 1)]
    plan += [("check", 0, until_s)] if "measure" in stages else []
    runs: list[StageRun] = []
    checks_cut = False
    for stage, number, at_s in plan:
        is_again = stage == "check" and any(run.stage == "check" for run in runs) and not checks_cut
        if stage in stages and deadline.clock() < at_s and not is_again:
            runs += _run_stage(stage, number, at_s, deadline, journal, run_child)
            if stage == "check":
                checks_cut = deadline.clock() >= at_s
    if "sanitize" in stages and deadline.left_s > 0:
        sanitize()
    return runs


def _run_stage(
    stage: str, number: int, at_s: float, deadline: Deadline, journal: Journal, run_child: RunChild
) -> list[StageRun]:
    runs: list[StageRun] = []
    while True:
        before = journal.died()
        code = run_child(stage, number, at_s)
        runs.append(StageRun(stage, number, at_s, code, was_again=bool(runs)))
        has_news = journal.died() > before  # else the next process would die at the same place
        if code == 0 or not has_news or deadline.clock() >= at_s:
            return runs
