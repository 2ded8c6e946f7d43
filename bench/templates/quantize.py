"""BF16 to FP8 with a scale per row in plain torch: scale = max |x| / 448, codes = e4m3(x / scale), bit for bit."""

import torch


def my_kernel(
    weights: dict[str, torch.Tensor], activations: dict[str, torch.Tensor], output: dict[str, torch.Tensor]
) -> None:
    x = activations["x"].float()  # bf16 (rows, columns)
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 448
    output["data"].copy_((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn))  # e4m3 (rows, columns)
    output["scale"].copy_(scale)  # float32 (rows, 1)
