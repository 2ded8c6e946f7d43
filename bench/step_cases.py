"""A decode step, and each of its ops, as the timing core takes them: their ``Case``s, and what these check.

See ``step_measure.py`` for the method. Nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..kernels.formats import MATRIX_RATES, get_format
from ..kernels.kv_cache import KvCache, MlaCache, write_mla_ref, write_ref
from ..kernels.reference import error
from .case import Case
from .cases import checksum
from .gpus import Gpu
from .measurement import L2Policy, num_rotated_sets
from .step_ops import Buffers, StepOp
from .step_reference import check_layers
from .step_state import DecodeStep

L2_TIMES = 5
"""How often the L2 must fit into what a step moves, as in ``num_rotated_sets``."""

MAX_RING = 512
"""Sets of an op's weights at most; more are needed for those of less than half a megabyte."""

MAX_COPIED_BYTES = 4 << 30
"""Of a ring, beside what the layers have: an embedding, of which few rows are read, is not copied hundreds of times."""

LAYER_TOLERANCE = {"bf16": 0.02, "e4m3": 0.08, "e2m1": 0.15}
"""Of ``check_layers``, by the element of activations: what a code that is tipped over may cost. A part that is left out
or mistaken costs 0.3 and more."""


# -- the whole step --------------------------------------------------------------------------------


def flops_floor_s(op: StepOp, flops: float, gpu: Gpu) -> float:
    """Flops at the fastest rate of this GPU that is no faster than the op's; 0 without matrix work."""
    if not flops:
        return 0.0
    slower = MATRIX_RATES[: MATRIX_RATES.index(op.rate) + 1]
    return flops / max(gpu.matrix_flops_per_s(each) for each in slower if getattr(gpu, f"{each}_flops_per_s"))


def make_step_case(step: DecodeStep, gpu: Gpu, l2_bytes: int) -> Case:
    """The whole step. Launches it once, to know which experts its tokens choose.

    Raises:
        ValueError: a step of which too much would stay in L2.
    """
    weight_bytes, flops, compute_s = 0, 0.0, 0.0

    def count(op: StepOp) -> None:
        nonlocal weight_bytes, flops, compute_s
        work = op.work()
        weight_bytes, flops = weight_bytes + work.weight_bytes, flops + work.flops
        compute_s += flops_floor_s(op, work.flops, gpu)

    inputs, outputs = {"token_ids": step.token_ids, **step.tokens, "lengths": step.lengths}, _outputs(step)
    _draw_tokens(step, 0)
    step.launch(count)
    own_bytes = weight_bytes * step.distinct_layers // step.num_layers
    if own_bytes < L2_TIMES * l2_bytes:
        raise ValueError(
            f"model: expected a step whose own weights and caches are {L2_TIMES} x {l2_bytes} bytes of L2 or more; "
            f"{step.model.config.name} reads {own_bytes}"
        )

    def make_activations(seed: int) -> Buffers:
        _draw_tokens(step, seed)
        return inputs

    def distance(weights: Any, activations: Any, output: Buffers) -> float:
        got = {name: part.clone() for name, part in output.items()}
        known = (got["next_token"] >= 0) & (got["next_token"] < step.model.config.vocab_size)
        assert bool(known.all()), "next_token is none of the vocabulary, or not all written"
        chosen = got["logits"].gather(1, got["next_token"][:, None])[:, 0]
        assert torch.equal(chosen, got["logits"].amax(dim=1)), "next_token is not the likeliest token"
        step.poison()
        streams = step.launch_with_streams()
        worst = error(got["logits"], step.logits.double())
        if step.layers[0].plain:
            worst = max(worst, max(check_layers(step, streams)) / layer_tolerance(step))
        return worst

    return Case(
        launch=lambda weights, activations, output: step.launch(),
        make_weights=lambda seed: [op.weights for op in step.ops],
        make_activations=make_activations,
        make_output=lambda: outputs,
        refresh=lambda activations, seed: _draw_tokens(step, seed),
        error=distance,
        tolerance=1.0,
        checksum=lambda buffers: _checksum(step, buffers),
        weight_bytes=weight_bytes,
        activation_bytes=sum(part.nbytes for part in (*inputs.values(), *outputs.values())),
        flops=flops,
        compute_floor_s=compute_s,
        memory_bytes_per_s=gpu.memory_bytes_per_s,
    )


def layer_tolerance(step: DecodeStep) -> float:
    """Of ``check_layers``: that of the coarsest format that an activation or the cache has."""
    names = (step.precision.linear_activation, step.precision.experts_activation, step.precision.kv)
    return max(LAYER_TOLERANCE[get_format(name).element] for name in names)


def _outputs(step: DecodeStep) -> Buffers:
    return {"logits": step.logits, "next_token": step.next_token}


def _draw_tokens(step: DecodeStep, seed: int) -> None:
    generator = torch.Generator().manual_seed((step.token_seed << 40) + seed)
    drawn = torch.randint(1, step.model.config.vocab_size, (step.batch,), generator=generator)
    step.token_ids.copy_(drawn)


def _checksum(step: DecodeStep, buffers: Any) -> Hashable:
    """As ``cases.checksum``; of the caches without the token that the step itself appends."""
    if not isinstance(buffers, list):
        return checksum(buffers)
    distinct = {part.data_ptr(): part for weights in buffers for part in weights.values()}
    with _without_new_token(step):
        return checksum(list(distinct.values()))


@contextmanager
def _without_new_token(step: DecodeStep) -> Iterator[None]:
    """The bytes of each sequence's new token zero for a while; nothing may run meanwhile."""
    kept = []
    for cache in {id(layer.cache): layer.cache for layer in step.layers}.values():
        for slot in step.slots.tolist():
            page, place = divmod(slot, step.page_size)
            bytes_ = appended_bytes(cache, place)
            kept.append((cache.pages[page], bytes_, cache.pages[page][:, bytes_].clone()))
            cache.pages[page][:, bytes_] = 0
    try:
        yield
    finally:
        for page, bytes_, values in kept:
            page[:, bytes_] = values


def appended_bytes(cache: KvCache | MlaCache, place: int) -> torch.Tensor:
    """Which bytes of a record the token at ``place`` of its page has: those that come out alike whatever was there."""
    made = []
    for fill in (0, 255):
        pages = torch.full((1, *cache.pages.shape[1:]), fill, dtype=torch.uint8, device=cache.pages.device)
        slot = torch.tensor([place], device=pages.device)
        if isinstance(cache, KvCache):
            values = pages.new_ones(1, pages.shape[1], cache.layout.head_dim, dtype=torch.bfloat16)
            write_ref(KvCache(cache.layout, pages, cache.factors), values, values, slot)
        else:
            layout = cache.layout
            latent, rope = (pages.new_ones(1, n, dtype=torch.bfloat16) for n in (layout.kv_lora_rank, layout.rope_dim))
            write_mla_ref(MlaCache(layout, pages, cache.factors), latent, rope, slot)
        made.append(pages[0, 0])
    return (made[0] == made[1]).nonzero().flatten()


# -- its ops alone ---------------------------------------------------------------------------------


def op_groups(step: DecodeStep) -> list[list[StepOp]]:
    """Ops of one name whose tensors have the same shapes, in the order of the first of each."""
    groups: dict[Hashable, list[StepOp]] = {}
    for op in step.ops:
        shapes = tuple(tuple(part.shape) for part in (*op.weights.values(), *op.inputs.values()))
        groups.setdefault((op.name, tuple(op.weights), shapes), []).append(op)
    return list(groups.values())


def make_op_case(step: DecodeStep, group: list[StepOp], gpu: Gpu, l2_bytes: int) -> tuple[Case, L2Policy]:
    """A group's op, as it stands after a step, and the policy to time it under. Launches it once."""
    op = group[0]
    op.run(op.weights)
    work = op.work()
    own = list({tuple(part.data_ptr() for part in each.weights.values()): each.weights for each in group}.values())
    policy: L2Policy = "hot"
    if work.weight_bytes:
        num_sets = num_rotated_sets("cold_weights", l2_bytes, work.weight_bytes, 0)
        copied = max(0, num_sets - len(own)) * sum(part.nbytes for part in op.weights.values())
        policy = "cold_weights" if num_sets <= MAX_RING and copied <= MAX_COPIED_BYTES else "hot"
    num_made, given = 0, set()

    def make_weights(seed: int) -> Buffers:
        """A layer's own; copies of what another set has too (a page table), and when all layers are through."""
        nonlocal num_made
        num_made += 1
        made = {
            name: part.clone() if part.data_ptr() in given else part
            for name, part in own[(num_made - 1) % len(own)].items()
        }
        given.update(part.data_ptr() for part in made.values())
        return made

    def distance(weights: Buffers, activations: Buffers, output: Buffers) -> float:
        got = {name: part.clone() for name, part in output.items()}
        for part in output.values():
            part.unsqueeze(-1).view(torch.uint8).fill_(0xFF)
        op.run(weights)
        worst = 0.0
        for name, part in output.items():
            if part.dtype in (torch.bfloat16, torch.float32) and name != "scale":
                worst = max(worst, error(got[name], part.double()))
            else:
                same = torch.equal(got[name].view(torch.uint8), part.contiguous().view(torch.uint8))
                assert same, f"{name} differs from that of an eager launch on the same inputs"
        return worst

    case = Case(
        launch=lambda weights, activations, output: op.run(weights),
        make_weights=make_weights,
        make_activations=lambda seed: op.inputs,
        make_output=lambda: op.outputs,
        refresh=lambda activations, seed: _change(activations, step.model.config.vocab_size),
        error=distance,
        tolerance=1.0,
        checksum=checksum,
        weight_bytes=work.weight_bytes,
        activation_bytes=work.activation_bytes,
        flops=work.flops,
        compute_floor_s=flops_floor_s(op, work.flops, gpu),
        memory_bytes_per_s=gpu.memory_bytes_per_s,
    )
    return case, policy


def _change(inputs: Buffers, vocab_size: int) -> None:
    """Other inputs of the same sizes: signs turned, the next token ids, lengths less one."""
    for name, part in inputs.items():
        if name == "token_ids":
            part.add_(1).remainder_(vocab_size)
        elif name == "lengths":
            part.sub_(1)
        elif name == "data" and part.dtype != torch.bfloat16:
            part.view(torch.uint8).bitwise_xor_(0x88 if part.dtype == torch.uint8 else 0x80)
        elif part.dtype in (torch.bfloat16, torch.float32) and name != "scale":
            part.neg_()
