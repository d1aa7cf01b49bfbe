"""A compressed program cut in two: what comes before some of its weights matter is run once for each input, and what they change as
often as is wanted, with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgewise.passes.graph import output_nodes, parameters_of, reachable
from edgewise.passes.legalise import is_compression_op, op_name
from edgewise.passes.realisations import REALISATIONS, SCATTER

Values = dict[str, Tensor]


class Rest:
    """Runs a program in two parts. `weights` are the names of its placeholders that may change."""

    def __init__(self, exported: ExportedProgram, output_names: Sequence[str], weights: Sequence[str]) -> None:
        nodes = list(exported.graph.nodes)
        self._constants = {name: tensor.detach() for name, tensor in parameters_of(exported).items()}
        changing = reachable([n for n in nodes if n.name in set(weights)])
        flat = dict(zip(output_names, output_nodes(exported.graph), strict=True))
        self._outputs = {name: node for name, node in flat.items() if isinstance(node, fx.Node) and node in changing}
        self.names = tuple(self._outputs)
        """Of the outputs that the weights change."""
        self._first = [n for n in nodes if n not in changing and n.op != "output"]
        self._second = [n for n in nodes if n in changing and n.op == "call_function"]
        self._border = {n.name for node in self._second for n in node.all_input_nodes if n not in changing}

    def first(self, inputs: Mapping[str, Tensor], also: Sequence[str] = ()) -> Values:
        """What the second part reads of the first, by node, and the values of the nodes in `also`."""
        with torch.no_grad():
            return _run(self._first, {**self._constants, **inputs}, self._border | set(also))

    def second(self, border: Values, weights: Mapping[str, Tensor]) -> Values:
        """The outputs that the weights change, by name; gradients flow to the weights."""
        made = _run(self._second, {**border, **weights}, {node.name for node in self._outputs.values()})
        return {name: made[node.name] for name, node in self._outputs.items()}


def outputs(exported: ExportedProgram, output_names: Sequence[str], inputs: Mapping[str, Tensor]) -> Values:
    """All outputs of a program that are tensors, by name."""
    flat = {k: n for k, n in zip(output_names, output_nodes(exported.graph), strict=True) if isinstance(n, fx.Node)}
    nodes = [n for n in exported.graph.nodes if n.op != "output"]
    constants = {name: tensor.detach() for name, tensor in parameters_of(exported).items()}
    with torch.no_grad():
        made = _run(nodes, {**constants, **inputs}, {n.name for n in flat.values()})
    return {name: made[node.name] for name, node in flat.items()}


def _run(nodes: Sequence[fx.Node], given: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Any]:
    """The values of the `wanted` nodes; every other one is let go when it was used for the last time."""
    values: dict[str, Any] = dict(given)
    last = {n.name: i for i, node in enumerate(nodes) for n in node.all_input_nodes}
    for i, node in enumerate(nodes):
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
            function: Any = REALISATIONS[op_name(node)][SCATTER] if is_compression_op(node) else node.target
            values[node.name] = function(*args, **kwargs)
        for operand in node.all_input_nodes:
            if last[operand.name] == i and operand.name not in wanted:
                values.pop(operand.name, None)
    return {name: values[name] for name in wanted}
