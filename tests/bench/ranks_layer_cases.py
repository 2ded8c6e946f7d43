"""Expert layers over two ranks against one rank's, and what must be seen when a part of the exchange is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tokenfab.bench import ranks_ops
from tokenfab.bench.ranks_group import RankGroup
from tokenfab.bench.ranks_ops import all_reduce, exchanged_experts, make_exchange
from tokenfab.bench.step_ops import Place
from tokenfab.kernels.codec import quantize
from tokenfab.kernels.grouped_experts import KERNEL_OF
from tokenfab.kernels.inputs import random_matrix
from tokenfab.kernels.moe_layer import MoeLayer, empty_moe_workspace, moe_layer
from tokenfab.kernels.moe_weights import GroupedWeight, prepare_experts
from tokenfab.kernels.reference import error
from tokenfab.kernels.routing_rule import Routing

CPU = torch.device("cpu")
HIDDEN, INTER, EXPERTS, TOP_K = 128, 128, 8, 3
PLAIN = Routing(EXPERTS, TOP_K)
DEEPSEEK = Routing(EXPERTS, TOP_K, "sigmoid", True, True, 2, 1, 2.5)
SCALES = {"x_scale": 2.0**-4, "h_scale": 2.0**-2}


def _weight(format: str, activation: str, is_gated: bool, experts: range, channels: slice, seed: int) -> GroupedWeight:
    """``channels`` of INTER: of gate and of up, or columns of down."""
    stored: dict[str, list[torch.Tensor]] = {}
    for expert in experts:
        full = random_matrix(2 * INTER if is_gated else HIDDEN, HIDDEN if is_gated else INTER, seed + expert, CPU)
        part = torch.cat([half[channels] for half in full.chunk(2)]) if is_gated else full[:, channels]
        made = quantize(part.contiguous(), format)
        for name in ("data", "scale", "global_scale"):
            if getattr(made, name) is not None:
                stored.setdefault(name, []).append(getattr(made, name))
    layout = next(layout for w, x, layout in KERNEL_OF if (w, x) == (format, activation))
    extra: dict[str, Any] = {"activation_scale": SCALES["x_scale" if is_gated else "h_scale"]}
    parts = {name: torch.stack(each) for name, each in stored.items()}
    return prepare_experts(format, parts, is_gated=is_gated, layout=layout, **(extra if activation == "nvfp4" else {}))


def make_layer(
    formats: str, experts: range = range(EXPERTS), channels: slice = slice(None), *, routing: Routing = PLAIN,
    has_shared: bool = False,
) -> MoeLayer:  # fmt: skip
    weight, activation = formats.split("-")
    both = [_weight(weight, activation, gated, experts, channels, 100 * gated) for gated in (True, False)]
    shared = [_weight(weight, activation, gated, range(1), slice(None), 700 + gated) for gated in (True, False)]
    options: dict[str, Any] = {"shared_gate_up": shared[0], "shared_down": shared[1]} if has_shared else {}
    options |= SCALES if activation == "nvfp4" else {}
    bias = torch.linspace(-0.3, 0.3, EXPERTS) if routing.has_bias else None
    return MoeLayer(
        routing, *both, x_format=activation, h_format=activation, first_expert=experts.start, bias=bias, **options
    )


def own_experts(group: RankGroup) -> range:
    local = EXPERTS // group.size
    return range(group.rank * local, (group.rank + 1) * local)


def inputs(counts: list[int], chosen: list[int] | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of all ranks and their logits; ``chosen``: experts that every token takes first."""
    tokens = sum(counts)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    for place, expert in enumerate(chosen or []):
        logits[:, expert] = 9.0 - place
    return random_matrix(tokens, HIDDEN, 31 + seed, CPU), logits.bfloat16()


class Exchanged:
    """This rank's expert layer with an exchange, and one rank's that has all tokens and experts."""

    def __init__(self, group: RankGroup, formats: str, counts: list[int], **options: Any) -> None:
        self.group, self.counts = group, counts
        kept = {name: options.pop(name) for name in ("capacity",) if name in options}
        self.whole = make_layer(formats, **options)
        self.layer = make_layer(formats, own_experts(group), **options)
        self.exchange = make_exchange(
            group, self.layer, counts[group.rank], most_tokens=max(counts), all_tokens=sum(counts), **kept
        )

    def outputs(
        self, x: torch.Tensor, logits: torch.Tensor, is_poisoned: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(this rank's, what one rank has for these tokens)."""
        first = sum(self.counts[: self.group.rank])
        mine = slice(first, first + self.counts[self.group.rank])
        out = torch.full((self.counts[self.group.rank], HIDDEN), float("nan"), dtype=torch.bfloat16)
        for part in self.exchange.buffers.values() if is_poisoned else ():
            part.unsqueeze(-1).view(torch.uint8).fill_(0xFF)
        for op in exchanged_experts(self.exchange, self.layer, 0, x[mine].contiguous(), logits[mine].contiguous(), out):
            op.run(op.weights)
        workspace = empty_moe_workspace(self.whole, x.shape[0], CPU)
        return out, moe_layer(x, logits, self.whole, workspace=workspace)[mine]

    def same_bits(self, x: torch.Tensor, logits: torch.Tensor, is_poisoned: bool = True) -> bool:
        got, expected = self.outputs(x, logits, is_poisoned)
        return self.group.every(torch.equal(got, expected)) and self.exchange.overflowed() == 0


# -- right -----------------------------------------------------------------------------------------


def has_same_bits(
    group: RankGroup, formats: str, counts: list[int], chosen: list[int] | None = None, **options: Any
) -> bool:
    return Exchanged(group, formats, counts, **options).same_bits(*inputs(counts, chosen))


def leaves_nothing_behind(group: RankGroup) -> bool:
    """Three loads over the same buffers without poison between: what one left the next does not read."""
    both = Exchanged(group, "fp8_block-fp8_group", [5, 4], has_shared=True)
    loads = [inputs([5, 4]), inputs([5, 4], chosen=[1, 2, 3], seed=5), inputs([5, 4], chosen=[6], seed=9)]
    for load in loads:
        same = both.same_bits(*load, is_poisoned=False)
        if not same or _rows_that_came(both) != 9 * TOP_K:  # nor computes a row that was of the one before
            return False
    return True


def _rows_that_came(both: Exchanged) -> int:
    """To all ranks together."""
    return sum(int(row[0]) for row in both.group.numbers([float((both.exchange.rows.ids >= 0).sum())]))


def receives_nothing(group: RankGroup) -> bool:
    """Rank 1 gets no row, and gives none back."""
    both = Exchanged(group, "bf16-bf16", [4, 6])
    same = both.same_bits(*inputs([4, 6], chosen=[1, 2, 3]))
    came = [int(row[0]) for row in group.numbers([float((both.exchange.rows.ids >= 0).sum())])]
    return same and came == [30, 0]


def summed(group: RankGroup, formats: str, is_split: bool) -> bool:
    """Replicated tokens; each rank has some experts, or some channels of all; an all-reduce of BF16 parts."""
    x, logits = inputs([4, 3])
    half = slice(group.rank * INTER // 2, (group.rank + 1) * INTER // 2)
    mine = make_layer(formats, channels=half) if is_split else make_layer(formats, own_experts(group))
    part = moe_layer(x, logits, mine)
    out = torch.full_like(part, float("nan"))
    before = part.clone()
    op = all_reduce(Place("experts_all_reduce"), group, part, out)
    op.run(op.weights)
    op.run(op.weights)  # its input is left as it was
    expected = moe_layer(x, logits, make_layer(formats), out=torch.empty(7, HIDDEN))
    return group.every(torch.equal(part, before) and error(out, expected.double()) <= 1)


def overflows(group: RankGroup) -> bool:
    """All 3 x 6 rows of a rank go to rank 0, which has room for 10 of each: seen on both ranks, by how much."""
    both = Exchanged(group, "bf16-bf16", [6, 6], capacity=10)
    x, logits = inputs([6, 6], chosen=[0, 1, 2])
    got, expected = both.outputs(x, logits)
    is_finite = bool(got.isfinite().all())  # what found no room adds nothing
    return is_finite and both.exchange.overflowed() == 8 and not torch.equal(got, expected)


def fits_exactly(group: RankGroup) -> bool:
    both = Exchanged(group, "bf16-bf16", [6, 6], capacity=18)
    return both.same_bits(*inputs([6, 6], chosen=[0, 1, 2]))


# -- wrong -----------------------------------------------------------------------------------------


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def is_seen(group: RankGroup, change: Callable[[Exchanged], Any], formats: str = "bf16-bf16") -> bool:
    """With the change, bits differ on some rank."""
    both = Exchanged(group, formats, [5, 4])
    with change(both):
        return not both.same_bits(*inputs([5, 4]))


def _all_to_all(change: Callable[[RankGroup, torch.Tensor, torch.Tensor], None]) -> Callable[[Exchanged], Any]:
    right = RankGroup.all_to_all

    def wrong(group: RankGroup, out: torch.Tensor, x: torch.Tensor) -> None:
        right(group, out, x)
        change(group, out, x)

    return lambda both: changed(RankGroup, "all_to_all", wrong)


def _lose_rank(is_back: bool) -> Callable[[RankGroup, torch.Tensor, torch.Tensor], None]:
    """What came from rank 1 counts for nothing: of the dispatch (bytes), or of the combine (BF16)."""

    def lose(group: RankGroup, out: torch.Tensor, x: torch.Tensor) -> None:
        if (out.dtype == torch.bfloat16) == is_back:
            block = out[out.shape[0] // 2 :]
            if is_back:
                block.zero_()
            else:
                block[:, -8:-4] = 0xFF

    return lose


def _swap(group: RankGroup, out: torch.Tensor, x: torch.Tensor) -> None:
    if out.dtype == torch.uint8:
        out.copy_(torch.cat(out.chunk(2)[::-1]))


def _without_weights(both: Exchanged) -> Any:
    right = ranks_ops.expert_rows

    def wrong(x: Any, layer: MoeLayer, workspace: Any) -> torch.Tensor:
        return right(x, layer, replace(workspace, weights=torch.ones_like(workspace.weights)))

    return changed(ranks_ops, "expert_rows", wrong)


def _others_experts(both: Exchanged) -> Any:
    """The other rank's weights under this rank's numbers."""
    other = 1 - both.group.rank
    local = EXPERTS // 2
    wrong = make_layer("bf16-bf16", range(other * local, (other + 1) * local))
    return changed(both, "layer", replace(wrong, first_expert=both.layer.first_expert))


def _shifted_experts(both: Exchanged) -> Any:
    """The right weights under numbers that are one off."""
    first = min(both.layer.first_expert + 1, EXPERTS // 2)
    first = both.layer.first_expert - 1 if first == both.layer.first_expert else first
    return changed(both, "layer", replace(both.layer, first_expert=first))


def _other_slots(both: Exchanged) -> Any:
    """The combine adds the rows of other slots."""
    right = ranks_ops.combine

    def wrong(rows: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return right(rows.roll(1, 0), *rest, **options)

    return changed(ranks_ops, "combine", wrong)


def sum_is_missed(group: RankGroup, is_split: bool) -> bool:
    with changed(RankGroup, "all_reduce", lambda self, x: None):
        return not summed(group, "bf16-bf16", is_split)


def rank_is_lost_in_the_sum(group: RankGroup) -> bool:
    right = RankGroup.all_reduce

    def wrong(self: RankGroup, x: torch.Tensor) -> None:
        right(self, x.zero_() if self.rank == 1 else x)

    with changed(RankGroup, "all_reduce", wrong):
        return not summed(group, "bf16-bf16", False)


def sum_is_scaled(group: RankGroup) -> bool:
    right = RankGroup.all_reduce

    def wrong(self: RankGroup, x: torch.Tensor) -> None:
        right(self, x)
        x.mul_(1.02)

    with changed(RankGroup, "all_reduce", wrong):
        return not summed(group, "bf16-bf16", False)


CASES: dict[str, Callable[[RankGroup], bool]] = {
    "even bf16": partial(has_same_bits, formats="bf16-bf16", counts=[5, 5]),
    "even fp8": partial(has_same_bits, formats="fp8_block-fp8_group", counts=[5, 5]),
    "even mxfp4": partial(has_same_bits, formats="mxfp4-bf16", counts=[5, 5]),
    "even mxfp4 x mxfp8": partial(has_same_bits, formats="mxfp4-mxfp8", counts=[3, 3]),
    "even nvfp4": partial(has_same_bits, formats="nvfp4-nvfp4", counts=[3, 3]),
    "groups, bias and a shared expert": partial(
        has_same_bits, formats="fp8_block-fp8_group", counts=[4, 4], routing=DEEPSEEK, has_shared=True
    ),
    "three loads, one after the other": leaves_nothing_behind,
    "uneven tokens": partial(has_same_bits, formats="bf16-bf16", counts=[9, 2]),
    "all to one rank": partial(has_same_bits, formats="fp8_block-fp8_group", counts=[6, 3], chosen=[5, 6, 7]),
    "all to one expert": partial(has_same_bits, formats="bf16-bf16", counts=[5, 4], chosen=[6]),
    "a rank that receives nothing": receives_nothing,
    "a rank without tokens": partial(has_same_bits, formats="fp8_block-fp8_group", counts=[0, 5], has_shared=True),
    "a rank without tokens or rows": partial(has_same_bits, formats="bf16-bf16", counts=[5, 0], chosen=[1, 2, 3]),
    "beyond the capacity": overflows,
    "up to the capacity": fits_exactly,
    "sum of experts": partial(summed, formats="fp8_block-fp8_group", is_split=False),
    "sum of channels": partial(summed, formats="bf16-bf16", is_split=True),
    "seen: dispatch of a rank lost": partial(is_seen, change=_all_to_all(_lose_rank(False))),
    "seen: combine of a rank lost": partial(is_seen, change=_all_to_all(_lose_rank(True))),
    "seen: blocks swapped": partial(is_seen, change=_all_to_all(_swap)),
    "seen: no routing weight": partial(is_seen, change=_without_weights),
    "seen: another rank's experts": partial(is_seen, change=_others_experts),
    "seen: experts one off": partial(is_seen, change=_shifted_experts),
    "seen: other slots": partial(is_seen, change=_other_slots),
    "seen: no sum of experts": partial(sum_is_missed, is_split=False),
    "seen: no sum of channels": partial(sum_is_missed, is_split=True),
    "seen: a rank lost in the sum": rank_is_lost_in_the_sum,
    "seen: a scaled sum": sum_is_scaled,
}
