"""Lower an exported program to OpenVINO IR, the same bytes every time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewise.errors import InputError
from edgewise.targets.half import as_half
from edgewise.targets.program import prepare, quiet

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def lower(
    exported: ExportedProgram,
    folder: Path,
    stem: str,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> list[Path]:
    """Write `stem.xml` and `stem.bin`; see `Target.lower`."""
    import openvino

    model = _convert(prepare(exported, "openvino", input_names, output_names))
    _name(model, input_names, output_names)
    if precision == "fp16":
        _halve(model)
    path = Path(folder) / f"{stem}.xml"
    files = [path, path.with_suffix(".bin")]
    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        # All that it says is "iostream error", whether the disk is full or the folder may not be written.
        for part in files:
            part.unlink(missing_ok=True)
        _probe(path, _upper_size(model))
        raise InputError(f"target openvino cannot write {path}: {_reason(error)}") from error
    return files


def _halve(model: Any) -> None:
    """Store as fp16, followed by a Convert to fp32, what loses nothing by it."""
    from openvino._offline_transformations import compress_model_transformation

    kept = {
        node.get_friendly_name(): node
        for graph in _graphs(model)
        for node in graph.get_ops()
        if node.get_type_name() == "Constant"
        and node.get_element_type().to_string() in ("f32", "f64")
        and as_half(node.data) is None
    }
    # This halves nearly every constant, and marks the Converts for devices that compute in fp16, which leave them out.
    # Each gets the name of its constant.
    compress_model_transformation(model)
    for graph in _graphs(model):
        for node in graph.get_ops():
            if node.get_type_name() == "Convert" and node.get_friendly_name() in kept:
                node.output(0).replace(kept[node.get_friendly_name()].output(0))


def _graphs(model: Any) -> Iterator[Any]:
    """A model, and the bodies of its loops."""
    yield model
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("Loop", "TensorIterator"):
            yield from _graphs(node.get_function())


# A layer of the `.xml` takes 1 to 2 KiB.
_LAYER_BYTES = 4096


def _upper_size(model: Any) -> int:
    """No fewer bytes than the files of a model have."""
    layers = model.get_ops()
    weights = sum(layer.get_byte_size() for layer in layers if layer.get_type_name() == "Constant")
    return int(weights) + _LAYER_BYTES * len(layers)


def _probe(path: Path, size: int) -> None:
    """Write as many bytes beside `path` and remove them: raises the `OSError` that stands in the way, if any does."""
    probe = path.with_name(path.name + ".probe")
    chunk = os.urandom(2**20)  # a file system that compresses would store zeros for nothing
    try:
        with open(probe, "wb") as file:
            for start in range(0, size, len(chunk)):
                file.write(chunk[: size - start])
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _convert(exported: ExportedProgram) -> Any:
    from openvino.frontend import OpConversionFailure

    from edgewise.targets.openvino.graph import decomposed, readable

    with quiet():
        try:
            try:
                return _read(readable(exported))
            except OpConversionFailure:
                # An op that has no rule as it is may have one after torch's decompositions.
                return _read(decomposed(exported))
        except Exception as error:
            # The frontend raises its own errors, RuntimeError, and whatever its translators run into.
            raise InputError(f"target openvino cannot lower this program: {_reason(error)}") from error


def _read(module: Any) -> Any:
    """Read a graph with OpenVINO's frontend. The model's outputs are the graph's, in order."""
    import openvino
    from openvino import opset13 as opset
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    from edgewise.targets.openvino.loops import extensions

    # The frontend fails on a graph that gives one value twice.
    output = next(node for node in module.graph.nodes if node.op == "output")
    values = list(output.args[0])
    single = list(dict.fromkeys(values))
    output.args = (tuple(single),)
    frontend = FrontEndManager().load_by_framework("pytorch")
    for extension in extensions():
        frontend.add_extension(extension)
    decoder = TorchFXPythonDecoder(module, dynamic_shapes=False)  # has to outlive the conversion
    model = frontend.convert(frontend.load(decoder))

    sources = [model.outputs[single.index(value)].get_node().input_value(0) for value in values]
    used: list[Any] = []
    results = []
    for source in sources:
        # One tensor has one name: an output that is an input, or another output, becomes a tensor of its own.
        shared = source in used or source.get_node().get_type_name() == "Parameter"
        used.append(source)
        results.append(
            opset.result(opset.convert(source, source.get_element_type().to_string()) if shared else source)
        )
    return openvino.Model(results, model.get_parameters())


def _reason(error: Exception) -> str:
    text = str(error).strip()
    ops = re.search(r"No conversion rule found for operations: (.*)", text)
    if ops:
        return f"it has no rule for {ops.group(1).strip()}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-3:]) if lines else type(error).__name__


def _name(model: Any, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Give inputs, outputs and nodes names that depend on the program alone.

    The frontend names nodes by counters that go on from one conversion to the next.
    """
    for level, graph in enumerate(list(_graphs(model))):
        prefix = f"body{level}/" if level else ""
        graph.set_friendly_name(f"{prefix}edgewise")
        for number, node in enumerate(graph.get_ordered_ops()):
            node.set_friendly_name(f"{prefix}{node.get_type_name()}_{number}")
            for output in node.outputs():
                output.get_tensor().set_names(set())
    for parameter, name in zip(model.inputs, input_names, strict=True):
        parameter.get_tensor().set_names({name})
        parameter.get_node().set_friendly_name(name)
    for result, name in zip(model.outputs, output_names, strict=True):
        result.get_tensor().set_names({name})
