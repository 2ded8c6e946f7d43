"""Every kernel of the registry with each of its buffers flush against memory that may not be touched.

``python guarded.py kernels [NAME...]`` launches the kernels on Triton's interpreter, which reads and writes real
addresses: one element too far ends this process with SIGSEGV. Each buffer, those that a wrapper allocates among them,
lies in pages of its own: its last byte before a page without access, then again its first byte behind one. Prints a
line before and after each launch, with the number of its buffers.

``planted-end`` and ``planted-start`` launch kernels that are wrong by one element, to show that they are caught.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from tokenfab.kernels.reference import error
from tokenfab.kernels.registry import KERNELS
from tokenfab.tests.kernels import conftest  # noqa: F401  repairs the interpreter
from tokenfab.tests.reliability.walk import Buffers, Case, case_of, whole
from torch.overrides import TorchFunctionMode

PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def guarded(like: torch.Tensor, at_end: bool) -> torch.Tensor:
    """The same values, contiguous, flush against a page without access."""
    like = like.contiguous()
    room = -(-like.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    _kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for place in (start, start + PAGE + room):
        if _libc.mprotect(ctypes.c_void_p(place), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (room - like.nbytes if at_end else 0)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=like.nbytes, offset=offset)
    flat.copy_(like.view(-1).view(torch.uint8))
    return flat.view(like.dtype).view(like.shape)


class Guard(TorchFunctionMode):
    """Guards what torch allocates: workspaces, partial results, outputs that a wrapper makes."""

    NEW = (
        torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_like, torch.zeros_like, torch.full_like,
        torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_full,
    )  # fmt: skip

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self._at_end, self.count = at_end, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self.NEW and made.numel():
            self.count += 1
            return guarded(made, self._at_end)
        return made


def launch(case: Case, at_end: bool) -> int:
    """How many buffers were guarded."""
    guard = Guard(at_end)

    def moved(buffers: Buffers) -> Buffers:
        guard.count += len(buffers)
        return {name: guarded(part, at_end) for name, part in buffers.items()}

    held = replace(case, weights=moved(case.weights), activations=moved(case.activations), run=case.kernel.load())
    with guard:
        output = held.launch(change=moved)
    if not error(whole(output), case.expected) <= case.kernel.tolerance:
        raise AssertionError(f"{case.kernel.name}: wrong on guarded buffers")
    return guard.count


def launch_all(names: list[str]) -> None:
    for kernel in KERNELS:
        if names and kernel.name not in names:
            continue
        case = case_of(kernel, torch.device("cpu"))
        for side in ("end", "start"):
            print("begin", kernel.name, side, flush=True)
            print("ended", kernel.name, side, launch(case, side == "end"), flush=True)
            _kept.clear()


@triton.jit
def _planted_kernel(x_ptr, y_ptr, count, FIRST: tl.constexpr, BEHIND: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, and x[FIRST] to x[count + BEHIND - 1] read."""
    offs = FIRST + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count + BEHIND, other=0.0)
    tl.store(y_ptr + offs, x, mask=(offs >= 0) & (offs < count))


def planted(first: int, behind: int) -> None:
    count = 101
    for at_end in (True, False):
        x, y = guarded(torch.randn(count), at_end), guarded(torch.zeros(count), at_end)
        print("begin", "end" if at_end else "start", flush=True)
        kernel: Any = _planted_kernel[(1,)]
        kernel(x, y, count, FIRST=first, BEHIND=behind, BLOCK=128)
        if not torch.equal(x, y):
            raise AssertionError("planted: wrong values")
        print("ended", "end" if at_end else "start", 2, flush=True)


if __name__ == "__main__":
    what = sys.argv[1]
    if what.startswith("planted"):
        planted(-1 if what == "planted-start" else 0, int(what == "planted-end"))
    else:
        launch_all(sys.argv[2:])
