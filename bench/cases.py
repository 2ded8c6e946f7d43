"""A kernel of the registry at one shape, as the timing core takes it: its ``Case``, and the anchor beside it.

Imports torch.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..kernels.formats import MATRIX_RATES, get_format, matrix_rate
from ..kernels.reference import error
from ..kernels.registry import Kernel, Shape
from .case import Anchor, Case
from .gpus import Gpu
from .measurement import num_rotated_sets
from .peers import ANCHORS, fits

_CHUNK = 1 << 22
_SEED = 1 << 40


def compute_floor_s(kernel: Kernel, shape: Shape, gpu: Gpu) -> float:
    """Flops at the fastest rate of this GPU that is no faster than the formats'; 0 without matrix work."""
    flops = kernel.work(shape).flops
    if not flops:
        return 0.0
    rate = matrix_rate(get_format(kernel.weight), get_format(kernel.activation))
    slower = MATRIX_RATES[: MATRIX_RATES.index(rate) + 1]
    return flops / max(gpu.matrix_flops_per_s(each) for each in slower if getattr(gpu, f"{each}_flops_per_s"))


def make_case(kernel: Kernel, shape: Shape, gpu: Gpu, device: Any = "cuda") -> Case:
    """The case of ``kernel`` at ``shape``; buffers are made on ``device``."""
    run, work = kernel.load(), kernel.work(shape)

    def refresh(activations: dict[str, torch.Tensor], seed: int) -> None:
        for name, part in run.make_activations(shape, seed, device).items():
            activations[name].copy_(part)

    def distance(weights: Any, activations: Any, output: Any) -> float:
        return error(output, run.reference(shape, weights, activations))

    return Case(
        launch=run.launch,
        make_weights=lambda seed: run.make_weights(shape, seed, device),
        make_activations=lambda seed: run.make_activations(shape, seed, device),
        make_output=lambda: run.make_output(shape, device),
        refresh=refresh,
        error=distance,
        tolerance=kernel.tolerance,
        checksum=checksum,
        weight_bytes=work.weight_bytes,
        activation_bytes=work.activation_bytes,
        flops=work.flops,
        compute_floor_s=compute_floor_s(kernel, shape, gpu),
        memory_bytes_per_s=gpu.memory_bytes_per_s,
    )


def checksum(buffers: Any) -> Hashable:
    """Changes when a byte changes or moves: per tensor the sum of its words, and of its words times their place."""
    if isinstance(buffers, dict):
        buffers = list(buffers.values())
    if isinstance(buffers, tuple | list):
        return tuple(checksum(part) for part in buffers)
    data = buffers.contiguous().view(-1).view(torch.uint8)
    words = data[: data.numel() // 4 * 4].view(torch.int32)
    total = torch.zeros(2, dtype=torch.int64, device=data.device)
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + chunk.numel(), device=data.device)
        total += torch.stack([chunk.sum(), (chunk * places).sum()])  # wraps
    return (*total.tolist(), *data[words.numel() * 4 :].tolist())


def make_anchor(kernel: Kernel, shape: Shape, l2_bytes: int, device: Any = "cuda") -> Anchor | None:
    """The library's kernel at the same shape, its weights rotating out of L2 as well; None for other ops.

    FP8 activations, and narrower ones, stand beside cuBLAS's FP8 with a scale per tensor; BF16 beside its BF16, and
    attention over any cache beside torch's over BF16.
    """
    rate = "bf16" if kernel.activation == "bf16" else "fp8"
    peer = next((peer for peer in ANCHORS if peer.op == kernel.op and peer.activation == rate), None)
    if peer is None or not fits(peer, shape):
        return None
    run, work = peer.load(), peer.work(shape)
    ring = num_rotated_sets("cold_weights", l2_bytes, work.weight_bytes, work.activation_bytes)
    weights = [run.make_weights(shape, _SEED + index, device) for index in range(ring)]
    activations, output = run.make_activations(shape, _SEED, device), run.make_output(shape, device)
    num_launches = 0

    def launch() -> None:
        nonlocal num_launches
        run.launch(weights[num_launches % ring], activations, output)
        num_launches += 1

    return Anchor(f"{peer.name}", launch)
