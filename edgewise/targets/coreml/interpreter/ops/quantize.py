"""Quantisation of activations: integers with a scale and a zero point."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import axis_of, op, text

_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def along_axis(parameter: Any, x: np.ndarray, axis: Any) -> np.ndarray:
    """A parameter of the whole of `x`, or one for each slice along an axis, as float32 that broadcasts with `x`."""
    flat = np.asarray(parameter, np.float32)
    if flat.size == 1:
        return flat.reshape(())
    if axis is None:
        raise InputError(f"{flat.size} scales or zero points without an axis")
    along = axis_of(axis, x.ndim)
    if flat.ndim != 1 or flat.size != x.shape[along]:
        raise InputError(f"scales or zero points of shape {list(flat.shape)} for an axis of {x.shape[along]}")
    return flat.reshape([-1 if i == along else 1 for i in range(x.ndim)])


@op("quantize")
def quantize(input: np.ndarray, scale: Any, output_dtype: Any, zero_point: Any = None, axis: Any = None) -> np.ndarray:
    """`clip(round(x / scale) + zero_point)`, ties to even; NaN becomes 0."""
    kind = text(output_dtype)
    if kind not in _RANGES:
        raise InputError(f"quantize to '{kind}'")
    result = np.rint(input / along_axis(scale, input, axis))
    if zero_point is not None:
        result += along_axis(zero_point, input, axis)
    return np.nan_to_num(np.clip(result, *_RANGES[kind]), nan=0).astype(kind)


@op("dequantize")
def dequantize(input: np.ndarray, scale: Any, zero_point: Any = None, axis: Any = None) -> np.ndarray:
    """`scale * (x - zero_point)`."""
    result = input.astype(np.float32)
    if zero_point is not None:
        result -= along_axis(zero_point, input, axis)
    return result * along_axis(scale, input, axis)
