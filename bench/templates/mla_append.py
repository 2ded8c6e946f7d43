"""RMSNorm of latents (eps 1e-6), RoPE ("interleaved") of rope part and q, into a paged BF16 cache, in plain torch.

A page's record (tokenfab.kernels.kv_layout): latents [page_size][kv_lora_rank], then rope parts [page_size][rope_dim].
Only the slots of these tokens are written: a page's other bytes are another step's.
"""

import torch


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x: (tokens, heads, rope_dim); cos_sin: (tokens, rope_dim), cosines, then sines."""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    x1, x2 = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2).to(torch.bfloat16)


def my_kernel(
    weights: dict[str, torch.Tensor], activations: dict[str, torch.Tensor], output: dict[str, torch.Tensor]
) -> None:
    latent, rope = activations["latent"].float(), activations["rope"]  # bf16 (tokens, rank), (tokens, rope_dim)
    rank, rope_dim = latent.shape[1], rope.shape[1]
    pages = output["pages"].view(torch.bfloat16)[:, 0]  # uint8 (pages, 1, record)
    page_size = pages.shape[1] // (rank + rope_dim)
    cos_sin = weights["cos_sin"][activations["positions"]]  # float32 (tokens, rope_dim)
    output["q"].copy_(_rotate(activations["q_rope"], cos_sin))  # bf16 (tokens, heads, rope_dim)
    page, place = activations["slots"] // page_size, activations["slots"] % page_size  # int64 (tokens,)
    inverse = 1 / torch.sqrt(latent.square().mean(dim=1, keepdim=True) + 1e-6)
    latents = pages[:, : page_size * rank].view(-1, page_size, rank)
    latents[page, place] = (latent * inverse * weights["norm"].float()).to(torch.bfloat16)
    pages[:, page_size * rank :].view(-1, page_size, rope_dim)[page, place] = _rotate(rope[:, None], cos_sin)[:, 0]
