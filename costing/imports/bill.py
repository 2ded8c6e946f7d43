"""What was served, in dollars, beside what the kernels allow at the same operating point.

    $/M output = $/h of all GPUs / (output tokens/s x 3600) x 1e6      all GPUs, prefill pools too
    $/M total  = the same over input + output tokens/s
    $/M input  = $/h of the prefill GPUs / (input tokens/s x 3600) x 1e6      only where a pool of its own prefills

The kernels' figure prices the GPU time that a token needs by published kernels, nothing else:

    decode   $/h of decode GPUs x step_s / (sequences in flight x kept tokens)      per output token
    prefill  $/h of prefill GPUs x time of a prompt's pass / output tokens          per output token

with a step of as many sequences as were in flight, each holding input + half the output. The distance is split by the
measured TPOT where the file has it, exactly:

    served = kernels' decode + decode gap + outside decode
    decode gap      = $/h of decode GPUs x (TPOT - step_s / kept) / sequences in flight
    outside decode  = served - $/h of decode GPUs x TPOT / sequences in flight

In the decode gap are host time, launch gaps, imbalance and the prefill of others in between; outside it are prefill,
queueing, ramps and a prefill pool of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cost import usd_per_mtok
from ..prices import Price
from .served import INFERENCEX, Served

if TYPE_CHECKING:
    from .allowed import Allowed


@dataclass(frozen=True)
class Bill:
    """One record with its prices. ``allowed``: what the kernels allow; ``not_allowed``: why there is no such figure."""

    served: Served
    price: Price
    prefill_price: Price
    allowed: Allowed | None = None
    not_allowed: str | None = None

    @property
    def _decode_gpus(self) -> int:
        gpus = self.served.decode_gpus
        assert gpus is not None
        return gpus

    @property
    def decode_usd_per_hour(self) -> float:
        return self._decode_gpus * self.price.usd_per_gpu_hour

    @property
    def prefill_usd_per_hour(self) -> float:
        return (self.served.prefill_gpus or 0) * self.prefill_price.usd_per_gpu_hour

    @property
    def usd_per_hour(self) -> float:
        """Of all GPUs."""
        return self.decode_usd_per_hour + self.prefill_usd_per_hour

    @property
    def usd_per_mtok_output(self) -> float:
        return usd_per_mtok(self.served.output_tokens_per_s, self.usd_per_hour)

    @property
    def usd_per_mtok_total(self) -> float:
        return usd_per_mtok(self.served.total_tokens_per_s, self.usd_per_hour)

    @property
    def usd_per_mtok_input(self) -> float | None:
        """Only where a pool of its own prefills; one pool's hour has no input share."""
        if not self.served.disaggregated:
            return None
        return usd_per_mtok(self.served.input_tokens_per_s, self.prefill_usd_per_hour)

    @property
    def usd_per_mtok_output_decode_gpus(self) -> float:
        """Without the prefill pool: what a source that divides by decode GPUs prints."""
        return usd_per_mtok(self.served.output_tokens_per_s, self.decode_usd_per_hour)

    @property
    def usd_per_mtok_output_inferencex(self) -> float | None:
        """By InferenceX's ``output_tput_per_gpu``, whose denominator in disaggregated rows is decode GPUs only."""
        if self.served.tool != INFERENCEX:
            return None
        return usd_per_mtok(self.served.stated["output_tput_per_gpu"], self.price.usd_per_gpu_hour)

    @property
    def tokens_per_s_per_user(self) -> float | None:
        """1 / mean TPOT."""
        tpot = self.served.tpot.mean_s if self.served.tpot else None
        return None if tpot is None else 1 / tpot

    @property
    def gap_usd_per_mtok(self) -> float | None:
        """Served over what the kernels allow, output tokens."""
        return None if self.allowed is None else self.usd_per_mtok_output - self.allowed.usd_per_mtok_output

    @property
    def times_allowed(self) -> float | None:
        return None if self.allowed is None else self.usd_per_mtok_output / self.allowed.usd_per_mtok_output

    @property
    def at_tpot_usd_per_mtok(self) -> float | None:
        """All in flight decode at the measured mean TPOT, nothing else happens."""
        tpot = self.served.tpot.mean_s if self.served.tpot else None
        if tpot is None or self.served.concurrency is None:
            return None
        return usd_per_mtok(self.served.concurrency / tpot, self.decode_usd_per_hour)

    @property
    def decode_gap_usd_per_mtok(self) -> float | None:
        if self.allowed is None or self.at_tpot_usd_per_mtok is None:
            return None
        return self.at_tpot_usd_per_mtok - self.allowed.decode_usd_per_mtok

    @property
    def outside_decode_usd_per_mtok(self) -> float | None:
        if self.at_tpot_usd_per_mtok is None:
            return None
        return self.usd_per_mtok_output - self.at_tpot_usd_per_mtok


def bills(
    records: Sequence[Served],
    price: Callable[[str], Price],
    allow: Callable[[Served, Price, Price], Allowed] | None,
    advance: Callable[[str], None] = lambda what: None,
) -> list[Bill]:
    """Every record priced, cheapest output first. ``allow``: what the kernels allow; None not to ask.

    Raises:
        ValueError: a GPU without a price. What the kernels' figure lacks is said in the bill.
    """
    found = []
    for served in records:
        advance(served.source)
        assert served.gpu is not None
        own, prefill = price(served.gpu), price(served.prefill_gpu or served.gpu)
        allowed, reason = None, None
        if allow is not None:
            try:
                allowed = allow(served, own, prefill)
            except ValueError as error:
                reason = str(error)
        found.append(Bill(served, own, prefill, allowed, reason))
    return sorted(found, key=lambda bill: bill.usd_per_mtok_output)
