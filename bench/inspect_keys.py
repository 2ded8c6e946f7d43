"""What a compilation is made from, as one digest: a point whose digest is a baseline's was compiled when that was made.

The digest covers the kernel's source with all device functions and constants that it reaches, the compiler's inputs,
what the point expects of the result, the variables that decide what a compiler makes, and the code here that reads a
result. Triton and its assembler are the baseline's ``toolchain``. (Triton's own ``cache_key`` is none: it names lines,
leaves out annotated constants, and depends on which functions were asked before.)

``python -m tokenfab.bench.inspect_keys`` reads a list of (module, function) from stdin, one JSON line, and answers with
the list of their keys; only that process imports triton.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..kernels.compile_point import CompilePoint, Task
from .inspect_cache import compiler_environment
from .inspect_child import CHILD_TIMEOUT_S, child_command, child_environment, jit_function

Digests = dict[tuple[str, str], str]
"""(a point's name, architecture) to its digest."""

_READERS = ("inspect", "inspect_child", "sass", "sm_limits", "tool_logs")


@cache
def _readers_hash() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in _READERS)).hexdigest()


def digests(tasks: Iterable[Task]) -> Digests:
    """The digest of every (point, architecture) whose kernel can be imported.

    Raises:
        RuntimeError: the process that reads the sources failed, or gave no answer in time.
    """
    tasks = list(tasks)
    names = sorted({(point.module, point.function) for point, _ in tasks})
    with tempfile.TemporaryDirectory(prefix="tokenfab-keys-") as folder:
        try:
            done = subprocess.run(
                child_command("inspect_keys"), input=json.dumps(names), capture_output=True, text=True, cwd=folder,
                env=child_environment(folder), timeout=CHILD_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"sources of kernels: expected them read within {CHILD_TIMEOUT_S:g} s") from None
    if done.returncode:
        got = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"sources of kernels: expected them read; the process exited with {done.returncode}: {got}")
    keys = dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))
    common = {"environment": compiler_environment(), "readers": _readers_hash()}
    found: Digests = {}
    for point, arch in tasks:
        if key := keys[point.module, point.function]:
            made = {"key": key, "arch": arch, **point.compiler_inputs(), **_expected(point), **common}
            found[point.name, arch] = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]
    return found


def _expected(point: CompilePoint) -> dict[str, Any]:
    fields = (
        "values_per_iteration", "bits_per_value", "flops_per_value", "matrix_rate", "expect",
        "max_instructions_per_value",
    )  # fmt: skip
    return {name: getattr(point, name) for name in fields}


# -- the process that imports kernels --------------------------------------------------------------


def source_key(function: Any) -> str:
    """Of the sources of a ``JITFunction`` and of all that it calls, with the constants that they name."""
    from triton.runtime.jit import JITCallable

    parts: dict[str, Any] = {}
    waiting = [function]
    while waiting:
        each = waiting.pop()
        name = f"{each.fn.__module__}.{each.fn.__qualname__}"
        if name in parts:
            continue
        named = dict(_named(each.fn))
        waiting += [value for value in named.values() if isinstance(value, JITCallable)]
        parts[name] = [each.src, sorted((key, repr(value)) for key, value in named.items() if _is_constant(value))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _named(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function names outside of itself and of Triton, also by way of a module."""
    found = inspect.getclosurevars(function)
    for name, value in {**found.globals, **found.nonlocals}.items():
        if not inspect.ismodule(value):
            if not str(getattr(value, "__module__", "")).startswith("triton.") or _is_constant(value):
                yield name, value
        elif not value.__name__.startswith("triton"):
            yield from (
                (f"{name}.{each}", vars(value)[each]) for each in function.__code__.co_names if each in vars(value)
            )


def _is_constant(value: Any) -> bool:
    import triton.language as tl

    return value is None or isinstance(value, bool | int | float | str | tuple | tl.constexpr | tl.dtype)


def main() -> None:
    answers = []
    for module, function in json.loads(sys.stdin.readline()):
        try:
            answers.append(source_key(jit_function(module, function)))
        except Exception:  # noqa: BLE001 - whatever a kernel's module raises; compiling it will say so
            answers.append("")
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
