"""What a request costs: input, of which some may be cached, and output; from one pool of GPUs, or from two.

A pool's work is GPU-seconds per request, by purpose:

    prefill   time of a pass x GPUs of an attention group / prompts of the pass; the part over cached tokens apart
    decode    output tokens / (tokens/s/GPU)

    $ per request = sum over pools of GPU-seconds x $/GPU-hour / 3600 / utilisation

In disaggregated serving the pools are separate and in balance: prefill GPUs : decode GPUs is as their work, whatever
the load, so that neither waits for the other. Every figure here pays for all GPUs, but for one that says "decode GPUs
only". Rates may be given instead of predicted (``request_pools``): tokens/s of so many GPUs, input with cached tokens
counted as its source counts them; a cached token then weighs as much as a new one. Idle time (utilisation below 1) is
shared out as work is.

Every output token is decoded, the first too. Units: seconds, dollars; $/M says of which tokens. Errors: ``ValueError``
naming the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..cost import usd_per_mtok

NEW: str = "prefill of new tokens"
CACHED_INPUT: str = "reading cached tokens"
DECODE: str = "decode"
PURPOSES: tuple[str, ...] = (NEW, CACHED_INPUT, DECODE)

GIVEN = "given"
"""Provenance of a rate that was not predicted."""

ROUNDING = 0.01
"""By how much given rates, which are rounded, may ask for more GPU-hours than were paid."""


def _whole(name: str, value: float, least: int) -> None:
    if not (least <= value < 2**53 and value == int(value)):
        raise ValueError(f"{name}: expected a whole number of at least {least}; got {value}")


def positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive number; got {value}")
    return value


@dataclass(frozen=True)
class Request:
    """Tokens of a request, or of all requests of a time. ``cached_tokens`` are part of ``input_tokens``.

    Raises:
        ValueError: not whole, no new input, no output.
    """

    input_tokens: int
    cached_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        _whole("input_tokens", self.input_tokens, 1)
        _whole("cached_tokens", self.cached_tokens, 0)
        _whole("output_tokens", self.output_tokens, 1)
        if self.cached_tokens >= self.input_tokens:
            raise ValueError(
                f"cached_tokens: expected fewer than the {self.input_tokens} input tokens, the last of which is always "
                f"computed; got {self.cached_tokens}"
            )

    @property
    def new_tokens(self) -> int:
        return self.input_tokens - self.cached_tokens

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def context(self) -> int:
        """Cached tokens of its decode steps on average."""
        return max(1, round(self.input_tokens + self.output_tokens / 2))

    def tokens_of(self, purpose: str) -> int:
        return {NEW: self.new_tokens, CACHED_INPUT: self.cached_tokens, DECODE: self.output_tokens}[purpose]


@dataclass(frozen=True)
class Bill:
    """Dollars of a request by purpose, and over every denominator. All GPUs are paid, unless a name says otherwise."""

    request: Request
    usd_of: dict[str, float]

    @cached_property
    def usd(self) -> float:
        return math.fsum(self.usd_of.values())

    def _per_mtok(self, usd: float, tokens: int) -> float:
        return usd / tokens * 1e6

    @property
    def usd_per_mtok_output(self) -> float:
        """Output bears everything."""
        return self._per_mtok(self.usd, self.request.output_tokens)

    @property
    def usd_per_mtok_total(self) -> float:
        """Over input, cached or not, and output."""
        return self._per_mtok(self.usd, self.request.total_tokens)

    @property
    def usd_per_mtok_input(self) -> float:
        """Prefill over all input, cached or not."""
        return self._per_mtok(self.usd_of[NEW] + self.usd_of[CACHED_INPUT], self.request.input_tokens)

    @property
    def usd_per_mtok_input_new(self) -> float:
        return self._per_mtok(self.usd_of[NEW], self.request.new_tokens)

    @property
    def usd_per_mtok_input_cached(self) -> float | None:
        """None where nothing is cached."""
        cached = self.request.cached_tokens
        return self._per_mtok(self.usd_of[CACHED_INPUT], cached) if cached else None

    @property
    def usd_per_mtok_output_decode_gpus_only(self) -> float:
        """Omits the GPUs, or in one pool the GPU-time, of prefill."""
        return self._per_mtok(self.usd_of[DECODE], self.request.output_tokens)

    def share(self, purpose: str) -> float:
        return self.usd_of[purpose] / self.usd

    def scaled(self, usd: float) -> Bill:
        """As much in all as was paid, shared out as this is."""
        scale = positive("usd", usd) / self.usd
        return Bill(self.request, {purpose: part * scale for purpose, part in self.usd_of.items()})


@dataclass(frozen=True)
class Pool:
    """GPUs that serve, and what one request takes of them.

    Attributes:
        name: "prefill", "decode", or "prefill and decode".
        operating_point: deployment and load of its work, for a reader.
        replica_gpus: GPUs of one replica.
        gpu_s_of: busy GPU-seconds per request by purpose; of no purpose but its own.
        shares: of these GPU-seconds by provenance.
    """

    name: str
    operating_point: str
    replica_gpus: float
    usd_per_gpu_hour: float
    price_source: str
    gpu_s_of: dict[str, float]
    shares: dict[str, float]

    def __post_init__(self) -> None:
        positive("usd_per_gpu_hour", self.usd_per_gpu_hour)
        positive("replica_gpus", self.replica_gpus)
        for purpose, value in self.gpu_s_of.items():
            positive(f"gpu_s_of {purpose}", value)

    @cached_property
    def gpu_s(self) -> float:
        return math.fsum(self.gpu_s_of.values())


@dataclass(frozen=True)
class Fleet:
    """Pools of whole replicas for a load: GPUs of each by name, and dollars per hour of all."""

    replicas: dict[str, int]
    gpus: dict[str, float]
    usd_per_hour: float
    bill: Bill


@dataclass(frozen=True)
class Paid:
    """GPUs paid for some hours, whatever they did; ``work_gpu_hours``: what the rates ask for."""

    gpus: float
    hours: float
    work_gpu_hours: float
    bill: Bill

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours


@dataclass(frozen=True)
class Serving:
    """A request served by its pools: one, or one of prefill and one of decode.

    ``utilisation``: the share of paid GPU-time in which pools are busy.
    """

    request: Request
    pools: tuple[Pool, ...]
    utilisation: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation: expected a share above 0 and up to 1; got {self.utilisation}")
        done = sorted(purpose for pool in self.pools for purpose in pool.gpu_s_of)
        wanted = sorted(purpose for purpose in PURPOSES if self.request.tokens_of(purpose))
        if done != wanted:
            raise ValueError(f"pools: expected work for {', '.join(wanted)}, once each; got {', '.join(done)}")

    @property
    def is_disaggregated(self) -> bool:
        return len(self.pools) > 1

    def gpu_s(self, *purposes: str) -> float:
        """Busy GPU-seconds per request for these purposes, of all pools."""
        return math.fsum(pool.gpu_s_of.get(purpose, 0.0) for pool in self.pools for purpose in purposes)

    @property
    def input_tokens_per_s_per_gpu(self) -> float:
        """Input tokens, cached ones counted, of a GPU while it prefills."""
        return self.request.input_tokens / self.gpu_s(NEW, CACHED_INPUT)

    @property
    def output_tokens_per_s_per_gpu(self) -> float:
        """Of a GPU while it decodes."""
        return self.request.output_tokens / self.gpu_s(DECODE)

    @property
    def prefill_gpus_per_decode_gpu(self) -> float:
        """The ratio at which pools are in balance; in one pool, that of the times it spends."""
        return self.gpu_s(NEW, CACHED_INPUT) / self.gpu_s(DECODE)

    @cached_property
    def bill(self) -> Bill:
        """Of one request."""
        usd = dict.fromkeys(PURPOSES, 0.0)
        for pool in self.pools:
            for purpose, gpu_s in pool.gpu_s_of.items():
                usd[purpose] += gpu_s * pool.usd_per_gpu_hour / 3600 / self.utilisation
        return Bill(self.request, usd)

    @property
    def shares(self) -> dict[str, float]:
        """Of the dollars, by provenance."""
        found: dict[str, float] = {}
        for pool in self.pools:
            part = pool.gpu_s * pool.usd_per_gpu_hour / 3600 / self.utilisation / self.bill.usd
            for kind, share in pool.shares.items():
                found[kind] = found.get(kind, 0.0) + part * share
        return found

    def gpus_for(self, requests_per_s: float) -> dict[str, float]:
        """GPUs of each pool that serve so many requests per second at the utilisation; not whole."""
        positive("requests_per_s", requests_per_s)
        return {pool.name: requests_per_s * pool.gpu_s / self.utilisation for pool in self.pools}

    def fleet(self, requests_per_s: float) -> Fleet:
        """Whole replicas for a load; what they idle is shared out as their work is, pool by pool."""
        needed = self.gpus_for(requests_per_s)
        # what floating point adds to an exact fit is not a replica
        replicas = {
            pool.name: max(1, math.ceil(needed[pool.name] / pool.replica_gpus - 1e-9)) for pool in self.pools
        }  # fmt: skip
        gpus = {pool.name: replicas[pool.name] * pool.replica_gpus for pool in self.pools}
        usd_of = dict.fromkeys(PURPOSES, 0.0)
        for pool in self.pools:
            usd = gpus[pool.name] * pool.usd_per_gpu_hour / 3600 / requests_per_s
            for purpose, gpu_s in pool.gpu_s_of.items():
                usd_of[purpose] += usd * gpu_s / pool.gpu_s
        bill = Bill(self.request, usd_of)
        return Fleet(replicas, gpus, bill.usd * requests_per_s * 3600, bill)

    def paid(self, gpus: float | None, hours: float | None) -> Paid:
        """GPUs that were paid for so many hours, for work that is all of ``request``; shared out as the rates say.

        Raises:
            ValueError: pools of different prices; fewer GPU-hours than the work takes, beyond rounding of rates; a
                utilisation, which the hours already say.
        """
        if self.utilisation != 1:
            raise ValueError(f"utilisation: expected none with GPUs paid for hours; got {self.utilisation}")
        if gpus is None or hours is None:
            raise ValueError(f"gpus: expected the GPUs paid for and the hours; got {gpus} and {hours}")
        prices = {pool.usd_per_gpu_hour for pool in self.pools}
        if len(prices) > 1:
            raise ValueError(f"gpus: expected one price of all pools for GPUs paid together; got {sorted(prices)}")
        hours_paid = positive("gpus", gpus) * positive("hours", hours)
        needed = math.fsum(pool.gpu_s for pool in self.pools) / 3600
        if needed > hours_paid * (1 + ROUNDING):
            raise ValueError(f"gpus: expected at least the {needed:,.0f} GPU-hours of the work; got {hours_paid:,.0f}")
        return Paid(gpus, hours, needed, self.bill.scaled(hours_paid * prices.pop()))


def given_pools(
    request: Request, input_tokens_per_s: float, output_tokens_per_s: float, gpus: float, usd_per_gpu_hour: float,
    source: str,
) -> tuple[Pool, Pool]:  # fmt: skip
    """A prefill and a decode pool from published rates of ``gpus`` GPUs each (8 for a node).

    ``input_tokens_per_s`` counts cached tokens too, as the source of such a figure must: each then weighs the same.

    Raises:
        ValueError: a rate, price or number of GPUs that is not positive.
    """
    usd_per_mtok(positive("input_tokens_per_s", input_tokens_per_s), positive("usd_per_gpu_hour", usd_per_gpu_hour))
    per_input = positive("gpus", gpus) / input_tokens_per_s
    per_output = gpus / positive("output_tokens_per_s", output_tokens_per_s)
    prefill = {NEW: request.new_tokens * per_input}
    if request.cached_tokens:
        prefill[CACHED_INPUT] = request.cached_tokens * per_input
    shared = (usd_per_gpu_hour, source, {GIVEN: 1.0})

    def pool(name: str, rate: float, what: str, gpu_s_of: dict[str, float]) -> Pool:
        price, price_source, shares = shared
        return Pool(name, f"{rate:,g} {what} tokens/s per {gpus:g} GPUs", gpus, price, price_source, gpu_s_of, shares)

    return (
        pool("prefill", input_tokens_per_s, "input (cached ones counted)", prefill),
        pool("decode", output_tokens_per_s, "output", {DECODE: request.output_tokens * per_output}),
    )


def serve_given(
    request: Request, input_tokens_per_s: float | None, output_tokens_per_s: float | None, gpus: float,
    usd_per_gpu_hour: float | None, utilisation: float = 1.0,
) -> Serving:  # fmt: skip
    """A request served at given rates; see ``given_pools``.

    Raises:
        ValueError: one of both rates, or the price, is not there or not positive.
    """
    pools = given_pools(
        request, _there("input_rate", input_tokens_per_s), _there("output_rate", output_tokens_per_s), gpus,
        _there("usd_per_gpu_hour", usd_per_gpu_hour), "given",
    )  # fmt: skip
    return Serving(request, pools, utilisation)


def _there(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"{name}: expected it with given rates; got none")
    return value
