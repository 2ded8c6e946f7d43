"""Tables of kernels for people: what was compiled, what would be measured, what was."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .summaries import Summary
from .tables import plain_table
from .targets import Target


def inspection_table(rows: Sequence[dict[str, str]]) -> Table:
    """One row per way of compiling: what it costs per value, and per GPU the floors, a star on the one that binds."""
    names = {
        "registers": "regs",
        "spill bytes": "spill B",
        "shared KiB": "KiB",
        "CTAs/SM": "CTAs",
        "instr/value": "i/v",
    }
    floors = {"bytes ps": "bytes", "matrix ps": "matrix", "issue ps": "issue"}
    left = ("kernel", "arch", "matrix", "findings")
    merged: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        row = row | {"CTAs/SM": row.get("CTAs/SM", "").split(" ")[0]}
        cells = merged.setdefault((row["kernel"], row["arch"]), [row.get(name, "") for name in (*left, *names)])
        stars = {name: "*" if row.get("bound by") == word else " " for name, word in floors.items()}
        gpu = [row.get("GPU", ""), *(row[name] + stars[name] if name in row else "" for name in floors),
               row.get("budget", "")]  # fmt: skip
        before = cells[len(left) + len(names) :]
        cells[len(left) + len(names) :] = ["\n".join(pair) for pair in zip(before, gpu, strict=True)] if before else gpu
    title = (
        "Compiled ahead of time. CTAs: per SM; i/v: instructions per value of the streamed operand in the hot loop;\n"
        "floors in ps per value, * the one that binds; budget: instructions per value at which issue binds"
    )
    return plain_table(title, (*left, *names.values(), "GPU", *floors, "budget"), merged.values(), left=len(left))


def targets_table(targets: Sequence[Target]) -> Table:
    """What would be measured."""
    rows = []
    for target in targets:
        work, shape = target.kernel.work(target.shape), " x ".join(str(value) for _, value in target.fields)
        places = ", ".join(target.places[:3]) + (f" and {len(target.places) - 3} more" if target.places[3:] else "")
        rows.append((target.kernel.name, shape, places, target.l2_policy, f"{work.weight_bytes / 1e6:.1f}",
                     f"{work.activation_bytes / 1e6:.1f}", f"{work.flops / 1e9:.1f}"))  # fmt: skip
    columns = ("kernel", "shape", "where", "L2", "weights MB", "activations MB", "GFLOP")
    return plain_table(f"{len(targets)} points", columns, rows, left=4)


def summaries_table(title: str, summaries: Sequence[Summary]) -> Table:
    """What was measured, one row per point."""
    rows = []
    for each in summaries:
        point = each.point
        formats = (point.formats.get(part) for part in ("weight", "activation"))
        name = f"{point.op}/{'-'.join(filter(None, formats))}"
        name += "" if point.recipe == "tokenfab" else f"@{point.recipe}"
        verdict = "; ".join(each.invalid or each.flags) or "ok"
        rows.append((
            name, " x ".join(map(str, point.shape.values())), point.l2_policy, verdict,
            _scaled(each.time_s, 1e6, 2), "-" if each.noise is None else f"{each.noise:.1%}", each.num_processes,
            _scaled(each.bytes_per_s, 1e-9, 0), _scaled(each.flops_per_s, 1e-12, 1),
            "-" if each.roofline_fraction is None else f"{each.roofline_fraction:.0%}",
            "-" if each.anchor_ratio is None else f"{1 / each.anchor_ratio:.2f}",
        ))  # fmt: skip
    columns = ("kernel", "shape", "L2", "verdict", "us", "noise", "processes", "GB/s", "TFLOP/s", "of floor",
               "x cuBLAS")  # fmt: skip
    return plain_table(title, columns, rows, left=4)


def _scaled(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"
