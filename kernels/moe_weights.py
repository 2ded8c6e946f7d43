"""Weights of the experts, prepared once at load.

Conventions, stated once. A gate-up weight is (E, 2 I, K): rows 0..I-1 are the gate ("w1", "gate_proj"), rows I..2 I-1
the up projection ("w3", "up_proj"). ``gate_up_order`` says what a checkpoint has: "gate_up" (that order; DeepSeek's,
Qwen's and Mixtral's separate tensors stacked so, vLLM's w13), "up_gate" (FlashInfer's TRT-LLM kernels), or
"interleaved" (gpt-oss: row 2 c is the gate and row 2 c + 1 the up of channel c). A down weight is (E, hidden, I).

FP4 weights that are decoded in registers are laid out anew (``fp4_weights.py``, ``w4a8_weights.py``), gate and up rows
in turn, 64 of each; the others stay as the codec stores them. NVFP4 scales per tensor are per expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .checks import require, seen
from .codec import QuantizedTensor
from .formats import Format, get_format
from .fp4_weights import prepare_fp4_weight

GATE_UP_ORDERS = ("gate_up", "up_gate", "interleaved")
_HALF = 64


@dataclass(frozen=True)
class GroupedWeight:
    """One weight of every expert of a rank.

    Attributes:
        format: as in ``formats.py``; layout: "stored" as the codec has it, "w4a16" or "w4a8" in fragment order.
        parts: tensors whose first axis is the expert.
        num_channels: I of a gate-up weight, hidden of a down weight. num_columns: K. is_gated: which of the two.
        bias: float32 (E, 2 I) in the order "gate_up", or (E, hidden); None without.
    """

    format: str
    layout: str
    parts: dict[str, torch.Tensor]
    num_channels: int
    num_columns: int
    is_gated: bool
    bias: torch.Tensor | None = None

    @property
    def row(self) -> Format:
        return get_format(self.format)

    @property
    def num_experts(self) -> int:
        return next(iter(self.parts.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    @property
    def num_bytes(self) -> int:
        """Of all experts, bias included."""
        return sum(part.nbytes for part in self.parts.values()) + (0 if self.bias is None else self.bias.nbytes)


def order_gate_up(rows: torch.Tensor, order: str) -> torch.Tensor:
    """(E, 2 I, ...) in ``order`` -> gate rows, then up rows.

    Raises:
        ValueError: an unknown order, or an odd number of rows.
    """
    require(order in GATE_UP_ORDERS, "gate_up_order", f"one of {', '.join(GATE_UP_ORDERS)}", repr(order))
    require(rows.dim() >= 2 and rows.shape[1] % 2 == 0, "weight", "(E, 2 I, ...)", seen(rows))
    if order == "interleaved":
        return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)
    if order == "up_gate":
        return torch.cat(rows.chunk(2, dim=1)[::-1], dim=1)
    return rows


def prepare_experts(
    format: str, parts: Mapping[str, torch.Tensor], *, is_gated: bool, layout: str = "stored",
    gate_up_order: str = "gate_up", bias: torch.Tensor | None = None, activation_scale: float | None = None,
) -> GroupedWeight:  # fmt: skip
    """The weight of E experts in the layout its kernel reads.

    Args:
        format: of the weights: bf16, fp8_row, fp8_block, mxfp8, mxfp4, nvfp4.
        parts: "data" (E, R, K) or packed (E, R, K / 2), "scale" (E, ...) as ``codec.QuantizedTensor`` has them for
            each expert, and for nvfp4 "global_scale" (E,) float32.
        is_gated: whether R = 2 I rows are gate and up.
        layout: "stored"; "w4a16" or "w4a8" for FP4 weights beside BF16 or FP8 activations.
        gate_up_order: what ``parts`` and ``bias`` have; ordered here. Blocks of 128 rows that share a scale
            (fp8_block) cannot be reordered.
        bias: (E, R), any float.
        activation_scale: of nvfp4 "stored": the calibrated scale per tensor of the NVFP4 activations beside it.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    row = get_format(format)
    require(
        "data" in parts and parts["data"].dim() == 3, "parts", "data (E, R, K)", {n: seen(p) for n, p in parts.items()}
    )
    experts, rows = parts["data"].shape[:2]
    columns = parts["data"].shape[2] * (2 if row.packing else 1)
    require(experts > 0 and rows > 0, "parts", "at least one expert and one row", seen(parts["data"]))
    require(not is_gated or rows % 2 == 0, "parts", "an even number of rows, gate and up", seen(parts["data"]))
    for expert in range(experts):  # the codec's own checks of dtype and shape
        QuantizedTensor(
            row, *(_part(parts, name, expert) for name in ("data", "scale", "global_scale")), (rows, columns)
        )
    ordered = dict(parts)
    if is_gated and gate_up_order != "gate_up":
        is_row_scaled = row.block is None or row.block[0] == 1
        require(is_row_scaled, "gate_up_order", f"gate_up for {format}, whose scales cover 128 rows", gate_up_order)
        ordered = {n: order_gate_up(p, gate_up_order) if p.dim() >= 2 else p for n, p in parts.items()}
    if bias is not None:
        require(tuple(bias.shape) == (experts, rows), "bias", f"(E, R) = {(experts, rows)}", seen(bias))
        bias = (order_gate_up(bias, gate_up_order) if is_gated else bias).float().contiguous()
    channels = rows // 2 if is_gated else rows
    require(layout in ("stored", "w4a16", "w4a8"), "layout", "stored, w4a16 or w4a8", repr(layout))
    if layout == "stored":
        kept = {name: part.contiguous() for name, part in ordered.items()}
        if activation_scale is not None:
            require(row.tensor_scale, "activation_scale", f"None for {format}", activation_scale)
            kept["factor"] = kept["global_scale"].float() * activation_scale
        return GroupedWeight(format, layout, kept, channels, columns, is_gated, bias)
    require(row.element == "e2m1", "format", f"an FP4 format for {layout}", format)
    prepared = _in_fragment_order(row, ordered, is_gated, layout)
    return GroupedWeight(format, layout, prepared, channels, columns, is_gated, bias)


def _part(parts: Mapping[str, torch.Tensor], name: str, expert: int) -> torch.Tensor | None:
    part = parts.get(name)
    return None if part is None else part[expert]


def _in_turn(rows: torch.Tensor) -> torch.Tensor:
    """(2 I, ...) gate then up -> 64 of each in turn, each half padded with zeros to a multiple of 64."""
    halves = rows.unflatten(0, (2, -1))
    missing = -halves.shape[1] % _HALF
    if missing:
        halves = torch.cat([halves, halves.new_zeros((2, missing, *halves.shape[2:]))], dim=1)
    return halves.unflatten(1, (-1, _HALF)).transpose(0, 1).flatten(0, 2).contiguous()


def _in_fragment_order(
    row: Format, parts: Mapping[str, torch.Tensor], is_gated: bool, layout: str
) -> dict[str, torch.Tensor]:
    made: list[dict[str, torch.Tensor]] = []
    for expert in range(parts["data"].shape[0]):
        data, scale = (part[expert] for part in (parts["data"], parts["scale"]))
        if is_gated:
            scale = _in_turn(scale.view(torch.uint8)).view(scale.dtype)
            data = _in_turn(data)
        if layout == "w4a8":
            from .w4a8_weights import prepare_w4a8_weight

            weight = prepare_w4a8_weight(data, scale, row.name)
            made.append({"words": weight.words, "scales": weight.scales, "base": weight.base})
        else:
            fp4 = prepare_fp4_weight(data, scale, row.name, _part(parts, "global_scale", expert))
            made.append({"words": fp4.words, "scales": fp4.scales, "factor": fp4.factor})
    if layout == "w4a8":  # one kernel for all experts: where one has a base per 128 columns, all have
        most = max(each["base"].shape[0] for each in made)
        for each in made:
            each["base"] = each["base"].expand(most, -1)
    return {name: torch.stack([each[name] for each in made]).contiguous() for name in made[0]}
