"""The lab on a virtual clock: what comes first, what a deadline leaves, what a kill loses, what the field shows."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench import campaign, cuda_device, doctor, lab, lab_checks, lab_order, lab_session, record
from tokenfab.bench.cases import compute_floor_s
from tokenfab.bench.device import MethodUnavailable
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.lab import Deadline, Journal, PassResult, PointCost, Progress, alone, measure_pass, target_key
from tokenfab.bench.lab_checks import (
    MODEST_SHAPES,
    CheckFile,
    KernelCheck,
    kernels_of,
    run_checks,
    run_sanitizers,
    sanitizer_problems,
    verify,
)
from tokenfab.bench.lab_field import agreement, cells, field_rows, markdown, num_behind, write_field
from tokenfab.bench.lab_order import by_worth
from tokenfab.bench.lab_session import CHECK_SHARE, STEP_SHARE, run_session
from tokenfab.bench.lab_tables import steps_lines
from tokenfab.bench.measurement import Settings
from tokenfab.bench.peers import COPY
from tokenfab.bench.published import PublishedData
from tokenfab.bench.recorded import NoRecords, RecordedData
from tokenfab.bench.records import RecordStore
from tokenfab.bench.targets import Target, find_targets
from tokenfab.bench.timing import measure
from tokenfab.bench.user_check import SMALL_SHAPES
from tokenfab.commands import lab as commands_lab
from tokenfab.kernels.reference import error
from tokenfab.kernels.registry import KERNELS, find_kernels
from tokenfab.tests.bench.fake_device import FakeDevice, copy_anchor, make_case
from tokenfab.tests.bench.recorded_points import recorded
from tokenfab.tests.bench.test_campaign import FAST, VirtualDevice
from tokenfab.tests.bench.test_doctor import Nvml

H100 = get_gpu("h100")
POINTS = [Target(find_kernels("quantize", [name])[0], (("rows", 2), ("columns", 64)), ("model place",))
          for name in ("fp8", "mxfp4", "nvfp4")]  # fmt: skip
W8A8 = {"weight": "fp8_block", "activation": "fp8_group"}


@pytest.fixture
def on_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a virtual clock over the interpreter; a GPU has its own")


@pytest.fixture
def one_pass(on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PassResult]:
    """A pass in a process of its own, as far as records can tell."""
    count = 0

    def run(number: int = 1, seconds: float = 1e6, targets: list[Target] | None = None, **more: Any) -> PassResult:
        nonlocal count
        count += 1
        monkeypatch.setattr(record, "_TOKEN", f"process{count}")
        device = more.pop("device", None) or VirtualDevice()
        deadline = Deadline(seconds, device.wall_s)
        return measure_pass(
            POINTS if targets is None else targets, device, H100, RecordStore(tmp_path, "h100.jsonl"), number, deadline,
            settings=FAST, buffers_on="cpu", **more,
        )  # fmt: skip

    return run


def kept(folder: Path) -> dict[str, int]:
    """Formats to how many processes recorded them."""
    found: dict[str, set[str]] = {}
    for each in RecordStore(folder, "h100.jsonl").records():
        found.setdefault(each.point.formats["activation"], set()).add(each.process)
    return {name: len(processes) for name, processes in found.items()}


# -- deadlines -------------------------------------------------------------------------------------


def test_a_deadline_allows_what_ends_before_it() -> None:
    now = [10.0]
    deadline = Deadline(5, lambda: now[0])
    assert (deadline.left_s, deadline.allows(5), deadline.allows(5.01)) == (5, True, False)
    now[0] = 16
    assert (deadline.left_s, deadline.allows(0)) == (0, False)
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds: expected a positive number"):
            Deadline(seconds)


def test_a_points_cost_is_learned_per_op() -> None:
    cost = PointCost(Settings(max_warm_up_s=1.5, budget_s=2.0, energy_s=None))
    first_s = cost.expect("gemm")
    assert 5 <= first_s <= 10
    for took_s in (9.0, 2.0, 3.0, 2.5, 2.0, 2.0):
        cost.learn("gemm", took_s)
    assert cost.expect("gemm") == 3.0  # the first is forgotten
    assert cost.expect("moe") == first_s
    assert cost.expect_all(["gemm", "gemm", "moe"]) == pytest.approx(2 * 2.3 + first_s)


def test_no_point_begins_that_would_not_end_in_time(one_pass: Any, tmp_path: Path) -> None:
    clock = VirtualDevice()
    one_pass(targets=POINTS[:1], device=clock)
    point_s = clock.now_s
    seconds = PointCost(FAST).expect("quantize") + 0.1  # room for one, then not for what one turned out to take
    assert point_s < seconds < 2 * point_s + 1
    device = VirtualDevice()
    result = one_pass(2, seconds, device=device)
    assert (result.measured, [target_key(t) for t in result.left]) == (1, [target_key(t) for t in POINTS[1:]])
    assert device.now_s <= seconds
    assert kept(tmp_path) == {"fp8": 2}
    none = one_pass(2, 0.5)
    assert (none.measured, len(none.left)) == (0, 3)


def test_progress_has_an_estimate(one_pass: Any, at_once: None) -> None:
    seen: list[Progress] = []
    device = VirtualDevice()
    one_pass(device=device, progress=seen.append)
    assert [(each.done, each.total) for each in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[2].rest_s == 0
    assert seen[0].left_s > seen[1].left_s > seen[2].left_s
    assert seen[1].rest_s == pytest.approx(seen[0].left_s - seen[1].left_s, rel=0.2)


# -- kills -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points take two seconds of virtual time, and none of the interpreter's."""
    made = recorded("quantize", {"activation": "fp8"}, {"rows": 2, "columns": 64}, 1e-5).measurement

    def measure_at_once(case: Any, device: VirtualDevice, **_: Any) -> Any:
        device.now_s += 2.0
        return made

    monkeypatch.setattr(campaign, "measure", measure_at_once)


@pytest.mark.parametrize("at", range(len(POINTS)))
@pytest.mark.parametrize("when", ["measuring", "recorded"])
def test_r21_killed_at_any_point_the_next_run_goes_on(
    one_pass: Any, at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, when: str
) -> None:
    """While point ``at`` is measured, or right after its record: in the end each is there once per pass."""
    count = 0

    def die(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == at + 1:
            raise Killed

    with monkeypatch.context() as patch:
        if when == "measuring":
            quick = campaign.measure
            patch.setattr(campaign, "measure", lambda *a, **o: (die(), quick(*a, **o))[1])
        with pytest.raises(Killed):
            one_pass(progress=die if when == "recorded" else lambda progress: None)
    before = at + (when == "recorded")
    assert sum(kept(tmp_path).values()) == before
    again = one_pass()
    assert (again.measured, again.old) == (3 - before, before)
    assert kept(tmp_path) == {"fp8": 1, "mxfp4": 1, "nvfp4": 1}
    assert one_pass(2).measured == 3
    assert kept(tmp_path) == {"fp8": 2, "mxfp4": 2, "nvfp4": 2}


def test_a_point_whose_process_died_is_left_out_of_the_same_run(one_pass: Any, at_once: None, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def die(progress: Progress) -> None:
        if progress.done == 2:
            raise Killed

    with pytest.raises(Killed):
        one_pass(journal=journal, progress=die)
    assert journal.died() == {target_key(POINTS[1])}
    result = one_pass(2, journal=journal)
    assert result.died == [POINTS[1]]
    assert kept(tmp_path) == {"fp8": 2, "mxfp4": 1, "nvfp4": 1}
    journal.clear()
    assert one_pass(2, journal=journal).died == []
    assert journal.died() == set()


def test_a_torn_journal_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write("begin", "a")
    journal.write("begin", "b")
    journal.write("end", "a")
    with journal.path.open("a") as file:
        file.write('["begin", "c')
    assert journal.died() == {"b"}


def test_an_orphan_stops(one_pass: Any, at_once: None) -> None:
    answers = iter([False, True])
    result = one_pass(is_orphan=lambda: next(answers))
    assert (result.measured, len(result.left)) == (1, 2)


def test_only_one_process_measures_into_a_folder(tmp_path: Path) -> None:
    import fcntl

    lock = tmp_path / "out" / "lock"
    with alone(lock), lock.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- order -----------------------------------------------------------------------------------------


def test_what_weighs_most_comes_first() -> None:
    """qwen3-30b-a3b, 64 tokens: 48 layers; the QKV matmul is 2.5 times O's k; a quantizer weighs next to nothing."""
    models = ["qwen3-30b-a3b"]
    targets = [t for t in find_targets(None, ["fp8_block", "fp8_group"], models, [64], H100, [1024])
               if t.kernel.op in ("gemm", "rms_norm_quantize")]  # fmt: skip
    found = by_worth([*reversed(targets), *find_targets("copy", None, [], [], H100)], models, H100)
    assert [each.target.kernel.op for each in found[:2]] == [COPY.op] * 2
    ours = [each for each in found[2:] if not each.target.kernel.library]
    assert [each.worth_s for each in ours] == sorted((each.worth_s for each in ours), reverse=True)
    (norm,) = [each for each in ours if each.target.kernel.op == "rms_norm_quantize"]
    work = norm.target.kernel.work(norm.target.shape)
    assert norm.worth_s == pytest.approx(96 * (work.weight_bytes + work.activation_bytes) / H100.memory_bytes_per_s)
    o_proj = next(each for each in ours if each.target.shape.get("k") == 4096)
    kernel, shape = o_proj.target.kernel, o_proj.target.shape
    moved_s = sum(kernel.work(shape)[:2]) / H100.memory_bytes_per_s
    assert o_proj.worth_s == pytest.approx(48 * max(moved_s, compute_floor_s(kernel, shape, H100)))
    libraries = [place for place, each in enumerate(found) if place > 1 and each.target.kernel.library]
    assert len(libraries) >= 2
    for place in libraries:  # right behind ours of the same shape
        assert found[place - 1].target.fields == found[place].target.fields
    assert found[2].target.kernel.library == ""
    assert len(found) == len(targets) + 2


def test_shapes_of_no_chosen_model_come_last() -> None:
    targets = find_targets("attention", ["fp8"], ["qwen3-30b-a3b"], [16], H100, [1024])
    found = by_worth(targets, ["qwen3-30b-a3b"], H100)
    compared = [each.target.places == ("compared",) for each in found]
    assert compared == sorted(compared)
    assert any(compared)
    assert all((each.worth_s == 0) == is_compared for each, is_compared in zip(found, compared, strict=True))


def test_the_order_needs_models_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (target,) = [t for t in find_targets("quantize", ["fp8"], ["gpt-oss-120b"], [16], H100)]
    assert lab_order.weigh(target, ["gpt-oss-120b"], H100) > 0
    assert lab_order.weigh(target, ["qwen3-30b-a3b"], H100) == 0


# -- a session -------------------------------------------------------------------------------------


def session(tmp_path: Path, codes: Callable[[str, int, Journal], int] = lambda *_: 0, stages: Any = None,
            takes_s: float = 1.0) -> tuple[list[tuple[str, int, float]], list[float]]:  # fmt: skip
    """((stage, number, until), ...) of a session of 100 s, and when the sanitizers ran."""
    now, calls, sanitized = [0.0], [], []
    journal = Journal(tmp_path / "journal")

    def child(stage: str, number: int, at_s: float) -> int:
        calls.append((stage, number, at_s))
        now[0] += takes_s
        return codes(stage, number, journal)

    run_session(stages or ("check", "measure", "step", "sanitize"), Deadline(100, lambda: now[0]), journal, child,
                lambda: sanitized.append(now[0]))  # fmt: skip
    return calls, sanitized


def test_stages_in_order_and_within_their_share(tmp_path: Path) -> None:
    calls, sanitized = session(tmp_path)
    assert calls == [
        ("check", 0, pytest.approx(100 * CHECK_SHARE)), ("measure", 1, pytest.approx(100 * (1 - STEP_SHARE))),
        ("step", 0, 100), ("measure", 2, 100), ("measure", 3, 100),
    ]  # fmt: skip
    assert sanitized == [5.0]


def test_stages_that_were_not_asked_for_take_no_time(tmp_path: Path) -> None:
    assert [call[:2] for call in session(tmp_path, stages=("measure",))[0]] == [("measure", n) for n in (1, 2, 3)]
    assert session(tmp_path, stages=("measure",))[0][0][2] == 100
    assert session(tmp_path, stages=("check",)) == ([("check", 0, 100)], [])
    with pytest.raises(ValueError, match="stage: expected some of check, measure, step, sanitize; got 'tune'"):
        session(tmp_path, stages=("tune",))


def test_checks_that_time_cut_off_are_ended_last(tmp_path: Path) -> None:
    calls, sanitized = session(tmp_path, takes_s=20.0)
    assert [call[:2] for call in calls] == [("check", 0), ("measure", 1), ("step", 0), ("measure", 2), ("measure", 3)]
    assert sanitized == []  # no time
    calls, _ = session(tmp_path, takes_s=20.0, stages=("check", "step", "measure"), codes=lambda *_: 0)
    assert calls[0][2] == pytest.approx(20)
    calls, _ = session(tmp_path, takes_s=20.0, stages=("check", "measure"))
    assert [call[:2] for call in calls] == [("check", 0), *(("measure", n) for n in (1, 2, 3)), ("check", 0)]


def test_a_process_that_dies_is_begun_again_while_that_helps(tmp_path: Path) -> None:
    deaths = iter(["a", "b"])

    def codes(stage: str, number: int, journal: Journal) -> int:
        if (stage, number) != ("measure", 1):
            return 0
        died = next(deaths, None)
        if died is not None:
            journal.write("begin", died)
        return -11

    calls, _ = session(tmp_path, codes)
    assert [call[:2] for call in calls].count(("measure", 1)) == 3  # twice at a point of its own, then at none
    assert ("measure", 3) in [call[:2] for call in calls]


# -- correctness -----------------------------------------------------------------------------------


def checked(tmp_path: Path, name: str, op: str = "gemm", **more: Any) -> list[KernelCheck]:
    (kernel,) = find_kernels(op, [name])
    shapes = {op: SMALL_SHAPES[op][:1]}
    file = CheckFile(tmp_path / "checks.jsonl")
    return run_checks([kernel], H100, VirtualDevice(), file, shapes=shapes, repeats=2, buffers_on="cpu", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("op", "name"), [("gemm", "fp8_block"), ("rope_append", "fp8"), ("attention", "fp8"),
                                          ("swiglu_quantize", "nvfp4")])  # fmt: skip
def test_right_kernels_are_right(on_cpu: None, tmp_path: Path, op: str, name: str) -> None:
    (check,) = checked(tmp_path, name, op)
    assert (check.problems, check.skipped, check.verdict) == ((), "", "ok")


def test_every_kernel_of_the_gpu_has_shapes_to_be_checked_at() -> None:
    found = kernels_of(H100)
    assert found
    assert all(kernel.min_capability <= 90 for kernel in found)
    assert {kernel.op for kernel in KERNELS} == set(MODEST_SHAPES)
    assert {"gemm/nvfp4-nvfp4", "moe/nvfp4-nvfp4"} == {k.name for k in KERNELS} - {k.name for k in found}


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, dict[str, torch.Tensor]], object]) -> None:
    """``change(number, output)`` after each launch of the quantizer."""
    from tokenfab.kernels import quantize_runs

    right, count = quantize_runs.Quantize.launch, 0

    def wrong(self: Any, weights: Any, activations: Any, output: Any) -> None:
        nonlocal count
        count += 1
        right(self, weights, activations, output)
        change(count, output)

    monkeypatch.setattr(quantize_runs.Quantize, "launch", wrong)


def test_a_wrong_kernel_is_named(on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda number, output: output["data"][0].bitwise_xor_(1))
    (check,) = checked(tmp_path, "mxfp4", "quantize")
    assert "more than the tolerance" in check.problems[0]


def test_what_is_right_but_not_the_same_twice_is_named(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail that no reference sees, from the ninth launch on; the repeats come last."""
    from tokenfab.bench import cases

    made = cases.make_case
    extra = torch.zeros(1)

    def widened(*arguments: Any) -> Any:
        case = made(*arguments)

        def checksum(buffers: Any) -> Any:
            is_output = isinstance(buffers, dict) and "scale" in buffers
            return case.checksum(buffers), float(extra) if is_output else 0.0

        return dataclasses.replace(case, checksum=checksum)

    monkeypatch.setattr(cases, "make_case", widened)
    (kernel,) = find_kernels("quantize", ["mxfp4"])
    shape = SMALL_SHAPES["quantize"][0]
    assert verify(kernel, shape, H100, VirtualDevice(), repeats=3, buffers_on="cpu") == ()
    spoil(monkeypatch, lambda number, output: extra.fill_(number >= 9))
    found = verify(kernel, shape, H100, VirtualDevice(), repeats=5, buffers_on="cpu")
    assert [problem.split(":")[0] for problem in found] == ["repeats"]
    spoil(monkeypatch, lambda number, output: extra.fill_(number == 6))
    found = verify(kernel, shape, H100, VirtualDevice(), repeats=0, buffers_on="cpu")
    assert [problem.split(":")[0] for problem in found] == ["graph"]


def test_checks_are_not_done_again_and_a_raising_kernel_is_a_result(
    on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[KernelCheck] = []
    first = checked(tmp_path, "fp8", "quantize", done=seen.append)
    assert checked(tmp_path, "fp8", "quantize", done=seen.append) == first == seen
    assert checked(tmp_path, "mxfp8", "quantize", allows=lambda: False) == []
    monkeypatch.setattr(lab_checks, "verify", lambda *a, **o: (_ for _ in ()).throw(MethodUnavailable("too large")))
    assert checked(tmp_path, "nvfp4", "quantize")[0].verdict == "skipped: too large"
    monkeypatch.setattr(lab_checks, "verify", lambda *a, **o: (_ for _ in ()).throw(RuntimeError("illegal\naddress")))
    journal = Journal(tmp_path / "journal")
    with pytest.raises(RuntimeError, match="illegal"):
        checked(tmp_path, "mxfp4", "quantize", journal=journal)
    assert len(journal.died()) == 1  # so that the session begins a process for the rest
    (kept_check,) = checked(tmp_path, "mxfp4", "quantize", journal=journal)
    assert kept_check.problems == ("raised: RuntimeError: illegal",)


def test_a_check_whose_process_died_is_a_result(tmp_path: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal")

    def die(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(lab_checks, "verify", die)
        with pytest.raises(Killed):
            checked(tmp_path, "fp8", "quantize", journal=journal)
    (check,) = checked(tmp_path, "fp8", "quantize", journal=journal)
    assert check.problems == ("died: its process ended without a result",)


def test_a_damaged_file_of_checks_is_named_and_a_torn_end_is_not(tmp_path: Path) -> None:
    file = CheckFile(tmp_path / "checks.jsonl")
    check = KernelCheck(how="lab", kernel="k", shape={"m": 1}, version="v")
    file.append(check)
    with file.path.open("ab") as torn:
        torn.write(b'{"how": "la')
    assert file.read() == [check]
    file.append(check)
    assert file.read() == [check, check]
    file.path.write_bytes(b"[]\n")
    with pytest.raises(ValueError, match=r"checks\.jsonl:1: expected the check of a kernel"):
        file.read()


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
INVALID = (
    "========= Invalid __global__ write of size 2 bytes\n=========     at _kernel\n========= ERROR SUMMARY: 3 errors\n"
)
RACES = "========= Error: Race reported between Write access\n========= RACECHECK SUMMARY: 1 hazard (1 error, 0)\n"


def test_what_a_sanitizer_says() -> None:
    assert sanitizer_problems(0, CLEAN) == ()
    assert sanitizer_problems(0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n") == ()
    assert sanitizer_problems(86, INVALID) == (
        "3 errors, exit code 86: Invalid __global__ write of size 2 bytes",
    )  # fmt: skip
    assert "Race reported" in sanitizer_problems(86, RACES)[0]
    assert sanitizer_problems(1, CLEAN) == ("0 errors, exit code 1",)
    with pytest.raises(MethodUnavailable, match="exit code 255 without a summary: Device not supported"):
        sanitizer_problems(255, "Device not supported\n")


def test_sanitizers_run_one_small_case_per_kernel_and_tool(tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout=CLEAN, stderr="")

    file, properties = CheckFile(tmp_path / "checks.jsonl"), VirtualDevice().properties
    kernels = find_kernels("gemm", ["fp8_block", "mxfp4-bf16"])
    found = run_sanitizers(kernels, "/opt/cs", properties, file, run=run)
    assert [(each.how, each.kernel, each.verdict) for each in found] == [
        (tool, kernel.name, "ok") for kernel in kernels for tool in ("memcheck", "racecheck")
    ]
    assert commands[1][:3] == ["/opt/cs", "--tool", "racecheck"]
    assert commands[1][-1] == kernels[0].name
    assert run_sanitizers(kernels, "/opt/cs", properties, file, run=run) == found
    assert len(commands) == 4
    assert run_sanitizers(kernels[:1], "/opt/cs", properties, CheckFile(tmp_path / "x"), allows=lambda: False) == []


def test_the_small_case_is_right(on_cpu: None) -> None:
    weights, activations, output = lab_checks.launch_small("quantize/mxfp4", "cpu")
    run = find_kernels("quantize", ["mxfp4"])[0].load()
    assert error(output, run.reference(SMALL_SHAPES["quantize"][0], weights, activations)) == 0.0
    with pytest.raises(ValueError, match="kernel: expected the name of one of the registry's; got 'gemm'"):
        lab_checks.launch_small("gemm", "cpu")


# -- the field -------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path: Path, published: PublishedData) -> Path:
    """Of one shape ours is a tenth slower than the best published row, of another a third of it; MXFP4 has no rows
    of its own; a quantizer has no rival. torch's FP8 matmul beside the first."""
    store = RecordStore(tmp_path / "records", "h100.jsonl")
    slow, fast = ({"m": 64, "n": 7168, "k": k} for k in (16384, 2048))
    best_s = min(published_s(published, slow).values())
    for name, time_s in (("a", 1.1 * best_s), ("b", 1.1 * best_s), ("c", 1.12 * best_s)):
        store.append(recorded("gemm", W8A8, slow, time_s, process=name))
    store.append(recorded("gemm", W8A8, fast, min(published_s(published, fast).values()) / 3))
    store.append(recorded("gemm", {"weight": "mxfp4", "activation": "bf16"}, fast, 5e-6))
    store.append(recorded("quantize", {"activation": "fp8_group"}, {"rows": 64, "columns": 7168}, 5e-6))
    fp8 = {"weight": "fp8", "activation": "fp8"}
    store.append(recorded("gemm", fp8, slow, 2 * best_s, recipe="torch._scaled_mm"))
    store.append(recorded("gemm", {"weight": "bf16", "activation": "bf16"}, slow, best_s / 9, recipe="torch.matmul"))
    return tmp_path / "records"


def published_s(published: PublishedData, shape: dict[str, int]) -> dict[str, float]:
    from tokenfab.bench.ops import Gemm

    op = Gemm(shape["m"], shape["n"], shape["k"], *W8A8.values())
    return {name: published.time(op, H100, published.stack(H100, name)).time_s for name in ("vllm", "sglang", "trtllm")}


def test_every_losing_point_is_shown_first(records: Path, published: PublishedData) -> None:
    rows = field_rows(RecordedData(records), published, H100)
    assert len(rows) == 4
    behind = rows[0]
    assert (behind.shape["k"], behind.format) == (16384, "fp8_block-fp8_group")
    assert behind.ratio == pytest.approx(1.1)
    assert (behind.num_processes, behind.noise) == (3, pytest.approx(0.02 / 1.1))
    assert num_behind(rows) == 1
    kinds = {rival.name: (rival.kind, rival.format) for rival in behind.rivals}
    assert kinds == {
        **dict.fromkeys(("vllm", "sglang", "trtllm"), ("published", "fp8_block-fp8_group")),
        "torch._scaled_mm": ("measured here", "fp8-fp8"),  # BF16's matmul is not beside FP8
    }  # fmt: skip
    assert behind.best is not None
    assert behind.best.time_s == min(published_s(published, behind.shape).values())
    assert "measured" in behind.best.source
    assert [row.ratio is None for row in rows] == [False, False, False, True]
    assert [r.ratio for r in rows[:3]] == sorted((r.ratio or 0 for r in rows[:3]), reverse=True)
    other = next(row for row in rows if row.format == "mxfp4-bf16")
    assert {rival.format for rival in other.rivals} == {"bf16-bf16"}


def test_cells_tell_published_from_measured(records: Path, published: PublishedData) -> None:
    rows = field_rows(RecordedData(records), published, H100)
    text = " | ".join(cells(rows[0]))
    assert "1.10 behind" in text
    assert ", published" in text
    assert "torch._scaled_mm" in text
    assert "(fp8-fp8)" in text
    quantizer = " | ".join(cells(rows[-1]))
    assert quantizer.endswith("- | - | -")
    page = markdown(H100, rows)
    assert "4 shapes, 1 behind" in page
    assert "vllm, sglang, trtllm: published" in page
    assert page.count("\n| ") == 5  # head and four rows: none is left out
    assert page == markdown(H100, field_rows(RecordedData(records), published, H100))


def test_a_modelled_row_is_no_rival(tmp_path: Path, published: PublishedData) -> None:
    shape = {"num_tokens": 64, "hidden": 512, "inter": 256, "top_k": 2, "num_experts": 8, "ep": 1, "load": 0}
    RecordStore(tmp_path, "h100.jsonl").append(recorded("moe", W8A8, shape, 1e-4))
    (row,) = field_rows(RecordedData(tmp_path), published, H100)
    assert (row.rivals, row.ratio) == ((), None)


def test_the_field_is_written_between_its_markers(
    records: Path, tmp_path: Path, published: PublishedData
) -> None:  # fmt: skip
    file, data = tmp_path / "README.md", RecordedData(records)
    file.write_text("before\n<!-- field:h100 -->\nold\n<!-- /field:h100 -->\nafter\n")
    assert write_field(file, data, published) == ["h100"]
    text = file.read_text()
    assert text.startswith("before\n<!-- field:h100 -->\n")
    assert text.endswith("\n<!-- /field:h100 -->\nafter\n")
    assert "1.10 behind" in text
    assert "old" not in text
    write_field(file, data, published)
    assert file.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "records"]
    result = CliRunner().invoke(cli, ["lab", "--field", str(file), "--out", str(records)])
    assert result.exit_code == 0, result.output
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("nothing", ValueError, r"expected lines <!-- field:GPU --> .* GPU of h100; got none"),
        ("<!-- field:h100 -->\n", ValueError, r"<!-- /field:h100 --> once behind it"),
        ("<!-- /field:h100 -->\n<!-- field:h100 -->\n", ValueError, "once behind it"),
        ("<!-- field:h100 --><!-- field:h100 --><!-- /field:h100 -->", ValueError, "once"),
        ("<!-- field:h7 -->\n<!-- /field:h7 -->", ValueError, "gpu: expected one of"),
        ("<!-- field:h200 -->\n<!-- /field:h200 -->", NoRecords, "on h200 in .*; got some of h100 only"),
    ],
)
def test_a_file_that_is_not_marked_stays_as_it_was(
    records: Path, tmp_path: Path, published: PublishedData, text: str, error: type[Exception], words: str
) -> None:
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(error, match=words):
        write_field(file, RecordedData(records), published)
    assert file.read_text() == text


# -- two runs --------------------------------------------------------------------------------------


def run_file(folder: Path, name: str, seed: int, scale: float = 1.0) -> Path:
    """Three processes of two points on the fake GPU whose clocks are ``scale`` apart for kernel and anchor alike."""
    store = RecordStore(folder, f"{name}.jsonl")
    for size in (1, 2):
        for process in range(3):
            device = FakeDevice(seed=100 * seed + 10 * size + process, scale=lambda _: scale)
            case = make_case(device, weight_bytes=size * 24_000_000)
            measured = measure(case, device, anchor=copy_anchor(device), settings=Settings(energy_s=None))
            base = recorded("gemm", W8A8, {"m": 64, "n": 1024, "k": 1024 * size}, 1e-5)
            point = msgspec.structs.replace(base.point, tile={})
            made = record.Record.of(point, measured, base.environment)
            store.append(msgspec.structs.replace(made, process=f"{name}-{process}"))
    return store.path


def test_two_runs_agree_though_the_clocks_do_not(tmp_path: Path) -> None:
    first, second = run_file(tmp_path, "first", 1), run_file(tmp_path, "second", 2, scale=1.2)
    found = agreement(first, second)
    assert found.num_points == 2
    assert 0 < found.median_difference <= found.worst_difference < 0.01
    assert found.agrees
    result = CliRunner().invoke(cli, ["lab", "--agree", str(first), str(second), "--json"])
    assert (result.exit_code, json.loads(result.output)["agrees"]) == (0, True)


def test_two_runs_that_differ(tmp_path: Path) -> None:
    for name, ratios in (("a", (1.0, 2.0, 3.0)), ("b", (1.0, 2.04, 3.3))):
        for size, ratio in enumerate(ratios):
            made = recorded("gemm", W8A8, {"m": 64, "n": 1024, "k": 1024 * (size + 1)}, 1e-5, ratio=ratio)
            RecordStore(tmp_path, f"{name}.jsonl").append(made)
    found = agreement(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert found.median_difference == pytest.approx(1 - 2 / 2.04)
    assert found.worst_difference == pytest.approx(1 - 3 / 3.3)
    assert '"k":3072' in found.worst_point
    assert not found.agrees
    result = CliRunner().invoke(cli, ["lab", "--agree", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert result.exit_code == 1
    RecordStore(tmp_path, "c.jsonl").append(recorded("gemm", W8A8, {"m": 1, "n": 8, "k": 8}, 1e-5))
    with pytest.raises(ValueError, match="got none in common"):
        agreement(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="expected a file of records"):
        agreement(tmp_path / "a.jsonl", tmp_path / "none.jsonl")


# -- whole steps -----------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[str], list[Any]]]:
    """``measure_steps`` with steps that take twenty seconds and have an op; what it told, and what it built."""
    from tokenfab.bench import decode_step, step_cases, step_measure
    from tokenfab.bench.step_measure import OpTime, StepResult

    device, store = VirtualDevice(), RecordStore(tmp_path, "h100.jsonl")
    built: list[Any] = []

    def build(config: Any, precision: Any, **sizes: Any) -> Any:
        built.append((config.name, precision.name, sizes["batch"], sizes["length"], sizes["max_weight_bytes"]))
        if config.name == "deepseek-v3" and sizes["batch"] == 64:
            raise ValueError("max_weight_bytes: expected more")
        return SimpleNamespace(config=config, precision=precision, batch=sizes["batch"], length=sizes["length"])

    def measure_one(step: Any, device: Any, gpu: Any, *, store: RecordStore, **_: Any) -> StepResult:
        device.now_s += 20.0
        shape = {"batch": step.batch, "length": step.length, "layers": 4, "distinct_layers": 2, "q_len": 1}
        made = recorded("decode_step", {"linear": "bf16"}, shape, 1e-2, l2_policy="hot", recipe="tokenfab",
                        kernel_hash="5" * 64, tile={"model": step.config.name})  # fmt: skip
        store.append(made)
        return StepResult(
            step.config.name, step.precision.name, step.batch, step.length, 4, 2, 1e-2, 5e-3, (), (), made
        )

    monkeypatch.setattr(decode_step, "build_step", build)
    monkeypatch.setattr(step_measure, "measure_step", measure_one)
    monkeypatch.setattr(step_measure, "step_hash", lambda properties: "5" * 64)
    monkeypatch.setattr(step_measure, "time_ops", lambda *_: [OpTime("o_proj", "torch", 4, "hot", 2e-3, 1e-3)])
    monkeypatch.setattr(step_cases, "op_groups", lambda step: [[None]])

    def run(models: list[str], seconds: float = 1e6, batches: tuple[int, ...] = (16, 64)) -> Any:
        told: list[str] = []
        count = lab.measure_steps(
            models, batches, [1024], device, H100, store, Deadline(seconds, device.wall_s),  # type: ignore[arg-type]
            results=tmp_path / "steps.ndjson", max_weight_bytes=1e9, buffers_on="cpu", tell=told.append,
        )  # fmt: skip
        return count, told, built

    return run


def test_whole_steps_smallest_model_first_with_their_gap(steps: Any, tmp_path: Path) -> None:
    count, told, built = steps(["deepseek-v3", "qwen3-30b-a3b"])
    assert [each[:3] for each in built] == [
        ("qwen3-30b-a3b", "bf16", 64), ("qwen3-30b-a3b", "bf16", 16), ("deepseek-v3", "fp8", 64),
        ("deepseek-v3", "fp8", 16),
    ]  # fmt: skip
    assert count == 3
    assert told[0].endswith(
        "10.00 ms, 6,400 tokens/s/GPU, ops 8.00 ms, gap +2.00 ms; 2 of 4 layers distinct"
    )  # fmt: skip
    assert told[2] == "deepseek-v3 fp8 64 x 1024: skipped: max_weight_bytes: expected more"
    lines = [json.loads(line) for line in (tmp_path / "steps.ndjson").read_text().splitlines()]
    assert [(line["model"], line["batch"], line["gap_s"]) for line in lines[:1]] == [
        ("qwen3-30b-a3b", 64, pytest.approx(2e-3))
    ]  # fmt: skip
    assert lines[0]["ops"][0]["name"] == "o_proj"
    with (tmp_path / "steps.ndjson").open("a") as torn:
        torn.write('{"model": "dee')
    assert lab.read_steps(tmp_path / "steps.ndjson") == lines
    shown = steps_lines(lines)
    assert shown[0] == (
        "step of qwen3-30b-a3b, bf16, 64 sequences x 1024: 10.00 ms whole, measured here: 6,400 tokens/s/GPU; its ops "
        "alone 8.00 ms, gap +2.00 ms; 2 of 4 layers have weights of their own"
    )
    count, told, _ = steps(["qwen3-30b-a3b", "deepseek-v3"])
    assert (count, len(told)) == (0, 1)  # what is recorded is not done again; what could not be is tried


def test_no_step_begins_that_would_not_end_in_time(steps: Any, tmp_path: Path) -> None:
    assert steps(["qwen3-30b-a3b"], 59.0)[0] == 0
    count, _, _ = steps(["qwen3-30b-a3b"], 61.0)
    assert count == 2  # the second by what the first took
    assert steps(["qwen3-30b-a3b"], 1e6, (1, 2, 4))[0] == 3


def test_a_whole_step_is_no_row_of_the_field(steps: Any, tmp_path: Path) -> None:
    steps(["qwen3-30b-a3b"])
    with pytest.raises(NoRecords):
        RecordedData(tmp_path).rows(H100)


# -- the command -----------------------------------------------------------------------------------


def test_without_a_gpu_one_line_says_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "installed_nvml", lambda: None)
    result = CliRunner().invoke(cli, ["lab", "--minutes", "1", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith("error: GPU: ")
    assert "`tokenfab inspect`" in line
    assert "`tokenfab doctor`" in line
    assert not (tmp_path / "out").exists()


def test_a_session_gives_each_stage_a_process(
    monkeypatch: pytest.MonkeyPatch, records: Path, tmp_path: Path
) -> None:  # fmt: skip
    """What the session starts its processes with is what they understand; then ours against the field."""
    started: list[list[str]] = []
    monkeypatch.setattr(doctor, "installed_nvml", Nvml)
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(commands_lab, "_start", lambda arguments, at_s: started.append(arguments) or 0)
    options = ["--model", "qwen3-30b-a3b", "--batch", "16,64", "--context", "1024", "--out", str(records)]
    result = CliRunner().invoke(cli, ["lab", "--minutes", "2", *options, "--stage", "check,measure", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["gpu"], data["behind"], len(data["rows"])) == ("h100", 1, 4)
    assert [arguments[1:3] for arguments in started] == [["check", "0"], *(["measure", str(n)] for n in (1, 2, 3))]

    passes: list[Any] = []
    monkeypatch.setattr(cuda_device, "CudaDevice", VirtualDevice)

    def note(points: Any, device: Any, gpu: Any, store: Any, number: int, deadline: Any, **more: Any) -> PassResult:
        passes.append((points, gpu.name, number, deadline.left_s, more["is_orphan"]()))
        return PassResult(measured=1)

    monkeypatch.setattr(lab, "measure_pass", note)
    result = CliRunner().invoke(cli, ["lab", *started[2]])
    assert result.exit_code == 0, result.output
    ((points, gpu, number, left_s, is_orphan),) = passes
    assert (gpu, number, is_orphan) == ("h100", 2, True)  # this process is not its own parent
    assert 0 < left_s < 120
    assert {target.shape["m"] for target in points if target.kernel.op == "gemm"} == {16, 64}
    assert "pass 2: 1 measured" in result.output


def test_an_unready_machine_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "installed_nvml", lambda: Nvml(MigMode=[1, 1]))
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = CliRunner().invoke(cli, ["lab", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.output.startswith("error: MIG: on: a slice of the GPU")
    monkeypatch.setattr(doctor, "installed_nvml", lambda: Nvml(Name="NVIDIA H1"))
    result = CliRunner().invoke(cli, ["lab", "--out", str(tmp_path / "out")])
    assert "gpu: expected the name of one of" in result.output


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_session, "GRACE_S", 0.2)
    monkeypatch.setattr(
        commands_lab, "_command", lambda arguments: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    before_s = time.monotonic()
    assert commands_lab._start([], before_s) == -9
    assert time.monotonic() - before_s < 10
    monkeypatch.setattr(commands_lab, "_command", lambda arguments: [sys.executable, "-c", "raise SystemExit(3)"])
    assert commands_lab._start([], time.monotonic() + 30) == 3


def test_the_list_needs_no_gpu_and_claims_no_time() -> None:
    options = ["--model", "qwen3-30b-a3b", "--batch", "64", "--context", "1024"]
    result = CliRunner().invoke(cli, ["lab", "--list", "--gpu", "h100", *options, "--json"])
    rows = json.loads(result.output)
    assert [row["kernel"].split("/")[0] == "copy" for row in rows[:3]] == [True, True, False]
    worths = [row["worth_s"] for row in rows if "@" not in row["kernel"]]
    assert worths == sorted(worths, reverse=True)
    text = CliRunner().invoke(cli, ["lab", "--list", "--gpu", "h100", *options]).output
    assert "modelled, not measured" in re.sub(r"\s+", " ", text)
    assert CliRunner().invoke(cli, ["lab", "--list"]).exit_code == 2


def test_help_names_the_stages() -> None:
    for command in ("lab", "doctor"):
        result = CliRunner().invoke(cli, [command, "--help"])
        assert result.exit_code == 0
        assert "--run" not in result.output
