"""Turn an exported program into the graph that OpenVINO's PyTorch frontend reads.

OpenVINO's own `convert_model` runs torch's decompositions over the program first, which traces it again and
takes most of the time (ViT-B/16: 6.8 s, against 0.4 s for the rewriting here). Few composite ops stand in the
way of reading a program as it is; they are rewritten in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from edgewise.targets.rewrite import arguments, become, shorten_sorts, simplify

aten = torch.ops.aten


def readable(exported: torch.export.ExportedProgram) -> GraphModule:
    """A copy of the program's graph with only simple ops in it, which shares the weights.

    The program must not write in place.
    """
    module = unlifted(exported)
    simplify(module.graph)
    shorten_sorts(module.graph)  # `lower` reads a topk as a stable one
    for node in list(module.graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            rewrite(module.graph, node)
    return module


def unlifted(exported: torch.export.ExportedProgram) -> GraphModule:
    """The program's graph with its weights as attributes, and only the user's inputs as inputs.

    What `exported.module()` does, without the code and the checks for calling it, which take longer than reading the graph.
    """
    signature = exported.graph_signature
    weights = {
        spec.arg.name: str(spec.target)
        for spec in signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    root, graph, copies = torch.nn.Module(), Graph(), {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in weights:
            if not node.users:
                continue
            target = weights[node.name]
            tensor = exported.state_dict[target] if target in exported.state_dict else exported.constants[target]
            root.register_buffer(node.name, tensor.detach())
            copies[node] = graph.get_attr(node.name)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(root, graph)


def decomposed(exported: torch.export.ExportedProgram) -> GraphModule:
    """The program's graph after torch's decompositions, for programs that `readable` cannot prepare."""
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
    from torch.export.decomp_utils import CustomDecompTable

    table: dict[Any, Callable[..., Any]] = CustomDecompTable()  # type: ignore[no-untyped-call]
    for op in ops_to_not_decompose():
        if op in table:
            table.pop(op)
    module = exported.run_decompositions(table).module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


def _view(graph: Graph, node: Node) -> None:
    # Values, not strides, count from here on: every reshape is a view.
    become(node, aten.view.default, (node.args[0], list(node.meta["val"].shape)))


def _convolution(graph: Graph, node: Node) -> None:
    value, weight, bias, stride, padding, dilation, groups = arguments(node)
    dimensions = weight.meta["val"].ndim - 2

    def full(sizes: list[int]) -> list[int]:
        return list(sizes) * (dimensions if len(sizes) == 1 else 1)

    output_padding = [0] * dimensions
    args = (value, weight, bias, full(stride), full(padding), full(dilation), False, output_padding, groups)
    become(node, aten.convolution.default, args)


def _layer_norm(graph: Graph, node: Node) -> None:
    value, shape, weight, bias, epsilon, _ = arguments(node)
    with graph.inserting_before(node):
        norm = graph.call_function(aten.native_layer_norm.default, (value, shape, weight, bias, epsilon))
        first = graph.call_function(operator.getitem, (norm, 0))
    first.meta = dict(node.meta)
    node.replace_all_uses_with(first)
    graph.erase_node(node)


def _softmax(graph: Graph, node: Node) -> None:
    value, dimension, dtype = arguments(node)
    if dtype is None or dtype == value.meta["val"].dtype:
        become(node, aten._softmax.default, (value, dimension, False))


def _cast(graph: Graph, node: Node) -> None:
    become(node, aten._to_copy.default, (node.args[0],))
    node.kwargs = {"dtype": node.meta["val"].dtype}


def _expand(graph: Graph, node: Node) -> None:
    become(node, aten.expand.default, (node.args[0], list(node.meta["val"].shape)))


def _matmul(graph: Graph, node: Node) -> None:
    # The frontend's rule for bmm is OpenVINO's MatMul, which broadcasts as matmul does.
    become(node, aten.bmm.default, tuple(node.args))


_REWRITES: dict[Any, Callable[[Graph, Node], None]] = {
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.layer_norm.default: _layer_norm,
    aten.softmax.int: _softmax,
    aten.matmul.default: _matmul,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.expand_as.default: _expand,
}
