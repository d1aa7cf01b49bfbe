"""Flat shapes, drawn the same on every machine: NumPy's frozen random stream, and arithmetic that IEEE 754 fixes."""

from __future__ import annotations

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")

# Points of a pixel, each way, at which the outline is tested.
_SAMPLES = 4


def rng(seed: int) -> np.random.RandomState:
    """A random stream that no release of NumPy changes: `RandomState` is frozen, the newer `Generator` is not."""
    return np.random.RandomState(seed)


def background(random: np.random.RandomState, frames: int, size: int) -> np.ndarray:
    """Dark grey with a slope of brightness over the frame and noise at every pixel: `(frames, size, size, 3)`, 0 to 255."""
    level, across, down = random.randint(50, 100), *random.randint(-20, 21, 2)
    place = np.arange(size) / (size - 1) - 0.5
    slope = level + across * place + down * place[:, None]
    noise = random.randint(-10, 11, (frames, size, size, 3))
    return slope[None, :, :, None] + noise


def paint(image: np.ndarray, shape: str, colour: np.ndarray, x: float, y: float, radius: float) -> None:
    """Paint a shape into `image (H, W, 3)`, in place, its edge smoothed.

    `x` and `y` are the centre in pixels from the left and top edge; the shape fits into `2 * radius` pixels each way.
    What lies outside of the image is cut off.
    """
    height, width, _ = image.shape
    left, right = max(int(x - radius) - 1, 0), min(int(x + radius) + 2, width)
    top, bottom = max(int(y - radius) - 1, 0), min(int(y + radius) + 2, height)
    across = (left - x + (np.arange((right - left) * _SAMPLES) + 0.5) / _SAMPLES) / radius
    down = (top - y + (np.arange((bottom - top) * _SAMPLES) + 0.5) / _SAMPLES)[:, None] / radius
    inside = _inside(shape, across, down)
    cells = inside.reshape(bottom - top, _SAMPLES, right - left, _SAMPLES)
    cover = cells.sum((1, 3))[..., None] / _SAMPLES**2
    region = image[top:bottom, left:right]
    region += cover * (colour - region)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in a shape of radius 1 round the origin; y points down."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return (np.abs(x) <= 0.88) & (np.abs(y) <= 0.88)
    if shape == "triangle":
        return (np.abs(x) * 2 <= y + 1) & (y <= 1)
    if shape == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) <= 0.34) & (np.maximum(np.abs(x), np.abs(y)) <= 1)
    raise ValueError(f"no shape {shape!r}: {', '.join(SHAPES)}")


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Round to uint8."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
