"""The table of ops: a MIL op is a plain numpy function whose parameters have the names of the op's inputs.

Floats come as float32 whatever the program declares, and what is given back is rounded and checked by the caller. A
parameter with a default is an optional input. Two keyword-only parameters are filled by the interpreter, for functions that
have them: `out`, what is declared of the outputs; `blocks`, the op's nested blocks as functions.
No function writes to an array that it was given.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.values import TensorType, Type

Function = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """One op: its function, the names of its inputs, which are required, which are lists of values, and what else it takes."""

    function: Function
    inputs: frozenset[str]
    required: frozenset[str]
    lists: frozenset[str]
    extras: frozenset[str]


OPS: dict[str, Op] = {}
"""Every op that the interpreter knows, by its MIL name."""


def op(*names: str, lists: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Register a function as the ops `names`. `lists`: inputs that hold a list of values."""

    def register(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        inputs = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
        entry = Op(
            function,
            inputs=frozenset(one.name for one in inputs),
            required=frozenset(one.name for one in inputs if one.default is one.empty),
            lists=frozenset(lists),
            extras=frozenset(one.name for one in parameters if one.kind is one.KEYWORD_ONLY),
        )
        for name in names:
            assert name not in OPS, name
            OPS[name] = entry
        return function

    return register


@dataclass(frozen=True)
class Out:
    """What the program declares of an op's outputs, and the bytes that one array may have."""

    types: tuple[Type, ...]
    max_bytes: int

    @property
    def tensor(self) -> TensorType:
        """The type of the first output."""
        first = self.types[0] if self.types else None
        if not isinstance(first, TensorType):
            raise InputError("its first output is not declared as a tensor")
        return first

    def promise(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the first output will have, before it is made. Raises `InputError` if another one is declared, or it
        is too large: what a few bytes of a program ask for may not fit any memory."""
        shape = tuple(int(size) for size in shape)
        if any(size < 0 for size in shape) or not self.tensor.fits(shape):
            raise InputError(f"its output would be of shape {list(shape)}, and is declared as {self.tensor}")
        self.room(shape, self.tensor.dtype.held.itemsize)
        return shape

    def room(self, shape: Sequence[int], itemsize: int = 4) -> None:
        """Raise `InputError` if an array of this shape would have more bytes than are allowed."""
        size = math.prod(int(size) for size in shape) * itemsize
        if size > self.max_bytes:
            raise InputError(
                f"it needs {size} bytes for an array of shape {list(shape)}; at most {self.max_bytes} are allowed"
            )


def whole(value: Any) -> int:
    """The number in a scalar, or in an array of one element."""
    return int(np.asarray(value).reshape(()))


def wholes(values: Any) -> tuple[int, ...]:
    """The numbers of a vector."""
    return tuple(int(one) for one in np.asarray(values).reshape(-1))


def text(value: Any) -> str:
    """The text in a scalar."""
    return str(np.asarray(value, dtype=object).reshape(()).item())


def axis_of(axis: Any, rank: int) -> int:
    """An axis counted from the front. Raises `InputError` if there is none."""
    number = whole(axis)
    if not -rank <= number < rank:
        raise InputError(f"axis {number} of a tensor of rank {rank}")
    return number % rank
