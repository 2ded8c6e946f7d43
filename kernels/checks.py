"""Argument checks of the kernels' wrappers: ``ValueError`` naming argument, what was expected and what came."""

from __future__ import annotations

import torch


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise unless ``condition`` holds.

    Raises:
        ValueError: "argument: expected ...; got ...".
    """
    if not condition:
        raise ValueError(f"{argument}: expected {expected}; got {got}")


def seen(tensor: object) -> str:
    """A tensor's dtype and shape for a message; anything else as it is."""
    return f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else repr(tensor)
