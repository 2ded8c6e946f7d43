"""Owning against renting: the parts by hand, their sum, break-even against bisection, the book's own range."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.commands.tco import tco
from tokenfab.costing.cost import usd_per_mtok
from tokenfab.costing.levers.tco import (
    PARTS,
    Ownership,
    Power,
    break_even_capex_usd,
    break_even_utilisation,
    per_token,
    tco_document,
)
from tokenfab.costing.prices import PriceBook

H100 = Ownership("h100", 35_000, 3_500, 4, 0.07, 0.06, 80, 0.02, 0.95, Power.of_book("h100"))
"""Stated inputs of these tests; only the power is the book's (1.37 kW, 2026-07)."""


def test_parts_by_hand() -> None:
    """On round numbers: 8760 h a year, 730 a month."""
    own = Ownership("h100", 43_800, 8_760, 4, 0.1, 0.10, 73, 0.04, 0.5, Power.stated(2))
    assert own.owned_hour_parts_usd == pytest.approx(
        {
            "depreciation": (43_800 - 8_760) / 35_040,  # = 1
            "cost of capital": 0.1 * 26_280 / 8760,  # = 0.3
            "electricity": 0.2,
            "colocation": 0.2,
            "opex": 0.2,
        }
    )
    assert own.usd_per_gpu_hour == pytest.approx(1.9 / 0.5)


positive = st.floats(0.01, 1e5)


@given(positive, st.floats(0, 1), st.floats(0.1, 20), st.floats(0, 1), st.floats(0, 2), st.floats(0, 1e4),
       st.floats(0, 1), st.floats(0.01, 1), st.floats(0.01, 100))  # fmt: skip
def test_parts_sum_exactly_and_idle_hours_are_paid(
    capex: float, residual: float, years: float, rate: float, kwh: float, month: float, opex: float, sold: float,
    kw: float,
) -> None:  # fmt: skip
    own = Ownership("h100", capex, residual * capex, years, rate, kwh, month, opex, sold, Power.stated(kw))
    parts = own.parts_usd_per_gpu_hour
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == own.usd_per_gpu_hour
    assert all(part >= 0 for part in parts.values())
    busy = replace(own, utilisation=1.0)
    assert own.usd_per_gpu_hour * sold == pytest.approx(busy.usd_per_gpu_hour)


def test_h100_lands_among_the_books_own_tiers() -> None:
    """And electricity with colocation stays under a fifth, as InferenceX states."""
    tiers = [row.usd_per_gpu_hour for row in PriceBook.read().of("h100") if row.tier.startswith("own")]
    assert min(tiers) < H100.usd_per_gpu_hour < max(tiers)
    assert 0.1 < H100.energy_and_colocation_share < 0.2
    parts = H100.parts_usd_per_gpu_hour
    assert H100.energy_and_colocation_share == pytest.approx(
        (parts["electricity"] + parts["colocation"]) / H100.usd_per_gpu_hour
    )


def test_price_costs_as_any_other_and_names_every_input() -> None:
    price = H100.price()
    assert (price.gpu, price.tier, price.kw_per_gpu) == ("h100", "own_stated", 1.37)
    assert price.usd_per_gpu_hour == H100.usd_per_gpu_hour
    for words in (
        "capex_usd_per_gpu 35000", "residual_usd_per_gpu 3500", "years 4", "cost_of_capital 0.07", "usd_per_kwh 0.06",
        "colocation_usd_per_kw_month 80", "opex_share_per_year 0.02", "utilisation 0.95", "1.37 kW all-in",
        "InferenceX",
    ):  # fmt: skip
        assert words in price.describe()


def test_power_of_the_newest_book_or_of_a_server() -> None:
    assert Power.of_book("h100").kw_per_gpu == 1.37  # 2026-02 says 1.73
    assert Power.of_server(1000, cooling="air").kw_per_gpu == pytest.approx(1.3)
    assert Power.of_server(1000, cooling="liquid").kw_per_gpu == pytest.approx(1.1)
    assert Power.of_server(1275, pue=1.2).kw_per_gpu == pytest.approx(1.53)
    assert "InferenceX" in Power.of_server(1000, cooling="air").source
    with pytest.raises(ValueError, match="the price book has no power for h800"):
        Power.of_book("h800")


@given(st.floats(0.2, 20))
def test_break_even_utilisation_is_where_bisection_finds_it(rent: float) -> None:
    def saves(share: float) -> float:
        return rent - replace(H100, utilisation=share).usd_per_gpu_hour

    found = break_even_utilisation(H100, rent)
    if found is None:
        assert saves(1.0) < 0
        return
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if saves(middle) > 0 else (middle, high)
    assert found == pytest.approx(high, rel=1e-6)


def test_break_even_utilisation_does_not_depend_on_the_stated_one() -> None:
    assert break_even_utilisation(replace(H100, utilisation=0.3), 2.0) == break_even_utilisation(H100, 2.0)


def test_break_even_capex() -> None:
    capex = break_even_capex_usd(H100, 2.0)
    assert capex is not None
    assert capex > H100.capex_usd_per_gpu
    there = replace(H100, capex_usd_per_gpu=capex, residual_usd_per_gpu=0.1 * capex)
    assert there.usd_per_gpu_hour == pytest.approx(2.0)
    assert break_even_capex_usd(H100, 0.1) is None


def test_tokens_of_a_watt() -> None:
    tokens = per_token(H100, 1370)
    assert tokens["tokens_per_s_per_w"] == pytest.approx(1.0)
    assert tokens["tokens_per_s_per_mw"] == pytest.approx(1e6)
    assert tokens["joules_per_token"] == pytest.approx(1.0)
    assert tokens["usd_per_mtok"] == pytest.approx(usd_per_mtok(1370, H100.usd_per_gpu_hour))
    kwh_per_mtok = 1e6 * 1.0 / 3.6e6
    assert tokens["electricity_usd_per_mtok"] == pytest.approx(kwh_per_mtok * 0.06 / 0.95)
    assert tokens["electricity_share"] == pytest.approx(tokens["electricity_usd_per_mtok"] / tokens["usd_per_mtok"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"capex_usd_per_gpu": -1}, "capex_usd_per_gpu: expected a number of more than 0; got -1"),
        ({"capex_usd_per_gpu": 0}, "capex_usd_per_gpu"),
        ({"residual_usd_per_gpu": 35_001}, "residual_usd_per_gpu: expected a number of at least 0 and at most 35000"),
        ({"residual_usd_per_gpu": -1}, "residual_usd_per_gpu"),
        ({"years": 0}, "years: expected a number of more than 0; got 0"),
        ({"cost_of_capital": -0.1}, "cost_of_capital"),
        ({"cost_of_capital": 8}, "cost_of_capital: expected a number of at most 1; got 8"),
        ({"usd_per_kwh": math.nan}, "usd_per_kwh: .*got nan"),
        ({"colocation_usd_per_kw_month": math.inf}, "colocation_usd_per_kw_month: .*got inf"),
        ({"opex_share_per_year": -0.1}, "opex_share_per_year"),
        ({"opex_share_per_year": 2}, "opex_share_per_year: .*at most 1"),
        ({"utilisation": 0}, "utilisation: expected a number of more than 0 and at most 1; got 0"),
        ({"utilisation": 1.01}, "utilisation: .*got 1.01"),
        ({"utilisation": math.nan}, "utilisation"),
    ],
)
def test_r28_absurd_inputs_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(H100, **change)


def test_r28_absurd_powers_and_rents_are_named() -> None:
    with pytest.raises(ValueError, match="pue: expected a number of at least 1; got 0.9"):
        Power.of_server(1000, pue=0.9)
    for given_both in ({}, {"pue": 1.2, "cooling": "air"}):
        with pytest.raises(ValueError, match="pue: expected it or a cooling"):
            Power.of_server(1000, **given_both)
    with pytest.raises(ValueError, match="cooling: expected one of air, liquid; got 'oil'"):
        Power.of_server(1000, cooling="oil")
    with pytest.raises(ValueError, match="server_w_per_gpu"):
        Power.of_server(0, pue=1.2)
    with pytest.raises(ValueError, match="kw_per_gpu"):
        Power.stated(-1)
    for ask in (break_even_utilisation, break_even_capex_usd):
        with pytest.raises(ValueError, match="rent_usd_per_gpu_hour"):
            ask(H100, 0)
    with pytest.raises(ValueError, match="tokens_per_s"):
        per_token(H100, math.nan)


ARGS = ("--gpu", "gb300", "--capex-usd-per-gpu", "60000", "--residual-share", "0.1", "--years", "4",
        "--cost-of-capital", "0.08", "--usd-per-kwh", "0.07", "--colocation-usd-per-kw-month", "90",
        "--opex-share", "0.02", "--utilisation", "0.9")  # fmt: skip


def run(*args: str) -> Any:
    return CliRunner().invoke(tco, [*ARGS, *args])


def test_command_prints_parts_rents_and_tokens() -> None:
    import json

    result = run("--tokens-per-s", "6000", "--rent-usd-per-gpu-hour", "3.3", "--json")
    assert result.exit_code == 0, result.output
    own = Ownership("gb300", 60_000, 6_000, 4, 0.08, 0.07, 90, 0.02, 0.9, Power.of_book("gb300"))
    found = json.loads(result.output)
    assert found == json.loads(json.dumps(tco_document(own, {"given": 3.3}, 6000)))
    assert found["kw_per_gpu"] == 2.12
    text = " ".join(run("--tokens-per-s", "6000").output.split())
    for words in (*PARTS, "per GPU-hour sold", "rent_3yr of 2026-07", "J/token", "break-even"):
        assert words in text
    assert "placeholder" not in text
    assert "rent_3yr of 2026-02" not in text  # GB300's of that survey is a placeholder


def test_command_takes_a_servers_watts() -> None:
    assert "PUE 1.1 (liquid" in " ".join(run("--server-w", "1900", "--cooling", "liquid").output.split())
    for bad in (
        ("--cooling", "liquid"), ("--server-w", "1900"), ("--kw", "2", "--server-w", "1900", "--cooling", "air"),
        ("--utilisation", "1.2"), ("--years", "0"), ("--residual-share", "1.1"), ("--pue", "1.2"),
    ):  # fmt: skip
        assert isinstance(run(*bad).exception, ValueError), bad


def test_nothing_has_an_unsourced_default() -> None:
    for name in ("--capex-usd-per-gpu", "--residual-share", "--years", "--cost-of-capital", "--usd-per-kwh",
                 "--colocation-usd-per-kw-month", "--opex-share", "--utilisation"):  # fmt: skip
        at = ARGS.index(name)
        result = CliRunner().invoke(tco, [*ARGS[:at], *ARGS[at + 2 :]])
        assert result.exit_code == 2
        assert name in result.output
