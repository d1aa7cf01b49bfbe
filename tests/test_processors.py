"""Which constants of a processor of several kinds of input are those of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgewise.exporter.processors import kind_of, preprocessing

PIXELS = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5]}
SOUND = {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 16000}
FILMS = {"video_processor_type": "LlavaOnevisionVideoProcessor", "image_mean": [0.25]}
WHOLE = {"image_processor": PIXELS, "feature_extractor": {**SOUND, "mel_filters": [[0.0]]}, "video_processor": FILMS}


def written(folder: Path, **files: Any) -> Path:
    for name, document in files.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ((), PIXELS),
        (("pixel_values",), PIXELS),
        (("pixel_values_videos",), FILMS),
        (("input_features", "feature_attention_mask"), SOUND),
        (("input_values",), SOUND),
        (("pixel_values", "input_features"), PIXELS),
    ],
)
def test_the_part_is_that_of_the_media(tmp_path: Path, inputs: tuple[str, ...], wanted: dict[str, Any]) -> None:
    assert preprocessing(written(tmp_path, processor_config=WHOLE), kind_of(inputs)) == wanted


def test_constants_of_images_are_none_of_sound(tmp_path: Path) -> None:
    assert preprocessing(written(tmp_path, preprocessor_config=PIXELS), "audio") == {}
    assert preprocessing(written(tmp_path, processor_config={"feature_extractor": SOUND}), "audio") == SOUND
    assert preprocessing(tmp_path, "image") == PIXELS
    # Some folders have the constants of both in one, and a model of one kind has these alone.
    assert preprocessing(written(tmp_path, preprocessor_config={**PIXELS, **SOUND}), "audio") == {**PIXELS, **SOUND}
    assert preprocessing(written(tmp_path, preprocessor_config=SOUND), "image") == SOUND
