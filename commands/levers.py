"""``tokenfab speculate``, ``tokenfab scale``: what drafts and what the links between GPUs are worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import data_option, parallel_option, records_option, report_option, stacks_option
from .shared import Progress, combined, comma, json_option, price_options, print_json, show

if TYPE_CHECKING:
    from ..costing.levers.acceptance import Acceptance

_serving_options = combined(
    click.option("--precision", help="See `tokenfab models --precisions`; the checkpoint's own by default."),
    click.option("--kv-format", help="Format of the KV cache, instead of the precision's: bf16 or fp8."),
    click.option("--context", type=int, default=4096, show_default=True, help="Cached tokens per sequence."),
    click.option(
        "--load", default="balanced", show_default=True, help="Expert load: balanced, power_law_1.01 or power_law_1.2."
    ),
)


@click.command()
@click.argument("model")
@comma("--gpu", "gpus", "See `tokenfab gpus`.", required=True)
@comma("--stack", "stacks", "NAME@VERSION for an older one.", default="vllm", show_default=True)
@parallel_option
@comma("--batch", "batches", "Sequences per GPU; powers of two that fit by default.", item=float)
@comma("--drafts", "drafts", "Draft tokens per step.", item=int, default="1", show_default=True)
@comma("--acceptance-rate", "rates", "One for every position, or one per position.", item=float)
@comma("--acceptance-length", "lengths", "Tokens kept per step, one for each of --drafts.", item=float)
@click.option("--acceptance", "measured", metavar="NAME", help="Measured by others: deepseek-v4-pro, glm-5.2, ...")
@click.option("--drafter", default="mtp", show_default=True, help="mtp, ngram (no GPU time), or a model that drafts.")
@_serving_options
@price_options
@data_option
@records_option
@report_option
@json_option
def speculate(
    model: str, gpus: list[str], stacks: list[str], parallel: str | None, batches: list[float] | None,
    drafts: list[int], rates: list[float] | None, lengths: list[float] | None, measured: str | None, drafter: str,
    report: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Speculative decoding of MODEL: $/M and tokens/s/user by batch and number of drafts, and where it stops paying.

    The verify step runs 1 + drafts tokens per sequence; drafting is added. One of --acceptance-rate,
    --acceptance-length and --acceptance says how many are kept.

    \b
    Examples:
      tokenfab speculate deepseek-v3 --gpu h200 --stack sglang --drafts 1,3 --acceptance-rate 0.85
      tokenfab speculate deepseek-v3 --gpu gb200 --stack trtllm --drafts 1,3,7 --acceptance deepseek-v4-pro
      tokenfab speculate gpt-oss-120b --gpu h100 --parallel tp2 --drafts 4 --acceptance-rate 0.6 --drafter gpt-oss-20b
    """
    from ..costing.levers import speculative_view as view
    from ..costing.levers.speculative import speculation
    from ..costing.study import study

    acceptance = _acceptance(drafts, rates, lengths, measured)
    found = []
    for gpu in _named(gpus):
        plan = study(model, [gpu], stacks, [parallel] if parallel else None, [max(batches or [32])], **options)
        found += speculation(plan, acceptance, drafts, drafter)
    with Progress("speculate", as_json) as progress:
        points = []
        for done, each in enumerate(found):
            progress.update(done, len(found), f"{each.gpu.name} {each.stack}")
            points.append(each.points(batches))
            _ = each.break_evens
    if report is not None:
        from ..costing.report.speculate_view import write_speculation

        write_speculation(report, list(zip(found, points, strict=True)))
        click.echo(f"report: {report}", err=True)
    if as_json:
        documents = [view.speculation_document(each, at) for each, at in zip(found, points, strict=True)]
        print_json(documents[0] if len(documents) == 1 else documents)
        return
    for each, at in zip(found, points, strict=True):
        show(
            False, dict, lambda e=each, a=at: view.speculation_table(e, a),
            lambda e=each, a=at: view.speculation_lines(e, a),
        )  # fmt: skip


def _named(gpus: list[str]) -> list[str]:
    if not gpus:
        raise ValueError("gpu: expected at least one; got none")
    return gpus


def _acceptance(
    drafts: list[int], rates: list[float] | None, lengths: list[float] | None, measured: str | None
) -> Acceptance:
    from ..costing.levers.acceptance import Acceptance, get_acceptance

    given = [each for each in (rates, lengths, measured) if each is not None]
    if len(given) != 1:
        raise ValueError(
            f"acceptance: expected one of --acceptance-rate, --acceptance-length and --acceptance; got {len(given)}"
        )
    if rates is not None:
        return Acceptance.of_rates(rates)
    if lengths is not None:
        return Acceptance.of_lengths(drafts, lengths)
    assert measured is not None
    return get_acceptance(measured)


@click.command()
@click.argument("model")
@comma("--gpu", "gpus", "See `tokenfab gpus`.", required=True)
@stacks_option
@click.option("--max-gpus", type=int, default=72, show_default=True, help="GPUs of one deployment at most.")
@click.option("--min-tokens-per-s-per-user", "min_rate", type=click.FloatRange(0), default=20, show_default=True,
              help="Interactivity that the best points must reach.")  # fmt: skip
@comma("--domain", "domains", "Also in scale-up domains of so many GPUs; none for ''.", item=int, default="8,72",
       show_default=True)  # fmt: skip
@comma("--batch", "batches", "Sequences per GPU; twenty from 1/8 to 512 by default.", item=float)
@click.option("--max-modelled", type=click.FloatRange(0, 1), default=0.25, show_default=True,
              help="Rank by number of GPUs only points with at most this share of their time modelled.")  # fmt: skip
@_serving_options
@price_options
@data_option
@records_option
@report_option
@json_option
def scale(
    model: str, gpus: list[str], stacks: list[str], max_gpus: int, min_rate: float, domains: list[int],
    batches: list[float] | None, max_modelled: float, report: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Every way to spread MODEL over GPUs: the best split by number of GPUs, and what the scale-up domain is worth.

    All splits of attention and experts over up to --max-gpus, with published all-to-all and all-reduce times. The
    second part prices the same GPU, at the same $/GPU-h, in a domain of another size, at equal interactivity.

    \b
    Examples:
      tokenfab scale deepseek-v3 --gpu gb200,h200 --max-gpus 72 --min-tokens-per-s-per-user 20
      tokenfab scale kimi-k2 --gpu gb300 --domain 8 --load power_law_1.2
    """
    from ..costing.levers import parallelism_view as view
    from ..costing.levers.parallelism import domain_worth, search
    from ..costing.study import study

    plan = study(model, _named(gpus), stacks, None, None, **options)
    with Progress("scale", as_json) as progress:
        found = search(plan, max_gpus, batches, domains, progress.update)
    worths, lines = domain_worth(found, view.rates(min_rate)), view.scale_lines(found, max_modelled)
    tables = [view.counts_table(found, min_rate, max_modelled), view.pareto_table(found, min_rate, max_modelled)]
    if worths:
        tables.append(view.domain_table(found, worths))
    if report is not None:
        from ..costing.report.workload_views import write_scale

        write_scale(report, found, max_modelled, tables, lines)
        click.echo(f"report: {report}", err=True)
    if as_json:
        print_json(view.scale_document(found, worths, min_rate, max_modelled))
        return
    from ..bench.tables import console

    out = console()
    for table in tables:
        out.print(table)
    for line in lines:
        out.print(line, soft_wrap=True)
