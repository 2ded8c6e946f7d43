"""What kernels are held to, in plain torch and float64. Imports no kernel.

``error`` is the one distance of the house: the largest and the root mean square of
``|y - expected| / max(RMS(expected), |expected|)``, each as a share of its limit, so that 1 is the most a correct
kernel may have. The limits leave room for BF16 outputs and Hopper's FP8 accumulators, and none for a scale that is
20 % off. Source: triton_kernels' ``assert_close`` (largest 2e-2, RMS 4e-3).

A quantizer has no such room: its codes and scales are the codec's, or wrong. What it may be unsure of is a rounding of
its input, where it computes that itself; ``Quantized`` knows from which BF16 value to which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .codec import QuantizedTensor, dequantize, encode_e2m1, encode_e4m3, quantize, unpack_fp4
from .formats import Format

MAX_ERROR = 2e-2
RMS_ERROR = 4e-3

Parts = dict[str, torch.Tensor]
Bounds = tuple[torch.Tensor, torch.Tensor]
"""Least and greatest BF16 that a value may have, NaN where it must be NaN."""


def matmul_ref(x: QuantizedTensor, w: QuantizedTensor) -> torch.Tensor:
    """y = x . w^T: (M, K) and (N, K) in any format -> (M, N) float64, of the dequantized operands."""
    return dequantize(x).double() @ dequantize(w).double().T


# -- activations -----------------------------------------------------------------------------------


def rms_norm_ref(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """BF16 of h / sqrt(mean(h^2) + eps) * weight by the kernel's float32 operations, in their order but for the sum."""
    h, weight = h.float(), weight.float()
    count = torch.full((h.shape[0], 1), float(h.shape[1]), device=h.device)
    mean = (h * h).sum(dim=1, keepdim=True) / count
    inverse = 1 / torch.sqrt(mean + torch.tensor(eps, dtype=torch.float32, device=h.device))
    return (h * inverse * weight).to(torch.bfloat16)


def rms_norm_bounds(h: torch.Tensor, weight: torch.Tensor, eps: float) -> Bounds:
    """Of the same in any order of the sum: (log2(K) / 2 + 14) 2^-24 relative, then rounded to BF16."""
    h = h.double()
    exact = h / torch.sqrt(h.square().mean(dim=1, keepdim=True) + eps) * weight.double()
    return _bounds(exact, (math.log2(h.shape[1]) / 2 + 14) * 2.0**-24)


def swiglu_ref(gate_up: torch.Tensor, limit: float | None, alpha: float) -> torch.Tensor:
    """silu(gate) * up, or gpt-oss's with ``limit``, in the input's precision, not rounded to BF16."""
    gate, up = gate_up.chunk(2, dim=1)
    if limit is None:
        return gate / (1 + torch.exp(-gate)) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + torch.exp(-(gate * alpha))) * (up + 1)


def swiglu_bounds(gate_up: torch.Tensor, limit: float | None = None, alpha: float = 1.0) -> Bounds:
    """Of the same by float32 operations: 2^-22 (2 + |gate|) relative, |alpha gate| with ``limit``, then to BF16."""
    gate, up = (part.double() for part in gate_up.chunk(2, dim=1))
    size = gate.abs() * (1 if limit is None else alpha)
    # 1 + up loses bits where up is about -1: absolute, half a unit of the largest term
    cancelled = 0 if limit is None else 2.0**-24 / (up + 1).abs().clamp(min=2.0**-8)
    return _bounds(swiglu_ref(gate_up.double(), limit, alpha), 2.0**-22 * (2 + size) + cancelled)


def _bounds(exact: torch.Tensor, relative: torch.Tensor | float) -> Bounds:
    slack = exact.abs() * (relative + 2.0**-24) + 2.0**-133  # float64 -> float32 -> BF16; BF16's subnormals
    return (exact - slack).float().bfloat16(), (exact + slack).float().bfloat16()


# -- distances -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """What a quantizer must write: of some matrix (R, C) from ``low`` to ``high``, by the codec's rules.

    Its scales must be those of some largest magnitude that is possible, its codes those of some possible values under
    the scales that it wrote. Where ``low`` is ``high`` no bit is free.

    Attributes:
        low, high: finite float32 or BF16.
        global_scale: of NVFP4, as given to the kernel.
        equal: what else it must write, bit for bit, by the name of its buffer.
    """

    format: Format
    low: torch.Tensor
    high: torch.Tensor
    global_scale: torch.Tensor | None = None
    equal: Parts = field(default_factory=dict)

    def error(self, output: Parts) -> float:
        """Share of what is in ``output`` ("data", "scale" and the names of ``equal``) that no correct kernel writes.

        Raises:
            ValueError: another dtype or shape.
        """
        data, scale = output["data"], output["scale"]
        stored = QuantizedTensor(self.format, data, scale, self.global_scale, (self.low.shape[0], self.low.shape[1]))
        wrong = [self._wrong_scales(scale), self._wrong_codes(stored)]
        wrong += [_different_bytes(name, output[name], expected) for name, expected in self.equal.items()]
        return sum(int(part.sum()) for part in wrong) / max(1, sum(part.numel() for part in wrong))

    def _wrong_scales(self, scale: torch.Tensor) -> torch.Tensor:
        low, high = self.low.abs(), self.high.abs()
        crosses = self.low.signbit() != self.high.signbit()
        sizes = (torch.minimum(low, high).masked_fill(crosses, 0), torch.maximum(low, high))
        bounds = [quantize(size, self.format, global_scale=self.global_scale).scale for size in sizes]
        least, most = (part.float() for part in bounds if part is not None)
        got = scale.float()
        return ~((least <= got) & (got <= most))  # NaN is wrong

    def _wrong_codes(self, stored: QuantizedTensor) -> torch.Tensor:
        factor, is_inverse = self._factor(stored)
        keys = []
        for values in (self.low.float(), self.high.float()):
            scaled = values * factor if is_inverse else values / factor
            keys.append(_ordered(encode_e2m1(scaled), 8) if self.format.packing else _ordered(encode_e4m3(scaled), 128))
        codes = unpack_fp4(stored.data) if self.format.packing else stored.data.view(torch.uint8)
        got = _ordered(codes, 8 if self.format.packing else 128)
        return (got < keys[0]) | (got > keys[1])

    def _factor(self, stored: QuantizedTensor) -> tuple[torch.Tensor, bool]:
        """Each value's divisor, or with True its factor: as in ``codec.quantize``, of the scales that are stored."""
        one = 0x22 if self.format.packing else 0x38  # codes of 1.0
        ones = torch.full_like(stored.data.view(torch.uint8), one).view(stored.data.dtype)
        unit = None if self.global_scale is None else torch.ones_like(self.global_scale)
        each = dequantize(QuantizedTensor(self.format, ones, stored.scale, unit, stored.shape))
        if self.global_scale is None:
            return each, False
        return self.global_scale.reciprocal() / each, True


@dataclass(frozen=True)
class Exact:
    """What a kernel must write, bit for bit.

    Attributes:
        parts: the expected buffers by name.
        written: of some of them, bool, which elements count: a kernel leaves the others as they were.
    """

    parts: Parts
    written: Parts = field(default_factory=dict)

    def error(self, output: Parts) -> float:
        """Share of the bytes that differ.

        Raises:
            ValueError: another dtype or shape.
        """
        wrong, total = 0, 0
        for name, expected in self.parts.items():
            different = _different_bytes(name, output[name], expected)
            if name in self.written:
                different = different[self.written[name]]
            wrong, total = wrong + int(different.sum()), total + different.numel()
        return wrong / max(1, total)


def _different_bytes(name: str, got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Bool, an axis of bytes last."""
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        raise ValueError(
            f"{name}: expected {expected.dtype} {tuple(expected.shape)}; got {got.dtype} {tuple(got.shape)}"
        )
    return torch.ne(*(part.contiguous().unsqueeze(-1).view(torch.uint8) for part in (got, expected)))


def _ordered(codes: torch.Tensor, sign: int) -> torch.Tensor:
    """Integers that are ordered like the values of sign-magnitude codes, -0 below +0."""
    size = (codes & (sign - 1)).to(torch.int16)
    return torch.where((codes & sign) != 0, -1 - size, size)


def error(y: torch.Tensor | Parts, expected: torch.Tensor | Quantized | Exact) -> float:
    """The distance of ``y`` from ``expected``; above 1 the kernel is wrong, NaN where either is not finite.

    Of buffers it is the error of ``Quantized`` or ``Exact``, and 0 is the most a correct kernel may have.

    Raises:
        ValueError: another shape.
    """
    if isinstance(expected, (Quantized, Exact)):
        assert isinstance(y, dict)
        return expected.error(y)
    assert isinstance(y, torch.Tensor)
    if y.shape != expected.shape:
        raise ValueError(f"y: expected shape {tuple(expected.shape)}; got {tuple(y.shape)}")
    if y.numel() == 0:
        return 0.0
    expected = expected.double()
    rms = expected.square().mean().sqrt()
    relative = (y.double() - expected).abs() / expected.abs().clamp_min(rms).clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.maximum(relative.max() / MAX_ERROR, relative.square().mean().sqrt() / RMS_ERROR))
