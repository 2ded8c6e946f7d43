"""Inspection: what tiny kernels compile to on each architecture, and what is made of the counts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenfab.bench import inspect_cache, sm_limits
from tokenfab.bench.gpus import GPUS, get_gpu
from tokenfab.bench.inspect import Inspection, document, floors, inspect, read_facts, rows
from tokenfab.bench.inspect_cache import Cache
from tokenfab.bench.inspect_child import Child, Children
from tokenfab.bench.sass import Loop
from tokenfab.kernels.compile_point import CompilePoint

KERNELS = str(Path(__file__).with_name("inspect_kernels.py"))
INSTALLED = importlib.util.find_spec("triton") is not None
TRITON = importlib.metadata.version("triton") if INSTALLED else "none"
needs_triton = pytest.mark.skipif(not INSTALLED, reason="compiles with Triton")


def point(
    name: str, function: str, signature: dict[str, str], constexprs: dict[str, Any], **fields: Any
) -> CompilePoint:
    """A point of ``inspect_kernels.py`` with every argument aligned."""
    fields = {
        "module": KERNELS, "num_warps": 4, "num_stages": 3, "values_per_iteration": 1, "bits_per_value": 16,
        "flops_per_value": 0, "matrix_rate": "bf16", **fields,
    }  # fmt: skip
    return CompilePoint(
        name=name, function=function, signature=tuple({**signature, **dict.fromkeys(constexprs, "constexpr")}.items()),
        constexprs=tuple(constexprs.items()), aligned=tuple(signature), **fields,
    )  # fmt: skip


BF16 = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "N": "i32", "K": "i32"}
FP8 = {**BF16, "x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv"}
FP4 = {
    "x_ptr": "*u8",
    "x_scale_ptr": "*u8",
    "w_ptr": "*u8",
    "w_scale_ptr": "*u8",
    "y_ptr": "*bf16",
    "N": "i32",
    "K": "i32",
}
WEIGHT_ONLY = {"x_ptr": "*bf16", "w_ptr": "*u8", "scale_ptr": "*u8", "y_ptr": "*bf16", "N": "i32", "K": "i32"}
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
SMALL_WORK = {"values_per_iteration": 64 * 64, "flops_per_value": 128.0}
SPECIALIZED = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
TILE_W4 = {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128}
W4 = {"values_per_iteration": 128 * 128, "flops_per_value": 32.0, "archs": ("sm_90",)}

BF16_POINT = point("bf16", "matmul", BF16, SMALL, **SMALL_WORK, expect="HGMMA|kind::f16|HMMA")
POINTS = (
    BF16_POINT,
    point("fp8", "matmul", FP8, SMALL, **SMALL_WORK, matrix_rate="fp8", archs=("sm_90",), expect=r"QGMMA.*E4M3\.E4M3"),
    point(
        "mxfp4", "scaled_matmul", FP4, {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 32},
        values_per_iteration=64 * 128, bits_per_value=4.25, flops_per_value=256, matrix_rate="fp4",
        archs=("sm_100", "sm_120"), expect=r"kind::(mxf4|mxf4nvf4|mxf8f6f4)\.block_scale",
    ),
    point("w4a16", "weight_only_matmul", WEIGHT_ONLY, {**TILE_W4, "GROUP": 32}, **W4, bits_per_value=4.25,
          max_instructions_per_value=2.5),
    point("nvfp4", "weight_only_matmul", {**WEIGHT_ONLY, "scale_ptr": "*fp8e4nv"}, {**TILE_W4, "GROUP": 16}, **W4,
          bits_per_value=4.5),
    point("spill", "matmul", BF16, {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, values_per_iteration=256 * 64,
          flops_per_value=256, archs=("sm_90",), expect="QGMMA"),
    point("specialized", "matmul_warp_specialized", {**BF16, "M": "i32"}, SPECIALIZED, values_per_iteration=128 * 64,
          flops_per_value=256, archs=("sm_90", "sm_100")),
    point("double", "double", {"x_ptr": "*bf16", "y_ptr": "*bf16"}, {"BLOCK": 1024, "DTYPE": "tl.bfloat16"},
          values_per_iteration=1024, archs=("sm_90",)),
    point("wrong", "wrong", {"x_ptr": "*fp32"}, {"BLOCK": 16}, archs=("sm_90",)),
    point("aborts", "aborts", {"x_ptr": "*fp32"}, {}, archs=("sm_90",)),
    point("option", "matmul", BF16, SMALL, archs=("sm_90",), options=(("max_registers", 64),)),
    point("registers", "matmul", BF16, {**SMALL, "BLOCK_N": 256}, archs=("sm_90",), options=(("maxnreg", 64),)),
    point("argument", "matmul", {**BF16, "M": "i32"}, SMALL, archs=("sm_90",)),
    point("not_a_kernel", "not_a_kernel", {"x_ptr": "*fp32"}, {}, archs=("sm_90",)),
    point("no_module", "matmul", {}, {}, module="tokenfab.kernels.no_such_module", archs=("sm_90",)),
)  # fmt: skip


@dataclasses.dataclass
class Inspected:
    results: dict[tuple[str, str], Inspection]
    calls: list[tuple[int, int, str]]
    order: list[tuple[str, str]]
    cache_dir: Path


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Inspected:
    """All points, inspected once, with the interpreter asked for as CPU tests of kernels do."""
    folder, calls = tmp_path_factory.mktemp("cache"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        Path("tokenfab.py").write_text("raise AssertionError('imported from the working directory')")
        found = inspect(
            POINTS, cache_dir=folder, progress=lambda *each: calls.append((each[0], each[1], each[2].point.name))
        )
    order = [(each.point.name, each.arch) for each in found]
    return Inspected(dict(zip(order, found, strict=True)), calls, order, folder)


def compiled(inspected: Inspected, name: str, arch: str) -> Any:
    inspection = inspected.results[name, arch]
    assert inspection.compiled is not None, inspection.findings
    return inspection.compiled


def kinds(inspection: Inspection) -> list[str]:
    return [finding.kind for finding in inspection.findings]


# ---- compiled kernels ------------------------------------------------------------------------------------


@needs_triton
def test_results_come_in_order_and_progress_tells_of_each(inspected: Inspected) -> None:
    archs = ("sm_90", "sm_100", "sm_103", "sm_120")
    assert inspected.order == [(each.name, arch) for each in POINTS for arch in archs if arch in (each.archs or archs)]
    assert [call[0] for call in inspected.calls] == list(range(1, len(inspected.order) + 1))
    assert {call[1] for call in inspected.calls} == {len(inspected.order)}
    assert sorted(call[2] for call in inspected.calls) == sorted(name for name, _ in inspected.order)


@needs_triton
@pytest.mark.parametrize(
    ("name", "arch", "matrix", "ptx"),
    [
        ("bf16", "sm_90", "HGMMA.64x64x16.F32.BF16", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"),
        ("bf16", "sm_100", "UTCHMMA", "tcgen05.mma.cta_group::1.kind::f16"),
        ("bf16", "sm_120", "HMMA.16816.F32.BF16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("fp8", "sm_90", "QGMMA.64x64x32.F32.E4M3.E4M3", "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"),
        ("mxfp4", "sm_100", "UTCOMMA", "tcgen05.mma.cta_group::1.kind::mxf4.block_scale"),
        (
            "mxfp4",
            "sm_120",
            "OMMA.SF.16864.F32.E2M1.E2M1.E8",
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale",
        ),
        ("w4a16", "sm_90", "HGMMA.64x16x16.F32.BF16", "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"),
    ],
)
def test_matrix_instructions(inspected: Inspected, name: str, arch: str, matrix: str, ptx: str) -> None:
    found = compiled(inspected, name, arch)
    (hot,) = found.hot
    assert list(hot.loop.matrix) == [matrix]
    assert list(found.matrix) == [matrix]
    assert [each[: len(ptx)] for each in found.ptx_matrix] == [ptx]
    assert found.triton == TRITON
    assert found.num_warps == hot.num_warps == 4
    assert found.spill_bytes == found.stack_bytes == 0
    assert 32 < found.registers <= 255
    if name != "w4a16":
        assert inspected.results[name, arch].findings == ()


@needs_triton
def test_counts_of_the_hot_loop(inspected: Inspected) -> None:
    found = compiled(inspected, "bf16", "sm_90")
    loop = found.hot[0].loop
    # a 64 x 64 tile of each operand in 16-byte loads of 128 threads; four steps of K
    assert (loop.loads, loop.num_matrix, loop.opcodes["HGMMA"]) == (8, 4, 4)
    assert loop.matrix_flops() * 4 == 2 * 64**3
    assert found.trips == 1
    assert found.instructions_per_value == loop.instructions * 128 / 4096
    assert loop.instructions == pytest.approx(97, abs=8)
    # two 64 x 64 BF16 tiles, three stages, and the KiB of the system
    assert found.shared_bytes == 3 * 2 * 64 * 64 * 2 + 1024
    assert found.occupancy == sm_limits.Occupancy(4, 16, "shared memory")


@needs_triton
def test_tensor_memory_and_peeled_matrix_work(inspected: Inspected) -> None:
    inspection = inspected.results["bf16", "sm_100"]
    assert compiled(inspected, "bf16", "sm_100").tensor_memory_columns == 64
    assert compiled(inspected, "bf16", "sm_90").tensor_memory_columns == 0
    assert "4 of 8 matrix instructions stand outside the hot loop (peeled trips)" in inspection.notes
    assert compiled(inspected, "mxfp4", "sm_100").occupancy.limited_by == "tensor memory"


@needs_triton
def test_sm_103_is_compiled_even_where_its_code_cannot_be_read(inspected: Inspected) -> None:
    found, inspection = compiled(inspected, "bf16", "sm_103"), inspected.results["bf16", "sm_103"]
    assert "tcgen05.mma.cta_group::1.kind::f16" in found.ptx_matrix
    assert inspection.findings == ()  # the PTX shows what is expected
    if TRITON == "3.6.0":
        assert "Cannot decode architecture" in found.sass_unreadable
        assert (found.instructions_per_value, found.hot) == (None, ())
        assert any("no SASS to count in" in note for note in inspection.notes)
    else:
        assert found.sass_unreadable == ""
        assert found.instructions_per_value > 1


@needs_triton
def test_instructions_per_value_of_the_plain_weight_only_kernel(inspected: Inspected) -> None:
    found = compiled(inspected, "w4a16", "sm_90")
    known = {"3.6.0": 7.96, "3.9.0": 5.80}
    if TRITON in known:
        assert found.instructions_per_value == pytest.approx(known[TRITON], abs=0.03)
    else:
        assert 2.5 < found.instructions_per_value < 8.5
    (finding,) = inspected.results["w4a16", "sm_90"].findings
    assert finding.kind == "instructions"
    assert finding.text == f"expected at most 2.5 instructions per value; got {found.instructions_per_value:.2f}"
    on_h100 = floors(inspected.results["w4a16", "sm_90"], get_gpu("h100"))
    assert on_h100.binds == "issue"
    assert on_h100.issue_s == pytest.approx(found.instructions_per_value / 29.65e12, rel=1e-3)


@needs_triton
def test_spills_and_serialized_matrix_work_are_findings(inspected: Inspected) -> None:
    inspection = inspected.results["spill", "sm_90"]
    found = compiled(inspected, "spill", "sm_90")
    assert kinds(inspection) == ["spills", "expect", "ptxas"]
    assert found.registers == 255
    assert found.spill_store_bytes > 500
    assert found.spill_load_bytes > 500
    assert found.spill_bytes == found.spill_store_bytes + found.spill_load_bytes
    texts = [finding.text for finding in inspection.findings]
    assert texts[0] == f"{found.spill_store_bytes} bytes of spill stores, {found.spill_load_bytes} of spill loads"
    assert texts[1].startswith("expected a matrix instruction like 'QGMMA'; got HGMMA.64x256x16.F32.BF16")
    assert "wgmma.mma_async instructions are serialized" in texts[2]


@needs_triton
def test_every_partition_of_a_warp_specialised_kernel_is_counted(inspected: Inspected) -> None:
    hopper = compiled(inspected, "specialized", "sm_90")
    assert hopper.num_warps == 12  # one warp group loads, two multiply half of the rows each
    working = sorted(hopper.hot, key=lambda hot: hot.loop.num_matrix)
    assert [(hot.loop.num_matrix, hot.loop.loads, hot.num_warps) for hot in working] == [
        (0, 3, 4),
        (4, 0, 4),
        (4, 0, 4),
    ]
    assert [hot.partition for hot in working] == ["default", *["partition0 or partition1"] * 2]
    assert hopper.trips == 1
    issued = sum(hot.loop.instructions for hot in hopper.hot) * 128
    assert hopper.instructions_per_value == issued / (128 * 64)
    blackwell = compiled(inspected, "specialized", "sm_100")
    assert sorted((hot.loop.num_matrix, hot.num_warps, hot.partition) for hot in blackwell.hot) == [
        (0, 2, "partition1"), (4, 1, "partition0"),
    ]  # fmt: skip
    issued = sum(hot.loop.instructions * hot.num_warps * 32 for hot in blackwell.hot)
    assert blackwell.instructions_per_value == issued / (128 * 64)
    assert (
        "warp-specialised: 2 loops of 3 partitions counted together" in inspected.results["specialized", "sm_100"].notes
    )


@needs_triton
def test_a_kernel_without_a_loop_is_counted_whole(inspected: Inspected) -> None:
    found = compiled(inspected, "double", "sm_90")
    assert inspected.results["double", "sm_90"].findings == ()
    assert inspected.results["double", "sm_90"].notes == ("no loop: the whole kernel counts as one trip",)
    assert found.matrix == {}
    assert found.hot[0].loop.loads == 1
    assert 1 < found.instructions_per_value == found.hot[0].loop.instructions / 8 < 5


@needs_triton
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("wrong", "exception", "CompilationError: at 2:"),
        ("aborts", "abort", "killed by SIGABRT\nFatal Python error: Aborted"),
        ("option", "exception", "ValueError: options: expected some of num_warps, "),
        ("registers", "exception", "Insufficient registers (64)"),
        ("argument", "exception", "ValueError: signature: expected arguments x_ptr, w_ptr, y_ptr, N, K, BLOCK_M, "),
        ("not_a_kernel", "exception", "ValueError: function: expected a @triton.jit function; got int"),
        ("no_module", "exception", "ModuleNotFoundError: No module named 'tokenfab.kernels.no_such_module'"),
    ],
)
def test_what_does_not_compile_is_a_finding(inspected: Inspected, name: str, kind: str, text: str) -> None:
    inspection = inspected.results[name, "sm_90"]
    (finding,) = inspection.findings
    assert finding.kind == kind
    assert text in finding.text
    assert "tokenfab-inspect-" not in finding.text  # no temporary file
    assert inspection.compiled is None
    assert rows([inspection], [get_gpu("h100")]) == [
        {"kernel": name, "arch": "sm_90", "findings": f"{kind}: {finding.text.splitlines()[0]}"}
    ]


@needs_triton
@pytest.mark.skipif(TRITON != "3.6.0", reason=f"the compiler of Triton 3.6.0 aborts; this is {TRITON}")
def test_an_assertion_of_the_compiler_is_a_finding(inspected: Inspected) -> None:
    (finding,) = inspected.results["nvfp4", "sm_90"].findings
    assert finding.kind in ("abort", "exception")  # MLIR may catch the signal
    assert "Assertion `type.getElementType().isIntOrIndex()' failed" in finding.text


@needs_triton
def test_a_compiler_that_hangs_is_a_finding_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    started = time.monotonic()
    hangs = point("hangs", "hangs", {"x_ptr": "*fp32"}, {})
    (inspection,) = inspect([hangs], ["sm_90"], timeout_s=1.5, cache_dir=tmp_path / "cache")
    assert time.monotonic() - started < 10
    assert [(each.kind, each.text) for each in inspection.findings] == [("timeout", "no answer within 1.5 s")]
    assert list(tmp_path.iterdir()) == []


@needs_triton
def test_the_document_is_json(inspected: Inspected) -> None:
    found = json.loads(json.dumps(document(inspected.results.values(), list(GPUS.values()))))
    assert found["schema_version"] == 1
    by_name = {(each["point"]["name"], each["arch"]): each for each in found["inspections"]}
    assert list(by_name) == inspected.order
    bf16 = by_name["bf16", "sm_90"]
    assert bf16["compiled"]["hot"][0]["loop"]["matrix"] == {"HGMMA.64x64x16.F32.BF16": 4}
    assert [each["gpu"] for each in bf16["floors"]] == ["h100", "h100_pcie", "h200", "h800", "h20"]
    assert by_name["aborts", "sm_90"]["compiled"] is None
    assert by_name["aborts", "sm_90"]["floors"] == []
    assert by_name["aborts", "sm_90"]["findings"][0]["kind"] == "abort"


@needs_triton
def test_rows_for_people(inspected: Inspected) -> None:
    wanted = [inspected.results["bf16", "sm_90"], inspected.results["bf16", "sm_100"]]
    h100, h200, none = rows(wanted, [get_gpu("h100"), get_gpu("h200"), get_gpu("rtx_5090")])
    assert (h100["kernel"], h100["arch"], h100["GPU"], h200["GPU"]) == ("bf16", "sm_90", "h100", "h200")
    assert (h100["shared KiB"], h100["CTAs/SM"], h100["spill bytes"]) == ("49.0", "4 (shared memory)", "0")
    assert (h100["matrix"], h100["bound by"], h100["findings"]) == ("HGMMA.64x64x16.F32.BF16", "bytes", "ok")
    assert (h100["bytes ps"], h200["bytes ps"], h100["matrix ps"]) == ("0.597", "0.417", "0.129")
    assert (h100["budget"], h200["budget"]) == ("17.7", "12.4")
    assert float(h100["instr/value"]) == pytest.approx(
        compiled(inspected, "bf16", "sm_90").instructions_per_value, abs=0.01
    )
    assert "GPU" not in none
    (b200,) = rows(wanted[1:], [get_gpu("b200")])
    assert (b200["issue ps"], b200["budget"]) == ("?", "?")


# ---- the cache -------------------------------------------------------------------------------------------


@needs_triton
def test_a_second_inspection_compiles_nothing(inspected: Inspected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(Children, "ask", _refuse)
    good = [each for each in POINTS if (each.name, "sm_90") in inspected.order]
    good = [each for each in good if inspected.results[each.name, "sm_90"].compiled]
    again = inspect(good, ["sm_90"], cache_dir=inspected.cache_dir)
    assert [each.cached for each in again] == [True] * len(good)
    for each in again:
        first = inspected.results[each.point.name, "sm_90"]
        assert not first.cached
        assert dataclasses.replace(each, cached=False) == first
    # judged anew: what a point expects is no part of what is compiled
    judged = dataclasses.replace(BF16_POINT, name="judged", expect="QGMMA", max_instructions_per_value=1)
    assert kinds(inspect([judged], ["sm_90"], cache_dir=inspected.cache_dir)[0]) == ["expect", "instructions"]


def _refuse(*_: Any) -> Any:
    raise AssertionError("compiled")


HELPER = "import triton\nimport triton.language as tl\n\n@triton.jit\ndef twice(x):\n    return x * 2\n"
KERNEL = """
import triton
import triton.language as tl
from helper_of_test import twice

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, twice(tl.load(x_ptr + offs)))
"""


@needs_triton
def test_an_edit_of_a_helper_compiles_again(tmp_path: Path) -> None:
    (tmp_path / "helper_of_test.py").write_text(HELPER)
    (tmp_path / "kernel.py").write_text(KERNEL)
    made = point("made", "kernel", {"x_ptr": "*fp32"}, {"BLOCK": 128}, module=str(tmp_path / "kernel.py"))

    def look(**fields: Any) -> Inspection:
        changed = dataclasses.replace(made, **fields)
        return inspect([changed], ["sm_90"], jobs=1, cache_dir=tmp_path / "cache")[0]

    first = look()
    assert (first.cached, look().cached) == (False, True)
    (tmp_path / "unrelated.py").write_text("")
    assert look().cached
    (tmp_path / "helper_of_test.py").write_text(HELPER.replace("* 2", "* 2 + tl.exp(x)"))
    edited = look()
    assert not edited.cached
    assert edited.compiled is not None
    assert first.compiled is not None
    assert edited.compiled.hot[0].loop.instructions > first.compiled.hot[0].loop.instructions
    assert look().cached


JOB = {"module": "tokenfab.kernels.formats", "function": "f", "num_warps": 4, "arch": "sm_90"}


@pytest.fixture
def answer(tmp_path: Path) -> dict[str, Any]:
    source = tmp_path / "source.py"
    source.write_text("x = 1")
    digest = "".join(Cache(tmp_path, {})._hash(str(source)))
    return {"facts": {"registers": 1}, "dependencies": {str(source): digest}}


def test_r18_the_cache_serves_only_what_nothing_has_changed(tmp_path: Path, answer: dict[str, Any]) -> None:
    folder = tmp_path / "made" / "by" / "it"

    def cache(**changed: str) -> Cache:
        return Cache(folder, {"triton": "1", "ptxas": "2", **changed})

    assert cache().get(JOB) is None
    cache().put(JOB, answer)
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    assert cache().get(JOB) == {"registers": 1}
    for changed in ({"num_warps": 8}, {"arch": "sm_100"}, {"function": "g"}, {"module": "tokenfab.bench.gpus"}):
        assert cache().get({**JOB, **changed}) is None
    assert cache(triton="2").get(JOB) is None
    assert cache(ptxas="3").get(JOB) is None
    (tmp_path / "source.py").write_text("x = 2")
    assert cache().get(JOB) is None
    (tmp_path / "source.py").write_text("x = 1")
    assert cache().get(JOB) == {"registers": 1}
    (tmp_path / "source.py").unlink()
    assert cache().get(JOB) is None


def test_r18_the_environment_that_steers_the_compiler_is_part_of_the_key(
    tmp_path: Path, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache(tmp_path / "c", {}).put(JOB, answer)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # never reaches the child
    monkeypatch.setenv("UNRELATED", "1")
    assert Cache(tmp_path / "c", {}).get(JOB) is not None
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert Cache(tmp_path / "c", {}).get(JOB) is None


def test_a_damaged_entry_is_compiled_again(tmp_path: Path, answer: dict[str, Any]) -> None:
    cache = Cache(tmp_path / "c", {})
    cache.put(JOB, answer)
    (entry,) = (tmp_path / "c").iterdir()
    for damaged in ("", entry.read_text()[:-5], "[]", "{}", '{"facts": 1, "dependencies": {}}'):
        entry.write_text(damaged)
        assert cache.get(JOB) is None
    cache.put(JOB, {**answer, "dependencies": None})  # changed while it compiled
    assert cache.get(JOB) is None


def test_a_cache_that_cannot_be_written_warns(tmp_path: Path, answer: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"^not cached: "):
        Cache(tmp_path / "file" / "c", {}).put(JOB, answer)


def test_the_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFAB_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setattr(sys, "platform", "linux")
    assert inspect_cache.cache_folder() == Path("/a")
    monkeypatch.delenv("TOKENFAB_CACHE")
    assert inspect_cache.cache_folder() == Path("/b/tokenfab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert inspect_cache.cache_folder() == Path("/h/.cache/tokenfab")


# ---- the child -------------------------------------------------------------------------------------------


@needs_triton
def test_a_child_works_until_it_fails() -> None:
    child = Child(KERNELS)
    job = {**POINTS[0].compiler_inputs(), "arch": "sm_90"}
    assert child.ask(job, 60)["facts"]["registers"] > 32
    assert child.alive
    told = child.ask({**job, "function": "wrong", "signature": {}}, 60)
    assert (told["failure"], child.alive) == ("exception", False)


@needs_triton
def test_sources_edited_while_a_child_lives_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_test.py").write_text(HELPER)
    (tmp_path / "kernel_of_test.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    made = point("made", "kernel", {"x_ptr": "*fp32"}, {"BLOCK": 128}, module="kernel_of_test")
    job = {**made.compiler_inputs(), "arch": "sm_90"}
    child = Child(made.module)
    seen = child.ask(job, 60)["dependencies"]
    assert {Path(path).name for path in seen} >= {
        "kernel_of_test.py", "helper_of_test.py", "sass.py", "inspect_child.py",
    }  # fmt: skip
    assert not any("site-packages" in path for path in seen)
    os.utime(tmp_path / "helper_of_test.py", (time.time() + 9, time.time() + 9))
    told = child.ask(job, 60)
    assert told["facts"]["registers"] > 1  # compiled a second time, and read a second time
    assert told["dependencies"] is None
    child.close()


@needs_triton
def test_a_child_that_is_killed_is_told_from_one_that_answers() -> None:
    child = Child(KERNELS)
    os.kill(child._process.pid, signal.SIGSTOP)
    os.kill(child._process.pid, signal.SIGKILL)
    told = child.ask({**POINTS[0].compiler_inputs(), "arch": "sm_90"}, 60)
    assert told == {"failure": "abort", "text": "killed by SIGKILL"}


def test_inspection_imports_without_triton_or_torch() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; sys.modules['triton'] = sys.modules['torch'] = None\n"
        "from tokenfab.bench import inspect\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_inspection_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^triton: expected it installed; pip install 'tokenfab\[kernels\]'$"):
        inspect([POINTS[0]])


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^archs: expected some of sm_90, sm_100, sm_103, sm_120; got 'sm_80'$"):
        inspect([POINTS[0]], ["sm_80"])
    with pytest.raises(ValueError, match=r"^points: expected names once; got bf16 on sm_90 twice$"):
        inspect([POINTS[0], POINTS[0]], ["sm_90"])


# ---- what is made of the facts ---------------------------------------------------------------------------


def loop(instructions: int, matrix: dict[str, int] | None = None, **fields: int) -> dict[str, Any]:
    made = Loop(0, instructions, fields.pop("conditional", 0), {}, matrix or {}, fields.pop("loads", 0), **fields)
    return dataclasses.asdict(made)


def facts(*loops: dict[str, Any], **fields: Any) -> dict[str, Any]:
    matrix: dict[str, int] = {}
    for each in loops:
        for name, count in each["matrix"].items():
            matrix[name] = matrix.get(name, 0) + count
    return {
        "triton": "3", "ptxas": "13", "num_warps": 4, "num_ctas": 1, "registers": 128, "stack_bytes": 0,
        "local_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0, "shared_bytes": 1024,
        "tensor_memory_columns": 0, "ptxas_warnings": [], "sass_unreadable": "", "loops": list(loops),
        "whole": loop(500), "ptx_loops": [],
        "matrix": matrix, "ptx_matrix": {}, "partitions": [], **fields,
    }  # fmt: skip


HGMMA = "HGMMA.64x16x16.F32.BF16"  # 2 * 64 * 16 * 16 flops per warp group
# 64 x 64 weights a trip against 16 rows: four of these
STREAM = point("stream", "f", {}, {}, values_per_iteration=4096, bits_per_value=4.25, flops_per_value=32)


def read(*loops: dict[str, Any], like: CompilePoint = STREAM, arch: str = "sm_90", **fields: Any) -> Any:
    return read_facts(like, arch, facts(*loops, **fields))


def test_instructions_per_value_and_unrolling_by_matrix_flops() -> None:
    once, twice = read(loop(96, {HGMMA: 4})), read(loop(180, {HGMMA: 8}))
    assert (once.compiled.trips, once.compiled.instructions_per_value) == (1, 96 * 128 / 4096)
    assert (twice.compiled.trips, twice.compiled.instructions_per_value) == (2, 180 * 128 / 4096 / 2)
    assert once.notes == ()
    assert twice.notes == ("the hot loop is unrolled: 2 trips of the source's loop in one",)
    assert once.findings == twice.findings == ()
    # two CTAs of one program each do half
    cluster = read(loop(96, {HGMMA: 2}), num_ctas=2)
    assert (cluster.compiled.trips, cluster.compiled.instructions_per_value) == (1, 96 * 256 / 4096)


@pytest.mark.parametrize(("count", "told"), [(6, "1.5"), (1, "0.25")])
def test_matrix_work_that_does_not_fit_the_point_is_a_finding(count: int, told: str) -> None:
    (finding,) = read(loop(96, {HGMMA: count})).findings
    assert finding.kind == "work"
    assert finding.text.startswith(f"a trip of the hot loop does {told} x the point's matrix flops")


def test_unrolling_against_the_ptx_where_names_hide_the_shape() -> None:
    peeled = read(loop(90, {"UTCHMMA": 8}), ptx_loops=[loop(50, {"tcgen05.mma": 4}), loop(9)], arch="sm_100")
    assert peeled.compiled.trips == 2
    assert peeled.compiled.instructions_per_value == 90 * 128 / 4096 / 2
    loads = read(loop(90, loads=12), ptx_loops=[loop(50, loads=3)], like=dataclasses.replace(STREAM, flops_per_value=0))
    assert loads.compiled.trips == 4
    assert read(loop(90, {"UTCHMMA": 8}), arch="sm_100").compiled.trips == 1


def test_loops_are_weighed_and_the_rest_told() -> None:
    inspection = read(loop(99, {HGMMA: 1}), loop(96, {HGMMA: 4}, conditional=7, inner=5, calls=2), loop(300, loads=4))
    assert inspection.compiled.instructions_per_value == 96 * 128 / 4096
    assert len(inspection.compiled.loops) == 3
    assert inspection.notes == (
        "several loops hold matrix instructions: the one with most matrix work counts",
        "hot loop: 7 more under branches without matrix work or loads, not counted",
        "hot loop: 5 in loops inside it, counted once",
        "hot loop: 2 calls, whose callees are not counted",
        "1 of 5 matrix instructions stand outside the hot loop (peeled trips)",
    )


def test_matrix_work_outside_every_loop_cannot_be_counted() -> None:
    inspection = read(
        loop(96, loads=3), matrix={HGMMA: 4}, like=dataclasses.replace(STREAM, max_instructions_per_value=5)
    )
    assert inspection.compiled.instructions_per_value is None
    assert inspection.notes == ("no loop holds a matrix instruction",)
    assert [(each.kind, each.text) for each in inspection.findings] == [
        ("instructions", "expected at most 5 instructions per value; got an unknown number")
    ]


def test_warps_of_a_loop_that_several_partitions_could_run() -> None:
    parts = [
        {"name": "default", "num_warps": 4, "matrix": False, "loads": False},
        {"name": "partition0", "num_warps": 1, "matrix": True, "loads": False},
        {"name": "partition1", "num_warps": 2, "matrix": True, "loads": True},
    ]
    inspection = read(
        loop(10, {"UTCHMMA": 4}), loop(20, loads=2), loop(5), partitions=parts, arch="sm_100", num_warps=8
    )
    assert [(each.num_warps, each.partition) for each in inspection.compiled.hot] == [
        (2, "partition0 or partition1"), (2, "partition1"),
    ]  # fmt: skip
    assert inspection.compiled.instructions_per_value == (10 * 64 + 20 * 64) / 4096
    assert inspection.notes[0] == "a loop may belong to partition0, partition1: 2 warps counted"


@pytest.mark.parametrize(
    ("expect", "found"),
    [("HGMMA", True), (r"^HGMMA\.64x16", True), (r"kind::mxf4.*block_scale", True), ("QGMMA", False), ("hgmma", False)],
)
def test_expected_matrix_instructions(expect: str, found: bool) -> None:
    wanted = dataclasses.replace(STREAM, expect=expect)
    inspection = read(loop(96, {HGMMA: 4}), like=wanted, ptx_matrix={"tcgen05.mma.kind::mxf4.block_scale": 1})
    assert kinds(inspection) == ([] if found else ["expect"])


def test_what_stands_only_outside_the_hot_loop_is_not_as_expected() -> None:
    inspection = read(
        loop(96, {HGMMA: 4}), loop(9, {"HMMA.16816.F32": 1}), like=dataclasses.replace(STREAM, expect="HMMA.16816")
    )
    assert kinds(inspection) == ["expect"]


@pytest.mark.parametrize(("limit", "found"), [(3.0, []), (2.9, ["instructions"]), (None, [])])
def test_limit_of_instructions_per_value(limit: float | None, found: list[str]) -> None:
    assert (
        kinds(read(loop(96, {HGMMA: 4}), like=dataclasses.replace(STREAM, max_instructions_per_value=limit))) == found
    )


def test_findings_of_the_assembler() -> None:
    assert kinds(read(loop(96, {HGMMA: 4}), spill_load_bytes=4)) == ["spills"]
    assert kinds(read(loop(96, {HGMMA: 4}), spill_store_bytes=4)) == ["spills"]
    (finding,) = read(loop(96, {HGMMA: 4}), shared_bytes=228 * 1024 + 1).findings
    assert (finding.kind, finding.text) == ("fit", "no CTA fits on an SM: shared memory")
    assert kinds(read(loop(96, {HGMMA: 4}), ptxas_warnings=["(C7506) Potential Performance Loss: x"])) == ["ptxas"]
    told = read(loop(96, {HGMMA: 4}), ptxas_warnings=["Too many maxnreg"], stack_bytes=8)
    assert told.findings == ()
    assert told.notes == ("8 bytes of stack without spills",)
    assert told.compiled.ptxas_warnings == ("Too many maxnreg",)


# ---- floors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "bits", "arriving", "budget"),
    # a GPU's bandwidth over the bits of a value; issue is 132 x 4 x 32 x 1.755 GHz = 29.65e12 per second
    [("h100", 4.25, 6.3e12, 4.7), ("h200", 4.25, 9.04e12, 3.3), ("h100", 8, 3.35e12, 8.8), ("h200", 8, 4.8e12, 6.2)],
)
def test_how_many_instructions_bandwidth_allows(gpu: str, bits: float, arriving: float, budget: float) -> None:
    found = floors(read(loop(96, {HGMMA: 4}), like=dataclasses.replace(STREAM, bits_per_value=bits)), get_gpu(gpu))
    assert 1 / found.bytes_s == pytest.approx(arriving, rel=2e-3)
    assert found.budget == pytest.approx(budget, abs=0.06)
    assert found.clock_source == sm_limits.SM_CLOCKS[gpu].source


@pytest.mark.parametrize(
    ("instructions", "flops", "binds"),
    [(96, 32, "bytes"), (320, 32, "issue"), (96, 2048, "matrix"), (3200, 2048, "issue")],
)
def test_the_slowest_floor_binds(instructions: int, flops: int, binds: str) -> None:
    like = dataclasses.replace(STREAM, flops_per_value=flops)
    found = floors(read(loop(instructions, {HGMMA: 4 * flops // 32}), like=like), get_gpu("h100"))
    assert found.binds == binds
    assert found.matrix_s == pytest.approx(flops / 989e12)
    assert found.issue_s == pytest.approx(instructions * 128 / 4096 / 29.65e12, rel=1e-3)
    assert found.bytes_s == pytest.approx(4.25 / 8 / 3.35e12)


def test_an_unknown_clock_leaves_the_issue_floor_unknown() -> None:
    b200 = get_gpu("b200")
    inspection = read(loop(96, {"UTCHMMA": 4}), arch="sm_100")
    found = floors(inspection, b200)
    assert (found.issue_s, found.budget, found.clock_source) == (None, None, "unknown")
    given = floors(inspection, b200, clock_hz=1e9)
    assert given.issue_s == pytest.approx(3 / (148 * 128 * 1e9))
    assert given.clock_source == "given"
    unread = read(arch="sm_100", sass_unreadable="why", whole=None)
    assert floors(unread, b200, clock_hz=1e9).issue_s is None
    assert unread.notes == ("no SASS to count in: why",)


def test_floors_are_those_of_the_architecture_and_rate_compiled_for() -> None:
    inspection = read(loop(96, {HGMMA: 4}))
    with pytest.raises(ValueError, match=r"^gpu: expected one of sm_90; got b200 \(10.0\)$"):
        floors(inspection, get_gpu("b200"))
    fp4 = read(loop(96, {HGMMA: 4}), like=dataclasses.replace(STREAM, matrix_rate="fp4"))
    with pytest.raises(ValueError, match=r"^gpu: h100 has no FP4 matrix units$"):
        floors(fp4, get_gpu("h100"))
    idle = read(loop(96, loads=1), like=dataclasses.replace(STREAM, flops_per_value=0, matrix_rate="fp4"))
    assert floors(idle, get_gpu("h100")).matrix_s == 0


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "columns", "expected"),
    [
        # CUDA's occupancy calculation: registers per warp in steps of 256, warps spread over four parts
        ("sm_90", 4, 128, 1024, 0, (4, 16, "registers")),
        ("sm_90", 4, 129, 1024, 0, (3, 12, "registers")),
        ("sm_90", 4, 255, 1024, 0, (2, 8, "registers")),
        ("sm_90", 12, 168, 1024, 0, (1, 12, "registers")),
        ("sm_90", 4, 32, 1024, 0, (16, 64, "registers")),
        ("sm_90", 4, 31, 1024, 0, (16, 64, "registers")),
        ("sm_90", 8, 24, 1024, 0, (8, 64, "warps")),
        ("sm_90", 1, 16, 1024, 0, (32, 32, "CTAs")),
        ("sm_90", 4, 64, 114 * 1024, 0, (2, 8, "shared memory")),
        ("sm_90", 4, 64, 114 * 1024 + 1, 0, (1, 4, "shared memory")),
        ("sm_90", 4, 64, 228 * 1024 + 1, 0, (0, 0, "shared memory")),
        ("sm_100", 4, 64, 1024, 256, (2, 8, "tensor memory")),
        ("sm_103", 4, 64, 1024, 512, (1, 4, "tensor memory")),
        ("sm_120", 4, 32, 1024, 0, (12, 48, "warps")),
        ("sm_120", 1, 32, 1024, 0, (24, 24, "CTAs")),
        ("sm_120", 4, 64, 51 * 1024, 0, (1, 4, "shared memory")),
    ],
)
def test_occupancy(arch: str, num_warps: int, registers: int, shared: int, columns: int, expected: Any) -> None:
    assert sm_limits.occupancy(arch, num_warps, registers, shared, columns) == sm_limits.Occupancy(*expected)


def test_clocks_belong_to_known_gpus() -> None:
    assert set(sm_limits.SM_CLOCKS) <= set(GPUS)
    assert sm_limits.issue_rate(get_gpu("h100")) == pytest.approx(29.6e12, rel=2e-3)
    assert sm_limits.issue_rate(get_gpu("b200")) is None
    assert all(clock.source for clock in sm_limits.SM_CLOCKS.values())


# ---- points ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signature": (("x", "i32"), ("x", "i32"))}, "signature: expected each name once; got x, x"),
        ({"options": (("a", 1), ("a", 2))}, "options: expected each name once; got a, a"),
        ({"constexprs": (("B", 1),)}, "constexprs: expected a value for every constexpr argument; differs in B"),
        (
            {"signature": (("B", "constexpr"),)},
            "constexprs: expected a value for every constexpr argument; differs in B",
        ),
        ({"aligned": ("z",)}, "aligned: expected arguments that are not constexpr; got z"),
        ({"num_warps": 0}, "num_warps: expected more than 0; got 0"),
        ({"values_per_iteration": 0}, "values_per_iteration: expected more than 0; got 0"),
        ({"bits_per_value": float("nan")}, "bits_per_value: expected more than 0; got nan"),
        ({"flops_per_value": -1}, "flops_per_value: expected at least 0; got -1"),
        ({"matrix_rate": "int8"}, "matrix_rate: expected one of bf16, fp8, fp4; got 'int8'"),
        ({"options": (("a", {1}),)}, "constexprs, options: expected what JSON can hold; "),
    ],
)
def test_bad_points_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"\(stream\)$") as error:
        dataclasses.replace(STREAM, **change)
    assert str(error.value).startswith(message)


def test_what_the_compiler_sees_of_a_point() -> None:
    judged = {"name", "values_per_iteration", "bits_per_value", "flops_per_value", "matrix_rate", "expect",
              "max_instructions_per_value", "archs"}  # fmt: skip
    assert {field.name for field in dataclasses.fields(CompilePoint)} - judged == set(BF16_POINT.compiler_inputs())
