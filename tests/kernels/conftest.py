"""Kernels run on the GPU where there is one, else on the repaired interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

torch.set_num_threads(1)  # thousands of small operations: a pool of threads only waits for itself

if os.environ.get("TRITON_INTERPRET") == "1":
    from tokenfab.bench import interpreter

    interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture
def reverse_programs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[], None]:
    """Called, lets the interpreter run every grid from its last program to its first; a GPU orders programs itself."""

    def reverse() -> None:
        if device.type == "cuda":
            return
        from triton.runtime.interpreter import interpreter_builder

        plain = interpreter_builder.set_grid_idx

        def reversed_grid(i: int, j: int, k: int) -> None:
            size = interpreter_builder.grid_dim
            plain(size[0] - 1 - i, size[1] - 1 - j, size[2] - 1 - k)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", reversed_grid)

    return reverse
