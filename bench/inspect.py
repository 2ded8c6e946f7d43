"""Inspection without a GPU: what each way of compiling a kernel costs, and which floor binds it.

``inspect`` compiles points ahead of time, in child processes, in parallel, and caches the results on
disk. An ``Inspection`` holds registers, spills, shared memory, occupancy, the matrix instructions, and
the SASS instructions that the hot loop spends per value; ``floors`` puts these beside a GPU's memory
and matrix rates: a streaming kernel is bound by the slowest of bytes, matrix flops and instruction
issue. What fails to compile, or fails a check of its point, is a finding.

Never imports triton: only the child process does.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.compile_point import CompilePoint, tasks_of
from .gpus import Gpu
from .inspect_cache import Cache, cache_folder, toolchain
from .inspect_child import ARCHS, CHILD_TIMEOUT_S, Children
from .sass import WARP_SIZE, Loop, hot_loop
from .sm_limits import SM_CLOCKS, Occupancy, issue_rate, occupancy

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    ``kind`` is exception, abort or timeout where there is no code; else spills, expect, instructions (too
    many per value, or not to be counted), work (the point's values or flops are not the kernel's), fit (no
    CTA fits on an SM) or ptxas (its own performance warning).
    """

    kind: str
    text: str


@dataclass(frozen=True)
class HotLoop:
    """A loop that every trip runs, the warps of a program that run it, and their partition ("" without one)."""

    loop: Loop
    num_warps: int
    partition: str = ""


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave.

    Attributes:
        num_warps: warps of one CTA, those of all partitions included.
        shared_bytes: per CTA, static and dynamic, with the 1 KiB that the system keeps.
        tensor_memory_columns: tcgen05's, per CTA.
        matrix, ptx_matrix: every matrix instruction of the kernel and how often it stands there.
        hot: the loops that one trip runs: one, or one per working partition of a warp-specialised kernel.
        trips: trips of the source's loop that one trip of the compiled loop does (unrolling).
        instructions_per_value: thread instructions of ``hot`` per value; None where they cannot be counted.
        loops: every loop found, hot or not.
        sass_unreadable: why there is no SASS to count in; "" where there is.
    """

    triton: str
    ptxas: str
    num_warps: int
    num_ctas: int
    registers: int
    stack_bytes: int
    local_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    ptxas_warnings: tuple[str, ...]
    sass_unreadable: str
    matrix: dict[str, int]
    ptx_matrix: dict[str, int]
    loops: tuple[Loop, ...]
    hot: tuple[HotLoop, ...]
    trips: float
    instructions_per_value: float | None
    occupancy: Occupancy

    @property
    def spill_bytes(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes


@dataclass(frozen=True)
class Inspection:
    """One point on one architecture. ``compiled`` is None where it did not compile; ``notes`` say how to read it."""

    point: CompilePoint
    arch: str
    compiled: Compiled | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    cached: bool = False


@dataclass(frozen=True)
class Floors:
    """Least seconds per value on one GPU, of each kind; None: unknown.

    ``budget`` is how many thread instructions may be spent per value, at 100 % issue, while the values
    arrive at full bandwidth; ``binds`` the largest floor known.
    """

    gpu: str
    bytes_s: float
    matrix_s: float
    issue_s: float | None
    budget: float | None
    binds: str
    clock_source: str


def floors(inspection: Inspection, gpu: Gpu, clock_hz: float | None = None) -> Floors:
    """The three floors of an inspected point on ``gpu``; ``clock_hz`` overrides ``SM_CLOCKS``.

    Raises:
        ValueError: the code is for another architecture, or the GPU has no units of the point's matrix rate.
    """
    if "sm_" + gpu.compute_capability.replace(".", "") != inspection.arch:
        raise ValueError(f"gpu: expected one of {inspection.arch}; got {gpu.name} ({gpu.compute_capability})")
    point, compiled, rate = inspection.point, inspection.compiled, issue_rate(gpu, clock_hz)
    bytes_s = point.bits_per_value / 8 / gpu.memory_bytes_per_s
    matrix_s = point.flops_per_value and point.flops_per_value / gpu.matrix_flops_per_s(point.matrix_rate)
    spent = compiled.instructions_per_value if compiled else None
    issue_s = spent / rate if spent is not None and rate else None
    known = {"bytes": bytes_s, "matrix": matrix_s, "issue": issue_s or 0.0}
    source = "given" if clock_hz else SM_CLOCKS[gpu.name].source if rate else "unknown"
    budget = bytes_s * rate if rate else None
    return Floors(gpu.name, bytes_s, matrix_s, issue_s, budget, max(known, key=lambda kind: known[kind]), source)


def _work(loops: Iterable[Loop]) -> int:
    """Matrix instructions of these loops, or their loads where they have none: what unrolling multiplies."""
    loops = list(loops)
    return sum(loop.num_matrix for loop in loops) or sum(loop.loads for loop in loops)


def _find_hot(facts: dict[str, Any], notes: list[str]) -> tuple[list[HotLoop], list[Loop]]:
    """The hot loops of the SASS, and of the PTX."""
    loops, ptx_loops = ([Loop(**each) for each in facts[name]] for name in ("loops", "ptx_loops"))
    if parts := facts["partitions"]:
        hot = []
        for loop in loops:
            alike = [part for part in parts if (part["matrix"] if loop.matrix else part["loads"])]
            if (loop.matrix or loop.loads) and alike:
                warps = max(part["num_warps"] for part in alike)
                if len({part["num_warps"] for part in alike}) > 1:
                    notes.append(
                        f"a loop may belong to {', '.join(part['name'] for part in alike)}: {warps} warps counted"
                    )
                hot.append(HotLoop(loop, warps, " or ".join(part["name"] for part in alike)))
        notes.append(f"warp-specialised: {len(hot)} loops of {len(parts)} partitions counted together")
        return hot, [loop for loop in ptx_loops if loop.matrix or loop.loads]
    found, ptx_found = hot_loop(loops), hot_loop(ptx_loops)
    if found and facts["matrix"] and not found.matrix:
        notes.append("no loop holds a matrix instruction")
        found = None
    elif not found and not facts["matrix"] and facts["whole"]:
        notes.append("no loop: the whole kernel counts as one trip")
        return [HotLoop(Loop(**facts["whole"]), facts["num_warps"])], []
    elif found and sum(each.num_matrix > 0 for each in loops) > 1:
        notes.append("several loops hold matrix instructions: the one with most matrix work counts")
    return [HotLoop(found, facts["num_warps"])] if found else [], [ptx_found] if ptx_found else []


def _count_trips(
    hot: list[HotLoop], ptx_hot: list[Loop], point: CompilePoint, num_ctas: int, findings: list[Finding]
) -> float:
    """Source trips in one compiled trip: by the matrix flops the names tell, else against the PTX."""
    flops = [(each.loop.matrix_flops(), each.num_warps) for each in hot]
    issued = sum((each or 0) * warps for each, warps in flops) * num_ctas
    if issued and point.flops_per_value and all(each is not None for each, _ in flops):
        trips = issued / (point.values_per_iteration * point.flops_per_value)
        if abs(trips - round(trips)) > 0.01 or trips < 0.5:
            text = f"a trip of the hot loop does {trips:.3g} x the point's matrix flops: its values or flops are wrong"
            findings.append(Finding("work", text))
        return trips
    in_ptx = _work(ptx_hot)
    return _work(each.loop for each in hot) / in_ptx if in_ptx else 1.0


def _loop_notes(hot: list[HotLoop], trips: float, matrix: dict[str, int], notes: list[str]) -> None:
    if hot and abs(trips - 1) > 0.01:
        notes.append(f"the hot loop is unrolled: {trips:.3g} trips of the source's loop in one")
    for each in hot:
        loop = each.loop
        for count, what in (
            (loop.conditional, "more under branches without matrix work or loads, not counted"),
            (loop.inner, "in loops inside it, counted once"),
            (loop.calls, "calls, whose callees are not counted"),
        ):
            if count:
                notes.append(f"hot loop{f' ({each.partition})' if each.partition else ''}: {count} {what}")
    outside = sum(matrix.values()) - sum(each.loop.num_matrix for each in hot)
    if hot and outside:
        notes.append(
            f"{outside} of {sum(matrix.values())} matrix instructions stand outside the hot loop (peeled trips)"
        )


def read_facts(point: CompilePoint, arch: str, facts: dict[str, Any], cached: bool = False) -> Inspection:
    """The inspection that a child's facts give, checked against what the point expects."""
    findings: list[Finding] = []
    notes: list[str] = []
    hot, ptx_hot = _find_hot(facts, notes)
    trips = _count_trips(hot, ptx_hot, point, facts["num_ctas"], findings) if hot else 1.0
    _loop_notes(hot, trips, facts["matrix"], notes)
    threads = WARP_SIZE * facts["num_ctas"]
    issued = sum(each.loop.instructions * each.num_warps for each in hot) * threads
    plain = {each.name for each in dataclasses.fields(Compiled)} & facts.keys()
    compiled = Compiled(
        **{name: facts[name] for name in plain - {"loops", "ptxas_warnings"}},
        ptxas_warnings=tuple(facts["ptxas_warnings"]),
        loops=tuple(Loop(**each) for each in facts["loops"]),
        hot=tuple(hot),
        trips=trips,
        instructions_per_value=issued / (point.values_per_iteration * trips) if hot else None,
        occupancy=occupancy(
            arch, facts["num_warps"], facts["registers"], facts["shared_bytes"], facts["tensor_memory_columns"]
        ),
    )
    if compiled.sass_unreadable:
        notes.append(f"no SASS to count in: {compiled.sass_unreadable}")
    if compiled.stack_bytes and not compiled.spill_bytes:
        notes.append(f"{compiled.stack_bytes} bytes of stack without spills")
    return Inspection(point, arch, compiled, (*findings, *_check(point, compiled)), tuple(notes), cached)


def _check(point: CompilePoint, compiled: Compiled) -> Iterable[Finding]:
    if compiled.spill_bytes:
        yield Finding(
            "spills", f"{compiled.spill_store_bytes} bytes of spill stores, {compiled.spill_load_bytes} of spill loads"
        )
    if point.expect:
        in_hot = [name for each in compiled.hot for name in each.loop.matrix]
        names = [*(in_hot or compiled.matrix), *compiled.ptx_matrix]
        if not any(re.search(point.expect, name) for name in names):
            yield Finding(
                "expect", f"expected a matrix instruction like {point.expect!r}; got {', '.join(names) or 'none'}"
            )
    limit, spent = point.max_instructions_per_value, compiled.instructions_per_value
    if limit is not None and (spent is None or spent > limit):
        got = "an unknown number" if spent is None else f"{spent:.2f}"
        yield Finding("instructions", f"expected at most {limit:g} instructions per value; got {got}")
    if not compiled.occupancy.ctas_per_sm:
        yield Finding("fit", f"no CTA fits on an SM: {compiled.occupancy.limited_by}")
    for warning in compiled.ptxas_warnings:
        if "Potential Performance Loss" in warning:
            yield Finding("ptxas", warning)


Numbered = tuple[int, dict[str, Any]]
Compile = Callable[[Sequence[Numbered]], Generator[Numbered, None, None]]
"""Compiles numbered jobs somewhere; yields (number, answer as ``Child.ask`` gives it) as they are done."""


def compile_here(jobs: int | None, timeout_s: float) -> Compile:
    """``jobs`` processes of this machine at a time; None: one per core."""

    def compile_all(waiting: Sequence[Numbered]) -> Generator[Numbered, None, None]:
        children = Children()
        with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            try:
                futures = {pool.submit(children.ask, job, timeout_s): index for index, job in waiting}
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                children.close()

    return compile_all


def inspect(
    points: Iterable[CompilePoint],
    archs: Sequence[str] = tuple(ARCHS),
    *,
    jobs: int | None = None,
    timeout_s: float = CHILD_TIMEOUT_S,
    compile_all: Compile | None = None,
    use_cache: bool = True,
    cache_dir: Path | None = None,
    progress: Callable[[int, int, Inspection], None] | None = None,
) -> list[Inspection]:
    """Inspects every point on every one of ``archs`` that it is for; the results are in that order.

    Args:
        jobs: compiling processes at a time; None: one per core.
        compile_all: where to compile instead; then ``jobs`` and ``timeout_s`` are not used.
        cache_dir: None: ``inspect`` in ``TOKENFAB_CACHE`` or in tokenfab's folder of the platform.
        progress: called in this thread with (done, total, inspection) as each is done.

    Raises:
        ValueError: an unknown architecture, two points of one name.
        RuntimeError: no Triton is installed.
    """
    for arch in archs:
        if arch not in ARCHS:
            raise ValueError(f"archs: expected some of {', '.join(ARCHS)}; got {arch!r}")
    tasks = tasks_of(points, archs)
    if len({(point.name, arch) for point, arch in tasks}) < len(tasks):
        names = [f"{point.name} on {arch}" for point, arch in tasks]
        raise ValueError(f"points: expected names once; got {max(names, key=names.count)} twice")
    cache = Cache(cache_dir or cache_folder() / "inspect", toolchain())
    done: dict[int, Inspection] = {}

    def finish(index: int, inspection: Inspection) -> None:
        done[index] = inspection
        if progress:
            progress(len(done), len(tasks), inspection)

    waiting: list[tuple[int, dict[str, Any]]] = []
    for index, (point, arch) in enumerate(tasks):
        job = {**point.compiler_inputs(), "arch": arch}
        facts = cache.get(job) if use_cache else None
        if facts:
            finish(index, read_facts(point, arch, facts, cached=True))
        else:
            waiting.append((index, job))
    waiting.sort(key=lambda each: each[1]["module"])  # one process serves one module
    job_of = dict(waiting)
    with closing((compile_all or compile_here(jobs, timeout_s))(waiting)) as answers:
        for index, answer in answers:
            point, arch = tasks[index]
            if "failure" in answer:
                failed = Finding(answer["failure"], answer["text"])
                finish(index, Inspection(point, arch, None, (failed,)))
                continue
            if use_cache:
                cache.put(job_of[index], answer)
            finish(index, read_facts(point, arch, answer["facts"]))
    return [done[index] for index in range(len(tasks))]


def _on(inspection: Inspection, gpus: Iterable[Gpu]) -> list[Floors]:
    fitting = [gpu for gpu in gpus if "sm_" + gpu.compute_capability.replace(".", "") == inspection.arch]
    return [floors(inspection, gpu) for gpu in fitting]


def rows(inspections: Iterable[Inspection], gpus: Sequence[Gpu] = ()) -> list[dict[str, str]]:
    """Rows of a table for people: one per inspection and GPU of its architecture, or one without floors."""
    found = []
    for each in inspections:
        compiled = each.compiled
        row = {"kernel": each.point.name, "arch": each.arch}
        if compiled:
            spent, names = compiled.instructions_per_value, [name for hot in compiled.hot for name in hot.loop.matrix]
            row |= {
                "registers": str(compiled.registers),
                "spill bytes": str(compiled.spill_bytes),
                "shared KiB": f"{compiled.shared_bytes / 1024:.1f}",
                "CTAs/SM": f"{compiled.occupancy.ctas_per_sm} ({compiled.occupancy.limited_by})",
                "matrix": ", ".join(dict.fromkeys(names or compiled.matrix or compiled.ptx_matrix)),
                "instr/value": "?" if spent is None else f"{spent:.2f}",
            }
        verdict = "; ".join(f"{finding.kind}: {finding.text.splitlines()[0]}" for finding in each.findings) or "ok"
        for floor in (_on(each, gpus) if compiled else []) or [None]:
            bound = {} if floor is None else {
                "GPU": floor.gpu,
                "budget": "?" if floor.budget is None else f"{floor.budget:.1f}",
                "bytes ps": f"{floor.bytes_s * 1e12:.3f}",
                "matrix ps": f"{floor.matrix_s * 1e12:.3f}",
                "issue ps": "?" if floor.issue_s is None else f"{floor.issue_s * 1e12:.3f}",
                "bound by": floor.binds,
            }  # fmt: skip
            found.append({**row, **bound, "findings": verdict})
    return found


def document(inspections: Iterable[Inspection], gpus: Sequence[Gpu] = ()) -> dict[str, Any]:
    """The inspections as JSON holds them, each with its floors on the GPUs of its architecture."""
    return {
        "schema_version": SCHEMA_VERSION,
        "inspections": [
            {
                **dataclasses.asdict(each),
                "floors": [dataclasses.asdict(floor) for floor in (_on(each, gpus) if each.compiled else [])],
            }
            for each in inspections
        ],
    }
