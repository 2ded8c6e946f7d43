"""A decode step with the weights of a published checkpoint: a folder of ``config.json`` and ``*.safetensors``.

Tensors are BF16, under the names that Hugging Face transformers gives them for qwen3_moe, mixtral, gpt_oss and
deepseek_v3; gpt-oss's experts either BF16, (E, h, 2 I) with gate and up columns interleaved and (E, I, h), or as
published in MXFP4, whose values BF16 holds exactly. Rotations and eps are those of ``config.json``. Every tensor must
be there, in its shape, and none beside; but for the layers behind the last one, which predict more tokens (DeepSeek's
``num_nextn_predict_layers``).

Files are read by the ``safetensors`` package, tensor by tensor, and nothing else in the folder is opened; never
pickle.

Errors: ``ValueError`` naming the tensor or file, what was expected and what came.

Source: modelling code of these models in Hugging Face transformers; safetensors' own format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..kernels.codec import QuantizedTensor, dequantize
from ..kernels.formats import MXFP4
from ..kernels.moe_checkpoints import read_experts
from ..kernels.moe_weights import order_gate_up
from .decode_step import DecodeStep, build_step
from .deployment import Precision
from .model_config import DenseFfn, GqaAttention, MlaAttention, MoeFfn
from .step_model import StepModel, read_step_model
from .step_weights import FLOAT32_ROLES, Shape

CHECKPOINT_KV_SCALE = 1.0
"""Of caches in FP8: keys and values up to 448 do not saturate, and E4M3 is as fine at any size."""

_ENDS = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MOE = {"MixtralForCausalLM": "block_sparse_moe"}
_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_PLAIN = {
    "attention_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight",
    "o": "self_attn.o_proj.weight", "o_bias": "self_attn.o_proj.bias", "sinks": "self_attn.sinks",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight", "q_b": "self_attn.q_b_proj.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight", "kv_b": "self_attn.kv_b_proj.weight",
    "correction_bias": "mlp.gate.e_score_correction_bias", "router_bias": "mlp.router.bias",
}  # fmt: skip
"""Roles of one tensor by its name within a layer."""


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """The tensors of all ``*.safetensors`` of a folder by name, read when asked for. ``read``: names that were.

    Raises:
        ValueError: no such file, one that is damaged, or a name that stands in two of them.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from safetensors import SafetensorError, safe_open

        self.read: set[str] = set()
        self._files: dict[str, Any] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"folder: expected *.safetensors in {str(folder)!r}; got none")
        for path in paths:
            try:
                file = safe_open(str(path), framework="pt", device=str(device))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path.name}: expected a safetensors file; got {error}") from None
            for name in file.keys():  # noqa: SIM118
                if name in self._files:
                    raise ValueError(f"{name}: expected in one file; got it in {path.name} too")
                self._files[name] = file

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def slice(self, name: str) -> Any:
        """A tensor of which only the entries that are asked for are read."""
        if name not in self:
            raise ValueError(f"{name}: expected it in the checkpoint; got none of that name")
        self.read.add(name)
        return self._files[name].get_slice(name)


class CheckpointSource:
    """Weights by role (``step_weights``) from a checkpoint's tensors."""

    def __init__(self, tensors: CheckpointTensors, model: StepModel) -> None:
        self.tensors, self.model = tensors, model
        self._moe = _MOE.get(model.config.architecture, "mlp")
        self._expert: tuple[str, int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def tensor(self, layer: int | None, role: str, shape: Shape) -> torch.Tensor:
        """The tensor of a role.

        Raises:
            ValueError: naming a tensor that is missing, or has another shape or dtype.
        """
        if layer is None:
            return self._get(_ENDS[role], shape)
        prefix = f"model.layers.{layer}"
        if role.startswith("experts."):
            _, expert, part = role.split(".")
            is_fused = self.model.config.architecture == "GptOssForCausalLM"
            return (self._fused if is_fused else self._single)(prefix, int(expert), part, shape)
        parts = [self._get(f"{prefix}.{name}", size, role) for name, size in self._names(layer, role, shape)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def check_all_read(self) -> None:
        """Raise unless every tensor was read.

        Raises:
            ValueError: naming one that has no place in the model.
        """
        for name in sorted(set(self.tensors) - self.tensors.read):
            match = _LAYER.match(name)
            if match is None or int(match[1]) < len(self.model.layers):
                raise ValueError(f"{name}: expected no such tensor in {self.model.config.architecture}; got one")

    def _names(self, layer: int, role: str, shape: Shape) -> list[tuple[str, Shape]]:
        """(name within the layer, shape) of the tensors that a role is made of, one below the other."""
        attention, ffn = self.model.layers[layer].attention, self.model.layers[layer].ffn
        if role in _PLAIN:
            return [(_PLAIN[role], shape)]
        if role in ("qkv", "qkv_bias"):
            assert isinstance(attention, GqaAttention)
            suffix, heads = (
                "bias" if role == "qkv_bias" else "weight",
                (attention.num_heads, *[attention.num_kv_heads] * 2),
            )
            return [
                (f"self_attn.{name}_proj.{suffix}", (count * attention.head_dim, *shape[1:]))
                for name, count in zip("qkv", heads, strict=True)
            ]
        if role == "q_kv_a":
            assert isinstance(attention, MlaAttention)
            latent = attention.kv_lora_rank + attention.rope_dim
            query = "q_proj" if attention.q_lora_rank is None else "q_a_proj"
            return [(f"self_attn.{query}.weight", (shape[0] - latent, shape[1])),
                    ("self_attn.kv_a_proj_with_mqa.weight", (latent, shape[1]))]  # fmt: skip
        if role == "router":
            is_gpt_oss = self.model.config.architecture == "GptOssForCausalLM"
            return [(f"{self._moe}.{'router' if is_gpt_oss else 'gate'}.weight", shape)]
        place = "mlp.shared_experts" if role.startswith("shared_") else "mlp"
        assert isinstance(ffn, DenseFfn) or place != "mlp"
        names = _PROJECTIONS[role.removeprefix("shared_")]
        return [(f"{place}.{name}.weight", (shape[0] // len(names), *shape[1:])) for name in names]

    def _get(self, name: str, shape: Shape, role: str = "") -> torch.Tensor:
        if name not in self.tensors:
            raise ValueError(f"{name}: expected {shape} in the checkpoint; got none of that name")
        return _checked(name, self.tensors[name], shape, role in FLOAT32_ROLES)

    def _single(self, prefix: str, expert: int, part: str, shape: Shape) -> torch.Tensor:
        """Of experts that are stored one by one; both weights of an expert are read together."""
        place = f"{prefix}.{self._moe}"
        if self._expert is None or self._expert[:2] != (place, expert):
            upper, lower = read_experts(self.tensors, place, range(expert, expert + 1))
            for weight in (upper, lower):
                if weight.format != "bf16":
                    raise ValueError(f"{place}.experts.{expert}: expected bfloat16; got {weight.format}")
            self._expert = place, expert, (upper.parts["data"][0], lower.parts["data"][0])
        return _checked(f"{place}.experts.{expert} ({part})", self._expert[2][part == "down"], shape, False)

    def _fused(self, prefix: str, expert: int, part: str, shape: Shape) -> torch.Tensor:
        """Of gpt-oss's experts, which are stored together."""
        ffn = next(layer.ffn for layer in self.model.layers)
        assert isinstance(ffn, MoeFfn)
        name, is_bias = part.removesuffix("_bias"), part.endswith("_bias")
        place = f"{prefix}.mlp.experts.{name}_proj"
        if is_bias:
            found = self._entry(f"{place}_bias", (ffn.num_experts, *shape), expert)
        elif f"{place}_blocks" in self.tensors:
            rows, columns = shape
            blocks = self._entry(f"{place}_blocks", (ffn.num_experts, rows, columns // 32, 16), expert, torch.uint8)
            scales = self._entry(f"{place}_scales", (ffn.num_experts, rows, columns // 32), expert, torch.uint8)
            stored = QuantizedTensor(MXFP4, blocks.flatten(1), scales, None, (rows, columns))
            found = dequantize(stored).to(torch.bfloat16)
        else:
            found = self._entry(place, (ffn.num_experts, *reversed(shape)), expert).t()
        return order_gate_up(found[None], "interleaved")[0] if name == "gate_up" else found

    def _entry(self, name: str, shape: Shape, index: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """One entry of the first axis of a tensor of this shape."""
        found = self.tensors.slice(name)
        if tuple(found.get_shape()) != shape:
            raise ValueError(f"{name}: expected {shape}; got {tuple(found.get_shape())}")
        entry = found[index]
        if entry.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}; got {entry.dtype}")
        return entry


def _checked(name: str, values: torch.Tensor, shape: Shape, is_wide: bool) -> torch.Tensor:
    """BF16, or any float as float32."""
    good = values.dtype == torch.bfloat16 or (is_wide and values.dtype == torch.float32)
    if not good or tuple(values.shape) != shape:
        expected = "float32 or bfloat16" if is_wide else "bfloat16"
        raise ValueError(f"{name}: expected {expected} {shape}; got {values.dtype} {tuple(values.shape)}")
    return values.float() if is_wide else values


def load_checkpoint(
    folder: str | Path, precision: Precision, *, batch: int, capacity: int, device: torch.device | str = "cuda",
    is_plain: bool = False,
) -> DecodeStep:  # fmt: skip
    """A step of ``batch`` sequences that have nothing cached, and room for ``capacity`` tokens each.

    Raises:
        ValueError: a folder without a config or tensors; a model or precision without kernels; a tensor that is
            missing, misshapen or one too many.
    """
    folder, place = Path(folder), torch.device(device)
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"folder: expected a config.json in {str(folder)!r}; got none")
    model = read_step_model(config.read_bytes(), folder.resolve().name)
    source = CheckpointSource(CheckpointTensors(folder, place), model)
    step = build_step(
        model, precision, batch=batch, length=0, capacity=capacity, device=place, source=source,
        kv_scale=CHECKPOINT_KV_SCALE, is_plain=is_plain,
    )  # fmt: skip
    source.check_all_read()
    return step
