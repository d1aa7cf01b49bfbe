"""Where a fit begins: weights that pool the token grid, as well as the method can, and the natural unit of each weight.

A query method cannot see where a token lies, only what it holds, and in a trained encoder that tells its place: a linear map of
the features is regressed on the windows of adaptive pooling. Queries that begin there have parts of the input of their own, and
no two begin alike.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgewise.ops.pool import LinearMap, adaptive

RIDGE = 1e-2
"""Of the regression on standardised features."""
MOST_TOKENS = 1 << 15
"""That the regression looks at: enough for any width, and some seconds at most."""
MOST_STRETCH = 4
"""Between the longest and the shortest side of a cell."""


@dataclass(frozen=True)
class Weight:
    """A weight at the start of a fit. It is fitted as `value + unit * change`, so that a change of one means as much in each of
    them, whatever the features' scale; `unit` is as the value, or broadcasts to it."""

    value: Tensor
    unit: Tensor


Start = Mapping[str, Weight]


def spread(tokens: Tensor) -> Tensor:
    """The standard deviation of each feature `(C,)` over `tokens (S, N, C)`, floored so that a constant one is no division by
    zero."""
    std = tokens.flatten(0, 1).std(dim=0, correction=0)
    return std.clamp_min(max(1e-3 * float(std.mean()), 1e-6))


def windows(count: int, keep: int, grid: tuple[int, ...] | None) -> Tensor:
    """Adaptive pooling of `count` tokens to `keep` as a matrix `(keep, count)`: on the grid in cells that are as square as may be,
    or along the sequence where `keep` has no divisors that the grid could hold."""
    if grid is None or math.prod(grid) != count:
        grid = (count,)
    stretch, sides = min(((_stretch(grid, cells), cells) for cells in _factors(keep, grid)), default=(math.inf, (keep,)))
    if stretch > MOST_STRETCH:
        grid, sides = (count,), (keep,)
    maps = [adaptive(n, m) for n, m in zip(grid, sides, strict=True)]
    return torch.from_numpy(LinearMap(grid, tuple(maps)).matrix()).float()


def _factors(count: int, grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All ways to share `count` cells out over the axes of a grid."""
    if not grid:
        if count == 1:
            yield ()
        return
    for n in range(1, min(count, grid[0]) + 1):
        if count % n == 0:
            yield from ((n, *rest) for rest in _factors(count // n, grid[1:]))


def _stretch(grid: tuple[int, ...], cells: tuple[int, ...]) -> float:
    sides = [n / m for n, m in zip(grid, cells, strict=True)]
    return max(sides) / min(sides)


def place_logits(tokens: Tensor, target: Tensor) -> Tensor:
    """A map `(keep, C)` from features to logits, whose softmax over the tokens is as near to the rows of `target (keep, N)` as a
    linear map of `tokens (S, N, C)` comes: a ridge regression, at the temperature that pools best."""
    tokens = tokens[:: -(-tokens.shape[0] * tokens.shape[1] // MOST_TOKENS)]
    scale = spread(tokens)
    x = ((tokens - tokens.mean(dim=(0, 1))) / scale).double()
    wanted = (target > 0).double()
    wanted = (wanted - wanted.mean(1, keepdim=True)).t().expand(x.shape[0], -1, -1)
    flat = x.flatten(0, 1)
    gram = flat.t() @ flat / len(flat) + RIDGE * torch.eye(flat.shape[1], dtype=flat.dtype)
    found = torch.linalg.solve(gram, flat.t() @ wanted.flatten(0, 1) / len(flat))
    logits, pool = (x @ found).transpose(1, 2), target.double() @ x
    errors = {heat: float(((heat * logits).softmax(-1) @ x - pool).square().mean()) for heat in 2.0 ** torch.arange(12.0)}
    best = min(errors, key=errors.__getitem__)
    return (best * found.t()).float() / scale
