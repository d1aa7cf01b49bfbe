"""Realisations: equivalent graphs for each compression op, of which a target takes the one that it runs best.

- `sort_free`: ranks by a comparison matrix, one-hot matrices by equality, matrix products. No topk, sort, gather or
  scatter, so accelerators keep it.
- `topk`: stable sort or topk, gather of whole rows, small one-hot products for the merged tokens. The fastest on CPUs.
- `scatter`: the reference itself: stable sort, gather and scatter-add.

Each takes exactly the arguments of its op (in `edgewise.ops`) and gives equal results, for equal scores too. Scores that
are equal in theory (of repeated tokens) may differ in their last digit, as products of other shapes round differently.
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
REALISATIONS["take"] = {SCATTER: reduce.take._init_fn}
REALISATIONS["top_tokens"] = {SCATTER: select.top_tokens._init_fn}


def descending_rank(score: Tensor) -> Tensor:
    """The place `(B, 1, N)` of each score `(B, N, 1)` in descending order, ties to the lowest index, as float: counts of
    comparisons. Rows of one keep their dimension all the way to `place_by_rank`, so that no change of shape is in between."""
    count = score.shape[1]
    mine, other = score.transpose(1, 2), score
    index = torch.arange(count, device=score.device)
    earlier = (index[:, None] < index[None, :])[None]
    return ((other > mine) | ((other == mine) & earlier)).to(torch.float32).sum(1, keepdim=True)


def one_hot(index: Tensor, count: int) -> Tensor:
    """`(B, K)` indices as `(B, K, count)` rows of zeros and a one, in float, by equality."""
    places = torch.arange(count, device=index.device, dtype=torch.float32)
    return (index.to(torch.float32)[:, :, None] == places).to(torch.float32)


def place_by_rank(rank: Tensor, wanted: int, value: Tensor, first: int = 0) -> Tensor:
    """`value (B, N, 1)` reordered by `rank (B, 1, N)`, of which `wanted` places from `first` on are taken: `(B, wanted)`."""
    places = torch.arange(first, first + wanted, device=rank.device, dtype=torch.float32)
    chosen = (rank == places[None, :, None]).to(torch.float32)
    return (chosen @ value)[:, :, 0]


def column(values: Tensor, batch: int) -> Tensor:
    """Constant `values (N)` as `(batch, N, 1)`, for `place_by_rank`. They are repeated for each sample, because NVIDIA's builder
    (TensorRT-RTX 1.7) does not come back from some products that broadcast a constant."""
    return values.to(torch.float32)[None, :, None].expand(batch, -1, -1)


def rank_among(flags: Tensor) -> Tensor:
    """For `flags (B, 1, N)` of zeros and ones: the number of each one among them, from 1 on, and 0 for each zero."""
    count = flags.shape[2]
    until = torch.ones(count, count, device=flags.device, dtype=torch.float32).triu()
    return (flags @ until) * flags


def unit(metric: Tensor) -> Tensor:
    """Rows of length one, zeros where they are zeros, in at least fp32."""
    metric = cast(metric, torch.promote_types(metric.dtype, torch.float32))
    return metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def similarity(metric: Tensor, protected: int, padding: Tensor | None) -> Tensor:
    """Cosine similarity of the unprotected A against the unprotected B, in at least fp32. The protected are sliced away, so
    that no target has to handle infinities."""
    rows, columns = match.protected_split(protected)
    metric = unit(metric)
    scores = metric[:, 2 * rows::2] @ metric[:, 2 * columns + 1::2].transpose(1, 2)
    return scores if padding is None else match.set_padding_apart(scores, padding[:, 2 * rows::2], padding[:, 2 * columns + 1::2])


def kept_tokens(rest: Tensor, count: int, protected: int) -> Tensor:
    """The `kept` of a matching: the protected, those of A that do not merge (`rest`, as tokens), and B."""
    _, columns = match.protected_split(protected)
    odd = torch.arange(2 * columns + 1, count, 2, device=rest.device).expand(rest.shape[0], -1)
    parts = [rest, odd]
    if protected:
        parts.insert(0, torch.arange(protected, device=rest.device).expand(rest.shape[0], -1))
    return torch.cat(parts, dim=1)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another type, with no op in the graph where it has that type."""
    return x if x.dtype == dtype else x.to(dtype)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """`x (B, N, C)` at `index (B, K)`: whole rows picked from a flat view, which runtimes do faster than an element gather."""
    batch, count, width = x.shape
    if batch == 1:
        return x.index_select(1, index[0])
    index = index + count * torch.arange(batch, device=index.device)[:, None]
    return x.reshape(batch * count, width).index_select(0, index.reshape(-1)).reshape(batch, -1, width)


@realisation("bipartite_match", TOPK)
def _(metric: Tensor, r: int, protected: int, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    scores = similarity(metric, protected, padding)
    order = scores.amax(dim=-1).sort(dim=-1, descending=True, stable=True).indices
    chosen, rest = order[:, :r], order[:, r:]
    if protected:
        rest = rest.sort(dim=-1).values
    rows, _ = match.protected_split(protected)
    partner = match.first_best(rows_at(scores, chosen))
    chosen, rest = (2 * i + 2 * rows if rows else 2 * i for i in (chosen, rest))
    return kept_tokens(rest, metric.shape[1], protected), chosen, partner + (protected + rest.shape[1])


@realisation("bipartite_match", FREE)
def _(metric: Tensor, r: int, protected: int, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    scores = similarity(metric, protected, padding)
    best = scores.amax(dim=-1, keepdim=True)
    # Tokens of B follow those that are protected and those of A that do not merge.
    before, columns = protected + scores.shape[1] - r, scores.shape[2]
    place = torch.arange(before, before + columns, device=metric.device, dtype=torch.float32)
    partner = torch.where(scores == best, place, float(before + columns)).amin(dim=-1, keepdim=True)
    rank = descending_rank(best)
    rows, _ = match.protected_split(protected)
    even = column(torch.arange(2 * rows, metric.shape[1], 2, device=metric.device), metric.shape[0])
    # Where A stays in order, merged tokens get a rank that no place has.
    rest, first = (rank_among((rank > r - 1).to(torch.float32)), 1) if protected else (rank, r)
    unmerged = place_by_rank(rest, scores.shape[1] - r, even, first)
    kept = kept_tokens(unmerged, metric.shape[1], protected)
    into = place_by_rank(rank, r, partner)
    return kept.to(torch.int64), place_by_rank(rank, r, even).to(torch.int64), into.to(torch.int64)


def without_padding(x: Tensor, size: Tensor | None, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and sizes as zeros where there is padding."""
    size = torch.ones_like(x[:, :, :1], dtype=torch.float32) if size is None else size
    return x.masked_fill(padding[:, :, None], 0), size.masked_fill(padding[:, :, None], 0)


@realisation("merge", FREE)
def _(x: Tensor, size: Tensor | None, kept: Tensor, src: Tensor, into: Tensor,
      padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count = x.shape[1]
    gather = one_hot(kept, count) + one_hot(into, kept.shape[1]).transpose(1, 2) @ one_hot(src, count)
    if padding is not None:
        x, size = without_padding(x, size, padding)
    wide = cast(x, torch.float32)
    if size is None:
        total = gather.sum(-1, keepdim=True)
        return cast(gather @ wide / total, x.dtype), cast(total, x.dtype)
    size = cast(size, torch.float32)
    total = gather @ size
    return cast(gather @ (wide * size) / (total if padding is None else reduce.divisor(total)), x.dtype), cast(total, x.dtype)


@realisation("merge", TOPK)
def _(x: Tensor, size: Tensor | None, kept: Tensor, src: Tensor, into: Tensor,
      padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if padding is not None:
        x, size = without_padding(x, size, padding)
    wide = cast(x, torch.float32)
    places = torch.arange(kept.shape[1], device=x.device)
    share = (places[:, None] == into[:, None, :]).to(torch.float32)
    if size is None:
        total = share.sum(-1, keepdim=True) + 1
        return cast((rows_at(wide, kept) + share @ rows_at(wide, src)) / total, x.dtype), cast(total, x.dtype)
    size = cast(size, torch.float32)
    share = share * rows_at(size, src).transpose(1, 2)
    own = rows_at(size, kept)
    total = share.sum(-1, keepdim=True) + own
    by = total if padding is None else reduce.divisor(total)
    tokens = rows_at(wide, kept) * (own / by) + (share / by) @ rows_at(wide, src)
    return cast(tokens, x.dtype), cast(total, x.dtype)


@realisation("take", TOPK)
def _(x: Tensor, kept: Tensor, dim: int, prefix: int) -> Tensor:
    index = kept[:, prefix:] - prefix if prefix else kept
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    if dim == 1 and x.ndim == 3 and x.shape[0] == index.shape[0]:
        return rows_at(x, index)
    return reduce.take._init_fn(x, kept, dim, prefix)


@realisation("top_tokens", TOPK)
def _(score: Tensor, keep: int, protected: int) -> Tensor:
    best = finite(score[:, protected:]).sort(dim=-1, descending=True, stable=True).indices[:, :keep].sort(dim=-1).values
    if not protected:
        return best
    return torch.cat([torch.arange(protected, device=score.device).expand(score.shape[0], -1), best + protected], dim=1)


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
    chosen = (descending_rank(free[:, :, None]) < keep).to(torch.float32)
    index = column(torch.arange(protected, score.shape[1], device=score.device), score.shape[0])
    best = place_by_rank(rank_among(chosen), keep, index, 1).to(torch.int64)
    return torch.cat([torch.arange(protected, device=score.device).expand(score.shape[0], -1), best], dim=1)


def finite(score: Tensor) -> Tensor:
    """Scores with NaN as the lowest, in at least fp32."""
    score = cast(score, torch.promote_types(score.dtype, torch.float32))
    return torch.where(score.isnan(), -torch.inf, score)
