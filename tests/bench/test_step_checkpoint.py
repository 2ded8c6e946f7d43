"""Checkpoints under their Hugging Face names against plain torch; what a precision costs; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenfab.bench.deployment import PRECISIONS
from tokenfab.bench.step_checkpoint import CheckpointSource, CheckpointTensors, load_checkpoint
from tokenfab.bench.step_error import Trace, checkpoint_error, compare_traces, decode_tokens
from tokenfab.bench.step_model import Numerics, load_step_model, read_numerics, read_step_model
from tokenfab.kernels.codec import dequantize, quantize
from tokenfab.tests.bench.plain_models import DEEPSEEK, GPT_OSS, QWEN, make_tensors, plain_logits

safetensors = pytest.importorskip("safetensors.torch")
CPU = torch.device("cpu")
TOKENS = torch.tensor([[3, 60, 17, 17, 5], [41, 0, 9, 30, 22]])
"""Longer than gpt-oss's window of 3."""


def save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Two files, as large checkpoints have."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    for index in range(2):
        part = {name: tensors[name].contiguous() for name in names[index::2]}
        safetensors.save_file(part, str(folder / f"model-{index + 1}-of-2.safetensors"))
    return folder


def source_of(folder: Path) -> CheckpointSource:
    model = read_step_model((folder / "config.json").read_bytes(), "tiny")
    return CheckpointSource(CheckpointTensors(folder, CPU), model)


def load(folder: Path, precision: str = "bf16", **options: Any) -> Any:
    return load_checkpoint(folder, PRECISIONS[precision], **{"batch": 2, "capacity": 5, "device": "cpu"} | options)


# -- right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QWEN, GPT_OSS, DEEPSEEK], ids=lambda config: config["architectures"][0])
def test_decoding_token_by_token_is_the_model(config: dict[str, Any], tmp_path: Path, device: torch.device) -> None:
    tensors = make_tensors(config)
    step = load(save(tmp_path / "tiny", config, tensors), device=device)
    got = decode_tokens(step, TOKENS.to(device)).logits.transpose(0, 1)
    expected = plain_logits(config, tensors, TOKENS)
    errors = (got - expected).square().mean(-1).sqrt() / expected.square().mean().sqrt()
    assert float(errors.max()) < 0.02, errors  # BF16 on the way


def test_precision_costs_more_the_fewer_bits_it_has(tmp_path: Path, device: torch.device) -> None:
    folder = save(tmp_path / "tiny", GPT_OSS, make_tensors(GPT_OSS))
    tokens = TOKENS[:1, :3]
    found = {name: checkpoint_error(folder, PRECISIONS[name], tokens, device=device) for name in ("fp8", "mxfp4")}
    fp8, mxfp4 = found["fp8"], found["mxfp4"]
    assert 1e-5 < fp8.kl_mean_nats < mxfp4.kl_mean_nats < 0.1
    assert fp8.kl_max_nats >= fp8.kl_mean_nats
    assert (fp8.num_tokens, fp8.precision, len(fp8.layer_sqnr_db)) == (3, "fp8", 2)
    assert 0.5 <= fp8.top1_agreement <= 1
    for each in found.values():
        assert all(8 < sqnr < 45 for sqnr in each.layer_sqnr_db)
        assert each.layer_sqnr_db[1] < each.layer_sqnr_db[0]
    assert fp8.layer_sqnr_db[0] > mxfp4.layer_sqnr_db[0]


def test_published_mxfp4_experts_are_those_of_bf16_that_hold_them(tmp_path: Path) -> None:
    tensors = make_tensors(GPT_OSS)
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        stored = [quantize(expert.t(), "mxfp4") for expert in tensors[name]]  # rows are outputs
        tensors[name] = torch.stack([dequantize(each).to(torch.bfloat16).t() for each in stored])
        del packed[name]
        packed[f"{name}_blocks"] = torch.stack([each.data.unflatten(1, (-1, 16)) for each in stored])
        packed[f"{name}_scales"] = torch.stack([each.scale for each in stored if each.scale is not None])
    sources = [source_of(save(tmp_path / name, GPT_OSS, held)) for name, held in (("a", tensors), ("b", packed))]
    for role, shape in (
        ("experts.3.gate_up", (128, 128)),
        ("experts.3.down", (128, 64)),
        ("experts.1.gate_up_bias", (128,)),
    ):
        assert torch.equal(*(source.tensor(1, role, shape) for source in sources))
    gate_up = sources[0].tensor(1, "experts.3.gate_up", (128, 128))
    assert torch.equal(gate_up[64 + 5], tensors["model.layers.1.mlp.experts.gate_up_proj"][3, :, 2 * 5 + 1])
    step = load(tmp_path / "b", "mxfp4", batch=1, capacity=1)
    assert step.layers[0].experts[0].format == "mxfp4"


def test_layers_that_predict_further_tokens_are_left_alone(tmp_path: Path) -> None:
    tensors = make_tensors(QWEN) | {"model.layers.2.eh_proj.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    step = load(save(tmp_path / "tiny", QWEN, tensors), batch=1, capacity=1)
    assert step.num_layers == 2


# -- figures ---------------------------------------------------------------------------------------


def test_traces_are_compared_by_the_formulas() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]], [[0.1, 0.1, 0.8]]]))
    other = torch.log(torch.tensor([[[0.25, 0.5, 0.25]], [[0.1, 0.1, 0.8]]])) + 3.0  # logits have no absolute size
    x = torch.ones(2, 3, 1, 4)
    y = x.clone()
    y[:, 0], y[:, 2] = 5.0, 1.1  # the stream before the first layer is no layer's
    result = compare_traces("fp8", Trace(logits, x), Trace(other, y))
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert result.kl_max_nats == pytest.approx(kl)
    assert result.kl_mean_nats == pytest.approx(kl / 2, abs=1e-6)
    assert result.top1_agreement == 0.5
    assert result.layer_sqnr_db == (math.inf, pytest.approx(20, abs=1e-3))
    reverse = compare_traces("fp8", Trace(other, y), Trace(logits, x))
    assert reverse.kl_max_nats == pytest.approx(0.25 * math.log(0.5) + 0.5 * math.log(2))
    skewed = torch.log(torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.1, 0.8]]]))
    one_way, other_way = (
        compare_traces("", Trace(a, x), Trace(b, x)).kl_max_nats for a, b in ((logits, skewed), (skewed, logits))
    )
    assert one_way == pytest.approx(0.5 * math.log(0.5 / 0.7) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(2.5))
    assert other_way != pytest.approx(one_way, rel=1e-3)
    with pytest.raises(ValueError, match="logits: expected finite values"):
        compare_traces("fp8", Trace(logits, x), Trace(logits * math.nan, x))
    with pytest.raises(ValueError, match=r"logits: expected \(2, 1, 3\); got \(1, 1, 3\)"):
        compare_traces("fp8", Trace(logits, x), Trace(logits[:1], x))


def test_rotations_are_read_from_the_config() -> None:
    old = read_numerics(json.dumps(GPT_OSS))
    scaling: Any = GPT_OSS["rope_scaling"]
    rope = scaling | {"rope_theta": GPT_OSS["rope_theta"]}
    new = {key: value for key, value in GPT_OSS.items() if key not in ("rope_scaling", "rope_theta")}
    assert read_numerics(json.dumps(new | {"rope_parameters": rope})) == old
    assert old.yarn is not None
    assert old.yarn.cosine_factor == pytest.approx(0.1 * math.log(4) + 1)
    deepseek = load_step_model("deepseek-v3")
    assert deepseek.numerics.score_scale(deepseek.layers[0].attention) == pytest.approx(
        192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    )
    assert float(deepseek.numerics.cos_sin(1, 64, "cpu").max()) == 1.0
    table = Numerics(rope_theta=100.0).cos_sin(3, 4, "cpu")
    assert table[2].tolist() == pytest.approx([math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)])


# -- refused ---------------------------------------------------------------------------------------

_Q, _EXPERT = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({_Q: None}, rf"{_Q}: expected \(256, 128\) in the checkpoint; got none of that name"),
        ({_Q: torch.ones(128, 256)}, rf"{_Q}: expected bfloat16 \(256, 128\); got torch.bfloat16 \(128, 256\)"),
        ({_Q: torch.ones(256, 128).double()}, rf"{_Q}: expected bfloat16 \(256, 128\); got torch.float64"),
        ({_EXPERT: None}, rf"expected {_EXPERT}; got none"),
        ({_EXPERT: torch.ones(60, 128)}, r"model.layers.0.mlp.experts.3 \(gate_up\): expected bfloat16 \(128, 128\)"),
        ({"model.layers.0.extra": torch.ones(2)}, "model.layers.0.extra: expected no such tensor in Qwen3Moe"),
        ({"lm_head.weight": None}, "lm_head.weight: expected"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = make_tensors(QWEN)
    for name, values in change.items():
        tensors.pop(name, None)
        if values is not None:
            tensors[name] = values if values.dtype == torch.float64 else values.to(torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "tiny", QWEN, tensors))


def test_gpt_oss_experts_of_another_shape_are_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = make_tensors(GPT_OSS)
    tensors[name] = tensors[name][:, :, :100]
    with pytest.raises(ValueError, match=rf"{name}: expected \(4, 64, 128\); got \(4, 64, 100\)"):
        load(save(tmp_path / "tiny", GPT_OSS, tensors))


def test_r26_folders_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder: expected a config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"folder: expected \*.safetensors"):
        load(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match="a.safetensors: expected a safetensors file"):
        load(tmp_path)
    for name in ("a", "b"):
        safetensors.save_file({"model.norm.weight": torch.ones(2)}, str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(ValueError, match="model.norm.weight: expected in one file; got it in b.safetensors too"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("swiglu_limit", 5.0, "swiglu_limit: expected 7.0 or none; got 5.0"),
        ("rope_scaling", {"rope_type": "llama3"}, "rope_scaling: expected none, default or yarn; got 'llama3'"),
        ("rope_scaling", {"rope_type": "yarn"}, "config: .*factor"),
        ("rope_theta", None, "rope_theta: expected a number above 1; got None"),
        ("rms_norm_eps", 0, "config: "),
    ],
)
def test_configs_that_are_not_understood_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_numerics(json.dumps(GPT_OSS | {field: value}))


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    step = load(save(tmp_path / "tiny", QWEN, make_tensors(QWEN)))
    with pytest.raises(ValueError, match=r"tokens: expected int64 \(2, N\), N from 1 to 5; got torch.int64 \(2, 6\)"):
        decode_tokens(step, torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 63; got 0 to 64"):
        decode_tokens(step, torch.tensor([[0], [64]]))
