"""``tokenfab explain``: from one $/M to another, factor by factor; a published claim, figure by figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import data_option, records_option, report_option
from .shared import Progress, combined, comma, json_option, price_file_option, print_json

if TYPE_CHECKING:
    from ..costing.levers.waterfall import Pricer
    from ..costing.levers.waterfall_ends import Found, Side


def _both(flag: str, help_text: str, **more: Any) -> Any:
    """``--from-X`` and ``--to-X``."""
    name = flag.replace("-", "_")
    return combined(
        click.option(f"--from-{flag}", f"from_{name}", help=f"{help_text}", **more),
        click.option(f"--to-{flag}", f"to_{name}", help="The same of the other side.", **more),
    )


def _lists(flag: str, help_text: str) -> Any:
    name = flag.replace("-", "_")
    return combined(
        comma(f"--from-{flag}", f"from_{name}", help_text), comma(f"--to-{flag}", f"to_{name}", "Of the other side.")
    )


_SIDES = (
    "stack", "precision", "kv_format", "parallel", "batch", "drafts", "acceptance", "drafter", "tier", "book",
    "usd_per_gpu_hour", "serving", "prefill_parallel",
)  # fmt: skip
"""Options that both sides have."""

DEFAULT_LIMIT = 20.0
"""Tokens/s/user, as ``tokenfab cost``'s."""


@click.command()
@click.option("--claim", help="Audit this published claim instead: nvidia-35x.")
@click.option("--model", help="See `tokenfab models`.")
@click.option("--from", "from_gpu", help="The GPU to start from; see `tokenfab gpus`.")
@click.option("--to", "to_gpu", help="The GPU to end at.")
@click.option("--min-tokens-per-s-per-user", type=float,
              help=f"Both sides: the cheapest point at least so fast; {DEFAULT_LIMIT:g} by default.")  # fmt: skip
@_both("min-tokens-per-s-per-user", "The start's own limit, instead.", type=float)
@_lists("stack", "Tried at the start: vllm, sglang, trtllm.")
@_lists("precision", "Tried at the start; the checkpoint's own by default.")
@_lists("kv-format", "KV caches tried at the start: bf16, fp8; the precision's own by default.")
@_lists("parallel", "Splits tried at the start: tp8, dp8-ep8, ...")
@_both("batch", "Sequences per GPU at the start; the cheapest that is fast enough by default.", type=float)
@_both("drafts", "Draft tokens per step at the start.", type=int, default=0)
@_both("acceptance", "Tokens kept per step at the start, 1 to 1 + drafts, or whose: deepseek-v3-mtp-low, ...")
@_both("drafter", "What makes drafts at the start: mtp, ngram or a model.", default="mtp", show_default=True)
@click.option("--context", type=int, help="Cached tokens per sequence; 4096, or the request's, by default.")
@click.option("--input-tokens", type=int, help="Of a request: with them, prefill is in every figure.")
@click.option("--cached-tokens", type=int, default=0, show_default=True, help="Of the input, already cached.")
@click.option("--output-tokens", type=int, help="Of a request.")
@_both(
    "serving", "aggregated: the same GPUs prefill and decode; disaggregated.", default="aggregated", show_default=True
)
@_lists("prefill-parallel", "Splits tried for GPUs that only prefill, at the start.")
@click.option("--load", default="balanced", show_default=True, help="Expert load.")
@click.option("--tier", default="rent_3yr", show_default=True, help="Price tier of both; see `tokenfab prices`.")
@click.option("--book", help="Price book of both, e.g. 2026-02; the newest by default.")
@_both("tier", "Price tier at the start, instead.")
@_both("book", "Price book at the start, instead.")
@_both("usd-per-gpu-hour", "This price at the start, instead.", type=float)
@price_file_option
@click.option("--max-modelled", type=float, default=0.25, show_default=True,
              help="No point with a larger share of its time modelled.")  # fmt: skip
@click.option("--order", help="a,b+c: changes in this order (+: at once); the rest in the default order.")
@comma(
    "--at", "at", "Instead: how many times cheaper at each of these tokens/s/user, the same on both sides.", item=float
)
@click.option("--mismatched", is_flag=True, help="With --at: also each interactivity against each.")
@data_option
@records_option
@report_option
@json_option
def explain(
    claim: str | None, model: str | None, from_gpu: str | None, to_gpu: str | None, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Why a token costs so much less there: from one $/M output tokens to another, factor by factor.

    Price, GPU (bandwidth, compute, links, kernels), stack, precision, split, drafts, batch: one change at a time, all
    others as they are at that place; the factors multiply to the total. What is not given is searched, for the
    cheapest point at the same interactivity on both sides.

    \b
    Examples:
      tokenfab explain --model deepseek-r1 --from h200 --to gb300 --to-precision nvfp4
      tokenfab explain --model deepseek-r1 --from h200 --to gb300 --at 20,40,60,80 --mismatched
      tokenfab explain --model gpt-oss-120b --from h100 --from-batch 64 --to h100 --to-batch 128
      tokenfab explain --claim nvidia-35x
    """
    _check_kind({"claim": claim, "model": model, "from": from_gpu, "to": to_gpu} | options)
    if claim is not None:
        _print_claim(claim, options["price_file"], as_json)
        return
    for name, value in (("model", model), ("from", from_gpu), ("to", to_gpu)):
        if value is None:
            raise ValueError(f"{name}: expected --model, --from and --to, or --claim; got none")
    assert model is not None
    assert from_gpu is not None
    assert to_gpu is not None
    _limits(options)  # wrong ones are an error before the search, not after
    pricer = _pricer(model, options["published_data"], options["records"])
    sides = [_side(pricer, name, gpu, options) for name, gpu in (("from", from_gpu), ("to", to_gpu))]
    with Progress("points", quiet=as_json) as progress:
        found = _find(pricer, sides, options["max_modelled"], progress)
    if options["at"] is not None:
        _print_ratios(found, options, as_json)
    else:
        _print_waterfall(pricer, found, options, as_json)


def _limits(options: dict[str, Any]) -> list[float]:
    """Tokens/s/user that each side must reach."""
    from ..costing.levers.waterfall_ends import check_limits, check_share

    name = "min_tokens_per_s_per_user"
    check_share(options["max_modelled"])
    check_limits([0.0] if options["at"] is None else options["at"])
    both = DEFAULT_LIMIT if options[name] is None else options[name]
    own = (options[f"from_{name}"], options[f"to_{name}"])
    return list(check_limits([both if each is None else each for each in own]))


def _check_kind(options: dict[str, Any]) -> None:
    """Refuse options that would be ignored: of a waterfall (neither --claim nor --at), of ratios (--at), of a claim.

    Raises:
        ValueError: naming the option.
    """
    limit = "min_tokens_per_s_per_user"
    of_waterfall = ("order", "report", limit, f"from_{limit}", f"to_{limit}")
    refused = {
        "claim": ("model", "from", "to", "at", "mismatched", *of_waterfall),
        "at": of_waterfall,
        "from_batch": (f"from_{limit}",),
        "to_batch": (f"to_{limit}",),
    }
    for name, others in refused.items():
        for other in others if options[name] is not None else ():
            if options[other]:
                raise ValueError(f"{other}: expected none with {name}; got {options[other]}")
    if options["mismatched"] and options["at"] is None:
        raise ValueError("mismatched: expected tokens/s/user with it, as in --at 20,40,80; got none")
    if None not in (options["from_batch"], options["to_batch"]) and options[limit] is not None:
        raise ValueError(f"{limit}: expected none where both batches are given; got {options[limit]:g}")


def _pricer(model: str, published_data: Path | None, records: Path | None) -> Pricer:
    from ..bench.models import load_model
    from ..bench.published import PublishedData
    from ..bench.recorded import RecordedData
    from ..costing.levers.waterfall import Pricer

    return Pricer(load_model(model), PublishedData(published_data), RecordedData(records))


def _side(pricer: Pricer, name: str, gpu: str, options: dict[str, Any]) -> Side:
    from ..costing.levers.waterfall_ends import make_request, make_side

    own = {key: options[f"{name}_{key}"] for key in _SIDES}
    own["tier"], own["book"] = own["tier"] or options["tier"], own["book"] or options["book"]
    shared = {key: options[key] for key in ("context", "load", "price_file")}
    request = make_request(options["input_tokens"], options["cached_tokens"], options["output_tokens"])
    return make_side(pricer.model, name, gpu, **own, **shared, request=request)


def _find(pricer: Pricer, sides: list[Side], max_modelled: float, progress: Progress) -> list[Found]:
    from ..costing.levers.waterfall_ends import find_points

    total = sum(len(side) for side in sides)
    return [find_points(pricer, side, max_modelled, lambda of, what: progress.advance(total, what)) for side in sides]


def _print_waterfall(pricer: Pricer, found: list[Found], options: dict[str, Any], as_json: bool) -> None:
    from ..bench.tables import console
    from ..costing.levers.waterfall_ends import chosen_ends
    from ..costing.levers.waterfall_orders import all_orders, ordered_waterfall
    from ..costing.levers.waterfall_view import waterfall_document, waterfall_lines, waterfall_table

    ends, own_limits = chosen_ends(found, _limits(options), options["max_modelled"])
    shown = ordered_waterfall(pricer, ends[0].point, ends[1].point, options["order"])
    orders, intervals = all_orders(pricer, shown), [end.interval(pricer.data) for end in ends]
    table, lines = waterfall_table(shown, orders), waterfall_lines(shown, orders, intervals, own_limits)
    if options["report"] is not None:
        from ..costing.report.explain_view import write_explanation

        write_explanation(options["report"], shown, table, lines)
        click.echo(f"report: {options['report']}", err=True)
    if as_json:
        print_json(waterfall_document(shown, orders, intervals, own_limits))
        return
    out = console()
    out.print(table)
    for line in lines:
        out.print(line, soft_wrap=True)


def _print_ratios(found: list[Found], options: dict[str, Any], as_json: bool) -> None:
    from ..bench.tables import console
    from ..costing.levers.waterfall_ends import mismatched, ratios
    from ..costing.levers.waterfall_view import mismatched_table, ratios_document, ratios_lines, ratios_table

    at, most = options["at"], options["max_modelled"]
    rows = ratios(found[0], found[1], at, most)
    matrix = mismatched(found[0], found[1], at, most) if options["mismatched"] else []
    if as_json:
        print_json(ratios_document(found, rows, matrix))
        return
    out = console()
    out.print(ratios_table(found, rows))
    if matrix:
        out.print(mismatched_table(matrix))
    for line in ratios_lines(found, most):
        out.print(line, soft_wrap=True)


def _print_claim(name: str, price_file: Path | None, as_json: bool) -> None:
    from ..bench.tables import console
    from ..costing.levers.claims import audit, get_claim
    from ..costing.levers.claims_view import audit_document, audit_lines, audit_table, prices_table
    from ..costing.prices import PriceBook

    found = audit(get_claim(name), PriceBook.read(price_file))
    if as_json:
        print_json(audit_document(found))
        return
    out = console()
    out.print(audit_table(found))
    for line in audit_lines(found):
        out.print(line, soft_wrap=True)
    out.print(prices_table(found))
