"""What a package says of its inputs beside their types: images, and shapes that may vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_COLOURS = {10: "grayscale", 20: "RGB", 30: "BGR", 40: "grayscale"}


@dataclass(frozen=True)
class Feature:
    """One input: its default shape, and the other shapes that it may have: some, or a range for each axis (None: no end)."""

    shape: tuple[int, ...]
    shapes: frozenset[tuple[int, ...]] = frozenset()
    ranges: tuple[tuple[int, int | None], ...] = ()
    meaning: str = ""

    @property
    def varies(self) -> bool:
        return bool(self.shapes or self.ranges)

    @property
    def allowed(self) -> str:
        """The shapes that are allowed, in words."""
        if self.shapes:
            return "one of " + ", ".join(str(shape) for shape in sorted(self.shapes))
        return "sizes of " + ", ".join(f"{low} to {'any' if high is None else high}" for low, high in self.ranges)

    def allows(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape may be fed."""
        if self.shapes:
            return tuple(shape) in self.shapes
        return len(shape) == len(self.ranges) and all(
            low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, self.ranges, strict=True)
        )


def features(description: Any, function: str) -> dict[str, Feature]:
    """What a protobuf `ModelDescription` says of the inputs of a function."""
    mine = next((one for one in description.functions if one.name == function), description)
    found = {}
    for one in mine.input:
        if one.type.HasField("multiArrayType"):
            found[one.name] = _array(one.type.multiArrayType, one.shortDescription)
        elif one.type.HasField("imageType"):
            found[one.name] = _image(one.type.imageType)
    return found


def _array(type_: Any, meaning: str) -> Feature:
    return Feature(
        shape=tuple(type_.shape),
        shapes=frozenset(tuple(one.shape) for one in type_.enumeratedShapes.shapes),
        ranges=tuple(_range(one) for one in type_.shapeRange.sizeRanges),
        meaning=meaning,
    )


def _image(type_: Any) -> Feature:
    """An image is fed as the array `(1, channels, height, width)` that the program declares, of values from 0 to 255."""
    colour = _COLOURS.get(type_.colorSpace, "unknown")
    channels = 1 if colour == "grayscale" else 3

    def shape(width: int, height: int) -> tuple[int, ...]:
        return (1, channels, height, width)

    ranges: tuple[tuple[int, int | None], ...] = ()
    if type_.HasField("imageSizeRange"):
        size = type_.imageSizeRange
        ranges = ((1, 1), (channels, channels), _range(size.heightRange), _range(size.widthRange))
    return Feature(
        shape=shape(type_.width, type_.height),
        shapes=frozenset(shape(one.width, one.height) for one in type_.enumeratedSizes.sizes),
        ranges=ranges,
        meaning=f"an image, {colour}, 0 to 255",
    )


def _range(message: Any) -> tuple[int, int | None]:
    return message.lowerBound, None if message.upperBound < 0 else message.upperBound
