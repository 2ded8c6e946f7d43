"""Tables of what there is: models, precisions, GPUs, prices. Nothing here reads measurements, so that it is quick."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ..bench.deployment import Precision
from ..bench.gpus import Gpu
from ..bench.model_config import GqaAttention, ModelConfig
from ..bench.tables import number, plain_table
from .prices import Price


def _attention(model: ModelConfig) -> str:
    kinds = []
    for attention in dict.fromkeys(layer.attention for layer, _ in model.layers):
        if isinstance(attention, GqaAttention):
            window = f" window {attention.window}" if attention.window else ""
            kinds.append(f"GQA {attention.num_heads}/{attention.num_kv_heads} x {attention.head_dim}{window}")
        else:
            sparse = f", DSA top-{attention.indexer.top_k}" if attention.indexer else ""
            kinds.append(f"MLA {attention.num_heads} x ({attention.kv_lora_rank} + {attention.rope_dim}){sparse}")
    return " + ".join(dict.fromkeys(kinds))


def models_table(models: Sequence[ModelConfig]) -> Table:
    rows = [
        (
            m.name,
            _attention(m),
            m.native_precision or "-",
            m.num_layers,
            m.hidden_size,
            f"{m.num_parameters / 1e9:.1f}",
            f"{m.num_active_parameters / 1e9:.2f}",
            f"{m.kv_values_per_token():,}",
        )
        for m in models
    ]
    columns = ("model", "attention", "checkpoint", "layers", "hidden", "B parameters", "B active", "KV values/token")
    return plain_table("Models", columns, rows, left=3)


def precisions_table(precisions: Sequence[Precision]) -> Table:
    rows = [
        (
            p.name,
            f"{p.linear} x {p.linear_activation}",
            f"{p.experts} x {p.experts_activation}",
            p.kv,
            p.dispatch,
            p.title,
        )
        for p in precisions
    ]
    columns = ("precision", "linear layers", "experts", "KV cache", "dispatch", "")
    return plain_table("Precisions (weights x activations)", columns, rows, left=6)


def gpus_table(gpus: Sequence[Gpu]) -> Table:
    def tera(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e12:,.0f}"

    rows = [
        (
            g.name,
            g.title,
            g.compute_capability,
            tera(g.bf16_flops_per_s),
            tera(g.fp8_flops_per_s),
            tera(g.fp4_flops_per_s),
            f"{g.memory_bytes / 1024**3:.0f}",
            f"{g.memory_bytes_per_s / 1e12:.2f}",
            f"{g.tdp_w:.0f}",
            f"{g.link_bytes_per_s / 1e9:.0f} x {g.scale_up_gpus}",
            g.source,
        )
        for g in gpus
    ]
    columns = ("gpu", "name", "cc", "BF16 TFLOP/s", "FP8", "FP4", "GiB", "TB/s", "W", "link GB/s x GPUs", "source")
    table = plain_table("GPUs (dense datasheet peaks, links one way)", columns, rows, left=3)
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    return table


def prices_table(prices: Sequence[Price]) -> Table:
    rows = [
        (p.gpu, p.tier, p.date, p.source, p.note, f"{p.usd_per_gpu_hour:.3f}", number(p.kw_per_gpu, 4)) for p in prices
    ]
    return plain_table("Prices", ("gpu", "tier", "date", "source", "note", "$/GPU-h", "kW/GPU"), rows, left=5)
