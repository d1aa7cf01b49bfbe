"""Quantise the weights of linear layers and convolutions, by coremltools, and see that it did.

Only weights of these ops: coremltools' compression of whole models has written other constants (position embeddings) that
no op scales back. Biases, norms, embeddings and constants stay in half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.palettes import palette

SMALLEST = 1024
"""Elements. What a smaller weight would save is less than its scales and its op cost."""
BLOCKS = (32, 16)
"""Sizes of a block of inputs that share a scale at four bits: the first that divides the inputs of a layer."""
PALETTE = 256
"""Values of a palette."""
_QUANTISED = ("linear", "conv")
_MOVES = ("transpose", "reshape", "expand_dims", "squeeze", "cast")
"""Ops that may stand between a quantised value and the layer that reads it."""


def quantised(model: Any, bits: int) -> Any:
    """coremltools' model with its weights as whole numbers of 8 bits (one scale an output) or of 4 (one scale a block of inputs).

    Weights at 4 bits whose inputs no block divides, as those of a convolution over colours, get 8. Raises `InputError` if a
    weight comes out as something else than it was, rounded, or any other constant as something else than it was.
    """
    import coremltools.optimize.coreml as optimize

    before = {name: (weight, axis) for name, weight, axis in _weights(model._mil_program)}
    steps = {name: _steps(weight, axis, bits) for name, (weight, axis) in before.items()}
    options: dict[str, Any] = {}
    for name, (_, block) in steps.items():
        kind = {"dtype": "int4", "granularity": "per_block", "block_size": block} if block else {"dtype": "int8"}
        options[name] = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=SMALLEST, **kind)
    made, after = _compressed(model, optimize.linear_quantize_weights, options, "_quantized")
    for name, (weight, _) in before.items():
        allowed, _ = steps[name]
        _check(name, name in after and bool(np.all(np.abs(after[name] - weight) <= allowed)))
    return made


def palettised(model: Any) -> Any:
    """coremltools' model with each of these weights as a palette of 256 values and an index of 8 bits for each element.

    Raises `InputError` if an element is not the value of its palette that is nearest to what it was, or any other constant is
    something else than it was.
    """
    import coremltools.optimize.coreml as optimize

    before = {name: weight for name, weight, _ in _weights(model._mil_program)}
    one = optimize.OpPalettizerConfig(
        mode="custom", lut_function=lambda weight: palette(weight, PALETTE), weight_threshold=SMALLEST
    )
    made, after = _compressed(model, optimize.palettize_weights, dict.fromkeys(before, one), "_palettized")
    for name, weight in before.items():
        values = np.unique(after[name]) if name in after else np.empty(0)
        _check(name, 0 < len(values) <= PALETTE and bool(np.all(np.abs(after[name] - weight) <= _distance(weight, values))))
    return made


def check_whole(model: Any) -> None:
    """Raise `InputError` if a layer that reads eight bits has a weight that is stored in floating point."""
    for op in model._mil_program.functions["main"].operations:
        if op.op_type in _QUANTISED and op.weight.op is not None and op.weight.op.op_type == "const":
            source = op.x.op
            while source is not None and source.op_type in _MOVES:
                source = source.x.op
            if source is not None and source.op_type == "dequantize":
                _check(op.weight.name, False)


def _distance(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How far each element is from the nearest of some ascending values."""
    right = np.clip(np.searchsorted(values, weight), 1, max(len(values) - 1, 1))
    near = np.abs(weight - values[right - 1])
    return np.minimum(near, np.abs(values[right] - weight)) if len(values) > 1 else near


def _check(name: str, right: bool) -> None:
    if not right:
        raise InputError(f"target coreml: coremltools did not quantise {name} as it was told")


def _compressed(model: Any, compress: Any, options: dict[str, Any], suffix: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The model after coremltools' `compress` with an option for each weight, and what the weights then are, by the names that they
    had. Raises `InputError` if another constant was changed."""
    import coremltools.optimize.coreml as optimize

    if not options:
        return model, {}
    others = {name: value for name, value in _constants(model._mil_program).items() if name not in options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = compress(model, optimize.OptimizationConfig(op_name_configs=options))
    for name, value in _constants(made._mil_program).items():
        if name in others and not np.array_equal(value, others[name], equal_nan=True):
            raise InputError(f"target coreml: coremltools changed the constant {name}, which was not to be quantised")
    return made, {name: weight for name, weight, _ in _weights(made._mil_program, suffix=suffix)}


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
