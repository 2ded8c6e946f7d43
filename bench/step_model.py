"""A model as a decode step computes it: its layers in order, eps, rotations, the scale of scores. Torch only for
tensors.

RoPE: position x base^(-2i / d), i < d / 2. YaRN stretches it: frequencies that turn fewer than ``beta_slow`` times
within the original context are divided by ``factor``, those that turn more than ``beta_fast`` times stay, between
them a linear ramp over i; cosines and sines are multiplied by ``attention_factor``, by default 0.1 ln(factor) + 1, or
where a config has both, that of ``mscale`` over that of ``mscale_all_dim``. DeepSeek also multiplies scores by the
square of 0.1 mscale_all_dim ln(factor) + 1.

Errors: ``ValueError`` naming the field, what was expected and what came.

Source: Su et al. 2021 (RoPE), Peng et al. 2023 (YaRN), the modelling code of Qwen3-MoE, gpt-oss and DeepSeek-V3 in
Hugging Face transformers (which pairs of channels turn together, and the limit of gpt-oss's SwiGLU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from .model_config import Attention, GqaAttention, Layer, ModelConfig
from .models import ARCHITECTURES, SHIPPED, load_model, model_from_config, shipped_models

SWIGLU_LIMIT = 7.0
"""The one that the expert kernels have, gpt-oss's."""

Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Yarn(msgspec.Struct, frozen=True, kw_only=True):
    """A config's ``rope_scaling`` of type "yarn"."""

    factor: Annotated[float, msgspec.Meta(ge=1, le=1e6)]
    original_max_position_embeddings: Annotated[int, msgspec.Meta(ge=1)]
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: Positive | None = None
    truncate: bool = True

    def _mscale(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0

    @property
    def cosine_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def score_factor(self) -> float:
        """What DeepSeek multiplies scores by."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def ramp(self, index: int, width: int, base: float) -> float:
        """Share of the stretched frequency in that of channel pair ``index`` of ``width`` channels."""

        def place(turns: float) -> float:
            return (
                width * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))
            )

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return min(1.0, max(0.0, (index - low) / ((high - low) or 1e-3)))


@dataclass(frozen=True)
class Numerics:
    """See the module. The defaults are for random weights: a step takes as long with any."""

    rms_eps: float = 1e-6
    rope_theta: float = 1e4
    yarn: Yarn | None = None

    def cos_sin(self, num_positions: int, width: int, device: Any) -> Any:
        """Float32 (num_positions, width): cosines, then sines, of ``width`` channels that turn."""
        import torch

        frequencies = []
        for index in range(width // 2):
            each = self.rope_theta ** (-2 * index / width)
            if self.yarn is not None:
                share = self.yarn.ramp(index, width, self.rope_theta)
                each = each * (1 - share) + each / self.yarn.factor * share
            frequencies.append(each)
        angles = torch.outer(
            torch.arange(num_positions, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64)
        )
        factor = 1.0 if self.yarn is None else self.yarn.cosine_factor
        return (torch.cat((angles.cos(), angles.sin()), dim=1) * factor).float().to(device)

    def score_scale(self, attention: Attention) -> float:
        """What q . k is multiplied by."""
        if isinstance(attention, GqaAttention):
            return attention.head_dim**-0.5
        return (attention.nope_dim + attention.rope_dim) ** -0.5 * (self.yarn.score_factor if self.yarn else 1.0)


class _Config(msgspec.Struct):
    rms_norm_eps: Positive
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    swiglu_limit: float | None = None


def read_numerics(text: str | bytes) -> Numerics:
    """Of the text of a ``config.json``: rotations are its ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``.

    Raises:
        ValueError: a missing or absurd field, or a rotation or SwiGLU limit that is not known here.
    """
    try:
        raw = msgspec.json.decode(text, type=_Config)
        rope = dict(raw.rope_parameters or raw.rope_scaling or {})
        theta = rope.pop("rope_theta", raw.rope_theta)
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        yarn = msgspec.convert(rope, Yarn) if kind == "yarn" else None
    except msgspec.MsgspecError as error:
        raise ValueError(f"config: {error}") from None
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_scaling: expected none, default or yarn; got {kind!r}")
    if not isinstance(theta, int | float) or not theta > 1:
        raise ValueError(f"rope_theta: expected a number above 1; got {theta!r}")
    if raw.swiglu_limit not in (None, SWIGLU_LIMIT):
        raise ValueError(f"swiglu_limit: expected {SWIGLU_LIMIT} or none; got {raw.swiglu_limit}")
    return Numerics(float(raw.rms_norm_eps), float(theta), yarn)


@dataclass(frozen=True)
class StepModel:
    """A model whose layers stand in their order, which a ``ModelConfig`` only counts."""

    config: ModelConfig
    layers: tuple[Layer, ...]
    numerics: Numerics


def read_step_model(text: str | bytes, name: str) -> StepModel:
    """From the text of a ``config.json``.

    Raises:
        ValueError: as ``models.model_from_config`` and ``read_numerics``.
    """
    config = model_from_config(text, name)
    raw: Any = msgspec.json.decode(text, type=ARCHITECTURES[config.architecture])
    raw = raw.text() if hasattr(raw, "text") else raw
    return StepModel(config, tuple(raw.layers()), read_numerics(text))


def load_step_model(name: str) -> StepModel:
    """A shipped model by name, or any ``config.json`` by path (the file or its folder), as ``models.load_model``.

    Raises:
        ValueError: as ``load_model`` and ``read_step_model``.
    """
    config = load_model(name)
    path = SHIPPED / f"{name.lower()}.json" if name.lower() in shipped_models() else Path(name)
    return read_step_model((path / "config.json" if path.is_dir() else path).read_bytes(), config.name)


def step_model_of(model: ModelConfig) -> StepModel:
    """Of a ``ModelConfig``: a shipped one's own; of another, whose layers are all alike, with ``Numerics()``.

    Raises:
        ValueError: a model of several kinds of layers that is not shipped, so that their order is not known.
    """
    if model.name in shipped_models() and load_model(model.name) == model:
        return load_step_model(model.name)
    if len(model.layers) > 1:
        raise ValueError(
            f"model: expected a shipped model, or a StepModel; got {model.name}, whose layers have no order"
        )
    layer, count = next(iter(model.layers))
    return StepModel(model, (layer,) * count, Numerics())
