"""Video files, and folders of frames, as pictures. Needs Pillow, and PyAV for files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.errors import InputError, MissingExtra, extras_named
from edgewise.runtime.images import fitted, normalised, open_image

with extras_named():
    from PIL import Image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_frames(path: Path, count: int) -> list[Image.Image]:
    """`count` frames at equal distances, of a folder of frames or a video file. Raises InputError; MissingExtra without PyAV."""
    return _folder(path, count) if path.is_dir() else _decoded(path, count)


def load_clip(video: Path | np.ndarray, shape: tuple[int, ...], preprocessing: Mapping[str, Any]) -> np.ndarray:
    """A video file, a folder of frames, or frames `(T, H, W, 3)` in uint8, as `shape (1, T, C, H, W)`, with the constants of the
    processor. Raises InputError if it cannot be read, or the model takes something else."""
    if len(shape) != 5 or shape[0] != 1 or shape[2] not in (1, 3):
        raise InputError(f"the model takes videos as {list(shape)}, which is not made of a file here: give the array")
    count = shape[1]
    if isinstance(video, np.ndarray):
        if not len(video):
            raise InputError("the video holds no frames")
        pictures = [Image.fromarray(video[i]) for i in _spread(len(video), count)]
    else:
        pictures = read_frames(video, count)
    return normalised([fitted(picture, shape[-2:], preprocessing) for picture in pictures], shape[2], preprocessing)[0][None]


def _folder(path: Path, count: int) -> list[Image.Image]:
    files = sorted((file for file in path.iterdir() if file.suffix.lower() in IMAGES), key=_counted)
    if not files:
        raise InputError(
            f"{path} holds no frames: give a folder of images ({', '.join(IMAGES[:3])}, ...), in order by name, 2 before 10"
        )
    return [open_image(files[i]) for i in _spread(len(files), count)]


def _counted(path: Path) -> tuple[Any, ...]:
    """Names in order, with the numbers in them as numbers: frame 2 is before frame 10."""
    parts = re.split(r"([0-9]+)", path.name)
    return (*[int(part) if i % 2 else part for i, part in enumerate(parts)], path.name)


def _decoded(path: Path, count: int) -> list[Image.Image]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a video file, or a folder of frames")
    try:
        av: Any = importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise MissingExtra(
            'PyAV is not installed, and reads video files; install it with: pip install "edgewise[generate]", '
            "or give a folder of frames"
        ) from error
    try:
        with av.open(str(path)) as file:
            total = sum(1 for _ in file.decode(video=0))
        wanted = _spread(total, count)
        found: dict[int, Image.Image] = {}
        with av.open(str(path)) as file:
            for i, frame in enumerate(file.decode(video=0)):
                if i in wanted:
                    found[i] = frame.to_image()
    except Exception as error:
        raise InputError(f"{path} is no video that can be read: {str(error) or type(error).__name__}") from error
    if not found:
        raise InputError(f"{path} holds no frames")
    return [found[i] for i in wanted]


def _spread(total: int, count: int) -> list[int]:
    """`count` of `total` frames, the middles of equal stretches; some are repeated where there are fewer."""
    return [min(total - 1, int((i + 0.5) * total / count)) for i in range(count)] if total else []
