"""Choosing among the tiles of a user's own kernel, as ``tune`` does among tokenfab's: measured, never pruned.

What foreign code compiles to is not known before it runs, so no tile is dropped by inspection: all of ``TILES`` enter
the first round, each checked before it is timed, beside the first of them as anchor. The winner is told and priced; the
file is the user's, who puts it first.

Units and errors: as in ``tune``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .case import Anchor
from .cases import make_case
from .device import Device
from .gpus import Gpu
from .measurement import Measurement, Settings, num_rotated_sets
from .record import environment
from .records import RecordStore
from .targets import Target
from .timing import measure
from .tune import ROUNDS, Contest, Round, Searched, Trials, search
from .user_kernel import UserKernel, UserTile

_SEED = 1 << 30


def tile_name(tile: UserTile) -> str:
    return " ".join(f"{name}={value}" for name, value in tile)


def user_contest(target: Target) -> Contest:
    """The tiles of a user's kernel at one shape.

    Raises:
        ValueError: a kernel with fewer than two.
    """
    kernel = target.kernel
    tiles = kernel.tiles if isinstance(kernel, UserKernel) else ()
    if len(tiles) < 2:
        raise ValueError(f"TILES: expected at least two tiles of {kernel.name} to choose among; got {len(tiles)}")
    return Contest(target, tiles, f"{kernel.name} {tile_name(tiles[0])}", dict)


def with_tile(target: Target, tile: UserTile) -> Target:
    """The same launched with this tile."""
    return dataclasses.replace(target, kernel=dataclasses.replace(target.kernel, tile=tile))  # type: ignore[call-arg]


def run_user_search(
    target: Target, device: Device, gpu: Gpu, store: RecordStore, *, process: int = 1,
    rounds: Sequence[Round] = ROUNDS, buffers_on: Any = "cuda", is_over: Callable[[float], bool] = lambda share: False,
    done: Callable[[int, int, Round, Any], None] = lambda number, total, at, tile: None,
) -> Searched:  # fmt: skip
    """``tune.search`` among the tiles of ``target``'s kernel. Returns and raises as it."""
    contest = user_contest(target)
    trials = Trials(contest, gpu, environment(device.properties), rounds, store.records())
    anchors: list[Anchor] = []

    def measured(tile: UserTile, settings: Settings) -> Measurement:
        if not anchors:
            anchors.append(_anchor(contest, device.properties.l2_bytes, buffers_on))
        kernel = with_tile(target, tile).kernel
        case = make_case(kernel, target.shape, gpu, buffers_on)
        return measure(case, device, l2_policy=target.l2_policy, anchor=anchors[0], settings=settings)  # pyright: ignore[reportArgumentType]

    return search(trials, store, measured, process=process, is_over=is_over, done=done)


def _anchor(contest: Contest, l2_bytes: int, buffers_on: Any) -> Anchor:
    """The first tile's launches on buffers of their own that rotate out of L2."""
    target = with_tile(contest.target, contest.tiles[0])
    run, shape, work = target.kernel.load(), target.shape, target.kernel.work(target.shape)
    ring = num_rotated_sets(target.l2_policy, l2_bytes, work.weight_bytes, work.activation_bytes)
    weights = [run.make_weights(shape, _SEED + index, buffers_on) for index in range(ring)]
    activations, output = run.make_activations(shape, _SEED, buffers_on), run.make_output(shape, buffers_on)
    num_launches = 0

    def launch() -> None:
        nonlocal num_launches
        run.launch(weights[num_launches % ring], activations, output)
        num_launches += 1

    return Anchor(contest.anchor, launch)
