"""Say the same with fewer nodes: casts that change nothing, reshapes to the same shape, transpositions that are one."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from edgewise.targets.tensorrt.retype import constant, is_constant


def tidy(model: ir.Model) -> None:
    """Tidy a model in place. Every value must have a type, and the shapes that are known must be static."""
    for rewrite in (_cast_likes, _no_ops, _swaps, _transposes, _no_ops):
        for node in list(model.graph):
            rewrite(model.graph, node)
        common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.NameFixPass()(model)


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


def _no_ops(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0] if node.inputs else None
    if source is None or node.outputs[0].is_graph_output():
        return
    same_type = node.op_type == "Cast" and source.dtype == node.outputs[0].dtype
    shape = _static(source)
    same_shape = node.op_type in ("Reshape", "Expand") and shape is not None and shape == _static(node.outputs[0])
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
    before, middle, after = _static(source), _static(merge.outputs[0]), _static(node.outputs[0])
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


def _static(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape.numpy())


