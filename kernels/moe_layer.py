"""A whole expert layer: routing, the experts' two matmuls, and the combine, in a few capturable launches.

Math:    y[t] = sum_s weight[t, s] down[e](act(gate[e] x[t]) * up[e] x[t]), e = ids[t, s], over the experts of this
         rank, (ids, weight) = route(logits[t]); + the shared expert's act(gate x[t]) * up x[t], down.
Launches: route 1, schedule 1 (3 beyond 4096 rows), quantization of x (FP8 and FP4 formats) 1, gate-up 1, quantization
         of h (formats that gate-up does not write itself) 1, down 1, combine 1; a shared expert: gate-up,
         quantization, down.
Workspace: ``MoeWorkspace`` holds every intermediate of up to a number of tokens; with it nothing is allocated, and one
         workspace may serve all layers of a model in turn.
In parts: where routed rows come from other ranks (expert parallelism with an exchange) ``expert_rows`` is the middle of
         the layer, from ids on: a row has the same bits there as in the whole layer, given the same tiles.
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  model code of DeepSeek-V3, Qwen3-MoE, Mixtral, gpt-oss in Hugging Face transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .checks import require, seen
from .codec import QuantizedTensor
from .grouped_experts import KERNEL_OF, QUANTIZING, as_bf16, choose_tile, down, gate_up, grouped_tile
from .grouped_parts import combine
from .moe_schedule import Schedule, empty_schedule, schedule
from .moe_weights import GroupedWeight
from .quantize import empty_quantized, quantize_activation
from .routing import route
from .routing_rule import Routing
from .tiles import Tile


@dataclass(frozen=True)
class MoeLayer:
    """The weights of one layer on one rank.

    Attributes:
        routing: the rule; bias: its float32 (E,) correction, if it has one.
        gate_up, down: of this rank's experts, first_expert .. first_expert + their number - 1.
        x_format, h_format: what x and h are in beside these weights; "bf16" where they are not quantized.
        activation: "silu" or "swiglu_oai".
        shared_gate_up, shared_down: of the shared expert, which every token takes, as weights of one expert.
        x_scale, h_scale: scales per tensor of NVFP4 activations, calibrated, as in ``prepare_experts``.

    Raises:
        ValueError: parts that do not fit each other.
    """

    routing: Routing
    gate_up: GroupedWeight
    down: GroupedWeight
    x_format: str = "bf16"
    h_format: str = "bf16"
    activation: str = "silu"
    bias: torch.Tensor | None = None
    first_expert: int = 0
    shared_gate_up: GroupedWeight | None = None
    shared_down: GroupedWeight | None = None
    x_scale: float | None = None
    h_scale: float | None = None

    def __post_init__(self) -> None:
        upper, lower = self.gate_up, self.down
        require(upper.is_gated and not lower.is_gated, "gate_up, down", "a gated and a down weight", "others")
        fits = lower.num_columns == upper.num_channels and lower.num_channels == upper.num_columns
        require(fits, "down", f"({upper.num_columns}, {upper.num_channels})", (lower.num_channels, lower.num_columns))
        require(lower.num_experts == upper.num_experts, "down", f"{upper.num_experts} experts", lower.num_experts)
        for half, weight in (("gate_up", upper), ("down", lower)):
            for name, part in weight.parts.items():
                require(part.is_contiguous(), f"{half}.{name}", "contiguous", f"stride {part.stride()}")
        last, known = self.first_expert + upper.num_experts, self.routing.num_experts
        require(self.first_expert >= 0 and last <= known, "first_expert", f"experts within 0..{known}", last)
        for name, weight, format in (("x_format", upper, self.x_format), ("h_format", lower, self.h_format)):
            try:
                choose_tile(weight, format, 1, 1)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        require((self.shared_gate_up is None) == (self.shared_down is None), "shared_down", "both or none", "one")
        if self.shared_gate_up is not None and self.shared_down is not None:
            shared = (self.shared_gate_up, self.shared_down)
            fits = all(each.num_experts == 1 for each in shared) and shared[0].num_columns == upper.num_columns
            require(fits, "shared_gate_up", f"one expert of K = {upper.num_columns}", shared[0].num_columns)

    @property
    def hidden(self) -> int:
        return self.gate_up.num_columns

    def tiles(self, num_tokens: int) -> tuple[Tile, Tile]:
        """Of gate-up and down for so many tokens, those of all ranks: with the rows of a block that both have."""
        rows, experts = num_tokens * self.routing.top_k, self.routing.num_experts
        upper = choose_tile(self.gate_up, self.x_format, rows, experts)
        lower = choose_tile(self.down, self.h_format, rows, experts)
        if upper.block_m > lower.block_m:
            upper = grouped_tile(self.gate_up, self.x_format, lower.block_m)[1]
        elif lower.block_m > upper.block_m:
            lower = grouped_tile(self.down, self.h_format, upper.block_m)[1]
        return upper, lower

    def block_m(self, num_tokens: int) -> int:
        """Rows of a block of ``tiles``."""
        return self.tiles(num_tokens)[0].block_m


@dataclass(frozen=True)
class MoeWorkspace:
    """Intermediates of a layer at exactly ``num_tokens`` tokens; contents undefined between calls.

    ``tiles``: of gate-up and down, chosen with the plan's blocks; None: those that ``grouped_tile`` has for these.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    plan: Schedule
    x: QuantizedTensor | None
    h_bf16: torch.Tensor | None
    h: QuantizedTensor | None
    rows: torch.Tensor
    shared: MoeWorkspace | None = None
    tiles: tuple[Tile, Tile] | None = None

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]


def empty_moe_workspace(layer: MoeLayer, num_tokens: int, device: torch.device | str) -> MoeWorkspace:
    """Room for ``num_tokens`` tokens of ``layer``, and of any layer of the same shape and formats."""
    top_k = layer.routing.top_k
    tiles = layer.tiles(num_tokens)
    plan = empty_schedule(num_tokens, top_k, layer.gate_up.num_experts, tiles[0].block_m, device)
    shared = None
    if layer.shared_gate_up is not None and layer.shared_down is not None:
        block_m = _shared_block_m(layer, num_tokens)
        constant = torch.zeros(num_tokens, 1, dtype=torch.int32, device=device)
        shared_plan = schedule(constant, 1, block_m)
        shared = _workspace(layer, layer.shared_gate_up, constant, shared_plan, num_tokens, 1, device)
        shared.weights.fill_(1.0)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    made = _workspace(layer, layer.gate_up, ids, plan, num_tokens, top_k, device, tiles)
    return replace(made, shared=shared)


def _shared_block_m(layer: MoeLayer, num_tokens: int) -> int:
    assert layer.shared_gate_up is not None
    assert layer.shared_down is not None
    tile = choose_tile(layer.shared_gate_up, layer.x_format, num_tokens, 2)
    return min(tile.block_m, choose_tile(layer.shared_down, layer.h_format, num_tokens, 2).block_m)


def _workspace(
    layer: MoeLayer, upper: GroupedWeight, ids: torch.Tensor, plan: Schedule, num_tokens: int, top_k: int,
    device: torch.device | str, tiles: tuple[Tile, Tile] | None = None,
) -> MoeWorkspace:  # fmt: skip
    rows, inter = num_tokens * top_k, upper.num_channels
    x = None if layer.x_format == "bf16" else empty_quantized(layer.x_format, num_tokens, layer.hidden, device)
    h = None if layer.h_format == "bf16" else empty_quantized(layer.h_format, rows, inter, device)
    # positions without a row are quantized with the others and never read: zeros keep them finite
    is_written = _writes_h(layer, upper, plan, tiles)
    plain = None if is_written else torch.zeros(rows, inter, dtype=torch.bfloat16, device=device)
    return MoeWorkspace(
        ids=ids,
        weights=torch.empty(num_tokens, top_k, dtype=torch.float32, device=device),
        plan=plan,
        x=x,
        h_bf16=plain,
        h=h,
        rows=torch.empty(rows, layer.hidden, dtype=torch.bfloat16, device=device),
        tiles=tiles,
    )


def _writes_h(layer: MoeLayer, upper: GroupedWeight, plan: Schedule, tiles: tuple[Tile, Tile] | None) -> bool:
    """Whether gate-up itself writes h in its format."""
    if layer.h_format != "fp8_group" or KERNEL_OF[upper.format, layer.x_format, upper.layout] not in QUANTIZING:
        return False
    tile = tiles[0] if tiles else grouped_tile(upper, layer.x_format, plan.block_m)[1]
    return tile.block_n == 256


def moe_layer(
    x: torch.Tensor, logits: torch.Tensor, layer: MoeLayer, *, workspace: MoeWorkspace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y (T, hidden) of tokens x (T, hidden) BF16 and router logits (T, E), the part of this rank's experts.

    Args:
        workspace: from ``empty_moe_workspace`` for T tokens; allocated if None.
        out: BF16 or FP32 (T, hidden), contiguous; BF16 by default.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    fits = x.dim() == 2 and x.dtype == torch.bfloat16 and x.shape[1] == layer.hidden and x.is_contiguous()
    require(fits, "x", f"bfloat16 (T, {layer.hidden}), contiguous", seen(x))
    tokens, device = x.shape[0], layer.gate_up.device
    require(x.device == device, "x", f"device {device}", x.device)
    fits = logits.dim() == 2 and logits.shape[0] == tokens and logits.device == device
    require(fits, "logits", f"({tokens}, {layer.routing.num_experts}) on {device}", seen(logits))
    workspace = empty_moe_workspace(layer, tokens, device) if workspace is None else workspace
    require(workspace.num_tokens == tokens, "workspace", f"one for {tokens} tokens", workspace.num_tokens)
    out = torch.empty(tokens, layer.hidden, dtype=torch.bfloat16, device=device) if out is None else out
    fits = out.shape == x.shape and out.dtype in (torch.bfloat16, torch.float32) and out.is_contiguous()
    require(
        fits and out.device == device,
        "out",
        f"BF16 or FP32 (T, hidden) {tuple(x.shape)} on {device}, contiguous",
        seen(out),
    )
    ids, weights = route(logits, layer.routing, layer.bias, ids=workspace.ids, weights=workspace.weights)
    local, first = layer.gate_up.num_experts, layer.first_expert
    plan = schedule(ids, local, workspace.plan.block_m, first_expert=first, out=workspace.plan)
    operand = as_bf16(x)
    if workspace.x is not None:
        operand = quantize_activation(x, layer.x_format, global_scale=layer.x_scale, out=workspace.x)
    rows = _experts(operand, weights, layer, layer.gate_up, layer.down, plan, workspace)
    return combine(rows, plan.position, layer.routing.top_k, out, extra=shared_rows(operand, layer, workspace))


def shared_rows(x: QuantizedTensor, layer: MoeLayer, workspace: MoeWorkspace) -> torch.Tensor | None:
    """(T, hidden) of the shared expert for tokens in ``x_format``; None without one."""
    shared = workspace.shared
    if shared is None:
        return None
    assert layer.shared_gate_up is not None
    assert layer.shared_down is not None
    return _experts(x, shared.weights, layer, layer.shared_gate_up, layer.shared_down, shared.plan, shared)


# -- rows that come from elsewhere -----------------------------------------------------------------


def empty_row_workspace(layer: MoeLayer, num_rows: int, num_tokens: int, device: torch.device | str) -> MoeWorkspace:
    """Room for ``num_rows`` rows of one expert each. ``num_tokens``: those of all ranks, by which tiles are chosen.

    ``x``, ``ids`` (num_rows, 1) and ``weights`` are there to be filled; ids all -1: no row.
    """
    require(num_rows >= 1, "num_rows", "1 or more", num_rows)
    tiles = layer.tiles(num_tokens)
    plan = empty_schedule(num_rows, 1, layer.gate_up.num_experts, tiles[0].block_m, device)
    ids = torch.full((num_rows, 1), -1, dtype=torch.int32, device=device)
    return _workspace(layer, layer.gate_up, ids, plan, num_rows, 1, device, tiles)


def expert_rows(x: QuantizedTensor, layer: MoeLayer, workspace: MoeWorkspace) -> torch.Tensor:
    """(rows, hidden) BF16, weighted, of the rows that ``workspace.ids`` gives to this rank's experts.

    Args:
        x: (rows, hidden) in ``layer.x_format``; rows without an expert here are not read.
        workspace: from ``empty_row_workspace``; its ids are experts' numbers in the whole layer, -1 for no row.

    Returns: ``workspace.rows``; rows without an expert here are not written.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    shape = (workspace.num_tokens, layer.hidden)
    require(x.format.name == layer.x_format, "x", layer.x_format, x.format.name)
    require(x.shape == shape, "x", f"{shape}", x.shape)
    plan = schedule(
        workspace.ids, layer.gate_up.num_experts, workspace.plan.block_m, first_expert=layer.first_expert,
        out=workspace.plan,
    )  # fmt: skip
    return _experts(x, workspace.weights, layer, layer.gate_up, layer.down, plan, workspace)


def _experts(
    x: QuantizedTensor, weights: torch.Tensor, layer: MoeLayer, upper: GroupedWeight, lower: GroupedWeight,
    plan: Schedule, workspace: MoeWorkspace,
) -> torch.Tensor:  # fmt: skip
    """Rows (T k, hidden), weighted; those of other ranks' experts are not written."""
    top_k = weights.shape[1]
    tile, down_tile = workspace.tiles or (None, None)
    if workspace.h_bf16 is None:
        h = gate_up(x, upper, plan, top_k=top_k, activation=layer.activation, tile=tile, out=workspace.h)
        assert isinstance(h, QuantizedTensor)
        return down(h, lower, plan, weights, tile=down_tile, out=workspace.rows)
    plain = gate_up(x, upper, plan, top_k=top_k, activation=layer.activation, tile=tile, out=workspace.h_bf16)
    assert isinstance(plain, torch.Tensor)
    h = as_bf16(plain)
    if workspace.h is not None:
        h = quantize_activation(plain, layer.h_format, global_scale=layer.h_scale, out=workspace.h)
    return down(h, lower, plan, weights, tile=down_tile, out=workspace.rows)
