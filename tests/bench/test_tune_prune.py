"""Pruning by inspection: real compilations of a few tiles, floors reckoned by hand, domination."""

from __future__ import annotations

import dataclasses

import pytest
from tokenfab.bench import tune_prune
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.sm_limits import issue_rate
from tokenfab.bench.targets import Target
from tokenfab.bench.tune_prune import Candidate, Grid, Pruned, drop_dominated, prune
from tokenfab.bench.tune_show import dropped_lines, floors_table, pruned_dict
from tokenfab.bench.tune_space import SPACES, Space, place_of
from tokenfab.kernels.registry import find_kernels
from tokenfab.kernels.tiles import Tile

pytest.importorskip("triton")
pytest.importorskip("torch")

H100, H200 = get_gpu("h100"), get_gpu("h200")
RATE = issue_rate(H100) or 0.0
SHAPE = {"m": 16, "n": 7168, "k": 2048}
SPILLS = Tile(128, 256, 256, 4, 3)
TOO_LARGE = Tile(16, 256, 256, 4, 8)


def target(op: str = "gemm", format: str = "mxfp4-bf16", **shape: int) -> Target:
    return Target(find_kernels(op, [format])[0], tuple((shape or SHAPE).items()), ("deepseek-v3 somewhere",))


def only(monkeypatch: pytest.MonkeyPatch, kernel: str, *tiles: Tile) -> None:
    """A space of these tiles alone, without rules."""
    monkeypatch.setattr(Space, "tiles", lambda self: iter(tiles))
    monkeypatch.setitem(SPACES, kernel, dataclasses.replace(SPACES[kernel], rules=()))


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> Pruned:
    only(monkeypatch, "w4a16", Tile(16, 128, 256, 4, 3), SPILLS, TOO_LARGE)
    return prune(target(), H100, jobs=1)


def test_faulty_tiles_are_dropped_and_say_why(pruned: Pruned) -> None:
    dropped = {each.tile: each.reason for each in pruned.dropped}
    assert dropped[SPILLS].startswith("spills: ")
    assert "bytes of spill stores" in dropped[SPILLS]
    assert dropped[TOO_LARGE] == "fit: no CTA fits on an SM: shared memory"
    assert {each.tile for each in pruned.survivors} == {pruned.place.default, Tile(16, 128, 256, 4, 3)}
    assert pruned.default is not None
    assert pruned.default.tile == Tile(16, 256, 256, 4, 3)
    shown = "\n".join(dropped_lines(pruned, show_all=True))
    assert "dropped: 128x256x256 w4 s3: spills: " in shown
    assert [line.split(":")[0] for line in dropped_lines(pruned, show_all=False)] == ["dropped 1", "dropped 1"]


def test_floors_are_those_of_the_shape(pruned: Pruned) -> None:
    """28 tiles of n, 8 trips of k, in 2 splits of 4: 56 programs on 132 SMs; the busiest has one of them."""
    default = pruned.default
    assert default is not None
    spent = default.instructions_per_value
    assert spent is not None
    assert spent == pytest.approx(2.36, abs=0.03)
    moved = 7168 * 2048 * 4.25 / 8 + 16 * 2048 * 2 + 16 * 7168 * 2
    assert default.bytes_s == pytest.approx(moved / 3.35e12)
    values = 4 * 256 * 256
    assert default.issue_s == pytest.approx(values * spent / (RATE / 132))
    assert default.matrix_s == pytest.approx(values * 2 * 16 / (989e12 / 132))
    assert default.floor_s == max(default.bytes_s, default.matrix_s, default.issue_s or 0.0)
    assert (default.programs, default.ctas_per_sm) == (56, 2)
    assert default.waves == pytest.approx(56 / (132 * 2))
    assert default.bytes_in_flight == 2 * 256 * (256 * 4.25 + 16 * 16) / 8  # one CTA is there, two trips ahead
    assert list(pruned.survivors) == sorted(pruned.survivors, key=lambda each: each.rank)


def test_tables_call_them_floors_and_documents_hold_all(pruned: Pruned) -> None:
    table = floors_table(pruned, "H100 SXM", show_all=False)
    assert "by their floors" in str(table.title)
    assert "Nothing here is a time" in str(table.title)
    assert "16x256x256 w4 s3 (default)" in list(table.columns[1].cells)
    shown = pruned_dict(pruned)
    assert shown["default"] == dataclasses.asdict(pruned.place.default)
    assert {each["reason"].split(":")[0] for each in shown["dropped"]} == {"spills", "fit"}
    assert not any("time" in name for each in shown["survivors"] for name in each)
    assert shown["survivors"][0]["floor_s"] <= shown["survivors"][1]["floor_s"]


def test_a_point_that_lost_its_native_instruction_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "fp8", Tile(16, 128, 128, 4, 3))
    found = tune_prune.matmul_points.tile_points

    def expecting(*arguments: object) -> list[object]:
        return [dataclasses.replace(point, expect="^HGMMA") for point in found(*arguments)]  # type: ignore[arg-type]

    monkeypatch.setattr(tune_prune.matmul_points, "tile_points", expecting)
    result = prune(target(format="fp8"), H100, jobs=1)
    assert result.survivors == ()
    assert result.default is None
    assert all(each.reason.startswith("expect: expected a matrix instruction like '^HGMMA'") for each in result.dropped)


def test_what_is_compiled_is_cached(pruned: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    prune(target(), H100, jobs=1, progress=lambda done, total, inspection: seen.append(inspection.cached))
    assert seen == [True] * 4
    h200 = prune(target(), H200, jobs=1)
    assert pruned.default is not None
    assert h200.default is not None
    assert h200.default.bytes_s == pytest.approx(pruned.default.bytes_s * 3.35 / 4.8)
    assert h200.default.issue_s == pruned.default.issue_s


def test_an_expert_layer_counts_both_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "grouped_w4a16")
    shape = {"num_tokens": 64, "hidden": 2048, "inter": 768, "top_k": 8, "num_experts": 128, "ep": 1, "load": 0}
    result = prune(target("moe", "mxfp4-bf16", **shape), H100, jobs=1)
    (default,) = result.survivors
    assert [each.point.name.split("/")[2] for each in default.inspections] == ["gate_up", "down"]
    # balanced: 4 rows for each of 128 experts, a block each; gate-up 1536 x 2048, down 2048 x 768
    trips = {"gate_up": (128 * 6, 8), "down": (128 * 8, 3)}
    assert default.programs == 128 * 8
    expected = 0.0
    for inspection, (programs, each) in zip(default.inspections, trips.values(), strict=True):
        assert inspection.compiled is not None
        spent = inspection.compiled.instructions_per_value
        assert spent is not None
        expected += -(-programs // 132) * each * 256 * 256 * spent / (RATE / 132)
    assert default.issue_s == pytest.approx(expected)


def test_grids_of_many_tokens_and_of_attention() -> None:
    many = {"m": 512, "n": 2112, "k": 7168}
    place = place_of(find_kernels("gemm", ["fp8_block"])[0], many, "sm_90")
    grid = tune_prune._gemm_grid(place, Tile(128, 128, 128, 8, 3), many, 132)
    assert grid == Grid(4 * 17, 56)  # one program each: no split of k
    grid = tune_prune._gemm_grid(place, Tile(64, 64, 128, 4, 3), many, 132)
    assert grid == Grid(8 * 33, 2 * 56)
    cached = {"batch": 16, "length": 8192, "q_len": 1, "num_kv_heads": 8, "window": 0}
    grid = tune_prune._attention_grid(Tile(16, 64, 128, 4, 4), 8, 8, cached, 132)
    assert grid == Grid(2 * 132 // 8 * 8, 16 * 128 * 8 / 132)
    seen = tune_prune._attention_grid(Tile(16, 64, 128, 4, 4), 8, 8, cached | {"window": 128}, 132)
    assert seen.busiest_trips == 16 * 2 * 8 / 132


# -- domination ------------------------------------------------------------------------------------


def candidate(stages: int, *, issue: float, matrix: float = 1e-6, ctas: int = 2, flight: int = 100) -> Candidate:
    return Candidate(Tile(16, 128, 128, 4, stages), (), 4e-6, matrix, issue, 100, ctas, 0.5, flight)


@pytest.mark.parametrize(
    ("other", "is_dropped"),
    [
        ({"issue": 3.1e-6}, True),
        ({"issue": 3.05e-6}, False),  # within 2 %
        ({"issue": 1.9e-6}, False),  # hidden behind 4 us of bytes
        ({"issue": 3.5e-6, "flight": 101}, False),
        ({"issue": 3.5e-6, "ctas": 3}, False),
        ({"issue": 3.5e-6, "matrix": 0.9e-6}, False),
    ],
)
def test_domination(other: dict[str, float], is_dropped: bool) -> None:
    least = {"issue": 1.0e-6} if other["issue"] < 2e-6 else {"issue": 3.0e-6}
    best, worse = candidate(2, **least), candidate(3, **other)  # type: ignore[arg-type]
    kept, dropped = drop_dominated([best, worse], default=best.tile)
    assert kept == ([best] if is_dropped else [best, worse])
    assert [each.reason for each in dropped] == (
        ["dominated: 16x128x128 w4 s2 issues for 3.00 us at least, not 3.10, and is no worse else"]
        if is_dropped
        else []
    )
    assert drop_dominated([best, worse], default=worse.tile) == ([best, worse], [])


def test_rank_goes_by_the_binding_floor_then_the_next_then_bytes_in_flight() -> None:
    bound = candidate(2, issue=5e-6)
    near, free = candidate(3, issue=3.5e-6), candidate(4, issue=1e-6)
    deep = candidate(5, issue=1e-6, flight=200)
    order = sorted([bound, near, free, deep], key=lambda each: each.rank)
    assert [each.tile.num_stages for each in order] == [5, 4, 3, 2]
    assert (bound.binds, free.binds) == ("issue", "bytes")
    unknown = dataclasses.replace(bound, issue_s=None)
    assert (unknown.floor_s, unknown.binds) == (4e-6, "bytes")


def test_an_op_without_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="op: expected one of gemm, moe"):
        prune(target("quantize", "mxfp4", rows=1, columns=32), H100)
