"""Windows that slide over padded tensors: what convolutions and pools share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import Out, text, wholes

ALL = (slice(None),)
"""The whole of one axis, as part of an index."""


@dataclass(frozen=True)
class Geometry:
    """How windows slide over the spatial axes, each field with one entry an axis: `pads` before and after it."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @property
    def extent(self) -> tuple[int, ...]:
        """From the first to the last element of a window."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    def places(self, spatial: Sequence[int], ceil: bool = False) -> tuple[int, ...]:
        """How many windows there are along each axis."""
        counts = []
        for size, extent, stride, (before, after) in zip(spatial, self.extent, self.strides, self.pads, strict=True):
            span = size + before + after - extent
            if span < 0:
                raise InputError(f"a window of {extent} is larger than its {size + before + after} elements")
            count = (-(-span // stride) if ceil else span // stride) + 1
            if ceil and (count - 1) * stride >= size + before and before + after > 0:
                count -= 1  # a window must start on an element or on the padding before it
            counts.append(count)
        return tuple(counts)


def geometry(
    x: np.ndarray,
    kernel: Sequence[int],
    strides: Any = None,
    pad_type: Any = "valid",
    pad: Any = None,
    dilations: Any = None,
) -> Geometry:
    """Read the parameters that convolutions and pools have in common, for `x (N, C, *spatial)`."""
    rank = x.ndim - 2
    steps = (1,) * rank if strides is None else wholes(strides)
    spread = (1,) * rank if dilations is None else wholes(dilations)
    kind = text(pad_type)
    if rank < 1 or len(kernel) != rank or len(steps) != rank or len(spread) != rank:
        raise InputError(f"a tensor of shape {list(x.shape)} with kernel {kernel}, strides {steps}, dilations {spread}")
    if min(*kernel, *steps, *spread) < 1:
        raise InputError(f"kernel {kernel}, strides {steps} and dilations {spread} must be positive")
    if kind == "valid":
        pads = [(0, 0)] * rank
    elif kind == "custom":
        flat = (0,) * (2 * rank) if pad is None else wholes(pad)
        if len(flat) != 2 * rank or min(flat) < 0:
            raise InputError(f"a padding of {flat} for {rank} axes")
        pads = list(zip(flat[::2], flat[1::2], strict=True))
    elif kind in ("same", "same_lower"):
        pads = []
        for size, k, s, d in zip(x.shape[2:], kernel, steps, spread, strict=True):
            total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
            less, more = total // 2, total - total // 2
            pads.append((less, more) if kind == "same" else (more, less))
    else:
        raise InputError(f"pad_type '{kind}'")
    return Geometry(tuple(kernel), steps, spread, tuple(pads))


def padded(x: np.ndarray, pads: Sequence[tuple[int, int]], value: float, out: Out) -> np.ndarray:
    """`x (N, C, *spatial)` with `value` around its spatial axes."""
    if not any(before or after for before, after in pads):
        return x
    shape = (*x.shape[:2], *(size + sum(pad) for size, pad in zip(x.shape[2:], pads, strict=True)))
    out.room(shape, x.itemsize)
    result = np.full(shape, value, x.dtype)
    inside = tuple(slice(before, before + size) for size, (before, _) in zip(x.shape[2:], pads, strict=True))
    result[ALL * 2 + inside] = x
    return result


def windows(x: np.ndarray, how: Geometry, places: Sequence[int]) -> np.ndarray:
    """A view `(N, C, *places, *kernel)` of a padded `x (N, C, *spatial)`. Raises `InputError` if a window lies beyond it."""
    for size, extent, stride, count in zip(x.shape[2:], how.extent, how.strides, places, strict=True):
        # What is not checked here would read beyond the array.
        if count < 1 or (count - 1) * stride + extent > size:
            raise InputError(f"{count} windows of {extent} by {stride} do not lie within {size} elements")
    across = x.strides[2:]
    moves = [step * stride for step, stride in zip(across, how.strides, strict=True)]
    spread = [step * dilation for step, dilation in zip(across, how.dilations, strict=True)]
    return as_strided(x, (*x.shape[:2], *places, *how.kernel), (*x.strides[:2], *moves, *spread), writeable=False)
