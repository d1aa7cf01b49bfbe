"""Reductions over axes. Sums are made in single precision, pairwise as numpy makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgewise.targets.coreml.interpreter.registry import axis_of, op, wholes

Reduction = Callable[..., np.ndarray]


def _reduction(name: str, function: Reduction) -> None:
    @op(name)
    def run(x: np.ndarray, axes: Any = None, keep_dims: Any = False) -> np.ndarray:
        along = None if axes is None else tuple(axis_of(axis, x.ndim) for axis in wholes(axes))
        return np.asarray(function(x, axis=along, keepdims=bool(keep_dims))).astype(x.dtype, copy=False)


def _log_sum_exp(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    result = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return result if keepdims else result.squeeze(axis)


def _sum(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return x.sum(axis=axis, keepdims=keepdims, dtype=x.dtype)


_reduction("reduce_sum", _sum)
_reduction("reduce_mean", np.mean)
_reduction("reduce_max", np.max)
_reduction("reduce_min", np.min)
_reduction("reduce_prod", lambda x, axis, keepdims: x.prod(axis=axis, keepdims=keepdims, dtype=x.dtype))
_reduction("reduce_l1_norm", lambda x, **where: _sum(np.abs(x), **where))
_reduction("reduce_l2_norm", lambda x, **where: np.sqrt(_sum(np.square(x), **where)))
_reduction("reduce_sum_square", lambda x, **where: _sum(np.square(x), **where))
_reduction("reduce_log_sum", lambda x, **where: np.log(_sum(x, **where)))
_reduction("reduce_log_sum_exp", _log_sum_exp)


@op("reduce_argmax")
def reduce_argmax(x: np.ndarray, axis: Any = -1, keep_dims: Any = False, output_dtype: Any = "int32") -> np.ndarray:
    """The first of equal elements."""
    return np.argmax(x, axis=axis_of(axis, x.ndim), keepdims=bool(keep_dims))


@op("reduce_argmin")
def reduce_argmin(x: np.ndarray, axis: Any = -1, keep_dims: Any = False, output_dtype: Any = "int32") -> np.ndarray:
    """The first of equal elements."""
    return np.argmin(x, axis=axis_of(axis, x.ndim), keepdims=bool(keep_dims))
