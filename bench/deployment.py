"""A deployment: how many GPUs, how they split the model, in which precision, at which load."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.formats import get_format, matrix_rate
from .gpus import GIB, Gpu
from .model_config import DenseFfn, GqaAttention, ModelConfig

DEFAULT_RESERVE_BYTES = 4 * GIB
"""Activations, workspaces, CUDA graphs and NCCL; public estimators use 3.5 to 4.5 GiB."""

EXCHANGES = ("all_to_all", "all_gather")
"""How tokens reach the experts' ranks when attention is data parallel."""

LOADS = ("balanced", "power_law_1.01", "power_law_1.2")
"""Expert load distributions of the published MoE tables."""


@dataclass(frozen=True)
class Precision:
    """Formats by role. Router, norms, embedding and LM head stay BF16, as published checkpoints keep them.

    Attributes:
        linear, linear_activation: attention projections, dense and shared FFNs.
        experts, experts_activation: routed experts.
        kv: the KV cache. dispatch: the payload of the expert all-to-all (combine is BF16).
    """

    name: str
    linear: str
    linear_activation: str
    experts: str
    experts_activation: str
    kv: str
    dispatch: str
    title: str


PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision("bf16", "bf16", "bf16", "bf16", "bf16", "bf16", "bf16", "all BF16"),
        Precision(
            "fp8",
            "fp8_block",
            "fp8_group",
            "fp8_block",
            "fp8_group",
            "fp8",
            "fp8_group",
            "FP8 blocks (DeepSeek recipe), FP8 KV",
        ),
        Precision("fp8_tensor", "fp8", "fp8", "fp8", "fp8", "fp8", "fp8", "FP8 per tensor, FP8 KV"),
        Precision(
            "mxfp4",
            "bf16",
            "bf16",
            "mxfp4",
            "bf16",
            "bf16",
            "bf16",
            "MXFP4 experts x BF16 activations, the rest BF16 (gpt-oss)",
        ),
        Precision(
            "mxfp4_mxfp8",
            "bf16",
            "bf16",
            "mxfp4",
            "mxfp8",
            "fp8",
            "mxfp8",
            "MXFP4 experts x MXFP8 activations, the rest BF16, FP8 KV",
        ),
        Precision("nvfp4", "nvfp4", "nvfp4", "nvfp4", "nvfp4", "fp8", "nvfp4", "NVFP4 x NVFP4, FP8 KV"),
    )
}


def get_precision(name: str) -> Precision:
    """The precision called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}; got {name!r}") from None


@dataclass(frozen=True)
class Deployment:
    """One way to serve a model.

    Attributes:
        gpus: GPUs of one replica = attention_tp x attention_dp = expert_parallel x expert_tp.
        attention_tp: ways attention heads are split; each such group serves its own sequences.
        expert_parallel: ways the experts are spread; the rest of the GPUs split each expert.
        batch_per_gpu: sequences per GPU; an attention group holds batch_per_gpu x attention_tp.
        context: cached tokens per sequence.
        tokens_per_step: new tokens per sequence in one step (1 + drafts when verifying).
        kept_tokens_per_step: how many of them are kept on average (the acceptance length).
        load: expert load, one of ``LOADS``.
        exchange: "all_to_all" sends each token to its experts' ranks and back; "all_gather" gives
            every rank all tokens and reduce-scatters the results.
    """

    gpus: int
    attention_tp: int
    expert_parallel: int
    precision: Precision
    batch_per_gpu: float
    context: int
    tokens_per_step: int = 1
    kept_tokens_per_step: float = 1.0
    reserve_bytes: int = DEFAULT_RESERVE_BYTES
    load: str = "balanced"
    exchange: str = "all_to_all"

    def __post_init__(self) -> None:
        for field in ("gpus", "attention_tp", "expert_parallel", "context", "tokens_per_step"):
            value = getattr(self, field)
            _require(value == int(value), field, "a whole number", value)
            _require(value >= 1, field, "at least 1", value)
        _require(
            self.gpus % self.attention_tp == 0, "attention_tp", f"a divisor of {self.gpus} GPUs", self.attention_tp
        )
        _require(
            self.gpus % self.expert_parallel == 0,
            "expert_parallel",
            f"a divisor of {self.gpus} GPUs",
            self.expert_parallel,
        )
        _require(0 < self.batch_per_gpu < 2**31, "batch_per_gpu", "more than 0", self.batch_per_gpu)
        sequences = self.batch_per_gpu * self.attention_tp
        _require(
            round(sequences) >= 1 and abs(sequences - round(sequences)) < 1e-6,
            "batch_per_gpu",
            f"a whole number of sequences per attention group of {self.attention_tp} GPUs",
            self.batch_per_gpu,
        )
        _require(
            1 <= self.kept_tokens_per_step <= self.tokens_per_step,
            "kept_tokens_per_step",
            f"between 1 and tokens_per_step = {self.tokens_per_step}",
            self.kept_tokens_per_step,
        )
        _require(self.reserve_bytes >= 0, "reserve_bytes", "0 or more", self.reserve_bytes)
        _require(self.load in LOADS, "load", f"one of {', '.join(LOADS)}", self.load)
        _require(self.exchange in EXCHANGES, "exchange", f"one of {', '.join(EXCHANGES)}", self.exchange)

    @property
    def attention_dp(self) -> int:
        """Attention groups that serve different sequences."""
        return self.gpus // self.attention_tp

    @property
    def expert_tp(self) -> int:
        """Ways each expert is split."""
        return self.gpus // self.expert_parallel

    @property
    def dispatches(self) -> bool:
        """Whether tokens travel to the experts by all-to-all: several attention groups, whole experts."""
        return self.attention_dp > 1 and self.expert_tp == 1 and self.exchange == "all_to_all"

    @property
    def sequences(self) -> int:
        """Sequences of one attention group."""
        return round(self.batch_per_gpu * self.attention_tp)

    @property
    def rows(self) -> int:
        """Rows of a GEMM on one GPU."""
        return self.sequences * self.tokens_per_step

    def describe(self) -> str:
        parts = [f"{self.gpus} GPU" + ("s" if self.gpus > 1 else "")]
        if self.attention_tp > 1:
            parts.append(f"attention TP{self.attention_tp}")
        if self.attention_dp > 1:
            parts.append(f"attention DP{self.attention_dp}")
        if self.expert_parallel > 1:
            parts.append(f"EP{self.expert_parallel}")
        if self.expert_tp > 1:
            parts.append(f"expert TP{self.expert_tp}")
        if self.attention_dp > 1 and self.expert_tp == 1:
            parts.append(self.exchange.replace("_", "-"))
        return ", ".join(parts)


def check_divides(model: ModelConfig, deployment: Deployment) -> None:
    """Refuse a split that the model's heads, experts or widths do not allow.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    tp = deployment.attention_tp
    _require(
        deployment.context <= model.max_context,
        "context",
        f"at most {model.name}'s {model.max_context} tokens",
        deployment.context,
    )
    _require(model.vocab_size % tp == 0, "attention_tp", f"a divisor of the vocabulary of {model.vocab_size}", tp)
    for layer, _ in model.layers:
        attention, ffn = layer.attention, layer.ffn
        _divides(attention.num_heads, tp, "attention_tp", f"{model.name}'s {attention.num_heads} heads")
        if isinstance(attention, GqaAttention):
            kv_heads = attention.num_kv_heads
            _require(
                kv_heads % tp == 0 or tp % kv_heads == 0,
                "attention_tp",
                f"a divisor or a multiple of {model.name}'s {kv_heads} KV heads",
                tp,
            )
        if isinstance(ffn, DenseFfn):
            _divides(ffn.intermediate_size, tp, "attention_tp", f"the dense width {ffn.intermediate_size}")
            continue
        experts, shared = ffn.num_experts, ffn.shared_intermediate_size
        _divides(experts, deployment.expert_parallel, "expert_parallel", f"{model.name}'s {experts} experts")
        inter = ffn.intermediate_size
        _divides(inter, deployment.expert_tp, "gpus / expert_parallel", f"the expert width {inter}")
        _divides(shared, tp, "attention_tp", f"the shared experts' width {shared}")


def _divides(whole: int, parts: int, field: str, what: str) -> None:
    _require(whole % parts == 0, field, f"a divisor of {what}", parts)


def check_precision(gpu: Gpu, precision: Precision) -> None:
    """Refuse a precision whose products the GPU's matrix units cannot take.

    Raises:
        ValueError: naming the precision and the missing unit.
    """
    for weight, activation in (
        (precision.linear, precision.linear_activation),
        (precision.experts, precision.experts_activation),
    ):
        rate = matrix_rate(get_format(weight), get_format(activation))
        if getattr(gpu, f"{rate}_flops_per_s") is None:
            raise ValueError(
                f"precision: {precision.name} is {weight} x {activation}; {gpu.name} has no {rate.upper()} matrix units"
            )


def _require(condition: bool, field: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{field}: expected {expected}; got {got}")
