"""Baselines: what every method must beat at equal count."""
from __future__ import annotations

import random
from typing import Any

import torch

from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, drop, method


@method(
    name="random", summary="Keep tokens at random: the baseline that every method must beat at equal count.",
    mechanism="baseline", modalities=("image", "video", "audio"), sites=("block", "out", "projector"), needs=(),
    paper="", limits="The choice is a constant of the graph: the same tokens for every input.",
    parameters=(KEEP, Parameter("seed", 0, "seed of the choice")),
)
def _random(t: Tokens, keep: int, seed: int = 0, **_: Any) -> Reduced:
    if not 1 <= keep <= t.count - t.protected:
        raise ValueError(f"keep={keep} is out of range: 1 to {t.count - t.protected}")
    free = sorted(random.Random(seed).sample(range(t.protected, t.count), keep))
    kept = torch.tensor([[*range(t.protected), *free]], device=t.tokens.device)
    return drop(t, kept.expand(t.tokens.shape[0], -1))
