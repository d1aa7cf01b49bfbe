"""Diversity methods: tokens are picked one after the other, each unlike those that are picked already."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.catalogue.similarity import text_cosines
from edgewise.ops.greedy import determinantal, farthest_points
from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, drop, method
from edgewise.ops.score import unit
from edgewise.ops.select import top_tokens

LAST = 1e30
"""Farther than any cosine distance, and far from overflow."""


def _ratio(free: int, grid: tuple[int, ...] | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    if parameters["ratio"] is None:
        raise ValueError("give keep=... (tokens that stay: a fraction such as 0.5, or a count) or ratio=...")
    if not parameters["ratio"]:
        raise ValueError("ratio=0 is out of range: above 0 and at most 1")
    return max(1, round(parameters["ratio"] * free))


def _marked(t: Tokens, picks: Tensor, keep: int) -> Reduced:
    """Keep the protected tokens and those that were picked `(B, keep)` of the others, in their order."""
    place = torch.arange(t.count, device=picks.device, dtype=torch.float32)
    chosen = (picks.to(torch.float32)[:, :, None] + t.protected == place).to(torch.float32).sum(dim=1)
    return drop(t, top_tokens(chosen, keep, t.protected))


@method(
    name="divprune", summary="Max-min diversity: each token that is kept is the one farthest (cosine) from those kept before.",
    mechanism="similarity", modalities=("image", "video"), sites=("block", "out", "projector"), needs=(),
    paper="DivPrune: Diversity-based Visual Token Pruning (CVPR 2025), arXiv 2503.02175", pads=True, count=_ratio,
    limits="No token is kept twice, also where tokens are equal (the published code repeats them). A fraction given as ratio is "
           "rounded to the nearest count, as published; given as keep it is rounded down.",
    parameters=(KEEP, Parameter("ratio", None, "the share that stays, instead of keep (published: 0.098)", least=0, most=1,
                                optional=float)),
)
def _divprune(t: Tokens, keep: int, **_: Any) -> Reduced:
    x = unit(t.tokens[:, t.protected:])
    distance = 1 - x @ x.transpose(1, 2)
    if t.padding is not None:
        padding = t.padding[:, t.protected:]
        distance = torch.where(padding[:, :, None], LAST, distance)  # real tokens do not mind how far padding is,
        distance = torch.where(padding[:, None, :], -LAST, distance)  # and padding comes after all of them
    return _marked(t, farthest_points(distance, keep), keep)


@method(
    name="cdpruner", summary="Conditional diversity: a determinantal point process over similarity times relevance to the text.",
    mechanism="similarity", modalities=("image", "video"), sites=("block", "out", "projector"), needs=("text",),
    paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning (NeurIPS 2025), arXiv 2506.10967",
    pads=True,
    limits="The text must have as many features as the tokens (as their image embeddings, where those are given as keys). The "
           "count is exact also beyond the rank of the features, where the published code loses tokens.",
    parameters=(KEEP, Parameter("normalise", "batch", "relevance is scaled to 0..1 over the whole batch (as published), or for "
                                "each sample alone", ("batch", "sample"))),
)
def _cdpruner(t: Tokens, keep: int, normalise: str = "batch", **_: Any) -> Reduced:
    x = unit(t.tokens[:, t.protected:])
    relevance = -text_cosines(t).mean(dim=-1)[:, t.protected:]
    relevance = relevance.to(x.dtype)
    padding = None if t.padding is None else t.padding[:, t.protected:]
    low, high = (relevance if padding is None else relevance.masked_fill(padding, fill) for fill in (torch.inf, -torch.inf))
    axes = (0, 1) if normalise == "batch" else (1,)
    least, most = low.amin(dim=axes, keepdim=True), high.amax(dim=axes, keepdim=True)
    # Where all are equally relevant the published division is by zero.
    relevance = (relevance - least + 1e-6) / (most - least).clamp_min(1e-6)
    kernel = relevance[:, :, None] * (x @ x.transpose(1, 2)) * relevance[:, None, :]
    if padding is not None:
        kernel = torch.where(padding[:, :, None] | padding[:, None, :], 0.0, kernel)
        place = torch.arange(kernel.shape[1], device=kernel.device)
        kernel = torch.where((place[:, None] == place) & padding[:, None, :], -1.0, kernel)
    return _marked(t, determinantal(kernel, keep), keep)
