"""The dense matmuls with their inputs and their reference, as tests and the bench run them.

A shape is {"m", "n", "k"}: y (m, n) BF16 = x (m, k) . w (n, k)^T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any

import torch

from .block_scaled_matmul import block_scaled_matmul
from .codec import QuantizedTensor, quantize
from .formats import get_format
from .fp4_weights import Fp4Weight, prepare_fp4_weight
from .fp8_matmul import MAX_FEW_TOKENS, fp8_matmul
from .inputs import EXACT_GLOBAL_SCALE, exact_operand, random_matrix, random_operand
from .matmul_points import FP8_FORMATS
from .reference import matmul_ref
from .registry import Shape
from .split_k import arch_of
from .tiles import find_tile
from .w4a8_matmul import w4a8_matmul
from .w4a8_weights import W4A8Weight, prepare_w4a8_weight
from .w4a16_matmul import w4a16_matmul

Buffers = dict[str, Any]

_ACTIVATION_SCALE = 2.0**-4
"""NVFP4 activations up to 2688 / 16 do not saturate."""


def _as_buffers(operand: QuantizedTensor) -> Buffers:
    parts = {"data": operand.data, "scale": operand.scale, "global_scale": operand.global_scale}
    return {name: part for name, part in parts.items() if part is not None}


def _as_operand(format: str, buffers: Buffers, rows: int, columns: int) -> QuantizedTensor:
    parts = (buffers.get(name) for name in ("data", "scale", "global_scale"))
    return QuantizedTensor(get_format(format), *parts, (rows, columns))


class StoredMatmul(ABC):
    """A matmul of operands as the codec stores them, unless a subclass lays them out anew."""

    def __init__(self, weight: str, activation: str) -> None:
        self.weight, self.activation = weight, activation

    def _operand(self, format: str, rows: int, columns: int, seed: int, device: Any, is_exact: bool) -> QuantizedTensor:
        return (exact_operand if is_exact else random_operand)(format, rows, columns, seed, torch.device(device))

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        return _as_buffers(self._operand(self.weight, shape["n"], shape["k"], 2 * seed, device, is_exact))

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        return _as_buffers(self._operand(self.activation, shape["m"], shape["k"], 2 * seed + 1, device, is_exact))

    def make_output(self, shape: Shape, device: Any) -> torch.Tensor:
        return torch.empty(shape["m"], shape["n"], dtype=torch.bfloat16, device=device)

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        x = _as_operand(self.activation, activations, shape["m"], shape["k"])
        return matmul_ref(x, self._stored(shape, weights))

    def _stored(self, shape: Shape, weights: Buffers) -> QuantizedTensor:
        """The weights as the codec stores them."""
        return _as_operand(self.weight, weights, shape["n"], shape["k"])

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        key = self._tile_key(shape)
        if key is None:
            return {}
        return asdict(find_tile(*key, arch_of(torch.device(device)), shape["m"], n=shape["n"], k=shape["k"]))

    def _tile_key(self, shape: Shape) -> tuple[str, str] | None:
        """Kernel and format in ``tiles.py``; None for a kernel that is cut up elsewhere."""
        return None

    @abstractmethod
    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None: ...


class Fp8Matmul(StoredMatmul):
    """``fp8_matmul``; the formats decide what shares a scale."""

    @property
    def _scaling(self) -> str:
        return next(scaling for scaling, formats in FP8_FORMATS.items() if formats == (self.weight, self.activation))

    def _tile_key(self, shape: Shape) -> tuple[str, str]:
        return ("fp8" if shape["m"] <= MAX_FEW_TOKENS else "fp8_many", self._scaling)

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        fp8_matmul(activations["data"], weights["data"], activations["scale"], weights["scale"], self._scaling,
                   out_dtype=output.dtype, out=output)  # fmt: skip


class BlockScaledMatmul(StoredMatmul):
    """``block_scaled_matmul``. NVFP4's two scales per tensor are multiplied at load."""

    def _tile_key(self, shape: Shape) -> tuple[str, str]:
        pair = self.weight if self.weight == self.activation else f"{self.weight}_{self.activation}"
        return ("block_scaled", pair)

    def _operand(self, format: str, rows: int, columns: int, seed: int, device: Any, is_exact: bool) -> QuantizedTensor:
        """NVFP4 activations have a scale per tensor that is fixed at load, as calibration does."""
        if format == "nvfp4" and not is_exact:
            values = random_matrix(rows, columns, seed, torch.device(device))
            return quantize(values, format, global_scale=_ACTIVATION_SCALE if seed % 2 else None)
        return super()._operand(format, rows, columns, seed, device, is_exact)

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        made = super().make_weights(shape, seed, device, is_exact=is_exact)
        if "global_scale" in made:
            made["factor"] = made["global_scale"] * (EXACT_GLOBAL_SCALE if is_exact else _ACTIVATION_SCALE)
        return made

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        block_scaled_matmul(
            activations["data"], weights["data"], activations["scale"], weights["scale"], self.weight,
            x_format=self.activation, global_scale=weights.get("factor"), out_dtype=output.dtype, out=output,
        )  # fmt: skip


class PreparedMatmul(StoredMatmul):
    """Weights laid out anew at load: they remember their seed, from which the reference makes them again."""

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        stored = self._operand(self.weight, shape["n"], shape["k"], 2 * seed, device, is_exact)
        return self.prepare(stored) | {"origin": torch.tensor([2 * seed, is_exact])}

    def _stored(self, shape: Shape, weights: Buffers) -> QuantizedTensor:
        seed, is_exact = weights["origin"].tolist()
        return self._operand(self.weight, shape["n"], shape["k"], seed, weights["words"].device, bool(is_exact))

    @abstractmethod
    def prepare(self, stored: QuantizedTensor) -> Buffers: ...


class W4A16Matmul(PreparedMatmul):
    """``w4a16_matmul``."""

    def _tile_key(self, shape: Shape) -> tuple[str, str]:
        return ("w4a16", self.weight)

    def prepare(self, stored: QuantizedTensor) -> Buffers:
        assert stored.scale is not None
        made = prepare_fp4_weight(stored.data, stored.scale, self.weight, stored.global_scale)
        return {"words": made.words, "scales": made.scales, "factor": made.factor}

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        x = activations["data"]
        parts = (weights["words"], weights["scales"], weights["factor"])
        weight = Fp4Weight(self.weight, *parts, output.shape[1], x.shape[1])
        w4a16_matmul(x, weight, out_dtype=output.dtype, out=output)


class W4A8Matmul(PreparedMatmul):
    """``w4a8_matmul``."""

    def _tile_key(self, shape: Shape) -> tuple[str, str]:
        return ("w4a8", self.activation)

    def prepare(self, stored: QuantizedTensor) -> Buffers:
        assert stored.scale is not None
        made = prepare_w4a8_weight(stored.data, stored.scale)
        return {"words": made.words, "scales": made.scales, "base": made.base}

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        x = activations["data"]
        parts = (weights["words"], weights["scales"], weights["base"])
        weight = W4A8Weight(*parts, output.shape[1], x.shape[1])
        w4a8_matmul(x, activations["scale"], weight, out_dtype=output.dtype, out=output)
