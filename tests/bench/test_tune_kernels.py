"""The search on real kernels, run on the CPU under a virtual clock: each measured under its own tile, and checked."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.measurement import Settings
from tokenfab.bench.records import RecordStore
from tokenfab.bench.targets import Target
from tokenfab.bench.tune import Round, Trials, default_anchor, measure_tile, run_search
from tokenfab.bench.tune_prune import Candidate, Pruned
from tokenfab.bench.tune_space import place_of
from tokenfab.kernels import matmul_runs, tiles
from tokenfab.kernels.registry import find_kernels
from tokenfab.kernels.tiles import Tile
from tokenfab.kernels.tuned import tuned_tile
from tokenfab.tests.bench.test_campaign import VirtualDevice

H100 = get_gpu("h100")
FAST = Settings(min_warm_up_s=0.5, max_warm_up_s=0.6, budget_s=0.5, max_ci=0.05, energy_s=None)
ROUNDS = (Round("first", FAST, 0.5), Round("final", msgspec.structs.replace(FAST, max_ci=0.04), 1.0))
SHAPES = {
    "gemm": {"m": 2, "n": 128, "k": 128},
    "attention": {"batch": 1, "length": 20, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "window": 0, "q_len": 1,
                  "page_size": 16},
}  # fmt: skip


@pytest.fixture
def on_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a virtual clock over the interpreter; a GPU has its own")


def pruned(op: str, format: str, *changes: dict[str, int]) -> Pruned:
    (kernel,) = find_kernels(op, [format])
    shape = SHAPES[op]
    place = place_of(kernel, shape, "sm_90")
    row = replace(place.row, tile=tiles.find_tile(place.kernel, place.format, "", place.rows))  # the CPU's default
    place = replace(place, row=row)
    others = [replace(row.tile, **change) for change in changes]
    survivors = [Candidate(tile, (), 1e-6, 1e-6, 1e-6, 1, 1, 1.0, 1) for tile in (row.tile, *others)]
    return Pruned(Target(kernel, tuple(shape.items()), ("somewhere",)), place, tuple(survivors), ())


def used(what: Pruned) -> Tile | None:
    return tuned_tile(what.place.kernel, what.place.format, "", dict(what.place.sizes))


@pytest.mark.parametrize(
    ("op", "format", "change"),
    [
        ("gemm", "fp8_block", {"block_n": 64}),
        ("attention", "fp8", {"block_n": 32}),
    ],
)
def test_each_is_measured_under_its_own_tile_beside_the_default(
    on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, format: str, change: dict[str, int]
) -> None:
    what = pruned(op, format, change)
    default, other = (each.tile for each in what.survivors)
    run = type(what.target.kernel.load())
    launch, launched = run.launch, []

    def noted(self: Any, *buffers: Any) -> None:
        launched.append(used(what))
        launch(self, *buffers)

    monkeypatch.setattr(run, "launch", noted)
    device: Any = VirtualDevice()
    anchor = default_anchor(what, device.properties.l2_bytes, "cpu")
    measured = measure_tile(what, other, device, H100, anchor, FAST, "cpu")
    assert measured.invalid == ()
    assert measured.check is not None
    assert measured.check.passed
    assert measured.anchor == anchor.name
    assert anchor.name.endswith(f"w{default.num_warps} s{default.num_stages}")
    assert set(launched) == {other, None}  # the anchor's without a tuned tile
    assert used(what) is None


def test_a_search_records_the_tiles_and_drops_the_wrong_one(
    on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = pruned("gemm", "fp8_block", {"block_n": 64}, {"num_stages": 2})
    right, wrong = matmul_runs.Fp8Matmul.launch, what.survivors[2].tile

    def scaled(self: Any, weights: Any, activations: Any, output: torch.Tensor) -> None:
        right(self, weights, activations, output)
        if used(what) == wrong:
            output *= 1.2

    monkeypatch.setattr(matmul_runs.Fp8Matmul, "launch", scaled)
    store, device = RecordStore(tmp_path, "h100-tune.jsonl"), VirtualDevice()
    searched = run_search(what, device, H100, store, rounds=ROUNDS, buffers_on="cpu")  # type: ignore[arg-type]
    assert searched == (True, {})
    records = list(store.records())
    assert [record.point.tile for record in records] == [
        *(asdict(each.tile) for each in what.survivors), *(asdict(each.tile) for each in what.survivors[:2]),
    ]  # fmt: skip
    assert [bool(record.invalid) for record in records] == [False, False, True, False, False]
    trials = Trials(what, H100, records[0].environment, ROUNDS, records)
    assert "error" in trials.fault(wrong)
    assert trials.entrants(1) == [each.tile for each in what.survivors[:2]]
    assert run_search(what, device, H100, store, rounds=ROUNDS, buffers_on="cpu") == (True, {})  # type: ignore[arg-type]
    assert len(list(store.records())) == 5


def test_a_launch_that_takes_another_tile_is_no_measurement(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    what = pruned("gemm", "fp8_block", {"block_n": 64})
    device: Any = VirtualDevice()
    anchor = default_anchor(what, device.properties.l2_bytes, "cpu")
    deaf = replace(what, place=replace(what.place, sizes=(("tokens", 3),)))
    with pytest.raises(
        RuntimeError, match=r"tile: expected the launch of gemm/fp8_block-fp8_group to take .*block_n=64"
    ):
        measure_tile(deaf, what.survivors[1].tile, device, H100, anchor, FAST, "cpu")
