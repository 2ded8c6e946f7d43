"""An NVIDIA GPU as the timing core sees it: torch.cuda's graphs and events, NVML's clocks and counters.

Nothing else is ever timed: the Triton interpreter runs on the CPU, and what it takes there says nothing
about a GPU.

Units: as in ``device``; torch gives milliseconds, NVML MHz, mW and mJ.

Errors: ``NoGpu`` without a GPU; ``MethodUnavailable`` where graphs, clocks or the energy counter are not to be
had.

Source: CUDA runtime API (events resolve about 0.5 us), NVML API reference, nvbench (the timed work is enqueued
behind other work, so that its launch is not timed).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .device import DeviceProperties, DeviceState, Graph, MethodUnavailable, NoGpu, Replay


class TorchBuffers:
    """What is done to buffers of torch tensors, on any of torch's devices."""

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def regions(self, buffers: Any) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor.nbytes) for tensor in _tensors(buffers)]

    def poison(self, buffers: Any) -> None:
        for tensor in _tensors(buffers):
            self._bytes(tensor).fill_(0xFF)

    def all_finite(self, buffers: Any) -> bool:
        return all(bool(self._torch.isfinite(tensor.float()).all()) for tensor in _tensors(buffers) if _has_nan(tensor))

    def all_zero(self, buffers: Any) -> bool:
        return not any(bool(self._bytes(tensor).any()) for tensor in _tensors(buffers))

    def _bytes(self, tensor: Any) -> Any:
        return tensor.unsqueeze(-1).view(self._torch.uint8)


class CudaDevice(TorchBuffers):
    """One NVIDIA GPU through torch.cuda and NVML."""

    def __init__(self, index: int = 0) -> None:
        """``index``: torch's device index.

        Raises:
            NoGpu: Triton's interpreter is on, or torch or a GPU is missing.
            MethodUnavailable: NVML cannot be read, so neither clocks nor throttling are known.
        """
        if os.environ.get("TRITON_INTERPRET", "").lower() not in ("", "0", "false", "off", "no", "n"):
            raise NoGpu("TRITON_INTERPRET: expected it unset; the interpreter's times on the CPU are no kernel speeds")
        try:
            import torch
        except ImportError:
            raise NoGpu("torch: expected it installed; without it no GPU can be measured") from None
        if not torch.cuda.is_available() or torch.version.cuda is None:
            raise NoGpu(f"GPU: expected an NVIDIA GPU that torch {torch.__version__} can use; found none")
        if not 0 <= index < torch.cuda.device_count():
            raise NoGpu(f"index: expected 0 to {torch.cuda.device_count() - 1}; got {index}")
        try:
            import pynvml  # pyright: ignore[reportMissingImports]
            import triton
        except ImportError as error:
            raise MethodUnavailable(f"{error.name}: expected it installed (packages nvidia-ml-py, triton)") from None
        super().__init__()
        torch.cuda.set_device(index)
        self._pynvml = pynvml
        properties = torch.cuda.get_device_properties(index)
        uuid = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
        self._nvml("nvmlInit")
        self._handle = self._nvml("nvmlDeviceGetHandleByUUID", uuid)
        self.properties = DeviceProperties(
            name=properties.name,
            uuid=uuid,
            l2_bytes=properties.L2_cache_size,
            driver=str(self._nvml("nvmlSystemGetDriverVersion")),
            cuda=torch.version.cuda,
            torch=torch.__version__,
            triton=triton.__version__,
        )
        self._flush = torch.ones(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda").view(torch.int32)
        self.state()
        self.energy_j()

    def _nvml(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._pynvml, function)(*arguments)
        except self._pynvml.NVMLError as error:
            raise MethodUnavailable(f"NVML: {function} failed: {error}") from None

    def capture(self, calls: Sequence[Callable[[], None]]) -> Graph:
        graph = self._torch.cuda.CUDAGraph()
        try:
            with self._torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError as error:
            raise MethodUnavailable(f"CUDA graph: the kernel cannot be captured: {error}") from error
        return _CudaGraph(self._torch, graph)

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def wall_s(self) -> float:
        return time.perf_counter()

    def state(self) -> DeviceState:
        return DeviceState(
            sm_clock_hz=self._nvml("nvmlDeviceGetClockInfo", self._handle, self._pynvml.NVML_CLOCK_SM) * 1e6,
            throttle_bits=self._nvml("nvmlDeviceGetCurrentClocksEventReasons", self._handle),
            temperature_c=float(
                self._nvml("nvmlDeviceGetTemperature", self._handle, self._pynvml.NVML_TEMPERATURE_GPU)
            ),
            power_w=self._nvml("nvmlDeviceGetPowerUsage", self._handle) * 1e-3,
        )

    def energy_j(self) -> float:
        return self._nvml("nvmlDeviceGetTotalEnergyConsumption", self._handle) * 1e-3

    def flush_l2(self) -> None:
        self._flush.max()


class _CudaGraph:
    def __init__(self, torch: Any, graph: Any) -> None:
        self._graph = graph
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def launch(self) -> None:
        self._graph.replay()

    def replay(self, in_flight: Callable[[], None] | None = None) -> Replay:
        start, lead_in, end = self._events
        start.record()
        self._graph.replay()
        lead_in.record()
        self._graph.replay()
        end.record()
        if in_flight is not None:
            in_flight()
        end.synchronize()
        return Replay(lead_in.elapsed_time(end) * 1e-3, start.elapsed_time(end) * 1e-3)


def _tensors(buffers: Any) -> Iterator[Any]:
    if isinstance(buffers, dict):
        buffers = tuple(buffers.values())
    if isinstance(buffers, tuple | list):
        for part in buffers:
            yield from _tensors(part)
    elif buffers is not None:
        yield buffers


def _has_nan(tensor: Any) -> bool:
    return tensor.dtype.is_floating_point and "float4" not in str(tensor.dtype)
