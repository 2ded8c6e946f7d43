"""Searching the tiles of a kernel at one shape by measurement: successive halving, then a decision beyond the noise.

Every tile that inspection left is checked and timed briefly, the best third of them longer, and a few finalists with
full settings in several fresh processes. Each is timed beside the default tile, block by block, and judged by the ratio
of the two: clocks move both. The default is measured like any other tile and is always in the final. A tile is out once
its output was wrong. Each measurement is a record, and all decisions follow from the records: what is recorded is not
measured again, and a search that was killed goes on where it ended.

Math: gain = 1 - ratio / default's ratio, medians over processes; noise = the larger (max - min) / median of the two, or
``MAX_A_A``. Adopted: gain > noise, and every process's ratio below each of the default's.

Units: seconds. Errors: ``RuntimeError`` where a launch takes another tile than the one measured.

Source: successive halving: Jamieson and Talwalkar, AISTATS 2016; Karnin, Koren and Somekh, ICML 2013.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from ..kernels.tiles import Tile
from ..kernels.tuned import use_tuned
from .campaign import point_of
from .case import Anchor
from .device import Device, MethodUnavailable
from .gpus import Gpu
from .measurement import Measurement, Settings, num_rotated_sets
from .noise import MAX_A_A, MIN_PROCESSES, process_noise
from .record import Environment, Point, Record, environment
from .records import RecordStore
from .targets import Target
from .timing import measure
from .tune_prune import Pruned, name_of

KEPT = 3
"""One tile in so many goes on to the next round."""

MIN_KEPT = 6
"""Tiles of the second round at least: a third of few, timed briefly, would be chance."""

FINALISTS = 3
"""Beside the default."""

_FAULTS = ("check:", "floor:")
"""First words of reasons why a measurement is invalid that are the kernel's own; the others are the machine's."""

_SEED = 1 << 30
"""Of the data of the default's launches."""


@dataclass(frozen=True)
class Round:
    """``share``: of the time budget that may be spent when this round ends."""

    name: str
    settings: Settings
    share: float


ROUNDS = (
    Round("first", Settings(max_warm_up_s=1.0, budget_s=0.5, max_ci=0.02, energy_s=None), 0.5),
    Round("second", Settings(max_warm_up_s=2.0, budget_s=2.0, max_ci=0.005, energy_s=None), 0.7),
    Round("final", Settings(energy_s=None), 1.0),
)


def anchor_name(pruned: Pruned) -> str:
    return f"{pruned.target.kernel.name} {name_of(pruned.place.default)}"


AnyTile = Any
"""A ``Tile`` of tokenfab's kernels, or what stands for one in a ``Contest``: hashable."""


@dataclass(frozen=True)
class Contest:
    """What competes at one shape: ``tiles``, hashable, the default first; ``anchor`` names the default's launches."""

    target: Target
    tiles: tuple[AnyTile, ...]
    anchor: str
    fields: Callable[[AnyTile], dict[str, Any]] = asdict
    """A tile as a record's point holds it."""

    @classmethod
    def of(cls, pruned: Pruned) -> Contest:
        """The tiles that inspection left, and the default whatever inspection found."""
        default = pruned.place.default
        others = (each.tile for each in pruned.survivors if each.tile != default)
        return cls(pruned.target, (default, *others), anchor_name(pruned))


class Trials:
    """What is recorded of one target's tiles, per round: records of this kernel, GPU and software alone."""

    def __init__(
        self, contest: Contest | Pruned, gpu: Gpu, here: Environment, rounds: Sequence[Round], records: Iterable[Record]
    ) -> None:
        self._contest = contest if isinstance(contest, Contest) else Contest.of(contest)
        self._gpu, self.here, self.rounds = gpu, here, rounds
        self._tiles = list(self._contest.tiles)
        self._tile_of = {self.point(tile).key: tile for tile in self._tiles}
        self._found: dict[tuple[AnyTile, str], list[Record]] = {}
        self.skipped: dict[AnyTile, str] = {}
        for record in records:
            self.add(record)

    def point(self, tile: AnyTile) -> Point:
        return point_of(self._contest.target, self._gpu, self.here, self._contest.fields(tile))

    def add(self, record: Record) -> None:
        """Takes note of a record, if it is one of these tiles, in a round, beside the same default."""
        tile, facts = self._tile_of.get(record.point.key), record.measurement
        there, here = ((e.name, e.driver, e.cuda, e.torch, e.triton) for e in (record.environment, self.here))
        if tile is None or there != here or facts.anchor != self._contest.anchor:
            return
        for each in self.rounds:
            if facts.settings == each.settings:
                self._found.setdefault((tile, each.name), []).append(record)

    def records(self, tile: AnyTile, of: Round) -> list[Record]:
        return self._found.get((tile, of.name), [])

    def num_processes(self, tile: AnyTile, of: Round) -> int:
        """Processes with a time: what an unsteady machine made invalid is measured again by the next run."""
        return len({record.process for record in self.records(tile, of) if record.time_s is not None})

    def fault(self, tile: AnyTile) -> str:
        """Why a tile is out for good: its output was wrong, or too fast to be true, or it does not fit; "" for none."""
        every = (record for each in self.rounds for record in self.records(tile, each))
        reasons = (reason for record in every for reason in record.invalid)
        return next((reason for reason in reasons if reason.startswith(_FAULTS)), "") or self.skipped.get(tile, "")

    def ratios(self, tile: AnyTile, of: Round) -> list[float]:
        """To the default beside it, one per record."""
        return [record.anchor_ratio for record in self.records(tile, of) if record.anchor_ratio is not None]

    # -- who goes on -------------------------------------------------------------------------------

    def ranking(self, tiles: Iterable[AnyTile], of: Round) -> list[AnyTile]:
        """Those of ``tiles`` that have a time in this round, the fastest first."""
        timed = [tile for tile in tiles if self.ratios(tile, of) and not self.fault(tile)]
        return sorted(timed, key=lambda tile: median(self.ratios(tile, of)))

    def entrants(self, index: int) -> list[AnyTile]:
        """The tiles of a round, the default first, by what the rounds before it found."""
        tiles, last = self._tiles, len(self.rounds) - 1
        for number in range(index):
            ranked = self.ranking(tiles[1:], self.rounds[number])
            count = FINALISTS if number + 1 == last else max(MIN_KEPT, -(-len(ranked) // KEPT))
            tiles = [tiles[0], *ranked[:count]]
        return tiles


# -- measuring -------------------------------------------------------------------------------------


def default_anchor(pruned: Pruned, l2_bytes: int, buffers_on: Any = "cuda") -> Anchor:
    """The same kernel at the same shape under its default tile, on buffers of its own that rotate out of L2."""
    kernel, shape = pruned.target.kernel, pruned.target.shape
    run, work = kernel.load(), kernel.work(shape)
    ring = num_rotated_sets(pruned.target.l2_policy, l2_bytes, work.weight_bytes, work.activation_bytes)
    with use_tuned(()):
        weights = [run.make_weights(shape, _SEED + index, buffers_on) for index in range(ring)]
        activations, output = run.make_activations(shape, _SEED, buffers_on), run.make_output(shape, buffers_on)
    num_launches = 0

    def launch() -> None:
        nonlocal num_launches
        with use_tuned(()):
            run.launch(weights[num_launches % ring], activations, output)
        num_launches += 1

    return Anchor(anchor_name(pruned), launch)


def measure_tile(
    pruned: Pruned, tile: Tile, device: Device, gpu: Gpu, anchor: Anchor, settings: Settings, buffers_on: Any = "cuda"
) -> Measurement:
    """A measurement as the bench makes it, under one tile.

    Raises:
        RuntimeError: the launch would take another tile. ``MethodUnavailable``: as ``measure``.
    """
    import torch

    from ..kernels.split_k import arch_of
    from .cases import make_case

    target = pruned.target
    row = dataclasses.replace(pruned.place.tuned(tile), arch=arch_of(torch.device(buffers_on)))
    with use_tuned([row]):
        taken = target.kernel.load().tile(target.shape, buffers_on)
        if taken != asdict(tile):
            raise RuntimeError(f"tile: expected the launch of {target.kernel.name} to take {tile}; got {taken}")
        case = make_case(target.kernel, target.shape, gpu, buffers_on)
        return measure(case, device, l2_policy=target.l2_policy, anchor=anchor, settings=settings)  # pyright: ignore[reportArgumentType]


_DOES_NOT_FIT = ("OutOfMemoryError", "OutOfResources")
"""torch's and Triton's, by name: this module imports neither."""


class Searched(NamedTuple):
    """``is_whole``: no tile was left out for want of time. ``skipped``: tiles that could not be measured, and why."""

    is_whole: bool
    skipped: dict[AnyTile, str]


class Unmeasured(NamedTuple):
    """Why a tile could not be measured, where it is measured in another process."""

    reason: str


Measured = Callable[[AnyTile, Settings], Measurement | Record | Unmeasured]
"""Measures one tile; a ``Record`` is one that another process made."""


def search(
    trials: Trials, store: RecordStore, measured: Measured, *, process: int = 1,
    is_over: Callable[[float], bool] = lambda share: False,
    done: Callable[[int, int, Round, AnyTile], None] = lambda number, total, at, tile: None,
) -> Searched:  # fmt: skip
    """Measures what ``trials`` lacks, round by round, each appended to ``store``.

    Args:
        measured: measures one tile.
        process: the first one searches; all of them measure finalists that have records of fewer processes.
        is_over: whether that share of the time is spent; then the round ends with the tiles it has.
        done: called after each tile of a round with how many of them are done, measured now or before.
    """
    is_whole, last = True, len(trials.rounds) - 1
    for index, at in enumerate(trials.rounds):
        if process > 1 and index < last:  # finalists must not change between the processes of a final
            continue
        wanted = process if index == last else 1
        entrants = trials.entrants(index)
        for number, tile in enumerate(entrants, start=1):
            if trials.num_processes(tile, at) < wanted and not trials.fault(tile):
                if is_over(at.share):
                    is_whole = False
                    break
                _attempt(trials, store, tile, at, measured)
            done(number, len(entrants), at, tile)
    return Searched(is_whole, trials.skipped)


def _attempt(trials: Trials, store: RecordStore, tile: AnyTile, at: Round, measured: Measured) -> None:
    try:
        made = measured(tile, at.settings)
    except (MethodUnavailable, MemoryError) as error:
        trials.skipped[tile] = f"{type(error).__name__}: {error}"
        return
    except Exception as error:
        if type(error).__name__ not in _DOES_NOT_FIT:
            raise
        trials.skipped[tile] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return
    if isinstance(made, Unmeasured):
        trials.skipped[tile] = made.reason
        return
    record = made if isinstance(made, Record) else Record.of(trials.point(tile), made, trials.here)
    store.append(record)
    trials.add(record)


def run_search(
    pruned: Pruned, device: Device, gpu: Gpu, store: RecordStore, *, process: int = 1,
    rounds: Sequence[Round] = ROUNDS, buffers_on: Any = "cuda", is_over: Callable[[float], bool] = lambda share: False,
    done: Callable[[int, int, Round, AnyTile], None] = lambda number, total, at, tile: None,
) -> Searched:  # fmt: skip
    """``search`` on a device, with the anchor made when it is first needed. Returns and raises as ``search``."""
    trials = Trials(pruned, gpu, environment(device.properties), rounds, store.records())
    anchors: list[Anchor] = []

    def measured(tile: AnyTile, settings: Settings) -> Measurement:
        if not anchors:
            anchors.append(default_anchor(pruned, device.properties.l2_bytes, buffers_on))
        return measure_tile(pruned, tile, device, gpu, anchors[0], settings, buffers_on)

    return search(trials, store, measured, process=process, is_over=is_over, done=done)


# -- the decision ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """A finalist over its processes: medians of its time and of its ratio to the default beside it."""

    tile: AnyTile
    time_s: float
    ratio: float
    noise: float
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """What came of a search. ``gain``: relative, of ``best`` over ``default``; None where the final is not complete.

    ``adopted``: the tile to use from now on, None for the default; ``reason`` says why.
    """

    default: Timed | None
    best: Timed | None
    gain: float | None
    noise: float | None
    adopted: AnyTile | None
    reason: str

    @property
    def saved_s(self) -> float:
        """Per call, by the paired ratio at the default's time; 0 where nothing is adopted."""
        return self.default.time_s * self.gain if self.adopted and self.default and self.gain else 0.0


def _timed(trials: Trials, tile: AnyTile, processes: int) -> Timed | None:
    final = trials.rounds[-1]
    times = [record.time_s for record in trials.records(tile, final) if record.time_s is not None]
    ratios = trials.ratios(tile, final)
    if trials.fault(tile) or trials.num_processes(tile, final) < processes:
        return None
    return Timed(tile, median(times), median(ratios), process_noise(ratios), tuple(ratios))


def decide(trials: Trials, processes: int = MIN_PROCESSES) -> Verdict:
    """The verdict that the records bear out.

    Raises:
        ValueError: fewer processes than show the noise.
    """
    if processes < MIN_PROCESSES:
        raise ValueError(f"processes: expected at least {MIN_PROCESSES}; got {processes}")
    entrants = trials.entrants(len(trials.rounds) - 1)
    default = _timed(trials, entrants[0], processes)
    if default is None:
        fault = trials.fault(entrants[0]) or f"not measured in {processes} processes"
        return Verdict(None, None, None, None, None, f"nothing to compare with: the default tile: {fault}")
    others = [tile for tile in entrants[1:] if not trials.fault(tile)]
    timed = [_timed(trials, tile, processes) for tile in others]
    if None in timed:
        return Verdict(default, None, None, None, None, "the final is not complete: run again, it goes on there")
    best = min((each for each in timed if each), key=lambda each: each.ratio, default=None)
    if best is None:
        return Verdict(default, None, None, None, None, "no other tile is left")
    gain, noise = 1 - best.ratio / default.ratio, max(best.noise, default.noise, MAX_A_A)
    if gain <= 0:
        return Verdict(default, best, gain, noise, None, "the default is the fastest")
    if gain <= noise or max(best.ratios) >= min(default.ratios):
        return Verdict(default, best, gain, noise, None, f"the gain of {gain:.1%} is within the noise of {noise:.1%}")
    return Verdict(default, best, gain, noise, best.tile, f"faster by {gain:.1%}, beyond the noise of {noise:.1%}")
