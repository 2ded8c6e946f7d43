"""Number formats: what a value costs, and at which matrix rate it runs."""

from __future__ import annotations

import pytest
from tokenfab.kernels.formats import FORMATS, MATRIX_RATES, get_format, matrix_rate

# name, bits per value with scales, matrix rate. Scales: FP32 per 128x128 or 1x128 (DeepSeek-V3 report),
# E8M0 per 32 (OCP MX 1.0), E4M3 per 16 (NVFP4).
ROWS = [
    ("bf16", 16.0, "bf16"),
    ("fp8", 8.0, "fp8"),
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


def test_no_row_is_untested() -> None:
    assert list(FORMATS) == [name for name, _, _ in ROWS]


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
