"""Kernels run here as in ``tests/kernels``: on the GPU where there is one, else on the repaired interpreter."""

from __future__ import annotations

from tokenfab.tests.kernels.conftest import device, reverse_programs

__all__ = ["device", "reverse_programs"]
