"""The pipeline of a bundle: how its components make one generative model.

Conventions that every exporter of a pipeline keeps, and the runtime reads:

- `prefill` gives `logits (1, vocabulary)` of the last real token, and for every decoder layer i `key_i` and `value_i`
  `(1, heads, tokens, size)`: tokens that came from media first, in the order in which the encoder gave them, then the
  prompt's bucket, whose real tokens are the last ones. Layers may have kept different numbers of media tokens.
- `decode` takes `input_ids (1, 1)`, `position`, `length (1)` (real tokens of the prompt), `step (1)` (new tokens that are in
  the caches), and `past_key_i`, `past_value_i` with `slots` tokens: those of prefill, then room for new ones. It gives `logits` and
  the new token's own `key_i`, `value_i` `(1, heads, 1, size)`, which the runtime writes to slot `tokens + step`. An artifact whose
  `states` name the caches is given them once, behind prefill, and writes to that slot itself.
- What only the encoder makes (`cross_key_i`, `cross_value_i`) is handed to `decode` under its name, unchanged.

Order in a sequence is what `position` says, never the place in a graph: a token sees those whose position is not larger.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgewise.schema import Strict

Count = Annotated[int, Field(ge=0, lt=2**63)]
Some = Annotated[int, Field(ge=1, lt=2**63)]


class CacheLayer(Strict):
    """The cache of one decoder layer: tokens that prefill leaves there (`media` of them from media), slots in all (room for
    new tokens included), and bytes of keys and values together."""

    media: Count
    tokens: Some
    slots: Some
    bytes: Count


class Stage(Strict):
    """What compression makes of one component: media tokens that are left behind it (for `decode`: that its shortest cache holds),
    FLOPs of a run, and bytes of the caches that it writes or reads (those of cross-attention too); `_before`: of the model with all
    tokens."""

    role: str
    tokens_before: Count
    tokens: Count
    flops_before: Count
    flops: Count
    cache_bytes_before: Count = 0
    cache_bytes: Count = 0


class Pipeline(Strict):
    """How components make one generative model.

    - `order`: roles in the order in which they run. `prompt_tokens`: the prompt's bucket. `new_tokens`: the most that can be
      generated. `media_tokens`: tokens that one image or recording becomes in front of the decoder; `media_items`: how many
      of these a prompt has.
    - `placeholder_id`: the token that stands for media in a prompt, `placeholder` its text; `before` and `after` are ids that the
      model's processor puts around them.
    - `media_positions`: rows of positions of an image's tokens, from that of the first, where they are not numbered as text is.
      Where these depend on which tokens were kept, the encoder gives them, as `visual_position (1, rows, tokens)`. The first
      new position behind an image is `media_advance` after the first of its own.
    - `template`: the text around a prompt, which stands at `{prompt}`.
    - `start_ids`: what a decoder begins with besides the prompt. `suppress_ids` are never generated, `suppress_first_ids` not as
      the first token. `eos_ids` end the text.
    - `stages`: what compression made of each component; empty where it is not known.
    - `tokenizer`: the file of the tokenizer in the bundle.
    """

    kind: Literal["vision-language", "audio-language", "speech"]
    order: tuple[str, ...] = Field(min_length=2)
    prompt_tokens: Some
    new_tokens: Some
    media_tokens: Count = 0
    media_items: Some = 1
    placeholder_id: Count | None = None
    placeholder: str = ""
    before: tuple[Count, ...] = ()
    after: tuple[Count, ...] = ()
    media_positions: tuple[tuple[Count, ...], ...] = ()
    media_advance: Count = 0
    template: str = "{prompt}"
    start_ids: tuple[Count, ...] = ()
    suppress_ids: tuple[Count, ...] = ()
    suppress_first_ids: tuple[Count, ...] = ()
    eos_ids: tuple[Count, ...] = ()
    caches: tuple[CacheLayer, ...] = Field(min_length=1)
    stages: tuple[Stage, ...] = ()
    tokenizer: str | None = None
    settings: dict[str, Any] = {}
    """What only this kind of pipeline needs (languages, tasks; `processor_tokens`: placeholders that a processor writes for one
    image or recording)."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of all layers."""
        return sum(layer.bytes for layer in self.caches)

    @model_validator(mode="after")
    def _fits(self) -> Pipeline:
        for number, layer in enumerate(self.caches):
            if not layer.media <= layer.tokens < layer.slots:
                raise ValueError(f"cache {number} has {layer.media} of {layer.tokens} tokens from media, and {layer.slots} slots")
        if "{prompt}" not in self.template:
            raise ValueError("the template has no {prompt}")
        return self
