"""Compute part of an ONNX graph in a narrower type, with an explicit Cast wherever a value goes from one part to the other.

A strongly typed TensorRT network computes every layer in the types of its operands and inserts nothing: what the graph says is
what runs. A rule decides for each node; a value is cast at most once in each direction, and weights are stored in the type that
they are used in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

Kind = Literal["narrow", "wide", "free"]
"""Of an operand: it comes in the narrow or in the wide type, or is to be had in either: a constant, or a cast of a third type."""
Rule = Callable[[ir.Node, list[tuple[ir.Value, Kind]]], bool]
"""Whether a node computes in the narrow type, given its operands of the type in question."""

# Operands that say where or how much; their type is fixed.
_SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Unsqueeze", "Squeeze", "Tile", "Split", "TopK", "CumSum"), (1,)),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"), (1,)),
    **dict.fromkeys(("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"), (1,)),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "ConstantOfShape": (0,),
    "OneHot": (1,),
    "Trilu": (1,),
}


def retype(model: ir.Model, wide: ir.DataType, narrow: ir.DataType, rule: Rule) -> None:
    """Let the nodes that `rule` chooses compute in `narrow` where they computed in `wide`. Inputs and outputs of the model keep
    their types. Every value of the model must have a type."""
    _Retyper(model, wide, narrow, rule).run()
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)


class _Retyper:
    def __init__(self, model: ir.Model, wide: ir.DataType, narrow: ir.DataType, rule: Rule) -> None:
        self.graph, self.wide, self.narrow, self.rule = model.graph, wide, narrow, rule
        self.narrowed: set[ir.Value] = set()
        self.narrow_of: dict[ir.Value, ir.Value] = {}
        self.wide_of: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            self._node(node)
        for index, value in enumerate(self.graph.outputs):
            if value in self.narrowed:
                self.graph.outputs[index] = self._as_output(value)

    def _node(self, node: ir.Node) -> None:
        if has_graphs(node):
            for inner in _inner(node):
                self._keep_wide(inner)
            self._keep_wide(node)
            return
        shapes = _SHAPES.get(node.op_type, ())
        operands = [(i, v) for i, v in enumerate(node.inputs) if v is not None and i not in shapes and self._concerns(v)]
        results = [value for value in node.outputs if value.dtype == self.wide]
        if not operands and not results:
            return
        if not self.rule(node, [(value, self._kind(value)) for _, value in operands]):
            self._keep_wide(node)
        elif node.op_type == "Cast" and not results:
            return  # it takes the type that it gets, and gives a third one
        elif node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(self.narrow))
            self._narrow(results)
        else:
            for i, value in operands:
                node.replace_input_with(i, self._narrow_version(value))
            self._narrow(results)

    def _narrow(self, results: list[ir.Value]) -> None:
        for value in results:
            value.dtype = self.narrow
            self.narrowed.add(value)

    def _concerns(self, value: ir.Value) -> bool:
        return value.dtype == self.wide or value in self.narrowed

    def _kind(self, value: ir.Value) -> Kind:
        if value in self.narrowed:
            return "narrow"
        return "free" if is_constant(value) or self._cast_source(value) is not None else "wide"

    def _cast_source(self, value: ir.Value) -> ir.Value | None:
        """What a value is a cast of, if that is of a third type."""
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
        return None if source is None or self._concerns(source) or source.dtype == self.narrow else source

    def _keep_wide(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            return  # it takes any type
        for i, value in enumerate(node.inputs):
            if value in self.narrowed:
                assert value is not None
                node.replace_input_with(i, self._wide_version(value))

    def _narrow_version(self, value: ir.Value) -> ir.Value:
        if value in self.narrowed:
            return value
        if value not in self.narrow_of:
            if is_constant(value):
                assert value.const_value is not None
                with np.errstate(over="ignore"):
                    array = value.const_value.numpy().astype(self.narrow.numpy())
                made = constant(self.graph, f"{value.name}.{self._suffix}", array, self.narrow)
            else:
                made = self._cast(self._cast_source(value) or value, value, self.narrow, self._suffix)
            self.narrow_of[value] = made
        return self.narrow_of[value]

    def _wide_version(self, value: ir.Value) -> ir.Value:
        if value not in self.wide_of:
            self.wide_of[value] = self._cast(value, value, self.wide, self.wide.name.lower())
        return self.wide_of[value]

    @property
    def _suffix(self) -> str:
        return self.narrow.name.lower()

    def _cast(self, source: ir.Value, like: ir.Value, to: ir.DataType, suffix: str) -> ir.Value:
        """A Cast of `source`, placed behind the node that makes `like`, whose origin it shares."""
        node = ir.node("Cast", [source], attributes={"to": int(to)}, name=f"{like.name}.{suffix}")
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{like.name}.{suffix}", ir.TensorType(to), like.shape
        producer = like.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            node.metadata_props.update(producer.metadata_props)
            self.graph.insert_after(producer, node)
        return made

    def _as_output(self, value: ir.Value) -> ir.Value:
        """The wide version of a narrow value, under the name that the value had."""
        made, name = self._wide_version(value), value.name
        value.name = f"{name}.{self._suffix}"
        made.name = name
        return made


def constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    """A new constant of a graph."""
    made = ir.Value(
        name=name,
        const_value=ir.tensor(array, dtype=dtype, name=name),
        type=ir.TensorType(dtype),
        shape=ir.Shape(array.shape),
    )
    graph.register_initializer(made)
    return made


def is_constant(value: ir.Value) -> bool:
    """Whether a value is a weight or another constant."""
    return value.is_initializer() and value.const_value is not None


def has_graphs(node: ir.Node) -> bool:
    """Whether a node has graphs of its own, as a Loop has."""
    return any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values())


def _inner(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of the graphs of a node, those of inner graphs included."""
    for attribute in node.attributes.values():
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
        for graph in graphs:
            for inner in graph:
                yield inner
                yield from _inner(inner)
