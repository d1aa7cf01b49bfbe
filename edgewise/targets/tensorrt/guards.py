"""Attention whose mask leaves a query no key gives zeros. Torch's exporter wants to say so between softmax and product, where it
keeps TensorRT-RTX 1.7 from building the attention in half precision (and is wrong: no score is infinite there). Say it behind the
product, and only where it may be so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgewise.targets.tensorrt.retype import constant, is_constant


def move_guards(model: ir.Model) -> None:
    """Rewrite `Where(IsNaN(softmax), 0, softmax) @ values` in place. Every value must have a type and a shape."""
    for node in list(model.graph):
        if node.op_type == "Where":
            _move(model.graph, node)


def _move(graph: ir.Graph, where: ir.Node) -> None:
    test, zero, softmax = where.inputs
    asked, made = _producer(test, "IsNaN"), _producer(softmax, "Softmax")
    scores = _producer(made.inputs[0], "Add") if made is not None else None
    users = [user for user, _ in where.outputs[0].uses()]
    if asked is None or made is None or scores is None or asked.inputs[0] is not softmax or not _is_zero(zero):
        return
    if [user.op_type for user in users] != ["MatMul"] or users[0].inputs[0] is not where.outputs[0]:
        return
    mask = scores.inputs[1]
    product = users[0]
    if mask is None or softmax is None or mask.shape is None or len(mask.shape) < 2:
        return
    assert mask.dtype is not None
    # The exporter writes masks of booleans so, as zeros and the lowest number.
    lowest = np.array(np.finfo(mask.dtype.numpy()).min, mask.dtype.numpy())
    shape = ir.Shape([*mask.shape[:-1], 1])
    added = []
    if is_constant(mask):
        assert mask.const_value is not None
        rows = np.asarray((mask.const_value.numpy() <= lowest).all(-1, keepdims=True))
        if not rows.any():
            where.outputs[0].replace_all_uses_with(softmax)
            return
        empty = constant(graph, f"{where.name}.empty", rows, ir.DataType.BOOL)
    else:
        axes = constant(graph, f"{where.name}.axes", np.array([-1], np.int64), ir.DataType.INT64)
        least = constant(graph, f"{where.name}.least", lowest, mask.dtype)
        most = _node("ReduceMax", [mask, axes], f"{where.name}.most", mask.dtype, shape, keepdims=1)
        added = [most, _node("LessOrEqual", [most.outputs[0], least], f"{where.name}.empty", ir.DataType.BOOL, shape)]
        empty = added[-1].outputs[0]
    result = product.outputs[0]
    guarded = _node("Where", [empty, zero, result], f"{where.name}.guarded", result.dtype, result.shape)
    for node in (*added, guarded):
        node.metadata_props.update(where.metadata_props)
    where.outputs[0].replace_all_uses_with(softmax)
    graph.insert_after(product, [*added, guarded])
    if result.is_graph_output():
        guarded.outputs[0].name, result.name = result.name, f"{result.name}.unguarded"
    result.replace_all_uses_with(guarded.outputs[0], replace_graph_outputs=True)
    guarded.replace_input_with(2, result)


def _node(
    op: str, inputs: list[ir.Value | None], name: str, dtype: ir.DataType | None, shape: ir.Shape | None, **attributes: int
) -> ir.Node:
    node = ir.node(op, inputs, attributes=attributes, name=name)
    made = node.outputs[0]
    assert dtype is not None
    made.name, made.type, made.shape = name, ir.TensorType(dtype), shape
    return node


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def _is_zero(value: ir.Value | None) -> bool:
    return value is not None and is_constant(value) and value.const_value is not None and not value.const_value.numpy().any()
