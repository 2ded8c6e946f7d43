"""Number formats: what a value costs, and at which matrix rate it runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenfab.kernels.formats import ELEMENTS, FORMATS, MATRIX_RATES, SCALE_RULES, get_format, matrix_rate

# name, bits per value with scales, matrix rate. Scales: FP32 per 128x128 or 1x128 (DeepSeek-V3 report),
# E8M0 per 32 (OCP MX 1.0), E4M3 per 16 (NVFP4).
ROWS = [
    ("bf16", 16.0, "bf16"),
    ("fp8", 8.0, "fp8"),
    ("fp8_row", 8.0, "fp8"),
    ("fp8_block", 8 + 32 / 16384, "fp8"),
    ("fp8_group", 8.25, "fp8"),
    ("mxfp8", 8.25, "fp8"),
    ("mxfp4", 4.25, "fp4"),
    ("nvfp4", 4.5, "fp4"),
]


@pytest.mark.parametrize(("name", "bits", "rate"), ROWS)
def test_bits_and_rate(name: str, bits: float, rate: str) -> None:
    row = get_format(name)
    assert row.name == name
    assert row.bits_per_value == bits
    assert row.bytes_per_value == bits / 8
    assert row.matrix_rate == rate


# name, element, its max, scale dtype, scale covers, block, FP32 scale per tensor, E8M0 rule, least amax, packing
RULES = [
    ("bf16", "bf16", 3.3895313892515355e38, "none", "none", None, False, None, None, None),
    ("fp8", "e4m3", 448.0, "f32", "tensor", None, False, None, 1e-12, None),
    ("fp8_row", "e4m3", 448.0, "f32", "row", None, False, None, 1e-12, None),
    ("fp8_block", "e4m3", 448.0, "f32", "block", (128, 128), False, None, 1e-4, None),
    ("fp8_group", "e4m3", 448.0, "f32", "block", (1, 128), False, None, 1e-4, None),
    ("mxfp8", "e4m3", 448.0, "e8m0", "block", (1, 32), False, "floor", None, None),
    ("mxfp4", "e2m1", 6.0, "e8m0", "block", (1, 32), False, "floor", None, "low_first"),
    ("nvfp4", "e2m1", 6.0, "e4m3", "block", (1, 16), True, None, None, "low_first"),
]


@pytest.mark.parametrize("want", RULES, ids=[row[0] for row in RULES])
def test_rules_are_pinned(want: tuple[object, ...]) -> None:
    row = get_format(str(want[0]))
    assert want == (
        row.name,
        row.element,
        row.element_max,
        row.scale,
        row.scale_per,
        row.block,
        row.tensor_scale,
        row.scale_rule,
        row.amax_clamp,
        row.packing,
    )
    assert row.tie == "even"


def test_no_row_is_untested() -> None:
    assert list(FORMATS) == [name for name, _, _ in ROWS] == [str(row[0]) for row in RULES]


@pytest.mark.parametrize(
    ("name", "data", "scale", "multiple"),
    [
        ("bf16", (130, 480), None, 1),
        ("fp8", (130, 480), (), 1),
        ("fp8_row", (130, 480), (130, 1), 1),
        ("fp8_block", (130, 480), (2, 4), 1),
        ("fp8_group", (130, 480), (130, 4), 1),
        ("mxfp8", (130, 480), (130, 15), 32),
        ("mxfp4", (130, 240), (130, 15), 32),
        ("nvfp4", (130, 240), (130, 30), 16),
    ],
)
def test_stored_shapes(name: str, data: tuple[int, int], scale: tuple[int, ...] | None, multiple: int) -> None:
    row = get_format(name)
    assert (row.data_shape(130, 480), row.scale_shape(130, 480), row.column_multiple) == (data, scale, multiple)


def test_elements_and_rules() -> None:
    assert [(e.name, e.bits, e.mantissa_bits, e.max_exponent) for e in ELEMENTS.values()] == [
        ("bf16", 16, 7, 127),
        ("e4m3", 8, 3, 8),
        ("e2m1", 4, 1, 2),
    ]
    assert SCALE_RULES == ("floor", "rceil", "even")


def test_formats_need_no_torch() -> None:
    code = "import sys, tokenfab.kernels.formats; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("weight", "activation", "rate"),
    [
        ("bf16", "bf16", "bf16"),
        ("mxfp4", "bf16", "bf16"),  # W4A16
        ("mxfp4", "mxfp8", "fp8"),  # W4A8
        ("nvfp4", "fp8_group", "fp8"),
        ("nvfp4", "nvfp4", "fp4"),  # W4A4
        ("fp8_block", "fp8_group", "fp8"),
        ("fp8", "bf16", "bf16"),  # W8A16
    ],
)
def test_a_product_runs_at_the_rate_of_its_wider_operand(weight: str, activation: str, rate: str) -> None:
    assert matrix_rate(get_format(weight), get_format(activation)) == rate
    assert matrix_rate(get_format(activation), get_format(weight)) == rate


def test_rates_are_ordered_slowest_first() -> None:
    assert MATRIX_RATES == ("bf16", "fp8", "fp4")


@pytest.mark.parametrize("name", ["int4", "BF16", "fp", "fp8 ", ""])
def test_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"^format: expected one of ") as error:
        get_format(name)
    assert all(known in str(error.value) for known in FORMATS)
    assert repr(name) in str(error.value)
