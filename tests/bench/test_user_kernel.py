"""Kernels of one's own: loaded by path, checked and timed as tokenfab's are, and found out where they are wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench import campaign, cuda_device, user_check
from tokenfab.bench.campaign import Outcome, run_targets
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.places import Place
from tokenfab.bench.records import RecordStore
from tokenfab.bench.summaries import QUICK, kernel_hash, summaries
from tokenfab.bench.targets import DEFAULT_MODELS, SHAPE_NAMES, Target, find_targets, shape_fields
from tokenfab.bench.user_check import SMALL_SHAPES, check_kernel, cpu_device
from tokenfab.bench.user_kernel import UserKernel, UserKernelError, base_kernel, load_user_kernel
from tokenfab.bench.user_table import ONE_CALL, kernels_table, num_rows, place_of, priced
from tokenfab.bench.user_template import ON_HOST, TEMPLATE_FORMATS, buffers_document, buffers_of, template
from tokenfab.costing.kernel_price import usd_per_mtok
from tokenfab.costing.prices import stated_price
from tokenfab.kernels.registry import OPS, find_kernels
from tokenfab.tests.bench.test_campaign import CALL_S, FAST, VirtualDevice

H100 = get_gpu("h100")
DOCUMENT = Path(__file__).parents[2] / "docs" / "own_kernel.md"
SHAPE = {"m": 4, "n": 128, "k": 256}

# a right kernel in torch, of gemm in fp8_row: what the cheats below start from
RIGHT = """
import torch

def product(weights, activations):
    x = activations["data"].float() * activations["scale"]
    return x @ (weights["data"].float() * weights["scale"]).t()

def mine(weights, activations, output):
    output.copy_(product(weights, activations))
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., UserKernel]:
    """A kernel from its source."""

    def write(source: str, function: str = "mine", op: str = "gemm", format: str = "fp8_row") -> UserKernel:
        path = tmp_path / "own.py"
        path.write_text(source)
        return load_user_kernel(f"{path}:{function}", base_kernel(op, [format]))

    return write


@pytest.fixture
def bench(device: torch.device, tmp_path: Path) -> Callable[..., Outcome]:
    """One target through the campaign, real tensors under a virtual clock."""
    if device.type != "cpu":
        pytest.skip("a virtual clock over the CPU; a GPU has its own")
    store = RecordStore(tmp_path, "h100.jsonl")

    def run(kernel: Any, shape: dict[str, int] | None = None) -> Outcome:
        target = Target(kernel, tuple((shape or SHAPE).items()), ("asked",))
        (outcome,) = run_targets([target], VirtualDevice(), H100, store, settings=FAST, has_anchor=False,
                                 buffers_on="cpu")  # fmt: skip
        return outcome

    return run


def problems(outcome: Outcome) -> str:
    assert outcome.record is not None, outcome.skipped
    assert outcome.record.time_s is None
    return "; ".join(outcome.record.invalid)


# -- loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "place", "message"),
    [
        (RIGHT, "own.py", r"^kernel: expected FILE.py:FUNCTION; got '.*own.py'$"),
        (RIGHT, "own.txt:mine", r"^kernel: expected FILE.py:FUNCTION; got "),
        (RIGHT, "own.py:no such", r"^kernel: expected FILE.py:FUNCTION; got "),
        (RIGHT, "other.py:mine", r"^kernel: expected a Python file; found none at .*other.py$"),
        (RIGHT, "own.py:yours", r"^kernel: expected a function yours in .*own.py; it has product, mine$"),
        ("x = 1\n", "own.py:x", r"x: expected a Python function of \(weights, activations, output\); got int"),
        ("def f(a, b): ...\n", "own.py:f", r"own.py: f: expected .*\(weights, activations, output\); got f\(a, b\)$"),
        ("import nowhere_at_all\n", "own.py:f", r"^kernel: .*own.py:1: import: ModuleNotFoundError: No module named"),
        ("x = 1\ndef f(:\n", "own.py:f", r"^kernel: .*own.py:2: import: SyntaxError"),
        ("x = 1\n\ny = x / 0\n", "own.py:f", r"^kernel: .*own.py:3: import: ZeroDivisionError: division by zero"),
        ("def prepare_weights(): ...\n" + RIGHT, "own.py:mine", r"prepare_weights: expected .*\(weights\); got"),
        ("TOLERANCE = 1.5\n" + RIGHT, "own.py:mine", r"TOLERANCE: expected a number from 0 to 1, .*'s; got 1.5"),
        ("TOLERANCE = -1\n" + RIGHT, "own.py:mine", r"TOLERANCE: expected .* got -1"),
        ("TOLERANCE = float('nan')\n" + RIGHT, "own.py:mine", r"TOLERANCE: expected .* got nan"),
        ("TOLERANCE = '1'\n" + RIGHT, "own.py:mine", r"TOLERANCE: expected .* got '1'"),
        (
            "import triton\n@triton.jit\ndef f(weights, activations, output):\n    pass\n", "own.py:f",
            r"own.py: f: expected a Python function .* that launches Triton kernels; got a Triton kernel$",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_said(source: str, place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(source)
    (tmp_path / "own.txt").write_text(source)
    with pytest.raises(ValueError, match=message):
        load_user_kernel(str(tmp_path / place), base_kernel("gemm", ["fp8_row"]))


def test_it_stands_in_for_one_row_of_the_registry() -> None:
    assert base_kernel("gemm", ["fp8_block"]).name == "gemm/fp8_block-fp8_group"
    with pytest.raises(ValueError, match=r"^format: expected one of mxfp4-bf16, mxfp4-fp8_row, .*; got mxfp4$"):
        base_kernel("gemm", ["mxfp4"])
    with pytest.raises(ValueError, match=r"^format: expected one of fp8-fp8, .*; got none$"):
        base_kernel("gemm", None)
    with pytest.raises(ValueError, match=r"^op: expected the op that the kernel computes; got none$"):
        base_kernel(None, ["fp8_row"])


# -- the campaign ------------------------------------------------------------------------------------


def test_a_right_kernel_is_recorded_beside_ours(load: Any, bench: Any) -> None:
    kernel = load(RIGHT)
    outcome = bench(kernel)
    assert outcome.record is not None
    assert outcome.record.invalid == ()
    assert outcome.record.time_s == pytest.approx(CALL_S)
    point = outcome.record.point
    assert (point.recipe, point.tile) == ("user:mine", {})
    assert point.formats == {"weight": "fp8_row", "activation": "fp8_row"}
    assert outcome.record.measurement.check.tolerance == 1
    assert outcome.record.measurement.weight_bytes == kernel.base.work(SHAPE).weight_bytes
    assert bench(kernel).is_old
    ours = bench(kernel.base)
    assert ours.record is not None
    assert ours.record.point.kernel_hash != point.kernel_hash


def test_the_file_its_neighbours_and_the_function_name_a_version(load: Any, tmp_path: Path) -> None:
    properties: Any = VirtualDevice().properties
    helper = tmp_path / "own_helper.py"
    helper.write_text("factor = 1.0\n")
    source = f"import own_helper\n{RIGHT}\nother = mine\n"
    first = kernel_hash(load(source), properties)
    assert kernel_hash(load(source), properties) == first
    assert kernel_hash(load(source + "# a remark\n"), properties) != first
    assert kernel_hash(load(source, "other"), properties) != first
    helper.write_text("factor = 2.0\n")
    assert kernel_hash(load(source), properties) != first
    del sys.modules["own_helper"]


def test_a_layout_of_ones_own_is_made_at_load_and_rotates(load: Any, bench: Any) -> None:
    kernel = load(
        RIGHT + "\ndef prepare_weights(weights):\n"
        "    made = [weights['data'].t().contiguous(), weights['scale'].clone()]\n"
        "    weights['data'].zero_()\n"  # theirs to spoil: the reference has its own
        "    return made\n"
        "\ndef mine(weights, activations, output):\n"
        "    w, scale = weights\n"
        "    x = activations['data'].float() * activations['scale']\n"
        "    output.copy_(x @ w.float() * scale.t())\n"
    )
    outcome = bench(kernel)
    assert outcome.record is not None
    assert outcome.record.invalid == ()
    assert outcome.record.measurement.num_sets > 1
    run = kernel.load()
    first, second = (run.make_weights(SHAPE, seed, "cpu")["prepared"][0] for seed in (1, 2))
    assert first.shape == (SHAPE["k"], SHAPE["n"])
    assert not torch.equal(first.float(), second.float())
    # what is prepared from other weights is wrong
    bad = load(RIGHT + "\ndef prepare_weights(w):\n    return w | {'scale': w['scale'] * 1.1}\n")
    assert "error" in problems(bench(bad))


@pytest.mark.parametrize(
    ("prepared", "message"),
    [
        ("weights | {'n': 3}", "prepare_weights: expected tensors, or dicts, lists or tuples of them; got int"),
        ("{'scale': weights['scale']}", "prepare_weights: expected at least the 32768 bytes .*; got 512"),
        ("weights['nothing']", r"own.py:\d+: prepare_weights: KeyError: 'nothing'"),
    ],
)
def test_a_layout_that_cannot_be_is_said(load: Any, bench: Any, prepared: str, message: str) -> None:
    outcome = bench(load(RIGHT + f"\ndef prepare_weights(weights):\n    return {prepared}\n"))
    assert outcome.record is None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(outcome.skipped)


def test_a_tolerance_may_be_tighter(load: Any, bench: Any) -> None:
    assert "more than the tolerance 0.0001;" in problems(bench(load("TOLERANCE = 1e-4\n" + RIGHT)))


CHEATS = {
    "wrong": ("output.copy_(1.03 * product(weights, activations))", "before timing, call 0: error"),
    "one wrong value": (
        "output.copy_(product(weights, activations)); output.view(-1)[output.abs().argmax()] *= 1.1",
        "before timing, call 0: error",
    ),
    "nothing": ("pass", "before timing, call 0: the output is not finite, or not all written"),
    "tail unwritten": (
        "output[:, :-1] = product(weights, activations)[:, :-1]",
        "before timing, call 0: the output is not finite, or not all written",
    ),
    "cached by address": (
        "key = weights['data'].data_ptr()\n"
        "    if key not in seen: seen[key] = product(weights, activations)\n"
        "    output.copy_(seen[key])",
        "on new inputs: error",
    ),
    "skipped when seen": (
        "key = weights['data'].data_ptr()\n"
        "    if key not in seen:\n"
        "        seen[key] = True; output.copy_(product(weights, activations))",
        "before timing, call .*: the output is not finite, or not all written",
    ),
    "writes weights": (
        "output.copy_(product(weights, activations)); weights['scale'][0] *= 1.0001",
        "inputs changed: the kernel wrote to its inputs",
    ),
    "writes activations": (
        "output.copy_(product(weights, activations)); activations['data'][0, 0] = 0",
        "(inputs changed|error)",
    ),
    "right only at first": (
        "seen[len(seen)] = 1; output.copy_(product(weights, activations) * (1 if len(seen) < 10 else 1.1))",
        "(captured|after timing): error",
    ),
    "first set's weights": (
        "first = seen.setdefault('first', weights['data'].float() * weights['scale'])\n"
        "    output.copy_((activations['data'].float() * activations['scale']) @ first.t())",
        "before timing, call .*: error",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS)
def test_r19_cheats_are_found_out(load: Any, bench: Any, cheat: str) -> None:
    body, reason = CHEATS[cheat]
    outcome = bench(load(f"{RIGHT}\nseen = {{}}\ndef cheat(weights, activations, output):\n    {body}\n", "cheat"))
    with pytest.raises(AssertionError, match=f"check: .*{reason}"):
        raise AssertionError(problems(outcome))


def test_outputs_put_into_the_dict_are_not_the_output(load: Any, bench: Any) -> None:
    source = (
        "import torch\ndef mine(weights, activations, output):\n"
        "    x = activations['x'].float()\n"
        "    output['scale'] = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448\n"
        "    output['data'] = (x / output['scale']).clamp(-448, 448).to(torch.float8_e4m3fn)\n"
    )
    kernel = load(source, op="quantize", format="fp8_row")
    assert "not all written" in problems(bench(kernel, {"rows": 3, "columns": 160}))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return product(weights, activations)", "mine: expected output filled in place and None returned; got Tensor"),
        ("raise ValueError('m: expected at least 16; got 4')", r"own.py:11: mine: ValueError: m: expected at least 16"),
        ("weights['nothing']", "own.py:11: mine: KeyError: 'nothing'"),
    ],
)
def test_what_it_raises_stops_no_other(load: Any, bench: Any, body: str, reason: str) -> None:
    kernel = load(f"{RIGHT}\n\ndef mine(weights, activations, output):\n    {body}\n".replace("\n\n\n", "\n"))
    outcome = bench(kernel)
    assert outcome.record is None
    with pytest.raises(UserKernelError, match=reason):
        raise UserKernelError(outcome.skipped)
    assert bench(kernel.base).record is not None


def test_a_lack_of_memory_is_the_campaigns_to_explain(load: Any, bench: Any) -> None:
    outcome = bench(load(RIGHT + "\ndef mine(w, a, o):\n    raise torch.OutOfMemoryError('none left')\n"))
    assert outcome.skipped == "memory: none left"


def test_output_itself_may_be_returned(load: Any, bench: Any) -> None:
    outcome = bench(load(RIGHT + "\ndef mine(w, a, o):\n    return o.copy_(product(w, a))\n"))
    assert outcome.record.invalid == ()


# -- shapes, templates, document ---------------------------------------------------------------------


def test_shapes_are_named_as_the_models_are() -> None:
    for target in find_targets(None, None, DEFAULT_MODELS, [64], H100, [1024]):
        if target.kernel.op != "copy":
            assert tuple(target.shape) == SHAPE_NAMES[target.kernel.op]
    assert all(set(shape) == set(SHAPE_NAMES[op]) for op in OPS for shape in SMALL_SHAPES[op])
    assert shape_fields("gemm", "n=7168, k=2048,m=64") == (("m", 64), ("n", 7168), ("k", 2048))
    for text in ("m=1,n=2", "m=1,n=2,k=3,k=3", "m=1,n=2,k=3,l=4", "m=0,n=2,k=3", "m=1.5,n=2,k=3", "m=-1,n=2,k=3", ""):
        with pytest.raises(ValueError, match=r"^shape: expected "):
            shape_fields("gemm", text)
    with pytest.raises(ValueError, match=r"^shape: expected one of gemm, .*; got no op$"):
        shape_fields(None, "m=1")


def test_asked_shapes_take_the_place_of_the_models(load: Any) -> None:
    kernel = load(RIGHT)
    fields = shape_fields("gemm", "m=64,n=256,k=512")
    found = find_targets("gemm", ["fp8_row"], ["deepseek-v3"], [64], H100, extra=[kernel], shapes=[fields])
    names = [target.kernel.name for target in found]
    assert names[:2] == ["gemm/fp8_row-fp8_row@user:mine", "gemm/fp8_row-fp8_row"]
    assert "gemm/fp8_row-fp8_row@torch._scaled_mm" in names
    assert {target.fields for target in found} == {fields}
    at_models = find_targets("gemm", ["fp8_row"], ["deepseek-v3"], [64], H100, extra=[kernel])
    of_mine = {target.fields for target in at_models if target.kernel is kernel}
    assert of_mine == {target.fields for target in at_models if target.kernel is kernel.base}
    assert len(of_mine) > 3


@pytest.mark.parametrize("op", OPS)
def test_templates_are_right_as_they_are(device: torch.device, op: str, tmp_path: Path) -> None:
    if device.type != "cpu":
        pytest.skip("checked on the CPU; on a GPU the bench does")
    text = template(op, None)
    (tmp_path / "own.py").write_text(text)
    kernel = load_user_kernel(f"{tmp_path / 'own.py'}:my_kernel", base_kernel(op, [TEMPLATE_FORMATS[op]]))
    checked = check_kernel(kernel, SMALL_SHAPES[op], cpu_device(), "cpu")
    assert [each.verdict for each in checked] == ["ok"] * len(SMALL_SHAPES[op])
    assert all(f"{row.part}: {row}\n" in text for row in buffers_of(kernel.base, SMALL_SHAPES[op][0]))
    (asked,) = [line.split("--shape ")[1] for line in text.splitlines() if "--shape " in line]
    assert shape_fields(op, asked)


def test_any_other_format_starts_from_the_registrys_own(device: torch.device, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(template("quantize", ["mxfp4"]))
    kernel = load_user_kernel(f"{path}:my_kernel", base_kernel("quantize", ["mxfp4"]))
    (checked,) = check_kernel(kernel, SMALL_SHAPES["quantize"][:1], cpu_device(), "cpu")
    assert checked.passed
    with pytest.raises(ValueError, match=r"^op: expected one of gemm, .*; got none$"):
        template(None, None)


@pytest.mark.parametrize("op", OPS)
def test_the_document_has_the_buffers_as_they_are_made(op: str) -> None:
    assert buffers_document(op) in DOCUMENT.read_text()


def test_buffers_on_the_host_are_the_small_ones() -> None:
    """So that a launch may read them; all others are on the device."""
    for op in OPS:
        for kernel in find_kernels(op)[:1]:
            rows = buffers_of(kernel, SMALL_SHAPES[op][0])
            assert all(sum(row.sizes) <= 8 for row in rows if row.name in ON_HOST)


# -- tables ------------------------------------------------------------------------------------------


def test_rows_of_a_call_are_its_tokens() -> None:
    assert num_rows("gemm", {"m": 64}) == 64
    assert num_rows("moe", {"num_tokens": 64, "ep": 8}) == 8
    assert num_rows("attention", {"batch": 16, "q_len": 4}) == 64
    assert num_rows("rope_append", {"num_tokens": 3}) == 3
    assert num_rows("swiglu_quantize", {"rows": 5}) == 5
    assert num_rows("copy", {"num_bytes": 5}) is None


def test_a_price_of_the_call_stands_beside_its_time(load: Any, bench: Any) -> None:
    kernel = load(RIGHT)
    records = [bench(each).record for each in (kernel.base, kernel)]
    ours, mine = summaries(records)
    usd = partial(usd_per_mtok, price=stated_price("h100", 3.6))
    alone = place_of(mine, ["deepseek-v3"])
    assert alone == Place("", ONE_CALL, 1, 4)  # 4 rows in 50 ms at $3.6/h: 1e-3 $/s * 0.05 s / 4 * 1e6
    assert priced(mine, alone, usd) == pytest.approx(12.5)
    assert priced(mine, alone, None) is None
    table = kernels_table("title", [ours, mine], ["deepseek-v3"], usd)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["kernel"] == ["tokenfab", "user:mine"]
    assert cells["us"] == ["50,000", "50,000"]
    assert cells["x tokenfab"] == ["1.00", "1.00"]
    assert cells["$/M"] == ["12.5", "12.5"]
    assert cells["where"] == [ONE_CALL] * 2
    placed = dataclasses.replace(
        mine, point=msgspec.structs.replace(mine.point, shape={"m": 64, "n": 7168, "k": 16384})
    )
    assert str(place_of(placed, ["deepseek-v3"])) == "deepseek-v3 o_proj"
    assert cells["verdict"] == ["not_flat", "not_flat"]  # the virtual clock's half second of warm-up
    assert mine.floor_s == records[1].measurement.floor_s
    wrong = bench(load(RIGHT.replace("output.copy_(", "output.copy_(2 * ")))
    table = kernels_table("t", summaries([wrong.record]), [], None)
    cells = {str(column.header): next(iter(column.cells)) for column in table.columns}
    assert [cells[name] for name in ("us", "of floor", "x tokenfab", "$/M")] == ["-"] * 4
    assert "error" in str(cells["verdict"])


# -- the command -------------------------------------------------------------------------------------


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def virtual(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cpu":
        pytest.skip("a virtual clock over the CPU; a GPU has its own")
    monkeypatch.setattr(cuda_device, "CudaDevice", VirtualDevice)
    monkeypatch.setattr(campaign, "run_targets", lambda *args, **more: run_targets(*args, **more, buffers_on="cpu"))


MXFP4 = """
from tokenfab.kernels.registry import find_kernels
RUN = find_kernels("gemm", ["mxfp4-bf16"])[0].load()
def mine(weights, activations, output):
    RUN.launch(weights, activations, output)
"""


def quick(path: Path, folder: Path, *more: str) -> Any:
    return run_cli("bench", "gemm", "--format", "mxfp4-bf16", "--kernel", f"{path}:mine", "--quick", "--shape",
                   "m=2,n=64,k=128", "--out", str(folder), *more)  # fmt: skip


def test_the_edit_loop(virtual: None, tmp_path: Path) -> None:
    path, folder = tmp_path / "own.py", tmp_path / "records"
    path.write_text(MXFP4)
    result = quick(path, folder, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["library"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["user:mine", "tokenfab", "torch.matmul"]
    assert all(row["is_quick"] and row["time_s"] == pytest.approx(CALL_S) for row in rows.values())
    assert rows["user:mine"]["usd_per_mtok"] > 0
    assert rows["user:mine"]["floor_s"] > 0
    assert [path.parent.name for path in folder.rglob("*.jsonl")] == ["quick"]  # apart from measurements
    store = RecordStore(folder / "quick", "h100.jsonl")
    assert all(record.measurement.settings == QUICK for record in store.records())
    # an edit: one new record, and the old version is not shown
    path.write_text(MXFP4 + "# edited\n")
    result = quick(path, folder)
    assert result.exit_code == 0
    assert result.stdout.count("user:mine") == 1
    assert "ok (quick)" in result.stdout
    assert "$/M: dollars per million output tokens that the op costs where it stands in a step, at $" in result.stdout
    assert len(list(store.records())) == 4
    # a mistake: no time, exit code 1
    path.write_text(MXFP4 + "    output *= 1.1\n")
    result = quick(path, folder)
    assert result.exit_code == 1
    assert "error" in result.stdout


def test_a_listed_kernel_of_ones_own_and_absent_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.py"
    path.write_text(RIGHT)
    result = run_cli("bench", "gemm", "--list", "--gpu", "b200", "--format", "fp8_row", "--kernel", f"{path}:mine",
                     "--model", "deepseek-v3", "--batch", "64")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "gemm/fp8_row-fp8_row@user:mine" in result.stdout
    assert "not here: gemm/fp8_block-fp8_group@torch._scaled_mm: expected compute capability 9.0" in result.stdout


def test_passes_get_the_kernel_and_the_shapes(virtual: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    path = tmp_path / "own.py"
    path.write_text(RIGHT)
    result = run_cli("bench", "gemm", "--format", "fp8_row", "--kernel", f"{path}:mine", "--shape", "m=1,n=64,k=64",
                     "--shape", "k=64,n=64,m=2", "--processes", "2", "--out", str(tmp_path / "records"))  # fmt: skip
    assert result.exit_code == 1  # nothing was recorded, so the kernel has no time
    assert len(commands) == 2
    assert f"{path}:mine" in commands[0]
    assert [commands[0][i + 1] for i, part in enumerate(commands[0]) if part == "--shape"] == [
        "m=1,n=64,k=64", "k=64,n=64,m=2"
    ]  # fmt: skip


def test_check_says_where_and_times_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if device.type != "cpu":
        pytest.skip("the check of a machine without a GPU")
    monkeypatch.setattr(user_check, "use_interpreter", lambda: "on the CPU")
    path = tmp_path / "own.py"
    path.write_text(RIGHT)
    arguments = ["bench", "gemm", "--format", "fp8_row", "--kernel", f"{path}:mine", "--check"]
    result = run_cli(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [each["shape"] for each in found["checks"]] == list(SMALL_SHAPES["gemm"])
    assert all(each["passed"] for each in found["checks"])
    assert found["where"] == "on the CPU"
    result = run_cli(*arguments, "--shape", "m=1,n=16,k=32")
    assert "1 x 16 x 32  ok" in result.stdout
    assert "nothing was timed" in result.stdout
    path.write_text(RIGHT.replace("x @", "0.9 * x @"))
    result = run_cli(*arguments)
    assert result.exit_code == 1
    assert "more than the tolerance 1" in result.stdout
    assert run_cli("bench", "gemm", "--check").exit_code == 2


def test_the_template_is_checked_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Where nothing was set up before: the interpreter is switched on, and repaired, in time."""
    path = tmp_path / "own.py"
    printed = run_cli("bench", "attention", "--template")
    assert printed.exit_code == 0
    path.write_text(printed.stdout)
    shape = "batch=1,length=20,num_heads=2,num_kv_heads=1,head_dim=64,window=0,q_len=1,page_size=16"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tokenfab", "bench", "attention", "--format", "bf16", "--kernel",
               f"{path}:my_kernel", "--check", "--shape", shape]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "1 x 20 x 2 x 1 x 64 x 0 x 1 x 16  ok" in done.stdout
    assert "on the CPU with Triton" in done.stdout
