"""What kernels are held to, in plain torch and float64. Imports no kernel.

``error`` is the one distance of the house: the largest and the root mean square of
``|y - expected| / max(RMS(expected), |expected|)``, each as a share of its limit, so that 1 is the most a correct
kernel may have. The limits leave room for BF16 outputs and Hopper's FP8 accumulators, and none for a scale that is
20 % off. Source: triton_kernels' ``assert_close`` (largest 2e-2, RMS 4e-3).
"""

from __future__ import annotations

import torch

from .codec import QuantizedTensor, dequantize

MAX_ERROR = 2e-2
RMS_ERROR = 4e-3


def matmul_ref(x: QuantizedTensor, w: QuantizedTensor) -> torch.Tensor:
    """y = x . w^T: (M, K) and (N, K) in any format -> (M, N) float64, of the dequantized operands."""
    return dequantize(x).double() @ dequantize(w).double().T


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of ``y`` from ``expected``; above 1 the kernel is wrong, NaN where either is not finite.

    Raises:
        ValueError: another shape.
    """
    if y.shape != expected.shape:
        raise ValueError(f"y: expected shape {tuple(expected.shape)}; got {tuple(y.shape)}")
    if y.numel() == 0:
        return 0.0
    expected = expected.double()
    rms = expected.square().mean().sqrt()
    relative = (y.double() - expected).abs() / expected.abs().clamp_min(rms).clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.maximum(relative.max() / MAX_ERROR, relative.square().mean().sqrt() / RMS_ERROR))
