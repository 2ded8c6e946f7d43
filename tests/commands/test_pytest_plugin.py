"""Kernels timed through pytest-benchmark: its own files hold the device's seconds, and the gate reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenfab.bench.sides import EXTRA, read_side
from tokenfab.commands.pytest_plugin import VirtualClock, find_kernel

CONFTEST = """
import os
import msgspec
import pytest
from tokenfab.bench.timing import measure
from tokenfab.bench.measurement import Settings
from tokenfab.bench.record import Environment, Record
from tokenfab.tests.bench.fake_device import FakeDevice, make_case
from tokenfab.tests.bench.made_samples import POINT

@pytest.fixture(scope="session")
def tokenfab_device():
    return FakeDevice(seed=int(os.environ.get("SEED", "0")))

@pytest.fixture
def measured(kernel_benchmark, tokenfab_device):
    def measured(factor=1.0, **changes):
        tokenfab_device.scale = lambda device: factor
        measurement = measure(
            make_case(tokenfab_device, **changes), tokenfab_device, settings=Settings(energy_s=None)
        )
        where = Environment(**msgspec.structs.asdict(tokenfab_device.properties), git_sha=None, git_dirty=False)
        return kernel_benchmark.record(Record.of(POINT, measurement, where))
    return measured
"""
TEST = """
import os

def test_o_proj(measured):
    assert measured(float(os.environ.get("FACTOR", "1"))).roofline_fraction > 0.1
"""
SAVED = ("--benchmark-autosave", "--benchmark-storage=file://./.benchmarks/h100")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_speed.py").write_text(TEST)
    return tmp_path


def run(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest in the project, as its user runs it, with the plugin as its entry point loads it."""
    command = [sys.executable, "-m", "pytest", "-p", "tokenfab.commands.pytest_plugin", "-p", "no:cacheprovider"]
    if _is_installed():
        del command[3:5]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not a worker's
    return subprocess.run([*command, *arguments], cwd=project, env=own | environment, capture_output=True, text=True,
                          check=False)  # fmt: skip


def _is_installed() -> bool:
    """Whether the environment's tokenfab brings the entry point, so that pytest has the plugin already."""
    from importlib.metadata import entry_points

    return any(each.value == "tokenfab.commands.pytest_plugin" for each in entry_points(group="pytest11"))


def document(project: Path) -> dict[str, Any]:
    (file,) = project.rglob("0001_*.json")
    (entry,) = json.loads(file.read_text())["benchmarks"]
    return entry


def test_pytest_benchmark_keeps_the_devices_seconds(project: Path) -> None:
    done = run(project, *SAVED)
    assert done.returncode == 0, done.stdout + done.stderr
    entry = document(project)
    sample = entry["extra_info"][EXTRA]
    assert entry["stats"]["median"] == pytest.approx(sample["time_s"], rel=1e-6)
    assert entry["stats"]["rounds"] >= 20
    assert 1e-5 < entry["stats"]["median"] < 3e-5
    assert entry["extra_info"]["bytes_per_s"] == pytest.approx(49_200_000 / sample["time_s"])
    assert entry["extra_info"]["flops_per_s"] == pytest.approx(1e9 / sample["time_s"])
    assert 0.5 < entry["extra_info"]["roofline_fraction"] < 1
    (place,) = entry["extra_info"]["usd_per_mtok"]
    assert place == "deepseek-v3 o_proj"
    alone = entry["extra_info"]["tokens_per_s_per_gpu_of_this_kernel_alone"][place]
    assert alone == pytest.approx(64 / (61 * sample["time_s"]))


def test_price_and_models_are_options(project: Path) -> None:
    options = ("--tokenfab-usd-per-gpu-hour=3.6", "--tokenfab-model=deepseek-r1")
    assert run(project, *SAVED, *options).returncode == 0
    extra = document(project)["extra_info"]
    time_s = extra[EXTRA]["time_s"]
    assert extra["usd_per_mtok"] == {"deepseek-r1 o_proj": pytest.approx(time_s * 61 / 64 * 1e-3 * 1e6)}


def test_three_runs_are_a_baseline_for_the_gate(project: Path, tmp_path: Path) -> None:
    for folder, factor in (("base", "1"), ("same", "1"), ("slow", "1.05")):
        for seed in range(3):
            storage = f"--benchmark-storage=file://./{folder}"
            number = str(seed + 10 * (folder == "same"))
            done = run(project, "--benchmark-autosave", storage, SEED=number, FACTOR=factor)
            assert done.returncode == 0, done.stdout
    assert len(read_side(str(tmp_path / "base")).samples) == 3

    def gate(before: str, now: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tokenfab", "gate", "times", before, now]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)

    passed, failed = gate("base", "same"), gate("base", "slow")
    assert (passed.returncode, failed.returncode) == (0, 1), passed.stdout + failed.stdout
    assert "is slower: +" in failed.stdout
    assert "$/M in deepseek-v3 o_proj at 64" in failed.stdout
    for file in (tmp_path / "slow").rglob("0003_*.json"):
        file.write_bytes(file.read_bytes()[:-200])
    torn = gate("base", "slow")
    assert torn.returncode == 3, torn.stdout
    assert "gate: inconclusive" in torn.stdout


def test_a_wrong_kernel_fails_its_test(project: Path) -> None:
    (project / "test_speed.py").write_text(
        "def test_o_proj(measured):\n    measured(error=lambda *buffers: 1.0)\n"
    )  # fmt: skip
    done = run(project)
    assert done.returncode == 1
    assert "gemm: no time: check: before timing, call 0: error 1, more than the tolerance" in done.stdout


def test_without_the_option_nothing_takes_the_gpu(project: Path) -> None:
    (project / "conftest.py").write_text("")
    (project / "test_speed.py").write_text("def test_o_proj(kernel_benchmark):\n    kernel_benchmark('x')\n")
    done = run(project, "-rs")
    assert done.returncode == 0
    assert "1 skipped" in done.stdout
    assert "give --tokenfab to time kernels on this machine's GPU" in done.stdout


def test_with_the_option_and_no_gpu_it_says_so(project: Path) -> None:
    from tokenfab.bench.cuda_device import CudaDevice
    from tokenfab.bench.device import NoGpu

    try:
        CudaDevice()
    except NoGpu:
        done = run(project, "--tokenfab", TRITON_INTERPRET="0")
        assert done.returncode == 4
        assert "--tokenfab: " in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
    else:
        pytest.skip("this machine has a GPU")


def test_without_pytest_benchmark_it_says_so(project: Path) -> None:
    done = run(project, "-p", "no:benchmark")
    assert done.returncode == 1
    assert "kernel_benchmark: expected pytest-benchmark installed and on; got none" in done.stdout


def test_kernels_are_found_by_name() -> None:
    assert find_kernel("gemm/mxfp4-bf16").weight == "mxfp4"
    assert find_kernel("gemm/bf16-bf16@torch.matmul").library == "torch.matmul"
    with pytest.raises(ValueError, match=r"^kernel: expected one of gemm/fp8-fp8, .*; got 'gemm/none'"):
        find_kernel("gemm/none")


def test_the_clock_stands_still() -> None:
    clock = VirtualClock([0.5, 0.25])
    assert clock() == clock() == 0.0
    clock.advance()
    assert clock() == 0.5
    clock.advance()
    assert clock() == 0.75
