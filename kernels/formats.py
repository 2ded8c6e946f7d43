"""Number formats: how many bits a value costs, scales included. Standard library only.

Source: OCP Microscaling Formats (MX) v1.0; DeepSeek-V3 technical report (1x128 and
128x128 FP8 blocks); NVIDIA Transformer Engine and cuBLAS documentation (NVFP4).
"""

from __future__ import annotations

from dataclasses import dataclass

MATRIX_RATES = ("bf16", "fp8", "fp4")
"""The rates at which matrix units run, slowest first."""


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: the key used everywhere in tokenfab.
        element_bits: bits of one encoded value.
        scale_bits: bits of one scale; 0 where a scale covers a whole row or tensor,
            whose cost per value vanishes.
        block: (rows, columns) of values that share one scale; None without blocks.
        matrix_rate: the fastest rate at which matrix units take this format as an
            operand, one of ``MATRIX_RATES``.
        title: one line for a reader.
    """

    name: str
    element_bits: int
    scale_bits: int
    block: tuple[int, int] | None
    matrix_rate: str
    title: str

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value: the element and its share of the block's scale."""
        if self.block is None:
            return float(self.element_bits)
        return self.element_bits + self.scale_bits / (self.block[0] * self.block[1])

    @property
    def bytes_per_value(self) -> float:
        return self.bits_per_value / 8


BF16 = Format("bf16", 16, 0, None, "bf16", "BF16, no scale")
FP8 = Format("fp8", 8, 0, None, "fp8", "FP8 E4M3, one scale per tensor or per row")
FP8_BLOCK = Format("fp8_block", 8, 32, (128, 128), "fp8", "FP8 E4M3, FP32 scale per 128x128 (weights)")
FP8_GROUP = Format("fp8_group", 8, 32, (1, 128), "fp8", "FP8 E4M3, FP32 scale per 1x128 (activations)")
MXFP8 = Format("mxfp8", 8, 8, (1, 32), "fp8", "FP8 E4M3, E8M0 scale per 32 (OCP MX)")
MXFP4 = Format("mxfp4", 4, 8, (1, 32), "fp4", "FP4 E2M1, E8M0 scale per 32 (OCP MX)")
NVFP4 = Format("nvfp4", 4, 8, (1, 16), "fp4", "FP4 E2M1, E4M3 scale per 16 and one FP32 per tensor")

FORMATS: dict[str, Format] = {row.name: row for row in (BF16, FP8, FP8_BLOCK, FP8_GROUP, MXFP8, MXFP4, NVFP4)}


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
