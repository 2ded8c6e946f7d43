"""Experts from the tensors of published checkpoints, by their names, in the order and layout the kernels read.

===========================  ==========================================================================================
checkpoint                   tensors under ``prefix``
===========================  ==========================================================================================
DeepSeek-V3, Qwen3, GLM-4.5  experts.{e}.gate_proj|up_proj|down_proj .weight; FP8 blocks: .weight_scale_inv (128 x 128)
Mixtral                      experts.{e}.w1 (gate) | w3 (up) | w2 (down) .weight
NVFP4 (ModelOpt)             as these two, .weight uint8, .weight_scale E4M3 per 16, .weight_scale_2 per tensor
gpt-oss                      experts.gate_up_proj|down_proj _blocks uint8 (E, R, K / 32, 16), _scales (E, R, K / 32),
                             _bias (E, R); gate and up rows interleaved
===========================  ==========================================================================================

Packed FP4 has element 0 in the low nibble in all of them. A rank names the experts it holds.

Source:  safetensors indices and modelling code of deepseek-ai/DeepSeek-V3, Qwen/Qwen3-30B-A3B-FP8,
         mistralai/Mixtral-8x7B-v0.1 and openai/gpt-oss-120b on Hugging Face; NVIDIA ModelOpt's NVFP4 export.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .checks import require, seen
from .moe_weights import GroupedWeight, prepare_experts

_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_SUFFIXES = {"weight_scale_inv": "fp8_block", "weight_scale_2": "nvfp4"}


def read_experts(
    tensors: Mapping[str, torch.Tensor], prefix: str, experts: range, *, layout: str | None = None,
    x_scale: float | None = None, h_scale: float | None = None,
) -> tuple[GroupedWeight, GroupedWeight]:  # fmt: skip
    """(gate-up, down) of ``experts`` of the layer whose tensors' names begin with ``prefix``.

    Args:
        tensors: by name; only those of this layer's experts are touched. prefix: "model.layers.3.mlp".
        experts: consecutive, those this rank holds.
        layout: as in ``prepare_experts``; by default "w4a16" for FP4 and "stored" for others.
        x_scale, h_scale: of NVFP4 activations beside "stored" NVFP4 weights.

    Raises:
        ValueError: a tensor that is missing or does not fit; names the tensor.
    """
    require(experts.step == 1 and len(experts) > 0, "experts", "consecutive experts, at least one", experts)
    if f"{prefix}.experts.gate_up_proj_blocks" in tensors:
        return _read_gpt_oss(tensors, f"{prefix}.experts", experts, layout or "w4a16")
    places = [f"{prefix}.experts.{e}" for e in experts]
    return _read(tensors, places, f"{prefix}.experts.gate_up_proj_blocks", layout, x_scale, h_scale)


def read_shared_expert(
    tensors: Mapping[str, torch.Tensor], prefix: str, *, layout: str | None = None, x_scale: float | None = None,
    h_scale: float | None = None,
) -> tuple[GroupedWeight, GroupedWeight]:  # fmt: skip
    """(gate-up, down) of the expert that every token takes, as weights of one expert: ``prefix``.shared_experts.

    DeepSeek-V3 and GLM-4.5 store several shared experts as one of their joint width. Arguments and errors as
    ``read_experts``.
    """
    return _read(tensors, [f"{prefix}.shared_experts"], "", layout, x_scale, h_scale)


def _read(
    tensors: Mapping[str, torch.Tensor], places: list[str], other: str, layout: str | None, x_scale: float | None,
    h_scale: float | None,
) -> tuple[GroupedWeight, GroupedWeight]:  # fmt: skip
    """Both weights of the experts at these places, one expert each."""
    first = places[0]
    names = next((names for names in _NAMES if f"{first}.{names[0]}.weight" in tensors), None)
    known = ", ".join([*(f"{first}.{names[0]}.weight" for names in _NAMES), *([other] if other else [])])
    require(names is not None, "tensors", f"one of {known}", "none of them")
    assert names is not None
    suffix = next((s for s in _SUFFIXES if f"{first}.{names[0]}.{s}" in tensors), "")
    format = _SUFFIXES.get(suffix, "bf16")
    layout = layout or ("w4a16" if format == "nvfp4" else "stored")
    halves = []
    for projections, scale in ((names[:2], x_scale), (names[2:], h_scale)):
        each = [_read_one(tensors, place, projections, format) for place in places]
        parts = {name: torch.stack([one[name] for one in each]) for name in each[0]}
        halves.append(
            prepare_experts(
                format, parts, is_gated=len(projections) == 2, layout=layout,
                activation_scale=scale if format == "nvfp4" and layout == "stored" else None,
            )
        )  # fmt: skip
    return halves[0], halves[1]


def _get(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    require(name in tensors, "tensors", name, "none of that name")
    return tensors[name]


def _read_one(
    tensors: Mapping[str, torch.Tensor], expert: str, projections: tuple[str, ...], format: str
) -> dict[str, torch.Tensor]:
    """Parts of one expert, gate and up rows stacked."""

    def rows(suffix: str) -> torch.Tensor:
        return torch.cat([_get(tensors, f"{expert}.{name}.{suffix}") for name in projections])

    parts = {"data": rows("weight")}
    if format == "fp8_block":
        height = _get(tensors, f"{expert}.{projections[0]}.weight").shape[0]
        is_whole = len(projections) == 1 or height % 128 == 0
        require(is_whole, f"{expert}.{projections[0]}.weight", "rows in whole blocks of 128 to stack", height)
        parts["scale"] = rows("weight_scale_inv").float()
    elif format == "nvfp4":
        parts["scale"] = rows("weight_scale")
        scales = [_get(tensors, f"{expert}.{name}.weight_scale_2").float().reshape(()) for name in projections]
        same = all(bool(scale == scales[0]) for scale in scales)
        require(same, f"{expert}.{projections[-1]}.weight_scale_2", f"{scales[0]}, as the gate's", scales[-1])
        parts["global_scale"] = scales[0]
    return parts


def _read_gpt_oss(
    tensors: Mapping[str, torch.Tensor], prefix: str, experts: range, layout: str
) -> tuple[GroupedWeight, GroupedWeight]:
    held, halves = slice(experts.start, experts.stop), []
    for name, is_gated in (("gate_up_proj", True), ("down_proj", False)):
        blocks, scales = (_get(tensors, f"{prefix}.{name}_{part}") for part in ("blocks", "scales"))
        fits = blocks.dim() == 4 and blocks.shape[3] == 16 and blocks.shape[0] >= experts.stop
        require(fits, f"{prefix}.{name}_blocks", f"(E >= {experts.stop}, R, K / 32, 16)", seen(blocks))
        bias = tensors.get(f"{prefix}.{name}_bias")
        parts = {"data": blocks[held].flatten(2), "scale": scales[held]}
        halves.append(
            prepare_experts("mxfp4", parts, is_gated=is_gated, layout=layout,
                            gate_up_order="interleaved" if is_gated else "gate_up",
                            bias=None if bias is None else bias[held])
        )  # fmt: skip
    return halves[0], halves[1]
