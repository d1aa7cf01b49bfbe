"""Transformation methods for images: fixed maps over the token grid."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, method
from edgewise.ops.pool import LinearMap, adaptive, linear, max_pool, over_space, strided, unshuffle

Grid = tuple[int, ...]


def pooled(t: Tokens, tokens: Tensor, size: Callable[[Tensor], Tensor], where: Callable[[], Tensor]) -> Reduced:
    """A result that none of the inputs represents.

    tokens `(B, M, C)` replace the unprotected ones; `size` maps their sizes `(B, N, 1)` to `(B, M, 1)`; `where` gives for each of
    them the place `(N,)` among the M, -1 where dropped. Protected tokens get features of zero where the others are wider.
    """
    head = t.tokens[:, :t.protected]
    if t.protected and tokens.shape[2] > head.shape[2]:
        head = torch.nn.functional.pad(head, (0, tokens.shape[2] - head.shape[2]))
    whole = torch.cat([head, tokens], dim=1) if t.protected else tokens
    sizes = None if t.size is None else torch.cat([t.size[:, :t.protected], size(t.size[:, t.protected:])], dim=1)

    def assignment() -> Tensor:
        place = where()
        place = torch.where(place < 0, place, place + t.protected)
        return torch.cat([torch.arange(t.protected), place]).to(t.tokens.device).expand(t.tokens.shape[0], -1)

    return Reduced(whole, sizes, None, assignment)


def mapped(t: Tokens, linear_map: LinearMap) -> Reduced:
    """The unprotected tokens put through a linear map."""
    return pooled(t, linear_map(t.tokens[:, t.protected:]), linear_map.sizes, linear_map.assignment)


def _strides(grid: Grid, ceil: bool) -> dict[int, dict[str, Any]]:
    """Counts that a whole stride gives, and the stride."""
    fixed, space = grid[:-2], grid[-2:]
    counts: dict[int, dict[str, Any]] = {}
    for stride in range(2, (max(space) if ceil else min(space)) + 1):
        cells = (-(-n // stride) if ceil else n // stride for n in space)
        counts.setdefault(math.prod(fixed) * math.prod(cells), {"stride": stride})
    return counts


def _sides(grid: Grid) -> dict[int, dict[str, Any]]:
    """Counts of `side` cells along each axis of the space."""
    fixed, space = grid[:-2], grid[-2:]
    return {math.prod(fixed) * side ** len(space): {"side": side} for side in range(1, max(space) + 1)
            if side ** len(space) <= math.prod(space)}


def _pool_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    if grid is None:
        return {}
    strides = _strides(grid, parameters["kind"] == "bilinear")
    return {**strides, **_sides(grid)} if parameters["kind"] == "adaptive" else strides


def _pool_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert grid is not None
    kind, stride, side = parameters["kind"], parameters["stride"], parameters["side"]
    fixed, space = math.prod(grid[:-2]), grid[-2:]
    if side is not None and kind != "adaptive":
        raise ValueError(f"side={side} is for kind=adaptive; kind={kind} takes stride")
    if side is not None:
        if side > max(space):
            raise ValueError(f"side={side} is out of range on the grid {grid}: 1 to {max(space)}")
        return fixed * side ** len(space)
    most = max(space) if kind == "bilinear" else min(space)
    if not 1 <= stride <= most:
        raise ValueError(f"stride={stride} does not fit the grid {grid}: 1 to {most}")
    return fixed * math.prod(-(-n // stride) if kind == "bilinear" else n // stride for n in space)


@method(
    name="pool", summary="Pooling over the token grid: average, maximum, bilinear or adaptive.", mechanism="transformation",
    modalities=("image", "video", "audio"), sites=("block", "out", "projector"), needs=("grid",),
    paper="LLaVA-NeXT (get_2dPool), PLLaVA (arXiv 2404.16994), DeCo (arXiv 2405.20985)",
    represented=False,
    limits="avg and max drop a remainder of the grid, bilinear takes ceil(h / stride) x ceil(w / stride) cells, adaptive any side "
           "x side (in overlapping windows where they do not divide). Frames of a video are pooled apart.",
    parameters=(
        KEEP,
        Parameter("kind", "avg", "avg and max over stride x stride cells; bilinear interpolation; adaptive average",
                  ("avg", "max", "bilinear", "adaptive")),
        Parameter("stride", 2, "cells along each axis of the grid that become one", least=1),
        Parameter("side", None, "adaptive: cells that stay along each axis of the grid", least=1),
    ),
    legal_counts=_pool_counts, count=_pool_count,
)
def _pool(t: Tokens, keep: int, kind: str = "avg", stride: int = 2, side: int | None = None, **_: Any) -> Reduced:
    assert t.grid is not None

    def axis(cells: int) -> Any:
        if kind == "adaptive":
            return adaptive(cells, cells // stride if side is None else side)
        return linear(cells, -(-cells // stride)) if kind == "bilinear" else strided(cells, stride, stride)

    linear_map = over_space(t.grid, axis)
    if kind != "max":
        return mapped(t, linear_map)
    return pooled(t, max_pool(t.tokens[:, t.protected:], t.grid, stride), linear_map.sizes, linear_map.assignment)


def _side_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return {} if grid is None else _sides(grid)


@method(
    name="merge-grid", summary="Average the token grid to any m x m cells.", mechanism="transformation",
    modalities=("image", "video", "audio"), sites=("out", "projector"), needs=("grid",), represented=False,
    paper="Adaptive average pooling: DeCo, arXiv 2405.20985; Matryoshka Multimodal Models, arXiv 2405.17430",
    limits="keep must be m x m for each frame. Windows overlap where m does not divide the grid.",
    parameters=(KEEP, Parameter("side", None, "m: cells that stay along each axis of the grid", least=1)),
    legal_counts=_side_counts,
)
def _merge_grid(t: Tokens, keep: int, side: int | None = None, **_: Any) -> Reduced:
    assert t.grid is not None and side is not None
    cells = side
    return mapped(t, over_space(t.grid, lambda n: adaptive(n, cells)))


def _unshuffle_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert grid is not None
    factor, layout = parameters["factor"], parameters["layout"]
    if layout == "qwen":
        if (free // math.prod(grid[:-2])) % factor ** 2:
            raise ValueError(f"{free} tokens do not fall into groups of {factor ** 2}, factor={factor}")
    elif len(grid) < 2 or any(n % factor for n in grid[-2:]):
        side = math.gcd(*grid[-2:]) if len(grid) > 1 else 1
        options = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        raise ValueError(f"factor={factor} does not divide the grid {grid}: {options}")
    return free // factor ** 2


def _unshuffle_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    counts: dict[int, dict[str, Any]] = {}
    for factor in range(1, math.isqrt(free) + 1):
        try:
            counts[_unshuffle_count(free, grid, frames, {**parameters, "factor": factor})] = {"factor": factor}
        except ValueError:
            continue
    return counts


@method(
    name="unshuffle", summary="Put factor x factor neighbouring tokens side by side into one that is factor^2 times as wide.",
    mechanism="transformation", modalities=("image", "video"), sites=("out", "projector"), needs=("grid",), represented=False,
    paper="InternVL 1.5, arXiv 2404.16821; Idefics3, arXiv 2408.12637; Qwen2-VL, arXiv 2409.12191",
    limits="What follows must take the wider features: a model trained with it. Protected tokens get zeros behind their features. "
           "qwen expects tokens that come in groups of factor x factor already.",
    parameters=(
        KEEP,
        Parameter("factor", 2, "neighbours along each axis of the grid", least=1),
        Parameter("layout", "internvl", "internvl: pixel unshuffle, second version; idefics: that of Idefics3 and SmolVLM; "
                  "qwen: factor^2 tokens that follow each other", ("internvl", "idefics", "qwen")),
    ),
    widens=lambda parameters: int(parameters["factor"]) ** 2, count=_unshuffle_count, legal_counts=_unshuffle_counts,
)
def _unshuffle(t: Tokens, keep: int, factor: int = 2, layout: str = "internvl", **_: Any) -> Reduced:
    """The two-step reshapes of InternVL (`ps_version` v2) and of Idefics3 come to the same map: rows, columns, channels."""
    assert t.grid is not None
    x, grid = t.tokens[:, t.protected:], t.grid
    count, cells = x.shape[1], factor ** 2
    if layout == "qwen":
        tokens = x.reshape(x.shape[0], count // cells, cells * x.shape[2])
        return pooled(t, tokens, lambda size: size.reshape(size.shape[0], -1, cells).sum(-1, keepdim=True),
                      lambda: torch.arange(count) // cells)
    # Frames lie one below the other: a higher image whose cells never cross two frames.
    tall = (math.prod(grid[:-1]), grid[-1])

    def where() -> Tensor:
        row, column = torch.arange(tall[0]) // factor, torch.arange(tall[1]) // factor
        return (row[:, None] * (tall[1] // factor) + column).flatten()

    return pooled(t, unshuffle(x, tall, factor), lambda size: unshuffle(size, tall, factor).sum(-1, keepdim=True), where)
