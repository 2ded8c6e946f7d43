"""How many tokens a step that verifies drafts keeps.

    kept tokens = 1 + r1 + r1 r2 + ... + r1 r2 ... rn        n drafts, r_i the acceptance rate at position i

A draft counts only where all before it were accepted; the 1 is the token that the verify step itself makes. A measured
acceptance length is that number as a benchmark counted it: 1 + accepted / verifications. A length holds for the number
of drafts at which it was measured and for no other: nothing is interpolated or extrapolated here.

Units: tokens per sequence and step. Errors: ``ValueError`` naming the rate, length or number of drafts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_DRAFTS = 64

_GOLDEN = "SemiAnalysis InferenceX, golden distributions, coding"


@dataclass(frozen=True)
class Acceptance:
    """What is kept, and who says so.

    Attributes:
        rates: of each position in order; with ``holds_on`` the last holds for every later one too.
        lengths: measured acceptance lengths by number of drafts; used instead of rates where given.
    """

    source: str
    rates: tuple[float, ...] = ()
    lengths: Mapping[int, float] = field(default_factory=dict)
    holds_on: bool = False

    def __post_init__(self) -> None:
        if bool(self.rates) == bool(self.lengths):
            raise ValueError("acceptance: expected rates or lengths; got " + ("both" if self.rates else "neither"))
        for rate in self.rates:
            if not 0 <= rate <= 1:
                raise ValueError(f"acceptance_rate: expected a share between 0 and 1; got {rate}")
        for drafts, length in self.lengths.items():
            check_drafts(drafts)
            if not 1 <= length <= 1 + drafts:
                raise ValueError(
                    f"acceptance_length: expected 1 to {1 + drafts} tokens with {drafts} draft"
                    f"{'s' if drafts > 1 else ''}; got {length}"
                )

    @classmethod
    def of_rates(cls, rates: Sequence[float], source: str = "stated") -> Acceptance:
        """One rate for every position, or a rate per position."""
        return cls(source, tuple(rates), holds_on=len(rates) == 1)

    @classmethod
    def of_lengths(cls, drafts: Sequence[int], lengths: Sequence[float], source: str = "stated") -> Acceptance:
        """A measured length for each number of drafts.

        Raises:
            ValueError: not one length per number of drafts, or one number of drafts twice.
        """
        if len(drafts) != len(lengths) or not lengths:
            raise ValueError(
                f"acceptance_length: expected one per number of drafts ({', '.join(map(str, drafts))}); "
                f"got {', '.join(map(str, lengths)) or 'none'}"
            )
        if len(set(drafts)) != len(drafts):
            raise ValueError(f"drafts: expected different numbers; got {', '.join(map(str, drafts))}")
        return cls(source, lengths=dict(zip(drafts, lengths, strict=True)))

    def kept_tokens(self, drafts: int) -> float:
        """Tokens kept per step with so many drafts, on average.

        Raises:
            ValueError: ``drafts`` is not a whole number from 1 on, or one of which nothing is known.
        """
        check_drafts(drafts)
        if self.lengths:
            if drafts not in self.lengths:
                known = ", ".join(map(str, sorted(self.lengths)))
                raise ValueError(f"drafts: expected one with a known acceptance ({known}; {self.source}); got {drafts}")
            return self.lengths[drafts]
        if drafts > len(self.rates) and not self.holds_on:
            raise ValueError(
                f"drafts: expected at most {len(self.rates)}, of which the acceptance is known ({self.source}); "
                f"got {drafts}"
            )
        kept, product = 1.0, 1.0
        for position in range(drafts):
            product *= self.rates[min(position, len(self.rates) - 1)]
            kept += product
        return kept

    def describe(self) -> str:
        """Rates or lengths, and the source, in one line."""
        if self.lengths:
            known = ", ".join(f"{length:g} with {drafts}" for drafts, length in sorted(self.lengths.items()))
            return f"acceptance length {known} drafts ({self.source})"
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        return f"acceptance rate {rates}{' at every position' if self.holds_on else ''} ({self.source})"


def check_drafts(drafts: int) -> None:
    """Refuse a number of drafts that is none.

    Raises:
        ValueError: not a whole number between 1 and ``MAX_DRAFTS``.
    """
    if isinstance(drafts, bool) or not math.isfinite(drafts) or drafts != int(drafts) or not 1 <= drafts <= MAX_DRAFTS:
        raise ValueError(f"drafts: expected a whole number from 1 to {MAX_DRAFTS}; got {drafts}")


MEASURED: dict[str, Acceptance] = {
    "deepseek-v3-mtp-low": Acceptance("DeepSeek-V3 report: second token 85 to 90 %, the lower end", (0.85,)),
    "deepseek-v3-mtp-high": Acceptance("DeepSeek-V3 report: second token 85 to 90 %, the upper end", (0.90,)),
    "qwen3.5-397b-mtp": Acceptance(_GOLDEN, lengths={1: 1.93, 3: 3.39, 7: 5.04}),
    "glm-5.2": Acceptance(_GOLDEN, lengths={1: 1.84, 3: 2.99, 7: 3.91}),
    "deepseek-v4-pro": Acceptance(_GOLDEN, lengths={1: 1.79, 3: 2.49, 7: 2.54}),
}
"""Acceptance as others measured it; each row names who."""


def get_acceptance(name: str) -> Acceptance:
    """A row of ``MEASURED``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    try:
        return MEASURED[name.lower()]
    except KeyError:
        raise ValueError(f"acceptance: expected one of {', '.join(MEASURED)}; got {name!r}") from None
