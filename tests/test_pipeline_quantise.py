"""Generative models whose components are quantised together: statistics of the running pipeline, shared weights, what accuracy
control keeps."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import soundfile
import torch
from conftest import Cli
from PIL import Image
from tiny_speech import BINS, FRAMES, tiny_speech_folder

import edgewise
from edgewise.calibration import Port, open_source, survey
from edgewise.demos import scenes
from edgewise.errors import InputError
from edgewise.exporter.pipeline.asking import STEPS, Fed, Probe, _Spread, ask, asked
from edgewise.runtime import load_pipeline
from edgewise.targets import get
from edgewise.targets.base import layer_of
from edgewise.targets.openvino.smooth import smooth
from edgewise.verify.questions import exact_match

TARGETS = ("openvino", "onnxruntime")
ROLES = ("audio_encoder", "prefill", "decode")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_speech_folder(tmp_path_factory.mktemp("quantised") / "model")


def sounds(count: int = 6) -> dict[str, np.ndarray]:
    return {"input_features": torch.randn(count, BINS, FRAMES, generator=torch.Generator().manual_seed(1)).numpy()}


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> edgewise.Bundle:
    return edgewise.export(str(folder), tmp_path_factory.mktemp("plain") / "b", targets=TARGETS, new_tokens=20)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> edgewise.Bundle:
    """Every component at `w8a8`."""
    out = tmp_path_factory.mktemp("whole") / "b"
    return edgewise.export(
        str(folder), out, targets=TARGETS, new_tokens=20, precision="w8a8", calibration=sounds(),
        skip_quant=["decode/*layers.0.fc2"],
    )  # fmt: skip


def weights(path: Path) -> dict[str, np.ndarray]:
    """The whole numbers of 8 bits that the weights of layers are stored as, by layer."""
    if path.suffix == ".onnx":
        found = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}
        whole = {name: array for name, array in found.items() if array.dtype == np.int8 and array.ndim > 1}
        return {name.removeprefix("quantised/"): array for name, array in whole.items()}
    made = {}
    for node in openvino.Core().read_model(path).get_ops():
        layer = layer_of(node.get_friendly_name())
        value = node.input_value(1).get_node() if layer is not None else None
        while value is not None and value.get_type_name() != "Constant":
            value = value.input_value(0).get_node()
        if layer is not None and value is not None and value.get_element_type().to_string() == "i8":
            made[layer] = value.data.copy()
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_prefill_and_decode_share_what_their_weights_become(whole: edgewise.Bundle, target: str) -> None:
    by_role = {one.role: one for one in whole.manifest.targets if one.target == target}
    assert {one.precision for one in by_role.values()} == {"w8a8"} and set(by_role) == set(ROLES)
    found = {role: weights(whole.file(one.files[0])) for role, one in by_role.items()}
    record = by_role["decode"].quantisation
    assert record is not None and [name.split(".")[-1] for name in record.skipped] == ["fc2"]
    # What is skipped in one component alone is still the same in the others.
    assert set(found["prefill"]) - set(found["decode"]) == set(record.skipped) and len(found["decode"]) > 10
    assert all(np.array_equal(array, found["prefill"][layer]) for layer, array in found["decode"].items())


@pytest.mark.parametrize("target", TARGETS)
def test_the_quantised_pipeline_says_nearly_the_same(
    plain: edgewise.Bundle, whole: edgewise.Bundle, target: str
) -> None:
    """Logits of every new token, at the tokens of the one in single precision."""
    errors = []
    with load_pipeline(plain, target) as before, load_pipeline(whole, target) as after:
        for feed in sounds(10)["input_features"][6:]:
            probe = Probe({"input_features": feed[None]}, None, "here")
            a = probe.logits(before)["logits"]
            assert len(a) == len(probe.tokens or ()) > 1
            b = probe.logits(after)["logits"]
            assert a.shape == b.shape
            errors.append(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
        ports = {"input_features": Port((1, BINS, FRAMES), "float32")}
        samples = survey(open_source(sounds(3), ports), ports, range(3))
        for role in ("prefill", "decode"):
            runs = [(before.sessions[role].run(feed), after.sessions[role].run(feed)) for feed in Fed(before, role, samples)]
            a, b = (np.stack([run[i]["logits"] for run in runs]) for i in range(2))
            assert 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()) > 18
    assert np.mean(errors) > 7  # the encoder's too, whose weights are spread widely
    assert whole.manifest.calibration is not None and whole.manifest.calibration.samples == 6
    sizes = [sum(one.stat().st_size for one in bundle.path.glob(f"{target}/*")) for bundle in (plain, whole)]
    assert sizes[1] < sizes[0]


def test_a_decoder_is_fed_what_it_is_fed_in_a_run(plain: edgewise.Bundle) -> None:
    """Real caches, whose slots hold the steps before, and one sample after the other."""
    ports = {"input_features": Port((1, BINS, FRAMES), "float32")}
    source = open_source(sounds(3), ports)
    samples = survey(source, ports, range(3))
    with load_pipeline(plain, "onnxruntime") as pipeline:
        said = [ask(pipeline, *one).ids for one in asked(samples)]
        fed = Fed(pipeline, "decode", samples)
        feeds = list(fed)
        # Each says 20 tokens, the first of which prefill gives: every second of 19 steps is seen.
        assert [len(ids) for ids in said] == [20, 20, 20] and fed.counted == len(feeds) == len(fed) == 30
        assert [int(feed["step"][0]) for feed in feeds] == [*range(0, 19, 2)] * 3
        tokens = plain.manifest.pipeline.caches[0].tokens  # type: ignore[union-attr]
        filled = [int(np.abs(feed["past_key_0"][0, 0, tokens:]).any(-1).sum()) for feed in feeds]
        assert filled == [int(feed["step"][0]) for feed in feeds]
        prefills = list(Fed(pipeline, "prefill", samples))
        assert len(prefills) == 3 and not np.array_equal(prefills[0]["cross_key_0"], prefills[1]["cross_key_0"])
        assert pipeline.decoder.prefill is pipeline.sessions["prefill"]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 200])
def test_a_long_text_is_seen_from_beginning_to_end(count: int) -> None:
    kept = _Spread(STEPS)
    for i in range(count):
        kept.add({"step": np.array(i)})
    steps = [int(one["step"]) for one in kept.feeds]
    assert len(steps) <= STEPS and len(steps) >= min(count, STEPS // 2)
    assert len(set(np.diff(steps))) <= 1 and steps[:1] == list(range(min(count, 1)))
    assert not steps or count - 1 - steps[-1] < max(1, np.diff([*steps, 0]).max())


def test_smoothing_changes_nothing_but_scales(plain: edgewise.Bundle) -> None:
    artifact = next(one for one in plain.manifest.targets if (one.target, one.role) == ("openvino", "decode"))
    files = [plain.file(name) for name in artifact.files]
    model = openvino.Core().read_model(files[0])
    with load_pipeline(plain, "openvino") as pipeline:
        ports = {"input_features": Port((1, BINS, FRAMES), "float32")}
        feeds = list(Fed(pipeline, "decode", survey(open_source(sounds(2), ports), ports, range(2))))
        wanted = pipeline.sessions["decode"].run(feeds[-1])
    known, other = (get(name).ranges(f, feeds) for name, f in (("openvino", files), ("onnxruntime", _onnx(plain, "decode"))))
    assert set(known) == set(other) and all(np.allclose(known[k], other[k], rtol=1e-3, atol=1e-4) for k in known)
    smooth(model, known)
    found = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds[-1])
    added = Counter(node.get_type_name() for node in model.get_ops() if node.get_friendly_name().endswith("/smoothed"))
    assert added["Multiply"] >= 8
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)


def _onnx(bundle: edgewise.Bundle, role: str) -> list[Path]:
    artifact = next(one for one in bundle.manifest.targets if (one.target, one.role) == ("onnxruntime", role))
    return [bundle.file(name) for name in artifact.files]


def spoken(plain: edgewise.Bundle, place: Path, count: int = 8) -> Path:
    """Noises, and what the model in single precision hears in them."""
    place.mkdir()
    rows = [("file", "text")]
    with load_pipeline(plain, "onnxruntime") as pipeline:
        for i in range(count):
            soundfile.write(place / f"{i}.wav", np.random.default_rng(i).uniform(-0.5, 0.5, 16000) * np.hanning(16000), 16000)
            rows.append((f"{i}.wav", pipeline.generate(place / f"{i}.wav").text))
    with open(place / "said.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    return place / "said.tsv"


def test_word_errors_are_held(folder: Path, plain: edgewise.Bundle, cli: Cli, tmp_path: Path) -> None:
    """Weights and activations of 8 bits in a model of random weights, whose words change: layers of all components are put back
    until they do not, in both that share them."""
    data = spoken(plain, tmp_path / "sounds")
    said = cli(
        "export", folder, "--precision", "w8a8", "--calib", data, "--max-drop", "0", "--target", "onnxruntime",
        "--new-tokens", "20", "-o", tmp_path / "b", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    bundle = edgewise.Bundle.open(tmp_path / "b")
    records = {one.role: one.quantisation for one in bundle.manifest.targets}
    for record in records.values():
        assert record is not None and record.metric == "word error rate" and record.held_out == 4
        assert record.result is not None and record.unquantised is not None and record.result <= record.unquantised + 1e-9
        assert record.all_quantised is not None and record.all_quantised > record.unquantised
    left = {role: {one.layer for one in record.floating} for role, record in records.items() if record is not None}
    assert left["prefill"] == left["decode"] and any(left.values())
    every = {role: record.sensitivity for role, record in records.items() if record is not None}
    assert all(len(every[role]) == records[role].layers for role in ROLES)  # type: ignore[union-attr]
    for role in ROLES:
        noise = [float("inf") if one.sqnr_db is None else one.sqnr_db for one in every[role]]
        assert noise == sorted(noise)
        kept = {layer for layer in _layers(_onnx(bundle, role)[0]) if layer not in weights(_onnx(bundle, role)[0])}
        assert kept == left[role]


def _layers(path: Path) -> set[str]:
    return {str(layer_of(node.name)) for node in onnx.load(str(path)).graph.node if layer_of(node.name) is not None}


@pytest.fixture(scope="module")
def asked_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("asked")
    rows = [("file", "question", "answer")]
    for i, one in enumerate(scenes.examples("train", 12)):
        Image.fromarray(one.image).save(place / f"{i}.png")
        rows.append((f"{i}.png", one.question, one.answer))
    with open(place / "asked.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return place / "asked.csv"


def test_questions_about_pictures(asked_table: Path, tmp_path: Path) -> None:
    """Compressed in front of the decoder and in it, where shapes of the caches differ, with statistics and a metric of a table."""
    bundle = edgewise.export(
        "demo:vqa", tmp_path / "b", targets=["onnxruntime"], compress=["divprune:keep=98", "fastv@decoder.block[2]:keep=60"],
        precision="w8a8", calibration=asked_table, max_drop=0.5, prompt_tokens=32, new_tokens=8,
    )  # fmt: skip
    record = {one.role: one.quantisation for one in bundle.manifest.targets}
    assert all(one is not None and (one.metric, one.held_out, one.floating) == ("exact match", 6, ()) for one in record.values())
    prefill, decode = (weights(_onnx(bundle, role)[0]) for role in ("prefill", "decode"))
    assert set(prefill) == set(decode) and all(np.array_equal(prefill[k], decode[k]) for k in prefill)
    with load_pipeline(bundle, "onnxruntime") as pipeline, pytest.raises(InputError, match=r"item 0: the prompt has .* tokens"):
        ask(pipeline, {"pixel_values": BLACK[:1]}, "What? " * 40, "item 0")
    (score,) = exact_match(bundle, "demo:vqa", most=15)
    assert score["exact_match"] >= 0.6


def test_no_question_is_measured_that_statistics_saw() -> None:
    ports = {"pixel_values": Port((1, 3, 112, 112), "float32")}
    source = open_source("demo:vqa", ports)
    assert source.apart is not None and source.questions and source.texts
    for split, drawn in (("train", source), ("test", source.apart)):
        read = drawn.read(3)
        wanted = scenes.example(split, 3 + (scenes.TEST if split == "test" else 0))
        assert (read.question, read.text) == (wanted.question, wanted.answer)
    assert [one.question for one in scenes.examples("test", 3)] == [scenes.example("test", i).question for i in range(3)]


BLACK = np.zeros((4, 3, 112, 112), np.float32)


@pytest.mark.parametrize(
    ("known", "fault"),
    [
        ({"calibration": {"pixel_values": BLACK}}, "has no prompts, and statistics .* file, question"),
        (
            {"calibration": {"pixel_values": BLACK, "questions": np.array(["What?"] * 4)}, "max_drop": 0.1},
            "no known texts, and accuracy control measures exact match",
        ),
        ({"images": 2}, "calibrated with one image at a time"),
        ({"precision": "w8a8,vision_encoder=fp16", "targets": ["coreml"]}, "statistics of vision_encoder alone"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, known: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        edgewise.export("demo:vqa", tmp_path / "b", **{"precision": "w8a8", "prompt_tokens": 32, "new_tokens": 4, **known})
    assert not (tmp_path / "b").exists()


def test_questions_in_every_form_of_data(asked_table: Path) -> None:
    ports = {"pixel_values": Port((1, 3, 112, 112), "float32")}
    table = open_source(asked_table, ports, {})
    first = next(scenes.examples("train", 1))
    assert table.questions and (table.read(0).question, table.read(0).text) == (first.question, first.answer)
    zeros = np.zeros((2, 3, 112, 112), np.float32)
    arrays = open_source({"pixel_values": zeros, "questions": np.array(["a?", "b?"]), "answers": np.array(["a", "b"])}, ports)
    items = open_source([(zeros[0], "a?", "a"), (zeros[1], "b?", "b")], ports)
    for source in (arrays, items):
        samples = survey(source, ports, range(2))
        assert samples.questions == ("a?", "b?") and samples.texts == ("a", "b")
        assert samples.only([1]).questions == ("b?",)
    assert open_source([(zeros[0], "a")], ports).questions is False
    with pytest.raises(InputError, match="questions must be strings"):
        open_source({"pixel_values": zeros, "questions": np.zeros(2)}, ports)
