"""Resizing of the last axes, by the nearest or by linear interpolation, an axis after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import Out, op, text, whole, wholes


def _grid(mode: str, size: int, wanted: int) -> np.ndarray:
    """Where each of `wanted` samples lies among `size` elements."""
    places = np.arange(wanted, dtype=np.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if wanted == 1:
            return np.full(1, (size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0)
        return places * ((size - 1) / (wanted - 1))
    if mode == "DEFAULT":
        return places * (size / wanted)
    if mode == "OFFSET_CORNERS":
        return (places + 0.5) * (max(1, size - 1) / wanted)
    if mode == "UNALIGN_CORNERS":
        return (places + 0.5) * (size / wanted) - 0.5
    raise InputError(f"sampling mode '{mode}'")


def _resized(x: np.ndarray, sizes: Sequence[int], mode: str, nearest: bool, out: Out) -> np.ndarray:
    """`x` with its last axes of these sizes."""
    if len(sizes) > x.ndim or min(sizes, default=1) < 1 or 0 in x.shape:
        raise InputError(f"a tensor of shape {list(x.shape)} cannot be resized to {list(sizes)}")
    first = x.ndim - len(sizes)
    out.promise((*x.shape[:first], *sizes))
    for axis, wanted in enumerate(sizes, first):
        size = x.shape[axis]
        if size == wanted and mode != "OFFSET_CORNERS":
            continue
        grid = np.clip(_grid(mode, size, wanted), 0, size - 1)
        low = np.floor(grid).astype(np.int64)
        if nearest:
            x = np.take(x, low, axis=axis)
            continue
        share = (grid - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        high = np.minimum(low + 1, size - 1)
        x = np.take(x, low, axis=axis) * (1 - share) + np.take(x, high, axis=axis) * share
    return x


def _scaled(x: np.ndarray, height: Any, width: Any) -> tuple[int, int]:
    factors = [float(np.asarray(one).reshape(())) for one in (height, width)]
    if x.ndim < 3 or not np.isfinite(factors).all():
        raise InputError(f"a tensor of shape {list(x.shape)} scaled by {factors}")
    return int(x.shape[-2] * factors[0]), int(x.shape[-1] * factors[1])


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(
    x: np.ndarray, scale_factor_height: Any = 1, scale_factor_width: Any = 1, *, out: Out
) -> np.ndarray:
    return _resized(x, _scaled(x, scale_factor_height, scale_factor_width), "DEFAULT", True, out)


@op("resize_nearest_neighbor")
def resize_nearest_neighbor(x: np.ndarray, target_size_height: Any, target_size_width: Any, *, out: Out) -> np.ndarray:
    return _resized(x, (whole(target_size_height), whole(target_size_width)), "DEFAULT", True, out)


@op("upsample_bilinear")
def upsample_bilinear(
    x: np.ndarray,
    scale_factor_height: Any = 1,
    scale_factor_width: Any = 1,
    align_corners: Any = True,
    half_pixel_centers: Any = None,
    *,
    out: Out,
) -> np.ndarray:
    half = not bool(align_corners) if half_pixel_centers is None else bool(half_pixel_centers)
    if align_corners and half:
        raise InputError("corners are aligned, or centres are: not both")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    return _resized(x, _scaled(x, scale_factor_height, scale_factor_width), mode, False, out)


@op("resize_bilinear")
def resize_bilinear(
    x: np.ndarray,
    target_size_height: Any = 1,
    target_size_width: Any = 1,
    sampling_mode: Any = "DEFAULT",
    *,
    out: Out,
) -> np.ndarray:
    return _resized(x, (whole(target_size_height), whole(target_size_width)), text(sampling_mode), False, out)


@op("resize")
def resize(
    x: np.ndarray,
    shape: Any,
    resized_dims: Any,
    interpolation_mode: Any = "LINEAR",
    sampling_mode: Any = "DEFAULT",
    *,
    out: Out,
) -> np.ndarray:
    """The last `resized_dims` sizes of `shape`; 0 keeps a size."""
    count, kind, mode = whole(resized_dims), text(interpolation_mode), text(sampling_mode)
    wanted = wholes(shape)
    if not 0 <= count <= min(len(wanted), x.ndim) or kind not in ("LINEAR", "NEAREST_NEIGHBOR"):
        raise InputError(f"{count} of the sizes {wanted} with interpolation '{kind}'")
    if kind == "NEAREST_NEIGHBOR" and mode != "DEFAULT":
        raise InputError(f"which neighbour is nearest with the sampling mode '{mode}' is not documented")
    last = wanted[len(wanted) - count :]
    sizes = [size or have for size, have in zip(last, x.shape[x.ndim - count :], strict=True)]
    return _resized(x, sizes, mode, kind == "NEAREST_NEIGHBOR", out)
