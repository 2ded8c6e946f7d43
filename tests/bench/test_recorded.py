"""tokenfab's own records as a stack: what counts of them, what they answer, what takes the place of what is missing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import Gemm
from tokenfab.bench.published import (
    INTERPOLATED,
    INTERPOLATED_HERE,
    MEASURED,
    MEASURED_HERE,
    MODELLED,
    PublishedData,
    model_timing,
)
from tokenfab.bench.record import Record, RecordError
from tokenfab.bench.recorded import NoRecords, RecordedData, RecordedStack, find_stack
from tokenfab.bench.recorded_asks import plan_asks
from tokenfab.bench.records import RecordStore
from tokenfab.bench.step_time import StepTime, TimedOp, published_step, step_time
from tokenfab.tests.bench.recorded_points import JUNE, MAY, invalid, recorded

H100, H200 = get_gpu("h100"), get_gpu("h200")
QWEN, DEEPSEEK = load_model("qwen3-30b-a3b"), load_model("deepseek-v3")
W8A8 = {"weight": "fp8_block", "activation": "fp8_group"}
QKV = {"n": 5120, "k": 2048}
O_PROJ = {"n": 2048, "k": 4096}
LAYERS = 48


@pytest.fixture
def keep(tmp_path: Path) -> Any:
    """Appends records and gives the folder's data, read anew."""

    def append(*records: Record, name: str = "h100.jsonl") -> RecordedData:
        for record in records:
            RecordStore(tmp_path, name).append(record)
        return RecordedData(tmp_path)

    return append


def gemm(m: int, time_s: float, sizes: dict[str, int] = QKV, **more: Any) -> Record:
    return recorded("gemm", W8A8, {"m": m, **sizes}, time_s, **more)


def deployment(batch: int = 64, precision: str = "fp8", gpus: int = 1, **more: Any) -> Deployment:
    return Deployment(gpus, 1, gpus, get_precision(precision), batch, 4096, **more)


def step(data: RecordedData, published: PublishedData, spec: str = "tokenfab", model: Any = QWEN,
         at: Deployment | None = None) -> StepTime:  # fmt: skip
    stack = find_stack(H100, spec, published, data)
    return step_time(published, model, H100, stack, at or deployment(), check_memory=False)


def op(found: StepTime, name: str) -> TimedOp:
    (timed,) = [each for each in found.ops if each.call.name == name]
    return timed


# -- what counts -----------------------------------------------------------------------------------


def test_a_recorded_shape_answers_the_op_and_says_where_it_is_from(keep: Any, published: PublishedData) -> None:
    data = keep(*(gemm(64, time_s, process=name) for name, time_s in (("a", 2e-5), ("b", 2.1e-5), ("c", 2.4e-5))))
    timed = op(step(data, published), "qkv_proj")
    assert timed.provenance == MEASURED_HERE
    assert timed.time_s == pytest.approx(LAYERS * 2.1e-5)
    assert timed.floor_s == pytest.approx(LAYERS * Gemm(64, 5120, 2048, *W8A8.values()).floor_s(H100))
    for part in ("tokenfab gemm/fp8_block-fp8_group", "NVIDIA H100 80GB HBM3", "aaaaaaaaa", "2026-06-03", "3 processes",
                 "noise 19.0%"):  # fmt: skip
        assert part in timed.source
    assert "changed since" not in timed.source


def test_one_process_flags_and_a_dirty_tree_are_said(keep: Any, published: PublishedData) -> None:
    data = keep(gemm(64, 2e-5, throttled=True, environment={"git_dirty": True}))
    source = op(step(data, published), "qkv_proj").source
    for part in ("1 process,", "noise not known", "throttled", "aaaaaaaaa with changes"):
        assert part in source


def test_r20_what_does_not_count(keep: Any, published: PublishedData) -> None:
    """Found wrong, another library's, another GPU's, hot in L2, other formats, another matrix, a user's kernel."""
    wrong = [
        invalid(gemm(64, 1e-6)), gemm(64, 1e-6, recipe="torch._scaled_mm"), gemm(64, 1e-6, gpu="h200"),
        gemm(64, 1e-6, l2_policy="hot"), gemm(64, 1e-6, {"n": 5120, "k": 4096}), gemm(64, 1e-6, recipe="user:mine"),
        recorded("gemm", {"weight": "mxfp4", "activation": "fp8_group"}, {"m": 64, **QKV}, 1e-6),
    ]  # fmt: skip
    data = keep(*wrong, gemm(64, 2e-5, O_PROJ))
    timed = op(step(data, published), "qkv_proj")
    assert timed.provenance == MODELLED
    timing = model_timing(Gemm(64, 5120, 2048, *W8A8.values()), H100, "no record of a kernel of tokenfab's")
    assert (timed.time_s, timed.source) == (pytest.approx(LAYERS * timing.time_s), timing.source)


def test_the_newest_version_counts_and_of_its_tiles_the_fastest_best_known(keep: Any, published: PublishedData) -> None:
    def tile(size: int, time_s: float, *processes: str) -> list[Record]:
        return [gemm(64, time_s, process=name, tile={"block_m": size}) for name in processes]

    old = [gemm(64, 1e-6, unix_s=MAY, kernel_hash="0" * 64, process=name) for name in "abcd"]
    data = keep(*old, *tile(16, 3e-5, "a", "b"), *tile(32, 2e-5, "a", "b"), *tile(64, 1.5e-5, "a"))
    timed = op(step(data, published), "qkv_proj")
    assert timed.time_s == pytest.approx(LAYERS * 2e-5)
    assert "newest of 2 versions of the kernel, fastest of 3 tiles" in timed.source
    assert "2 processes" in timed.source


def test_a_kernel_that_has_changed_since_is_said(keep: Any, published: PublishedData) -> None:
    source = op(step(keep(gemm(64, 2e-5, kernel_hash="0" * 64)), published), "qkv_proj").source
    assert source.endswith("the kernel has changed since")


# -- between and beyond ----------------------------------------------------------------------------


def test_between_two_shapes_time_is_affine_in_the_floor(keep: Any, published: PublishedData) -> None:
    def floor(m: int) -> float:
        return Gemm(m, 5120, 2048, *W8A8.values()).floor_s(H100)

    data = keep(*(gemm(m, 3e-6 + 1.5 * floor(m)) for m in (16, 512)))
    timed = op(step(data, published), "qkv_proj")
    assert timed.provenance == INTERPOLATED_HERE
    assert timed.time_s == pytest.approx(LAYERS * (3e-6 + 1.5 * floor(64)), rel=1e-9)
    assert "between rows, the nearest m=" in timed.source
    beyond = op(step(data, published, at=deployment(1024)), "qkv_proj")
    assert beyond.provenance == MODELLED
    assert beyond.time_s == pytest.approx(LAYERS * (3e-6 + 1.5 * floor(512)) * floor(1024) / floor(512))
    assert "efficiency of the last row (m=512) held" in beyond.source


def test_attention_interpolates_along_batch_and_length(keep: Any, published: PublishedData) -> None:
    asked = {a.call.name: a for a in plan_asks(QWEN, H100, deployment())}["attention"].ask
    assert asked is not None
    points = [(batch, length) for batch in (32, 128) for length in (1024, 8192)]

    def time(batch: int, length: int) -> float:
        return 5e-6 + 2 * asked.floor_s(H100, (batch, length))

    records = [recorded("attention", dict(asked.formats), dict(asked.fixed) | {"batch": b, "length": n}, time(b, n))
               for b, n in points]  # fmt: skip
    timed = op(step(keep(*records), published), "attention")
    assert timed.provenance == INTERPOLATED_HERE
    assert timed.time_s == pytest.approx(LAYERS * time(64, 4096), rel=1e-9)


def test_a_quantizer_interpolates_along_its_rows(keep: Any, published: PublishedData) -> None:
    def time(rows: int) -> float:
        return 2e-6 + 3 * 8 * rows * 2048 / H100.memory_bytes_per_s

    formats = {"activation": "fp8_group"}
    data = keep(*(recorded("rms_norm_quantize", formats, {"rows": rows, "columns": 2048}, time(rows))
                  for rows in (16, 256)))  # fmt: skip
    timed = op(step(data, published), "attention_norm")
    assert timed.provenance == INTERPOLATED_HERE
    assert timed.time_s == pytest.approx(LAYERS * time(64), rel=1e-9)


# -- a plan's asks ---------------------------------------------------------------------------------


def asks(model: Any, at: Deployment) -> dict[str, Any]:
    return {each.call.name: each for each in plan_asks(model, H100, at, check_memory=False)}


def test_every_kernel_of_the_house_stands_where_the_plan_has_its_op() -> None:
    found = asks(QWEN, deployment())
    names = {name: each.ask.name for name, each in found.items() if each.ask}
    assert names == {
        "attention_norm": "rms_norm_quantize/fp8_group", "qkv_proj": "gemm/fp8_block-fp8_group",
        "rope_append": "rope_append/fp8", "attention": "attention/fp8-bf16", "o_proj": "gemm/fp8_block-fp8_group",
        "o_proj_quantize": "quantize/fp8_group", "ffn_norm": "rms_norm_quantize/fp8_group",
        "experts": "moe/fp8_block-fp8_group",
    }  # fmt: skip
    experts = found["experts"].ask
    assert dict(experts.fixed) == {
        "hidden": 2048, "inter": 768, "top_k": 8, "num_experts": 128, "ep": 1, "load": 0,
    }  # fmt: skip
    assert experts.axes == (("num_tokens", 64),)


def test_mla_and_shared_experts_ask_alike() -> None:
    found = asks(DEEPSEEK, deployment(gpus=8, load="power_law_1.2"))
    names = {name: each.ask.name for name, each in found.items() if each.ask}
    assert names["attention"] == "mla/fp8-bf16"
    assert names["rope_append"] == "mla_append/fp8"
    assert names["shared_swiglu"] == names["dense_swiglu"] == "swiglu_quantize/fp8_group"
    assert dict(found["dense_swiglu"].ask.fixed) == {"columns": 18432}
    assert dict(found["shared_swiglu"].ask.fixed) == {"columns": 2048}
    experts = found["experts"].ask
    assert (dict(experts.fixed)["ep"], dict(experts.fixed)["load"]) == (8, 120)
    assert experts.axes == (("num_tokens", 8 * 64),)
    assert not {"router", "lm_head", "absorbed_q_bmm", "q_kv_a_norm", "dispatch", "sampling"} & set(names)


def test_formats_are_the_deployments_and_bf16_layers_ask_no_quantizer() -> None:
    found = asks(load_model("gpt-oss-120b"), deployment(precision="mxfp4"))
    assert found["experts"].ask.name == "moe/mxfp4-bf16"
    assert found["qkv_proj"].ask.name == "gemm/bf16-bf16"
    assert found["attention"].ask.name == found["window_attention"].ask.name == "attention/bf16-bf16"
    assert dict(found["window_attention"].ask.fixed)["window"] == 128
    assert found["attention_norm"].ask is None
    assert "o_proj_quantize" not in found


def test_experts_split_by_tensor_parallelism_ask_for_their_part() -> None:
    at = Deployment(2, 2, 1, get_precision("fp8"), 64, 4096)
    assert dict(asks(QWEN, at)["experts"].ask.fixed)["inter"] == 384
    assert dict(asks(QWEN, at)["qkv_proj"].ask.fixed) == {"n": 2560, "k": 2048}


def test_the_quantizer_before_a_recorded_projection_is_a_call_of_its_own(keep: Any, published: PublishedData) -> None:
    alone = step(keep(gemm(64, 2e-5)), published)
    assert "o_proj_quantize" not in [each.call.name for each in alone.ops]
    beside = step(keep(gemm(64, 2e-5, O_PROJ)), published)
    quantizer = op(beside, "o_proj_quantize")
    assert (quantizer.provenance, quantizer.call.calls_per_step) == (MODELLED, LAYERS)
    assert quantizer.floor_s == pytest.approx(LAYERS * 64 * 4096 * (2 + 1 + 4 / 128) / H100.memory_bytes_per_s)
    mixed = [each.call.name for each in step(keep(), published, "tokenfab+vllm").ops]
    assert mixed.index("o_proj_quantize") == mixed.index("o_proj") + 1
    data = keep(recorded("quantize", {"activation": "fp8_group"}, {"rows": 64, "columns": 4096}, 4e-6))
    assert op(step(data, published), "o_proj_quantize").time_s == pytest.approx(LAYERS * 4e-6)


def test_experts_whose_tokens_were_dispatched_are_an_upper_estimate(keep: Any, published: PublishedData) -> None:
    at = deployment(gpus=8)
    ask = asks(DEEPSEEK, at)["experts"].ask
    data = keep(recorded("moe", W8A8, dict(ask.fixed) | dict(ask.axes), 1e-3))
    found = step(data, published, model=DEEPSEEK, at=at)
    timed = op(found, "experts")
    assert timed.provenance == MODELLED
    assert timed.time_s == pytest.approx(58e-3)
    assert "an upper estimate" in timed.source
    assert "router_top_k" not in [each.call.name for each in found.ops]  # the layer contains it
    gathered = step(data, published, model=DEEPSEEK, at=replace(at, exchange="all_gather"))
    assert op(gathered, "experts").provenance == MEASURED_HERE


# -- what takes the place of what is missing -------------------------------------------------------


def test_alone_it_never_takes_another_stacks_kernel(keep: Any, published: PublishedData) -> None:
    found = step(keep(gemm(64, 2e-5)), published)
    assert {each.provenance for each in found.ops} == {MEASURED_HERE, MODELLED}
    assert not any("vllm" in each.source or "sglang" in each.source for each in found.ops)
    assert set(found.coverage()) == {MEASURED_HERE, INTERPOLATED_HERE, MODELLED}
    assert sum(found.coverage().values()) == pytest.approx(1)


def test_with_another_stack_its_rows_are_the_rest(keep: Any, published: PublishedData) -> None:
    found = step(keep(gemm(64, 2e-5)), published, "tokenfab+vllm")
    theirs = published_step(published, QWEN, H100, published.stack(H100, "vllm"), deployment())
    for each in theirs.ops:
        if each.call.name != "qkv_proj":
            own = op(found, each.call.name)
            assert (own.time_s, own.provenance, own.source) == (each.time_s, each.provenance, each.source)
    assert op(found, "qkv_proj").provenance == MEASURED_HERE
    assert op(found, "experts").source.startswith("vllm ")
    assert {MEASURED, INTERPOLATED} <= set(found.coverage())
    assert str(found.stack) == f"tokenfab+vllm 2026-06-03+{published.stack(H100, 'vllm').version}"


def test_an_mla_block_stays_whole_where_its_attention_is_not_ours(keep: Any, published: PublishedData) -> None:
    at = deployment(gpus=8)
    o_proj = asks(DEEPSEEK, at)["o_proj"].ask
    data = keep(recorded("gemm", W8A8, dict(o_proj.fixed) | {"m": 64}, 5e-5))
    whole = step(data, published, "tokenfab+vllm", DEEPSEEK, at)
    assert op(whole, "attention_module").source.startswith("vllm ")
    assert not {"o_proj", "o_proj_quantize", "attention"} & {each.call.name for each in whole.ops}
    mla = asks(DEEPSEEK, at)["attention"].ask
    parts = step(keep(recorded("mla", dict(mla.formats), dict(mla.fixed) | dict(mla.axes), 2e-4)), published,
                 "tokenfab+vllm", DEEPSEEK, at)  # fmt: skip
    assert op(parts, "attention").provenance == op(parts, "o_proj").provenance == MEASURED_HERE
    assert op(parts, "o_proj_quantize").provenance == MODELLED
    assert "attention_module" not in [each.call.name for each in parts.ops]


# -- stacks and errors -----------------------------------------------------------------------------


def test_no_records_names_the_folder(tmp_path: Path, published: PublishedData, keep: Any) -> None:
    with pytest.raises(NoRecords, match=rf"on h100 in {tmp_path}/none; got none"):
        RecordedData(tmp_path / "none").stack(H100, "tokenfab", published)
    with pytest.raises(NoRecords, match="got none"):
        keep(invalid(gemm(64, 2e-5))).stack(H100, "tokenfab", published)
    with pytest.raises(NoRecords, match=r"on h200 in .*; got some of h100 only"):
        keep(gemm(64, 2e-5)).stack(H200, "tokenfab", published)


def test_a_stack_is_named_by_its_parts(keep: Any, published: PublishedData) -> None:
    data = keep(gemm(64, 2e-5, unix_s=MAY), gemm(16, 2e-5))
    own = find_stack(H100, "tokenfab", published, data)
    assert isinstance(own, RecordedStack)
    assert (str(own), own.rest) == ("tokenfab 2026-06-03", None)
    for spec, message in (
        ("tokenfab+", r"expected tokenfab or tokenfab\+STACK; got 'tokenfab\+'"),
        ("tokenfab+tensorrt", "stack: expected one of vllm, sglang, trtllm"),
        ("tokenfab+vllm@0.0.1", "expected vllm at one of"),
    ):
        with pytest.raises(ValueError, match=message):
            find_stack(H100, spec, published, data)
    assert find_stack(H100, "vllm", published, data) == published.stack(H100, "vllm")


def test_r23_a_damaged_file_is_named(tmp_path: Path, keep: Any, published: PublishedData) -> None:
    keep(gemm(64, 2e-5))
    (tmp_path / "other.jsonl").write_text('{"schema_version": 1}\n')
    with pytest.raises(RecordError, match=r"other\.jsonl:1: "):
        find_stack(H100, "tokenfab", published, RecordedData(tmp_path))


def test_records_of_two_files_are_one(keep: Any, published: PublishedData) -> None:
    keep(gemm(64, 2e-5, process="a"))
    data = keep(gemm(64, 4e-5, process="b"), name="again.jsonl")
    timed = op(step(data, published), "qkv_proj")
    assert timed.time_s == pytest.approx(LAYERS * 3e-5)


def test_date_is_the_newest_records(keep: Any) -> None:
    (row,) = keep(gemm(64, 2e-5, process="a", unix_s=MAY), gemm(64, 2e-5, process="b", unix_s=JUNE)).rows(H100)
    assert row.date == "2026-06-03"
    assert msgspec.structs.asdict(row.environment)["git_sha"] == "a" * 40


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, tokenfab.costing.study, tokenfab.bench.recorded, tokenfab.bench.lab_field, tokenfab.bench.doctor;"
        "print({'torch', 'triton'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
