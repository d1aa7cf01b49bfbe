"""Realisations: equivalent graphs for each compression op, of which a target takes the one that it runs best.

- `sort_free`: ranks by a comparison matrix, one-hot matrices by equality, matrix products. No topk, sort, gather or
  scatter, so accelerators keep it.
- `topk`: topk and gather, small one-hot products for the merged tokens. The fastest on CPUs.
- `scatter`: the reference itself: stable sort, gather and scatter-add.

Each takes exactly the arguments of its op (in `edgewise.ops`) and gives equal results, ties included.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgewise.ops import match, reduce, select

FREE, TOPK, SCATTER = "sort_free", "topk", "scatter"

REALISATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


def realisation(op: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as one realisation of `edgewise::op`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        REALISATIONS.setdefault(op, {})[name] = function
        return function

    return register


REALISATIONS["bipartite_match"] = {SCATTER: match.bipartite_match._init_fn}
REALISATIONS["merge"] = {SCATTER: reduce.merge._init_fn}
REALISATIONS["take"] = {SCATTER: reduce.take._init_fn, TOPK: reduce.take._init_fn}
REALISATIONS["top_tokens"] = {SCATTER: select.top_tokens._init_fn}


def descending_rank(score: Tensor) -> Tensor:
    """The place `(B, N)` of each score in descending order, ties to the lowest index, as float: counts of comparisons."""
    count = score.shape[1]
    mine, other = score[:, :, None], score[:, None, :]
    index = torch.arange(count, device=score.device)
    earlier = (index[None, :] < index[:, None])[None]
    return ((other > mine) | ((other == mine) & earlier)).to(torch.float32).sum(-1)


def one_hot(index: Tensor, count: int) -> Tensor:
    """`(B, K)` indices as `(B, K, count)` rows of zeros and a one, in float, by equality."""
    places = torch.arange(count, device=index.device, dtype=torch.float32)
    return (index.to(torch.float32)[:, :, None] == places).to(torch.float32)


def place_by_rank(rank: Tensor, wanted: int, value: Tensor) -> Tensor:
    """`value (B, N)` reordered by `rank (B, N)`, of which the places 0 to `wanted` - 1 are taken: `(B, wanted)`."""
    places = torch.arange(wanted, device=rank.device, dtype=torch.float32)
    chosen = (rank[:, None, :] == places[None, :, None]).to(torch.float32)
    return (chosen @ value.to(torch.float32)[:, :, None])[:, :, 0]


def rank_among(flags: Tensor) -> Tensor:
    """For `flags (B, N)` of zeros and ones: how many ones come before each position."""
    count = flags.shape[1]
    before = torch.ones(count, count, device=flags.device, dtype=torch.float32).triu(1)
    return flags @ before


@realisation("bipartite_match", FREE)
def _(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    scores = masked_similarity(metric, protected)
    best = scores.amax(dim=-1)
    place = torch.arange(scores.shape[-1], device=metric.device, dtype=torch.float32)
    partner = torch.where(scores == best[:, :, None], place, float(scores.shape[-1])).amin(dim=-1)
    rank = descending_rank(best)
    even = torch.arange(scores.shape[1], device=metric.device, dtype=torch.float32).expand(rank.shape[0], -1)
    rest_rank = rank - r
    if protected:
        rest = (rank >= r).to(torch.float32)
        # Merged tokens get a rank that no place has.
        rest_rank = rank_among(rest) * rest - (1 - rest)
    chosen = place_by_rank(rank, r, even)
    unmerged = place_by_rank(rest_rank, scores.shape[1] - r, even)
    kept, src, into = match.assemble(chosen, unmerged, place_by_rank(rank, r, partner), metric.shape[1], protected)
    return kept.to(torch.int64), src.to(torch.int64), into.to(torch.int64)


def masked_similarity(metric: Tensor, protected: int) -> Tensor:
    """`ops.match.similarity` without writing in place."""
    metric = torch.nn.functional.normalize(metric.float() if metric.dtype.itemsize < 4 else metric, dim=-1)
    even, odd = metric[:, ::2], metric[:, 1::2]
    scores = even @ odd.transpose(1, 2)
    rows, columns = match.protected_split(protected)
    if not protected:
        return scores
    keep = torch.ones(scores.shape[1:], dtype=torch.bool)
    keep[:rows] = False
    keep[:, :columns] = False
    return torch.where(keep.to(scores.device), scores, -torch.inf)


@realisation("merge", FREE)
def _(x: Tensor, size: Tensor | None, kept: Tensor, src: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    count = x.shape[1]
    gather = one_hot(kept, count) + one_hot(into, kept.shape[1]).transpose(1, 2) @ one_hot(src, count)
    wide = x.float() if x.dtype.itemsize < 4 else x
    if size is None:
        total = gather.sum(-1, keepdim=True)
        return (gather @ wide / total).to(x.dtype), total.to(x.dtype)
    total = gather @ size.to(wide.dtype)
    return (gather @ (wide * size) / total).to(x.dtype), total.to(x.dtype)


@realisation("merge", TOPK)
def _(x: Tensor, size: Tensor | None, kept: Tensor, src: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float() if x.dtype.itemsize < 4 else x
    adds = one_hot(into, kept.shape[1]).transpose(1, 2)
    if size is None:
        total = 1 + adds.sum(-1, keepdim=True)
    else:
        size = size.to(wide.dtype)
        wide = wide * size
        total = reduce.gather_along(size, kept, 1) + adds @ reduce.gather_along(size, src, 1)
    tokens = reduce.gather_along(wide, kept, 1) + adds @ reduce.gather_along(wide, src, 1)
    return (tokens / total).to(x.dtype), total.to(x.dtype)


@realisation("take", FREE)
def _(x: Tensor, kept: Tensor, dim: int, prefix: int) -> Tensor:
    chosen = one_hot(kept[:, prefix:] - prefix, x.shape[dim])
    wide = x.to(torch.float32)
    if x.dtype.is_floating_point:
        # Zero times minus infinity is not a number: a mask's -inf becomes the lowest finite value.
        wide = wide.clamp(min=torch.finfo(torch.float32).min)
    moved = wide.movedim(dim, 1) if dim else wide.unsqueeze(0)
    if moved.shape[0] > chosen.shape[0] > 1:
        chosen = chosen.repeat_interleave(moved.shape[0] // chosen.shape[0], dim=0)
    taken = chosen @ moved.reshape(*moved.shape[:2], -1)
    taken = taken.reshape(*taken.shape[:2], *moved.shape[2:])
    taken = taken.movedim(1, dim) if dim else taken[0]
    return taken > 0.5 if x.dtype == torch.bool else taken.to(x.dtype)


@realisation("top_tokens", FREE)
def _(score: Tensor, keep: int, protected: int) -> Tensor:
    free = finite(score[:, protected:])
    chosen = (descending_rank(free) < keep).to(torch.float32)
    place = rank_among(chosen) * chosen - (1 - chosen)
    index = torch.arange(protected, score.shape[1], device=score.device, dtype=torch.float32)
    best = place_by_rank(place, keep, index.expand(score.shape[0], -1)).to(torch.int64)
    return torch.cat([torch.arange(protected, device=score.device).expand(score.shape[0], -1), best], dim=1)


def finite(score: Tensor) -> Tensor:
    """Scores with NaN as the lowest, in at least fp32."""
    score = score.float() if score.dtype.itemsize < 4 else score
    return torch.where(score.isnan(), -torch.inf, score)
