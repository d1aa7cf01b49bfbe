"""Models that answer about media: an image, or a recording, and a prompt to text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgewise.bundle import Bundle
from edgewise.errors import InputError
from edgewise.runtime.generate import Generation
from edgewise.runtime.pipeline import GenerativePipeline, OnText
from edgewise.runtime.places import items_axis, placed
from edgewise.runtime.sampling import Sampling


class MediaLanguage(GenerativePipeline):
    """An encoder of media, `prefill` and `decode` as one model: what all kinds have in common."""

    noun: str
    """How messages call the media."""
    tokens: ClassVar[str]
    """How the graphs call what the encoder makes of it."""

    @staticmethod
    def check(bundle: Bundle) -> None:
        """Raise InputError if the bundle holds no pipeline, or one with wrong settings."""
        GenerativePipeline.check(bundle)
        assert bundle.manifest.pipeline is not None
        settings = bundle.manifest.pipeline.settings
        if settings.get("processor_tokens") is not None:
            check_count(bundle, "processor_tokens", settings["processor_tokens"])

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
        texts = self._split(self._ids(prompt, input_ids))
        length = sum(map(len, texts))
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
            {self.tokens: encoded[self.tokens].reshape(1, -1, encoded[self.tokens].shape[-1]), **self._placed(texts, encoded)},
            length=length,
            position=length + about.media_items * about.media_advance,
            sampling=sampling or Sampling(),
            most=about.new_tokens if max_new_tokens is None else max_new_tokens,
            into=into,
        )
        return self._collect(made, into, on_text)

    def _placed(self, texts: Sequence[Sequence[int]], encoded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The prompt, and where its tokens are. Positions of media are those of `encoded` where the encoder gives them."""
        about, name = self.description, f"{self.tokens}_position"
        places = encoded.get(name)
        if places is None:
            rows = np.array(about.media_positions or [range(about.media_tokens)], np.int64)
            places = np.stack([rows] * about.media_items)
        return placed(texts, places, about.media_advance, about.prompt_tokens, name)

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

    def _split(self, ids: list[int]) -> list[list[int]]:
        """The ids before, between and behind the media, with those that the model wants around each."""
        about = self.description
        mark = about.placeholder or f"token {about.placeholder_id}"
        places = [i for i, token in enumerate(ids) if token == about.placeholder_id]
        if not places:
            raise InputError(f"the prompt has no {self.noun} placeholder: write {mark} where the {self.noun} belongs")
        # A processor writes as many for an image or a recording as it becomes tokens.
        width = about.settings.get("processor_tokens") or 1
        expanded = width > 1 and len(places) == width * about.media_items
        groups = [places[i : i + width] for i in range(0, len(places), width)] if expanded else [[i] for i in places]
        if len(groups) != about.media_items or any(group[-1] - group[0] >= len(group) for group in groups):
            wanted = f"one {self.noun} is" if about.media_items == 1 else f"{about.media_items} {self.noun}s are"
            raise InputError(
                f"the prompt has {len(places)} {self.noun} placeholders ({mark}), and {wanted} given: write one for each"
            )
        ends = [-1, *(group[-1] for group in groups)]
        texts = [ids[end + 1 : group[0]] for end, group in zip(ends, groups, strict=False)] + [ids[ends[-1] + 1 :]]
        if not expanded:
            for i in range(len(groups)):
                texts[i], texts[i + 1] = [*texts[i], *about.before], [*about.after, *texts[i + 1]]
        if not texts[-1]:
            raise InputError(
                f"the prompt ends with its {self.noun}, and the text behind it is what is answered: put the question there"
            )
        return texts


class VisionLanguage(MediaLanguage):
    """`vision_encoder`, `prefill` and `decode` as one model."""

    kind = "vision-language"
    noun, tokens = "image", "visual"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._media_input.name == "pixel_values_videos":
            self.noun = "video"

    def generate(
        self,
        prompt: str | None = None,
        image: str | os.PathLike[str] | np.ndarray | Sequence[Any] | None = None,
        *,
        images: Sequence[Any] | np.ndarray | None = None,
        video: str | os.PathLike[str] | np.ndarray | Sequence[np.ndarray] | None = None,
        input_ids: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
    ) -> Generation:
        """Generate text for an image, for several, or for a video, and a prompt.

        Args:
            prompt: the question; the model's template goes around it, unless it holds the images' placeholders itself.
            image: a file, a picture `(H, W, 3)` in uint8, or the array that the encoder takes.
            images: so many of these as the bundle was exported for (`--images`), in the order of the placeholders; pictures may be
                one array `(K, H, W, 3)` in uint8.
            video: for a bundle that takes a video: a file, a folder of frames, frames `(T, H, W, 3)` or a list of `(H, W, 3)` in
                uint8, or the array that the encoder takes. So many frames as the bundle takes are chosen, at equal distances.
            input_ids: the prompt as token ids instead, with one placeholder for each image or the video.
            max_new_tokens: by default as many as the bundle has room for.
            on_text: called with each piece of the text as soon as it is known.

        Raises InputError for a prompt with more or fewer placeholders than images, or longer than the bucket, and for wrong images.
        """
        given = [one for one in (image, images, video) if one is not None]
        if len(given) > 1:
            raise InputError("give image or images, and not both" if video is None else "give images or a video, and not both")
        wanted = self.noun == "video"
        if given and wanted != (video is not None):
            raise InputError(f"this bundle takes {'a' if wanted else 'an'} {self.noun}: give --{self.noun} FILE ({self.noun}=...)")
        media = given[0] if given else None
        return self._answer(
            lambda into: {self._media_input.name: self._clip(media) if wanted else self._pixels(media)},
            prompt,
            input_ids,
            max_new_tokens,
            sampling,
            on_text,
        )

    @property
    def _media_input(self) -> Any:
        return self.sessions["vision_encoder"].inputs[0]

    def _pixels(self, given: Any) -> np.ndarray:
        """All images as the encoder takes them."""
        info, items = self._media_input, self.description.media_items
        if given is None:
            raise InputError("no image: this model answers questions about one; give --image FILE (image=...)")
        if not isinstance(given, (list, tuple)):
            if _are_numbers(given) and given.shape == info.shape:
                return given.astype(info.dtype)  # type: ignore[no-any-return]
            given = list(given) if _are_pictures(given, 4) else [given]
        if len(given) != items:
            count = "1 image is" if len(given) == 1 else f"{len(given)} images are"
            raise InputError(f"{count} given, and this bundle takes {items}: give as many, one for each placeholder")
        axis, shape = items_axis(info.shape, items), list(info.shape)
        shape[axis] //= items
        return np.concatenate([self._one(image, tuple(shape)) for image in given], axis).astype(info.dtype)

    def _one(self, image: Any, shape: tuple[int, ...]) -> np.ndarray:
        """One image as an array of this shape."""
        picture = _are_pictures(image, 3)
        if not picture and not isinstance(image, (str, os.PathLike)):
            if not _are_numbers(image):
                raise InputError(f"an image is given as {_kind(image)}: give a file, or a picture (H, W, 3) in uint8")
            if image.shape != shape:
                raise InputError(
                    f"the image has shape {image.shape}, and this bundle takes {shape}; or give a file, or a picture (H, W, 3) in "
                    "uint8"
                )
            return image  # type: ignore[no-any-return]
        from edgewise.runtime.images import load_pixels

        return load_pixels(image if picture else Path(image), shape, self.bundle.manifest.preprocessing)

    def _clip(self, given: Any) -> np.ndarray:
        """A video as the encoder takes it."""
        info = self._media_input
        if given is None:
            raise InputError("no video: this model answers questions about one; give --video FILE (video=...)")
        if isinstance(given, (list, tuple)) and given and all(_are_pictures(one, 3) for one in given):
            if len({one.shape for one in given}) > 1:
                raise InputError("the frames of the video differ in size: give frames of one size")
            given = np.stack(given)
        frames = _are_pictures(given, 4)
        if not frames and not isinstance(given, (str, os.PathLike)):
            if not _are_numbers(given):
                raise InputError(
                    f"the video is given as {_kind(given)}: give a file, a folder of frames, or frames (T, H, W, 3) in uint8"
                )
            if given.shape != info.shape:
                raise InputError(
                    f"the video has shape {given.shape}, and this bundle takes {info.shape}; or give a file, or frames "
                    "(T, H, W, 3) in uint8"
                )
            return given.astype(info.dtype)  # type: ignore[no-any-return]
        from edgewise.runtime.video import load_clip

        return load_clip(given if frames else Path(given), info.shape, self.bundle.manifest.preprocessing).astype(info.dtype)


def check_count(bundle: Bundle, name: str, value: Any, most: int | None = None) -> None:
    """Raise InputError for a setting of the pipeline that is no whole number from 1 to `most`."""
    if type(value) is not int or value < 1 or (most is not None and value > most):
        upper = "on" if most is None else f"to {most}"
        raise InputError(
            f"{bundle.path}: {name} of the pipeline is {value!r}, and a number from 1 {upper} is needed: export the model again"
        )


def _are_pictures(given: Any, rank: int) -> bool:
    """Whether this is a picture `(H, W, 3)`, or of rank 4 a stack of these, in uint8."""
    known = isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim == rank
    return known and given.shape[-1] == 3 and all(given.shape[-3:-1])


def _are_numbers(given: Any) -> bool:
    return isinstance(given, np.ndarray) and given.dtype.kind in "biuf"


def _kind(given: Any) -> str:
    """What was given, for a message."""
    if isinstance(given, np.ndarray):
        return f"an array of {given.dtype}"
    if isinstance(given, (list, tuple)):
        return " of ".join([type(given).__name__, ", ".join(sorted({type(one).__name__ for one in given})) or "nothing"])
    return type(given).__name__
