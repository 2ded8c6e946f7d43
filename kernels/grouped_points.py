"""The experts' matmuls as they are compiled: every row of ``tiles.py`` in both modes, as ``matmul_points.py`` does.

A name is ``moe/WEIGHT-ACTIVATION/MODE/mTOKENS-...``, the mode "gate_up" (with h quantized where its format is
fp8_group) or "down". K that does not divide by the tile is compiled for sm_90 and the smallest block only: the dense
kernels, whose loops these are, compile it everywhere. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .compile_point import CompilePoint
from .formats import get_format, matrix_rate
from .matmul_points import (
    BLOCK_SCALED_FORMATS,
    COMPILED_ARCHS,
    EXPECT,
    SCALE_CONSTANTS,
    W4A8_MAX_INSTRUCTIONS,
    W4A16_MAX_INSTRUCTIONS,
    make_point,
)
from .tiles import ANY_NUMBER, TILES, Tile, TileRow, used_on

MODES = ("gate_up", "down")
_PLAN = ("row_index_ptr", "block_expert_ptr", "block_start_ptr", "expert_offsets_ptr")
TOP_K = 8


def _name(weight: str, activation: str, mode: str, row: TileRow, is_even: bool) -> str:
    tokens = "any" if row.max_tokens == ANY_NUMBER else f"m{row.max_tokens}"
    size = f"{tokens}-{row.tile.block_m}x{row.tile.block_n}"
    return f"moe/{weight}-{activation}/{mode}/{size}{'' if row.archs else '/default'}{'' if is_even else '/tail'}"


def _types(operands: dict[str, str], mode: str, *, is_quantized: bool, sizes: str) -> dict[str, str]:
    """Arguments that a mode does not have are None at launch, which makes them constants."""
    types = dict(operands) | {"bias_ptr": "constexpr"}
    types["routing_ptr"] = "*fp32" if mode == "down" else "constexpr"
    types["y_ptr"] = "*fp8e4nv" if is_quantized else "*bf16"
    return types | dict.fromkeys(_PLAN, "*i32") | dict.fromkeys(sizes.split(), "i32")


def _make(
    name: str, module: str, function: str, types: dict[str, str], constexprs: dict[str, Any], row: TileRow, arch: str,
    **facts: Any,
) -> CompilePoint:  # fmt: skip
    missing = {argument: None for argument, kind in types.items() if kind == "constexpr"}
    kept = {argument: kind for argument, kind in types.items() if kind != "constexpr"}
    return make_point(
        name, module, function, kept, missing | constexprs, "N K", num_warps=row.tile.num_warps,
        num_stages=row.tile.num_stages, archs=(arch,),
        values_per_iteration=row.tile.block_n * row.tile.block_k, flops_per_value=2 * row.tile.block_m, **facts,
    )  # fmt: skip


def _grouped(row: TileRow, format: str, arch: str, mode: str, is_even: bool) -> Iterator[CompilePoint]:
    scaling = {"bf16": "none", "fp8_row": "row", "fp8_block": "block"}[format]
    activation = "fp8_group" if format == "fp8_block" else format
    code = "*bf16" if scaling == "none" else "*fp8e4nv"
    scale = "constexpr" if scaling == "none" else "*fp32"
    is_quantized = mode == "gate_up" and activation == "fp8_group"
    types = _types({"x_ptr": code, "xs_ptr": scale, "w_ptr": code, "ws_ptr": scale}, mode, is_quantized=is_quantized,
                   sizes="N K n_tiles") | {"ys_ptr": "*fp32" if is_quantized else "constexpr"}  # fmt: skip
    rate = "bf16" if scaling == "none" else "fp8"
    yield _make(
        _name(format, activation, mode, row, is_even), "grouped_matmul", "_grouped_kernel", types,
        {"TOP_K": TOP_K, "BLOCK_M": row.tile.block_m, "BLOCK_N": row.tile.block_n, "SCALING": scaling,
         "ACTIVATION": "silu" if mode == "gate_up" else "", "HAS_BIAS": False, "QUANTIZE": is_quantized,
         "EVEN_K": is_even},
        row, arch, bits_per_value=get_format(format).bits_per_value, matrix_rate=rate,
        expect=EXPECT["w4a16" if rate == "bf16" else "fp8", arch],
    )  # fmt: skip


def _w4a16(row: TileRow, format: str, arch: str, mode: str, is_even: bool) -> Iterator[CompilePoint]:
    operands = {"x_ptr": "*bf16", "w_ptr": "*i32", "s_ptr": "*i16", "factor_ptr": "*fp32"}
    types = _types(operands, mode, is_quantized=False, sizes="N K n_tiles k_tiles") | {"ys_ptr": "constexpr"}
    constants = SCALE_CONSTANTS[format]
    is_judged = (arch, row.max_tokens) == ("sm_90", 16)
    yield _make(
        _name(format, "bf16", mode, row, is_even), "grouped_fp4", "_grouped_w4a16_kernel", types,
        {"TOP_K": TOP_K, "BLOCK_M": row.tile.block_m, "BLOCKS_N": row.tile.block_n // 64,
         "UNROLL": row.tile.block_k // 128, "SCALE_HALVES": constants["SCALE_HALVES"],
         "SCALE_BITS": [constants["SCALE_MUL"], constants["SCALE_ADD"]],
         "ACTIVATION": "silu" if mode == "gate_up" else "", "FLAGS": [False, False], "EVEN_K": is_even},
        row, arch, bits_per_value=get_format(format).bits_per_value, matrix_rate="bf16", expect=EXPECT["w4a16", arch],
        max_instructions_per_value=W4A16_MAX_INSTRUCTIONS if is_judged else None,
    )  # fmt: skip


def _w4a8(row: TileRow, format: str, arch: str, mode: str, is_even: bool) -> Iterator[CompilePoint]:
    operands = {"x_ptr": "*fp8e4nv", "xs_ptr": "*fp32", "w_ptr": "*i32", "s_ptr": "*i32", "base_ptr": "*bf16"}
    is_group = format == "fp8_group"
    is_quantized = mode == "gate_up" and is_group and row.tile.block_n == 256
    types = _types(operands, mode, is_quantized=is_quantized, sizes="N K n_tiles k_tiles")
    types["ys_ptr"] = "*fp32" if is_quantized else "constexpr"
    is_judged = (arch, row.max_tokens) == ("sm_90", 16)
    for has_group_base in (False, True) if is_judged else (False,):
        yield _make(
            _name("mxfp4", format, mode, row, is_even) + ("/group_base" if has_group_base else ""),
            "grouped_fp4", "_grouped_w4a8_kernel", types,
            {"TOP_K": TOP_K, "BLOCK_M": row.tile.block_m, "BLOCKS_N": row.tile.block_n // 64,
             "UNROLL": row.tile.block_k // 128, "ACTIVATION": "silu" if mode == "gate_up" else "",
             "FLAGS": [False, is_quantized, is_group, has_group_base], "EVEN_K": is_even,
             "STAGES": row.tile.num_stages if has_group_base else None},
            row, arch, bits_per_value=4.25 if has_group_base else 4.125, matrix_rate="fp8", expect=EXPECT["w4a8", arch],
            max_instructions_per_value=W4A8_MAX_INSTRUCTIONS if is_judged else None,
        )  # fmt: skip


def _block_scaled(row: TileRow, pair: str, arch: str, mode: str, is_even: bool) -> Iterator[CompilePoint]:
    if (pair, arch) == ("nvfp4", "sm_90"):  # refused there: Triton 3.6.0 aborts
        return
    weight, activation = BLOCK_SCALED_FORMATS[pair]
    packs = [1 if name == "mxfp8" else 2 for name in (weight, activation)]
    if (pair, arch) == ("mxfp4_mxfp8", "sm_120"):
        packs[0] = 8
    codes, scale = {1: "*fp8e4nv", 2: "*u8", 8: "*i32"}, "*fp8e4nv" if pair == "nvfp4" else "*u8"
    operands = {"x_ptr": codes[packs[1]], "xs_ptr": scale, "w_ptr": codes[packs[0]], "ws_ptr": scale}
    operands["factor_ptr"] = "*fp32" if pair == "nvfp4" else "constexpr"
    types = _types(operands, mode, is_quantized=False, sizes="N K n_tiles")
    native = EXPECT.get((pair, arch), "")
    rate = matrix_rate(get_format(weight), get_format(activation)) if native else "bf16"
    yield _make(
        _name(weight, activation, mode, row, is_even), "grouped_block_scaled", "_grouped_block_scaled_kernel", types,
        {"TOP_K": TOP_K, "BLOCK_M": row.tile.block_m, "BLOCK_K": row.tile.block_k,
         "GROUP": 16 if pair == "nvfp4" else 32, "PACK_W": packs[0], "PACK_X": packs[1],
         "ACTIVATION": "silu" if mode == "gate_up" else "", "FLAGS": [False, pair == "nvfp4"], "EVEN_K": is_even},
        row, arch, bits_per_value=get_format(weight).bits_per_value, matrix_rate=rate, expect=native,
    )  # fmt: skip


_OF_KERNEL = {
    "grouped": _grouped,
    "grouped_w4a16": _w4a16,
    "grouped_w4a8": _w4a8,
    "grouped_block_scaled": _block_scaled,
}


def tile_points(row: TileRow, format: str, arch: str, mode: str, is_even: bool) -> list[CompilePoint]:
    """The points of a row, one of ``TILES`` or a candidate, in one mode, as if it were used on ``arch``."""
    return list(_OF_KERNEL[row.kernel](row, format, arch, mode, is_even))


def grouped_points(rows: Iterable[TileRow] = TILES) -> list[CompilePoint]:
    """Every point of the experts' matmuls, one for rows that differ in their tokens only; names are unique per
    architecture."""
    found: list[CompilePoint] = []
    seen: set[tuple[str, str, str, Tile]] = set()
    for row in rows:
        make = _OF_KERNEL.get(row.kernel)
        if make is None:
            continue
        for format in row.formats:
            for arch in used_on(row, format, COMPILED_ARCHS):
                key = (row.kernel, format, arch, row.tile)
                if key in seen:
                    continue
                seen.add(key)
                for mode in MODES:
                    found += make(row, format, arch, mode, True)
                if (arch, row.max_tokens) == ("sm_90", 16):
                    found += make(row, format, arch, "gate_up", False)
    return found
