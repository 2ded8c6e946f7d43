"""The lab's tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .doctor import Finding
from .gpus import Gpu
from .lab_checks import KernelCheck
from .lab_field import COLUMNS, NOTE, FieldRow, cells
from .lab_order import Weighed
from .tables import plain_table


def doctor_table(findings: Sequence[Finding]) -> Table:
    """One row per finding, in words."""
    rows = [(each.name, each.status, each.detail) for each in findings]
    return plain_table("This machine", ("what", "status", ""), rows, left=3)


def order_table(points: Sequence[Weighed]) -> Table:
    """What would be measured, in its order. The worth is a roofline's, no time."""
    rows = []
    for number, each in enumerate(points, 1):
        shape = " x ".join(str(value) for _, value in each.target.fields)
        places = each.target.places
        where = ", ".join(places[:2]) + (f" and {len(places) - 2} more" if places[2:] else "")
        rows.append((each.target.kernel.name, shape, where, number, f"{each.worth_s * 1e3:.3f}"))
    title = f"{len(points)} points. Floor: calls per step x roofline, ms of the models' steps; modelled, not measured"
    return plain_table(title, ("kernel", "shape", "where", "order", "floor ms"), rows, left=3)


def field_table(gpu: Gpu, rows: Sequence[FieldRow]) -> Table:
    """Ours against the field: every row, furthest behind first."""
    title = f"{gpu.title}: ours, measured here, against the field (us). {NOTE}"
    return plain_table(title, COLUMNS, [cells(row) for row in rows], left=2)


def steps_lines(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Whole decode steps beside the sum of their ops, a line each."""
    lines = []
    for step in steps:
        what = f"step of {step['model']}, {step['precision']}, {step['batch']} sequences x {step['length']}: "
        if step["whole_s"] is None:
            lines.append(what + "no time: " + "; ".join(step["invalid"]))
            continue
        beside = ""
        if step["sum_s"] is not None:
            beside = f"; its ops alone {step['sum_s'] * 1e3:.2f} ms, gap {step['gap_s'] * 1e3:+.2f} ms"
        lines.append(
            f"{what}{step['whole_s'] * 1e3:.2f} ms whole, measured here: {step['tokens_per_s_per_gpu']:,.0f} "
            f"tokens/s/GPU{beside}; {step['distinct_layers']} of {step['layers']} layers have weights of their own"
        )
    return lines


def checks_lines(checks: Sequence[KernelCheck]) -> list[str]:
    """What the checks found: what is wrong and what was skipped, one by one; the rest counted."""
    right = sum(check.verdict == "ok" for check in checks)
    lines = [f"{right} of {len(checks)} checks of kernels are ok"] if checks else []
    return lines + [
        f"{check.how} {check.kernel} {' x '.join(map(str, check.shape.values()))}: {check.verdict}"
        for check in checks if check.verdict != "ok"
    ]  # fmt: skip
