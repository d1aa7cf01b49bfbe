"""Packages that take an image: the same numbers as the processor and an array give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Cli
from PIL import Image

import edgewise
from edgewise import demos
from edgewise.calibration.pixels import pixels_of, stated, without_constants
from edgewise.errors import InputError
from edgewise.targets.coreml.package import Package

pytest.importorskip("coremltools")

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SPEC = "topk@encoder.block[0]:keep=0.5"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer with random weights, and a processor with a mean and deviation of each channel."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(image_mean=MEAN, image_std=STD, size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("image") / "b"
    edgewise.export(str(model), out, targets=["coreml"], compress=SPEC, image_input=True)
    return out


def pictures() -> list[np.ndarray]:
    """`(32, 32, 3)`: noise, a gradient, and the extremes."""
    ramp = np.linspace(0, 255, 32 * 32 * 3).round().astype(np.uint8).reshape(32, 32, 3)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return [noise, ramp, np.zeros_like(ramp), np.full_like(ramp, 255), np.array(Image.fromarray(ramp).rotate(30))]


def processed(model: Path, picture: np.ndarray) -> np.ndarray:
    processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    return np.asarray(processor(Image.fromarray(picture), return_tensors="np")["pixel_values"], np.float32)


def pixels(picture: np.ndarray) -> np.ndarray:
    return picture.transpose(2, 0, 1)[None].astype(np.float32)


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("fp16", 1e-3)])
def test_pixels_give_what_the_processor_and_an_array_give(
    precision: str, allowed: float, model: Path, bundle: Path, tmp_path: Path
) -> None:
    """In half precision, too: the constants are applied in single precision, so that the model sees the same numbers."""
    if precision != "fp32":
        bundle = tmp_path / "image"
        edgewise.export(str(model), bundle, targets=["coreml"], compress=SPEC, precision=precision, image_input=True)
    edgewise.export(str(model), tmp_path / "array", targets=["coreml"], compress=SPEC, precision=precision)
    with edgewise.load(bundle) as images, edgewise.load(tmp_path / "array") as arrays:
        for picture in pictures():
            wanted = arrays.run({"pixel_values": processed(model, picture)})["logits"]
            found = images.run({"pixel_values": pixels(picture)})["logits"]
            assert np.abs(found - wanted).max() <= allowed * np.abs(wanted).max()


def test_the_package_says_that_it_takes_an_image(bundle: Path) -> None:
    package = Package.open(next((bundle / "coreml").iterdir()))
    (feature,) = package.model.description.input
    image = feature.type.imageType
    assert (image.width, image.height, image.colorSpace) == (32, 32, 20)
    (block,) = package.model.mlProgram.functions["main"].block_specializations.values()
    assert [op.type for op in block.operations if op.type != "const"][:2] == ["sub", "mul"]
    import coremltools

    spec = coremltools.models.MLModel(str(package.path), skip_model_load=True).get_spec()
    assert spec.description.input[0].type.WhichOneof("Type") == "imageType"


def test_the_manifest_records_it(bundle: Path) -> None:
    opened = edgewise.Bundle.open(bundle)
    (info,) = opened.manifest.components[0].inputs
    assert info.meaning == "an image, RGB, 0 to 255" and info.shape == (1, 3, 32, 32)
    known = opened.manifest.preprocessing["image_input"]
    assert (known["name"], known["colour"]) == ("pixel_values", "RGB")
    assert np.allclose(known["scale"], [1 / 255 / one for one in STD]) and np.allclose(known["bias"], -np.divide(MEAN, STD))
    golden = opened.golden("vision_encoder").inputs["pixel_values"]
    assert np.array_equal(golden, golden.round()) and golden.min() >= 0 and golden.max() <= 255 and golden.std() > 10
    (rung,) = [one for one in opened.manifest.verification if one.kind == "capture"]
    assert rung.passed and "image_input: true" in (bundle / "recipe.yaml").read_text()


def test_run_takes_an_image_file(bundle: Path, model: Path, cli: Cli, tmp_path: Path) -> None:
    picture = pictures()[1]
    Image.fromarray(picture).save(tmp_path / "x.png")
    done = cli("run", bundle, "--image", tmp_path / "x.png", "-o", tmp_path / "out.npz", "--json")
    assert done.code == 0
    with edgewise.load(bundle) as session, np.load(tmp_path / "out.npz") as out:
        assert np.array_equal(out["logits"], session.run({"pixel_values": pixels(picture)})["logits"])
    Image.fromarray(np.array(Image.fromarray(picture).resize((50, 40)))).save(tmp_path / "large.jpg")
    assert cli("run", bundle, "--image", tmp_path / "large.jpg").code == 0
    for args, message in (
        (("--image", tmp_path / "none.png"), "does not exist"),
        (("--image", tmp_path / "x.png", "--inputs", tmp_path / "out.npz"), "give one of them"),
        (("--image", tmp_path / "x.png", "--prompt", "what?"), "no generative model"),
    ):
        wrong = cli("run", bundle, *args)
        assert wrong.code == 2 and message in wrong.err
    np.savez(tmp_path / "float.npz", pixel_values=processed(model, picture))
    wrong = cli("run", bundle, "--inputs", tmp_path / "float.npz")
    assert wrong.code == 2 and "is an image, of pixels that are whole numbers from 0 to 255" in wrong.err


def test_quantised_functions_take_images_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / "data" / f"{i}.png")
    made = edgewise.export(str(model), tmp_path / "b", targets=["coreml"], compress=SPEC, compress_variants="all=none",
                           precision="w8a8", calibration=str(tmp_path / "data"), image_input=True)  # fmt: skip
    package = Package.open(next((made.path / "coreml").iterdir()))
    assert [one.input[0].type.imageType.width for one in package.model.description.functions] == [32, 32]
    with edgewise.load(str(model_of(tmp_path, model))) as plain:
        wanted = plain.run({"pixel_values": processed(model, pictures()[0])})["logits"]
    with edgewise.load(made, function="all") as session:
        found = session.run({"pixel_values": pixels(pictures()[0])})["logits"]
    assert np.abs(found - wanted).max() <= 0.1 * np.abs(wanted).max()


def model_of(folder: Path, model: Path) -> Path:
    """The model as it is, exported."""
    edgewise.export(str(model), folder / "plain", targets=["coreml"])
    return folder / "plain"


def test_pixels_of_a_demo_come_back() -> None:
    split = demos.split("digits")
    assert split is not None
    constants = json.loads((demos.folder("digits") / "preprocessor_config.json").read_text())
    array = split.inputs["pixel_values"]
    known = pixels_of("pixel_values", (1, *array.shape[1:]), constants)
    found = known.recovered(array, "digits")
    assert found.min() == 0 and found.max() == 255 and np.array_equal(found, found.round())
    assert np.abs(known.normalised(found) - array).max() < 1e-3
    assert stated(json.loads(json.dumps(without_constants(constants, known)))) == known
    for damaged in (1, {}, {**vars(known), "scale": 1}, {**vars(known), "bias": ["much"]}):
        with pytest.raises(InputError, match="damaged image_input"):
            stated({"image_input": damaged})
    with pytest.raises(InputError, match="not what the processor makes of pixels"):
        known.recovered(array * 0.9, "digits")


def test_grayscale_and_demo_data(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert cli("export", "demo:digits", "--target", "coreml", "--compress", "topk@encoder.block[1]:keep=0.2", "--image-input",
               "-o", out).code == 0  # fmt: skip
    package = Package.open(next((out / "coreml").iterdir()))
    assert package.model.description.input[0].type.imageType.colorSpace == 10
    (score,) = cli("verify", out, "--data", "demo:digits", "--data-samples", "12", "--json").document["accuracy"]
    assert score["top1"] >= 0.9
    assert cli("run", out, "--inputs", "demo:digits[3]", "--json").document["outputs"]["logits"]["top"][0][0]["index"] == 7


class Many(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean((2, 3))


@pytest.mark.parametrize(
    ("shape", "preprocessing", "message"),
    [
        ((1, 3, 8, 8), {}, "comes without them"),
        ((1, 4, 8, 8), {"image_mean": MEAN, "image_std": STD}, "of 1 or 3 channels"),
        ((2, 3, 8, 8), {"image_mean": MEAN, "image_std": STD}, "a batch of 2"),
        ((1, 3, 8, 8), {"image_mean": MEAN, "image_std": [0.0, 1, 1]}, "no pixels can be made"),
        ((1, 3, 8, 8), {"image_mean": [0.5, 0.5], "image_std": STD}, "not for 3 channels"),
        ((1, 3, 8), {"image_mean": MEAN, "image_std": STD}, "has no input of one image"),
    ],
)
def test_inputs_that_are_no_images(shape: tuple[int, ...], preprocessing: dict[str, Any], message: str) -> None:
    from edgewise.exporter.capture import capture
    from edgewise.exporter.image_input import take_pixels
    from edgewise.exporter.sources import Source

    module = Many() if len(shape) == 4 else torch.nn.Identity()
    program = capture(module, (torch.randn(shape),))
    with pytest.raises(InputError, match=message):
        take_pixels(program, Source("m", "Many", module=module, preprocessing=preprocessing), 0)


def test_targets_and_models_without_images_say_so(tmp_path: Path, cli: Cli) -> None:
    for model, target, message in (
        ("demo:digits", "openvino", "target openvino takes arrays, and no images"),
        ("demo:speech", "coreml", "has no input of one image"),
        ("demo:vqa", "coreml", "becomes several components"),
    ):
        done = cli("export", model, "--target", target, "--image-input", "-o", tmp_path / "b")
        assert done.code == 2 and message in done.err
    assert list(tmp_path.iterdir()) == []
