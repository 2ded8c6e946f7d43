"""Other libraries' paged MLA decode over absorbed latents, run as tokenfab's own is; see ``peer_attention.py``.

o = softmax((q_latent . c + q_rope . r) (rank + rope)^-1/2) . c; the scale is that of ``mla_runs.py``.

Source: flashinfer-python 0.6.18 (``mla.BatchMLAPagedAttentionWrapper``: latents and rope parts in two caches; FP8 on
sm_90 with a scale for each), sgl-flash-mla 1.0.0 (``flash_mla_with_kvcache``: one cache (page, 64, 1, 576), dense
BF16 decoding on its legacy side, which is the one for sm_90; the first call makes the schedule).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..kernels.attention_runs import random_table
from ..kernels.codec import encode_e4m3
from ..kernels.inputs import random_matrix
from ..kernels.mla_runs import FP8_SCALE
from ..kernels.registry import Shape
from .peer_attention import WORKSPACE_BYTES

Buffers = dict[str, Any]

_SIZES = ("batch", "length", "num_heads", "kv_lora_rank", "rope_dim", "q_len", "page_size")
_SEED = 1


class _MlaPeer(ABC):
    """A cache (pages, page_size, rank + rope) in BF16 or E4M3, as one tensor or as two."""

    is_split: bool

    def __init__(self, weight: str, activation: str) -> None:
        self.format = weight

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        pages, size = shape["batch"] * -(-shape["length"] // shape["page_size"]), shape["page_size"]
        rank, width = shape["kv_lora_rank"], shape["kv_lora_rank"] + shape["rope_dim"]
        values = random_matrix(pages * size, width, seed, torch.device(device))
        if self.format == "fp8":
            values = encode_e4m3(values.float() / FP8_SCALE).view(torch.float8_e4m3fn)
        values = values.view(pages, size, width)
        if not self.is_split:
            return {"cache": values}
        return {"latent": values[:, :, :rank].contiguous(), "rope": values[:, :, rank:].contiguous()}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        tokens, place = shape["batch"] * shape["q_len"], torch.device(device)
        width = shape["kv_lora_rank"] + shape["rope_dim"]
        q = random_matrix(tokens * shape["num_heads"], width, 2 * seed + 1, place)
        return {
            "q": q.view(tokens, shape["num_heads"], width),
            "lengths": torch.full((shape["batch"],), shape["length"], dtype=torch.int32, device=place),
            "page_table": random_table(shape["batch"], -(-shape["length"] // shape["page_size"]), _SEED, place),
            "sizes": torch.tensor([shape[name] for name in _SIZES]),  # on the host
        }

    def make_output(self, shape: Shape, device: Any) -> torch.Tensor:
        tokens = shape["batch"] * shape["q_len"]
        return torch.empty(tokens, shape["num_heads"], shape["kv_lora_rank"], dtype=torch.bfloat16, device=device)

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        rank, q_len, q = shape["kv_lora_rank"], shape["q_len"], activations["q"].double()
        scale, made = _score_scale(shape), []
        factor = FP8_SCALE if self.format == "fp8" else 1.0
        parts = (weights["latent"], weights["rope"]) if self.is_split else (weights["cache"],)
        for seq, pages in enumerate(activations["page_table"].long()):
            kv = torch.cat([part[pages].flatten(0, 1).double() for part in parts], dim=1) * factor
            for token in range(q_len):
                seen = kv[: shape["length"] - q_len + 1 + token]
                p = torch.softmax(q[seq * q_len + token] @ seen.T * scale, dim=1)
                made.append(p @ seen[:, :rank])
        return torch.stack(made)

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        return {}

    @abstractmethod
    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None: ...


def _score_scale(shape: Shape) -> float:
    return (shape["kv_lora_rank"] + shape["rope_dim"]) ** -0.5


class FlashInferMla(_MlaPeer):
    """``BatchMLAPagedAttentionWrapper``, planned once per shape; q comes in its two parts, as absorption leaves it."""

    is_split = True

    def __init__(self, weight: str, activation: str) -> None:
        super().__init__(weight, activation)
        import flashinfer.mla  # pyright: ignore[reportMissingImports]

        self._wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper
        self._planned: dict[tuple[int, ...], Any] = {}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        made = super().make_activations(shape, seed, device, is_exact=is_exact)
        key = tuple(made["sizes"].tolist())
        if key not in self._planned:
            self._planned[key] = self._plan(shape, made["page_table"], made["lengths"])
        latent, rope = made["q"].split((shape["kv_lora_rank"], shape["rope_dim"]), dim=2)
        return made | {"q_latent": latent.contiguous(), "q_rope": rope.contiguous()}

    def _plan(self, shape: Shape, table: torch.Tensor, lengths: torch.Tensor) -> Any:
        batch, pages = table.shape
        ints = {"dtype": torch.int32, "device": table.device}
        rows = torch.arange(0, (batch + 1) * shape["q_len"], shape["q_len"], **ints)
        starts = torch.arange(0, (batch + 1) * pages, pages, **ints)
        wrapper = self._wrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=table.device), use_cuda_graph=True,
            qo_indptr=torch.empty_like(rows), kv_indptr=torch.empty_like(starts),
            kv_indices=torch.empty(batch * pages, **ints), kv_len_arr=torch.empty_like(lengths),
        )  # fmt: skip
        wrapper.plan(
            rows, starts, table.flatten(), lengths, shape["num_heads"], shape["kv_lora_rank"], shape["rope_dim"],
            shape["page_size"], shape["q_len"] > 1, _score_scale(shape), torch.bfloat16,
            torch.float8_e4m3fn if self.format == "fp8" else torch.bfloat16,
        )  # fmt: skip
        return wrapper

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        scales = {"ckv_scale": FP8_SCALE, "kpe_scale": FP8_SCALE} if self.format == "fp8" else {}
        wrapper = self._planned[tuple(activations["sizes"].tolist())]
        wrapper.run(activations["q_latent"], activations["q_rope"], weights["latent"], weights["rope"], out=output,
                    **scales)  # fmt: skip


class FlashMla(_MlaPeer):
    """``flash_mla_with_kvcache``, whose schedule is made by the first call at a shape and kept for the layers after
    it; it gives a result of its own, which is copied."""

    is_split = False

    def __init__(self, weight: str, activation: str) -> None:
        super().__init__(weight, activation)
        import flash_mla  # pyright: ignore[reportMissingImports]

        self._library = flash_mla
        self._schedules: dict[tuple[int, ...], Any] = {}

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        key = tuple(activations["sizes"].tolist())
        shape: dict[str, int] = dict(zip(_SIZES, key, strict=True))
        if key not in self._schedules:
            self._schedules[key] = self._library.get_mla_metadata()[0]
        q = activations["q"]
        made, _ = self._library.flash_mla_with_kvcache(
            q.view(-1, shape["q_len"], *q.shape[1:]), weights["cache"][:, :, None], activations["page_table"],
            activations["lengths"], shape["kv_lora_rank"], self._schedules[key], softmax_scale=_score_scale(shape),
            causal=shape["q_len"] > 1, is_fp8_kvcache=False, use_legacy=True,
        )  # fmt: skip
        output.copy_(made.view(output.shape))
