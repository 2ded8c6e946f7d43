"""The time of a step: its parts, their provenance, and whole modules where a stack's table times only those."""

from __future__ import annotations

import pytest
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.published import PublishedData
from tokenfab.bench.step_time import StepTime, published_step


def step(
    data: PublishedData, model: str, gpu: str, stack: str, dp: int, precision: str = "fp8", batch: int = 64
) -> StepTime:
    deployment = Deployment(dp, 1, dp, get_precision(precision), batch, 4096)
    return published_step(data, load_model(model), get_gpu(gpu), data.stack(get_gpu(gpu), stack), deployment)


def test_total_is_the_sum_of_calls_times_time(published: PublishedData) -> None:
    found = step(published, "deepseek-v3", "h200", "sglang", 8)
    stack = published.stack(found.gpu, "sglang")
    total = sum(op.call.calls_per_step * published.time(op.call.op, found.gpu, stack).time_s for op in found.ops)
    assert found.step_s == pytest.approx(total, rel=1e-12)
    assert sum(found.coverage().values()) == pytest.approx(1)
    assert found.floor_s < found.step_s


def test_vllm_mla_block_is_one_module_row(published: PublishedData) -> None:
    found = step(published, "deepseek-v3", "h200", "vllm", 8)
    names = [op.call.name for op in found.ops]
    assert "attention_module" in names
    assert not {"q_b_proj", "o_proj", "attention", "absorbed_q_bmm"} & set(names)
    (module,) = [op for op in found.ops if op.call.name == "attention_module"]
    parts = step(published, "deepseek-v3", "h200", "trtllm", 8)
    block = [op for op in parts.ops if op.call.block == "mla"]
    assert module.floor_s == pytest.approx(sum(op.floor_s for op in block), rel=1e-9)
    assert module.call.calls_per_step == 61
    assert "mla_generation_module" in module.source


def test_sparse_attention_is_a_module_in_every_stack(published: PublishedData) -> None:
    # TensorRT-LLM's Hopper table has no FP8 KV cache
    for gpu, stack in (("h200", "vllm"), ("h200", "sglang"), ("b200", "trtllm")):
        found = step(published, "deepseek-v3.2", gpu, stack, 8)
        (module,) = [op for op in found.ops if op.call.name == "attention_module"]
        assert "dsa_generation_module" in module.source, stack
        assert module.provenance != "modelled"


def test_top_k_is_inside_the_moe_row(published: PublishedData) -> None:
    measured = step(published, "qwen3-30b-a3b", "h100", "vllm", 1, "bf16", 8)
    assert "router_top_k" not in [op.call.name for op in measured.ops]
    unknown = step(published, "glm-4.5", "h200", "vllm", 8, "fp8", 8)
    assert "router_top_k" in [op.call.name for op in unknown.ops]


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-120b", "mixtral-8x7b", "llama-4-maverick", "minimax-m2.5"])
@pytest.mark.parametrize("stack", ["vllm", "sglang", "trtllm"])
def test_published_models_are_mostly_measured(published: PublishedData, model: str, stack: str) -> None:
    """With experts on the ranks that hold the tokens, nine tenths of a step is in the tables."""
    config = load_model(model)
    tp = {"llama-4-maverick": 8, "qwen3-30b-a3b": 1, "gpt-oss-120b": 1, "mixtral-8x7b": 2}.get(model, 4)
    gpu = get_gpu("h200" if stack != "trtllm" or model != "gpt-oss-120b" else "b200")
    precision = get_precision(config.native_precision or "fp8")
    deployment = Deployment(tp, tp, 1, precision, 16, 4096)
    found = published_step(published, config, gpu, published.stack(gpu, stack), deployment)
    assert found.coverage()["modelled"] < 0.12
