"""The matmuls as they are compiled: a tile per architecture, what its hot loop must contain, and at what price.

Read by ``bench.inspect``; standard library only. Values are weights. Every point compiles without spills.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .compile_point import CONSTEXPR, CompilePoint
from .formats import FP8, FP8_BLOCK, MXFP4, MXFP8, NVFP4

ROOM = __package__

W4A16_MAX_INSTRUCTIONS = 2.55
"""Aim: 2.5. MXFP4 takes 2.41 with Triton 3.6.0, NVFP4 2.51: its scales change every 16 values."""


def _point(name: str, module: str, function: str, types: dict[str, str], constexprs: dict[str, Any], aligned: str,
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


def _w4a16() -> Iterator[CompilePoint]:
    sizes = "M N K stride_xm stride_ym stride_ys k_tiles k_tiles_per_split"
    for row, constants in (
        (MXFP4, {"SCALE_HALVES": 1, "SCALE_MUL": 0x00800080, "SCALE_ADD": 0}),
        (NVFP4, {"SCALE_HALVES": 2, "SCALE_MUL": 0x00100010, "SCALE_ADD": 0x75807580}),
    ):
        types = {"x_ptr": "*bf16", "w_ptr": "*i32", "s_ptr": "*i16", "factor_ptr": "*fp32", "y_ptr": "*bf16"}
        types |= dict.fromkeys(sizes.split(), "i32")
        yield _point(
            f"w4a16/{row.name}/m16", "w4a16_matmul", "_w4a16_kernel", types,
            {"BLOCK_M": 16, "BLOCKS_N": 4, "UNROLL": 2, "EVEN_K": True} | constants, "N K stride_xm stride_ym",
            num_warps=4, num_stages=4, values_per_iteration=256 * 128 * 2, bits_per_value=row.bits_per_value,
            flops_per_value=32, matrix_rate="bf16", expect=r"^HGMMA", archs=("sm_90",),
            max_instructions_per_value=W4A16_MAX_INSTRUCTIONS,
        )  # fmt: skip


def _fp8() -> Iterator[CompilePoint]:
    expect = {"sm_90": "^QGMMA", "sm_100": "^UTCQMMA", "sm_120": "^QMMA"}
    for scaling in ("tensor", "row", "block"):
        bits = (FP8_BLOCK if scaling == "block" else FP8).bits_per_value
        for arch, instruction in expect.items():
            for block_m, num_warps in ((16, 4), (64, 8)):
                sizes = "M N K stride_xm stride_wn stride_xsm stride_wsn stride_ym stride_ys k_tiles k_tiles_per_split"
                types = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "xs_ptr": "*fp32", "ws_ptr": "*fp32"}
                types |= {"y_ptr": "*bf16"} | dict.fromkeys(sizes.split(), "i32")
                yield _point(
                    f"fp8/{scaling}/m{block_m}", "fp8_matmul", "_fp8_few_tokens_kernel", types,
                    {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 128, "SCALING": scaling, "EVEN_K": True},
                    "N K stride_xm stride_wn stride_ym", num_warps=num_warps, num_stages=4,
                    values_per_iteration=128 * 128, bits_per_value=bits, flops_per_value=2 * block_m,
                    matrix_rate="fp8", expect=instruction, archs=(arch,),
                )  # fmt: skip


def _block_scaled() -> Iterator[CompilePoint]:
    sizes = "A B K stride_a stride_b stride_as stride_bs stride_ya stride_yb stride_ys k_tiles_per_split"
    expect = {
        ("mxfp8", "sm_100"): "kind::mxf8f6f4.block_scale", ("mxfp8", "sm_120"): "^QMMA.SF",
        ("mxfp4", "sm_100"): "kind::mxf4.block_scale", ("mxfp4", "sm_120"): "^OMMA.SF",
        ("nvfp4", "sm_100"): "kind::mxf4nvf4.block_scale", ("nvfp4", "sm_120"): "^OMMA.SF.*UE4M3",
        ("w4a8", "sm_100"): "kind::mxf8f6f4.block_scale",
    }  # fmt: skip
    for (name, arch), instruction in expect.items():
        row = {"mxfp8": MXFP8, "nvfp4": NVFP4}.get(name, MXFP4)
        pack_a, pack_b = {"mxfp8": (1, 1), "w4a8": (2, 1)}.get(name, (2, 2))
        block_k = 256 if pack_b == 2 else 128
        scale = "*fp8e4nv" if row is NVFP4 else "*u8"
        codes = {1: "*fp8e4nv", 2: "*u8"}
        types = {"a_ptr": codes[pack_a], "b_ptr": codes[pack_b], "as_ptr": scale, "bs_ptr": scale}
        types |= {"factor_ptr": "*fp32", "y_ptr": "*bf16"} | dict.fromkeys(sizes.split(), "i32")
        for block_m, num_warps in ((16, 4), (64, 8)):
            yield _point(
                f"block_scaled/{name}/m{block_m}", "block_scaled_matmul", "_block_scaled_kernel", types,
                {"BLOCK_A": 128, "BLOCK_B": block_m, "BLOCK_K": block_k, "PACK_A": pack_a, "PACK_B": pack_b,
                 "GROUP": 16 if row is NVFP4 else 32, "EVEN_K": True, "GROUP_A": 8},
                "K stride_a stride_b stride_yb", num_warps=num_warps, num_stages=3,
                values_per_iteration=128 * block_k, bits_per_value=row.bits_per_value, flops_per_value=2 * block_m,
                matrix_rate="fp4" if pack_b == 2 else "fp8", expect=instruction, archs=(arch,),
            )  # fmt: skip


def matmul_points() -> list[CompilePoint]:
    """Every point of the matmuls; one name appears once per architecture."""
    return [*_w4a16(), *_fp8(), *_block_scaled()]
