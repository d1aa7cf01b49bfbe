"""Lay tokens out as the Neural Engine wants them: `(batch, channels, 1, tokens)`, as Apple publishes it (ml-ane-transformers, and
"Deploying Transformers on the Apple Neural Engine", 2022).

Linear layers become convolutions by one, norms go over the axis of channels, and attention is computed head by head, its keys
transposed once. The program's values `(batch, tokens, channels)` are followed through it by what each op does to their axes, so
that views into heads and back cost nothing. What has no such form, and what compression does, stays as it is, with the tokens
laid out anew around it: `Layout.moves` names each place. Imports torch.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgewise.errors import InputError
from edgewise.passes.graph import MADE_BY, describe, shape_of
from edgewise.targets.coreml import layout_math
from edgewise.targets.coreml.laying import HEADS, PLAIN, TOKENS, Image, Laying, Move
from edgewise.targets.coreml.legal import MADE_HERE
from edgewise.targets.rewrite import arguments

aten = torch.ops.aten
_dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default

NAME = "coreml-ane"


@dataclass
class Layout:
    """A program in the layout. `moves`: what is laid out anew, in the order of the graph, but for the keys of each attention."""

    program: ExportedProgram
    moves: list[Move] = field(default_factory=list)

    @property
    def strays(self) -> list[Move]:
        """Moves that neither an input or output, nor a compression, asks for."""
        return [move for move in self.moves if not _of_compression(move.of) and not _of_compression(move.why)
                and move.why.op != "output" and move.of.op != "placeholder"]


def lay_out(exported: ExportedProgram) -> Layout:
    """The program, which `legal` made, in the layout; it is not changed.

    Raises `InputError`, with the node and the reason, where no token goes through a linear layer, and for layers over windows or
    groups of tokens and attention that is not `(batch, heads, tokens, channels)`: those have no published form.
    """
    laying = Laying(exported)
    graph = laying.editor.graph
    for node in list(graph.nodes):
        if node.op not in ("call_function", "output"):
            continue
        ours = _of_compression(node)
        if not ours:
            _refuse(node)
        with graph.inserting_before(node):
            rule = None if ours else _RULES.get(node.target)
            if rule is None or not rule(laying, node):
                laying.take_plain(node)
    if not laying.linear:
        raise InputError(
            f"target {NAME} lays out tokens (batch, tokens, channels), and no linear layer of this program reads such; "
            "use the target coreml"
        )
    return Layout(laying.editor.finish(), laying.moves)


def _refuse(node: Node) -> None:
    if node.target is aten.linear.default and len(shape_of(node.args[0])) > 3:  # type: ignore[arg-type]
        what = "a linear layer over windows or groups of tokens"
    elif node.target is aten.scaled_dot_product_attention.default and any(len(shape_of(one)) != 4 for one in node.args[:3]):  # type: ignore[arg-type]
        what = "attention that is not (batch, heads, tokens, channels)"
    else:
        return
    raise InputError(
        f"target {NAME} cannot lay out this program: {describe(node)} is {what}, which has no published form for the "
        "Neural Engine; use the target coreml"
    )


def _of_compression(node: Node) -> bool:
    return node.meta.get(MADE_BY, MADE_HERE) != MADE_HERE


def _linear(laying: Laying, node: Node) -> bool:
    x, weight, bias = arguments(node)
    if len(shape_of(x)) != 3:
        return False
    image = laying.image(x, node)
    if weight.target is _dequantize:  # a scale for each output, as the kernel has them
        whole, scales, zeros, *how = weight.args
        kernel = laying.call(node, lambda *given: _dequantize(*given, *how), _kernel(laying, whole, node), scales, zeros)
    else:
        kernel = _kernel(laying, weight, node)
    rest = () if bias is None else (bias,)
    laying.linear += 1
    return laying.settle(node, laying.call(node, torch.conv2d, image.node, kernel, *rest))


def _kernel(laying: Laying, weight: Node, node: Node) -> Node:
    """The weight of a linear layer as that of a convolution by one."""
    found = laying.constant(weight, "kernel", lambda w: w[:, :, None, None])
    return laying.call(node, lambda w: w.reshape(*w.shape, 1, 1), weight) if found is None else found


def _norm(laying: Laying, node: Node) -> bool:
    x, shape, weight, bias, epsilon, _ = arguments(node)
    if len(shape_of(x)) != 3 or len(shape) != 1:
        return False
    affine = [laying.constant(one, "channels", lambda w: w[None, :, None, None]) for one in (weight, bias) if one is not None]
    known = [one for one in affine if one is not None]
    if len(known) != len(affine) or (weight is None) != (bias is None):
        return False
    image = laying.image(x, node)
    return laying.settle(node, laying.call(node, lambda *given: layout_math.norm(*given, epsilon=epsilon), image.node, *known))


def _each(laying: Laying, node: Node) -> bool:
    """Ops that treat every number alone: the operands are images of one kind, numbers, or spread over them."""
    operands = list(dict.fromkeys(node.all_input_nodes))
    known = [laying.images[one] for one in operands if one in laying.images and shape_of(one) == shape_of(node)]
    if not known or any((one.parts, one.axes) != (known[0].parts, known[0].axes) for one in known):
        return False
    like, given = known[0], []
    for one in operands:
        image = laying.images.get(one)
        if image is not None and (image.parts, image.axes) == (like.parts, like.axes):
            given.append(image.node)
        elif shape_of(one) == ():
            given.append(one)
        elif like.axes == PLAIN and len(shape_of(one)) == 3:
            given.append(laying.image(one, node).node)
        elif like.axes == PLAIN and (spread := laying.constant(one, "image", layout_math.spread)) is not None:
            given.append(spread)
        else:
            return False

    def again(*tensors: Tensor) -> Any:
        values = dict(zip(operands, tensors, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return laying.settle(node, laying.call(node, again, *given), like)


def _join(laying: Laying, node: Node) -> bool:
    parts, axis = arguments(node)
    if axis % len(shape_of(node)) != 1 or len(shape_of(node)) != 3 or not any(one in laying.images for one in parts):
        return False
    given = [laying.image(one, node).node for one in parts]
    return laying.settle(node, laying.call(node, lambda *x: torch.cat(x, 3), *given))


def _slice(laying: Laying, node: Node) -> bool:
    x, axis, start, end, step = arguments(node)
    image = laying.images.get(x)
    if image is None or image.axes != PLAIN or axis % 3 not in (1, 2):
        return False
    place = 3 if axis % 3 == 1 else 1
    return laying.settle(node, laying.call(node, lambda y: aten.slice.Tensor(y, place, start, end, step), image.node))


def _select(laying: Laying, node: Node) -> bool:
    x, axis, index = arguments(node)
    image = laying.images.get(x)
    if image is None:
        return False
    place = image.axes[axis % len(image.axes)]
    if place == TOKENS and image.axes == PLAIN:
        laying.plains[node] = laying.call(node, lambda y: y[:, :, 0, index], image.node)
        return True
    if place != 0 or len(image.parts) < 2:
        return False
    function, like = _picked(image, index)
    made = laying.call(node, function, image.node)
    return laying.settle(node, made, Image(made, *like))


def _parted(laying: Laying, node: Node) -> bool:
    """Ops that give several values: each is taken of the image where it is used."""
    return all(user.target is operator.getitem and _part(laying, node, user) is not None for user in node.users)


def _item(laying: Laying, node: Node) -> bool:
    several = node.args[0]
    assert isinstance(several, Node)
    made = _part(laying, several, node)
    if made is None:
        return False
    function, like = made
    image = laying.call(node, function, laying.images[several.args[0]].node)  # type: ignore[index]
    return laying.settle(node, image, Image(image, *like))


def _part(laying: Laying, several: Node, item: Node) -> tuple[Any, tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """How one of several parts of a value is taken of its image, with the part's `parts` and `axes`. None: there is no such way."""
    source, index = several.args[0], item.args[1]
    image = laying.images.get(source) if several.target in _SEVERAL else None  # type: ignore[arg-type]
    if image is None:
        return None
    assert isinstance(index, int)
    axis = arguments(several)[1 if several.target is aten.unbind.int else 2]
    place = image.axes[axis % len(image.axes)]
    if several.target is aten.unbind.int:
        return None if place != 0 or len(image.parts) < 2 else _picked(image, index)
    if image.axes != PLAIN or place != 0:
        return None
    widths = [int(value.shape[-1]) for value in several.meta["val"]]
    start = sum(widths[:index])
    end = start + widths[index]
    return (lambda y: aten.slice.Tensor(y, 1, start, end)), ((widths[index],), PLAIN)


def _picked(image: Image, index: int) -> tuple[Any, tuple[tuple[int, ...], tuple[int, ...]]]:
    """How one place of the outermost part of the channels is taken of an image."""
    count, width = image.parts[0], image.node.meta["val"].shape[1] // image.parts[0]
    start = index % count * width
    axes = tuple(one if one < 0 else one - 1 for one in image.axes if one != 0)
    return (lambda y: aten.slice.Tensor(y, 1, start, start + width)), (image.parts[1:], axes)


def _mean(laying: Laying, node: Node) -> bool:
    x, axes, kept, dtype = arguments(node)
    image = laying.images.get(x)
    if image is None or image.axes != PLAIN or dtype is not None or [one % 3 for one in axes or ()] != [1]:
        return False
    if kept:
        return laying.settle(node, laying.call(node, lambda y: y.mean(3, keepdim=True), image.node))
    laying.plains[node] = laying.call(node, lambda y: y.mean(3)[:, :, 0], image.node)
    return True


def _reshape(laying: Laying, node: Node) -> bool:
    x = node.args[0]
    image = laying.images.get(x)  # type: ignore[arg-type]
    if image is None:
        return False
    found = layout_math.reshaped(image.parts, image.axes, shape_of(x), shape_of(node))  # type: ignore[arg-type]
    return found is not None and laying.settle(node, image.node, Image(image.node, *found))


def _permute(laying: Laying, node: Node) -> bool:
    x, *order = arguments(node)
    rank = len(shape_of(node))
    if node.target is aten.permute.default:
        places = [one % rank for one in order[0]]
    else:
        places = list(range(rank))
        a, b = (one % rank for one in order)
        places[a], places[b] = places[b], places[a]
    image = laying.images.get(x)
    if image is not None:
        return laying.settle(node, image.node, Image(image.node, image.parts, tuple(image.axes[one] for one in places)))
    if places == [0, 2, 1] and x.name not in laying.values:
        # Channels first as they are, those of a convolution for example: an image already.
        laid = laying.call(node, lambda y: y[:, :, None, :], laying.plain(x, node))
        laying.plains[node] = node
        laying.take_plain(node)
        return laying.settle(node, laid)
    return False


def _attention(laying: Laying, node: Node) -> bool:
    query, key, value, mask, _, causal, scale, _ = arguments(node)
    heads, width = shape_of(query)[1], shape_of(query)[3]
    if shape_of(key)[1] != heads or shape_of(value)[1] != heads:
        return False
    laid = [laying.image(one, node, HEADS).node for one in (query, key, value)]
    if causal:
        masks = [laying.editor.add_constant(layout_math.causal(shape_of(query)[2], shape_of(key)[2]), "causal")]
    else:
        masks = [] if mask is None else [_mask(laying, mask, node)]
    factor = width**-0.5 if scale is None else scale
    made = laying.call(node, lambda *given: layout_math.attention(*given, heads=heads, scale=factor), *laid, *masks)
    return laying.settle(node, made, Image(made, (heads, shape_of(value)[3]), HEADS))


def _mask(laying: Laying, mask: Node, why: Node) -> Node:
    found = laying.constant(mask, "columns", layout_math.columns)
    if found is None:
        if (mask, "columns") not in laying.made:
            laying.made[mask, "columns"] = laying.call(why, layout_math.columns, laying.plain(mask, why))
            if layout_math.moves_columns(shape_of(mask)):
                laying.moves.append(Move(mask, why))
        found = laying.made[mask, "columns"]
    return found


_ALONE = (
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor),
    *(aten.div.Scalar, aten.neg.default, aten.pow.Tensor_Scalar, aten.sqrt.default, aten.exp.default, aten.clone.default),
    *(aten.gelu.default, aten.relu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.hardswish.default),
    *(aten.elu.default, aten.softplus.default, aten.leaky_relu.default, aten.clamp.default, aten.abs.default, aten.erf.default),
    torch.ops.quantized_decomposed.quantize_per_tensor.default, torch.ops.quantized_decomposed.dequantize_per_tensor.default,
)
_SEVERAL = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_RULES: dict[Any, Any] = {
    operator.getitem: _item,
    **dict.fromkeys(_SEVERAL, _parted),
    aten.linear.default: _linear,
    aten.layer_norm.default: _norm,
    aten.cat.default: _join,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.mean.dim: _mean,
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys(_ALONE, _each),
}
