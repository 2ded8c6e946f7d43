"""A comparison of routers for people and as JSON: hit rates, load, and with a model and a GPU what they save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bench.prefill_plan import OMITTED
from ...bench.tables import number, plain_table
from ..study import Study
from .routing import KV_AWARE, Pace, Routed, Router, simulate
from .routing_saving import Prefiller, Saving
from .traces import BLOCK_TOKENS, TraceFile, open_trace, whole

if TYPE_CHECKING:
    from rich.table import Table

    from .traces import Trace

ENDLESS = "endless"
DEEPSEEK_PACE = "DeepSeek's service, one 8-GPU H800 node (open-infra-index, day 6)"
GIVEN_PACE = "given"

NOT_COUNTED = (
    "answers, which a trace does not say the blocks of: in chats more would hit",
    f"prefixes that share less than a block of {BLOCK_TOKENS} tokens: more would hit",
    "blocks in use, which cannot be evicted, and those of answers, which take room: less would hit",
)


def parse_cache_tokens(text: str) -> int | None:
    """Tokens; None for ``endless``.

    Raises:
        ValueError: neither that nor a whole number of at least a block.
    """
    if text == ENDLESS:
        return None
    if not text.isdigit() or int(text) < BLOCK_TOKENS:
        raise ValueError(f"cache_tokens: expected at least the {BLOCK_TOKENS} of a block, or {ENDLESS}; got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Comparison:
    """Routers on one trace. ``savings``: one for each, empty without a model. ``pace_source``: whose pace it is."""

    path: Path
    span_s: float
    output_tokens: int
    routed: Sequence[Routed]
    pace_source: str
    prefiller: Prefiller | None = None
    savings: Sequence[Saving] = ()

    @property
    def pace(self) -> Pace:
        return self.routed[0].router.pace


def lengths_of(source: TraceFile, progress: Callable[[int, int], None]) -> Trace:
    """All but the blocks."""
    return whole(replace(chunk, block_ids=None, block_starts=None) for chunk in source.chunks(progress))


def compare(
    path: Path, policies: Sequence[str], cache_tokens: Sequence[int | None], replicas: int, *,
    cache_bytes: Sequence[float] = (), seed: int = 0, prefill_weight: float = 1.0, pace: Pace | None = None,
    plan: Callable[[int], Study] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Comparison:  # fmt: skip
    """Every policy with every size of cache. ``plan``: the study of one model, GPU, stack and parallelism at a context,
    for savings; without sizes the size is what its memory leaves, without ``pace`` that is its own. ``cache_bytes``: of
    one GPU, more sizes; with a plan only.

    Raises:
        ValueError: neither sizes nor a plan; what ``traces``, ``routing`` and ``routing_saving`` refuse.
    """
    import numpy as np

    source = open_trace(path)
    if cache_bytes and plan is None:
        raise ValueError("cache_bytes: expected a model and a GPU with it, which say what a token takes")
    for size in cache_bytes:
        if not (math.isfinite(size) and size > 0):
            raise ValueError(f"cache_bytes: expected a positive number; got {size}")
    if not cache_tokens and plan is None:
        raise ValueError("cache_tokens: expected sizes of a cache, or a model and a GPU whose memory says it")
    if not policies:
        raise ValueError("policy: expected at least one; got none")
    trace = lengths_of(source, lambda done, total: progress(done, total, "lengths"))
    prefiller, pace_source = None, GIVEN_PACE if pace else DEEPSEEK_PACE
    if plan is not None:
        mean_output = trace.output_tokens / trace.output_tokens.sum()
        context = max(1, round(float((mean_output * (trace.input_tokens + trace.output_tokens / 2)).sum())))
        prefiller = Prefiller.of(plan(context))
        cache_tokens = [*cache_tokens, *map(prefiller.tokens_in, cache_bytes)] or [prefiller.cache_tokens]
        if pace is None:
            pace = prefiller.pace(max(1, round(float(trace.input_tokens.mean()))))
            pace_source = "the model's on this GPU: prompts of the trace's mean length, alone; the decode step"
    routers = [
        Router(policy, replicas, None if size is None else size // BLOCK_TOKENS, pace or Pace(), seed, prefill_weight)
        for policy in policies
        for size in cache_tokens
    ]
    routed = simulate(source, routers, lambda done, total: progress(done, total, "routing"))
    savings: Sequence[Saving] = ()
    if prefiller is not None:
        savings = prefiller.savings(
            trace.input_tokens, trace.output_tokens, [each.cached_tokens.astype(np.int64) for each in routed]
        )
    span_s, outputs = float(trace.arrival_s[-1]), int(trace.output_tokens.sum())
    return Comparison(path, span_s, outputs, routed, pace_source, prefiller, savings)


def _tokens(blocks: int | None) -> str:
    return ENDLESS if blocks is None else f"{blocks * BLOCK_TOKENS:,}"


def routing_table(found: Comparison) -> Table:
    one = found.routed[0]
    count = one.router.replicas
    title = f"prefix cache hits of {found.path.name}: {count} replica{'s' if count > 1 else ''} with a cache each"
    columns = ["policy", "cache tokens", "hit rate", "of bound", "hit blocks", "imbalance"]
    if found.savings:
        columns += ["$/M input", "with cache", "saved", "$/M new", "$/M cached"]
    rows = []
    for index, each in enumerate(found.routed):
        row = [
            each.router.policy, _tokens(each.router.cache_blocks), f"{each.hit_rate:.1%}",
            "-" if each.of_bound is None else f"{each.of_bound:.1%}", f"{each.hit_rate_blocks:.1%}",
            f"{each.imbalance:.2f}",
        ]  # fmt: skip
        if found.savings:
            saved = found.savings[index]
            without, with_cache = saved.prefill_usd_per_mtok_input
            row += [
                number(without), number(with_cache), f"{saved.share:.1%}", number(saved.usd_per_mtok_new),
                number(saved.usd_per_mtok_cached),
            ]  # fmt: skip
        rows.append(row)
    return plain_table(title, columns, rows)


def routing_lines(found: Comparison) -> list[str]:
    one, pace = found.routed[0], found.pace
    rate = f", {(one.requests - 1) / found.span_s:.3g} requests/s" if found.span_s else ""
    lines = [
        f"{one.requests:,} requests, {one.input_tokens:,} input and {found.output_tokens:,} output tokens over "
        f"{found.span_s:,.0f} s{rate}; blocks of {BLOCK_TOKENS} tokens",
        f"bound: one endless cache for all replicas hits {one.bound:.2%} of input tokens, "
        f"{one.bound_blocks / one.blocks:.2%} of blocks",
        "hit rate: cached over all input tokens; imbalance: prefilled tokens of the busiest replica over the mean",
        f"load as routers see it, per replica: prefill {pace.prefill_tokens_per_s:,.0f} new tokens/s, decode "
        f"{pace.tokens_per_s_per_user:.3g} tokens/s per user: {found.pace_source}",
    ]
    if found.prefiller is not None:
        price, shares = found.prefiller.step.price, found.savings[0].shares
        kinds = ", ".join(f"{share:.0%} {kind}" for kind, share in shares.items())
        lines += [
            f"{found.prefiller.describe()}; a replica is one attention group",
            f"$ of prefill alone, GPU-time in use only, one prompt per pass: per million input tokens (cached or not), "
            f"per million prefilled, per million cached; {number(price.usd_per_gpu_hour)} $/GPU-h ({price.describe()})",
            f"prefill time: {kinds}; over cached tokens always modelled",
            f"not in it: {'; '.join(OMITTED)}",
        ]
    lines.append(f"not counted: {'; '.join(NOT_COUNTED)}")
    return lines


def _saving_dict(saved: Saving) -> dict[str, Any]:
    without, with_cache = saved.prefill_usd_per_mtok_input
    return {
        "prefill_usd_per_mtok_input_without_cache": without,
        "prefill_usd_per_mtok_input_with_cache": with_cache,
        "saved_usd_per_mtok_input": saved.usd_per_mtok_input,
        "saved_usd_per_mtok_output": saved.usd_per_mtok_output,
        "saved_share_of_prefill": saved.share,
        "usd_per_mtok_new": saved.usd_per_mtok_new,
        "usd_per_mtok_cached": saved.usd_per_mtok_cached,
        "saved_usd": saved.usd,
        "coverage": saved.shares,
    }


def routing_document(found: Comparison) -> dict[str, Any]:
    one, pace = found.routed[0], found.pace
    serving = None
    if found.prefiller is not None:
        price = found.prefiller.step.price
        serving = {
            "operating_point": found.prefiller.describe(),
            "usd_per_gpu_hour": price.usd_per_gpu_hour,
            "price_source": price.describe(),
            "omitted": list(OMITTED),
        }
    return {
        "schema_version": 1,
        "trace": found.path.name,
        "requests": one.requests,
        "input_tokens": one.input_tokens,
        "output_tokens": found.output_tokens,
        "span_s": found.span_s,
        "block_tokens": BLOCK_TOKENS,
        "bound_hit_rate": one.bound,
        "bound_hit_rate_blocks": one.bound_blocks / one.blocks,
        "pace": {
            "prefill_tokens_per_s": pace.prefill_tokens_per_s,
            "tokens_per_s_per_user": pace.tokens_per_s_per_user,
            "source": found.pace_source,
        },
        "serving": serving,
        "routers": [
            {
                "policy": each.router.policy,
                "replicas": each.router.replicas,
                "cache_tokens": None if each.router.cache_blocks is None else each.router.cache_blocks * BLOCK_TOKENS,
                "seed": each.router.seed,
                "prefill_weight": each.router.prefill_weight if each.router.policy == KV_AWARE else None,
                "hit_rate": each.hit_rate,
                "hit_rate_blocks": each.hit_rate_blocks,
                "of_bound": each.of_bound,
                "imbalance": each.imbalance,
                "requests_of": each.requests_of.tolist(),
                "prefilled_tokens_of": each.prefilled_tokens_of.tolist(),
                "saving": _saving_dict(found.savings[index]) if found.savings else None,
            }
            for index, each in enumerate(found.routed)
        ],
        "not_counted": list(NOT_COUNTED),
    }
