"""Say the same with fewer nodes and bytes: casts that change nothing, reshapes to the same shape, transpositions that are one,
masks of ones and zeros in single precision."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgewise.targets.tensorrt.retype import constant, is_constant
from edgewise.targets.tensorrt.views import merge_views, static_shape


def tidy(model: ir.Model) -> None:
    """Tidy a model in place. Every value must have a type, and the shapes that are known must be static."""
    for rewrite in (_cast_likes, _triangles, _kept_dimensions, _no_ops, _swaps, _transposes, _no_ops):
        for node in list(model.graph):
            rewrite(model.graph, node)
        common.RemoveUnusedNodesPass()(model)
    merge_views(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.NameFixPass()(model)
    common.RemoveUnusedNodesPass()(model)


def store_masks(model: ir.Model) -> None:
    """Store large masks of ones and zeros in booleans, a byte for each number, in front of a Cast, where they are a part of the
    file that counts."""
    masks = [value for value in model.graph.initializers.values() if _is_mask(value)]
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(value.const_value.nbytes for value in masks if value.const_value is not None) > MASKS_FROM * sum(sizes):
        for value in masks:
            _store_mask(model.graph, value)


def _cast_likes(graph: ir.Graph, node: ir.Node) -> None:
    """CastLike to the type that is asked for: at once if it is of a constant."""
    if node.op_type != "CastLike":
        return
    value, like = node.inputs
    assert value is not None and like is not None and like.dtype is not None
    if value.dtype != like.dtype and is_constant(value):
        assert value.const_value is not None
        array = value.const_value.numpy().astype(like.dtype.numpy())
        _replace(node.outputs[0], constant(graph, f"{node.outputs[0].name}.value", array, like.dtype))
    else:
        cast = ir.node("Cast", [value], attributes={"to": int(like.dtype)}, name=node.name)
        cast.metadata_props.update(node.metadata_props)
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(like.dtype), value.shape
        graph.insert_before(node, cast)
        _replace(node.outputs[0], cast.outputs[0])


MASKS_FROM = 0.01
"""The part of a file's weights from which on masks are stored in booleans."""
_LARGE = 1024


def _triangles(graph: ir.Graph, node: ir.Node) -> None:
    """The triangle of a constant, which the exporter leaves to the runtime where it is large: a constant."""
    if node.op_type != "Trilu" or not all(value is not None and is_constant(value) for value in node.inputs):
        return
    matrix, *above = (value.const_value.numpy() for value in node.inputs if value is not None and value.const_value is not None)
    upper = node.attributes.get_int("upper", 1)
    array = (np.triu if upper else np.tril)(matrix, int(above[0]) if above else 0)
    made = node.outputs[0]
    assert made.dtype is not None
    _replace(made, constant(graph, f"{made.name}.value", array, made.dtype))


def _kept_dimensions(graph: ir.Graph, node: ir.Node) -> None:
    """A reduction that loses a dimension, which comes back at once: a reduction that keeps it."""
    reduced = node.inputs[0].producer() if node.op_type == "Unsqueeze" and node.inputs[0] is not None else None
    if reduced is None or reduced.op_type not in _REDUCTIONS or len(reduced.outputs[0].uses()) != 1:
        return
    before, after = static_shape(reduced.inputs[0]), static_shape(node.outputs[0])
    axes = reduced.inputs[1] if len(reduced.inputs) > 1 else None
    if before is None or after is None or axes is None or axes.const_value is None or reduced.outputs[0].is_graph_output():
        return
    gone = {int(axis) % len(before) for axis in axes.const_value.numpy().reshape(-1)}
    kept = tuple(1 if axis in gone else size for axis, size in enumerate(before))
    if reduced.attributes.get_int("keepdims", 1) == 0 and after == kept:
        reduced.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
        reduced.outputs[0].shape = ir.Shape(kept)
        _replace(node.outputs[0], reduced.outputs[0])


_REDUCTIONS = frozenset({"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"})


def _is_mask(value: ir.Value) -> bool:
    if value.dtype != ir.DataType.FLOAT or value.const_value is None or value.is_graph_output():
        return False
    array = value.const_value.numpy().reshape(-1)
    return array.size >= _LARGE and all(bool(((part == 0) | (part == 1)).all()) for part in (array[:_LARGE], array))


def _store_mask(graph: ir.Graph, value: ir.Value) -> None:
    assert value.const_value is not None
    stored = constant(graph, f"{value.name}.mask", value.const_value.numpy().astype(np.bool_), ir.DataType.BOOL)
    cast = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.cast")
    cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
    users = [user for user, _ in value.uses()]
    # Users may be in the body of a loop, too.
    first = next((node for node in graph if node in users), graph[0])
    cast.metadata_props.update(first.metadata_props)
    graph.insert_before(first, cast)
    value.replace_all_uses_with(cast.outputs[0])
    graph.initializers.pop(value.name or "")


def _no_ops(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0] if node.inputs else None
    if source is None or node.outputs[0].is_graph_output():
        return
    same_type = node.op_type == "Cast" and source.dtype == node.outputs[0].dtype
    shape = static_shape(source)
    same_shape = node.op_type in ("Reshape", "Expand") and shape is not None and shape == static_shape(node.outputs[0])
    if same_type or same_shape or node.op_type == "Identity":
        _replace(node.outputs[0], source)


def _swaps(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape to three dimensions, swap the last two, reshape back: a Transpose. Torch's exporter writes K so."""
    if node.op_type != "Reshape":
        return
    swap = _producer(node, "Transpose")
    merge = _producer(swap, "Reshape") if swap is not None else None
    if swap is None or merge is None or _perm(swap) != (0, 2, 1):
        return
    source = merge.inputs[0]
    before, middle, after = static_shape(source), static_shape(merge.outputs[0]), static_shape(node.outputs[0])
    if before is None or middle is None or after is None or len(before) < 3 or before[-2:] != middle[-2:]:
        return
    if after == (*before[:-2], before[-1], before[-2]):
        rank = len(before)
        _transpose(graph, node, source, (*range(rank - 2), rank - 1, rank - 2))


def _transposes(graph: ir.Graph, node: ir.Node) -> None:
    """Two transpositions in a row."""
    first = _producer(node, "Transpose") if node.op_type == "Transpose" else None
    if first is not None:
        inner, outer = _perm(first), _perm(node)
        if inner is not None and outer is not None:
            _transpose(graph, node, first.inputs[0], tuple(inner[axis] for axis in outer))


def _transpose(graph: ir.Graph, node: ir.Node, source: ir.Value | None, perm: tuple[int, ...]) -> None:
    made = ir.node("Transpose", [source], attributes={"perm": list(perm)}, name=node.name)
    made.metadata_props.update(node.metadata_props)
    made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, made)
    _replace(node.outputs[0], made.outputs[0])


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Let all users of a value use another, which takes over its name if it is an output of the model."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}.before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _producer(node: ir.Node, op: str) -> ir.Node | None:
    made = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return made if made is not None and made.op_type == op else None


def _perm(node: ir.Node) -> tuple[int, ...] | None:
    attribute = node.attributes.get("perm")
    return tuple(attribute.as_ints()) if attribute is not None else None
