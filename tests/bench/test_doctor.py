"""What doctor finds: of a GPU that is well, of one thing wrong at a time, and where there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench import doctor
from tokenfab.bench.doctor import FAIL, OK, WARN, Finding, NoDriver, examine, find_tool, is_ready, properties


class NVMLError(Exception):
    pass


class Nvml:
    """The part of pynvml that doctor asks, for one GPU. ``answers`` changes what it says; an exception is raised."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {
            "Name": "NVIDIA H100 80GB HBM3", "UUID": "GPU-1", "CudaComputeCapability": (9, 0), "MigMode": [0, 0],
            "PersistenceMode": 1, "EnforcedPowerLimit": 700_000, "PowerManagementDefaultLimit": 700_000,
            "TotalEnergyConsumption": 5, "ClockInfo": 345, "MaxClockInfo": 1980, "CurrentClocksEventReasons": 1,
            "Temperature": 31, "ComputeRunningProcesses": [SimpleNamespace(pid=os.getpid())],
            "MemoryInfo": SimpleNamespace(free=79 << 30, total=80 << 30), "UtilizationRates": SimpleNamespace(gpu=0),
            "HandleByIndex": 0, "HandleByUUID": 0,
        } | answers  # fmt: skip
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        if "init" in self.answers:
            raise self.answers["init"]

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95"

    def __getattr__(self, name: str) -> Any:
        key = name.removeprefix("nvmlDeviceGet")

        def answer(*arguments: Any) -> Any:
            self.asked.append(name)
            if isinstance(self.answers[key], Exception):
                raise self.answers[key]
            return self.answers[key]

        return answer


def findings(nvml: Any, **environ: str) -> dict[str, Finding]:
    return {each.name: each for each in examine(nvml, environ=environ)}


def test_a_gpu_that_is_well() -> None:
    nvml = Nvml()
    found = findings(nvml)
    assert {name: found[name].status for name in (
        "GPU", "driver", "kernels", "MIG", "persistence", "power limit", "clocks", "throttling", "temperature",
        "other processes", "memory",
    )} == dict.fromkeys(("GPU", "driver", "kernels", "MIG", "persistence", "power limit", "clocks", "throttling",
                         "temperature", "other processes", "memory"), OK)  # fmt: skip
    assert found["GPU"].detail == "NVIDIA H100 80GB HBM3: h100 (H100 SXM), 1 of 2"
    assert found["clocks"].detail == "SM 345 MHz now, 1980 MHz at most"
    assert "energy counter" not in found
    assert "utilization" not in found
    assert not any("Set" in name or "Reset" in name for name in nvml.asked)


@pytest.mark.parametrize(
    ("answers", "name", "status", "words"),
    [
        ({"Name": "NVIDIA H100 80GB"}, "GPU", WARN, "not a known name; say which row"),
        ({"CudaComputeCapability": (8, 9)}, "kernels", OK, "run at compute capability 8.9"),
        ({"CudaComputeCapability": (8, 0)}, "kernels", FAIL, "0 of"),
        ({"MigMode": [1, 1]}, "MIG", FAIL, "a slice of the GPU"),
        ({"MigMode": NVMLError("not supported")}, "MIG", OK, "not supported"),
        ({"PersistenceMode": 0}, "persistence", WARN, "off"),
        ({"EnforcedPowerLimit": 500_000}, "power limit", WARN, "500 W, less than the default 700 W"),
        ({"EnforcedPowerLimit": NVMLError("no")}, "power limit", WARN, "cannot be read"),
        ({"TotalEnergyConsumption": NVMLError("no")}, "energy counter", FAIL, "cannot be read"),
        ({"ClockInfo": NVMLError("no")}, "clocks", FAIL, "cannot be read"),
        ({"CurrentClocksEventReasons": 0x40 | 0x04}, "throttling", WARN, "software power cap, hardware thermal"),
        ({"CurrentClocksEventReasons": NVMLError("no")}, "throttling", FAIL, "cannot be read"),
        ({"ComputeRunningProcesses": [SimpleNamespace(pid=1)]}, "other processes", WARN, "1 compute on this GPU: 1"),
        ({"MemoryInfo": SimpleNamespace(free=40 << 30, total=80 << 30)}, "memory", WARN, "40.0 of 80.0 GiB free"),
        ({"UtilizationRates": SimpleNamespace(gpu=40)}, "utilization", WARN, "40 %"),
    ],
)  # fmt: skip
def test_one_thing_at_a_time(answers: dict[str, Any], name: str, status: str, words: str) -> None:
    found = findings(Nvml(**answers))[name]
    assert (found.status, words in found.detail) == (status, True), found


def test_what_stops_and_what_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    assert is_ready(examine(Nvml(PersistenceMode=0), environ={}))
    assert not is_ready(examine(Nvml(MigMode=[1, 1]), environ={}))
    assert not is_ready(examine(Nvml(), environ={"TRITON_INTERPRET": "1"}))
    assert is_ready(examine(Nvml(), environ={"TRITON_INTERPRET": "0"}))
    assert findings(Nvml(), CUDA_LAUNCH_BLOCKING="1")["CUDA_LAUNCH_BLOCKING"].status == WARN


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.11.0+cpu", "triton": "3.6.0", "numpy": None}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = findings(Nvml())
    assert (found["torch"].status, found["torch"].detail) == (FAIL, "2.11.0+cpu: built without CUDA")
    assert (found["triton"].status, found["triton"].detail) == (OK, "3.6.0")
    assert (found["numpy"].status, "not installed" in found["numpy"].detail) == (FAIL, True)


@pytest.mark.parametrize(
    ("nvml", "environ", "words"),
    [
        (None, {}, "nvidia-ml-py is not installed"),
        (Nvml(init=NVMLError("Driver Not Loaded")), {}, "no NVIDIA driver that answers: Driver Not Loaded"),
        (Nvml(), {"CUDA_VISIBLE_DEVICES": ""}, "expected one of the driver's 2 GPUs first; got ''"),
        (Nvml(), {"CUDA_VISIBLE_DEVICES": "2"}, "got '2'"),
    ],
)  # fmt: skip
def test_without_a_gpu_it_says_why_and_what_runs(nvml: Any, environ: dict[str, str], words: str) -> None:
    found = findings(nvml, **environ)
    assert found["GPU"].status == FAIL
    assert words in found["GPU"].detail
    assert "`tokenfab inspect`" in found["what runs"].detail
    assert "clocks" not in found
    with pytest.raises(NoDriver, match=words[:20]):
        properties(nvml, environ)


def test_the_gpu_is_the_one_that_cuda_sees() -> None:
    nvml = Nvml()
    assert properties(nvml, {"CUDA_VISIBLE_DEVICES": "1,0"}).name == "NVIDIA H100 80GB HBM3"
    assert properties(nvml, {"CUDA_VISIBLE_DEVICES": "GPU-1"}).uuid == "GPU-1"
    assert nvml.asked[0] == "nvmlDeviceGetHandleByIndex"
    assert "nvmlDeviceGetHandleByUUID" in nvml.asked


def test_tools_are_looked_for_on_the_path_and_beside_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool("compute-sanitizer", lambda name: None) is None
    found = {each.name: each for each in examine(Nvml(), environ={}, which=lambda name: None)}
    assert found["compute-sanitizer"].status == WARN
    assert "memcheck and racecheck of the kernels are skipped" in found["compute-sanitizer"].detail
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    assert find_tool("compute-sanitizer", lambda name: None) == str(tool)
    assert find_tool("compute-sanitizer", lambda name: f"/opt/{name}") == "/opt/compute-sanitizer"


def test_peers_that_are_missing_are_named_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "absence", lambda peer: "not installed" if "sdpa" in peer.name else "")
    found = findings(Nvml())
    assert found["peer attention/bf16-bf16@torch.sdpa"] == Finding(
        "peer attention/bf16-bf16@torch.sdpa", WARN, "not installed"
    )
    assert found["peer gemm/bf16-bf16@torch.matmul"].status == OK


def test_records_need_a_folder_to_write_to(tmp_path: Path) -> None:
    (found,) = [each for each in examine(Nvml(), environ={}, out=tmp_path / "a" / "b") if each.name == "records"]
    assert found.status == OK
    assert not (tmp_path / "a").exists()


def test_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_nvml", lambda: None)
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 1
    rows = {row["name"]: row for row in json.loads(result.output)}
    assert rows["GPU"]["status"] == "fail"
    assert "GPU" in CliRunner().invoke(cli, ["doctor"]).output
