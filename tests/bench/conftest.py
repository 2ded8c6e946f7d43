"""Kernels run here as in ``tests/kernels``: on the GPU where there is one, else on the repaired interpreter."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def device() -> object:
    torch = pytest.importorskip("torch")
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tokenfab.bench import interpreter

        interpreter.install()
        torch.set_num_threads(1)
        return torch.device("cpu")
    return torch.device("cuda")
