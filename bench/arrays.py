"""Functions of numbers or, value by value, of NumPy arrays; NumPy is imported for arrays only."""

from __future__ import annotations

import functools
import math
from typing import Any


def largest(*values: Any) -> Any:
    """``max`` of numbers; value by value where any is an array."""
    if not any(hasattr(value, "shape") for value in values):
        return max(values)
    import numpy as np

    return functools.reduce(np.maximum, values)


def smallest(*values: Any) -> Any:
    """``min`` of numbers; value by value where any is an array."""
    if not any(hasattr(value, "shape") for value in values):
        return min(values)
    import numpy as np

    return functools.reduce(np.minimum, values)


def expm1(value: Any) -> Any:
    """``math.expm1`` of a number; value by value of an array."""
    if not hasattr(value, "shape"):
        return math.expm1(value)
    import numpy as np

    return np.expm1(value)
