"""The data of `demo:motion`: a shape that moves left, right, up or down over a noisy ground, past another that rests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgewise.demos.drawing import SHAPES, background, paint, rng, to_bytes

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LABELS = tuple(f"{shape} {direction}" for shape in SHAPES for direction in DIRECTIONS)
FRAMES, SIZE = 8, 48  # pixels each way
TEST = 320  # clips of the test split
MEAN = STD = 0.5

# Clips of the test split have seeds that no clip for training has.
_FIRST = {"train": 0, "test": 2**31}


@dataclass(frozen=True)
class Path:
    """A shape with its centre in every frame, `x` and `y (8,)` in pixels; `step` is its direction, (0, 0) at rest."""

    shape: str
    step: tuple[int, int]
    radius: float
    x: np.ndarray
    y: np.ndarray


def clip(split: str, index: int) -> tuple[np.ndarray, int, list[Path]]:
    """Clip `index` of the split "train" (endless) or "test": frames `(8, 48, 48, 3)` in uint8, its class in `LABELS`,
    and the two shapes, the moving one, which lies on top, last.

    The shape moves by 1.5 to 3 pixels a frame. No single frame tells which of the two moves, nor where to.
    """
    random = rng(_FIRST[split] + index)
    label = random.randint(len(LABELS))
    shape, direction = SHAPES[label // len(DIRECTIONS)], list(DIRECTIONS.values())[label % len(DIRECTIONS)]
    frames = background(random, FRAMES, SIZE)
    other = SHAPES[(SHAPES.index(shape) + random.randint(1, len(SHAPES))) % len(SHAPES)]
    paths = [_paint_path(random, frames, other, (0, 0)), _paint_path(random, frames, shape, direction)]
    return to_bytes(frames), int(label), paths


def _paint_path(random: np.random.RandomState, frames: np.ndarray, shape: str, step: tuple[int, int]) -> Path:
    """Draw a shape at a random place, its whole path within the frame."""
    radius, speed = random.uniform(6, 9), random.uniform(1.5, 3)
    colour = random.randint(0, 256, 3)
    # Bright enough against the ground in at least one channel.
    colour[random.randint(3)] = random.randint(190, 256)
    moved = speed * (np.arange(FRAMES) - (FRAMES - 1) / 2)
    x, y = (
        random.uniform(margin, SIZE - margin) + moved * along
        for along, margin in ((along, radius + moved[-1] * abs(along)) for along in step)
    )
    for number, frame in enumerate(frames):
        paint(frame, shape, colour, x[number], y[number], radius)
    return Path(shape, step, radius, x, y)


def normalise(frames: np.ndarray) -> np.ndarray:
    """Frames `(clips, 8, 48, 48, 3)` in uint8 as the model takes them: `(clips, 8, 3, 48, 48)` in fp32, -1 to 1."""
    return ((frames.transpose(0, 1, 4, 2, 3) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)).astype(np.float32)


def whole_test_split() -> tuple[np.ndarray, np.ndarray]:
    """The whole test split: `pixel_values (320, 8, 3, 48, 48)` in fp32, and labels `(320,)`."""
    frames, labels, _ = zip(*(clip("test", index) for index in range(TEST)), strict=True)
    return normalise(np.stack(frames)), np.array(labels, np.int64)
