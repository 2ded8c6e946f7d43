"""Whether every kernel that a GPU has is right on it, before any is timed; and what compute-sanitizer says of them.

Of each kernel, at modest shapes: the timing core's own check (``case.Checker``: every call onto poison, a reference
computed after the launch, inputs untouched, a graph replayed on inputs that changed after its capture); then, in bits,
that an eager call equals the graph's replay, and that each of ``REPEATS`` replays onto poison equals the first.

Results are appended to a file of lines as they come, and name the kernel's version and the GPU with its software: what
is there is not done again.

Errors: ``ValueError`` naming file and line for a file that is not what it should be.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..kernels.registry import KERNELS, Kernel, Shape
from .device import Device, DeviceProperties, MethodUnavailable
from .gpus import Gpu
from .lab import Journal, append_line
from .summaries import kernel_hash
from .targets import capability

REPEATS = 100
_SEED = 7

_GQA = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "page_size": 64}
_MLA = {"num_heads": 16, "kv_lora_rank": 512, "rope_dim": 64, "page_size": 64}
_EXPERTS = {"hidden": 512, "inter": 256, "top_k": 4, "num_experts": 32, "load": 120}
MODEST_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "gemm": ({"m": 3, "n": 1032, "k": 2048}, {"m": 64, "n": 2112, "k": 1536}, {"m": 300, "n": 512, "k": 7168}),
    "moe": ({"num_tokens": 4, "ep": 1} | _EXPERTS, {"num_tokens": 257, "ep": 4} | _EXPERTS),
    "attention": (
        {"batch": 7, "length": 1999, "window": 0, "q_len": 1} | _GQA,
        {"batch": 3, "length": 700, "window": 128, "q_len": 3} | _GQA,
    ),
    "mla": ({"batch": 5, "length": 1999, "q_len": 1} | _MLA, {"batch": 2, "length": 300, "q_len": 2} | _MLA),
    "rope_append": ({"num_tokens": 67} | _GQA,),
    "mla_append": ({"num_tokens": 67} | _MLA,),
    **{
        op: ({"rows": 5, "columns": 2880}, {"rows": 257, "columns": 7168})
        for op in ("quantize", "rms_norm_quantize", "swiglu_quantize")
    },
}
"""Tails and several programs, seconds at most: every size that a kernel treats apart is the tests' matter."""


class KernelCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of one kernel at one shape. ``skipped``: why it could not run here; no ``problems``, no skip: right.

    ``how``: "lab", or the sanitizer's tool. ``version``: the kernel's hash and the software around it.
    """

    how: str
    kernel: str
    shape: dict[str, int]
    version: str
    problems: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def key(self) -> str:
        return msgspec.json.encode((self.how, self.kernel, self.shape, self.version), order="deterministic").decode()

    @property
    def verdict(self) -> str:
        return f"skipped: {self.skipped}" if self.skipped else "; ".join(self.problems) or "ok"


def kernels_of(gpu: Gpu) -> list[Kernel]:
    """The registry's kernels that this GPU has the units for."""
    return [kernel for kernel in KERNELS if kernel.min_capability <= capability(gpu)]


def version_of(kernel: Kernel, properties: DeviceProperties) -> str:
    """Kernel and whatever else decides its machine code."""
    parts = (kernel_hash(kernel, properties)[:16], properties.uuid, properties.driver, properties.torch)
    return " ".join((*parts, properties.triton))


def verify(
    kernel: Kernel, shape: Shape, gpu: Gpu, device: Device, *, repeats: int = REPEATS, buffers_on: Any = "cuda"
) -> tuple[str, ...]:
    """What is wrong with a kernel at a shape; empty where nothing is.

    Raises:
        MethodUnavailable: it cannot be captured.
    """
    from .case import Checker, make_sets
    from .cases import make_case

    case = make_case(kernel, shape, gpu, buffers_on)
    sets = make_sets(case, device, "hot", 1, _SEED)
    checker, buffers = Checker(case, device, sets, _SEED), sets[0]
    before = checker.before()
    if not before.passed_before:
        return before.problems
    graph = device.capture(checker.calls(1))
    problems = list(checker.after(before, [graph]).problems)
    replayed = case.checksum(buffers.output)  # of the inputs that came after the capture
    device.poison(buffers.output)
    case.launch(*buffers)
    device.synchronize()
    if case.checksum(buffers.output) != replayed:
        problems.append("graph: its replay on new inputs differs in bits from an eager call")
    for index in range(repeats):
        device.poison(buffers.output)
        graph.launch()
        device.synchronize()
        if case.checksum(buffers.output) != replayed:
            problems.append(f"repeats: replay {index + 1} of {repeats} differs in bits from the first")
            break
    return tuple(problems)


class CheckFile:
    """Results, one JSON line each, appended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[KernelCheck]:
        """In order; a last line without an end is left out.

        Raises:
            ValueError: another line that is none.
        """
        if not self.path.exists():
            return []
        *whole, _ = self.path.read_bytes().split(b"\n")
        found = []
        for number, line in enumerate(whole, 1):
            try:
                found.append(msgspec.json.decode(line, type=KernelCheck))
            except msgspec.MsgspecError as error:
                raise ValueError(f"{self.path}:{number}: expected the check of a kernel; {error}") from None
        return found

    def append(self, check: KernelCheck) -> None:
        append_line(self.path, msgspec.json.encode(check))


def run_checks(
    kernels: Sequence[Kernel],
    gpu: Gpu,
    device: Device,
    file: CheckFile,
    *,
    allows: Callable[[], bool] = lambda: True,
    journal: Journal | None = None,
    shapes: Mapping[str, Sequence[Shape]] = MODEST_SHAPES,
    repeats: int = REPEATS,
    buffers_on: Any = "cuda",
    done: Callable[[KernelCheck], None] = lambda check: None,
) -> list[KernelCheck]:
    """Checks what has no result yet, as long as ``allows`` says so; returns all results of these kernels.

    A kernel that raises is a result too, and then the error is raised: the device may be lost to this process.
    """
    known = {check.key: check for check in file.read()}
    found, dead = [], journal.died() if journal else set()
    for kernel in kernels:
        for shape in shapes[kernel.op]:
            version = version_of(kernel, device.properties)
            check = KernelCheck(how="lab", kernel=kernel.name, shape=dict(shape), version=version)
            if check.key in known:
                found.append(known[check.key])
                continue
            if not allows():
                return found
            if check.key in dead:
                check = msgspec.structs.replace(check, problems=("died: its process ended without a result",))
            else:
                check = _checked(check, kernel, shape, gpu, device, file, journal, repeats, buffers_on)
            file.append(check)
            found.append(check)
            done(check)
    return found


def _checked(
    check: KernelCheck, kernel: Kernel, shape: Shape, gpu: Gpu, device: Device, file: CheckFile,
    journal: Journal | None, repeats: int, buffers_on: Any,
) -> KernelCheck:  # fmt: skip
    if journal:
        journal.write("begin", check.key)
    try:
        problems = verify(kernel, shape, gpu, device, repeats=repeats, buffers_on=buffers_on)
        check = msgspec.structs.replace(check, problems=problems)
    except (MethodUnavailable, MemoryError) as error:
        check = msgspec.structs.replace(check, skipped=str(error))
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        file.append(msgspec.structs.replace(check, problems=(f"raised: {type(error).__name__}: {line}",)))
        raise  # begun and not ended: the next process goes on behind it
    if journal:
        journal.write("end", check.key)
    return check


# -- sanitizers ------------------------------------------------------------------------------------

SANITIZERS = ("memcheck", "racecheck")
_FAILED = 86
_ERROR = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: (\d+))", re.M)


def sanitize_command(executable: str, tool: str, kernel: Kernel) -> list[str]:
    """One small launch of a kernel in a process of its own, under a tool of compute-sanitizer."""
    own = [sys.executable, "-m", "tokenfab.bench.lab_checks", kernel.name]
    return [executable, "--tool", tool, "--error-exitcode", str(_FAILED), "--print-limit", "3", *own]


def sanitizer_problems(returncode: int, output: str) -> tuple[str, ...]:
    """What a tool's run says: empty where it found nothing.

    Raises:
        MethodUnavailable: it has no summary: the tool, not the kernel, failed.
    """
    counts = [int(part) for pair in _ERROR.findall(output) for part in pair if part]
    if not counts:
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise MethodUnavailable(f"compute-sanitizer: exit code {returncode} without a summary: {last}")
    if sum(counts) == 0 and returncode == 0:
        return ()
    lines = [line.lstrip("= ") for line in output.splitlines() if re.match(r"=+ +(Invalid|Error|Warning|Race)", line)]
    said = "; ".join(lines[:3])
    return (f"{sum(counts)} errors, exit code {returncode}" + (f": {said}" if said else ""),)


def run_sanitizers(
    kernels: Iterable[Kernel],
    executable: str,
    properties: DeviceProperties,
    file: CheckFile,
    *,
    allows: Callable[[], bool] = lambda: True,
    timeout_s: float = 300.0,
    run: Callable[..., Any] = subprocess.run,
    done: Callable[[KernelCheck], None] = lambda check: None,
) -> list[KernelCheck]:
    """memcheck and racecheck of one small case of each kernel that has no such result yet."""
    from .user_check import SMALL_SHAPES

    known = {check.key: check for check in file.read()}
    found = []
    for kernel in kernels:
        for tool in SANITIZERS:
            version, shape = version_of(kernel, properties), SMALL_SHAPES[kernel.op][0]
            check = KernelCheck(how=tool, kernel=kernel.name, shape=dict(shape), version=version)
            if check.key not in known:
                if not allows():
                    return found
                try:
                    ended = run(
                        sanitize_command(executable, tool, kernel), capture_output=True, text=True, check=False,
                        timeout=timeout_s,
                    )  # fmt: skip
                    problems = sanitizer_problems(ended.returncode, ended.stdout + ended.stderr)
                    check = msgspec.structs.replace(check, problems=problems)
                except MethodUnavailable as error:
                    check = msgspec.structs.replace(check, skipped=str(error))
                except subprocess.TimeoutExpired:
                    check = msgspec.structs.replace(check, skipped=f"compute-sanitizer: took more than {timeout_s:g} s")
                file.append(check)
                done(check)
            found.append(known.get(check.key, check))
    return found


def launch_small(name: str, buffers_on: Any = "cuda") -> tuple[Any, Any, Any]:
    """One launch of a kernel at its op's first small shape, and nothing else that a sanitizer would look at but the
    making of its inputs: (weights, activations, output).

    Raises:
        ValueError: no such kernel.
    """
    import torch

    from .user_check import SMALL_SHAPES

    kernel = next((kernel for kernel in KERNELS if kernel.name == name), None)
    if kernel is None:
        raise ValueError(f"kernel: expected the name of one of the registry's; got {name!r}")
    shape, run = SMALL_SHAPES[kernel.op][0], kernel.load()
    weights, activations = run.make_weights(shape, 1, buffers_on), run.make_activations(shape, 2, buffers_on)
    output = run.make_output(shape, buffers_on)
    run.launch(weights, activations, output)
    if torch.device(buffers_on).type == "cuda":
        torch.cuda.synchronize()
    return weights, activations, output


if __name__ == "__main__":
    launch_small(sys.argv[1])
