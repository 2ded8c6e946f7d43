"""The matmuls compiled ahead of time: every tile without spills, native matrix instructions, the price of a weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from compiled import compiled
from tokenfab.bench.inspect import inspect
from tokenfab.kernels.matmul_points import COMPILED_ARCHS, matmul_points, row_points
from tokenfab.kernels.split_k import choose_splits
from tokenfab.kernels.tiles import ANY_NUMBER, ARCHS, TILES, Tile, find_tile, used_on

W4A16, W4A8 = "gemm/mxfp4-bf16/m16-16x256", "gemm/mxfp4-fp8_row/m16-16x256"


def test_r18_every_tile_compiles_as_it_says() -> None:
    found = compiled(matmul_points())
    assert not [each for each in found if each.problems]
    assert {each.arch for each in found} == set(COMPILED_ARCHS)
    assert all(each.facts.spill_bytes == 0 for each in found)
    prices = {each.name: each.facts.instructions_per_value for each in found if each.arch == "sm_90"}
    assert prices[W4A16] == pytest.approx(2.36, abs=0.03)
    assert prices[W4A8] == pytest.approx(1.43, abs=0.03)


def test_a_wrong_expectation_is_a_finding(tmp_path: Path) -> None:
    point = next(p for p in matmul_points() if p.name.startswith("gemm/fp8-fp8/m16") and p.archs == ("sm_90",))
    wrong = dataclasses.replace(point, expect="^HGMMA", max_instructions_per_value=1.0)
    (inspection,) = inspect([wrong], cache_dir=tmp_path)
    assert {finding.kind for finding in inspection.findings} == {"expect", "instructions"}


def test_a_tile_that_spills_is_a_finding(tmp_path: Path) -> None:
    row = next(r for r in TILES if r.kernel == "w4a16" and "sm_90" in r.archs and r.max_tokens == 16)
    wide = dataclasses.replace(row, tile=dataclasses.replace(row.tile, block_m=128))
    point = dataclasses.replace(next(p for p in row_points(row, "mxfp4")), name="wide")
    constexprs = tuple((name, 128 if name == "BLOCK_M" else value) for name, value in point.constexprs)
    (inspection,) = inspect(
        [dataclasses.replace(point, constexprs=constexprs, flops_per_value=2 * wide.tile.block_m)], cache_dir=tmp_path
    )
    assert "spills" in {finding.kind for finding in inspection.findings}


def test_r18_every_row_is_used_has_a_reason_and_is_compiled() -> None:
    points = {(p.name, p.archs[0]) for p in matmul_points()}
    assert len(points) == len(matmul_points())
    for row in TILES:
        assert len(row.reason) > 20
        assert set(row.archs) <= set(ARCHS)
        for format in row.formats:
            assert used_on(row, format, (*ARCHS, "sm_89")), (row.kernel, format, row.max_tokens)


def test_rows_are_found_by_tokens_then_architecture() -> None:
    assert find_tile("w4a16", "mxfp4", "sm_90", 1) == Tile(16, 256, 256, 4, 3)
    assert find_tile("w4a16", "mxfp4", "sm_90", 17).block_m == 32
    assert find_tile("w4a16", "mxfp4", "sm_89", 17) == find_tile("w4a16", "mxfp4", "sm_120", 4096)
    assert find_tile("block_scaled", "mxfp4", "sm_100", 16).block_k == 256
    assert find_tile("block_scaled", "mxfp4", "sm_90", 16).block_k == 128
    assert find_tile("block_scaled", "mxfp4", "sm_100", 16).block_m == 16
    assert find_tile("block_scaled", "mxfp4", "sm_100", 4096).block_m == 128
    assert find_tile("fp8", "row", "", 64).block_m == 64
    with pytest.raises(ValueError, match="kernel, format: expected one of .*; got w4a16 int4"):
        find_tile("w4a16", "int4", "sm_90", 1)


@pytest.mark.parametrize("num_tiles", [1, 7, 28, 64, 200, 1000])
@pytest.mark.parametrize("k_tiles", [1, 3, 4, 23, 56, 128])
def test_splits_fill_the_gpu_once(num_tiles: int, k_tiles: int) -> None:
    splits = choose_splits(num_tiles, k_tiles, 132)
    assert 1 <= splits <= k_tiles
    assert splits == 1 or (num_tiles * splits <= 2 * 132 and -(-k_tiles // splits) >= 4)
    per_split = -(-k_tiles // splits)
    assert (splits - 1) * per_split < k_tiles  # the last part is not empty
    if num_tiles * 2 <= 132 and k_tiles >= 16:
        assert splits > 1


def test_any_number_is_any() -> None:
    assert find_tile("fp8_many", "block", "sm_90", ANY_NUMBER) == find_tile("fp8_many", "block", "sm_90", 65)
