"""The layers of a program that may be quantised: linear layers and convolutions of the model, by the names of their weights."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

aten = torch.ops.aten

# Ops of a layer, and which of their arguments is the weight.
_WEIGHT: dict[object, int] = {
    aten.linear.default: 1,
    aten.addmm.default: 2,
    aten.conv1d.default: 1,
    aten.conv2d.default: 1,
    aten.conv3d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 1,
    aten.conv3d.padding: 1,
    aten.convolution.default: 1,
}
_VIEWS = {aten.t.default, aten.transpose.int, aten.permute.default, aten.detach.default}


def layers(exported: ExportedProgram) -> dict[str, str]:
    """The layers of a program, in the order of the graph: the placeholder of each weight, and the name of the layer, which is
    that of its parameter without `.weight` (`encoder.layer.0.output.dense`).

    What compression inserts has no parameters of the model, and so is never among them; neither are attention's products, norms,
    embeddings, or a weight that is used for anything else than a layer.
    """
    found: dict[str, str] = {}
    weights = {
        spec.arg.name: str(spec.target)  # type: ignore[union-attr]
        for spec in exported.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER
    }
    for node in exported.graph.nodes:
        place = _WEIGHT.get(node.target)
        if place is None or len(node.args) <= place:
            continue
        weight = _source(node.args[place])
        if weight.name in weights and weight.meta["val"].ndim > 1 and _only_layers(weight):
            found[weight.name] = weights[weight.name].removesuffix(".weight")
    return found


def _source(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    while value.target in _VIEWS:
        value = value.args[0]
        assert isinstance(value, fx.Node)
    return value


def _only_layers(weight: fx.Node) -> bool:
    """Whether every product that a weight goes into is that of a layer. A table that is looked up as well is a weight all the
    same."""
    stack, products = [weight], 0
    while stack:
        value = stack.pop()
        for user in value.users:
            if user.target in _VIEWS:
                stack.append(user)
            elif user.target in _WEIGHT and user.args[_WEIGHT[user.target]] is value:
                products += 1
            elif user.target is not aten.embedding.default:
                return False
    return products > 0
