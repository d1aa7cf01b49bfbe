"""Retrieval recall: the metric against one written by loops, and of a two-tower model against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from conftest import Cli

import edgewise
from edgewise.errors import InputError
from edgewise.verify.retrieval import has_two_towers, recall, recall_of


def by_loops(media: np.ndarray, texts: np.ndarray, pairs: list[tuple[int, int]], k: int) -> float:
    """Recall@k of texts by media: a query at a time, sorted, what does not belong to it first among equals."""
    found = 0
    for i, query in enumerate(media):
        order = sorted(
            range(len(texts)),
            key=lambda j: (-round(float(query @ texts[j] / np.linalg.norm(query) / np.linalg.norm(texts[j])), 9), (i, j) in pairs),
        )
        found += any((i, j) in pairs for j in order[:k])
    return found / len(media)


@pytest.mark.parametrize("seed", range(4))
def test_against_loops(seed: int) -> None:
    """Several texts of an image, a text of several images, and equal embeddings of different things."""
    random = np.random.default_rng(seed)
    media, texts = random.normal(size=(9, 3)), random.normal(size=(14, 3))
    media[3] = 2 * media[5]
    texts[4:8] = texts[2]
    pairs = [*zip(range(9), range(9), strict=True), (0, 9), (0, 10), (2, 11), (2, 1), (8, 12), (1, 13)]
    rows = np.array(pairs)
    made = recall_of(media[rows[:, 0]], texts[rows[:, 1]], rows[:, 0], rows[:, 1])
    back = [(j, i) for i, j in pairs]
    assert (made["media"], made["texts"]) == (9, 14)
    for k in (1, 5):
        assert made["media_to_text"][str(k)] == pytest.approx(by_loops(media, texts, pairs, k))
        assert made["text_to_media"][str(k)] == pytest.approx(by_loops(texts, media, back, k))


def test_embeddings_that_say_nothing_find_nothing() -> None:
    ids = np.arange(8)
    for rows in (np.ones((8, 4)), np.zeros((8, 4))):
        assert recall_of(rows, rows, ids, ids)["media_to_text"] == {"1": 0.0, "5": 0.0}
    assert recall_of(np.eye(8), 1000 * np.eye(8), ids, ids)["text_to_media"] == {"1": 1.0, "5": 1.0}


@pytest.mark.parametrize(
    ("rows", "ids", "fault"),
    [
        (np.eye(5), np.arange(5), "5 different media, and recall@5 needs more than 5"),
        (np.eye(8), np.zeros(8, int), "1 different media"),
        (np.full((8, 2), np.nan), np.arange(8), "not finite"),
    ],
)
def test_what_cannot_be_computed(rows: np.ndarray, ids: np.ndarray, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        recall_of(rows, rows, ids, ids)


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[edgewise.Bundle, Path, dict[str, torch.Tensor]]:
    """A bundle of batches of two, its model, and 12 texts of 7 images with odd counts."""
    place = tmp_path_factory.mktemp("towers")
    model, inputs = families.build("clip", True)
    model.save_pretrained(place / "model")  # type: ignore[operator]
    shapes = {name: (2, *one.shape[1:]) for name, one in inputs.items()}
    bundle = edgewise.export(str(place / "model"), place / "b", targets=["onnxruntime"], input_shapes=shapes)
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(7, *shapes["pixel_values"][1:], generator=generator)[[0, 1, 2, 3, 4, 5, 6, 0, 1, 1, 2]]
    ids = torch.randint(3, 90, (11, shapes["input_ids"][1]), generator=generator)
    ids[:, -1] = 2
    return bundle, place, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


def test_of_a_model_with_two_towers(
    two_towers: tuple[edgewise.Bundle, Path, dict[str, torch.Tensor]], cli: Cli, tmp_path: Path
) -> None:
    bundle, _, data = two_towers
    np.savez(tmp_path / "pairs.npz", **{name: one.numpy() for name, one in data.items()})
    with torch.no_grad():
        outputs = families.build("clip", True)[0](**data)
    pairs = list(enumerate([0, 1, 2, 3, 4, 5, 6, 0, 1, 1, 2]))
    said = cli("verify", bundle.path, "--data", tmp_path / "pairs.npz", "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    (found,) = result["recall"]
    assert (found["samples"], found["media"], found["texts"]) == (11, 7, 11) and result["accuracy"] is None
    images, texts = outputs.image_embeds[:7].numpy(), outputs.text_embeds.numpy()
    for k in (1, 5):
        assert found["media_to_text"][str(k)] == pytest.approx(by_loops(images, texts, [(i, j) for j, i in pairs], k))
        assert found["text_to_media"][str(k)] == pytest.approx(by_loops(texts, images, pairs, k))
    assert 0 < found["text_to_media"]["5"] < 1
    table = cli("verify", bundle.path, "--data", tmp_path / "pairs.npz", "--data-samples", "9")
    assert table.code == 0 and "recall@5" in table.out + table.err


def test_data_without_pairs(two_towers: tuple[edgewise.Bundle, Path, dict[str, torch.Tensor]], cli: Cli, tmp_path: Path) -> None:
    bundle, _, data = two_towers
    np.savez(tmp_path / "images.npz", pixel_values=data["pixel_values"].numpy())
    for src, fault in ((tmp_path / "images.npz", "no array for the input"), (tmp_path, "give an .npz of arrays by name")):
        said = cli("verify", bundle.path, "--data", src)
        assert said.code == 2 and fault in " ".join(said.err.split())


def test_a_model_without_two_towers(digits: Path) -> None:
    bundle = edgewise.Bundle.open(digits)
    assert not has_two_towers(bundle)
    with pytest.raises(InputError, match="has no two towers"):
        recall(bundle, "nothing.npz")
