"""Scatters: write at indices, or combine with what is there, in the order of the updates."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.ops.gather import checked
from edgewise.targets.coreml.interpreter.registry import axis_of, op, text

_COMBINE: dict[str, np.ufunc] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _combined(data: np.ndarray, index: tuple[Any, ...], updates: np.ndarray, mode: Any) -> np.ndarray:
    """`data` with `updates` at `index`. An index that comes twice counts twice; with `update`, the last one stays."""
    kind = text(mode)
    result = data.copy()
    if kind == "update":
        result[index] = updates
    elif kind not in _COMBINE:
        raise InputError(f"a scatter with mode '{kind}'")
    elif kind == "div" and data.dtype.kind in "iu":
        wide = data.astype(np.float64)
        np.divide.at(wide, index, updates)
        result = np.trunc(wide).astype(data.dtype)
    else:
        _COMBINE[kind].at(result, index, updates)
    return result


@op("scatter")
def scatter(
    data: np.ndarray,
    indices: np.ndarray,
    updates: np.ndarray,
    axis: Any = 0,
    mode: Any = "add",
    validate_indices: Any = None,
) -> np.ndarray:
    """Slices of `data` along an axis; `updates` has the shape of `data` with the axis replaced by those of `indices`."""
    along = axis_of(axis, data.ndim)
    picked = np.asarray(indices)
    if updates.shape != (*data.shape[:along], *picked.shape, *data.shape[along + 1 :]):
        raise InputError(
            f"updates of shape {list(updates.shape)} for {list(data.shape)} by {list(picked.shape)}, axis {along}"
        )
    return _combined(
        data, (slice(None),) * along + (checked(picked, data.shape[along], validate_indices),), updates, mode
    )


@op("scatter_along_axis")
def scatter_along_axis(
    data: np.ndarray,
    indices: np.ndarray,
    updates: np.ndarray,
    axis: Any = 0,
    mode: Any = "add",
    validate_indices: Any = None,
) -> np.ndarray:
    """An index for every update."""
    along = axis_of(axis, data.ndim)
    if indices.shape != updates.shape or indices.ndim != data.ndim:
        raise InputError(f"indices of shape {list(indices.shape)} and updates of shape {list(updates.shape)}")
    index: list[Any] = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    index[along] = checked(indices, data.shape[along], validate_indices)
    return _combined(data, tuple(index), updates, mode)


@op("scatter_nd")
def scatter_nd(
    data: np.ndarray, indices: np.ndarray, updates: np.ndarray, mode: Any = "add", validate_indices: Any = None
) -> np.ndarray:
    """The last axis of `indices` holds where to go on the first axes of `data`."""
    depth = indices.shape[-1]
    if depth > data.ndim or updates.shape != (*indices.shape[:-1], *data.shape[depth:]):
        raise InputError(
            f"updates of shape {list(updates.shape)} for {list(data.shape)} by indices of shape {list(indices.shape)}"
        )
    index = tuple(checked(indices[..., i], data.shape[i], validate_indices) for i in range(depth))
    return _combined(data, index, updates, mode)
