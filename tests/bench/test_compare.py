"""What is set beside what, by which measure, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenfab.bench.compare import compare, identity, versions
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.ops import Experts, Gemm, MlaAttention, PagedAttention
from tokenfab.bench.point_ops import op_of
from tokenfab.bench.published import PublishedData, Timing
from tokenfab.bench.record import Record
from tokenfab.bench.records import RecordStore
from tokenfab.bench.sample import Sample, SampleError
from tokenfab.bench.sides import EXTRA, Side, read_benchmarks, read_side
from tokenfab.bench.targets import find_targets
from tokenfab.tests.bench.made_records import RECORD, WRONG, numbered
from tokenfab.tests.bench.made_samples import OTHER_HASH, POINT, anchored, processes, sample, side


def only(compared: Any) -> Any:
    (pair,) = compared.pairs
    return pair


def test_times_of_the_same_point() -> None:
    pair = only(compare(side(processes(50e-6)), side(processes(55e-6, kernel_hash=OTHER_HASH, tile={"block_m": 16}))))
    assert (pair.word, pair.basis, pair.name) == ("slower", "time", "gemm/fp8_block-fp8_group")
    assert pair.judgement.ratio == pytest.approx(1.1)
    assert (pair.a.time_s, pair.b.time_s) == pytest.approx((50e-6, 55e-6))
    assert pair.notes == ()
    assert only(compare(side(processes(50e-6)), side(processes(50e-6)))).word == "same"


def test_anchors_take_the_clock_out() -> None:
    """A power cap slows kernel and anchor by a fifth: the ratio stands."""
    before, capped = anchored(50e-6, 100e-6), anchored(60e-6, 120e-6)
    pair = only(compare(side(before), side(capped)))
    assert (pair.word, pair.basis) == ("same", "ratio to torch.matmul")
    assert only(compare(side(before), side(processes(60e-6)))).basis == "time"
    other = [msgspec.structs.replace(each, anchor="torch.sdpa") for each in capped]
    assert only(compare(side(before), side(other))).word == "slower"
    lost = [msgspec.structs.replace(capped[0], anchor=None, ratio=None, ratio_interval=None), *capped[1:]]
    assert only(compare(side(before), side(lost))).basis == "time"


def test_gpus_are_compared_by_time_where_each_side_is_of_one() -> None:
    pair = only(compare(side(anchored(50e-6, 100e-6)), side(anchored(40e-6, 70e-6, gpu="h200"))))
    assert (pair.word, pair.basis) == ("faster", "time")
    with pytest.raises(
        ValueError, match=r"^sides: expected a point that is on both; got 2 points in side and 1 others"
    ):
        compare(side(processes(1.0), processes(1.0, m=16)), side(processes(1.0, gpu="h200", m=32)))


def test_several_gpus_on_both_sides_pair_up() -> None:
    both = side(processes(50e-6), processes(40e-6, gpu="h200"))
    compared = compare(both, both)
    assert [(pair.a.point.gpu, pair.word) for pair in compared.pairs] == [("h100", "same"), ("h200", "same")]
    (pair,) = compare(both, side(processes(40e-6, gpu="h200"))).pairs
    assert pair.a.point.gpu == pair.b.point.gpu == "h200"


def test_shapes_policies_and_formats_tell_points_apart() -> None:
    base = identity(sample(1.0))
    other: list[dict[str, Any]] = [
        {"m": 16}, {"l2_policy": "hot"}, {"recipe": "torch"}, {"gpu": "h200"}, {"op": "moe"}, {"name": "x"},
        {"formats": {"weight": "mxfp4", "activation": "fp8_group"}},
    ]  # fmt: skip
    assert [change for change in other if identity(sample(1.0, **change)) == base] == []
    same: list[dict[str, Any]] = [
        {"kernel_hash": OTHER_HASH}, {"tile": {}}, {"triton": "3.9.0"}, {"git_sha": "b" * 40},
    ]  # fmt: skip
    assert [change for change in same if identity(sample(1.0, **change)) != base] == []


def test_what_has_no_counterpart_is_named() -> None:
    compared = compare(side(processes(1.0), processes(2.0, m=16)), side(processes(1.0), processes(3.0, m=32)))
    assert len(compared.pairs) == 1
    assert [each.point.shape["m"] for each in (*compared.only_a, *compared.only_b)] == [16, 32]


def test_the_newest_version_counts() -> None:
    old = processes(1.0, recorded_unix_s=1.0)
    new = processes(2.0, recorded_unix_s=2.0, kernel_hash=OTHER_HASH)
    for group in ([*old, *new], [*new, *old]):
        (version,) = versions(group).values()
        assert version.time_s == pytest.approx(2.0)
        assert version.num_older == 3
    pair = only(compare(side(processes(1.0)), side(old, new)))
    assert pair.notes == ("B: 3 of older versions left out",)


def test_a_process_counts_once() -> None:
    (version,) = versions([sample(1.0, "p"), sample(2.0, "p"), sample(3.0, "q")]).values()
    assert [each.time_s for each in version.samples] == [2.0, 3.0]


def test_r20_invalid_measurements_have_no_say() -> None:
    pair = only(compare(side(processes(1.0)), side([sample(None, "a"), sample(None, "b")])))
    assert (pair.word, pair.judgement) == ("unsure", None)
    assert pair.notes == ("B: no valid time: check: wrong",)
    pair = only(compare(side(processes(1.0)), side([*processes(1.0), sample(None, "q")])))
    assert pair.word == "same"


def test_flags_are_said() -> None:
    flagged = [msgspec.structs.replace(each, flags=("throttled",)) for each in processes(1.0)]
    assert only(compare(side(processes(1.0)), side(flagged))).notes == ("B: throttled",)


def test_selected_formats_are_what_is_compared() -> None:
    fp8, fp4 = processes(50e-6), processes(40e-6, formats={"weight": "mxfp4", "activation": "bf16"})
    a, b = (Side("s", tuple(group), frozenset({"weight"})) for group in (fp8, fp4))
    pair = only(compare(a, b))
    assert (pair.word, pair.name) == ("faster", "gemm/fp8_block-fp8_group -> gemm/mxfp4-bf16")
    both = Side("s", tuple([*fp4, *processes(1.0, formats={"weight": "mxfp4", "activation": "fp8_row"})]), b.selected)
    with pytest.raises(ValueError, match=r"^activation: expected one of each side at a point; got bf16 and fp8_row"):
        compare(a, both)


# -- published rows --------------------------------------------------------------------------------


def test_a_stack_is_looked_up(published: PublishedData) -> None:
    def look_up(op: Any, gpu: Any, stack: str) -> Timing:
        return published.time(op, gpu, published.stack(gpu, stack))

    pair = only(compare(Side("published:vllm", stack="vllm"), side(processes(40e-6)), published=look_up))
    assert pair.a.time_s == pytest.approx(87.5e-6, rel=0.01)
    assert pair.word == "faster"
    assert pair.notes[0].startswith("A: measured: vllm 0.24.0 gemm: DeepGemm")
    assert pair.notes[0].endswith("its noise is unknown")
    turned = only(compare(side(processes(40e-6)), Side("published:vllm", stack="vllm"), published=look_up))
    assert turned.word == "slower"
    assert turned.judgement.ratio == pytest.approx(1 / pair.judgement.ratio)
    with pytest.raises(ValueError, match=r"^sides: expected measurements on one side at least"):
        compare(Side("a", stack="vllm"), Side("b", stack="sglang"), published=look_up)


def test_points_become_the_ops_they_are_of() -> None:
    found: dict[str, set[str]] = {}
    for target in find_targets(None, None, ["deepseek-v3", "gpt-oss-120b"], [64], get_gpu("h100"), [8192]):
        point = msgspec.structs.replace(POINT, op=target.kernel.op, shape=target.shape, formats=target.kernel.formats)
        op, work = op_of(point), target.kernel.work(target.shape)
        found.setdefault(target.kernel.op, set()).add(type(op).__name__)
        if op is None:
            continue
        if isinstance(op, Gemm | PagedAttention | MlaAttention):
            assert op.flops == pytest.approx(work.flops, rel=1e-3), target.kernel.name
        if isinstance(op, Experts):
            assert (op.load == "balanced") == (target.shape["load"] == 0)
            if op.load != "balanced":  # the op estimates the experts that are touched; a shape draws them
                continue
        assert op.bytes == pytest.approx(work.weight_bytes + work.activation_bytes, rel=0.07), target.kernel.name
    assert found["gemm"] == {"Gemm"}
    assert found["moe"] == {"Experts"}
    assert found["attention"] == {"PagedAttention"}
    assert found["mla"] == {"MlaAttention"}
    assert found["quantize"] == found["rope_append"] == found["copy"] == {"NoneType"}


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    store = RecordStore(tmp_path, "h100.jsonl")
    for number in (1, 2):
        for process in ("one", "two", "three"):
            store.append(numbered(number, process))
    return store


def test_records_are_a_side(store: RecordStore) -> None:
    found = read_side(str(store.path))
    assert len(found.samples) == 6
    assert found.selected == frozenset()
    assert found.samples[0].time_s == RECORD.time_s
    assert found.samples[0].interval_s == RECORD.interval_s
    assert read_side(str(store.path.parent)).samples == found.samples
    assert len(compare(found, found).pairs) == 2


@pytest.mark.parametrize(
    ("tail", "num"), [(":commit=aaaa", 6), (":commit=aaaa,gpu=h100", 6), (":weight=nvfp4", 6), (":uuid=GPU-1", 6)]
)
def test_a_side_is_narrowed(store: RecordStore, tail: str, num: int) -> None:
    found = read_side(f"{store.path}{tail}")
    assert len(found.samples) == num
    assert found.selected == {part.partition("=")[0] for part in tail[1:].split(",")}


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (":commit=bbbb", "expected commit=bbbb among its 6 measurements; got none"),
        (":weight=nvfp", "expected weight=nvfp among"),
        (":colour=red", "expected FIELD=VALUE with a field of op, weight"),
        (":gpu=", "expected FIELD=VALUE"),
        (":gpu=h100,x", "expected FIELD=VALUE"),
    ],
)
def test_a_side_of_nothing_is_refused(store: RecordStore, tail: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_side(f"{store.path}{tail}")


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a file or folder of measurements; got none"):
        read_side(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"expected \.jsonl records or pytest-benchmark's \.json in it; got none"):
        read_side(str(tmp_path))


def test_a_torn_last_line_is_told(store: RecordStore) -> None:
    with store.path.open("ab") as file:
        file.write(b'{"schema_version": 1, "proc')
    found = read_side(str(store.path))
    assert len(found.samples) == 6
    assert "the last line has no end" in found.torn[0]


def test_a_sample_says_what_its_record_says() -> None:
    made = Sample.of(RECORD, "test")
    assert (made.name, made.device, made.uuid) == ("test", "NVIDIA H100 80GB HBM3", "GPU-1")
    assert (made.anchor, made.ratio, made.ratio_interval) == (None, None, None)
    assert Sample.read(made.to_dict(), "here") == made
    wrong = Sample.of(Record.of(RECORD.point, WRONG, RECORD.environment))
    assert wrong.time_s is None
    assert wrong.invalid[0].startswith("check: ")
    assert Sample.read(wrong.to_dict(), "here") == wrong


@pytest.mark.parametrize(
    ("field", "value"),
    [("time_s", -1.0), ("time_s", None), ("interval_s", None), ("interval_s", {"low": 2.0, "high": 1.0}),
     ("invalid", ["x"]), ("extra", 1), ("point", {}), ("ratio", 0.0)],
)  # fmt: skip
def test_what_is_no_sample_is_refused_by_place(field: str, value: Any) -> None:
    with pytest.raises(SampleError, match=r"^here: "):
        Sample.read(Sample.of(RECORD).to_dict() | {field: value}, "here")


def benchmarks(path: Path, *samples: Sample, **stats: Any) -> Path:
    entries = [
        {"fullname": each.name, "stats": {"median": each.time_s} | stats, "extra_info": {EXTRA: each.to_dict()}}
        for each in samples
    ]
    others = [{"fullname": "other", "stats": {"median": 1.0}, "extra_info": {}}]
    path.write_text(json.dumps({"benchmarks": [*entries, *others]}))
    return path


def test_pytest_benchmarks_files_are_a_side(tmp_path: Path) -> None:
    for number, each in enumerate(processes(1e-5, name="tests/test_it.py::test_it")):
        benchmarks(tmp_path / f"000{number}.json", each)
    found = read_side(str(tmp_path))
    assert [each.name for each in found.samples] == ["tests/test_it.py::test_it"] * 3
    assert only(compare(found, found)).word == "same"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"benchmarks": [', "expected pytest-benchmark's JSON"),
        ('{"benchmarks": NaN}', "NaN is no JSON number"),
        ('{"runs": []}', "'benchmarks' is missing"),
        ("[]", "expected pytest-benchmark's JSON"),
        ('{"benchmarks": [{"fullname": "x", "extra_info": {"tokenfab": {}}}]}', "'stats' is missing"),
        ('{"benchmarks": [{"fullname": "x", "stats": {}, "extra_info": {"tokenfab": {}}}]}', "x: Object missing"),
        ('{"benchmarks": [{"fullname": "x", "stats": 1, "extra_info": {"tokenfab": {}}}]}', "x: expected objects"),
        ("[" * 100_000, "expected pytest-benchmark's JSON"),
    ],
)
def test_damaged_benchmark_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "0001.json"
    path.write_text(text)
    with pytest.raises(SampleError, match=rf"0001\.json: .*{message}"):
        read_benchmarks(path)


def test_statistics_must_bear_the_sample_out(tmp_path: Path) -> None:
    each = sample(1e-5, name="x")
    assert read_benchmarks(benchmarks(tmp_path / "a.json", each, median=1.0005e-5)) == [each]
    for median in (2e-5, None, "1e-5"):
        with pytest.raises(SampleError, match=r"b\.json: x: median: expected 1e-05, as measured; got"):
            read_benchmarks(benchmarks(tmp_path / "b.json", each, median=median))
