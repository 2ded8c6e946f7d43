"""The GPU table against datasheet facts, and its exact lookup."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from tokenfab.bench.gpus import GPUS, get_gpu

GIB = 1024**3
MIB = 1024**2


class Fact(NamedTuple):
    """One row of the sources: dense TFLOP/s, capacity as a GB range, TB/s, W, GB/s x GPUs in the domain."""

    name: str
    bf16: float
    fp8: float | None
    fp4: float | None
    memory_gb: tuple[float, float]
    bandwidth: float
    tdp: float
    link: float
    domain: int
    chip: tuple[str, int]


# aiconfigurator-core 0.12.0 systems/*.yaml (AIC); InferenceX-app gpu-specs.ts @77ca49a (SPEC). Where they differ:
# B200 7.7 TB/s is AIC (SPEC 8.0); B300 7.75 TB/s and 1100 W are AIC (SPEC 8, 1200), FP4 13500 is SPEC (AIC 14000).
# PCIe cards have no scale-up link: their "domain" is the server.
FACTS = [
    Fact("a100", 312, None, None, (80, 80), 2.039, 400, 300, 8, ("8.0", 108)),
    Fact("l40s", 362.05, 733, None, (48, 48), 0.864, 350, 32, 8, ("8.9", 142)),
    Fact("h100", 989, 1979, None, (80, 80), 3.35, 700, 450, 8, ("9.0", 132)),
    Fact("h100_pcie", 756.5, 1513, None, (80, 80), 2.0, 350, 64, 8, ("9.0", 114)),
    Fact("h200", 989, 1979, None, (141, 141), 4.8, 700, 450, 8, ("9.0", 132)),
    Fact("h800", 989, 1979, None, (80, 80), 3.35, 700, 200, 8, ("9.0", 132)),
    Fact("h20", 148, 296, None, (96, 96), 4.0, 400, 450, 8, ("9.0", 78)),
    Fact("b200", 2250, 4500, 9000, (180, 180), 7.7, 1000, 900, 8, ("10.0", 148)),
    Fact("b300", 2250, 4500, 13500, (268, 288), 7.75, 1100, 900, 8, ("10.3", 148)),
    Fact("gb200", 2500, 5000, 10000, (186, 192), 8.0, 1200, 900, 72, ("10.0", 152)),
    Fact("gb300", 2500, 5000, 15000, (278, 288), 8.0, 1400, 900, 72, ("10.3", 152)),
    Fact("rtx_pro_6000", 468, 936, 1871, (96, 96), 1.792, 600, 64, 8, ("12.0", 188)),
    Fact("rtx_5090", 209, 419, 1676, (32, 32), 1.792, 575, 64, 8, ("12.0", 170)),
    Fact("mi300x", 1307, 2615, None, (192, 192), 5.3, 750, 448, 8, ("gfx942", 304)),
    Fact("mi355x", 2516, 5033, 10066, (288, 288), 8.0, 1400, 576, 8, ("gfx950", 256)),
]


def _flops(tera: float | None) -> Any:
    return None if tera is None else pytest.approx(tera * 1e12, rel=1e-12)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.name)
def test_row_matches_its_datasheet(fact: Fact) -> None:
    gpu = get_gpu(fact.name)
    assert gpu.bf16_flops_per_s == _flops(fact.bf16)
    assert gpu.fp8_flops_per_s == _flops(fact.fp8)
    assert gpu.fp4_flops_per_s == _flops(fact.fp4)
    assert gpu.memory_bytes_per_s == pytest.approx(fact.bandwidth * 1e12, rel=1e-12)
    # "80 GB" is 80e9 in one source and 80 GiB in another: nothing outside the two
    assert fact.memory_gb[0] * 1e9 <= gpu.memory_bytes <= fact.memory_gb[1] * GIB
    assert gpu.tdp_w == fact.tdp
    assert gpu.link_bytes_per_s == fact.link * 1e9
    assert gpu.scale_up_gpus == fact.domain
    assert (gpu.compute_capability, gpu.num_sms) == fact.chip


def test_no_row_is_untested() -> None:
    assert list(GPUS) == [fact.name for fact in FACTS]


# capacities to the byte where the source gives MiB or GiB (AIC)
@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("a100", 80 * GIB),
        ("h100", 80 * GIB),
        ("h200", 141 * GIB),
        ("b200", 180 * GIB),
        ("b300", 275040 * MIB),
        ("gb200", 189471 * MIB),
        ("gb300", 284208 * MIB),
    ],
)
def test_capacity_to_the_byte(name: str, num_bytes: int) -> None:
    assert get_gpu(name).memory_bytes == num_bytes


@pytest.mark.parametrize(
    ("name", "scale_out", "node_gpus"),
    # 400 Gb/s per GPU on H100, H200 and B200 nodes of eight; an NVL72 compute tray holds four
    [("h100", 50e9, 8), ("h200", 50e9, 8), ("b200", 50e9, 8), ("gb200", 100e9, 4), ("gb300", 100e9, 4)],
)
def test_scale_out(name: str, scale_out: float, node_gpus: int) -> None:
    gpu = get_gpu(name)
    assert gpu.scale_out_bytes_per_s == scale_out
    assert gpu.node_gpus == node_gpus


def test_every_row_names_its_source() -> None:
    for gpu in GPUS.values():
        assert any(source in gpu.source for source in ("AIC", "SPEC")), gpu.name


@pytest.mark.parametrize("name", ["l40s", "h800", "rtx_5090", "mi355x"])
def test_rows_with_a_figure_from_no_source_say_so(name: str) -> None:
    assert "MEM (unverified)" in get_gpu(name).source


def test_gpus_with_published_tables_name_them() -> None:
    with_tables = {"a100", "l40s", "h100", "h200", "b200", "b300", "gb200", "gb300", "rtx_pro_6000"}
    assert {gpu.name for gpu in GPUS.values() if gpu.published_system} == with_tables
    systems = [gpu.published_system for gpu in GPUS.values() if gpu.published_system]
    assert len(set(systems)) == len(systems)


def test_every_name_and_alias_leads_to_its_own_row() -> None:
    # an alias given to two rows would lead to the other one
    for gpu in GPUS.values():
        for alias in (gpu.name, *gpu.aliases):
            assert get_gpu(alias) is gpu
            assert get_gpu(alias.upper()) is gpu


@pytest.mark.parametrize(
    ("alias", "name"),
    [("H100", "h100"), ("H100_SXM", "h100"), ("h200_sxm", "h200"), ("GB200_NVL72", "gb200"), ("Mi300X", "mi300x")],
)
def test_aliases(alias: str, name: str) -> None:
    assert get_gpu(alias).name == name


# the table is never matched by substring: "h100" must not answer for "h100_pcie", nor "b200" for "gb200"
@pytest.mark.parametrize("name", ["", "h", "100", "H100X", "h100 ", " h100", "h100_", "h100_pci", "b20", "sxm"])
def test_anything_but_an_exact_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^gpu: expected one of ") as error:
        get_gpu(name)
    assert all(known in str(error.value) for known in GPUS)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "rate", "flops"),
    [("h100", "bf16", 989e12), ("h100", "fp8", 1979e12), ("b200", "fp4", 9000e12), ("a100", "bf16", 312e12)],
)
def test_matrix_peak(name: str, rate: str, flops: float) -> None:
    assert get_gpu(name).matrix_flops_per_s(rate) == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize(("name", "rate"), [("h100", "fp4"), ("h20", "fp4"), ("mi300x", "fp4"), ("a100", "fp8")])
def test_a_missing_matrix_unit_is_refused(name: str, rate: str) -> None:
    with pytest.raises(ValueError, match=rf"^gpu: {name} has no {rate.upper()} matrix units$"):
        get_gpu(name).matrix_flops_per_s(rate)
