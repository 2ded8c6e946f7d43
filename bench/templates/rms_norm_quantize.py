"""Residual, RMSNorm (eps 1e-6), then FP8 with a scale per row, in plain torch; rounded to BF16 between, as the
reference is."""

import torch


def my_kernel(
    weights: dict[str, torch.Tensor], activations: dict[str, torch.Tensor], output: dict[str, torch.Tensor]
) -> None:
    residual = (activations["x"].float() + activations["residual"].float()).to(torch.bfloat16)  # bf16 (rows, columns)
    h = residual.float()
    x = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-6) * weights["norm"].float()  # bf16 (columns,)
    x = x.to(torch.bfloat16).float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 448
    output["residual"].copy_(residual)
    output["data"].copy_((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn))  # e4m3 (rows, columns)
    output["scale"].copy_(scale)  # float32 (rows, 1)
