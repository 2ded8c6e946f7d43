"""Paged attention as it is compiled, and what a call of it must do. Read by ``bench.inspect``; standard library only.

A name is ``attention/KV-bf16/dHEAD_DIM-rROWS/pPAGE_SIZE``, ROWS the query rows of a program; ``/prefix`` without causal
order. Values are those of K and V. The options compiled with a head dim are those of models that have it: sinks and a
window with 64 (gpt-oss), a window with 128, a window and capped scores with 256 (Gemma 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .compile_point import CompilePoint
from .formats import get_format
from .kv_layout import KvLayout
from .matmul_points import COMPILED_ARCHS, make_point
from .tiles import ANY_NUMBER, PARTED_ARCHS, TILES, TileRow, used_on

if TYPE_CHECKING:
    from .registry import Work

OPTIONS = {
    64: {"sinks_ptr": "*fp32", "window": "i32"},
    128: {"window": "i32"},
    256: {"window": "i32", "soft_cap": "fp32"},
}


def register_options(num_warps: int) -> dict[str, int]:
    """Launch options: with four warps the assembler would rather spill than use more than 128 or 168 registers, for
    more CTAs per SM than the two of a plan."""
    return {"maxnreg": 255} if num_warps == 4 else {}


_ALL_OPTIONS = ("sinks_ptr", "soft_cap", "window")
_CODES = {"bf16": "*bf16", "mxfp4": "*i32", "nvfp4": "*i32"}

MAX_INSTRUCTIONS = {"fp8": 4.4, "fp8_row": 4.4, "mxfp4": 6.2, "nvfp4": 6.2}
"""SASS instructions per value of K and V on sm_90, with the fewest rows and head dim 128: half of what an H100 can
issue per FP8 value at full bandwidth (8.8), and for FP4 what an H200 can (6.2)."""

SCORED_TWICE = {("sm_120", 32, 4)}
"""Architecture, tokens and warps with which two warps compute the scores of the same tokens."""


def _expected(format: str, arch: str, tokens: int) -> str:
    """The matrix instruction: a warpgroup's, or tensor memory's, from 64 tokens on, else a warp's.

    A warp's FP8 one is used on sm_120 only: elsewhere Triton widens both sides to FP16.
    """
    kind = "Q" if get_format(format).element == "e4m3" else "H"
    if arch == "sm_120" or tokens < 64:
        return f"^{kind if arch == 'sm_120' else 'H'}MMA"
    return f"^{kind}GMMA" if arch == "sm_90" else f"^UTC{kind}MMA"


def _point(row: TileRow, format: str, arch: str, page_size: int, is_prefix: bool) -> CompilePoint:
    head_dim, tile = int(row.kernel.removeprefix("attention_d")), row.tile
    pointers = "factors_ptr:*fp32 table_ptr:*i32 plan_ptr:*i32 out_ptr:*bf16 lse_ptr:*fp32 parts_ptr:*fp32"
    types = {"q_ptr": "*bf16", "codes_ptr": _CODES.get(format, "*fp8e4nv")}
    types |= dict(pair.split(":") for pair in pointers.split())
    types |= {"parts_lse_ptr": "*fp32", "stride_qt": "i32", "stride_table": "i32", "q_len": "i32", "scale": "fp32"}
    types |= {"split_tiles": "i32"} | ({} if is_prefix else OPTIONS[head_dim])
    constexprs: dict[str, Any] = {
        "FORMAT": format, "HEAD_DIM": head_dim, "GROUP": min(8, tile.block_m), "PAGE": page_size,
        "IS_CAUSAL": not is_prefix, "IS_JOINED": arch not in PARTED_ARCHS, "BLOCK_N": tile.block_n,
        "BLOCK_R": tile.block_m,
    } | {name: None for name in _ALL_OPTIONS if name not in types}  # fmt: skip
    is_fp8 = get_format(format).element == "e4m3"
    is_judged = (arch, head_dim) == ("sm_90", 128) and tile.block_m <= 16 and format in MAX_INSTRUCTIONS
    terms = 2 if is_fp8 else 1
    rows = "any" if row.max_tokens == ANY_NUMBER else str(row.max_tokens)
    return make_point(
        f"attention/{format}-bf16/d{head_dim}-r{rows}-{tile.block_m}/p{page_size}{'/prefix' if is_prefix else ''}",
        "paged_attention", "_paged_attention_kernel", types, constexprs, "stride_qt",
        values_per_iteration=2 * tile.block_n * head_dim,
        bits_per_value=KvLayout(format, head_dim, page_size).bits_per_value,
        flops_per_value=2 * tile.block_m * terms * (1.5 if (arch, tile.block_n, tile.num_warps) in SCORED_TWICE else 1),
        matrix_rate="fp8" if is_fp8 and tile.block_n >= 64 else "bf16", expect=_expected(format, arch, tile.block_n),
        max_instructions_per_value=MAX_INSTRUCTIONS[format] if is_judged else None,
        num_warps=tile.num_warps, num_stages=tile.num_stages, archs=(arch,),
        options=tuple(register_options(tile.num_warps).items()),
    )  # fmt: skip


def tile_points(row: TileRow, format: str, arch: str, page_size: int) -> list[CompilePoint]:
    """The points of a row, one of ``TILES`` or a candidate, as if it were used on ``arch``."""
    return [_point(row, format, arch, page_size, is_prefix=False)]


def _row_points(row: TileRow, format: str) -> Iterator[CompilePoint]:
    """Pages smaller than a tile, and the prefix's pass, on one architecture: they differ in loads and masks alone."""
    for arch in used_on(row, format, COMPILED_ARCHS):
        yield _point(row, format, arch, 64, is_prefix=False)
        if arch == "sm_90":
            if row.tile.block_m <= 16:
                yield _point(row, format, arch, 16, is_prefix=False)
            if row.max_tokens == ANY_NUMBER and row.kernel == "attention_d128":
                yield _point(row, format, arch, 64, is_prefix=True)


def attention_points() -> list[CompilePoint]:
    """Every row of the tiles, wherever it is used; one name appears once per architecture."""
    rows = [row for row in TILES if row.kernel.startswith("attention_d")]
    return [point for row in rows for format in row.formats for point in _row_points(row, format)]


class PlanPoint(NamedTuple):
    """A launch beside the attention's own."""

    name: str
    function: str
    types: str
    constexprs: dict[str, Any]
    num_warps: int
    values: int


_PLANS = (
    PlanPoint(
        "attention_plan/b256", "_plan_kernel",
        "lengths_ptr:*i32 plan_ptr:*i32 batch:i32 num_programs:i32 q_len:i32 window:i32 split_tiles:i32 overhead:i32",
        {"BLOCK_N": 64, "BLOCK_B": 256, "BLOCK_P": 16}, 4, 256,
    ),
    PlanPoint(
        "attention_combine/d128", "_combine_parts_kernel",
        "parts_ptr:*fp32 parts_lse_ptr:*fp32 plan_ptr:*i32 sinks_ptr:*fp32 out_ptr:*bf16 lse_ptr:*fp32 "
        "num_programs:i32 q_len:i32 num_heads:i32",
        {"HEAD_DIM": 128, "PIECES": 8}, 2, 1024,
    ),
    PlanPoint(
        "attention_combine/d512", "_combine_parts_kernel",
        "parts_ptr:*fp32 parts_lse_ptr:*fp32 plan_ptr:*i32 out_ptr:*bf16 lse_ptr:*fp32 num_programs:i32 q_len:i32 "
        "num_heads:i32",
        {"HEAD_DIM": 512, "PIECES": 8, "sinks_ptr": None}, 2, 4096,
    ),
)  # fmt: skip


def plan_points() -> list[CompilePoint]:
    """The plan and the sum of parts, for any architecture. Values: sequences, and float32 of a part."""
    return [
        make_point(
            each.name, "attention_plan", each.function, dict(pair.split(":") for pair in each.types.split()),
            each.constexprs, "", values_per_iteration=each.values, bits_per_value=32, flops_per_value=0,
            matrix_rate="bf16", num_warps=each.num_warps, num_stages=3,
        )
        for each in _PLANS
    ]  # fmt: skip


def kv_tokens(shape: Mapping[str, int]) -> int:
    """Cached tokens that each sequence reads."""
    return min(shape["length"], shape["window"] + shape["q_len"] - 1) if shape["window"] else shape["length"]


def attention_work(format: str) -> Callable[[Mapping[str, int]], Work]:
    """Of a shape of ``attention_runs.py``: each cached token once, however large q_len is; q and o once."""

    def work(shape: Mapping[str, int]) -> Work:
        from .registry import Work

        bits = KvLayout(format, shape["head_dim"], shape["page_size"]).bits_per_value
        tokens = shape["batch"] * kv_tokens(shape)
        cached = tokens * 2 * shape["num_kv_heads"] * shape["head_dim"] * bits / 8
        rows = shape["batch"] * shape["q_len"] * shape["num_heads"] * shape["head_dim"]
        return Work(round(cached), 4 * rows, 4.0 * rows * kv_tokens(shape))

    return work
