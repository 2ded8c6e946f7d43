"""What stands for compilers and GPUs in the tests of sweeps on Ray: found by name in the workers.

The workers learn where to write and whom to kill from a folder named by ``TOKENFAB_FLEET_FAKES``, which a cluster that
is started with it passes on to them.
"""

from __future__ import annotations

import json
import os
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenfab.bench.cuda_device import TorchBuffers
from tokenfab.bench.device import DeviceProperties, DeviceState, Replay
from tokenfab.bench.fleet_seat import NotMeasured, Point, Seat
from tokenfab.bench.measurement import Settings
from tokenfab.kernels.compile_point import CompilePoint

FOLDER = "TOKENFAB_FLEET_FAKES"
COMPILE_S = 0.08
FAST = Settings(min_warm_up_s=0.5, max_warm_up_s=0.6, budget_s=0.5, max_ci=0.05, energy_s=None)


def folder() -> Path:
    return Path(os.environ[FOLDER])


def note(name: str, *what: Any) -> None:
    """A line of the log, whole whoever writes beside."""
    descriptor = os.open(folder() / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, (json.dumps(what) + "\n").encode())
    os.close(descriptor)


def noted(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- compiling -------------------------------------------------------------------------------------


def points(count: int) -> list[CompilePoint]:
    """Points that differ in a constexpr, of a module of the package."""
    return [
        CompilePoint(
            name=f"point {number}", module="tokenfab.kernels.fp8_matmul", function="kernel",
            signature=(("x_ptr", "*bf16"), ("NUMBER", "constexpr")), constexprs=(("NUMBER", number),),
            aligned=("x_ptr",), num_warps=4, num_stages=3, values_per_iteration=64, bits_per_value=16,
            flops_per_value=0, matrix_rate="bf16",
        )
        for number in range(count)
    ]  # fmt: skip


def facts(job: dict[str, Any]) -> dict[str, Any]:
    """What a compiler would have found; a pure function of the job."""
    number = job["constexprs"]["NUMBER"]
    return {
        "triton": "1", "ptxas": "1", "num_warps": job["num_warps"], "num_ctas": 1, "registers": 32 + number % 200,
        "stack_bytes": 0, "local_bytes": 0, "spill_store_bytes": 4 * (number % 7 == 0), "spill_load_bytes": 0,
        "shared_bytes": 1024, "tensor_memory_columns": 0, "ptxas_warnings": [], "sass_unreadable": "", "loops": [],
        "whole": None, "ptx_loops": [], "matrix": {}, "ptx_matrix": {}, "partitions": [],
    }  # fmt: skip


def answer(job: dict[str, Any]) -> dict[str, Any]:
    own = str(Path(__file__).absolute())
    digest = __import__("hashlib").sha256(Path(own).read_bytes()).hexdigest()
    return {"facts": facts(job), "dependencies": {own: digest}}


def compile_point(payload: dict[str, Any]) -> bytes:
    """In place of ``fleet_compile.compile_point``: takes its time, says that it ran, and may be a compiler that kills
    its worker."""
    job = payload["job"]
    number = job["constexprs"]["NUMBER"]
    note("compiled", number, os.getpid())
    if (folder() / f"kills-{number}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(COMPILE_S)
    return zlib.compress(json.dumps({"answer": answer(job), "package": "/elsewhere"}).encode())


# -- GPUs ------------------------------------------------------------------------------------------


class _Graph:
    def __init__(self, device: SimulatedGpu, calls: Sequence[Callable[[], None]]) -> None:
        self.device, self.calls = device, list(calls)

    def launch(self) -> None:
        for call in self.calls:
            call()
        self.device.now_s += self.device.call_s * len(self.calls)

    def replay(self, in_flight: Callable[[], None] | None = None) -> Replay:
        self.launch()
        if in_flight is not None:
            in_flight()
        time_s = self.device.call_s * len(self.calls)
        self.device.now_s += time_s
        return Replay(time_s, 2 * time_s)


class SimulatedGpu(TorchBuffers):
    """Kernels run on the CPU; a call takes ``call_s`` of a clock of its own."""

    def __init__(self, uuid: str, call_s: float) -> None:
        super().__init__()
        self.call_s, self.now_s = call_s, 0.0
        self.properties = DeviceProperties(
            name="NVIDIA H100 80GB HBM3", uuid=uuid, l2_bytes=256, driver="1", cuda="1", torch="1", triton="1"
        )

    def capture(self, calls: Sequence[Callable[[], None]]) -> Any:
        return _Graph(self, calls)

    def synchronize(self) -> None: ...

    def wall_s(self) -> float:
        return self.now_s

    def state(self) -> DeviceState:
        return DeviceState(1.7e9, 0, 40.0, 300.0)

    def energy_j(self) -> float:
        return 300 * self.now_s

    def flush_l2(self) -> None: ...


CALL_S = 50e-3
SLOW = 1.2


def gpu() -> tuple[Any, Any]:
    """The GPU that Ray gave this process: number 1 is 20 % slow while the folder says so."""
    import torch
    from tokenfab.bench import interpreter

    interpreter.install()
    torch.set_num_threads(1)
    number = os.environ["CUDA_VISIBLE_DEVICES"]
    slow = number == "1" and (folder() / "slow").exists()
    return SimulatedGpu(f"GPU-{number}", CALL_S * (SLOW if slow else 1.0)), "cpu"


GPU = f"{__name__}:gpu"
ANCHORS = (
    Point("copy/bf16-bf16@torch.copy_", (("num_bytes", 1 << 12),)),
    Point("gemm/bf16-bf16@torch.matmul", (("m", 4), ("n", 64), ("k", 64))),
)


class MortalSeat(Seat):
    """A seat that says when it measures, and dies at a point as often as the folder asks for."""

    def measure(self, point: Point, settings: Settings) -> bytes | NotMeasured:
        size = dict(point.fields).get("n", 0)
        note("measured", "begin", self.device.properties.uuid, size, os.getpid(), time.monotonic())
        for deadly in sorted(folder().glob(f"kills-{size}-*")):
            deadly.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (folder() / f"raises-{size}").exists():
            return self._attempt(lambda: _raise(RuntimeError("an illegal memory access was encountered")))
        made = super().measure(point, settings)
        note("measured", "end", self.device.properties.uuid, size, os.getpid(), time.monotonic())
        return made


def _raise(error: Exception) -> Any:
    raise error


MORTAL = f"{__name__}:MortalSeat"
