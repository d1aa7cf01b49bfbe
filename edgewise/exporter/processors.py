"""The constants of a model's own processor, as its folder has them."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from edgewise.errors import InputError

_PARTS = {
    "image": ("image_processor", "feature_extractor", "audio_processor"),
    "video": ("video_processor", "image_processor", "feature_extractor", "audio_processor"),
    "audio": ("feature_extractor", "audio_processor"),
}
"""The parts of a processor of several kinds of input that have the constants for one kind, the best first."""
_SOUND = ("input_features", "input_values")
_OF_IMAGES = ("image_processor", "image_processor_type", "image_mean")


def kind_of(inputs: Container[str]) -> str:
    """What a model is exported for, by the names of the inputs that shapes are given for: `image` where these do not tell."""
    if "pixel_values_videos" in inputs:
        return "video"
    return "audio" if "pixel_values" not in inputs and any(name in inputs for name in _SOUND) else "image"


def preprocessing(folder: Path, kind: str = "image") -> dict[str, Any]:
    """The constants for `image`, `video` or `audio`; those for another kind where the folder has no others, but none of images
    for audio. Raises InputError for a file that cannot be read."""
    own = ("video_preprocessor_config.json",) if kind == "video" else ()
    for name in (*own, "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            document = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        parts = (document.get(part) for part in _PARTS[kind])
        found = next((part for part in parts if isinstance(part, dict)), document)
        if kind == "audio" and "feature_extractor_type" not in found and any(name in found for name in _OF_IMAGES):
            continue  # those for sound may be in another file
        # Filter banks are large tables that follow from the other constants.
        return {k: v for k, v in found.items() if k != "mel_filters"}
    return {}
