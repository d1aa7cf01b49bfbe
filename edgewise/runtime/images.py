"""Image files and pictures as the array that a model takes, with the constants of its processor. Needs Pillow, and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.errors import InputError, extras_named

with extras_named():
    from PIL import Image, ImageOps

_MOST_PIXELS = 1 << 27


def load_pixels(image: Path | np.ndarray, shape: tuple[int, ...], preprocessing: Mapping[str, Any]) -> np.ndarray:
    """An image file, or a picture `(H, W, 3)` in uint8, as `shape (1, C, H, W)`. Raises InputError if it cannot be read, or the
    model takes something else."""
    if len(shape) != 4 or shape[0] != 1 or shape[1] not in (1, 3):
        raise InputError(f"the model takes images as {list(shape)}, which is not made of a file here: give the array")
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)
    return normalised([fitted(picture, shape[-2:], preprocessing)], shape[1], preprocessing)[0]


def open_image(path: Path) -> Image.Image:
    """An image file in RGB, or RGBA where anything shines through, turned as its EXIF orientation says. Grey of 16 bits is scaled
    to 8. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, and one image is needed")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with Image.open(path) as file:
            if file.width * file.height > _MOST_PIXELS:
                raise InputError(f"{path} has {file.width} x {file.height} pixels, more than are read")
            file.load()
            picture = ImageOps.exif_transpose(file)
            if picture.mode[0] in "IF":
                return _eight_bits(picture, _white(file, path))
            clear = "transparency" in file.info or "A" in picture.getbands() or "a" in picture.getbands()
            return picture.convert("RGBA" if clear else "RGB")
    except InputError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise InputError(f"{path} is no image that can be read: {str(error) or type(error).__name__}") from error


def _white(file: Any, path: Path) -> int:
    """The value of white in an image of one channel with more than 8 bits."""
    if file.mode.startswith("I;16"):
        return (1 << int(file.tag_v2.get(258, (16,))[0])) - 1 if file.format == "TIFF" else 65535
    if file.mode == "I" and file.format in ("PNG", "PPM"):
        return 65535
    kind = "floating-point numbers" if file.mode == "F" else "whole numbers of 32 bits"
    raise InputError(f"{path} holds {kind}, and does not say which is white: save it with 8 or 16 bits a channel, or give arrays")


def _eight_bits(picture: Image.Image, white: int) -> Image.Image:
    grey = np.asarray(picture).astype(np.float64) * (255 / white)
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def opaque(picture: Image.Image) -> Image.Image:
    """In RGB alone. What shines through is white, as in transformers' `convert_to_rgb`."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def shortest_edge(preprocessing: Mapping[str, Any]) -> int | None:
    """What the processor makes of the shorter side, if that is how it resizes. With a longest edge too, these are limits."""
    given = preprocessing.get("size")
    if not isinstance(given, Mapping) or "longest_edge" in given or not given.get("shortest_edge"):
        return None
    return int(given["shortest_edge"])


def check_scale(picture: Image.Image, scale: float) -> None:
    """Raises InputError where the resized picture, before its centre is cut out, has more pixels than are read."""
    width, height = (max(1, round(side * scale)) for side in picture.size)
    if width * height > _MOST_PIXELS:
        raise InputError(
            f"an image of {picture.width} x {picture.height} pixels becomes {width} x {height} before its centre is cut out, more "
            "than are made: give images that are less long and narrow"
        )


def fitted(picture: Image.Image, size: tuple[int, ...], preprocessing: Mapping[str, Any]) -> Image.Image:
    """Resized to `size (H, W)` as the processor does: the whole image, or its centre where the processor crops."""
    height, width = size
    picture = opaque(picture)
    kind = Image.Resampling(int(preprocessing.get("resample", Image.Resampling.BICUBIC)))
    crop, edge = preprocessing.get("crop_size"), shortest_edge(preprocessing)
    cropped = preprocessing.get("do_center_crop", crop is not None)
    if not cropped and edge is None:
        return picture.resize((width, height), kind)
    sides = [crop.get("height"), crop.get("width")] if isinstance(crop, Mapping) else [crop]
    short = min((int(side) for side in sides if side), default=0)
    # The edge before the crop, in proportion where the input has another size than the processor makes.
    share = max(1.0, edge / short) if edge and short else 1.0
    scale = max(height * share / picture.height, width * share / picture.width)
    check_scale(picture, scale)
    large = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))), kind)
    left, top = (large.width - width) // 2, (large.height - height) // 2
    return large.crop((left, top, left + width, top + height))


def normalised(
    pictures: list[Image.Image], channels: int, preprocessing: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Arrays `(n, C, H, W)`, and what had to be assumed."""
    mode = "L" if channels == 1 else "RGB"
    array = np.stack([np.asarray(p.convert(mode), np.float32).reshape(p.height, p.width, -1) for p in pictures])
    if preprocessing.get("do_rescale", True):
        array = array * np.float32(preprocessing.get("rescale_factor", 1 / 255))
    mean, std = constants(preprocessing, channels)
    notes: tuple[str, ...] = ()
    if "image_mean" not in preprocessing:
        notes = ("the model comes without constants of its processor: pixels were scaled to -1 to 1",)
    return ((array - mean) / std).transpose(0, 3, 1, 2).astype(np.float32), notes


def constants(preprocessing: Mapping[str, Any], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation by channel."""
    if not preprocessing.get("do_normalize", True):
        return np.zeros(1, np.float32), np.ones(1, np.float32)
    pair = [np.array(preprocessing.get(key, [0.5]), np.float32).reshape(-1) for key in ("image_mean", "image_std")]
    if any(len(one) not in (1, channels) for one in pair):
        raise InputError(f"the processor's image_mean and image_std are not for {channels} channels")
    return pair[0], pair[1]
