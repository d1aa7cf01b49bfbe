"""Fixed linear maps over a grid of tokens: average, adaptive and bilinear pooling are all one matrix for each axis.

A map over the whole grid would be one constant matrix `(M, N)`, the Kronecker product of the axes' matrices. It is applied one
axis at a time, as a product from the left with a constant: no permutation, no gather, and faster on CPUs than `avg_pool2d`.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Matrix = npt.NDArray[np.float64]
"""NumPy, so that it is a constant where a program is traced."""


@dataclass(frozen=True)
class LinearMap:
    """One matrix `(outputs, inputs)` for each axis of a grid; None leaves an axis as it is."""

    grid: tuple[int, ...]
    axes: tuple[Matrix | None, ...]

    @property
    def out(self) -> tuple[int, ...]:
        """The grid of the outputs."""
        return tuple(n if a is None else a.shape[0] for n, a in zip(self.grid, self.axes, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """`(B, prod(grid), C)`, row-major over the grid, to `(B, prod(out), C)`. Half precision is summed in fp32."""
        return self._apply(x, self.axes)

    def sizes(self, size: Tensor) -> Tensor:
        """Sizes `(B, N, 1)` as `(B, M, 1)`: what every input stands for is shared out among the outputs that read it, so that
        the sum is kept (less what no output reads)."""
        return self._apply(size, [None if a is None else a / np.where(a.any(0), a.sum(0), 1) for a in self.axes])

    def assignment(self) -> Tensor:
        """`(N,)`: the output that reads each input with the greatest weight (ties to the first), -1 where none does."""
        where, read = np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool)
        for n, a, m in zip(self.grid, self.axes, self.out, strict=True):
            best, reads = (np.arange(n), np.ones(n, dtype=bool)) if a is None else (a.argmax(0), a.any(0))
            where, read = (where[:, None] * m + best).ravel(), (read[:, None] & reads).ravel()
        return torch.from_numpy(np.where(read, where, -1))

    def matrix(self) -> Matrix:
        """The whole map as one matrix `(M, N)`."""
        whole: Matrix = np.ones((1, 1))
        for n, a in zip(self.grid, self.axes, strict=True):
            whole = np.kron(whole, np.eye(n) if a is None else a).astype(np.float64)
        return whole

    def _apply(self, x: Tensor, axes: Sequence[Matrix | None]) -> Tensor:
        batch, _, width = x.shape
        shape = [*self.grid, width]
        y = x.float() if x.dtype.itemsize < 4 else x
        for axis, a in reversed(list(enumerate(axes))):
            if a is not None:
                y = y.reshape(batch * math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1:]))
                y = torch.tensor(a.tolist(), dtype=y.dtype, device=y.device) @ y
                shape[axis] = a.shape[0]
        return y.reshape(batch, -1, width).to(x.dtype)


def strided(inputs: int, kernel: int, stride: int) -> Matrix:
    """Means of `kernel` cells, `stride` apart; a remainder is dropped (floor mode)."""
    outputs = (inputs - kernel) // stride + 1
    return windows(inputs, [(i * stride, i * stride + kernel) for i in range(outputs)])


def adaptive(inputs: int, outputs: int) -> Matrix:
    """Means over the windows of adaptive pooling: output i reads floor(i N / M) to ceil((i + 1) N / M), which overlap where M does
    not divide N."""
    return windows(inputs, [(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)])


def windows(inputs: int, spans: Sequence[tuple[int, int]]) -> Matrix:
    """Means over spans `[start, stop)` of an axis."""
    weight = np.zeros((len(spans), inputs))
    for i, (start, stop) in enumerate(spans):
        weight[i, start:stop] = 1 / (stop - start)
    return weight


def linear(inputs: int, outputs: int) -> Matrix:
    """Linear interpolation without aligned corners, as `torch.nn.functional.interpolate` does it (no anti-aliasing)."""
    weight = np.zeros((outputs, inputs))
    for i in range(outputs):
        place = max(0.0, (i + 0.5) * inputs / outputs - 0.5)
        low = min(int(place), inputs - 1)
        high, share = min(low + 1, inputs - 1), place - low
        weight[i, low] += 1 - share
        weight[i, high] += share
    return weight


def over_space(grid: tuple[int, ...], matrix: Callable[[int], Matrix]) -> LinearMap:
    """One kind of matrix, made for the length of each axis, for the last two axes of a grid (the one of a 1-D grid)."""
    fixed = max(0, len(grid) - 2)
    return LinearMap(grid, (*[None] * fixed, *(matrix(n) for n in grid[fixed:])))


def max_pool(x: Tensor, grid: tuple[int, ...], stride: int) -> Tensor:
    """Maxima of `stride` x `stride` cells (`stride` on a 1-D grid) of `x (B, prod(grid), C)`; a remainder is dropped."""
    batch, _, width = x.shape
    shape = [*grid, width]
    for axis in range(max(0, len(grid) - 2), len(grid)):
        cells = shape[axis] // stride
        x = x.reshape(batch * math.prod(shape[:axis]), shape[axis], -1)[:, :cells * stride]
        x = x.reshape(-1, stride, x.shape[2]).amax(1)
        shape[axis] = cells
    return x.reshape(batch, -1, width)


def unshuffle(x: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Cells of `factor` x `factor` side by side in the features: `(B, h w, C)` to `(B, h w / factor^2, C factor^2)`, features by
    row, then column, then channel. Both sides of the grid must be multiples of `factor`."""
    height, width = grid
    cells = x.reshape(x.shape[0], height // factor, factor, width // factor, factor * x.shape[2])
    return cells.transpose(2, 3).reshape(x.shape[0], -1, factor * factor * x.shape[2])
