"""The seam between media and text, learned from the whole model: where its decoder puts the tokens of an image or a recording, and
who sees whom.

Nothing is known of families here: the model runs once on a prompt, what its decoder is given is looked at, and the components
that are captured must then give the same logits, token by token.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from edgewise.errors import InputError
from edgewise.exporter.capture import evaluating, quiet
from edgewise.exporter.pipeline.media import Media
from edgewise.exporter.pipeline.patches import patched
from edgewise.exporter.pipeline.vision_language import RULES, Decode, Rule
from edgewise.runtime.places import placed
from edgewise.verify.ladder import Rung, judge

THRESHOLD = 1e-4
"""Largest relative error of the components, joined, against the whole model."""

_STEPS = 3
"""New tokens that are compared."""


@dataclass(frozen=True)
class Seam:
    """How every image is joined with text.

    offsets `(rows, K)`: positions of the image's tokens, from that of the first; `advance`: how many positions the text behind the
    image is further on. One row is an order as well; of several, none is. `rule` says who sees whom.
    """

    offsets: np.ndarray
    advance: int
    rule: Rule = "causal"

    @property
    def count(self) -> int:
        """Tokens of an image."""
        return self.offsets.shape[1]

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Frames, height and width of a video's tokens, where their positions have these rows; None: of one frame, or another
        order."""
        pairs = [np.unique(row, return_inverse=True) for row in self.offsets]
        sizes = tuple(len(values) for values, _ in pairs)
        if len(sizes) != 3 or sizes[0] < 2 or math.prod(sizes) != self.count:
            return None
        ranks = np.stack([rank.reshape(-1) for _, rank in pairs])
        return sizes if (ranks == np.indices(sizes).reshape(3, -1)).all() else None

    @property
    def dense(self) -> bool:
        """Whether an image's tokens are numbered as text is, so that fewer of them are numbered without gaps."""
        return len(self.offsets) == 1 and self.advance == self.offsets.shape[1] and bool(
            (self.offsets[0] == np.arange(self.advance)).all()
        )


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens before, between and behind its images: one text more than images."""

    texts: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of text."""
        return sum(map(len, self.texts))

    def whole(self, image: int, count: int) -> Tensor:
        """All ids, `count` placeholders for each image included: `(1, N)`."""
        ids = list(self.texts[0])
        for text in self.texts[1:]:
            ids += [*[image] * count, *text]
        return torch.tensor([ids])

    def feeds(self, seam: Seam, bucket: int, name: str = "visual_position", places: Tensor | None = None) -> dict[str, Tensor]:
        """Inputs of prefill besides the images' tokens, whose positions are called `name`. `places (images, rows, K)`: where those
        are, if not where the seam says."""
        where = np.stack([seam.offsets] * (len(self.texts) - 1)) if places is None else places.numpy()
        made = placed(self.texts, where, seam.advance, bucket, name)
        return {key: torch.from_numpy(value) for key, value in made.items()}

    def next_position(self, seam: Seam) -> int:
        """The position of the first new token."""
        return self.length + (len(self.texts) - 1) * seam.advance


def random_prompt(model: nn.Module, image: int, images: int, bucket: int, length: int, seed: int) -> Prompt:
    """Seeded ids of text around images: at least one is behind the last."""
    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (min(length, bucket),), generator=generator).tolist()
    ids = [token if token != image else (token + 1) % vocabulary for token in ids]
    ends = [0, *(turn * len(ids) // (images + 2) for turn in range(1, images + 1)), len(ids)]
    return Prompt(tuple(tuple(ids[start:end]) for start, end in itertools.pairwise(ends)))


def learn(
    media: Media, model: nn.Module, example: Tensor, settled: Mapping[str, Any], bucket: int, seed: int, items: int = 1
) -> tuple[Seam, Rung]:
    """Run the whole model, on a prompt with so many `items` of media, and find the seam under which the components give the same;
    and the rung that says how closely.

    Raises InputError where none does, or it differs from text to text: the model is of a kind that this pipeline does not know. So
    it does where the model fails on the example.
    """
    token = media.placeholder(model)
    assert token is not None
    words = 5 + 2 * items  # enough for some around every item
    bucket = max(bucket, words)
    prompt = random_prompt(model, token, items, bucket, words, seed)
    with evaluating(model), quiet():
        with _saying(f"{type(model).__name__} cannot encode {media.argument} of shape {list(example.shape)}"):
            tokens = media.encoder(model, settled, None, items)(example)[media.tokens]
        count = tokens.shape[1]

        def inputs_of(one: Prompt) -> dict[str, Any]:
            ids = one.whole(token, count)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), media.argument: patched(model, example), **settled}
            return inputs | token_types(model, ids == token, media.mark)

        # The same media behind and between other lengths of text: two more tokens in front of each.
        longer = random_prompt(model, token, items, words + 2 * (items + 2), words + 2 * (items + 2), seed)
        with _saying(f"{type(model).__name__} fails on a prompt with its {media.noun}, as tokens of text and {count} placeholders"):
            seam, moved = (
                _positions(_decoder_inputs(model, inputs_of(one)).get("position_ids"), one, count) for one in (prompt, longer)
            )
            if (seam.offsets != moved.offsets).any() or seam.advance != moved.advance or (seam.offsets < 0).any():
                raise InputError(
                    f"{type(model).__name__} numbers the tokens of its {media.noun} by absolute places, which do not move with the "
                    "text in front of them, and a bundle is for any text: export its components one by one"
                )
            made = model.generate(  # type: ignore[operator]
                **inputs_of(prompt),
                max_new_tokens=_STEPS,
                min_new_tokens=_STEPS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        wanted = torch.cat(list(made.logits)).float().numpy()
        text = made.sequences[0, -_STEPS:].tolist()
        rungs = []
        for rule in RULES:
            seam = Seam(seam.offsets, seam.advance, rule)
            with _saying(f"{type(model).__name__} cannot be split: its decoder does not run on embedded tokens and given caches"):
                found = _joined(media, model, tokens, prompt, seam, bucket, text)
            outputs = {"logits": wanted}, {"logits": found}
            rung = judge("components, joined", "whole model", "capture", *outputs, threshold=THRESHOLD)
            if rung.passed:
                return seam, rung
            rungs.append(rung)
    best = min(rung.outputs["logits"].relative or float("inf") for rung in rungs)
    raise InputError(
        f"{type(model).__name__} cannot be split: its encoder and its decoder, joined by the positions that "
        f"the whole model uses, give other logits than it does (relative error {best:.1e}). Something between them is not "
        "known here (features that are added inside of the decoder, other masks); export its components one by one"
    )


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Whatever a model raises in here is an InputError that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {error}") from error


def token_types(model: nn.Module, image: Tensor, mark: int = 1) -> dict[str, Tensor]:
    """What a processor says of each token besides its id, where the model asks for it: 1 for an image's tokens, or `mark`."""
    takes = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in takes:
        return {"mm_token_type_ids": image.long() * mark}
    if "token_type_ids" not in takes:
        return {}
    # Of two meanings: which tokens are an image's, or which belong to the answer (none, in a prompt).
    config: Any = model.config
    marks = getattr(PROCESSOR_MAPPING.get(type(config), None), "return_mm_token_type_ids", False)
    return {"token_type_ids": image.long() if marks else torch.zeros_like(image, dtype=torch.int64)}


def _decoder_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the whole model hands to its decoder."""
    seen: dict[str, Any] = {}
    handle = model.get_decoder().register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen


def _positions(given: Tensor | None, prompt: Prompt, count: int) -> Seam:
    """The offsets of an image's tokens in the positions `(N)`, `(1, N)` or `(rows, 1, N)` that the decoder was given.

    Raises InputError where the images have different ones."""
    if given is None:
        return Seam(np.arange(count)[None], count)
    rows = given.reshape(-1, given.shape[-1]).numpy()
    if (rows == rows[0]).all():
        rows = rows[:1]
    elif len(rows) == 4:  # the order of the sequence, then time, height and width
        rows = rows[1:]
    images = len(prompt.texts) - 1
    # Some families count from one, which is the same: positions are compared with one another and with nothing else.
    base = int(rows[0, 0])
    advance = (int(rows[0, -1]) + 1 - prompt.length - base) // images
    found = []
    for turn, start in enumerate(itertools.accumulate(map(len, prompt.texts[:-1]))):
        place = start + turn * count
        found.append(rows[:, place : place + count] - (base + start + turn * advance))
    if any((one != found[0]).any() for one in found):
        raise InputError("the images of the example have different shapes or places, and a bundle is for images of one: give such")
    return Seam(np.ascontiguousarray(found[0], np.int64), advance)


def _joined(
    media: Media, model: nn.Module, encoded: Tensor, prompt: Prompt, seam: Seam, bucket: int, tokens: list[int]
) -> np.ndarray:
    """Logits `(steps, V)` of the components, fed with the `tokens` that the whole model chose."""
    out = media.prefill(model, seam.rule, len(encoded))(encoded.flatten(0, 1)[None], **prompt.feeds(seam, bucket, media.position))
    decode = Decode(model, bucket, len(tokens))
    logits = [out["logits"]]
    key, value = caches(out, len(tokens))
    for step, token in enumerate(tokens[:-1]):
        where = decode_position(seam, prompt.next_position(seam) + step)
        made = decode(torch.tensor([[token]]), where, torch.tensor([prompt.length]), torch.tensor([step]), key, value)
        logits.append(made["logits"])
        for i, (k, v) in enumerate(zip(key, value, strict=True)):
            k[:, :, k.shape[2] - len(tokens) + step] = made[f"key_{i}"][:, :, 0]
            v[:, :, v.shape[2] - len(tokens) + step] = made[f"value_{i}"][:, :, 0]
    return torch.cat(logits).float().numpy()


def decode_position(seam: Seam, position: int) -> Tensor:
    """The position of a new token, as the decode graph takes it."""
    rows = len(seam.offsets)
    return torch.full((1, 1) if rows == 1 else (1, 1 + rows, 1), position)


def caches(out: Mapping[str, Tensor], room: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer as prefill made them, with `room` slots behind."""
    count = sum(name.startswith("key_") for name in out)
    padded = [
        [torch.cat([t, t.new_zeros(*t.shape[:2], room, t.shape[3])], dim=2) for t in (out[f"{kind}_{i}"] for i in range(count))]
        for kind in ("key", "value")
    ]
    return padded[0], padded[1]
