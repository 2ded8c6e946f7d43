"""Which kernel runs which op in which formats, and all that others need to know of it.

Tests, bench, inspection and the command walk ``KERNELS``; a new kernel is one row. Importing this needs the standard
library only: a kernel itself, with torch and Triton, is imported by ``Kernel.load``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .append_points import append_points, append_work
from .attention_points import attention_points, attention_work, plan_points
from .compile_point import CompilePoint
from .formats import get_format
from .grouped_points import grouped_points
from .kv_layout import KV_FORMATS, MLA_FORMATS
from .matmul_points import matmul_points
from .mla_points import mla_points, mla_work
from .moe_work import touched
from .quantize_points import INPUT_BYTES, QUANTIZED_FORMATS, quantize_points, stored_bytes
from .routing_points import routing_points

Shape = Mapping[str, int]


class Work(NamedTuple):
    """What one call must do at least: bytes moved (output included in the activations'), matrix flops."""

    weight_bytes: int
    activation_bytes: int
    flops: float


class Runnable(Protocol):
    """A kernel with its inputs and its reference. Buffers are dicts of tensors."""

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> dict[str, Any]:
        """Weights as the kernel reads them, prepared as at load."""
        ...

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> dict[str, Any]: ...

    def make_output(self, shape: Shape, device: Any) -> Any: ...

    def launch(self, weights: dict[str, Any], activations: dict[str, Any], output: Any) -> None:
        """Enqueues the kernel, capturable in a CUDA graph."""
        ...

    def reference(self, shape: Shape, weights: dict[str, Any], activations: dict[str, Any]) -> Any:
        """The result of these very buffers, as ``reference.error`` takes it: float64, or a ``reference.Quantized``."""
        ...

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        """How the launch is cut up, for the record."""
        ...


@dataclass(frozen=True)
class Kernel:
    """One row.

    Attributes:
        op: kind of op that it runs, as the decode plan calls it.
        weight, activation: names of formats; weight is "" where there is no matrix of weights.
        title: for a reader.
        sources: the files that it is made of, from this room; they name a version of the kernel in records.
        runnable: "module:class", the module relative to this room, called with (weight, activation).
        points: how it is compiled.
        work: bytes and flops of a shape.
        min_capability: compute capability from which it runs, ten times CUDA's ("9.0" is 90).
        tolerance: largest ``reference.error``.
        library: the function of another library that this row sets beside the house's own kernels; "" for those.
    """

    op: str
    weight: str
    activation: str
    title: str
    sources: tuple[str, ...]
    runnable: str
    points: Callable[[], list[CompilePoint]]
    work: Callable[[Shape], Work]
    min_capability: int
    tolerance: float = 1.0
    library: str = ""

    @property
    def name(self) -> str:
        return f"{self.op}/{self.format}" + (f"@{self.library}" if self.library else "")

    @property
    def format(self) -> str:
        """Formats of weights and activations in one word, or that of the activations alone."""
        return "-".join(self.formats.values())

    @property
    def formats(self) -> dict[str, str]:
        """The same by operand, weights first."""
        return (
            {"weight": self.weight, "activation": self.activation} if self.weight else {"activation": self.activation}
        )

    def load(self) -> Runnable:
        """The kernel; imports torch and Triton."""
        module, _, name = self.runnable.partition(":")
        return getattr(importlib.import_module(module, __package__), name)(self.weight, self.activation)

    def source_texts(self) -> dict[str, bytes]:
        folder = Path(__file__).parent
        return {name: (folder / name).read_bytes() for name in self.sources}


# -- gemm ------------------------------------------------------------------------------------------

OUTPUT_BYTES = 2


def gemm_work(weight: str, activation: str, weight_bits: float | None = None) -> Callable[[Shape], Work]:
    """Of y (m, n) BF16 = x (m, k) . w (n, k)^T: each operand once, the output once.

    ``weight_bits``: bits of a weight, its scales included, where it is laid out denser than its format.
    """
    bits = get_format(weight).bits_per_value if weight_bits is None else weight_bits

    def work(shape: Shape) -> Work:
        m, n, k = shape["m"], shape["n"], shape["k"]
        weights = n * k * bits / 8
        activations = m * k * get_format(activation).bytes_per_value + m * n * OUTPUT_BYTES
        return Work(round(weights), round(activations), 2.0 * m * n * k)

    return work


def _named(points: Callable[[], list[CompilePoint]], prefix: str) -> Callable[[], list[CompilePoint]]:
    return lambda: [point for point in points() if point.name.startswith(f"{prefix}/")]


def _gemm(
    weight: str, activation: str, runnable: str, title: str, sources: str, min_capability: int,
    weight_bits: float | None = None,
) -> Kernel:  # fmt: skip
    files = tuple(f"{name}.py" for name in ("split_k", *sources.split()))
    return Kernel(
        "gemm", weight, activation, title, files, f".matmul_runs:{runnable}", 
        _named(matmul_points, f"gemm/{weight}-{activation}"),
        gemm_work(weight, activation, weight_bits), min_capability,
    )  # fmt: skip


# -- expert layers ---------------------------------------------------------------------------------


def moe_work(weight: str, activation: str, weight_bits: float | None = None) -> Callable[[Shape], Work]:
    """Of the whole layer on rank 0: weights of the experts that some token chose, x and logits once, y once."""
    bits = get_format(weight).bits_per_value if weight_bits is None else weight_bits

    def work(shape: Shape) -> Work:
        experts, rows = touched(shape)
        values = 3 * shape["hidden"] * shape["inter"]
        tokens = shape["num_tokens"]
        activations = tokens * (shape["hidden"] * (INPUT_BYTES + OUTPUT_BYTES) + 4 * shape["num_experts"])
        return Work(int(experts * values * bits / 8), activations, 2.0 * rows * values)

    return work


_MOE_SOURCES = (
    "moe_layer moe_weights moe_schedule routing routing_tiles routing_rule grouped_experts grouped_parts split_k "
    "quantize fused_quantize quantize_tiles"
)


def _moe(weight: str, activation: str, title: str, sources: str, min_capability: int = 89,
         weight_bits: float | None = None) -> Kernel:  # fmt: skip
    files = tuple(f"{name}.py" for name in (*_MOE_SOURCES.split(), *sources.split()))
    return Kernel(
        "moe", weight, activation, title, files, ".moe_runs:MoeRun",
        _named(grouped_points, f"moe/{weight}-{activation}"),
        moe_work(weight, activation, weight_bits), min_capability,
    )  # fmt: skip


# -- quantizers ------------------------------------------------------------------------------------


def quantize_work(op: str, format: str) -> Callable[[Shape], Work]:
    """Of codes and scales (rows, columns): inputs once (of a norm the residual, which is written too), the result once.

    Weights are those of a norm, and the scale that NVFP4 is given.
    """
    row, is_norm = get_format(format), op == "rms_norm_quantize"
    moved = {"quantize": 1, "rms_norm_quantize": 3, "swiglu_quantize": 2}[op]

    def work(shape: Shape) -> Work:
        rows, columns = shape["rows"], shape["columns"]
        weights = columns * INPUT_BYTES * is_norm + 4 * row.tensor_scale
        return Work(weights, moved * rows * columns * INPUT_BYTES + stored_bytes(row, rows, columns), 0.0)

    return work


def _quantizers(op: str, runnable: str, title: str, sources: str) -> list[Kernel]:
    """A row per format, from compute capability 8.9: the first that rounds to E4M3."""
    files = tuple(f"{name}.py" for name in ("quantize", "quantize_tiles", *sources.split()))
    return [
        Kernel(
            op, "", format, f"{title} {get_format(format).title}", files, f".quantize_runs:{runnable}",
            _named(quantize_points, f"{op}/{format}"), quantize_work(op, format), 89, tolerance=0.0,
        )
        for format in QUANTIZED_FORMATS
    ]  # fmt: skip


# -- attention -------------------------------------------------------------------------------------


def _attention(format: str) -> Kernel:
    """Its "weights" are the cache: what a step finds out of L2. From 8.9: the first that has E4M3."""
    files = (
        "paged_attention attention_plan attention_points attention_parts attention_fp4 kv_cache kv_layout tiles "
        "w4a16_matmul"
    )
    return Kernel(
        "attention", format, "bf16", f"paged GQA decode, K and V in {get_format(format).title}",
        tuple(f"{name}.py" for name in files.split()), ".attention_runs:PagedAttention",
        _named(attention_points, f"attention/{format}-bf16"), attention_work(format), 89,
    )  # fmt: skip


def _mla(format: str) -> Kernel:
    files = "mla_attention mla_points attention_plan attention_parts kv_cache kv_layout tiles paged_attention"
    return Kernel(
        "mla", format, "bf16", f"paged MLA decode, latent in {get_format(format).title}",
        tuple(f"{name}.py" for name in files.split()), ".mla_runs:MlaAttention",
        _named(mla_points, f"mla/{format}-bf16"), mla_work(format), 89,
    )  # fmt: skip


def _append(op: str, runnable: str, title: str, format: str) -> Kernel:
    own = "kv_append" if op == "rope_append" else "mla_append"
    files = f"{own} append_tiles kv_append kv_cache kv_layout quantize quantize_tiles"
    return Kernel(
        op, "", format, f"{title} in {get_format(format).title}",
        tuple(dict.fromkeys(f"{name}.py" for name in files.split())), f".append_runs:{runnable}",
        _named(append_points, f"{op}/{format}"), append_work(op, format), 89, tolerance=0.0,
    )  # fmt: skip


W4A8_BITS = 4.125
"""A code, and half a byte of scale per 32; see ``w4a8_weights.py``."""

_W4A16 = "w4a16_matmul fp4_weights matmul_points"
_W4A8 = "w4a8_matmul w4a8_weights"
_SCALED = "block_scaled_matmul w4a8_matmul"
KERNELS: tuple[Kernel, ...] = (
    _gemm("fp8", "fp8", "Fp8Matmul", "W8A8 FP8, scale per tensor", "fp8_matmul", 89),
    _gemm("fp8_row", "fp8_row", "Fp8Matmul", "W8A8 FP8, scale per row", "fp8_matmul", 89),
    _gemm("fp8_block", "fp8_group", "Fp8Matmul", "W8A8 FP8, scale per block", "fp8_matmul", 89),
    _gemm("mxfp8", "mxfp8", "BlockScaledMatmul", "W8A8 MXFP8", _SCALED, 90),
    _gemm("mxfp4", "bf16", "W4A16Matmul", "W4A16 MXFP4, decoded in registers", _W4A16, 90),
    _gemm("nvfp4", "bf16", "W4A16Matmul", "W4A16 NVFP4, decoded in registers", _W4A16, 90),
    _gemm("mxfp4", "fp8_row", "W4A8Matmul", "W4A8 MXFP4 decoded to FP8, scale per token", _W4A8, 90, W4A8_BITS),
    _gemm("mxfp4", "fp8_group", "W4A8Matmul", "W4A8 MXFP4 decoded to FP8, scale per 128", _W4A8, 90, W4A8_BITS),
    _gemm("mxfp4", "mxfp8", "BlockScaledMatmul", "W4A8 MXFP4 x MXFP8", _SCALED, 90),
    _gemm("mxfp4", "mxfp4", "BlockScaledMatmul", "W4A4 MXFP4", _SCALED, 90),
    _gemm("nvfp4", "nvfp4", "BlockScaledMatmul", "W4A4 NVFP4", _SCALED, 100),
    _moe("bf16", "bf16", "experts in BF16", "grouped_matmul fp8_matmul"),
    _moe("fp8_row", "fp8_row", "experts in FP8, scale per row", "grouped_matmul fp8_matmul"),
    _moe("fp8_block", "fp8_group", "experts in FP8, scale per block", "grouped_matmul fp8_matmul"),
    _moe("mxfp8", "mxfp8", "experts in MXFP8", f"grouped_block_scaled {_SCALED}", 90),
    _moe("mxfp4", "bf16", "MXFP4 experts, BF16 activations", f"grouped_fp4 {_W4A16}", 90),
    _moe("nvfp4", "bf16", "NVFP4 experts, BF16 activations", f"grouped_fp4 {_W4A16}", 90),
    _moe("mxfp4", "fp8_row", "MXFP4 experts, FP8 per token", f"grouped_fp4 {_W4A8}", 90, W4A8_BITS),
    _moe("mxfp4", "fp8_group", "MXFP4 experts, FP8 per 128", f"grouped_fp4 {_W4A8}", 90, W4A8_BITS),
    _moe("mxfp4", "mxfp8", "MXFP4 experts, MXFP8 activations", f"grouped_block_scaled {_SCALED}", 90),
    _moe("mxfp4", "mxfp4", "MXFP4 experts and activations", f"grouped_block_scaled {_SCALED}", 90),
    _moe("nvfp4", "nvfp4", "NVFP4 experts and activations", f"grouped_block_scaled {_SCALED}", 100),
    *(_attention(format) for format in KV_FORMATS),
    *(_mla(format) for format in MLA_FORMATS),
    *(_append("rope_append", "KvAppend", "norm, RoPE and append of K and V", format) for format in KV_FORMATS),
    *(_append("mla_append", "MlaAppend", "norm, RoPE and append of latents", format) for format in MLA_FORMATS),
    *_quantizers("quantize", "Quantize", "to", ""),
    *_quantizers("rms_norm_quantize", "RmsNormQuantize", "residual + RMSNorm to", "fused_quantize"),
    *_quantizers("swiglu_quantize", "SwigluQuantize", "SwiGLU to", "fused_quantize"),
)

OPS = tuple(dict.fromkeys(kernel.op for kernel in KERNELS))


def find_points(op: str | None = None, formats: Iterable[str] | None = None) -> list[CompilePoint]:
    """How the kernels of ``find_kernels`` are compiled; an expert layer's with its routing, attention's with its plan.

    Raises:
        ValueError: as ``find_kernels``.
    """
    kernels = find_kernels(op, formats)
    routed = routing_points() if any(kernel.op == "moe" for kernel in kernels) else []
    planned = plan_points() if any(kernel.op in ("attention", "mla") for kernel in kernels) else []
    return [*(point for kernel in kernels for point in kernel.points()), *routed, *planned]


def find_kernels(op: str | None = None, formats: Iterable[str] | None = None) -> list[Kernel]:
    """The kernels of an op, or of all; of some formats, each "WEIGHT-ACTIVATION" or a weight's alone, or a quantizer's.

    Raises:
        ValueError: no such op, or a format that none of its kernels has.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}; got {op!r}")
    found = [kernel for kernel in KERNELS if op in (None, kernel.op)]
    if formats is None:
        return found
    wanted = list(formats)
    for name in wanted:
        if not any(name in (kernel.format, kernel.weight) for kernel in found):
            known = ", ".join(dict.fromkeys(kernel.format for kernel in found))
            part = ", or a weight format of them" if any(kernel.weight for kernel in found) else ""
            raise ValueError(f"format: expected one of {known}{part}; got {name!r}")
    return [kernel for kernel in found if kernel.format in wanted or kernel.weight in wanted]
