"""Number formats: what is stored, by which rules, and what a value costs. Standard library only.

Sources: OCP Microscaling Formats (MX) v1.0 (E4M3, E2M1, E8M0, blocks of 32, scale rule "floor");
DeepSeek-V3 technical report and DeepGEMM (1x128 and 128x128 FP8 blocks, amax >= 1e-4); NVIDIA
Transformer Engine and cuBLAS documentation (NVFP4, scale rule "rceil"); torchao float8 (amax >= 1e-12).
``codec.py`` carries the rules out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MATRIX_RATES = ("bf16", "fp8", "fp4")
"""The rates at which matrix units run, slowest first."""

SCALE_RULES = ("floor", "rceil", "even")
"""How an E8M0 scale is chosen; see ``codec.encode_e8m0``."""

SCALE_BITS = {"none": 0, "f32": 32, "e8m0": 8, "e4m3": 8}


@dataclass(frozen=True)
class Element:
    """One encoded value: ``bits`` wide with ``mantissa_bits`` of fraction; ``max`` is its largest value."""

    name: str
    bits: int
    mantissa_bits: int
    max: float

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)): the emax of OCP MX."""
        return math.frexp(self.max)[1] - 1


ELEMENTS: dict[str, Element] = {
    row.name: row
    for row in (
        Element("bf16", 16, 7, (2 - 2**-7) * 2.0**127),
        Element("e4m3", 8, 3, 448.0),
        Element("e2m1", 4, 1, 6.0),
    )
}


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: the key used everywhere in tokenfab.
        element: name of the encoded value, a key of ``ELEMENTS``. Rounds to nearest; E4M3 and E2M1
            saturate at the largest value, BF16 overflows to infinity.
        scale: what a scale is stored as, a key of ``SCALE_BITS``.
        scale_per: "none", "tensor", "row" (a token or an output channel) or "block".
        block: (rows, columns) of values that share one scale; None without blocks.
        matrix_rate: the fastest rate at which matrix units take this format as an operand, one of
            ``MATRIX_RATES``.
        title: one line for a reader.
        packing: "low_first" where two codes share a byte, element 0 in the low nibble; else None.
        tensor_scale: whether one more FP32 scale covers the tensor.
        scale_rule: default rule for E8M0 scales, one of ``SCALE_RULES``; None for other scales.
        amax_clamp: least amax from which an FP32 scale is made, so that zeros do not divide 0 / 0.
        tie: which code a midpoint between two codes takes.
    """

    name: str
    element: str
    scale: str
    scale_per: str
    block: tuple[int, int] | None
    matrix_rate: str
    title: str
    packing: str | None = None
    tensor_scale: bool = False
    scale_rule: str | None = None
    amax_clamp: float | None = None
    tie: str = "even"

    @property
    def element_bits(self) -> int:
        """Bits of one encoded value."""
        return ELEMENTS[self.element].bits

    @property
    def element_max(self) -> float:
        """Largest value of the element, where codes saturate."""
        return ELEMENTS[self.element].max

    @property
    def scale_bits(self) -> int:
        """Bits of one block's scale; 0 where a scale covers a row or a tensor, whose cost per value vanishes."""
        return SCALE_BITS[self.scale] if self.block else 0

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value: the element and its share of the block's scale."""
        if self.block is None:
            return float(self.element_bits)
        return self.element_bits + self.scale_bits / (self.block[0] * self.block[1])

    @property
    def bytes_per_value(self) -> float:
        return self.bits_per_value / 8

    @property
    def column_multiple(self) -> int:
        """What the number of columns must divide by: the block of an MX or NVFP4 row. FP8 blocks may have a tail."""
        return self.block[1] if self.block and self.scale != "f32" else 1

    def data_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the stored codes of a (rows, columns) matrix."""
        return (rows, columns // 2 if self.packing else columns)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """Shape of the stored scales of a (rows, columns) matrix; None without scales."""
        if self.block:
            return (-(-rows // self.block[0]), -(-columns // self.block[1]))
        return {"none": None, "tensor": (), "row": (rows, 1)}[self.scale_per]


BF16 = Format("bf16", "bf16", "none", "none", None, "bf16", "BF16, no scale")
FP8 = Format("fp8", "e4m3", "f32", "tensor", None, "fp8", "FP8 E4M3, FP32 scale per tensor", amax_clamp=1e-12)
FP8_ROW = Format("fp8_row", "e4m3", "f32", "row", None, "fp8", "FP8 E4M3, FP32 scale per row", amax_clamp=1e-12)
FP8_BLOCK = Format(
    "fp8_block", "e4m3", "f32", "block", (128, 128), "fp8", "FP8 E4M3, FP32 per 128x128 (weights)", amax_clamp=1e-4
)
FP8_GROUP = Format(
    "fp8_group", "e4m3", "f32", "block", (1, 128), "fp8", "FP8 E4M3, FP32 per 1x128 (activations)", amax_clamp=1e-4
)
MXFP8 = Format("mxfp8", "e4m3", "e8m0", "block", (1, 32), "fp8", "FP8 E4M3, E8M0 per 32 (OCP MX)", scale_rule="floor")
MXFP4 = Format(
    "mxfp4", "e2m1", "e8m0", "block", (1, 32), "fp4", "FP4 E2M1, E8M0 per 32 (OCP MX)", "low_first", scale_rule="floor"
)
NVFP4 = Format(
    "nvfp4", "e2m1", "e4m3", "block", (1, 16), "fp4", "FP4 E2M1, E4M3 per 16 and FP32", "low_first", tensor_scale=True
)

FORMATS: dict[str, Format] = {row.name: row for row in (BF16, FP8, FP8_ROW, FP8_BLOCK, FP8_GROUP, MXFP8, MXFP4, NVFP4)}


def get_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}; got {name!r}") from None


def matrix_rate(weight: Format, activation: Format) -> str:
    """The matrix rate of a product: that of its wider operand (W4A16 runs at the BF16 rate)."""
    return min(weight.matrix_rate, activation.matrix_rate, key=MATRIX_RATES.index)
