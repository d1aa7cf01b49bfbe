"""Lower an exported program to an ONNX file, the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.half import as_half
from edgewise.targets.program import prepare

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

# Protobuf, and so one ONNX file, ends at 2 GiB. Beyond this limit the weights go to a second file.
EXTERNAL_ABOVE = 1_800_000_000

Weights = dict[str, np.ndarray]


def lower(
    exported: ExportedProgram,
    folder: Path,
    stem: str,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> list[Path]:
    """Write `stem.onnx`; see `Target.lower`."""
    import onnx
    import onnx_ir

    from edgewise.targets.onnxruntime.export import to_onnx

    converted = to_onnx(prepare(exported, "onnxruntime", input_names, output_names))
    _rename(converted.graph, input_names, output_names)
    weights = {}
    for name, value in converted.graph.initializers.items():
        assert value.const_value is not None
        weights[name] = value.const_value.numpy()
    converted.graph.initializers.clear()
    model = onnx_ir.to_proto(converted)
    if precision == "fp16":
        weights = _halve(model, weights)
    files = _write(model, weights, Path(folder) / f"{stem}.onnx")
    try:
        onnx.checker.check_model(str(files[0]))
    except onnx.checker.ValidationError as error:
        raise InputError(f"target onnxruntime made an invalid model: {error}") from error
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


def _halve(model: onnx.ModelProto, weights: Weights) -> Weights:
    """Store as fp16, followed by a Cast to fp32, what loses nothing by it."""
    import onnx

    halved: Weights = {}
    casts = []
    for name, array in weights.items():
        half = as_half(array)
        if half is None:
            halved[name] = array
        else:
            stored = f"{name}.fp16"
            halved[stored] = half
            casts.append(onnx.helper.make_node("Cast", [stored], [name], f"cast {name}", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return halved


def _write(model: onnx.ModelProto, weights: Weights, path: Path) -> list[Path]:
    from edgewise.targets.onnxruntime.stream import write_external, write_model

    if sum(array.nbytes for array in weights.values()) <= EXTERNAL_ABOVE:
        with open(path, "wb") as file:
            write_model(file, model, weights)
        return [path]
    data = path.with_name(path.name + ".data")
    write_external(path, data, model, weights)
    return [path, data]
