"""Groups: of which tokens of an encoder each token behind its projector is made, and what attention says of those together.

A projector that merges tokens (pixel shuffle, a patch merger, pooling) leaves tokens that no attention ran over. Each is as
important as the tokens it is made of are on average, and its key is the mean of theirs.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgewise.ops.score import attention_rows
from edgewise.passes.anchors import Anchor
from edgewise.passes.graph import ancestors, describe, shape_of
from edgewise.passes.origins import Origins


@dataclass(frozen=True)
class Asked:
    """One attention, and the query rows of it that count: a stretch, and what share each of them has `(R, rows)` in the mean, None
    where they are alike."""

    anchor: Anchor
    rows: slice
    share: Tensor | None


@dataclass(frozen=True)
class Groups:
    """The tokens behind a projector as groups of the encoder's, those of several attentions (of windows, of images) counted one
    behind the other.

    index `(B, N, G)`: the tokens of each group; where it has fewer (`uneven`), the number of all tokens. size `(B, N)`: how many
    it has. none `(B, N)`: which are of no group, as the model adds them (the ends of rows); None if there are no such.
    """

    attentions: tuple[Asked, ...]
    index: Tensor
    size: Tensor
    none: Tensor | None
    uneven: bool
    has_class: bool

    def mean(self, values: Tensor) -> Tensor:
        """The mean over each group `(B, N, ..)` of `values (tokens, ..)`, zero for an empty one."""
        batch, count, most = self.index.shape
        if self.uneven:
            values = torch.cat([values, torch.zeros_like(values[:1])])
        grouped = values.index_select(0, self.index.flatten()).reshape(batch, count, most, *values.shape[1:])
        size = self.size.reshape(batch, count, *[1] * (values.ndim - 1)).to(values.dtype)
        return grouped[:, :, 0] if most == 1 else grouped.sum(dim=2) / size

    def keys(self, given: Mapping[str, Any]) -> Tensor:
        """Keys `(B, N, D)`, averaged over heads and groups."""
        parts = []
        for i, asked in enumerate(self.attentions):
            key = given[f"keys.{i}"]
            key = key.transpose(-1, -2) if asked.anchor.transposed_k else key
            parts.append((key.mean(dim=1) if key.ndim == 4 else key).flatten(0, -2))
        return self.mean(torch.cat(parts))

    def attention(self, given: Mapping[str, Any], rows: slice) -> Tensor:
        """Attention `(B, 1, 1, N)` that each group receives on average, over heads and query rows: from the class token if only the
        first of `rows` is wanted, else from all tokens that are in a group."""
        counts = [shape_of(asked.anchor.k)[asked.anchor.key_axis] for asked in self.attentions]
        parts = []
        for i, (asked, count) in enumerate(zip(self.attentions, counts, strict=True)):
            own = {name: given.get(f"{name}.{i}") for name in ("weights", "q", "k", "mask")}
            received = _received(asked, own, rows == slice(0, 1))
            # In a small window each token is given more of a query's attention than in a large one.
            parts.append((received * (count / max(counts)) if count < max(counts) else received).flatten())
        return self.mean(torch.cat(parts))[:, None, None]


def _received(asked: Asked, given: Mapping[str, Any], of_class: bool) -> Tensor:
    """What the tokens of one attention receive `(R, N)`, on average over heads and the rows asked for, or of the class token."""
    weights, q, k, mask = given["weights"], given["q"], given["k"], given["mask"]
    rows = slice(0, 1) if of_class else asked.rows
    if weights is not None:
        attention = weights[..., rows, :]
    else:
        mask = mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
        if q.ndim != 4:  # heads are among what comes first, each a row of its own
            if mask is not None and mask.ndim > 2:
                mask = mask.expand(*q.shape[:-2], -1, -1).flatten(0, -3)[:, None]
            q, k = q.flatten(0, -3)[:, None], k.flatten(0, -3)[:, None]
        attention = attention_rows(q[:, :, rows], k, asked.anchor.scale, mask)
    attention = (attention.mean(dim=1) if attention.ndim == 4 else attention).flatten(0, -3)
    if of_class or asked.share is None:
        return attention.mean(dim=1)
    return (asked.share.to(attention.dtype)[:, None] @ attention)[:, 0]


def _asked(anchor: Anchor, used: Tensor) -> Asked:
    """Of an attention those query rows `(R, Q)` that are `used`."""
    some = used.any(dim=0).nonzero()
    rows = slice(int(some.min()), int(some.max()) + 1) if len(some) else slice(0, 1)
    used = used[:, rows]
    share = None if bool(used.all()) else used.float() / used.sum(dim=1, keepdim=True).clamp_min(1)
    return Asked(anchor, rows, share)


class Origin:
    """Where the tokens of a value `(B, N, C)` come from: of `anchors` whose tokens attend to one another the last, of all stacks
    that stand side by side.

    `classes`: the attentions in which the first token is a class token.
    """

    def __init__(self, program: ExportedProgram, anchors: Sequence[Anchor], node: fx.Node, classes: Sequence[Anchor] = ()) -> None:
        ahead = ancestors(node)
        own = [a for a in anchors if a.joined in ahead and _queries(a) == shape_of(a.k)[a.key_axis]]
        past = set().union(*(ancestors(a.q) for a in own))
        self.attentions = tuple(a for a in own if a.joined not in past)
        self._program, self.node, self._classes = program, node, classes

    @property
    def groups(self) -> Groups:
        """The tokens as groups of the encoder's, of an origin that is not `refused`."""
        assert isinstance(self._found, Groups), self._found
        return self._found

    @property
    def refused(self) -> str | None:
        """Why the tokens cannot be told apart by what they are made of; None if they can."""
        return None if isinstance(self._found, Groups) else self._found

    @cached_property
    def _found(self) -> Groups | str:
        if not self.attentions:
            return "no attention of the encoder leads to the tokens here"
        if len({(shape_of(a.k)[-2 if a.transposed_k else -1], a in self._classes) for a in self.attentions}) > 1:
            return "the encoders that lead to the tokens here have other keys, or class tokens in some"
        origins = Origins(self._program)
        shapes, start = [], 0
        for anchor in self.attentions:
            *lead, tokens, _ = shape_of(anchor.out)
            if tokens != _queries(anchor):
                return f"{describe(anchor.out)}: it has no dimension that counts tokens before the last"
            lead = [lead[0], 1] if len(lead) == 2 else lead  # a token is one over all heads
            shapes.append((prod(lead), tokens))
            origins.start(anchor.out, torch.arange(start, start + prod(shapes[-1])).reshape(*lead, tokens, 1))
            start += prod(shapes[-1])
        origins.follow(self._program.graph.nodes)
        made = origins.last_axis(self.node)
        alike = _alike(made)
        if alike is not None:
            return alike + (f", mixed by {describe(origins.mixed)}" if origins.mixed is not None else "")
        most = max(len(group) for row in made for group in row)
        index = torch.tensor([[[*group, *[start] * (most - len(group))] for group in row] for row in made])
        size = torch.tensor([[len(group) for group in row] for row in made])
        used = torch.zeros(start + 1, dtype=torch.bool).index_fill(0, index.flatten(), True)
        parts = torch.split(used[:start], [prod(shape) for shape in shapes])
        asked = tuple(_asked(a, part.reshape(s)) for a, part, s in zip(self.attentions, parts, shapes, strict=True))
        empty, has_class = size == 0, all(anchor in self._classes for anchor in self.attentions)
        return Groups(asked, index, size.clamp_min(1), empty if bool(empty.any()) else None, int(size.min()) < most, has_class)


def _alike(made: list[list[tuple[int, ...]]]) -> str | None:
    """Which tokens of a sample are made of the same, if there are any."""
    for row in made:
        known: dict[tuple[int, ...], int] = {}
        for place, group in enumerate(row):
            if group and group in known:
                return f"tokens {known[group]} and {place} are made of the same {len(group)} of the encoder's"
            known[group] = place
    return None


def _queries(anchor: Anchor) -> int:
    return shape_of(anchor.q)[-2]
