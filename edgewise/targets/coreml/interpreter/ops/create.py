"""Ops that make tensors, or look at shapes and places."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import Out, axis_of, op, whole, wholes


@op("fill")
def fill(shape: Any, value: Any = 0.0, *, out: Out) -> np.ndarray:
    return np.full(out.promise(wholes(shape)), value, np.asarray(value).dtype)


@op("fill_like")
def fill_like(ref_tensor: np.ndarray, value: Any = 0.0) -> np.ndarray:
    return np.full(ref_tensor.shape, value, np.asarray(value).dtype)


@op("shape")
def shape(x: np.ndarray) -> np.ndarray:
    return np.array(x.shape, np.int32)


@op("range_1d")
def range_1d(end: Any, start: Any, step: Any, *, out: Out) -> np.ndarray:
    first, last, by = (np.asarray(one).reshape(()) for one in (start, end, step))
    if by == 0 or not np.isfinite([first, last, by]).all():
        raise InputError(f"a range from {first} to {last} by {by}")
    count = max(0, math.ceil((float(last) - float(first)) / float(by)))
    out.promise((count,))
    return (first + by * np.arange(count)).astype(first.dtype)


@op("one_hot")
def one_hot(
    indices: np.ndarray, one_hot_vector_size: Any, axis: Any = -1, on_value: Any = 1, off_value: Any = 0, *, out: Out
) -> np.ndarray:
    """An index from the end is negative; one beyond the ends has no element on."""
    picked, size = np.asarray(indices), whole(one_hot_vector_size)
    along = axis_of(axis, picked.ndim + 1)
    out.promise((*picked.shape[:along], size, *picked.shape[along:]))
    places = np.arange(size).reshape([-1 if i == along else 1 for i in range(picked.ndim + 1)])
    wide = np.expand_dims(picked.astype(np.int64), along)
    on, off = np.asarray(on_value), np.asarray(off_value)
    return np.where(places == np.where(wide < 0, wide + size, wide), on, off).astype(np.result_type(on, off))


@op("band_part")
def band_part(x: np.ndarray, lower: Any = -1, upper: Any = -1) -> np.ndarray:
    """Zero outside of a band around the diagonal of the last two axes."""
    below, above = whole(lower), whole(upper)
    distance = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])
    kept = ((below < 0) | (distance <= below)) & ((above < 0) | (-distance <= above))
    return np.where(kept, x, np.zeros((), x.dtype))


@op("cumsum")
def cumsum(x: np.ndarray, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> np.ndarray:
    along = axis_of(axis, x.ndim)
    source = np.flip(x, along) if reverse else x
    total = np.cumsum(source, axis=along, dtype=np.float64 if x.dtype.kind == "f" else x.dtype)
    if exclusive:
        total = np.roll(total, 1, axis=along)
        total[(slice(None),) * along + (slice(0, 1),)] = 0
    return np.flip(total, along) if reverse else total


@op("non_zero")
def non_zero(x: np.ndarray) -> np.ndarray:
    return np.argwhere(x)
