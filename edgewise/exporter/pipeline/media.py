"""The kinds of media that a decoder is given tokens of, and the encoder of each: its features, in the space of the decoder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_outputs import BaseModelOutputWithPast

from edgewise.errors import InputError
from edgewise.exporter.capture import evaluating, quiet
from edgewise.exporter.pipeline.patches import with_grid
from edgewise.exporter.pipeline.settle import Settle, is_traced
from edgewise.exporter.pipeline.vision_language import (
    AudioPrefill,
    Encoder,
    Prefill,
    VideoEncoder,
    VisionEncoder,
    placed,
)
from edgewise.runtime.mel import DEFAULTS, made_here


class AudioEncoder(Encoder):
    """`input_features` of recordings to `audio`: what the model puts into the embeddings of a text in place of placeholders.
    `settled`: the mask of real frames.
    """

    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        with Settle(self._noted, tracing=is_traced(input_features)):
            # Two, as a single one means to some models that its tokens are still to be counted.
            ids = torch.full((1, 2), AUDIO.placeholder(self.model))  # type: ignore[arg-type]
            with _unchecked(), _passed_by(self.model.get_decoder()), _Scattered() as found:
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids), input_features=input_features, **self.settled)
        if found.source is None:
            name = type(self.model).__name__
            raise InputError(f"{name} does not put features of audio in place of placeholders (masked_scatter)")
        width = self.model.get_input_embeddings().weight.shape[-1]
        return placed("audio", found.source.reshape(self.items, -1, width), self.places)


def frame_mask(model: nn.Module) -> str | None:
    """The argument of a model that says which frames of its features are real; None if it takes none."""
    names = [name for name in inspect.signature(model.forward).parameters if "feature" in name and name.endswith("mask")]
    return names[0] if names else None


def _with_mask(model: nn.Module, features: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """With a mask of frames where the model wants one: a shorter one is filled up with frames that are not real, and without one
    all are real."""
    name = frame_mask(model)
    if name is None or (name not in given and _encodes(model, features, given)):
        return given
    frames = features.shape[-1]
    mask = given.get(name, torch.ones(features.shape[0], frames, dtype=torch.int64))
    if mask.ndim != 2 or mask.shape[0] != len(features) or mask.shape[1] > frames or not mask.any():
        raise InputError(f"{name} has shape {list(mask.shape)}: give ones for the real frames, up to {[len(features), frames]}")
    return {**given, name: nn.functional.pad(mask, (0, frames - mask.shape[1]))}


def _encodes(model: nn.Module, features: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether a model does without the mask that it could be given."""
    try:
        with evaluating(model), quiet():
            AudioEncoder(model, given)(features)
    except Exception:  # what else is wrong with the features shows when all frames are said to be real
        return False
    return True


def _whisper(model: nn.Module, features: Tensor) -> dict[str, Any]:
    """Whisper's constants, where the configuration says that the features have its layout, `(items, bins, frames)`."""
    config: Any = model.config
    parts = (getattr(config, name, None) for name in ("audio_config", "encoder_config"))
    known = [getattr(part, "num_mel_bins", None) for part in (config, *parts)]
    return {**DEFAULTS, "feature_size": features.shape[-2]} if features.shape[-2] in known else {}


def _frames(
    model: nn.Module, features: Tensor, settled: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> dict[str, Any]:
    """How many frames are real, where it is known which axis counts these."""
    if not made_here(features.shape, preprocessing):
        return {}
    mask = settled.get(frame_mask(model) or "")
    return {"frames": features.shape[-1] if mask is None else int(mask.sum(-1).max())}


class _Scattered(TorchFunctionMode):
    """Finds what a model scatters into the embeddings of its text, and leaves these as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.source: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.masked_scatter, Tensor.masked_scatter_, torch.masked_scatter):
            self.source = args[2] if len(args) > 2 else kwargs["source"]
            return args[0]
        return func(*args, **kwargs)


@contextmanager
def _passed_by(decoder: nn.Module) -> Iterator[None]:
    """While this holds, a decoder gives back what it is given."""
    decoder.forward = lambda *, inputs_embeds, **_: BaseModelOutputWithPast(last_hidden_state=inputs_embeds)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del decoder.forward


@contextmanager
def _unchecked() -> Iterator[None]:
    """While this holds, models do not compare the number of placeholders with that of features."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass(frozen=True)
class Media:
    """One kind. `argument` is the model's and the encoder's input, `tokens` the name of what the encoder makes of it, `noun` how
    messages call it and `chat` how chat templates do; `ids` are the names under which a configuration has the placeholder."""

    kind: Literal["vision-language", "audio-language"]
    role: str
    argument: str
    tokens: str
    noun: str
    chat: str
    ids: tuple[str, ...]
    encoder: Callable[[nn.Module, Mapping[str, Any] | None, Tensor | None, int], nn.Module]
    prefill: type[Prefill]
    settled: Callable[[nn.Module, Tensor, dict[str, Any]], dict[str, Any]]
    """Of a model, an example and what was given with it: all that the model must be told of the example."""
    settings: Callable[[nn.Module, Tensor, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    """What the runtime must know of the example, told too of the processor: `settings` of the pipeline."""
    constants: Callable[[nn.Module, Tensor], dict[str, Any]]
    """Of a model and an example, the constants of a processor, where a model comes without."""
    mark: int = 1
    """What a processor says of its tokens, where a model asks which are of media, and of which."""

    @property
    def order(self) -> tuple[str, str, str]:
        """The roles of the components, in the order in which they run."""
        return self.role, "prefill", "decode"

    @property
    def position(self) -> str:
        """The input of prefill that says where the tokens are."""
        return f"{self.tokens}_position"

    def placeholder(self, model: nn.Module) -> int | None:
        """The id of the token that stands for its tokens in a text."""
        config: Any = model.config
        found = (getattr(config, name, None) for name in self.ids)
        return next((int(one) for one in found if one is not None), None)


IMAGE = Media(
    kind="vision-language",
    role="vision_encoder",
    argument="pixel_values",
    tokens="visual",
    noun="image",
    chat="image",
    ids=("image_token_id", "image_token_index"),
    encoder=VisionEncoder,
    prefill=Prefill,
    settled=lambda model, example, given: with_grid(model, example, given, "image_grid_thw"),
    settings=lambda model, example, settled, preprocessing: {},
    constants=lambda model, example: {},
)
VIDEO = replace(
    IMAGE,
    argument="pixel_values_videos",
    noun="video",
    chat="video",
    ids=("video_token_id", "video_token_index"),
    encoder=VideoEncoder,
    settled=lambda model, example, given: with_grid(model, example, given, "video_grid_thw"),
    mark=2,
)
AUDIO = Media(
    kind="audio-language",
    role="audio_encoder",
    argument="input_features",
    tokens="audio",
    noun="recording",
    chat="audio",
    ids=("audio_token_id", "audio_token_index"),
    encoder=AudioEncoder,
    prefill=AudioPrefill,
    settled=_with_mask,
    settings=_frames,
    constants=_whisper,
)
