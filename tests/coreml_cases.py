"""What a test of one op of the Core ML interpreter is made of, and arrays for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RNG = np.random.default_rng(7)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def u(*shape: int) -> np.ndarray:
    """Positive numbers, away from zero."""
    return RNG.uniform(0.2, 3, shape).astype(np.float32)


def i(high: int, *shape: int, low: int = 0) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


def b(*shape: int) -> np.ndarray:
    return RNG.random(shape) < 0.5


@dataclass(frozen=True)
class Case:
    """One op on arrays that are fed (`arrays`) and parameters that are constants. `reference` gives what torch computes from
    tensors; without it, coremltools' inference of values is the reference. `tolerance` is relative to the largest value."""

    op: str
    arrays: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    tolerance: float = 3e-6
    half: bool = True
    target: str = "iOS18"


def case(op: str, arrays: dict[str, Any], reference: Callable[..., Any] | None = None, **parameters: Any) -> Case:
    options = {name: parameters.pop(name) for name in ("tolerance", "half", "target") if name in parameters}
    return Case(op, arrays, parameters, reference, **options)


X, Y = f(2, 3, 4), f(2, 3, 4)
IMAGE, VOLUME, LINE = f(2, 4, 9, 8), f(2, 4, 5, 6, 7), f(2, 4, 11)
INTS, SMALL = i(9, 3, 4, low=-9), i(5, 3, 4, low=1)
