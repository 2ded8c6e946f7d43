"""The same GPU in a scale-up domain of another size: what of the published rows still holds, and what becomes a model.

Rows of communication were measured in the GPU's own domain (8 GPUs of a server, 72 of an NVL72). Cut or widened, a
collective or all-to-all over no more GPUs than both domains hold is the same thing, and its row stands. A wider one is

    time of the nearest op that the own domain has rows for + (rise of the floor) / efficiency

that is, over a cut domain, the op itself with its bytes beyond the cut sent over the scale-out link; over a widened
one, the op within the own domain with the bytes of the wider one. Always ``modelled``, never faster than the anchor;
the longer latency of a scale-out network is not in it. Price, memory and all else stay the GPU's.

Errors: ``ValueError`` naming the field.
"""

from __future__ import annotations

from dataclasses import replace

from .gpus import GPUS, Gpu
from .ops import Collective, ExpertAllToAll, Op

MAX_DOMAIN = 1024

_BY_SYSTEM: dict[str | None, Gpu] = {row.published_system: row for row in GPUS.values() if row.published_system}


def with_domain(gpu: Gpu, scale_up_gpus: int) -> Gpu:
    """The GPU in a domain of so many; itself where it has that.

    Raises:
        ValueError: not a whole number from 1 to ``MAX_DOMAIN``.
    """
    if scale_up_gpus != int(scale_up_gpus) or not 1 <= scale_up_gpus <= MAX_DOMAIN:
        raise ValueError(f"domain: expected a whole number of GPUs from 1 to {MAX_DOMAIN}; got {scale_up_gpus}")
    own = native(gpu)
    if scale_up_gpus == own.scale_up_gpus:
        return own
    name, title = f"{own.name}@{scale_up_gpus}", f"{own.title} in a domain of {scale_up_gpus}"
    return replace(own, name=name, title=title, aliases=(), scale_up_gpus=int(scale_up_gpus))


def native(gpu: Gpu) -> Gpu:
    """The GPU as it is sold and was measured."""
    return _BY_SYSTEM.get(gpu.published_system, gpu)


def span(op: Op) -> int:
    """The GPUs that an op talks to, itself included."""
    if isinstance(op, Collective):
        return op.num_gpus
    return op.ep if isinstance(op, ExpertAllToAll) else 1


def anchor(op: Op, gpu: Gpu) -> tuple[Op, Gpu] | None:
    """The op and GPU whose rows are nearest; None where the op is the same in both domains."""
    own = native(gpu)
    if gpu.scale_up_gpus == own.scale_up_gpus or span(op) <= min(gpu.scale_up_gpus, own.scale_up_gpus):
        return None
    within = own.scale_up_gpus if gpu.scale_up_gpus > own.scale_up_gpus else span(op)
    if isinstance(op, Collective):
        return replace(op, num_gpus=within), own
    assert isinstance(op, ExpertAllToAll)
    return replace(op, ep=within), own
