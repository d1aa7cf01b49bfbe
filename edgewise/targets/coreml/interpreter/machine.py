"""Run a compiled function on numpy arrays: step by step, each result checked against its declared type and rounded as it says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.program import Block, Literal, Program, Source, Step
from edgewise.targets.coreml.interpreter.registry import Out
from edgewise.targets.coreml.interpreter.values import Blob, TensorType, Type, held

MAX_BYTES = 8 << 30
MAX_STEPS = 20_000_000

Watch = Callable[[str, np.ndarray], None]


@dataclass
class State:
    """A tensor that is kept between calls. Writing puts another array in, so that what was read before stays as it was."""

    type: TensorType
    array: np.ndarray

    @classmethod
    def zeros(cls, type_: TensorType) -> State:
        return cls(type_, np.zeros([size or 0 for size in type_.shape], type_.dtype.held))


@dataclass
class Machine:
    """What running a program needs and keeps: its weights, read once, and the limits.

    Args:
        program: the function.
        blob: gives the bytes of a weight, see `Package.blob`.
        max_bytes: of all values that are alive at a time, weights included. Values that share memory count twice.
        max_steps: ops in one run, so that a loop ends.
    """

    program: Program
    blob: Blob
    max_bytes: int = MAX_BYTES
    max_steps: int = MAX_STEPS
    _constants: dict[str, Any] = field(default_factory=dict)
    _constant_bytes: int = 0

    def run(self, feeds: Mapping[str, Any], watch: Watch | None = None) -> dict[str, Any]:
        """Run once. `feeds` holds for every input an array as it is held (see `values`), or a `State`. Gives the outputs by
        name, as they are held. `watch(name, array)` is called with every value that depends on them."""
        with np.errstate(all="ignore"):
            return _Run(self, dict(feeds), watch).function()


class _Run:
    """One run: the values that are alive, and what they cost."""

    def __init__(self, machine: Machine, values: dict[str, Any], watch: Watch | None) -> None:
        self.machine = machine
        self.values = values
        self.watch = watch
        self.steps = 0
        self.bytes = sum(_bytes(value) for value in values.values())

    def function(self) -> dict[str, Any]:
        block = self.machine.program.block
        self.steps_of(block)
        return {name: self.value(name) for name in block.outputs}

    def nested(self, block: Block, *arguments: Any) -> tuple[Any, ...]:
        """Run a nested block with its arguments, give back its outputs, and keep nothing."""
        if len(arguments) != len(block.inputs):
            raise InputError(f"a nested block takes {len(block.inputs)} values, and is given {len(arguments)}")
        for (name, type_), value in zip(block.inputs, arguments, strict=True):
            self.define(name, type_, value)
        self.steps_of(block)
        outputs = tuple(self.value(name) for name in block.outputs)
        for name in block.own:
            self.free(name)
        return outputs

    def steps_of(self, block: Block) -> None:
        for step in block.steps:
            if not (step.constant and all(name in self.machine._constants for name, _ in step.outputs)):
                self.step(step)
            for name in step.frees:
                self.free(name)

    def free(self, name: str) -> None:
        self.bytes -= _bytes(self.values.pop(name, None))

    def step(self, step: Step) -> None:
        self.steps += 1
        if self.steps > self.machine.max_steps:
            raise InputError(f"{step.where}: the program did not end after {self.machine.max_steps} ops")
        try:
            declared = sum(type_.held_bytes for _, type_ in step.outputs if isinstance(type_, TensorType))
            self.reserve(declared)
            results = self.call(step)
            if len(results) != len(step.outputs):
                raise InputError(f"it gives {len(results)} values, and {len(step.outputs)} are declared")
            for (name, type_), result in zip(step.outputs, results, strict=True):
                self.define(name, type_, result, constant=step.constant)
        except InputError as error:
            # A message from a nested block says where already.
            raise error if str(error).startswith(step.where) else InputError(f"{step.where}: {error}") from error
        except Exception as error:
            # A program that does not fit its own data makes numpy raise nearly anything.
            raise InputError(f"{step.where} cannot be run: {str(error) or type(error).__name__}") from error

    def call(self, step: Step) -> tuple[Any, ...]:
        arguments = {name: self.argument(step, name, sources) for name, sources in step.inputs.items()}
        for extra in step.op.extras:
            if extra == "out":
                arguments["out"] = Out(tuple(type_ for _, type_ in step.outputs), self.machine.max_bytes - self.live)
            else:
                arguments["blocks"] = [functools.partial(self.nested, block) for block in step.blocks]
        result = step.op.function(**arguments)
        return result if isinstance(result, tuple) else () if result is None else (result,)

    def argument(self, step: Step, name: str, sources: Sequence[Source]) -> Any:
        values = [self.source(one) for one in sources]
        return values if name in step.op.lists else values[0]

    def source(self, source: Source) -> Any:
        if isinstance(source, Literal):
            return held(source.read(self.machine.blob))
        return self.value(source.name)

    def value(self, name: str) -> Any:
        value = self.values.get(name)
        return self.machine._constants[name] if value is None else value

    def define(self, name: str, type_: Type, value: Any, *, constant: bool = False) -> None:
        if isinstance(type_, TensorType):
            value = type_.settle(np.asarray(value))
        size = _bytes(value)
        self.reserve(size)
        if constant:
            self.machine._constants[name] = value
            self.machine._constant_bytes += size
        else:
            self.bytes += size
            self.values[name] = value
        if self.watch is not None and not constant and isinstance(value, np.ndarray):
            self.watch(name, value)

    @property
    def live(self) -> int:
        return self.bytes + self.machine._constant_bytes

    def reserve(self, size: int) -> None:
        if self.live + size > self.machine.max_bytes:
            raise InputError(
                f"it needs {size} bytes beside the {self.live} in use, and at most {self.machine.max_bytes} are allowed"
            )


def _bytes(value: Any) -> int:
    if isinstance(value, State):
        return value.array.nbytes
    return value.nbytes if isinstance(value, np.ndarray) else 0
