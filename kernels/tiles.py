"""Tiles as data: what one program of a kernel computes, per format, architecture and number of tokens, and why.

A row without architectures is the default of its kernel and formats, safe in shared memory and registers on every
architecture that has no row of its own for so many tokens. Every row compiles
without spills wherever ``find_tile`` returns it, but MLA's of 64 rows (the ``*_points.py`` inspect all of them).
Standard library only.

Blackwell's block-scaled instructions want 128 rows on the M side of the instruction, which is the weights up to 64
tokens and the tokens beyond: with fewer, Triton widens both sides to BF16, or aborts (NVFP4, 3.6.0).

Shared memory and registers in the reasons are those of Triton 3.6.0, the larger of the releases tried.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .tuned import tuned_tile

ARCHS = ("sm_90", "sm_100", "sm_103", "sm_120")
"""Architectures a row may name."""

PARTED_ARCHS = ("sm_100", "sm_103")
"""Where attention multiplies the two terms of FP8 queries and probabilities apart: see ``attention_parts.py``."""

ANY_NUMBER = 1 << 62
"""Tokens without a limit."""


@dataclass(frozen=True)
class Tile:
    """What one program computes and how it is compiled.

    Attributes:
        block_m, block_n, block_k: tokens, output channels, and input channels per trip of the loop.
        num_warps, num_stages: Triton's launch options.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TileRow:
    """A tile and where it is used: up to ``max_tokens`` tokens; ``archs`` empty for the default."""

    kernel: str
    formats: tuple[str, ...]
    archs: tuple[str, ...]
    max_tokens: int
    tile: Tile
    reason: str


_FP8 = ("tensor", "row", "block")
_FP4 = ("mxfp4", "nvfp4")
_A8 = ("fp8_row", "fp8_group")
_EXPERTS = ("bf16", "fp8_row", "fp8_block")
_MXFP8 = ("mxfp8", "mxfp4_mxfp8")

_KV_FP8 = ("fp8", "fp8_row")

_ROWS = (8, 16, ANY_NUMBER)
"""Query rows of attention's tiles: heads of a group times query tokens."""

_LIMITS = (16, 32, ANY_NUMBER)
"""Rows per block of the experts' matmuls."""

TILES: tuple[TileRow, ...] = (
    TileRow("w4a16", _FP4, ("sm_90",), 16, Tile(16, 256, 256, 4, 3),
            "2.4 instructions per weight, least of all widths; 91 KiB: two CTAs per SM hide each other's waits"),
    TileRow("w4a16", _FP4, ("sm_90",), 32, Tile(32, 128, 256, 4, 3),
            "at 256 channels 255 registers are all in use; at 128 three CTAs per SM fit"),
    TileRow("w4a16", ("mxfp4",), ("sm_90",), ANY_NUMBER, Tile(64, 128, 256, 4, 3),
            "decodes each weight once per 64 tokens; 128 tokens or 256 channels spill"),
    TileRow("w4a16", ("nvfp4",), ("sm_90",), ANY_NUMBER, Tile(64, 128, 128, 4, 3),
            "as MXFP4, but its twice as many scales spill where two tiles of k are decoded per trip"),
    TileRow("w4a16", _FP4, ("sm_100", "sm_103"), 16, Tile(16, 128, 256, 4, 3),
            "tcgen05 takes decoded weights from shared memory; three CTAs per SM share the waits"),
    TileRow("w4a16", _FP4, ("sm_100", "sm_103"), ANY_NUMBER, Tile(64, 128, 256, 4, 3),
            "decodes each weight once per 64 tokens; 256 channels spill"),
    TileRow("w4a16", _FP4, (), ANY_NUMBER, Tile(16, 128, 256, 4, 3),
            "83 KiB fit in the 99 of sm_120, where 32 tokens spill"),
    TileRow("w4a8", _A8, ("sm_90",), 16, Tile(16, 256, 256, 4, 3),
            "1.4 instructions per weight, least of all widths; two CTAs per SM"),
    TileRow("w4a8", _A8, ("sm_90",), ANY_NUMBER, Tile(32, 256, 128, 4, 3),
            "two tiles of k per trip, or 64 tokens, would spill"),
    TileRow("w4a8", _A8, (), ANY_NUMBER, Tile(16, 128, 256, 4, 3), "the narrowest: its fragments are Hopper's"),
    TileRow("fp8", _FP8, (), 16, Tile(16, 128, 128, 4, 4),
            "72 KiB of weights and tokens in flight; one warpgroup's accumulator is 16 registers"),
    TileRow("fp8", _FP8, (), 32, Tile(32, 128, 128, 4, 4), "80 KiB in flight; the accumulator is 32 registers"),
    TileRow("fp8", _FP8, (), 64, Tile(64, 128, 128, 8, 3), "eight warps halve the two accumulators, 64 registers each"),
    TileRow("fp8_many", _FP8, ("sm_120",), ANY_NUMBER, Tile(128, 64, 128, 8, 3),
            "two accumulators of 32 registers; at 128 channels the last registers of a thread spill"),
    TileRow("fp8_many", _FP8, (), ANY_NUMBER, Tile(128, 128, 128, 8, 3),
            "two accumulators of 64 registers, one for 128 of k and one in FP32; 256 channels would spill"),
    TileRow("block_scaled", ("mxfp4",), ("sm_90",), 16, Tile(16, 128, 128, 4, 3),
            "widened to BF16 there: 256 of k spill"),
    TileRow("block_scaled", ("mxfp4",), ("sm_90",), 64, Tile(16, 128, 128, 4, 3),
            "widened to BF16 there: 256 of k, or 64 tokens, spill"),
    TileRow("block_scaled", ("mxfp4",), ("sm_90",), ANY_NUMBER, Tile(64, 128, 128, 8, 3),
            "widened to BF16 there: 128 tokens spill"),
    TileRow("block_scaled", ("mxfp4",), ("sm_100", "sm_103"), ANY_NUMBER, Tile(128, 128, 256, 8, 3),
            "96 KiB of operands in flight; the accumulator is in tensor memory"),
    TileRow("block_scaled", ("mxfp4_mxfp8",), ("sm_120",), ANY_NUMBER, Tile(128, 128, 128, 8, 3),
            "FP4 expanded to E4M3 in registers, each weight once per 128 tokens"),
    TileRow("block_scaled", ("mxfp8",), (), ANY_NUMBER, Tile(128, 128, 128, 8, 3), "96 KiB of operands in flight"),
    TileRow("block_scaled", _FP4, (), 16, Tile(16, 128, 256, 4, 3), "256 of k are 128 bytes of codes per row"),
    TileRow("block_scaled", _FP4, (), 64, Tile(64, 128, 256, 8, 3), "256 of k are 128 bytes of codes per row"),
    TileRow("block_scaled", _FP4, (), ANY_NUMBER, Tile(128, 64, 256, 8, 3), "128 channels spill on sm_120"),
    TileRow("block_scaled", _MXFP8, (), 16, Tile(16, 128, 128, 4, 3), "128 of k are 128 bytes of codes per row"),
    TileRow("block_scaled", _MXFP8, (), 64, Tile(64, 128, 128, 8, 3), "128 of k are 128 bytes of codes per row"),
    TileRow("block_scaled", ("mxfp4_mxfp8",), (), ANY_NUMBER, Tile(128, 64, 128, 8, 3),
            "128 channels gain nothing where FP4 is widened"),
    TileRow("grouped", ("bf16",), ("sm_120",), 16, Tile(16, 128, 128, 4, 2), "72 KiB; a third stage would not fit"),
    *(TileRow("grouped", ("bf16",), ("sm_120",), limit, Tile(32, 128, 128, 4, 2),
              "80 KiB; 64 tokens would leave no room") for limit in (32, ANY_NUMBER)),
    TileRow("grouped", ("bf16",), (), ANY_NUMBER, Tile(64, 128, 128, 8, 3), "144 KiB; 256 channels would not fit"),
    TileRow("grouped", ("fp8_block",), (), ANY_NUMBER, Tile(64, 128, 128, 8, 3),
            "two accumulators of 32 registers; at 256 channels the scales spill"),
    TileRow("grouped", _EXPERTS, (), 16, Tile(16, 256, 128, 4, 3),
            "gate and up of 128 channels: one group of fp8_group"),
    TileRow("grouped", _EXPERTS, (), 32, Tile(32, 256, 128, 8, 3),
            "one group of fp8_group; two accumulators of 32 registers"),
    TileRow("grouped", ("fp8_row",), (), ANY_NUMBER, Tile(64, 256, 128, 8, 3), "two accumulators of 64 registers"),
    *(TileRow("grouped_w4a16", _FP4, ("sm_120",), limit, Tile(16, 128, 256, 4, 3), "as the dense kernel's there")
      for limit in _LIMITS),
    TileRow("grouped_w4a16", _FP4, (), 16, Tile(16, 256, 256, 4, 3), "as the dense kernel's on sm_90"),
    TileRow("grouped_w4a16", _FP4, (), 32, Tile(32, 128, 256, 4, 3), "as the dense kernel's on sm_90"),
    TileRow("grouped_w4a16", _FP4, (), ANY_NUMBER, Tile(64, 128, 128, 4, 3),
            "as the dense kernel's for NVFP4 on sm_90"),
    *(TileRow("grouped_w4a8", _A8, ("sm_100", "sm_103"), limit, Tile(16, 128, 128, 4, 3),
              "wider ones, or two tiles of k per trip, spill") for limit in _LIMITS),
    *(TileRow("grouped_w4a8", _A8, ("sm_120",), limit, Tile(16, 128, 256, 4, 3),
              "as the dense kernel's default: wider ones spill") for limit in _LIMITS),
    TileRow("grouped_w4a8", _A8, (), 16, Tile(16, 256, 256, 4, 3), "as the dense kernel's on sm_90"),
    *(TileRow("grouped_w4a8", _A8, (), limit, Tile(32, 128, 128, 4, 3),
              "256 channels, or 64 tokens, spill with Triton 3.9.0") for limit in (32, ANY_NUMBER)),
    *(TileRow("grouped_block_scaled", ("mxfp4", *_MXFP8), ("sm_90",), limit, Tile(16, 128, 128, 4, 3),
              "widened to BF16 there: more tokens, or 256 of k, spill") for limit in _LIMITS),
    TileRow("grouped_block_scaled", _FP4, (), 16, Tile(16, 128, 256, 4, 3), "256 of k are 128 bytes of codes per row"),
    TileRow("grouped_block_scaled", _FP4, (), 32, Tile(32, 128, 256, 4, 3), "256 of k are 128 bytes of codes per row"),
    TileRow("grouped_block_scaled", _FP4, (), ANY_NUMBER, Tile(64, 128, 256, 8, 3),
            "256 of k are 128 bytes of codes per row"),
    TileRow("grouped_block_scaled", _MXFP8, (), 16, Tile(16, 128, 128, 4, 3),
            "128 of k are 128 bytes of codes per row"),
    TileRow("grouped_block_scaled", _MXFP8, (), 32, Tile(32, 128, 128, 4, 3),
            "128 of k are 128 bytes of codes per row"),
    TileRow("grouped_block_scaled", _MXFP8, (), ANY_NUMBER, Tile(64, 128, 128, 8, 3),
            "128 of k are 128 bytes of codes per row"),
    *(TileRow("attention_d64", _KV_FP8, ("sm_100", "sm_103"), limit, Tile(16, 64, 64, 4, 3),
              "8 rows are an N that tcgen05 does not have with 128 of M, 32 spill") for limit in _ROWS),
    TileRow("attention_d64", _KV_FP8, ("sm_120",), 16, Tile(16, 32, 64, 4, 4),
            "64 tokens spill: the scores of both terms"),
    TileRow("attention_d64", _KV_FP8, ("sm_120",), ANY_NUMBER, Tile(16, 32, 64, 4, 4), "32 rows, or 64 tokens, spill"),
    TileRow("attention_d64", _KV_FP8, (), 8, Tile(8, 64, 64, 4, 4), "24 KiB ahead of the matrix unit, in each CTA"),
    TileRow("attention_d64", _KV_FP8, (), 16, Tile(16, 64, 64, 4, 3), "two terms of 16 rows are an N of 32"),
    TileRow("attention_d64", _KV_FP8, (), ANY_NUMBER, Tile(32, 64, 64, 4, 3), "64 rows spill: the output and its sums"),
    *(TileRow("attention_d64", ("bf16",), ("sm_120",), limit, Tile(16, 64, 64, 4, 2),
              "all four warps have tokens of their own; 32 rows spill") for limit in _ROWS[1:]),
    TileRow("attention_d64", ("bf16",), (), 16, Tile(16, 32, 64, 4, 4),
            "warp instructions of 16 tokens: half the registers of a warpgroup's 64, and bytes bind either way"),
    TileRow("attention_d64", ("bf16",), (), ANY_NUMBER, Tile(32, 32, 64, 4, 4),
            "64 rows spill: the output and its sums"),
    *(TileRow("attention_d64", _FP4, ("sm_100", "sm_103"), limit, Tile(16, 64, 64, 4, 3),
              "32 rows spill: the output and its sums")
      for limit in _ROWS[1:]),
    TileRow("attention_d64", _FP4, ("sm_120",), ANY_NUMBER, Tile(16, 64, 64, 4, 4),
            "32 rows spill: the output and its sums"),
    TileRow("attention_d64", _FP4, (), 16, Tile(16, 64, 64, 4, 4), "a lane decodes 16 bytes of a row at a time"),
    TileRow("attention_d64", _FP4, (), ANY_NUMBER, Tile(32, 64, 64, 4, 4), "64 rows spill: the output and its sums"),
    *(TileRow("attention_d128", ("fp8",), ("sm_100", "sm_103"), limit, Tile(16, 64, 128, 4, 3),
              "8 rows are an N that tcgen05 does not have with 128 of M, 32 spill") for limit in _ROWS),
    *(TileRow("attention_d128", ("fp8_row",), ("sm_100", "sm_103"), limit, Tile(16, 128, 128, 8, 3),
              "scales of 64 tokens and a window spill with four warps") for limit in _ROWS),
    TileRow("attention_d128", _KV_FP8, ("sm_120",), 8, Tile(8, 64, 128, 4, 3), "37 KiB: two CTAs in the 99 there are"),
    TileRow("attention_d128", _KV_FP8, ("sm_120",), 16, Tile(16, 32, 128, 4, 4),
            "64 tokens spill: the scores of both terms"),
    TileRow("attention_d128", _KV_FP8, ("sm_120",), ANY_NUMBER, Tile(32, 32, 128, 4, 4),
            "64 tokens spill: the scores of both terms"),
    TileRow("attention_d128", _KV_FP8, (), 8, Tile(8, 64, 128, 4, 4), "48 KiB ahead of the matrix unit, in each CTA"),
    TileRow("attention_d128", _KV_FP8, (), 16, Tile(16, 64, 128, 4, 4), "two terms of 16 rows are an N of 32"),
    TileRow("attention_d128", _KV_FP8, (), ANY_NUMBER, Tile(32, 128, 128, 8, 2),
            "each warpgroup has 64 tokens; four warps spill (this one 4 bytes, with pages of 16, a window and 3.6.0)"),
    *(TileRow("attention_d128", ("bf16",), ("sm_120",), limit, Tile(16, 64, 128, 4, 2),
              "all four warps have tokens of their own; 40 KiB: two CTAs") for limit in _ROWS[1:]),
    TileRow("attention_d128", ("bf16",), (), 16, Tile(16, 32, 128, 4, 4),
            "warp instructions of 16 tokens: half the registers of a warpgroup's 64, and bytes bind either way"),
    TileRow("attention_d128", ("bf16",), (), ANY_NUMBER, Tile(32, 32, 128, 4, 4), "64 tokens, or rows, spill"),
    TileRow("attention_d128", _FP4, ("sm_120",), ANY_NUMBER, Tile(16, 64, 128, 4, 3), "42 KiB: two CTAs in 99"),
    TileRow("attention_d128", _FP4, (), ANY_NUMBER, Tile(16, 64, 128, 4, 4), "32 rows spill with NVFP4"),
    TileRow("attention_d256", ("bf16",), ("sm_120",), ANY_NUMBER, Tile(16, 64, 256, 4, 2),
            "77 KiB of the 99 there are"),
    TileRow("attention_d256", _KV_FP8, ("sm_120",), ANY_NUMBER, Tile(8, 64, 256, 4, 3), "72 KiB of the 99 there are"),
    TileRow("attention_d256", _FP4, ("sm_120",), ANY_NUMBER, Tile(16, 64, 256, 4, 3), "81 KiB of the 99 there are"),
    TileRow("attention_d256", ("bf16", *_KV_FP8, *_FP4), (), ANY_NUMBER, Tile(16, 32, 256, 4, 3),
            "64 tokens, or 32 rows, spill"),
    TileRow("mla_attention", ("bf16",), ("sm_90",), 32, Tile(32, 64, 512, 8, 2),
            "as 16 rows: warp instructions still take less time than the bytes"),
    TileRow("mla_attention", ("bf16",), ("sm_90",), ANY_NUMBER, Tile(64, 64, 512, 8, 2),
            "each warpgroup half the tokens, then half the channels: 224 KiB, 128 registers of output; a few bytes for "
            "the epilogue spill; 32 tokens, which spill none, read the queries twice as often"),
    TileRow("mla_attention", _KV_FP8, ("sm_90",), ANY_NUMBER, Tile(64, 64, 128, 8, 2),
            "at most 7.3 instructions per value, where 16 rows, which transpose byte by byte, take 6 to 10; 128 "
            "channels at a time become FP16, so that 255 registers nearly suffice: up to 144 bytes spill"),
    TileRow("mla_attention", ("bf16",), ("sm_100", "sm_103"), ANY_NUMBER, Tile(32, 64, 512, 8, 2),
            "64 rows of output leave no room in tensor memory for scores, and spill"),
    TileRow("mla_attention", ("bf16",), (), 16, Tile(16, 64, 512, 8, 2),
            "warp instructions of 16 rows; 92 KiB fit in the 99 of sm_120"),
    TileRow("mla_attention", ("bf16",), (), ANY_NUMBER, Tile(16, 64, 512, 8, 2), "92 KiB fit in the 99 of sm_120"),
    TileRow("mla_attention", _KV_FP8, (), ANY_NUMBER, Tile(16, 32, 512, 8, 2), "64 tokens, or 32 rows, spill"),
)  # fmt: skip


def find_row(kernel: str, format: str, arch: str, num_tokens: int) -> TileRow:
    """The row with the fewest tokens that are enough, an architecture's own before the default.

    Raises:
        ValueError: no such kernel or format.
    """
    rows = [row for row in TILES if row.kernel == kernel and format in row.formats]
    if not rows:
        known = sorted({f"{row.kernel} {name}" for row in TILES for name in row.formats})
        raise ValueError(f"kernel, format: expected one of {', '.join(known)}; got {kernel} {format}")
    fitting = [row for row in rows if num_tokens <= row.max_tokens and (not row.archs or arch in row.archs)]
    return min(fitting, key=lambda row: (row.max_tokens, not row.archs))


def find_tile(kernel: str, format: str, arch: str, num_tokens: int, **sizes: int) -> Tile:
    """The tile of that row, or the tuned one in use for exactly these tokens and sizes: see ``tuned.py``.

    ``sizes``: all that the launch knows of its shape; without them no tuned tile is looked for. Raises as ``find_row``.
    """
    tuned = tuned_tile(kernel, format, arch, {"tokens": num_tokens, **sizes}) if sizes else None
    return tuned or find_row(kernel, format, arch, num_tokens).tile


def used_on(row: TileRow, format: str, archs: Iterable[str]) -> list[str]:
    """Those of ``archs`` on which ``find_row`` gives ``row`` for some number of tokens."""
    limits = {each.max_tokens for each in TILES if each.kernel == row.kernel}
    return [arch for arch in archs if any(find_row(row.kernel, format, arch, limit) is row for limit in limits)]
