"""Lower an exported program to OpenVINO IR, the same bytes every time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.base import layer_name, layer_of
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
    """Write `stem.xml` and `stem.bin`; see `Target.lower`. A node that computes a layer is named after it."""
    from edgewise.passes.layers import layers

    exported = prepare(exported, "openvino", input_names, output_names)
    model = _convert(exported)
    _name(model, input_names, output_names, _layers(model, layers(exported)))
    if precision == "fp16":
        halve(model)
    return save(model, folder, stem)


def save(model: Any, folder: Path, stem: str) -> list[Path]:
    """Write a model, whose small constants are shared; gives its files. Raises what stands in the way."""
    import openvino

    _share(model)
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


_SMALL = 4096
_SHARED = ("boolean", "i8", "i32", "i64", "f16", "f32")


def _share(model: Any) -> None:
    """Let equal constants be one. Of large ones (in bytes) the values are stored once anyhow; of small ones, such as axes and
    limits, it is the description that takes room."""
    for graph in graphs(model):
        known: dict[tuple[Any, ...], Any] = {}
        for node in graph.get_ordered_ops():
            if node.get_type_name() != "Constant" or node.get_element_type().to_string() not in _SHARED:
                continue
            users = list(node.output(0).get_target_inputs())
            # A name of a result is of its tensor.
            if node.get_byte_size() > _SMALL or any(port.get_node().get_type_name() == "Result" for port in users):
                continue
            value = (node.get_element_type().to_string(), tuple(node.get_output_shape(0)), node.data.tobytes())
            first = known.setdefault(value, node)
            if first is not node:
                for port in users:
                    port.replace_source_output(first.output(0))


def halve(model: Any) -> None:
    """Store as fp16, followed by a Convert to fp32, what loses nothing by it."""
    from openvino._offline_transformations import compress_model_transformation

    kept = {
        node.get_friendly_name(): node
        for graph in graphs(model)
        for node in graph.get_ops()
        if node.get_type_name() == "Constant"
        and node.get_element_type().to_string() in ("f32", "f64")
        and as_half(node.data) is None
    }
    # This halves nearly every constant, and marks the Converts for devices that compute in fp16, which leave them out.
    # Each gets the name of its constant.
    compress_model_transformation(model)
    for graph in graphs(model):
        for node in graph.get_ops():
            if node.get_type_name() == "Convert" and node.get_friendly_name() in kept:
                node.output(0).replace(kept[node.get_friendly_name()].output(0))
    # It leaves out what such devices, too, compute in single precision. That may be stored in half, if it is computed as before.
    for graph in graphs(model):
        for node in graph.get_ops():
            if node.get_type_name() == "Constant" and node.get_element_type().to_string() == "f32":
                half = as_half(node.data)
                if half is not None:
                    _widened(node, half)


def _widened(constant: Any, half: np.ndarray) -> None:
    """Put a constant in half precision, and what widens it again, in the place of one."""
    from openvino import opset13 as opset

    stored = opset.constant(half)
    wide = opset.convert(stored, "f32")
    wide.set_friendly_name(constant.get_friendly_name())
    stored.set_friendly_name(constant.get_friendly_name() + "_compressed")
    constant.output(0).replace(wide.output(0))


def graphs(model: Any) -> Iterator[Any]:
    """A model, and the bodies of its loops."""
    yield model
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("Loop", "TensorIterator"):
            yield from graphs(node.get_function())


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
    _keep_ties(model)

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


def _keep_ties(model: Any) -> None:
    """Let each TopK give equal values in the order of their indices. The frontend leaves it open, but for a stable sort."""
    from openvino import opset13 as opset

    for node in [node for graph in graphs(model) for node in graph.get_ordered_ops()]:
        known = node.get_attributes() if node.get_type_name() == "TopK" else {}
        if not known or known.get("stable"):
            continue
        value, count = node.input_value(0), node.input_value(1)
        found = opset.topk(value, count, known["axis"], known["mode"], "value", known["index_element_type"], stable=True)
        for before, after in zip(node.outputs(), found.outputs(), strict=True):
            before.replace(after)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    ops = re.search(r"No conversion rule found for operations: (.*)", text)
    if ops:
        return f"it has no rule for {ops.group(1).strip()}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-3:]) if lines else type(error).__name__


def number_nodes(graph: Any, prefix: str = "") -> None:
    """Name the nodes of a graph by their ops and places, but for layers and the model's inputs, which have names of their own."""
    for number, node in enumerate(graph.get_ordered_ops()):
        if layer_of(node.get_friendly_name()) is None and (prefix or node.get_type_name() != "Parameter"):
            node.set_friendly_name(f"{prefix}{node.get_type_name()}_{number}")


_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")
_MOVES = ("Convert", "Reshape", "Transpose")


def _layers(model: Any, names: Mapping[str, str]) -> dict[int, str]:
    """The nodes that compute a layer, by their places in the order of the graph. `names`: of layers, by their weights'
    placeholders."""
    found: dict[int, str] = {}
    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in _PRODUCTS:
            continue
        weight = node.input_value(1)
        while weight.get_node().get_type_name() in _MOVES:
            weight = weight.get_node().input_value(0)
        if weight.get_node().get_type_name() == "Constant":
            known = [name for tensor in weight.get_names() if (name := names.get(tensor.partition(":")[0])) is not None]
            if known:
                found[number] = known[0]
    return found


def _name(model: Any, input_names: Sequence[str], output_names: Sequence[str], layers: Mapping[int, str]) -> None:
    """Give inputs, outputs and nodes names that depend on the program alone.

    The frontend names nodes by counters that go on from one conversion to the next.
    """
    for level, graph in enumerate(list(graphs(model))):
        prefix = f"body{level}/" if level else ""
        graph.set_friendly_name(f"{prefix}edgewise")
        number_nodes(graph, prefix)
        for node in graph.get_ordered_ops():
            for output in node.outputs():
                output.get_tensor().set_names(set())
        seen: list[str] = []
        for number, node in enumerate(graph.get_ordered_ops()):
            if not level and number in layers:
                seen.append(layers[number])
                node.set_friendly_name(layer_name(layers[number], seen.count(layers[number])))
    for parameter, name in zip(model.inputs, input_names, strict=True):
        parameter.get_tensor().set_names({name})
        parameter.get_node().set_friendly_name(name)
    for result, name in zip(model.outputs, output_names, strict=True):
        result.get_tensor().set_names({name})
