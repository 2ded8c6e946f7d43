"""What the ranks of a deployment hold: together the whole model, each part once; and what does not run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tokenfab.bench.deployment import PRECISIONS, Deployment  # noqa: E402
from tokenfab.bench.model_config import DenseFfn, GqaAttention, Layer, MlaAttention, MoeFfn, Router  # noqa: E402
from tokenfab.bench.models import load_model, shipped_models  # noqa: E402
from tokenfab.bench.ranks_split import Split, SplitSource, _shapes  # noqa: E402
from tokenfab.bench.step_model import StepModel, load_step_model  # noqa: E402
from tokenfab.tests.bench.step_models import deepseek, gpt_oss, qwen  # noqa: E402


def deployed(gpus: int, tp: int, ep: int, precision: str = "bf16", **changes: Any) -> Deployment:
    return Deployment(gpus, tp, ep, PRECISIONS[precision], 2.0, 40, **changes)


def splits(gpus: int, tp: int, ep: int) -> list[Split]:
    return [Split(deployed(gpus, tp, ep), rank) for rank in range(gpus)]


def numbered(*shape: int) -> Any:
    """Every element another number."""
    count = 1
    for size in shape:
        count *= size
    return torch.arange(count, dtype=torch.float64).view(shape)


GQA = Layer(GqaAttention(8, 4, 16, has_bias=True, has_sinks=True), DenseFfn(32))
MLA = Layer(MlaAttention(4, 24, 32, 8, 4, 6), MoeFfn(8, 2, 16, 32, Router("softmax", True), has_bias=True))
PLAIN_MLA = replace(MLA, attention=replace(MLA.attention, q_lora_rank=None))


def test_experts_of_all_ranks_are_all_experts() -> None:
    assert isinstance(MLA.ffn, MoeFfn)
    for gpus, tp, ep in ((4, 1, 4), (4, 4, 4), (8, 1, 8)):
        held = [each.held(MLA.ffn) for each in splits(gpus, tp, ep)]
        assert [expert for part in held for expert in part] == list(range(8))
    both = [each.held(MLA.ffn) for each in splits(4, 4, 2)]  # two ranks share each expert
    assert both == [range(4), range(4), range(4, 8), range(4, 8)]
    assert [each.expert_ways for each in splits(4, 4, 2)] == [(2, 0), (2, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("role", "layer", "shape", "join"),
    [
        ("o", GQA, (6, 128), lambda parts: torch.cat(parts, dim=1)),
        ("down", GQA, (6, 32), lambda parts: torch.cat(parts, dim=1)),
        ("sinks", GQA, (8,), torch.cat),
        ("q_b", MLA, (48, 24), torch.cat),
        ("kv_b", MLA, (56, 32), torch.cat),
        ("shared_down", MLA, (6, 32), lambda parts: torch.cat(parts, dim=1)),
        ("experts.3.down", MLA, (6, 16), lambda parts: torch.cat(parts, dim=1)),
    ],
)
def test_slices_join_to_the_whole(role: str, layer: Layer, shape: tuple[int, ...], join: Callable[..., Any]) -> None:
    full = numbered(*shape)
    parts = [each.slice(full, role, layer) for each in splits(4, 4, 1)]
    assert torch.equal(join(parts), full)
    assert {tuple(part.shape) for part in parts} == {tuple(parts[0].shape)}


@pytest.mark.parametrize(("role", "layer"), [("gate_up", GQA), ("shared_gate_up", MLA), ("experts.5.gate_up", MLA)])
def test_a_rank_has_gate_and_up_of_the_same_channels(role: str, layer: Layer) -> None:
    full = numbered(32, 5)
    for place, each in enumerate(splits(4, 4, 1)):
        rows = [*range(4 * place, 4 * place + 4), *range(16 + 4 * place, 20 + 4 * place)]
        assert torch.equal(each.slice(full, role, layer), full[rows])


def test_heads_go_with_their_keys_and_values() -> None:
    full = numbered((8 + 4 + 4) * 16, 3)
    heads = full.view(16, 16, 3)
    for place, each in enumerate(splits(4, 4, 1)):
        mine = heads[[2 * place, 2 * place + 1, 8 + place, 12 + place]]
        assert torch.equal(each.slice(full, "qkv", GQA), mine.flatten(0, 1))
        assert torch.equal(each.slice(full[:, 0], "qkv_bias", GQA), mine.flatten(0, 1)[:, 0])


def test_kv_heads_are_replicated_where_ranks_are_more() -> None:
    attention = GqaAttention(8, 2, 16)
    assert [each.kv_heads(attention) for each in splits(4, 4, 1)] == [range(1), range(1), range(1, 2), range(1, 2)]
    assert [each.kv_heads(attention) for each in splits(2, 2, 1)] == [range(1), range(1, 2)]
    assert [each.kv_heads(GqaAttention(8, 8, 16)) for each in splits(2, 2, 1)] == [range(4), range(4, 8)]


def test_biases_behind_a_sum_are_one_ranks() -> None:
    bias = numbered(6) + 1
    for role, layer in (("o_bias", GQA), ("experts.1.down_bias", MLA)):
        parts = [each.slice(bias, role, layer) for each in splits(4, 4, 1)]
        assert torch.equal(sum(parts), bias)
    whole = [each.slice(bias, "experts.1.down_bias", MLA) for each in splits(4, 4, 4)]  # whole experts: all of it
    assert all(torch.equal(part, bias) for part in whole)


def test_queries_of_mla_are_split_and_its_latent_is_not() -> None:
    full = numbered(4 * 12 + 32 + 4, 7)
    for place, each in enumerate(splits(4, 4, 1)):
        mine = torch.cat((full[12 * place : 12 * place + 12], full[48:]))
        assert torch.equal(each.slice(full, "q_kv_a", PLAIN_MLA), mine)
        assert torch.equal(each.slice(full[:60], "q_kv_a", MLA), full[:60])


@pytest.mark.parametrize("name", ["router", "router_bias", "correction_bias", "attention_norm", "q_norm", "kv_a_norm"])
def test_what_every_rank_has(name: str) -> None:
    full = numbered(8, 5)
    assert all(torch.equal(each.slice(full, name, MLA), full) for each in splits(4, 4, 4))


def test_data_parallel_ranks_have_all_but_experts() -> None:
    full = numbered(32, 8)
    for role in ("qkv", "o", "gate_up", "down", "shared_gate_up", "experts.0.down", "o_bias"):
        assert all(each.slice(full, role, GQA) is full for each in splits(4, 1, 4))


def test_ends_are_rows_of_the_vocabulary() -> None:
    embedding, head = numbered(8, 3), -numbered(8, 3)
    for tied in (True, False):
        ends = {"embedding": embedding} | ({} if tied else {"lm_head": head})
        parts = [each.ends(ends) for each in splits(2, 2, 1)]
        assert torch.equal(torch.cat([part["lm_head"] for part in parts]), embedding if tied else head)
        assert all(part["embedding"] is embedding for part in parts)
    assert splits(2, 1, 2)[1].ends({"embedding": embedding}) == {"embedding": embedding}


class _Whole:
    """Tensors that say what was asked."""

    def tensor(self, layer: int | None, role: str, shape: tuple[int, ...]) -> Any:
        return numbered(*shape)


@pytest.mark.parametrize("model", [qwen(), gpt_oss(), deepseek(), deepseek(None, "m")], ids=lambda m: m.config.name)
@pytest.mark.parametrize(("gpus", "tp", "ep"), [(2, 2, 1), (2, 2, 2), (2, 1, 2)])
def test_every_weight_of_a_rank_has_the_shape_that_its_layers_ask_for(
    model: StepModel, gpus: int, tp: int, ep: int
) -> None:
    for each in splits(gpus, tp, ep):
        mine, source = each.model(model), SplitSource(_Whole(), each, model)
        for index, layer in enumerate(mine.layers):
            for role, shape in _shapes(layer, 128).items():
                asked = role.replace("expert.", "experts.1.")
                assert tuple(source.tensor(index, asked, shape).shape) == shape


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_models_split_over_eight_ranks_or_say_why_not(name: str) -> None:
    """The parameters of all ranks are those of the model, where each is held once."""
    try:
        model = load_step_model(name)
    except ValueError:
        pytest.skip("a model without a step")
    given = deployed(8, 1, 8)
    if any(isinstance(layer.ffn, MoeFfn) and layer.ffn.num_experts % 8 for layer in model.layers):
        pytest.skip("experts that eight does not divide")
    held = [Split(given, rank).model(model) for rank in range(8)]
    assert all(each.layers == held[0].layers for each in held)
    assert load_model(name).num_layers == len(held[0].layers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (deployed(4, 2, 4), "parallel: expected tpN, tpN-epN or dpN-epN; got 4 GPUs, attention TP2, attention DP2"),
        (deployed(2, 1, 2, exchange="all_gather"), "parallel: expected tpN, tpN-epN or dpN-epN; got 2 GPUs"),
        (deployed(2, 1, 1), "parallel: expected tpN, tpN-epN or dpN-epN; got 2 GPUs"),
    ],
)
def test_deployments_that_do_not_run_here(given: Deployment, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(given, 0)


def test_ranks_and_blocks_out_of_range() -> None:
    with pytest.raises(ValueError, match="rank: expected 0 to 1; got 2"):
        Split(deployed(2, 2, 1), 2)
    message = (
        r"parallel: expected slices of whole blocks of 128 \(fp8_block\); qwen3-30b-a3b's expert.gate_up would "
        "have 96 on a rank"
    )
    with pytest.raises(ValueError, match=message):
        Split(deployed(8, 8, 1, "fp8"), 0).model(load_step_model("qwen3-30b-a3b"))
    Split(deployed(8, 8, 8, "fp8"), 0).model(load_step_model("deepseek-v3"))
