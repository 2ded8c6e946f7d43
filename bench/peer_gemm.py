"""Other libraries' FP8 matmuls with scales per block (1 x 128 of x, 128 x 128 of w), run as tokenfab's own are.

Source: DeepGEMM 2.8.1 (``fp8_gemm_nt``; csrc/apis/layout.hpp: on sm_90 float32 scales of x are wanted MN-major and
aligned for TMA, those of w as they are), torchao 0.18.0 (``kernel/blockwise_quantization.py``: all contiguous).
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.matmul_runs import Buffers, StoredMatmul
from ..kernels.registry import Shape


class DeepGemm(StoredMatmul):
    """``deep_gemm.fp8_gemm_nt``. Scales of x are laid out before the call, as the kernel that makes them would."""

    def __init__(self, weight: str, activation: str) -> None:
        super().__init__(weight, activation)
        import deep_gemm  # pyright: ignore[reportMissingImports]

        self._gemm = deep_gemm.fp8_gemm_nt
        self._align = deep_gemm.get_mn_major_tma_aligned_tensor

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        made = super().make_activations(shape, seed, device, is_exact=is_exact)
        return made | {"scale": self._align(made["scale"])}

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        x, w = (activations["data"], activations["scale"]), (weights["data"], weights["scale"])
        self._gemm(x, w, output, recipe=(1, 128, 128))


class TorchaoGemm(StoredMatmul):
    """``torchao.kernel.blockwise_quantization.blockwise_fp8_gemm``, autotuned at the first call; its result copied."""

    def __init__(self, weight: str, activation: str) -> None:
        super().__init__(weight, activation)
        from torchao.kernel.blockwise_quantization import blockwise_fp8_gemm  # pyright: ignore[reportMissingImports]

        self._gemm = blockwise_fp8_gemm

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        x, w = activations, weights
        output.copy_(self._gemm(x["data"], x["scale"], w["data"], w["scale"], 128))
