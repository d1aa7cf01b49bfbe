"""Pixels in the place of what a processor makes of them: for artifacts that take images. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgewise.errors import InputError

KEY = "image_input"
"""Where the preprocessing of a bundle keeps the input that takes pixels."""
COLOURS = {1: "grayscale", 3: "RGB"}
_OFF = 0.1
"""How far a value may be from a pixel, in steps of one: halves, in which splits are stored, are up to 0.04 off."""


@dataclass(frozen=True)
class Pixels:
    """The input `name` takes pixels, whole numbers from 0 to 255 `(B, C, H, W)`; the model sees `scale * pixel + bias`, a pair for
    each channel: what the processor's rescaling, mean and standard deviation come to."""

    name: str
    colour: str
    scale: tuple[float, ...]
    bias: tuple[float, ...]

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """What the processor makes of pixels, float32."""
        scale, bias = (np.reshape(one, (-1, 1, 1)) for one in (self.scale, self.bias))
        return np.asarray(pixels * scale + bias, np.float32)

    def recovered(self, array: np.ndarray, where: str) -> np.ndarray:
        """The pixels that the processor made an array of, float32. Raises `InputError` if it made it of none."""
        scale, bias = (np.reshape(one, (-1, 1, 1)) for one in (self.scale, self.bias))
        found = (array.astype(np.float64) - bias) / scale
        whole = found.round()
        if not (np.abs(found - whole).max() <= _OFF and whole.min() >= 0 and whole.max() <= 255):
            raise InputError(f"{where}: {self.name} is not what the processor makes of pixels, and pixels are taken, 0 to 255")
        return whole.astype(np.float32)


def is_of_images(preprocessing: Mapping[str, Any]) -> bool:
    """Whether there are constants of a processor of images."""
    return bool({"image_mean", "image_std", "do_rescale", "do_normalize", "rescale_factor"} & set(preprocessing))


def pixels_of(name: str, shape: tuple[int, ...], preprocessing: Mapping[str, Any]) -> Pixels:
    """The pixels of an input of `shape (B, C, H, W)`, by its processor's constants. Raises `InputError` if there can be none."""
    if len(shape) != 4 or shape[1] not in COLOURS:
        raise InputError(f"{name} has shape {list(shape)}: an image input is of 1 or 3 channels, (1, C, H, W)")
    if shape[0] != 1:
        raise InputError(f"{name} has a batch of {shape[0]}: an image input takes one image at a time; leave --batch out")
    if not is_of_images(preprocessing):
        raise InputError(
            "an image input is made of the constants of the processor (preprocessor_config.json), and the model with the input "
            f"{name} comes without them"
        )
    from edgewise.runtime.images import constants  # needs Pillow, which a device may lack

    mean, std = (np.broadcast_to(one.astype(np.float64), shape[1]) for one in constants(preprocessing, shape[1]))
    factor = float(preprocessing.get("rescale_factor", 1 / 255)) if preprocessing.get("do_rescale", True) else 1.0
    if not np.all(np.isfinite(std) & (std > 0)) or not np.isfinite(factor) or factor <= 0:
        raise InputError(f"the processor divides by {std.tolist()} and multiplies by {factor}: no pixels can be made of that")
    return Pixels(name, COLOURS[shape[1]], tuple((factor / std).tolist()), tuple((-mean / std).tolist()))


def without_constants(preprocessing: Mapping[str, Any], pixels: Pixels) -> dict[str, Any]:
    """The preprocessing of a model that takes pixels: it resizes, and does no more."""
    known = {"name": pixels.name, "colour": pixels.colour, "scale": list(pixels.scale), "bias": list(pixels.bias)}
    kept = {key: value for key, value in preprocessing.items() if key not in ("image_mean", "image_std", "rescale_factor")}
    return {**kept, "do_rescale": False, "do_normalize": False, "image_mean": [0.0], "image_std": [1.0], KEY: known}


def stated(preprocessing: Mapping[str, Any] | None) -> Pixels | None:
    """The input that takes pixels, as the preprocessing says; None: there is none. Raises `InputError` if it cannot be read."""
    known = (preprocessing or {}).get(KEY)
    if known is None:
        return None
    try:
        scale, bias = (tuple(float(one) for one in known[key]) for key in ("scale", "bias"))
        return Pixels(known["name"], known["colour"], scale, bias)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the preprocessing has a damaged {KEY}, {known!r}: export the model anew") from error


def as_pixels(arrays: Mapping[str, np.ndarray], preprocessing: Mapping[str, Any] | None, where: str) -> dict[str, np.ndarray]:
    """Arrays that a processor made, as the model with this preprocessing takes them: its image input, if it has one, in pixels."""
    pixels = stated(preprocessing)
    if pixels is None or pixels.name not in arrays:
        return dict(arrays)
    return {**arrays, pixels.name: pixels.recovered(arrays[pixels.name], where)}
