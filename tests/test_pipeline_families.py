"""Vision-language models of many families: how each joins image and text is learned, and no family is named in the package.

`benchmarks/vlm_families.py` exports all of them to both runtimes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from audio_families import make as make_audio
from tiny_speech import tiny_speech
from torch import nn
from vlm_families import FAMILIES, blip2, deepseek_vl, hunyuan_vl, make, make_video, noise
from vlm_pruned import check_compressed
from vlm_reference import IMAGE, greedy

import edgewise
from edgewise.errors import InputError, Refused
from edgewise.exporter.capture import capture
from edgewise.exporter.pipeline import media
from edgewise.exporter.pipeline.seam import learn
from edgewise.exporter.pipeline.vision_language import VisionEncoder

RULES = {"gemma3": "media", "paligemma": "prompt"}
ROWS = {"qwen2-vl": 3, "qwen2.5-vl": 3}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_seam_is_learned(name: str) -> None:
    model, example = make(name)
    pixels = example.pop("pixel_values")
    assert media.IMAGE.placeholder(model) == IMAGE
    seam, rung = learn(media.IMAGE, model, pixels, example, 12, 0)
    assert rung.passed and seam.rule == RULES.get(name, "causal") and len(seam.offsets) == ROWS.get(name, 1)
    assert seam.dense == (name not in ROWS)


def test_features_of_a_model_inside_of_its_head(tmp_path: Path) -> None:
    model, example = deepseek_vl()
    bundle = edgewise.export(model, tmp_path / "b", example=example, prompt_tokens=10, new_tokens=8, cache=False)
    pixels = noise(1, 3, 32, 32, seed=5)
    with edgewise.load(bundle) as loaded:
        made = loaded.generate(input_ids=[1, 5, IMAGE, 7, 8], image=pixels.numpy())
    assert made.ids == greedy(model, pixels, [1, 5], [7, 8], 64, 8)


def test_a_decoder_that_takes_no_embedded_tokens_is_refused(tmp_path: Path) -> None:
    model, example = blip2()
    with pytest.raises(InputError, match=r"cannot be split: its decoder does not run on embedded tokens.*missing 2 required"):
        edgewise.export(model, tmp_path / "b", example=example, prompt_tokens=10, new_tokens=4)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["llava-next", "smolvlm", "qwen2.5-vl"])
def test_what_does_not_depend_on_the_image_is_settled(name: str) -> None:
    """Tiles, padding images and windows: the captured graph is static, and right for another image."""
    model, example = make(name)
    pixels = example.pop("pixel_values")
    program = capture(VisionEncoder(model, example), (pixels,))
    other = noise(*pixels.shape, seed=9)
    with torch.no_grad():
        wanted = VisionEncoder(model, example)(other)["visual"]
        torch.testing.assert_close(program.module()(other)["visual"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "target"), [("qwen2-vl", "onnxruntime"), ("qwen2.5-vl", "openvino"), ("paligemma", "openvino")]
)
def test_what_a_bundle_generates(name: str, target: str, tmp_path: Path) -> None:
    model, example = make(name)
    bundle = edgewise.export(
        model, tmp_path / "b", example=example, targets=[target], prompt_tokens=10, new_tokens=32, cache=False
    )
    pipeline = bundle.manifest.pipeline
    assert pipeline is not None
    pixels = noise(*example.pop("pixel_values").shape, seed=5)
    with edgewise.load(bundle) as loaded:
        for before, after in (([1, 5, 6], [7, 8, 9]), ([], [4])):
            made = loaded.generate(input_ids=[*before, IMAGE, *after], image=pixels.numpy())
            assert made.ids == greedy(model, pixels, before, after, pipeline.media_tokens, 32, **example)
            assert len(set(made.ids)) > 8


BOTH = ("openvino", "onnxruntime")


@pytest.mark.parametrize(
    ("name", "spec", "kept", "images", "targets"),
    [
        ("paligemma", "", 0, 1, ("openvino",)),
        ("llava-next", "", 0, 1, BOTH),
        ("gemma3", "", 0, 1, BOTH),
        ("qwen2.5-vl", "", 0, 2, BOTH),
        ("internvl", "divprune@projector.out:keep=9", 9, 1, ("openvino",)),
        ("qwen2-vl", "divprune@projector.out:keep=9", 9, 2, ("openvino",)),
    ],
)
def test_compressed_as_research_code_does_it(
    name: str, spec: str, kept: int, images: int, targets: tuple[str, ...], tmp_path: Path
) -> None:
    """In front of the decoder and inside of it. `benchmarks/vlm_families.py --compressed` does the same for every family."""
    check_compressed(name, tmp_path / "b", targets, images, spec=spec, kept=kept)


def test_images_of_different_shapes_are_refused(tmp_path: Path) -> None:
    model, example = make("qwen2-vl", 2)
    example["image_grid_thw"] = torch.tensor([[1, 8, 8], [1, 4, 16]])
    with pytest.raises(InputError, match="different shapes"):
        edgewise.export(model, tmp_path / "b", example=example, images=2, prompt_tokens=10, new_tokens=4)
    with pytest.raises(InputError, match=r"not 3 images"):
        edgewise.export(model, tmp_path / "b", example=example, images=3, prompt_tokens=10, new_tokens=4)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("method", "name"), [("divprune", "qwen2-vl"), ("dpcknn", "qwen2.5-vl"), ("random", "qwen2-vl")])
def test_tokens_bring_their_places(method: str, name: str) -> None:
    """Each token that is left has the row and column that it had; what was merged, those of what represents it."""
    model, example = make(name)
    pixels = example.pop("pixel_values")
    seam, _ = learn(media.IMAGE, model, pixels, example, 12, 0)
    places = torch.from_numpy(seam.offsets)
    encoder = VisionEncoder(model, example, places=places)
    program = edgewise.compress(capture(encoder, (pixels,)).with_role(tokens="visual"), f"{method}@projector.out:keep=7")
    for other in (noise(*pixels.shape, seed=9), torch.zeros_like(pixels)):
        with torch.no_grad():
            whole, made = encoder(other), program.module()(other)
        wanted = edgewise.ops.apply(method, whole["visual"], keep=7)
        torch.testing.assert_close(made["visual"], wanted.tokens, rtol=1e-4, atol=1e-5)
        assert torch.equal(whole["visual_position"][0], places)
        assert torch.equal(made["visual_position"][0], places[:, wanted.kept[0]])


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("smolvlm", "visionzip@encoder.out:keep=20,context=4", r"divprune@projector.out:keep=.*fastv"),
        ("qwen2-vl", "pyramiddrop@decoder.block[2]:keep=4", "use fastv, sparsevlm or dart"),
        ("llava", "fastv@decoder.block[2]:keep=4,span=0:64", "leave span out"),
        ("qwen2-vl", "visionzip@encoder.out:keep=4,context=1", r"splits the tokens into a grid.*divprune@projector.out"),
        ("internvl", "visionzip:keep=14,context=3", r"cannot keep 14 of 16"),
                ("qwen2-vl", "avgpool1d@projector.out:kernel=2,stride=2", "pooled tokens have none of their own"),
    ],
)
def test_compression_that_a_pipeline_cannot_carry(name: str, spec: str, message: str, tmp_path: Path) -> None:
    model, example = make(name)
    with pytest.raises((InputError, Refused), match=message):
        edgewise.export(model, tmp_path / "b", example=example, compress=spec, prompt_tokens=10, new_tokens=4)
    assert not (tmp_path / "b").exists()


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Its decoder gets more of the image than tokens: the components, joined, cannot give the same."""
    model, example = make("llava")

    class More(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x) * (1 + x.shape[1] / 100)

    # Depends on how the prompt is cut into runs of the decoder, as the components do it otherwise.
    model.model.language_model.norm = More(model.model.language_model.norm)
    with pytest.raises(InputError, match="cannot be split"):
        edgewise.export(model, tmp_path / "b", example=example, prompt_tokens=10, new_tokens=4)


def test_images_at_absolute_places_are_refused(tmp_path: Path) -> None:
    """Places learned of one prompt would be wrong for every other length of text in front."""
    model, example = hunyuan_vl()
    with pytest.raises(InputError, match=r"HunYuanVL.*by absolute places, which do not move with the text"):
        edgewise.export(model, tmp_path / "b", example=example, prompt_tokens=10, new_tokens=4)
    assert not (tmp_path / "b").exists()


def test_a_window_shorter_than_the_text_is_refused(tmp_path: Path) -> None:
    model, example = make("gemma3")
    model.get_decoder().config.sliding_window = 60
    with pytest.raises(InputError, match=r"attend to 60 tokens at a time.*--prompt-tokens"):
        edgewise.export(model, tmp_path / "b", example=example, prompt_tokens=10, new_tokens=64)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["image", "video", "audio", "speech"])
def test_a_batch_of_prompts_is_refused(kind: str, tmp_path: Path) -> None:
    made = {"image": lambda: make("llava"), "video": lambda: make_video("qwen2-vl"), "audio": lambda: make_audio("qwen2-audio")}
    model, example = made[kind]() if kind in made else (tiny_speech(), {})
    with pytest.raises(InputError, match=r"answers one prompt at a time: leave --batch 2 out"):
        edgewise.export(model, tmp_path / "b", example=example, batch=2)
    assert not (tmp_path / "b").exists()


def test_a_whole_model_that_fails_is_said_to(tmp_path: Path) -> None:
    """Its encoder takes two images, and one prompt has no place for the second."""
    model, example = make("qwen2-vl", 2)
    with pytest.raises(InputError, match=r"Qwen2VL.*fails on a prompt with its image"):
        edgewise.export(model, tmp_path / "b", example=example, prompt_tokens=10, new_tokens=4)
    assert not (tmp_path / "b").exists()


def test_options_of_pipelines_are_for_pipelines(tmp_path: Path) -> None:
    for given in ({"prompt_tokens": 4}, {"images": 2}):
        with pytest.raises(InputError, match="prompt-tokens"):
            edgewise.export(nn.Linear(2, 2), tmp_path / "b", example=(torch.ones(1, 2),), **given)
