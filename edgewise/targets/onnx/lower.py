"""Lower an exported program to an ONNX model, and write it to a file, the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.program import prepare

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from torch.export import ExportedProgram

# Protobuf, and so one ONNX file, ends at 2 GiB. Beyond this limit the weights go to a second file.
EXTERNAL_ABOVE = 1_800_000_000

Weights = dict[str, np.ndarray]


def convert(
    exported: ExportedProgram, target: str, input_names: Sequence[str], output_names: Sequence[str]
) -> onnx_ir.Model:
    """The ONNX model of a program, its inputs and outputs named. See `Target.lower` for what is asked of the program."""
    from edgewise.passes.layers import layers
    from edgewise.targets.onnx.export import to_onnx

    exported = prepare(exported, target, input_names, output_names)
    weights = exported.graph_signature.inputs_to_parameters
    model = to_onnx(exported, target, {weights[place]: name for place, name in layers(exported).items()})
    _rename(model.graph, input_names, output_names)
    return model


def take_weights(model: onnx_ir.Model) -> Weights:
    """Take the weights out of a model, by name: they are written aside (see `edgewise.targets.onnx.stream`)."""
    weights = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        weights[name] = value.const_value.numpy()
    model.graph.initializers.clear()
    return weights


def write(model: onnx.ModelProto, weights: Weights, path: Path, target: str) -> list[Path]:
    """Write a model and its weights, the same bytes every time, and check the file. Gives the files, the model first."""
    import onnx

    files = _write(model, weights, path)
    try:
        onnx.checker.check_model(str(files[0]))
    except onnx.checker.ValidationError as error:
        raise InputError(f"target {target} made an invalid model: {error}") from error
    return files


def _rename(graph: Any, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Name inputs and outputs; a value inside that has one of these names by chance gets another."""
    ports = [*graph.inputs, *graph.outputs]
    inner = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    taken = {*input_names, *output_names, *(value.name for value in inner)}
    for value in inner:
        if value.name in (*input_names, *output_names) and not any(value is port for port in ports):
            name = value.name
            while name in taken:
                name += "_"
            taken.add(name)
            value.name = name
    # Through names that nobody has, since the new names may be a permutation of the old ones.
    for number, value in enumerate(ports):
        value.name = f"edgewise port {number}"
    for value, name in zip(ports, (*input_names, *output_names), strict=True):
        value.name = name


def _write(model: onnx.ModelProto, weights: Weights, path: Path) -> list[Path]:
    from edgewise.targets.onnx.stream import write_external, write_model

    if sum(array.nbytes for array in weights.values()) <= EXTERNAL_ABOVE:
        with open(path, "wb") as file:
            write_model(file, model, weights)
        return [path]
    data = path.with_name(path.name + ".data")
    write_external(path, data, model, weights)
    return [path, data]
