"""The same values at other addresses: what a caller's views, slices and transposes look like to a kernel."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from tokenfab.tests.reliability.walk import Buffers, Case, as_bytes, as_nan
from triton.runtime.jit import KernelInterface

FAR = 2**31
"""Elements from the first to the last entry of a leading axis: one more than 32 bits count."""

_ON_THE_HOST = ("origin", "sizes", "window")
"""What a runnable keeps for itself."""

_NO_RESERVE = 0x4000  # of Linux: pages exist once they are touched


def _bytes(count: int, device: torch.device) -> torch.Tensor:
    """Flat uint8 of 0xFF, NaN in most formats."""
    return torch.full((count,), 0xFF, dtype=torch.uint8, device=device)


def sparse(count: int, device: torch.device) -> torch.Tensor:
    """Flat uint8 memory, of which on the host only the pages that are touched exist."""
    if device.type != "cpu":
        return torch.empty(count, dtype=torch.uint8, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, count, flags=flags), dtype=torch.uint8)


def _within(flat: torch.Tensor, like: torch.Tensor, strides: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """``like`` copied into flat bytes at these strides, in elements."""
    view = flat.view(like.dtype).as_strided(tuple(like.shape), strides, start)
    view.copy_(like)
    return view


def _row_strides(like: torch.Tensor, row: int) -> tuple[int, ...]:
    strides = [1]
    for size in like.shape[:0:-1]:
        strides.append(row if len(strides) == 1 else strides[-1] * size)
    return tuple(reversed(strides))


def _wider(like: torch.Tensor, extra: int) -> torch.Tensor:
    strides = _row_strides(like, like.shape[-1] + extra)
    count = like.shape[0] * strides[0] if like.dim() > 1 else like.shape[0]
    return _within(_bytes(count * like.element_size(), like.device), like, strides)


def wide_rows(like: torch.Tensor) -> torch.Tensor:
    """Rows of a wider matrix, 32 bytes of NaN between them."""
    return _wider(like, 32 // like.element_size())


def odd_rows(like: torch.Tensor) -> torch.Tensor:
    """One element of NaN between rows: of two rows one is not aligned."""
    return _wider(like, 1)


def shifted(like: torch.Tensor) -> torch.Tensor:
    """Contiguous, one element behind an aligned address."""
    flat = _bytes(like.nbytes + 64, like.device)
    return _within(flat[: flat.numel() // 16 * 16], like, tuple(like.contiguous().stride()), 1)


def transposed(like: torch.Tensor) -> torch.Tensor:
    """The last two axes exchanged in memory."""
    return like.transpose(-1, -2).contiguous().transpose(-1, -2) if like.dim() > 1 else like


def every_other(like: torch.Tensor) -> torch.Tensor:
    """NaN between any two entries of the last axis."""
    return torch.stack((like, as_nan(like)), dim=-1)[..., 0]


def far_apart(like: torch.Tensor) -> torch.Tensor:
    """Entries of the first axis spread over 2^31 elements; only what is touched exists."""
    if like.dim() < 2 or like.shape[0] < 2:
        return like
    stride = -(-FAR // (like.shape[0] - 1) // 64) * 64 + 64
    strides = (stride, *like.contiguous().stride()[1:])
    return _within(sparse(((like.shape[0] - 1) * stride + like[0].numel()) * like.element_size(), like.device),
                   like, strides)  # fmt: skip


LAYOUTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    wide_rows, odd_rows, shifted, transposed, every_other
)  # fmt: skip


class _Launched(BaseException):
    """A wrapper came to its first launch."""


@contextlib.contextmanager
def _no_launches() -> Iterator[None]:
    def launch(self: Any, grid: Any) -> Any:
        def stop(*arguments: Any, **options: Any) -> None:
            raise _Launched

        return stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", launch)
        yield


def sides_of(case: Case) -> Mapping[str, Buffers]:
    """Inputs and outputs that a launch hands to the device, by what they are."""
    sides = {"weights": case.weights, "activations": case.activations, "output": case.outputs(0xFF)}
    return {
        side: {name: part for name, part in each.items() if part.numel() > 1 and name not in _ON_THE_HOST}
        for side, each in sides.items()
    }


def accepted(case: Case, layout: Callable[[torch.Tensor], torch.Tensor]) -> tuple[dict[str, set[str]], int]:
    """(the buffers that a wrapper takes in a layout, each tried alone, by side; how many it refuses).

    Raises:
        AssertionError: a refusal that is no ``ValueError`` naming what was expected, or that wrote to the output.
    """
    taken: dict[str, set[str]] = {"weights": set(), "activations": set(), "output": set()}
    refused = 0
    for side, buffers in sides_of(case).items():
        for name, part in buffers.items():
            moved = layout(part)
            if moved.stride() == part.stride() and moved.data_ptr() % 16 == part.data_ptr() % 16:
                continue
            output: Buffers = {}
            refusal = ""
            try:
                with _no_launches():
                    launch_in(case, {side: {name}}, layout, output)
            except _Launched:
                taken[side].add(name)
            except ValueError as error:
                refusal = str(error)
            if name not in taken[side]:
                assert "expected" in refusal, f"{side} {name}: {refusal}"
                assert all((as_bytes(each) == 0xFF).all() for each in output.values()), f"{side} {name}: {refusal}"
                refused += 1
    return taken, refused


def launch_in(
    case: Case, names: Mapping[str, set[str]], layout: Callable[[torch.Tensor], torch.Tensor],
    output: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """The output of a launch with the named buffers in a layout."""

    def moved(side: str, buffers: Buffers) -> Buffers:
        return {name: layout(part) if name in names.get(side, ()) else part for name, part in buffers.items()}

    def keep(made: Buffers) -> Buffers:
        made = moved("output", made)
        if output is not None:
            output.update(made)
        return made

    return case.launch(moved("weights", case.weights), moved("activations", case.activations), change=keep)
