"""``tokenfab tune`` from the command line: floors without a GPU; verdicts, the table and its worth on a made-up one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli
from tokenfab.bench import cuda_device
from tokenfab.bench.device import DeviceProperties, NoGpu
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.tune import Timed, Verdict
from tokenfab.bench.tune_space import Space
from tokenfab.bench.tune_table import read_table
from tokenfab.commands import tune as tune_module
from tokenfab.kernels.tiles import Tile

pytest.importorskip("triton")

PROPERTIES = DeviceProperties(
    name="NVIDIA H100 80GB HBM3", uuid="GPU-1", l2_bytes=52428800, driver="580.1", cuda="13.0", torch="2.11.0",
    triton="3.6.0",
)  # fmt: skip
OTHER = Tile(64, 128, 128, 4, 4)
ASKED = ["tune", "gemm", "--format", "fp8_block", "--gpu", "h100", "--jobs", "1"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space of one tile beside the default."""
    monkeypatch.setattr(Space, "tiles", lambda self: iter([OTHER, Tile(64, 256, 128, 4, 3)]))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise NoGpu("GPU: none here")

    monkeypatch.setattr(cuda_device, "CudaDevice", none)


class _Gpu:
    properties = PROPERTIES


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An H100 whose passes are noted and not run."""
    passes: list[list[str]] = []
    monkeypatch.setattr(cuda_device, "CudaDevice", _Gpu)

    noting(monkeypatch, passes)
    return passes


def noting(monkeypatch: pytest.MonkeyPatch, passes: list[list[str]], returncode: int = 0) -> None:
    """Passes are noted; other programs run."""
    others = subprocess.run

    def note(command: list[str], **options: Any) -> Any:
        if "--pass" not in command:
            return others(command, **options)
        passes.append(command[command.index("tune") :])
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(tune_module.subprocess, "run", note)


def test_without_a_gpu_it_ranks_by_floors_and_ends_well(no_gpu: None) -> None:
    result = run(*ASKED, "--shape", "m=64,n=2112,k=7168")
    assert result.exit_code == 0, result.output
    assert "Ranked by floors only; nothing was timed. GPU: none here" in result.output
    assert "2 of 3 tiles are left, by their floors" in result.output
    assert "64x128x128 w8 s3 (default)" in result.output
    assert "64x128x128 w4 s4" in result.output
    assert "dropped 1: registers: the accumulators alone" in result.output


def test_the_document_holds_floors_and_no_times(no_gpu: None) -> None:
    result = run(*ASKED, "--batch", "64", "--model", "deepseek-v3", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["gpu"] == "h100"
    found = document["targets"]
    assert {(each["shape"]["n"], each["shape"]["k"]) for each in found} >= {(2112, 7168), (7168, 16384)}
    assert all(each["shape"]["m"] == 64 for each in found)
    assert all(each["survivors"] and "gain" not in each for each in found)
    assert any("deepseek-v3 o_proj" in each["places"] for each in found)


def test_experts_are_tuned_under_balanced_load(no_gpu: None) -> None:
    asked = ["moe", "--format", "mxfp4-bf16", "--model", "gpt-oss-120b", "--batch", "16", "--gpu", "h200"]
    result = run("tune", *asked, "--jobs", "1", "--json")
    assert result.exit_code == 0, result.output
    assert [each["shape"]["load"] for each in json.loads(result.stdout)["targets"]] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "quantize", "--gpu", "h100"], "op: expected one of gemm, moe, attention, mla; got 'quantize'"),
        (["tune", "gemm"], "GPU: none here. Without one, say with --gpu which to compile for"),
        ([*ASKED, "--arch", "sm_100"], "arch: expected sm_90, as h100 has; got sm_100"),
        (["tune", "gemm", "--gpu", "h100", "--shape", "m=64"], "shape: expected m=N,n=N,k=N for gemm"),
        (["tune", "gemm", "--gpu", "h100", "--format", "int4"], "format: expected one of"),
        (["tune", "gemm", "--gpu", "l40s"], "gpu: expected one of sm_90, sm_100, sm_103, sm_120; got l40s (8.9)"),
    ],
)
def test_what_it_refuses(no_gpu: None, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.startswith("error: ")


def test_each_pass_is_a_process_with_its_share_of_the_time(gpu: list[list[str]], tmp_path: Path) -> None:
    shape = ["--shape", "m=64,n=2112,k=7168"]
    result = run(*ASKED, *shape, "--budget-minutes", "10", "--processes", "4", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert [each[each.index("--pass") + 1] for each in gpu] == ["1", "2", "3", "4"]
    shares = [float(each[each.index("--pass-budget") + 1]) for each in gpu]
    assert shares == pytest.approx([360, 200, 300, 600], rel=0.01)  # of what is left; the clock stands still here
    for each in gpu:
        assert each[each.index("--gpu") + 1] == "h100"
        assert each[each.index("--shape") + 1] == shape[1]
        assert each[each.index("--format") + 1] == "fp8_block"
    assert "nothing to compare with" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_failed_pass_ends_it(gpu: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    noting(monkeypatch, gpu, returncode=7)
    assert run(*ASKED, "--shape", "m=64,n=2112,k=7168").exit_code == 7
    assert len(gpu) == 1


def test_floors_only_on_a_gpu_measures_nothing(gpu: list[list[str]]) -> None:
    result = run(*ASKED, "--shape", "m=64,n=2112,k=7168", "--floors")
    assert result.exit_code == 0
    assert "nothing was timed" in result.output
    assert gpu == []


def adopting(monkeypatch: pytest.MonkeyPatch, adopted: bool) -> None:
    default = Timed(Tile(64, 128, 128, 8, 3), 10e-6, 1.0, 0.002, (1.0, 1.001, 0.999))
    best = Timed(OTHER, 9e-6, 0.9, 0.003, (0.9, 0.901, 0.899))
    verdict = Verdict(default, best, 0.1, 0.01, OTHER if adopted else None, "faster by 10.0%" if adopted else "noise")
    monkeypatch.setattr("tokenfab.bench.tune.decide", lambda trials, processes: verdict)


def test_an_adopted_tile_is_written_and_priced(
    gpu: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 us saved per call of q_kv_a_proj, once in each of 61 layers of a step of 64 tokens, at $3.6 per GPU-hour."""
    adopting(monkeypatch, True)
    asked = [*ASKED, "--model", "deepseek-v3", "--batch", "64", "--out", str(tmp_path), "--usd-per-gpu-hour", "3.6"]
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    found = {(each["shape"]["n"], each["shape"]["k"]): each for each in json.loads(result.stdout)["targets"]}
    each = found[2112, 7168]
    assert each["adopted"] == msgspec.to_builtins(OTHER)
    assert each["saved_s"] == pytest.approx(1e-6)
    (worth,) = each["worth"]
    assert (worth["model"], worth["calls_per_step"]) == ("deepseek-v3", 61)
    assert worth["saved_s_per_step"] == pytest.approx(61e-6)
    assert worth["saved_gpu_s_per_mtok"] == pytest.approx(61e-6 / 64 * 1e6)
    assert worth["saved_usd_per_mtok"] == pytest.approx(61e-6 / 64 * 1e6 * 3.6 / 3600)
    table = read_table(tmp_path / "tuned-h100.json", get_gpu("h100"))
    assert len(table.tiles) == len(found)
    printed = run(*asked)
    assert (
        "worth: deepseek-v3 q_kv_a_proj (gemm/fp8_block-fp8_group 64 x 2112 x 7168): 61.00 us per step of 61 calls"
        in (printed.output)
    )
    assert f"{len(found)} of {len(found)} shapes have a tuned tile in {tmp_path / 'tuned-h100.json'}" in printed.output
    adopting(monkeypatch, False)
    assert run(*asked).exit_code == 0
    assert read_table(tmp_path / "tuned-h100.json", get_gpu("h100")).tiles == ()


def test_the_help_says_what_it_does() -> None:
    result = run("tune", "--help")
    assert result.exit_code == 0
    assert "tokenfab tune gemm --format fp8_block --model deepseek-v3 --batch 64 --gpu h100" in result.output
    assert "--pass" not in result.output.replace("--pass-budget", "")


def test_clock_gives_each_target_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(tune_module.time, "monotonic", lambda: now)
    is_over, never = tune_module._clock(160.0, 3), tune_module._clock(None, 3)
    assert not is_over(0.5)
    now = 111.0
    assert is_over(0.5)
    assert not is_over(1.0)
    now = 121.0
    assert is_over(1.0)
    assert not never(0.0)
