"""The quantizers with their inputs and their reference, as tests and the bench run them.

A shape is {"rows", "columns"}, columns of the result. Outputs are buffers made before and written in place. NVFP4's
scale of the tensor is given, as calibration does, and kept with the weights; FP8's is found by each call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from .codec import QuantizedTensor
from .formats import get_format
from .fused_quantize import rms_norm_quantize, swiglu_quantize
from .inputs import exact_operand, random_matrix
from .quantize import empty_quantized, quantize_activation
from .quantize_tiles import Launch, needs_tensor_amax, quantize_launch, rms_norm_launch, swiglu_launch
from .reference import Bounds, Quantized, rms_norm_bounds, swiglu_bounds
from .registry import Shape

Buffers = dict[str, Any]

GLOBAL_SCALE = 2.0**-2
"""NVFP4 values up to 672 do not saturate."""

EPS = 1e-6


class Quantizer(ABC):
    """A quantizer of BF16, without weights of its own unless a subclass has some."""

    def __init__(self, weight: str, activation: str) -> None:
        self.format = get_format(activation)

    def _matrix(self, rows: int, columns: int, seed: int, device: Any, is_exact: bool) -> torch.Tensor:
        if is_exact:
            return exact_operand("bf16", rows, columns, seed, torch.device(device)).data
        return random_matrix(rows, columns, seed, torch.device(device))

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        return {"global_scale": torch.tensor(GLOBAL_SCALE, device=device)} if self.format.tensor_scale else {}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        return {"x": self._matrix(shape["rows"], shape["columns"], 3 * seed, device, is_exact)}

    def make_output(self, shape: Shape, device: Any) -> Buffers:
        made = empty_quantized(self.format, shape["rows"], shape["columns"], device)
        return {"data": made.data, "scale": made.scale}

    def _out(self, weights: Buffers, output: Buffers) -> QuantizedTensor:
        """The given scale is the result's own, so that no launch copies it."""
        data = output["data"]
        shape = (data.shape[0], data.shape[1] * (2 if self.format.packing else 1))
        return QuantizedTensor(self.format, data, output["scale"], weights.get("global_scale"), shape)

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> Quantized:
        low, high = self._bounds(weights, activations)
        return Quantized(self.format, low, high, weights.get("global_scale"), self._equal(activations))

    def _equal(self, activations: Buffers) -> Buffers:
        """What else is written."""
        return {}

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        launch = self._launch(shape["columns"])
        return {"block_m": launch.block_m, "block_k": launch.block_k, "num_warps": launch.num_warps}

    @property
    def _is_first_of_two(self) -> bool:
        """Whether a fused kernel leaves BF16 to be quantized by others."""
        return needs_tensor_amax(self.format, has_global_scale=True)

    @abstractmethod
    def _bounds(self, weights: Buffers, activations: Buffers) -> Bounds: ...

    @abstractmethod
    def _launch(self, columns: int) -> Launch: ...

    @abstractmethod
    def launch(self, weights: Buffers, activations: Buffers, output: Buffers) -> None: ...


class Quantize(Quantizer):
    """``quantize_activation``."""

    def _bounds(self, weights: Buffers, activations: Buffers) -> Bounds:
        return activations["x"], activations["x"]

    def _launch(self, columns: int) -> Launch:
        return quantize_launch(self.format, columns, from_amax=self._is_first_of_two)

    def launch(self, weights: Buffers, activations: Buffers, output: Buffers) -> None:
        out = self._out(weights, output)
        quantize_activation(activations["x"], self.format, global_scale=out.global_scale, out=out)


class RmsNormQuantize(Quantizer):
    """``rms_norm_quantize`` after a residual, as between attention and FFN; the new residual is an output."""

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        norm = self._matrix(1, shape["columns"], 3 * seed + 2, device, is_exact)[0]
        return {"norm": norm, **super().make_weights(shape, seed, device, is_exact=is_exact)}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        residual = self._matrix(shape["rows"], shape["columns"], 3 * seed + 1, device, is_exact)
        return {**super().make_activations(shape, seed, device, is_exact=is_exact), "residual": residual}

    def make_output(self, shape: Shape, device: Any) -> Buffers:
        residual = torch.empty(shape["rows"], shape["columns"], dtype=torch.bfloat16, device=device)
        return {**super().make_output(shape, device), "residual": residual}

    def _equal(self, activations: Buffers) -> Buffers:
        return {"residual": (activations["x"].float() + activations["residual"].float()).to(torch.bfloat16)}

    def _bounds(self, weights: Buffers, activations: Buffers) -> Bounds:
        return rms_norm_bounds(self._equal(activations)["residual"], weights["norm"], EPS)

    def _launch(self, columns: int) -> Launch:
        step = get_format("bf16") if self._is_first_of_two else self.format
        return rms_norm_launch(step, columns, has_residual=True)

    def launch(self, weights: Buffers, activations: Buffers, output: Buffers) -> None:
        out = self._out(weights, output)
        rms_norm_quantize(
            activations["x"], weights["norm"], EPS, self.format, residual=activations["residual"],
            residual_out=output["residual"], global_scale=out.global_scale, out=out,
        )  # fmt: skip


class SwigluQuantize(Quantizer):
    """``swiglu_quantize`` without a limit."""

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        return {"gate_up": self._matrix(shape["rows"], 2 * shape["columns"], 3 * seed, device, is_exact)}

    def _bounds(self, weights: Buffers, activations: Buffers) -> Bounds:
        return swiglu_bounds(activations["gate_up"])

    def _launch(self, columns: int) -> Launch:
        step = get_format("bf16") if self._is_first_of_two else self.format
        return swiglu_launch(step, columns, is_clamped=False)

    def launch(self, weights: Buffers, activations: Buffers, output: Buffers) -> None:
        out = self._out(weights, output)
        swiglu_quantize(activations["gate_up"], self.format, global_scale=out.global_scale, out=out)
