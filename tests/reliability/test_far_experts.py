"""Row 4 for experts, whose weights are the largest tensors of a model: DeepSeek-V3's have 7.5e9 values in a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenfab.kernels.grouped_experts import down, gate_up
from tokenfab.kernels.moe_schedule import Schedule
from tokenfab.kernels.moe_weights import GroupedWeight
from tokenfab.tests.kernels.test_grouped_experts import PAIRS, make_experts, make_x, plan_of
from tokenfab.tests.reliability.layouts import FAR, sparse

Pair = tuple[str, str, str]
COLUMNS, CHANNELS = 160, 96
IDS = torch.tensor([[0, 1], [1, 0], [1, 0]])


def spread(w: GroupedWeight) -> GroupedWeight:
    """Two experts as the first and the last of so many that the last begins 2^31 values after the first."""
    count = FAR // max(part[0].numel() for part in w.parts.values()) + 2

    def far(part: torch.Tensor) -> torch.Tensor:
        flat = sparse(count * part[0].numel() * part.element_size(), part.device)
        made = flat.view(part.dtype).view(count, *part.shape[1:])
        made[0], made[-1] = part[0], part[1]
        return made

    return replace(w, parts={name: far(part) for name, part in w.parts.items()})


def spread_plan(plan: Schedule, count: int) -> Schedule:
    """The same rows, of the experts 0 and count - 1."""
    first, held = (int(plan.expert_offsets[index]) for index in (1, 2))
    offsets = torch.full((count + 1,), first, dtype=torch.int32, device=plan.expert_offsets.device)
    offsets[0], offsets[-1] = 0, held
    moved = torch.where(plan.block_expert == 1, count - 1, plan.block_expert)
    return replace(plan, expert_offsets=offsets, block_expert=moved)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_r04_experts_beyond_32_bits(pair: Pair, device: torch.device) -> None:
    """Both matmuls, in every format: the same bits as of two experts side by side."""
    if device.type == "cuda" and pair[1] == "nvfp4" and torch.cuda.get_device_capability()[0] < 10:
        pytest.skip("NVFP4 on both sides needs a Blackwell GPU")
    tokens, top_k = IDS.shape
    plan = plan_of(IDS, device, experts=2)
    upper = make_experts(pair, 2 * CHANNELS, COLUMNS, is_gated=True, experts=2, device=device).w
    x, _ = make_x(pair[1], tokens, COLUMNS, 1, device)
    wide = spread(upper)
    far_plan = spread_plan(plan, wide.num_experts)
    outs = [torch.full((tokens * top_k, CHANNELS), float("nan"), device=device) for _ in range(2)]
    for w, each, out in ((upper, plan, outs[0]), (wide, far_plan, outs[1])):
        gate_up(x, w, each, top_k=top_k, out=out)
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)

    lower = make_experts(pair, COLUMNS, CHANNELS, is_gated=False, experts=2, device=device).w
    h, _ = make_x(pair[1], tokens * top_k, CHANNELS, 2, device)
    wide = spread(lower)
    far_plan = spread_plan(plan, wide.num_experts)
    routing = torch.ones(tokens, top_k, device=device)
    outs = [torch.full((tokens * top_k, COLUMNS), float("nan"), device=device) for _ in range(2)]
    for w, each, out in ((lower, plan, outs[0]), (wide, far_plan, outs[1])):
        down(h, w, each, routing, out=out)
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)
