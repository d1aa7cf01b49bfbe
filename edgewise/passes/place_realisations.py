"""A matching and what is merged by it as one: each token's place in the result, and one product that brings it there.

The fewest ops of all realisations, and no sort, gather or scatter. A product with a matrix of all tokens also moves those that stay
as they are, so it is for sequences in which that costs little; see `MOST_TOKENS`. `Legalise` takes it where a merge uses what one
matching gives; everywhere else the realisation of this name is `sort_free` for the matching and `topk` for the merge.
"""
from __future__ import annotations

import torch
from torch import Tensor, fx

from edgewise.ops import match
from edgewise.passes.realisations import FREE, REALISATIONS, TOPK, cast, unit

PLACES = "places"
MOST_TOKENS = 512
"""Moving N tokens of C channels by a product takes N * N * C multiplications, where a block has 12 * N * C * C in its layers and
2 * N * N * C in its attention."""

REALISATIONS["bipartite_match"][PLACES] = REALISATIONS["bipartite_match"][FREE]
REALISATIONS["merge"][PLACES] = REALISATIONS["merge"][TOPK]


def joins(matching: fx.Node, merge: fx.Node) -> bool:
    """Whether a merge takes the three results of a matching as they are, without padding, and few enough tokens."""
    if len(matching.args) > 3 or len(merge.args) > 5:
        return False
    metric, r = matching.args[:2]
    if not r or metric.meta["val"].shape[1] > MOST_TOKENS:  # type: ignore[union-attr]
        return False
    results = [(part.args[0], part.args[1]) for part in merge.args[2:5] if isinstance(part, fx.Node) and len(part.args) > 1]
    return results == [(matching, 0), (matching, 1), (matching, 2)]


def match_places(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`bipartite_match`, and the place `(B, 1, N)` of each token in what `merge` makes, as float.

    All tokens are rows of one table, those of B and the protected too, whose places do not depend on what is found.
    """
    count = metric.shape[1]
    rows, columns = match.protected_split(protected)
    index = torch.arange(count, device=metric.device)
    of_a, of_b = (index >= protected) & (index % 2 == 0), (index >= protected) & (index % 2 == 1)
    free = (count + 1) // 2 - rows
    own = unit(metric)
    scores = own[:, 2 * columns + 1::2] @ own.transpose(1, 2)
    best = scores.amax(dim=1, keepdim=True)
    before, most = protected + free - r, scores.shape[1]
    there = torch.arange(before, before + most, device=metric.device, dtype=torch.float32)[:, None]
    partner = torch.where(scores == best, there, float(before + most)).amin(dim=1, keepdim=True)
    # Those before a token of A: with a better match, or with the same at a lower index.
    other, one = best.transpose(1, 2), of_a[:, None].to(torch.float32)
    ahead = (other > best) | ((other == best) & (index[:, None] < index))  # no choice between truths: ONNX Runtime has none
    rank = torch.where(ahead, one, 0.0).sum(1, keepdim=True)
    # Protected tokens, then those of A, then those of B.
    after = index + count * (of_a.to(torch.int64) + 2 * of_b.to(torch.int64))
    behind = (after[:, None] < after).to(torch.float32)
    stays = rank > torch.where(of_a, r - 1.0, -1.0)
    if r == free:  # none of A stays
        fixed = torch.where(of_b, (index - protected) // 2 + protected, index).to(torch.float32)
        place = torch.where(of_a, partner, fixed)
    elif protected:
        place = torch.where(stays, stays.to(torch.float32) @ behind, partner)
    else:
        fixed = (before + index // 2).to(torch.float32)
        place = torch.where(of_a, torch.where(stays, rank - r, partner), fixed)
    kept = _index_of(torch.where(stays, place, -1.0), count - r, index.to(torch.float32))
    turn = torch.where(of_a, rank, -1.0)
    return kept, _index_of(turn, r, index.to(torch.float32)), _index_of(turn, r, partner), place


def _index_of(place: Tensor, count: int, value: Tensor) -> Tensor:
    """`value (N)` or `(B, 1, N)` of those whose place `(B, 1, N)` is 0, 1, ...: `(B, count)` indices."""
    wanted = torch.arange(count, device=place.device, dtype=torch.float32)[:, None]
    return torch.where(place == wanted, value, 0.0).amax(dim=-1).to(torch.int64)


def merge_places(x: Tensor, size: Tensor | None, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`merge` of `x` to `count` tokens by the place `(B, 1, N)` of each."""
    places = torch.arange(count, device=x.device, dtype=torch.float32)[:, None]
    here = place == places
    share = here.to(torch.float32) if size is None else torch.where(here, cast(size, torch.float32).transpose(1, 2), 0.0)
    total = share.sum(-1, keepdim=True)
    return cast((share / total) @ cast(x, torch.float32), x.dtype), cast(total, x.dtype)
