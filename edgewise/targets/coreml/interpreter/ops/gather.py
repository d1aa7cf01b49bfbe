"""Gathers. An index beyond its axis is an error here, where Core ML leaves the result open.

Until iOS 16 a negative index counts from the end. From iOS 17 on it lies beyond the axis; its programs are known by the input
`validate_indices`, which they always write.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import Out, axis_of, op, whole


def checked(indices: np.ndarray, size: int, validate: Any) -> np.ndarray:
    """Indices into an axis of `size` elements, counted from the front. `validate`: the input `validate_indices`, None where the
    program is older. Raises `InputError` if an index is beyond the axis."""
    wide = indices.astype(np.int64)
    least = -size if validate is None else 0
    if wide.size and (wide.min() < least or wide.max() >= size):
        beyond = wide[(wide < least) | (wide >= size)].reshape(-1)[0]
        raise InputError(f"the index {beyond} is beyond an axis of {size} elements")
    return np.where(wide < 0, wide + size, wide)


@op("gather")
def gather(
    x: np.ndarray, indices: np.ndarray, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = None, *, out: Out
) -> np.ndarray:
    """`x (*batch, *before, n, *after)` by `indices (*batch, *where)` to `(*batch, *before, *where, *after)`."""
    along, batch = axis_of(axis, x.ndim), whole(batch_dims)
    picked = np.asarray(indices)
    if not 0 <= batch <= min(along, picked.ndim) or x.shape[:batch] != picked.shape[:batch]:
        raise InputError(f"{batch} batch axes of shapes {list(x.shape)} and {list(picked.shape)}, axis {along}")
    out.promise((*x.shape[:along], *picked.shape[batch:], *x.shape[along + 1 :]))
    index = checked(picked, x.shape[along], validate_indices)
    if batch == 0:
        return np.take(x, index, axis=along)
    # The batches become one axis, whose number goes along with each index.
    count = math.prod(x.shape[:batch])
    flat = np.moveaxis(x.reshape(count, *x.shape[batch:]), along - batch + 1, 1)
    flat_index = index.reshape(count, -1)
    taken = flat[np.arange(count)[:, None], flat_index]  # (batch, where, *before, *after)
    before, where = along - batch, picked.ndim - batch
    taken = taken.reshape(*x.shape[:batch], *picked.shape[batch:], *x.shape[batch:along], *x.shape[along + 1 :])
    return np.moveaxis(taken, range(batch, batch + where), range(batch + before, batch + before + where))


@op("gather_along_axis")
def gather_along_axis(
    x: np.ndarray, indices: np.ndarray, axis: Any = 0, validate_indices: Any = None, *, out: Out
) -> np.ndarray:
    """An index for every element of the result: `indices` has its shape."""
    along = axis_of(axis, x.ndim)
    out.promise(indices.shape)
    return np.take_along_axis(x, checked(indices, x.shape[along], validate_indices), axis=along)


@op("gather_nd")
def gather_nd(
    x: np.ndarray, indices: np.ndarray, batch_dims: Any = 0, validate_indices: Any = None, *, out: Out
) -> np.ndarray:
    """The last axis of `indices` holds where to go on the axes after the batch."""
    batch, depth = whole(batch_dims), indices.shape[-1]
    if not 0 <= batch < indices.ndim or batch + depth > x.ndim or x.shape[:batch] != indices.shape[:batch]:
        raise InputError(f"indices of shape {list(indices.shape)} into {list(x.shape)}, with {batch} batch axes")
    out.promise((*indices.shape[:-1], *x.shape[batch + depth :]))
    places = [checked(indices[..., i], x.shape[batch + i], validate_indices) for i in range(depth)]
    inner = indices.ndim - 1 - batch
    batches = [
        np.arange(x.shape[i]).reshape([-1 if axis == i else 1 for axis in range(batch)] + [1] * inner)
        for i in range(batch)
    ]
    # With nothing to pick, all of `x` stands at every place.
    return (
        np.asarray(x[tuple(batches + places)])
        if depth
        else np.broadcast_to(x, out.promise((*indices.shape[:-1], *x.shape)))
    )
