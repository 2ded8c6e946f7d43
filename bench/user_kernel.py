"""A user's own kernel for any op of the registry: its buffers, check, timing and records are those of tokenfab's.

``FILE.py:FUNCTION`` names it, on the command line only. ``FUNCTION(weights, activations, output)`` gets exactly the
buffers that the registry's kernel of that op and format gets (docs/own_kernel.md), enqueues on the current stream and
fills ``output``. The file may define:

``prepare_weights(weights) -> buffers``: a layout of its own, made once at load; ``FUNCTION`` then gets that. The
reference is still computed from the original, made again from its seed.
``TOLERANCE``: at most that of the registry's row.
``TILES``: a list of dicts of keyword arguments for ``FUNCTION``, for ``tokenfab tune`` to choose among; the first is
what it is launched with until then.

The file and the modules beside it that it imports name a version of the kernel in records, with ``FUNCTION``; the
recipe is "user:FUNCTION".

Errors: ``ValueError`` names file, function and what is missing. What the user's code raises at a shape is a
``UserKernelError``, which names the line: that shape gets no time, and stops no other.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..kernels.registry import Kernel, Runnable, Shape, find_kernels
from .device import MethodUnavailable
from .foreign import ForeignCode

RECIPE = "user:"

Function = Callable[..., None]
UserTile = tuple[tuple[str, int | str], ...]
"""Keyword arguments of a launch; hashable."""


class _LoadError(ValueError):
    """The file cannot be imported."""


class UserKernelError(MethodUnavailable):
    """The user's code raised, or returned what it may not; names file, line and function."""


@dataclass(frozen=True, kw_only=True)
class UserKernel(Kernel):
    """A row of the registry with the user's launch in place of its own.

    Attributes:
        base: the registry's row: buffers, reference, bytes and flops are its own.
        path: the file, absolute. function_name: of the launch in it.
        function, prepare: what the file defines; ``prepare`` None without.
        files: (name, content) of all that names its version.
        tiles: those of the file's ``TILES``. tile: the one that it is launched with.
    """

    base: Kernel
    path: Path
    function_name: str
    function: Function
    prepare: Callable[[Any], Any] | None
    files: tuple[tuple[str, bytes], ...]
    tiles: tuple[UserTile, ...] = ()
    tile: UserTile = ()

    def load(self) -> Runnable:
        return UserRun(self)

    def source_texts(self) -> dict[str, bytes]:
        return {**dict(self.files), "function": self.function_name.encode()}


def base_kernel(op: str | None, formats: list[str] | None) -> Kernel:
    """The one row of the registry that a user's kernel stands in for.

    Raises:
        ValueError: no op, or formats that name none or several of its rows.
    """
    if op is None:
        raise ValueError("op: expected the op that the kernel computes; got none")
    found = find_kernels(op, formats)
    if len(found) != 1:
        raise ValueError(
            f"format: expected one of {', '.join(kernel.format for kernel in found)}: a kernel of your own computes "
            f"one format; got {','.join(formats or ['none'])}"
        )
    return found[0]


def load_user_kernel(place: str, base: Kernel) -> UserKernel:
    """The kernel at ``place``, "FILE.py:FUNCTION". Executes the file.

    Raises:
        ValueError: naming file and function: no such file or function, an import that fails, a signature that does
            not take (weights, activations, output), a ``TOLERANCE`` wider than the row's.
    """
    name, _, function_name = place.rpartition(":")
    if not name.endswith(".py") or not function_name.isidentifier():
        raise ValueError(f"kernel: expected FILE.py:FUNCTION; got {place!r}")
    path = Path(name).resolve()
    if not path.is_file():
        raise ValueError(f"kernel: expected a Python file; found none at {path}")
    module = _execute(path)
    function = getattr(module, function_name, None)
    if function is None:
        known = [each for each, part in vars(module).items() if inspect.isfunction(part)]
        raise ValueError(f"kernel: expected a function {function_name} in {path}; it has {', '.join(known) or 'none'}")
    offered = getattr(module, "TILES", None)
    _require_signature(
        path, function_name, function, ("weights", "activations", "output"), has_tiles=offered is not None
    )
    prepare = getattr(module, "prepare_weights", None)
    if prepare is not None:
        _require_signature(path, "prepare_weights", prepare, ("weights",))
    tiles = _tiles(path, function_name, function, offered)
    return UserKernel(
        op=base.op, weight=base.weight, activation=base.activation, title=f"{function_name} of {path.name}",
        sources=(), runnable="", points=list, work=base.work, min_capability=0,
        tolerance=_tolerance(path, getattr(module, "TOLERANCE", None), base),
        library=f"{RECIPE}{function_name}", base=base, path=path, function_name=function_name, function=function,
        prepare=prepare, files=tuple((each.name, each.read_bytes()) for each in _files(path)),
        tiles=tiles, tile=tiles[0] if tiles else (),
    )  # fmt: skip


def _execute(path: Path) -> ModuleType:
    """The file as a module of its own; it may import its neighbours."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"tokenfab_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"kernel: expected a Python file; got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with ForeignCode(f"kernel: {path}", "import", _LoadError, str(path)):
        spec.loader.exec_module(module)
    return module


def _files(path: Path) -> list[Path]:
    """The file and the loaded modules beside it."""
    places = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    beside = {Path(place) for place in places if place and Path(place).parent == path.parent and place.endswith(".py")}
    return sorted(beside | {path})


def _require_signature(
    path: Path, name: str, function: Any, arguments: tuple[str, ...], *, has_tiles: bool = False
) -> None:
    expected = f"kernel: {path}: {name}: expected a Python function of ({', '.join(arguments)})"
    if type(function).__module__.startswith("triton"):
        raise ValueError(f"{expected} that launches Triton kernels; got a Triton kernel")
    if not callable(function):
        raise ValueError(f"{expected}; got {type(function).__name__}")
    signature = inspect.signature(function)
    try:
        (signature.bind_partial if has_tiles else signature.bind)(*arguments)  # tiles fill in the rest
    except TypeError:
        raise ValueError(f"{expected}; got {name}{signature}") from None


def _tolerance(path: Path, got: Any, base: Kernel) -> float:
    if got is None:
        return base.tolerance
    is_number = isinstance(got, float | int) and not isinstance(got, bool) and math.isfinite(got)
    if not is_number or not 0 <= got <= base.tolerance:
        raise ValueError(
            f"kernel: {path}: TOLERANCE: expected a number from 0 to {base.tolerance:g}, {base.name}'s; got {got!r}"
        )
    return float(got)


def _tiles(path: Path, name: str, function: Function, got: Any) -> tuple[UserTile, ...]:
    if got is None:
        return ()
    expected = f"kernel: {path}: TILES: expected a list of dicts of keyword arguments of {name}, each another"
    if not isinstance(got, list | tuple) or not got or not all(isinstance(tile, dict) and tile for tile in got):
        raise ValueError(f"{expected}; got {got!r}")
    for tile in got:
        wrong = [key for key, value in tile.items() if not isinstance(value, int | str) or not isinstance(key, str)]
        if wrong:
            raise ValueError(f"{expected}, whole numbers or texts; got {wrong[0]!r}: {tile[wrong[0]]!r}")
        try:
            inspect.signature(function).bind("weights", "activations", "output", **tile)
        except TypeError as error:
            raise ValueError(f"{expected}; got {tile!r}: {error}") from None
    tiles = tuple(tuple(tile.items()) for tile in got)
    if len({tuple(sorted(tile)) for tile in tiles}) < len(tiles):
        raise ValueError(f"{expected}; got one twice")
    return tiles


class UserRun:
    """The registry's runnable with the user's launch and, where the file has one, the user's layout of weights."""

    def __init__(self, kernel: UserKernel) -> None:
        self._kernel, self._base = kernel, kernel.base.load()
        self._device: Any = "cpu"

    def _theirs(self, name: str) -> ForeignCode:
        return ForeignCode(str(self._kernel.path), name, UserKernelError, str(self._kernel.path))

    def make_weights(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> dict[str, Any]:
        made = self._base.make_weights(shape, seed, device, is_exact=is_exact)
        if self._kernel.prepare is None:
            return made
        import torch

        self._device = device

        with self._theirs("prepare_weights"):
            prepared = self._kernel.prepare(made)
        parts = list(_leaves(prepared))
        strange = {type(part).__name__ for part in parts if not isinstance(part, torch.Tensor)}
        if strange:
            raise UserKernelError(
                f"{self._kernel.path}: prepare_weights: expected tensors, or dicts, lists or tuples of them; got "
                f"{', '.join(sorted(strange))}"
            )
        held, least = sum(part.nbytes for part in parts), self._kernel.work(shape).weight_bytes
        if held < least:
            raise UserKernelError(
                f"{self._kernel.path}: prepare_weights: expected at least the {least} bytes that the floor counts of "
                f"{self._kernel.base.name}; got {held}"
            )
        return {"prepared": prepared, "origin": torch.tensor([seed, is_exact])}

    def make_activations(self, shape: Shape, seed: int, device: Any, *, is_exact: bool = False) -> dict[str, Any]:
        return self._base.make_activations(shape, seed, device, is_exact=is_exact)

    def make_output(self, shape: Shape, device: Any) -> Any:
        return self._base.make_output(shape, device)

    def launch(self, weights: dict[str, Any], activations: dict[str, Any], output: Any) -> None:
        name = self._kernel.function_name
        own = weights if self._kernel.prepare is None else weights["prepared"]
        # dicts of its own: what it puts into them or takes out is not there at the next call
        given = [dict(part) if isinstance(part, dict) else part for part in (own, activations, output)]
        with self._theirs(name):
            returned = self._kernel.function(*given, **dict(self._kernel.tile))
        if returned is not None and returned is not given[2]:
            raise UserKernelError(
                f"{self._kernel.path}: {name}: expected output filled in place and None returned; got "
                f"{type(returned).__name__}"
            )

    def reference(self, shape: Shape, weights: dict[str, Any], activations: dict[str, Any]) -> Any:
        if self._kernel.prepare is not None:
            seed, is_exact = weights["origin"].tolist()
            weights = self._base.make_weights(shape, seed, self._device, is_exact=bool(is_exact))
        return self._base.reference(shape, weights, activations)

    def tile(self, shape: Shape, device: Any) -> dict[str, Any]:
        """Of ``TILES``; none without: then the source alone names the version."""
        return dict(self._kernel.tile)


def _leaves(buffers: Any) -> Iterator[Any]:
    if isinstance(buffers, dict):
        buffers = tuple(buffers.values())
    if isinstance(buffers, tuple | list):
        for part in buffers:
            yield from _leaves(part)
    else:
        yield buffers
