"""Dollars beside microseconds: tables, lines and documents of comparisons and gates."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console
from tokenfab.bench.compare import Compared, compare
from tokenfab.bench.gate import gate
from tokenfab.bench.places import Place
from tokenfab.costing.comparison import (
    comparison_document,
    comparison_lines,
    comparison_table,
    gate_document,
    gate_lines,
    gate_table,
)  # fmt: skip
from tokenfab.costing.kernel_price import usd_per_mtok
from tokenfab.costing.prices import PriceBook, price_lookup, stated_price
from tokenfab.tests.bench.made_samples import processes, sample, side

MODELS = ("deepseek-v3",)
PRICE = price_lookup(3.6)
"""A thousandth of a dollar per second."""


def text(table: Any) -> str:
    console = Console(width=250)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def one(factor: float = 1.1) -> Compared:
    return compare(side(processes(50e-6)), side(processes(factor * 50e-6)))


def test_a_kernels_dollars() -> None:
    """50 us x 61 calls / 64 tokens x $ 0.001 per second = $ 0.04766 per million."""
    price = stated_price("h100", 3.6)
    assert usd_per_mtok(50e-6, Place("m", "o_proj", 61, 64), price) == pytest.approx(50e-6 * 61 / 64 * 1e-3 * 1e6)
    assert usd_per_mtok(-50e-6, Place("m", "o_proj", 61, 64), price) < 0
    with pytest.raises(ValueError, match=r"^time_s: expected a finite number; got nan"):
        usd_per_mtok(float("nan"), Place("m", "o_proj", 61, 64), price)


def test_prices_are_looked_up_or_stated() -> None:
    assert price_lookup(2.5)("b200").usd_per_gpu_hour == 2.5
    assert price_lookup()("h100") == PriceBook.read().look_up("h100")
    with pytest.raises(ValueError, match="price: no "):
        price_lookup(tier="none-such")("h100")


def test_a_comparison_for_people() -> None:
    shown = text(comparison_table("title", one(), MODELS, PRICE))
    (row,) = [line for line in shown.splitlines() if line.startswith("gemm/")]
    assert row.split() == [
        "gemm/fp8_block-fp8_group", "64", "x", "7168", "x", "16384", "slower", "deepseek-v3", "o_proj", "50.00",
        "55.00", "+10.0%", "+9.5%", "to", "+10.5%", "0.2%", "0.0477", "+0.0048",
    ]  # fmt: skip
    lines = comparison_lines(one())
    assert lines[0] == "1 points: 0 same, 0 faster, 1 slower, 0 unsure"
    assert "compared by time" in lines[1]


def test_what_is_left_over_is_listed() -> None:
    compared = compare(side(processes(1.0), processes(1.0, m=16)), side(processes(1.0), processes(1.0, m=32)))
    lines = comparison_lines(compared)
    assert "only in A: gemm/fp8_block-fp8_group 16 x 7168 x 16384" in lines
    assert "only in B: gemm/fp8_block-fp8_group 32 x 7168 x 16384" in lines


def test_a_comparison_for_machines() -> None:
    document = json.loads(json.dumps(comparison_document(one(), MODELS, PRICE), allow_nan=False))
    (pair,) = document["pairs"]
    assert (pair["verdict"], pair["basis"], pair["a"]["processes"]) == ("slower", "time", 3)
    assert pair["ratio"] == pytest.approx(1.1)
    assert pair["interval"][0] < 1.1 < pair["interval"][1]
    (place,) = pair["places"]
    assert place["b_usd_per_mtok"] - place["a_usd_per_mtok"] == pytest.approx(5e-6 * 61 / 64 * 1e3, rel=1e-3)
    wrong = compare(side(processes(1.0)), side([sample(None)]))
    document = json.loads(json.dumps(comparison_document(wrong, MODELS, PRICE), allow_nan=False))
    assert (document["pairs"][0]["ratio"], document["pairs"][0]["b"]["invalid"]) == (None, ["check: wrong"])
    assert "unsure" in text(comparison_table("title", wrong, MODELS, PRICE))


def test_a_gate_names_the_kernel_and_the_dollars() -> None:
    result = gate(side(processes(50e-6), processes(20e-6, m=16)), side(processes(55e-6)), models=MODELS)
    lines = gate_lines(result, PRICE)
    assert (
        "fail: gemm/fp8_block-fp8_group 64 x 7168 x 16384 is slower: +0.0048 $/M in deepseek-v3 o_proj at 64" in lines
    )
    assert any(line.startswith("inconclusive: gemm/fp8_block-fp8_group 16 x 7168") for line in lines)
    assert (
        "fail: deepseek-v3 at 64 tokens: 1 points 0.0477 -> 0.0524 $/M (+10.0%, surely +9.5% or more; limit +1.0%"
        in "".join(lines)
    )
    assert lines[-1] == "gate: fail"
    rows = [line for line in text(gate_table("t", result, PRICE)).splitlines() if line.startswith("gemm/")]
    assert [("fail" in row, "inconclusive" in row) for row in rows] == [(True, False), (False, True)]
    assert "+0.0048" in rows[0]
    document = json.loads(json.dumps(gate_document(result, PRICE), allow_nan=False))
    assert document["result"] == "fail"
    assert document["rows"][0]["places"][0]["change_usd_per_mtok"] == pytest.approx(5e-6 * 61 / 64 * 1e3, rel=1e-3)


def test_a_gate_without_points_still_says_why() -> None:
    result = gate(side(processes(1.0)), side(processes(1.0, device="other")))
    assert gate_lines(result, PRICE)[-1] == "gate: inconclusive"
    assert "inconclusive: GPU: expected the baseline's" in gate_lines(result, PRICE)[0]
    assert json.dumps(gate_document(result, PRICE))
