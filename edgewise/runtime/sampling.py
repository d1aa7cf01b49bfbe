"""Choose the next token from logits: the likeliest, or one drawn from a distribution that is cut to its head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgewise.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest; `top_k` and `top_p` cut the distribution to its most likely
    tokens (a number of them; the fewest whose probabilities sum to `top_p`). The same seed gives the same tokens."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature:g}: give 0 (the likeliest token) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top-k {self.top_k}: give 1 or more tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p:g}: give a share above 0 and up to 1")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: give 0 or more")


class Sampler:
    """Draws tokens one after the other."""

    def __init__(self, sampling: Sampling, suppressed: Iterable[int] = ()) -> None:
        self.sampling, self.suppressed = sampling, list(suppressed)
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray, suppressed: Iterable[int] = ()) -> int:
        """The next token of logits `(vocabulary,)`; of equal ones the first. Raises InputError if they are not finite."""
        # In double precision, so that the cut is the same on every machine.
        scores = np.asarray(logits, np.float64)
        if not np.isfinite(scores).all():
            raise InputError("the model gave logits that are not finite: verify the bundle (edgewise verify BUNDLE)")
        scores = scores.copy()
        scores[[*self.suppressed, *suppressed]] = -np.inf
        if self.sampling.temperature == 0:
            return int(scores.argmax())
        order = np.argsort(-scores, kind="stable")
        order = order[: self.sampling.top_k]
        scaled = scores[order] / self.sampling.temperature
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        # The token that reaches the share still belongs to the head.
        count = 1 + int((weights.cumsum() < self.sampling.top_p).sum())
        head = weights[:count].cumsum()
        return int(order[min(np.searchsorted(head, self._random.random() * head[-1], side="right"), len(head) - 1)])
