"""The components of an encoder-decoder speech model: what is captured of it, as plain modules with static shapes.

They are found from the model's structure: the decoder's layers say what they read and write by the cache that they are given, and
so what of the encoder's tokens they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from edgewise.exporter.pipeline.decoder import GivenCache

Tensors = Sequence[Tensor]


class AudioEncoder(nn.Module):
    """`input_features (B, bins, frames)` to `cross_key_i` and `cross_value_i (B, heads, N, D)` for each decoder layer i: what its
    cross-attention makes of the encoder's N tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = model.get_encoder(), model.get_decoder()

    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(input_features).last_hidden_state
        # What the decoder makes of a token of text is of no use here, and is not captured.
        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.int64)
        cross = GivenCache()
        _decoded(self.decoder, ids, hidden, GivenCache(), cross)
        return {f"cross_{name}": value for name, value in cross.named().items()}


class Prefill(nn.Module):
    """`input_ids (B, P)` at `position (B, P)`, which is -1 where there is no token, to `logits (B, V)` of the last and every
    layer's `key_i` and `value_i (B, heads, P, D)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()

    def forward(
        self, input_ids: Tensor, position: Tensor, cross_key: Tensors, cross_value: Tensors
    ) -> dict[str, Tensor]:
        # What fills the bucket up is seen by none and sees itself: a row must not be empty.
        key, query = position[:, None, None, :], position[:, None, :, None]
        seen = (key <= query) & ((key >= 0) | (query < 0))
        own = GivenCache()
        cross = _Cross(cross_key, cross_value)
        hidden = _decoded(
            self.decoder, input_ids, None, own, cross, position_ids=position.clamp_min(0), attention_mask=seen
        )
        return {"logits": self.head(hidden[:, -1]), **own.named()}


class Decode(nn.Module):
    """One token `input_ids (B, 1)` at `position (B, 1)`, behind `length (B)` real tokens of the prompt and `step (1)` new ones,
    with the caches `past_key[i]`, `past_value[i] (B, heads, slots, D)`, to `logits (B, V)` and the token's own `key_i`, `value_i`.

    `prompt`: slots of the prompt's bucket, which come first in every cache.
    """

    def __init__(self, model: Any, prompt: int) -> None:
        super().__init__()
        self.decoder, self.head, self.prompt = model.get_decoder(), model.get_output_embeddings(), prompt

    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        length: Tensor,
        step: Tensor,
        cross_key: Tensors,
        cross_value: Tensors,
        past_key: Tensors,
        past_value: Tensors,
    ) -> dict[str, Tensor]:
        slot = torch.arange(past_key[0].shape[2])[None]
        real = (slot >= self.prompt - length[:, None]) & (slot < self.prompt + step[:, None])
        seen = torch.cat([real, torch.ones(real.shape[0], 1, dtype=torch.bool)], dim=1)[:, None, None]
        own = GivenCache(list(zip(past_key, past_value, strict=True)))
        cross = _Cross(cross_key, cross_value)
        hidden = _decoded(self.decoder, input_ids, None, own, cross, position_ids=position, attention_mask=seen)
        return {"logits": self.head(hidden[:, -1]), **own.named()}


class _Cross(GivenCache):
    """The keys and values of the encoder's tokens, which every layer reads as they are."""

    def __init__(self, keys: Tensors, values: Tensors) -> None:
        super().__init__()
        self.counts = [int(key.shape[2]) for key in keys]
        for key, value in zip(keys, values, strict=True):
            layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.keys, layer.values, layer.is_initialized = key, value, True
            self.layers.append(layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens there are: a layer that finds some makes none."""
        return self.counts[layer_idx]


def _decoded(
    decoder: Any, ids: Tensor, hidden: Tensor | None, own: GivenCache, cross: GivenCache, **kwargs: Any
) -> Tensor:
    """The decoder's hidden states. `hidden` None: what is made of the encoder's tokens is in `cross` already."""
    if hidden is None:
        hidden = ids.new_zeros(())  # only asked whether it is there
    made = decoder(
        input_ids=ids,
        encoder_hidden_states=hidden,
        past_key_values=EncoderDecoderCache(own, cross),
        use_cache=True,
        **kwargs,
    )
    return made.last_hidden_state  # type: ignore[no-any-return]
