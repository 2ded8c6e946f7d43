"""Router logits to the experts of each token and their weights, in one launch.

Math:    ``routing_rule``: ids[t, :] = the top_k experts of token t, weights[t, :] = their scores.
Shapes:  logits (T, E) BF16 or FP32; bias (E,) FP32; ids (T, k) int32; weights (T, k) FP32.
         A token's slots stand in descending order of choice, ties in ascending order of expert.
Layout:  rows of logits, ids and weights of any stride, last axes contiguous.
Bytes:   T E (size of a logit) + 8 T k.
Accuracy: choice by softmax is exact: it compares logits. Choice by sigmoid compares float32 scores, each
         off by at most 2^-21 (1 + |logit| / 4) relative, and 2^-24 (score + |bias|) by the addition: experts
         closer than that may swap. Weights are off by at most 2^-17 relative, for logits within 16 of the
         chosen ones' largest (softmax) or of 0 (sigmoid).
Edges:   T may be 0. A NaN choice counts as the largest of all, and a group that holds one of its two as
         the best, as ``torch.topk`` has it; the weights are what the formulas give, NaN of a NaN logit.
         Whatever the logits and the bias hold, the ids of a token are distinct and in 0..E-1. -0 equals 0.
Errors:  ``ValueError`` before any launch, naming argument, expected, got.
Source:  iterated argmax over registers, one warp per token, as vLLM's topk_softmax (from TensorRT-LLM); order
         keys of floats and ties to the smaller index as in triton_kernels' top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require, seen
from .routing_rule import SUM_FLOOR, Routing

LOWEST = tl.constexpr(-(2**31))
"""Key of what cannot be chosen: padding, dropped groups, experts already taken. Below the key of -inf."""

HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _order_key(x):
    """int32 that orders as float32 does: -inf < finite < inf < NaN, -0 = 0; never ``LOWEST``."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, HIGHEST, key)


@triton.jit
def _key_value(key):
    """The float32 of a key; NaN of ``HIGHEST``."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _score(logits, SCORING: tl.constexpr):
    """What the choice compares, before the bias."""
    if SCORING == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logits))
    else:
        return logits


@triton.jit
def _drop_groups(keys, NUM_GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
                 BLOCK_S: tl.constexpr):  # fmt: skip
    """``LOWEST`` outside the best groups of a (BLOCK_G, BLOCK_S) tile of keys."""
    offs_s = tl.arange(0, BLOCK_S)[None, :]
    offs_g = tl.arange(0, BLOCK_G)
    best = tl.max(keys, axis=1)
    first = tl.min(tl.where(keys == best[:, None], offs_s, BLOCK_S), axis=1)
    second = tl.max(tl.where(offs_s == first[:, None], LOWEST, keys), axis=1)
    left = tl.where(offs_g < NUM_GROUPS, _order_key(_key_value(best) + _key_value(second)), LOWEST)
    kept = offs_g < 0
    for _ in tl.static_range(KEPT_GROUPS):
        group = tl.min(tl.where(left == tl.max(left), offs_g, BLOCK_G))
        kept = kept | (offs_g == group)
        left = tl.where(offs_g == group, LOWEST, left)
    return tl.where(kept[:, None], keys, LOWEST)


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, stride_lt, stride_it, stride_wt, scaling_factor,
    NUM_GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, SUM_FLOOR: tl.constexpr,
):  # fmt: skip
    """One token per program of one warp, its choices in registers as (groups, experts of a group)."""
    token = tl.program_id(0).to(tl.int64)
    offs_g, offs_s = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_S)[None, :]
    experts = offs_g * GROUP_SIZE + offs_s
    mask = (offs_g < NUM_GROUPS) & (offs_s < GROUP_SIZE)
    logits = tl.load(logits_ptr + token * stride_lt + experts, mask=mask, other=0.0).to(tl.float32)
    choice = _score(logits, SCORING)
    if HAS_BIAS:
        choice += tl.load(bias_ptr + experts, mask=mask, other=0.0)
    keys = tl.where(mask, _order_key(choice), LOWEST)
    if KEPT_GROUPS < NUM_GROUPS:
        keys = _drop_groups(keys, NUM_GROUPS, KEPT_GROUPS, BLOCK_G, BLOCK_S)
    offs_k = tl.arange(0, BLOCK_K)
    ids = tl.zeros((BLOCK_K,), tl.int32)
    for slot in tl.static_range(TOP_K):
        expert = tl.min(tl.where(keys == tl.max(keys), experts, NUM_GROUPS * GROUP_SIZE - 1))
        ids = tl.where(offs_k == slot, expert, ids)
        keys = tl.where(experts == expert, LOWEST, keys)
    mask_k = offs_k < TOP_K
    chosen = tl.load(logits_ptr + token * stride_lt + ids).to(tl.float32)  # cheaper than carrying each score along
    if SCORING == "sigmoid":
        weights = tl.where(mask_k, _score(chosen, SCORING), 0.0)
        if RENORMALIZE:
            weights = tl.div_rn(weights, tl.sum(weights) + SUM_FLOOR)
    else:
        top = tl.max(tl.where(mask_k, _order_key(chosen), LOWEST))
        weights = tl.where(mask_k, tl.exp(chosen - _key_value(top)), 0.0)
        parts = weights
        if not RENORMALIZE:
            parts = tl.where(mask, tl.exp(logits - _key_value(top)), 0.0)
        weights = tl.div_rn(weights, tl.sum(parts))
    tl.store(ids_ptr + token * stride_it + offs_k, ids, mask=mask_k)
    tl.store(weights_ptr + token * stride_wt + offs_k, weights * scaling_factor, mask=mask_k)


def route(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None, *,
    ids: torch.Tensor | None = None, weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The experts of each token, (T, k) int32, and their weights, (T, k) float32.

    Args:
        logits: (T, E) bfloat16 or float32.
        bias: (E,) float32, with ``routing.has_bias`` only.
        ids, weights: where the results go; allocated if None.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing is launched.
    """
    experts, top_k = routing.num_experts, routing.top_k
    fits = logits.dim() == 2 and logits.dtype in (torch.bfloat16, torch.float32) and logits.shape[1] == experts
    require(fits, "logits", f"bfloat16 or float32 (T, {experts})", seen(logits))
    require(experts == 1 or logits.stride(1) == 1, "logits", "a contiguous last axis", f"stride {logits.stride()}")
    if bias is None:
        require(not routing.has_bias, "bias", f"float32 ({experts},)", None)
    else:
        require(routing.has_bias, "bias", "None: the rule has no bias", seen(bias))
        fits = bias.dtype == torch.float32 and tuple(bias.shape) == (experts,)
        require(fits, "bias", f"float32 ({experts},)", seen(bias))
        require(bias.is_contiguous(), "bias", "contiguous", f"stride {bias.stride()}")
        require(bias.device == logits.device, "bias", f"device {logits.device}", bias.device)
    shape = (logits.shape[0], top_k)
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device) if ids is None else ids
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device) if weights is None else weights
    for name, tensor, dtype in (("ids", ids, torch.int32), ("weights", weights, torch.float32)):
        require(tuple(tensor.shape) == shape and tensor.dtype == dtype, name, f"{dtype} {shape}", seen(tensor))
        require(top_k == 1 or tensor.stride(1) == 1, name, "a contiguous last axis", f"stride {tensor.stride()}")
        require(tensor.device == logits.device, name, f"device {logits.device}", tensor.device)
    if shape[0] == 0:
        return ids, weights
    _route_kernel[(shape[0],)](
        logits, bias, ids, weights, logits.stride(0), ids.stride(0), weights.stride(0),
        float(routing.scaling_factor),
        NUM_GROUPS=routing.num_groups, KEPT_GROUPS=routing.kept_groups, GROUP_SIZE=routing.group_size, TOP_K=top_k,
        BLOCK_G=triton.next_power_of_2(routing.num_groups), BLOCK_S=triton.next_power_of_2(routing.group_size),
        BLOCK_K=triton.next_power_of_2(top_k), SCORING=routing.scoring, RENORMALIZE=routing.renormalize,
        HAS_BIAS=routing.has_bias, SUM_FLOOR=SUM_FLOOR, num_warps=1,
    )  # fmt: skip
    return ids, weights
