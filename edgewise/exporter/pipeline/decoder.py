"""What decoders of any family need to run with explicit caches: a cache that is a plain list of tensors, and an attention that
takes caches of different lengths in different layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from edgewise.errors import InputError

_ATTENTION = "edgewise"


class GivenCache(Cache):
    """Keys and values by layer: those of the `past`, and in `made` those that the decoder made of the tokens of this run."""

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__(layers=[])
        self.past = past
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values `(B, heads, N, D)` that the layer attends to: the past, then the new."""
        self.made[layer_idx] = (key_states, value_states)
        if self.past is None:
            return key_states, value_states
        key, value = self.past[layer_idx]
        return torch.cat([key, key_states], dim=2), torch.cat([value, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions and masks are given, so that nothing is derived from it."""
        return 0

    def named(self) -> dict[str, Tensor]:
        """What was made, as `key_i` and `value_i`."""
        return {f"{kind}_{i}": pair[n] for i, pair in sorted(self.made.items()) for n, kind in enumerate(("key", "value"))}


@contextmanager
def explicit_attention(decoder: nn.Module) -> Iterator[None]:
    """While this holds, the decoder's layers attend with `_attend`."""
    AttentionInterface.register(_ATTENTION, _attend)
    found: list[Any] = [getattr(module, "config", None) for module in decoder.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {i: config._attn_implementation for i, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        for i, config in configs.items():
            config._attn_implementation = before[i]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention `(B, heads, Q, D)` with a mask for the longest of all caches: what a layer lacks is missing at its front."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (
            x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]) for x in (key, value)
        )
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
        attention_mask = attention_mask[..., -key.shape[2] :]
    if softcap is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = torch.tanh(logits / softcap) * softcap
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
        out = torch.softmax(logits, dim=-1) @ value
    return out.transpose(1, 2).contiguous(), None


def check_windows(config: Any, tokens: int) -> None:
    """Refuse a decoder in which a layer sees fewer tokens at once than a text may have (`tokens`, those of media included): the
    masks here show every layer all of them."""
    kinds = getattr(config, "layer_types", None)
    sliding, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    windows = [sliding] if sliding and (kinds is None or "sliding_attention" in kinds) else []
    windows += [chunk] if chunk and "chunked_attention" in (kinds or ()) else []
    if windows and min(windows) < tokens:
        raise InputError(
            f"layers of the decoder attend to {min(windows)} tokens at a time, and image, prompt and new tokens may come to "
            f"{tokens}: ask for less with --prompt-tokens and --new-tokens"
        )
