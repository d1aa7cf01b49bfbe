"""Vision-language models end to end: what a bundle generates, token for token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlm_reference import IMAGE, Compressed, Compression, greedy, greedy_of_several, llava, save_llava, zipped

import edgewise
from edgewise.errors import InputError
from edgewise.runtime.places import items_axis

TARGETS = ("openvino", "onnxruntime")
EVERY = (*TARGETS, "tensorrt", "coreml", "coreml-ios18")
BUCKET, NEW = 12, 32
PROMPTS = [([1, 5, 6], [7, 8, 9, 10]), ([], [3]), ([4, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]), ([1, 2], [9, 30])]
HOW = Compression(tower=2, dominant=20, context=4, stages={2: ("fastv", 8)})


def image(seed: int) -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def export(model: Any, out: Path, *specs: str, targets: tuple[str, ...] = TARGETS) -> edgewise.Bundle:
    return edgewise.export(
        model,
        out,
        example={"pixel_values": image(0)},
        targets=targets,
        compress=specs,
        prompt_tokens=BUCKET,
        new_tokens=NEW,
        cache=False,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> edgewise.Bundle:
    return export(llava(), tmp_path_factory.mktemp("plain") / "b")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> edgewise.Bundle:
    specs = (f"visionzip:keep={HOW.dominant},context={HOW.context}", "fastv@decoder.block[2]:keep=8")
    return export(llava(), tmp_path_factory.mktemp("compressed") / "b", *specs, targets=EVERY)


@pytest.mark.parametrize("target", TARGETS)
def test_uncompressed_equals_the_model(plain: edgewise.Bundle, target: str) -> None:
    model = llava()
    with edgewise.load(plain, target=target) as pipeline:
        for seed, (before, after) in enumerate(PROMPTS):
            pixels = image(seed)
            made = pipeline.generate(input_ids=[*before, IMAGE, *after], image=pixels.numpy())
            assert made.ids == greedy(model, pixels, before, after, 64, NEW)
            assert len(set(made.ids)) > 8 and made.stopped == "length"


@pytest.mark.parametrize("target", EVERY)
def test_compressed_equals_an_eager_implementation(compressed: edgewise.Bundle, target: str) -> None:
    model = llava()
    with torch.no_grad(), edgewise.load(compressed, target=target) as pipeline:
        for seed, (before, after) in enumerate(PROMPTS):
            pixels = image(seed)
            made = pipeline.generate(input_ids=[*before, IMAGE, *after], image=pixels.numpy())
            visual = zipped(model, pixels, HOW)
            assert made.ids == Compressed(model, HOW).generate(visual, before, after, NEW)
            assert made.ids != greedy(model, pixels, before, after, 64, NEW)


@pytest.mark.parametrize(
    ("target", "stages"),
    [
        ("openvino", {1: ("pyramiddrop", 12), 2: ("fastv", 7), 3: ("pyramiddrop", 3)}),
        ("onnxruntime", {1: ("dart", 13), 2: ("sparsevlm", 9)}),
    ],
)
def test_other_methods_in_the_decoder(target: str, stages: dict[int, tuple[str, int]], tmp_path: Path) -> None:
    """Prompts of one token behind the image and of none before it are among them: buckets are padded, text is not where it was."""
    model, how = llava(), Compression(tower=2, dominant=20, context=4, stages=stages)
    parts = [f"{method}@decoder.block[{block}]:keep={keep}" for block, (method, keep) in stages.items()]
    bundle = export(model, tmp_path / "b", "visionzip:keep=20,context=4", *parts, targets=(target,))
    assert bundle.manifest.pipeline is not None
    media = [24]
    for block in range(1, 4):
        media.append(stages[block][1] if block in stages else media[-1])
    assert [cache.media for cache in bundle.manifest.pipeline.caches] == media
    with torch.no_grad(), edgewise.load(bundle) as pipeline:
        for seed, (before, after) in enumerate(PROMPTS):
            made = pipeline.generate(input_ids=[*before, IMAGE, *after], image=image(seed).numpy())
            visual = zipped(model, image(seed), how)
            assert made.ids == Compressed(model, how).generate(visual, before, after, NEW)
            assert len(set(made.ids)) > 8


def test_the_bundle_says_what_caches_hold(plain: edgewise.Bundle, compressed: edgewise.Bundle) -> None:
    about = compressed.manifest.pipeline
    assert about is not None and plain.manifest.pipeline is not None
    assert [(c.media, c.tokens, c.slots) for c in about.caches] == [(24, 36, 68)] * 2 + [(8, 20, 52)] * 2
    # Keys and values of two heads of twelve numbers.
    assert [c.bytes for c in about.caches] == [2 * 2 * 12 * 4 * slots for slots in (68, 68, 52, 52)]
    assert about.cache_bytes < plain.manifest.pipeline.cache_bytes
    # Of both bundles the uncompressed figures are the same, and those of the plain one are its own.
    whole = plain.manifest.pipeline.stages
    assert [(s.tokens, s.flops, s.cache_bytes) for s in whole] == [
        (s.tokens_before, s.flops_before, s.cache_bytes_before) for s in about.stages
    ]
    assert [(s.role, s.tokens_before, s.tokens) for s in about.stages] == [
        ("vision_encoder", 64, 24),
        ("prefill", 64, 8),
        ("decode", 64, 8),
    ]
    assert all(s.flops < s.flops_before for s in about.stages) and about.stages[1].cache_bytes == about.cache_bytes
    assert [c.role for c in compressed.manifest.components] == ["vision_encoder", "prefill", "decode"]
    assert all(c.flops_after < c.flops_before for c in compressed.manifest.components[:2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": [1, 2]}, "no image placeholder: write token 99"),
        ({"input_ids": [1, IMAGE, 2, IMAGE]}, "2 image placeholders"),
        ({"input_ids": [1, IMAGE]}, "ends with its image"),
        ({"input_ids": [IMAGE, *range(BUCKET + 1)]}, "13 tokens besides the image, and this bundle takes 12"),
        ({"input_ids": [IMAGE, 1], "image": None}, "no image"),
        ({"input_ids": [IMAGE, 1], "image": [image(0).numpy()] * 2}, "2 images are given, and this bundle takes 1"),
        ({"input_ids": [IMAGE, 1], "images": [image(0).numpy()]}, "image or images, and not both"),
        ({"input_ids": [IMAGE, 1], "image": np.zeros((1, 3, 8, 8))}, "shape"),
        ({"input_ids": [IMAGE, 1], "image": __file__}, "no image that can be read"),
        ({"input_ids": [IMAGE, 1], "image": "absent.png"}, "does not exist"),
        ({"input_ids": [IMAGE, 1], "image": 5}, "an image is given as int: give a file"),
        ({"input_ids": [IMAGE, 1], "image": [None]}, "an image is given as NoneType"),
        ({"input_ids": [IMAGE, 1], "image": np.array([["x"]])}, "an image is given as an array of <U1"),
        ({"input_ids": [IMAGE, 1], "image": np.zeros((0, 4, 3), np.uint8)}, "shape"),
        ({"input_ids": [IMAGE, 1], "image": np.zeros((2, 8, 8, 3), np.uint8)}, "2 images are given, and this bundle takes 1"),
        ({"prompt": "what?"}, "no tokenizer"),
        ({}, "give a prompt, or input_ids"),
        ({"input_ids": [IMAGE, 1], "max_new_tokens": NEW + 1}, "room for 32 new tokens"),
    ],
)
def test_wrong_prompts_and_media(plain: edgewise.Bundle, given: dict[str, Any], message: str) -> None:
    with edgewise.load(plain, target="openvino") as pipeline, pytest.raises(InputError, match=message):
        pipeline.generate(**{"image": image(0).numpy()} | given)


def test_the_command_line_answers_as_the_model_does(cli: Cli, tmp_path: Path) -> None:
    """From a Hugging Face folder: its tokenizer, template and image constants go into the bundle, and sampling is seeded."""
    folder, out, picture = tmp_path / "model", tmp_path / "b", tmp_path / "x.png"
    folder.mkdir()
    model = save_llava(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(picture)
    assert cli("export", folder, "--target", "openvino", "--prompt-tokens", 16, "--new-tokens", 8, "-o", out).code == 0
    asked = cli("run", out, "--image", picture, "--prompt", "what is this", "--json", "--quiet").document
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": content}], return_dict=True)["input_ids"]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(Image.open(picture), return_tensors="pt")["pixel_values"]
    at = ids.index(IMAGE)
    assert asked["ids"] == greedy(model, pixels, ids[:at], ids[at + 1 :], 64, 8)
    assert asked["text"] == tokenizer.decode(asked["ids"]) and asked["stages"]["decode"]["runs"] == 7
    drawn = ["run", out, "--image", picture, "--prompt", "is", "--temperature", 2, "--json", "--quiet"]
    texts = [cli(*drawn, "--seed", seed).document["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    streamed = cli("run", out, "--image", picture, "--prompt", "what is this")
    assert asked["text"] in streamed.out
    twice = cli("run", out, "--image", picture, "--prompt", "<image> is <image>")
    assert twice.code == 2 and "write one" in twice.err


def test_several_images_between_the_text(cli: Cli, tmp_path: Path) -> None:
    """Each in the place of its placeholder; with the template, all before the question, as the processor has them."""
    folder, out = tmp_path / "model", tmp_path / "b"
    folder.mkdir()
    model = save_llava(folder)
    files = [tmp_path / "x.png", tmp_path / "y.png"]
    for seed, file in enumerate(files):
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    asked = ["--target", "openvino", "--prompt-tokens", 16, "--new-tokens", 32]
    assert cli("export", folder, "--images", 2, *asked, "-o", out).code == 0
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    tokenizer, shown = AutoTokenizer.from_pretrained(folder), ["--image", files[0], "--image", files[1], "--json", "--quiet"]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is this"}]
    whole = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    texts = []
    for prompt, written in (("what is this", whole), ("w7 <image> is w8 <image> this w9", "w7 <image> is w8 <image> this w9")):
        made = cli("run", out, "--prompt", prompt, *shown).document["ids"]
        between = [tokenizer.encode(text) for text in written.split("<image>")]
        assert made == greedy_of_several(model, pixels, between, 64, 32) and len(set(made)) > 8
        texts.append(made)
    assert cli("run", out, "--prompt", "what is this", *shown[2:4], *shown[:2], *shown[4:]).document["ids"] != texts[0]
    with edgewise.load(out) as pipeline:
        pictures = np.stack([np.asarray(Image.open(file)) for file in files])
        assert pipeline.generate("what is this", images=pictures).ids == texts[0]
        with pytest.raises(InputError, match="an image is given as int"):
            pipeline.generate("what is this", images=[3, 4])
    for given, message in (
        (["--prompt", "what", *shown[:2]], "1 image is given, and this bundle takes 2"),
        (["--prompt", "what <image>", *shown[:4]], "1 image placeholder.*2 images are given"),
    ):
        wrong = cli("run", out, *given)
        assert wrong.code == 2 and re.search(message, " ".join(wrong.err.split()))


@pytest.mark.parametrize(
    ("shape", "items", "axis"), [((1, 3, 24, 24), 3, 0), ((3, 3, 24, 24), 3, 0), ((1, 3, 3, 24, 24), 3, 1), ((64, 1176), 4, 0)]
)
def test_colours_are_no_images(shape: tuple[int, ...], items: int, axis: int) -> None:
    assert items_axis(shape, items) == axis
