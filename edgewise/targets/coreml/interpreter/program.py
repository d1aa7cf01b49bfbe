"""From the protobuf of a function to steps that can be run in order.

All that does not depend on data is checked here: every op is known and has the inputs that it needs, every name is defined
before it is used (so that nothing can be cyclic), every declared type can be read. Last uses are marked, so that values can
be freed.
"""

from __future__ import annotations

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
    name: str
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
    """Steps, and the names of what goes in and out."""

    inputs: tuple[tuple[str, Type], ...]
    outputs: tuple[str, ...]
    steps: list[Step] = field(default_factory=list)


@dataclass
class Program:
    """A function that is ready to run: `types` holds the type of every name at its top level."""

    name: str
    block: Block
    types: dict[str, Type]

    def __len__(self) -> int:
        return sum(not step.constant for step in self.block.steps)


CONST = "const"


def compile_function(message: Any, name: str) -> Program:
    """Read a protobuf `Function`. Raises `InputError` that names the op, the function and the place of what is wrong."""
    where = f"function '{name}'"
    block = message.block_specializations.get(message.opset) if message.opset in message.block_specializations else None
    if block is None:
        raise InputError(f"{where} has no block for its opset '{message.opset}'")
    inputs = tuple(_declared(one, where) for one in message.inputs)
    types: dict[str, Type] = {}
    for one, type_ in inputs:
        _define(one, type_, types, where)
    compiled = _block(block, inputs, types, where)
    return Program(name, compiled, types)


def _declared(message: Any, where: str) -> tuple[str, Type]:
    return message.name, read_type(message.type, f"{where}: '{message.name}'")


def _define(name: str, type_: Type, types: dict[str, Type], where: str) -> None:
    if not name or name in types:
        raise InputError(f"{where} defines the name '{name}', which is " + ("there already" if name else "empty"))
    types[name] = type_


def _block(message: Any, inputs: tuple[tuple[str, Type], ...], types: dict[str, Type], where: str) -> Block:
    """Compile the operations of a block. `types` holds what is visible, and is added to."""
    block = Block(inputs, tuple(message.outputs))
    for place, operation in enumerate(message.operations):
        block.steps.append(_step(operation, types, f"{where}, op {place}"))
    for name in block.outputs:
        if name not in types:
            raise InputError(f"{where} gives back '{name}', which nothing defines")
    _mark_frees(block)
    return block


def _step(message: Any, types: dict[str, Type], where: str) -> Step:
    outputs = tuple((one.name, one.type) for one in message.outputs)
    name = outputs[0][0] if outputs else ""
    where = f"{where} ({message.type} '{name}')" if name else f"{where} ({message.type})"
    op = OPS.get(message.type)
    if op is None:
        raise InputError(f"{where}: this interpreter does not know the op '{message.type}'")
    inputs = {
        parameter: [_source(binding, types, f"{where}: input '{parameter}'") for binding in argument.arguments]
        for parameter, argument in message.inputs.items()
    }
    constant = message.type == CONST or message.type.startswith("constexpr_")
    if constant:
        # Older versions keep the inputs of these in the attributes.
        for key, value in message.attributes.items():
            if key != "name":
                inputs[key] = [Literal(value, f"{where}: '{key}'")]
    _check_inputs(op, inputs, where)
    blocks = tuple(_nested(one, types, f"{where}, block {index}") for index, one in enumerate(message.blocks))
    if bool(blocks) != ("blocks" in op.extras):
        raise InputError(f"{where} has {len(blocks)} nested blocks")
    typed = tuple((one, read_type(type_, f"{where}: output '{one}'")) for one, type_ in outputs)
    for one, type_ in typed:
        _define(one, type_, types, where)
    return Step(op, message.type, name, where, inputs, typed, blocks, constant)


def _nested(message: Any, types: dict[str, Type], where: str) -> Block:
    """A block sees what is outside of it, and nothing outside sees what it defines."""
    inner = dict(types)
    inputs = tuple(_declared(one, where) for one in message.inputs)
    for name, type_ in inputs:
        _define(name, type_, inner, where)
    return _block(message, inputs, inner, where)


def _source(binding: Any, types: dict[str, Type], where: str) -> Source:
    if binding.HasField("value"):
        return Literal(binding.value, where)
    if binding.name not in types:
        raise InputError(f"{where} is '{binding.name}', which nothing before it defines")
    return Name(binding.name)


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
    for step in reversed(block.steps):
        names = {*step.uses(), *(name for name, _ in step.outputs)}
        step.frees = tuple(sorted((names & mine) - kept))
        kept |= names
