"""Models: sizes against the published ones, architectures, and refusal of bad configs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenfab.bench.model_config import DenseFfn, GqaAttention, MlaAttention, ModelConfig, MoeFfn, SparseIndexer
from tokenfab.bench.models import ARCHITECTURES, SHIPPED, load_model, model_from_config, shipped_models

# total and active parameters in billions, with embedding and head, without multi-token prediction
SIZES = [
    ("deepseek-v3", 671.0, 37.6),
    ("deepseek-r1", 671.0, 37.6),
    ("deepseek-v3.2", 671.0, 37.6),
    ("kimi-k2", 1026, 32.9),
    ("qwen3-235b-a22b", 235.1, 22.2),
    ("qwen3-30b-a3b", 30.5, 3.35),
    ("gpt-oss-120b", 116.8, 5.7),
    ("gpt-oss-20b", 20.9, 4.2),
    ("mixtral-8x7b", 46.7, 12.9),
    ("mixtral-8x22b", 140.6, 39.2),
    ("llama-4-maverick", 400.7, 17.2),
    ("glm-4.5", 352.8, 33.6),
    ("minimax-m2.5", 228.7, 11.0),
]


def indexer_parameters(model: ModelConfig) -> int:
    return sum(
        layer.attention.indexer_parameters(model.hidden_size) * count
        for layer, count in model.layers
        if isinstance(layer.attention, MlaAttention)
    )


@pytest.mark.parametrize(("name", "total", "active"), SIZES)
def test_parameter_counts(name: str, total: float, active: float) -> None:
    model = load_model(name)
    # DeepSeek-V3.2's published size is V3's: the sparse-attention indexer is not in it, so it comes off here.
    # It is zero for every other model.
    indexer = indexer_parameters(model)
    assert (indexer > 0) == (name == "deepseek-v3.2")
    assert model.num_parameters - indexer == pytest.approx(total * 1e9, rel=0.01)
    assert model.num_active_parameters - indexer == pytest.approx(active * 1e9, rel=0.01)


def test_no_shipped_model_is_untested() -> None:
    assert shipped_models() == sorted(name for name, _, _ in SIZES)


# parameters of the published checkpoints to the last one; gpt-oss also has 64 sinks and an o_proj bias of 2880
# per layer, which are not counted
@pytest.mark.parametrize(
    ("name", "total", "uncounted"),
    [
        ("mixtral-8x7b", 46_702_792_704, 0),
        ("mixtral-8x22b", 140_620_634_112, 0),
        ("qwen3-30b-a3b", 30_532_122_624, 0),
        ("qwen3-235b-a22b", 235_093_634_560, 0),
        ("deepseek-v3", 671_026_419_200, 0),
        ("gpt-oss-120b", 116_829_156_672, 36 * (64 + 2880)),
        ("gpt-oss-20b", 20_914_757_184, 24 * (64 + 2880)),
    ],
)
def test_exact_counts(name: str, total: int, uncounted: int) -> None:
    assert load_model(name).num_parameters == total - uncounted


def test_indexer_parameters() -> None:
    # q from the q_lora latent (1536 x 64 x 128), one shared key of 128 and a weight per head from the hidden
    # state (7168 x (128 + 64)), and the key's LayerNorm (2 x 128): 61 layers
    assert indexer_parameters(load_model("deepseek-v3.2")) == 61 * (1536 * 64 * 128 + 7168 * (128 + 64) + 2 * 128)


# hidden, vocabulary, longest context, precision of the published checkpoint
@pytest.mark.parametrize(
    ("name", "hidden", "vocab", "context", "precision"),
    [
        ("deepseek-v3", 7168, 129280, 163840, "fp8"),
        ("deepseek-r1", 7168, 129280, 163840, "fp8"),
        ("deepseek-v3.2", 7168, 129280, 163840, "fp8"),
        ("kimi-k2", 7168, 163840, 131072, "fp8"),
        ("qwen3-235b-a22b", 4096, 151936, 40960, "bf16"),
        ("qwen3-30b-a3b", 2048, 151936, 40960, "bf16"),
        ("gpt-oss-120b", 2880, 201088, 131072, "mxfp4"),
        ("gpt-oss-20b", 2880, 201088, 131072, "mxfp4"),
        ("mixtral-8x7b", 4096, 32000, 32768, "bf16"),
        ("mixtral-8x22b", 6144, 32000, 65536, "bf16"),
        ("llama-4-maverick", 5120, 202048, 1048576, "bf16"),
        ("glm-4.5", 5120, 151552, 131072, "bf16"),
        ("minimax-m2.5", 3072, 200064, 196608, "fp8"),
    ],
)
def test_ends_and_native_precision(name: str, hidden: int, vocab: int, context: int, precision: str) -> None:
    model = load_model(name)
    assert (model.hidden_size, model.vocab_size, model.max_context) == (hidden, vocab, context)
    assert model.native_precision == precision
    assert model.name == name
    assert not model.tied_embeddings


# layers, dense layers, dense width, experts, top-k, expert width, shared width
@pytest.mark.parametrize(
    ("name", "num_layers", "num_dense", "dense", "moe"),
    [
        ("deepseek-v3", 61, 3, 18432, (256, 8, 2048, 2048)),
        ("deepseek-v3.2", 61, 3, 18432, (256, 8, 2048, 2048)),
        ("kimi-k2", 61, 1, 18432, (384, 8, 2048, 2048)),
        ("qwen3-235b-a22b", 94, 0, None, (128, 8, 1536, 0)),
        ("qwen3-30b-a3b", 48, 0, None, (128, 8, 768, 0)),
        ("gpt-oss-120b", 36, 0, None, (128, 4, 2880, 0)),
        ("gpt-oss-20b", 24, 0, None, (32, 4, 2880, 0)),
        ("mixtral-8x7b", 32, 0, None, (8, 2, 14336, 0)),
        ("mixtral-8x22b", 56, 0, None, (8, 2, 16384, 0)),
        ("llama-4-maverick", 48, 24, 16384, (128, 1, 8192, 8192)),
        ("glm-4.5", 92, 3, 12288, (160, 8, 1536, 1536)),
        ("minimax-m2.5", 62, 0, None, (256, 8, 1536, 0)),
    ],
)
def test_layers_and_experts(
    name: str, num_layers: int, num_dense: int, dense: int | None, moe: tuple[int, int, int, int]
) -> None:
    model = load_model(name)
    assert model.num_layers == num_layers
    dense_layers = [(layer.ffn, count) for layer, count in model.layers if isinstance(layer.ffn, DenseFfn)]
    assert sum(count for _, count in dense_layers) == num_dense
    assert {ffn.intermediate_size for ffn, _ in dense_layers} == ({dense} if dense else set())
    experts = {layer.ffn for layer, _ in model.layers if isinstance(layer.ffn, MoeFfn)}
    assert {(f.num_experts, f.top_k, f.intermediate_size, f.shared_intermediate_size) for f in experts} == {moe}


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2", "glm-4.5"])
def test_dense_layers_come_first(name: str) -> None:
    # layers are listed in order of first appearance
    kinds = [type(layer.ffn) for layer, _ in load_model(name).layers]
    assert kinds == [DenseFfn, MoeFfn]


# query heads, KV heads, head dim
@pytest.mark.parametrize(
    ("name", "heads", "qk_norm", "bias", "sinks"),
    [
        ("qwen3-235b-a22b", (64, 4, 128), True, False, False),
        ("qwen3-30b-a3b", (32, 4, 128), True, False, False),
        ("gpt-oss-120b", (64, 8, 64), False, True, True),
        ("gpt-oss-20b", (64, 8, 64), False, True, True),
        ("mixtral-8x7b", (32, 8, 128), False, False, False),
        ("mixtral-8x22b", (48, 8, 128), False, False, False),
        ("llama-4-maverick", (40, 8, 128), False, False, False),
        ("glm-4.5", (96, 8, 128), True, True, False),
        ("minimax-m2.5", (48, 8, 128), True, False, False),
    ],
)
def test_gqa(name: str, heads: tuple[int, int, int], qk_norm: bool, bias: bool, sinks: bool) -> None:
    for layer, _ in load_model(name).layers:
        attention = layer.attention
        assert isinstance(attention, GqaAttention)
        assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == heads
        assert (attention.has_qk_norm, attention.has_bias, attention.has_sinks) == (qk_norm, bias, sinks)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        # gpt-oss: 128 tokens on every other layer
        ("gpt-oss-120b", {128: 18, None: 18}),
        ("gpt-oss-20b", {128: 12, None: 12}),
        # Llama-4: three layers of four see their 8192-token chunk, every fourth has no RoPE and sees all
        ("llama-4-maverick", {8192: 36, None: 12}),
        # published with "sliding_window": null
        ("mixtral-8x7b", {None: 32}),
        ("qwen3-30b-a3b", {None: 48}),
    ],
)
def test_windows(name: str, windows: dict[int | None, int]) -> None:
    seen: dict[int | None, int] = {}
    for layer, count in load_model(name).layers:
        assert isinstance(layer.attention, GqaAttention)
        seen[layer.attention.window] = seen.get(layer.attention.window, 0) + count
    assert seen == windows


def test_gpt_oss_starts_with_a_window() -> None:
    first = load_model("gpt-oss-20b").layers[0][0].attention
    assert isinstance(first, GqaAttention)
    assert first.window == 128


def test_llama4_full_attention_falls_on_moe_layers() -> None:
    # layers 4, 8, ... have no RoPE; layers 2, 4, 6, ... are MoE: so all 24 dense layers are chunked
    kinds = {
        (type(layer.ffn), layer.attention.window): count
        for layer, count in load_model("llama-4-maverick").layers
        if isinstance(layer.attention, GqaAttention)
    }
    assert kinds == {(DenseFfn, 8192): 24, (MoeFfn, 8192): 12, (MoeFfn, None): 12}


@pytest.mark.parametrize(("name", "heads"), [("deepseek-v3", 128), ("deepseek-r1", 128), ("kimi-k2", 64)])
def test_mla(name: str, heads: int) -> None:
    # q_lora 1536, kv_lora 512, nope 128, rope 64, v 128
    expected = MlaAttention(heads, 1536, 512, 128, 64, 128, None)
    assert {layer.attention for layer, _ in load_model(name).layers} == {expected}


def test_dsa_indexer() -> None:
    attentions = {layer.attention for layer, _ in load_model("deepseek-v3.2").layers}
    assert attentions == {MlaAttention(128, 1536, 512, 128, 64, 128, SparseIndexer(64, 128, 2048))}


# scoring, renormalised, bias, groups, kept groups, factor
@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("deepseek-v3", ("sigmoid", True, True, 8, 4, 2.5)),
        ("kimi-k2", ("sigmoid", True, True, 1, 1, 2.827)),
        ("glm-4.5", ("sigmoid", True, True, 1, 1, 2.5)),
        ("minimax-m2.5", ("sigmoid", True, True, 1, 1, 1.0)),
        ("qwen3-30b-a3b", ("softmax", True, False, 1, 1, 1.0)),
        ("gpt-oss-120b", ("softmax_top_k", True, False, 1, 1, 1.0)),
        ("mixtral-8x7b", ("softmax_top_k", True, False, 1, 1, 1.0)),
        ("llama-4-maverick", ("sigmoid", False, False, 1, 1, 1.0)),
    ],
)
def test_router(name: str, router: tuple[str, bool, bool, int, int, float]) -> None:
    routers = {layer.ffn.router for layer, _ in load_model(name).layers if isinstance(layer.ffn, MoeFfn)}
    assert {(r.scoring, r.renormalize, r.has_bias, r.num_groups, r.kept_groups, r.scaling_factor) for r in routers} == {
        router
    }


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("deepseek-v3", 35_136),  # 61 x 576
        ("kimi-k2", 35_136),
        ("qwen3-30b-a3b", 48 * 2 * 4 * 128),
        ("gpt-oss-120b", 36 * 2 * 8 * 64),
        ("mixtral-8x7b", 32 * 2 * 8 * 128),
    ],
)
def test_kv_values_per_token(name: str, values: int) -> None:
    assert load_model(name).kv_values_per_token() == values


# --- other configs ---------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 256,
    "vocab_size": 1000,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def read(config: dict[str, Any]) -> ModelConfig:
    return model_from_config(json.dumps(config), "tiny")


def shipped_config(name: str) -> dict[str, Any]:
    return json.loads((SHIPPED / f"{name}.json").read_text())


@settings(deadline=None, max_examples=60)
@given(
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([16, 40, 64, 128]),
    hidden=st.integers(1, 4096),
    inter=st.integers(1, 4096),
    experts=st.integers(1, 64),
    top_k=st.integers(1, 64),
    layers=st.integers(1, 100),
    vocab=st.integers(1, 50000),
    tied=st.booleans(),
)
def test_totals_equal_a_count_over_the_tensors(
    kv_heads: int, group: int, head_dim: int, hidden: int, inter: int, experts: int, top_k: int, layers: int,
    vocab: int, tied: bool,
) -> None:  # fmt: skip
    top_k = min(top_k, experts)
    heads = kv_heads * group
    model = read(
        SMALL
        | {
            "hidden_size": hidden,
            "vocab_size": vocab,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": inter,
            "num_local_experts": experts,
            "num_experts_per_tok": top_k,
            "tie_word_embeddings": tied,
        }
    )
    expert = [(inter, hidden), (hidden, inter), (inter, hidden)]  # w1, w2, w3
    layer = [
        (heads * head_dim, hidden),
        (kv_heads * head_dim, hidden),
        (kv_heads * head_dim, hidden),
        (hidden, heads * head_dim),
        (hidden,),
        (hidden,),
        (experts, hidden),
    ]
    ends = [(vocab, hidden), (hidden,), *([] if tied else [(vocab, hidden)])]

    def count(experts_counted: int) -> int:
        return sum(map(math.prod, ends)) + layers * (
            sum(map(math.prod, layer)) + experts_counted * sum(map(math.prod, expert))
        )

    assert model.num_parameters == count(experts)
    assert model.num_active_parameters == count(top_k)
    assert model.num_layers == layers
    assert model.kv_values_per_token() == layers * 2 * kv_heads * head_dim


def test_head_dim_defaults_to_hidden_over_heads() -> None:
    attention = read(SMALL).layers[0][0].attention
    assert isinstance(attention, GqaAttention)
    assert attention.head_dim == 32


def test_qwen3_sparse_step_and_dense_layers() -> None:
    # layers 2, 4, 6, 8 (counted from one) are MoE but for index 3, listed as dense
    changes = {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    model = read(shipped_config("qwen3-30b-a3b") | changes)
    dense = {layer.ffn for layer, _ in model.layers if isinstance(layer.ffn, DenseFfn)}
    assert {(type(layer.ffn), count) for layer, count in model.layers} == {(DenseFfn, 5), (MoeFfn, 3)}
    assert dense == {DenseFfn(6144)}


@pytest.mark.parametrize(("shared", "width"), [(0, 0), (1, 2048), (2, 4096)])
def test_shared_experts_add_up_to_one_of_their_width(shared: int, width: int) -> None:
    model = read(shipped_config("deepseek-v3") | {"n_shared_experts": shared})
    assert [layer.ffn.shared_intermediate_size for layer, _ in model.layers if isinstance(layer.ffn, MoeFfn)] == [width]


def test_moe_layer_frequency() -> None:
    # of 61 layers, those from index 3 on with an even index
    model = read(shipped_config("deepseek-v3") | {"moe_layer_freq": 2})
    assert sum(count for layer, count in model.layers if isinstance(layer.ffn, MoeFfn)) == 29


def test_mla_without_a_query_latent() -> None:
    whole, direct = (read(shipped_config("deepseek-v3") | change) for change in ({}, {"q_lora_rank": None}))
    # q straight from the hidden state in place of a down- and an up-projection and the norm between
    query = 128 * 192
    saved = 61 * (7168 * 1536 + 1536 + 1536 * query - 7168 * query)
    assert direct.num_parameters == whole.num_parameters - saved


def test_llama4_text_alone() -> None:
    config = shipped_config("llama-4-maverick")
    text = config["text_config"] | {"architectures": ["Llama4ForCausalLM"]}
    assert read(text).layers == load_model("llama-4-maverick").layers


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8"}, None),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, None),
        ({"quant_method": "awq"}, None),
        ({}, None),
    ],
)
def test_native_precision(quantization: dict[str, Any] | None, precision: str | None) -> None:
    assert read(SMALL | {"quantization_config": quantization}).native_precision == precision


def test_load_by_path(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "other.json").write_text(json.dumps(SMALL | {"num_hidden_layers": 5}))
    by_folder, by_file = load_model(str(folder)), load_model(str(folder / "config.json"))
    assert by_folder == by_file == model_from_config(json.dumps(SMALL), "my-model")
    other = load_model(str(tmp_path / "other.json"))
    assert (other.name, other.num_layers) == ("other", 5)


def test_names_ignore_case() -> None:
    assert load_model("DeepSeek-V3") == load_model("deepseek-v3")


@pytest.mark.parametrize(
    "name",
    [
        "no-such-model",
        "deepseek",
        "../gpus",
        "../gpus.py",
        "../models/deepseek-v3",
        "./deepseek-v3",
        "deepseek-v3/../kimi-k2",
        "deepseek-v3.json",
        "..",
        "*",
        "deepseek-v?",
        "deepseek-v3\0",
    ],
)
def test_only_a_shipped_name_or_a_path_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that no relative path leads to a config
    with pytest.raises(ValueError, match=r"^model: expected one of .*deepseek-v3, .*or the path of a config\.json"):
        load_model(name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: expected one of "):
        load_model(str(tmp_path))


# --- bad configs: each refused by name of the field ------------------------------------------------------------

GPT_OSS = shipped_config("gpt-oss-20b")
DEEPSEEK = shipped_config("deepseek-v3")
LLAMA4 = shipped_config("llama-4-maverick")


@pytest.mark.parametrize(
    ("base", "changes", "field"),
    [
        (SMALL, {"hidden_size": None}, "hidden_size"),
        (SMALL, {"hidden_size": 0}, "hidden_size"),
        (SMALL, {"hidden_size": -256}, "hidden_size"),
        (SMALL, {"intermediate_size": 2**24 + 1}, "intermediate_size"),
        (SMALL, {"hidden_size": "256"}, "hidden_size"),
        (SMALL, {"hidden_size": 256.5}, "hidden_size"),
        (SMALL, {"hidden_size": True}, "hidden_size"),
        (SMALL, {"vocab_size": 0}, "vocab_size"),
        (SMALL, {"num_hidden_layers": 0}, "num_hidden_layers"),
        (SMALL, {"num_attention_heads": 0}, "num_attention_heads"),
        (SMALL, {"num_key_value_heads": 0}, "num_key_value_heads"),
        (SMALL, {"intermediate_size": -1}, "intermediate_size"),
        (SMALL, {"num_local_experts": 0}, "num_local_experts"),
        (SMALL, {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        (SMALL, {"max_position_embeddings": 0}, "max_position_embeddings"),
        (SMALL, {"sliding_window": -1}, "sliding_window"),
        (SMALL, {"head_dim": 0}, "head_dim"),
        (SMALL, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (SMALL, {"num_key_value_heads": 3}, "num_key_value_heads"),  # heads not divisible by KV heads
        (SMALL, {"num_attention_heads": 6, "num_key_value_heads": 2}, "num_attention_heads"),  # 256 / 6
        (SMALL, {"num_experts_per_tok": 5}, "num_experts_per_tok"),  # top-k beyond the experts
        (GPT_OSS, {"layer_types": GPT_OSS["layer_types"][:-1]}, "layer_types"),
        (GPT_OSS, {"layer_types": ["full_attention"] * 25}, "layer_types"),
        (GPT_OSS, {"layer_types": ["linear_attention"] * 24}, "layer_types"),
        (DEEPSEEK, {"kv_lora_rank": 0}, "kv_lora_rank"),
        (DEEPSEEK, {"topk_group": 9}, "topk_group"),
        (DEEPSEEK, {"n_group": 7}, "n_group"),
        (DEEPSEEK, {"num_experts_per_tok": 257}, "num_experts_per_tok"),
        (DEEPSEEK, {"routed_scaling_factor": -2.5}, "routed_scaling_factor"),
        (DEEPSEEK, {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        (LLAMA4, {"text_config": LLAMA4["text_config"] | {"num_local_experts": 0}}, "num_local_experts"),
        (LLAMA4, {"text_config": 1}, "text_config"),
    ],
)
def test_an_absurd_field_is_refused_by_name(base: dict[str, Any], changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^model tiny: .*\b{field}\b"):
        read(base | changes)


@pytest.mark.parametrize("field", sorted(set(SMALL) - {"architectures"}))
def test_a_missing_field_is_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=rf"^model tiny: .*missing required field `{field}`"):
        read({key: value for key, value in SMALL.items() if key != field})


def test_missing_architectures() -> None:
    with pytest.raises(ValueError, match=r"^model tiny: .*missing required field `architectures`"):
        read({"hidden_size": 256})


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], ["mixtralforcausallm"], []])
def test_an_unknown_architecture_is_refused_with_the_known_ones(architectures: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^model tiny: architectures: expected one of ") as error:
        read(SMALL | {"architectures": architectures})
    assert all(known in str(error.value) for known in ARCHITECTURES)
    assert str(architectures) in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps(SMALL | {"hidden_size": math.nan}), "malformed"),  # a NaN literal
        (json.dumps(SMALL | {"hidden_size": math.inf}), "malformed"),
        ("hidden_size: 256", "malformed"),
        (json.dumps(SMALL)[:-1], "truncated"),
        ("", "truncated"),
        ("[1, 2]", "got `array`"),
        (json.dumps([SMALL]), "got `array`"),
        ("null", "got `null`"),
    ],
)
def test_text_that_is_no_json_object_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^model tiny: .*{reason}"):
        model_from_config(text, "tiny")
    with pytest.raises(ValueError, match=rf"^model tiny: .*{reason}"):
        model_from_config(text.encode(), "tiny")


def test_a_bad_config_by_path_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"^model broken: "):
        load_model(str(tmp_path / "broken.json"))


def test_llama_4_checkpoint_precision_is_beside_the_text_config() -> None:
    raw = json.loads((SHIPPED / "llama-4-maverick.json").read_text())
    raw["quantization_config"] = {"quant_method": "compressed-tensors"}
    assert model_from_config(json.dumps(raw), "fp8").native_precision is None


def test_a_relative_path_is_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mixtral-8x7b", "qwen3-30b-a3b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text((SHIPPED / f"{name}.json").read_text())
        monkeypatch.chdir(folder)
        assert load_model("config.json").architecture == load_model(name).architecture
        assert load_model(".").name == name


@pytest.mark.parametrize("name", ["", "x" * 300, "\0"])
def test_r26_names_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model: |embedded null"):
        load_model(name)
