"""The ops of a decode step: one launch each over buffers that are there, with what it reads, writes and must move.

An op's inputs and outputs are its own for good; its weights are passed to ``run``, so that it can be timed over a
ring of them. What it keeps beside (workspaces, the cache that an append writes) is neither. ``runs_on`` says whose
code it is. Bytes of work: each weight, input and output once; a cache's read tokens; the experts that some token
chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kernels.append_points import append_work
from ..kernels.attention_plan import AttentionPlan, Parts, plan_attention
from ..kernels.attention_points import attention_work
from ..kernels.block_scaled_matmul import block_scaled_matmul
from ..kernels.codec import QuantizedTensor
from ..kernels.formats import get_format, matrix_rate
from ..kernels.fp8_matmul import fp8_matmul
from ..kernels.fused_quantize import rms_norm_quantize, swiglu_quantize
from ..kernels.kv_append import append_kv
from ..kernels.kv_cache import KvCache, MlaCache
from ..kernels.mla_append import append_mla
from ..kernels.mla_attention import mla_attention
from ..kernels.mla_points import mla_work
from ..kernels.moe_layer import MoeLayer, MoeWorkspace, moe_layer
from ..kernels.moe_weights import GroupedWeight
from ..kernels.paged_attention import paged_attention
from ..kernels.quantize import quantize_activation
from ..kernels.registry import Work
from ..kernels.tiles import Tile
from .step_weights import NVFP4_ACTIVATION_SCALE

Buffers = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class StepOp:
    """One launch of a step.

    Attributes:
        name: its place, as in the decode plan where that has it. layer: None outside of layers.
        runs_on: "tokenfab: ..." or "torch: ...", the function.
        run: ``run(weights)`` enqueues it, reading ``inputs`` and writing all of ``outputs``.
        work: of one call; of experts, by the routing of the last one, so it is asked right after it.
        rate: at which its flops run, one of ``formats.MATRIX_RATES``.
    """

    name: str
    layer: int | None
    runs_on: str
    weights: Buffers
    inputs: Buffers
    outputs: Buffers
    run: Callable[[Buffers], None]
    work: Callable[[], Work]
    rate: str = "bf16"


@dataclass(frozen=True)
class Place:
    """Where an op stands."""

    name: str
    layer: int | None = None

    def op(
        self, runs_on: str, weights: Buffers, inputs: Buffers, outputs: Buffers, run: Callable[[Buffers], None], *,
        flops: float = 0.0, rate: str = "bf16", work: Callable[[], Work] | None = None,
    ) -> StepOp:  # fmt: skip
        moved = Work(_nbytes(weights), _nbytes(inputs) + _nbytes(outputs), flops)
        return StepOp(self.name, self.layer, runs_on, weights, inputs, outputs, run, work or (lambda: moved), rate)


def _nbytes(buffers: Buffers) -> int:
    return sum(part.numel() * part.element_size() for part in buffers.values())


def pieces(stored: QuantizedTensor) -> Buffers:
    """What is there of an operand, by name."""
    parts = {"data": stored.data, "scale": stored.scale, "global_scale": stored.global_scale}
    return {name: part for name, part in parts.items() if part is not None}


def written(stored: QuantizedTensor) -> Buffers:
    """What a quantizer with a given global scale writes."""
    return {name: part for name, part in pieces(stored).items() if name != "global_scale"}


# -- linear layers ---------------------------------------------------------------------------------


def torch_linear(place: Place, weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor,
                 bias: torch.Tensor | None = None) -> StepOp:  # fmt: skip
    """y = x . w^T [+ bias] in BF16."""
    weights = {"data": weight} | ({} if bias is None else {"bias": bias})

    def run(w: Buffers) -> None:
        if "bias" in w:
            torch.addmm(w["bias"], x, w["data"].t(), out=out)
        else:
            torch.mm(x, w["data"].t(), out=out)

    name = "torch: mm" if bias is None else "torch: addmm"
    return place.op(name, weights, {"x": x}, {"y": out}, run, flops=2.0 * x.numel() * weight.shape[0])


def linear(
    place: Place, weight: QuantizedTensor, x: QuantizedTensor, out: torch.Tensor, workspace: torch.Tensor, *,
    bias: torch.Tensor | None = None, unbiased: torch.Tensor | None = None,
) -> list[StepOp]:  # fmt: skip
    """A linear layer in its format; where its kernel adds no bias, another op does, from ``unbiased``."""
    if weight.format.name == "bf16":
        return [torch_linear(place, weight.data, x.data, out, bias)]
    y = out if bias is None else unbiased
    assert y is not None
    weights = written(weight)
    flops, rate = 2.0 * x.shape[0] * x.shape[1] * weight.shape[0], matrix_rate(weight.format, x.format)
    if weight.format.name == "nvfp4":
        assert weight.global_scale is not None
        weights["factor"] = weight.global_scale * NVFP4_ACTIVATION_SCALE
    x_scale = x.scale
    assert x_scale is not None

    def run(w: Buffers) -> None:
        if weight.format.name == "fp8_block":
            fp8_matmul(x.data, w["data"], x_scale, w["scale"], "block", workspace=workspace, out=y)
        else:
            block_scaled_matmul(
                x.data, w["data"], x_scale, w["scale"], "nvfp4", global_scale=w["factor"], workspace=workspace, out=y
            )

    name = "fp8_matmul" if weight.format.name == "fp8_block" else "block_scaled_matmul"
    ops = [place.op(f"tokenfab: {name}", weights, written(x), {"y": y}, run, flops=flops, rate=rate)]
    if bias is not None:

        def add(w: Buffers) -> None:
            torch.add(y, w["bias"], out=out)

        after = Place(f"{place.name}_bias", place.layer)
        ops.append(after.op("torch: add", {"bias": bias}, {"x": y}, {"y": out}, add))
    return ops


# -- norms and quantizers --------------------------------------------------------------------------


def norm(
    place: Place, x: torch.Tensor, weight: torch.Tensor, eps: float, out: QuantizedTensor,
    residuals: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> StepOp:  # fmt: skip
    """RMSNorm of x, or of x + residuals[0], which goes to residuals[1]."""
    before, after = residuals or (None, None)

    def run(w: Buffers) -> None:
        rms_norm_quantize(
            x, w["weight"], eps, out.format, residual=before, residual_out=after, global_scale=out.global_scale, out=out
        )

    inputs = {"x": x} | ({} if before is None else {"residual": before})
    outputs = written(out) | ({} if after is None else {"residual": after})
    return place.op("tokenfab: rms_norm_quantize", {"weight": weight}, inputs, outputs, run)


def to_format(place: Place, x: torch.Tensor, out: QuantizedTensor) -> StepOp:
    """x in out's format."""

    def run(_: Buffers) -> None:
        quantize_activation(x, out.format, global_scale=out.global_scale, out=out)

    return place.op("tokenfab: quantize_activation", {}, {"x": x}, written(out), run)


def swiglu(place: Place, gate_up: torch.Tensor, out: QuantizedTensor) -> StepOp:
    """silu(gate) * up in out's format."""

    def run(_: Buffers) -> None:
        swiglu_quantize(gate_up, out.format, global_scale=out.global_scale, out=out)

    return place.op("tokenfab: swiglu_quantize", {}, {"x": gate_up}, written(out), run)


# -- attention -------------------------------------------------------------------------------------


def attention_plan(place: Place, lengths: torch.Tensor, plan: AttentionPlan) -> StepOp:
    """The plan for the lengths that now stand in ``lengths``."""

    def run(_: Buffers) -> None:
        plan_attention(lengths, plan.num_programs, plan.block_n, q_len=plan.q_len, window=plan.window, out=plan.table)

    return place.op("tokenfab: plan_attention", {}, {"lengths": lengths}, {"plan": plan.table}, run)


def rope_append(
    place: Place, qkv: torch.Tensor, cache: KvCache, tokens: Buffers, cos_sin: torch.Tensor, eps: float,
    q: torch.Tensor, norms: Buffers,
) -> StepOp:  # fmt: skip
    """``append_kv``; tokens: positions and slots; norms: q_norm and k_norm, or none."""
    rows, heads = q.shape[:2]

    def run(w: Buffers) -> None:
        append_kv(
            qkv, tokens["positions"], w["cos_sin"], cache, tokens["slots"], heads, q_norm=w.get("q_norm"),
            k_norm=w.get("k_norm"), eps=eps, q_out=q,
        )  # fmt: skip

    shape = {"num_tokens": rows, "num_heads": heads, "num_kv_heads": cache.num_kv_heads,
             "head_dim": cache.layout.head_dim, "page_size": cache.layout.page_size}  # fmt: skip
    weights, inputs, outputs = {"cos_sin": cos_sin} | norms, {"qkv": qkv} | tokens, {"q": q}
    work = _held(append_work("rope_append", cache.layout.format)(shape), weights, inputs, outputs)
    return place.op("tokenfab: append_kv", weights, inputs, outputs, run, work=work)


def mla_append(
    place: Place, latent: torch.Tensor, rope: torch.Tensor, q_rope: torch.Tensor, cache: MlaCache, tokens: Buffers,
    cos_sin: torch.Tensor, eps: float, q_out: torch.Tensor, weight: torch.Tensor,
) -> StepOp:  # fmt: skip
    """``append_mla``, with the norm of the latent."""
    rows, heads = q_out.shape[:2]

    def run(w: Buffers) -> None:
        append_mla(
            latent, rope, tokens["positions"], w["cos_sin"], cache, tokens["slots"], q_rope=q_rope, q_out=q_out,
            norm=w["norm"], eps=eps,
        )  # fmt: skip

    layout = cache.layout
    shape = {"num_tokens": rows, "num_heads": heads, "kv_lora_rank": layout.kv_lora_rank, "rope_dim": layout.rope_dim,
             "page_size": layout.page_size}  # fmt: skip
    weights, outputs = {"cos_sin": cos_sin, "norm": weight}, {"q": q_out}
    inputs = {"latent": latent, "rope": rope, "q_rope": q_rope} | tokens
    work = _held(append_work("mla_append", layout.format)(shape), weights, inputs, outputs)
    return place.op("tokenfab: append_mla", weights, inputs, outputs, run, work=work)


def _held(work: Work, weights: Buffers, inputs: Buffers, outputs: Buffers) -> Callable[[], Work]:
    """No more than the buffers hold: the cache that an append writes is none of them."""
    moved = min(work.activation_bytes, _nbytes(inputs) + _nbytes(outputs))
    bounded = Work(min(work.weight_bytes, _nbytes(weights)), moved, work.flops)
    return lambda: bounded


@dataclass(frozen=True, eq=False)
class Attending:
    """What the attention of all layers with one window shares."""

    tile: Tile
    plan: AttentionPlan
    parts: Parts
    page_table: torch.Tensor
    lengths: torch.Tensor
    length: int
    """Tokens that a sequence holds, the new one among them, for the count of bytes."""


def _cached(cache: KvCache | MlaCache, shared: Attending) -> Buffers:
    return {"pages": cache.pages, "factors": cache.factors, "page_table": shared.page_table}


def gqa_attention(
    place: Place, q: torch.Tensor, cache: KvCache, shared: Attending, sinks: torch.Tensor | None, out: torch.Tensor,
    lse: torch.Tensor,
) -> StepOp:  # fmt: skip
    """``paged_attention``, q_len 1."""
    layout, window = cache.layout, shared.plan.window

    def run(w: Buffers) -> None:
        paged_attention(
            q, KvCache(layout, w["pages"], w["factors"]), w["page_table"], shared.lengths, window=window,
            sinks=w.get("sinks"), plan=shared.plan, tile=shared.tile, parts=shared.parts, out=out, lse=lse,
        )  # fmt: skip

    shape = {"batch": q.shape[0], "length": shared.length, "num_heads": q.shape[1], "num_kv_heads": cache.num_kv_heads,
             "head_dim": layout.head_dim, "window": window or 0, "q_len": 1, "page_size": layout.page_size}  # fmt: skip
    work = attention_work(layout.format)(shape)
    weights = _cached(cache, shared) | ({} if sinks is None else {"sinks": sinks})
    inputs, rate = {"q": q, "plan": shared.plan.table}, get_format(layout.format).matrix_rate
    return place.op(
        "tokenfab: paged_attention", weights, inputs, {"o": out, "lse": lse}, run, rate=rate, work=lambda: work
    )


def latent_attention(
    place: Place,
    q: torch.Tensor,
    cache: MlaCache,
    shared: Attending,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> StepOp:
    """``mla_attention``, q_len 1."""
    layout = cache.layout

    def run(w: Buffers) -> None:
        mla_attention(
            q, MlaCache(layout, w["pages"], w["factors"]), w["page_table"], shared.lengths, scale=scale,
            plan=shared.plan, tile=shared.tile, parts=shared.parts, out=out, lse=lse,
        )  # fmt: skip

    shape = {"batch": q.shape[0], "length": shared.length, "num_heads": q.shape[1], "kv_lora_rank": layout.kv_lora_rank,
             "rope_dim": layout.rope_dim, "q_len": 1, "page_size": layout.page_size}  # fmt: skip
    work = mla_work(layout.format)(shape)
    inputs, rate = {"q": q, "plan": shared.plan.table}, get_format(layout.format).matrix_rate
    return place.op("tokenfab: mla_attention", _cached(cache, shared), inputs, {"o": out, "lse": lse}, run, rate=rate,
                    work=lambda: work)  # fmt: skip


def per_head(place: Place, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, is_transposed: bool) -> StepOp:
    """A matmul per head: x (B, H, K), weight (H, K, N), or (H, N, K) if transposed, out (B, H, N); views will do."""
    left, target = x.transpose(0, 1), out.transpose(0, 1)

    def run(w: Buffers) -> None:
        torch.bmm(left, w["data"].transpose(1, 2) if is_transposed else w["data"], out=target)

    flops = 2.0 * x.shape[0] * weight.numel()
    return place.op("torch: bmm", {"data": weight}, {"x": x}, {"y": out}, run, flops=flops)


# -- experts ---------------------------------------------------------------------------------------

_PARTS = ("gate_up", "down", "shared_gate_up", "shared_down")


def flat(layer: MoeLayer) -> Buffers:
    made = {} if layer.bias is None else {"correction_bias": layer.bias}
    for name in _PARTS:
        weight: GroupedWeight | None = getattr(layer, name)
        if weight is not None:
            made |= {f"{name}.{part}": tensor for part, tensor in weight.parts.items()}
            made |= {} if weight.bias is None else {f"{name}.bias": weight.bias}
    return made


def bound(layer: MoeLayer, weights: Buffers) -> MoeLayer:
    """The layer with these tensors in place of its own; parts of which there are none here stay."""
    changed: dict[str, Any] = {"bias": weights.get("correction_bias", layer.bias)}
    for name in _PARTS:
        weight: GroupedWeight | None = getattr(layer, name)
        if weight is not None and any(key.startswith(f"{name}.") for key in weights):
            parts = {part: weights[f"{name}.{part}"] for part in weight.parts}
            changed[name] = replace(weight, parts=parts, bias=weights.get(f"{name}.bias"))
    return replace(layer, **changed)


def experts(
    place: Place, layer: MoeLayer, x: torch.Tensor, logits: torch.Tensor, workspace: MoeWorkspace, out: torch.Tensor
) -> StepOp:
    """``moe_layer``: routing, experts, shared expert, combine."""

    def run(w: Buffers) -> None:
        moe_layer(x, logits, bound(layer, w), workspace=workspace, out=out)

    def values(upper: GroupedWeight) -> float:
        return 3.0 * upper.num_channels * upper.num_columns

    def work() -> Work:
        local = workspace.ids - layer.first_expert
        local = local[(local >= 0) & (local < layer.gate_up.num_experts)]
        touched, rows = int(local.unique().numel()), local.numel()
        weight_bytes = touched * values(layer.gate_up) * layer.gate_up.row.bits_per_value / 8
        flops = 2.0 * rows * values(layer.gate_up)
        if layer.shared_gate_up is not None:
            weight_bytes += values(layer.shared_gate_up) * layer.shared_gate_up.row.bits_per_value / 8
            flops += 2.0 * x.shape[0] * values(layer.shared_gate_up)
        return Work(int(weight_bytes), _nbytes({"x": x, "logits": logits, "y": out}), flops)

    rate = matrix_rate(layer.gate_up.row, get_format(layer.x_format))
    inputs = {"x": x, "logits": logits}
    return place.op("tokenfab: moe_layer", flat(layer), inputs, {"y": out}, run, rate=rate, work=work)


# -- ends ------------------------------------------------------------------------------------------


def embedding(place: Place, table: torch.Tensor, token_ids: torch.Tensor, out: torch.Tensor) -> StepOp:
    """Rows of the table."""

    def run(w: Buffers) -> None:
        torch.index_select(w["data"], 0, token_ids, out=out)

    read = Work(_nbytes({"y": out}), _nbytes({"x": token_ids, "y": out}), 0.0)
    return place.op(
        "torch: index_select", {"data": table}, {"token_ids": token_ids}, {"y": out}, run, work=lambda: read
    )


def sampling(place: Place, logits: torch.Tensor, out: torch.Tensor) -> StepOp:
    """The likeliest token."""

    def run(_: Buffers) -> None:
        torch.argmax(logits, dim=-1, out=out)

    return place.op("torch: argmax", {}, {"logits": logits}, {"token": out}, run)
