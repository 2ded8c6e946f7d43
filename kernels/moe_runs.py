"""The expert layer with its inputs and its reference, as tests and the bench run it: the whole layer, routing included.

A shape is {"num_tokens", "hidden", "inter", "top_k", "num_experts", "ep", "load"}: rank 0 of ``ep``, which holds the
first num_experts / ep experts; num_tokens are those of all ranks, as in the published tables. ``load`` is 100 times
the exponent of the power law (101, 120), 0 for balanced. Router: softmax, renormalized; activation: SwiGLU.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from .codec import QuantizedTensor, dequantize
from .grouped_experts import KERNEL_OF, choose_tile
from .inputs import exact_operand, random_matrix, random_operand
from .loads import load_logits
from .moe_layer import MoeLayer, MoeWorkspace, empty_moe_workspace, moe_layer
from .moe_reference import combine_ref, down_ref, gate_up_ref, round_h
from .moe_weights import GroupedWeight, prepare_experts
from .moe_work import draw_ids, local_experts
from .registry import Shape
from .routing_reference import route_ref
from .routing_rule import Routing

Buffers = dict[str, Any]

X_SCALE, H_SCALE = 2.0**-4, 2.0**-2
"""Calibrated scales per tensor of NVFP4 activations: up to 168 and 672 nothing saturates."""


class MoeRun:
    """``moe_layer`` for one pair of formats; h has the format of x."""

    def __init__(self, weight: str, activation: str) -> None:
        self.weight, self.activation = weight, activation
        self.layout = next(layout for w, x, layout in KERNEL_OF if (w, x) == (weight, activation))
        self._workspaces: dict[tuple[int, ...], MoeWorkspace] = {}

    # -- inputs ------------------------------------------------------------------------------------

    def _operand(self, rows: int, columns: int, seed: int, device: Any, is_exact: bool) -> QuantizedTensor:
        return (exact_operand if is_exact else random_operand)(self.weight, rows, columns, seed, torch.device(device))

    def _expert(
        self, shape: Shape, is_gated: bool, expert: int, seed: int, device: Any, is_exact: bool
    ) -> QuantizedTensor:
        hidden, inter = shape["hidden"], shape["inter"]
        rows, columns = (2 * inter, hidden) if is_gated else (hidden, inter)
        return self._operand(rows, columns, (seed * 4096 + expert) * 2 + is_gated, device, is_exact)

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        made: Buffers = {"origin": torch.tensor([seed, is_exact])}
        for is_gated, scale in ((True, X_SCALE), (False, H_SCALE)):
            each = []
            for expert in range(local_experts(shape)):
                stored = self._expert(shape, is_gated, expert, seed, device, is_exact)
                parts = {"data": stored.data, "scale": stored.scale, "global_scale": stored.global_scale}
                one = {name: part[None] for name, part in parts.items() if part is not None}
                extra: dict[str, Any] = {"activation_scale": scale} if self.activation == "nvfp4" else {}
                each.append(prepare_experts(self.weight, one, is_gated=is_gated, layout=self.layout, **extra).parts)
            for name in each[0]:
                if name == "base":
                    most = max(parts[name].shape[1] for parts in each)
                    each = [parts | {name: parts[name].expand(-1, most, -1)} for parts in each]
                made[f"{'gate_up' if is_gated else 'down'}.{name}"] = torch.cat([parts[name] for parts in each])
        return made

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> Buffers:
        tokens, hidden = shape["num_tokens"], shape["hidden"]
        where = (tokens, hidden, 2 * seed + 1, torch.device(device))
        x = exact_operand("bf16", *where).data if is_exact else random_matrix(*where)
        logits = load_logits(draw_ids(shape, seed), shape["num_experts"], torch.float32).to(device)
        sizes = torch.tensor([shape[name] for name in ("inter", "top_k", "ep")])
        return {"x": x, "logits": logits, "sizes": sizes}

    def make_output(self, shape: Shape, device: Any) -> torch.Tensor:
        return torch.empty(shape["num_tokens"], shape["hidden"], dtype=torch.bfloat16, device=device)

    # -- the kernel --------------------------------------------------------------------------------

    def _layer(self, weights: Buffers, hidden: int, inter: int, top_k: int, num_experts: int) -> MoeLayer:
        halves = []
        for prefix, channels, columns in (("gate_up.", inter, hidden), ("down.", hidden, inter)):
            parts = {name.removeprefix(prefix): part for name, part in weights.items() if name.startswith(prefix)}
            halves.append(GroupedWeight(self.weight, self.layout, parts, channels, columns, prefix == "gate_up."))
        is_nvfp4 = self.activation == "nvfp4"
        return MoeLayer(
            Routing(num_experts, top_k), *halves, x_format=self.activation, h_format=self.activation,
            x_scale=X_SCALE if is_nvfp4 else None, h_scale=H_SCALE if is_nvfp4 else None,
        )  # fmt: skip

    def launch(self, weights: Buffers, activations: Buffers, output: torch.Tensor) -> None:
        x, logits = activations["x"], activations["logits"]
        inter, top_k, _ = activations["sizes"].tolist()
        layer = self._layer(weights, x.shape[1], inter, top_k, logits.shape[1])
        key = (*x.shape, *logits.shape, layer.gate_up.num_experts, inter, top_k)
        if key not in self._workspaces:  # the layers of a model share one
            self._workspaces[key] = empty_moe_workspace(layer, x.shape[0], x.device)
        moe_layer(x, logits, layer, workspace=self._workspaces[key], out=output)

    def tile(self, shape: Shape, device: Any) -> dict[str, int]:
        """Of gate-up, at this load's average."""
        parts = {"data": torch.empty(1, 1, 1, device=device).expand(local_experts(shape), 1, 1)}
        w = GroupedWeight(self.weight, self.layout, parts, shape["inter"], shape["hidden"], True)
        return asdict(choose_tile(w, self.activation, shape["num_tokens"] * shape["top_k"], shape["num_experts"]))

    # -- the reference -----------------------------------------------------------------------------

    def reference(self, shape: Shape, weights: Buffers, activations: Buffers) -> torch.Tensor:
        """Expert by expert, the weights made again from their seed."""
        x, logits = activations["x"], activations["logits"]
        seed, is_exact = weights["origin"].tolist()
        ids, routing = route_ref(logits.cpu(), Routing(shape["num_experts"], shape["top_k"]))
        ids, routing = ids.to(x.device), routing.to(x.device)
        is_nvfp4 = self.activation == "nvfp4"
        scales = [torch.tensor(s, device=x.device) if is_nvfp4 else None for s in (X_SCALE, H_SCALE)]
        values = round_h(x, self.activation, scales[0])
        rows = torch.full((ids.numel(), shape["hidden"]), float("nan"), dtype=torch.float64, device=x.device)
        for expert in range(local_experts(shape)):
            mine = (ids.flatten() == expert).nonzero().flatten()
            if not mine.numel():
                continue
            upper, lower = (
                dequantize(self._expert(shape, is_gated, expert, seed, x.device, bool(is_exact))).double()[None]
                for is_gated in (True, False)
            )
            one = torch.zeros(mine.numel(), 1, dtype=torch.int32, device=x.device)
            h = gate_up_ref(values[mine // shape["top_k"]], one, upper, "silu")
            rows[mine] = down_ref(round_h(h, self.activation, scales[1]), one, routing.flatten()[mine, None], lower)
        return combine_ref(rows, shape["top_k"])
