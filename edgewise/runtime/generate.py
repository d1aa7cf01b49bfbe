"""The loop of prefill and decode, with static caches that are written in place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgewise.bundle.pipeline import Pipeline
from edgewise.errors import InputError
from edgewise.runtime.sampling import Sampler, Sampling
from edgewise.targets import Session


@dataclass
class Generation:
    """What was generated: the tokens (an end token included), their text (empty without a tokenizer), why it stopped (`eos` or
    `length`), and seconds by stage: one number for each run of it."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    stopped: str = "length"
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def timed(self, stage: str, start: float) -> None:
        """Note that `stage` ran from `start` (of `time.perf_counter`) until now."""
        self.seconds.setdefault(stage, []).append(time.perf_counter() - start)


class Decoder:
    """The components `prefill` and `decode`, and the caches between them."""

    def __init__(self, prefill: Session, decode: Session, pipeline: Pipeline) -> None:
        self.prefill, self.decode, self.pipeline = prefill, decode, pipeline
        self._inputs = {info.name: info for info in (*decode.inputs, *decode.kept)}

    def tokens(
        self,
        feeds: Mapping[str, np.ndarray],
        *,
        length: int,
        position: int,
        sampling: Sampling,
        most: int,
        into: Generation,
        held: Mapping[str, np.ndarray] | None = None,
    ) -> Iterator[int]:
        """Generate up to `most` tokens, each given as soon as it is chosen; `into` is filled on the way.

        `feeds` are the inputs of prefill; `length` real tokens are in the prompt's bucket; `position` is that of the first new
        token; `held` are further inputs of decode, the same for every token.
        """
        if not 1 <= most <= self.pipeline.new_tokens:
            raise InputError(
                f"this bundle has room for {self.pipeline.new_tokens} new tokens, and {most} are asked for: export it with a "
                "larger --new-tokens"
            )
        sampler = Sampler(sampling, self.pipeline.suppress_ids)
        start = time.perf_counter()
        outputs = self.prefill.run(feeds)
        into.timed("prefill", start)
        caches = self._caches(outputs)
        fixed = {**(held or {}), "length": np.array([length])}
        for step in range(most):
            token = sampler(outputs["logits"].reshape(-1), self.pipeline.suppress_first_ids if step == 0 else ())
            into.ids.append(token)
            yield token
            if token in self.pipeline.eos_ids:
                into.stopped = "eos"
                return
            if step + 1 == most:
                return
            start = time.perf_counter()
            changing = {"input_ids": np.array([[token]]), "position": np.array(position + step), "step": np.array([step])}
            outputs = self.decode.run({**caches, **self._shaped({**fixed, **changing})})
            for info in self.decode.kept:
                caches.pop(info.name, None)  # it has them now, and wrote to them
            for i, layer in enumerate(self.pipeline.caches):
                for kind in ("key", "value"):
                    if f"past_{kind}_{i}" in caches:
                        caches[f"past_{kind}_{i}"][:, :, layer.tokens + step] = outputs[f"{kind}_{i}"][:, :, 0]
            into.timed("decode", start)

    def _caches(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What prefill made, with room behind it for the tokens to come."""
        caches = {}
        for i, layer in enumerate(self.pipeline.caches):
            for kind in ("key", "value"):
                name = f"past_{kind}_{i}"
                caches[name] = np.zeros(self._inputs[name].shape, self._inputs[name].dtype)
                caches[name][:, :, : layer.tokens] = outputs[f"{kind}_{i}"]
        return caches

    def _shaped(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values that the decode graph takes, as it takes them."""
        return {
            name: np.ascontiguousarray(np.broadcast_to(value, info.shape).astype(info.dtype))
            for name, value in values.items()
            if (info := self._inputs.get(name)) is not None
        }
