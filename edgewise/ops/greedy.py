"""Greedy selections: one token after the other, each the best one beside those that are picked already.

Both run on a matrix over all pairs of tokens and take O(N) work (max-min) or O(K N) work (DPP) for each of their K picks. No token
is picked twice, and K are picked whatever the matrix holds.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgewise.ops.reduce import gather_along

Rows = Callable[[Tensor, Tensor], Tensor]
"""The row `(B, N)` of a matrix `(B, M, N)` at an index `(B)`, which is given in float."""
Watch = Callable[[Tensor], None]
"""Called with the scores `(B, N)` that each pick is the largest of."""


def pick_rows(matrix: Tensor, index: Tensor) -> Tensor:
    return gather_along(matrix, index.to(torch.int64)[:, None], 1)[:, 0]


@torch.library.custom_op("edgewise::farthest_points", mutates_args=())
def farthest_points(distance: Tensor, keep: int) -> Tensor:
    """Pick `keep` points that lie far apart (max-min diversity, as DivPrune has it, arXiv 2503.02175).

    The first is the point whose nearest other point is farthest; each next one is the point whose nearest picked point is
    farthest.

    Args:
        distance: `(B, N, N)`; NaN counts as 0. What is lower than every distance in a point's column puts that point last.
        keep: `1 <= keep <= N`.

    Returns: `(B, keep)` indices in the order of picking. Ties go to the lowest index; no point comes twice, not even where
    points are equal.
    """
    return farthest(distance, keep, pick_rows)


@farthest_points.register_fake
def _(distance: Tensor, keep: int) -> Tensor:
    return torch.empty(distance.shape[0], keep, dtype=torch.int64, device=distance.device)


@torch.library.custom_op("edgewise::determinantal", mutates_args=())
def determinantal(kernel: Tensor, keep: int) -> Tensor:
    """Pick `keep` items by the greedy search for the most probable subset of a determinantal point process.

    Fast greedy MAP inference (Chen et al., NeurIPS 2018, arXiv 1709.05135): the item that adds most to the determinant of the
    picked items' kernel is next; one row of the Cholesky factor is added for each pick.

    Args:
        kernel: `(B, N, N)`, positive semidefinite. NaN counts as 0. An item whose diagonal entry is negative comes last.
        keep: `1 <= keep <= N`.

    Returns: `(B, keep)` indices in the order of picking. Ties go to the lowest index. An item that depends linearly on the
    picked ones, to `TOLERANCE` of what it was at first, adds nothing: beyond the kernel's rank items come by their index.
    """
    return most_determinant(kernel, keep, pick_rows)


@determinantal.register_fake
def _(kernel: Tensor, keep: int) -> Tensor:
    return torch.empty(kernel.shape[0], keep, dtype=torch.int64, device=kernel.device)


MOST = 1e38
"""Far above any distance or weight, and still a number in fp32."""
TOLERANCE = 32
"""In units of the type's precision: what rounding leaves of an item that adds nothing to the determinant."""


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE * torch.finfo(dtype).eps


def check_count(matrix: Tensor, keep: int) -> None:
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
        raise ValueError(f"a matrix over all pairs must be (B, N, N), got {tuple(matrix.shape)}")
    if not 1 <= keep <= matrix.shape[1]:
        raise ValueError(f"keep={keep} is out of range: 1 to {matrix.shape[1]}")


def finite(matrix: Tensor) -> Tensor:
    """In at least fp32, with zeros for NaN and +-`MOST` for what is beyond: minus infinity marks what is picked."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    matrix = matrix if matrix.dtype == dtype else matrix.to(dtype)
    return torch.where(matrix.isnan(), 0.0, matrix).clamp(-MOST, MOST)


def first_largest(score: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `score (B, N)`: the maximum `(B, 1)`, the lowest index of it `(B)` in float, and where that is `(B, N)`."""
    best = score.amax(dim=-1, keepdim=True)
    index = torch.where(score == best, place, float(score.shape[-1])).amin(dim=-1, keepdim=True)
    return best, index[:, 0], place == index


def places(matrix: Tensor) -> Tensor:
    """The numbers 0 to N - 1, in float."""
    return torch.arange(matrix.shape[-1], device=matrix.device, dtype=torch.float32)


def nearest_other(distance: Tensor) -> Tensor:
    """The distance `(B, N)` from every point to its nearest other one."""
    place = places(distance)
    return torch.where(place[:, None] == place, torch.inf, distance).amin(dim=1)


def farthest(distance: Tensor, keep: int, rows: Rows, watch: Watch = lambda _: None) -> Tensor:
    check_count(distance, keep)
    distance, place = finite(distance), places(distance)
    score, least, picks = nearest_other(distance), None, []
    for turn in range(keep):
        watch(score)
        _, index, here = first_largest(score, place)
        picks.append(index)
        if turn + 1 < keep:
            row = rows(distance, index)
            least = torch.where(here, -torch.inf, row if least is None else torch.minimum(least, row))
            score = least
    return torch.stack(picks, dim=1).to(torch.int64)


def diagonal(matrix: Tensor) -> Tensor:
    """`(B, N)`, without an op that not every target has."""
    place = places(matrix)
    return torch.where(place[:, None] == place, matrix, 0.0).sum(dim=-1)


def cholesky_row(row: Tensor, projected: Tensor | None, gain: Tensor) -> Tensor:
    """The next row `(B, N)` of the factor: of the kernel's `row` what the rows before do not explain (`projected`), by the root of
    the picked item's `gain (B, 1)`; zero where that item adds nothing."""
    rest = row if projected is None else row - projected
    return torch.where(gain > 0, rest / gain.clamp_min(torch.finfo(row.dtype).tiny).sqrt(), 0.0)


def remaining(gain: Tensor, row: Tensor, here: Tensor, floor: Tensor) -> Tensor:
    """What each item would add to the determinant after a pick: nothing where that is not above `floor`; those that were below
    nothing already (picked, or to come last) stay there."""
    left = gain - row * row
    return torch.where(here, -torch.inf, torch.where(left > floor, left, gain.clamp_max(0.0)))


def most_determinant(kernel: Tensor, keep: int, rows: Rows, watch: Watch = lambda _: None) -> Tensor:
    check_count(kernel, keep)
    kernel, place = finite(kernel), places(kernel)
    gain = diagonal(kernel)
    floor = gain.abs() * tolerance(kernel.dtype)
    factor: Tensor | None = None
    picks: list[Tensor] = []
    for turn in range(keep):
        watch(gain)
        best, index, here = first_largest(gain, place)
        picks.append(index)
        if turn + 1 < keep:
            projected = None
            if factor is not None:
                column = factor @ here.to(factor.dtype)[:, :, None]
                projected = (column.transpose(1, 2) @ factor)[:, 0]
            row = cholesky_row(rows(kernel, index), projected, best)
            gain = remaining(gain, row, here, floor)
            factor = row[:, None] if factor is None else torch.cat([factor, row[:, None]], dim=1)
    return torch.stack(picks, dim=1).to(torch.int64)
