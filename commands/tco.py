"""``tokenfab tco``, ``tokenfab interval``, ``tokenfab sensitivity``: what moves a price, and how sure it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    batch_option,
    data_option,
    gpu_option,
    model_options,
    parallel_option,
    records_option,
    stack_option,
)  # fmt: skip
from .shared import combined, json_option, price_file_option, price_options, show

if TYPE_CHECKING:
    from ..costing.levers.tco import Ownership, Power
    from ..costing.study import Study

_range_options = combined(
    click.option("--price-low", type=float, metavar="USD", help="Lowest $/GPU-h, instead of the price book's."),
    click.option("--price-high", type=float, metavar="USD", help="Highest $/GPU-h, instead of the price book's."),
)


def _plan(model: str, gpu: str, stack: str, parallel: str | None, batch: float, **options: Any) -> Study:
    from ..costing.study import study

    return study(model, [gpu], [stack], [parallel] if parallel else None, [batch], **options)


def _price_range(low: float | None, high: float | None) -> tuple[float, float] | None:
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise ValueError(f"price_range: expected --price-low and --price-high; got {low} and {high}")
    return low, high


@click.command()
@gpu_option
@click.option("--capex-usd-per-gpu", type=float, required=True, help="With its share of server and network.")
@click.option("--residual-share", type=float, required=True, help="Of capex, what it fetches in the end: 0 to 1.")
@click.option("--years", type=float, required=True, help="Of straight-line depreciation.")
@click.option("--cost-of-capital", type=float, required=True, help="Per year, 0.08 for 8 %; on the mean book value.")
@click.option("--usd-per-kwh", type=float, required=True, help="Electricity.")
@click.option("--colocation-usd-per-kw-month", type=float, required=True, help="Per kW of all-in power.")
@click.option("--opex-share", type=float, required=True, help="Per year, of capex: staff, repair, insurance, software.")
@click.option("--utilisation", type=float, required=True, help="Share of owned hours sold: above 0 to 1.")
@click.option("--kw", type=float, help="All-in kW per GPU; the price book's by default.")
@click.option("--server-w", type=float, help="Instead: watts of the server per GPU, times the PUE.")
@click.option("--pue", type=float, help="Power usage effectiveness, at least 1.")
@click.option("--cooling", type=click.Choice(["air", "liquid"]), help="Instead of --pue: 1.3 or 1.1 (InferenceX).")
@click.option("--rent-usd-per-gpu-hour", type=float, help="Rent to compare with; the book's rents by default.")
@click.option("--tokens-per-s", type=float, help="Tokens/s of one GPU, for $/M, tokens/s/W and J/token.")
@price_file_option
@json_option
def tco(
    gpu: str, residual_share: float, opex_share: float, kw: float | None, server_w: float | None, pue: float | None,
    cooling: str | None, rent_usd_per_gpu_hour: float | None, tokens_per_s: float | None, price_file: Path | None,
    as_json: bool, **inputs: float,
) -> None:  # fmt: skip
    """What an owned GPU costs per hour sold, part by part, and when owning beats renting.

    What has no source has no default. Power is paid for every hour owned, idle ones too.

    \b
    Examples:
      tokenfab tco --gpu h100 --capex-usd-per-gpu 35000 --residual-share 0.1 --years 4 --cost-of-capital 0.07 \\
               --usd-per-kwh 0.06 --colocation-usd-per-kw-month 80 --opex-share 0.02 --utilisation 0.95
      tokenfab tco --gpu gb300 ... --server-w 1900 --cooling liquid --rent-usd-per-gpu-hour 5 --tokens-per-s 6000
    """
    from ..bench.gpus import get_gpu
    from ..costing.levers.tco import Ownership, tco_document
    from ..costing.levers.view import tco_lines, tco_table
    from ..costing.prices import PriceBook

    book, name, capex = PriceBook.read(price_file), get_gpu(gpu).name, inputs["capex_usd_per_gpu"]
    own: Ownership = Ownership(
        gpu=name, residual_usd_per_gpu=residual_share * capex, opex_share_per_year=opex_share,
        power=_power(name, book, kw, server_w, pue, cooling), **inputs,
    )  # fmt: skip
    if rent_usd_per_gpu_hour is not None:
        rents = {"given": rent_usd_per_gpu_hour}
    else:
        rows = [row for row in book.prices if row.gpu == name and row.tier.startswith("rent")]
        rents = {
            f"{row.tier} of {row.date}": row.usd_per_gpu_hour for row in rows if "placeholder" not in row.note
        }  # fmt: skip
    document = tco_document(own, rents, tokens_per_s)
    show(as_json, lambda: document, lambda: tco_table(own), lambda: tco_lines(own, rents, tokens_per_s))


def _power(
    gpu: str, book: Any, kw: float | None, server_w: float | None, pue: float | None, cooling: str | None
) -> Power:
    from ..costing.levers.tco import Power

    if server_w is None and (pue is not None or cooling is not None):
        raise ValueError("server_w: expected it with --pue or --cooling; the other powers are all-in already")
    if server_w is not None and kw is not None:
        raise ValueError(f"kw: expected --kw or --server-w; got both {kw:g} and {server_w:g}")
    if server_w is not None:
        return Power.of_server(server_w, pue, cooling)
    return Power.stated(kw) if kw is not None else Power.of_book(gpu, book)


@click.command()
@click.argument("model")
@gpu_option
@stack_option
@parallel_option
@batch_option
@model_options
@price_options
@_range_options
@click.option("--samples", type=int, default=100_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--independent", is_flag=True, help="Every op its own error, instead of one per table: the other extreme."
)
@data_option
@records_option
@json_option
def interval(
    model: str, gpu: str, stack: str, parallel: str | None, batch: float, price_low: float | None,
    price_high: float | None, samples: int, seed: int, independent: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """How sure the price of one decode step of MODEL is: 5th, 50th and 95th percentile, and what the width is made of.

    Measured times repeat to within the tables' noise, interpolated and modelled ones err as rows left out of the
    tables do, and the price lies within the book's tiers and dates (a stated one is certain).

    \b
    Examples:
      tokenfab interval deepseek-v3 --gpu h200 --stack sglang --parallel dp8-ep8 --batch 64
      tokenfab interval gpt-oss-120b --gpu h100 --parallel tp2 --batch 48 --price-low 1.5 --price-high 2.5
    """
    from ..costing.levers.calibration import Calibration
    from ..costing.levers.intervals import interval as cost_interval
    from ..costing.levers.intervals import price_range_of
    from ..costing.levers.view import interval_document, interval_lines, interval_table
    from ..costing.prices import PriceBook
    from ..costing.study import price_step

    given = _price_range(price_low, price_high)
    plan = _plan(model, gpu, stack, parallel, batch, **options)
    cost = price_step(plan)
    span = given or price_range_of(cost.price, PriceBook.read(options["price_file"]))
    found = cost_interval(
        cost, samples=samples, seed=seed, price_range=span, correlated=not independent, data=plan.data
    )
    coverage = Calibration.read().coverage
    show(
        as_json, lambda: interval_document(found, coverage), lambda: interval_table(found),
        lambda: interval_lines(found, coverage),
    )  # fmt: skip


@click.command()
@click.argument("model")
@gpu_option
@stack_option
@parallel_option
@batch_option
@model_options
@price_options
@_range_options
@click.option("--utilisation", type=(float, float), metavar="LOW HIGH", help="Share of paid hours that decode.")
@click.option("--acceptance", type=(float, float), metavar="LOW HIGH", help="Tokens kept per step.")
@click.option("--batches", type=(float, float), metavar="LOW HIGH", help="Sequences per GPU.")
@click.option("--contexts", type=(int, int), metavar="LOW HIGH", help="Cached tokens per sequence.")
@data_option
@records_option
@json_option
def sensitivity(
    model: str, gpu: str, stack: str, parallel: str | None, batch: float, price_low: float | None,
    price_high: float | None, utilisation: tuple[float, float] | None, acceptance: tuple[float, float] | None,
    batches: tuple[float, float] | None, contexts: tuple[int, int] | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Which input moves the price of one decode step of MODEL most, one at a time, each over its own range.

    \b
    Examples:
      tokenfab sensitivity deepseek-v3 --gpu h200 --stack sglang --parallel dp8-ep8 --batch 64
      tokenfab sensitivity deepseek-v3 --gpu gb300 --stack trtllm --batch 64 --tokens-per-step 2 --kept-tokens 1.85 \\
               --utilisation 0.4 0.9
    """
    from ..costing.levers import sensitivity as levers
    from ..costing.levers.view import sensitivity_document, sensitivity_lines, sensitivity_table

    given = {
        levers.PRICE: _price_range(price_low, price_high), levers.UTILISATION: utilisation,
        levers.ACCEPTANCE: acceptance, levers.BATCH: batches, levers.CONTEXT: contexts,
    }  # fmt: skip
    plan = _plan(model, gpu, stack, parallel, batch, **options)
    found = levers.sensitivity(plan, {name: span for name, span in given.items() if span is not None})
    show(
        as_json, lambda: sensitivity_document(found), lambda: sensitivity_table(found),
        lambda: sensitivity_lines(found),
    )  # fmt: skip
