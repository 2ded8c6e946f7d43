"""Tiles judged before any launch: compiled ahead of time, dropped for what the code shows, ranked by their floors.

Dropped: what does not compile, spills, does not fit on an SM, lacks the native matrix instruction, or is dominated:
instructions weigh, and another tile issues fewer, with no more matrix work and no fewer CTAs or bytes in flight.

Math, at a shape on a GPU of S SMs, P programs of t trips, v values per trip:
    trips of the busiest SM >= max(all trips / S, ceil(P / S) x the shortest program's, the longest program's)
    matrix = those x v x flops per value, padding included / (peak / S);  issue = those x v x instructions / (rate / S)
    bytes = each operand once / peak bandwidth, the same for every tile
    floor = the largest of the three: no launch of this tile is faster at these clocks. It is no time.
Units: seconds, bytes. Errors: ``ValueError`` as ``tune_space.place_of``; ``RuntimeError`` without Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..kernels import attention_points, grouped_points, matmul_points, mla_points
from ..kernels.compile_point import CompilePoint
from ..kernels.moe_work import draw_ids, local_experts
from ..kernels.registry import Shape
from ..kernels.tiles import Tile
from .gpus import Gpu
from .inspect import Compile, Inspection, floors, inspect
from .sm_limits import SM_LIMITS, issue_rate
from .targets import Target
from .tune_space import GROUP, Dropped, Place, candidates, place_of, seen_tokens

DOMINATED_BY = 0.98
"""Issue of a tile that dominates another, at most: a difference of 2 % is none."""

ISSUE_MATTERS = 0.5
"""Share of the other floors from which on instructions can decide: with less, they hide behind the waits for memory."""


@dataclass(frozen=True)
class Candidate:
    """A tile that compiles cleanly, and its floors at the shape on the GPU.

    Attributes:
        inspections: of each way that the shape compiles it, those of the main matmul first.
        bytes_s, matrix_s, issue_s: floors of one call; issue_s None where the GPU's clock has no source.
        programs, waves: of the largest launch; waves = programs / (SMs x CTAs per SM).
        bytes_in_flight: per SM, by the CTAs that fit and are there.
    """

    tile: Tile
    inspections: tuple[Inspection, ...]
    bytes_s: float
    matrix_s: float
    issue_s: float | None
    programs: int
    ctas_per_sm: int
    waves: float
    bytes_in_flight: int

    @property
    def floor_s(self) -> float:
        return max(self.bytes_s, self.matrix_s, self.issue_s or 0.0)

    @property
    def binds(self) -> str:
        known = {"bytes": self.bytes_s, "matrix": self.matrix_s, "issue": self.issue_s or 0.0}
        return max(known, key=lambda kind: known[kind])

    @property
    def instructions_per_value(self) -> float | None:
        compiled = self.inspections[0].compiled
        return compiled.instructions_per_value if compiled else None

    @property
    def rank(self) -> tuple[float, ...]:
        """The largest floor first, the next one where those are equal, then bytes in flight, more before fewer."""
        ordered = sorted((self.bytes_s, self.matrix_s, self.issue_s or 0.0), reverse=True)
        return (*ordered, -self.bytes_in_flight)


@dataclass(frozen=True)
class Pruned:
    """The tiles of one target: ``survivors`` by rank; ``default`` is among them unless its code is faulty."""

    target: Target
    place: Place
    survivors: tuple[Candidate, ...]
    dropped: tuple[Dropped, ...]

    @property
    def default(self) -> Candidate | None:
        return next((each for each in self.survivors if each.tile == self.place.default), None)


@dataclass(frozen=True)
class Grid:
    """A launch at the shape: its programs, and the trips that the busiest SM runs at least."""

    programs: int
    busiest_trips: float


def _busiest(programs: int, longest: int, shortest: int, total: float, num_sms: int) -> float:
    return max(total / num_sms, -(-programs // num_sms) * shortest, longest)


# -- grids -----------------------------------------------------------------------------------------


def _gemm_grid(place: Place, tile: Tile, shape: Shape, num_sms: int) -> Grid:
    from ..kernels.split_k import choose_splits

    m, n, k = shape["m"], shape["n"], shape["k"]
    padded = -(-n // 256) * 256 if place.kernel in ("w4a16", "w4a8") else n  # weights laid out in tiles of 256 rows
    tiles, trips = -(-m // tile.block_m) * -(-padded // tile.block_n), -(-k // tile.block_k)
    if place.kernel == "fp8_many" or (place.kernel == "block_scaled" and place.is_many):
        return Grid(tiles, _busiest(tiles, trips, trips, tiles * trips, num_sms))
    per_split = -(-trips // choose_splits(tiles, trips, num_sms))
    splits = -(-trips // per_split)
    last = trips - (splits - 1) * per_split
    return Grid(tiles * splits, _busiest(tiles * splits, per_split, last, tiles * trips, num_sms))


@lru_cache(maxsize=256)
def _rows_per_expert(items: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    shape = dict(items)
    return tuple(draw_ids(shape, 0).flatten().bincount(minlength=shape["num_experts"])[: local_experts(shape)].tolist())


def _moe_grid(tile: Tile, shape: Shape, mode: str, num_sms: int) -> Grid:
    hidden, inter = shape["hidden"], shape["inter"]
    rows, columns = (2 * inter, hidden) if mode == "gate_up" else (hidden, inter)
    blocks = sum(-(-count // tile.block_m) for count in _rows_per_expert(tuple(sorted(shape.items()))))
    programs, trips = blocks * -(-rows // tile.block_n), -(-columns // tile.block_k)
    return Grid(programs, _busiest(programs, trips, trips, programs * trips, num_sms))


def _attention_grid(tile: Tile, rows: int, heads: int, shape: Shape, num_sms: int) -> Grid:
    """The plan shares all tiles of tokens out evenly over programs that fill the GPU once."""
    blocks = heads * -(-rows // tile.block_m)
    programs = max(1, max(1, 8 // tile.num_warps) * num_sms // blocks) * blocks
    trips = shape["batch"] * -(-seen_tokens(shape) // tile.block_n) * blocks
    return Grid(programs, trips / num_sms)


# -- points ----------------------------------------------------------------------------------------


def _parts(place: Place, tile: Tile, shape: Shape, num_sms: int) -> list[tuple[Grid, list[CompilePoint]]]:
    """Each launch of the tile at the shape, and the ways it is compiled; the first is the one that floors go by."""
    arch = "sm_100" if place.arch == "sm_103" else place.arch  # the points are those of sm_100 there
    row = dataclasses.replace(place.row, archs=(arch,), tile=tile)
    if place.kernel.startswith("attention_d"):
        points = attention_points.tile_points(row, place.format, arch, shape["page_size"])
        return [(_attention_grid(tile, place.rows, shape["num_kv_heads"], shape, num_sms), points)]
    if place.kernel == "mla_attention":
        points = mla_points.tile_points(row, place.format, arch)
        points = points if shape["q_len"] == 1 else points[::-1]
        return [(_attention_grid(tile, place.rows, 1, shape, num_sms), points)]
    step = tile.block_k if "block_scaled" in place.kernel else GROUP
    if place.kernel.startswith("grouped"):
        return [
            (_moe_grid(tile, shape, mode, num_sms),
             grouped_points.tile_points(row, place.format, arch, mode, shape[columns] % step == 0))
            for mode, columns in (("gate_up", "hidden"), ("down", "inter"))
        ]  # fmt: skip
    is_even = shape["k"] % step == 0 or place.kernel == "fp8_many"
    points = matmul_points.tile_points(row, place.format, arch, is_even)
    return [(_gemm_grid(place, tile, shape, num_sms), points)]


def name_of(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"


def _named(point: CompilePoint, place: Place, tile: Tile) -> CompilePoint:
    """The point as a candidate: no limit on its price, which is what is being compared."""
    name = f"{point.name}/{name_of(tile)}"
    return dataclasses.replace(point, name=name, archs=(place.arch,), max_instructions_per_value=None)


def prune(
    target: Target, gpu: Gpu, *, jobs: int | None = None, use_cache: bool = True,
    progress: Callable[[int, int, Inspection], None] | None = None, compile_all: Compile | None = None,
) -> Pruned:  # fmt: skip
    """Compiles the candidates of a target for ``gpu`` and keeps those worth measuring, best floors first.

    Args:
        jobs, use_cache, progress, compile_all: as ``inspect``.

    Raises:
        ValueError: an op without tiles, or a GPU that nothing is compiled for. RuntimeError: no Triton.
    """
    arch = "sm_" + gpu.compute_capability.replace(".", "")
    if arch not in SM_LIMITS:
        raise ValueError(f"gpu: expected one of {', '.join(SM_LIMITS)}; got {gpu.name} ({gpu.compute_capability})")
    place = place_of(target.kernel, target.shape, arch)
    tiles, dropped = candidates(place)
    parts = {tile: _parts(place, place.launched(tile), target.shape, gpu.num_sms) for tile in tiles}
    named = {tile: [_named(point, place, tile) for _, points in parts[tile] for point in points] for tile in tiles}
    points = [point for tile in tiles for point in named[tile]]
    found = inspect(
        points, [arch], jobs=jobs, use_cache=use_cache, progress=progress, compile_all=compile_all
    )  # fmt: skip
    by_name = {each.point.name: each for each in found}
    survivors: list[Candidate] = []
    for tile in tiles:
        inspections = [by_name[point.name] for point in named[tile]]
        fault = next((f"{f.kind}: {f.text.splitlines()[0]}" for each in inspections for f in each.findings), None)
        if fault is not None:
            dropped.append(Dropped(tile, fault))
            continue
        grids, index = [], 0
        for grid, points in parts[tile]:
            grids.append((grid, inspections[index]))
            index += len(points)
        survivors.append(_candidate(target, place, tile, tuple(inspections), grids, gpu))
    kept, dominated = drop_dominated(survivors, place.default)
    return Pruned(target, place, tuple(sorted(kept, key=lambda each: each.rank)), (*dropped, *dominated))


def _candidate(
    target: Target, place: Place, tile: Tile, inspections: tuple[Inspection, ...],
    grids: Iterable[tuple[Grid, Inspection]], gpu: Gpu,
) -> Candidate:  # fmt: skip
    work, rate = target.kernel.work(target.shape), issue_rate(gpu)
    matrix_s, issue_s = 0.0, 0.0 if rate else None
    most: tuple[Grid, int] | None = None
    for grid, inspection in grids:
        assert inspection.compiled is not None
        of_value = floors(inspection, gpu)
        values = grid.busiest_trips * inspection.point.values_per_iteration * gpu.num_sms
        matrix_s += values * of_value.matrix_s
        issue_s = None if issue_s is None or of_value.issue_s is None else issue_s + values * of_value.issue_s
        if most is None or grid.programs > most[0].programs:
            most = grid, inspection.compiled.occupancy.ctas_per_sm
    assert most is not None
    grid, ctas = most
    there = min(ctas, -(-grid.programs // gpu.num_sms))
    return Candidate(
        tile, inspections, (work.weight_bytes + work.activation_bytes) / gpu.memory_bytes_per_s, matrix_s, issue_s,
        grid.programs, ctas, grid.programs / (gpu.num_sms * ctas),
        there * (tile.num_stages - 1) * place.stage_bytes(place.launched(tile)),
    )  # fmt: skip


def drop_dominated(survivors: Iterable[Candidate], default: Tile) -> tuple[list[Candidate], list[Dropped]]:
    """(those that no other dominates, and the default; the rest with the one that dominates them)."""
    every = list(survivors)
    kept, dropped = [], []
    for each in every:
        better = None if each.tile == default else next((other for other in every if _dominates(other, each)), None)
        if better is None:
            kept.append(each)
            continue
        saved = f"{1e6 * (better.issue_s or 0):.2f} us at least, not {1e6 * (each.issue_s or 0):.2f}"
        dropped.append(
            Dropped(each.tile, f"dominated: {name_of(better.tile)} issues for {saved}, and is no worse else")
        )
    return kept, dropped


def _dominates(one: Candidate, other: Candidate) -> bool:
    if one.issue_s is None or other.issue_s is None:
        return False
    return (
        other.issue_s >= ISSUE_MATTERS * max(other.bytes_s, other.matrix_s)
        and one.issue_s < DOMINATED_BY * other.issue_s
        and one.matrix_s <= other.matrix_s
        and one.ctas_per_sm >= other.ctas_per_sm
        and one.bytes_in_flight >= other.bytes_in_flight
    )
