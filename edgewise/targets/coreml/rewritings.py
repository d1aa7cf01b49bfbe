"""The rewritings of ops that coremltools' frontend misreads, or reads in one of their forms only.

Each takes an op's arguments, nodes for tensors and defaults filled in, and gives what computes the same. Imports torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from edgewise.passes.graph import shape_of
from edgewise.passes.realisations import cast, descending_rank

aten = torch.ops.aten

Made = Callable[..., Any] | None
"""What computes the same from the tensors among an op's arguments, in their order; None: the node stays as it is."""


def _gelu(value: Node, approximate: str) -> Made:
    if approximate == "none":
        return None
    # In the form that coremltools fuses into one op again, with the right mode.
    scale = math.sqrt(2 / math.pi)
    return lambda x: x * (((x + x.pow(3.0) * 0.044715) * scale).tanh() + 1.0).mul(0.5)


def _scaled(combine: Callable[[Any, Any], Any]) -> Callable[..., Made]:
    """Sums of which one part is multiplied by `alpha`."""

    def rewrite(value: Any, other: Any, alpha: float = 1) -> Made:
        if alpha == 1:
            return None
        if not isinstance(other, Node):
            return lambda x: combine(x, other * alpha)
        if other is value:
            return lambda x: combine(x, x * alpha)
        return lambda x, y: combine(x, y * alpha)

    return rewrite


def _subtract_from(value: Node, other: Any, alpha: float = 1) -> Made:
    if not isinstance(other, Node):
        return lambda x: (x * -alpha) + other
    return (lambda x: x - x * alpha) if other is value else (lambda x, y: y - x * alpha)


def _reciprocal(value: Node) -> Made:
    # Not 1 / x, which torch takes for a reciprocal again.
    return lambda x: torch.tensor(1.0) / x


def _rsqrt(value: Node) -> Made:
    return lambda x: torch.tensor(1.0) / x.sqrt()


def _rms_norm(value: Node, shape: list[int], weight: Node | None, epsilon: float | None) -> Made:
    axes = list(range(-len(shape), 0))
    epsilon = torch.finfo(value.meta["val"].dtype).eps if epsilon is None else epsilon

    def norm(x: Tensor, scale: Tensor | None = None) -> Tensor:
        normed = x / ((x * x).mean(axes, keepdim=True) + epsilon).sqrt()
        return normed if scale is None else normed * scale

    return norm


def _attention(
    query: Node,
    key: Node,
    value: Node,
    mask: Node | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    fused: bool = False,
) -> Made:
    """`fused`: it is to be one op, which has no scale but the usual one: another becomes a factor of the queries."""
    width = query.meta["val"].shape[-1]
    groups = query.meta["val"].shape[-3] // key.meta["val"].shape[-3] if grouped else 1
    usual = scale is None or math.isclose(scale, width**-0.5, rel_tol=1e-12)
    if groups == 1 and (scale is None or not (usual or fused)):
        return None
    nodes = list(dict.fromkeys(n for n in (query, key, value, mask) if n is not None))

    def attention(*tensors: Tensor) -> Tensor:
        known = dict(zip(nodes, tensors, strict=True))
        q, k, v = known[query], known[key], known[value]
        if groups > 1:
            k, v = (_repeated(x, groups) for x in (k, v))
        if fused and scale is not None and not usual:
            q = q * (scale * math.sqrt(width))
        return aten.scaled_dot_product_attention.default(
            q, k, v, None if mask is None else known[mask], dropout, causal, **({} if usual or fused else {"scale": scale})
        )

    return attention


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Every head `groups` times, one after the other."""
    *batch, heads, tokens, width = x.shape
    wide = x.unsqueeze(-3).expand(*batch, heads, groups, tokens, width)
    return wide.reshape(*batch, heads * groups, tokens, width)


def _sort(value: Node, stable: bool | None, dim: int = -1, descending: bool = False) -> Made:
    if not stable:
        return None
    return lambda x: _stable_sort(x, dim, descending)


def _stable_sort(x: Tensor, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    """Core ML leaves the order of equal values open, so that places are counted first, of which no two are equal."""
    last = x.ndim - 1
    moved = x.transpose(dim, last)
    flat = moved.reshape(-1, moved.shape[-1])
    if not flat.is_floating_point():
        flat = flat.to(torch.float32)
    place = descending_rank((flat if descending else -flat)[:, :, None])[:, 0]
    order = place.topk(flat.shape[-1], dim=-1, largest=False, sorted=True)[1]
    values = moved.reshape(flat.shape).gather(1, order)
    return tuple(part.reshape(moved.shape).transpose(dim, last) for part in (values, order))  # type: ignore[return-value]


RESHAPES = {
    *(
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.view_as.default,
        aten.reshape_as.default,
    ),
    *(aten.flatten.using_ints, aten.unflatten.int),
}
"""Ops that give other dimensions to the same values in the same order, for the frontend to read as one."""


def _logical(on_truth: Any) -> Callable[..., Made]:
    """Bit by bit is one by one for truth values, the only ones that the frontend does it for."""

    def rewrite(value: Node, *other: Any) -> Made:
        if value.meta["val"].dtype != torch.bool or any(not isinstance(n, Node) for n in other):
            return None
        return lambda *x: on_truth(*(x if len(x) > len(other) else x * 2))

    return rewrite


def _along(value: Node, index: Node, dim: int | None) -> Made:
    def along(x: Tensor, i: Tensor) -> Tensor:
        if dim is None:
            return x.reshape(-1).gather(0, i.reshape(-1))
        at = dim % x.ndim
        sizes = [max(a, b) for a, b in zip(x.shape, i.shape, strict=True)]
        sizes_x, sizes_i = ([*sizes[:at], one.shape[at], *sizes[at + 1 :]] for one in (x, i))
        return x.expand(sizes_x).gather(at, i.expand(sizes_i))

    return along


def _as_numbers(op: Any) -> Callable[..., Made]:
    """Choices of rows of truth values: Core ML gathers numbers alone."""

    def rewrite(value: Node, dim: int, index: Node, *_: Any) -> Made:
        if value.meta["val"].dtype != torch.bool:
            return None
        return lambda x, i: op(x.to(torch.int32), dim, i).to(torch.bool)

    return rewrite


def _softplus(value: Node, beta: float, threshold: float) -> Made:
    if threshold >= 20:  # where both are the same to single precision
        return None
    return lambda x: torch.where(x * beta > threshold, x, aten.softplus.default(x, beta))


def _cosine(first: Node, second: Node, dim: int, epsilon: float) -> Made:
    def norm(x: Tensor) -> Tensor:
        return (x * x).sum(dim, keepdim=True).sqrt().clamp_min(epsilon)

    shape = torch.Size(np.broadcast_shapes(shape_of(first), shape_of(second)))

    def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
        # Norms and `dim` are those of the common shape.
        x, y = (one if one.shape == shape else one.expand(shape) for one in (x, x if y is None else y))
        return ((x / norm(x)) * (y / norm(y))).sum(dim)

    return cosine


def _chunk(value: Node, chunks: int, dim: int) -> Made:
    sizes = [len(part) for part in torch.arange(value.meta["val"].shape[dim]).chunk(chunks)]
    return lambda x: aten.split_with_sizes.default(x, sizes, dim)


def _joined(op: Any) -> Callable[..., Made]:
    """Joined tensors of several types have the widest of them, and not that of the first."""

    def rewrite(parts: list[Node], dim: int) -> Made:
        types = [part.meta["val"].dtype for part in parts]
        if len(set(types)) == 1:
            return None
        widest = functools.reduce(torch.promote_types, types)
        order = list(dict.fromkeys(parts))
        return lambda *x: op([cast(x[order.index(part)], widest) for part in parts], dim)

    return rewrite


def _full_like(number: float | None) -> Callable[..., Made]:
    """Tensors of one number, of the shape of another and a type of their own."""

    def rewrite(value: Node, *rest: Any) -> Made:
        *given, dtype, _, _, _, _ = rest
        like = value.meta["val"]
        fill = given[0] if number is None else number
        return lambda _: torch.full(like.shape, fill, dtype=dtype or like.dtype)

    return rewrite


def _new(number: float | None) -> Callable[..., Made]:
    """Tensors of one number, of a shape of their own and, without a type of their own, the type of another."""

    def rewrite(value: Node, size: list[int], *rest: Any) -> Made:
        *given, dtype, _, _, _ = rest
        fill = given[0] if number is None else number
        return lambda x: torch.full(size, fill, dtype=dtype or x.dtype)

    return rewrite


def _over_all(op: Any) -> Callable[..., Made]:
    """The place of an extreme among all values, and not along the last dimension."""

    def rewrite(value: Node, dim: int | None, keepdim: bool) -> Made:
        shape = (1,) * value.meta["val"].ndim if keepdim else ()
        return None if dim is not None else lambda x: op(x.reshape(-1), 0).reshape(shape)

    return rewrite


def _bounded(op: Any) -> Callable[..., Made]:
    """A bound of the type of what it bounds."""

    def rewrite(value: Node, bound: Any) -> Made:
        if isinstance(bound, int) and value.meta["val"].is_floating_point():
            return lambda x: op(x, float(bound))
        return None

    return rewrite


def _clamp(value: Node, least: Any, most: Any) -> Made:
    """Bounds of whole numbers: the frontend has a clamp of floating-point numbers only, and gives such numbers back."""
    # A bound that is no whole number, an infinite one included, makes floating-point numbers of all, as the frontend does.
    if value.meta["val"].is_floating_point() or any(isinstance(bound, float) for bound in (least, most)):
        return None

    def bounded(x: Tensor) -> Tensor:
        for bound, op in ((least, torch.maximum), (most, torch.minimum)):  # in this order: where they cross, `most` holds
            x = x if bound is None else op(x, torch.tensor(bound, dtype=x.dtype))
        return x

    return bounded


def _in_another_type(op: Any) -> Callable[..., Made]:
    """Reductions whose keyword `dtype` says in which type they are done."""

    def rewrite(value: Node, *rest: Any) -> Made:
        *others, dtype = rest
        return None if dtype is None else lambda x: op(x.to(dtype), *others)

    return rewrite


REWRITES: dict[Any, Callable[..., Made]] = {
    aten.bitwise_and.Tensor: _logical(aten.logical_and.default),
    aten.bitwise_or.Tensor: _logical(aten.logical_or.default),
    aten.bitwise_xor.Tensor: _logical(aten.logical_xor.default),
    aten.bitwise_not.default: _logical(aten.logical_not.default),
    aten.gelu.default: _gelu,
    aten.add.Tensor: _scaled(lambda x, y: x + y),
    aten.add.Scalar: _scaled(lambda x, y: x + y),
    aten.sub.Tensor: _scaled(lambda x, y: x - y),
    aten.sub.Scalar: _scaled(lambda x, y: x - y),
    aten.rsub.Tensor: _subtract_from,
    aten.rsub.Scalar: _subtract_from,
    aten.reciprocal.default: _reciprocal,
    aten.rsqrt.default: _rsqrt,
    aten.scaled_dot_product_attention.default: _attention,
    aten.rms_norm.default: _rms_norm,
    aten.sort.stable: _sort,
    aten.zeros_like.default: _full_like(0),
    aten.ones_like.default: _full_like(1),
    aten.full_like.default: _full_like(None),
    aten.new_zeros.default: _new(0),
    aten.new_ones.default: _new(1),
    aten.new_full.default: _new(None),
    aten.argmax.default: _over_all(aten.argmax.default),
    aten.argmin.default: _over_all(aten.argmin.default),
    aten.softplus.default: _softplus,
    aten.cosine_similarity.default: _cosine,
    aten.mT.default: lambda value: lambda x: x.transpose(-1, -2),
    aten.chunk.default: _chunk,
    aten.cat.default: _joined(aten.cat.default),
    aten.stack.default: _joined(aten.stack.default),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _bounded(aten.clamp_min.default),
    aten.clamp_max.default: _bounded(aten.clamp_max.default),
    aten.take_along_dim.default: _along,
    aten.index_select.default: _as_numbers(aten.index_select.default),
    aten.gather.default: _as_numbers(aten.gather.default),
    **{
        op: _in_another_type(op)
        for op in (
            *(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum.default),
            *(aten.prod.default, aten.prod.dim_int, aten.linalg_vector_norm.default),
        )
    },
}

FUSED: dict[Any, Callable[..., Made]] = {
    **REWRITES,
    aten.scaled_dot_product_attention.default: functools.partial(_attention, fused=True),
}
"""The same for systems that have attention as one op."""
