"""The libraries' kernels with their inputs and reference, run as tokenfab's own are. Imports torch.

``torch._scaled_mm``: scales per tensor go to cuBLAS, per row to torch's CUTLASS kernel, as torch decides.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..kernels.attention_reference import attention_ref
from ..kernels.inputs import random_matrix
from ..kernels.matmul_runs import Buffers, StoredMatmul
from ..kernels.registry import Shape


class TorchMatmul(StoredMatmul):
    """``torch.matmul`` of BF16 operands."""

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        torch.matmul(activations["data"], weights["data"].t(), out=output)


class TorchScaledMm(StoredMatmul):
    """``torch._scaled_mm`` of FP8 operands, with the fast accumulation that torch's users choose."""

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        x_scale, w_scale = activations["scale"], weights["scale"]
        w_scale = w_scale.reshape(1, -1) if w_scale.dim() else w_scale
        torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            activations["data"], weights["data"].t(), x_scale, w_scale, out_dtype=output.dtype, use_fast_accum=True,
            out=output,
        )  # fmt: skip


class TorchBlockScaledMm(StoredMatmul):
    """``torch._scaled_mm`` with scales per 1 x 128 of x and per 128 x 128 of w, which goes to cuBLAS on sm_90.

    Scales of x lie token by token, as ``ScaledBlas.cpp`` asks: (m, k / 128) with strides (1, m).
    """

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        made = super().make_activations(shape, seed, device, is_exact=is_exact)
        return made | {"scale": made["scale"].t().contiguous().t()}

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            activations["data"], weights["data"].t(), activations["scale"], weights["scale"].t(),
            out_dtype=output.dtype, out=output,
        )  # fmt: skip


class TorchAttention:
    """``scaled_dot_product_attention`` of one query token per sequence; K and V (B, Hk, L, D) contiguous."""

    def __init__(self, weight: str, activation: str) -> None:
        self.format = (weight, activation)

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        sizes = (shape["batch"], shape["num_kv_heads"], shape["length"], shape["head_dim"])
        return {
            name: random_matrix(math.prod(sizes[:3]), sizes[3], 2 * seed + half, torch.device(device)).view(sizes)
            for half, name in enumerate(("k", "v"))
        }

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        rows, heads = shape["batch"], shape["num_heads"]
        q = random_matrix(rows * heads, shape["head_dim"], seed, torch.device(device))
        return {"q": q.view(rows, heads, 1, shape["head_dim"])}

    def make_output(self, shape: Shape, device: Any) -> torch.Tensor:
        sizes = (shape["batch"], shape["num_heads"], 1, shape["head_dim"])
        return torch.empty(sizes, dtype=torch.bfloat16, device=device)

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        q, k, v = activations["q"], weights["k"], weights["v"]
        output.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        scale, length = shape["head_dim"] ** -0.5, shape["length"]
        made = []
        for q, k, v in zip(activations["q"], weights["k"], weights["v"], strict=True):
            k, v = (part.double().transpose(0, 1) for part in (k, v))
            made.append(attention_ref(q[:, 0], k, v, 0, length, scale)[0][:, None])
        return torch.stack(made)

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        return {}


class Copy:
    """A copy of ``num_bytes``: what it reads are its activations, since nothing of it stays from call to call."""

    def __init__(self, weight: str, activation: str) -> None:
        self.format = (weight, activation)

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        return {}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        return {"data": random_matrix(1, shape["num_bytes"] // 2, seed, torch.device(device))}

    def make_output(self, shape: Shape, device: Any) -> torch.Tensor:
        return torch.empty(1, shape["num_bytes"] // 2, dtype=torch.bfloat16, device=device)

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        output.copy_(activations["data"])

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        return activations["data"]

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        return {}
