"""Tiny checkpoints under their Hugging Face names, and the models themselves in plain torch: whole sequences, no cache.

Written from the modelling code of transformers, float32, without anything of the package: what a step must reproduce.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

HIDDEN, VOCAB, HEADS, KV_HEADS, EXPERTS, TOP_K, INTER = 128, 64, 4, 2, 4, 2, 64
Tensors = dict[str, torch.Tensor]

_COMMON = {
    "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "num_experts_per_tok": TOP_K, "max_position_embeddings": 256,
}  # fmt: skip
QWEN = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 64, "intermediate_size": 128, "num_experts": EXPERTS,
    "moe_intermediate_size": INTER, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
GPT_OSS = _COMMON | {
    "architectures": ["GptOssForCausalLM"], "head_dim": 64, "intermediate_size": INTER, "num_local_experts": EXPERTS,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3, "rms_norm_eps": 1e-5,
    "rope_theta": 150.0, "swiglu_limit": 7.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0,
                     "original_max_position_embeddings": 64, "truncate": False},
}  # fmt: skip
DEEPSEEK = _COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "intermediate_size": 128, "moe_intermediate_size": INTER,
    "num_key_value_heads": HEADS, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "q_lora_rank": 64, "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "rms_norm_eps": 1e-6, "rope_theta": 100.0,
    "rope_scaling": {"type": "yarn", "factor": 8.0, "beta_fast": 8, "beta_slow": 1, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 32},
}  # fmt: skip


def make_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """BF16 tensors of a config, of about the sizes that trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    made: Tensors = {}

    def add(name: str, *shape: int, size: float | None = None) -> None:
        values = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "layernorm.weight")):
            values = 1 + 0.25 * values
        else:
            values = values * (shape[-1] ** -0.5 if size is None else size)
        made[name] = values.to(torch.bfloat16)

    kind = config["architectures"][0]
    add("model.embed_tokens.weight", VOCAB, HIDDEN, size=1.0)
    add("model.norm.weight", HIDDEN)
    add("lm_head.weight", VOCAB, HIDDEN)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        add(f"{prefix}.input_layernorm.weight", HIDDEN)
        add(f"{prefix}.post_attention_layernorm.weight", HIDDEN)
        if kind == "DeepseekV3ForCausalLM":
            rank, rope, nope, v = (
                config[n] for n in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
            )
            add(f"{attention}.q_a_proj.weight", config["q_lora_rank"], HIDDEN)
            add(f"{attention}.q_a_layernorm.weight", config["q_lora_rank"])
            add(f"{attention}.q_b_proj.weight", HEADS * (nope + rope), config["q_lora_rank"])
            add(f"{attention}.kv_a_proj_with_mqa.weight", rank + rope, HIDDEN)
            add(f"{attention}.kv_a_layernorm.weight", rank)
            add(f"{attention}.kv_b_proj.weight", HEADS * (nope + v), rank)
            add(f"{attention}.o_proj.weight", HIDDEN, HEADS * v)
            if index < config["first_k_dense_replace"]:
                _add_gated(add, mlp, config["intermediate_size"])
                continue
            add(f"{mlp}.gate.weight", 8, HIDDEN)
            add(f"{mlp}.gate.e_score_correction_bias", 8, size=0.1)
            made[f"{mlp}.gate.e_score_correction_bias"] = made[f"{mlp}.gate.e_score_correction_bias"].float()
            _add_gated(add, f"{mlp}.shared_experts", INTER)
            for expert in range(8):
                _add_gated(add, f"{mlp}.experts.{expert}", INTER)
            continue
        for name, heads in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True):
            add(f"{attention}.{name}_proj.weight", heads * 64, HIDDEN)
            if kind == "GptOssForCausalLM":
                add(f"{attention}.{name}_proj.bias", heads * 64, size=0.2)
        add(f"{attention}.o_proj.weight", HIDDEN, HEADS * 64)
        if kind == "Qwen3MoeForCausalLM":
            add(f"{attention}.q_norm.weight", 64)
            add(f"{attention}.k_norm.weight", 64)
            add(f"{mlp}.gate.weight", EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                _add_gated(add, f"{mlp}.experts.{expert}", INTER)
            continue
        add(f"{attention}.o_proj.bias", HIDDEN, size=0.2)
        add(f"{attention}.sinks", HEADS, size=1.0)
        add(f"{mlp}.router.weight", EXPERTS, HIDDEN)
        add(f"{mlp}.router.bias", EXPERTS, size=0.2)
        add(f"{mlp}.experts.gate_up_proj", EXPERTS, HIDDEN, 2 * INTER, size=HIDDEN**-0.5)
        add(f"{mlp}.experts.gate_up_proj_bias", EXPERTS, 2 * INTER, size=0.2)
        add(f"{mlp}.experts.down_proj", EXPERTS, INTER, HIDDEN, size=INTER**-0.5)
        add(f"{mlp}.experts.down_proj_bias", EXPERTS, HIDDEN, size=0.2)
    return made


def _add_gated(add: Any, place: str, inter: int) -> None:
    add(f"{place}.gate_proj.weight", inter, HIDDEN)
    add(f"{place}.up_proj.weight", inter, HIDDEN)
    add(f"{place}.down_proj.weight", HIDDEN, inter)


# -- the models ------------------------------------------------------------------------------------


def plain_logits(config: dict[str, Any], tensors: Tensors, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 (B, N, vocab) of whole sequences (B, N), causal."""
    w = {name: part.float() for name, part in tensors.items()}
    kind, eps = config["architectures"][0], config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        h = _norm(x, w[f"{prefix}.input_layernorm.weight"], eps)
        attention = _mla if kind == "DeepseekV3ForCausalLM" else _gqa
        x = x + attention(config, w, f"{prefix}.self_attn", h, index)
        h = _norm(x, w[f"{prefix}.post_attention_layernorm.weight"], eps)
        x = x + _mlp(config, w, f"{prefix}.mlp", h.flatten(0, 1)).view(x.shape)
    return _norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _frequencies(config: dict[str, Any], width: int) -> tuple[torch.Tensor, float]:
    """(inverse frequencies, factor of cosines and sines), as ``modeling_rope_utils`` has them."""
    base, scaling = config["rope_theta"], config.get("rope_scaling")
    powers = base ** (torch.arange(0, width, 2).float() / width)
    if scaling is None:
        return 1.0 / powers, 1.0

    def dimension(turns: float) -> float:
        return (
            width * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))
        )

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    keep = 1 - ((torch.arange(width // 2).float() - low) / (high - low)).clamp(0, 1)
    factor = 1.0 if "mscale" in scaling else 0.1 * math.log(scaling["factor"]) + 1.0
    return 1.0 / (scaling["factor"] * powers) * (1 - keep) + 1.0 / powers * keep, factor


def _rotate(config: dict[str, Any], x: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """(B, N, H, D) at positions 0..N-1."""
    inverse, factor = _frequencies(config, x.shape[-1])
    turned = torch.polar(
        torch.full((x.shape[1], x.shape[3] // 2), factor), torch.outer(torch.arange(x.shape[1]).float(), inverse)
    )
    if is_interleaved:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turned[None, :, None]).flatten(-2)
    pairs = torch.complex(*x.chunk(2, dim=-1)) * turned[None, :, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None,
            sinks: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    """(B, N, H D_v) of (B, N, H, D)."""
    n = q.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    behind = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    visible = (behind >= 0) & (behind < (n if window is None else window))
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, n, 1)), dim=-1)
    p = torch.softmax(scores, dim=-1)[..., :n]
    return torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2)


def _gqa(config: dict[str, Any], w: Tensors, place: str, x: torch.Tensor, index: int) -> torch.Tensor:
    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, w[f"{place}.{name}_proj.weight"], w.get(f"{place}.{name}_proj.bias"))

    q, k, v = (linear(name, x).unflatten(-1, (-1, 64)) for name in "qkv")
    if f"{place}.q_norm.weight" in w:
        q, k = (_norm(h, w[f"{place}.{name}_norm.weight"], config["rms_norm_eps"]) for name, h in (("q", q), ("k", k)))
    q, k = (_rotate(config, h, False) for h in (q, k))
    k, v = (h.repeat_interleave(HEADS // KV_HEADS, dim=2) for h in (k, v))
    slides = config.get("layer_types", ["full_attention"] * 2)[index] == "sliding_attention"
    window = config["sliding_window"] if slides else None
    return linear("o", _attend(q, k, v, 64**-0.5, window, w.get(f"{place}.sinks")))


def _mla(config: dict[str, Any], w: Tensors, place: str, x: torch.Tensor, index: int) -> torch.Tensor:
    """Not absorbed: keys and values of every head are made from the latent."""
    eps, nope, rope = config["rms_norm_eps"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    q = (
        _norm(x @ w[f"{place}.q_a_proj.weight"].T, w[f"{place}.q_a_layernorm.weight"], eps)
        @ w[f"{place}.q_b_proj.weight"].T
    )
    q_plain, q_turned = q.unflatten(-1, (HEADS, -1)).split((nope, rope), dim=-1)
    both = x @ w[f"{place}.kv_a_proj_with_mqa.weight"].T
    latent, k_turned = both.split((config["kv_lora_rank"], rope), dim=-1)
    kv = _norm(latent, w[f"{place}.kv_a_layernorm.weight"], eps) @ w[f"{place}.kv_b_proj.weight"].T
    k_plain, v = kv.unflatten(-1, (HEADS, -1)).split((nope, config["v_head_dim"]), dim=-1)
    q_turned, k_turned = _rotate(config, q_turned, True), _rotate(config, k_turned[:, :, None], True)
    q = torch.cat((q_plain, q_turned), dim=-1)
    k = torch.cat((k_plain, k_turned.expand(-1, -1, HEADS, -1)), dim=-1)
    scaling = config["rope_scaling"]
    scale = (nope + rope) ** -0.5 * (0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1.0) ** 2
    return _attend(q, k, v, scale, None, None) @ w[f"{place}.o_proj.weight"].T


def _mlp(config: dict[str, Any], w: Tensors, place: str, x: torch.Tensor) -> torch.Tensor:
    kind = config["architectures"][0]
    if f"{place}.gate_proj.weight" in w:
        return _gated(w, place, x)
    if kind == "GptOssForCausalLM":
        logits = F.linear(x, w[f"{place}.router.weight"], w[f"{place}.router.bias"])
        top, ids = logits.topk(TOP_K, dim=-1)
        return _mix(x, ids, top.softmax(dim=-1), lambda h, e: _gpt_oss_expert(w, f"{place}.experts", h, e))
    logits = x @ w[f"{place}.gate.weight"].T
    if kind == "Qwen3MoeForCausalLM":
        top, ids = logits.softmax(dim=-1).topk(TOP_K, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        return _mix(x, ids, top, lambda h, e: _gated(w, f"{place}.experts.{e}", h))
    scores = logits.sigmoid()
    choice = scores + w[f"{place}.gate.e_score_correction_bias"]
    groups = choice.unflatten(-1, (config["n_group"], -1)).topk(2, dim=-1)[0].sum(-1)
    kept = torch.zeros_like(groups).scatter(1, groups.topk(config["topk_group"], dim=-1)[1], 1)
    outside = kept.repeat_interleave(8 // config["n_group"], dim=1) == 0
    ids = choice.masked_fill(outside, -math.inf).topk(TOP_K, dim=-1)[1]
    top = scores.gather(1, ids)
    top = top / top.sum(-1, keepdim=True) * config["routed_scaling_factor"]
    routed = _mix(x, ids, top, lambda h, e: _gated(w, f"{place}.experts.{e}", h))
    return routed + _gated(w, f"{place}.shared_experts", x)


def _mix(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert: Any) -> torch.Tensor:
    rows = [sum(weights[t, s] * expert(x[t], int(ids[t, s])) for s in range(ids.shape[1])) for t in range(x.shape[0])]
    return torch.stack(rows)  # pyright: ignore[reportArgumentType]


def _gated(w: Tensors, place: str, x: torch.Tensor) -> torch.Tensor:
    h = F.silu(x @ w[f"{place}.gate_proj.weight"].T) * (x @ w[f"{place}.up_proj.weight"].T)
    return h @ w[f"{place}.down_proj.weight"].T


def _gpt_oss_expert(w: Tensors, place: str, x: torch.Tensor, expert: int) -> torch.Tensor:
    both = x @ w[f"{place}.gate_up_proj"][expert] + w[f"{place}.gate_up_proj_bias"][expert]
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return h @ w[f"{place}.down_proj"][expert] + w[f"{place}.down_proj_bias"][expert]
