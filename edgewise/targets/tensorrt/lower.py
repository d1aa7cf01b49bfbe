"""Lower an exported program to a strongly typed ONNX file for TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.errors import InputError
from edgewise.targets.onnx.lower import convert, take_weights, write

if TYPE_CHECKING:
    import onnx_ir
    from torch.export import ExportedProgram

    from edgewise.targets.tensorrt.origin import Origin, Origins

TARGET = "tensorrt"


def lower(
    exported: ExportedProgram,
    folder: Path,
    stem: str,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> tuple[list[Path], dict[str, Origin]]:
    """Write `stem.onnx`; see `Target.lower`. Gives the origins of the nodes, by name, as well."""
    import onnx_ir

    from edgewise.targets.onnx.export import drop_notes

    model, origins = typed(exported, precision, input_names, output_names)
    drop_notes(model)
    weights = take_weights(model)
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]  # types and shapes inside follow from those of the inputs
    return write(proto, weights, Path(folder) / f"{stem}.onnx", TARGET), origins


def typed(
    exported: ExportedProgram, precision: str, input_names: Sequence[str], output_names: Sequence[str]
) -> tuple[onnx_ir.Model, dict[str, Origin]]:
    """The model in the types that it will compute in, and the origins of its nodes, by name."""
    from onnx_ir.passes import common

    from edgewise.targets.tensorrt.guards import move_guards
    from edgewise.targets.tensorrt.origin import Origins
    from edgewise.targets.tensorrt.precision import compare_as_numbers, compute_in_half, index_in_32_bits
    from edgewise.targets.tensorrt.tidy import store_masks, tidy

    model = convert(exported, TARGET, input_names, output_names)
    common.ShapeInferencePass()(model)
    origins = Origins(exported)
    _check_types(model, origins)
    move_guards(model)
    tidy(model)
    index_in_32_bits(model, origins)
    compare_as_numbers(model, origins)
    if precision == "fp16":
        compute_in_half(model, origins)
    tidy(model)
    store_masks(model)
    return model, origins.rename(model)


def _check_types(model: onnx_ir.Model, origins: Origins) -> None:
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None and (value.uses() or value.is_graph_output()):
                where = origins.of(node) or f"'{value.name}'"
                raise InputError(f"target {TARGET}: the type of {where} ({node.op_type}) is not known, and has to be")
