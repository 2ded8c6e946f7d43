"""A recorded point as the op of a decode plan: the inverse of ``targets.op_shapes`` where a stack has such rows."""

from __future__ import annotations

from .ops import Experts, Gemm, MlaAttention, Op, PagedAttention
from .record import Point

_LOADS = {0: "balanced", 101: "power_law_1.01", 120: "power_law_1.2"}


def op_of(point: Point) -> Op | None:
    """The op that ``point`` measured; None where published tables have none like it (quantizers, appends, a copy)."""
    shape, formats = point.shape, point.formats
    if point.op == "gemm":
        return Gemm(shape["m"], shape["n"], shape["k"], formats["weight"], formats["activation"])
    if point.op == "moe" and shape["load"] in _LOADS:
        sizes = (shape[name] for name in ("num_tokens", "hidden", "inter", "top_k", "num_experts", "ep"))
        return Experts(
            *sizes, weight=formats["weight"], activation=formats["activation"], load=_LOADS[shape["load"]]
        )  # fmt: skip
    if point.op == "attention":
        return PagedAttention(
            shape["batch"], shape["length"], shape["num_heads"], shape["num_kv_heads"], shape["head_dim"],
            shape["window"] or None, formats["weight"], shape["q_len"],
        )  # fmt: skip
    if point.op == "mla":
        return MlaAttention(
            shape["batch"], shape["length"], shape["num_heads"], shape["kv_lora_rank"], shape["rope_dim"],
            formats["weight"], shape["q_len"],
        )  # fmt: skip
    return None
