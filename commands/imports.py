"""``tokenfab import``: benchmark results of serving tools, in dollars, beside what the kernels allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import data_option, records_option, report_option
from .shared import Progress, combined, json_option, path_type, price_options, print_json

_given_options = combined(
    click.option("--model", help="Name, or path of the config.json; where the file's is not known."),
    click.option("--gpu", help="What served; see `tokenfab gpus`."),
    click.option("--num-gpus", type=int, help="All GPUs of all replicas, prefill too."),
    click.option("--parallel", help="Of one replica (its decode pool): tp8, dp8-ep8, tp2-dp4-ep8, ..."),
    click.option("--precision", help="See `tokenfab models --precisions`."),
    click.option("--kv-format", help="bf16 or fp8; the precision's own by default."),
    click.option("--prefill-gpus", type=int, help="Of --num-gpus, those that only prefill."),
    click.option("--prefill-parallel", help="Of one replica of the prefill pool."),
    click.option("--tokens-per-step", type=int, help="Tokens that a step verifies: 1 + drafts."),
    click.option("--kept-tokens", type=float, help="Of those kept: the acceptance length."),
)


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=path_type)
@_given_options
@click.option("--stack", help="Kernels to compare with: vllm, sglang, trtllm; by default those of the server.")
@click.option("--load", default="balanced", show_default=True, help="Expert load of the kernels' step.")
@click.option("--no-kernels", is_flag=True, help="Only what was served; needs no precision or parallelism.")
@click.option("--skip-refused", is_flag=True, help="List results that are refused, and price the others.")
@price_options
@data_option
@records_option
@report_option
@json_option
def imports(
    files: tuple[Path, ...], stack: str | None, load: str, no_kernels: bool, skip_refused: bool, tier: str,
    book: str | None, price_file: Path | None, usd_per_gpu_hour: float | None, published_data: Path | None,
    records: Path | None, report: Path | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Price results of vLLM's, SGLang's, TensorRT-LLM's and Dynamo's benchmarks, and rows of InferenceX.

    FILES: `vllm bench serve --save-result`, `sglang.bench_serving --output-file`, `trtllm-bench --report_json`,
    AIPerf's profile_export_aiperf.json or profile_export.jsonl, InferenceX's agg_*.json. Which tool wrote a file is
    seen from its content. What no file says (often the GPUs) is given here; figures that contradict are refused.

    \b
    Examples:
      tokenfab import agg_bmk.json
      tokenfab import vllm.json --gpu h200 --num-gpus 8 --parallel tp8-ep8 --precision fp8
      tokenfab import trtllm.json aiperf.json --gpu b200 --num-gpus 8 --no-kernels --usd-per-gpu-hour 3.5
    """
    from ..bench.published import PublishedData
    from ..bench.recorded import RecordedData
    from ..costing.imports import view
    from ..costing.imports.allowed import Tables, allowed
    from ..costing.imports.bill import bills
    from ..costing.imports.read import read_results
    from ..costing.imports.served import Given, completed_by
    from ..costing.prices import price_lookup
    from ..costing.sweep import Parallel

    for name in ("parallel", "prefill_parallel"):
        given[name] = Parallel.parse(given[name]) if given[name] else None
    said, refused = Given(**given), list[str]()
    price = price_lookup(usd_per_gpu_hour, tier, book, price_file)
    found = [
        completed_by(served, said, kernels=not no_kernels)
        for path in files
        for served in read_results(path, refused.append if skip_refused else None)
    ]
    if not found:
        raise ValueError(f"files: every result is refused: {refused[0]}")
    tables = None if no_kernels else Tables(PublishedData(published_data), RecordedData(records), stack, load)
    with Progress("import", as_json) as progress:
        priced = bills(
            found, price,
            None if tables is None else lambda served, own, prefill: allowed(served, own, prefill, tables),
            lambda what: progress.advance(len(found), what),
        )  # fmt: skip
    shown = [view.cost_table(priced)]
    if any(bill.allowed for bill in priced):
        shown.append(view.distance_table(priced))
    lines = [*view.notes(priced), *(f"refused: {reason}" for reason in refused)]
    if report is not None:
        from ..costing.report.workload_views import write_served

        write_served(report, priced, shown, lines)
        click.echo(f"report: {report}", err=True)
    if as_json:
        print_json(view.document(priced, refused))
        return
    from ..bench.tables import console

    out = console()
    for table in shown:
        out.print(table)
    for line in lines:
        out.print(line, soft_wrap=True)
