"""Ops on two tensors of shapes that broadcast."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgewise.targets.coreml.interpreter.registry import Out, op


def _binary(name: str, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    @op(name)
    def run(x: np.ndarray, y: np.ndarray, *, out: Out) -> np.ndarray:
        # Two small tensors may broadcast to one that fits no memory.
        out.promise(np.broadcast_shapes(np.shape(x), np.shape(y)))
        return function(x, y)


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whole numbers are divided towards zero."""
    if x.dtype.kind == "f" or y.dtype.kind == "f":
        return np.true_divide(x, y)
    quotient = np.floor_divide(x, y)
    return quotient + ((quotient < 0) & (quotient * y != x))


_binary("add", np.add)
_binary("sub", np.subtract)
_binary("mul", np.multiply)
_binary("real_div", _divide)
_binary("floor_div", np.floor_divide)
_binary("mod", np.mod)  # of the sign of y
_binary("pow", np.power)
_binary("maximum", np.maximum)
_binary("minimum", np.minimum)
_binary("equal", np.equal)
_binary("not_equal", np.not_equal)
_binary("greater", np.greater)
_binary("greater_equal", np.greater_equal)
_binary("less", np.less)
_binary("less_equal", np.less_equal)
_binary("logical_and", np.logical_and)
_binary("logical_or", np.logical_or)
_binary("logical_xor", np.logical_xor)


@op("select")
def select(cond: np.ndarray, a: np.ndarray, b: np.ndarray, *, out: Out) -> np.ndarray:
    """`a` where the condition holds, `b` elsewhere."""
    out.promise(np.broadcast_shapes(np.shape(cond), np.shape(a), np.shape(b)))
    return np.where(cond, a, b)
