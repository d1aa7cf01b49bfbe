"""Where the tokens of a stream come from: constant leading tokens (class, registers), and the grid they lay on."""
from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import fx

from edgewise.passes.anchors import elementwise
from edgewise.passes.graph import shape_of

aten = torch.ops.aten

_FEATURE_OPS = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.dropout.default,
                aten.contiguous.default, aten.clone.default, aten.repeat.default}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
                 aten.conv3d.padding}


def constant_prefix(node: fx.Node, axis: int, dependent: set[fx.Node]) -> int:
    """How many leading positions along `axis` hold values that no user input reaches (`dependent`: those it does)."""
    count = shape_of(node)[axis]
    if node not in dependent:
        return count
    if node.target is aten.cat.default and _axis_argument(node, 1) == axis:
        total = 0
        for piece in node.args[0]:  # type: ignore[union-attr]
            own = constant_prefix(piece, axis, dependent)  # type: ignore[arg-type]
            total += own
            if own < shape_of(piece)[axis]:  # type: ignore[arg-type]
                break
        return total
    if node.target is aten.slice.Tensor and _axis_argument(node, 1) == axis:
        source = node.args[0]
        start = node.args[2] if len(node.args) > 2 and isinstance(node.args[2], int) else 0
        start = start if start >= 0 else start + shape_of(source)[axis]  # type: ignore[arg-type]
        return min(count, max(0, constant_prefix(source, axis, dependent) - start))  # type: ignore[arg-type]
    if elementwise(node):
        return min(constant_prefix(operand, own, dependent) if shape_of(operand)[own] == count else 0
                   for operand, own in _broadcast(node, axis) if operand in dependent)
    for source, own in _same_tokens(node, axis):
        return constant_prefix(source, own, dependent)
    return 0


def grid_of(node: fx.Node, axis: int, dependent: set[fx.Node]) -> tuple[int, ...] | None:
    """The shape that the input-dependent positions along `axis` had before they were made one axis.

    `(T,)` for a sequence, `(H, W)` for an image, `(frames, H, W)` for a video; None where unknown.
    """
    if node not in dependent:
        return None
    if node.target is aten.cat.default and _axis_argument(node, 1) == axis:
        pieces = [p for p in node.args[0] if p in dependent  # type: ignore[union-attr]
                  and constant_prefix(p, axis, dependent) < shape_of(p)[axis]]  # type: ignore[arg-type]
        return grid_of(pieces[0], axis, dependent) if len(pieces) == 1 else None  # type: ignore[arg-type]
    if node.target is aten.slice.Tensor and _axis_argument(node, 1) == axis:
        source = node.args[0]
        lost = shape_of(source)[axis] - shape_of(node)[axis]  # type: ignore[arg-type]
        known = constant_prefix(source, axis, dependent) >= lost  # type: ignore[arg-type]
        return grid_of(source, axis, dependent) if known else (shape_of(node)[axis],)  # type: ignore[arg-type]
    if elementwise(node):
        for operand, own in _broadcast(node, axis):
            if operand in dependent and shape_of(operand)[own] == shape_of(node)[axis]:
                return grid_of(operand, own, dependent)
        return None
    if node.target in _CONVOLUTIONS or node.op == "placeholder":
        return (shape_of(node)[axis],)
    if node.target in (aten.flatten.using_ints, aten.reshape.default):
        before = _merged(node, axis)
        if before is not None and len(before) > 1:
            return before
    for source, own in _same_tokens(node, axis):
        return grid_of(source, own, dependent)
    return None


def _same_tokens(node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
    """The operand that has the same tokens, and the dimension that they have there."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return
    rank = len(shape_of(source))
    if node.target in _FEATURE_OPS and axis < len(shape_of(node)) - 1 and rank == len(shape_of(node)):
        if shape_of(source)[axis] == shape_of(node)[axis]:
            yield source, axis
    elif node.target is aten.transpose.int:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        yield source, {a: b, b: a}.get(axis, axis)
    elif node.target is aten.permute.default:
        yield source, int(node.args[1][axis]) % rank  # type: ignore[index, arg-type]
    elif node.target is aten.expand.default:
        own = axis - (len(shape_of(node)) - rank)
        if own >= 0 and shape_of(source)[own] == shape_of(node)[axis]:
            yield source, own
    elif node.target is aten.unsqueeze.default:
        new = _axis_argument(node, 1)
        if axis != new:
            yield source, axis - (axis > new)
    elif node.target in (aten.flatten.using_ints, aten.reshape.default):
        ahead = prod(shape_of(node)[:axis])
        for own in range(rank):
            if prod(shape_of(source)[:own]) == ahead and shape_of(source)[own] == shape_of(node)[axis]:
                yield source, own
                return


def _merged(node: fx.Node, axis: int) -> tuple[int, ...] | None:
    """The input dimensions (ones left out) that a reshape makes into `axis`; None where they do not line up."""
    source, target = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    ahead = prod(target[:axis])
    for start in range(len(source)):
        if prod(source[:start]) == ahead:
            for end in range(start + 1, len(source) + 1):
                if prod(source[start:end]) == target[axis]:
                    return tuple(n for n in source[start:end] if n != 1)
    return None


def _broadcast(node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
    """Tensor operands of an elementwise op, with the dimension that lines up with `axis`."""
    rank = len(shape_of(node))
    for operand in node.all_input_nodes:
        own = axis - (rank - len(shape_of(operand)))
        if own >= 0:
            yield operand, own


def _axis_argument(node: fx.Node, position: int) -> int:
    axis = node.args[position] if len(node.args) > position else 0
    return int(axis) % len(shape_of(node))  # type: ignore[arg-type]
