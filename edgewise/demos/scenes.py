"""The data of `demo:vqa`: drawn scenes of coloured shapes, and questions about colour, shape, number, place and size.

The design follows CLEVR (Johnson et al. 2017): scenes made at random, questions from templates whose answer follows
from the scene, and a question is asked only where the scene leaves one answer to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from edgewise.demos.drawing import SHAPES, background, paint, rng, to_bytes

SIZE = 112  # pixels each way
TEST = 1000  # examples of the test split
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 40),
    "purple": (165, 50, 190),
    "white": (235, 235, 235),
}
RADII = {"small": 6.5, "large": 11.5}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
KINDS = ("colour", "shape", "count", "position", "comparison")
PROMPT = "USER: <image>\n{question} ASSISTANT:"

# Scenes of the test split have seeds that no scene for training has.
_FIRST = {"train": 0, "test": 2**31}
# Things stand where patches of 8 pixels hold them whole: a small one fills two by two, a large one three by three.
_STEP, _FIRST_CENTRE, _PLACES = 8, {"small": 8, "large": 12}, {"small": 13, "large": 12}
# Things keep off each other, and a question of place off the line that decides it.
_GAP, _CLEAR_SIDE, _CLEAR_MIDDLE = 2, 12, 7


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `x` and `y` are its centre in pixels from the left and top edge."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Question:
    """A question of one of `KINDS` and its only answer, in lower case."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Example:
    """An image `(112, 112, 3)` in uint8, a question with the prompt that asks it, and the answer."""

    image: np.ndarray
    question: str
    prompt: str
    answer: str
    kind: str


def examples(split: str, count: int = TEST) -> Iterator[Example]:
    """The first `count` examples of the split "test" or "train": a scene each, the kinds of question in turn."""
    return (example(split, index) for index in range(count))


def example(split: str, index: int) -> Example:
    """Example `index` of a split. There are more of each than are ever counted to it."""
    random, things, image = scene(split, index)
    turn = (ask(random, things, KINDS[(index + later) % len(KINDS)]) for later in range(len(KINDS)))
    found = next(question for question in turn if question is not None)
    return Example(image, found.text, PROMPT.format(question=found.text), found.answer, found.kind)


def scene(split: str, index: int) -> tuple[np.random.RandomState, list[Thing], np.ndarray]:
    """Scene `index` of a split: its random stream, for questions, two to five things, and the image."""
    random = rng(_FIRST[split] + index)
    things = _arrange(random)
    image = background(random, 1, SIZE)[0]
    for thing in things:
        colour = np.array(COLOURS[thing.colour]) + random.randint(-20, 21, 3)
        paint(image, thing.shape, colour, thing.x, thing.y, RADII[thing.size])
    return random, things, to_bytes(image)


def _arrange(random: np.random.RandomState) -> list[Thing]:
    """Things that do not touch, of few colours and shapes, so that some are alike."""
    colours = random.permutation(list(COLOURS))[: random.randint(2, 5)]
    shapes = random.permutation(SHAPES)[: random.randint(2, 4)]
    wanted = random.randint(2, 6)
    things: list[Thing] = []
    while len(things) < wanted:
        size = ("small", "large")[random.randint(2)]
        x, y = (float(_FIRST_CENTRE[size] + _STEP * place) for place in random.randint(0, _PLACES[size], 2))
        apart = (max(abs(x - o.x), abs(y - o.y)) - RADII[size] - RADII[o.size] for o in things)
        if all(gap >= _GAP for gap in apart):
            shape, colour = shapes[random.randint(len(shapes))], colours[random.randint(len(colours))]
            things.append(Thing(str(shape), str(colour), size, x, y))
    return things


def ask(random: np.random.RandomState, things: list[Thing], kind: str) -> Question | None:
    """A question of a kind, or None where the scene has none of it.

    Among the questions that the scene allows, the template is drawn first, then the answer, then the question: no
    answer is common because questions that have it are many.
    """
    templates = [found for found in _TEMPLATES[kind](things) if found]
    if not templates:
        return None
    found = templates[random.randint(len(templates))]
    answers = sorted({answer for _, answer in found})
    answer = answers[random.randint(len(answers))]
    texts = [text for text, other in found if other == answer]
    return Question(kind, texts[random.randint(len(texts))], answer)


_Found = list[tuple[str, str]]


def _colour(things: list[Thing]) -> list[_Found]:
    plain = [(f"What colour is the {t.shape}?", t.colour) for t in things if _only(things, shape=t.shape)]
    sized = [
        (f"What colour is the {t.size} {t.shape}?", t.colour)
        for t in things
        if _only(things, shape=t.shape, size=t.size)
    ]
    return [plain, sized]


def _shape(things: list[Thing]) -> list[_Found]:
    plain = [(f"What shape is the {t.colour} thing?", t.shape) for t in things if _only(things, colour=t.colour)]
    sized = [
        (f"What shape is the {t.size} {t.colour} thing?", t.shape)
        for t in things
        if _only(things, colour=t.colour, size=t.size)
    ]
    return [plain, sized]


def _count(things: list[Thing]) -> list[_Found]:
    shapes = [(f"How many {plural(s)} are there?", _number(things, shape=s)) for s in SHAPES]
    colours = [(f"How many {c} things are there?", _number(things, colour=c)) for c in COLOURS]
    sizes = [(f"How many {s} things are there?", _number(things, size=s)) for s in RADII]
    return [shapes, colours, sizes, [("How many things are there?", NUMBERS[len(things)])]]


def _position(things: list[Thing]) -> list[_Found]:
    named = [t for t in things if _only(things, colour=t.colour, shape=t.shape)]
    corners = [
        (f"Where is the {t.name}?", f"{'top' if t.y < SIZE / 2 else 'bottom'} {'left' if t.x < SIZE / 2 else 'right'}")
        for t in named
        if min(abs(t.x - SIZE / 2), abs(t.y - SIZE / 2)) >= _CLEAR_MIDDLE
    ]
    sides = []
    for a, b in permutations(named, 2):
        for words, distance in (
            ("left of", b.x - a.x),
            ("right of", a.x - b.x),
            ("above", b.y - a.y),
            ("below", a.y - b.y),
        ):
            if abs(distance) >= _CLEAR_SIDE:
                sides.append((f"Is the {a.name} {words} the {b.name}?", _yes(distance > 0)))
    return [corners, sides]


def _comparison(things: list[Thing]) -> list[_Found]:
    named = [t for t in things if _only(things, colour=t.colour, shape=t.shape)]
    sizes = [
        (f"Is the {a.name} {word} than the {b.name}?", _yes(RADII[more.size] > RADII[less.size]))
        for a, b in permutations(named, 2)
        for word, more, less in (("larger", a, b), ("smaller", b, a))
    ]
    counts = {plural(s): sum(t.shape == s for t in things) for s in SHAPES}
    counts |= {f"{c} things": sum(t.colour == c for t in things) for c in COLOURS}
    numbers = [
        (f"Are there {word} {a} than {b}?", _yes(counts[more] > counts[less]))
        for a, b in permutations(counts, 2)
        if a.endswith("things") == b.endswith("things") and counts[a] + counts[b]
        for word, more, less in (("more", a, b), ("fewer", b, a))
    ]
    return [sizes, numbers]


_TEMPLATES = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "comparison": _comparison,
}


def _matches(things: list[Thing], **wanted: str) -> int:
    return sum(all(getattr(t, key) == value for key, value in wanted.items()) for t in things)


def _only(things: list[Thing], **wanted: str) -> bool:
    return _matches(things, **wanted) == 1


def _number(things: list[Thing], **wanted: str) -> str:
    return NUMBERS[_matches(things, **wanted)]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def plural(shape: str) -> str:
    """More than one of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")
