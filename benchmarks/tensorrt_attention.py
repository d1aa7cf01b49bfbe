"""What it would cost to compute the products of attention in 8 bits on TensorRT, too: nodes, layers, and accuracy.

    python benchmarks/tensorrt_attention.py [--compress tome:keep=0.5] [--device sm86] [DEMO ...]

Takes the `w8a8` artifact of a demo and puts QuantizeLinear and DequantizeLinear on both operands of every product before and
behind a softmax, with scales from 32 samples (for the weights of attention 1/127). Two rows for each demo: the artifact as it is
shipped, and with attention quantised. Each row: nodes, layers that NVIDIA's parser makes, products of attention in 8 bits, correct
samples of the whole test split in ONNX Runtime, and megabytes of the engine. No GPU is needed, and so nothing is said of time.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

import edgewise
from edgewise.demos import split
from edgewise.targets.base import layer_of
from edgewise.targets.tensorrt import rtx

SAMPLES = 32
THROUGH = ("Cast", "Add", "Where", "Mul", "Div")


def products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """The products before a softmax, and those behind one (True)."""
    made = {output: node for node in graph.node for output in node.output}
    for softmax in graph.node:
        if softmax.op_type != "Softmax":
            continue
        node = made.get(softmax.input[0])
        while node is not None and node.op_type in THROUGH:
            node = next((made[name] for name in node.input if name in made), None)
        if node is not None and node.op_type == "MatMul" and layer_of(node.name) is None:
            yield node, False
        seen = {softmax.output[0]}
        for after in graph.node:
            if seen & set(after.input):
                if after.op_type == "MatMul":
                    yield after, True
                elif after.op_type == "Cast":
                    seen |= set(after.output)


def quantised(path: Path, inputs: dict[str, np.ndarray], out: Path) -> int:
    """Write the file with attention quantised; gives how many products that are."""
    model = onnx.load(path)
    found = list(products(model.graph))
    names = list(dict.fromkeys(name for node, _ in found for name in node.input))
    watching = onnx.load(path)
    watching.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(watching.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(names, 0.0)
    for place in range(0, len(next(iter(inputs.values()))), max(1, len(next(iter(inputs.values()))) // SAMPLES)):
        values = session.run(names, {name: array[place : place + 1] for name, array in inputs.items()})
        for name, value in zip(names, values, strict=True):
            largest[name] = max(largest[name], float(np.abs(value).max()))
    soft = {node.input[0] for node, behind in found if behind}
    position = {node.name: place for place, node in enumerate(model.graph.node)}
    for node, _ in sorted(found, key=lambda one: -position[one[0].name]):
        added = []
        for operand, name in enumerate(node.input):
            base = f"{node.name}.{operand}"
            scale = np.float16((1.0 if name in soft else largest[name]) / 127)
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(scale), f"{base}.scale"))
            constants = [f"{base}.scale", "edgewise.zero"]
            added += [
                helper.make_node("QuantizeLinear", [name, *constants], [f"{base}.int8"], name=f"{base}.int8"),
                helper.make_node("DequantizeLinear", [f"{base}.int8", *constants], [f"{base}.value"], name=f"{base}.value"),
            ]
            node.input[operand] = f"{base}.value"
        place = list(model.graph.node).index(node)
        for one in reversed(added):
            model.graph.node.insert(place, one)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out)
    return len(found)


def correct(path: Path, inputs: dict[str, np.ndarray], labels: np.ndarray) -> int:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return sum(
        int(session.run(None, {name: array[n : n + 1] for name, array in inputs.items()})[0].argmax() == label)
        for n, label in enumerate(labels)
    )


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demos", nargs="*", default=["digits", "speech"])
    parser.add_argument("--compress", default="tome:keep=0.5")
    parser.add_argument("--device", default="sm86")
    given = parser.parse_args()
    print(f"| demo, `{given.compress}` | nodes | layers | products in 8 bits | correct | {given.device} |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in given.demos:
        data = split(name)
        assert data is not None
        with tempfile.TemporaryDirectory() as folder:
            bundle = edgewise.export(f"demo:{name}", Path(folder) / "b", targets=["tensorrt"], compress=given.compress,
                                     precision="w8a8", cache=False)  # fmt: skip
            plain = bundle.file(bundle.manifest.targets[0].files[0])
            more = Path(folder) / "attention.onnx"
            counts = {plain: 0, more: quantised(plain, data.inputs, more)}
            for path, count in counts.items():
                right = correct(path, data.inputs, data.labels)
                copy = Path(folder) / f"copy-{path.name}"
                copy.write_bytes(path.read_bytes())
                size = rtx.build(copy, given.device)[0].stat().st_size / 1e6
                nodes, score = len(onnx.load(path).graph.node), f"{right} of {len(data.labels)}"
                row = (name, nodes, rtx.parse(path), count, score, f"{size:.1f} MB")
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
