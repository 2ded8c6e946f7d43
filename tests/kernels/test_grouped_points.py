"""The experts' matmuls compiled ahead of time: no spills, native instructions, the price of a weight on Hopper."""

from __future__ import annotations

from compiled import compiled
from tokenfab.kernels.grouped_experts import KERNEL_OF
from tokenfab.kernels.grouped_points import MODES, grouped_points


def test_r18_every_tile_compiles_as_it_says() -> None:
    found = compiled(grouped_points())
    assert [each for each in found if each.problems] == []
    assert all(each.facts.spill_bytes == 0 for each in found)
    limits = {"bf16": 2.5, "fp8_row": 2.0, "fp8_group": 2.0}
    judged = 0
    for each in found:
        _, formats, mode, size = each.name.split("/")[:4]
        weight, activation = formats.split("-")
        is_decoded = weight in ("mxfp4", "nvfp4") and activation in limits
        if is_decoded and mode in MODES and size == "m16-16x256" and each.arch == "sm_90":
            assert each.facts.instructions_per_value is not None
            assert each.facts.instructions_per_value <= limits[activation]
            judged += 1
    assert judged == 2 * 3 + 2 * 6  # two formats of W4A16; W4A8 with bases per row and per 128


def test_every_pair_is_compiled_in_both_modes() -> None:
    names = [tuple(point.name.split("/")[1:3]) for point in grouped_points()]
    pairs = {f"{weight}-{activation}" for weight, activation, _ in KERNEL_OF}
    assert {(pair, mode) for pair in pairs for mode in MODES} == set(names)
    unique = {(point.name, point.archs) for point in grouped_points()}
    assert len(unique) == len(grouped_points())
