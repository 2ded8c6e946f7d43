"""The price book: both surveys to the cent, and no price that is not there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tokenfab.costing.prices import PriceBook, stated_price

# own hyperscaler / own neocloud / 3-year rent, kW per GPU; SemiAnalysis InferenceX, early 2026 and July 2026
BOOKS = {
    "2026-02": {
        "h100": (1.30, 1.69, 1.30, 1.73), "h200": (1.41, 1.74, 1.60, 1.73), "b200": (1.95, 2.34, 2.90, 2.17),
        "b300": (2.34, 2.808, 3.48, 2.17), "gb200": (2.21, 2.75, 3.30, 2.10), "gb300": (2.652, 3.30, 3.96, 2.10),
        "mi300x": (1.12, 1.40, 1.55, 1.79), "mi355x": (1.48, 1.90, 2.10, 2.65),
    },
    "2026-07": {
        "h100": (1.17, 1.55, 2.00, 1.37), "h200": (1.22, 1.59, 2.90, 1.37), "b200": (1.73, 2.07, 3.70, 1.71),
        "b300": (2.26, 2.52, 4.25, 1.90), "gb200": (1.86, 2.26, 4.00, 1.87), "gb300": (2.31, 2.79, 5.00, 2.12),
        "mi300x": (0.95, 1.16, 1.30, 1.39), "mi355x": (1.50, 2.09, 2.90, 2.09),
        "rtx_pro_6000": (0.68, 0.75, 0.52, 0.975),
    },
}  # fmt: skip
TIERS = ("own_hyperscaler", "own_neocloud", "rent_3yr")


@pytest.mark.parametrize("book", BOOKS)
def test_both_books_to_the_cent(book: str) -> None:
    prices = PriceBook.read()
    for gpu, (*usd, kw) in BOOKS[book].items():
        found = [prices.look_up(gpu, tier, book) for tier in TIERS]
        assert [row.usd_per_gpu_hour for row in found] == usd
        assert {row.kw_per_gpu for row in found} == {kw}
        assert all(row.source and row.date.startswith(book) for row in found)
    assert len([row for row in prices.prices if row.book == book]) == 3 * len(BOOKS[book])


def test_newest_book_is_the_default() -> None:
    assert PriceBook.read().look_up("gb300", "rent_3yr").usd_per_gpu_hour == 5.00


def test_placeholders_of_the_source_say_so() -> None:
    noted = {(row.gpu, row.book) for row in PriceBook.read().prices if "placeholder" in row.describe()}
    assert noted == {("b300", "2026-02"), ("gb300", "2026-02")}


def test_r27_missing_price_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"price: no rent_3yr price for l40s; known: none\. Give --usd-per-gpu-hour"):
        PriceBook.read().look_up("l40s")
    with pytest.raises(
        ValueError, match=r"no spot price for h100; known: own_hyperscaler \(2026-02\), own_hyperscaler"
    ):
        PriceBook.read().look_up("h100", "spot")
    with pytest.raises(ValueError, match="no rent_3yr in book 1999-01 price for h100"):
        PriceBook.read().look_up("h100", "rent_3yr", "1999-01")


@pytest.mark.parametrize("value", [0, -2.0, math.nan, math.inf])
def test_r27_stated_price_must_be_positive(value: float) -> None:
    with pytest.raises(ValueError, match="usd_per_gpu_hour: expected a positive number"):
        stated_price("h100", value)


BOOK = '[[book]]\nname = "mine"\ndate = "2026-11-01"\nsource = "contract"\n'
ROW = '[[price]]\nbook = "mine"\ngpu = "h100"\ntier = "rent_3yr"\nusd_per_gpu_hour = 1.5\n'


def test_file_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text("schema_version = 1\n" + BOOK + ROW)
    price = PriceBook.read(path).look_up("h100")
    assert (price.usd_per_gpu_hour, price.kw_per_gpu, price.source) == (1.5, None, "contract")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema_version = 2\n" + BOOK + ROW, "schema_version: expected 1; got 2"),
        ("schema_version = 1\n" + BOOK + ROW + ROW, "mine h100 rent_3yr is given twice"),
        ("schema_version = 1\n" + BOOK + ROW.replace("h100", "h1000"), "gpu: expected one of"),
        ("schema_version = 1\n" + BOOK + ROW.replace('"mine"', '"other"'), "book: expected one of mine; got 'other'"),
        ("schema_version = 1\n" + BOOK + ROW.replace("1.5", "-1.5"), r"Expected `float` > 0"),
        ("schema_version = 1\n" + BOOK + ROW.replace("1.5", "nan"), r"Expected `float`"),
        ("schema_version = 1\n" + BOOK + ROW.replace("usd_per_gpu_hour", "usd"), "usd"),
        ("schema_version = ", "prices: "),
    ],
)
def test_r27_spoilt_file_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        PriceBook.read(path)


def test_absent_file_is_an_error() -> None:
    with pytest.raises(ValueError, match="prices: cannot read nowhere.toml: No such file"):
        PriceBook.read(Path("nowhere.toml"))
