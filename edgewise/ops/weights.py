"""Tensors that come from a file: the weights of a method, or the embedding of a fixed prompt."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file by name, or that of a `.npy` file as `array`.

    Raises ValueError if there is no such file, or it cannot be read; nothing is ever unpickled.
    """
    place = Path(path)
    if not place.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if place.suffix == ".safetensors":
            return load_file(place)
        if place.suffix == ".npy":
            return {"array": torch.from_numpy(np.load(place, allow_pickle=False))}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    raise ValueError(f"{path} is neither a .safetensors nor a .npy file")
