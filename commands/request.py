"""``tokenfab request``: what a request costs, prefill and decode, from one pool of GPUs or two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import batch_option, data_option, parallel_option, records_option, request_options, stack_option
from .shared import combined, json_option, price_options, show

if TYPE_CHECKING:
    from pathlib import Path

    from ..costing.workload.request_pools import Predicted
    from ..costing.workload.serving import Request

_given_options = combined(
    click.option("--input-rate", type=float, help="Given instead of MODEL: input tokens/s, cached ones counted."),
    click.option("--output-rate", type=float, help="Given: output tokens/s."),
    click.option("--rate-gpus", type=float, default=8, show_default=True, help="GPUs that reach either given rate."),
    click.option("--paid-gpus", type=float, help="GPUs paid for, instead of those that the rates need."),
    click.option("--paid-hours", type=float, help="Hours for which they were paid."),
)


@click.command()
@click.argument("model", required=False)
@click.option("--gpu", help="That decodes, and prefills unless told otherwise; see `tokenfab gpus`.")
@click.option("--input", "input_tokens", type=int, required=True, help="Input tokens, cached ones among them.")
@click.option("--cached", "cached_tokens", type=int, default=0, show_default=True, help="Of those, in the KV cache.")
@click.option("--output", "output_tokens", type=int, required=True, help="Output tokens.")
@stack_option
@parallel_option
@batch_option
@click.option("--disaggregated", is_flag=True, help="A pool of its own for prefill, as large as decode needs.")
@click.option("--prefill-gpu", help="With --disaggregated: another GPU for prefill.")
@click.option("--prefill-stack", help="With --disaggregated: another stack for prefill.")
@click.option("--prefill-parallel", help="With --disaggregated: another split; by default --parallel.")
@click.option("--prefill-usd-per-gpu-hour", type=float, help="With --disaggregated: this price for its GPUs.")
@click.option("--token-budget", type=int, help="New tokens per prefill pass and attention group.  [default: 8192]")
@click.option("--utilisation", type=float, default=1.0, show_default=True, help="Busy share of paid GPU-time, to 1.")
@click.option("--requests-per-s", type=float, help="Also: whole replicas for so many requests.")
@request_options
@price_options
@_given_options
@data_option
@records_option
@json_option
def request(
    model: str | None, gpu: str | None, input_tokens: int, cached_tokens: int, output_tokens: int, utilisation: float,
    requests_per_s: float | None, input_rate: float | None, output_rate: float | None, rate_gpus: float,
    paid_gpus: float | None, paid_hours: float | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """What one request to MODEL costs: prefill of its new tokens, reading its cached ones, decode.

    From one pool of GPUs, or with --disaggregated from two in balance; all of them are paid. Instead of MODEL and
    --gpu, published rates may be given, and the tokens of a whole day be the request.

    \b
    Examples:
      tokenfab request deepseek-v3 --gpu h200 --stack sglang --parallel dp8-ep8 --batch 64 \\
               --input 4096 --cached 1024 --output 512
      tokenfab request deepseek-v3 --gpu h200 --stack sglang --parallel dp16-ep16 --batch 128 \\
               --input 4096 --output 512 --disaggregated --prefill-gpu h100 --prefill-parallel dp32-ep32
      tokenfab request --input 608000000000 --cached 342304000000 --output 168000000000 \\
               --input-rate 73700 --output-rate 14800 --usd-per-gpu-hour 2 --paid-gpus 1814 --paid-hours 24
    """
    from ..costing.workload.request_view import request_document, request_lines, request_table
    from ..costing.workload.serving import Request, serve_given

    tokens = Request(input_tokens, cached_tokens, output_tokens)
    rates, predicted = (input_rate, output_rate), None
    if any(rate is not None for rate in rates):
        if model is not None or gpu is not None:
            raise ValueError("input_rate: expected given rates or MODEL and --gpu; got both")
        serving = serve_given(tokens, *rates, rate_gpus, options["usd_per_gpu_hour"], utilisation)
    else:
        predicted = _predicted(model, gpu, tokens, utilisation, **options)
        serving = predicted.serving
    fleet = None if requests_per_s is None else serving.fleet(requests_per_s)
    bill, paid = serving.bill, None
    if paid_gpus is not None or paid_hours is not None:
        if predicted is not None:
            raise ValueError(f"paid_gpus: expected --input-rate and --output-rate with it; got {paid_gpus}")
        paid = serving.paid(paid_gpus, paid_hours)
        bill = paid.bill
    show(
        as_json, lambda: request_document(serving, bill, predicted, fleet, paid), lambda: request_table(serving, bill),
        lambda: request_lines(serving, bill, predicted, fleet, paid),
    )  # fmt: skip


def _predicted(
    model: str | None, gpu: str | None, tokens: Request, utilisation: float, *, stack: str, parallel: str | None,
    batch: float, disaggregated: bool, prefill_gpu: str | None, prefill_stack: str | None,
    prefill_parallel: str | None, prefill_usd_per_gpu_hour: float | None, token_budget: int | None,
    published_data: Path | None, **options: Any,
) -> Predicted:  # fmt: skip
    from ..costing.study import study
    from ..costing.workload.request_pools import DEFAULT_TOKEN_BUDGET, predict

    if model is None or gpu is None:
        raise ValueError("model: expected MODEL and --gpu, or --input-rate and --output-rate")
    others = {
        "prefill_gpu": prefill_gpu, "prefill_stack": prefill_stack, "prefill_parallel": prefill_parallel,
        "prefill_usd_per_gpu_hour": prefill_usd_per_gpu_hour,
    }  # fmt: skip
    for name, value in others.items():
        if value is not None and not disaggregated:
            raise ValueError(f"{name}: expected --disaggregated with it; got {value}")
    shared: dict[str, Any] = {"published_data": published_data, "context": tokens.context, **options}
    decode = study(model, [gpu], [stack], [parallel] if parallel else None, [batch], **shared)
    split = prefill_parallel or str(decode.sweep.parallels[0])
    if prefill_usd_per_gpu_hour is not None:
        shared["usd_per_gpu_hour"] = prefill_usd_per_gpu_hour
    prefill = study(model, [prefill_gpu or gpu], [prefill_stack or stack], [split], [batch], **shared)
    budget = DEFAULT_TOKEN_BUDGET if token_budget is None else token_budget
    return predict(decode, prefill if disaggregated else None, tokens, token_budget=budget, utilisation=utilisation)
