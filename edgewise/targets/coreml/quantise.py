"""Quantise a package to eight bits: the inputs of its layers, and their weights, and nothing else.

`quantize` and `dequantize` go in front of layers, as the Neural Engine fuses them. Everything is symmetric: weights have a scale
for each output, and activations one. Statistics are of the package itself, run by the interpreter. Biases, scores, norms,
softmax and what compression chooses with stay in half precision.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.base import Feeds, Quantiser
from edgewise.targets.coreml.convert import model_of, quiet
from edgewise.targets.coreml.session import CoreMLSession
from edgewise.targets.coreml.weights import SMALLEST, quantised
from edgewise.targets.coreml.write import LAYERS_KEY, write_package
from edgewise.targets.scales import smoothing

if TYPE_CHECKING:
    from edgewise.targets.coreml.package import Package

_LEAST = 2.0**-14
"""Half precision holds no smaller distance of two values with all its digits."""


@dataclass(frozen=True)
class Layer:
    """An op that computes a layer: the layer's name, the op's, the values that it reads, and the axis of their channels."""

    name: str
    op: str
    source: str
    weight: str
    axis: int


class CoreMLQuantiser(Quantiser):
    """See `Target.quantiser`; `files` are those of a package at `fp16`."""

    def __init__(self, files: Sequence[Path], feeds: Feeds) -> None:
        session = CoreMLSession(files)
        self._package, self._ports = session.package, session.ports
        with quiet():
            found = _find(_program(self._package), _names(self._package))
        self._largest = _largest(session, found, feeds)
        silent = [layer for layer in found if not self._largest[layer.source].any()]
        self._layers = [layer for layer in found if layer not in silent]
        self._smooth: dict[tuple[str, ...], np.ndarray] = {}
        self.layers = tuple(dict.fromkeys(layer.name for layer in self._layers))
        if silent:
            names = ", ".join(layer.name for layer in silent[:3])
            self.notes = (f"the inputs of {len(silent)} layers are zero on all samples, and stay in floating point: {names}",)

    def follow(self, other: Quantiser) -> None:
        assert isinstance(other, CoreMLQuantiser)
        self._smooth = other._smooth

    def write(self, folder: Path, stem: str, floating: Collection[str] = ()) -> list[Path]:
        groups: dict[str, list[Layer]] = {}
        for layer in self._layers:
            if layer.name not in floating:
                groups.setdefault(layer.source, []).append(layer)
        with quiet():
            program = _program(self._package)
            weights = []
            for source, group in groups.items():
                weights += _quantise(program, group, self._largest[source], self._smooth)
            model = quantised(model_of(program), 8, weights)
            return write_package(model, *self._ports, Path(folder) / f"{stem}.mlpackage")


def _program(package: Package) -> Any:
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(package.path), skip_model_load=True)
    spec = model.get_spec()
    return load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)


def _names(package: Package) -> dict[str, str]:
    """The names of layers by those of their weights, as the lowering left them."""
    text = package.model.description.metadata.userDefined.get(LAYERS_KEY)
    if text is None:
        raise InputError(f"{package.path} does not say what its layers are; lower the model again")
    return dict(json.loads(text))


def _find(program: Any, names: Mapping[str, str]) -> list[Layer]:
    layers = []
    for op in program.functions["main"].operations:
        if op.op_type not in ("linear", "conv") or op.weight.op is None or op.weight.op.op_type != "const":
            continue
        name = names.get(op.weight.name.removesuffix("_to_fp16"))
        if name is not None and op.weight.val.size >= SMALLEST:
            axis = -1 if op.op_type == "linear" else 1
            layers.append(Layer(name, op.name, op.x.name, op.weight.name, axis))
    return layers


def _largest(session: CoreMLSession, layers: Sequence[Layer], feeds: Feeds) -> dict[str, np.ndarray]:
    """The largest absolute value of each channel of what layers read, over all samples."""
    axes = {layer.source: layer.axis for layer in layers}
    largest: dict[str, np.ndarray] = {}

    def watch(name: str, value: np.ndarray) -> None:
        if name not in axes:
            return
        seen = np.abs(np.moveaxis(value, axes[name], -1)).reshape(-1, value.shape[axes[name]]).max(0).astype(np.float32)
        if not np.isfinite(seen).all():
            raise InputError(f"target coreml: {name} is not finite on the calibration data")
        largest[name] = np.maximum(largest[name], seen) if name in largest else seen

    for feed in feeds:
        for port in session.ports[0]:
            watch(port.feature, feed[port.name])
        session.reset()
        session.run(feed, watch=watch)
    return largest


def _quantise(program: Any, group: Sequence[Layer], largest: np.ndarray, known: dict[tuple[str, ...], np.ndarray]) -> list[str]:
    """Let the layers that read a value read it in eight bits; gives the names of their weights. `known`: what groups of layers, by
    their names, were smoothed by, which is taken if it is there, and kept."""
    from coremltools.converters.mil.mil import Builder

    ops = {op.name: op for op in program.functions["main"].operations}
    readers = [ops[layer.op] for layer in group]
    first = readers[0]
    value, source, half = first.x, group[0].source, np.float16
    weights = {layer.weight: reader.weight.val for layer, reader in zip(group, readers, strict=True)}
    scale, changed = np.ones_like(largest), {}
    if all(reader.op_type == "linear" for reader in readers):
        wide = {name: weight.astype(np.float32) for name, weight in weights.items()}
        smooth = known.setdefault(tuple(layer.name for layer in group), smoothing(largest, list(wide.values())))
        with np.errstate(over="ignore"):
            made = {name: (weight * smooth).astype(half) for name, weight in wide.items()}
        if all(np.isfinite(weight).all() for weight in made.values()):
            scale, changed = smooth, made
    with program.functions["main"]:
        if changed:
            value = Builder.mul(x=value, y=(1 / scale).astype(half), name=f"{source}_smoothed", before_op=first)
        step = half(max((largest / scale).max() / 127, _LEAST))
        code = Builder.quantize(input=value, scale=step, output_dtype="int8", name=f"{source}_int8", before_op=first)
        value = Builder.dequantize(input=code, scale=step, name=f"{source}_quantised", before_op=first)
        for layer, reader in zip(group, readers, strict=True):
            reader.set_inputs(x=value)
            if layer.weight in changed:
                name = f"{layer.weight}_of_{source}"
                reader.set_inputs(weight=Builder.const(val=changed[layer.weight], name=name, before_op=reader))
    return list(dict.fromkeys(reader.weight.name for reader in readers))
