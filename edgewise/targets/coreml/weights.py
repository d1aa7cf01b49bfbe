"""Quantise the weights of linear layers and convolutions, by coremltools, and see that it did.

Only weights of these ops: coremltools' compression of whole models has written other constants (position embeddings) that
no op scales back. Biases, norms, embeddings and constants stay in half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from edgewise.errors import InputError

SMALLEST = 1024
"""Elements. What a smaller weight would save is less than its scales and its op cost."""
BLOCKS = (32, 16)
"""Sizes of a block of inputs that share a scale at four bits: the first that divides the inputs of a layer."""
_QUANTISED = ("linear", "conv")


def quantised(model: Any, bits: int, only: Collection[str] | None = None) -> Any:
    """coremltools' model with its weights as whole numbers of 8 bits (one scale an output) or of 4 (one scale a block of inputs).
    `only`: the names of those that are quantised; None: all.

    Weights at 4 bits whose inputs no block divides, as those of a convolution over colours, get 8. Raises `InputError` if a
    weight comes out as something else than it was, rounded, or any other constant as something else than it was.
    """
    import coremltools.optimize.coreml as optimize

    found = {name: (weight, axis) for name, weight, axis in _weights(model._mil_program)}
    before = {name: one for name, one in found.items() if only is None or name in only}
    others = {name: value for name, value in _constants(model._mil_program).items() if name not in before}
    steps = {name: _steps(weight, axis, bits) for name, (weight, axis) in before.items()}
    options: dict[str, Any] = {}
    for name, (_, block) in steps.items():
        kind = {"dtype": "int4", "granularity": "per_block", "block_size": block} if block else {"dtype": "int8"}
        options[name] = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=SMALLEST, **kind)
    if not options:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = optimize.linear_quantize_weights(model, optimize.OptimizationConfig(op_name_configs=options))
    for name, value in _constants(made._mil_program).items():
        if name in others and not np.array_equal(value, others[name], equal_nan=True):
            raise InputError(f"target coreml: coremltools changed the constant {name}, which was not to be quantised")
    after = {name: weight for name, weight, _ in _weights(made._mil_program, suffix="_quantized")}
    for name, (weight, _) in before.items():
        allowed, _ = steps[name]
        if name not in after or not np.all(np.abs(after[name] - weight) <= allowed):
            raise InputError(f"target coreml: coremltools did not quantise {name} as it was told")
    return made


def _constants(program: Any) -> dict[str, np.ndarray]:
    """The larger constants of a program, by name."""
    return {
        op.name: op.outputs[0].val.copy()  # which coremltools scales in place
        for op in program.functions["main"].operations
        if op.op_type == "const" and getattr(op.outputs[0].val, "size", 0) >= SMALLEST
    }


def _weights(program: Any, suffix: str = "") -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, values in single precision, and the axis of the inputs, of every weight that is worth quantising."""
    for op in program.functions["main"].operations:
        if op.op_type in _QUANTISED and op.weight.op is not None and op.weight.rank > 1:
            source = op.weight.op
            value = op.weight.val if source.op_type == "const" else source.materialized_val_inference()
            if value is not None and value.size >= SMALLEST:
                yield source.name.removesuffix(suffix), np.asarray(value, dtype=np.float32), 1


def _steps(weight: np.ndarray, axis: int, bits: int) -> tuple[np.ndarray, int]:
    """Half of the distance `(broadcast to the weight)` between two values that a weight can have, and the size of its blocks (0:
    there are none, and 8 bits)."""
    size = weight.shape[axis]
    block = next((n for n in BLOCKS if bits == 4 and size % n == 0), 0)
    rest = tuple(range(1, weight.ndim))
    if not block:
        largest, levels = np.abs(weight).max(rest, keepdims=True), 127
    else:
        # A block is of inputs alone: the places of a kernel share its scale.
        folded = np.abs(weight).reshape(weight.shape[0], size // block, -1).max(-1)
        largest, levels = np.repeat(folded, block, axis=1).reshape(*weight.shape[:2], *(1 for _ in weight.shape[2:])), 7
    # Scales are stored in half precision, and so are the products.
    return largest / levels * 0.51 + largest * 2e-3, block
