"""Realisations of the greedy selections.

- `scatter` (the reference) and `topk`: unrolled, one row gathered for each pick.
- `sort_free`: unrolled, rows by a product with a one-hot vector.
- `loop`: above `UNROLLED` picks the op stays one node, and the target makes a loop of its own of it; below it is unrolled.
"""
from __future__ import annotations

from torch import Tensor

from edgewise.ops import greedy
from edgewise.passes.realisations import FREE, REALISATIONS, SCATTER, TOPK, one_hot, realisation, rows_at

LOOP = "loop"
UNROLLED = 32
"""The most picks that are unrolled where a target has a loop."""

REALISATIONS["farthest_points"] = {SCATTER: greedy.farthest_points._init_fn}
REALISATIONS["determinantal"] = {SCATTER: greedy.determinantal._init_fn}


def _gathered(matrix: Tensor, index: Tensor) -> Tensor:
    return rows_at(matrix, index.long()[:, None])[:, 0]


def _multiplied(matrix: Tensor, index: Tensor) -> Tensor:
    return (one_hot(index[:, None], matrix.shape[1]).to(matrix.dtype) @ matrix)[:, 0]


@realisation("farthest_points", TOPK)
def _(distance: Tensor, keep: int) -> Tensor:
    return greedy.farthest(distance, keep, _gathered)


@realisation("farthest_points", FREE)
def _(distance: Tensor, keep: int) -> Tensor:
    return greedy.farthest(distance, keep, _multiplied)


@realisation("determinantal", TOPK)
def _(kernel: Tensor, keep: int) -> Tensor:
    return greedy.most_determinant(kernel, keep, _gathered)


@realisation("determinantal", FREE)
def _(kernel: Tensor, keep: int) -> Tensor:
    return greedy.most_determinant(kernel, keep, _multiplied)


@realisation("farthest_points", LOOP)
def _(distance: Tensor, keep: int) -> Tensor:
    if keep > UNROLLED:
        return greedy.farthest_points(distance, keep)
    return greedy.farthest(distance, keep, _gathered)


@realisation("determinantal", LOOP)
def _(kernel: Tensor, keep: int) -> Tensor:
    if keep > UNROLLED:
        return greedy.determinantal(kernel, keep)
    return greedy.most_determinant(kernel, keep, _gathered)
