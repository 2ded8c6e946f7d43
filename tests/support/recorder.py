"""What a wrapper passes to its kernel, kept instead of launched."""

from __future__ import annotations

import inspect
from typing import Any


class Recorder:
    """Stands where a kernel is, and keeps the arguments of its last launch."""

    def __init__(self, kernel: Any) -> None:
        self.signature = inspect.signature(kernel.fn)
        self.arguments: dict[str, Any] = {}
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            named = {name: options.pop(name) for name in self.signature.parameters if name in options}
            self.arguments, self.options = self.signature.bind(*args, **named).arguments, options

        return launch
