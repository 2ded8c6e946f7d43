"""A process that is killed at any one of its steps, and one whose disk is full: what a file must survive."""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any


def in_child(action: Callable[[], None]) -> int:
    """Exit status of a fork that does it; that of a signal is negative."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            warnings.simplefilter("ignore")
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Whether the action, in a fork, was killed before its ``step``-th call of a function written in C.

    All that reaches the disk goes through such calls, so that between any two of them a kill can fall. False where it
    came to its end before.

    Raises:
        AssertionError: it ended in another way.
    """

    def dying() -> None:
        left = step

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal left
            if event == "c_call":
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.setprofile(count)
        try:
            action()
        finally:
            sys.setprofile(None)

    status = in_child(dying)
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def with_full_disk(room_bytes: int, action: Callable[[], None]) -> int:
    """Exit status of a fork in which no file may grow beyond so many bytes; 3 where it raised an ``OSError``."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, resource.RLIM_INFINITY))
        try:
            action()
        except OSError:
            os._exit(3)

    return in_child(limited)
