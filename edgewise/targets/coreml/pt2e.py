"""Put layers of a program on grids of eight bits by PT2E, torchao's quantisation of captured programs, with a quantizer of our own.

The quantizer says which values are put on a grid: what layers read, with one scale, and their weights, with one for each output.
All is symmetric, as Core ML computes it. Biases, scores, norms, softmax and what compression chooses with are never among them.
PT2E observes, puts `quantize` and `dequantize` into the graph and stores weights in whole numbers. Imports torch and torchao.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e import PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from edgewise.errors import InputError
from edgewise.passes.graph import MADE_BY, user_inputs
from edgewise.passes.layers import layers
from edgewise.targets.coreml.weights import SMALLEST
from edgewise.targets.scales import smoothing

aten = torch.ops.aten

_CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
}
_ANNOTATION = "quantization_annotation"
_LEAST = 2.0**-14
"""Half precision holds no smaller distance of two values with all its digits."""
_MOST = 65504.0
"""The largest number of half precision."""
_ON_GRID = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127}

Smoothings = MutableMapping[tuple[str, ...], np.ndarray]
"""What groups of layers, by their names, are smoothed by."""


@dataclass(frozen=True)
class Value:
    """What layers read: the node, and the axis of its channels."""

    node: str
    axis: int


@dataclass(frozen=True)
class Layer:
    """A node that computes a layer: the layer's name, the node's, and what it reads."""

    name: str
    node: str
    reads: Value


def observe(
    exported: ExportedProgram, feeds: Iterable[Mapping[str, np.ndarray]], input_names: Sequence[str]
) -> dict[Layer, np.ndarray]:
    """The layers of a program, in the order of the graph, and the largest absolute value of each channel `(channels,)` of what
    each reads, over all feeds. Layers whose weights half precision does not hold at 8 bits are not among them. Raises `InputError`
    if it does not hold what one reads, or for weights of another type than float32."""
    module = exported.module(check_guards=False)
    found = _find(module, _weights(exported))
    prepared = prepare_pt2e(module, _Observing(found))
    states = [prepared.get_buffer(name) for name in exported.graph_signature.buffers_to_mutate.values()]
    with torch.no_grad():
        for feed in feeds:
            args, kwargs = _call(exported, [torch.from_numpy(feed[name]) for name in input_names])
            prepared(*args, **kwargs)
            for state in states:  # each sample begins anew; they are those of the program, too
                state.zero_()
    nodes = {node.name: node for node in prepared.graph.nodes}
    largest = {}
    for layer in found:
        seen = prepared.get_submodule(nodes[layer.node].args[0].target)
        largest[layer] = torch.maximum(seen.min_val.abs(), seen.max_val.abs()).numpy()
        if not (largest[layer] <= _MOST).all():  # not a number, too
            raise InputError(f"target coreml: {layer.reads.node} is not finite on the calibration data in half precision")
    return largest


def quantised(exported: ExportedProgram, largest: Mapping[Layer, np.ndarray], known: Smoothings) -> ExportedProgram:
    """The program, called as it was, with these layers computed in eight bits, and their weights stored in them.

    `largest`: see `observe`. `known`: the smoothings that are taken where they are there, and kept. Layers that read one value
    read it smoothed by the same.
    """
    prepared = prepare_pt2e(exported.module(check_guards=False), _Quantising(largest, known))
    for node in prepared.graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                if user.op == "call_module":  # an observer of a weight, whose values are there
                    prepared.get_submodule(user.target)(_attribute(prepared, node))
    converted = convert_pt2e(prepared)
    for node in converted.graph.nodes:
        if MADE_BY in node.meta:  # `custom` is what an export keeps
            node.meta["custom"] = {**node.meta.get("custom", {}), MADE_BY: node.meta[MADE_BY]}
    zeros = [torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype) for node in user_inputs(exported)]
    args, kwargs = _call(exported, zeros)
    made = torch.export.export(converted, args, kwargs, strict=False)
    for node in made.graph.nodes:
        if MADE_BY in node.meta.get("custom", {}):
            node.meta[MADE_BY] = node.meta["custom"][MADE_BY]
    return made


def _call(exported: ExportedProgram, inputs: Sequence[torch.Tensor]) -> Any:
    """The arguments and keywords that a program is called with."""
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    return pytree.tree_unflatten(inputs, signature.in_spec)


def _weights(exported: ExportedProgram) -> dict[str, str]:
    """The names of layers by those of their parameters."""
    names = layers(exported)
    specs = exported.graph_signature.input_specs
    return {str(spec.target): names[spec.arg.name] for spec in specs if spec.arg.name in names}  # type: ignore[union-attr]


def _find(module: GraphModule, weights: Mapping[str, str]) -> list[Layer]:
    found = []
    for node in module.graph.nodes:
        if node.target is not aten.linear.default and node.target not in _CONVOLUTIONS:
            continue
        source, weight = node.args[:2]
        if weight.op == "get_attr" and weight.target in weights and weight.meta["val"].numel() >= SMALLEST:
            value = _attribute(module, weight).detach()
            if value.dtype != torch.float32:
                kind = str(value.dtype).removeprefix("torch.")
                raise InputError(f"target coreml: {weights[weight.target]} is of {kind}, and w8a8 is for float32: model.float()")
            if not _held(value.numpy()):
                continue
            rank = source.meta["val"].ndim
            axis = rank - 1 if node.target is aten.linear.default else rank - weight.meta["val"].ndim + 1
            found.append(Layer(weights[weight.target], node.name, Value(source.name, axis)))
    return found


def _held(weight: np.ndarray) -> bool:
    """Whether half precision holds a weight, and the steps of 8 bits for each of its outputs to a hundredth."""
    steps = np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127
    return bool((np.abs(weight) <= _MOST).all() and (np.abs(steps.astype(np.float16) - steps) <= steps / 100).all())


def _attribute(module: GraphModule, node: Node) -> torch.Tensor:
    value = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor)
    return value


class _Observing(Quantizer):  # type: ignore[misc]
    """Has the channels of what layers read observed."""

    def __init__(self, found: Collection[Layer]) -> None:
        super().__init__()
        self._found = {layer.node: layer for layer in found}

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.name in self._found:
                node.meta[_ANNOTATION] = self._annotation(self._found[node.name], node)
        return model

    def _annotation(self, layer: Layer, node: Node) -> Any:
        return QuantizationAnnotation({node.args[0]: _by_channel(layer.reads.axis)}, _annotated=True)

    def validate(self, model: GraphModule) -> None:
        pass


def _by_channel(axis: int) -> Any:
    observer = PerChannelMinMaxObserver.with_args(eps=2.0**-24)  # the smallest half
    return QuantizationSpec(torch.int8, observer, -127, 127, torch.per_channel_symmetric, axis)


class _Quantising(_Observing):
    """Has layers computed in eight bits, with outliers of what linear layers read smoothed into their weights."""

    def __init__(self, largest: Mapping[Layer, np.ndarray], known: Smoothings) -> None:
        super().__init__(largest)
        self._largest, self._known = largest, known
        self._steps: dict[Value, float] = {}

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        groups: dict[Value, list[Layer]] = {}
        for layer in self._found.values():
            groups.setdefault(layer.reads, []).append(layer)
        nodes = {node.name: node for node in model.graph.nodes}
        for number, (value, group) in enumerate(groups.items()):
            readers = [nodes[layer.node] for layer in group]
            largest = self._largest[group[0]]
            if all(node.target is aten.linear.default for node in readers):
                largest = self._smooth(model, f"smoothing_{number}", group, readers, largest)
            # As it will be stored, so that the program is what the package computes.
            self._steps[value] = float(np.float16(max(largest.max() / 127, _LEAST)))
        model.graph.lint()
        model.recompile()
        return model

    def _smooth(
        self, model: GraphModule, name: str, group: Sequence[Layer], readers: Sequence[Node], largest: np.ndarray
    ) -> np.ndarray:
        """Let linear layers read a value that is multiplied by a factor for each channel, and their weights be divided by it; gives
        the largest values of the channels then."""
        weights = {node.args[1]: _attribute(model, node.args[1]).detach().numpy() for node in readers}  # type: ignore[arg-type]
        key = tuple(layer.name for layer in group)
        if key not in self._known:
            self._known[key] = smoothing(largest, list(weights.values()))
        factor = (1 / self._known[key]).astype(np.float16).astype(np.float32)
        made = {node: weight / factor for node, weight in weights.items()}
        if not all(map(_held, made.values())):
            return largest
        (source,) = {node.args[0] for node in readers}
        with model.graph.inserting_before(readers[0]):
            smoothed = model.graph.call_function(aten.mul.Tensor, (source, _constant(model, name, factor)))
            smoothed.meta["val"] = source.meta["val"]  # type: ignore[union-attr]
            for number, (node, weight) in enumerate(made.items()):
                new = _constant(model, f"{name}_weight_{number}", weight)
                for reader in readers:
                    if reader.args[1] is node:
                        reader.args = (smoothed, new, *reader.args[2:])
        return largest * factor

    def _annotation(self, layer: Layer, node: Node) -> Any:
        step = self._steps[layer.reads]
        reads = FixedQParamsQuantizationSpec(scale=step, zero_point=0, qscheme=torch.per_tensor_symmetric, **_ON_GRID)
        return QuantizationAnnotation({node.args[0]: reads, node.args[1]: _by_channel(0)}, _annotated=True)


def _constant(model: GraphModule, name: str, value: np.ndarray) -> Node:
    """A node for a constant of the program, where the graph's nodes are being inserted."""
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    model.register_buffer(name, tensor)
    node = model.graph.get_attr(name)
    node.meta["val"] = tensor
    return node
