"""Kernels run on the GPU where there is one, else on the repaired interpreter."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)  # thousands of small operations: a pool of threads only waits for itself

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
