"""The append kernels with their inputs and their reference, as tests and the bench run them.

Shapes: GQA {"num_tokens", "num_heads", "num_kv_heads", "head_dim", "page_size"}, MLA {"num_tokens", "num_heads",
"kv_lora_rank", "rope_dim", "page_size"}. Rotated over the whole head, with the norms that Qwen3 and DeepSeek have; as
many rows of cosines and sines as tokens, each read once. Tokens fill a shuffled page table from its start, pages just
enough for them.

What is normalised is multiples of 1/32 up to 4: their squares sum to the same float32 in any order, so that no bit of
the result is free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from .append_tiles import append_kv_launch, append_mla_launch
from .attention_reference import append_kv_ref, append_mla_ref
from .inputs import random_matrix
from .kv_append import append_kv
from .kv_cache import KvCache, MlaCache, slots_of
from .kv_layout import KvLayout, MlaLayout
from .mla_append import append_mla
from .quantize_tiles import Launch
from .reference import Exact
from .registry import Shape

Buffers = dict[str, Any]

EPS = 1e-6

FACTORS = {"fp8": (0.03125, 0.0390625), "nvfp4": (0.25, 0.3125)}
"""Of K and V, of the formats that have any: small enough that no code is lost, one of them no power of two."""

_GRID = 32
_GRID_LARGEST = 128


def grid_matrix(rows: int, columns: int, seed: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) BF16: normal, rounded to multiples of 1/32 up to 4; 512 squares of them sum exactly."""
    generator = torch.Generator(device=device).manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, device=device) * _GRID
    return (values.round().clamp(-_GRID_LARGEST, _GRID_LARGEST) / _GRID).to(torch.bfloat16)


def make_cos_sin(num_positions: int, rotary_dim: int, device: torch.device | str, base: float = 1e4) -> torch.Tensor:
    """Float32 (num_positions, rotary_dim): cosines, then sines, of position x base^(-2i / rotary_dim)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), base**-exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float().to(device)


class _Append(ABC):
    """The append of either kind of cache in one format."""

    def __init__(self, weight: str, activation: str) -> None:
        self.format = activation

    def _tokens(self, shape: Shape, seed: int, device: torch.device) -> Buffers:
        """Positions, all different, and slots."""
        num_tokens, page_size = shape["num_tokens"], shape["page_size"]
        generator = torch.Generator(device=device).manual_seed(3 * seed)
        positions = torch.randperm(num_tokens, generator=generator, device=device)
        page_table = torch.randperm(_num_pages(shape), generator=generator, device=device)
        return {"positions": positions, "slots": slots_of(page_table, num_tokens, page_size)}

    def _norm(self, width: int, seed: int, device: torch.device) -> torch.Tensor:
        generator = torch.Generator(device=device).manual_seed(seed)
        return (1 + 0.25 * torch.randn(width, generator=generator, device=device)).to(torch.bfloat16)

    def _factors(self, count: int, device: torch.device) -> torch.Tensor:
        return torch.tensor(FACTORS.get(self.format, (1.0, 1.0))[:count], device=device)

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> Exact:
        """What is written to pages of zeros and to pages of ones: bytes that differ were not."""
        device = activations["slots"].device
        made = [self._expected(shape, weights, activations, torch.full(self._pages_shape(shape), fill,
                dtype=torch.uint8, device=device)) for fill in (0, 255)]  # fmt: skip
        return Exact(made[0], {"pages": made[0]["pages"] == made[1]["pages"]})

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        launch = self._launch(shape)
        return {"block_h": launch.constants["BLOCK_H"], "num_warps": launch.num_warps}

    @abstractmethod
    def _pages_shape(self, shape: Shape) -> tuple[int, int, int]: ...

    @abstractmethod
    def _expected(self, shape: Shape, weights: Buffers, activations: Buffers, pages: torch.Tensor) -> Buffers: ...

    @abstractmethod
    def _launch(self, shape: Shape) -> Launch: ...


def _num_pages(shape: Shape) -> int:
    return -(-shape["num_tokens"] // shape["page_size"])


class KvAppend(_Append):
    """``append_kv`` with norms of q and k, style "half"."""

    def _layout(self, shape: Shape) -> KvLayout:
        return KvLayout(self.format, shape["head_dim"], shape["page_size"])

    def _pages_shape(self, shape: Shape) -> tuple[int, int, int]:
        return _num_pages(shape), shape["num_kv_heads"], self._layout(shape).record_bytes

    def _launch(self, shape: Shape) -> Launch:
        return append_kv_launch(self._layout(shape), shape["num_kv_heads"], shape["head_dim"], "half")

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        head_dim, device = shape["head_dim"], torch.device(device)
        norms = {
            name: self._norm(head_dim, 3 * seed + place, device) for place, name in enumerate(("q_norm", "k_norm"))
        }
        cos_sin = make_cos_sin(shape["num_tokens"], head_dim, device)
        return norms | {"cos_sin": cos_sin, "factors": self._factors(2, device)}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        device, head_dim, num_tokens = torch.device(device), shape["head_dim"], shape["num_tokens"]
        qk = grid_matrix(num_tokens, (shape["num_heads"] + shape["num_kv_heads"]) * head_dim, 3 * seed + 1, device)
        v = random_matrix(num_tokens, shape["num_kv_heads"] * head_dim, 3 * seed + 2, device)
        return {"qkv": torch.cat((qk, v), dim=1), **self._tokens(shape, seed, device)}

    def make_output(self, shape: Shape, device: Any) -> Buffers:
        size = (shape["num_tokens"], shape["num_heads"], shape["head_dim"])
        pages = torch.empty(self._pages_shape(shape), dtype=torch.uint8, device=device)
        return {"q": torch.empty(size, dtype=torch.bfloat16, device=device), "pages": pages}

    def _arguments(self, layout: KvLayout, weights: Buffers, activations: Buffers, pages: torch.Tensor) -> Buffers:
        heads = activations["qkv"].shape[1] // layout.head_dim - 2 * pages.shape[1]
        cache = KvCache(layout, pages, weights["factors"])
        norms = {name: weights[name] for name in ("q_norm", "k_norm")}
        return {**activations, **norms, "cos_sin": weights["cos_sin"], "cache": cache, "num_heads": heads, "eps": EPS}

    def launch(self, weights: Buffers, activations: Buffers, output: Buffers) -> None:
        head_dim, record_bytes = weights["q_norm"].shape[0], output["pages"].shape[2]
        per_token = KvLayout(self.format, head_dim, 16).record_bytes // 16
        layout = KvLayout(self.format, head_dim, record_bytes // per_token)
        append_kv(**self._arguments(layout, weights, activations, output["pages"]), q_out=output["q"])

    def _expected(self, shape: Shape, weights: Buffers, activations: Buffers, pages: torch.Tensor) -> Buffers:
        q = append_kv_ref(**self._arguments(self._layout(shape), weights, activations, pages))
        return {"q": q, "pages": pages}


class MlaAppend(_Append):
    """``append_mla`` with a norm of the latent and query heads, style "interleaved"."""

    def _layout(self, shape: Shape) -> MlaLayout:
        return MlaLayout(self.format, shape["kv_lora_rank"], shape["rope_dim"], shape["page_size"])

    def _pages_shape(self, shape: Shape) -> tuple[int, int, int]:
        return _num_pages(shape), 1, self._layout(shape).record_bytes

    def _launch(self, shape: Shape) -> Launch:
        return append_mla_launch(self._layout(shape), shape["num_heads"], "interleaved")

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        device = torch.device(device)
        norm = self._norm(shape["kv_lora_rank"], 3 * seed, device)
        cos_sin = make_cos_sin(shape["num_tokens"], shape["rope_dim"], device)
        return {"norm": norm, "cos_sin": cos_sin, "factors": self._factors(1, device)}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        device, num_tokens, rope_dim = torch.device(device), shape["num_tokens"], shape["rope_dim"]
        latent = grid_matrix(num_tokens, shape["kv_lora_rank"], 3 * seed + 1, device)
        q_rope = random_matrix(num_tokens, (shape["num_heads"] + 1) * rope_dim, 3 * seed + 2, device)
        q_rope = q_rope.view(num_tokens, -1, rope_dim)
        values = {"latent": latent, "rope": q_rope[:, 0].clone(), "q_rope": q_rope[:, 1:].contiguous()}
        return values | self._tokens(shape, seed, device)

    def make_output(self, shape: Shape, device: Any) -> Buffers:
        size = (shape["num_tokens"], shape["num_heads"], shape["rope_dim"])
        pages = torch.empty(self._pages_shape(shape), dtype=torch.uint8, device=device)
        return {"q": torch.empty(size, dtype=torch.bfloat16, device=device), "pages": pages}

    def _arguments(self, layout: MlaLayout, weights: Buffers, activations: Buffers, pages: torch.Tensor) -> Buffers:
        cache = MlaCache(layout, pages, weights["factors"])
        return {**activations, "norm": weights["norm"], "cos_sin": weights["cos_sin"], "cache": cache, "eps": EPS}

    def launch(self, weights: Buffers, activations: Buffers, output: Buffers) -> None:
        widths = activations["latent"].shape[1], activations["rope"].shape[1]
        per_token = MlaLayout(self.format, *widths, 16).record_bytes // 16
        layout = MlaLayout(self.format, *widths, output["pages"].shape[2] // per_token)
        append_mla(**self._arguments(layout, weights, activations, output["pages"]), q_out=output["q"])

    def _expected(self, shape: Shape, weights: Buffers, activations: Buffers, pages: torch.Tensor) -> Buffers:
        q = append_mla_ref(**self._arguments(self._layout(shape), weights, activations, pages))
        return {"q": q, "pages": pages}
