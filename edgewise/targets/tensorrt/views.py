"""Fewer changes of shape: one in the place of several with elementwise ops between them, and none of a constant.

What compression computes with positions goes from `(B, N)` to `(B, N, 1)` and back between products; where B is 1 those are views
of the same numbers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgewise.targets.tensorrt.retype import constant, is_constant

_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Gather"})
_ELEMENTWISE = frozenset(
    {"Cast", "Add", "Sub", "Mul", "Div", "Max", "Min", "Neg", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where",
     "And", "Or", "Not"}
)  # fmt: skip
_MOST = 1 << 20
"""Numbers of the largest constant that is stored a second time, in another shape."""

Shape = tuple[int, ...]


def merge_views(model: ir.Model) -> None:
    """Rewrite a model in place. The shapes that are known must be static."""
    graph = model.graph
    for node in reversed(list(graph)):
        if node.graph is not graph or not _is_view(node) or node.outputs[0].is_graph_output():
            continue
        source, shape = node.inputs[0], static_shape(node.outputs[0])
        assert source is not None and shape is not None
        if is_constant(source) or _ends_in_views(source, shape):
            node.outputs[0].replace_all_uses_with(_in_shape(graph, source, shape))
            graph.remove(node, safe=True)


def static_shape(value: ir.Value | None) -> Shape | None:
    """The sizes of a value; None if they are not all known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape.numpy())


def _is_view(node: ir.Node | None) -> bool:
    """Whether a node gives its operand in a shape that differs in sizes of one alone."""
    if node is None or node.op_type not in _VIEWS:
        return False
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if before is None or after is None or _longer(before) != _longer(after):
        return False
    if node.op_type != "Gather":
        return True
    # One entry of a dimension of one is all of it.
    index = node.inputs[1]
    return index is not None and is_constant(index) and len(after) == len(before) - 1


def _longer(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def _ends_in_views(value: ir.Value, shape: Shape) -> bool:
    """Whether a value can be had in another shape by changing views that are there already."""
    node = value.producer()
    if node is None or len(value.uses()) != 1 or value.is_graph_output():
        return False
    if _is_view(node):
        return True
    known = static_shape(value)
    if node.op_type == "Concat":
        parts = [part for part in node.inputs if part is not None]
        if known is None or _place(known, node.attributes["axis"].as_int(), shape) is None:
            return False
    elif node.op_type in _ELEMENTWISE:
        parts = [part for part in node.inputs if part is not None and not _is_scalar(part)]
        if any(static_shape(part) != known for part in parts):
            return False
    else:
        return False
    found = [part for part in parts if not is_constant(part)]
    small = all(part.const_value is None or part.const_value.size <= _MOST for part in parts)
    return bool(found) and small and all(_ends_in_views(part, shape) for part in found)


def _is_scalar(value: ir.Value) -> bool:
    return is_constant(value) and static_shape(value) == ()


def _place(known: Shape, axis: int, shape: Shape) -> int | None:
    """Which axis of `shape` is `axis` of `known`; None if that is of size one."""
    axis %= len(known)
    if known[axis] == 1:
        return None
    number = len(_longer(known[:axis]))
    return [place for place, size in enumerate(shape) if size != 1][number]


def _in_shape(graph: ir.Graph, value: ir.Value, shape: Shape) -> ir.Value:
    if static_shape(value) == shape:
        return value
    node = value.producer()
    if is_constant(value):
        assert value.const_value is not None and value.dtype is not None
        name = f"{value.name}.{'x'.join(map(str, shape))}"
        known = graph.initializers.get(name)
        return known or constant(graph, name, value.const_value.numpy().reshape(shape), value.dtype)
    assert node is not None
    if _is_view(node):
        source = node.inputs[0]
        assert source is not None
        if is_constant(source) or static_shape(source) == shape:
            return _in_shape(graph, source, shape)
        return _reshape(graph, node, source, shape)
    if node.op_type == "Concat":
        axis, before = node.attributes["axis"].as_int(), static_shape(value)
        assert before is not None
        place = _place(before, axis, shape)
        assert place is not None
        node.attributes["axis"] = ir.AttrInt64("axis", place)
        for i, part in enumerate(node.inputs):
            sizes = static_shape(part)
            assert part is not None and sizes is not None
            node.replace_input_with(i, _in_shape(graph, part, (*shape[:place], sizes[axis], *shape[place + 1 :])))
    else:
        for i, part in enumerate(node.inputs):
            if part is not None and not _is_scalar(part):
                node.replace_input_with(i, _in_shape(graph, part, shape))
    value.shape = ir.Shape(shape)
    return value


def _reshape(graph: ir.Graph, like: ir.Node, source: ir.Value, shape: Shape) -> ir.Value:
    """A Reshape in the place of a view, whose origin it shares."""
    name = f"{like.outputs[0].name}.{'x'.join(map(str, shape))}"
    sizes = constant(graph, f"{name}.sizes", np.array(shape, np.int64), ir.DataType.INT64)
    made = ir.node("Reshape", [source, sizes], name=like.name)
    made.metadata_props.update(like.metadata_props)
    made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = name, like.outputs[0].type, ir.Shape(shape)
    graph.insert_before(like, made)
    return made.outputs[0]
