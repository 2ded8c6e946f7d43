"""Checkpoints by their tensors' names: each convention gives the weight that the same values give directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels.codec import QuantizedTensor
from tokenfab.kernels.inputs import random_operand
from tokenfab.kernels.moe_checkpoints import read_experts, read_shared_expert
from tokenfab.kernels.moe_weights import GroupedWeight, prepare_experts

HIDDEN, INTER, EXPERTS, PREFIX = 256, 128, 4, "model.layers.3.mlp"
HELD = range(1, 3)
CPU = torch.device("cpu")


def experts_of(format: str) -> list[dict[str, QuantizedTensor]]:
    shapes = {"gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER)}
    made = []
    for expert in range(EXPERTS):
        one = {n: random_operand(format, *shape, 10 * expert + i, CPU) for i, (n, shape) in enumerate(shapes.items())}
        made.append(one)
    return made


def directly(each: list[dict[str, QuantizedTensor]], layout: str) -> tuple[GroupedWeight, GroupedWeight]:
    halves = []
    for names in (("gate", "up"), ("down",)):
        parts: dict[str, torch.Tensor] = {}
        for part in ("data", "scale"):
            if getattr(each[0]["gate"], part) is not None:
                parts[part] = torch.stack([torch.cat([getattr(each[e][n], part) for n in names]) for e in HELD])
        if each[0]["gate"].global_scale is not None:
            parts["global_scale"] = torch.ones(len(HELD)) * 0.25
        halves.append(prepare_experts(each[0]["gate"].format.name, parts, is_gated=len(names) == 2, layout=layout))
    return halves[0], halves[1]


def same(got: tuple[GroupedWeight, GroupedWeight], expected: tuple[GroupedWeight, GroupedWeight]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.format, one.layout, one.num_channels, one.num_columns, one.is_gated) == (
            other.format, other.layout, other.num_channels, other.num_columns, other.is_gated)  # fmt: skip
        assert one.parts.keys() == other.parts.keys()
        for name, part in other.parts.items():
            assert torch.equal(one.parts[name].view(torch.uint8), part.view(torch.uint8)), name


PROJECTIONS = {"deepseek": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def named(each: list[dict[str, QuantizedTensor]], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    tensors: dict[str, Any] = {}
    for expert, one in enumerate(each):
        for name, q in zip(names, one.values(), strict=True):
            place = f"{PREFIX}.experts.{expert}.{name}"
            tensors[f"{place}.weight"] = q.data
            if q.format.name == "fp8_block":
                tensors[f"{place}.weight_scale_inv"] = q.scale
            if q.format.name == "nvfp4":
                tensors |= {f"{place}.weight_scale": q.scale, f"{place}.weight_scale_2": torch.tensor(0.25)}
    return tensors


@pytest.mark.parametrize("convention", PROJECTIONS)
@pytest.mark.parametrize(("format", "layout"), [("bf16", "stored"), ("fp8_block", "stored"), ("nvfp4", "w4a16")])
def test_tensors_per_expert(convention: str, format: str, layout: str) -> None:
    each = experts_of(format)
    same(read_experts(named(each, PROJECTIONS[convention]), PREFIX, HELD), directly(each, layout))


def test_shared_expert_is_a_weight_of_one_expert() -> None:
    each = experts_of("fp8_block")
    tensors = named(each, PROJECTIONS["deepseek"])
    renamed = {n.replace("experts.1.", "shared_experts."): t for n, t in tensors.items() if "experts.1." in n}
    got = read_shared_expert(tensors | renamed, PREFIX)
    same(got, read_experts(tensors, PREFIX, range(1, 2)))
    assert got[0].num_experts == 1
    with pytest.raises(ValueError, match="tensors: expected one of .*shared_experts.gate_proj.weight.*; got none"):
        read_shared_expert(tensors, PREFIX)


def gpt_oss(each: list[dict[str, QuantizedTensor]]) -> dict[str, torch.Tensor]:
    def stacked(part: str, names: tuple[str, ...]) -> torch.Tensor:
        rows = [torch.stack([getattr(one[n], part) for n in names], 1).flatten(0, 1) for one in each]
        return torch.stack(rows)

    tensors = {}
    for name, names in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        place = f"{PREFIX}.experts.{name}"
        tensors[f"{place}_blocks"] = stacked("data", names).unflatten(2, (-1, 16))
        tensors[f"{place}_scales"] = stacked("scale", names)
        rows = tensors[f"{place}_scales"].shape[1]
        tensors[f"{place}_bias"] = torch.arange(EXPERTS * rows).reshape(EXPERTS, rows).bfloat16()
    return tensors


@pytest.mark.parametrize("layout", ["w4a16", "w4a8", "stored"])
def test_gpt_oss_interleaves_gate_and_up(layout: str) -> None:
    each = experts_of("mxfp4")
    tensors = gpt_oss(each)
    got = read_experts(tensors, PREFIX, HELD, layout=layout)
    same(got, directly(each, layout))
    upper, lower = got
    assert upper.bias is not None
    assert lower.bias is not None
    given = tensors[f"{PREFIX}.experts.gate_up_proj_bias"].float()
    assert torch.equal(upper.bias[0], torch.cat([given[1, 0::2], given[1, 1::2]]))
    assert torch.equal(lower.bias[1], tensors[f"{PREFIX}.experts.down_proj_bias"].float()[2])


def test_gate_and_up_are_not_swapped() -> None:
    each = experts_of("bf16")
    tensors = named(each, PROJECTIONS["mixtral"])
    upper, _ = read_experts(tensors, PREFIX, HELD)
    assert torch.equal(upper.parts["data"][0, :INTER], tensors[f"{PREFIX}.experts.1.w1.weight"])
    assert torch.equal(upper.parts["data"][1, INTER:], tensors[f"{PREFIX}.experts.2.w3.weight"])


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    tensors = named(experts_of("fp8_block"), PROJECTIONS["deepseek"])
    place = f"{PREFIX}.experts.2.up_proj"
    with pytest.raises(ValueError, match=f"tensors: expected {place}.weight_scale_inv; got none"):
        read_experts({n: t for n, t in tensors.items() if n != f"{place}.weight_scale_inv"}, PREFIX, HELD)
    with pytest.raises(
        ValueError, match=r"tensors: expected one of other.experts.1.gate_proj.weight, .*; got none of them"
    ):
        read_experts(tensors, "other", HELD)
    with pytest.raises(ValueError, match="experts: expected consecutive experts, at least one; got range"):
        read_experts(tensors, PREFIX, range(0))
    odd = {n: t[:100] if "gate_proj.weight" in n and "scale" not in n else t for n, t in tensors.items()}
    with pytest.raises(ValueError, match="rows in whole blocks of 128 to stack; got 100"):
        read_experts(odd, PREFIX, HELD)
    tensors = named(experts_of("nvfp4"), PROJECTIONS["deepseek"])
    tensors[f"{place}.weight_scale_2"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match=f"{place}.weight_scale_2: expected 0.25, as the gate's; got 0.5"):
        read_experts(tensors, PREFIX, HELD)
    with pytest.raises(ValueError, match="gate_up_proj_blocks: expected .E >= 9, R, K / 32, 16."):
        read_experts(gpt_oss(experts_of("mxfp4")), PREFIX, range(8, 9))
