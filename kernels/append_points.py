"""The append kernels as they are compiled, and the bytes they must move. Read by ``bench.inspect`` and by the registry;
standard library only.

A name is ``rope_append/FORMAT/dHEAD_DIM/STYLE``, with ``/norm`` where q and k are normalised, or
``mla_append/FORMAT/LATENT+ROPE/STYLE``, with ``/bare`` without norm and queries. Values are those that one program
reads. A kernel holds the ways of queries, keys and values beside one another, so instructions per value count more
than any program runs. No matrix work, no spills.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .append_tiles import append_kv_launch, append_mla_launch
from .compile_point import CONSTEXPR, CompilePoint
from .formats import get_format
from .kv_layout import KV_FORMATS, MLA_FORMATS, KvLayout, MlaLayout
from .quantize_tiles import EXACT, Launch

if TYPE_CHECKING:
    from .registry import Work

ROOM = __package__

COMPILED_ARCHS = ("sm_90", "sm_100", "sm_120")

NUM_HEADS, NUM_KV_HEADS = 64, 8
"""Of the GQA points: Llama-3-70B, Qwen3-32B and gpt-oss have as many."""

PAGE_SIZE = 64

MLA_HEADS = 128
MLA_WIDTHS = (512, 64)
"""DeepSeek's and Kimi's."""

FULL = "half", "half/norm", "interleaved"
"""What ``FULL_FORMAT`` is compiled with."""

FULL_FORMAT = "nvfp4"
"""The format that takes most registers."""

MLA_FULL = "interleaved", "half", "half/bare"
MLA_FULL_FORMAT = "fp8_row"
"""The same of MLA."""

HEAD_DIMS_FORMATS = ((64, "mxfp4"), (256, "fp8_row"), (256, "nvfp4"))
"""Where halves of a head are smallest, and where rows are widest."""


def _typed(pointers: dict[str, str], numbers: dict[str, int | float], launch: Launch, **facts: Any) -> CompilePoint:
    types = pointers | {name: "fp32" if isinstance(value, float) else "i32" for name, value in numbers.items()}
    ones = {name: 1 for name, value in numbers.items() if value == 1}  # Triton makes them constants
    missing: dict[str, Any] = {name: None for name, kind in pointers.items() if kind == "none"}
    constants = launch.constants | ones | missing
    aligned = [name for name in types if name not in constants
               and (name in pointers or (isinstance(numbers[name], int) and numbers[name] % 16 == 0))]  # fmt: skip
    return CompilePoint(
        signature=tuple((types | dict.fromkeys(constants, CONSTEXPR)).items()), constexprs=tuple(constants.items()),
        aligned=tuple(aligned), num_warps=launch.num_warps, num_stages=3, flops_per_value=0, matrix_rate="bf16",
        archs=COMPILED_ARCHS, options=tuple(EXACT.items()), **facts,
    )  # fmt: skip


def _gqa(format: str, head_dim: int, kind: str) -> CompilePoint:
    layout, (style, *norm) = KvLayout(format, head_dim, PAGE_SIZE), kind.split("/")
    launch = append_kv_launch(layout, NUM_KV_HEADS, head_dim, style)
    norms = dict.fromkeys(("q_norm_ptr", "k_norm_ptr"), "*bf16" if norm else "none")
    pointers = {"qkv_ptr": "*bf16", "positions_ptr": "*i64", "cos_sin_ptr": "*fp32", **norms, "slots_ptr": "*i64",
                "pages_ptr": "*u8", "factors_ptr": "*fp32", "q_ptr": "*bf16"}  # fmt: skip
    all_heads = NUM_HEADS + 2 * NUM_KV_HEADS
    numbers: dict[str, int | float] = {
        "num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "eps": 1e-6, "stride_xt": all_heads * head_dim,
        "stride_qt": NUM_HEADS * head_dim, "stride_qh": head_dim,
    }  # fmt: skip
    written = NUM_HEADS * head_dim * 2 + NUM_KV_HEADS * layout.record_bytes / PAGE_SIZE
    return _typed(
        pointers, numbers, launch, name=f"rope_append/{format}/d{head_dim}/{kind}", module=f"{ROOM}.kv_append",
        function="_append_kv_kernel", values_per_iteration=launch.constants["BLOCK_H"] * head_dim,
        bits_per_value=8 * (2 + written / (all_heads * head_dim)),
    )  # fmt: skip


def _mla(format: str, kind: str) -> CompilePoint:
    (rank, rope_dim), (style, *bare) = MLA_WIDTHS, kind.split("/")
    heads = 0 if bare else MLA_HEADS
    layout = MlaLayout(format, rank, rope_dim, PAGE_SIZE)
    launch = append_mla_launch(layout, max(1, heads), style)
    pointers = {"latent_ptr": "*bf16", "rope_ptr": "*bf16", "positions_ptr": "*i64", "cos_sin_ptr": "*fp32",
                "norm_ptr": "none" if bare else "*bf16", "slots_ptr": "*i64", "pages_ptr": "*u8",
                "factors_ptr": "*fp32", "q_rope_ptr": "*bf16", "q_ptr": "*bf16"}  # fmt: skip
    width = rank + rope_dim
    numbers: dict[str, int | float] = {
        "num_heads": heads, "eps": 1e-6, "stride_lt": width, "stride_rt": width, "stride_xt": heads * 192,
        "stride_xh": 0 if bare else 192, "stride_qt": heads * width, "stride_qh": 0 if bare else width,
    }  # fmt: skip
    written = heads * rope_dim * 2 + layout.record_bytes / PAGE_SIZE
    return _typed(
        pointers, numbers, launch, name=f"mla_append/{format}/{rank}+{rope_dim}/{kind}", module=f"{ROOM}.mla_append",
        function="_append_mla_kernel", values_per_iteration=max(width, launch.constants["BLOCK_H"] * rope_dim),
        bits_per_value=8 * (2 + written / (heads * rope_dim + width)),
    )  # fmt: skip


def _points() -> Iterator[CompilePoint]:
    for format in KV_FORMATS:
        for kind in FULL if format == FULL_FORMAT else ("half",):
            yield _gqa(format, 128, kind)
    for head_dim, format in HEAD_DIMS_FORMATS:
        yield _gqa(format, head_dim, "half")
    for format in MLA_FORMATS:
        for kind in MLA_FULL if format == MLA_FULL_FORMAT else MLA_FULL[:1]:
            yield _mla(format, kind)


def append_points() -> list[CompilePoint]:
    """Every point, for ``COMPILED_ARCHS``."""
    return list(_points())


# -- work ------------------------------------------------------------------------------------------

_TOKEN_BYTES = 16
"""Position and slot, int64 each."""


def append_work(op: str, format: str) -> Callable[[Mapping[str, int]], Work]:
    """Of "rope_append" or "mla_append", shapes as in ``append_runs.py``: values read once, q and records written once.

    Weights are those of norms, a row of cosines and sines per token, and the factors that fp8 and nvfp4 have.
    """
    has_factors = get_format(format).scale_per == "tensor" or get_format(format).tensor_scale

    def gqa(shape: Mapping[str, int]) -> tuple[int, int]:
        heads, kv_heads, head_dim = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
        token_bytes = KvLayout(format, head_dim, shape["page_size"]).record_bytes // shape["page_size"]
        each = 2 * (2 * heads + 2 * kv_heads) * head_dim + kv_heads * token_bytes + _TOKEN_BYTES
        tokens = shape["num_tokens"]
        return 4 * tokens * head_dim + 2 * 2 * head_dim + 2 * 4 * has_factors, tokens * each

    def mla(shape: Mapping[str, int]) -> tuple[int, int]:
        heads, rank, rope_dim = shape["num_heads"], shape["kv_lora_rank"], shape["rope_dim"]
        token_bytes = MlaLayout(format, rank, rope_dim, shape["page_size"]).record_bytes // shape["page_size"]
        each = 2 * (rank + rope_dim + 2 * heads * rope_dim) + token_bytes + _TOKEN_BYTES
        tokens = shape["num_tokens"]
        return 4 * tokens * rope_dim + 2 * rank + 4 * has_factors, tokens * each

    def work(shape: Mapping[str, int]) -> Work:
        from .registry import Work  # which reads these points

        return Work(*(gqa if op == "rope_append" else mla)(shape), 0.0)

    return work
