"""Where in a model's decode step a shape stands, and how often: what a kernel's time is worth there.

A kernel's microseconds count only through the step that runs it: seconds per token of one GPU are
time x calls per step / tokens per step. Needs no torch.

Units: calls and tokens per step of one GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from .decode_plan import decode_plan
from .deployment import PRECISIONS, Deployment
from .gpus import Gpu, get_gpu
from .model_config import ModelConfig, MoeFfn
from .models import load_model
from .targets import DEFAULT_MODELS, op_shapes

_DEFAULT_LENGTH = 1024
"""Cached tokens where the shape has none: no shape but attention's depends on them."""


@dataclass(frozen=True)
class Place:
    """One place of a shape: ``name`` as in the decode plan ("o_proj").

    Attributes:
        calls_per_step: of this op in one step of one GPU.
        tokens_per_step: tokens that one GPU keeps per step: one per sequence, also where several are verified (how many
            of those are kept is the drafter's matter). Of experts spread over ranks, the group's tokens / ranks.
    """

    model: str
    name: str
    calls_per_step: int
    tokens_per_step: float

    def __str__(self) -> str:
        return f"{self.model} {self.name}"


def places_of(
    op: str, shape: Mapping[str, int], models: Iterable[str] = DEFAULT_MODELS, gpu: Gpu | None = None
) -> list[Place]:
    """The places of ``op`` at ``shape`` in the decode steps of ``models``, one GPU's attention data parallel.

    Args:
        op, shape: as ``targets.op_shapes`` gives them. gpu: only refuses precisions; None: any.

    Returns:
        none for a shape that is no model's, or an op that no step has (a copy).
    """
    fields = tuple(sorted(shape.items()))
    return [place for name in models for place in _places(op, fields, name, gpu.name if gpu else "h100")]


@lru_cache(maxsize=4096)
def _places(op: str, fields: tuple[tuple[str, int], ...], name: str, gpu: str) -> tuple[Place, ...]:
    shape, model = dict(fields), load_model(name)
    found: dict[tuple[str, float], int] = {}
    for batch, q_len in _loads(op, shape, model):
        length = min(shape.get("length", _DEFAULT_LENGTH), model.max_context)
        deployment = Deployment(1, 1, 1, PRECISIONS["fp8"], batch, length, q_len)
        for call in decode_plan(model, get_gpu(gpu), deployment, check_memory=False):
            for each, other, place in op_shapes(call, model, deployment.rows):
                if each == op and dict(other) == shape:
                    key = (place, batch / shape.get("ep", 1))
                    found[key] = found.get(key, 0) + call.calls_per_step
    return tuple(Place(name, place, calls, tokens) for (place, tokens), calls in found.items())


def _loads(op: str, shape: Mapping[str, int], model: ModelConfig) -> list[tuple[int, int]]:
    """(sequences, tokens of each) of the steps that may hold the shape."""
    if "batch" in shape:
        return [(shape["batch"], shape.get("q_len", 1))]
    rows = shape.get("m") or shape.get("num_tokens") or shape.get("rows")
    if not rows:
        return []
    top_k = (
        {layer.ffn.top_k for layer, _ in model.layers if isinstance(layer.ffn, MoeFfn)} if "rows" in shape else set()
    )
    return [(rows, 1), *((rows // k, 1) for k in sorted(top_k) if k > 1 and rows % k == 0)]
