"""Paged attention with its inputs and its reference, as tests and the bench run it.

A shape is {"batch", "length", "num_heads", "num_kv_heads", "head_dim", "window" (0 for none), "q_len", "page_size"}.
The cache is the weights: a decode step finds it out of L2. Its pages are in random order.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from .attention_plan import AttentionPlan, Parts, empty_parts, num_plan_programs, plan_attention
from .attention_reference import paged_attention_ref
from .codec import encode_e4m3
from .formats import get_format
from .inputs import random_matrix
from .kv_cache import KvCache, empty_kv_cache
from .kv_layout import NVFP4_BIAS, KvLayout
from .paged_attention import choose_attention_tile, paged_attention
from .registry import Shape
from .split_k import arch_of
from .tiles import Tile

Buffers = dict[str, Any]

_FP8_SCALE = 2.0**-6
"""Of caches in fp8: values up to 7 do not saturate."""

_CHUNK = 1 << 24


def random_bytes(codes: torch.Tensor, format: str, seed: int) -> None:
    """Fill ``codes``, contiguous uint8 (N, bytes), with codes of ``inputs.random_matrix``; of FP4 any codes will do."""
    flat = codes.view(-1)
    step = _CHUNK * (2 if format == "bf16" else 1)
    for index, start in enumerate(range(0, flat.numel(), step)):
        part = flat[start : start + step]
        if get_format(format).packing:
            generator = torch.Generator(device=codes.device).manual_seed(seed + index)
            part.random_(0, 256, generator=generator)
            continue
        count = part.numel() // (2 if format == "bf16" else 1)
        values = random_matrix(1, count, seed + index, codes.device)[0]
        part.copy_(values.view(torch.uint8) if format == "bf16" else encode_e4m3(values.float() / _FP8_SCALE))


def random_scales(scales: torch.Tensor, format: str, seed: int) -> None:
    """Fill ``scales``, uint8 (..., bytes), with sizes from about 2^-8 to 2^-4 of FP8 and 2^-3 to 2^1 of FP4."""
    generator = torch.Generator(device=scales.device).manual_seed(seed)
    if format == "fp8_row":
        shape = (*scales.shape[:-1], scales.shape[-1] // 4)
        sizes = torch.exp2(torch.randn(shape, generator=generator, device=scales.device) - 6)
        scales.copy_(sizes.view(torch.uint8))
    else:
        exponents = torch.randint(-3, 2, scales.shape, generator=generator, device=scales.device)
        bytes = exponents + 127 if format == "mxfp4" else ((exponents + NVFP4_BIAS) << 3) + 1 + exponents % 7
        scales.copy_(bytes.to(torch.uint8))


def random_table(batch: int, max_pages: int, seed: int, device: torch.device) -> torch.Tensor:
    """(batch, max_pages) int32: every page once, in random order."""
    generator = torch.Generator(device=device).manual_seed(seed)
    order = torch.randperm(batch * max_pages, generator=generator, device=device)
    return order.to(torch.int32).view(batch, max_pages)


class PagedAttention:
    """``paged_attention`` without its plan, which all layers of a step share: it comes with the activations."""

    def __init__(self, weight: str, activation: str) -> None:
        self.format = weight
        self._parts: dict[tuple[int, ...], Parts] = {}

    def _cache(self, weights: Buffers) -> KvCache:
        pages = weights["pages"]
        head_dim, page_size = weights["sizes"].tolist()
        return KvCache(KvLayout(self.format, head_dim, page_size), pages, weights["factors"])

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        """``is_exact``: keys are zero, so that a result is the mean of the values seen, small integers."""
        layout, place = KvLayout(self.format, shape["head_dim"], shape["page_size"]), torch.device(device)
        max_pages = -(-shape["length"] // layout.page_size)
        factor = _FP8_SCALE if self.format == "fp8" else 1.0
        cache = empty_kv_cache(
            layout, shape["batch"] * max_pages, shape["num_kv_heads"], place, k_scale=factor, v_scale=factor
        )
        for half in range(2):
            start = half * layout.codes_bytes
            codes = torch.empty(*cache.pages.shape[:2], layout.codes_bytes, dtype=torch.uint8, device=place)
            random_bytes(codes, self.format, seed * (1 << 20) + half * (1 << 19))
            cache.pages[:, :, start : start + layout.codes_bytes] = codes
            start = layout.k_scales + half * layout.scales_bytes
            if layout.scales_bytes:
                random_scales(cache.pages[:, :, start : start + layout.scales_bytes], self.format, 2 * seed + half)
        table = random_table(shape["batch"], max_pages, seed, place)
        sizes = torch.tensor([layout.head_dim, layout.page_size])  # on the host: a launch does not wait for the device
        return {"pages": cache.pages, "factors": cache.factors, "page_table": table, "sizes": sizes}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        rows, place = shape["batch"] * shape["q_len"], torch.device(device)
        q = random_matrix(rows, shape["num_heads"] * shape["head_dim"], seed, place)
        lengths = torch.full((shape["batch"],), shape["length"], dtype=torch.int32, device=place)
        tile, programs = self._shape_sizes(shape, place)
        plan = plan_attention(lengths, programs, tile.block_n, q_len=shape["q_len"], window=shape["window"] or None)
        return {
            "q": q.view(rows, shape["num_heads"], shape["head_dim"]),
            "lengths": lengths,
            "plan": plan.table,
            "window": torch.tensor(shape["window"]),  # on the host
        }

    def _sizes(
        self, heads: int, kv_heads: int, head_dim: int, q_len: int, device: torch.device, **sizes: int
    ) -> tuple[Tile, int]:
        """(tile, programs per KV head)."""
        rows = heads // kv_heads * q_len
        tile = choose_attention_tile(head_dim, self.format, rows, arch_of(device), kv_heads=kv_heads, **sizes)
        return tile, num_plan_programs(kv_heads * -(-rows // tile.block_m), device, tile.num_warps)

    def _shape_sizes(self, shape: Shape, device: torch.device) -> tuple[Tile, int]:
        pages = -(-shape["length"] // shape["page_size"])
        return self._sizes(
            shape["num_heads"], shape["num_kv_heads"], shape["head_dim"], shape["q_len"], device,
            batch=shape["batch"], window=shape["window"], max_tokens=pages * shape["page_size"],
        )  # fmt: skip

    def make_output(self, shape: Shape, device: Any) -> torch.Tensor:
        rows = shape["batch"] * shape["q_len"]
        return torch.empty(rows, shape["num_heads"], shape["head_dim"], dtype=torch.bfloat16, device=device)

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        cache, q, lengths = self._cache(weights), activations["q"], activations["lengths"]
        batch, heads, head_dim, window = lengths.numel(), *q.shape[1:], int(activations["window"]) or None
        q_len = q.shape[0] // batch
        room = weights["page_table"].shape[1] * cache.layout.page_size
        tile, programs = self._sizes(
            heads, cache.num_kv_heads, head_dim, q_len, q.device, batch=batch, window=window or 0, max_tokens=room
        )
        plan = AttentionPlan(activations["plan"], batch, programs, tile.block_n, q_len, window, 0, programs + batch - 1)
        key = (plan.num_parts, q_len, heads, head_dim)
        if key not in self._parts:  # layers share them
            self._parts[key] = empty_parts(plan, heads, head_dim)
        paged_attention(
            q, cache, weights["page_table"], lengths, q_len=q_len, window=window, plan=plan, tile=tile,
            parts=self._parts[key], out=output,
        )  # fmt: skip

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        expected, _ = paged_attention_ref(
            activations["q"], self._cache(weights), weights["page_table"], activations["lengths"],
            q_len=shape["q_len"], window=shape["window"] or None,
        )  # fmt: skip
        return expected

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        return asdict(self._shape_sizes(shape, torch.device(device))[0])
