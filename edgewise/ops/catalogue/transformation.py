"""Transformation methods: fixed linear maps over the token grid."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, method
from edgewise.ops.pool import grid_pool, pooled_grid


def _pool_counts(free: int, grid: tuple[int, ...] | None) -> dict[int, dict[str, int]]:
    if grid is None:
        return {}
    counts: dict[int, dict[str, int]] = {}
    for stride in range(2, min(grid[-2:]) + 1):
        cells = 1
        for axis in pooled_grid(grid, stride):
            cells *= axis
        counts.setdefault(cells, {"stride": stride})
    return counts


@method(
    name="pool", summary="Average pooling over the token grid.", mechanism="transformation",
    modalities=("image", "video", "audio"), sites=("out",), needs=("grid",),
    paper="LLaVA-NeXT, PLLaVA (arXiv 2404.16994), DeCo (arXiv 2405.20985)",
    represented=False,
    limits="Counts are those of a whole stride; a remainder of the grid is dropped. Frames of a video are pooled apart.",
    parameters=(KEEP, Parameter("stride", 2, "cells averaged along each axis of the grid")), legal_counts=_pool_counts,
)
def _pool(t: Tokens, keep: int, stride: int = 2, **_: Any) -> Reduced:
    assert t.grid is not None
    free = t.tokens[:, t.protected:]
    tokens = torch.cat([t.tokens[:, :t.protected], grid_pool(free, t.grid, stride)], dim=1)
    size = None
    if t.size is not None:
        cells = stride ** min(len(t.grid), 2)
        size = torch.cat([t.size[:, :t.protected], grid_pool(t.size[:, t.protected:], t.grid, stride) * cells], dim=1)

    def assignment() -> Tensor:
        assert t.grid is not None
        pooled = pooled_grid(t.grid, stride)
        target = torch.full(t.grid, -1, dtype=torch.int64)
        cell = torch.arange(torch.tensor(pooled).prod().item()).reshape(pooled)
        for axis in range(max(0, len(t.grid) - 2), len(t.grid)):
            cell = cell.repeat_interleave(stride, dim=axis)
        target[tuple(slice(n) for n in cell.shape)] = cell + t.protected
        prefix = torch.arange(t.protected)
        return torch.cat([prefix, target.flatten()]).to(t.tokens.device).expand(t.tokens.shape[0], -1)

    return Reduced(tokens, size, None, assignment)
