"""The folder of demo:vqa: Hugging Face loads it as it is, and the model answers questions about what it sees."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor

from edgewise import demos
from edgewise.demos import scenes
from edgewise.demos.drawing import SHAPES
from edgewise.exporter.sources import load_source

FOLDER = demos.folder("vqa")
LEAST = 0.9


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(FOLDER)


@torch.inference_mode()
def right(model: Any, processor: Any, images: list[np.ndarray], asked: list[scenes.Example]) -> Counter[str]:
    """Rightly answered questions by kind."""
    inputs = processor(images=images, text=[e.prompt for e in asked], return_tensors="pt", padding=True)
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = processor.batch_decode(made, skip_special_tokens=True)
    return Counter(e.kind for e, answer in zip(asked, said, strict=True) if answer == e.answer)


def test_answers_need_the_image(model: Any, processor: Any) -> None:
    asked = list(scenes.examples("test", 400))
    images = [example.image for example in asked]
    found, kinds = right(model, processor, images, asked), Counter(example.kind for example in asked)
    assert found.total() >= LEAST * len(asked)
    assert all(found[kind] >= 0.75 * kinds[kind] for kind in scenes.KINDS), (found, kinds)
    # The same questions about other scenes: what a blind model could answer.
    blind = asked[:200]
    assert right(model, processor, images[200:], blind).total() < 0.6 * len(blind)


def test_it_is_a_small_llava(model: Any) -> None:
    config = model.config
    assert config.architectures == ["LlavaForConditionalGeneration"] and model.dtype == torch.float32
    assert (config.vision_config.image_size // config.vision_config.patch_size) ** 2 == config.image_seq_length == 196
    assert config.text_config.num_hidden_layers >= 4
    assert sum(p.numel() for p in model.parameters()) * 2 <= 6e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6e6


def test_the_tokenizer_alone_gives_the_same_tokens(processor: Any) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    words = Counter()
    for example in scenes.examples("test", 300):
        text = example.prompt.replace("<image>", "<image>" * 196)
        ids = processor(images=example.image, text=example.prompt)["input_ids"][0]
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(tokenizer.encode(example.answer, add_special_tokens=False).ids) == example.answer
        words.update(tokenizer.encode(example.prompt).tokens)
    assert "<unk>" not in words and words["<bos>"] == words["<image>"] == 300
    for word in [*SHAPES, *map(scenes.plural, SHAPES), *scenes.COLOURS, *scenes.RADII, *scenes.NUMBERS]:
        assert tokenizer.encode(word, add_special_tokens=False).tokens == [word]


def test_the_chat_template_writes_the_prompt(processor: Any) -> None:
    question = "What colour is the circle?"
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert prompt == scenes.PROMPT.format(question=question)


def test_the_processor_says_how_pixels_are_made(processor: Any) -> None:
    source = load_source("demo:vqa")
    assert source.preprocessing["image_mean"] == [0.5, 0.5, 0.5] and source.preprocessing["size"]["height"] == 112
    image = next(scenes.examples("test", 1)).image
    pixels = processor.image_processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(pixels, image.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_it_is_listed_and_has_no_arrays(cli: Cli, digits: Any) -> None:
    (listed,) = (one for one in cli("models", "--json").document["models"] if one["model"] == "demo:vqa")
    weights = json.loads((FOLDER / "config.json").read_text())
    assert listed["architecture"] == weights["architectures"][0] and listed["inputs"] == {
        "pixel_values": [1, 3, 112, 112]
    }
    assert listed["tokens"] == 197 and listed["classes"] is None and listed["test_samples"] == scenes.TEST
    cli("verify", digits, "--data", "demo:vqa").refused("demo:vqa", "questions")
