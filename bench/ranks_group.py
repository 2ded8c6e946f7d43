"""The ranks of a step: one process each, joined by torch.distributed; what they agree on, and how they fail together.

A process finds the others by the environment that torchrun sets (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
LOCAL_RANK), which Slurm's can be turned into (docs/many_gpus.md). Tensors of GPUs travel by NCCL; those of CPUs, and
all that ranks agree on while they measure, by gloo.

A rank that fails must not leave the others waiting:

- it raises: it leaves the reason in the store that all share, and closes its connections;
- it is killed: its connections close by themselves;
- it hangs, or the others wait for it inside of a GPU, where no connection is looked at: whoever waits longer than
  ``timeout_s`` gives up; a thread of its own ends a process that cannot even raise, with exit code ``GAVE_UP``.

So every rank ends with ``RankFailed``, or that exit code, within about ``timeout_s``; its message names the rank that
failed first where that could say so.

Units: seconds. Errors: ``ValueError`` naming a variable of the environment; ``RankFailed``.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCH = "torchrun --nproc-per-node N -m tokenfab ranks ..."
TIMEOUT_S = 300.0
"""Ranks wait for each other while one of them compiles kernels."""

GAVE_UP = 70
"""Exit code of a process that waited in vain and could not raise (EX_SOFTWARE of sysexits.h)."""

_GRACE_S = 5.0
"""How long after ``timeout_s`` a process may take to raise before its thread ends it."""

_REASON = "tokenfab/failed"
_LOOK_S = 1.0


class RankFailed(RuntimeError):
    """This or another rank failed; the message says which, as far as it is known."""


@dataclass(frozen=True)
class Launched:
    """What the environment says of this process."""

    rank: int
    size: int
    local_rank: int


def launched() -> Launched:
    """This process among those that a launcher started.

    Raises:
        ValueError: a variable that is not there, or no number of a rank.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(f"{missing[0]}: expected the environment of a launcher; got none. One line: {LAUNCH}")
    numbers = []
    for name in VARIABLES[:3]:
        text = os.environ[name]
        if not text.isdecimal():
            raise ValueError(f"{name}: expected a whole number; got {text!r}")
        numbers.append(int(text))
    rank, size, local = numbers
    if not rank < size:
        raise ValueError(f"RANK: expected less than WORLD_SIZE = {size}; got {rank}")
    return Launched(rank, size, local)


@dataclass
class RankGroup:
    """This rank, and what it does with the others. Made by ``joined``.

    Attributes:
        device: of the tensors that travel. backend: by what.
    """

    rank: int
    size: int
    device: torch.device
    backend: str
    timeout_s: float
    store: Any = None
    _waits_until_s: float | None = field(default=None, repr=False)
    _what: str = field(default="", repr=False)

    # -- communication of a step: enqueued, capturable where the backend is NCCL --------------------

    def all_reduce(self, x: torch.Tensor) -> None:
        """x becomes the sum over ranks, in its own format and in the backend's order: no bits are promised."""
        with self._guarded("all_reduce"):
            dist.all_reduce(x)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Block i of x, of equally many rows each, to rank i; block i of out from rank i."""
        with self._guarded("all_to_all"):
            dist.all_to_all_single(out, x)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """The x of all ranks, one after the other along the first axis."""
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._guarded("all_gather"):
            gather(out, x)

    # -- what ranks agree on: on the CPU, waited for ------------------------------------------------

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, by rank; equally many on each."""
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self.waiting("agreement"), self._guarded("agreement"):
            dist.all_gather(found, mine)
        return [each.tolist() for each in found]

    def most(self, *values: float) -> list[float]:
        """The largest of all ranks, of each value."""
        return [max(column) for column in zip(*self.numbers(values), strict=True)]

    def every(self, holds: bool) -> bool:
        """Whether it holds on all ranks."""
        return self.most(float(not holds)) == [0.0]

    def texts(self, text: str) -> list[str]:
        """The text of every rank, by rank."""
        mine = text.encode()
        sizes = [int(size) for (size,) in self.numbers([len(mine)])]
        padded = [float(byte) for byte in mine.ljust(max(1, *sizes), b"\0")]
        rows = self.numbers(padded)
        return [bytes(int(byte) for byte in row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]

    # -- failing together ---------------------------------------------------------------------------

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, this process waits for others: longer than ``timeout_s``, and it is ended."""
        outer = self._waits_until_s, self._what
        self._what, self._waits_until_s = what, time.monotonic() + self.timeout_s + _GRACE_S
        try:
            yield
        finally:
            self._waits_until_s, self._what = outer

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what all of torch.distributed's are
            raise self.lost(what, error) from error

    def lost(self, what: str, error: Exception) -> RankFailed:
        """The error of a rank whose communication failed, by the reason that the first to fail left, if it did."""
        reason = self._reason()
        if reason:
            return RankFailed(f"rank {self.rank}: in {what}: {reason}")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return RankFailed(f"rank {self.rank}: in {what}: another rank died or gave no answer: {first}")

    def report(self, error: BaseException) -> None:
        """Leaves the reason of this rank for the others, unless one was there first, or it is another's failure."""
        if isinstance(error, RankFailed):
            return
        words = " ".join(str(error).split()) or type(error).__name__
        reason = f"rank {self.rank} failed: {type(error).__name__}: {words}"
        try:
            self.store.compare_set(_REASON, "", reason[:1000])
        except RuntimeError:  # the store is gone with the process that held it: its closed connections say the rest
            return

    def _reason(self) -> str:
        try:
            if not self.store.check([_REASON]):
                time.sleep(_LOOK_S)  # it closes its connections and leaves its reason at about the same time
            return self.store.get(_REASON).decode() if self.store.check([_REASON]) else ""
        except RuntimeError:
            return ""

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(0.2):
            until_s = self._waits_until_s
            if until_s is not None and time.monotonic() > until_s:
                print(
                    f"error: rank {self.rank}: in {self._what}: no answer from the other ranks in {self.timeout_s:g} s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(GAVE_UP)


@contextmanager
def joined(device: torch.device, *, timeout_s: float = TIMEOUT_S) -> Iterator[RankGroup]:
    """This process as one rank of those that were launched together; leaves with them, or fails with them.

    Args:
        device: "cuda:N" for NCCL, "cpu" for gloo alone.

    Raises:
        ValueError: as ``launched``; or a timeout that is none.
        RankFailed: not all ranks came in time, or one failed.
    """
    here = launched()
    if not 0 < timeout_s < 1e6:
        raise ValueError(f"timeout_s: expected above 0; got {timeout_s}")
    is_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if is_gpu else "gloo"
    if is_gpu:
        torch.cuda.set_device(device)
    group = RankGroup(here.rank, here.size, device, "nccl" if is_gpu else "gloo", timeout_s)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), rank=here.rank, world_size=here.size)
        # one of its own: what NCCL asks of the other may take as long as a rank takes to build its weights
        group.store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
        group.store.set_timeout(timedelta(seconds=_GRACE_S))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        message = f"rank {here.rank}: expected {here.size} ranks within {timeout_s:g} s; {first}"
        raise RankFailed(message) from error
    stopped = threading.Event()
    watch = threading.Thread(target=group._watch, args=(stopped,), daemon=True)
    watch.start()
    try:
        yield group
        group.every(True)  # nobody leaves, and the store with it, while others work
    except BaseException as error:
        group.report(error)
        raise
    finally:
        stopped.set()
        watch.join()
        _leave(is_failed=sys.exc_info()[0] is not None, is_gpu=is_gpu)


def _leave(is_failed: bool, is_gpu: bool) -> None:
    """Closes the connections. A failed rank's work on a GPU may wait for others without end, and destroying the group
    or leaving Python for it: so the process ends, by itself or, after a while, by force."""
    if is_failed and is_gpu:
        faulthandler.dump_traceback_later(_GRACE_S, exit=True)
        return
    dist.destroy_process_group()
