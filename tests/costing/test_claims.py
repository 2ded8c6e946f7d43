"""The claim's table: its figures from its own inputs to two digits where it closes, and by how much where not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.__main__ import cli
from tokenfab.bench.gpus import get_gpu
from tokenfab.costing.levers.claims import CLAIMS, Check, Stated, audit, get_claim, pflops_per_usd, rates_that_close
from tokenfab.costing.levers.claims_view import audit_document, audit_lines, verdict
from tokenfab.costing.prices import PriceBook

CLAIM = get_claim("nvidia-35x")


def check(figure: str, side: str = "both columns", index: int = 0) -> Check:
    return [each for each in audit(CLAIM).checks if (each.figure, each.side) == (figure, side)][index]


def two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def test_the_table_to_two_digits_given_its_inputs() -> None:
    """By hand: 1.41 / (93.2 x 3600) x 1e6 = 4.202; 93.2 / 1.73 kW = 53.87K/MW; 2.65 / (5940 x 3600) x 1e6 = 0.1239."""
    assert two_digits(1.41 / (93.2 * 3600) * 1e6) == 4.2
    book = PriceBook.read()
    for side, inside, outside in ((CLAIM.before, 93.2, 90.0), (CLAIM.after, 5940.0, 6100.0)):
        price = book.look_up(side.gpu, side.tier, side.book)
        assert price.kw_per_gpu is not None
        span = rates_that_close(side, price)
        assert span is not None
        assert span[0] < inside < span[1]
        for rate in (span[0] * (1 + 1e-9), inside, span[1] * (1 - 1e-9)):
            assert two_digits(side.usd_per_gpu_hour.value / (rate * 3600) * 1e6) == side.usd_per_mtok.value
            assert two_digits(rate / (price.kw_per_gpu / 1e3)) == side.tokens_per_s_per_mw.value
        both = (outside / (price.kw_per_gpu / 1e3), side.usd_per_gpu_hour.value / (outside * 3600) * 1e6)
        assert (two_digits(both[0]), two_digits(both[1])) != (side.tokens_per_s_per_mw.value, side.usd_per_mtok.value)
    assert rates_that_close(CLAIM.before, book.look_up("h200", "own_hyperscaler", "2026-02")) == pytest.approx(
        (93.144, 93.366), abs=0.001
    )
    assert rates_that_close(CLAIM.after, book.look_up("gb300", "own_hyperscaler", "2026-02")) == pytest.approx(
        (2.65 / (0.125 * 3600) * 1e6, 5985.0), rel=1e-9
    )


@pytest.mark.parametrize(
    ("figure", "side", "recomputed", "word"),
    [
        ("$/GPU-h", "HGX H200", 1.41, "closes"),
        ("$/GPU-h", "GB300 NVL72", 2.652, "closes"),
        ("PFLOP/s per $/h", "HGX H200", 3.958 / 1.41, "closes"),
        ("PFLOP/s per $/h", "GB300 NVL72", 15 / 2.65, "cut, not rounded"),
        ("$/M tokens", "HGX H200", 4.35185, "does not close"),
        ("$/M tokens", "GB300 NVL72", 0.122685, "closes"),
        ("tokens/s/GPU", "HGX H200", 93.2540, "only to one digit"),
        ("tokens/s/GPU", "GB300 NVL72", 6134.26, "closes"),
        ("tokens/s/MW", "HGX H200", 52023.1, "does not close"),
        ("tokens/s/MW", "GB300 NVL72", 2857142.9, "cut, not rounded"),
        ("x $/GPU-h", "both columns", 1.87943, "closes"),
        ("x FLOP per $", "both columns", 2.0, "closes"),
        ("x tokens/s/GPU", "both columns", 66.6667, "does not close"),
        ("x tokens/s/MW", "both columns", 51.8519, "only to one digit"),
        ("/ $/M tokens", "both columns", 35.0, "closes"),
    ],
)
def test_every_figure_recomputed(figure: str, side: str, recomputed: float, word: str) -> None:
    found = check(figure, side)
    assert found.recomputed == pytest.approx(recomputed, rel=2e-5)
    assert verdict(found) == word
    assert found.off == pytest.approx(recomputed / found.stated.value - 1, abs=2e-5)


def test_what_would_close_them() -> None:
    assert check("$/M tokens", "HGX H200").needs == "93.3 tokens/s/GPU"
    assert check("tokens/s/MW", "HGX H200").needs == "93.4 tokens/s/GPU, or 1.67 kW"
    assert check("tokens/s/MW", "GB300 NVL72").needs == "5,880.0 tokens/s/GPU, or 2.14 kW"
    assert check("/ $/M tokens", index=1).recomputed == pytest.approx(6000 / 90 / (2.65 / 1.41))


def test_conventions_price_and_silence_are_said() -> None:
    text = "\n".join(audit_lines(audit(CLAIM)))
    assert "FP8 sparse against FP4 dense. Dense against dense it is 1.40 against 5.66, 4.0x" in text
    assert "both in dense FP8 1.40 against 1.89, 1.34x" in text
    assert "placeholder in the source: 1.2 x GB200: 1.2 x 2.21 = 2.652; surveyed on 2026-07-01 it is 2.31" in text
    assert "tokens/s/GPU grow 63.1 to 64.3 times: the stated 65x does not close" in text
    assert "input and output lengths, tokens/s/user on either side" in text
    assert text.startswith("9 of 16 figures close; claimed by NVIDIA, DeepSeek-R1, HGX H200 against GB300 NVL72")
    assert pflops_per_usd(get_gpu("h200"), "fp8", False, 1.41) == pytest.approx(1.4035, abs=1e-4)
    assert pflops_per_usd(get_gpu("gb300"), "fp4", False, 2.652) == pytest.approx(5.656, abs=1e-3)


def test_the_stated_rates_at_every_price_of_the_book() -> None:
    found = {(a.tier, a.book): (a.usd_per_gpu_hour, b.usd_per_gpu_hour, x) for a, b, x in audit(CLAIM).at_prices}
    assert len(found) == 6
    assert found["rent_3yr", "2026-07"] == (2.9, 5.0, pytest.approx(6000 / 90 / (5.0 / 2.9)))
    assert found["rent_3yr", "2026-02"][2] == pytest.approx(26.9, abs=0.05)
    assert found["own_hyperscaler", "2026-07"][2] == pytest.approx(35.2, abs=0.05)


@given(st.floats(1e-6, 1e9), st.integers(1, 4))
def test_a_figure_closes_within_its_range_and_not_beyond(value: float, digits: int) -> None:
    written = float(f"{value:.{digits - 1}e}")
    stated = Stated("-", written, digits)
    low, high = stated.range
    half = (high - low) / 2
    assert stated.closes(value)
    assert stated.closes(written + 0.98 * half)
    assert not stated.closes(written + 1.02 * half)
    assert stated.is_cut_from(written + 1.5 * half)
    assert not stated.is_cut_from(written + 2.1 * half)
    assert not stated.is_cut_from(written)


def test_a_zero_that_may_be_no_digit() -> None:
    assert Stated("90", 90, 2).ends_in_zero
    assert not Stated("4.20", 4.2, 3).ends_in_zero
    assert not Stated("65x", 65, 2).ends_in_zero
    assert not Stated("6K", 6e3, 1).ends_in_zero


def test_a_claim_whose_rates_agree_closes_and_one_without_power_says_so() -> None:
    before = replace(CLAIM.before, tokens_per_s_per_gpu=Stated("93.2", 93.2, 3))
    found = audit(replace(CLAIM, before=before))
    of_side = [each for each in found.checks if each.side == "HGX H200"]
    assert [verdict(each) for each in of_side if each.figure in ("$/M tokens", "tokens/s/MW")] == ["closes"] * 2
    apart = replace(CLAIM.before, tokens_per_s_per_mw=Stated("60K", 60e3, 2))
    lines = audit(replace(CLAIM, before=apart)).findings
    assert lines[0] == "HGX H200: no tokens/s/GPU near 90 closes both $/M and tokens/s/MW"
    book = PriceBook(tuple(replace(row, kw_per_gpu=None) for row in PriceBook.read().prices))
    with pytest.raises(ValueError, match="kw_per_gpu: expected the power of h200 in the book 2026-02; got none"):
        audit(CLAIM, book)
    with pytest.raises(ValueError, match="usd_per_gpu_hour: expected a positive number; got 0"):
        pflops_per_usd(get_gpu("h200"), "fp8", False, 0)


def test_command_prints_the_audit() -> None:
    result = CliRunner().invoke(cli, ["explain", "--claim", "nvidia-35x"])
    assert result.exit_code == 0, result.output
    assert "9 of 16 figures close" in result.output
    document = json.loads(CliRunner().invoke(cli, ["explain", "--claim", "nvidia-35x", "--json"]).output)
    assert document == json.loads(json.dumps(audit_document(audit(CLAIM)), allow_nan=False))
    assert len(document["checks"]) == 16
    assert all(math.isfinite(each["recomputed"]) for each in document["checks"])
    wrong = CliRunner().invoke(cli, ["explain", "--claim", "amd-40x"])
    assert wrong.exit_code == 2
    assert wrong.output == f"error: claim: expected one of {', '.join(CLAIMS)}; got 'amd-40x'\n"
