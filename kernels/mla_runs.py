"""MLA attention with its inputs and its reference, as tests and the bench run it.

A shape is {"batch", "length", "num_heads", "kv_lora_rank", "rope_dim", "q_len", "page_size"}: ``batch`` sequences of
``length`` cached tokens, the q_len new ones among them. Weights are the cache and its page table (shuffled pages), so
that the bench finds them in memory and not in a cache of the GPU; activations are q and the lengths.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from .attention_plan import AttentionPlan, Parts, empty_parts, num_plan_programs, plan_attention
from .codec import encode_e4m3
from .inputs import exact_operand, random_matrix
from .kv_cache import MlaCache, read_mla_ref, slots_of
from .kv_layout import MlaLayout
from .mla_attention import choose_mla_tile, mla_attention
from .registry import Shape
from .split_k import arch_of
from .tiles import Tile

Buffers = dict[str, Any]

FP8_SCALE = 2.0**-4
"""Of fp8 caches: values up to 28 do not saturate."""


def _score_scale(rank: int, rope: int) -> float:
    """As of a head of rank + rope channels: scores of random queries and tokens are a few units."""
    return (rank + rope) ** -0.5


def _cached(shape: Shape) -> dict[str, int]:
    """Sequences, and the tokens that their pages have room for."""
    return {"batch": shape["batch"], "max_tokens": -(-shape["length"] // shape["page_size"]) * shape["page_size"]}


class MlaAttention:
    """``mla_attention`` over a cache in ``weight``, without its plan, which all layers of a step share: it comes with
    the activations."""

    def __init__(self, weight: str, activation: str) -> None:
        self.format, self.activation = weight, activation
        self._parts: dict[tuple[int, ...], Parts] = {}

    def _layout(self, shape: Shape) -> MlaLayout:
        return MlaLayout(self.format, shape["kv_lora_rank"], shape["rope_dim"], shape["page_size"])

    # -- inputs ------------------------------------------------------------------------------------

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        layout, batch, size = self._layout(shape), shape["batch"], shape["page_size"]
        rank, width = layout.kv_lora_rank, layout.kv_lora_rank + layout.rope_dim
        per_sequence = -(-shape["length"] // size)
        count = batch * per_sequence
        pages = torch.empty(count, 1, layout.record_bytes, dtype=torch.uint8, device=device)
        for first in range(0, count, 4096):  # so that float32 values of a large cache need no room
            held = min(4096, count - first)
            where = (held * size, width, seed * 65536 + first // 4096, torch.device(device))
            values = exact_operand("bf16", *where).data if is_exact else random_matrix(*where)
            record = pages[first : first + held, 0]
            if self.format == "bf16":
                codes = values.view(torch.uint8)
            else:
                scale = torch.full((held * size, 1), FP8_SCALE, device=device)
                if self.format == "fp8_row":
                    most = values.float().abs().amax(dim=1, keepdim=True).clamp_min(2.0**-20) / 448
                    scale = torch.exp2(most.log2().ceil()) if is_exact else most
                    record[:, layout.scales :] = scale.view(held, size).view(torch.uint8)
                codes = encode_e4m3(values.float() / scale)
            each = codes.view(held, size, width * layout.element_bytes)
            split = rank * layout.element_bytes
            record[:, : layout.rope_codes] = each[:, :, :split].reshape(held, -1)
            record[:, layout.rope_codes : layout.scales] = each[:, :, split:].reshape(held, -1)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return {
            "pages": pages,
            "factors": torch.tensor([FP8_SCALE if self.format == "fp8" else 1.0], device=device),
            "page_table": order.view(batch, per_sequence).to(torch.int32).to(device),
        }

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        tokens, heads = shape["batch"] * shape["q_len"], shape["num_heads"]
        width = shape["kv_lora_rank"] + shape["rope_dim"]
        where = (tokens * heads, width, 2 * seed + 1, torch.device(device))
        q = exact_operand("bf16", *where).data if is_exact else random_matrix(*where)
        lengths = torch.full((shape["batch"],), shape["length"], dtype=torch.int32, device=device)
        sizes = torch.tensor([shape[name] for name in ("kv_lora_rank", "rope_dim", "q_len", "page_size")])
        tile, programs = self._sizes(heads * shape["q_len"], torch.device(device), **_cached(shape))
        plan = plan_attention(lengths, programs, tile.block_n, q_len=shape["q_len"])
        return {"q": q.view(tokens, heads, width), "lengths": lengths, "plan": plan.table, "sizes": sizes}

    def make_output(self, shape: Shape, device: Any) -> torch.Tensor:
        tokens = shape["batch"] * shape["q_len"]
        return torch.empty(tokens, shape["num_heads"], shape["kv_lora_rank"], dtype=torch.bfloat16, device=device)

    # -- the kernel --------------------------------------------------------------------------------

    def _sizes(self, rows: int, device: torch.device, **sizes: int) -> tuple[Tile, int]:
        """(tile, programs) of a plan."""
        tile = choose_mla_tile(self.format, rows, arch_of(device), **sizes)
        return tile, num_plan_programs(-(-rows // tile.block_m), device, tile.num_warps)

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        q, lengths = activations["q"], activations["lengths"]
        rank, rope, q_len, page_size = activations["sizes"].tolist()  # on the host
        batch, heads = lengths.numel(), q.shape[1]
        cache = MlaCache(MlaLayout(self.format, rank, rope, page_size), weights["pages"], weights["factors"])
        room = weights["page_table"].shape[1] * page_size
        tile, programs = self._sizes(heads * q_len, q.device, batch=batch, max_tokens=room)
        plan = AttentionPlan(activations["plan"], batch, programs, tile.block_n, q_len, None, 0, programs + batch - 1)
        key = (plan.num_parts, q_len, heads, rank)
        if key not in self._parts:  # layers share them
            self._parts[key] = empty_parts(plan, heads, rank)
        mla_attention(
            q, cache, weights["page_table"], lengths, q_len=q_len, scale=_score_scale(rank, rope), plan=plan,
            tile=tile, parts=self._parts[key], out=output,
        )  # fmt: skip

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        rows = shape["num_heads"] * shape["q_len"]
        return asdict(choose_mla_tile(self.format, rows, arch_of(torch.device(device)), **_cached(shape)))

    # -- the reference -----------------------------------------------------------------------------

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        """Sequence by sequence, in float64."""
        scale = _score_scale(shape["kv_lora_rank"], shape["rope_dim"])
        q, length, q_len = activations["q"], shape["length"], shape["q_len"]
        cache = MlaCache(self._layout(shape), weights["pages"], weights["factors"])
        made = []
        for b in range(shape["batch"]):
            kv = read_mla_ref(cache, slots_of(weights["page_table"][b], length, shape["page_size"]))
            for i in range(q_len):
                seen = kv[: max(0, length - q_len + 1 + i)]
                p = torch.softmax(q[b * q_len + i].double() @ seen.T * scale, dim=1)
                made.append(p @ seen[:, : shape["kv_lora_rank"]])
        return torch.stack(made)
