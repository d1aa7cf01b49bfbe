"""Convolutions over one, two or three axes, as products of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.ops.windows import ALL, Geometry, geometry, padded, windows
from edgewise.targets.coreml.interpreter.registry import Out, op, text, whole, wholes

_COLUMNS = 1 << 24  # elements of windows that are laid out at a time
_TAPS = 1 << 12  # elements of a kernel that are taken one after the other


@op("conv")
def conv(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    strides: Any = None,
    pad_type: Any = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
    *,
    out: Out,
) -> np.ndarray:
    """`x (N, in, *spatial)`, `weight (out, in / groups, *kernel)`, `bias (out)`."""
    count = _check_groups(x.shape[1], weight.shape[0], groups)
    if weight.ndim != x.ndim or weight.shape[1] * count != x.shape[1]:
        raise InputError(f"{x.shape[1]} channels in {count} groups, with weights of shape {list(weight.shape)}")
    how = geometry(x, weight.shape[2:], strides, pad_type, pad, dilations)
    places = how.places(x.shape[2:])
    shape = out.promise((x.shape[0], weight.shape[0], *places))
    source = padded(x, how.pads, 0, out)
    if weight.shape[1] == 1 and weight.shape[0] == count and math.prod(how.kernel) <= _TAPS:
        result = _depthwise(source, weight, how, places)
    else:
        result = _by_matrices(source, weight, how, places, count)
    if bias is not None:
        result += bias.reshape(-1, *[1] * len(places))
    return result.reshape(shape)


def _check_groups(channels: int, outputs: int, groups: Any) -> int:
    count = whole(groups)
    if count < 1 or channels % count or outputs % count:
        raise InputError(f"{channels} channels to {outputs} in {count} groups")
    return count


def _by_matrices(x: np.ndarray, weight: np.ndarray, how: Geometry, places: Sequence[int], groups: int) -> np.ndarray:
    """For every sample and group, weights `(out, in * kernel)` times the windows as columns `(in * kernel, places)`."""
    batch, inner = x.shape[0], weight[0].size
    matrix = weight.reshape(groups, -1, inner)
    result = np.empty((batch, groups, matrix.shape[1], *places), np.float32)
    view = windows(x, how, places)
    rank, depth = len(places), weight.shape[1]
    # (N, in, *kernel, *places)
    view = np.moveaxis(view, range(2 + rank, 2 + 2 * rank), range(2, 2 + rank))
    rows = max(1, _COLUMNS // max(1, inner * math.prod(places[1:])))
    for sample in range(batch):
        for group in range(groups):
            for start in range(0, places[0], rows):
                channels = view[sample, group * depth : (group + 1) * depth]
                part = channels[ALL * (1 + rank) + (slice(start, start + rows),)]
                product = matrix[group] @ part.reshape(inner, -1)
                result[sample, group, :, start : start + rows] = product.reshape(-1, *part.shape[1 + rank :])
    return result.reshape(batch, -1, *places)


def _depthwise(x: np.ndarray, weight: np.ndarray, how: Geometry, places: Sequence[int]) -> np.ndarray:
    """One filter a channel: a sum over the kernel's elements of shifted tensors."""
    result = np.zeros((*x.shape[:2], *places), np.float32)
    ones = [1] * len(places)
    for tap in np.ndindex(*how.kernel):
        at = tuple(
            slice(i * d, i * d + (count - 1) * s + 1, s)
            for i, d, s, count in zip(tap, how.dilations, how.strides, places, strict=True)
        )
        result += x[ALL * 2 + at] * weight[:, 0][ALL + tap].reshape(-1, *ones)
    return result


@op("conv_transpose")
def conv_transpose(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    pad: Any = None,
    output_shape: Any = None,
    pad_type: Any = "valid",
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
    *,
    out: Out,
) -> np.ndarray:
    """`x (N, in, *spatial)`, `weight (in, out / groups, *kernel)`: every element adds its filter to the output."""
    count = _check_groups(x.shape[1], x.shape[1], groups)
    if weight.ndim != x.ndim or weight.shape[0] != x.shape[1]:
        raise InputError(f"{x.shape[1]} channels, with weights of shape {list(weight.shape)}")
    kind = text(pad_type)
    how = geometry(x, weight.shape[2:], strides, "custom" if kind == "custom" else "valid", pad, dilations)
    full = [(size - 1) * s + extent for size, s, extent in zip(x.shape[2:], how.strides, how.extent, strict=True)]
    before = [one for one, _ in how.pads]
    if output_shape is not None:
        spatial = list(wholes(output_shape))[2:]
    elif kind in ("same", "same_lower"):
        spatial = [size * s for size, s in zip(x.shape[2:], how.strides, strict=True)]
    else:
        spatial = [size - sum(pads) for size, pads in zip(full, how.pads, strict=True)]
    if kind in ("same", "same_lower"):
        excess = [max(0, size - wanted) for size, wanted in zip(full, spatial, strict=True)]
        before = [one // 2 if kind == "same" else one - one // 2 for one in excess]
    shape = out.promise((x.shape[0], weight.shape[1] * count, *spatial))
    whole_shape = [max(size, start + wanted) for size, start, wanted in zip(full, before, spatial, strict=True)]
    out.room((*shape[:2], *whole_shape))
    result = np.zeros((x.shape[0], count, weight.shape[1], *whole_shape), np.float32)
    inputs = x.reshape(x.shape[0], count, x.shape[1] // count, -1)
    filters = weight.reshape(count, x.shape[1] // count, weight.shape[1], *weight.shape[2:])
    for tap in np.ndindex(*how.kernel):
        at = tuple(
            slice(i * d, i * d + (size - 1) * s + 1, s)
            for i, d, s, size in zip(tap, how.dilations, how.strides, x.shape[2:], strict=True)
        )
        product = filters[ALL * 3 + tap].swapaxes(-1, -2) @ inputs
        result[ALL * 3 + at] += product.reshape(*product.shape[:3], *x.shape[2:])
    inside = tuple(slice(start, start + size) for start, size in zip(before, spatial, strict=True))
    result = result[ALL * 3 + inside].reshape(shape)
    return result if bias is None else result + bias.reshape(-1, *[1] * len(spatial))
