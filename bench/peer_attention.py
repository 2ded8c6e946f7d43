"""Other libraries' paged GQA decode, run as tokenfab's own is: pages in random order, lengths on the device.

The page table and what a library plans from it and the lengths are shared by all layers of a step: they come with the
activations, made once and left in L2, while K and V of each layer rotate. Inputs are drawn as ``attention_runs.py``
draws them, in each library's own layout of pages; the reference gathers them.

Source: flashinfer-python 0.6.18 (``decode.BatchDecodeWithPagedKVCacheWrapper``, pages "HND"), fa3-fwd 0.0.3
(``flash_attn_with_kvcache``, pages (page, token, head, channel); a window counts the tokens before the query's).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

from ..kernels.attention_reference import attention_ref
from ..kernels.attention_runs import random_table
from ..kernels.codec import encode_e4m3
from ..kernels.inputs import random_matrix
from ..kernels.registry import Shape

Buffers = dict[str, Any]

FP8_SCALE = 2.0**-6
"""Of caches in fp8: values up to 7 do not saturate."""

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends."""

_SIZES = ("batch", "length", "num_heads", "num_kv_heads", "head_dim", "window", "q_len", "page_size")
_SEED = 1


class _PagedPeer(ABC):
    """K and V in pages of one order of axes, in BF16 or in E4M3 under one scale."""

    axes: str
    """Of a page: "HND" (head, token, channel) or "NHD" (token, head, channel)."""

    def __init__(self, weight: str, activation: str) -> None:
        self.format = weight

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        pages = shape["batch"] * -(-shape["length"] // shape["page_size"])
        sizes = {"H": shape["num_kv_heads"], "N": shape["page_size"], "D": shape["head_dim"]}
        size = (pages, *(sizes[axis] for axis in self.axes))
        made = {}
        for half, name in enumerate(("k", "v")):
            values = random_matrix(math.prod(size[:3]), size[3], 2 * seed + half, torch.device(device))
            if self.format == "fp8":
                values = encode_e4m3(values.float() / FP8_SCALE).view(torch.float8_e4m3fn)
            made[name] = values.view(size)
        return made

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        rows, place = shape["batch"] * shape["q_len"], torch.device(device)
        q = random_matrix(rows * shape["num_heads"], shape["head_dim"], seed, place)
        return {
            "q": q.view(rows, shape["num_heads"], shape["head_dim"]),
            "lengths": torch.full((shape["batch"],), shape["length"], dtype=torch.int32, device=place),
            "page_table": random_table(shape["batch"], -(-shape["length"] // shape["page_size"]), _SEED, place),
            "sizes": torch.tensor([shape[name] for name in _SIZES]),  # on the host
        }

    def make_output(self, shape: Shape, device: Any) -> torch.Tensor:
        rows = shape["batch"] * shape["q_len"]
        return torch.empty(rows, shape["num_heads"], shape["head_dim"], dtype=torch.bfloat16, device=device)

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        made, scale, q_len = [], shape["head_dim"] ** -0.5, shape["q_len"]
        factor = FP8_SCALE if self.format == "fp8" else 1.0
        for seq, pages in enumerate(activations["page_table"].long()):
            k, v = (self._by_token(weights[name][pages]).double() * factor for name in ("k", "v"))
            for token in range(q_len):
                end = shape["length"] - q_len + 1 + token
                first = max(0, end - shape["window"]) if shape["window"] else 0
                made.append(attention_ref(activations["q"][seq * q_len + token], k, v, first, end, scale)[0])
        return torch.stack(made)

    def _by_token(self, pages: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, channels) of a sequence's pages."""
        return (pages.transpose(1, 2) if self.axes == "HND" else pages).flatten(0, 1)

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        return {}

    @abstractmethod
    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None: ...


class FlashInferDecode(_PagedPeer):
    """``BatchDecodeWithPagedKVCacheWrapper``, planned once per shape as a step plans once for its layers.

    On tensor cores for more than four query heads per KV head, as vLLM does.
    """

    axes = "HND"

    def __init__(self, weight: str, activation: str) -> None:
        super().__init__(weight, activation)
        import flashinfer  # pyright: ignore[reportMissingImports]

        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        self._planned: dict[tuple[int, ...], Any] = {}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        made = super().make_activations(shape, seed, device, is_exact=is_exact)
        key = tuple(made["sizes"].tolist())
        if key not in self._planned:
            self._planned[key] = self._plan(shape, made["page_table"], torch.device(device))
        return made

    def _plan(self, shape: Shape, table: torch.Tensor, device: torch.device) -> Any:
        batch, pages = table.shape
        ints = {"dtype": torch.int32, "device": device}
        starts = torch.arange(0, (batch + 1) * pages, pages, **ints)
        last = torch.full((batch,), shape["length"] - (pages - 1) * shape["page_size"], **ints)
        wrapper = self._wrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "HND", use_cuda_graph=True,
            use_tensor_cores=shape["num_heads"] > 4 * shape["num_kv_heads"],
            paged_kv_indptr_buffer=torch.empty_like(starts),
            paged_kv_indices_buffer=torch.empty(batch * pages, **ints),
            paged_kv_last_page_len_buffer=torch.empty_like(last),
        )  # fmt: skip
        wrapper.plan(
            starts, table.flatten(), last, shape["num_heads"], shape["num_kv_heads"], shape["head_dim"],
            shape["page_size"], window_left=shape["window"] - 1, q_data_type=torch.bfloat16,
            kv_data_type=torch.float8_e4m3fn if self.format == "fp8" else torch.bfloat16,
            o_data_type=torch.bfloat16,
        )  # fmt: skip
        return wrapper

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        scales = {"k_scale": FP8_SCALE, "v_scale": FP8_SCALE} if self.format == "fp8" else {}
        wrapper = self._planned[tuple(activations["sizes"].tolist())]
        wrapper.run(activations["q"], (weights["k"], weights["v"]), out=output, **scales)


class FlashAttention3(_PagedPeer):
    """``flash_attn_with_kvcache`` with a page table; it gives a result of its own, which is copied."""

    axes = "NHD"

    def __init__(self, weight: str, activation: str) -> None:
        super().__init__(weight, activation)
        from fa3_fwd_interface import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

        self._attention = flash_attn_with_kvcache

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        *_, window, q_len, _ = activations["sizes"].tolist()
        q = activations["q"]
        made = self._attention(
            q.view(-1, q_len, *q.shape[1:]), weights["k"], weights["v"], cache_seqlens=activations["lengths"],
            page_table=activations["page_table"], causal=True, window_size=(window - 1, 0) if window else (-1, -1),
        )  # fmt: skip
        output.copy_(made.view(output.shape))
