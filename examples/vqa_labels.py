"""What the parts of `demo:vqa` are told while they are trained, beside the answers: what lies under every patch, and
what every noun of a question refers to. The heads that learn it are not kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from vqa_model import GRID, PATCH

from edgewise.demos import scenes
from edgewise.demos.drawing import SHAPES, paint

NAMES = {"colour": tuple(scenes.COLOURS), "shape": SHAPES, "size": tuple(scenes.RADII)}
SIZES = [len(values) for values in NAMES.values()]
NOUNS = {"thing": None, "things": None}
NOUNS |= {word: shape for shape in SHAPES for word in (shape, scenes.plural(shape))}


@dataclass
class Patches:
    """What lies under the patches of an image, or of a batch: class 0 is the ground.

    `colour`, `shape`, `size` and `centre` are `(patches,)`; `place (patches, 4)` is the centre of the thing, seen from
    the patch and within the image; `tally` counts things by colour, shape and size, and all of them.
    """

    colour: Tensor
    shape: Tensor
    size: Tensor
    centre: Tensor
    place: Tensor
    tally: Tensor

    @staticmethod
    def of(things: list[scenes.Thing]) -> Patches:
        labels = {key: np.zeros((GRID, GRID), np.int64) for key in NAMES}
        centre, place = np.zeros((GRID, GRID), np.float32), np.zeros((GRID, GRID, 4), np.float32)
        middles = np.arange(GRID) * PATCH + PATCH / 2
        tally = []
        for key, values in NAMES.items():
            tally += [sum(getattr(thing, key) == value for thing in things) for value in values]
        for thing in things:
            cover = np.zeros((scenes.SIZE, scenes.SIZE, 1))
            paint(cover, thing.shape, np.ones(1), thing.x, thing.y, scenes.RADII[thing.size])
            on = cover.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)) > 0.1
            for key, values in NAMES.items():
                labels[key][on] = values.index(getattr(thing, key)) + 1
            row, column = int(thing.y // PATCH), int(thing.x // PATCH)
            centre[row, column] = 1
            away = np.stack(np.broadcast_arrays(thing.x - middles, (thing.y - middles)[:, None]), -1) / 8
            place[on] = np.concatenate((away, np.broadcast_to(within(thing), away.shape)), -1)[on]
        flat = [torch.from_numpy(labels[key]).flatten() for key in NAMES]
        tally.append(len(things))
        return Patches(
            *flat,
            torch.from_numpy(centre).flatten(),
            torch.from_numpy(place).flatten(0, 1),
            torch.tensor(tally),
        )

    def features(self) -> Tensor:
        """The labels of things as numbers, `(batch, patches, features)`."""
        kinds = zip((self.colour, self.shape, self.size), SIZES, strict=True)
        one_hot = [functional.one_hot(labels, size + 1)[..., 1:].float() for labels, size in kinds]
        return torch.cat((*one_hot, self.place), dim=-1)

    def take(self, kept: Tensor | None) -> Patches:
        """The labels of the kept patches `(batch, count)` alone, of a batch."""
        if kept is None:
            return self
        flat = (self.colour, self.shape, self.size, self.centre)
        place = self.place.gather(1, kept[..., None].expand(-1, -1, 4))
        return Patches(*(one.gather(1, kept) for one in flat), place, self.tally)

    @staticmethod
    def stack(many: list[Patches]) -> Patches:
        return Patches(*(torch.stack([getattr(one, key) for one in many]) for key in Patches.__dataclass_fields__))


class PatchHead(nn.Module):
    """Reads off each visual token what lies under it, and off the class token how many things there are of each
    colour, shape and size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(SIZES) + 3 + 1 + 4)
        self.whole = nn.Linear(width, (sum(SIZES) + 1) * len(scenes.NUMBERS))

    def forward(self, tokens: Tensor, pooled: Tensor, patches: Patches) -> dict[str, Tensor]:
        """The losses, by name, for tokens `(batch, patches, width)` and the pooled class token `(batch, width)`."""
        colour, shape, size, centre, place = self.patch(tokens).split([*(n + 1 for n in SIZES), 1, 4], dim=-1)
        on = patches.colour > 0
        tallies = self.whole(pooled).view(-1, len(scenes.NUMBERS))
        return {
            "colour": functional.cross_entropy(colour.flatten(0, 1), patches.colour.flatten()),
            "shape": functional.cross_entropy(shape.flatten(0, 1), patches.shape.flatten()),
            "size": functional.cross_entropy(size.flatten(0, 1), patches.size.flatten()),
            "centre": functional.binary_cross_entropy_with_logits(centre[..., 0], patches.centre),
            "place": functional.mse_loss(place[on], patches.place[on]),
            "tally": functional.cross_entropy(tallies, patches.tally.flatten()),
        }


@dataclass
class Nouns:
    """The nouns of a batch of questions: at which question and token each stands, how many things it refers to, and
    of the only one, where it refers to one, `place (x, y)` and what it is by colour, shape and size."""

    row: list[int]
    token: list[int]
    count: list[int]
    single: list[scenes.Thing | None]

    def add(self, row: int, words: list[str], things: list[scenes.Thing]) -> None:
        """Look up the nouns among the words of one question."""
        for at, word in enumerate(words):
            if word not in NOUNS:
                continue
            wanted = {} if NOUNS[word] is None else {"shape": NOUNS[word]}
            before = at - 1
            while before >= 0 and (key := _attribute(words[before])):
                wanted[key] = words[before]
                before -= 1
            found = [thing for thing in things if all(getattr(thing, k) == v for k, v in wanted.items())]
            self.row.append(row)
            self.token.append(at)
            self.count.append(len(found))
            self.single.append(found[0] if len(found) == 1 else None)


class NounHead(nn.Module):
    """Reads off the hidden state at a noun of a question what the noun refers to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, len(scenes.NUMBERS) + 2 + sum(SIZES))

    def forward(self, hidden: Tensor, nouns: Nouns) -> Tensor:
        """The sum of the losses, for hidden states `(questions, length, width)`."""
        count, place, *kinds = self.read(hidden[nouns.row, nouns.token]).split([len(scenes.NUMBERS), 2, *SIZES], dim=-1)
        loss = functional.cross_entropy(count, torch.tensor(nouns.count))
        one = [at for at, thing in enumerate(nouns.single) if thing is not None]
        things = [nouns.single[at] for at in one]
        loss = loss + functional.mse_loss(place[one], torch.tensor(np.array([within(t) for t in things])).float())
        for (key, values), logits in zip(NAMES.items(), kinds, strict=True):
            target = torch.tensor([values.index(getattr(thing, key)) for thing in things])
            loss = loss + 0.5 * functional.cross_entropy(logits[one], target)
        return loss


def within(thing: scenes.Thing) -> np.ndarray:
    """Where a thing is in the image, from -2 to 2 each way."""
    return (np.array([thing.x, thing.y]) / scenes.SIZE - 0.5) * 4


def _attribute(word: str) -> str | None:
    return next((key for key in ("colour", "size") if word in NAMES[key]), None)
