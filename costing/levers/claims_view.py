"""Table, lines and JSON of a claim's audit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...bench.tables import number, plain_table
from .claims import Audit, Check

if TYPE_CHECKING:
    from rich.table import Table


def verdict(check: Check) -> str:
    """ "closes", or how far off."""
    if check.closes:
        return "closes"
    if check.is_cut:
        return "cut, not rounded"
    if check.closes_to_one_digit:
        return "only to one digit"
    return "does not close"


def audit_table(found: Audit) -> Table:
    claim = found.claim
    rows = [
        (
            check.figure,
            check.side,
            check.formula,
            verdict(check),
            "" if check.closes else check.needs,
            check.stated.text,
            number(check.recomputed, 4),
            f"{check.off:+.1%}",
        )
        for check in found.checks
    ]
    columns = ("figure", "side", "recomputed from", "verdict", "what would close it", "stated", "recomputed", "off")
    return plain_table(f"{claim.name}: {claim.title}", columns, rows, left=5)


def prices_table(found: Audit) -> Table:
    """The claim's tokens/s/GPU at every price of the book: how much of it is price."""
    claim = found.claim
    rows = [
        (
            before.tier,
            before.date,
            after.note or "-",
            f"{before.usd_per_gpu_hour:g}",
            f"{after.usd_per_gpu_hour:g}",
            f"{times:.1f}",
        )
        for before, after, times in found.at_prices
    ]
    title = (
        f"Times cheaper with the stated {claim.before.tokens_per_s_per_gpu.text} and "
        f"{claim.after.tokens_per_s_per_gpu.text} tokens/s/GPU, at other prices"
    )
    columns = ("tier", "date", "note", f"{claim.before.name} $/GPU-h", f"{claim.after.name} $/GPU-h", "times cheaper")
    return plain_table(title, columns, rows, left=3)


def audit_lines(found: Audit) -> list[str]:
    closed = sum(check.closes for check in found.checks)
    claimed = f"claimed by {found.claim.source}, {found.claim.date}"
    return [f"{closed} of {len(found.checks)} figures close; {claimed}", *found.findings]


def audit_document(found: Audit) -> dict[str, Any]:
    claim = found.claim
    return {
        "schema_version": 1,
        "claim": claim.name,
        "title": claim.title,
        "source": claim.source,
        "date": claim.date,
        "model": claim.model,
        "checks": [
            {
                "figure": check.figure,
                "side": check.side,
                "stated": check.stated.value,
                "stated_text": check.stated.text,
                "formula": check.formula,
                "recomputed": check.recomputed,
                "off": check.off,
                "verdict": verdict(check),
                "needs": check.needs,
            }
            for check in found.checks
        ],
        "findings": list(found.findings),
        "not_stated": list(claim.not_stated),
        "at_prices": [
            {
                "tier": before.tier,
                "date": before.date,
                "from_usd_per_gpu_hour": before.usd_per_gpu_hour,
                "to_usd_per_gpu_hour": after.usd_per_gpu_hour,
                "note": after.note,
                "times_cheaper": times,
            }
            for before, after, times in found.at_prices
        ],
    }
