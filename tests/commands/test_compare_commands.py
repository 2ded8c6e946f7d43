"""``tokenfab compare`` and ``tokenfab gate`` as a stranger runs them: exit codes, one-line errors, JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli
from tokenfab.bench.gate_run import baseline_targets, measure_pass, user_kernels
from tokenfab.bench.record import Record, encode
from tokenfab.bench.records import RecordStore
from tokenfab.commands import compare as compare_commands
from tokenfab.tests.bench.made_records import RECORD
from tokenfab.tests.bench.made_samples import POINT, processes, side

PLACED = msgspec.structs.replace(RECORD.point, shape=POINT.shape, formats=POINT.formats, recipe="tokenfab", tile={})


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def slowed(record: Record, factor: float) -> Record:
    """The same measurement with every time ``factor`` as long, made anew so that its summary bears it out."""
    measurement = record.measurement
    blocks = tuple(
        msgspec.structs.replace(block, time_s=factor * block.time_s, events_s=factor * block.events_s,
                                wall_s=factor * block.wall_s)
        for block in measurement.blocks
    )  # fmt: skip
    changed = msgspec.structs.replace(measurement, blocks=blocks)
    return Record.of(record.point, changed, record.environment, record.recorded_unix_s)


def write(path: Path, factor: float = 1.0, num: int = 3, **changes: Any) -> Path:
    """Records of so many processes."""
    store = RecordStore(path.parent, path.name)
    point = msgspec.structs.replace(PLACED, **changes)
    record = slowed(msgspec.structs.replace(RECORD, point=point), factor)
    for number in range(num):
        store.append(msgspec.structs.replace(record, process=f"p{number}"))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.jsonl")


def test_compare_prints_a_table_and_counts(base: Path, tmp_path: Path) -> None:
    slow = write(tmp_path / "slow.jsonl", 1.1)
    result = run("compare", base, slow, "--usd-per-gpu-hour", "3.6")
    assert result.exit_code == 0, result.output
    assert "gemm/fp8_block-fp8_group" in result.output
    assert "1 points: 0 same, 0 faster, 1 slower, 0 unsure" in result.output
    assert "+10.0%" in result.output
    document = json.loads(run("compare", base, slow, "--json").stdout)
    assert document["pairs"][0]["verdict"] == "slower"
    assert "1 same" in run("compare", base, base).output


def test_compare_with_a_published_stack(base: Path) -> None:
    result = run("compare", "published:vllm", base)
    assert result.exit_code == 0, result.output
    assert "measured: vllm 0.24.0 gemm" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "none.jsonl", "none.jsonl"), "expected a file or folder of measurements; got none"),
        (("compare", "BASE", "published:none"), "stack"),
        (("compare", "BASE:colour=red", "BASE"), "expected FIELD=VALUE"),
        (("compare", "BASE", "BASE", "--tier", "none"), "price: no none price for h100"),
        (("gate", "times", "BASE"), "current: expected CURRENT or --measure, and not both"),
        (("gate", "times", "BASE", "BASE", "--measure"), "current: expected CURRENT or --measure, and not both"),
        (("gate", "times", "published:vllm", "BASE"), "baseline: expected measurements"),
    ],
)
def test_what_is_not_understood_is_one_line(base: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*(each.replace("BASE", str(base)) for each in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(("factor", "code", "word"), [(1.0, 0, "pass"), (1.1, 1, "fail"), (0.97, 0, "pass")])
def test_gate_exit_codes(base: Path, tmp_path: Path, factor: float, code: int, word: str) -> None:
    now = write(tmp_path / "now.jsonl", factor)
    result = run("gate", "times", base, now)
    assert result.exit_code == code, result.output
    assert result.output.strip().endswith(f"gate: {word}")
    assert json.loads(run("gate", "times", base, now, "--json").stdout)["result"] == word


def _missing(base: Path) -> None:
    base.unlink()


def _truncated(base: Path) -> None:
    base.write_bytes(base.read_bytes()[:-40])


def _cut_in_the_middle(base: Path) -> None:
    first, *rest = base.read_bytes().splitlines(keepends=True)
    base.write_bytes(first[:500] + b"\n" + b"".join(rest))


def _nan(base: Path) -> None:
    text = base.read_text()
    base.write_text(text.replace('"roofline_fraction":0', '"roofline_fraction":NaN,"x":0', 1))


def _faster_than_measured(base: Path) -> None:
    fields = json.loads(base.read_text().splitlines()[0])
    fields["time_s"] *= 2
    base.write_text(json.dumps(fields) + "\n")


def _later_schema(base: Path) -> None:
    base.write_text(base.read_text().replace('"schema_version":1', '"schema_version":2', 1))


def _empty(base: Path) -> None:
    base.write_text("")


def _other_machine(base: Path) -> None:
    base.unlink()
    write(base, gpu="h200")


def _renamed(base: Path) -> None:
    base.unlink()
    write(base, op="matmul")


def _few(base: Path) -> None:
    base.unlink()
    write(base, num=2)


@pytest.mark.parametrize(
    "spoil",
    [_missing, _truncated, _cut_in_the_middle, _nan, _faster_than_measured, _later_schema, _empty, _other_machine,
     _renamed, _few],
)  # fmt: skip
def test_r24_a_spoilt_baseline_is_never_a_pass(base: Path, tmp_path: Path, spoil: Any) -> None:
    """Not even where the kernel became four times as slow: nothing is known, and that is said."""
    now = write(tmp_path / "now.jsonl", 4.0)
    spoil(base)
    result = run("gate", "times", base, now)
    assert result.exit_code == 3, result.output
    assert "inconclusive: " in result.output
    assert result.output.strip().endswith("gate: inconclusive")


def test_r24_a_spoilt_baseline_that_is_narrowed_is_no_pass(base: Path, tmp_path: Path) -> None:
    _cut_in_the_middle(base)
    result = run("gate", "times", f"{base}:recipe=tokenfab", write(tmp_path / "now.jsonl"))
    assert result.exit_code == 3, result.output


def test_a_spoilt_measurement_of_now_is_no_pass_either(base: Path, tmp_path: Path) -> None:
    now = write(tmp_path / "now.jsonl")
    now.write_bytes(now.read_bytes()[:-40])
    assert run("gate", "times", base, now).exit_code == 3


# -- measuring -------------------------------------------------------------------------------------


def test_measure_runs_passes_in_fresh_processes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes per cycle; a regression that does not repeat is none."""
    commands: list[list[str]] = []
    factors = {1: 1.1, 2: 1.0}

    def process(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        place = Path(command[command.index("--out") + 1])
        cycle, number = int(place.name.removeprefix("cycle-")), int(command[command.index("--pass") + 1])
        assert Path(command[command.index("--keys") + 1]).read_text().count("gemm") == (cycle == 2)
        record = slowed(msgspec.structs.replace(RECORD, point=PLACED), factors[cycle])
        with (place / "h100.jsonl").open("ab") as file:
            file.write(encode(msgspec.structs.replace(record, process=f"c{cycle}p{number}")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare_commands.subprocess, "run", process)
    out = tmp_path / "out"
    result = run("gate", "times", base, "--measure", "--out", out, "--gpu", "h100", "--kernel", "mine.py:mine")
    assert result.exit_code == 0, result.output
    assert all(command[command.index("--kernel") + 1] == "mine.py:mine" for command in commands)
    assert [command[command.index("--pass") + 1] for command in commands] == ["1", "2", "3"] * 2
    assert all(command[1:5] == ["-m", "tokenfab", "gate", "times"] for command in commands)
    assert sorted(path.name for path in out.iterdir()) == ["cycle-1", "cycle-2"]


def test_a_pass_that_fails_ends_the_gate(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        compare_commands.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 2)
    )
    assert run("gate", "times", base, "--measure", "--out", tmp_path / "out").exit_code == 2


def test_targets_of_a_baseline() -> None:
    baseline = side(processes(1.0), processes(1.0, m=16))
    found = baseline_targets(baseline)
    assert [(each.kernel.name, each.shape["m"]) for each in found] == [
        ("gemm/fp8_block-fp8_group", 64), ("gemm/fp8_block-fp8_group", 16)
    ]  # fmt: skip
    key = baseline.samples[0].point.key
    assert [each.shape["m"] for each in baseline_targets(baseline, {key})] == [64]
    peer = processes(1.0, recipe="torch.matmul", formats={"weight": "bf16", "activation": "bf16"})
    assert baseline_targets(side(peer))[0].kernel.library == "torch.matmul"
    with pytest.raises(ValueError, match=r"^baseline: expected a kernel for gemm/fp8_block-fp8_group@other"):
        baseline_targets(side(processes(1.0, recipe="other")))


def test_a_kernel_of_ones_own_is_gated_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine(weights, activations, output):\n    pass\n")
    baseline = side(processes(1.0), processes(2.0, recipe="user:mine"), label="base.jsonl")
    kernels = user_kernels(baseline, f"{file}:mine")
    assert [(each.name, each.library) for each in kernels] == [("gemm/fp8_block-fp8_group@user:mine", "user:mine")]
    found = baseline_targets(baseline, None, kernels)
    assert [each.kernel.library for each in found] == ["", "user:mine"]
    with pytest.raises(ValueError, match=r"^baseline: expected a kernel for .*@user:mine"):
        baseline_targets(baseline)
    with pytest.raises(ValueError, match=r"^kernel: expected points of user:other in base.jsonl; got tokenfab, user:"):
        user_kernels(baseline, f"{file}:other")


def test_a_pass_records_into_the_gpus_file(tmp_path: Path) -> None:
    from tokenfab.tests.bench.fake_device import FakeDevice

    device = FakeDevice()
    assert measure_pass([], device, tmp_path, 1, "h100") == []  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^gpu: expected the name of one of"):
        measure_pass([], device, tmp_path, 1)  # type: ignore[arg-type]


def test_inspection_needs_its_baseline(tmp_path: Path) -> None:
    result = run("gate", "inspection", tmp_path / "none.json")
    assert result.exit_code == 3, result.output
    assert "none.json: expected a baseline; found none" in result.output
    (tmp_path / "torn.json").write_text('{"schema_version": 1')
    result = run("gate", "inspection", tmp_path / "torn.json", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["rows"][0]["result"] == "inconclusive"


def test_help_tells_exit_codes() -> None:
    result = run("gate", "--help")
    assert "3: inconclusive" in " ".join(result.output.split())
