"""Which nodes compute in half precision, and which in 32-bit integers: the rules for `retype`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgewise.targets.half import HALVE_FROM
from edgewise.targets.onnx.quantise import Form
from edgewise.targets.tensorrt.origin import Origins
from edgewise.targets.tensorrt.retype import Kind, Rule, constant, is_constant, retype

# Sums of products, which tensor cores form in single precision out of half-precision operands.
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
# One number from one of each operand. Powers, roots, logarithms and exponentials are left out: they are parts of norms.
POINTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Relu", "LeakyRelu", "PRelu", "Gelu", "Erf", "Sigmoid", "Tanh", "HardSigmoid",
     "HardSwish", "Elu", "Celu", "Selu", "Mish", "Softsign", "Clip", "Min", "Max", "Where", "MaxPool", "AveragePool",
     "GlobalAveragePool"}
)  # fmt: skip
MOVES = frozenset(
    {"Transpose", "Reshape", "Concat", "Slice", "Gather", "GatherElements", "GatherND", "Expand", "Squeeze", "Unsqueeze", "Split",
     "Pad", "Tile", "Identity", "Flatten", "DepthToSpace", "SpaceToDepth"}
)  # fmt: skip
# What takes 32-bit indices and counts.
INDEXED = frozenset(
    {"Add", "Sub", "Mul", "Neg", "Abs", "Min", "Max", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where", "Cast",
     "ReduceSum", "ReduceMax", "ReduceMin"}
) | MOVES  # fmt: skip
FOUR_BITS = Form(blocks=(128, 64), mixed=False)
"""TensorRT takes weights of four bits in blocks of 64 or 128 inputs:
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-schemes.html"""
_LOOKUPS = frozenset({"Gather", "GatherElements", "GatherND"})
_LEAST, _MOST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
_EXACT = 2.0**-10
_WHOLE = 2**24


def compute_in_half(model: ir.Model, origins: Origins) -> None:
    """Products in half precision, and what is pointwise between them. Norms, softmax, sums, and all that scores and chooses
    tokens stay in single precision; the tokens themselves are merged and moved in the precision that they have."""
    retype(model, ir.DataType.FLOAT, ir.DataType.FLOAT16, _half(origins))


def index_in_32_bits(model: ir.Model, origins: Origins) -> None:
    """What compression computes with indices in 32 bits: they count tokens. The model's own integers stay as they are."""
    retype(model, ir.DataType.INT64, ir.DataType.INT32, _short(origins))


def compare_as_numbers(model: ir.Model, origins: Origins) -> None:
    """Positions that compression casts to whole numbers only to compare them with constants are compared as they are: they are
    whole, and far below what single precision holds."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Equal":
            continue
        for place in (0, 1):
            cast, other = node.inputs[place], node.inputs[1 - place]
            made = cast.producer() if cast is not None else None
            origin = origins.of(made) if made is not None and made.op_type == "Cast" else None
            source = made.inputs[0] if made is not None else None
            if origin is None or not origin.ours or source is None or source.dtype != ir.DataType.FLOAT:
                continue
            if other is None or not is_constant(other) or other.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
                continue
            assert other.const_value is not None
            array = other.const_value.numpy()
            if np.abs(array).max(initial=0) < _WHOLE:
                name = f"{other.name}.float"
                known = graph.initializers.get(name) or constant(graph, name, array.astype(np.float32), source.dtype)
                node.replace_input_with(place, source)
                node.replace_input_with(1 - place, known)
    common.RemoveUnusedNodesPass()(model)


def _half(origins: Origins) -> Rule:
    def rule(node: ir.Node, operands: list[tuple[ir.Value, Kind]]) -> bool:
        kinds = {kind for _, kind in operands}
        if not all(_holds(value) for value, _ in operands if is_constant(value)):
            return False
        origin = origins.of(node)
        if origin is not None and origin.decides:
            return node.op_type in MOVES and kinds == {"narrow"}
        if node.op_type in PRODUCTS:
            return True
        if origin is not None and origin.ours and node.op_type in POINTWISE:
            return "narrow" in kinds  # a mean of tokens, whose weights may come in single precision
        return node.op_type in POINTWISE | MOVES and "wide" not in kinds
    return rule


def _holds(value: ir.Value) -> bool:
    """Whether half precision can hold a constant: no number becomes infinite, and of few numbers none becomes another."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    with np.errstate(over="ignore"):
        half = array.astype(np.float16).astype(array.dtype)
    if not np.array_equal(np.isfinite(array), np.isfinite(half)):
        return False
    if array.nbytes >= HALVE_FROM:
        return True
    finite = np.isfinite(array)
    return bool((np.abs(half[finite] - array[finite]) <= _EXACT * np.abs(array[finite])).all())


def _short(origins: Origins) -> Rule:
    def rule(node: ir.Node, operands: list[tuple[ir.Value, Kind]]) -> bool:
        for value, _ in operands:
            if is_constant(value):
                assert value.const_value is not None
                array = value.const_value.numpy()
                if array.size and (array.min() < _LEAST or array.max() > _MOST):
                    return False
        if node.op_type not in INDEXED:
            return False
        origin = origins.of(node)
        if origin is not None and origin.ours:
            return True
        # A table of the model that is read at indices of ours.
        return node.op_type in _LOOKUPS and [kind for _, kind in operands] == ["narrow"]
    return rule
