"""Paged MLA decode over BF16 latents in plain torch: o = softmax(q . C^T / sqrt(rank + rope)) . C[:, :rank], absorbed.

A page's record (tokenfab.kernels.kv_layout): latents [page_size][kv_lora_rank], then rope parts [page_size][rope_dim].
"""

import torch


def my_kernel(weights: dict[str, torch.Tensor], activations: dict[str, torch.Tensor], output: torch.Tensor) -> None:
    q, lengths = activations["q"], activations["lengths"]  # bf16 (batch x q_len, heads, rank + rope), int32 (batch,)
    rank, rope, q_len, page_size = activations["sizes"].tolist()  # on the host
    table = weights["page_table"]  # int32 (batch, pages of a sequence)
    batch, heads = lengths.numel(), q.shape[1]
    pages = weights["pages"].view(torch.bfloat16)[:, 0][table.long()]  # (batch, pages, record)
    split = page_size * rank
    latent = pages[:, :, :split].reshape(batch, -1, rank).float()
    cache = torch.cat((latent, pages[:, :, split:].reshape(batch, -1, rope).float()), dim=2)
    scores = torch.einsum("bthd,bnd->bthn", q.view(batch, q_len, heads, -1).float(), cache) * (rank + rope) ** -0.5
    places = torch.arange(cache.shape[1], device=q.device)
    ends = lengths[:, None] - q_len + 1 + torch.arange(q_len, device=q.device)  # causal: the last token sees all
    scores.masked_fill_((places >= ends[:, :, None])[:, :, None], -float("inf"))
    output.copy_(torch.einsum("bthn,bnd->bthd", scores.softmax(dim=-1), latent).flatten(0, 1))
