"""The process that compiles, both ends of its pipe: a compiler that aborts or hangs takes nothing else down.

``python -m tokenfab.bench.inspect_child FOLDER`` reads one JSON job per line from stdin (the compiler inputs
of a ``CompilePoint`` and ``arch``) and answers each with one JSON line on stdout: facts, or what went
wrong. After a failure it exits: a compiler that failed once is not asked again. When its input ends, its
parent is gone, and it removes FOLDER. ``Child`` is the other
end, ``Children`` a pool of them. Only the process itself imports triton.

Differences between Triton 3.6.0 and 3.9.0 that matter here: the ptxas used for sm_90 ("ptxas" against
"ptxas-blackwell") and its flags, so the log read is that of the compilation itself and not of a second
run; ``nvdisasm`` of 3.6.0 (CUDA 12.8) cannot read sm_103; MLIR may turn an abort into an exception, its
text on stderr. Both take ``TRITON_DUMP_PTXAS_LOG``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from . import sass, tool_logs

ARCHS = {"sm_90": 90, "sm_100": 100, "sm_103": 103, "sm_120": 120}
TEXT_LIMIT = 2000
CHILD_TIMEOUT_S = 300.0
_DIAGNOSIS = re.compile(r"Assertion|\berror:|fatal|LLVM ERROR|Fatal Python error|terminate called", re.IGNORECASE)

CHILD_ENVIRONMENT = {
    "TRITON_DUMP_PTXAS_LOG": "1",
    "TRITON_INTERPRET": None,
    "TRITON_STORE_BINARY_ONLY": None,
    "TRITON_ALWAYS_COMPILE": "1",
}
"""What the child's environment must hold (None: must not), whatever the parent's says. Triton's own cache
would answer a second time without a log of ptxas."""


def source_path(module: str) -> Path | None:
    """The file of a module that is named by its path; None for an importable one."""
    return Path(module).absolute() if module.endswith(".py") else None


# ---- the child's end -------------------------------------------------------------------------------------


def _load(module: str) -> ModuleType:
    path = source_path(module)
    if path is None:
        return importlib.import_module(module)
    name = f"inspected_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ModuleNotFoundError(f"module: expected a Python file; got {module!r}")
        sys.path.insert(0, str(path.parent))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def dependencies(module: str, since: float) -> dict[str, str] | None:
    """Source file to SHA-256 of everything loaded from the kernel's package, ours, and outside any library.

    None when a file changed after ``since``: what was imported is no longer what lies there.
    """
    own = {(__package__ or "").split(".")[0], module.split(".")[0]}
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    libraries = tuple(folder + os.sep for folder in folders)
    found = {}
    for name, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None)
        if not file or not file.endswith(".py") or not os.path.isabs(file):
            continue  # torch names modules without a file, torch.ops, by a relative one
        if name.split(".")[0] in own or name == "__main__" or not file.startswith(libraries):
            path = Path(file).absolute()
            if path.stat().st_mtime > since:
                return None
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _value(value: Any) -> Any:
    """A constexpr from its JSON form: lists are tuples, "tl.bfloat16" is a type."""
    import triton.language as tl

    if isinstance(value, list):
        return tuple(_value(each) for each in value)
    return getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value


def jit_function(module: str, name: str) -> Any:
    """The ``JITFunction`` of that name, without the decorators around it.

    Raises:
        ValueError: it is none.
    """
    from triton import JITFunction

    function = getattr(_load(module), name)
    while not isinstance(function, JITFunction) and hasattr(function, "fn"):
        function = function.fn  # autotune, heuristics
    if not isinstance(function, JITFunction):
        raise ValueError(f"function: expected a @triton.jit function; got {type(function).__name__}")
    return function


def _source(job: dict[str, Any]) -> Any:
    """The job as Triton's source object.

    Raises:
        ValueError: the signature does not fit the function.
    """
    from triton.compiler import ASTSource

    function = jit_function(job["module"], job["function"])
    names, signature = function.arg_names, job["signature"]
    if set(names) != set(signature):
        raise ValueError(f"signature: expected arguments {', '.join(names)}; got {', '.join(signature)}")
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in job["aligned"]}
    constexprs = {name: _value(value) for name, value in job["constexprs"].items()}
    kind: Any = ASTSource
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kind
    return kind(fn=function, signature={name: signature[name] for name in names}, constexprs=constexprs, attrs=attrs)


def _options(job: dict[str, Any]) -> dict[str, Any]:
    """The compiler's options. Triton ignores one it does not know: refused here.

    Raises:
        ValueError: an unknown option.
    """
    from triton.backends.nvidia.compiler import CUDAOptions

    known = [each.name for each in dataclasses.fields(CUDAOptions)]
    for name in job["options"]:
        if name not in known:
            raise ValueError(f"options: expected some of {', '.join(known)}; got {name!r}")
    return {"num_warps": job["num_warps"], "num_stages": job["num_stages"], **job["options"]}


def _run_tool(name: str, *arguments: str) -> str:
    from triton import knobs

    tool = getattr(knobs.nvidia, name).path
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles one job and reads what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    arch = ARCHS[job["arch"]]
    source, options = _source(job), _options(job)
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # ptxas's log is printed
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, sass.WARP_SIZE), options=options)
    name, metadata, ptx = compiled.metadata.name, compiled.metadata, compiled.asm["ptx"]
    log = printed.getvalue()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = tool_logs.resource_usage(_run_tool("cuobjdump", "--dump-resource-usage", cubin.name), name)
        try:
            code, unreadable = sass.parse_sass(_run_tool("nvdisasm", "-c", cubin.name), name), ""
        except RuntimeError as error:
            code, unreadable = None, str(error)
    ptx_code = sass.parse_ptx(ptx, name)
    stores, loads = tool_logs.spills(log, name)
    return {
        "triton": triton.__version__,
        "ptxas": f"{Path(get_ptxas(arch).path).name} {get_ptxas(arch).version}",
        "num_warps": metadata.num_warps,
        "num_ctas": metadata.num_ctas,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
        "shared_bytes": metadata.shared + usage["SHARED"],
        "tensor_memory_columns": getattr(metadata, "tmem_size", None) or 0,
        "ptxas_warnings": tool_logs.ptxas_warnings(log),
        "sass_unreadable": unreadable,
        "loops": [dataclasses.asdict(loop) for loop in sass.loops(code)] if code else [],
        "whole": dataclasses.asdict(sass.straight_line(code)) if code else None,
        "ptx_loops": [dataclasses.asdict(loop) for loop in sass.loops(ptx_code)],
        "matrix": sass.matrix_instructions(code) if code else {},
        "ptx_matrix": sass.matrix_instructions(ptx_code),
        "partitions": partitions(compiled.asm["ttgir"], job["num_warps"]),
    }


def partitions(ttgir: str, num_warps: int) -> list[dict[str, Any]]:
    """Of a warp-specialised kernel: the warps of each partition and what its code does, the default one first."""
    found: list[dict[str, Any]] = []
    name, warps, text = "", 0, ""
    for line in ttgir.splitlines():
        header = re.match(r"\s*(default) \{|\s*(partition\d+)\(.*num_warps\((\d+)\)", line)
        if name and (header or re.match(r"\s*\} : \(", line)):
            matrix = re.search(r"warp_group_dot |tc_gen5_mma|tt\.dot", text)
            loads = re.search(r"async_tma|async_copy_global|tt\.load|descriptor_load", text)
            found.append({"name": name, "num_warps": warps, "matrix": bool(matrix), "loads": bool(loads)})
            name = ""
        if header:
            name, warps, text = header[1] or header[2], int(header[3] or num_warps), ""
        text += line + "\n"
    return found


def main() -> None:
    started = time.time()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print must not mix with the answers
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = {"facts": compile_job(job), "dependencies": dependencies(job["module"], started)}
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
            text = str(error).split("Repro command")[0].strip()  # names a temporary file
            answer = {"failure": "exception", "text": f"{type(error).__name__}: {text}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "failure" in answer:
            return
    for folder in sys.argv[1:]:  # whose parent is gone without closing
        shutil.rmtree(folder, ignore_errors=True)


# ---- the parent's end ------------------------------------------------------------------------------------


def child_environment(folder: str) -> dict[str, str]:
    """This process's environment as a child's must be; its files go to ``folder``."""
    changed = {
        **CHILD_ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(each) for each in sys.path if os.path.exists(each or ".")),
        "TMPDIR": folder,
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
    }
    return {name: value for name, value in {**os.environ, **changed}.items() if value is not None}


def child_command(module: str, *arguments: str) -> list[str]:
    """A module of this folder as a process. -P: the working directory is never searched for modules."""
    return [sys.executable, "-P", "-X", "faulthandler", "-m", f"{__package__}.{module}", *arguments]


class Child:
    """A compiling process. ``ask`` answers every job with a dict, whatever becomes of the process."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._folder = tempfile.mkdtemp(prefix="tokenfab-inspect-")
        self._stderr = Path(self._folder, "stderr")
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                child_command("inspect_child", self._folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=stderr, cwd=self._folder, env=child_environment(self._folder), start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer: ``facts`` and ``dependencies``, or ``failure`` (exception, abort, timeout) and ``text``."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        line = self._read_line(timeout_s)
        if line is None:
            self.close()
            return {"failure": "timeout", "text": f"no answer within {timeout_s:g} s"}
        if line.endswith(b"\n"):
            answer = json.loads(line)
            if "failure" in answer:
                answer["text"] = self._told(answer["text"], 0)
                self.close()
            return answer
        status = self._process.wait()
        died = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        text = self._told(died, 3)
        self.close()
        return {"failure": "abort", "text": text}

    def _read_line(self, timeout_s: float) -> bytes | None:
        """A line, less than one where the process ended, or None after the time limit."""
        assert self._process.stdout is not None
        descriptor, line, deadline = self._process.stdout.fileno(), b"", time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            read = os.read(descriptor, 1 << 16)
            if not read:
                break
            line += read
        return line

    def _told(self, text: str, num_last: int) -> str:
        """``text`` and what stderr says about it: its diagnoses, or without any its last lines."""
        lines = self._stderr.read_text(errors="replace").splitlines()
        told = [line for line in lines if _DIAGNOSIS.search(line)][:8] or lines[len(lines) - num_last :]
        return "\n".join([text[:TEXT_LIMIT], *(line.strip()[:300] for line in told)])[: 2 * TEXT_LIMIT]

    def close(self) -> None:
        """Ends the process and all it started, and removes its files."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class Children:
    """Children at work and idle; each serves one module, so that its answers depend on no other."""

    def __init__(self) -> None:
        self._idle: list[Child] = []
        self._all: list[Child] = []
        self._lock = threading.Lock()
        self._closed = False

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        with self._lock:
            if self._closed:
                raise RuntimeError("children: closed")
            same = [child for child in self._idle if child.module == job["module"]]
            for child in same[:1] or self._idle[:1]:
                self._idle.remove(child)
                if not same:  # makes room
                    self._all.remove(child)
                    child.close()
            child = same[0] if same else Child(job["module"])
            self._all += [] if same else [child]
        answer = child.ask(job, timeout_s)
        with self._lock:
            (self._idle if child.alive else []).append(child)
        return answer

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for child in self._all:
                child.close()


if __name__ == "__main__":
    main()
