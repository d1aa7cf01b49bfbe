"""Parts of images: a border taken off, and values at given places, as `grid_sample` of torch has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import Out, op, text, wholes


@op("crop")
def crop(x: Any, crop_height: Any, crop_width: Any, *, out: Out) -> Any:
    """Without so many rows above and below, and columns left and right."""
    cuts = (wholes(crop_height), wholes(crop_width))
    if x.ndim < 3 or any(len(cut) != 2 or min(cut) < 0 or sum(cut) >= size for cut, size in zip(cuts, x.shape[-2:], strict=True)):
        raise InputError(f"{cuts} cannot be taken off a tensor of shape {list(x.shape)}")
    (top, bottom), (left, right) = cuts
    out.promise((*x.shape[:-2], x.shape[-2] - top - bottom, x.shape[-1] - left - right))
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@op("resample")
def resample(
    x: Any,
    coordinates: Any,
    sampling_mode: Any,
    padding_mode: Any,
    padding_value: Any,
    coordinates_mode: Any,
    align_corners: Any,
    *,
    out: Out,
) -> Any:
    """The values of images `(B, C, H, W)` at `coordinates (B, h, w, 2)`, x before y."""
    if x.ndim != 4 or coordinates.ndim != 4 or coordinates.shape[0] != x.shape[0] or coordinates.shape[3] != 2 or 0 in x.shape:
        raise InputError(f"images of shape {list(x.shape)} have no values at places of shape {list(coordinates.shape)}")
    out.promise((*x.shape[:2], *coordinates.shape[1:3]))
    padding, corners = text(padding_mode), bool(np.asarray(align_corners).reshape(()))
    places = []
    for axis, size in ((1, x.shape[2]), (0, x.shape[3])):
        place = _in_pixels(coordinates[..., axis].astype(np.float64), size, text(coordinates_mode), corners)
        if not np.isfinite(place).all():
            raise InputError("a place is not finite")
        places.append(_folded(place, size, padding))
    mode = text(sampling_mode)
    if mode == "nearest":
        return _values(x, np.rint(places[0]), np.rint(places[1]), padding, padding_value)
    if mode != "bilinear":
        raise InputError(f"sampling mode '{mode}'")
    low = [np.floor(place) for place in places]
    share = [(place - floor)[:, None].astype(np.float32) for place, floor in zip(places, low, strict=True)]
    total = np.float32(0)
    for down in (0, 1):
        for right in (0, 1):
            weight = (share[0] if down else 1 - share[0]) * (share[1] if right else 1 - share[1])
            total = total + weight * _values(x, low[0] + down, low[1] + right, padding, padding_value)
    return total


def _in_pixels(place: np.ndarray, size: int, mode: str, corners: bool) -> np.ndarray:
    """Places along an axis, counted in its elements from the centre of the first."""
    if mode == "unnormalized":
        return place
    if mode == "normalized_minus_one_to_one":
        place = (place + 1) / 2
    elif mode != "normalized_zero_to_one":
        raise InputError(f"coordinates mode '{mode}'")
    return place * (size - 1) if corners else place * size - 0.5


def _folded(place: np.ndarray, size: int, padding: str) -> np.ndarray:
    """Places outside, as the padding has it, inside; with a constant they stay where they are."""
    if padding == "constant":
        return place.clip(-2, size + 1)  # beyond it is all the same
    if padding == "border":
        return place.clip(0, size - 1)
    if padding not in ("reflection", "symmetric"):
        raise InputError(f"padding mode '{padding}'")
    low, span = (0.0, size - 1.0) if padding == "reflection" else (-0.5, float(size))
    if span == 0:
        return np.zeros_like(place)
    turned = np.abs(place - low) % (2 * span)
    return (np.minimum(turned, 2 * span - turned) + low).clip(0, size - 1)


def _values(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, padding: str, value: Any) -> np.ndarray:
    """`x` at whole places `(B, h, w)`: `(B, C, h, w)`, with `value` outside."""
    height, width = x.shape[2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    at = (rows.clip(0, height - 1).astype(np.int64), columns.clip(0, width - 1).astype(np.int64))
    found = np.moveaxis(x[np.arange(len(x))[:, None, None], :, at[0], at[1]], -1, 1)
    return np.where(inside[:, None], found, np.float32(value)) if padding == "constant" else found
