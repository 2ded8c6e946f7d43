"""MLA attention as it is compiled: every row of ``tiles.py``, what its hot loop must contain; and what a call must do.

Read by ``bench.inspect`` and the registry; standard library only. A name is ``mla/KVFORMAT-bf16/rROWS-BLOCKxTOKENS``,
with ``default`` for rows of the table that are not an architecture's own and ``drafts`` where several query tokens
are compiled for. Values are those of the cache, latent and rotated part alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from .compile_point import CompilePoint
from .kv_layout import MlaLayout
from .matmul_points import COMPILED_ARCHS, make_point
from .tiles import ANY_NUMBER, TILES, TileRow, used_on

if TYPE_CHECKING:
    from .registry import Work

RANK, ROPE, PAGE = 512, 64, 64
"""DeepSeek's latent, and the page of most servers."""

MOST_ROWS = 128
"""Rows that a limit of any number is compiled for: DeepSeek's heads."""

EXPECT = {"sm_90": "^HGMMA", "sm_100": "^(UTC)?HMMA", "sm_120": "^HMMA"}
"""With 64 rows on sm_90; fewer run on warp instructions everywhere."""


def computed_in_branch(block_m: int, arch: str) -> bool:
    """Whether scores are computed in a branch, see ``mla_attention._attend_tile``; "" is the interpreter."""
    return block_m >= 64 and arch in ("", "sm_90")


def _point(row: TileRow, format: str, arch: str, has_drafts: bool) -> CompilePoint:
    tile = row.tile
    rows = MOST_ROWS if row.max_tokens == ANY_NUMBER else row.max_tokens
    pointers = dict.fromkeys(["factors_ptr", "lse_ptr", "parts_ptr", "parts_lse_ptr", "scales_ptr"], "*fp32")
    pointers |= {"q_ptr": "*bf16", "out_ptr": "*bf16", "table_ptr": "*i32", "plan_ptr": "*i32"}
    pointers["codes_ptr"] = "*bf16" if format == "bf16" else "*fp8e4nv"
    types = pointers | {"stride_table": "i32", "scale": "fp32", "split_tiles": "i32"}
    constexprs = {
        "FORMAT": format, "HEADS": rows // 4 if has_drafts else rows, "RANK": RANK, "ROPE": ROPE, "PAGE": PAGE,
        "IS_CAUSAL": True, "BLOCK_N": tile.block_n, "BLOCK_R": tile.block_m, "WIDTH": tile.block_k,
        "IN_BRANCH": computed_in_branch(tile.block_m, arch),
    }  # fmt: skip
    if has_drafts:
        types["q_len"] = "i32"
    else:
        constexprs["q_len"] = 1
    scored = 2 if (tile.block_m, tile.block_n) == (16, 32) else 1  # by two halves of the warps alike
    limit = "any" if row.max_tokens == ANY_NUMBER else str(row.max_tokens)
    name = f"mla/{format}-bf16/r{limit}-{tile.block_m}x{tile.block_n}"
    return make_point(
        name + ("" if row.archs else "/default") + ("/drafts" if has_drafts else ""),
        "mla_attention", "_mla_attention_kernel", types, constexprs, "",
        values_per_iteration=tile.block_n * (RANK + ROPE),
        bits_per_value=MlaLayout(format, RANK, ROPE, PAGE).bits_per_value,
        flops_per_value=2 * tile.block_m * (scored * (RANK + ROPE) + RANK) / (RANK + ROPE), matrix_rate="bf16",
        expect="^HMMA" if tile.block_m < 64 else EXPECT[arch],
        num_warps=tile.num_warps, num_stages=tile.num_stages, archs=(arch,),
    )  # fmt: skip


def tile_points(row: TileRow, format: str, arch: str) -> list[CompilePoint]:
    """The points of a row, one of ``TILES`` or a candidate, as if used on ``arch``: a query token, and drafts."""
    return [_point(row, format, arch, has_drafts) for has_drafts in (False, True)]


def _points() -> Iterator[CompilePoint]:
    for row in TILES:
        if row.kernel == "mla_attention":
            for format in row.formats:
                for arch in used_on(row, format, COMPILED_ARCHS):
                    for has_drafts in (False, True):
                        yield _point(row, format, arch, has_drafts)


def mla_points() -> list[CompilePoint]:
    """Every point; one name appears once per architecture."""
    return list(_points())


def mla_work(kv_format: str) -> Callable[[Mapping[str, int]], Work]:
    """Of a shape of ``mla_runs.py``: every cached token once, q and o once."""

    def work(shape: Mapping[str, int]) -> Work:
        from .registry import Work

        rank, rope = shape["kv_lora_rank"], shape["rope_dim"]
        layout = MlaLayout(kv_format, rank, rope, shape["page_size"])
        tokens = shape["batch"] * shape["length"]
        rows = shape["batch"] * shape["q_len"] * shape["num_heads"]
        cached = tokens * layout.record_bytes // layout.page_size
        # a query token does not see the ones after it
        pairs = rows * (shape["length"] - (shape["q_len"] - 1) / 2)
        return Work(cached, rows * (2 * rank + rope) * 2, 2.0 * pairs * (2 * rank + rope))

    return work
