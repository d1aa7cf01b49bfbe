"""From the protobuf of a function to steps that can be run in order.

All that does not depend on data is checked here: every op is known and has the inputs that it needs, every name is defined
before it is used (so that nothing can be cyclic), every declared type can be read. Last uses are marked, so that values can
be freed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import OPS, Op
from edgewise.targets.coreml.interpreter.values import Blob, Type, read_type, read_value


@dataclass(frozen=True)
class Name:
    """A value that another op made, or an input of the function or block."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A value that is written in the program. It is read when it is needed, as it may be large."""

    message: Any
    where: str

    def read(self, blob: Blob) -> Any:
        return read_value(self.message, blob, self.where)


Source = Name | Literal


@dataclass
class Step:
    """One op to be run. `constant`: it depends on no input and is run once; `frees`: names that no later step uses."""

    op: Op
    kind: str
    where: str
    inputs: dict[str, list[Source]]
    outputs: tuple[tuple[str, Type], ...]
    blocks: tuple[Block, ...]
    constant: bool
    frees: tuple[str, ...] = ()

    def uses(self) -> Iterator[str]:
        """Names of all values that it reads, its blocks included."""
        for sources in self.inputs.values():
            yield from (one.name for one in sources if isinstance(one, Name))
        for block in self.blocks:
            yield from block.outputs
            for step in block.steps:
                yield from step.uses()


@dataclass
class Block:
    """Steps, and the names of what goes in and out. `own`: what it defines and no step frees."""

    inputs: tuple[tuple[str, Type], ...]
    outputs: tuple[str, ...] = ()
    steps: list[Step] = field(default_factory=list)
    own: tuple[str, ...] = ()


@dataclass
class Program:
    """A function that is ready to run: `types` holds the type of every name at its top level."""

    name: str
    block: Block
    types: dict[str, Type]

    def __len__(self) -> int:
        return sum(not step.constant for step in self.block.steps)


CONST = "const"


class Scope:
    """The names that are visible at a place of the program: what each is called in the steps, and its type.

    Two nested blocks may use one name for two values. So a name that is defined in a nested block gets a number in the steps, and
    only those of the function itself are kept as they are.
    """

    def __init__(self, outer: Scope | None = None) -> None:
        self.names: dict[str, str] = dict(outer.names) if outer else {}
        self.types: dict[str, Type] = dict(outer.types) if outer else {}
        self._blocks: Iterator[int] = outer._blocks if outer else itertools.count(1)
        self._suffix = f"@{next(self._blocks)}" if outer else ""

    def define(self, name: str, type_: Type, where: str) -> str:
        """Make a name visible from here on, and give what it is called in the steps."""
        if not name or name in self.names:
            raise InputError(f"{where} defines the name '{name}', which is " + ("there already" if name else "empty"))
        self.names[name], self.types[name] = name + self._suffix, type_
        return name + self._suffix


def compile_function(message: Any, name: str) -> Program:
    """Read a protobuf `Function`. Raises `InputError` that names the op, the function and the place of what is wrong."""
    where = f"function '{name}'"
    if message.opset not in message.block_specializations:
        raise InputError(f"{where} has no block for its opset '{message.opset}'")
    scope = Scope()
    block = _block(message.block_specializations[message.opset], message.inputs, scope, where)
    return Program(name, block, scope.types)


def _block(message: Any, inputs: Any, scope: Scope, where: str) -> Block:
    """Compile the operations of a block. `inputs`: those of the function for its own block, and else those of the block."""
    block = Block(tuple(_defined(one, scope, where, "") for one in inputs))
    for place, operation in enumerate(message.operations):
        block.steps.append(_step(operation, scope, f"{where}, op {place}"))
    for name in message.outputs:
        if name not in scope.names:
            raise InputError(f"{where} gives back '{name}', which nothing defines")
    block.outputs = tuple(scope.names[name] for name in message.outputs)
    _mark_frees(block)
    return block


def _defined(message: Any, scope: Scope, where: str, kind: str) -> tuple[str, Type]:
    type_ = read_type(message.type, f"{where}: {kind}'{message.name}'")
    return scope.define(message.name, type_, where), type_


def _step(message: Any, scope: Scope, where: str) -> Step:
    name = message.outputs[0].name if message.outputs else ""
    where = f"{where} ({message.type} '{name}')" if name else f"{where} ({message.type})"
    op = OPS.get(message.type)
    if op is None:
        raise InputError(f"{where}: this interpreter does not know the op '{message.type}'")
    inputs = {
        parameter: [_source(binding, scope, f"{where}: input '{parameter}'") for binding in argument.arguments]
        for parameter, argument in message.inputs.items()
    }
    constant = message.type == CONST or message.type.startswith("constexpr_")
    if constant:
        # Older versions keep the inputs of these in the attributes.
        for key, value in message.attributes.items():
            if key != "name":
                inputs[key] = [Literal(value, f"{where}: '{key}'")]
    _check_inputs(op, inputs, where)
    blocks = tuple(_block(one, one.inputs, Scope(scope), f"{where}, block {i}") for i, one in enumerate(message.blocks))
    if bool(blocks) != ("blocks" in op.extras):
        raise InputError(f"{where} has {len(blocks)} nested blocks")
    outputs = tuple(_defined(one, scope, where, "output ") for one in message.outputs)
    return Step(op, message.type, where, inputs, outputs, blocks, constant)


def _source(binding: Any, scope: Scope, where: str) -> Source:
    if binding.HasField("value"):
        return Literal(binding.value, where)
    if binding.name not in scope.names:
        raise InputError(f"{where} is '{binding.name}', which nothing before it defines")
    return Name(scope.names[binding.name])


def _check_inputs(op: Op, inputs: dict[str, list[Source]], where: str) -> None:
    for name, sources in inputs.items():
        if name not in op.inputs:
            raise InputError(f"{where} has an input '{name}', which this interpreter does not know")
        if len(sources) != 1 and name not in op.lists:
            raise InputError(f"{where} has {len(sources)} values for its input '{name}', and takes one")
    missing = sorted(op.required - set(inputs))
    if missing:
        raise InputError(f"{where} lacks its input '{missing[0]}'")


def _mark_frees(block: Block) -> None:
    """Give every step the names that are not used after it. What is constant, or defined outside of the block, is kept."""
    mine = {name for name, _ in block.inputs}
    mine.update(name for step in block.steps if not step.constant for name, _ in step.outputs)
    kept = set(block.outputs)
    freed: set[str] = set()
    for step in reversed(block.steps):
        names = {*step.uses(), *(name for name, _ in step.outputs)}
        step.frees = tuple(sorted((names & mine) - kept))
        freed.update(step.frees)
        kept |= names
    block.own = tuple(sorted(mine - freed))
