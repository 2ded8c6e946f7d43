"""Published measurements: known figures, provenance, versions, and files that are not what they should be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.ops import Collective, ExpertAllToAll, Experts, Gemm, MlaAttention, Op, PagedAttention, Streaming
from tokenfab.bench.published import INTERPOLATED, MEASURED, MODELLED, PublishedData, PublishedDataError, model_timing
from tokenfab.bench.published_check import check_tables
from tokenfab.bench.published_inventory import inventory, op_timings, parse_op
from tokenfab.bench.published_rows import Rows
from tokenfab.bench.published_tables import MOE

FP8 = ("fp8_block", "fp8_group")
H100 = get_gpu("h100")


def moe(
    tokens: int, hidden: int, inter: int, top_k: int, experts: int, ep: int, weight: str, activation: str
) -> Experts:
    return Experts(tokens, hidden, inter, top_k, experts, ep, 1, weight, activation)


def gqa(batch: int, length: int, heads: int, kv: str) -> PagedAttention:
    return PagedAttention(batch, length, heads, 8, 128, None, kv)


# Microseconds of aiconfigurator-core 0.12.0, as quoted in public comparisons of the three stacks.
BAR: list[tuple[str, Op, str, float]] = [
    ("h100", Gemm(64, 7168, 16384, *FP8), "vllm", 87.5),
    ("h100", Gemm(64, 7168, 16384, *FP8), "sglang", 48.4),
    ("h100", Gemm(64, 7168, 16384, *FP8), "trtllm", 50.7),
    ("h100", Gemm(64, 7168, 16384, "fp8", "fp8"), "vllm", 49.7),
    ("h100", Gemm(64, 4096, 7168, *FP8), "sglang", 15.9),
    ("h100", Gemm(4096, 7168, 16384, *FP8), "sglang", 729),
    ("h100", moe(128, 7168, 2048, 8, 256, 8, *FP8), "vllm", 561),
    ("h100", moe(128, 7168, 2048, 8, 256, 8, *FP8), "sglang", 546),
    ("h100", moe(128, 7168, 2048, 8, 256, 8, *FP8), "trtllm", 495),
    ("h100", moe(64, 2048, 768, 8, 128, 1, "fp8", "fp8"), "trtllm", 236),
    ("h100", moe(64, 2880, 2880, 4, 128, 1, "mxfp4", "bf16"), "vllm", 689),
    ("h100", moe(64, 2880, 2880, 4, 128, 1, "mxfp4", "bf16"), "sglang", 2219),
    ("h200", moe(128, 2880, 2880, 4, 128, 1, "mxfp4", "bf16"), "vllm", 664),
    ("h100", gqa(16, 8192, 64, "bf16"), "vllm", 185),
    ("h100", gqa(16, 8192, 64, "fp8"), "sglang", 141),
    ("h100", gqa(128, 2048, 32, "fp8"), "trtllm", 182),
    ("h200", gqa(16, 8192, 64, "fp8"), "trtllm", 77),
    # the table has this shape several times; 511 is quoted, 508 is the fastest
    ("h100", MlaAttention(32, 32768, 128, 512, 64, "bf16"), "sglang", 508),
    ("h100", MlaAttention(32, 32768, 128, 512, 64, "fp8"), "trtllm", 415),
]


@pytest.mark.parametrize(("gpu", "op", "stack", "us"), BAR)
def test_known_rows(published: PublishedData, gpu: str, op: Op, stack: str, us: float) -> None:
    timing = published.time(op, get_gpu(gpu), published.stack(get_gpu(gpu), stack))
    assert timing.provenance == MEASURED
    assert timing.time_s * 1e6 == pytest.approx(us, rel=0.005)


def test_kernel_table_and_version_are_named(published: PublishedData) -> None:
    timing = published.time(Gemm(64, 7168, 16384, *FP8), H100, published.stack(H100, "sglang"))
    assert timing.source == "sglang 0.5.14 gemm: sglang_deepgemm_gemm_nt_f8f8bf16"


def test_real_shapes_fall_between_rows(published: PublishedData) -> None:
    stack = published.stack(H100, "sglang")
    times = [published.time(Gemm(64, n, 7168, *FP8), H100, stack) for n in (2048, 2112, 2560)]
    assert [t.provenance for t in times] == [MEASURED, INTERPOLATED, MEASURED]
    assert min(times[0].time_s, times[2].time_s) <= times[1].time_s <= max(times[0].time_s, times[2].time_s)


def test_beyond_the_last_row_is_a_model_and_says_so(published: PublishedData) -> None:
    stack = published.stack(H100, "vllm")
    last = published.time(Gemm(64, 65536, 7168), H100, stack)
    beyond = published.time(Gemm(64, 131072, 7168), H100, stack)
    assert beyond.provenance == MODELLED
    assert "n=65536" in beyond.source
    assert beyond.time_s == pytest.approx(2 * last.time_s, rel=0.01)


def test_absent_shape_borrows_the_nearest_efficiency_and_says_whose(published: PublishedData) -> None:
    """GLM-4.5's experts are in no table; MiniMax's and Qwen's are near."""
    timing = published.time(moe(64, 5120, 1536, 8, 160, 8, *FP8), H100, published.stack(H100, "trtllm"))
    assert timing.provenance == MODELLED
    assert "efficiency of trtllm 1.3.0rc20 moe at hidden_size=" in timing.source


def test_no_table_at_all_is_the_stated_roofline(published: PublishedData) -> None:
    op = Streaming(3.35e12 * 8e-6)
    timing = published.time(op, H100, published.stack(H100, "vllm"))
    assert timing == model_timing(op, H100, "no published streaming row")
    assert timing.time_s == pytest.approx(8e-6 / 0.8 + 3e-6)


def test_message_sizes_are_elements_not_bytes(published: PublishedData) -> None:
    """33.5 MB at 351 GB/s bus bandwidth is what an H100 node does; twice that is beyond its links."""
    elements = 16_777_216
    for stack in ("vllm", "trtllm"):
        timing = published.time(Collective("all_reduce", elements, 8), H100, published.stack(H100, stack))
        bus_bytes_per_s = 2 * 7 / 8 * 2 * elements / timing.time_s
        assert timing.provenance == MEASURED
        assert 0.25e12 < bus_bytes_per_s < 0.45e12


def test_all_to_all_is_in_microseconds(published: PublishedData) -> None:
    """DeepEP publishes 77 us for a dispatch of 128 tokens over 8 H800; milliseconds would be 1000 times off."""
    route = (128, 7168, 8, 256, 8, "fp8_group")
    for stack in ("vllm", "sglang", "trtllm"):
        timing = published.time(ExpertAllToAll("dispatch", *route), H100, published.stack(H100, stack))
        assert timing.provenance == MEASURED
        assert 20e-6 < timing.time_s < 200e-6


def test_two_sided_dispatch_contains_its_preparation(published: PublishedData) -> None:
    """TensorRT-LLM on GB200, 128 tokens over 8 ranks: 14.6 us to prepare and the dispatch itself."""
    gpu = get_gpu("gb200")
    stack = published.stack(gpu, "trtllm")
    dispatch = published.time(ExpertAllToAll("dispatch", 128, 7168, 8, 256, 8, "fp8_group"), gpu, stack)
    combine = published.time(ExpertAllToAll("combine", 128, 7168, 8, 256, 8, "bf16"), gpu, stack)
    assert dispatch.provenance == combine.provenance == MEASURED
    assert dispatch.source.endswith("+ alltoall_prepare")
    assert dispatch.time_s == pytest.approx(14.582e-6 + 22.759e-6, rel=0.001)
    assert combine.time_s == pytest.approx(37.533e-6, rel=0.001)


def test_dispatched_experts_do_not_use_rows_of_replicated_tokens(published: PublishedData) -> None:
    """vLLM's and SGLang's EP rows ran every token of the group: no measurement of a dispatched layer."""
    replicated = moe(8192, 7168, 2048, 8, 256, 64, *FP8)
    dispatched = Experts(8192, 7168, 2048, 8, 256, 64, 1, *FP8, dispatched=True)
    vllm, sglang, trtllm = (published.stack(H100, name) for name in ("vllm", "sglang", "trtllm"))
    assert published.time(replicated, H100, vllm).provenance == MEASURED
    assert published.time(dispatched, H100, vllm).provenance == MODELLED
    assert "upper estimate" in published.time(dispatched, H100, vllm).source
    wide = published.time(dispatched, H100, sglang)
    assert wide.provenance == MEASURED
    assert wide.time_s < published.time(replicated, H100, sglang).time_s / 20
    assert published.time(dispatched, H100, trtllm) == published.time(replicated, H100, trtllm)


def test_stack_names_and_versions(published: PublishedData) -> None:
    assert str(published.stack(H100, "vllm")) == "vllm 0.24.0"
    assert str(published.stack(H100, "sglang@0.5.10")) == "sglang 0.5.10"
    with pytest.raises(ValueError, match="stack: expected one of vllm, sglang, trtllm"):
        published.stack(H100, "llama.cpp")
    with pytest.raises(ValueError, match="expected vllm at one of"):
        published.stack(H100, "vllm@9.9")
    with pytest.raises(PublishedDataError, match="no published measurements for h800"):
        published.stack(get_gpu("h800"), "vllm")


def test_inventory_names_tables_and_kernels(published: PublishedData) -> None:
    rows = {(row["stack"], row["table"]): row for row in inventory(published, H100)}
    assert rows["vllm 0.24.0", "gemm"]["rows"] == 107_188
    assert "DeepGemmFp8BlockScaledMMKernel" in rows["vllm 0.24.0", "gemm"]["kernels"]
    assert rows["sglang 0.5.14", "wideep_deepep_ll"]["version"] == "0.5.12"
    assert rows["vllm 0.24.0", "context_attention"]["rows"] > 50_000
    assert rows["sglang 0.5.14", "dsa_context_module"]["rows"] > 70_000


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["m=1", "n=2"], "gemm: missing k"),
        (["m=1", "n=2", "k=3", "q=4"], "gemm: expected FIELD=VALUE with a field of m, n, k"),
        (["m=1", "n=2", "k=0"], "k: expected at least 1; got 0"),
        (["m=1", "n=2", "k=x"], "k: expected a whole number; got 'x'"),
        (["m=1", "m=1", "n=2", "k=3"], "m is given twice"),
        (["m=1", "n=2", "k=3", "weight=int3"], "format: expected one of"),
    ],
)
def test_op_from_text_refuses(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_op("gemm", texts)


def test_op_timings(published: PublishedData) -> None:
    texts = ["m=64", "n=7168", "k=16384", "weight=fp8_block", "activation=fp8_group"]
    rows = op_timings(published, "gemm", texts, "h100", ["vllm", "sglang"])
    assert [round(row["time_s"] * 1e6, 1) for row in rows] == [87.5, 48.4]
    texts = ["batch=1", "new_tokens=4096", "num_heads=32", "num_kv_heads=4", "head_dim=128"]
    (row,) = op_timings(published, "context_attention", texts, "h100", ["vllm"])
    assert round(row["time_s"] * 1e6, 1) == 266.0


# -- a made-up tree ------------------------------------------------------------------------------


def gemm_rows(**columns: Any) -> dict[str, Any]:
    return {"gemm_dtype": "bfloat16", "m": [1, 2], "n": 32, "k": 32, "latency": [0.5, 0.75], **columns}


def test_r27_milliseconds_become_seconds(tree: Any) -> None:
    root, write = tree
    write("h100_sxm/gemm/vllm/2.0/gemm_perf", gemm_rows())
    data = PublishedData(root)
    timing = data.time(Gemm(2, 32, 32), H100, data.stack(H100, "vllm"))
    assert (timing.time_s, timing.provenance) == (0.75e-3, MEASURED)


def test_older_version_serves_a_missing_row_and_is_named(tree: Any) -> None:
    root, write = tree
    write("h100_sxm/gemm/vllm/2.0/gemm_perf", gemm_rows(gemm_dtype="fp8"))
    write("h100_sxm/gemm/vllm/1.9/gemm_perf", gemm_rows(latency=[0.1, 0.2]))
    write("h100_sxm/gemm/vllm/1.10/gemm_perf", gemm_rows(latency=[0.3, 0.4]))
    write("h100_sxm/gemm/vllm/3.0/gemm_perf", gemm_rows(latency=[0.9, 0.9]))
    data = PublishedData(root)
    timing = data.time(Gemm(1, 32, 32), H100, data.stack(H100, "vllm"))
    # 1.10 is newer than 1.9; 3.0 is newer than the one asked for and never serves it
    assert timing.time_s == pytest.approx(0.3e-3)
    assert timing.source.startswith("vllm 1.10 gemm")


def test_reuse_declaration_comes_before_older_versions(tree: Any) -> None:
    root, write = tree
    write("h100_sxm/gemm/vllm/1.0/gemm_perf", gemm_rows(latency=[0.1, 0.2]))
    write("h100_sxm/gemm/vllm/3.0/gemm_perf", gemm_rows(latency=[0.5, 0.6]))
    reuse = root / "data/h100_sxm/gemm/vllm/2.0/reuse.yaml"
    reuse.parent.mkdir()
    reuse.write_text('reuse: [{table: gemm_perf, from_version: "3.0"}]\n')
    data = PublishedData(root)
    assert data.time(Gemm(1, 32, 32), H100, data.stack(H100, "vllm")).source.startswith("vllm 3.0")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "expected a whole Parquet file of gemm rows"),
        (lambda path: path.write_bytes(b"not parquet at all"), "expected a whole Parquet file of gemm rows"),
        (lambda path: path.write_bytes(b""), "expected a whole Parquet file of gemm rows"),
    ],
)
def test_r23_spoilt_file_is_a_typed_error_that_names_it(tree: Any, spoil: Any, message: str) -> None:
    root, write = tree
    path = write("h100_sxm/gemm/vllm/2.0/gemm_perf", gemm_rows())
    spoil(path)
    data = PublishedData(root)
    with pytest.raises(PublishedDataError, match=message) as caught:
        data.time(Gemm(1, 32, 32), H100, data.stack(H100, "vllm"))
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:Exporting an unversioned DLPack capsule")  # NumPy's second try, on columns of text
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"m": [1, 2], "latency": [1.0, 2.0]}, "expected column 'gemm_dtype'"),
        (gemm_rows(latency=[0.5, -1.0]), "expected positive latency; got 1 rows that are not"),
        (gemm_rows(latency=[0.5, math.nan]), "expected positive latency; got 1 rows that are not"),
        (gemm_rows(latency=["a", "b"]), "expected a whole Parquet file of gemm rows"),
        (gemm_rows(latency=[0.5, None]), "expected a whole Parquet file of gemm rows"),
    ],
)
def test_foreign_file_is_a_typed_error(tree: Any, columns: dict[str, Any], message: str) -> None:
    root, write = tree
    write("h100_sxm/gemm/vllm/2.0/gemm_perf", columns)
    data = PublishedData(root)
    with pytest.raises(PublishedDataError, match=message):
        data.time(Gemm(1, 32, 32), H100, data.stack(H100, "vllm"))


def test_no_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PublishedDataError, match=r"not installed; pip install 'aiconfigurator-core>=0.12,<0.13'"):
        PublishedData()


def test_folder_without_a_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishedDataError, match=r"expected a folder with query_versions\.yaml and data/"):
        PublishedData(tmp_path)


def test_checkout_layout_is_found(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    root, write = tree
    write("h100_sxm/gemm/vllm/2.0/gemm_perf", gemm_rows())
    checkout = tmp_path_factory.mktemp("checkout")
    systems = checkout / "aic-core/src/aiconfigurator_core/systems"
    systems.parent.mkdir(parents=True)
    systems.symlink_to(root)
    assert PublishedData(checkout).root == root


# -- how good interpolation is --------------------------------------------------------------------


def test_leave_one_out_of_a_known_error(tree: Any) -> None:
    """Rows on a straight line but one, which is 10 % off: the check finds it, and its neighbours' errors."""
    root, write = tree
    batch = [1, 2, 4, 8]
    times = [1.0, 2.0 * 1.1, 4.0, 8.0]
    write(
        "h100_sxm/comm/vllm/2.0/custom_allreduce_perf",
        {"op_name": "all_reduce", "num_gpus": 2, "message_size": [b * 10**7 for b in batch], "latency": times},
    )
    data = PublishedData(root)
    (error,) = [e for e in check_tables(data, H100, data.stack(H100, "vllm")) if e.table == "all_reduce"]
    # row 2 is predicted as 2 against 2.2; row 4 as 2.2 + 5.8 / 3 against 4
    expected = sorted([0.2 / 2.2, (2.2 + 5.8 / 3) / 4 - 1])
    assert error.num_rows == 2
    assert error.median == pytest.approx(sum(expected) / 2)


def test_interpolation_meets_its_aim_on_one_gpu(published: PublishedData) -> None:
    """The aim is a median of 5 % and a p95 of 20 %; what the tables allow is stated in the README."""
    errors = list(check_tables(published, H100, published.stack(H100, "trtllm")))
    medians = [error.median for error in errors]
    assert len(errors) > 15
    assert all(median <= 0.05 for median in medians)
    assert sum(error.p95 <= 0.20 for error in errors) >= 0.75 * len(errors)


def test_rows_are_found_alike_by_scanning_and_by_sorting(published: PublishedData) -> None:
    """Files are sorted only once they were asked for several keys."""
    path = next(path for _, path in published.files(H100, published.stack(H100, "sglang"), MOE))
    scanning, sorting = Rows(path, MOE), Rows(path, MOE)
    assert len(scanning.keys) > 20
    found = 0
    for key in scanning.keys:
        scanning._num_scans, sorting._num_scans = 0, 1000
        scanned, by_order = scanning.grid(key), sorting.grid(key)
        assert scanned is not None
        assert by_order is not None
        for one, other in zip((*scanned.axes, scanned.time_s), (*by_order.axes, by_order.time_s), strict=True):
            np.testing.assert_array_equal(one, other)
        found += int(np.isfinite(scanned.time_s).sum())
    assert 0 < found <= scanning.num_rows
