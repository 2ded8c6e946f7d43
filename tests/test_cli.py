"""The command as a stranger meets it: help, tables, JSON, one-line errors with exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli
from tokenfab.bench.models import SHIPPED
from tokenfab.kernels.registry import OPS


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


def run_json(*args: str) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output, parse_constant=pytest.fail)


STEP = ("step", "deepseek-v3", "--gpu", "h200", "--stack", "sglang", "--parallel", "dp8-ep8", "--batch", "64")
COST = ("cost", "qwen3-30b-a3b", "--gpu", "h100,h200", "--stack", "vllm,sglang", "--parallel", "tp1,tp2")


def test_step_document_has_the_promised_fields() -> None:
    document = run_json(*STEP)
    assert set(document) == {"schema_version", "model", "points", "omitted", "skipped"}
    assert (document["schema_version"], document["model"]) == (1, "deepseek-v3")
    assert any("launch gaps" in text for text in document["omitted"])
    (point,) = document["points"]
    expected = {
        "gpu": "h200", "stack": "sglang", "stack_version": "0.5.14", "precision": "fp8", "gpus": 8, "attention_tp": 1,
        "expert_parallel": 8, "batch_per_gpu": 64, "context": 4096, "usd_per_gpu_hour": 2.90,
    }  # fmt: skip
    assert {name: point[name] for name in expected} == expected
    assert "July 2026" in point["price_source"]
    assert set(point["coverage"]) == {"measured", "interpolated", "modelled"}
    for op in point["ops"]:
        assert {"op", "calls_per_step", "time_s", "floor_s", "share", "usd_per_mtok", "provenance", "source", "bytes",
                "flops"} <= set(op)  # fmt: skip
    assert sum(op["time_s"] for op in point["ops"]) == pytest.approx(point["step_s"])
    assert sum(op["usd_per_mtok"] for op in point["ops"]) == pytest.approx(point["usd_per_mtok_output"])
    assert point["tokens_per_s_per_gpu"] == pytest.approx(64 / point["step_s"])
    experts = next(op for op in point["ops"] if op["op"] == "experts")
    assert experts["bytes"] == pytest.approx(58 * 32 * 3 * 7168 * 2048, rel=0.03)


def test_step_for_people_names_totals_provenance_and_omissions() -> None:
    text = run(*STEP).output
    for phrase in (
        "experts",
        "of floor",
        "$/M saved at floor",
        "tokens/s/GPU",
        "measured",
        "left out:",
        "per million output",
    ):
        assert phrase in text


def test_cost_document_and_table() -> None:
    document = run_json(*COST, "--batch", "1,16")
    places = {(p["gpu"], p["stack"], p["gpus"], p["batch_per_gpu"]) for p in document["points"]}
    assert len(places) == len(document["points"]) == 2 * 2 * 2 * 2
    text = run(*COST).output
    assert "cheapest at >= 20 tokens/s/user" in text
    assert text.count("h100") == text.count("h200") == 2


def test_cost_all_prints_every_point() -> None:
    assert run(*COST, "--batch", "1,16", "--all").output.count("tp2") >= 8


def test_price_formula() -> None:
    assert "$4.202 per million tokens" in run("price", "--tokens-per-s", "93.2", "--usd-per-gpu-hour", "1.41").output
    found = run_json("price", "--tokens-per-s", "93.2", "--usd-per-gpu-hour", "1.41", "--kw", "1.73")
    assert found["joules_per_token"] == pytest.approx(1730 / 93.2)


@pytest.mark.parametrize(
    ("args", "rows", "phrase"),
    [
        (("models",), 13, "MLA 128 x (512 + 64)"),
        (("models", "--precisions"), 6, "fp8_block x fp8_group"),
        (("gpus",), 15, "GB300 NVL72"),
        (("prices", "--gpu", "gb300"), 6, "placeholder"),
        (("published", "tables", "--gpu", "h100"), 27, "DeepGemmFp8BlockScaledMMKernel"),
        (("published", "op", "gemm", "m=64", "n=2112", "k=7168", "--gpu", "h100"), 3, "interpolated"),
    ],
)
def test_lists(args: tuple[str, ...], rows: int, phrase: str) -> None:
    assert len(run_json(*args)) >= rows
    assert phrase in " ".join(run(*args).output.split())


def test_published_check() -> None:
    rows = run_json("published", "check", "--gpu", "h100", "--stack", "trtllm")
    assert {"gemm", "moe", "generation_attention", "generation_mla"} <= {row["table"] for row in rows}
    text = run("published", "check", "--gpu", "h100", "--stack", "trtllm").output
    assert "held-out rows: median <= 5 % in" in text


@pytest.mark.parametrize(
    "args",
    [(), ("cost",), ("step",), ("models",), ("gpus",), ("prices",), ("price",), ("published",), ("published", "op"),
     ("published", "check"), ("published", "tables")],
)  # fmt: skip
def test_every_command_has_help(args: tuple[str, ...]) -> None:
    result = run(*args, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output
    assert len(result.output.splitlines()[2].strip()) > 10


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(**changes: Any) -> str:
        data = json.loads((SHIPPED / "mixtral-8x7b.json").read_text()) | changes
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: value for name, value in data.items() if value != "absent"}))
        return str(path)

    return write


ON_H100 = ("--gpu", "h100")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("step", "gpt-5", *ON_H100), "model: expected one of deepseek-r1"),
        (("step", "deepseek-v3", "--gpu", "h1000"), "gpu: expected one of a100"),
        (("step", "deepseek-v3", *ON_H100, "--stack", "ollama"), "stack: expected one of vllm, sglang, trtllm"),
        (("cost", "deepseek-v3", "--stack", "vllm@0.1"), "stack: expected vllm at one of"),
        (("step", "deepseek-v3", "--gpu", "h800", "--tier", "rent"), "no published measurements for h800"),
        (("step", "deepseek-v3", *ON_H100, "--parallel", "dp8-ep8"), "the smallest that fits is 16 x h100"),
        (
            ("step", "deepseek-v3", *ON_H100, "--parallel", "dp12-ep12"),
            "expert_parallel: expected a divisor of deepseek-v3's 256",
        ),
        (("step", "qwen3-30b-a3b", *ON_H100, "--parallel", "tp3"), "attention_tp: expected a divisor"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--parallel", "x8"), "parallel: expected a form like tp8"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--batch", "0"), "batch_per_gpu: expected more than 0; got 0"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--batch", "nan"), "batch_per_gpu: expected"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--batch", "-4"), "batch_per_gpu: expected more than 0"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--context", "0"), "context: expected at least 1; got 0"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--context", "999999"), "context: expected at most qwen3-30b-a3b's 40960"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--precision", "int1"), "precision: expected one of bf16"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--precision", "nvfp4"), "h100 has no FP4 matrix units"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--kept-tokens", "2"), "kept_tokens_per_step: expected between 1 and"),
        (("step", "qwen3-30b-a3b", *ON_H100, "--load", "zipf"), "load: expected one of balanced"),
        (("step", "qwen3-30b-a3b", "--gpu", "l40s"), "price: no rent_3yr price for l40s"),
        (
            ("step", "qwen3-30b-a3b", *ON_H100, "--usd-per-gpu-hour", "-1"),
            "usd_per_gpu_hour: expected a positive number",
        ),
        (
            ("step", "qwen3-30b-a3b", *ON_H100, "--published-data", "/nonexistent"),
            "expected a folder with query_versions.yaml",
        ),
        (
            ("price", "--tokens-per-s", "0", "--usd-per-gpu-hour", "2"),
            "tokens_per_s: expected a positive number; got 0",
        ),
        (
            ("price", "--tokens-per-s", "-3", "--usd-per-gpu-hour", "2"),
            "tokens_per_s: expected a positive number; got -3",
        ),
        (("prices", "--gpu", "l40s"), "price: no price for l40s"),
        (("cost", "qwen3-30b-a3b", "mixtral-8x7b", "--json"), "--json: expected one model; got 2"),
        (("cost", "qwen3-30b-a3b", "--batch", "1,x"), "batches: could not convert"),
        (("cost", "qwen3-30b-a3b", "--prices", "nowhere.toml"), "prices: cannot read nowhere.toml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": -4096}, "hidden_size"),
        ({"hidden_size": float("nan")}, "NaN"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"vocab_size": "absent"}, "vocab_size"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most the 8 experts; got 9"),
        ({"architectures": ["MysteryForCausalLM"]}, "architectures: expected one of DeepseekV3ForCausalLM"),
    ],
)
def test_bad_config_is_one_line_and_exit_code_2(config: Any, changes: dict[str, Any], message: str) -> None:
    result = run("step", config(**changes), *ON_H100)
    assert result.exit_code == 2
    assert message in result.output or (message == "NaN" and "malformed" in result.output)
    assert len(result.output.strip().splitlines()) == 1


def test_config_by_path_works(config: Any) -> None:
    assert run_json("step", config(), *ON_H100, "--parallel", "tp2")["points"][0]["gpus"] == 2


def test_r23_truncated_table_is_one_line_and_exit_code_2(tree: Any) -> None:
    root, write = tree
    rows = {"gemm_dtype": "bfloat16", "m": [1, 2], "n": 32, "k": 32, "latency": [1.0, 2.0]}
    path = write("h100_sxm/gemm/vllm/2.0/gemm_perf", rows)
    path.write_bytes(path.read_bytes()[:50])
    result = run("step", "qwen3-30b-a3b", *ON_H100, "--published-data", str(root))
    assert result.exit_code == 2
    assert f"error: {path}: expected a whole Parquet file" in result.output


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    hide = {"aiconfigurator_core"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hide else find(name, *rest))
    result = run("cost", "qwen3-30b-a3b")
    assert result.exit_code == 2
    assert "pip install 'aiconfigurator-core" in result.output


@pytest.mark.parametrize("command", [("models",), ("cost", "qwen3-30b-a3b", "--gpu", "h100", "--batch", "1", "--json")])
def test_costing_never_loads_torch_and_models_loads_little(command: tuple[str, ...]) -> None:
    code = (
        "import sys; from tokenfab.__main__ import cli\n"
        f"try: cli.main({list(command)!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'triton', 'pandas', 'plotly', 'scipy'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)), 'pyarrow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"LOADED [] {command[0] == 'cost'}" in result.stdout


# -- inspect and bench -----------------------------------------------------------------------------


def test_inspect_document_and_table() -> None:
    pytest.importorskip("triton")
    args = ("inspect", "gemm", "--arch", "sm_90", "--format", "mxfp4-bf16", "--gpu", "h100,h200")
    document = run_json(*args)
    assert document["schema_version"] == 1
    first = document["inspections"][0]
    assert first["point"]["name"] == "gemm/mxfp4-bf16/m16-16x256"
    assert first["findings"] == []
    assert first["compiled"]["spill_store_bytes"] == 0
    assert {floor["gpu"] for floor in first["floors"]} == {"h100", "h200"}
    text = run(*args).output
    assert "HGMMA.64x16x16.F32.BF16" in text
    assert "0 with findings" in text
    assert next(line.split()[-1] for line in text.splitlines() if " h100 " in line) == "4.7"


def test_inspect_takes_a_quantizer_by_its_format() -> None:
    pytest.importorskip("triton")
    document = run_json("inspect", "quantize", "--arch", "sm_100", "--format", "nvfp4", "--gpu", "b200")
    names = [each["point"]["name"] for each in document["inspections"]]
    assert names == ["quantize/nvfp4/64x7168", "quantize/nvfp4/64x7168/from_amax"]
    assert [each["findings"] for each in document["inspections"]] == [[], []]
    assert [each["floors"][0]["matrix_s"] for each in document["inspections"]] == [0, 0]


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_help_names_every_op(command: str) -> None:
    text = run(command, "--help").output
    assert all(op in text for op in (*OPS, *(("copy",) if command == "bench" else ())))


def test_inspect_fails_where_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tokenfab.kernels import matmul_points

    monkeypatch.setattr(matmul_points, "W4A16_MAX_INSTRUCTIONS", 1.0)
    result = run("inspect", "gemm", "--arch", "sm_90", "--format", "mxfp4-bf16", "--gpu", "h100")
    assert result.exit_code == 1
    assert "2.3" in result.output
    assert "expected at" in result.output


def test_bench_lists_its_points_without_a_gpu() -> None:
    listed = run_json("bench", "gemm", "--list", "--gpu", "h100", "--model", "deepseek-v3", "--batch", "64")
    o_proj = {"kernel": "gemm/fp8_block-fp8_group", "m": 64, "n": 7168, "k": 16384, "places": ["deepseek-v3 o_proj"],
              "l2_policy": "cold_weights"}  # fmt: skip
    assert o_proj in listed
    listed = run_json("bench", "quantize", "--list", "--gpu", "h100", "--model", "deepseek-v3", "--batch", "64")
    assert listed == [{"kernel": "quantize/fp8_group", "rows": 64, "columns": 16384, "places": ["deepseek-v3 o_proj"],
                       "l2_policy": "hot"}]  # fmt: skip
    assert "117.5" in run("bench", "--list", "--gpu", "h100", "--model", "deepseek-v3", "--batch", "64").output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "gemm", "--format", "int4"), "format: expected one of fp8-fp8"),
        (("inspect", "gemm", "--arch", "sm_80"), "archs: expected some of sm_90"),
        (("inspect", "attend"), "op: expected one of gemm"),
        (("bench", "--list"), "gpu: expected --gpu NAME with --list; got none"),
        (("bench", "gemm", "--list", "--gpu", "h900"), "gpu: expected one of"),
        (("bench", "gemm", "--batch", "x"), "batches: invalid literal"),
    ],
)
def test_kernel_commands_refuse_in_one_line(args: tuple[str, ...], message: str) -> None:
    pytest.importorskip("triton")
    result = run(*args)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert message in result.output


def test_bench_without_a_gpu_says_so_and_offers_inspect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = run("bench", "gemm", "--out", str(tmp_path / "records"))
    assert result.exit_code == 2
    assert re.fullmatch(
        r"error: GPU: expected .*; found none\. Without one, `tokenfab inspect gemm` .*\n", result.output
    )
    assert not (tmp_path / "records").exists()


def test_bench_never_times_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("bench", "gemm")
    assert result.exit_code == 2
    assert "the interpreter's times on the CPU are no kernel speeds" in result.output


def test_bench_runs_each_pass_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tokenfab.bench import cuda_device
    from tokenfab.bench.device import DeviceProperties
    from tokenfab.commands import kernels as kernel_commands

    class Device:
        properties = DeviceProperties(
            name="NVIDIA H100 80GB HBM3", uuid="GPU-0", l2_bytes=1, driver="1", cuda="1", torch="1", triton="1"
        )

    commands: list[list[str]] = []

    def record(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cuda_device, "CudaDevice", Device)
    monkeypatch.setattr(kernel_commands.subprocess, "run", record)
    out = str(tmp_path / "records")
    asked = ["gemm", "--model", "deepseek-v3", "--format", "fp8_block", "--batch", "1,64", "--context", "2048",
             "--gpu", "h200", "--budget", "3.0", "--no-energy", "--out", out]  # fmt: skip
    result = run("bench", *asked, "--processes", "2")
    assert result.exit_code == 0, result.output
    assert [command[1:4] for command in commands] == [["-m", "tokenfab", "bench"]] * 2
    assert [command[4:] for command in commands] == [[*asked, "--pass", str(number)] for number in (1, 2)]
    assert "H200 SXM" in result.output
