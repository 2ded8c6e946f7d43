"""The two matmuls of the experts: ``gate_up`` and ``down``, for every format; which kernel and tile runs them.

============  =======================  ==========================================  ===============================
weights       x and h                  layout (``moe_weights.prepare_experts``)    kernel
============  =======================  ==========================================  ===============================
bf16          bf16                     stored                                      ``grouped_matmul.py``
fp8_row       fp8_row                  stored                                      ``grouped_matmul.py``
fp8_block     fp8_group                stored                                      ``grouped_matmul.py``
mxfp4, nvfp4  bf16                     w4a16                                       ``grouped_fp4.py``
mxfp4         fp8_row, fp8_group       w4a8                                        ``grouped_fp4.py``
mxfp8         mxfp8                    stored                                      ``grouped_block_scaled.py``
mxfp4         mxfp4, mxfp8             stored                                      ``grouped_block_scaled.py``
nvfp4         nvfp4                    stored                                      ``grouped_block_scaled.py``
============  =======================  ==========================================  ===============================

h is by position: row p of h belongs to row ``plan.row_index[p]``. Errors: ``ValueError`` before any launch, naming
argument, expected, got.
"""

from __future__ import annotations

import torch
import triton

from .checks import require, seen
from .codec import QuantizedTensor
from .formats import get_format
from .grouped_block_scaled import launch_grouped_block_scaled
from .grouped_fp4 import launch_grouped_fp4
from .grouped_matmul import launch_grouped
from .grouped_parts import ACTIVATIONS
from .moe_schedule import Schedule
from .moe_weights import GroupedWeight
from .split_k import arch_of
from .tiles import Tile, find_tile

KERNEL_OF = {
    ("bf16", "bf16", "stored"): "grouped", ("fp8_row", "fp8_row", "stored"): "grouped",
    ("fp8_block", "fp8_group", "stored"): "grouped",
    ("mxfp4", "bf16", "w4a16"): "grouped_w4a16", ("nvfp4", "bf16", "w4a16"): "grouped_w4a16",
    ("mxfp4", "fp8_row", "w4a8"): "grouped_w4a8", ("mxfp4", "fp8_group", "w4a8"): "grouped_w4a8",
    ("mxfp8", "mxfp8", "stored"): "grouped_block_scaled", ("mxfp4", "mxfp4", "stored"): "grouped_block_scaled",
    ("mxfp4", "mxfp8", "stored"): "grouped_block_scaled", ("nvfp4", "nvfp4", "stored"): "grouped_block_scaled",
}  # fmt: skip
"""(format of the weights, of the activations, layout) -> kernel in ``tiles.py``."""

QUANTIZING = ("grouped", "grouped_w4a16", "grouped_w4a8")
"""Kernels that can write h in fp8_group themselves."""

_BLOCKS = (16, 32, 64)


def _tile_key(w: GroupedWeight, activation: str) -> tuple[str, str]:
    """Kernel and format in ``tiles.py``."""
    kernel = KERNEL_OF.get((w.format, activation, w.layout))
    pairs = ", ".join(f"{weight} ({layout}) x {x}" for weight, x, layout in KERNEL_OF)
    require(kernel is not None, "x", f"one of {pairs}", f"{w.format} ({w.layout}) x {activation}")
    assert kernel is not None
    if kernel == "grouped_w4a8":
        return kernel, activation
    is_mixed = kernel == "grouped_block_scaled" and activation != w.format
    return kernel, f"{w.format}_{activation}" if is_mixed else w.format


def choose_tile(w: GroupedWeight, activation: str, num_rows: int, num_experts: int) -> Tile:
    """A tile for twice the average expert's rows, so that few experts need a second block and read weights twice.

    ``num_rows`` and ``num_experts`` are those of all ranks together; ``activation`` the format of x or h. Both matmuls
    of a layer share a schedule, so both take the tile's block_m.

    Raises:
        ValueError: a pair and layout that no kernel has.
    """
    kernel, format = _tile_key(w, activation)
    wanted = triton.next_power_of_2(-(-2 * num_rows // max(num_experts, 1)))
    channels, columns = w.num_channels, w.num_columns
    hidden, inter = (columns, channels) if w.is_gated else (channels, columns)
    return find_tile(
        kernel, format, arch_of(w.device), min(max(wanted, _BLOCKS[0]), _BLOCKS[-1]), rows=num_rows,
        experts=num_experts, local_experts=w.num_experts, hidden=hidden, inter=inter,
    )  # fmt: skip


def grouped_tile(w: GroupedWeight, activation: str, block_m: int) -> tuple[str, Tile]:
    """(kernel, its tile with blocks of ``block_m`` rows) for weights beside activations of that format.

    Raises:
        ValueError: a pair, layout or block that no kernel has.
    """
    kernel, format = _tile_key(w, activation)
    tiles = [find_tile(kernel, format, arch_of(w.device), size) for size in _BLOCKS]
    blocks = sorted({tile.block_m for tile in tiles})
    require(block_m in blocks, "plan", f"block_m of {', '.join(map(str, blocks))}", block_m)
    return kernel, next(tile for tile in tiles if tile.block_m == block_m)


def gate_up(
    x: QuantizedTensor, w: GroupedWeight, plan: Schedule, *, top_k: int, activation: str = "silu",
    tile: Tile | None = None, out: torch.Tensor | QuantizedTensor | None = None,
) -> torch.Tensor | QuantizedTensor:  # fmt: skip
    """h[p] = act(gate) * up of token ``plan.row_index[p] // top_k``, for every position p that has a row.

    Args:
        x: (T, K), rows contiguous. w: a gated weight of the experts that ``plan`` is for.
        activation: "silu" or "swiglu_oai"; see ``grouped_parts.py``.
        out: BF16 or FP32 (T top_k, I), or an fp8_group ``QuantizedTensor`` of this shape: h rounded to BF16, then
            quantized as ``codec.quantize`` does. BF16 by default. Positions without a row are not written.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    require(w.is_gated, "w", "gate and up rows", "a down weight")
    require(activation in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    rows = plan.position.numel()
    require(top_k >= 1 and rows == x.shape[0] * top_k, "top_k", f"{rows} rows of x's {x.shape[0]} tokens", top_k)
    kernel, tile = _check(x, w, plan, tile)
    shape = (rows, w.num_channels)
    out = torch.empty(shape, dtype=torch.bfloat16, device=w.device) if out is None else out
    if isinstance(out, QuantizedTensor):
        fits = kernel in QUANTIZING and out.format.name == "fp8_group" and out.shape == shape
        require(fits, "out", f"fp8_group {shape} of one of {', '.join(QUANTIZING)}", f"{out.format.name} {out.shape}")
        require(tile.block_n == 256, "tile", "256 rows, 128 channels, for a quantized h", tile)
        _check_output(out.data, shape, (torch.float8_e4m3fn,), w.device)
    else:
        _check_output(out, shape, (torch.bfloat16, torch.float32), w.device)
    _launch(kernel, x, w, plan, out, top_k, activation, None, tile)
    return out


def down(
    h: QuantizedTensor, w: GroupedWeight, plan: Schedule, routing: torch.Tensor, *, tile: Tile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y[r] = routing[r] * (w[e] . h[position of r]) for every row r of this rank's experts.

    Args:
        h: (T k, I) by position. routing: float32 (T, k) or (T k,), weights by row.
        out: BF16 or FP32 (T k, hidden), BF16 by default; rows of other ranks' experts are not written.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    require(not w.is_gated, "w", "a down weight", "gate and up rows")
    rows = plan.position.numel()
    require(h.shape[0] == rows, "h", f"{rows} rows", f"{h.shape[0]} rows")
    fits = routing.dtype == torch.float32 and routing.numel() == rows and routing.is_contiguous()
    require(fits and routing.device == w.device, "routing", f"float32, {rows} values on {w.device}", seen(routing))
    kernel, tile = _check(h, w, plan, tile)
    shape = (rows, w.num_channels)
    out = torch.empty(shape, dtype=torch.bfloat16, device=w.device) if out is None else out
    _check_output(out, shape, (torch.bfloat16, torch.float32), w.device)
    _launch(kernel, h, w, plan, out, 1, "", routing, tile)
    return out


def _check(x: QuantizedTensor, w: GroupedWeight, plan: Schedule, tile: Tile | None) -> tuple[str, Tile]:
    if tile is None:
        kernel, tile = grouped_tile(w, x.format.name, plan.block_m)
    else:
        kernel, _ = _tile_key(w, x.format.name)
    require(tile.block_m == plan.block_m, "tile", f"block_m = {plan.block_m}, as the plan", tile)
    require(x.shape[1] == w.num_columns, "x", f"K = {w.num_columns}", f"K = {x.shape[1]}")
    parts = [("x", x.data), ("x", x.scale), ("plan", plan.row_index)]
    for name, part in parts:
        if part is not None:
            require(part.device == w.device, name, f"device {w.device}", part.device)
            require(part.is_contiguous(), name, "contiguous", f"stride {part.stride()}")
    local = plan.num_local_experts
    require(local == w.num_experts, "plan", f"{w.num_experts} local experts, as w", local)
    if w.format == "nvfp4" and w.layout == "stored":
        is_old = w.device.type == "cuda" and torch.cuda.get_device_capability(w.device)[0] < 10
        require(not is_old, "w", "layout w4a16 below compute capability 10", "nvfp4 as stored")
        require("factor" in w.parts, "w", "an activation_scale beside nvfp4 activations", "none")
    return kernel, tile


def _check_output(
    out: torch.Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    fits = tuple(out.shape) == shape and out.dtype in dtypes and out.is_contiguous() and out.device == device
    names = " or ".join(map(str, dtypes))
    require(fits, "out", f"{names} {shape} on {device}, contiguous", f"{seen(out)} on {out.device}")


def _launch(
    kernel: str, x: QuantizedTensor, w: GroupedWeight, plan: Schedule, out: torch.Tensor | QuantizedTensor, top_k: int,
    activation: str, routing: torch.Tensor | None, tile: Tile,
) -> None:  # fmt: skip
    if x.shape[0] == 0:
        return
    if kernel == "grouped_block_scaled":
        assert isinstance(out, torch.Tensor)
        launch_grouped_block_scaled(x, w, plan, out, top_k=top_k, activation=activation, routing=routing, tile=tile)
        return
    launch = launch_grouped if kernel == "grouped" else launch_grouped_fp4
    launch(x, w, plan, out, top_k=top_k, activation=activation, routing=routing, tile=tile)


def as_bf16(x: torch.Tensor) -> QuantizedTensor:
    """A BF16 matrix as an operand."""
    return QuantizedTensor(get_format("bf16"), x, None, None, (x.shape[0], x.shape[1]))
