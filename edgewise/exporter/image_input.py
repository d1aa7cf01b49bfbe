"""Let a captured program take pixels, and all that is fed to it be pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from edgewise.calibration.pixels import Pixels, as_pixels, pixels_of, without_constants
from edgewise.errors import InputError
from edgewise.exporter.sources import Source
from edgewise.passes.pixels import scale_input
from edgewise.passes.program import Program, make_program

_USUAL = "pixel_values"


def take_pixels(program: Program, source: Source, seed: int) -> tuple[Program, Pixels]:
    """The program with its image input in pixels, and the input. The source's samples and preprocessing become those of pixels.

    Raises `InputError` for a model without one image input, without a processor, of a batch, or of other than 1 or 3 channels.
    """
    images = [name for name, value in program.inputs.items() if value.is_floating_point() and value.ndim == 4]
    chosen = [_USUAL] if _USUAL in program.inputs else images
    if len(chosen) != 1:
        has = ", ".join(f"{name} {list(value.shape)}" for name, value in program.inputs.items())
        raise InputError(f"{source.class_name} has no input of one image (1, C, H, W): it takes {has}; leave --image-input out")
    (name,) = chosen
    pixels = pixels_of(name, tuple(program.inputs[name].shape), source.preprocessing)
    source.preprocessing = without_constants(source.preprocessing, pixels)
    source.samples = as_pixels(source.samples, source.preprocessing, source.name)
    real = source.samples.get(name)
    shape = tuple(program.inputs[name].shape)
    if real is not None and real.shape[1:] == shape[1:]:
        example = torch.from_numpy(real[:1].copy())
    else:
        generator = torch.Generator().manual_seed(seed)
        example = torch.randint(0, 256, shape, generator=generator).to(torch.float32)
    exported = scale_input(program.base, name, pixels.scale, pixels.bias)
    made = make_program(exported, {**program.inputs, name: example}, program.output_names)
    known = replace(made, order=program.order).with_role(program.role, source.tokens)
    return known, pixels


def eager_inputs(inputs: dict[str, torch.Tensor], pixels: Pixels | None) -> dict[str, torch.Tensor]:
    """Inputs of the program as the model takes them, pixels as its processor makes them."""
    if pixels is None:
        return inputs
    return {**inputs, pixels.name: torch.from_numpy(np.ascontiguousarray(pixels.normalised(inputs[pixels.name].numpy())))}
