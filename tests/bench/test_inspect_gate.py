"""The gate without a GPU: real kernels, edited as people edit them, against a baseline of the unchanged tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenfab.bench import inspect_gate
from tokenfab.bench.inspect import Finding, Inspection, inspect
from tokenfab.bench.inspect_cache import toolchain
from tokenfab.bench.inspect_gate import (
    Baseline,
    BaselineError,
    Facts,
    baseline_path,
    facts_of,
    instruction_kind,
    judge_inspections,
    read_baseline,
    unchanged,
    write_baseline,
)  # fmt: skip
from tokenfab.kernels.compile_point import only, tasks_of
from tokenfab.kernels.registry import find_points

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 40
GATE = ("gate", "inspection", "baseline.json", "--op", "gemm", "--format", "fp8-fp8,mxfp4-bf16", "--arch", "sm_90")


# -- a tree that is edited -------------------------------------------------------------------------


class Tree:
    """A copy of the package that can be edited, and its command."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tokenfab"
        for room in ("kernels", "bench", "costing", "commands"):
            shutil.copytree(ROOT / room, self.root / room, ignore=shutil.ignore_patterns("__pycache__", "recorded"))
        for name in ("__init__.py", "__main__.py"):
            shutil.copy(ROOT / name, self.root / name)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self.root.parent), "TOKENFAB_CACHE": str(self.root.parent / "c")}
        environment.pop("TRITON_INTERPRET", None)
        return subprocess.run(
            [sys.executable, "-m", "tokenfab", *arguments], cwd=self.root.parent, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    @contextmanager
    def edited(self, file: str, old: str, new: str) -> Iterator[None]:
        """Replaces a text that must be there once, until the block ends."""
        path = self.root / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file}: {text.count(old)} x {old!r}"
        path.write_text(text.replace(old, new))
        try:
            yield
        finally:
            path.write_text(text)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    made = Tree(tmp_path_factory.mktemp("tree"))
    written = made.run(*GATE, "--write")
    assert written.returncode == 0, written.stderr
    return made


def test_the_unchanged_tree_passes_twice(tree: Tree) -> None:
    for _ in range(2):
        done = tree.run(*GATE)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip() == "gate: pass, 13 points inspected"
    done = tree.run(*GATE, "--changed")
    assert done.stdout.strip() == "gate: pass, 0 points inspected, 13 made from what the baseline's were"


def test_a_tree_without_a_digest_is_compiled(tree: Tree) -> None:
    """As a baseline of an earlier release."""
    path = tree.root.parent / "baseline.json"
    text = path.read_text()
    try:
        path.write_text(re.sub(r', "digest": "\w+"', "", text))
        assert tree.run(*GATE, "--changed").stdout.strip() == "gate: pass, 13 points inspected"
    finally:
        path.write_text(text)


EDITS = [
    (
        "a tile that spills", "kernels/tiles.py",
        'TileRow("w4a16", _FP4, ("sm_90",), 16, Tile(16, 256, 256, 4, 3),',
        'TileRow("w4a16", _FP4, ("sm_90",), 16, Tile(128, 256, 256, 4, 3),',
        r"fail: gemm/mxfp4-bf16/m16@sm_90: \d+ bytes of spills, 0 before", 2,
    ),
    (
        "FP8 that falls back to BF16", "kernels/fp8_matmul.py",
        "            part = tl.dot(w, x)\n", "            part = tl.dot(w.to(tl.bfloat16), x.to(tl.bfloat16))\n",
        r"fail: gemm/fp8-fp8/m16/default@sm_90: lost QGMMA[.A-Z0-9]*, has HGMMA[.A-Z0-9]*", 6,
    ),
    (
        "a hot loop that grew by a fifth", "kernels/w4a16_matmul.py",
        "            w = tl.reshape(tl.load(w_ptrs + step * WORDS), (BLOCKS_N, 2, 128, 4))\n",
        "            w = tl.reshape(tl.load(w_ptrs + step * WORDS), (BLOCKS_N, 2, 128, 4))\n"
        "            w = (w ^ (w >> 9)) + (w >> 3)\n",
        r"fail: gemm/mxfp4-bf16/m16/tail@sm_90: 2\.[78]\d instructions per value, 2\.3\d before", 6,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new", "reason", "num_made_anew"), [row[1:] for row in EDITS], ids=[row[0] for row in EDITS]
)
def test_an_edit_that_makes_a_kernel_worse_fails(
    tree: Tree, file: str, old: str, new: str, reason: str, num_made_anew: int
) -> None:
    """What the edit touches is compiled, and no other."""
    with tree.edited(file, old, new):
        done = tree.run(*GATE, "--changed")
    assert f" {num_made_anew} points inspected, {13 - num_made_anew} made from " in done.stdout
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(re.match(reason, line) for line in done.stdout.splitlines()), done.stdout
    assert "gate: fail, " in done.stdout


def test_a_wider_tile_that_is_better_passes(tree: Tree) -> None:
    """The baseline tells points apart without their tile: a new tile is no renamed point."""
    wider = (
        "kernels/tiles.py", 'TileRow("w4a16", _FP4, ("sm_90",), 32, Tile(32, 128, 256, 4, 3),',
        'TileRow("w4a16", _FP4, ("sm_90",), 32, Tile(16, 256, 256, 4, 3),',
    )  # fmt: skip
    with tree.edited(*wider):
        done = tree.run(*GATE, "--changed")
    assert done.returncode == 0, done.stdout
    assert "pass: gemm/mxfp4-bf16/m32@sm_90: better: " in done.stdout


# -- the tree itself -------------------------------------------------------------------------------


def test_this_tree_passes_its_baseline() -> None:
    """Every kernel, every architecture; of what is made from the baseline's sources one in ``SAMPLE`` is compiled."""
    tools = toolchain()
    path = baseline_path(tools)
    if not path.exists():
        pytest.skip(f"no baseline for Triton {tools['triton']}; `tokenfab gate inspection --write` makes one")
    archs = ("sm_90", "sm_100", "sm_120")
    baseline, tasks = read_baseline(path), tasks_of(find_points(), archs)
    same = unchanged(baseline, tools, tasks)
    sample = {key: facts for key, facts in same.items() if int(facts.digest, 16) % SAMPLE == 0}
    found = inspect(
        only((point, arch) for point, arch in tasks if (point.name, arch) not in same.keys() - sample.keys()), archs
    )
    rows = judge_inspections(baseline, found, tools, whole=archs, same=same)
    assert [row for row in rows if row.result != "pass"] == []
    assert len(tasks) > 600
    again = {(each.point.name, each.arch): facts_of(each) for each in found}
    for key, facts in sample.items():
        assert again[key] == msgspec.structs.replace(facts, digest="")


# -- judging ---------------------------------------------------------------------------------------

TOOLS = {"triton": "3.6.0", "ptxas": "12.8"}
GOOD = Facts(
    registers=128, spill_bytes=0, shared_bytes=1 << 16, ctas_per_sm=2, matrix=("QGMMA.F32.E4M3.E4M3",),
    instructions_per_value=2.0, floor_s={"h100": 1e-12}, bound_by={"h100": "bytes"},
)  # fmt: skip


def judged(monkeypatch: pytest.MonkeyPatch, after: Facts | None, before: Facts = GOOD, **changes: Any) -> list[Any]:
    """What the gate says where one point became ``after``."""
    (point,) = [each for each in find_points("gemm", ["fp8-fp8"]) if each.name == "gemm/fp8-fp8/many-128x64"]
    inspection = Inspection(point, "sm_120", None, (Finding("abort", "it aborted"),))
    monkeypatch.setattr(inspect_gate, "facts_of", lambda each: after)
    name = changes.pop("name", "gemm/fp8-fp8/many@sm_120")
    baseline = Baseline(schema_version=1, toolchain=changes.pop("baseline_tools", TOOLS), points={name: before})
    return judge_inspections(baseline, changes.pop("inspections", [inspection]), TOOLS, **changes)


def changed(**fields: Any) -> Facts:
    return msgspec.structs.replace(GOOD, **fields)


@pytest.mark.parametrize(
    ("after", "result", "reason"),
    [
        (changed(spill_bytes=4), "fail", "4 bytes of spills, 0 before"),
        (changed(spill_bytes=4, findings=("spills",)), "fail", "4 bytes of spills, 0 before"),
        (changed(matrix=("HGMMA.F32.BF16",)), "fail", "lost QGMMA.F32.E4M3.E4M3, has HGMMA.F32.BF16"),
        (changed(matrix=()), "fail", "lost QGMMA.F32.E4M3.E4M3, has no matrix instruction"),
        (changed(instructions_per_value=2.11), "fail", "2.11 instructions per value, 2.00 before"),
        (changed(instructions_per_value=None), "fail", "instructions per value: not to be counted, 2.0 before"),
        (changed(floor_s={"h100": 1.06e-12}, bound_by={"h100": "issue"}), "fail", "floor on h100 1.060 ps per value"),
        (changed(floor_s={}), "fail", "no floor on h100"),
        (changed(findings=("expect",)), "fail", "new findings: expect"),
        (None, "fail", "does not compile: abort: it aborted"),
        (changed(instructions_per_value=1.8), "pass", "better: 1.80 instructions per value, 2.00 before"),
    ],
)
def test_what_changed_is_named(monkeypatch: pytest.MonkeyPatch, after: Facts | None, result: str, reason: str) -> None:
    (row,) = judged(monkeypatch, after)
    assert row.result == result
    assert row.reason.startswith(reason)
    assert ";" not in row.reason


def test_what_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for after in (GOOD, changed(registers=255), changed(instructions_per_value=2.09),
                  changed(instructions_per_value=1.95),
                  changed(matrix=("HGMMA.F32.BF16", "QGMMA.F32.E4M3.E4M3"))):  # fmt: skip
        assert judged(monkeypatch, after) == []
    spilling = changed(spill_bytes=28, findings=("spills",))
    assert judged(monkeypatch, spilling, before=spilling) == []


def test_r24_what_cannot_be_compared_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = judged(monkeypatch, GOOD, baseline_tools=TOOLS | {"triton": "3.9.0"})
    assert (row.result, row.name) == ("inconclusive", "toolchain")
    assert "'3.6.0', '3.9.0' in the baseline" in row.reason
    new, gone = judged(monkeypatch, GOOD, name="gemm/fp8-fp8/some@sm_120", whole=["sm_120"])
    assert (new.result, new.reason) == ("inconclusive", "not in the baseline: renamed or new")
    assert (gone.result, gone.reason) == ("inconclusive", "only in the baseline: renamed or gone")
    (new,) = judged(monkeypatch, GOOD, name="gemm/fp8-fp8/some@sm_120", whole=["sm_90"])
    assert new.name == "gemm/fp8-fp8/many@sm_120"
    (new,) = judged(monkeypatch, changed(findings=("spills",)), name="gemm/fp8-fp8/some@sm_120")
    assert (new.result, new.reason) == ("fail", "not in the baseline, with findings: spills")
    assert [row.reason for row in judged(monkeypatch, GOOD, inspections=[])] == ["nothing was inspected"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HGMMA.64x16x16.F32.BF16", "HGMMA.F32.BF16"),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", "QGMMA.F32.E4M3.E4M3"),
        ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16", "wgmma.mma_async.sync.aligned.f32.bf16.bf16"),
        ("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", "OMMA.SF.F32.E2M1.E2M1.UE4M3.4X"),
    ],
)
def test_kinds_of_instructions_have_no_sizes(name: str, kind: str) -> None:
    assert instruction_kind(name) == kind


def test_the_gate_on_inspection_ends_in_its_verdict() -> None:
    row = inspect_gate.InspectRow
    rows = [row("a", "pass", "better"), row("b", "inconclusive", "new")]
    assert inspect_gate.lines(rows, 7)[-1] == "gate: inconclusive, 7 points inspected"
    assert inspect_gate.lines([*rows, row("c", "fail", "x")], 7)[-1] == "gate: fail, 7 points inspected"
    assert inspect_gate.lines(rows[:1], 7) == ["pass: a: better", "gate: pass, 7 points inspected"]


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    write_baseline(path, Baseline(schema_version=1, toolchain=TOOLS, points={"b@sm_90": GOOD, "a@sm_90": GOOD}))
    return path


def test_a_baseline_is_read_as_written(file: Path) -> None:
    found = read_baseline(file)
    assert found.points == {"a@sm_90": GOOD, "b@sm_90": GOOD}
    assert found.toolchain == TOOLS
    assert len(file.read_text().splitlines()) == 4
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-30],
        lambda text: text.replace('"spill_bytes": 0', '"spill_bytes": NaN'),
        lambda text: text.replace('"spill_bytes": 0', '"spill_bytes": -1'),
        lambda text: text.replace('"instructions_per_value": 2.0', '"instructions_per_value": 0.0'),
        lambda text: text.replace('"instructions_per_value": 2.0', '"instructions_per_value": 1e999'),
        lambda text: text.replace('"registers"', '"register"'),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_r24_a_damaged_baseline_is_named(file: Path, spoil: Callable[[str], str]) -> None:
    text = file.read_text()
    assert spoil(text) != text
    file.write_text(spoil(text))
    with pytest.raises(BaselineError, match=r"baseline\.json: "):
        read_baseline(file)


def test_r24_a_missing_baseline_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(BaselineError, match=r"other\.json: expected a baseline; found none"):
        read_baseline(file.parent / "other.json")
    link = tmp_path / "link.json"
    link.symlink_to(file)
    with pytest.raises(BaselineError, match=r"link\.json"):
        read_baseline(link)


def test_r21_a_killed_writer_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_gate.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_baseline(file, Baseline(schema_version=1, toolchain=TOOLS, points={}))
    assert file.read_bytes() == before
