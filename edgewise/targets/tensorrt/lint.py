"""What would fail on TensorRT, or be slow, said of a program before anything is written. Needs nothing of NVIDIA's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from torch.export import ExportedProgram

from edgewise.errors import InputError
from edgewise.targets.base import layer_of
from edgewise.targets.tensorrt import capabilities as can
from edgewise.targets.tensorrt.engine import WAYS_ROUND
from edgewise.targets.tensorrt.lower import typed
from edgewise.targets.tensorrt.origin import Origin
from edgewise.targets.tensorrt.precision import FOUR_BITS
from edgewise.targets.tensorrt.retype import is_constant
from edgewise.targets.tensorrt.views import static_shape

Level = Literal["fails", "slow", "note"]
_ORDER = ("fails", "slow", "note")


@dataclass(frozen=True)
class Finding:
    """`fails`: TensorRT refuses it, or computes something else; `slow`: it runs, and costs more than it has to; `note`: it runs,
    and not everywhere, or not as was asked."""

    level: Level
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{'' if self.level == 'fails' else f'{self.level}: '}{self.where}: {self.reason}"


def lint(exported: ExportedProgram, precision: str = "fp32") -> list[str]:
    """One line for each finding in a program of ATen ops, the failures first."""
    signature = exported.graph_signature
    try:
        model, origins = typed(
            exported,
            "fp32" if precision == "fp32" else "fp16",
            [f"i{n}" for n in range(len(signature.user_inputs))],
            [f"o{n}" for n in range(len(signature.user_outputs))],
        )
    except InputError as error:
        return [str(error)]
    found = findings(model, origins) + (_four_bits(model) if precision == "w4a16" else [])
    return [str(finding) for finding in sorted(found, key=lambda finding: _ORDER.index(finding.level))]


def findings(model: ir.Model, origins: dict[str, Origin] | None = None) -> list[Finding]:
    """What the capability table says of an ONNX model whose values have types. `origins`: of its nodes, by name."""
    found = []
    opset = model.opset_imports.get("", can.OPSET)
    if opset > can.OPSET:
        found.append(Finding("note", f"opset {opset}", f"TensorRT before 10.9 (JetPack 6) reads up to {can.OPSET}"))
    for value in model.graph.inputs:
        for level, reason in _value(value):
            found.append(Finding(level, f"input {value.name}", reason))
    for node in model.graph.all_nodes():
        origin = (origins or {}).get(node.name or "")
        where = f"{node.op_type}, {origin}" if origin is not None else f"{node.op_type} '{node.name}'"
        found += [Finding(level, where, reason) for level, reason in _node(node)]
    return list(dict.fromkeys(found))


def _four_bits(model: ir.Model) -> list[Finding]:
    """What weights of four bits need, and the layers that cannot have them."""
    unfit = []
    for node in model.graph:
        name = layer_of(node.name or "")
        sizes = static_shape(node.inputs[1]) if name is not None else None
        if name is None or sizes is None:
            continue
        inputs = 1 if node.attributes.get_int("transB", 0) else 0
        if len(sizes) != 2 or all(sizes[inputs] % block for block in FOUR_BITS.blocks):
            unfit.append(name)
    found = [Finding("note", "w4a16", can.FOUR_BITS_NEED)]
    if unfit:
        blocks, names = " or ".join(map(str, FOUR_BITS.blocks)), ", ".join(dict.fromkeys(unfit))
        reason = f"they are convolutions, or their inputs do not divide into blocks of {blocks}, and stay in half precision"
        found.append(Finding("note", f"layers {names}", reason))
    return found


_Found = Iterator[tuple[Level, str]]


def _node(node: ir.Node) -> _Found:
    op = node.op_type
    if op not in can.SUPPORTED:
        yield "fails", f"TensorRT has no such op{_way_round(op)}"
        return
    if op in can.LATER:
        yield "fails", f"TensorRT has it from {can.LATER[op]} on, and JetPack 6 has 10.3{_way_round(op)}"
    if op in can.DATA_DEPENDENT:
        yield "fails", f"the data say how many entries it has{_way_round(op)}"
    if op in ("ScatterElements", "ScatterND"):
        reduction = node.attributes.get("reduction")
        if reduction is not None and reduction.as_string() != "none":
            yield "fails", f"it scatters with the reduction '{reduction.as_string()}'{_way_round(op)}"
    if op == "TopK":
        yield from _topk(node)
    if op in can.LOOPS:
        yield "slow", "its iterations run one after the other, each in kernels of its own"
    if op == "Softmax":
        yield from _attention(node)
    for value in node.outputs:
        yield from _value(value)
    if op in can.ARITHMETIC and any(value.dtype == ir.DataType.INT64 for value in node.outputs):
        yield "slow", "it computes with 64-bit integers; 32 bits do for indices and counts"


def _value(value: ir.Value) -> _Found:
    if value.dtype is not None and value.dtype.name == "DOUBLE":
        yield "fails", "it is float64, and TensorRT computes in float32 without a word: cast the model with .float()"
    elif value.dtype is not None and value.dtype.name not in can.TYPES:
        yield "fails", f"its type is {value.dtype.name.lower()}, and TensorRT computes with {', '.join(sorted(can.TYPES)).lower()}"
    if value.shape is not None:
        if len(value.shape) > can.MOST_DIMENSIONS:
            yield "fails", f"it has {len(value.shape)} dimensions, and TensorRT has {can.MOST_DIMENSIONS}"
        if not value.shape.is_static():
            yield "fails", f"its shape ({', '.join(map(str, value.shape))}) is dynamic: artifacts are static"


def _topk(node: ir.Node) -> _Found:
    count = node.inputs[1]
    if count is None or not is_constant(count) or count.const_value is None:
        yield "fails", "its K is not a constant"
        return
    picked = int(count.const_value.numpy().reshape(-1)[0])
    if picked > can.MOST_PICKED:
        yield "fails", f"K is {picked}{_way_round('TopK')}"


def _attention(softmax: ir.Node) -> _Found:
    """Two products with a softmax between them are one kernel, if nothing else is between and nobody else looks."""
    users = list(_users(softmax.outputs[0]))
    if not any(user.op_type == "MatMul" for user in users):
        return
    if len(users) > 1 or softmax.outputs[0].is_graph_output():
        yield "slow", "the weights of this attention are read by more than its product with the values, and so it is not one kernel"
    made = _producers(softmax)
    while made and made[0].op_type != "MatMul":
        between = next((node for node in made if node.op_type not in can.BETWEEN_PRODUCTS), None)
        if between is not None and len(made) == 1:
            yield "slow", f"{between.op_type} stands between the first product and the softmax of this attention: not one kernel"
            return
        inner = [node for node in made if node.op_type in {*can.BETWEEN_PRODUCTS, "MatMul"}]
        made = sorted((part for node in inner for part in _producers(node)), key=lambda part: part.op_type != "MatMul")


def _producers(node: ir.Node) -> list[ir.Node]:
    made = [value.producer() for value in node.inputs if value is not None]
    return [producer for producer in made if producer is not None]


def _users(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a value, seen through casts."""
    for user, _ in value.uses():
        if user.op_type == "Cast":
            yield from _users(user.outputs[0])
        else:
            yield user


def _way_round(op: str) -> str:
    return f": {WAYS_ROUND[op]}" if op in WAYS_ROUND else ""
