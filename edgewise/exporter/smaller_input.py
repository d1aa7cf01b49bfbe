"""The baseline of a smaller input: the model itself on smaller pictures, so that it has as many tokens as compression leaves."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgewise.errors import InputError, Refused
from edgewise.exporter.capture import capture
from edgewise.exporter.sources import Source
from edgewise.passes.analysis import Stream
from edgewise.passes.program import Program

NAME = "smaller input"
INTERPOLATE = "interpolate_pos_encoding"
"""The keyword by which Hugging Face models take pictures of another size than they were trained on."""


@dataclass(frozen=True)
class SmallerInput:
    """A model captured at a smaller size `(height, width)` of the input called `input`, and the `tokens` that it has then."""

    program: Program
    input: str
    size: tuple[int, int]
    tokens: int

    def resize(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures `(samples, channels, height, width)` brought to the size: bilinear, with antialiasing, as processors do."""
        made = torch.nn.functional.interpolate(torch.from_numpy(pictures).float(), self.size, mode="bilinear", antialias=True)
        return made.numpy().astype(pictures.dtype)


def smaller_input(source: Source, program: Program, stream: Stream, wanted: int) -> SmallerInput:
    """The model at the size that gives nearest to `wanted` tokens, protected ones counted.

    Raises Refused, with the reason, where the model or its input has no other size.
    """
    if source.module is None:
        raise Refused("a saved program has one input size", method=NAME)
    pictures = [name for name, value in program.inputs.items() if value.ndim == 4 and value.is_floating_point()]
    if len(pictures) != 1 or stream.grid is None or len(stream.grid) != 2:
        raise Refused("it takes pictures that are cut into a grid of patches, and there is no one such input here", method=NAME)
    name = pictures[0]
    value, grid = program.inputs[name], stream.grid
    height, width = value.shape[2:]
    if height % grid[0] or width % grid[1]:
        raise Refused(f"a grid of {grid[0]} x {grid[1]} patches does not divide a picture of {height} x {width}", method=NAME)
    rows, columns = _shrunk(grid, wanted - stream.protected)
    size = (rows * height // grid[0], columns * width // grid[1])
    module = source.module
    known: dict[str, object] = {INTERPOLATE: True} if INTERPOLATE in inspect.signature(module.forward).parameters else {}
    small = torch.nn.functional.interpolate(value, size, mode="bilinear", antialias=True)
    try:
        made = capture(module, *_given(source, value, small, known))
        tokens = _tokens(made, stream)
    except InputError as error:
        raise Refused(f"the model cannot take pictures of {size[0]} x {size[1]} (no interpolated position embeddings): "
                      f"{str(error).splitlines()[0]}", method=NAME) from None
    if len(made.inputs) != len(program.inputs) or tokens >= stream.tokens:
        raise Refused(f"its tokens do not become fewer with the size of the picture ({tokens} at {size[0]} x {size[1]})",
                      method=NAME)
    return SmallerInput(made, name, size, tokens)


def _shrunk(grid: tuple[int, ...], wanted: int) -> tuple[int, int]:
    """The grid of nearest to `wanted` cells that is no larger and of nearly the same aspect."""
    rows = {round(grid[0] * n / grid[1]): n for n in range(1, grid[1] + 1)} if grid[1] > grid[0] else None
    pairs = [(r, c) for r, c in rows.items() if r] if rows is not None else \
        [(n, max(1, round(grid[1] * n / grid[0]))) for n in range(1, grid[0] + 1)]
    return min(pairs, key=lambda pair: (abs(pair[0] * pair[1] - wanted), pair[0] * pair[1]))


def _given(source: Source, value: Tensor, small: Tensor, known: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """The source's own arguments, with the picture replaced."""
    def swap(given: object) -> object:
        same = isinstance(given, Tensor) and given.shape == value.shape and torch.equal(given, value)
        return small if same else given

    return tuple(swap(a) for a in source.args), {k: swap(v) for k, v in source.kwargs.items()} | known


def _tokens(program: Program, like: Stream) -> int:
    """Tokens of the stream that is named as `like`."""
    found = [s for s in program.analysis.streams if s.name == like.name]
    if not found:
        raise InputError(f"it has no {like.name} any more")
    return found[0].tokens
