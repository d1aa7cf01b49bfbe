"""A precision for each component: how it is written, what is quantised by it, and what makes no sense."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import Cli
from tiny_speech import BINS, FRAMES, tiny_speech_folder

import edgewise
from edgewise.builder import key
from edgewise.calibration import Port, open_source, survey
from edgewise.errors import InputError
from edgewise.exporter.precisions import parse_precisions
from edgewise.exporter.recipe import Recipe
from edgewise.targets import joined_labels

MIXED = "w8a16,audio_encoder=w8a8"


@pytest.mark.parametrize(
    ("text", "default", "encoder", "every"),
    [
        ("fp16", "fp16", "fp16", ("fp16",)),
        ("encoder=w8a8", "fp32", "w8a8", ("fp32", "w8a8")),
        (" w4a16 , encoder = w8a8 , decode=w4a16", "w4a16", "w8a8", ("w4a16", "w8a8")),
    ],
)
def test_how_it_is_written(text: str, default: str, encoder: str, every: tuple[str, ...]) -> None:
    made = parse_precisions(text)
    assert made.default == default == made.of("other") and made.of("encoder") == encoder and made.all == every
    made.check(["encoder", "decode"])


@pytest.mark.parametrize("text", ["", "fp16,", "=fp16", "encoder=", "fp16,fp32", "encoder=fp16,encoder=fp16"])
def test_what_is_no_precision(text: str) -> None:
    with pytest.raises(InputError, match="precision"):
        parse_precisions(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_speech_folder(tmp_path_factory.mktemp("precisions") / "model")


def sounds() -> dict[str, np.ndarray]:
    return {"input_features": torch.randn(8, BINS, FRAMES, generator=torch.Generator().manual_seed(1)).numpy()}


@pytest.fixture(scope="module")
def mixed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> edgewise.Bundle:
    out = tmp_path_factory.mktemp("precisions") / "bundle"
    return edgewise.export(str(model), out, precision=MIXED, calibration=sounds(), skip_quant=["decode/*fc2*"])


def test_every_component_has_its_own(mixed: edgewise.Bundle) -> None:
    by_role = {one.role: one for one in mixed.manifest.targets}
    assert {role: one.precision for role, one in by_role.items()} == {
        "audio_encoder": "w8a8", "prefill": "w8a16", "decode": "w8a16",
    }  # fmt: skip
    assert mixed.manifest.calibration is not None and mixed.manifest.calibration.samples == 8
    skipped = {role: one.quantisation.skipped for role, one in by_role.items() if one.quantisation is not None}
    assert not skipped["audio_encoder"] and not skipped["prefill"]
    assert skipped["decode"] and all("fc2" in layer for layer in skipped["decode"])
    quantised = {rung.name for rung in mixed.manifest.verification if rung.kind == "quantisation"}
    assert quantised == {f"openvino/{role}/{one.precision}" for role, one in by_role.items()}
    ops = {role: edgewise.targets.get("openvino").ops([mixed.file(f) for f in one.files]) for role, one in by_role.items()}
    assert ops["audio_encoder"]["FakeQuantize"] and "FakeQuantize" not in ops["prefill"]  # type: ignore[index, operator]


def test_it_runs_as_a_whole(mixed: edgewise.Bundle, cli: Cli, tmp_path: Path) -> None:
    assert joined_labels(mixed.manifest.targets) == {"openvino": "openvino/w8a8+w8a16"}
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16000) / 9), 16000)
    with open(tmp_path / "said.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("file", "text"), ("a.wav", "some words")])
    (score,) = cli("verify", mixed.path, "--data", tmp_path / "said.tsv", "--json").document["wer"]
    assert score["artifact"] == "openvino/w8a8+w8a16" and score["words"] == 2
    with edgewise.load(mixed) as speech:
        assert speech.generate(tmp_path / "a.wav").text == score["transcripts"][0]


@pytest.mark.parametrize(
    ("known", "fault"),
    [
        ({"precision": "fp16,vision_encoder=w8a8"}, "unknown component 'vision_encoder': did you mean 'audio_encoder'"),
        ({"precision": "audio_encoder=w9"}, "w9"),
        ({"skip_quant": ["*fc2*"]}, "write ROLE/PATTERN with one of audio_encoder, prefill, decode"),
        ({"precision": "audio_encoder=w8a8", "skip_quant": ["decode/*fc2*"]}, "decode is not quantised, but fp32"),
        ({"skip_quant": ["decode/nothing"]}, "no layer of the openvino artifact matches 'nothing'"),
        ({"max_drop": 0.01}, "no known texts, and accuracy control measures word error rate: give a table"),
        ({"max_drop": 0.01, "calibration": {**sounds(), "texts": np.array(["?!"] * 8)}}, "without words"),
        ({"precision": "fp16,audio_encoder=w8a8", "targets": ["coreml"], "max_drop": 0.01}, "statistics of audio_encoder alone"),
        ({"calibration": None}, "w8a8 needs calibration data"),
    ],
)
def test_what_makes_no_sense(model: Path, tmp_path: Path, known: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        edgewise.export(str(model), tmp_path / "b", **{"precision": MIXED, "calibration": sounds(), **known})
    assert not (tmp_path / "b").exists()


def test_a_model_of_one_component(cli: Cli, tmp_path: Path) -> None:
    said = cli("export", "demo:digits", "--precision", "decode=fp16", "-o", tmp_path / "b")
    said.refused("unknown component 'decode'", "vision_encoder")
    assert not (tmp_path / "b").exists()


def test_a_key_knows_the_tools_of_every_precision() -> None:
    plain, mixed = (
        key.tools(Recipe(model="demo:digits", targets=("openvino",), precision=p)) for p in ("fp32", "fp32,vision_encoder=w8a8")
    )
    assert set(mixed) - set(plain) == {"nncf"}


def test_pictures_of_the_questions_demo() -> None:
    """Drawn anew at every look, the same each time, of the split that answers are not measured on."""
    ports = {"pixel_values": Port((1, 3, 112, 112), "float32")}
    source = open_source("demo:vqa", ports, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    one, again, other = (source.read(i).inputs["pixel_values"] for i in (0, 0, 1))
    assert one.shape == (3, 112, 112) and np.array_equal(one, again) and not np.array_equal(one, other)
    assert survey(source, ports, range(3)).digest == survey(source, ports, range(3)).digest
    with pytest.raises(InputError, match="demo:vqa has images, and the model takes input_ids"):
        open_source("demo:vqa", {"input_ids": Port((1, 8), "int64")})
