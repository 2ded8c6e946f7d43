"""``tokenfab lab --weights``: a checkpoint in several precisions, what each costs and what it loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shared import UserError, show


def weights_report(
    folder: Path, precisions: list[str], batch: int, num_tokens: int, token_file: Path | None, out: Path,
    gpu_name: str | None, as_json: bool, price_options: dict[str, Any],
) -> None:  # fmt: skip
    """Loads ``folder`` in BF16 and in each precision, decodes the same tokens, and prints cost beside error."""
    from ..bench.campaign import gpu_of
    from ..bench.cuda_device import CudaDevice
    from ..bench.deployment import get_precision
    from ..bench.device import NoGpu
    from ..bench.user_check import use_interpreter

    chosen = [get_precision(name) for name in precisions]
    try:
        device, place = CudaDevice(), "cuda"
        where = f"times of whole decode steps behind {num_tokens} tokens, batch {batch}"
    except NoGpu:
        device, place = None, "cpu"
        where = f"no times without a GPU; the error {use_interpreter()}"
    from ..bench.records import RecordStore
    from ..bench.step_model import read_step_model
    from ..bench.step_precisions import PrecisionResult, compare_precisions, random_tokens, read_tokens
    from ..bench.tables import plain_table
    from ..costing.cost import usd_per_mtok
    from ..costing.prices import price_lookup

    gpu = gpu_of(device.properties, gpu_name) if device else None
    price = price_lookup(**price_options)
    if token_file is None:
        config = folder / "config.json"
        if not config.is_file():
            raise UserError(f"weights: expected a checkpoint's folder with its config.json; got {folder}")
        vocab = read_step_model(config.read_bytes(), folder.resolve().name).config.vocab_size
        tokens, what = random_tokens(vocab, batch, num_tokens), "random token ids; --token-ids FILE for real ones"
    else:
        tokens, what = read_tokens(token_file), f"token ids of {token_file}"
    found = compare_precisions(
        folder, chosen, tokens, place, device=device, gpu=gpu,
        store=RecordStore(out, f"{gpu.name}.jsonl") if gpu else None,
        done=lambda result: click.echo(f"{result.precision}: {result.reason or 'done'}", err=True),
    )  # fmt: skip

    def usd(result: PrecisionResult) -> float | None:
        rate = result.tokens_per_s_per_gpu
        return usd_per_mtok(rate, price(gpu.name).usd_per_gpu_hour) if rate and gpu else None

    def row(result: PrecisionResult) -> tuple[str, ...]:
        error, cost = result.error, usd(result)
        quality = ("-",) * 4 if error is None else (
            f"{error.kl_mean_nats:.4g}", f"{error.kl_max_nats:.4g}", f"{error.top1_agreement:.1%}",
            f"{min(error.layer_sqnr_db):.1f}",
        )  # fmt: skip
        step = "-" if result.step_s is None else f"{result.step_s * 1e3:.3f}"
        rate = "-" if result.tokens_per_s_per_gpu is None else f"{result.tokens_per_s_per_gpu:,.0f}"
        return result.precision, result.reason or "ok", *quality, step, rate, "-" if cost is None else f"{cost:.4f}"

    columns = ("precision", "verdict", "KL nats", "KL max", "top-1", "worst SQNR dB", "step ms", "tokens/s/GPU", "$/M")
    title = f"{folder}: against BF16, {tokens.numel()} tokens"
    listed = [{**result.as_dict(), "usd_per_mtok": usd(result)} for result in found]
    show(as_json, lambda: _finite(listed), lambda: plain_table(title, columns, [row(each) for each in found], left=2),
         lambda: [what, where])  # fmt: skip


def _finite(value: Any) -> Any:
    """JSON has no infinity: an SQNR of the same bits is null."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value == float("inf") else value
