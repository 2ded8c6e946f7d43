"""A campaign on a device that runs real kernels on the CPU under a virtual clock: records, resuming, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenfab.bench import campaign
from tokenfab.bench.campaign import Outcome, gpu_of, run_targets
from tokenfab.bench.cases import checksum, compute_floor_s, make_anchor, make_case
from tokenfab.bench.cuda_device import TorchBuffers
from tokenfab.bench.device import DeviceProperties, DeviceState, MethodUnavailable, Replay
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.kernel_tables import summaries_table
from tokenfab.bench.measurement import Check, Settings
from tokenfab.bench.peers import COPY, PEERS
from tokenfab.bench.records import RecordStore
from tokenfab.bench.summaries import QUICK, QUICK_FOLDER, kernel_hash, summaries
from tokenfab.bench.targets import Target
from tokenfab.kernels.quantize_points import QUANTIZE_OPS
from tokenfab.kernels.registry import Kernel, find_kernels

H100 = get_gpu("h100")
SHAPE = (("m", 2), ("n", 64), ("k", 128))
FAST = Settings(min_warm_up_s=0.5, max_warm_up_s=0.6, budget_s=0.5, max_ci=0.05, energy_s=None)
CALL_S = 50e-3


class _VirtualGraph:
    def __init__(self, device: VirtualDevice, calls: Sequence[Callable[[], None]]) -> None:
        self.device, self.calls = device, list(calls)

    def launch(self) -> None:
        for call in self.calls:
            call()
        self.device.now_s += CALL_S * len(self.calls)

    def replay(self, in_flight: Callable[[], None] | None = None) -> Replay:
        """The result is on the CPU at once; only the first replay computes it, time passes for both."""
        self.launch()
        if in_flight is not None:
            in_flight()
        time_s = CALL_S * len(self.calls)
        self.device.now_s += time_s
        return Replay(time_s, 2 * time_s)


class VirtualDevice(TorchBuffers):
    """The CPU with a clock of its own: each call takes ``CALL_S``."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.properties = DeviceProperties(
            name="NVIDIA H100 80GB HBM3", uuid="GPU-0", l2_bytes=256, driver="1", cuda="1", torch="1", triton="1"
        )

    def capture(self, calls: Sequence[Callable[[], None]]) -> Any:
        return _VirtualGraph(self, calls)

    def synchronize(self) -> None: ...

    def wall_s(self) -> float:
        return self.now_s

    def state(self) -> DeviceState:
        return DeviceState(1.7e9, 0, 40.0, 300.0)

    def energy_j(self) -> float:
        return 300 * self.now_s

    def flush_l2(self) -> None: ...


def target(name: str = "mxfp4-bf16", kernel: Kernel | None = None) -> Target:
    return Target(kernel or find_kernels("gemm", [name])[0], SHAPE, ("somewhere",))


@pytest.fixture
def on_cpu(device: torch.device) -> torch.device:
    if device.type != "cpu":
        pytest.skip("a virtual clock over the interpreter; a GPU has its own")
    return device


@pytest.fixture
def bench(on_cpu: torch.device, tmp_path: Path) -> Callable[..., list[Outcome]]:
    store = RecordStore(tmp_path, "h100.jsonl")

    def run(*targets: Target, **changes: Any) -> list[Outcome]:
        return run_targets(targets, VirtualDevice(), H100, store, settings=FAST, buffers_on="cpu", **changes)  # type: ignore[arg-type]

    run.store = store  # type: ignore[attr-defined]
    return run


def test_a_target_becomes_a_record_once(bench: Any) -> None:
    seen: list[Outcome] = []
    (first,) = bench(target(), done=seen.append, has_anchor=False)
    assert first.record is not None
    assert first.record.invalid == ()
    assert first.record.time_s == pytest.approx(CALL_S)
    assert first.record.point.shape == {"m": 2, "n": 64, "k": 128}
    assert first.record.point.formats == {"weight": "mxfp4", "activation": "bf16"}
    assert first.record.point.tile["block_m"] == 16
    assert first.record.measurement.check.passed
    assert first.record.measurement.weight_bytes == 64 * 128 * 4.25 / 8
    assert seen == [first]
    (again,) = bench(target(), has_anchor=False)
    assert again.is_old
    assert again.record is None
    assert [record.point for record in bench.store.records()] == [first.record.point]


def test_library_kernels_are_measured_alike(bench: Any) -> None:
    peer = next(peer for peer in PEERS if peer.library == "torch.matmul")
    (outcome,) = bench(target(kernel=peer), has_anchor=False)
    assert outcome.record is not None
    assert outcome.record.invalid == ()
    assert outcome.record.point.recipe == "torch.matmul"
    (copied,) = bench(Target(COPY, (("num_bytes", 1 << 16),), ("memory",)))
    assert copied.record is not None
    assert copied.record.invalid == ()
    (row,) = [each for each in summaries(bench.store.records()) if each.point.op == "copy"]
    assert row.bytes_per_s == pytest.approx(2 * (1 << 16) / CALL_S)
    assert row.anchor is None


def test_an_absent_library_is_skipped_with_its_reason(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    absent = next(peer for peer in PEERS if peer.library == "deep_gemm.fp8_gemm_nt")
    skipped, measured = bench(target(kernel=absent), target(), has_anchor=False)
    assert skipped.record is None
    assert skipped.skipped == "module deep_gemm: expected its folder on PYTHONPATH; found none"
    assert measured.record is not None


def test_a_library_that_fails_is_skipped_with_its_reason(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no algorithm for this shape")

    peer = next(peer for peer in PEERS if peer.library == "torch.matmul")
    monkeypatch.setattr(torch, "matmul", refuse)
    skipped, measured = bench(target(kernel=peer), target(), has_anchor=False)
    assert skipped.skipped == ("gemm/bf16-bf16@torch.matmul: launch: RuntimeError: no algorithm for this shape")
    assert measured.record is not None


def test_a_library_that_cannot_be_imported_is_skipped(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "absence", lambda kernel: "")  # it is there, and broken
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    absent = next(peer for peer in PEERS if peer.library == "deep_gemm.fp8_gemm_nt")
    skipped, measured = bench(target(kernel=absent), target(), has_anchor=False)
    assert "deep_gemm.fp8_gemm_nt: import: ModuleNotFoundError" in skipped.skipped
    assert measured.record is not None


def test_a_first_look_says_so(bench: Any, on_cpu: torch.device, tmp_path: Path) -> None:
    store = RecordStore(tmp_path / QUICK_FOLDER, "h100.jsonl")
    more: dict[str, Any] = {"has_anchor": False, "buffers_on": "cpu"}
    run_targets([target()], VirtualDevice(), H100, store, settings=QUICK, **more)  # type: ignore[arg-type]
    bench(target(), has_anchor=False)
    (quick,), (slow,) = summaries(store.records()), summaries(bench.store.records())
    assert (quick.is_quick, slow.is_quick) == (True, False)
    assert quick.point == slow.point
    assert quick.floor_s == slow.floor_s > 0


def test_attention_is_measured_alike(bench: Any) -> None:
    """The cache rotates out of L2 like weights; torch's attention beside it, where it has what is asked."""
    shape = {"batch": 1, "length": 20, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "window": 0, "q_len": 1,
             "page_size": 16}  # fmt: skip
    (kernel,) = find_kernels("attention", ["fp8"])
    (outcome,) = bench(Target(kernel, tuple(shape.items()), ("somewhere",)))
    assert outcome.record is not None
    assert outcome.record.invalid == ()
    assert outcome.record.point.l2_policy == "cold_weights"
    assert outcome.record.measurement.anchor == "attention/bf16-bf16@torch.sdpa"
    assert make_anchor(kernel, shape | {"q_len": 2}, 1 << 20, "cpu") is None
    assert make_anchor(kernel, shape | {"window": 8}, 1 << 20, "cpu") is None
    (peer,) = [peer for peer in PEERS if peer.library == "torch.sdpa"]
    (outcome,) = bench(Target(peer, tuple(shape.items()), ("somewhere",)), has_anchor=False)
    assert outcome.record is not None
    assert outcome.record.invalid == ()
    assert outcome.record.measurement.check.passed


@pytest.mark.parametrize("op", QUANTIZE_OPS)
def test_quantizers_are_measured_alike(bench: Any, op: str) -> None:
    """A dict of outputs, each poisoned and checked; no weights to rotate, no anchor, one format."""
    (kernel,) = find_kernels(op, ["mxfp4"])
    quantizer = Target(kernel, (("rows", 3), ("columns", 160)), ("somewhere",))
    (outcome,) = bench(quantizer)
    assert outcome.record is not None
    assert outcome.record.invalid == ()
    assert outcome.record.point.formats == {"activation": "mxfp4"}
    assert outcome.record.point.l2_policy == "hot"
    assert outcome.record.measurement.check == Check(
        tolerance=0.0, before_error=0.0, after_error=0.0, refreshed_error=0.0
    )
    assert outcome.record.measurement.anchor is None
    (again,) = bench(quantizer)
    assert again.is_old
    shown = summaries(bench.store.records())
    assert shown[0].as_dict()["activation"] == "mxfp4"
    table = summaries_table("title", shown)
    assert list(table.columns[0].cells) == [f"{op}/mxfp4"]


def test_a_quantizer_with_one_wrong_code_has_no_time(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenfab.kernels import quantize_runs

    right = quantize_runs.Quantize.launch

    def one_off(self: Any, weights: Any, activations: Any, output: Any) -> None:
        right(self, weights, activations, output)
        output["data"][2, 79] ^= 1

    monkeypatch.setattr(quantize_runs.Quantize, "launch", one_off)
    (kernel,) = find_kernels("quantize", ["mxfp4"])
    (outcome,) = bench(Target(kernel, (("rows", 3), ("columns", 160)), ("somewhere",)))
    assert outcome.record is not None
    assert outcome.record.time_s is None
    assert "more than the tolerance 0" in outcome.record.invalid[0]


def test_anchor_is_interleaved_and_rotates(bench: Any) -> None:
    (outcome,) = bench(target())
    assert outcome.record is not None
    assert outcome.record.measurement.anchor == "gemm/bf16-bf16@torch.matmul"
    assert outcome.record.anchor_ratio == pytest.approx(1.0)


def test_anchor_goes_round_its_ring(on_cpu: torch.device) -> None:
    shape = {"m": 2, "n": 64, "k": 128}
    anchor = make_anchor(find_kernels("gemm", ["mxfp4-bf16"])[0], shape, 1 << 20, "cpu")
    assert anchor is not None
    closure = inspect.getclosurevars(anchor.launch).nonlocals
    weights = closure["weights"]
    assert len(weights) == -(-5 * (1 << 20) // (64 * 128 * 2)) + 1
    assert len({w["data"].data_ptr() for w in weights}) == len(weights)
    before = closure["output"].fill_(float("nan")).clone()
    anchor.launch()
    first = closure["output"].clone()
    anchor.launch()
    assert before.isnan().all()
    assert not torch.equal(first, closure["output"])


def test_a_wrong_kernel_is_recorded_without_a_time(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenfab.kernels import matmul_runs

    right = matmul_runs.W4A16Matmul.launch

    def scaled(self: Any, weights: Any, activations: Any, output: torch.Tensor) -> None:
        right(self, weights, activations, output)
        output *= 1.2

    monkeypatch.setattr(matmul_runs.W4A16Matmul, "launch", scaled)
    (outcome,) = bench(target(), has_anchor=False)
    assert outcome.record is not None
    assert outcome.record.time_s is None
    assert "error" in outcome.record.invalid[0]
    (row,) = summaries(bench.store.records())
    assert (row.time_s, row.num_processes, row.roofline_fraction) == (None, 0, None)
    assert row.invalid == outcome.record.invalid


ERRORS = [MethodUnavailable("too small"), MemoryError("none left"), torch.OutOfMemoryError("none left\nmore")]


@pytest.mark.parametrize("error", ERRORS)
def test_what_one_target_cannot_do_stops_no_other(
    bench: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    measure = campaign.measure

    def refuse(case: Any, *args: Any, **options: Any) -> Any:
        if case.weight_bytes == 64 * 128 * 4.5 / 8:
            raise error
        return measure(case, *args, **options)

    monkeypatch.setattr(campaign, "measure", refuse)
    first, second = bench(target("nvfp4-bf16"), target(), has_anchor=False)
    assert first.record is None
    assert str(error).splitlines()[0] in first.skipped
    assert second.record is not None


def test_other_errors_are_not_swallowed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(campaign, "measure", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench(target())


def test_summary_over_processes(bench: Any) -> None:
    (outcome,) = bench(target())
    record = outcome.record
    assert record is not None
    others = [msgspec.structs.replace(record, process=f"other-{index}") for index in range(2)]
    (row,) = summaries([record, *others])
    assert (row.num_processes, row.noise, row.time_s) == (3, 0.0, pytest.approx(CALL_S))
    assert row.flops_per_s == pytest.approx(2 * 2 * 64 * 128 / CALL_S)
    assert row.as_dict()["library"] == "tokenfab"


def test_r18_a_kernels_hash_follows_its_source_and_a_librarys_its_version(tmp_path: Path) -> None:
    kernel, properties = find_kernels("gemm", ["mxfp4-bf16"])[0], VirtualDevice().properties
    assert kernel_hash(kernel, properties) == kernel_hash(kernel, properties)
    fewer = dataclasses.replace(kernel, sources=kernel.sources[:-1])
    assert kernel_hash(fewer, properties) != kernel_hash(kernel, properties)
    newer = msgspec.structs.replace(properties, torch="2")
    assert kernel_hash(kernel, newer) == kernel_hash(kernel, properties)
    assert kernel_hash(PEERS[0], newer) != kernel_hash(PEERS[0], properties)


def test_the_gpu_is_told_by_its_exact_name() -> None:
    properties = VirtualDevice().properties
    assert gpu_of(properties).name == "h100"
    other = msgspec.structs.replace(properties, name="NVIDIA H100 80GB")
    with pytest.raises(ValueError, match="gpu: expected the name of one of .* for 'NVIDIA H100 80GB'; got none"):
        gpu_of(other)
    assert gpu_of(other, "h200").name == "h200"


def test_known_device_names_are_known_gpus() -> None:
    for name in campaign.DEVICE_NAMES.values():
        get_gpu(name)


def test_checksum_sees_a_byte_and_a_place() -> None:
    buffers = {"a": torch.arange(1000, dtype=torch.int16), "b": torch.zeros(3, 5, dtype=torch.uint8)}
    before = checksum(buffers)
    assert checksum({name: part.clone() for name, part in buffers.items()}) == before
    buffers["b"][2, 4] = 1
    assert checksum(buffers) != before
    buffers["b"][2, 4] = 0
    buffers["a"][[3, 700]] = buffers["a"][[700, 3]]
    assert checksum(buffers) != before


def test_compute_floor_uses_the_fastest_rate_that_the_formats_allow() -> None:
    shape = {"m": 4096, "n": 4096, "k": 4096}
    flops = 2 * 4096**3
    w4a16, w4a4 = (find_kernels("gemm", [name])[0] for name in ("mxfp4-bf16", "mxfp4-mxfp4"))
    assert compute_floor_s(w4a16, shape, H100) == pytest.approx(flops / 989e12)
    assert compute_floor_s(w4a4, shape, H100) == pytest.approx(flops / 1979e12)  # no FP4 units there
    assert compute_floor_s(w4a4, shape, get_gpu("b200")) == pytest.approx(flops / 9000e12)
    assert compute_floor_s(COPY, {"num_bytes": 64}, H100) == 0


def test_case_refreshes_in_place(on_cpu: torch.device) -> None:
    kernel = find_kernels("gemm", ["fp8_block"])[0]
    case = make_case(kernel, {"m": 2, "n": 64, "k": 128}, H100, "cpu")
    activations = case.make_activations(0)
    places, before = [part.data_ptr() for part in activations.values()], case.checksum(activations)
    case.refresh(activations, 1)
    assert [part.data_ptr() for part in activations.values()] == places
    assert case.checksum(activations) != before
