"""What tokenfab's kernels are set beside: torch's matmuls and attention, and a copy. Rows as in the registry; no torch.

The kernels of vLLM, SGLang and TensorRT-LLM on the same GPU are in the published tables.
"""

from __future__ import annotations

from ..kernels.attention_points import attention_work
from ..kernels.registry import Kernel, Shape, Work, gemm_work

_SOURCES = ("../bench/peer_runs.py",)


def _peer(weight: str, activation: str, library: str, runnable: str, title: str, min_capability: int) -> Kernel:
    return Kernel(
        "gemm", weight, activation, title, _SOURCES, f"..bench.peer_runs:{runnable}", list,
        gemm_work(weight, activation), min_capability, library=library,
    )  # fmt: skip


PEERS: tuple[Kernel, ...] = (
    _peer("bf16", "bf16", "torch.matmul", "TorchMatmul", "cuBLAS BF16", 80),
    _peer("fp8", "fp8", "torch._scaled_mm", "TorchScaledMm", "cuBLAS FP8, scale per tensor", 89),
    _peer("fp8_row", "fp8_row", "torch._scaled_mm", "TorchScaledMm", "CUTLASS FP8, scale per row", 90),
    Kernel(
        "attention", "bf16", "bf16", "torch's attention over K and V without pages", _SOURCES,
        "..bench.peer_runs:TorchAttention", list, attention_work("bf16"), 80, library="torch.sdpa",
    ),
)  # fmt: skip


def fits(kernel: Kernel, shape: Shape) -> bool:
    """Whether a library's kernel runs a shape: torch's attention has no window, and causal order from the wrong end."""
    return kernel.library != "torch.sdpa" or (shape["window"] == 0 and shape["q_len"] == 1)


COPY_SHAPES = ({"num_bytes": 1 << 28}, {"num_bytes": 1 << 30})
"""Far more than any L2."""


def _copy_work(shape: Shape) -> Work:
    return Work(0, 2 * shape["num_bytes"], 0.0)


COPY = Kernel(
    "copy", "bf16", "bf16", "device copy: the bandwidth that is there", _SOURCES, "..bench.peer_runs:Copy", list,
    _copy_work, 80, library="torch.copy_",
)  # fmt: skip
"""Bytes count twice: read and written."""
