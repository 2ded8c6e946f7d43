"""What an owned GPU costs per hour sold, part by part, and when owning beats renting.

Per hour owned, of 8760 a year:

    depreciation     (capex - residual) / (years x 8760)                  straight line
    cost of capital  rate x (capex + residual) / 2 / 8760                 on the mean book value
    electricity      kW x $/kWh
    colocation       kW x $/kW-month / 730
    opex             share of capex per year / 8760

each over the utilisation, the share of owned hours that is sold. kW is all-in (server, cooling, network share): stated,
from the price book, or server watts x PUE. Power is paid for every hour owned, idle ones too.

Only what has a source has a default: PUE 1.3 for air and 1.1 for liquid (SemiAnalysis InferenceX), the price book's kW.
Units: dollars, kW, hours. Errors: ``ValueError`` naming the input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..cost import joules_per_token, tokens_per_s_per_mw, usd_per_mtok
from ..prices import Price, PriceBook

HOURS_PER_YEAR = 8760
HOURS_PER_MONTH = HOURS_PER_YEAR / 12
PUE = {"air": 1.3, "liquid": 1.1}
PUE_SOURCE = "SemiAnalysis InferenceX"

DEPRECIATION, CAPITAL, ELECTRICITY, COLOCATION, OPEX = PARTS = (
    "depreciation", "cost of capital", "electricity", "colocation", "opex",
)  # fmt: skip


@dataclass(frozen=True)
class Power:
    """All-in kW of one GPU (server, cooling, network share), and where that is from."""

    kw_per_gpu: float
    source: str

    def __post_init__(self) -> None:
        _check("kw_per_gpu", self.kw_per_gpu, above=0)

    @classmethod
    def stated(cls, kw_per_gpu: float) -> Power:
        return cls(kw_per_gpu, "stated")

    @classmethod
    def of_server(cls, server_w_per_gpu: float, pue: float | None = None, cooling: str | None = None) -> Power:
        """A GPU's share of the server's watts x PUE; the PUE stated, or that of a ``cooling``.

        Raises:
            ValueError: watts not positive, a PUE below 1, neither or both of PUE and cooling.
        """
        _check("server_w_per_gpu", server_w_per_gpu, above=0)
        if (pue is None) == (cooling is None):
            raise ValueError(f"pue: expected it or a cooling of {', '.join(PUE)}; got {pue} and {cooling}")
        if cooling is not None and cooling not in PUE:
            raise ValueError(f"cooling: expected one of {', '.join(PUE)}; got {cooling!r}")
        value = PUE[cooling] if cooling is not None else pue
        assert value is not None
        _check("pue", value, least=1)
        source = f"{cooling} cooling, {PUE_SOURCE}" if cooling is not None else "stated"
        return cls(server_w_per_gpu / 1e3 * value, f"{server_w_per_gpu:g} W x PUE {value:g} ({source})")

    @classmethod
    def of_book(cls, gpu: str, book: PriceBook | None = None) -> Power:
        """The newest all-in kW of the price book.

        Raises:
            ValueError: the book has none for this GPU.
        """
        rows = [row for row in (book or PriceBook.read()).prices if row.gpu == gpu and row.kw_per_gpu is not None]
        if not rows:
            raise ValueError(f"kw_per_gpu: the price book has no power for {gpu}; give it, or server watts and a PUE")
        row = max(rows, key=lambda row: row.date)
        assert row.kw_per_gpu is not None
        return cls(row.kw_per_gpu, f"{row.date}: {row.source}")


@dataclass(frozen=True)
class Ownership:
    """What owning one GPU takes.

    Attributes:
        capex_usd_per_gpu: with its share of server and network. residual_usd_per_gpu: what it still fetches.
        years: of depreciation. cost_of_capital: per year, 0.08 for 8 %.
        opex_share_per_year: staff, repair, insurance, software as a share of capex.
        utilisation: share of owned hours sold, above 0 to 1.
    """

    gpu: str
    capex_usd_per_gpu: float
    residual_usd_per_gpu: float
    years: float
    cost_of_capital: float
    usd_per_kwh: float
    colocation_usd_per_kw_month: float
    opex_share_per_year: float
    utilisation: float
    power: Power

    def __post_init__(self) -> None:
        _check("capex_usd_per_gpu", self.capex_usd_per_gpu, above=0)
        _check("residual_usd_per_gpu", self.residual_usd_per_gpu, least=0, most=self.capex_usd_per_gpu)
        _check("years", self.years, above=0)
        for name in ("cost_of_capital", "usd_per_kwh", "colocation_usd_per_kw_month", "opex_share_per_year"):
            _check(name, getattr(self, name), least=0)
        _check("cost_of_capital", self.cost_of_capital, most=1)
        _check("opex_share_per_year", self.opex_share_per_year, most=1)
        _check("utilisation", self.utilisation, above=0, most=1)

    @property
    def owned_hour_parts_usd(self) -> dict[str, float]:
        """Dollars per hour owned, sold or not, by part."""
        capex, residual, kw = self.capex_usd_per_gpu, self.residual_usd_per_gpu, self.power.kw_per_gpu
        return {
            DEPRECIATION: (capex - residual) / (self.years * HOURS_PER_YEAR),
            CAPITAL: self.cost_of_capital * (capex + residual) / 2 / HOURS_PER_YEAR,
            ELECTRICITY: kw * self.usd_per_kwh,
            COLOCATION: kw * self.colocation_usd_per_kw_month / HOURS_PER_MONTH,
            OPEX: self.opex_share_per_year * capex / HOURS_PER_YEAR,
        }

    @property
    def parts_usd_per_gpu_hour(self) -> dict[str, float]:
        """Dollars per hour sold, by part; they sum to ``usd_per_gpu_hour``."""
        return {name: usd / self.utilisation for name, usd in self.owned_hour_parts_usd.items()}

    @property
    def usd_per_gpu_hour(self) -> float:
        return sum(self.parts_usd_per_gpu_hour.values())

    @property
    def energy_and_colocation_share(self) -> float:
        """Of the whole; InferenceX states that it is under 0.2."""
        parts = self.parts_usd_per_gpu_hour
        return (parts[ELECTRICITY] + parts[COLOCATION]) / self.usd_per_gpu_hour

    def describe(self) -> str:
        """Every input in one line."""
        values = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Power):
                values.append(f"{value.kw_per_gpu:g} kW all-in ({value.source})")
            elif field.name != "gpu":
                values.append(f"{field.name} {value:g}")
        return ", ".join(values)

    def price(self) -> Price:
        """As a price to cost with: tier ``own_stated``, every input in its source."""
        return Price(
            self.gpu, "own_stated", self.usd_per_gpu_hour, self.power.kw_per_gpu, "stated", "now",
            f"total cost of ownership per hour sold: {self.describe()}",
        )  # fmt: skip


def break_even_utilisation(ownership: Ownership, rent_usd_per_gpu_hour: float) -> float | None:
    """Share of owned hours above which owning is cheaper than renting only the hours used.

    In closed form: dollars per hour owned / rent. None where not even every hour sold is enough. A contract that is
    paid for every hour has no such point: it costs rent / utilisation, as owning does.

    Raises:
        ValueError: a rent that is not a positive number.
    """
    _check("rent_usd_per_gpu_hour", rent_usd_per_gpu_hour, above=0)
    share = sum(ownership.owned_hour_parts_usd.values()) / rent_usd_per_gpu_hour
    return share if share <= 1 else None


def break_even_capex_usd(ownership: Ownership, rent_usd_per_gpu_hour: float) -> float | None:
    """The capex per GPU at which owning costs the rent, at the stated utilisation and residual share; None where
    power and colocation alone cost more.

    Raises:
        ValueError: a rent that is not a positive number.
    """
    _check("rent_usd_per_gpu_hour", rent_usd_per_gpu_hour, above=0)
    parts = ownership.owned_hour_parts_usd
    of_capex = (parts[DEPRECIATION] + parts[CAPITAL] + parts[OPEX]) / ownership.capex_usd_per_gpu
    left = rent_usd_per_gpu_hour * ownership.utilisation - parts[ELECTRICITY] - parts[COLOCATION]
    return left / of_capex if left > 0 and of_capex > 0 else None


def per_token(ownership: Ownership, tokens_per_s_per_gpu: float) -> dict[str, float]:
    """What a rate of tokens makes of it, per GPU while it decodes.

    ``electricity_usd_per_mtok`` is the part of ``usd_per_mtok`` that is electricity, idle hours included.

    Raises:
        ValueError: a rate that is not a positive number.
    """
    rate, kw = tokens_per_s_per_gpu, ownership.power.kw_per_gpu
    electricity = ownership.parts_usd_per_gpu_hour[ELECTRICITY]
    total = usd_per_mtok(rate, ownership.usd_per_gpu_hour)
    return {
        "tokens_per_s_per_gpu": rate,
        "usd_per_mtok": total,
        "tokens_per_s_per_mw": tokens_per_s_per_mw(rate, kw),
        "tokens_per_s_per_w": tokens_per_s_per_mw(rate, kw) / 1e6,
        "joules_per_token": joules_per_token(rate, kw),
        "electricity_usd_per_mtok": total * electricity / ownership.usd_per_gpu_hour,
        "electricity_share": electricity / ownership.usd_per_gpu_hour,
    }


def tco_document(
    ownership: Ownership, rents: Mapping[str, float], tokens_per_s: float | None = None
) -> dict[str, object]:
    """The machine-readable result. ``rents``: dollars per GPU-hour by the name of who asks them."""
    return {
        "schema_version": 1,
        "gpu": ownership.gpu,
        "usd_per_gpu_hour_sold": ownership.usd_per_gpu_hour,
        "parts_usd_per_gpu_hour_sold": ownership.parts_usd_per_gpu_hour,
        "usd_per_gpu_hour_owned": sum(ownership.owned_hour_parts_usd.values()),
        "energy_and_colocation_share": ownership.energy_and_colocation_share,
        "inputs": ownership.describe(),
        "kw_per_gpu": ownership.power.kw_per_gpu,
        "rents": [
            {
                "rent": name,
                "usd_per_gpu_hour": usd,
                "break_even_utilisation": break_even_utilisation(ownership, usd),
                "break_even_capex_usd_per_gpu": break_even_capex_usd(ownership, usd),
            }
            for name, usd in rents.items()
        ],
        "tokens": None if tokens_per_s is None else per_token(ownership, tokens_per_s),
    }


def _check(
    name: str, value: float, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> None:
    bounds = [f"more than {above:g}"] if above is not None else []
    bounds += [f"at least {least:g}"] if least is not None else []
    bounds += [f"at most {most:g}"] if most is not None else []
    fits = (
        math.isfinite(value)
        and (above is None or value > above)
        and (least is None or value >= least)
        and (most is None or value <= most)
    )
    if not fits:
        raise ValueError(f"{name}: expected a number of {' and '.join(bounds)}; got {value}")
