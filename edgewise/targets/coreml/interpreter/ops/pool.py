"""Pools over one, two or three axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.targets.coreml.interpreter.ops.windows import Geometry, geometry, padded, windows
from edgewise.targets.coreml.interpreter.registry import Out, op, wholes


def _pooled(x: np.ndarray, how: Geometry, ceil: bool, fill: float, out: Out, reduce: Any) -> np.ndarray:
    """`reduce(windows, axes)` over the windows of `x`, padded with `fill`."""
    places = how.places(x.shape[2:], ceil)
    out.promise((*x.shape[:2], *places))
    # The last window may reach beyond the padding that was asked for.
    ends = [
        (before, max(after, (count - 1) * s + extent - size - before))
        for size, (before, after), s, extent, count in zip(
            x.shape[2:], how.pads, how.strides, how.extent, places, strict=True
        )
    ]
    view = windows(padded(x, ends, fill, out), how, places)
    return reduce(view, tuple(range(x.ndim, view.ndim)))


@op("max_pool")
def max_pool(
    x: np.ndarray,
    kernel_sizes: Any,
    pad_type: Any,
    strides: Any = None,
    pad: Any = None,
    ceil_mode: Any = False,
    *,
    out: Out,
) -> np.ndarray:
    how = geometry(x, wholes(kernel_sizes), strides, pad_type, pad)
    return _pooled(x, how, bool(ceil_mode), -np.inf, out, lambda view, axes: view.max(axis=axes))


@op("avg_pool")
def avg_pool(
    x: np.ndarray,
    kernel_sizes: Any,
    pad_type: Any,
    strides: Any = None,
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
    *,
    out: Out,
) -> np.ndarray:
    """The padding counts as elements unless it is excluded; what lies beyond it, with `ceil_mode`, never does."""
    how = geometry(x, wholes(kernel_sizes), strides, pad_type, pad)
    total = _pooled(x, how, bool(ceil_mode), 0, out, lambda view, axes: view.sum(axis=axes))
    places = total.shape[2:]
    count = np.ones((), np.float32)
    for axis, size in enumerate(x.shape[2:]):
        before, after = how.pads[axis]
        low, high = (before, before + size) if exclude_padding_from_average else (0, before + size + after)
        starts = np.arange(places[axis]) * how.strides[axis]
        inside = np.clip(starts + how.kernel[axis], low, high) - np.clip(starts, low, high)
        count = count * inside.reshape([-1 if i == axis else 1 for i in range(len(places))]).astype(np.float32)
    return total / count


@op("l2_pool")
def l2_pool(
    x: np.ndarray,
    kernel_sizes: Any,
    pad_type: Any,
    strides: Any = None,
    pad: Any = None,
    ceil_mode: Any = False,
    *,
    out: Out,
) -> np.ndarray:
    """The square root of the sum of squares."""
    how = geometry(x, wholes(kernel_sizes), strides, pad_type, pad)
    return np.sqrt(_pooled(np.square(x), how, bool(ceil_mode), 0, out, lambda view, axes: view.sum(axis=axes)))
