"""Models that answer about media: an image, or a recording, and a prompt to text."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgewise.errors import InputError
from edgewise.runtime.generate import Generation
from edgewise.runtime.pipeline import GenerativePipeline, OnText
from edgewise.runtime.sampling import Sampling


class MediaLanguage(GenerativePipeline):
    """An encoder of media, `prefill` and `decode` as one model: what all kinds have in common."""

    noun: ClassVar[str]
    """How messages call the media."""
    tokens: ClassVar[str]
    """How the graphs call what the encoder makes of it."""

    def _answer(
        self,
        feeds: Callable[[Generation], dict[str, np.ndarray]],
        prompt: str | None,
        input_ids: Sequence[int] | None,
        max_new_tokens: int | None,
        sampling: Sampling | None,
        on_text: OnText | None,
    ) -> Generation:
        """Generate text for a prompt and what `feeds` gives to the encoder."""
        about = self.description
        before, after = self._split(self._ids(prompt, input_ids))
        length = len(before) + len(after)
        if length > about.prompt_tokens:
            raise InputError(
                f"the prompt has {length} tokens besides the {self.noun}, and this bundle takes {about.prompt_tokens}: shorten it, "
                "or export with a larger --prompt-tokens"
            )
        into = Generation()
        given = feeds(into)
        start, role = time.perf_counter(), about.order[0]
        encoded = self.sessions[role].run(given)
        into.timed(role, start)
        made = self.decoder.tokens(
            {self.tokens: encoded[self.tokens], **self._placed(before, after, encoded)},
            length=length,
            position=length + about.media_advance,
            sampling=sampling or Sampling(),
            most=about.new_tokens if max_new_tokens is None else max_new_tokens,
            into=into,
        )
        return self._collect(made, into, on_text)

    def _placed(self, before: list[int], after: list[int], encoded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The prompt in its bucket, behind the fill, and where every token is in the sequence: -1 for the fill. Positions of media
        are those of `encoded` where the encoder gives them."""
        name = f"{self.tokens}_position"
        about, start = self.description, len(before)
        length = start + len(after)
        ids = np.zeros((1, about.prompt_tokens), np.int64)
        ids[0, about.prompt_tokens - length :] = before + after

        def position(behind: int) -> np.ndarray:
            made = np.full((1, about.prompt_tokens), -1, np.int64)
            made[0, about.prompt_tokens - length :] = [*range(start), *range(start + behind, length + behind)]
            return made

        places = encoded.get(name)
        order = start + np.arange(about.media_tokens, dtype=np.int64)[None]
        if places is None and not about.media_positions:
            return {name: order, "input_ids": ids, "position": position(about.media_advance)}
        rows = (np.array(about.media_positions, np.int64) if places is None else places[0].astype(np.int64)) + start
        text = np.repeat(position(about.media_advance), len(rows), axis=0)
        if len(rows) == 1:
            return {name: rows, "input_ids": ids, "position": text}
        return {
            name: np.concatenate([order, rows])[None],
            "input_ids": ids,
            "position": np.concatenate([position(about.media_tokens), text])[None],
        }

    def _ids(self, prompt: str | None, input_ids: Sequence[int] | None) -> list[int]:
        about = self.description
        if (prompt is None) == (input_ids is None):
            raise InputError("give a prompt, or input_ids, and not both")
        if input_ids is not None:
            return [int(token) for token in input_ids]
        assert prompt is not None
        whole = prompt if about.placeholder and about.placeholder in prompt else about.template.replace("{prompt}", prompt)
        special = whole == prompt or bool(about.settings.get("template_special", True))
        return self.tokenizer.encode(whole, special=special)

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The ids before and behind the media, with those that the model wants around it."""
        about = self.description
        mark = about.placeholder or f"token {about.placeholder_id}"
        places = [i for i, token in enumerate(ids) if token == about.placeholder_id]
        if not places:
            raise InputError(f"the prompt has no {self.noun} placeholder: write {mark} where the {self.noun} belongs")
        runs = 1 + sum(after - before > 1 for before, after in itertools.pairwise(places))
        if runs > 1 or len(places) not in (1, about.settings.get("processor_tokens")):
            raise InputError(
                f"the prompt has {len(places)} {self.noun} placeholders ({mark}), and one {self.noun} is given: write one"
            )
        expanded = len(places) > 1
        before, after = ids[: places[0]], ids[places[-1] + 1 :]
        if not expanded:
            before, after = [*before, *about.before], [*about.after, *after]
        if not after:
            raise InputError(
                f"the prompt ends with its {self.noun}, and the text behind it is what is answered: put the question there"
            )
        return before, after


class VisionLanguage(MediaLanguage):
    """`vision_encoder`, `prefill` and `decode` as one model."""

    kind = "vision-language"
    noun, tokens = "image", "visual"

    def generate(
        self,
        prompt: str | None = None,
        image: str | os.PathLike[str] | np.ndarray | Sequence[Any] | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
    ) -> Generation:
        """Generate text for an image and a prompt.

        Args:
            prompt: the question; the model's template goes around it, unless it holds the image's placeholder itself.
            image: a file, a picture `(H, W, 3)` in uint8, or the array that the encoder takes.
            input_ids: the prompt as token ids instead, with one placeholder.
            max_new_tokens: by default as many as the bundle has room for.
            on_text: called with each piece of the text as soon as it is known.

        Raises InputError for a prompt without a placeholder, with several, or longer than the bucket, and for a wrong image.
        """
        return self._answer(
            lambda into: {self._image_input.name: self._pixels(image)}, prompt, input_ids, max_new_tokens, sampling, on_text
        )

    @property
    def _image_input(self) -> Any:
        return self.sessions["vision_encoder"].inputs[0]

    def _pixels(self, image: Any) -> np.ndarray:
        info = self._image_input
        if image is None:
            raise InputError("no image: this model answers questions about one; give --image FILE (image=...)")
        if isinstance(image, (list, tuple)):
            if len(image) != 1:
                raise InputError(f"{len(image)} images are given, and the prompt has one placeholder: give one image")
            image = image[0]
        picture = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        if isinstance(image, np.ndarray) and not picture:
            if image.shape != info.shape:
                raise InputError(
                    f"the image has shape {image.shape}, and this bundle takes {info.shape}; or give a file, or a picture "
                    "(H, W, 3) in uint8"
                )
            return image.astype(info.dtype)
        from edgewise.runtime.images import load_pixels

        return load_pixels(image if picture else Path(image), info.shape, self.bundle.manifest.preprocessing).astype(info.dtype)
