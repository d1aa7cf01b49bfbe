"""Quantise an ONNX model with QuantizeLinear and DequantizeLinear: the inputs of its layers, and nothing else.

The node of a layer bears its name (see `edgewise.passes.layers`). Everything is symmetric: weights with a scale for each output (at
four bits: for each block of inputs), activations with one scale. Biases, scores, norms, softmax and what compression chooses with
stay in floating point. The form is the one that ONNX Runtime fuses and that TensorRT reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from edgewise.targets.base import LAYER, layer_of
from edgewise.targets.scales import smoothing

if TYPE_CHECKING:
    from edgewise.targets.onnx.lower import Weights

_FOUR_BITS = 21  # the first opset with whole numbers of four bits
_ZERO = "edgewise.zero"


@dataclass(frozen=True)
class Layer:
    """A node that computes a layer: its inputs, and which axes of the weight count the outputs and the inputs."""

    name: str
    node: str
    op: str
    source: str
    weight: str
    outputs: int
    inputs: int


@dataclass(frozen=True)
class Form:
    """What a runtime takes at four bits. `blocks`: inputs that share a scale, the first size that divides the inputs of a layer;
    `mixed`: layers without such a size, convolutions among them, are stored in eight bits."""

    blocks: tuple[int, ...] = (32, 16)
    mixed: bool = True

    def block(self, weight: np.ndarray, layer: Layer, bits: int) -> int:
        """Inputs of a layer that share a scale; 0: all."""
        if bits != 4 or weight.ndim != 2:
            return 0
        return next((n for n in self.blocks if weight.shape[layer.inputs] % n == 0), 0)

    def takes(self, weight: np.ndarray, layer: Layer, bits: int) -> bool:
        """Whether the layer can be quantised."""
        return self.mixed or bits != 4 or self.block(weight, layer, bits) > 0


FORM = Form()


def find_layers(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> list[Layer]:
    """The layers of a model, in the order of its nodes."""
    found = []
    for node in model.graph.node:
        name = layer_of(node.name)
        if name is None or node.input[1] not in weights:
            continue
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        outputs, inputs = (0, 1) if node.op_type == "Conv" or turned else (1, 0)
        found.append(Layer(name, node.name, node.op_type, node.input[0], node.input[1], outputs, inputs))
    return found


class Ranges:
    """The largest absolute value of each channel of the inputs of layers, over all that was seen."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._axis = {layer.source: 1 if layer.op == "Conv" else -1 for layer in layers}
        self.largest: dict[str, np.ndarray] = {}

    @property
    def names(self) -> list[str]:
        """The values to be looked at."""
        return list(self._axis)

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        for name, axis in self._axis.items():
            value = np.abs(np.moveaxis(values[name], axis, -1)).reshape(-1, values[name].shape[axis]).max(0)
            self.largest[name] = np.maximum(self.largest[name], value) if name in self.largest else value


def factors(layers: Iterable[Layer], weights: Mapping[str, np.ndarray], shared: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each source of linear layers is multiplied by, by ranges of all models that share their weights: of all layers that read
    it, whichever of them are quantised."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.source, []).append(layer)
    known = {
        source: np.max([shared[one.name] for one in group], axis=0).astype(np.float32)
        for source, group in groups.items()
        if all(one.name in shared for one in group)
    }
    return {source: _factor(groups[source], weights, largest) for source, largest in known.items()}


def _factor(group: Sequence[Layer], weights: Mapping[str, np.ndarray], largest: np.ndarray) -> np.ndarray:
    """What smooths a source whose channels have these largest values: ones, unless all that read it are linear layers."""
    if any(layer.op == "Conv" for layer in group):
        return np.ones_like(largest)
    matrices = [np.moveaxis(weights[one.weight], one.outputs, 0).astype(np.float32) for one in group]
    factor = 1 / smoothing(largest, matrices)
    return factor.astype(weights[group[0].weight].dtype).astype(np.float32)  # what it is rounded to is undone by the weights


def quantised(
    model: onnx.ModelProto,
    weights: Weights,
    layers: Collection[Layer],
    bits: int,
    ranges: Mapping[str, np.ndarray] | None = None,
    form: Form = FORM,
    factors: Mapping[str, np.ndarray] | None = None,
) -> tuple[onnx.ModelProto, Weights]:
    """A copy of a model with the weights of `layers` quantised to `bits`, and, with `ranges`, their activations to 8. `factors`:
    what each source is multiplied by to smooth it (see `factors`), where that does not follow from the ranges.

    Scales have the type of the weights, which is that of the layer's values in a model that is strongly typed.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    change = _Change(made, dict(weights), form)
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.source, []).append(layer)
    for source, group in groups.items():
        if ranges is not None:
            change.smooth(source, group, ranges[source], None if factors is None else factors.get(source))
        for layer in group:
            change.weight(layer, bits)
    return change.finish()


class _Change:
    """What is added to a model: nodes in front of others, and weights in the place of others."""

    def __init__(self, model: onnx.ModelProto, weights: Weights, form: Form) -> None:
        self.model, self.weights, self.form = model, weights, form
        self.nodes = {node.name: node for node in model.graph.node}
        self._made_by = {output: node for node in model.graph.node for output in node.output}
        self._reads = Counter(_read(model.graph))
        self._added: dict[str, list[onnx.NodeProto]] = {}  # by the node that they go in front of
        self._smoothed: dict[str, np.ndarray] = {}
        self._four_bits = False

    def smooth(self, source: str, group: list[Layer], largest: np.ndarray, factor: np.ndarray | None) -> None:
        """Let a group of layers read the source in 8 bits, its channels scaled by `factor`, or so that none needs a much wider
        range than others."""
        kind = self.weights[group[0].weight].dtype
        largest = largest.astype(np.float32)
        if factor is None:
            factor = _factor(group, self.weights, largest)
        first, smoothed = group[0], source
        if not (factor == 1).all():
            if not self._scale_norm(source, group, factor):
                by = self._constant(f"{source}.smooth", factor.astype(kind))
                smoothed = self._node(first, "Mul", [source, by], f"{source}.smoothed")
            for layer in group:
                shape = [-1 if axis == layer.inputs else 1 for axis in range(2)]
                self._smoothed[layer.node] = self.weights[layer.weight] / factor.reshape(shape)
        step = _step((largest * factor).max(), 127, kind)
        zero, one = self._constant(_ZERO, np.int8(0)), self._constant(f"{source}.scale", step)
        code = self._node(first, "QuantizeLinear", [smoothed, one, zero], f"{source}.int8")
        value = self._node(first, "DequantizeLinear", [code, one, zero], f"{source}.quantised")
        for layer in group:
            self.nodes[layer.node].input[0] = value

    def _scale_norm(self, source: str, group: list[Layer], factor: np.ndarray) -> bool:
        """Let the norm that makes a source scale it, if nobody else reads it. Gives whether it does."""
        node, reads = self._made_by.get(source), len(group)
        if node is not None and node.op_type == "Cast" and self._reads[source] == reads:
            source, reads = node.input[0], 1
            node = self._made_by.get(source)
        if node is None or node.op_type != "LayerNormalization" or self._reads[source] != reads:
            return False
        if not all(name in self.weights and self.weights[name].shape == factor.shape for name in node.input[1:]):
            return False
        for place, name in enumerate(node.input[1:], 1):
            # Other norms may have the same weights.
            scaled = (self.weights[name] * factor).astype(self.weights[name].dtype)
            node.input[place] = self._constant(f"{source}.norm.{place}", scaled)
        return True

    def weight(self, layer: Layer, bits: int) -> None:
        """Store the weight of a layer in whole numbers."""
        kind = self.weights[layer.weight].dtype
        weight = self._smoothed.get(layer.node, self.weights[layer.weight]).astype(np.float32)
        name = f"quantised/{layer.node.removeprefix(LAYER)}"  # which is not the name of a layer
        block = self.form.block(weight, layer, bits)
        if block:
            self._four_bits = True
            code, scale = _blocks(weight, layer.inputs, block, kind)
            self.model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT4, code.shape, code.ravel()))
            axis, options = layer.inputs, {"block_size": block}
        else:
            rest = tuple(axis for axis in range(weight.ndim) if axis != layer.outputs)
            scale = _step(np.abs(weight).max(rest), 127, kind)
            shape = [-1 if axis == layer.outputs else 1 for axis in range(weight.ndim)]
            self.weights[name] = _code(weight, scale.reshape(shape), 127)
            axis, options = layer.outputs, {}
        inputs = [name, self._constant(f"{name}.scale", scale)]
        self.nodes[layer.node].input[1] = self._node(layer, "DequantizeLinear", inputs, f"{name}.value", axis=axis, **options)

    def finish(self) -> tuple[onnx.ModelProto, Weights]:
        """The changed model, without the weights that nothing uses any more."""
        nodes = [one for node in self.model.graph.node for one in (*self._added.get(node.name, ()), node)]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        if self._four_bits:
            for opset in self.model.opset_import:
                if opset.domain == "":
                    opset.version = max(opset.version, _FOUR_BITS)
            self.model.ir_version = max(self.model.ir_version, 10)
        used = set(_read(self.model.graph))
        return self.model, {name: array for name, array in self.weights.items() if name in used}

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.weights[name] = np.asarray(value)
        return name

    def _node(self, layer: Layer, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        node = onnx.helper.make_node(op, inputs, [output], name=output, **attributes)
        self._added.setdefault(layer.node, []).append(node)
        return output


def _read(graph: onnx.GraphProto) -> Iterable[str]:
    """The names of all values that nodes of a graph, and of those inside, read."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _read(attribute.g)


def _step(largest: np.ndarray, levels: int, kind: np.dtype) -> np.ndarray:
    """The distance of two values, so that the largest has a code; of nothing but zeros any will do."""
    step = np.where(largest > 0, largest / levels, 1).astype(kind)
    return np.maximum(step, np.finfo(kind).smallest_subnormal)


def _code(weight: np.ndarray, step: np.ndarray, levels: int) -> np.ndarray:
    # Where the type of the steps is coarse, the largest weight may be a little beyond the last code.
    return np.clip(np.rint(weight / step.astype(np.float32)), -levels, levels).astype(np.int8)


def _blocks(weight: np.ndarray, axis: int, block: int, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in whole numbers of -7 to 7, and a scale for each block along an axis."""
    rows = np.moveaxis(weight, axis, 0)
    parts = rows.reshape(-1, block, rows.shape[1])
    scale = _step(np.abs(parts).max(1), 7, kind)
    code = _code(parts, scale[:, None], 7).reshape(rows.shape)
    return np.moveaxis(code, 0, axis), np.ascontiguousarray(np.moveaxis(scale, 0, axis))
