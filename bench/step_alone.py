"""What a decode step asks of the ranks that it runs on; here for one rank, which holds the whole model.

A step on several ranks is the same list of launches, over slices of the weights, with communication between some of
them: ``ranks_step.ManyRanks`` answers the same questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import step_ops as ops
from .step_ops import Place

if TYPE_CHECKING:
    import torch

    from ..kernels.kv_cache import KvCache, MlaCache
    from ..kernels.moe_layer import MoeLayer
    from .model_config import ModelConfig, MoeFfn
    from .step_model import StepModel
    from .step_state import DecodeStep
    from .step_weights import Source


class OneRank:
    """See the module."""

    # -- what this rank holds ----------------------------------------------------------------------

    def model(self, model: StepModel) -> StepModel:
        """The model as this rank computes it: its heads, its widths."""
        return model

    def source(self, source: Source, model: StepModel) -> Source:
        """The weights of ``model(model)``, of a source of the whole model's."""
        return source

    def held(self, ffn: MoeFfn) -> range:
        """Its experts, of those of a layer of its model."""
        return range(ffn.num_experts)

    def heads_of(self, cache: KvCache | MlaCache, model: StepModel, index: int) -> KvCache | MlaCache:
        """Its heads of the cache of a layer of the whole model."""
        return cache

    def ends(self, config: ModelConfig, ends: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its part of what stands before and behind the layers."""
        return ends

    # -- what it does between launches -------------------------------------------------------------

    def reduced(self, step: DecodeStep, place: Place, y: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a partial result."""
        return y

    def experts(
        self, step: DecodeStep, index: int, ffn: MoeFfn, layer: MoeLayer, x: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """The expert layer's ops, from normalised tokens and router logits to what is added to the residual."""
        out = step.buffer("ffn", step.batch, x.shape[1])
        workspace = step.moe_workspace(ffn, layer)
        step.ops.append(ops.experts(Place("experts", index), layer, x, logits, workspace, out))
        return out

    def head(self, step: DecodeStep, weight: torch.Tensor, x: torch.Tensor) -> None:
        """The LM head's ops, into ``step.logits``."""
        step.ops.append(ops.torch_linear(Place("lm_head"), weight, x, step.logits))
