"""RMSNorm of each head of q and k (eps 1e-6), RoPE ("half"), k and v into a paged BF16 cache, in plain torch.

A page's record (tokenfab.kernels.kv_layout): K [page_size][head_dim], then V [head_dim][page_size], of one KV head.
Only the slots of these tokens are written: a page's other bytes are another step's.
"""

import torch


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return (x * (1 / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)) * weight.float()).to(torch.bfloat16)


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """cos_sin: (tokens, head_dim), cosines, then sines."""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(torch.bfloat16)


def my_kernel(
    weights: dict[str, torch.Tensor], activations: dict[str, torch.Tensor], output: dict[str, torch.Tensor]
) -> None:
    pages = output["pages"].view(torch.bfloat16)  # uint8 (pages, KV heads, record)
    head_dim, kv_heads = weights["q_norm"].shape[0], pages.shape[1]
    page_size = pages.shape[2] // (2 * head_dim)
    heads = activations["qkv"].unflatten(1, (-1, head_dim))  # bf16 (tokens, q heads + 2 KV heads, head_dim)
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    cos_sin = weights["cos_sin"][activations["positions"]]  # float32 (tokens, head_dim)
    output["q"].copy_(_rotate(_norm(q, weights["q_norm"]), cos_sin))  # bf16 (tokens, q heads, head_dim)
    page, place = activations["slots"] // page_size, activations["slots"] % page_size  # int64 (tokens,)
    keys = pages[:, :, : page_size * head_dim].view(-1, kv_heads, page_size, head_dim)
    values = pages[:, :, page_size * head_dim :].view(-1, kv_heads, head_dim, page_size)
    keys[page, :, place] = _rotate(_norm(k, weights["k_norm"]), cos_sin)
    values[page, :, :, place] = v
