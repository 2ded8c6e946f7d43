"""How far each kind of time may be off: quantiles of log(measured / said), taken from the published tables themselves.

    noise          the same row measured twice: +-log(a / b) / sqrt(2), both signs
    interpolation  a row left out and predicted from its neighbours (``bench.published_check``), per stack, table, axis
    beyond         the last decode row of an axis predicted by holding the efficiency of the row before it
    borrowed       a whole shape left out and modelled from the nearest other shape of its table
    roofline       every table left out: roofline / efficiency + overhead set against its rows
    replicated     rows that ran all of a group's tokens on one rank, against SGLang's wide-EP rows, by width of EP

Interpolation's check bridges about twice the gap of a real query: an upper estimate. Empirical quantiles, because on a
GPU that is left out of the calibration their 90 % interval holds 87 to 92 % of the rows (``coverage``); that of a
log-normal holds 90 to 94 % if fitted to the 95th percentile of the error, 70 to 79 % if to its median. The shipped file
``errors.json`` names the version of the data; ``write_calibration(SHIPPED_ERRORS, PublishedData(), GPUS)`` makes it.

Units: natural logarithms of time ratios. Errors: ``ValueError``. Source of all rows: ``aiconfigurator-core``.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .left_out import CAUSES, INTERPOLATION, all_errors

if TYPE_CHECKING:
    import numpy as np

    from ...bench.published import PublishedData

SHIPPED_ERRORS = Path(__file__).with_name("errors.json")
PACKAGE = "aiconfigurator-core"
SCHEMA_VERSION = 1

LEVELS = (0.005, 0.01, 0.025, *(round(0.05 * step, 2) for step in range(1, 20)), 0.975, 0.99, 0.995)
"""Probabilities of the stored quantiles; nothing is drawn beyond the outermost."""


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Quantiles of log(measured / said) at ``LEVELS``. Empty ``stack``, ``table`` or ``axis``: pooled over them."""

    cause: str
    stack: str
    table: str
    axis: str
    rows: int
    log_quantiles: tuple[float, ...]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema_version: int
    package: str
    version: str
    gpus: tuple[str, ...]
    levels: tuple[float, ...]
    coverage: dict[str, float]
    spreads: tuple[Spread, ...]


@dataclass(frozen=True)
class Calibration:
    """Spreads by cause, stack, table and axis.

    ``version``: of the published data they are from. ``coverage``: see the function of that name.
    """

    version: str
    coverage: dict[str, float]
    spreads: tuple[Spread, ...]

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, str, str], Spread]:
        return {(each.cause, each.stack, each.table, each.axis): each for each in self.spreads}

    def find(self, cause: str, stack: str = "", table: str = "", axis: str = "") -> Spread:
        """The spread of this very table and axis, else pooled over stacks, else over everything of the cause.

        Pools weigh their members alike, whatever their number of rows.

        Raises:
            ValueError: an unknown cause.
        """
        key = (cause, stack, table, axis)
        if key not in self._by_key:
            self._by_key[key] = self._pool(cause, table, axis)
        return self._by_key[key]

    def _pool(self, cause: str, table: str, axis: str) -> Spread:
        ofs = [each for each in self.spreads if each.cause == cause]
        if not ofs:
            raise ValueError(f"cause: expected one of {', '.join(CAUSES)}; got {cause!r}")
        for members, key in (
            ([each for each in ofs if (each.table, each.axis) == (table, axis)], ("", table, axis)),
            ([each for each in ofs if each.table == table], ("", table, "")),
            (ofs, ("", "", "")),
        ):
            if members:
                return Spread(cause, *key, sum(each.rows for each in members), _pooled(members))
        raise AssertionError

    @classmethod
    @lru_cache(maxsize=4)
    def read(cls, path: Path | None = None) -> Calibration:
        """The spreads of a file; of the shipped one for None.

        Raises:
            ValueError: unreadable, of another schema or other levels, quantiles that fall or are not finite.
        """
        path = path or SHIPPED_ERRORS
        try:
            raw = msgspec.json.decode(path.read_bytes(), type=_File)
        except OSError as error:
            raise ValueError(f"calibration: cannot read {path}: {error.strerror}") from None
        except msgspec.MsgspecError as error:
            raise ValueError(f"calibration: {path}: {error}") from None
        if raw.schema_version != SCHEMA_VERSION or raw.levels != LEVELS:
            raise ValueError(f"calibration: {path}: expected schema {SCHEMA_VERSION} and its levels")
        for each in raw.spreads:
            values = each.log_quantiles
            if len(values) != len(LEVELS) or any(a > b for a, b in itertools.pairwise(values)):
                raise ValueError(f"calibration: {path}: expected {len(LEVELS)} rising quantiles of {each.cause}")
        missing = set(CAUSES) - {each.cause for each in raw.spreads}
        if missing:
            raise ValueError(f"calibration: {path}: expected spreads of {', '.join(sorted(missing))}; got none")
        return cls(raw.version, raw.coverage, raw.spreads)


def _pooled(members: Sequence[Spread]) -> tuple[float, ...]:
    """Quantiles of an even mixture: each member is drawn from alike."""
    import numpy as np

    inner = np.linspace(LEVELS[0], LEVELS[-1], 1001)
    drawn = np.concatenate([np.interp(inner, LEVELS, each.log_quantiles) for each in members])
    return tuple(float(value) for value in np.quantile(drawn, LEVELS))


def spread_of(cause: str, stack: str, table: str, axis: str, errors: Sequence[np.ndarray]) -> Spread:
    """The quantiles of errors log(measured / said).

    Raises:
        ValueError: none, or one that is not finite.
    """
    import numpy as np

    found = np.concatenate(errors) if errors else np.empty(0)
    if not len(found) or not np.isfinite(found).all():
        raise ValueError(f"errors: expected finite log(measured / said) of {cause} {stack} {table}; got {len(found)}")
    quantiles = tuple(float(f"{value:.4g}") for value in np.quantile(found, LEVELS))
    return Spread(cause, stack, table, axis, len(found), quantiles)


def calibrate(data: PublishedData, gpus: Sequence[str], causes: Iterable[str] = CAUSES) -> list[Spread]:
    """Every spread of ``causes`` on ``gpus``, pooled over them."""
    found: dict[tuple[str, str, str, str], list[np.ndarray]] = defaultdict(list)
    for cause, _, stack, table, axis, errors in all_errors(data, gpus, causes):
        found[cause, stack, table, axis].append(errors)
    return [spread_of(*key, errors) for key, errors in sorted(found.items()) if sum(map(len, errors))]


def write_calibration(path: Path, data: PublishedData, gpus: Sequence[str]) -> None:
    """Write the file that ``Calibration.read`` reads."""
    spreads = calibrate(data, gpus)
    shares = {gpu: round(share, 4) for gpu, share in coverage(data, gpus).items()}
    document = _File(SCHEMA_VERSION, PACKAGE, metadata.version(PACKAGE), tuple(gpus), LEVELS, shares, tuple(spreads))
    head = {key: value for key, value in msgspec.to_builtins(document).items() if key != "spreads"}
    rows = ",\n".join(json.dumps(msgspec.to_builtins(each)) for each in spreads)
    path.write_text(json.dumps(head)[:-1] + ', "spreads": [\n' + rows + "\n]}\n")


def coverage(data: PublishedData, gpus: Sequence[str]) -> dict[str, float]:
    """Share of each GPU's held-out rows within the 5th to 95th percentile calibrated on the other GPUs.

    Interpolation only; rows of a (stack, table, axis) that no other GPU has are not counted.
    """
    import numpy as np

    found: dict[str, dict[tuple[str, str, str], list[np.ndarray]]] = {gpu: defaultdict(list) for gpu in gpus}
    for _, gpu, stack, table, axis, errors in all_errors(data, gpus, [INTERPOLATION]):
        found[gpu][stack, table, axis].append(errors)
    shares: dict[str, float] = {}
    for gpu in gpus:
        inside = total = 0
        for key, parts in found[gpu].items():
            others = [part for other in gpus if other != gpu for part in found[other].get(key, [])]
            if others:
                spread, errors = spread_of(INTERPOLATION, *key, others), np.concatenate(parts)
                low, high = np.interp([0.05, 0.95], LEVELS, spread.log_quantiles)
                inside += int(((errors >= low) & (errors <= high)).sum())
                total += len(errors)
        shares[gpu] = inside / total
    return shares
