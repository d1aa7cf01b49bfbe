"""The quantiser of all targets whose artifact is an ONNX file; statistics are gathered by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from edgewise.errors import InputError
from edgewise.targets.base import Feeds, Quantiser
from edgewise.targets.base import Ranges as LayerRanges
from edgewise.targets.onnx.lower import Weights, write
from edgewise.targets.onnx.quantise import FORM, Form, Layer, Ranges, factors, find_layers, quantised
from edgewise.targets.scales import joined

Store = Callable[[onnx.ModelProto, Weights], Weights]
"""Changes how a model stores the weights that are not quantised, and gives them."""


@dataclass(frozen=True)
class Kind:
    """What differs between targets: the name for messages, how four bits are laid out, how the rest is stored."""

    target: str
    form: Form = FORM
    store: Store = lambda _, weights: weights


class OnnxQuantiser(Quantiser):
    """See `Target.quantiser`."""

    def __init__(
        self, files: Sequence[Path], precision: str, feeds: Feeds | None, kind: Kind, shared: LayerRanges | None = None
    ) -> None:
        self._kind = kind
        self._model = onnx.load(str(files[0]))
        self._weights: Weights = {one.name: onnx.numpy_helper.to_array(one) for one in self._model.graph.initializer}
        del self._model.graph.initializer[:]
        self._bits = 4 if precision == "w4a16" else 8
        self._layers = find_layers(self._model, self._weights)
        self._ranges: dict[str, np.ndarray] | None = None
        notes = []
        if precision == "w8a8":
            assert feeds is not None
            self._ranges = _ranges(files[0], self._layers, feeds, kind.target)
            silent = [layer for layer in self._layers if not self._ranges[layer.source].any()]
            self._layers = [layer for layer in self._layers if layer not in silent]
            if silent:
                names = ", ".join(layer.name for layer in silent[:3])
                notes.append(f"the inputs of {len(silent)} layers are zero on all samples, and stay in floating point: {names}")
        self._factors = None if shared is None else factors(self._layers, self._weights, shared)
        unfit = [layer for layer in self._layers if not kind.form.takes(self._weights[layer.weight], layer, self._bits)]
        if unfit:
            self._layers = [layer for layer in self._layers if layer not in unfit]
            names = ", ".join(layer.name for layer in unfit[:3])
            sizes = " or ".join(map(str, sorted(kind.form.blocks)))
            notes.append(
                f"{len(unfit)} layers are convolutions, or their inputs do not divide into blocks of {sizes}, and stay in floating "
                f"point: {names}"
            )
        self.notes = tuple(notes)
        self.layers = tuple(dict.fromkeys(layer.name for layer in self._layers))

    def write(self, folder: Path, stem: str, floating: Collection[str] = ()) -> list[Path]:
        chosen = [layer for layer in self._layers if layer.name not in floating]
        model, weights = quantised(
            self._model, self._weights, chosen, self._bits, self._ranges, self._kind.form, self._factors
        )
        folder.mkdir(parents=True, exist_ok=True)
        return write(model, self._kind.store(model, weights), folder / f"{stem}.onnx", self._kind.target)


def ranges(path: Path, feeds: Feeds, target: str) -> LayerRanges:
    """See `Target.ranges`."""
    model = onnx.load(str(path))
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    layers = [layer for layer in find_layers(model, weights) if layer.op != "Conv"]
    largest = _ranges(path, layers, feeds, target)
    return joined(*({layer.name: largest[layer.source]} for layer in layers))


def _ranges(path: Path, layers: Sequence[Layer], feeds: Feeds, target: str) -> dict[str, np.ndarray]:
    """Run the model on the data, with the inputs of the layers as further outputs."""
    ranges = Ranges(layers)
    model = onnx.load(str(path), load_external_data=False)
    known = {value.name for value in model.graph.input}
    inner = [name for name in ranges.names if name not in known]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inner)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weights in a file of their own are found beside the model.
    watching = path.with_name(f"{path.stem}.watching.onnx")
    watching.write_bytes(model.SerializeToString())
    try:
        session = onnxruntime.InferenceSession(str(watching), options, providers=["CPUExecutionProvider"])
        for feed in feeds:
            values = dict(zip(inner, session.run(inner, feed), strict=True)) if inner else {}
            values |= {name: feed[name] for name in ranges.names if name in known}
            if not all(np.isfinite(value).all() for value in values.values()):
                raise InputError(f"target {target}: activations are not finite on the calibration data")
            ranges.add(values)
    finally:
        watching.unlink()
    return ranges.largest
