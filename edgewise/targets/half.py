"""Half-precision storage: one rule for all targets, so that their artifacts hold the same numbers."""

from __future__ import annotations

import numpy as np

HALVE_FROM = 1024
"""Bytes in single precision. Halving a smaller array saves less than the node that widens it again costs."""


def as_half(array: np.ndarray) -> np.ndarray | None:
    """A single-precision array in half precision, the same numbers. None: it stays as it is, being too small or not exact."""
    if array.dtype != np.float32 or array.nbytes < HALVE_FROM:
        return None
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.isfinite(half).all() and np.array_equal(half.astype(np.float32), array) else None
