"""The CUDA device as far as it goes without a GPU: refusals, units, the order of events, buffers of tensors."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from tokenfab.bench.cuda_device import CudaDevice, TorchBuffers, _CudaGraph
from tokenfab.bench.device import DeviceProperties, MethodUnavailable, NoGpu


def test_timing_and_records_need_no_torch() -> None:
    code = "import sys, tokenfab.bench.timing, tokenfab.bench.records; print({'torch', 'triton'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_interpreter_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NoGpu, match=r"^TRITON_INTERPRET: expected it unset"):
        CudaDevice()


def _fake_torch(is_available: bool, cuda: str | None = "13.0", devices: int = 1) -> Any:
    gpus = SimpleNamespace(is_available=lambda: is_available, device_count=lambda: devices)
    return SimpleNamespace(__version__="2.13", cuda=gpus, version=SimpleNamespace(cuda=cuda))


@pytest.mark.parametrize(
    ("torch", "index", "message"),
    [
        (None, 0, "^torch: expected it installed"),
        (_fake_torch(False), 0, "^GPU: expected an NVIDIA GPU that torch 2.13 can use; found none"),
        (_fake_torch(True, cuda=None), 0, "^GPU: expected an NVIDIA GPU"),
        (_fake_torch(True), 1, "^index: expected 0 to 0; got 1"),
    ],
)
def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, torch: Any, index: int, message: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(NoGpu, match=message):
        CudaDevice(index)


def test_clocks_that_cannot_be_read_are_no_reason_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "torch", _fake_torch(True))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MethodUnavailable, match=r"^pynvml: expected it installed \(packages nvidia-ml-py"):
        CudaDevice()


class _NvmlError(Exception):
    pass


def _fake_gpu(monkeypatch: pytest.MonkeyPatch, **nvml: Any) -> Any:
    """torch, triton and NVML of a machine with one GPU; ``nvml`` replaces functions of the last."""
    torch = _fake_torch(True)
    readings: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetClockInfo": lambda handle, kind: {("GPU-12", "SM"): 1980}[handle, kind],
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 5,
        "nvmlDeviceGetTemperature": lambda handle, sensor: {("GPU-12", "die"): 61}[handle, sensor],
        "nvmlDeviceGetPowerUsage": lambda handle: 512_345,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 7_654_321,
        "NVML_CLOCK_SM": "SM",
        "NVML_TEMPERATURE_GPU": "die",
        "NVMLError": _NvmlError,
    }
    torch.cuda.set_device = lambda index: None
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(name="H100", uuid="12", L2_cache_size=64)
    torch.uint8, torch.int32 = "uint8", "int32"
    torch.ones = lambda size, dtype, device: SimpleNamespace(view=lambda dtype: flush.append(size) or flush_buffer)
    flush: list[Any] = []
    flush_buffer = SimpleNamespace(max=lambda: flush.append("read"))
    torch.flush = flush
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.9"))
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**(readings | nvml)))
    return torch


def test_readings_in_si_units(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = _fake_gpu(monkeypatch)
    device = CudaDevice()
    assert device.properties == DeviceProperties(
        name="H100", uuid="GPU-12", l2_bytes=64, driver="580.1", cuda="13.0", torch="2.13", triton="3.9"
    )
    assert device.state() == (1.98e9, 5, 61.0, pytest.approx(512.345))
    assert device.energy_j() == pytest.approx(7654.321)
    device.flush_l2()
    assert torch.flush == [128, "read"]


def _fail(*arguments: Any) -> Any:
    raise _NvmlError("Not Supported")


@pytest.mark.parametrize(
    "name",
    [
        "nvmlInit",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetClockInfo",
        "nvmlDeviceGetTotalEnergyConsumption",
    ],
)
def test_a_reading_that_is_not_to_be_had_is_no_zero(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _fake_gpu(monkeypatch, **{name: _fail})
    with pytest.raises(MethodUnavailable, match=f"^NVML: {name} failed: Not Supported"):
        CudaDevice()


def test_kernel_that_cannot_be_captured_is_not_timed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = _fake_gpu(monkeypatch)
    torch.cuda.CUDAGraph = lambda: "graph"
    torch.cuda.Event = lambda enable_timing: None
    captured: list[Any] = []
    torch.cuda.graph = lambda graph: nullcontext(captured.append(graph))
    calls: list[str] = []
    CudaDevice().capture([lambda: calls.append("one"), lambda: calls.append("two")])
    assert (captured, calls) == (["graph"], ["one", "two"])

    def syncs() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(MethodUnavailable, match=r"^CUDA graph: the kernel cannot be captured: operation not"):
        CudaDevice().capture([syncs])


def test_replay_times_the_second_of_two_replays_in_a_row() -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = f"event {len(made)}"
            made.append(self)

        def record(self) -> None:
            log.append(self.name)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return {("event 1", "event 2"): 4.0, ("event 0", "event 2"): 9.0}[self.name, end.name]

    made: list[Event] = []
    torch = SimpleNamespace(cuda=SimpleNamespace(Event=Event))
    graph = _CudaGraph(torch, SimpleNamespace(replay=lambda: log.append("replay")))
    assert graph.replay(lambda: log.append("in flight")) == pytest.approx((4e-3, 9e-3))
    assert log == ["event 0", "replay", "event 1", "replay", "event 2", "in flight", "wait"]


def test_buffers_of_tensors() -> None:
    torch = pytest.importorskip("torch")
    on = TorchBuffers()
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
        tensor = torch.ones(4, 6).to(getattr(torch, name))
        assert on.all_finite(tensor)
        assert not on.all_zero(tensor)
        on.poison((None, [tensor]))
        assert not on.all_finite({"x": tensor})
    packed = torch.zeros(3, 5, dtype=torch.uint8)
    assert on.all_zero((packed, torch.zeros(())))
    on.poison(packed)
    assert bool((packed == 0xFF).all())
    assert on.all_finite((packed, torch.zeros(2, dtype=torch.float4_e2m1fn_x2)))
    rows = torch.zeros(4, 8)
    on.poison(rows[:, :3])
    assert int(rows.isnan().sum()) == 12
    assert on.regions((rows, {"a": packed}, None)) == [(rows.data_ptr(), 128), (packed.data_ptr(), 15)]
    infinite = torch.tensor([1.0, math.inf])
    assert not on.all_finite(infinite)
