"""Rewrite what exporters stumble over in a captured graph: ops that do nothing, and composite ops.

Torch's own way is to trace the whole program again with a table of decompositions. That takes longer than all the
rest of a lowering, so it is done only where a cheap rewriting does not help. Imports torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

aten = torch.ops.aten

# Composite ops that exporters have rules for, and that runtimes run faster whole than in parts.
_WHOLE = {
    aten.linear.default,
    aten.matmul.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.rms_norm.default,
    aten.softmax.int,
    aten.scaled_dot_product_attention.default,
    aten.einsum.default,
    aten.reshape.default,
    aten.flatten.using_ints,
}


def simplify(graph: Graph) -> None:
    """Rewrite, in place, ops that do nothing at inference, and ops that are others by another name."""
    for node in list(graph.nodes):
        rewrite = _SIMPLE.get(node.target)
        if rewrite is not None:
            rewrite(graph, node)


def shorten_sorts(graph: Graph) -> None:
    """Let, in place, a stable sort of which only the first entries are read find no more than these.

    It becomes a `topk`, and that is the same only for a target whose `topk` gives equal values in the order of their indices.
    """
    for node in list(graph.nodes):
        if node.target is not aten.sort.stable:
            continue
        given = dict(zip(("self", "stable", "dim", "descending"), arguments(node), strict=True))
        value, rank = given["self"], given["self"].meta["val"].ndim
        slices = [user for part in node.users for user in part.users]
        if not slices or not all(user.target is aten.slice.Tensor for user in slices):
            continue
        read = {tuple(arguments(user)[1:]) for user in slices}
        dim, start, end, step = read.pop()
        size = value.meta["val"].shape[given["dim"]]
        if read or dim % rank != given["dim"] % rank or start not in (None, 0) or step != 1 or not 0 < (end or 0) < size:
            continue
        with graph.inserting_before(node):
            parts = tuple(torch.narrow(part, dim, 0, end) for part in node.meta["val"])
            first = _insert(graph, aten.topk.default, (value, end, dim, given["descending"], True), parts)
        for part in list(node.users):
            for user in list(part.users):
                become(user, operator.getitem, (first, part.args[1]))
            graph.erase_node(part)
        graph.erase_node(node)


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """The program without composite ops, but for those that exporters have rules for."""
    defaults = torch.export.default_decompositions()
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    table = {
        node.target: defaults[node.target]
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target in defaults
        and node.target not in _WHOLE
        and node.target.has_kernel_for_dispatch_key(composite)
    }
    return exported.run_decompositions(table)


def arguments(node: Node) -> list[Any]:
    """All arguments of a node in the order of its schema, defaults filled in."""
    given = list(node.args)
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return [
        given[index] if index < len(given) else node.kwargs.get(argument.name, argument.default_value)
        for index, argument in enumerate(schema)
    ]


def become(node: Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> None:
    """Make a node call another op."""
    node.target, node.args, node.kwargs = target, args, kwargs


def remove(graph: Graph, node: Node) -> None:
    """Let the users of a node use its first argument."""
    if any(user.op == "output" for user in node.users):
        become(node, aten.clone.default, (node.args[0],))  # the program knows its outputs by their names
        return
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.erase_node(node)


def _dropout(graph: Graph, node: Node) -> None:
    if not arguments(node)[2]:  # not training
        remove(graph, node)


def _cast(graph: Graph, node: Node) -> None:
    dtype = node.meta["val"].dtype
    if node.args[0].meta["val"].dtype == dtype:  # type: ignore[union-attr]
        remove(graph, node)
    else:
        become(node, aten._to_copy.default, (node.args[0],), dtype=dtype)


def _named_padding(graph: Graph, node: Node) -> None:
    value, weight, bias, stride, padding, dilation, groups = arguments(node)
    total = [step * (size - 1) for step, size in zip(dilation, weight.meta["val"].shape[2:], strict=False)]
    if len(dilation) != weight.meta["val"].ndim - 2 or (
        padding == "same" and any(size % 2 for size in total)
    ):
        return  # one padding for all dimensions, or not the same on both sides; torch has to decompose it
    sizes = [0 if padding == "valid" else size // 2 for size in total]
    become(node, _CONVOLUTIONS[node.target], (value, weight, bias, stride, sizes, dilation, groups))


def _bitwise(graph: Graph, node: Node) -> None:
    become(node, _OPERATORS[node.target], tuple(node.args))


def _subtract_from(graph: Graph, node: Node) -> None:
    value, number, alpha = arguments(node)
    if alpha == 1:
        with graph.inserting_before(node):
            negative = _insert(graph, aten.neg.default, (value,), value.meta["val"])
        become(node, aten.add.Scalar, (negative, number))


def _where(graph: Graph, node: Node) -> None:
    condition, *choices = node.args
    result = node.meta["val"]
    with graph.inserting_before(node):
        for index, choice in enumerate(choices):
            if not isinstance(choice, Node):
                number = _insert(graph, aten.full.default, ([], choice), result.new_empty(()))
                number.kwargs = {"dtype": result.dtype}
                choices[index] = number
    become(node, aten.where.self, (condition, *choices))


def _argsort(graph: Graph, node: Node) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, arguments(node), strict=True))
    source = given["self"]
    with graph.inserting_before(node):
        both = _insert(graph, aten.sort.stable, (source,), (source.meta["val"], node.meta["val"]))
    both.kwargs = {"stable": True, "dim": given["dim"], "descending": given["descending"]}
    become(node, operator.getitem, (both, 1))


def _movedim(graph: Graph, node: Node) -> None:
    value, source, destination = arguments(node)
    order = list(range(node.meta["val"].ndim))
    order.insert(destination % len(order), order.pop(source % len(order)))
    become(node, aten.permute.default, (value, order))


def _insert(graph: Graph, target: Any, args: tuple[Any, ...], value: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


_OPERATORS: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
}

_CONVOLUTIONS: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}

_SIMPLE: dict[Any, Callable[[Graph, Node], None]] = {
    aten._assert_tensor_metadata.default: lambda graph, node: graph.erase_node(node),
    aten.contiguous.default: remove,
    aten.dropout.default: _dropout,
    aten.to.device: _cast,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.type_as.default: _cast,
    aten.rsub.Scalar: _subtract_from,
    aten.where.Scalar: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.movedim.int: _movedim,
    aten.argsort.default: _argsort,
    aten.argsort.stable: _argsort,
    **dict.fromkeys(_OPERATORS, _bitwise),
    **dict.fromkeys(_CONVOLUTIONS, _named_padding),
}
