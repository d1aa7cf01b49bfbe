"""Sorts. Equal elements keep their order, which Core ML leaves open; NaN comes last in both directions."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import axis_of, op, whole


def _order(x: np.ndarray, axis: int, ascending: bool) -> np.ndarray:
    if ascending:
        return np.argsort(x, axis=axis, kind="stable")
    if x.dtype.kind == "f":
        return np.argsort(-x, axis=axis, kind="stable")
    # The smallest whole number has no negative: reverse twice instead.
    backward = np.argsort(np.flip(x, axis), axis=axis, kind="stable")
    return x.shape[axis] - 1 - np.flip(backward, axis)


@op("argsort")
def argsort(x: np.ndarray, axis: Any = -1, ascending: Any = False) -> np.ndarray:
    return _order(x, axis_of(axis, x.ndim), bool(ascending))


@op("topk")
def topk(
    x: np.ndarray,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: Any = "int32",
) -> tuple[np.ndarray, ...]:
    along, count = axis_of(axis, x.ndim), whole(k)
    count = x.shape[along] if count == -1 else count
    if not 0 <= count <= x.shape[along]:
        raise InputError(f"the best {count} of {x.shape[along]}")
    index = np.take(_order(x, along, bool(ascending)), np.arange(count), axis=along)
    values = np.take_along_axis(x, index, axis=along)
    return (values, index) if return_indices else (values,)
