"""Greedy selections as OpenVINO Loops: what the frontend makes of `edgewise::farthest_points` and `edgewise::determinantal`.

Each mirrors its function in `edgewise.ops.greedy`, one pick in an iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as op
from openvino.frontend.pytorch import ConversionExtension

from edgewise.ops.greedy import MOST, tolerance


def extensions() -> list[Any]:
    """What a PyTorch frontend needs to read compression ops that were left whole."""
    return [
        ConversionExtension(f"edgewise.{name}.default", convert)
        for name, convert in (("farthest_points", _farthest_points), ("determinantal", _determinantal))
    ]


def _farthest_points(context: Any) -> list[Any]:
    matrix, number = _Matrix(context.get_input(0)), _Numbers(context.get_input(0))
    nearest = op.reduce_min(op.select(matrix.diagonal, number(np.inf), matrix.value), _axes(1), False)
    least = op.broadcast(number(np.inf), op.shape_of(nearest))

    def body(turn: Any, value: Any, state: list[Any]) -> tuple[Any, list[Any]]:
        _, index, here = _first_largest(state[0], matrix.count, number)
        closest = op.minimum(state[1], _row(value, index))
        closest = op.select(here, number(-np.inf), closest)
        return index, [closest, closest]

    return _loop(matrix, _keep(context), [nearest, least], body)


def _determinantal(context: Any) -> list[Any]:
    matrix, number, keep = _Matrix(context.get_input(0)), _Numbers(context.get_input(0)), _keep(context)
    gain = op.reduce_sum(op.select(matrix.diagonal, matrix.value, number(0)), _axes(2), False)
    floor = op.multiply(op.abs(gain), number(tolerance(number.torch_type)))
    shape = [matrix.batch, keep, matrix.count]
    factor = op.broadcast(number(0), op.constant(np.array(shape)))
    turns = op.constant(np.arange(keep, dtype=np.int32).reshape(1, keep, 1))

    def body(turn: Any, value: Any, state: list[Any]) -> tuple[Any, list[Any]]:
        gain, factor, floor = state
        best, index, here = _first_largest(gain, matrix.count, number)
        column = op.matmul(op.unsqueeze(op.convert(here, number.name), _axes(1)), factor, False, True)
        rest = op.subtract(_row(value, index), op.squeeze(op.matmul(column, factor, False, False), _axes(1)))
        root = op.sqrt(op.maximum(best, number(np.finfo(number.type).tiny)))
        row = op.select(op.greater(best, number(0)), op.divide(rest, root), number(0))
        left = op.subtract(gain, op.multiply(row, row))
        left = op.select(here, number(-np.inf), op.select(op.greater(left, floor), left, op.minimum(gain, number(0))))
        factor = op.select(op.equal(turns, turn), op.unsqueeze(row, _axes(1)), factor)
        return index, [left, factor, floor]

    return _loop(matrix, keep, [gain, factor, floor], body)


class _Numbers:
    """Constants of a value's floating-point type."""

    def __init__(self, value: Any) -> None:
        self.type = np.dtype(np.float64 if value.get_element_type() == openvino.Type.f64 else np.float32)
        self.torch_type = torch.float64 if self.type == np.float64 else torch.float32
        self.name = "f64" if self.type == np.float64 else "f32"

    def __call__(self, value: Any) -> Any:
        return op.constant(np.asarray(value, dtype=self.type))


class _Matrix:
    """The matrix `(B, N, N)` as `greedy.finite` has it, and where its diagonal is."""

    def __init__(self, value: Any) -> None:
        number = _Numbers(value)
        self.batch, _, self.count = (int(size) for size in value.get_shape())
        value = op.convert(value, number.name)
        value = op.select(op.is_nan(value), number(0), value)
        self.value = op.minimum(op.maximum(value, number(-MOST)), number(MOST))
        place = np.arange(self.count, dtype=np.int32)
        self.diagonal = op.equal(op.constant(place[None, :, None]), op.constant(place[None, None]))


def _axes(*axes: int) -> Any:
    return op.constant(np.array(axes, dtype=np.int64))


def _keep(context: Any) -> int:
    return int(context.get_values_from_const_input(1, None, int))


def _first_largest(score: Any, count: int, number: _Numbers) -> tuple[Any, Any, Any]:
    """The maximum `(B, 1)` of a score `(B, N)`, its lowest index in float, and where that is."""
    place = number(np.arange(count)[None])
    best = op.reduce_max(score, _axes(1), True)
    index = op.reduce_min(op.select(op.equal(score, best), place, number(count)), _axes(1), True)
    return best, index, op.equal(place, index)


def _row(matrix: Any, index: Any) -> Any:
    """The rows `(B, N)` of a matrix `(B, N, N)` at `(B, 1)`."""
    rows = op.gather(matrix, op.convert(index, "i32"), op.constant(np.int64(1)), 1)
    return op.squeeze(rows, _axes(1))


def _loop(
    matrix: _Matrix, keep: int, start: list[Any], body: Callable[[Any, Any, list[Any]], tuple[Any, list[Any]]]
) -> list[Any]:
    """`keep` iterations; gives the indices `(B, keep)` that they pick."""
    turn = op.parameter([], np.int32)
    value = op.parameter(list(matrix.value.get_output_shape(0)), _type(matrix.value))
    state = [op.parameter(list(one.get_output_shape(0)), _type(one)) for one in start]
    index, after = body(turn, value, state)
    going = op.constant(np.array([True]))
    results = [op.result(one) for one in (going, index, *after)]
    loop = op.loop(op.constant(np.int32(keep)), op.constant(np.array(True)))
    loop.set_function(openvino.Model(results, [turn, value, *state]))
    loop.set_special_body_ports([0, 0])
    loop.set_invariant_input(value, matrix.value.output(0))
    for parameter, first, result in zip(state, start, results[2:], strict=True):
        loop.set_merged_input(parameter, first.output(0), result.output(0))
    picks = loop.get_concatenated_slices(results[1].output(0), 0, 1, 1, -1, 1)
    return [op.convert(picks, "i64").output(0)]


def _type(node: Any) -> Any:
    return node.get_output_element_type(0).to_dtype()
