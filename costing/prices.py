"""The price book: what a GPU-hour costs, when, to whom, and who says so.

A price is a dated fact with a source and a tier, never a constant; a missing one is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from ..bench.gpus import get_gpu

SHIPPED_PRICES = Path(__file__).with_name("prices.toml")
DEFAULT_TIER = "rent_3yr"
_Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e6)]


@dataclass(frozen=True)
class Price:
    """What one GPU costs per hour. ``kw_per_gpu``: all-in power, None where the source has none."""

    gpu: str
    tier: str
    usd_per_gpu_hour: float
    kw_per_gpu: float | None
    book: str
    date: str
    source: str
    note: str = ""

    def describe(self) -> str:
        """Provenance in one line."""
        note = f" ({self.note})" if self.note else ""
        return f"{self.tier}, {self.date}: {self.source}{note}"


class _Book(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    date: str
    source: str


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    book: str
    gpu: str
    tier: str
    usd_per_gpu_hour: _Positive
    kw_per_gpu: _Positive | None = None
    note: str = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    schema_version: int
    book: list[_Book]
    price: list[_Row]


@dataclass(frozen=True)
class PriceBook:
    """All known prices."""

    prices: tuple[Price, ...]

    @classmethod
    def read(cls, path: Path | None = None) -> PriceBook:
        """The prices of a TOML file; of the shipped one for None.

        Raises:
            ValueError: unreadable, of another schema, an unknown GPU or book, a price given twice.
        """
        path = path or SHIPPED_PRICES
        try:
            raw = msgspec.toml.decode(path.read_bytes(), type=_File)
        except OSError as error:
            raise ValueError(f"prices: cannot read {path}: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"prices: {path}: {error}") from None
        if raw.schema_version != 1:
            raise ValueError(f"prices: {path}: schema_version: expected 1; got {raw.schema_version}")
        books = {book.name: book for book in raw.book}
        found: dict[tuple[str, str, str], Price] = {}
        for row in raw.price:
            if row.book not in books:
                raise ValueError(f"prices: {path}: book: expected one of {', '.join(books)}; got {row.book!r}")
            key = (row.book, get_gpu(row.gpu).name, row.tier)
            if key in found:
                raise ValueError(f"prices: {path}: {' '.join(key)} is given twice")
            book = books[row.book]
            found[key] = Price(
                key[1], row.tier, row.usd_per_gpu_hour, row.kw_per_gpu, book.name, book.date, book.source, row.note
            )
        return cls(tuple(found.values()))

    def of(self, gpu: str | None) -> list[Price]:
        """Every price of one GPU; of all for None.

        Raises:
            ValueError: an unknown GPU, or one without a price.
        """
        name = get_gpu(gpu).name if gpu else None
        found = [row for row in self.prices if name in (None, row.gpu)]
        if not found:
            raise ValueError(f"price: no price for {name} in the book")
        return found

    def look_up(self, gpu: str, tier: str = DEFAULT_TIER, book: str | None = None) -> Price:
        """The price of ``gpu`` in ``tier``, from the newest book that has it or from ``book``.

        Raises:
            ValueError: no such price; the message lists what there is for this GPU.
        """
        found = [row for row in self.prices if row.gpu == gpu and row.tier == tier and book in (None, row.book)]
        if found:
            return max(found, key=lambda row: row.date)
        known = sorted({f"{row.tier} ({row.book})" for row in self.prices if row.gpu == gpu})
        wanted = f"{tier}" + (f" in book {book}" if book else "")
        raise ValueError(
            f"price: no {wanted} price for {gpu}; known: {', '.join(known) or 'none'}. Give --usd-per-gpu-hour, "
            "or add a row to a price file and pass it with --prices"
        )


def price_lookup(
    usd_per_gpu_hour: float | None = None, tier: str = DEFAULT_TIER, book: str | None = None,
    price_file: Path | None = None,
) -> Callable[[str], Price]:  # fmt: skip
    """A GPU's name to its price: the stated one, or the book's.

    Raises:
        ValueError: an unreadable price file now; a missing price when it is asked for.
    """
    if usd_per_gpu_hour is not None:
        return lambda gpu: stated_price(gpu, usd_per_gpu_hour)
    prices = PriceBook.read(price_file)
    return lambda gpu: prices.look_up(gpu, tier, book)


def stated_price(gpu: str, usd_per_gpu_hour: float) -> Price:
    """A price the user gave.

    Raises:
        ValueError: not a positive number.
    """
    if not 0 < usd_per_gpu_hour < float("inf"):
        raise ValueError(f"usd_per_gpu_hour: expected a positive number; got {usd_per_gpu_hour}")
    return Price(gpu, "stated", usd_per_gpu_hour, None, "command line", "now", "given on the command line")
