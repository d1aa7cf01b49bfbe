"""Methods: named recipes of the algebra. A new method is one new entry here (or in any module that calls `method`)."""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.match import bipartite_match, max_merges
from edgewise.ops.pool import grid_pool, pooled_grid
from edgewise.ops.reduce import merge, take
from edgewise.ops.score import attention_received
from edgewise.ops.select import top_tokens


@dataclass(frozen=True)
class Tokens:
    """All that a method may look at, at one site.

    tokens `(B, N, C)`; size `(B, N, 1)` or None (one each); keys `(B, N, D)` attention keys averaged over heads;
    `attend(rows)` gives the attention `(B, heads, queries, N)` of a slice of query rows (there may be more of them than
    tokens are left); grid is the shape of the
    tokens after the `protected` leading ones; `has_class` says that token 0 is a class token.
    """

    tokens: Tensor
    size: Tensor | None = None
    keys: Tensor | None = None
    attend: Callable[[slice], Tensor] | None = None
    grid: tuple[int, ...] | None = None
    length: Tensor | None = None
    protected: int = 0
    has_class: bool = False

    @property
    def count(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Reduced:
    """What a method made of one site's tokens. `kept (B, N')` is None where no output is one of the inputs (pooling);
    `assignment (B, N)` says for every input the output it went to, -1 where dropped."""

    tokens: Tensor
    size: Tensor | None
    kept: Tensor | None
    assignment: Callable[[], Tensor]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its default, how text becomes a value, and what it means."""

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Method:
    """A named method. `reduce(tokens, keep, **parameters)` keeps `keep` tokens besides the protected ones."""

    name: str
    summary: str
    mechanism: str
    modalities: tuple[str, ...]
    sites: tuple[str, ...]
    needs: tuple[str, ...]
    paper: str
    limits: str
    reduce: Callable[..., Reduced] = field(repr=False)
    parameters: tuple[Parameter, ...] = ()
    every_block: bool = False
    """The default is a schedule over every block, not one site."""
    merges: bool = False
    """Tokens grow: sizes are tracked, and attention is made proportional to them."""
    keeps_order: bool = True
    legal_counts: Callable[[int, tuple[int, ...] | None], dict[int, dict[str, int]]] | None = field(default=None, repr=False)
    """Where not every count is possible: the legal ones (besides the protected) and the parameters that give them."""


METHODS: dict[str, Method] = {}

KEEP = Parameter("keep", None, "tokens kept besides the protected: a fraction if below 1 (or 1.0), else a count")


def method(**entry: Any) -> Callable[[Callable[..., Reduced]], Callable[..., Reduced]]:
    """Register the decorated function as the `reduce` of a new `Method`."""

    def register(reduce: Callable[..., Reduced]) -> Callable[..., Reduced]:
        METHODS[entry["name"]] = Method(reduce=reduce, **entry)
        return reduce

    return register


def drop(t: Tokens, kept: Tensor) -> Reduced:
    """Reduce by dropping all tokens that are not `kept (B, N')`."""
    size = None if t.size is None else take(t.size, kept, 1, 0)
    return Reduced(take(t.tokens, kept, 1, 0), size, kept, lambda: assign(t.count, kept))


def assign(count: int, kept: Tensor, src: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """The output position of each of `count` input tokens, -1 where dropped."""
    batch, survivors = kept.shape
    assignment = torch.full((batch, count), -1, dtype=torch.int64, device=kept.device)
    assignment.scatter_(1, kept, torch.arange(survivors, device=kept.device).expand(batch, -1))
    return assignment if src is None or into is None else assignment.scatter_(1, src, into)


@method(
    name="tome", summary="Token merging: the most similar pairs become size-weighted means, at every block.",
    mechanism="similarity", modalities=("image", "video", "audio"), sites=("block", "out"), needs=("keys",),
    paper="Token Merging: Your ViT But Faster (ICLR 2023), arXiv 2210.09461", every_block=True, merges=True,
    keeps_order=False,
    limits="At most half of the unprotected tokens go at one site; r beyond that is clipped at later blocks, as published.",
    parameters=(
        KEEP,
        Parameter("r", None, "tokens merged away at every block, or a list [r0,r1,...] with one number for each block"),
        Parameter("schedule", "constant", "how r (or the removal that keep asks for) is spread over the blocks",
                  ("constant", "increasing", "decreasing")),
        Parameter("prop_attn", True, "add log(size) to later attention logits (off for models trained with merging)"),
    ),
)
def _tome(t: Tokens, keep: int, **_: Any) -> Reduced:
    assert t.keys is not None
    kept, src, into = bipartite_match(t.keys, t.count - t.protected - keep, t.protected)
    tokens, size = merge(t.tokens, t.size, kept, src, into)
    return Reduced(tokens, size, kept, lambda: assign(t.count, kept, src, into))


@method(
    name="topk", summary="Keep the tokens that the class token (or all tokens on average) attends to most.",
    mechanism="attention", modalities=("image", "video", "audio"), sites=("block", "out"), needs=("attention",),
    paper="FasterVLM, arXiv 2412.01818; top-K for AST and AudioMAE, arXiv 2504.01690", limits="",
    parameters=(
        KEEP,
        Parameter("score", "auto", "class: the class token's attention; column: mean attention received from all "
                  "unprotected queries; auto: class where there is a class token", ("auto", "class", "column")),
    ),
)
def _topk(t: Tokens, keep: int, score: str = "auto", **_: Any) -> Reduced:
    assert t.attend is not None
    if score == "class" and not t.has_class:
        raise ValueError("score=class needs a class token, and this model has none: use score=column")
    by_class = t.has_class if score == "auto" else score == "class"
    rows = t.attend(slice(0, 1) if by_class else slice(t.protected, None))
    received = attention_received(rows)
    if t.length is not None:
        padding = torch.arange(t.count, device=received.device) >= t.length.reshape(-1, 1)
        received = received.masked_fill(padding, -torch.inf)
    return drop(t, top_tokens(received, keep, t.protected))


@method(
    name="random", summary="Keep tokens at random: the baseline that every method must beat at equal count.",
    mechanism="baseline", modalities=("image", "video", "audio"), sites=("block", "out"), needs=(),
    paper="", limits="The choice is a constant of the graph: the same tokens for every input.",
    parameters=(KEEP, Parameter("seed", 0, "seed of the choice")),
)
def _random(t: Tokens, keep: int, seed: int = 0, **_: Any) -> Reduced:
    if not 1 <= keep <= t.count - t.protected:
        raise ValueError(f"keep={keep} is out of range: 1 to {t.count - t.protected}")
    free = sorted(random.Random(seed).sample(range(t.protected, t.count), keep))
    kept = torch.tensor([[*range(t.protected), *free]], device=t.tokens.device)
    return drop(t, kept.expand(t.tokens.shape[0], -1))


def _pool_counts(count: int, grid: tuple[int, ...] | None) -> dict[int, dict[str, int]]:
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


def max_keep(entry: Method, count: int, protected: int) -> tuple[int, int]:
    """Least and most tokens (besides the protected) that `entry` can leave at one site of `count` tokens."""
    free = count - protected
    return (free - max_merges(count, protected) if entry.merges else 1), free
