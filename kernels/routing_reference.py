"""Routing and its schedule in plain torch and Python: what the kernels must equal. Imports no kernel."""

from __future__ import annotations

import torch

from .routing_rule import SUM_FLOOR, Routing


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest of each row: NaN first, ties to the smaller index."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def route_ref(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule of ``routing_rule``, step by step in ``dtype``: ids (T, k) int32, weights (T, k).

    A renormalized softmax is taken over all experts first, then divided by the sum of the chosen ones.
    """
    values = logits.to(dtype)
    if routing.scoring == "softmax":
        choice, scores = values, torch.softmax(values, dim=-1)
    else:
        choice = scores = torch.sigmoid(values)
    if routing.has_bias:
        assert bias is not None
        choice = scores + bias.to(dtype)
    if routing.kept_groups < routing.num_groups:
        grouped = choice.unflatten(-1, (routing.num_groups, routing.group_size))
        group_score = torch.gather(grouped, -1, _largest(grouped, 2)).sum(-1)
        is_kept = torch.zeros_like(group_score, dtype=torch.bool)
        is_kept.scatter_(-1, _largest(group_score, routing.kept_groups), True)
        # after every kept expert, even one of -inf: that is what "cannot be chosen" means
        order = torch.sort(choice, dim=-1, descending=True, stable=True).indices
        outside = ~is_kept.repeat_interleave(routing.group_size, dim=-1).gather(-1, order)
        order = order.gather(-1, torch.sort(outside.int(), dim=-1, stable=True).indices)
        ids = order[..., : routing.top_k]
    else:
        ids = _largest(choice, routing.top_k)
    weights = torch.gather(scores, -1, ids)
    if routing.renormalize:
        floor = SUM_FLOOR if routing.scoring == "sigmoid" else 0.0
        weights = weights / (weights.sum(-1, keepdim=True) + floor)
    return ids.int(), weights * routing.scaling_factor


def schedule_ref(
    ids: torch.Tensor, num_local_experts: int, block_m: int, first_expert: int = 0
) -> dict[str, list[int]]:
    """The fields of ``moe_schedule.Schedule`` by name, blocks without what stands beyond the last."""
    rows = ids.flatten().tolist()
    members = [[row for row, expert in enumerate(rows) if expert == first_expert + e] for e in range(num_local_experts)]
    offsets = [0]
    for rows_of_expert in members:
        offsets.append(offsets[-1] + len(rows_of_expert))
    row_index = [row for rows_of_expert in members for row in rows_of_expert]
    position = [-1] * len(rows)
    for place, row in enumerate(row_index):
        position[row] = place
    blocks = [
        (expert, start)
        for expert in range(num_local_experts)
        for start in range(offsets[expert], offsets[expert + 1], block_m)
    ]
    return {
        "expert_offsets": offsets,
        "row_index": row_index + [-1] * (len(rows) - len(row_index)),
        "position": position,
        "block_expert": [expert for expert, _ in blocks],
        "block_start": [start for _, start in blocks],
    }
