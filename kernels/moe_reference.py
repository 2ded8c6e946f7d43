"""An expert layer in plain torch and float64, expert by expert. Imports no kernel.

Weights are the dequantized ones, (E, 2 I, K) gate rows then up rows, and (E, hidden, I). What a kernel rounds on the
way, h to BF16 and then to a format, is rounded here as well, so that what is left is accumulation.
"""

from __future__ import annotations

import torch

from .codec import dequantize, quantize
from .reference import swiglu_ref


def activation_ref(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, float64; "silu" or "swiglu_oai" (limit 7, alpha 1.702)."""
    is_clamped = activation == "swiglu_oai"
    return swiglu_ref(torch.cat([gate, up], dim=1), 7.0 if is_clamped else None, 1.702)


def gate_up_ref(
    x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, activation: str, bias: torch.Tensor | None = None,
    first_expert: int = 0,
) -> torch.Tensor:  # fmt: skip
    """h by row (token k + slot), (T k, I) float64; NaN where no expert of w is chosen."""
    inter, top_k = w.shape[1] // 2, ids.shape[1]
    h = torch.full((ids.numel(), inter), float("nan"), dtype=torch.float64, device=x.device)
    for expert in range(w.shape[0]):
        rows = (ids.flatten() == first_expert + expert).nonzero().flatten()
        sums = x.double()[rows // top_k] @ w[expert].double().T
        if bias is not None:
            sums = sums + bias[expert].double()
        h[rows] = activation_ref(sums[:, :inter], sums[:, inter:], activation)
    return h


def round_h(h: torch.Tensor, format: str, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """h as the second matmul reads it: BF16, then ``format``; rows that are NaN stay NaN."""
    rounded = h.to(torch.bfloat16)
    if format == "bf16":
        return rounded.double()
    missing = rounded.isnan().all(dim=1)
    options = {} if global_scale is None else {"global_scale": global_scale}
    values = dequantize(quantize(rounded.masked_fill(missing[:, None], 0), format, **options)).double()
    return values.masked_fill(missing[:, None], float("nan"))


def down_ref(
    h: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None,
    first_expert: int = 0,
) -> torch.Tensor:  # fmt: skip
    """y by row, (T k, hidden) float64, weighted; NaN where no expert of w is chosen."""
    y = torch.full((ids.numel(), w.shape[1]), float("nan"), dtype=torch.float64, device=h.device)
    for expert in range(w.shape[0]):
        rows = (ids.flatten() == first_expert + expert).nonzero().flatten()
        sums = h[rows] @ w[expert].double().T
        if bias is not None:
            sums = sums + bias[expert].double()
        y[rows] = sums * routing.flatten()[rows, None].double()
    return y


def combine_ref(rows: torch.Tensor, top_k: int) -> torch.Tensor:
    """(T, hidden) float64: a token's slots summed, rows that are NaN left out."""
    return rows.nan_to_num(0.0).unflatten(0, (-1, top_k)).sum(dim=1)
