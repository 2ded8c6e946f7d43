"""The matmuls as they are compiled: every row of ``tiles.py``, what its hot loop must contain, and at what price.

Read by ``bench.inspect``; standard library only. A name is ``gemm/WEIGHT-ACTIVATION/mTOKENS``, with ``default`` for
rows that are not an architecture's own and ``tail`` where K does not divide by the tile. Values are weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .compile_point import CONSTEXPR, CompilePoint
from .formats import get_format
from .tiles import ANY_NUMBER, TILES, TileRow, used_on

ROOM = __package__

COMPILED_ARCHS = ("sm_90", "sm_100", "sm_120")
"""sm_103 runs the tiles of sm_100."""

W4A16_MAX_INSTRUCTIONS = 2.5
"""On sm_90 with 16 tokens. MXFP4 takes 2.36; NVFP4, whose scales change every 16 values, 2.46 (Triton 3.6.0)."""

W4A8_MAX_INSTRUCTIONS = 2.0
"""On sm_90 with 16 tokens: 1.43 with a scale per token and a base per row, 1.71 with both per 128 (Triton 3.6.0)."""

SCALE_CONSTANTS = {
    "mxfp4": {"SCALE_HALVES": 1, "SCALE_MUL": 0x00800080, "SCALE_ADD": 0},
    "nvfp4": {"SCALE_HALVES": 2, "SCALE_MUL": 0x00100010, "SCALE_ADD": 0x75807580},
}
"""Of ``w4a16_matmul``, by format."""

FP8_FORMATS = {"tensor": ("fp8", "fp8"), "row": ("fp8_row", "fp8_row"), "block": ("fp8_block", "fp8_group")}
"""Scaling of ``fp8_matmul`` to formats of weights and activations."""

BLOCK_SCALED_FORMATS = {
    "mxfp8": ("mxfp8", "mxfp8"), "mxfp4": ("mxfp4", "mxfp4"), "nvfp4": ("nvfp4", "nvfp4"),
    "mxfp4_mxfp8": ("mxfp4", "mxfp8"),
}  # fmt: skip
"""Pair of ``block_scaled_matmul`` to formats of weights and activations."""

EXPECT = {
    ("w4a16", "sm_90"): "^HGMMA", ("w4a16", "sm_100"): "^UTCHMMA", ("w4a16", "sm_120"): "^HMMA",
    ("w4a8", "sm_90"): "^QGMMA", ("w4a8", "sm_100"): "^UTCQMMA", ("w4a8", "sm_120"): "^QMMA",
    ("fp8", "sm_90"): "^QGMMA", ("fp8", "sm_100"): "^UTCQMMA", ("fp8", "sm_120"): "^QMMA",
    ("mxfp8", "sm_100"): "kind::mxf8f6f4.block_scale", ("mxfp8", "sm_120"): "^QMMA.SF",
    ("mxfp4", "sm_100"): "kind::mxf4.block_scale", ("mxfp4", "sm_120"): "^OMMA.SF",
    ("nvfp4", "sm_100"): "kind::mxf4nvf4.block_scale", ("nvfp4", "sm_120"): "^OMMA.SF.*UE4M3",
    ("mxfp4_mxfp8", "sm_100"): "kind::mxf8f6f4.block_scale", ("mxfp4_mxfp8", "sm_120"): "^QMMA.SF",
}  # fmt: skip
"""Of a block-scaled pair without an entry Triton widens both sides to BF16."""


def make_point(name: str, module: str, function: str, types: dict[str, str], constexprs: dict[str, Any], aligned: str,
           **facts: Any) -> CompilePoint:  # fmt: skip
    pointers = tuple(argument for argument, kind in types.items() if kind.startswith("*"))
    return CompilePoint(
        name=name,
        module=f"{ROOM}.{module}",
        function=function,
        signature=(*types.items(), *((argument, CONSTEXPR) for argument in constexprs)),
        constexprs=tuple(constexprs.items()),
        aligned=(*pointers, *aligned.split()),
        **facts,
    )


def _name(weight: str, activation: str, row: TileRow, is_even: bool) -> str:
    tokens = "any" if row.max_tokens == ANY_NUMBER else row.max_tokens
    tile = row.tile
    size = f"m{tokens}-{tile.block_m}x{tile.block_n}"
    return f"gemm/{weight}-{activation}/{size}{'' if row.archs else '/default'}{'' if is_even else '/tail'}"


def _facts(row: TileRow, arch: str) -> dict[str, Any]:
    return {"num_warps": row.tile.num_warps, "num_stages": row.tile.num_stages, "archs": (arch,)}


def _w4a16(row: TileRow, format: str, arch: str, is_even: bool) -> Iterator[CompilePoint]:
    sizes = "M N K stride_xm stride_ym stride_ys k_tiles k_tiles_per_split"
    types = {"x_ptr": "*bf16", "w_ptr": "*i32", "s_ptr": "*i16", "factor_ptr": "*fp32", "y_ptr": "*bf16"}
    tile, is_judged = row.tile, arch == "sm_90" and row.max_tokens == 16 and is_even
    yield make_point(
        _name(format, "bf16", row, is_even), "w4a16_matmul", "_w4a16_kernel",
        types | dict.fromkeys(sizes.split(), "i32"),
        {"BLOCK_M": tile.block_m, "BLOCKS_N": tile.block_n // 64, "UNROLL": tile.block_k // 128, "EVEN_K": is_even}
        | SCALE_CONSTANTS[format],
        "N K stride_xm stride_ym", values_per_iteration=tile.block_n * tile.block_k,
        bits_per_value=get_format(format).bits_per_value, flops_per_value=2 * tile.block_m, matrix_rate="bf16",
        expect=EXPECT["w4a16", arch], max_instructions_per_value=W4A16_MAX_INSTRUCTIONS if is_judged else None,
        **_facts(row, arch),
    )  # fmt: skip


def _w4a8(row: TileRow, format: str, arch: str, is_even: bool) -> Iterator[CompilePoint]:
    """A base per row of w, and one per 128 of k."""
    sizes = "M N K stride_xm stride_xs stride_base stride_ym stride_ys k_tiles k_tiles_per_split"
    types = {"x_ptr": "*fp8e4nv", "xs_ptr": "*fp32", "w_ptr": "*i32", "s_ptr": "*i32", "base_ptr": "*bf16"}
    types |= {"y_ptr": "*bf16"} | dict.fromkeys(sizes.split(), "i32")
    tile = row.tile
    for has_group_base in (False, True):
        yield make_point(
            _name("mxfp4", format, row, is_even) + ("/group_base" if has_group_base else ""),
            "w4a8_matmul", "_w4a8_kernel", types,
            {"BLOCK_M": tile.block_m, "BLOCKS_N": tile.block_n // 64, "UNROLL": tile.block_k // 128,
             "GROUP_X": format == "fp8_group", "GROUP_BASE": has_group_base, "EVEN_K": is_even,
             "STAGES": tile.num_stages if has_group_base else None},
            "N K stride_xm stride_ym stride_base", values_per_iteration=tile.block_n * tile.block_k,
            bits_per_value=4.25 if has_group_base else 4.125, flops_per_value=2 * tile.block_m, matrix_rate="fp8",
            expect=EXPECT["w4a8", arch],
            max_instructions_per_value=W4A8_MAX_INSTRUCTIONS if (arch, row.max_tokens) == ("sm_90", 16) else None,
            **_facts(row, arch),
        )  # fmt: skip


def _fp8(row: TileRow, scaling: str, arch: str, is_even: bool) -> Iterator[CompilePoint]:
    sizes = "M N K stride_xm stride_wn stride_xsm stride_wsn stride_ym stride_ys k_tiles k_tiles_per_split"
    types = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "xs_ptr": "*fp32", "ws_ptr": "*fp32", "y_ptr": "*bf16"}
    weight, activation = FP8_FORMATS[scaling]
    tile = row.tile
    yield make_point(
        _name(weight, activation, row, is_even), "fp8_matmul", "_fp8_few_tokens_kernel",
        types | dict.fromkeys(sizes.split(), "i32"),
        {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SCALING": scaling, "EVEN_K": is_even},
        "N K stride_xm stride_wn stride_ym", values_per_iteration=tile.block_n * tile.block_k,
        bits_per_value=get_format(weight).bits_per_value, flops_per_value=2 * tile.block_m, matrix_rate="fp8",
        expect=EXPECT["fp8", arch], **_facts(row, arch),
    )  # fmt: skip


def _fp8_many(row: TileRow, scaling: str, arch: str, is_even: bool) -> Iterator[CompilePoint]:
    if not is_even:  # descriptors know the tail themselves
        return
    tile, sizes = row.tile, "M N stride_xsm stride_wsn stride_ym k_tiles num_programs"
    types = {side: f"tensordesc<fp8e4nv[{rows},{tile.block_k}]>"
             for side, rows in (("x_desc", tile.block_m), ("w_desc", tile.block_n))}  # fmt: skip
    types |= {"xs_ptr": "*fp32", "ws_ptr": "*fp32", "y_ptr": "*bf16"} | dict.fromkeys(sizes.split(), "i32")
    weight, activation = FP8_FORMATS[scaling]
    yield make_point(
        _name(weight, activation, row, is_even), "fp8_matmul", "_fp8_many_tokens_kernel", types,
        {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "SCALING": scaling, "GROUP_M": 8},
        "N stride_ym", values_per_iteration=tile.block_n * tile.block_k,
        bits_per_value=get_format(weight).bits_per_value, flops_per_value=2 * tile.block_m, matrix_rate="fp8",
        expect=EXPECT["fp8", arch], **_facts(row, arch),
    )  # fmt: skip


def _block_scaled(row: TileRow, pair: str, arch: str, is_even: bool) -> Iterator[CompilePoint]:
    if (pair, arch) == ("nvfp4", "sm_90"):  # refused there: Triton 3.6.0 aborts
        return
    sizes = "A B K stride_a stride_b stride_as stride_bs stride_ya stride_yb stride_ys k_tiles_per_split"
    weight, activation = BLOCK_SCALED_FORMATS[pair]
    packs = {name: 1 if name == "mxfp8" else 2 for name in (weight, activation)}
    if (pair, arch) == ("mxfp4_mxfp8", "sm_120"):
        packs["mxfp4"] = 8  # words of eight codes, expanded to E4M3
    codes = {1: "*fp8e4nv", 2: "*u8", 8: "*i32"}
    # up to 64 tokens the weights are operand a, beyond them the tokens
    tile, is_few = row.tile, row.max_tokens != ANY_NUMBER
    sides = ((weight, tile.block_n), (activation, tile.block_m))
    (a, block_a), (b, block_b) = sides if is_few else sides[::-1]
    scale = "*fp8e4nv" if pair == "nvfp4" else "*u8"
    types = {"a_ptr": codes[packs[a]], "b_ptr": codes[packs[b]], "as_ptr": scale, "bs_ptr": scale}
    types |= {"factor_ptr": "*fp32", "y_ptr": "*bf16"} | dict.fromkeys(sizes.split(), "i32")
    native = EXPECT.get((pair, arch), "")
    yield make_point(
        _name(weight, activation, row, is_even), "block_scaled_matmul", "_block_scaled_kernel", types,
        {"BLOCK_A": block_a, "BLOCK_B": block_b, "BLOCK_K": tile.block_k, "PACK_A": packs[a], "PACK_B": packs[b],
         "GROUP": 16 if pair == "nvfp4" else 32, "EVEN_K": is_even, "GROUP_A": 8},
        "K stride_a stride_b stride_yb", values_per_iteration=tile.block_n * tile.block_k,
        bits_per_value=get_format(weight).bits_per_value, flops_per_value=2 * tile.block_m,
        matrix_rate=("fp4" if activation != "mxfp8" else "fp8") if native else "bf16", expect=native,
        **_facts(row, arch),
    )  # fmt: skip


_OF_KERNEL = {"w4a16": _w4a16, "w4a8": _w4a8, "fp8": _fp8, "fp8_many": _fp8_many, "block_scaled": _block_scaled}


def tile_points(row: TileRow, format: str, arch: str, is_even: bool) -> list[CompilePoint]:
    """The points of a row, one of ``TILES`` or a candidate, as if it were used on ``arch``."""
    return list(_OF_KERNEL[row.kernel](row, format, arch, is_even))


def row_points(row: TileRow, format: str) -> Iterator[CompilePoint]:
    """The points of one row for one of its formats: wherever it is used, K that divides and K that does not."""
    for arch in used_on(row, format, COMPILED_ARCHS):
        for is_even in (True, False):
            yield from _OF_KERNEL[row.kernel](row, format, arch, is_even)


def matmul_points(rows: Iterable[TileRow] = TILES) -> list[CompilePoint]:
    """Every point of the matmuls; one name appears once per architecture."""
    return [
        point for row in rows if row.kernel in _OF_KERNEL for format in row.formats for point in row_points(row, format)
    ]
