"""What the published tables hold, and the time of one op across stacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from .gpus import Gpu, get_gpu
from .ops import Experts, Gemm, MlaAttention, Op, PagedAttention
from .prefill_ops import ContextAttention, MlaContext
from .prefill_tables import PREFILL_TABLES
from .published import STACKS, PublishedData
from .published_tables import TABLES

OP_KINDS: dict[str, type[Op]] = {
    "gemm": Gemm, "moe": Experts, "attention": PagedAttention, "mla": MlaAttention,
    "context_attention": ContextAttention, "mla_context": MlaContext,
}  # fmt: skip


def inventory(data: PublishedData, gpu: Gpu) -> list[dict[str, Any]]:
    """One row per stack and table: the version used, its rows, its kernels.

    Raises:
        ValueError: no tables for this GPU.
    """
    found: list[dict[str, Any]] = []
    for name in STACKS:
        stack = data.stack(gpu, name)
        seen = set()
        for table in (*TABLES, *PREFILL_TABLES):
            files = data.files(gpu, stack, table)
            if not files or table.file in seen:
                continue
            seen.add(table.file)
            version, path = files[0]
            rows = data.rows(path, table)
            found.append(
                {
                    "gpu": gpu.name,
                    "stack": str(stack),
                    "table": table.name,
                    "version": version,
                    "rows": rows.num_rows,
                    "kernels": rows.kernel_names,
                }
            )
    return found


def parse_op(kind: str, assignments: Sequence[str]) -> Op:
    """An op from ``FIELD=VALUE`` texts.

    Raises:
        ValueError: an unknown, missing, repeated or malformed field.
    """
    made = OP_KINDS[kind]
    known = {field.name: field for field in fields(made)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for text in assignments:
        name, separator, value = text.partition("=")
        if not separator or name not in known:
            raise ValueError(f"{kind}: expected FIELD=VALUE with a field of {', '.join(known)}; got {text!r}")
        if name in values:
            raise ValueError(f"{kind}: {name} is given twice")
        values[name] = value if known[name].type == "str" else _size(name, value)
    missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"{kind}: missing {', '.join(missing)}")
    op = made(**values)
    op.bytes  # noqa: B018 - an unknown format is an error here, not later
    return op


def _size(name: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number; got {text!r}") from None
    if value < 1:
        raise ValueError(f"{name}: expected at least 1; got {value}")
    return value


def op_timings(
    data: PublishedData, kind: str, assignments: Sequence[str], gpu_name: str, stacks: Sequence[str]
) -> list[dict[str, Any]]:
    """The time of one op in each stack, beside its floor."""
    op, gpu = parse_op(kind, assignments), get_gpu(gpu_name)
    floor_s = op.floor_s(gpu)
    rows = []
    for spec in stacks:
        stack = data.stack(gpu, spec)
        timing = data.time(op, gpu, stack)
        rows.append(
            {
                "gpu": gpu.name,
                "stack": str(stack),
                "op": kind,
                "shape": op.shape(),
                "time_s": timing.time_s,
                "floor_s": floor_s,
                "provenance": timing.provenance,
                "source": timing.source,
            }
        )
    return rows
