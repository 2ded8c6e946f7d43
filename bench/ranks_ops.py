"""Communication as ops of a decode step: sums over ranks, the gathering of logits, and the exchange of expert layers.

The exchange is padded. Every rank sends a block of ``capacity`` rows to every rank, one row per chosen expert as in the
decode plan's ``dispatch``: the token in the experts' format, its scales, the expert's number (-1: no row), its routing
weight. ``combine`` brings the experts' rows back to where they came from, and ``kernels.grouped_parts.combine`` adds a
token's slots in their order. Sizes never depend on the routing, so nothing waits for the host and a CUDA graph holds
the whole step on NCCL. The other way, splits of the true sizes, needs the counts of all ranks on the host before each
exchange: it cannot be captured, and would put two waits into every layer. What padding costs is bytes on the links; by
how much, ``Exchange.padding`` says.

Bits: a row of experts has the same wherever it is computed with the same tiles (those for the tokens of all ranks), it
travels unchanged, and slots are added in their order: an exchanged expert layer has the bits of one rank's, whatever
the load, the order of arrival or the number of ranks. A sum over ranks of BF16 parts (``all_reduce``) has not.

``capacity``: by default tokens x min(k, experts of a rank), which no routing exceeds. A smaller one sends less; a row
that finds no room is not dropped silently: ``Exchange.overflow`` counts it, and a step that has some is an error.

Communication is added, never hidden: each op waits for the one before it, on one stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..kernels.codec import QuantizedTensor
from ..kernels.formats import get_format, matrix_rate
from ..kernels.grouped_experts import as_bf16
from ..kernels.grouped_parts import combine
from ..kernels.moe_layer import (
    MoeLayer,
    MoeWorkspace,
    empty_moe_workspace,
    empty_row_workspace,
    expert_rows,
    shared_rows,
)
from ..kernels.moe_schedule import Schedule, empty_schedule, schedule
from ..kernels.quantize import empty_quantized
from ..kernels.registry import Work
from ..kernels.routing import route
from . import step_ops as ops
from .ranks_group import RankGroup
from .step_ops import Buffers, Place, StepOp, written

_BLOCK_M = 64
"""Of the schedule that sorts rows by rank; its blocks are not used."""

_BETWEEN = ("ids", "weights", "ranks", "slots", "position", "packed", "send", "received", "back", "own")

COMMUNICATION = (
    "dispatch", "combine", "attention_all_reduce", "dense_all_reduce", "experts_all_reduce", "logits_all_gather",
)  # fmt: skip
"""Names that the decode plan has for them."""


def all_reduce(place: Place, group: RankGroup, x: torch.Tensor, out: torch.Tensor) -> StepOp:
    """out = sum of x over ranks; x stays as it is, so its copy is part of the op."""

    def run(_: Buffers) -> None:
        out.copy_(x)
        group.all_reduce(out)

    return place.op(f"torch: all_reduce, {group.backend}", {}, {"x": x}, {"y": out}, run)


def gather_logits(place: Place, group: RankGroup, x: torch.Tensor, gathered: torch.Tensor, out: torch.Tensor) -> StepOp:
    """out (B, V) of every rank's x (B, V / ranks), by way of ``gathered`` (ranks B, V / ranks)."""
    parts = gathered.view(group.size, *x.shape)

    def run(_: Buffers) -> None:
        group.all_gather(gathered, x)
        out.view(x.shape[0], group.size, x.shape[1]).copy_(parts.transpose(0, 1))

    return place.op(f"torch: all_gather, {group.backend}", {}, {"x": x}, {"y": out}, run)


# -- the exchange of an expert layer ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exchange:
    """Buffers of one rank for the expert layers of one shape, which take turns.

    Attributes:
        capacity: rows of a block. tokens: of this rank, from 0 on.
        ids (T, k), weights (T, k): of this rank's tokens. x: these in the experts' format; None for BF16.
        ranks: ids' ranks. plan: rows sorted by rank. slots (T k,): where a row stands in ``send``, the last row of
            ``send`` for one that goes nowhere. position (T k,): -1 for such a one.
        packed, send, received: bytes of rows: codes, scales, expert, weight.
        rows: of the experts here, and what they read. back, own: the experts' rows, returned, and by token and slot.
        overflow: float64 (1,), the most rows beyond the capacity that any exchange so far had.
    """

    group: RankGroup
    layer: MoeLayer
    tokens: int
    all_tokens: int
    capacity: int
    ids: torch.Tensor
    weights: torch.Tensor
    x: QuantizedTensor | None
    ranks: torch.Tensor
    plan: Schedule
    slots: torch.Tensor
    position: torch.Tensor
    packed: torch.Tensor
    send: torch.Tensor
    received: torch.Tensor
    operand: QuantizedTensor
    rows: MoeWorkspace
    shared: MoeWorkspace | None
    back: torch.Tensor
    own: torch.Tensor
    overflow: torch.Tensor

    @property
    def row_bytes(self) -> int:
        return self.send.shape[1]

    @property
    def buffers(self) -> Buffers:
        """All that stands between two launches, for poison: nothing of it may be read before it is written."""
        made = {name: getattr(self, name) for name in _BETWEEN}
        made |= {"rows.ids": self.rows.ids, "rows.weights": self.rows.weights, "rows": self.rows.rows}
        made |= {f"operand.{name}": part for name, part in written(self.operand).items()}
        return made | ({} if self.x is None else {f"x.{name}": part for name, part in written(self.x).items()})

    @property
    def sent_bytes(self) -> tuple[int, int]:
        """That leave this rank in one (dispatch, combine)."""
        rows = (self.group.size - 1) * self.capacity
        return rows * self.row_bytes, rows * self.back.shape[1] * self.back.element_size()

    @property
    def padding(self) -> float:
        """Rows sent per row that has a token."""
        return self.group.size * self.capacity / max(1, self.tokens * self.layer.routing.top_k)

    def overflowed(self) -> float:
        """The most rows that one rank had for another beyond the capacity, on any rank. Waits."""
        return self.group.most(float(self.overflow))[0]


def full_capacity(layer: MoeLayer, tokens: int) -> int:
    """Rows of a block that no routing of so many tokens exceeds."""
    return max(1, tokens * min(layer.routing.top_k, layer.gate_up.num_experts))


def make_exchange(
    group: RankGroup, layer: MoeLayer, tokens: int, *, most_tokens: int | None = None, all_tokens: int | None = None,
    capacity: int | None = None,
) -> Exchange:  # fmt: skip
    """The exchange of ``layer``, which has the experts of this rank, for ``tokens`` tokens of this rank, 0 or more.

    Args:
        most_tokens: of any rank; all_tokens: of all; both the same on all ranks, by default as if all had ``tokens``.
        capacity: rows of a block, the same on all ranks; ``full_capacity`` by default.

    Raises:
        ValueError: sizes that do not fit the layer or each other.
    """
    most_tokens = tokens if most_tokens is None else most_tokens
    all_tokens = tokens * group.size if all_tokens is None else all_tokens
    routing, local, device = layer.routing, layer.gate_up.num_experts, layer.gate_up.device
    _require(
        local * group.size == routing.num_experts, "layer", f"1 / {group.size} of {routing.num_experts} experts", local
    )
    _require(layer.first_expert == group.rank * local, "first_expert", f"{group.rank * local}", layer.first_expert)
    _require(0 <= tokens <= most_tokens, "tokens", f"0 to {most_tokens}", tokens)
    capacity = full_capacity(layer, most_tokens) if capacity is None else capacity
    most = full_capacity(layer, most_tokens)
    _require(1 <= capacity <= most, "capacity", f"1 to {most}, beyond which no routing goes", capacity)
    count, blocks = tokens * routing.top_k, group.size * capacity
    rows = empty_row_workspace(layer, blocks, all_tokens, device)
    operand = rows.x or as_bf16(torch.zeros(blocks, layer.hidden, dtype=torch.bfloat16, device=device))
    if operand.global_scale is not None and layer.x_scale is not None:
        operand.global_scale.fill_(layer.x_scale)
    x = None
    if layer.x_format != "bf16":
        x = empty_quantized(layer.x_format, tokens, layer.hidden, device)
    width = sum(part.shape[1] for part in _as_bytes(operand)) + 8
    width += -width % 4
    shared = None
    if layer.shared_gate_up is not None and tokens:
        shared = empty_moe_workspace(layer, tokens, device).shared

    def buffer(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Exchange(
        group=group, layer=layer, tokens=tokens, all_tokens=all_tokens, capacity=capacity,
        ids=buffer(tokens, routing.top_k, dtype=torch.int32),
        weights=buffer(tokens, routing.top_k, dtype=torch.float32), x=x,
        ranks=buffer(tokens, routing.top_k, dtype=torch.int32),
        plan=empty_schedule(tokens, routing.top_k, group.size, _BLOCK_M, device),
        slots=buffer(count, dtype=torch.int64), position=buffer(count, dtype=torch.int32),
        packed=buffer(count, width), send=buffer(blocks + 1, width), received=buffer(blocks, width), operand=operand,
        rows=rows, shared=shared, back=buffer(blocks, layer.hidden, dtype=torch.bfloat16),
        own=buffer(count, layer.hidden, dtype=torch.bfloat16), overflow=buffer(1, dtype=torch.float64),
    )  # fmt: skip


def exchanged_experts(
    exchange: Exchange, layer: MoeLayer, index: int | None, x: torch.Tensor, logits: torch.Tensor, out: torch.Tensor
) -> list[StepOp]:
    """An expert layer over ranks: from this rank's tokens x (T, h) BF16 and router logits to its sums out (T, h).

    ``layer``: as ``exchange.layer`` but for its weights.
    """
    made = [_route(Place("router_top_k", index), exchange, layer, logits)]
    operand = as_bf16(x)
    if exchange.x is not None:
        operand = exchange.x
        if operand.global_scale is not None and layer.x_scale is not None:
            operand.global_scale.fill_(layer.x_scale)
        made.append(ops.to_format(Place("dispatch_quantize", index), x, operand))
    made.append(_dispatch(Place("dispatch", index), exchange, operand))
    made.append(_experts(Place("experts", index), exchange, layer))
    extra = None
    if exchange.shared is not None:
        extra = exchange.shared.rows
        made.append(_shared(Place("shared_experts", index), exchange, layer, operand, extra))
    made.append(_combine(Place("combine", index), exchange, extra, out))
    return made


def _route(place: Place, exchange: Exchange, layer: MoeLayer, logits: torch.Tensor) -> StepOp:
    weights = {} if layer.bias is None else {"correction_bias": layer.bias}

    def run(w: Buffers) -> None:
        route(logits, layer.routing, w.get("correction_bias"), ids=exchange.ids, weights=exchange.weights)

    outputs = {"ids": exchange.ids, "weights": exchange.weights}
    return place.op("tokenfab: route", weights, {"logits": logits}, outputs, run)


def _as_bytes(x: QuantizedTensor) -> list[torch.Tensor]:
    """Codes and scales, a row of bytes for each row."""
    return [part.view(torch.uint8).view(x.shape[0], part.nbytes // max(1, x.shape[0])) for part in
            (x.data, x.scale) if part is not None]  # fmt: skip


def _fields(rows: torch.Tensor, widths: list[int]) -> list[torch.Tensor]:
    """Views of rows of bytes: codes, scales, then expert int32 (N, 1) and weight float32 (N, 1)."""
    made, at = [], 0
    for width in widths:
        made.append(rows[:, at : at + width])
        at += width
    end = rows.shape[1]
    return [*made, rows[:, end - 8 : end - 4].view(torch.int32), rows[:, end - 4 :].view(torch.float32)]


def _dispatch(place: Place, exchange: Exchange, x: QuantizedTensor) -> StepOp:
    """Rows sorted into the blocks of their ranks, sent, and laid out as the experts read them."""
    group, capacity, local = exchange.group, exchange.capacity, exchange.layer.gate_up.num_experts
    top_k, nowhere = exchange.layer.routing.top_k, exchange.group.size * exchange.capacity
    widths = [part.shape[1] for part in _as_bytes(exchange.operand)]
    received = _fields(exchange.received, widths)
    targets = [*_as_bytes(exchange.operand), exchange.rows.ids, exchange.rows.weights]
    send_ids = _fields(exchange.send, widths)[-2]
    blocks = exchange.send[:nowhere]

    def run(_: Buffers) -> None:
        send_ids.fill_(-1)
        if exchange.tokens:
            torch.div(exchange.ids, local, rounding_mode="floor", out=exchange.ranks)
            schedule(exchange.ranks, group.size, _BLOCK_M, out=exchange.plan)
            sorted_to, flat = exchange.plan.position, exchange.ranks.view(-1)
            place_in = sorted_to - exchange.plan.expert_offsets[flat.long().clamp(0, group.size - 1)]
            is_sent = (sorted_to >= 0) & (place_in < capacity)
            beyond = ((sorted_to >= 0) & ~is_sent).sum().double().view(1)
            torch.maximum(exchange.overflow, beyond, out=exchange.overflow)
            exchange.slots.copy_(torch.where(is_sent, flat * capacity + place_in, nowhere))
            exchange.position.copy_(torch.where(is_sent, sorted_to, -1))
            packed = _fields(exchange.packed, widths)
            for target, part in zip(packed, _as_bytes(x), strict=False):
                target.unflatten(0, (-1, top_k)).copy_(part[:, None, :])
            packed[-2].copy_(exchange.ids.view(-1, 1))
            packed[-1].copy_(exchange.weights.view(-1, 1))
            exchange.send.index_copy_(0, exchange.slots, exchange.packed)
        group.all_to_all(exchange.received, blocks)
        for target, part in zip(targets, received, strict=True):
            target.copy_(part)

    inputs = written(x) | {"ids": exchange.ids, "weights": exchange.weights}
    outputs = {"received": exchange.received, "slots": exchange.slots, "position": exchange.position}
    return place.op(f"torch: all_to_all_single, {group.backend}", {}, inputs, outputs, run)


def _experts(place: Place, exchange: Exchange, layer: MoeLayer) -> StepOp:
    """The experts of this rank on the rows that came. Outputs as bits: rows of no token are not written."""
    space, operand, group = exchange.rows, exchange.operand, exchange.group

    def run(w: Buffers) -> None:
        expert_rows(operand, ops.bound(layer, w), space)

    def work() -> Work:
        chosen = space.ids[space.ids >= 0]
        values = 3.0 * layer.gate_up.num_channels * layer.gate_up.num_columns
        weight_bytes = int(chosen.unique().numel() * values * layer.gate_up.row.bits_per_value / 8)
        row_bytes = layer.hidden * (get_format(layer.x_format).bytes_per_value + 2)
        most = group.most(weight_bytes, int(chosen.numel() * row_bytes), 2.0 * chosen.numel() * values)
        return Work(int(most[0]), int(most[1]), most[2])

    weights = {name: part for name, part in ops.flat(layer).items() if name.split(".")[0] in ("gate_up", "down")}
    inputs = written(operand) | {"ids": space.ids, "weights": space.weights}
    rate = matrix_rate(layer.gate_up.row, get_format(layer.x_format))
    outputs = {"rows": space.rows.view(torch.int16)}
    return place.op("tokenfab: expert_rows", weights, inputs, outputs, run, rate=rate, work=work)


def _shared(place: Place, exchange: Exchange, layer: MoeLayer, x: QuantizedTensor, out: torch.Tensor) -> StepOp:
    """The shared expert on this rank's tokens."""
    space = replace(exchange.rows, shared=exchange.shared)
    upper = layer.shared_gate_up
    assert upper is not None

    def run(w: Buffers) -> None:
        shared_rows(x, ops.bound(layer, w), space)

    weights = {name: part for name, part in ops.flat(layer).items() if name.startswith("shared")}
    flops = 6.0 * x.shape[0] * upper.num_channels * upper.num_columns
    rate = matrix_rate(upper.row, get_format(layer.x_format))
    return place.op("tokenfab: shared_rows", weights, written(x), {"y": out}, run, flops=flops, rate=rate)


def _combine(place: Place, exchange: Exchange, extra: torch.Tensor | None, out: torch.Tensor) -> StepOp:
    """The experts' rows back to their tokens, and a token's slots added in their order."""
    group, last = exchange.group, exchange.back.shape[0] - 1
    rows, top_k = exchange.rows.rows, exchange.layer.routing.top_k

    def run(_: Buffers) -> None:
        group.all_to_all(exchange.back, rows)
        if exchange.tokens:
            torch.index_select(exchange.back, 0, exchange.slots.clamp(max=last), out=exchange.own)
            combine(exchange.own, exchange.position, top_k, out, extra=extra)

    inputs = {"rows": rows, "slots": exchange.slots, "position": exchange.position}
    inputs |= {} if extra is None else {"extra": extra}
    return place.op(f"torch: all_to_all_single, {group.backend}", {}, inputs, {"y": out}, run)


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}; got {got}")
