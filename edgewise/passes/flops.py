"""Floating-point operations of a program, by node and by part. A multiply and an add count as two."""
from __future__ import annotations

from math import prod

import torch
from torch import fx
from torch.export import ExportedProgram

from edgewise.passes.analysis import Analysis
from edgewise.passes.graph import shape_of

aten = torch.ops.aten

_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
                 aten.conv3d.padding, aten.convolution.default}


def node_flops(node: fx.Node) -> int:
    """What one node costs: matrix products, convolutions and attention; elementwise work is not counted."""
    if node.op != "call_function":
        return 0
    out = shape_of(node)
    shapes = [shape_of(a) if isinstance(a, fx.Node) else () for a in node.args]
    if node.target is aten.linear.default:
        return 2 * prod(out) * shapes[0][-1]
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return 2 * prod(out) * shapes[0][-1]
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return 2 * prod(out) * shapes[1][-1]
    if node.target in _CONVOLUTIONS:
        return 2 * prod(out) * prod(shapes[1][1:])
    if node.target is aten.scaled_dot_product_attention.default:
        query, key = shapes[0], shapes[1]
        return 2 * prod(query[:-1]) * key[-2] * (query[-1] + out[-1])
    if node.target is torch.ops.edgewise.bipartite_match.default:
        batch, count, width = shapes[0]
        return 2 * batch * ((count + 1) // 2) * (count // 2) * width
    return 0


def total_flops(program: ExportedProgram) -> int:
    """FLOPs of one run of a program."""
    return sum(node_flops(n) for n in program.graph.nodes)


def flops_by_part(program: ExportedProgram, analysis: Analysis) -> dict[str, int]:
    """FLOPs by part of the uncompressed program: before the blocks, each block's attention and MLP, after them.

    Parts are told apart by the graph alone: a block's attention ends where its output joins the residual stream.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    ends: list[tuple[int, str]] = []
    for stream in analysis.streams:
        ends.append((order.get(stream.root, 0), f"{stream.name}.embed"))
        for place, following in zip(stream.blocks, [*stream.blocks[1:], None], strict=False):
            ends.append((order[place.node], f"{place.name}.attention"))
            if following is not None and following.anchor.residual in order:
                ends.append((order[following.anchor.residual], f"{place.name}.mlp"))
            elif stream.out is not None:
                ends.append((order[stream.out.node], f"{place.name}.mlp"))
    ends.sort()
    parts: dict[str, int] = {}
    for node in program.graph.nodes:
        name = next((name for end, name in ends if order[node] <= end), "head")
        parts[name] = parts.get(name, 0) + node_flops(node)
    return {name: flops for name, flops in parts.items() if flops}
