"""Published claims as data, and their arithmetic: which stated figure follows from which, and which does not.

    $/M = $/GPU-h / (tokens/s/GPU x 3600) x 1e6      tokens/s/MW = tokens/s/GPU / kW x 1000      FLOP/$ = peak / $/GPU-h

A stated figure closes where the recomputed one, rounded to as many significant digits as the figure is written with,
is that figure. A trailing zero of a whole number ("90", "50x", "6K") is read as a digit, and the check says where the
figure would close without it. Peaks are datasheet rows (``bench.gpus``), power and prices the price book's.

Units: as each check names them. Errors: ``ValueError``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...bench.gpus import Gpu, get_gpu
from ..cost import tokens_per_s_for, tokens_per_s_per_mw, usd_per_mtok
from ..prices import Price, PriceBook

SPARSITY = 2.0
"""2:4 structured sparsity doubles a datasheet's matrix peak; no serving stack's decode runs at it."""

PLACEHOLDER = 1.2
"""GB300 over GB200 in the book of 2026-02, before anyone surveyed a price (its note says so)."""


@dataclass(frozen=True)
class Stated:
    """A figure as written: ``text`` for the reader, ``value``, and the significant ``digits`` it is written with."""

    text: str
    value: float
    digits: int

    def closes(self, recomputed: float, digits: int | None = None) -> bool:
        """Whether ``recomputed`` rounds to it."""
        digits = digits or self.digits
        return float(f"{recomputed:.{digits - 1}e}") == float(f"{self.value:.{digits - 1}e}")

    @property
    def range(self) -> tuple[float, float]:
        """The values that round to it."""
        half = 0.5 * 10.0 ** (math.floor(math.log10(self.value)) - self.digits + 1)
        return self.value - half, self.value + half

    def is_cut_from(self, recomputed: float) -> bool:
        """Whether it is ``recomputed`` with the digits after its own cut off instead of rounded."""
        unit = self.range[1] - self.range[0]
        return not self.closes(recomputed) and math.floor(recomputed / unit * (1 + 1e-12)) == round(self.value / unit)

    @property
    def ends_in_zero(self) -> bool:
        """Whether its last digit is a zero that may be no digit at all."""
        return self.digits > 1 and "." not in self.text and f"{self.value:.{self.digits - 1}e}".split("e")[0][-1] == "0"


@dataclass(frozen=True)
class ClaimedSide:
    """One column of a claim's table. ``flops_convention``: (format, sparse) by which its FLOP per dollar comes near."""

    name: str
    gpu: str
    tier: str
    book: str
    usd_per_gpu_hour: Stated
    pflops_per_usd: Stated
    flops_convention: tuple[str, bool]
    tokens_per_s_per_gpu: Stated
    tokens_per_s_per_mw: Stated
    usd_per_mtok: Stated


@dataclass(frozen=True)
class Claim:
    """A published table of two columns, and the ratios stated of them, in the order of ``RATIOS``."""

    name: str
    title: str
    date: str
    source: str
    model: str
    before: ClaimedSide
    after: ClaimedSide
    price_ratio: Stated
    flops_ratio: Stated
    throughput_ratio: Stated
    power_ratio: Stated
    cost_ratio: Stated
    not_stated: tuple[str, ...]


CLAIMS = {
    row.name: row
    for row in (
        Claim(
            "nvidia-35x", "35x lower cost per million tokens, Hopper to Blackwell", "2026-04-15",
            "NVIDIA, DeepSeek-R1, HGX H200 against GB300 NVL72; repeated in the press", "deepseek-r1",
            ClaimedSide(
                "HGX H200", "h200", "own_hyperscaler", "2026-02", Stated("1.41", 1.41, 3), Stated("2.8", 2.8, 2),
                ("fp8", True), Stated("90", 90, 2), Stated("54K", 54e3, 2), Stated("4.20", 4.20, 3),
            ),
            ClaimedSide(
                "GB300 NVL72", "gb300", "own_hyperscaler", "2026-02", Stated("2.65", 2.65, 3), Stated("5.6", 5.6, 2),
                ("fp4", False), Stated("6K", 6e3, 1), Stated("2.8M", 2.8e6, 2), Stated("0.12", 0.12, 2),
            ),
            Stated("2x", 2, 1), Stated("2x", 2, 1), Stated("65x", 65, 2), Stated("50x", 50, 2), Stated("35x", 35, 2),
            (
                "input and output lengths", "tokens/s/user on either side", "batch, parallelism and number of GPUs",
                "precision of the H200 side", "whether prefill GPUs are counted", "draft tokens and their acceptance",
            ),
        ),
    )
}  # fmt: skip


def get_claim(name: str) -> Claim:
    """The claim called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    try:
        return CLAIMS[name]
    except KeyError:
        raise ValueError(f"claim: expected one of {', '.join(CLAIMS)}; got {name!r}") from None


@dataclass(frozen=True)
class Check:
    """One stated figure against the formula. ``off``: recomputed / stated - 1; ``needs``: what would close it."""

    figure: str
    side: str
    stated: Stated
    formula: str
    recomputed: float
    needs: str = ""

    @property
    def closes(self) -> bool:
        return self.stated.closes(self.recomputed)

    @property
    def off(self) -> float:
        return self.recomputed / self.stated.value - 1

    @property
    def is_cut(self) -> bool:
        """Whether the stated figure is the recomputed one cut, not rounded."""
        return self.stated.is_cut_from(self.recomputed)

    @property
    def closes_to_one_digit(self) -> bool:
        """Where the figure's last zero is no digit."""
        return not self.closes and self.stated.ends_in_zero and self.stated.closes(self.recomputed, 1)


@dataclass(frozen=True)
class Audit:
    """``checks`` of every stated figure; ``findings``: what the conventions behind them come to, in sentences.

    ``at_prices``: (price of before, price of after, times cheaper) with the claim's own tokens/s/GPU, at every tier and
    date of the book that prices both GPUs.
    """

    claim: Claim
    checks: tuple[Check, ...]
    findings: tuple[str, ...]
    at_prices: tuple[tuple[Price, Price, float], ...]


def audit(claim: Claim, book: PriceBook | None = None) -> Audit:
    """Recompute every figure of a claim.

    Raises:
        ValueError: a GPU or price of the claim that is not in the book.
    """
    book = book or PriceBook.read()
    sides = (claim.before, claim.after)
    prices = [book.look_up(side.gpu, side.tier, side.book) for side in sides]
    checks: list[Check] = []
    for side, price in zip(sides, prices, strict=True):
        checks += _side_checks(side, get_gpu(side.gpu), price)
    findings = (*_one_rates(claim, prices), *_findings(claim, book, prices))
    return Audit(claim, (*checks, *_ratio_checks(claim)), findings, tuple(_at_prices(claim, book)))


def rates_that_close(side: ClaimedSide, price: Price) -> tuple[float, float] | None:
    """The tokens/s/GPU at which the side's $/M (at its own price) and tokens/s/MW both round to what is stated.

    Raises:
        ValueError: no power in the price book.
    """
    cheap, dear = side.usd_per_mtok.range
    kw, usd = _kw(price), side.usd_per_gpu_hour.value
    low, high = (rate * kw / 1e3 for rate in side.tokens_per_s_per_mw.range)
    low, high = max(low, tokens_per_s_for(dear, usd)), min(high, tokens_per_s_for(cheap, usd))
    return (low, high) if low < high else None


def _kw(price: Price) -> float:
    if price.kw_per_gpu is None:
        raise ValueError(f"kw_per_gpu: expected the power of {price.gpu} in the book {price.book}; got none")
    return price.kw_per_gpu


def _one_rates(claim: Claim, prices: list[Price]) -> list[str]:
    sides = (claim.before, claim.after)
    spans = [rates_that_close(side, price) for side, price in zip(sides, prices, strict=True)]
    lines = [
        f"{side.name}: "
        + (
            f"$/M and tokens/s/MW both close from {span[0]:,.1f} to {span[1]:,.1f} tokens/s/GPU, which is "
            f"{stated.text} to one digit"
            if span and stated.closes(span[0], 1) and stated.closes(span[1], 1)
            else f"no tokens/s/GPU near {stated.text} closes both $/M and tokens/s/MW"
        )
        for side, span in zip(sides, spans, strict=True)
        for stated in (side.tokens_per_s_per_gpu,)
    ]
    if spans[0] and spans[1]:
        low, high = spans[1][0] / spans[0][1], spans[1][1] / spans[0][0]
        is_within = low <= claim.throughput_ratio.range[1] and high >= claim.throughput_ratio.range[0]
        lines.append(
            f"with these, tokens/s/GPU grow {low:.1f} to {high:.1f} times: the stated {claim.throughput_ratio.text} "
            + ("closes" if is_within else "does not close")
        )
    return lines


def _side_checks(side: ClaimedSide, gpu: Gpu, price: Price) -> list[Check]:
    usd, rate, kw = side.usd_per_gpu_hour.value, side.tokens_per_s_per_gpu.value, _kw(price)
    implied = tokens_per_s_for(side.usd_per_mtok.value, usd)
    name, sparse = side.flops_convention
    needed_rate = side.tokens_per_s_per_mw.value * kw / 1e3
    needed_kw = rate / side.tokens_per_s_per_mw.value * 1e3
    peak = f"{name.upper()} {'with' if sparse else 'without'} sparsity"
    return [
        Check("$/GPU-h", side.name, side.usd_per_gpu_hour, f"price book {price.book}, {price.tier}",
              price.usd_per_gpu_hour),
        Check("PFLOP/s per $/h", side.name, side.pflops_per_usd, f"{peak} / $/GPU-h",
              pflops_per_usd(gpu, name, sparse, usd)),
        Check("$/M tokens", side.name, side.usd_per_mtok, "$/GPU-h / tokens/s/GPU", usd_per_mtok(rate, usd),
              f"{implied:,.1f} tokens/s/GPU"),
        Check("tokens/s/GPU", side.name, side.tokens_per_s_per_gpu, "$/GPU-h / $/M", implied),
        Check("tokens/s/MW", side.name, side.tokens_per_s_per_mw, f"tokens/s/GPU / {kw:g} kW (price book)",
              tokens_per_s_per_mw(rate, kw), f"{needed_rate:,.1f} tokens/s/GPU, or {needed_kw:.2f} kW"),
    ]  # fmt: skip


def pflops_per_usd(gpu: Gpu, rate: str, sparse: bool, usd_per_gpu_hour: float) -> float:
    """Datasheet PFLOP/s per dollar of an hour.

    Raises:
        ValueError: a price that is not positive, a rate that the GPU lacks.
    """
    if not usd_per_gpu_hour > 0:
        raise ValueError(f"usd_per_gpu_hour: expected a positive number; got {usd_per_gpu_hour}")
    return gpu.matrix_flops_per_s(rate) * (SPARSITY if sparse else 1.0) / 1e15 / usd_per_gpu_hour


def _ratio_checks(claim: Claim) -> list[Check]:
    before, after = claim.before, claim.after

    def ratio(name: str) -> float:
        return getattr(after, name).value / getattr(before, name).value

    price, rate = ratio("usd_per_gpu_hour"), ratio("tokens_per_s_per_gpu")
    implied = [tokens_per_s_for(side.usd_per_mtok.value, side.usd_per_gpu_hour.value) for side in (before, after)]
    both = "both columns"
    return [
        Check("x $/GPU-h", both, claim.price_ratio, "stated figures", price),
        Check("x FLOP per $", both, claim.flops_ratio, "stated figures", ratio("pflops_per_usd")),
        Check("x tokens/s/GPU", both, claim.throughput_ratio, "stated figures", rate,
              f"{implied[1]:,.0f} / {implied[0]:.1f} = {implied[1] / implied[0]:.1f} by the stated $/M"),
        Check("x tokens/s/MW", both, claim.power_ratio, "stated figures", ratio("tokens_per_s_per_mw")),
        Check("/ $/M tokens", both, claim.cost_ratio, "stated $/M", 1 / ratio("usd_per_mtok")),
        Check("/ $/M tokens", both, claim.cost_ratio, "x tokens/s/GPU / x $/GPU-h", rate / price),
    ]  # fmt: skip


def _findings(claim: Claim, book: PriceBook, prices: list[Price]) -> list[str]:
    before, after = claim.before, claim.after
    gpus = [get_gpu(side.gpu) for side in (before, after)]
    usd = [price.usd_per_gpu_hour for price in prices]
    conventions = [
        f"{side.flops_convention[0].upper()} {'sparse' if side.flops_convention[1] else 'dense'}"
        for side in (before, after)
    ]
    dense = [
        pflops_per_usd(gpu, side.flops_convention[0], False, each)
        for gpu, side, each in zip(gpus, (before, after), usd, strict=True)
    ]
    same = [pflops_per_usd(gpu, before.flops_convention[0], False, each) for gpu, each in zip(gpus, usd, strict=True)]
    format_ = before.flops_convention[0].upper()
    found = [
        f"FLOP per $ mixes conventions: {conventions[0]} against {conventions[1]}. Dense against dense it is "
        f"{dense[0]:.2f} against {dense[1]:.2f}, {dense[1] / dense[0]:.1f}x; both in dense {format_} {same[0]:.2f} "
        f"against {same[1]:.2f}, {same[1] / same[0]:.2f}x",
    ]
    if "placeholder" in prices[1].note:
        base = book.look_up("gb200", after.tier, after.book)
        later = book.look_up(after.gpu, after.tier)
        found.append(
            f"the price of {after.name} was a {prices[1].note}: {PLACEHOLDER:g} x {base.usd_per_gpu_hour:g} = "
            f"{PLACEHOLDER * base.usd_per_gpu_hour:.3f}; surveyed on {later.date} it is {later.usd_per_gpu_hour:g}"
        )
    found.append("not stated, so not to be checked: " + ", ".join(claim.not_stated))
    return found


def _at_prices(claim: Claim, book: PriceBook) -> list[tuple[Price, Price, float]]:
    before, after = claim.before, claim.after
    rate = after.tokens_per_s_per_gpu.value / before.tokens_per_s_per_gpu.value
    theirs = {(row.tier, row.book): row for row in book.of(after.gpu)}
    found = []
    for row in book.of(before.gpu):
        other = theirs.get((row.tier, row.book))
        if other is not None:
            found.append((row, other, rate * row.usd_per_gpu_hour / other.usd_per_gpu_hour))
    return found
