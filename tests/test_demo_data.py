"""The drawn data of demo:motion and demo:vqa: the same everywhere, and its labels and answers are true."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from edgewise.demos import clips, scenes
from edgewise.demos.drawing import SHAPES, paint

# What was drawn when the models were trained. Another digest means other data than the documented accuracy is of.
DRAWN = {
    "clips": "816fd9d4192f70b2ae10961b360a7264d9cc18d9d601dbf164954dd5d8385f96",
    "scenes": "c5c102a8c8717d21d8d4a945aff2368186424d7363a24a79dfe10d398fc7218c",
}

KINDS = {word: shape for shape in SHAPES for word in (shape, scenes.plural(shape))}


def test_the_test_splits_are_those_of_the_documented_accuracy() -> None:
    frames, words = hashlib.sha256(), hashlib.sha256()
    for index in range(0, clips.TEST, 16):
        drawn, label, _ = clips.clip("test", index)
        frames.update(drawn.tobytes() + bytes([label]))
    for example in list(scenes.examples("test", 40)):
        words.update(example.image.tobytes() + f"{example.prompt} {example.answer}".encode())
    assert {"clips": frames.hexdigest(), "scenes": words.hexdigest()} == DRAWN


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_cover_what_geometry_says(shape: str) -> None:
    area = {"circle": np.pi, "square": 4 * 0.88**2, "triangle": 2, "cross": 4 * 2 * 0.34 - 4 * 0.34**2}[shape]
    image = np.zeros((60, 80, 1))
    paint(image, shape, np.ones(1), x=41.3, y=28.7, radius=20)
    assert image.sum() == pytest.approx(area * 400, rel=0.02)
    assert image[28, 41] == 1 and image[0, 0] == 0 and image.min() == 0 and image.max() == 1
    rows, columns = np.nonzero(image[..., 0])
    assert columns.min() >= 41.3 - 21 and columns.max() < 41.3 + 21
    assert rows.min() >= 28.7 - 21 and rows.max() < 28.7 + 21
    # Only the triangle is not the same upside down: its point is at the top.
    assert (image[9:20].sum() < image[38:49].sum()) == (shape == "triangle")


def test_what_leaves_the_image_is_cut_off() -> None:
    inside, outside = np.zeros((40, 40, 3)), np.zeros((80, 80, 3))
    paint(inside, "circle", np.array([9.0, 8, 7]), 1, 38, 9)
    paint(outside, "circle", np.array([9.0, 8, 7]), 21, 58, 9)
    np.testing.assert_array_equal(inside, outside[20:60, 20:60])


def test_clips_show_what_their_label_says() -> None:
    seen = Counter()
    for index in range(80):
        frames, label, (still, moving) = clips.clip("train", index)
        assert frames.shape == (8, 48, 48, 3) and frames.dtype == np.uint8
        shape, direction = clips.LABELS[label].split()
        dx, dy = (path[-1] - path[0] for path in (moving.x, moving.y))
        assert (moving.shape, (np.sign(dx), np.sign(dy))) == (shape, clips.DIRECTIONS[direction])
        assert 1.5 * 7 <= abs(dx + dy) <= 3 * 7
        assert still.shape != moving.shape and np.ptp(still.x) == np.ptp(still.y) == 0
        for path in (still, moving):
            assert min(path.x.min(), path.y.min()) >= path.radius
            assert max(path.x.max(), path.y.max()) <= clips.SIZE - path.radius
        # The moving shape, as it is seen: its colour, of the first frame, is at its centre in every frame.
        colours = [frames[n, int(moving.y[n]), int(moving.x[n])] for n in range(clips.FRAMES)]
        assert np.ptp(np.array(colours, int), axis=0).max() == 0
        seen[label] += 1
    assert len(seen) == len(clips.LABELS) == 16


def test_the_whole_test_split_of_clips() -> None:
    pixels, labels = clips.whole_test_split()
    assert pixels.shape == (clips.TEST, 8, 3, 48, 48) and pixels.dtype == np.float32
    frames, label, _ = clips.clip("test", 7)
    np.testing.assert_allclose(pixels[7], (frames.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5, atol=1e-6)
    assert labels[7] == label and min(Counter(labels.tolist()).values()) >= 10


def test_scenes_are_drawn_as_they_are_described() -> None:
    for index in range(60):
        _, things, image = scenes.scene("train", index)
        assert image.shape == (112, 112, 3) and image.dtype == np.uint8 and 2 <= len(things) <= 5
        for thing in things:
            colour = image[int(thing.y), int(thing.x)].astype(int)
            nearest = min(scenes.COLOURS, key=lambda c: np.abs(colour - scenes.COLOURS[c]).max())
            assert nearest == thing.colour and np.abs(colour - scenes.COLOURS[thing.colour]).max() <= 20
        for one in range(len(things)):
            for other in things[:one]:
                gap = max(abs(things[one].x - other.x), abs(things[one].y - other.y))
                assert gap >= scenes.RADII[things[one].size] + scenes.RADII[other.size]


def test_answers_are_true_and_the_only_ones() -> None:
    kinds, answers = Counter(), defaultdict(set)
    for index in range(150):
        random, things, _ = scenes.scene("train", index)
        for kind in scenes.KINDS * 2:
            question = scenes.ask(random, things, kind)
            if question is not None:
                assert question.kind == kind and question.answer == solve(question.text, things), (question, things)
                kinds[kind] += 1
                answers[kind].add(question.answer)
    assert min(kinds.values()) >= 150
    assert answers["colour"] == set(scenes.COLOURS) and answers["shape"] == set(SHAPES)
    assert answers["count"] == set(scenes.NUMBERS) and answers["comparison"] == {"yes", "no"}
    assert answers["position"] == {"yes", "no", "top left", "top right", "bottom left", "bottom right"}


def test_no_answer_gives_itself_away() -> None:
    """Who knows how often each question of the test split has each answer, and sees no image, is seldom right."""
    seen = defaultdict(Counter)
    for example in scenes.examples("test", 600):
        seen[re.sub("|".join([*scenes.COLOURS, *KINDS]), "X", example.question)][example.answer] += 1
    assert sum(max(found.values()) for found in seen.values()) / 600 < 0.55


def test_examples_are_prompts_of_scenes() -> None:
    first, again = list(scenes.examples("test", 10)), list(scenes.examples("test", 10))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert (one.question, one.answer) == (other.question, other.answer)
        assert one.prompt == f"USER: <image>\n{one.question} ASSISTANT:"
    assert Counter(example.kind for example in scenes.examples("test", 100)).keys() == set(scenes.KINDS)
    other = next(scenes.examples("train", 1))
    assert not np.array_equal(other.image, first[0].image)


def solve(text: str, things: list[scenes.Thing]) -> str:
    """Answer a question by reading it, apart from how it was made; every thing asked after must be the only one."""
    words = text.rstrip("?").lower().split()
    phrases = [
        found for found in re.split(r"\b(?:the|many|more|fewer|than|are there)\b", " ".join(words)) if found.strip()
    ]

    def group(phrase: str) -> list[scenes.Thing]:
        said = [word for word in phrase.split() if word in {*scenes.COLOURS, *scenes.RADII, *KINDS}]
        return [t for t in things if all(w in (t.colour, t.size) or KINDS.get(w) == t.shape for w in said)]

    def only(phrase: str) -> scenes.Thing:
        (thing,) = group(phrase)
        return thing

    if words[:2] == ["what", "colour"]:
        return only(phrases[-1]).colour
    if words[:2] == ["what", "shape"]:
        return only(phrases[-1]).shape
    if words[:2] == ["how", "many"]:
        return scenes.NUMBERS[len(group(phrases[1]))]
    if words[0] == "where":
        thing = only(phrases[-1])
        return f"{'top' if thing.y < 56 else 'bottom'} {'left' if thing.x < 56 else 'right'}"
    if words[:2] == ["are", "there"]:
        a, b = (len(group(phrase)) for phrase in phrases[-2:])
        return "yes" if (a > b if "more" in words else a < b) else "no"
    a, b = (only(phrase) for phrase in phrases[-2:])
    relations = {
        "left": a.x < b.x,
        "right": a.x > b.x,
        "above": a.y < b.y,
        "below": a.y > b.y,
        "larger": (a.size, b.size) == ("large", "small"),
        "smaller": (a.size, b.size) == ("small", "large"),
    }
    (relation,) = relations.keys() & set(words)
    return "yes" if relations[relation] else "no"
