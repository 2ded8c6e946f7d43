"""What is benched: shapes of real models, formats of their checkpoints, what runs on the GPU, libraries beside it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from tokenfab.bench import targets
from tokenfab.bench.gpus import GPUS, get_gpu
from tokenfab.bench.measurement import num_rotated_sets
from tokenfab.bench.models import load_model
from tokenfab.bench.peers import COPY, PEERS
from tokenfab.bench.targets import DEFAULT_BATCHES, DEFAULT_MODELS, capability, find_targets, known_ops, peers_of
from tokenfab.kernels.registry import find_kernels

SCALED_MM = {"gemm/fp8-fp8@torch._scaled_mm", "gemm/fp8_row-fp8_row@torch._scaled_mm"}
BLOCK_SCALED = {"gemm/fp8_block-fp8_group@torch._scaled_mm", "gemm/fp8_block-fp8_group@torchao.blockwise_fp8_gemm"}
H100, B200 = get_gpu("h100"), get_gpu("b200")


def names(*args: object, **changes: object) -> dict[str, set[tuple[int, ...]]]:
    found: dict[str, set[tuple[int, ...]]] = {}
    for target in find_targets(*args, **changes):  # type: ignore[arg-type]
        found.setdefault(target.kernel.name, set()).add(tuple(target.shape.values()))
    return found


def test_shapes_are_the_models_own() -> None:
    found = names("gemm", None, ["deepseek-v3"], [64], H100)
    assert set(found) == {"gemm/fp8_block-fp8_group", *SCALED_MM, *BLOCK_SCALED}
    shapes = found["gemm/fp8_block-fp8_group"]
    assert {(64, 7168, 16384), (64, 24576, 1536), (64, 2112, 7168), (64, 4096, 7168), (64, 7168, 2048)} <= shapes
    assert (64, 256, 7168) not in shapes  # the router is BF16
    assert (64, 129280, 7168) not in shapes  # so is the LM head


def test_places_name_every_model_of_a_shape() -> None:
    targets = find_targets("gemm", ["fp8_block"], ["deepseek-v3", "deepseek-r1"], [1], H100)
    o_proj = next(t for t in targets if t.kernel.library == "" and t.shape == {"m": 1, "n": 7168, "k": 16384})
    assert o_proj.places == ("deepseek-v3 o_proj", "deepseek-r1 o_proj")


def test_a_checkpoint_without_kernels_gets_all_formats() -> None:
    """gpt-oss keeps its projections in BF16, for which there is no kernel of the house."""
    found = names("gemm", None, ["gpt-oss-120b"], [1], H100)
    assert {"gemm/mxfp4-bf16", "gemm/fp8_block-fp8_group", "gemm/bf16-bf16@torch.matmul"} <= set(found)
    assert "gemm/nvfp4-nvfp4" not in found  # needs capability 10
    assert "gemm/nvfp4-nvfp4" in names("gemm", None, ["gpt-oss-120b"], [1], B200)


def test_asked_formats_only_and_their_peers() -> None:
    found = names("gemm", ["mxfp4-bf16"], ["deepseek-v3"], [1], H100)
    assert set(found) == {"gemm/mxfp4-bf16", "gemm/bf16-bf16@torch.matmul"}
    peers = {peer.name for peer in peers_of(find_kernels("gemm", ["nvfp4-nvfp4"]))}
    assert peers == {*SCALED_MM, *BLOCK_SCALED, "gemm/fp8_block-fp8_group@deep_gemm.fp8_gemm_nt"}


def test_copy_moves_what_it_says_and_rotates_all() -> None:
    for target in find_targets("copy", None, [], [], H100):
        assert target.l2_policy == "cold_all"
        assert target.kernel.work(target.shape).activation_bytes == 2 * target.shape["num_bytes"]
    attention = ["attention", "mla", "rope_append", "mla_append"]
    quantizers = ["quantize", "rms_norm_quantize", "swiglu_quantize"]
    assert known_ops() == ["gemm", "moe", *attention, *quantizers, "copy"]
    assert known_ops()[-1] == COPY.op


def test_quantizers_stand_where_a_step_quantizes() -> None:
    targets = find_targets(None, None, ["deepseek-v3"], [64], H100)
    places = {(t.kernel.name, *t.shape.values()): t.places for t in targets if not t.kernel.weight}
    assert places == {
        ("mla_append/fp8", 64, 128, 512, 64, 64): ("deepseek-v3 mla_append",),
        ("rms_norm_quantize/fp8_group", 64, 7168): ("deepseek-v3 attention_norm", "deepseek-v3 ffn_norm"),
        ("quantize/fp8_group", 64, 128 * 128): ("deepseek-v3 o_proj",),
        ("swiglu_quantize/fp8_group", 64, 18432): ("deepseek-v3 dense_swiglu",),
        ("swiglu_quantize/fp8_group", 64, 2048): ("deepseek-v3 shared_swiglu",),
        ("swiglu_quantize/fp8_group", 8 * 64, 2048): ("deepseek-v3 experts_swiglu",),
    }
    assert all(t.l2_policy == "hot" for t in targets if not t.kernel.weight)
    assert num_rotated_sets("hot", 50 << 20, 0, 1) == 1


def test_quantizers_of_a_checkpoint_without_quantized_activations() -> None:
    """gpt-oss keeps its activations in BF16: every format, of sizes that do not divide by 128."""
    for op, rows, columns in (("quantize", 16, 4096), ("rms_norm_quantize", 16, 2880), ("swiglu_quantize", 64, 2880)):
        formats = ("fp8", "fp8_row", "fp8_group", "mxfp8", "mxfp4", "nvfp4")
        expected = {f"{op}/{format}": {(rows, columns)} for format in formats}
        assert names(op, None, ["gpt-oss-120b"], [16], H100) == expected
    assert set(names("quantize", ["mxfp8"], ["qwen3-30b-a3b"], [1], H100)) == {"quantize/mxfp8"}


def test_attention_at_the_models_shapes_and_the_compared_ones() -> None:
    """gpt-oss: half of its layers have a window; its heads, and Qwen's; KV in the checkpoint's own format."""
    found = names("attention", None, ["gpt-oss-120b", "qwen3-30b-a3b"], [16, 512], H100, contexts=[1024, 1 << 20])
    own = {f"attention/{kv}-bf16" for kv in ("bf16", "fp8", "fp8_row", "mxfp4", "nvfp4")}
    assert set(found) == own | {"attention/bf16-bf16@torch.sdpa"}
    assert all(window == 0 and q_len == 1 for *_, window, q_len, _ in found["attention/bf16-bf16@torch.sdpa"])
    shapes = found["attention/fp8-bf16"]
    assert {(16, 1024, 64, 8, 64, 128, 1, 64), (16, 1024, 64, 8, 64, 0, 1, 64)} <= shapes
    assert {(16, 131072, 64, 8, 64, 0, 1, 64), (16, 40960, 32, 4, 128, 0, 1, 64)} <= shapes  # the models' longest
    compared = {(16, 8192, 64, 8, 128, 0, 1, 64), (16, 8192, 64, 8, 128, 0, 4, 64), (128, 2048, 32, 8, 128, 0, 1, 64)}
    assert compared <= shapes
    assert not any(shape[0] > 256 for shape in shapes)
    assert (256, 131072, 64, 8, 64, 0, 1, 64) not in names("attention", ["bf16"], ["gpt-oss-120b"], [256], H100)[
        "attention/bf16-bf16"
    ]  # 69 GB of one layer's cache
    latent = names("mla", None, ["deepseek-v3"], [64], H100, contexts=[8192])
    assert latent["mla/fp8-bf16"] >= {(64, 8192, 128, 512, 64, 1, 64), (32, 32768, 128, 512, 64, 1, 64)}
    assert all(t.l2_policy == "cold_weights" for t in find_targets("attention", None, ["gpt-oss-120b"], [16], H100))
    assert set(names("rope_append", ["fp8"], ["gpt-oss-120b"], [16], H100)["rope_append/fp8"]) == {(16, 64, 8, 64, 64)}


def test_experts_have_activations_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dataclasses.replace(load_model("gpt-oss-120b"), native_precision="mxfp4_mxfp8")
    monkeypatch.setattr(targets, "load_model", lambda name: model)
    assert set(names("swiglu_quantize", None, ["gpt-oss-120b"], [1], H100)) == {"swiglu_quantize/mxfp8"}
    assert len(names("quantize", None, ["gpt-oss-120b"], [1], H100)) == 6


def test_default_run_has_every_shape_once() -> None:
    targets = find_targets(None, None, DEFAULT_MODELS, DEFAULT_BATCHES, H100)
    keys = [(t.kernel.name, t.fields) for t in targets]
    assert len(keys) == len(set(keys)) > 100
    assert {t.shape["m"] for t in targets if t.kernel.op == "gemm"} == set(DEFAULT_BATCHES)
    assert all(t.l2_policy == "cold_weights" for t in targets if t.kernel.op == "gemm")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("attn", None, ["deepseek-v3"], [1], H100), "op: expected one of gemm"),
        (("gemm", ["int4"], ["deepseek-v3"], [1], H100), "format: expected one of fp8-fp8"),
        (("gemm", None, ["deepseek-v9"], [1], H100), "model"),
        (("gemm", ["nvfp4-nvfp4"], ["deepseek-v3"], [1], H100), "expected a kernel that runs on h100; got nvfp4-nvfp4"),
        (("gemm", None, ["deepseek-v3"], [1], get_gpu("mi300x")), "expected an NVIDIA GPU; got mi300x"),
    ],
)  # fmt: skip
def test_what_cannot_be_benched_is_said(args: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_targets(*args)  # type: ignore[arg-type]


def test_capabilities() -> None:
    assert [capability(GPUS[name]) for name in ("a100", "h100", "b200", "b300", "rtx_5090")] == [80, 90, 100, 103, 120]


def test_peers_are_marked_as_a_librarys() -> None:
    assert all(kernel.library and kernel.library in kernel.name and kernel.source_texts() for kernel in (*PEERS, COPY))


def test_targets_need_no_torch() -> None:
    code = "import sys, tokenfab.bench.targets, tokenfab.bench.campaign; print({'torch', 'triton'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_expert_layers_at_the_published_shapes() -> None:
    found = names("moe", None, ["deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b"], [64, 128], H100)
    assert {(128, 7168, 2048, 8, 256, 8, load) for load in (0, 101, 120)} <= found["moe/fp8_block-fp8_group"]
    assert (64, 2880, 2880, 4, 128, 1, 0) in found["moe/mxfp4-bf16"]
    assert (64, 2048, 768, 8, 128, 1, 120) in found["moe/bf16-bf16"]
    targets = find_targets("moe", ["fp8_block"], ["deepseek-v3"], [128], H100)
    balanced = next(target for target in targets if target.shape["load"] == 0)
    assert balanced.l2_policy == "cold_weights"
    assert balanced.kernel.work(balanced.shape).weight_bytes == pytest.approx(1.41e9, rel=0.01)
