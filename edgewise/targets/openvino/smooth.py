"""Smooth the outliers of activations into weights by ranges of several components, so that equal weights of theirs stay equal.

NNCF smooths each model by statistics of its own, and so two that share weights differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.base import Feeds, Ranges, layer_of
from edgewise.targets.scales import joined, smoothing


def ranges(path: Path, feeds: Feeds) -> Ranges:
    """See `Target.ranges`. The maxima are outputs of the model, small ones, so that no activation leaves it."""
    import openvino
    from openvino import opset13 as opset

    model = openvino.Core().read_model(path)
    named: dict[str, list[str]] = {}
    watched: list[Any] = []
    for group in _groups(model):
        source = group[0].input_value(0)
        axes = np.arange(len(source.get_partial_shape()) - 1)
        result = opset.result(opset.reduce_max(opset.abs(source), axes))
        result.output(0).get_tensor().set_names({f"largest of {len(watched)}"})
        named[f"largest of {len(watched)}"] = [str(layer_of(node.get_friendly_name())) for node in group]
        watched.append(result)
    model.add_results(watched)
    found: dict[str, np.ndarray] = {}
    request = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    for feed in feeds:
        request.infer(feed)
        for output, names in named.items():
            largest = request.get_tensor(output).data.copy()
            if not np.isfinite(largest).all():
                raise InputError(f"target openvino: the input of {names[0]} is not finite on the calibration data")
            found = joined(found, dict.fromkeys(names, largest))
    return found


def smooth(model: Any, known: Ranges) -> None:
    """Divide what layers read by a factor for each channel, and multiply their weights by it, in place."""
    from openvino import opset13 as opset

    for group in list(_groups(model)):
        names = [str(layer_of(node.get_friendly_name())) for node in group]
        if not all(name in known for name in names):
            continue
        weights = [_weight(node) for node in group]
        factor = smoothing(np.max([known[name] for name in names], axis=0), weights)
        if (factor == 1).all():
            continue
        source = group[0].input_value(0)
        scaled = opset.multiply(source, opset.constant((1 / factor).astype(np.float32)))
        scaled.set_friendly_name(f"{group[0].get_friendly_name().partition('/')[2]}/smoothed")
        for node, weight in zip(group, weights, strict=True):
            made = weight * factor
            stored = opset.constant(np.ascontiguousarray(made if _turned(node) else made.T, np.float32))
            stored.set_friendly_name(node.input_value(1).get_node().get_friendly_name() + "/smoothed")
            node.input(0).replace_source_output(scaled.output(0))
            node.input(1).replace_source_output(stored.output(0))


def _groups(model: Any) -> Iterator[list[Any]]:
    """The linear layers of a model, those that read the same value together."""
    groups: dict[tuple[str, int], list[Any]] = {}
    for node in model.get_ordered_ops():
        if layer_of(node.get_friendly_name()) is None or node.get_type_name() != "MatMul":
            continue
        plain = node.input_value(1).get_node().get_type_name() == "Constant" and len(node.input(1).get_shape()) == 2
        if plain and not node.get_attributes()["transpose_a"]:
            source = node.input_value(0)
            groups.setdefault((source.get_node().get_friendly_name(), source.get_index()), []).append(node)
    yield from groups.values()


def _turned(node: Any) -> bool:
    """Whether the weight is `(outputs, inputs)`, and not the other way."""
    return bool(node.get_attributes()["transpose_b"])


def _weight(node: Any) -> np.ndarray:
    """The weight of a linear layer, `(outputs, inputs)`."""
    array: np.ndarray = node.input_value(1).get_node().data.astype(np.float32)
    return array if _turned(node) else array.T
