"""The gate that needs no GPU: what a kernel compiles to, against a committed baseline.

A kernel fails that spills more, has lost a kind of matrix instruction (FP8 that fell back to BF16), spends more
instructions per value in its hot loop or has a higher floor on a GPU, by more than ``MAX_GROWTH``, or no longer
compiles. What cannot be set beside the baseline is ``inconclusive``: another Triton, a point that one side lacks.

The baseline holds a digest of what each point was compiled from (``inspect_keys``): while that is the same, so are its
facts, and ``unchanged`` tells which points need no compiling.

Facts are those of ``inspect``; the baseline is JSON, one file per release of Triton, since each compiles differently.

Errors: ``BaselineError`` naming the file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..kernels.compile_point import Task
from .gate import Result
from .gpus import Gpu, get_gpu
from .inspect import Inspection, floors
from .inspect_keys import Digests, digests

SCHEMA_VERSION = 1
MAX_GROWTH = 0.05
"""Of instructions per value, and of the floor that binds."""
BASELINE_GPUS = ("h100", "h200", "b200", "rtx_pro_6000")
FOLDER = Path(__file__).with_name("recorded")
_MAX_BYTES = 64 << 20

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e30)]


class BaselineError(ValueError):
    """A baseline that is missing or not what it should be; names the file."""


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one point on one architecture compiled to.

    Attributes:
        matrix: kinds of matrix instruction in the hot loop, without their sizes; sorted.
        instructions_per_value: None where they cannot be counted.
        floor_s: GPU to the largest floor, in seconds per value. bound_by: which that is.
        findings: what inspection found wrong, its kinds.
        digest: of what it was compiled from; "" where that is unknown.
    """

    registers: Count
    spill_bytes: Count
    shared_bytes: Count
    ctas_per_sm: Count
    matrix: tuple[str, ...]
    instructions_per_value: Positive | None
    floor_s: dict[str, Positive]
    bound_by: dict[str, str]
    findings: tuple[str, ...] = ()
    digest: str = ""


class Baseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file. ``toolchain``: ``inspect_cache.toolchain``; ``points``: "NAME@ARCH" to facts, a name without its tile."""

    schema_version: int
    toolchain: dict[str, str]
    points: dict[str, Facts]


@dataclass(frozen=True)
class InspectRow:
    """One point that fails, is inconclusive, or got better; ``reason`` says in which fact."""

    name: str
    result: Result
    reason: str


def instruction_kind(name: str) -> str:
    """``name`` without its sizes: "HGMMA.64x16x16.F32.BF16" is "HGMMA.F32.BF16", whatever the tile."""
    parts = [part for part in name.split(".") if not re.fullmatch(r"\d+(x\d+)*|[mnk]\d+([mnk]\d+)*", part)]
    return ".".join(parts)


def facts_of(inspection: Inspection, gpus: Sequence[Gpu] | None = None, digest: str = "") -> Facts | None:
    """The facts of an inspection; None where it did not compile."""
    compiled = inspection.compiled
    if compiled is None:
        return None
    names = [name for hot in compiled.hot for name in hot.loop.matrix] or [*compiled.matrix, *compiled.ptx_matrix]
    chosen = [get_gpu(name) for name in BASELINE_GPUS] if gpus is None else gpus
    found = [
        floors(inspection, gpu) for gpu in chosen if "sm_" + gpu.compute_capability.replace(".", "") == inspection.arch
    ]
    return Facts(
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        shared_bytes=compiled.shared_bytes,
        ctas_per_sm=compiled.occupancy.ctas_per_sm,
        matrix=tuple(sorted({instruction_kind(name) for name in names})),
        instructions_per_value=compiled.instructions_per_value or None,
        floor_s={each.gpu: max(each.bytes_s, each.matrix_s, each.issue_s or 0.0) for each in found},
        bound_by={each.gpu: each.binds for each in found},
        findings=tuple(sorted({finding.kind for finding in inspection.findings})),
        digest=digest,
    )


def unchanged(baseline: Baseline, toolchain: dict[str, str], tasks: Iterable[Task]) -> dict[tuple[str, str], Facts]:
    """(a point's name, architecture) to its facts, of those that would be compiled from what the baseline's were.

    Raises:
        RuntimeError: as ``inspect_keys.digests``.
    """
    if baseline.toolchain != toolchain:
        return {}
    found = {}
    for (name, arch), digest in digests(tasks).items():
        facts = baseline.points.get(_plain_name(name, arch))
        if facts is not None and facts.digest == digest:
            found[name, arch] = facts
    return found


def baseline_of(
    inspections: Iterable[Inspection], toolchain: dict[str, str], known: Baseline | None = None,
    made: Digests | None = None,
) -> Baseline:  # fmt: skip
    """A baseline of these, in place of those of ``known``, whose others stay; ``made``: of what.

    Raises:
        ValueError: one did not compile, or ``known`` is of another toolchain.
    """
    if known is not None and known.toolchain != toolchain:
        raise ValueError(f"toolchain: expected the baseline's, {known.toolchain}; got {toolchain}")
    fresh: dict[str, Facts] = {}
    for each in inspections:
        facts = facts_of(each, digest=(made or {}).get((each.point.name, each.arch), ""))
        if facts is None:
            raise ValueError(f"{_name(each)}: expected what compiles; got {each.findings[0].text}")
        if _name(each) in fresh:
            raise ValueError(f"points: expected names that differ in more than the tile; got {_name(each)} twice")
        fresh[_name(each)] = facts
    points = {**(known.points if known else {}), **fresh}
    return Baseline(schema_version=SCHEMA_VERSION, toolchain=toolchain, points=points)


def _plain_name(name: str, arch: str) -> str:
    """The point without its tile, which may be edited: "gemm/mxfp4-bf16/m16@sm_90" of ".../m16-16x256"."""
    return re.sub(r"-\d+(x\d+)?(?=/|$)", "", name) + f"@{arch}"


def _name(inspection: Inspection) -> str:
    return _plain_name(inspection.point.name, inspection.arch)


def judge_inspections(
    baseline: Baseline, inspections: Iterable[Inspection], toolchain: dict[str, str], *, whole: Sequence[str] = (),
    same: Iterable[tuple[str, str]] = (), max_growth: float = MAX_GROWTH,
) -> list[InspectRow]:  # fmt: skip
    """What changed against ``baseline``, worst first; nothing where nothing did.

    Args:
        whole: architectures of which ``inspections`` are all there are, so that a point of theirs that only the
            baseline has is missing.
        same: (name, architecture) of points that were not inspected, being ``unchanged``.
    """
    if baseline.toolchain != toolchain:
        got = "; ".join(f"{name} {text!r}, {baseline.toolchain.get(name)!r} in the baseline"
                        for name, text in toolchain.items() if baseline.toolchain.get(name) != text)  # fmt: skip
        return [InspectRow("toolchain", "inconclusive", f"expected the baseline's; got {got or 'fewer tools'}")]
    rows: list[InspectRow] = []
    seen = {_plain_name(*each) for each in same}
    for each in inspections:
        name = _name(each)
        seen.add(name)
        before, after = baseline.points.get(name), facts_of(each)
        if after is None:
            rows.append(InspectRow(name, "fail", f"does not compile: {each.findings[0].kind}: {each.findings[0].text}"))
        elif before is None:
            rows.append(_judge_new(name, after))
        else:
            rows += _judge(name, before, after, max_growth)
    gone = [name for name in baseline.points if name not in seen and name.rpartition("@")[2] in whole]
    rows += [InspectRow(name, "inconclusive", "only in the baseline: renamed or gone") for name in gone]
    if not seen:
        rows.append(InspectRow("points", "inconclusive", "nothing was inspected"))
    return sorted(rows, key=lambda row: ("fail", "inconclusive", "pass").index(row.result))


def _judge_new(name: str, after: Facts) -> InspectRow:
    if after.findings:
        return InspectRow(name, "fail", f"not in the baseline, with findings: {', '.join(after.findings)}")
    return InspectRow(name, "inconclusive", "not in the baseline: renamed or new")


def _judge(name: str, before: Facts, after: Facts, max_growth: float) -> list[InspectRow]:
    worse: list[str] = []
    better: list[str] = []
    if after.spill_bytes != before.spill_bytes:
        text = f"{after.spill_bytes} bytes of spills, {before.spill_bytes} before"
        (worse if after.spill_bytes > before.spill_bytes else better).append(text)
    if lost := sorted(set(before.matrix) - set(after.matrix)):
        worse.append(f"lost {', '.join(lost)}, has {', '.join(after.matrix) or 'no matrix instruction'}")
    if new := sorted(set(after.findings) - set(before.findings) - {"spills"}):
        worse.append(f"new findings: {', '.join(new)}")
    spent, had = after.instructions_per_value, before.instructions_per_value
    if spent is None or had is None:
        if spent is not had:
            worse.append(f"instructions per value: {spent or 'not to be counted'}, {had or 'not to be counted'} before")
    else:
        _grown(f"{spent:.2f} instructions per value, {had:.2f} before", spent / had, max_growth, worse, better)
    for gpu, floor_s in before.floor_s.items():
        now_s = after.floor_s.get(gpu)
        if now_s is None:
            worse.append(f"no floor on {gpu}")
            continue
        bound = after.bound_by[gpu]
        text = f"floor on {gpu} {now_s * 1e12:.3f} ps per value (bound by {bound}), {floor_s * 1e12:.3f} before"
        _grown(text, now_s / floor_s, max_growth, worse, better)
    if worse:
        return [InspectRow(name, "fail", "; ".join(worse))]
    return [InspectRow(name, "pass", "better: " + "; ".join(better))] if better else []


def _grown(text: str, ratio: float, limit: float, worse: list[str], better: list[str]) -> None:
    if ratio > 1 + limit:
        worse.append(text)
    elif ratio < 1 - limit:
        better.append(text)


def verdict(rows: Iterable[InspectRow]) -> Result:
    """Of all rows together."""
    words = {row.result for row in rows}
    return "fail" if "fail" in words else "inconclusive" if "inconclusive" in words else "pass"


def lines(rows: Sequence[InspectRow], num_points: int, num_same: int = 0) -> list[str]:
    """Every row, and the verdict in one line."""
    listed = [f"{row.result}: {row.name}: {row.reason}" for row in rows]
    same = f", {num_same} made from what the baseline's were" if num_same else ""
    return [*listed, f"gate: {verdict(rows)}, {num_points} points inspected{same}"]


# -- files -----------------------------------------------------------------------------------------


def baseline_path(toolchain: dict[str, str], folder: Path = FOLDER) -> Path:
    """Where the baseline of a release of Triton lies."""
    return folder / f"inspection-triton-{toolchain['triton']}.json"


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file.

    Raises:
        BaselineError: missing, a link, too large, truncated, NaN, an unknown field, a later schema.
    """
    if path.is_symlink() or not path.is_file():
        known = ", ".join(sorted(each.name for each in path.parent.glob("inspection-*.json"))) or "none"
        raise BaselineError(f"{path}: expected a baseline; found none (beside it: {known})")
    if path.stat().st_size > _MAX_BYTES:
        raise BaselineError(f"{path}: expected at most {_MAX_BYTES} bytes; got {path.stat().st_size}")
    try:
        baseline = msgspec.json.decode(path.read_bytes(), type=Baseline)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BaselineError(f"{path}: expected a baseline; {error}") from None
    if baseline.schema_version != SCHEMA_VERSION:
        got = baseline.schema_version
        raise BaselineError(f"{path}: schema_version: expected {SCHEMA_VERSION}; got {got}")
    return baseline


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes the file whole, or leaves the old one."""
    fields: dict[str, Any] = msgspec.to_builtins(baseline)
    fields["points"] = dict(sorted(fields["points"].items()))
    text = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in fields["points"].items())
    head = {name: value for name, value in fields.items() if name != "points"}
    text = json.dumps(head)[:-1] + ', "points": {\n' + text + "\n}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        part.write(text)
        part.flush()
        os.fsync(part.fileno())
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)
