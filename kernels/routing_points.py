"""Routing and its schedule as they are compiled. Read by ``bench.inspect``; standard library only.

Values are logits of ``_route_kernel``, rows of the schedule's kernels. No matrix work, no spills anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .compile_point import CONSTEXPR, CompilePoint
from .routing_rule import SUM_FLOOR, Routing
from .routing_tiles import CHUNK, CHUNK_TILE, COUNT_TILE, EXPERT_TILE, SLOTS

ROOM = __package__

ROUTINGS = {
    "gpt-oss": Routing(128, 4),
    "qwen3.5": Routing(512, 10),
    "deepseek-v3": Routing(256, 8, "sigmoid", has_bias=True, num_groups=8, kept_groups=4, scaling_factor=2.5),
    "kimi-k2": Routing(384, 8, "sigmoid", has_bias=True, scaling_factor=2.827),
    "largest": Routing(1024, 16, "softmax", renormalize=False),
}
"""The shapes models have, and the most the kernel takes."""

BF16_LOGITS = ("deepseek-v3", "largest")
"""Also with BF16 logits, which differ in their load alone."""

SCHEDULES = {"deepseek-v3": 256, "largest": 1024}
"""Local experts."""


def _pow2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _point(
    name: str, module: str, function: str, types: dict[str, str], constexprs: dict[str, Any], **facts: Any
) -> CompilePoint:
    return CompilePoint(
        name=name, module=f"{ROOM}.{module}", function=function,
        signature=(*types.items(), *((argument, CONSTEXPR) for argument in constexprs)),
        constexprs=tuple(constexprs.items()),
        aligned=tuple(argument for argument, kind in types.items() if kind.startswith("*")),
        num_stages=3, flops_per_value=0, matrix_rate="bf16", **facts,
    )  # fmt: skip


def _route() -> Iterator[CompilePoint]:
    for model, rule in ROUTINGS.items():
        for logits, bits in (("fp32", 32), ("bf16", 16))[: 2 if model in BF16_LOGITS else 1]:
            types = {"logits_ptr": f"*{logits}", "ids_ptr": "*i32", "weights_ptr": "*fp32", "scaling_factor": "fp32"}
            types |= dict.fromkeys(["stride_lt", "stride_it", "stride_wt"], "i32")
            constants: dict[str, Any] = {
                "NUM_GROUPS": rule.num_groups, "KEPT_GROUPS": rule.kept_groups, "GROUP_SIZE": rule.group_size,
                "TOP_K": rule.top_k, "BLOCK_G": _pow2(rule.num_groups), "BLOCK_S": _pow2(rule.group_size),
                "BLOCK_K": _pow2(rule.top_k), "SCORING": rule.scoring, "RENORMALIZE": rule.renormalize,
                "HAS_BIAS": rule.has_bias, "SUM_FLOOR": SUM_FLOOR,
            }  # fmt: skip
            if rule.has_bias:
                types["bias_ptr"] = "*fp32"
            else:
                constants["bias_ptr"] = None
            yield _point(
                f"route/{model}/{logits}", "routing", "_route_kernel", types, constants,
                num_warps=1, values_per_iteration=rule.num_experts, bits_per_value=bits,
            )  # fmt: skip


def _schedule() -> Iterator[CompilePoint]:
    results = ["expert_offsets_ptr", "row_index_ptr", "position_ptr", "block_expert_ptr", "block_start_ptr"]
    sizes = ["num_rows", "num_blocks", "row_programs", "first_expert"]
    for model, experts in SCHEDULES.items():
        both: dict[str, Any] = {"NUM_LOCAL": experts, "BLOCK_L": max(32, _pow2(experts))}
        tile = {"BLOCK_M": 16, "CHUNK": CHUNK, "SLOTS": SLOTS}
        ids, partial = {"ids_ptr": "*i32"}, {"partial_ptr": "*i32"}
        outputs = dict.fromkeys(results, "*i32") | dict.fromkeys(sizes, "i32")
        rows = {"num_rows": "i32", "first_expert": "i32"}
        for name, types, constants, values in (
            ("schedule", ids | outputs, both | tile | {"COUNT_TILE": COUNT_TILE}, COUNT_TILE),
            ("count_rows", ids | partial | rows, both | {"CHUNK": CHUNK}, CHUNK),
            ("sum_chunks", partial | {"num_chunks": "i32"},
             {"NUM_LOCAL": experts, "CHUNK_TILE": CHUNK_TILE, "EXPERT_TILE": EXPERT_TILE}, CHUNK_TILE * CHUNK),
            ("place", ids | partial | outputs, both | tile, CHUNK),
        ):  # fmt: skip
            yield _point(
                f"{name}/{model}", "moe_schedule", f"_{name}_kernel", types, constants,
                num_warps=4, values_per_iteration=values, bits_per_value=32,
            )  # fmt: skip


def routing_points() -> list[CompilePoint]:
    """Every point, for any architecture."""
    return [*_route(), *_schedule()]
