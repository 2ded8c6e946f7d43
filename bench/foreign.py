"""Where code that is not tokenfab's runs: what it raises gets its place, and stops no other target."""

from __future__ import annotations

import traceback
from types import TracebackType

FATAL = ("OutOfMemoryError", "AcceleratorError", "MemoryError")
"""Not the code's own to explain: the campaign knows a lack of memory, and no CUDA call works after a failed one."""


class ForeignCode:
    """A ``with`` block in which any exception, but ``FATAL`` ones, becomes ``error``: place, what was done, and why.

    Args:
        name: of the code, for the message; followed by a line where ``file`` is in the traceback.
    """

    def __init__(self, name: str, doing: str, error: type[Exception], file: str = "") -> None:
        self._name, self._doing, self._error, self._file = name, doing, error, file

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, self._error) or type(error).__name__ in FATAL:
            return
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == self._file]
        if isinstance(error, SyntaxError) and error.filename == self._file:
            lines = [error.lineno]
        place = f"{self._name}:{lines[-1]}" if lines else self._name
        raise self._error(f"{place}: {self._doing}: {type(error).__name__}: {error}") from error
