"""The spaces of tiles: what the kernels themselves accept, each rule for its reason, the default never lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.targets import find_targets
from tokenfab.bench.tune_space import SPACES, TUNED_OPS, Dropped, Place, candidates, place_of
from tokenfab.kernels.registry import KERNELS, find_kernels
from tokenfab.kernels.tiles import ARCHS, TILES, Tile, find_row

H100 = get_gpu("h100")
TUNED = [kernel for kernel in KERNELS if kernel.op in TUNED_OPS]


def gemm(format: str, m: int, k: int = 7168, n: int = 2112, arch: str = "sm_90") -> Place:
    return place_of(find_kernels("gemm", [format])[0], {"m": m, "n": n, "k": k}, arch)


def places(op: str) -> Iterator[Place]:
    shapes = {
        tuple(target.fields)
        for target in find_targets(
            op, None, ["deepseek-v3", "gpt-oss-120b", "qwen3-30b-a3b"], [1, 64, 512], H100, [1024]
        )
    }
    for kernel in TUNED:
        for fields in shapes if kernel.op == op else ():
            if op == "mla" and "kv_lora_rank" not in dict(fields):
                continue
            for arch in ARCHS:
                if kernel.min_capability <= int(arch.removeprefix("sm_")):
                    yield place_of(kernel, dict(fields), arch)


def reasons(place: Place) -> dict[Tile, str]:
    kept, dropped = candidates(place)
    assert not set(kept) & {each.tile for each in dropped}
    return {each.tile: each.reason.split(":")[0] for each in dropped}


def kept(place: Place) -> set[Tile]:
    return set(candidates(place)[0])


# -- what the kernels accept -----------------------------------------------------------------------


@pytest.mark.parametrize("op", TUNED_OPS)
def test_every_candidate_is_one_that_the_kernel_accepts(op: str) -> None:
    pytest.importorskip("torch")
    from tokenfab.kernels.w4a8_matmul import check_tile
    from tokenfab.kernels.w4a16_matmul import check_w4a16_tile

    checks = {"w4a16": check_w4a16_tile, "w4a8": check_tile}
    seen = 0
    for place in places(op):
        tiles, dropped = candidates(place)
        check = checks.get(place.kernel.removeprefix("grouped_"))
        for tile in tiles:
            if check is not None:
                check(tile)
            if place.kernel in ("fp8", "fp8_many", "grouped"):
                assert tile.block_k == 128
            if place.kernel == "grouped_block_scaled":
                assert tile.block_n == 128
            assert (tile.block_m & (tile.block_m - 1), tile.block_n & (tile.block_n - 1)) == (0, 0)
            seen += 1
        assert tiles[0] == place.default
        assert len(set(tiles)) == len(tiles)
        assert len(tiles) + len(dropped) == len({place.default, *SPACES[place.kernel].tiles()})
    assert seen > 500


def test_the_product_holds_tiles_that_a_check_refuses_and_the_rule_drops_them() -> None:
    pytest.importorskip("torch")
    from tokenfab.kernels.w4a8_matmul import check_tile

    refused = [tile for tile in SPACES["w4a8"].tiles() if (tile.block_m, tile.block_n) == (64, 256)]
    assert refused
    for tile in refused:
        with pytest.raises(ValueError, match="tile: expected"):
            check_tile(tile)
    assert {reasons(gemm("mxfp4-fp8_row", 64))[tile] for tile in refused} == {"kernel"}


def test_every_kernel_of_the_table_has_a_space() -> None:
    assert {row.kernel for row in TILES} == set(SPACES)


# -- places ----------------------------------------------------------------------------------------


def test_a_place_is_the_row_that_the_launch_finds() -> None:
    assert gemm("fp8_block", 64).row is find_row("fp8", "block", "sm_90", 64)
    assert gemm("fp8_block", 65).row is find_row("fp8_many", "block", "sm_90", 65)
    assert gemm("mxfp4-mxfp8", 64).format == "mxfp4_mxfp8"
    assert gemm("mxfp4-fp8_group", 16).row.kernel == "w4a8"
    assert dict(gemm("fp8", 8).sizes) == {"tokens": 8, "n": 2112, "k": 7168}
    moe = find_kernels("moe", ["mxfp4-bf16"])[0]
    shape = {"num_tokens": 64, "hidden": 2880, "inter": 1440, "top_k": 4, "num_experts": 128, "ep": 8, "load": 0}
    place = place_of(moe, shape, "sm_90")
    assert place.row is find_row("grouped_w4a16", "mxfp4", "sm_90", 16)
    assert dict(place.sizes) == {
        "tokens": 16, "rows": 256, "experts": 128, "local_experts": 16, "hidden": 2880, "inter": 1440
    }  # fmt: skip
    assert place.rows == 4  # twice an expert's two
    assert place_of(moe, shape | {"num_tokens": 700}, "sm_90").row is find_row("grouped_w4a16", "mxfp4", "sm_90", 64)


@pytest.mark.parametrize("op", ["quantize", "rope_append"])
def test_an_op_without_tiles_is_refused(op: str) -> None:
    kernel = find_kernels(op)[0]
    with pytest.raises(ValueError, match=f"op: expected one of gemm, moe, attention, mla; got {op}/"):
        place_of(kernel, {"rows": 1, "columns": 32}, "sm_90")


# -- rules -----------------------------------------------------------------------------------------


def test_padding_and_rereads() -> None:
    few = reasons(gemm("mxfp4-bf16", 16))
    assert few[Tile(32, 128, 256, 4, 3)] == "padding"
    assert Tile(16, 128, 128, 4, 4) in kept(gemm("mxfp4-bf16", 16))
    assert Tile(32, 128, 256, 4, 3) in kept(gemm("mxfp4-bf16", 17))
    many = reasons(gemm("mxfp4-bf16", 4096))
    assert many[Tile(32, 128, 256, 4, 3)] == "re-reads"
    assert Tile(64, 256, 128, 4, 3) in kept(gemm("mxfp4-bf16", 4096))


def test_stages_and_shared_memory() -> None:
    short = gemm("fp8_block", 16, k=256)
    assert {tile.num_stages for tile in kept(short) - {short.default}} == {2}
    assert reasons(short)[Tile(16, 64, 128, 4, 3)] == "stages"
    wide = gemm("fp8_block", 64, k=16384)
    assert wide.stage_bytes(Tile(64, 256, 128, 8, 6)) == pytest.approx((256 + 64) * 128, rel=0.04)
    assert Tile(64, 256, 128, 8, 6) in kept(wide)  # 5 x 40 KiB
    small = dataclasses.replace(wide, arch="sm_120")
    assert reasons(small)[Tile(64, 256, 128, 8, 6)] == "shared memory"
    assert reasons(small)[Tile(64, 256, 128, 8, 4)] == "shared memory"  # 120 of the 99 KiB
    assert Tile(64, 256, 128, 8, 3) in kept(small)


def test_registers_where_accumulators_are_in_them() -> None:
    tile = Tile(64, 256, 128, 4, 3)  # two accumulators of 128
    assert reasons(gemm("fp8_block", 64))[tile] == "registers"
    assert tile in kept(gemm("fp8_block", 64, arch="sm_100"))
    assert Tile(64, 256, 128, 4, 3) in kept(gemm("mxfp4-bf16", 64))  # one


def test_warps_of_a_hopper_instruction() -> None:
    narrow = Tile(64, 64, 128, 8, 3)
    assert reasons(gemm("fp8_block", 64))[narrow] == "warps"
    assert narrow in kept(gemm("fp8_block", 64, arch="sm_100"))
    short = Tile(64, 128, 128, 8, 3)
    assert reasons(gemm("fp8_block", 512))[short] == "warps"
    assert Tile(64, 128, 128, 4, 3) in kept(gemm("fp8_block", 512))


def test_native_block_scaled_instructions() -> None:
    assert reasons(gemm("mxfp8", 16, arch="sm_100"))[Tile(16, 64, 128, 4, 3)] == "native"
    assert Tile(16, 64, 128, 4, 3) in kept(gemm("mxfp8", 16))
    assert reasons(gemm("mxfp8", 512, arch="sm_103"))[Tile(64, 128, 128, 4, 3)] == "native"
    assert Tile(128, 64, 128, 4, 3) in kept(gemm("mxfp8", 512, arch="sm_100"))


def test_an_odd_number_of_tiles_is_launched_one_by_one() -> None:
    odd, even = gemm("mxfp4-bf16", 16, k=2880), gemm("mxfp4-bf16", 16, k=2816)
    assert odd.default.block_k == 256
    assert odd.launched(odd.default).block_k == 128
    assert even.launched(even.default) == even.default
    twin = dataclasses.replace(odd.default, block_k=128)
    assert reasons(odd)[twin] == "pairs"
    assert twin in kept(even)
    launched = [odd.launched(tile) for tile in candidates(odd)[0]]
    assert len(set(launched)) == len(launched)


def test_a_rule_never_drops_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    place = gemm("fp8_block", 64)
    none = dataclasses.replace(SPACES["fp8"], rules=(("never: not even one", lambda tile, place: True),))
    monkeypatch.setitem(SPACES, "fp8", none)
    tiles, dropped = candidates(place)
    assert tiles == [place.default]
    assert set(dropped) == {Dropped(t, "never: not even one") for t in none.tiles() if t != place.default}


def test_attention_keeps_the_defaults_rows() -> None:
    (kernel,) = find_kernels("attention", ["bf16"])
    shape = {"batch": 16, "length": 8192, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128, "window": 0, "q_len": 1,
             "page_size": 64}  # fmt: skip
    place = place_of(kernel, shape, "sm_90")
    assert place.default.block_m == 16 > place.rows
    assert {tile.block_m for tile in kept(place)} == {8, 16}
    assert reasons(place)[Tile(16, 64, 128, 8, 3)] == "warps"
    assert place.stage_bytes(place.default) == 32 * 2 * 128 * 2
    assert dict(place.sizes) == {"tokens": 8, "kv_heads": 8, "window": 0, "batch": 16, "max_tokens": 8192}
