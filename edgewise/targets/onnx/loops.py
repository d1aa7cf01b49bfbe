"""Greedy selections as ONNX Loops: translations of `edgewise::farthest_points` and `edgewise::determinantal`.

Each mirrors its function in `edgewise.ops.greedy`, one pick in an iteration.
"""

# mypy: disable-error-code="arg-type, type-var, assignment, return-value, misc"
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import INT64, script
from onnxscript import opset18 as op  # in which the exporter builds, before it converts to the opset that is asked for
from onnxscript.values import Opset

from edgewise.ops import greedy

_OPSET = Opset("edgewise", 1)


@script(_OPSET, default_opset=op)
def _loop_farthest_points(distance, place, count, lowest, keep) -> INT64:  # type: ignore[no-untyped-def]
    diagonal = op.Equal(op.Unsqueeze(place, [1]), place)
    score = op.ReduceMin(op.Where(diagonal, op.Neg(lowest), distance), [1], keepdims=0)
    least = op.Expand(op.Neg(lowest), op.Shape(score))
    turns = op.Range(0, keep, 1)
    picks = op.Expand(0, op.Concat(op.Shape(score, start=0, end=1), op.Unsqueeze(keep, [0]), axis=0))
    for turn in range(keep):
        best = op.ReduceMax(score, [1], keepdims=1)
        index = op.ReduceMin(op.Where(op.Equal(score, best), place, count), [1], keepdims=1)
        row = op.GatherND(distance, op.Cast(index, to=7), batch_dims=1)
        least = op.Where(op.Equal(place, index), lowest, op.Min(least, row))
        score = op.Identity(least)
        picks = op.Where(op.Equal(turns, turn), op.Cast(index, to=7), picks)
    return picks


@script(_OPSET, default_opset=op)
def _loop_determinantal(kernel, place, count, lowest, keep, tolerance, tiny) -> INT64:  # type: ignore[no-untyped-def]
    zero = op.CastLike(0.0, kernel)
    diagonal = op.Equal(op.Unsqueeze(place, [1]), place)
    gain = op.ReduceSum(op.Where(diagonal, kernel, zero), [2], keepdims=0)
    floor = op.Mul(op.Abs(gain), tolerance)
    turns = op.Range(0, keep, 1)
    batch = op.Shape(gain, start=0, end=1)
    size = op.Unsqueeze(keep, [0])
    factor = op.Expand(zero, op.Concat(batch, size, op.Shape(gain, start=1, end=2), axis=0))
    picks = op.Expand(0, op.Concat(batch, size, axis=0))
    for turn in range(keep):
        best = op.ReduceMax(gain, [1], keepdims=1)
        index = op.ReduceMin(op.Where(op.Equal(gain, best), place, count), [1], keepdims=1)
        here = op.Equal(place, index)
        column = op.MatMul(factor, op.Unsqueeze(op.CastLike(here, kernel), [2]))
        projected = op.Squeeze(op.MatMul(op.Transpose(column, perm=[0, 2, 1]), factor), [1])
        rest = op.Sub(op.GatherND(kernel, op.Cast(index, to=7), batch_dims=1), projected)
        row = op.Where(op.Greater(best, zero), op.Div(rest, op.Sqrt(op.Max(best, tiny))), zero)
        left = op.Sub(gain, op.Mul(row, row))
        left = op.Where(op.Greater(left, floor), left, op.Min(gain, zero))
        gain = op.Where(here, lowest, left)
        now = op.Equal(turns, turn)
        factor = op.Where(op.Unsqueeze(now, [1]), op.Unsqueeze(row, [1]), factor)
        picks = op.Where(now, op.Cast(index, to=7), picks)
    return picks


def _matrix(value: Any) -> tuple[Any, torch.dtype]:
    """As `greedy.finite`: in at least fp32, with zeros for NaN, and no infinity."""
    double = str(value.dtype) == "DOUBLE"
    value = op.Cast(value, to=11 if double else 1)
    value = op.Where(op.IsNaN(value), op.CastLike(0.0, value), value)
    least, most = (op.CastLike(op.Constant(value_float=bound), value) for bound in (-greedy.MOST, greedy.MOST))
    return op.Clip(value, least, most), torch.float64 if double else torch.float32


def _constants(value: Any, count: int) -> tuple[Any, Any, Any]:
    """The numbers of all tokens, how many they are, and minus infinity, of the type of a value."""
    place = op.Constant(value_floats=[float(n) for n in range(count)])
    return op.CastLike(place, value), *(op.CastLike(op.Constant(value_float=n), value) for n in (float(count), -math.inf))


def _farthest_points(distance: Any, keep: int) -> Any:
    value, _ = _matrix(distance)
    return _loop_farthest_points(value, *_constants(value, distance.shape[1]), op.Constant(value_int=keep))


def _determinantal(kernel: Any, keep: int) -> Any:
    value, dtype = _matrix(kernel)
    tolerance, tiny = (
        op.CastLike(op.Constant(value_float=number), value)
        for number in (greedy.tolerance(dtype), float(torch.finfo(torch.float32).tiny))
    )
    return _loop_determinantal(value, *_constants(value, kernel.shape[1]), op.Constant(value_int=keep), tolerance, tiny)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.edgewise.farthest_points.default: _farthest_points,
    torch.ops.edgewise.determinantal.default: _determinantal,
}
