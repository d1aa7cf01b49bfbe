"""The components of a vision-language model: what is captured of it, as plain modules with static shapes.

Visual tokens come first in the graphs, then the prompt's bucket, whose real tokens are its last ones; `position` says where each
token is in the sequence, and so who sees whom. The last token of a prompt is the last of the graph for every prompt, and the
visual tokens are the same span: that is what compression inside of the decoder needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgewise.errors import InputError
from edgewise.exporter.pipeline.decoder import GivenCache, explicit_attention
from edgewise.exporter.pipeline.patches import patched
from edgewise.exporter.pipeline.settle import Noted, Settle, is_traced

Rule = Literal["causal", "media", "prompt"]
"""Who sees whom besides what a token sees before it: nobody more, media tokens one another, or all of the prompt one another."""

RULES: tuple[Rule, ...] = ("causal", "media", "prompt")


class Encoder(nn.Module):
    """A medium, of which there are so many `items`, to its tokens `NAME (items, K, C)`, in the space of the decoder. `settled` are
    further arguments of the model, which follow from the shape of the input.

    `places (rows, K)`: where an item's tokens are from the first of them, where that is no number of their own order. They come out
    too, as `NAME_position (items, rows, K)`: of the tokens that compression leaves, those of their own, or of what represents them.
    """

    places: Tensor | None

    def __init__(
        self, model: nn.Module, settled: Mapping[str, Any] | None = None, places: Tensor | None = None, items: int = 1
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.settled, self.items = dict(settled or {}), items
        self._noted: Noted = {}
        self.register_buffer("places", None if places is None else places.t()[None].contiguous())


class VisionEncoder(Encoder):
    """`pixel_values` of images to `visual`: tower and projector."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self._encoded(features_of(self.model, "image"), pixel_values=pixel_values)

    def _encoded(self, encode: Any, **given: Tensor) -> dict[str, Tensor]:
        with Settle(self._noted, tracing=any(map(is_traced, given.values()))):
            given = {name: patched(self.model, value) for name, value in given.items()}
            features = encode(**given, **self.settled, return_dict=True).pooler_output
        if features is None:
            raise InputError(
                f"{type(self.model).__name__} gives no tokens in the space of its decoder: export its components one by one"
            )
        if isinstance(features, (list, tuple)):
            alike = all(one.shape == features[0].shape for one in features)
            features = torch.stack(list(features)) if alike else torch.cat([one.reshape(-1, one.shape[-1]) for one in features])
        count = features[..., 0].numel()
        if count % self.items:
            raise InputError(f"the example becomes {count} visual tokens, which are not those of {self.items} images of one shape")
        return placed("visual", features.reshape(self.items, -1, features.shape[-1]), self.places)


class VideoEncoder(VisionEncoder):
    """The same for the frames of a video, `pixel_values_videos`, all of whose tokens are one span."""

    def forward(self, pixel_values_videos: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return self._encoded(features_of(self.model, "video"), pixel_values_videos=pixel_values_videos)


def features_of(model: Any, medium: Literal["image", "video"]) -> Any:
    """What makes the tokens of a medium: a method of a model, or of the one without a head inside of it. None: there is none."""
    found = (getattr(one, f"get_{medium}_features", None) for one in (model, getattr(model, "base_model", None)))
    return next((one for one in found if callable(one)), None)


def placed(name: str, tokens: Tensor, places: Tensor | None) -> dict[str, Tensor]:
    """Tokens `(B, K, C)` as `name`, and their `places (1, K, rows)`, where they have such, as `name_position (B, rows, K)`."""
    if places is None:
        return {name: tokens}
    # Places meet the tokens that they are of: what chooses among the tokens has to choose among these.
    places = places.masked_fill(tokens[..., :1].isnan(), -1)
    return {name: tokens, f"{name}_position": places.transpose(1, 2)}


class Prefill(nn.Module):
    """`visual (1, K, C)`, one of the `items` behind the other, at `visual_position (1, K)`, and the prompt's `input_ids (1, P)` at
    `position (1, P)`, which is -1 where there is no token, to `logits (1, V)` of the last and every layer's `key_i`, `value_i`.

    Positions may have several rows `(1, 1 + rows, N)`: the first is the order of the sequence then, and the others say where a
    token is in time, height and width.
    """

    def __init__(self, model: nn.Module, rule: Rule = "causal", items: int = 1) -> None:
        super().__init__()
        self.model: Any = model
        self.rule, self.items = rule, items

    def forward(self, visual: Tensor, visual_position: Tensor, input_ids: Tensor, position: Tensor) -> dict[str, Tensor]:
        embeds = torch.cat([visual, self.model.get_input_embeddings()(input_ids)], dim=1)
        where = torch.cat([visual_position, position], dim=-1)
        cache = GivenCache()
        mask = self._mask(where, visual.shape[1])
        return _logits(self.model, embeds, mask, where, cache)

    def _mask(self, where: Tensor, visual: int) -> Tensor:
        """Who sees whom `(1, 1, N, N)`. What fills the bucket up is seen by none and sees all: a row must not be empty."""
        order = where if where.ndim == 2 else where[:, 0]
        real = order >= 0
        row = torch.where(real, order, order.amax(dim=-1, keepdim=True))
        mask = row[:, :, None] >= order[:, None, :]
        if self.rule == "prompt":
            mask = mask | torch.ones_like(mask)
        elif self.rule == "media":
            item = torch.arange(order.shape[1]) // (visual // self.items)
            mask = mask | ((item[:, None] == item[None, :]) & (item < self.items))
        return (mask & real[:, None, :])[:, None]


class AudioPrefill(Prefill):
    """The same with the tokens of a recording, `audio (1, K, C)` at `audio_position (1, K)`."""

    def forward(self, audio: Tensor, audio_position: Tensor, input_ids: Tensor, position: Tensor) -> dict[str, Tensor]:
        return super().forward(audio, audio_position, input_ids, position)


class Decode(nn.Module):
    """One token `input_ids (1, 1)` at `position (1, 1)` (or `(1, 1 + rows, 1)`, see `Prefill`), behind `length (1)` real tokens of
    the prompt and `step (1)` new ones, with the caches `past_key[i]`, `past_value[i] (1, heads, slots, D)`, to `logits (1, V)` and
    the token's own `key_i`, `value_i`.

    `prompt`, `new`: slots of the prompt's bucket and for new tokens, the last ones of every cache.
    """

    def __init__(self, model: nn.Module, prompt: int, new: int) -> None:
        super().__init__()
        self.model: Any = model
        self.prompt, self.new = prompt, new

    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        length: Tensor,
        step: Tensor,
        past_key: Sequence[Tensor],
        past_value: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        most = max(key.shape[2] for key in past_key)
        slot = torch.arange(self.prompt + self.new)
        real = (slot >= self.prompt - length) & (slot < self.prompt + step)
        mask = torch.cat([torch.ones(most - len(slot), dtype=torch.bool), real, torch.ones(1, dtype=torch.bool)])
        cache = GivenCache(list(zip(past_key, past_value, strict=True)))
        embeds = self.model.get_input_embeddings()(input_ids)
        return _logits(self.model, embeds, mask[None, None, None, :], position, cache)


def _logits(model: Any, embeds: Tensor, mask: Tensor, position: Tensor, cache: GivenCache) -> dict[str, Tensor]:
    """The decoder and its head on embedded tokens: logits of the last, and what was made for the cache."""
    decoder = model.get_decoder()
    types = set(getattr(decoder.config, "layer_types", None) or ())
    with explicit_attention(decoder), _last_alone(model):
        out = model(
            inputs_embeds=embeds,
            attention_mask={kind: mask for kind in sorted(types)} if len(types) > 1 else mask,
            position_ids=position.clamp(min=0) if position.ndim == 2 else position.clamp(min=0).transpose(0, 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return {"logits": out.logits[:, -1], **cache.named()}


@contextmanager
def _last_alone(model: Any) -> Iterator[None]:
    """While this holds, a model that cannot be told `logits_to_keep` has its head see the last token alone."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        yield
        return
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
