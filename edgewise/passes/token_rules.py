"""Rules for the token axis: what each op may do with it, and how literals that bear sizes follow it.

Shapes alone do not tell whether an op still means the same after tokens were dropped or merged. So an op may touch a
token axis only where a rule here says how:

- elementwise ops, and `ANY`: tokens are a batch, a reduction over all of them, or a contraction over equal counts;
- `OTHER_AXES`: allowed on every axis but the token axis (a cumulative sum or a split over channels);
- a literal rule (`LITERALS`): the op has sizes or positions among its arguments.

Everything else is refused by name.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
import torch

from edgewise.passes.symbolic import Abstract, SampleCount, Size, simplify

aten = torch.ops.aten


class NoRule(Exception):
    """An op does something with the token axis that has no meaning after compression. The message says what."""


@dataclass(frozen=True)
class Rewrite:
    """New arguments of a node (sizes may be sympy expressions), and how many leading and last tokens it reads by position."""

    args: tuple[Any, ...]
    protected: int = 0
    trailing: int = 0


ANY = {
    aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default, aten.baddbmm.default,
    aten.scaled_dot_product_attention.default, aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default,
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.mean.dim, aten.mean.default, aten.sum.dim_IntList,
    aten.sum.default, aten.amax.default, aten.amin.default, aten.var.correction, aten.var.dim, aten.std.correction,
    aten.var_mean.correction, aten.linalg_vector_norm.default, aten.logsumexp.default, aten.max.default, aten.min.default,
    aten.norm.ScalarOpt_dim, aten.any.dim, aten.all.dim,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default, aten.movedim.int, aten.swapaxes.default, aten.adjoint.default, aten.mT.default, aten.repeat.default,
    aten.cat.default, aten.stack.default, aten.contiguous.default, aten.clone.default, aten.dropout.default,
    aten.embedding.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.batch_norm.default,
    aten.flatten.using_ints, aten.expand_as.default, aten.broadcast_tensors.default,
}
OTHER_AXES = {
    aten.cumsum.default, aten.flip.default, aten.sort.default, aten.topk.default, aten.argmax.default, aten.argmin.default,
    aten.argsort.default, aten.max.dim, aten.min.dim, aten.chunk.default, aten.split.Tensor, aten.unbind.int,
    aten.glu.default, aten.roll.default, aten.gather.default, aten.index_select.default, aten.cosine_similarity.default,
    aten.repeat_interleave.self_int, aten.narrow.default, aten.unflatten.int, aten.split_with_sizes.default,
}
CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3,
                aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3}
ROUTABLE_OPERANDS = {aten.scaled_dot_product_attention.default: {3}, aten.baddbmm.default: {0}}
"""Operands that may be a side value in an op that is not elementwise: the mask, or the bias of the logits."""


def symbolic_axes(value: Any) -> list[int]:
    """Dimensions of an abstract value that hold a token count."""
    return [d for d, n in enumerate(value.shape) if isinstance(n, sympy.Expr)] if isinstance(value, Abstract) else []


def rewrite(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Sequence[Any], after: Sequence[int],
            hint: Callable[[Size], int]) -> Rewrite:
    """Arguments of an op on values with token counts, with its literals made to follow.

    `before` are the static shapes of the operands in `args` (None where no tensor) and `after` that of the result, as
    captured. Raises NoRule.
    """
    if target in LITERALS:
        return LITERALS[target](args, before, after, hint)
    if (isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags) or target in ANY:
        return Rewrite(args)
    if target in OTHER_AXES:
        _check_other_axes(target, args, kwargs)
        return Rewrite(args)
    if target in CONVOLUTIONS:
        _check_convolution(args, CONVOLUTIONS[target])
        return Rewrite(args)
    if target is aten.index.Tensor:
        _check_index(args)
        return Rewrite(args)
    if target in (aten.pad.default, aten.constant_pad_nd.default):
        _check_padding(args)
        return Rewrite(args)
    raise NoRule("there is no rule for this op on the token axis")


def _check_other_axes(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip((a.name for a in target._schema.arguments), args, strict=False)) | kwargs
    source = next(a for a in args if isinstance(a, Abstract))
    defaults = {a.name: a.default_value for a in target._schema.arguments}
    axis = next((given.get(name, defaults.get(name)) for name in ("dim", "dims", "axis") if name in defaults), None)
    rank = len(source.shape)
    if axis is None:
        raise NoRule("it runs over all values of the tensor in order, and tokens have no fixed order after compression")
    axes = [axis] if isinstance(axis, int) else list(axis)
    touched = {a % rank for a in axes} & set(symbolic_axes(source))
    if touched:
        raise NoRule(f"it works along the token axis (dimension {min(touched)}), where positions change under compression")


def _check_padding(args: tuple[Any, ...]) -> None:
    x, widths = args[0], args[1]
    rank = len(x.shape)
    padded = {rank - 1 - i // 2 for i, width in enumerate(widths) if width != 0}
    if padded & set(symbolic_axes(x)):
        raise NoRule("it adds positions along the token axis (to whole windows, or for a shift), and compression changes positions")


def _check_convolution(args: tuple[Any, ...], spatial: int) -> None:
    x, weight = args[0], args[1]
    first = len(x.shape) - spatial
    for axis in symbolic_axes(x):
        if axis >= first and weight.shape[2 + axis - first] != 1:
            raise NoRule("it convolves along the token axis: after compression, neighbours are no longer neighbours")


def _check_index(args: tuple[Any, ...]) -> None:
    x, indices = args[0], args[1]
    for axis, index in enumerate(indices):
        if index is not None and axis in symbolic_axes(x):
            raise NoRule("it selects tokens by indices that were made for the uncompressed tokens")


def _reshape(args: tuple[Any, ...], before: Sequence[Any], after: Sequence[int], hint: Callable[[Size], int]) -> Rewrite:
    source: Abstract = args[0]
    return Rewrite((source, match_factors(source.shape, before[0], after, hint), *args[2:]))


def match_factors(symbolic: Sequence[Size], static: Sequence[int], target: Sequence[int],
                  hint: Callable[[Size], int]) -> list[Size]:
    """The sizes of a reshape's result: input and output dimensions are matched by factor groups from the left.

    >>> t = sympy.Symbol("t")
    >>> match_factors((1, t, 32), (1, 17, 32), (1, 17, 2, 16), lambda n: 17)
    [1, t, 2, 16]
    """
    result: list[Size] = list(target)
    i = j = 0
    while i < len(static) or j < len(target):
        i0, j0 = i, j
        left = right = 1
        if i < len(static):
            left, i = static[i], i + 1
        if j < len(target):
            right, j = target[j], j + 1
        while left != right:
            if left < right and i < len(static):
                left, i = left * static[i], i + 1
            elif right < left and j < len(target):
                right, j = right * target[j], j + 1
            elif i < len(static):
                left, i = left * static[i], i + 1
            else:
                right, j = right * target[j], j + 1
        group = symbolic[i0:i]
        if not any(isinstance(n, sympy.Expr) for n in group):
            continue
        total = simplify(prod(sympy.sympify(n) for n in group))
        spots = [d for d in range(j0, j) if target[d] != 1]
        if len(spots) == 1:
            result[spots[0]] = total
            continue
        result[j0:j] = _split(total, group, list(target[j0:j]), hint)
    return result


def _split(total: Size, group: Sequence[Size], target: list[int], hint: Callable[[Size], int]) -> list[Size]:
    """A group of input dimensions that becomes several output dimensions: exactly one of them holds the tokens."""
    tokens = [n for n in group if isinstance(n, sympy.Expr)]
    if len(group) == 1 and len(tokens) == 1:
        # A product such as 4 * T (batch and tokens made one) may come apart again; T alone may not be cut.
        options = []
        for d, n in enumerate(target):
            others = prod(target) // n
            quotient = sympy.cancel(total / others)
            if n != 1 and quotient.is_polynomial() and all(c.is_integer for c in sympy.Poly(quotient).coeffs()):
                options.append((d, simplify(quotient)))
    else:
        options = []
        for d, n in enumerate(target):
            quotient = sympy.cancel(total / (prod(target) // n)) if n else None
            if n != 1 and quotient is not None and any(quotient == t for t in tokens):
                options.append((d, quotient))
        # (A, T) -> (a1, a2, T): the tokens stay where they are relative to the other factors.
        where = next(i for i, n in enumerate(group) if isinstance(n, sympy.Expr))
        ahead = prod(hint(n) for n in group[:where])
        options = [(d, q) for d, q in options if prod(target[:d]) == ahead]
        if not options and ahead == 1:
            # (T, a) -> (b * T, a / b): what follows the tokens is cut, and a piece of it is folded into them.
            first = next(d for d, n in enumerate(target) if n != 1)
            quotient = sympy.cancel(total / (prod(target) // target[first]))
            if sympy.cancel(quotient / group[where]).is_Integer:
                options = [(first, simplify(quotient))]
    if len(options) > 1 and all(isinstance(s, SampleCount) for s in total.free_symbols):
        options = sorted(options, key=lambda option: not option[1].is_Symbol)[:1]
    if len(options) != 1:
        sizes = " x ".join(map(str, target))
        reason = "splits the tokens into a grid of" if not options else "could mean two different things for"
        raise NoRule(f"the reshape {reason} {sizes}: after compression the tokens no longer form it")
    spot, quotient = options[0]
    return [quotient if d == spot else n for d, n in enumerate(target)]


def _expand(args: tuple[Any, ...], before: Sequence[Any], after: Sequence[int], hint: Callable[[Size], int]) -> Rewrite:
    source: Abstract = args[0]
    lead = len(after) - len(source.shape)
    sizes: list[Size] = list(after)
    for axis in symbolic_axes(source):
        sizes[lead + axis] = source.shape[axis]
    return Rewrite((source, sizes, *args[2:]))


def _select(args: tuple[Any, ...], before: Sequence[Any], after: Sequence[int], hint: Callable[[Size], int]) -> Rewrite:
    source, axis, index = args
    if axis % len(source.shape) not in symbolic_axes(source):
        return Rewrite(args)
    return Rewrite(args, trailing=-index) if index < 0 else Rewrite(args, protected=index + 1)


def _slice(args: tuple[Any, ...], before: Sequence[Any], after: Sequence[int], hint: Callable[[Size], int]) -> Rewrite:
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    source, axis, start, end, step = args + defaults[len(args) :]
    axis %= len(source.shape)
    if axis not in symbolic_axes(source):
        return Rewrite(args)
    count = before[0][axis]
    start, end = 0 if start is None else start, count if end is None else end
    if step != 1:
        raise NoRule(f"it takes every {step}th token")
    if start < 0 and end >= count:
        return Rewrite((source, axis, start, torch.iinfo(torch.int64).max), trailing=-start)
    if start < 0 or end < 0:
        raise NoRule("it cuts the tokens at a position counted from the end, which changes under compression")
    if end >= count:
        return Rewrite((source, axis, start, torch.iinfo(torch.int64).max), protected=start)
    return Rewrite((source, axis, start, end), protected=end)


def _split_sizes(args: tuple[Any, ...], before: Sequence[Any], after: Sequence[int], hint: Callable[[Size], int]) -> Rewrite:
    source, sizes, axis = (*args, 0)[:3]
    axis %= len(source.shape)
    if axis not in symbolic_axes(source):
        return Rewrite(args)
    lead = sum(sizes[:-1])
    return Rewrite((source, [*sizes[:-1], source.shape[axis] - lead], axis), protected=lead)


def _unflatten(args: tuple[Any, ...], before: Sequence[Any], after: Sequence[int], hint: Callable[[Size], int]) -> Rewrite:
    source, axis, sizes = args
    axis %= len(source.shape)
    if axis not in symbolic_axes(source):
        return Rewrite(args)
    inner = list(after[axis:axis + len(sizes)])
    return Rewrite((source, axis, match_factors((source.shape[axis],), (before[0][axis],), inner, hint)))


LITERALS: dict[Any, Callable[[tuple[Any, ...], Sequence[Any], Sequence[int], Callable[[Size], int]], Rewrite]] = {
    aten.reshape.default: _reshape, aten.view.default: _reshape, aten.expand.default: _expand, aten.select.int: _select,
    aten.slice.Tensor: _slice, aten.split_with_sizes.default: _split_sizes, aten.unflatten.int: _unflatten,
}
