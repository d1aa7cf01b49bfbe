"""Average pooling of tokens that lie on a grid."""
from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def pooled_grid(grid: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """The grid after pooling: time (of a 3-D grid) stays, the last one or two axes shrink; a remainder is dropped."""
    fixed, pooled = grid[:-2], grid[-2:]
    return (*fixed, *(axis // stride for axis in pooled))


def grid_pool(x: Tensor, grid: tuple[int, ...], stride: int) -> Tensor:
    """Average `stride` x `stride` cells (`stride` cells on a 1-D grid).

    Args: x `(B, prod(grid), C)`, row-major over `grid`: `(T,)`, `(H, W)` or `(frames, H, W)`.
    Returns: `(B, prod(pooled_grid(grid, stride)), C)`. Source: average pooling as in LLaVA-NeXT and PLLaVA, floor mode.
    """
    batch, _, width = x.shape
    if len(grid) == 1:
        return F.avg_pool1d(x.transpose(1, 2), stride).transpose(1, 2)
    frames = math.prod(grid[:-2])
    cells = x.reshape(batch * frames, *grid[-2:], width).permute(0, 3, 1, 2)
    cells = F.avg_pool2d(cells, stride).flatten(2).transpose(1, 2)
    return cells.reshape(batch, -1, width)
