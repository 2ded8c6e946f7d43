"""How the quantize kernels are cut up and specialised, with the reasons. Standard library only.

The wrappers launch by these functions and ``quantize_points`` compiles by them, so that what is inspected is what runs.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from .formats import Format

MAX_PARTIALS = 1024
"""Most programs of the first pass over a tensor: several per SM on the largest GPUs, and so few that
every program of the second pass reads all partial maxima (4 KiB, from the L2 cache)."""

BLOCK_TILE = (2048, 1024, 4)
"""Values and most columns per program, and warps: 16 values per thread keep a block's maximum inside a
few threads and the tile in registers; decode batches still give several programs per row."""

ROW_TILE = (8192, 8192, 8)
"""The same where one program takes whole rows: one trip for most hidden sizes, 32 values per thread."""

SWIGLU_TILE = (1024, 1024, 4)
"""As ``BLOCK_TILE``, with two inputs: 8 results per thread, since 16 spill on sm_100 with Triton 3.6."""

SWIGLU_ROW_TILE = (4096, 4096, 8)
"""As ``ROW_TILE``, with two inputs: 16 results per thread, since 32 spill."""

MAX_COLUMNS = 16384
"""Most columns of rms_norm: a row stays in the registers of one program."""

COLUMNS_PER_WARP = 512
"""16 values per thread of rms_norm: 32 spill at 16384 columns, the most values of a program. Even 16 spill, up to 52
bytes on sm_100 and sm_120 with Triton 3.9.0, where more than 8192 columns do not divide by 16; every model's do."""

EXACT = {"enable_fp_fusion": False}
"""Launch option: no fused multiply-add, which would round once where the codec rounds twice."""


class Launch(NamedTuple):
    """The constexprs of a kernel and its warps."""

    constants: dict[str, Any]
    num_warps: int

    @property
    def block_m(self) -> int:
        return self.constants.get("BLOCK_M", 1)

    @property
    def block_k(self) -> int:
        return self.constants["BLOCK_K"]


def _next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _block_shape(columns: int, tile: tuple[int, int, int]) -> dict[str, int]:
    """Columns up to a power of two from 128, the rest of the tile in rows."""
    block_k = min(tile[1], max(128, _next_power_of_2(columns)))
    return {"BLOCK_M": min(16, tile[0] // block_k), "BLOCK_K": block_k}


def _format_constants(row: Format, scale_rule: str | None) -> dict[str, Any]:
    """The constants by which ``quantize.store_tile`` knows a format."""
    return {
        "GROUP": row.block[1] if row.block else 0,
        "ELEMENT": row.element,
        "SCALE": row.scale,
        "RULE": scale_rule or row.scale_rule or "none",
        "AMAX_MIN": struct.unpack("<i", struct.pack("<f", row.amax_clamp or 0.0))[0],
    }


def needs_tensor_amax(row: Format, *, has_global_scale: bool) -> bool:
    """Whether a scale covers the tensor and is not given: then its maximum is found first, by a launch of its own."""
    return row.scale_per == "tensor" or (row.tensor_scale and not has_global_scale)


def amax_launch(columns: int) -> Launch:
    """Of ``_amax_kernel``."""
    return Launch(_block_shape(columns, BLOCK_TILE), BLOCK_TILE[2])


def num_partials(rows: int, columns: int) -> int:
    """Programs of ``_amax_kernel``, each with one maximum."""
    first = amax_launch(columns)
    return min(MAX_PARTIALS, max(1, -(-rows // first.block_m) * -(-columns // first.block_k)))


def quantize_launch(row: Format, columns: int, scale_rule: str | None = None, *, from_amax: bool = False) -> Launch:
    """Of ``_quantize_kernel``; from_amax: the tensor's scale comes from partial maxima."""
    tile = ROW_TILE if row.scale_per == "row" else BLOCK_TILE
    own = {"PARTIALS": MAX_PARTIALS if from_amax else 0, "PER": row.scale_per}
    return Launch(_block_shape(columns, tile) | own | _format_constants(row, scale_rule), tile[2])


def rms_norm_launch(row: Format, columns: int, scale_rule: str | None = None, *, has_residual: bool) -> Launch:
    """Of ``_rms_norm_quantize_kernel``: a program takes one row."""
    block_k = max(128, _next_power_of_2(columns))
    own = {"BLOCK_K": block_k, "HAS_RESIDUAL": has_residual, "PER": row.scale_per}
    return Launch(own | _format_constants(row, scale_rule), max(4, block_k // COLUMNS_PER_WARP))


def swiglu_launch(row: Format, columns: int, scale_rule: str | None = None, *, is_clamped: bool) -> Launch:
    """Of ``_swiglu_quantize_kernel``; columns are those of the result."""
    tile = SWIGLU_ROW_TILE if row.scale_per == "row" else SWIGLU_TILE
    own = {"CLAMPED": is_clamped, "PER": row.scale_per}
    return Launch(_block_shape(columns, tile) | own | _format_constants(row, scale_rule), tile[2])
