"""Origins: which tokens of an encoder each element of a value behind it is made of.

Sets of tokens are followed through the graph, element by element: what moves elements (a reshape, a window's order) is run on them
as it is, and what adds elements up (a linear map, a norm, a pooling) joins their sets. An op that has no rule joins all there is.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgewise.passes.anchors import elementwise
from edgewise.passes.graph import parameters_of, shape_of

aten = torch.ops.aten

_MOVES = {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default, aten.slice.Tensor,
    aten.select.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.cat.default,
    aten.stack.default, aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int, aten.repeat.default,
    aten.roll.default, aten.flip.default, aten.movedim.int, aten.narrow.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.expand_as.default, aten.view_as.default,
}
_SAME = {
    aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.alias.default, aten.detach.default, aten.to.dtype,
    aten._to_copy.default,
}
_ALONG = {
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.var.dim,
    aten.linalg_vector_norm.default, aten.softmax.int, aten._softmax.default,
}
_TUPLES = {aten._native_batch_norm_legit_no_training.default, aten.native_dropout.default}
"""The same, first of several results."""
_FILLED = {
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
}
"""Ops that take a shape and no values."""
_PRODUCTS = {aten.matmul.default, aten.mm.default, aten.bmm.default}
_SPACE = {
    aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2, aten.max_pool1d.default: 1, aten.max_pool2d.default: 2,
    aten.upsample_bilinear2d.vec: 2, aten.upsample_bicubic2d.vec: 2, aten.upsample_nearest2d.vec: 2,
    aten.upsample_linear1d.vec: 1, aten.upsample_nearest1d.vec: 1,
}
"""Ops on the last dimensions, how many of them, alike for everything before these."""
_CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_MOST_PLACES = 4096
"""A spatial op over more places than these is taken to join all: its map is looked at place by place."""


class Origins:
    """Sets of tokens, element by element, for the values that follow from some; `mixed` is the first node whose op joined all."""

    def __init__(self, program: ExportedProgram) -> None:
        self.sets: list[tuple[int, ...]] = [()]
        self.mixed: fx.Node | None = None
        self._numbers: dict[tuple[int, ...], int] = {(): 0}
        self._values: dict[fx.Node, Any] = {}
        self._constants: dict[fx.Node, Any] = {}
        self._weights = parameters_of(program)

    def start(self, node: fx.Node, tokens: Tensor) -> None:
        """Say that each element of a value is of one token: `tokens`, numbers that can be expanded to its shape."""
        numbers = {int(n): self._number((int(n),)) for n in tokens.flatten().tolist()}
        ids = torch.tensor([numbers[n] for n in tokens.flatten().tolist()]).reshape(tokens.shape)
        self._values[node] = ids.expand(shape_of(node))

    def follow(self, nodes: Iterable[fx.Node]) -> None:
        """Through `nodes`, in the order of the graph."""
        for node in nodes:
            if node not in self._values and node.op == "call_function" and any(n in self._values for n in node.all_input_nodes):
                self._values[node] = self._made(node)

    def last_axis(self, node: fx.Node) -> list[list[tuple[int, ...]]]:
        """What a value `(B, N, C)` is made of, for every sample and token."""
        return [[self.sets[n] for n in row] for row in self._join(self._values[node]).tolist()]

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._values

    # -- one node

    def _made(self, node: fx.Node) -> Any:
        target, first = node.target, node.args[0]
        if target is operator.getitem:
            return self._values[first][node.args[1]]  # type: ignore[index]
        if target in _FILLED:
            return torch.zeros((), dtype=torch.int64).expand(shape_of(node))
        if target in _MOVES:
            try:
                return target(*self._moved(node.args), **self._moved(node.kwargs))  # type: ignore[operator]
            except KeyError:
                return self._all(node)  # the places are computed from an input
        if target is aten.constant_pad_nd.default or (target is aten.pad.default and node.args[2:3] in ((), ("constant",))):
            return aten.constant_pad_nd(self._values[first], node.args[1], 0)  # type: ignore[index]
        follows = self._values.get(first) if isinstance(first, fx.Node) else None
        alone = sum(n in self._values for n in node.all_input_nodes) == 1
        if elementwise(node) or (target in _SAME and alone and follows is not None):
            parts = [self._values[n] for n in node.all_input_nodes if n in self._values]
            return self._pointwise(parts, shape_of(node))
        if target in _TUPLES and alone and follows is not None:
            return [follows]
        if target is aten.scaled_dot_product_attention.default:
            return self._attention(node)
        if follows is not None and alone:
            if target is aten.batch_norm.default and not node.args[5]:  # not training: channels are scaled by constants
                return follows
            if target is aten.linear.default:
                return self._join(follows)[..., None].expand(shape_of(node))
            if target in (aten.layer_norm.default, aten.rms_norm.default):
                return self._along(follows, range(-len(node.args[1]), 0), True).expand(shape_of(node))  # type: ignore[arg-type]
            if target is aten.glu.default:
                return self._pointwise(follows.chunk(2, node.args[1] if len(node.args) > 1 else -1), shape_of(node))  # type: ignore[arg-type]
            if target in _ALONG:
                return self._reduced(node, follows)
            if target in _SPACE and math.prod(follows.shape[-_SPACE[target]:]) <= _MOST_PLACES:
                spatial = _SPACE[target]
                return self._through(follows, spatial, _places(node, follows.shape[-spatial:]), shape_of(node))
            if target in _CONVOLUTIONS and math.prod(follows.shape[-_CONVOLUTIONS[target]:]) <= _MOST_PLACES:
                spatial = _CONVOLUTIONS[target]
                joined = self._along(follows, [-spatial - 1], True)
                return self._through(joined, spatial, _windows(node, follows.shape[-spatial:]), shape_of(node))
        if target in _PRODUCTS:
            product = self._product(node)
            if product is not None:
                return product
        return self._all(node)

    def _moved(self, args: Any) -> Any:
        """Arguments with sets in place of values, and no token where a value is of none; indices as they are."""
        def operand(n: fx.Node) -> Any:
            if n in self._values:
                return self._values[n]
            if n.meta["val"].is_floating_point():
                return torch.zeros((), dtype=torch.int64).expand(shape_of(n))
            return self._constant(n)

        return fx.node.map_arg(args, operand)

    def _constant(self, node: fx.Node) -> Any:
        if node not in self._constants:
            if node.op == "placeholder":
                self._constants[node] = self._weights[node.name].detach()
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._constant)
                with torch.no_grad():
                    self._constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._constants[node]

    def _pointwise(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        wide = [part.expand(shape) for part in parts]
        if len(wide) == 1:
            return wide[0]
        wide = [_apart(part, [d for d in range(len(shape)) if all(_repeats(w, d) for w in wide)]) for part in wide]
        return self._join(torch.stack(wide, dim=-1)).expand(shape)

    def _along(self, ids: Tensor, dims: Iterable[int], keep: bool) -> Tensor:
        """Join the sets along some dimensions."""
        dims = sorted(d % ids.ndim for d in dims)
        rest = [d for d in range(ids.ndim) if d not in dims]
        joined = self._join(ids.permute(*rest, *dims).flatten(len(rest)) if len(dims) > 1 else ids.movedim(dims[0], -1))
        for d in dims if keep else ():
            joined = joined.unsqueeze(d)
        return joined

    def _reduced(self, node: fx.Node, ids: Tensor) -> Tensor:
        position = 2 if node.target is aten.linalg_vector_norm.default else 1
        given = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
        dims = [given] if isinstance(given, int) else list(given or range(ids.ndim))  # type: ignore[arg-type]
        joined = self._along(ids, dims, True)
        shape = shape_of(node)
        return joined.expand(shape) if len(shape) == ids.ndim else joined.reshape(shape)

    def _through(self, ids: Tensor, spatial: int, sources: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Sets at places `(.., *space)` to those of `sources (places behind, K)`, which are joined; one behind the last place is
        none."""
        lead = ids.shape[:-spatial]
        ids = _apart(ids, [d for d in range(len(lead)) if _repeats(ids, d)])
        ids = ids.flatten(-spatial)
        made = self._join(torch.cat([ids, ids.new_zeros(*ids.shape[:-1], 1)], dim=-1)[..., sources])
        made = made.reshape(*made.shape[:-1], *shape[len(shape) - spatial:])
        return made.expand(shape)

    def _attention(self, node: fx.Node) -> Tensor:
        """Each query's row is made of its own and of all keys and values of the same sample and head."""
        given = dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False)) | dict(node.kwargs)
        sets = {name: self._values[n] for name, n in given.items() if isinstance(n, fx.Node) and n in self._values}
        if "attn_mask" in sets or given.get("enable_gqa"):
            return self._all(node)  # type: ignore[no-any-return]
        parts = [self._join(sets[name])[..., None] for name in ("query",) if name in sets]
        parts += [self._along(sets[name], (-2, -1), True) for name in ("key", "value") if name in sets]
        return self._pointwise(parts, shape_of(node))

    def _product(self, node: fx.Node) -> Tensor | None:
        """A product: joined along the rows of its left side and the columns of its right side; by a constant on the left, as that
        says."""
        left, right = node.args
        shape = shape_of(node)
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        if left in self._values and right in self._values:
            if min(self._values[left].ndim, self._values[right].ndim) < 2:
                return None
            columns = self._join(self._values[right].transpose(-1, -2))[..., None, :]
            return self._pointwise([self._join(self._values[left])[..., None], columns], shape)
        if left in self._values:
            return self._join(self._values[left])[..., None].expand(shape)
        weights = self._known(left)
        if weights is None or weights.ndim != 2 or self._values[right].ndim < 2 or max(weights.shape) > _MOST_PLACES:
            return None
        turned = (*shape[:-2], shape[-1], shape[-2])
        return self._through(self._values[right].transpose(-1, -2), 1, _sources(weights != 0), turned).transpose(-1, -2)

    def _known(self, node: fx.Node) -> Tensor | None:
        """A constant's value; None for what depends on an input."""
        try:
            return self._constant(node)  # type: ignore[no-any-return]
        except KeyError:
            return None

    def _all(self, node: fx.Node) -> Any:
        """All that comes in, for every element."""
        self.mixed = self.mixed or node
        parts = [self._values[n] for n in node.all_input_nodes if n in self._values]
        tensors = [t for part in parts for t in (part if isinstance(part, (list, tuple)) else [part])]
        found = reduce(set.union, ({*self.sets[n]} for t in tensors for n in t.unique().tolist()), set[int]())
        number = torch.tensor(self._number(tuple(sorted(found))))
        made = node.meta["val"]
        return [number.expand(m.shape) for m in made] if isinstance(made, (list, tuple)) else number.expand(made.shape)

    # -- sets

    def _number(self, tokens: tuple[int, ...]) -> int:
        if tokens not in self._numbers:
            self._numbers[tokens] = len(self.sets)
            self.sets.append(tokens)
        return self._numbers[tokens]

    def _join(self, ids: Tensor) -> Tensor:
        """Join sets along the last dimension."""
        shape = ids.shape[:-1]
        ids = _apart(ids, [d for d in range(ids.ndim) if _repeats(ids, d)])
        rows = _distinct(ids.reshape(-1, ids.shape[-1]))
        if rows.shape[1] > 1:
            rows = _distinct(rows.sort(dim=1).values)
            kinds, place = torch.unique(rows, dim=0, return_inverse=True)
            joined = [reduce(set.union, (self.sets[n] for n in kind), set[int]()) for kind in kinds.tolist()]
            rows = torch.tensor([self._number(tuple(sorted(one))) for one in joined])[place][:, None]
        return rows.reshape(ids.shape[:-1]).expand(shape)


def _distinct(rows: Tensor) -> Tensor:
    """Without the columns that are as the one before them."""
    other = (rows[:, 1:] != rows[:, :-1]).any(dim=0)
    return rows[:, torch.cat([torch.ones(1, dtype=torch.bool), other])]


def _repeats(ids: Tensor, dim: int) -> bool:
    """Whether a dimension is one value, repeated."""
    return ids.shape[dim] == 1 or ids.stride(dim) == 0


def _apart(ids: Tensor, dims: Sequence[int]) -> Tensor:
    """One entry of each of some dimensions."""
    for d in dims:
        ids = ids.narrow(d, 0, 1)
    return ids


def _places(node: fx.Node, space: Sequence[int]) -> Tensor:
    """Of which places each place behind a spatial op is made: the op is run on every place alone."""
    call: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    count = math.prod(space)
    return _sources(call(torch.eye(count).reshape(count, 1, *space), *node.args[1:], **node.kwargs).reshape(count, -1).T != 0)


def _windows(node: fx.Node, space: Sequence[int]) -> Tensor:
    """The same for a convolution, whatever its weights are."""
    _, weight, _, stride, padding, dilation = (*node.args, *(None, 1, 0, 1)[max(0, len(node.args) - 2):])[:6]
    count, call = math.prod(space), {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}[len(space)]
    ones = torch.ones(1, 1, *shape_of(weight)[2:])  # type: ignore[arg-type]
    many = [[n] * len(space) if isinstance(n, int) else n for n in (stride, padding, dilation)]
    return _sources(call(torch.eye(count).reshape(count, 1, *space), ones, None, *many).reshape(count, -1).T != 0)


def _sources(touches: Tensor) -> Tensor:
    """The places `(rows, K)` that each row of `touches (rows, places)` is true at; the first again where they are fewer. A row that
    is true nowhere has one behind the last place."""
    most = max(1, int(touches.sum(dim=1).max()))
    order = touches.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    first = torch.where(touches.any(dim=1, keepdim=True), order[:, :1], touches.shape[1])
    return torch.where(touches.gather(1, order), order, first)
