"""Lower an exported program to an ONNX file for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.targets.half import as_half
from edgewise.targets.onnx.lower import Weights, convert, take_weights, write

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram


def lower(
    exported: ExportedProgram,
    folder: Path,
    stem: str,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> list[Path]:
    """Write `stem.onnx`; see `Target.lower`."""
    import onnx_ir

    from edgewise.targets.onnx.export import drop_notes

    converted = convert(exported, "onnxruntime", input_names, output_names)
    drop_notes(converted)
    weights = take_weights(converted)
    model = onnx_ir.to_proto(converted)
    if precision == "fp16":
        weights = halve(model, weights)
    return write(model, weights, Path(folder) / f"{stem}.onnx", "onnxruntime")


def halve(model: onnx.ModelProto, weights: Weights) -> Weights:
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
