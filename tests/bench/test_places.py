"""Where a shape stands in a model's step, and how often."""

from __future__ import annotations

import pytest
from tokenfab.bench.decode_plan import decode_plan
from tokenfab.bench.deployment import PRECISIONS, Deployment
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.places import Place, places_of
from tokenfab.bench.targets import find_targets

H100 = get_gpu("h100")
MOE = {"hidden": 7168, "inter": 2048, "top_k": 8, "num_experts": 256, "ep": 8, "load": 0}


def test_a_matmul_of_every_layer() -> None:
    """DeepSeek-V3 has 61 layers, the first 3 of them dense."""
    assert places_of("gemm", {"m": 64, "n": 7168, "k": 16384}) == [Place("deepseek-v3", "o_proj", 61, 64)]
    assert places_of("gemm", {"m": 64, "n": 7168, "k": 18432}) == [Place("deepseek-v3", "dense_down", 3, 64)]
    assert places_of("gemm", {"m": 64, "n": 7168, "k": 16385}) == []


def test_experts_serve_the_tokens_of_all_ranks() -> None:
    assert places_of("moe", {"num_tokens": 128, **MOE}) == [Place("deepseek-v3", "experts", 58, 128 / 8)]
    assert places_of("moe", {"num_tokens": 128, **MOE, "load": 120}) == [Place("deepseek-v3", "experts", 58, 16)]
    assert places_of("moe", {"num_tokens": 128, **MOE, "ep": 4}) == []


def test_the_same_shape_in_two_places_and_kinds_of_layer() -> None:
    """An expert's SwiGLU of 64 tokens has 8 rows of each; gpt-oss alternates full attention and a window."""
    found = places_of("swiglu_quantize", {"rows": 512, "columns": 2048})
    assert found == [Place("deepseek-v3", "shared_swiglu", 58, 512), Place("deepseek-v3", "experts_swiglu", 58, 64)]
    shape = {"batch": 16, "length": 8192, "num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "q_len": 1,
             "page_size": 64}  # fmt: skip
    assert places_of("attention", {**shape, "window": 0}) == [Place("gpt-oss-120b", "attention", 18, 16)]
    assert places_of("attention", {**shape, "window": 128}) == [Place("gpt-oss-120b", "window_attention", 18, 16)]
    append = {"num_tokens": 16, "num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "page_size": 64}
    assert places_of("rope_append", append) == [Place("gpt-oss-120b", "rope_append", 36, 16)]


def test_verified_tokens_are_one_per_sequence() -> None:
    shape = {"batch": 16, "length": 8192, "num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "window": 0, "q_len": 4,
             "page_size": 64}  # fmt: skip
    assert places_of("attention", shape)[0].tokens_per_step == 16


def test_models_are_those_asked() -> None:
    assert places_of("gemm", {"m": 64, "n": 7168, "k": 16384}, ["gpt-oss-120b"]) == []
    assert places_of("copy", {"num_bytes": 1 << 28}) == []
    with pytest.raises(ValueError, match="none-such"):
        places_of("gemm", {"m": 1, "n": 1, "k": 1}, ["none-such"])


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss-120b", "qwen3-30b-a3b"])
def test_every_target_of_a_model_has_a_place_there(name: str) -> None:
    lost = [
        (target.kernel.name, target.shape)
        for target in find_targets(None, None, [name], [64], H100, [1024])
        if target.places != ("compared",) and target.kernel.op != "copy"
        and not places_of(target.kernel.op, target.shape, [name])
    ]  # fmt: skip
    assert lost == []


def test_calls_add_up_to_the_plans() -> None:
    """Every FP8 matmul of a step, by its shapes: as many calls as the plan has."""
    model, deployment = load_model("deepseek-v3"), Deployment(1, 1, 1, PRECISIONS["fp8"], 64, 1024)
    plan = [call for call in decode_plan(model, H100, deployment, check_memory=False) if call.op.kind == "gemm"]
    wanted = sum(call.calls_per_step for call in plan if call.name not in ("router", "lm_head"))
    targets = find_targets("gemm", ["fp8_block"], ["deepseek-v3"], [64], H100)
    shapes = {target.fields for target in targets if not target.kernel.library}
    got = sum(place.calls_per_step for fields in shapes for place in places_of("gemm", dict(fields), ["deepseek-v3"]))
    assert got == wanted
