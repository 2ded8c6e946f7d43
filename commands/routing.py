"""``tokenfab routing``: what a prefix cache hits on a trace, by routing policy and cache size, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import data_option, parallel_option, records_option, report_option, request_options
from .shared import Progress, combined, comma, json_option, path_type, price_options, show

if TYPE_CHECKING:
    from ..costing.study import Study
    from ..costing.workload.routing import Pace

_load_options = combined(
    click.option("--prefill-tokens-per-s", type=float, help="New tokens/s of a replica, as routers see its load."),
    click.option("--tokens-per-s-per-user", type=float, help="Of a replica, likewise; both or neither."),
)
_model_options = combined(
    click.option("--model", help="With --gpu: what is saved, and a cache as large as its memory leaves."),
    click.option("--gpu", help="See `tokenfab gpus`."),
    click.option("--stack", default="vllm", show_default=True, help="vllm, sglang, trtllm."),
    parallel_option,
    comma("--cache-gib", "cache_gib", "Or GiB of one GPU; host memory counts as if it were as fast.", item=float),
    click.option("--batch", type=float, default=16, show_default=True, help="Sequences per GPU beside the cache."),
)


@click.command()
@click.argument("trace", type=path_type)
@click.option("--replicas", type=int, default=8, show_default=True, help="With a cache each: attention groups.")
@comma("--policy", "policies", "random, round_robin, sticky, kv_aware, cache_aware.",
       default="random,round_robin,sticky,kv_aware,cache_aware", show_default=True)  # fmt: skip
@comma("--cache-tokens", "cache_tokens", "Tokens of one replica's cache, or endless.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random.")
@click.option("--prefill-weight", type=float, default=1.0, show_default=True,
              help="Of kv_aware: a block to prefill against an active one.")  # fmt: skip
@_load_options
@_model_options
@request_options
@price_options
@data_option
@records_option
@report_option
@json_option
def routing(
    trace: Path, replicas: int, policies: list[str], cache_tokens: list[str] | None, seed: int, prefill_weight: float,
    cache_gib: list[float] | None, prefill_tokens_per_s: float | None, tokens_per_s_per_user: float | None,
    report: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """What prefix caches hit on TRACE, where requests are routed to replicas by each policy.

    TRACE: Mooncake JSON lines, plain or gzip. Caches evict the least recent, deepest blocks first. kv_aware is NVIDIA
    Dynamo's router, cache_aware that of SGLang's and vLLM's gateway, sticky goes by the first 1024 tokens. With --model
    and --gpu, also the dollars: prefill not done, less what cached tokens still cost.

    \b
    Examples:
      tokenfab routing mooncake_conversation.jsonl --cache-tokens 500000,2000000,endless
      tokenfab routing mooncake_conversation.jsonl --policy kv_aware,sticky --replicas 32 --cache-tokens 1000000
      tokenfab routing mooncake_conversation.jsonl --model deepseek-v3 --gpu h200 --stack sglang --parallel dp8-ep8
    """
    from ..bench.gpus import GIB
    from ..costing.workload import routing_view as view

    plan = _plan(**options)
    sizes = [view.parse_cache_tokens(text) for text in cache_tokens or ()]
    with Progress("trace", as_json) as bar:
        found = view.compare(
            trace, policies, sizes, replicas, cache_bytes=[gib * GIB for gib in cache_gib or ()], seed=seed,
            prefill_weight=prefill_weight, pace=_pace(prefill_tokens_per_s, tokens_per_s_per_user), plan=plan,
            progress=bar.update,
        )  # fmt: skip
    if report is not None:
        from ..costing.report.workload_views import write_routing

        write_routing(report, found, view.routing_table(found), view.routing_lines(found))
        click.echo(f"report: {report}", err=True)
    show(
        as_json, lambda: view.routing_document(found), lambda: view.routing_table(found),
        lambda: view.routing_lines(found),
    )  # fmt: skip


def _pace(prefill_tokens_per_s: float | None, tokens_per_s_per_user: float | None) -> Pace | None:
    from ..costing.workload.routing import Pace

    if prefill_tokens_per_s is None and tokens_per_s_per_user is None:
        return None
    if prefill_tokens_per_s is None or tokens_per_s_per_user is None:
        raise ValueError(
            "prefill_tokens_per_s: expected it and --tokens-per-s-per-user, or neither; got "
            f"{prefill_tokens_per_s} and {tokens_per_s_per_user}"
        )
    return Pace(prefill_tokens_per_s, tokens_per_s_per_user)


def _plan(
    *, model: str | None, gpu: str | None, stack: str, parallel: str | None, batch: float, **options: Any
) -> Any:  # fmt: skip
    """A study at a context, for a model and a GPU; None without them."""
    from ..costing.study import study

    if model is None and gpu is None:
        return None
    if model is None or gpu is None:
        raise ValueError(f"model: expected --model and --gpu, or neither; got {model} and {gpu}")

    def plan(context: int) -> Study:
        return study(model, [gpu], [stack], [parallel] if parallel else None, [batch], context=context, **options)

    return plan
