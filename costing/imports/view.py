"""Bills for people and for machines: one table of prices, one of the distance to the kernels, and one document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ...bench.decode_plan import OMITTED
from ...bench.prefill_plan import OMITTED as PREFILL_OMITTED
from ...bench.tables import number, plain_table
from ..sweep import Parallel
from .bill import Bill
from .served import INFERENCEX, Served, Spread

SCHEMA_VERSION = 1


def _usd(value: float | None) -> str:
    """Dollars per million tokens: three significant digits from a cent on."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.2f}" if size >= 10 else f"{value:.3f}" if size >= 0.1 else f"{value:.4f}"


def _ms(spread: Spread | None) -> str:
    return "-" if spread is None or spread.mean_s is None else number(spread.mean_s * 1e3)


def _gpus(served: Served) -> str:
    if served.disaggregated:
        return f"{served.prefill_gpus} + {served.decode_gpus} {served.gpu}"
    return f"{served.num_gpus} {served.gpu}"


def _failed(served: Served) -> str:
    return "?" if served.failed is None else str(served.failed)


def _label(served: Served) -> str:
    """The file's own name; where it lies is in the document."""
    return served.source.rsplit("/", 1)[-1]


def cost_table(bills: Sequence[Bill]) -> Table:
    """What was served, cheapest first. GPUs: prefill + decode where they are pools of their own."""
    pools = any(bill.served.disaggregated for bill in bills)
    public = any(bill.served.tool == INFERENCEX for bill in bills)
    columns = [
        "result", "model", "GPUs", "in / out", "in flight", "out tok/s", "tok/s/user", "TTFT ms", "failed", "$/GPU-h",
        "$/M output", "$/M total",
    ]  # fmt: skip
    columns += ["$/M input"] * pools + ["$/M out InferenceX"] * public
    rows = []
    for bill in bills:
        served = bill.served
        row = [
            _label(served), served.known_model or served.model or "-", _gpus(served),
            f"{number(served.input_tokens_mean, 4)} / {number(served.output_tokens_mean, 4)}",
            number(served.concurrency), number(served.output_tokens_per_s, 4), number(bill.tokens_per_s_per_user),
            _ms(served.ttft), _failed(served), f"{bill.price.usd_per_gpu_hour:.2f}", _usd(bill.usd_per_mtok_output),
            _usd(bill.usd_per_mtok_total),
        ]  # fmt: skip
        row += [_usd(bill.usd_per_mtok_input)] * pools + [_usd(bill.usd_per_mtok_output_inferencex)] * public
        rows.append(row)
    title = "Served: dollars per million tokens over all GPUs" + (" (input: prefill GPUs alone)" if pools else "")
    return plain_table(title + ", cheapest output first", columns, rows, left=2)


def distance_table(bills: Sequence[Bill]) -> Table:
    """What the kernels allow at the same operating point, and where the rest of the price is."""
    rows, kinds = [], list[str]()
    for bill in bills:
        found, served = bill.allowed, bill.served
        if found is None:
            continue
        deployment = found.step.deployment
        shares = found.coverage()
        kinds = list(shares)
        rows.append(
            (
                _label(served),
                f"{found.step.stack} {Parallel.of(deployment)} {deployment.precision.name}",
                f"{deployment.sequences} x {deployment.context}",
                f"{found.step.step_s / deployment.kept_tokens_per_step * 1e3:.2f}",
                _ms(served.tpot),
                _usd(bill.usd_per_mtok_output),
                _usd(found.decode_usd_per_mtok),
                _usd(found.prefill_usd_per_mtok),
                _usd(bill.decode_gap_usd_per_mtok),
                _usd(bill.outside_decode_usd_per_mtok),
                _usd(bill.gap_usd_per_mtok),
                number(bill.times_allowed),
                "/".join(f"{share:.0%}" for share in shares.values()),
            )
        )
    short = {"measured": "meas", "interpolated": "interp", "modelled": "model"}
    columns = (
        "result", "kernels", "seqs x context", "step ms", "TPOT ms", "served", "decode", "prefill", "decode gap",
        "outside", "gap", "x", "/".join(short.get(kind, kind) for kind in kinds),
    )  # fmt: skip
    title = "Distance to the kernels, $/M output tokens, all GPUs: served = decode + decode gap + outside decode; "
    return plain_table(title + "gap = served - decode - prefill; step per kept token", columns, rows, left=2)


def omitted(bills: Sequence[Bill]) -> tuple[str, ...]:
    """What the kernels' figures, where there are any, leave out: prefill only where one of them is of decode only."""
    found = [bill.allowed for bill in bills if bill.allowed is not None]
    if not found:
        return ()
    if any(one.prefill is None for one in found):
        return OMITTED
    of_decode = (text for text in OMITTED if not text.startswith("prefill"))
    return tuple(dict.fromkeys((*of_decode, *PREFILL_OMITTED)))


def notes(bills: Sequence[Bill]) -> list[str]:
    """What the tables' figures mean, once each."""
    tools = dict.fromkeys(bill.served.tool for bill in bills)
    lines = [
        f"read as {tool}: {', '.join(_label(bill.served) for bill in bills if bill.served.tool == tool)}"
        for tool in tools
    ]
    for bill in bills:
        served = bill.served
        if bill.not_allowed is not None:
            lines.append(f"{_label(served)}: no figure of the kernels: {bill.not_allowed}")
        elif bill.allowed is not None:
            lines.append(f"{_label(served)}: kernels: {'; '.join(bill.allowed.notes)}")
            if bill.times_allowed is not None and bill.times_allowed < 1:
                lines.append(
                    f"{_label(served)}: served for less than the tables allow: other kernels than those of "
                    f"{bill.allowed.step.stack}, cached prefixes, or fewer sequences decoding than in flight"
                )
        if served.failed:
            lines.append(
                f"{_label(served)}: {served.failed} requests failed: their tokens do not count, their time does"
            )
        if served.tool == INFERENCEX and served.disaggregated:
            lines.append(
                f"{_label(served)}: InferenceX divides output tokens by the {served.decode_gpus} decode GPUs alone; "
                f"over all {served.num_gpus} they cost ${_usd(bill.usd_per_mtok_output)}/M"
            )
    for price in dict.fromkeys(price for bill in bills for price in (bill.price, bill.prefill_price)):
        lines.append(f"price: {price.gpu} ${price.usd_per_gpu_hour:g}/GPU-h: {price.describe()}")
    if any(bill.allowed for bill in bills):
        lines.append("decode gap: TPOT over the step: host time, launch gaps, imbalance, the prefill of others between")
        lines.append("outside decode: prefill, queueing, ramps, a prefill pool of its own")
        lines.append("left out of the kernels: " + "; ".join(omitted(bills)))
    return lines


def _spread_dict(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {
        "mean_s": spread.mean_s,
        "percentiles_s": {f"{rank:g}": value for rank, value in spread.percentiles_s.items()},
    }


def _served_dict(served: Served) -> dict[str, Any]:
    rate = served.request_rate_per_s
    plain = (
        "source", "tool", "tool_version", "model", "known_model", "gpu", "prefill_gpu", "num_gpus", "prefill_gpus",
        "decode_gpus", "tokens_per_step", "acceptance_length", "precision", "kv_format", "framework",
        "framework_version", "parallel_note", "concurrency_limit", "mean_in_flight", "estimated_in_flight",
        "duration_s", "completed", "failed", "input_tokens_mean", "output_tokens_mean", "output_tokens_per_s",
        "total_tokens_per_s", "speculative",
    )  # fmt: skip
    found = {name: getattr(served, name) for name in plain}
    found |= {
        name: str(split) if (split := getattr(served, name)) else None for name in ("parallel", "prefill_parallel")
    }
    found |= {name: _spread_dict(getattr(served, name)) for name in ("ttft", "tpot", "itl", "e2e")}
    found["request_rate_per_s"] = "unlimited" if rate == math.inf else rate
    return found | {"stated": dict(served.stated)}


def _allowed_dict(bill: Bill) -> dict[str, Any] | None:
    found = bill.allowed
    if found is None:
        return None
    deployment = found.step.deployment
    return {
        "stack": str(found.step.stack),
        "parallel": str(Parallel.of(deployment)),
        "precision": deployment.precision.name,
        "kv_format": deployment.precision.kv,
        "sequences_per_group": deployment.sequences,
        "context": deployment.context,
        "tokens_per_step": deployment.tokens_per_step,
        "kept_tokens_per_step": deployment.kept_tokens_per_step,
        "step_s": found.step.step_s,
        "prefill_pass_s": None if found.prefill is None else found.prefill.time_s,
        "prefill_prompts_per_pass": None if found.prefill is None else found.prefill.sequences,
        "decode_usd_per_mtok_output": found.decode_usd_per_mtok,
        "prefill_usd_per_mtok_output": found.prefill_usd_per_mtok,
        "usd_per_mtok_output": found.usd_per_mtok_output,
        "gap_usd_per_mtok_output": bill.gap_usd_per_mtok,
        "times_allowed": bill.times_allowed,
        "decode_gap_usd_per_mtok_output": bill.decode_gap_usd_per_mtok,
        "outside_decode_usd_per_mtok_output": bill.outside_decode_usd_per_mtok,
        "coverage": found.coverage(),
        "notes": list(found.notes),
    }


def document(bills: Sequence[Bill], refused: Sequence[str] = ()) -> dict[str, Any]:
    """One document of all bills, cheapest first."""
    return {
        "schema_version": SCHEMA_VERSION,
        "results": [
            {
                "served": _served_dict(bill.served),
                "usd_per_gpu_hour": bill.price.usd_per_gpu_hour,
                "price_source": bill.price.describe(),
                "prefill_usd_per_gpu_hour": bill.prefill_price.usd_per_gpu_hour if bill.served.disaggregated else None,
                "tokens_per_s_per_user": bill.tokens_per_s_per_user,
                "usd_per_mtok_output_all_gpus": bill.usd_per_mtok_output,
                "usd_per_mtok_total_all_gpus": bill.usd_per_mtok_total,
                "usd_per_mtok_input_prefill_gpus": bill.usd_per_mtok_input,
                "usd_per_mtok_output_inferencex": bill.usd_per_mtok_output_inferencex,
                "kernels_allow": _allowed_dict(bill),
                "no_kernels_figure": bill.not_allowed,
            }
            for bill in bills
        ],
        "omitted": list(omitted(bills)),
        "refused": list(refused),
    }
