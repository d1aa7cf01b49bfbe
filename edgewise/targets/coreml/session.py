"""Run a saved Core ML package, of whoever made it, on numpy arrays by the interpreter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bundle.manifest import TensorInfo
from edgewise.errors import InputError, unknown
from edgewise.targets.base import Session, check_threads
from edgewise.targets.coreml.features import Feature, features
from edgewise.targets.coreml.interpreter import (
    MAX_BYTES,
    MAX_STEPS,
    Machine,
    OtherType,
    Program,
    State,
    StateType,
    TensorType,
    Type,
    Watch,
    compile_function,
)
from edgewise.targets.coreml.interpreter.values import held
from edgewise.targets.coreml.package import Package
from edgewise.targets.coreml.ports import METADATA_KEY, Port, key_of, parse


class InterpreterSession(Session):
    """One function of a package; `program` holds its steps.

    States start with zeros and keep their values between runs; `reset` makes them zeros again.

    Args:
        path: the package, a folder.
        function: of a package with several; by default the one that the package names as its default, or else `main`.
        threads: checked and not used: numpy's BLAS takes its number of threads from the environment when it is loaded
            (`OMP_NUM_THREADS`), and all else runs in one.
        max_bytes: what all values that are alive at a time may have, weights included.
        max_steps: ops in one run, so that every loop ends.

    Raises `InputError` if the package is damaged, has an op that is not known, or has no such function.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        function: str | None = None,
        threads: int | None = None,
        max_bytes: int = MAX_BYTES,
        max_steps: int = MAX_STEPS,
    ) -> None:
        check_threads(threads)
        self.package = Package.open(path)
        where = str(self.package.path)
        try:
            self.function = _chosen(self.package, function)
            program = compile_function(self.package.model.mlProgram.functions[self.function], self.function)
            self._features = features(self.package.model.description, self.function)
            self.inputs = tuple(
                _info(name, type_, self._features.get(name))
                for name, type_ in program.block.inputs
                if not isinstance(type_, StateType)
            )
            self.outputs = tuple(_output(name, program) for name in program.block.outputs)
            self._states = _states(program, max_bytes)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        self._types = dict(program.block.inputs)
        self.program = program
        self._machine: Machine | None = Machine(program, self.package.blob, max_bytes, max_steps)

    @property
    def states(self) -> dict[str, np.ndarray]:
        """What the states hold, by name, as they are stored."""
        return {name: _stored(state.array, state.type) for name, state in self._states.items()}

    def reset(self, states: Mapping[str, np.ndarray] | None = None) -> None:
        """Fill all states with zeros, or those of `states` with these arrays. Raises `InputError` if one does not fit."""
        for name in states or ():
            if name not in self._states:
                raise unknown("state", name, self._states)
        for name, state in self._states.items():
            if states is None:
                state.array = State.zeros(state.type).array
            elif name in states:
                try:
                    state.array = state.type.settle(held(np.array(states[name])))
                except InputError as error:
                    raise InputError(f"state '{name}': {error}") from error

    def _checked(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs whose shape may vary are checked against what the package allows, the others as for every session."""
        varying = {}
        fixed = self.inputs
        for info in self.inputs:
            feature, array = self._features.get(info.name), feeds.get(info.name)
            if feature is not None and feature.varies and isinstance(array, np.ndarray):
                if not feature.allows(array.shape):
                    raise InputError(
                        f"input '{info.name}' has shape {array.shape}; this package takes {feature.allowed}"
                    )
                varying[info.name] = info.model_copy(update={"shape": array.shape})
        self.inputs = tuple(varying.get(info.name, info) for info in fixed)
        try:
            return super()._checked(feeds)
        finally:
            self.inputs = fixed

    def run(self, feeds: Mapping[str, np.ndarray], *, watch: Watch | None = None) -> dict[str, np.ndarray]:
        """Run once, see `Session.run`. `watch(name, array)` is called with every value that is
        computed from them, halves as float32."""
        return self._compute(self._checked(feeds), watch)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._compute(feeds, None)

    def _compute(self, feeds: dict[str, np.ndarray], watch: Watch | None) -> dict[str, np.ndarray]:
        if self._machine is None:
            raise InputError("this session was closed; load the artifact again")
        values = {**{name: held(array) for name, array in feeds.items()}, **self._states}
        before = {name: state.array for name, state in self._states.items()}
        try:
            outputs = self._machine.run(values, watch)
        except InputError as error:
            # A run that failed half-way leaves no half-written state.
            for name, array in before.items():
                self._states[name].array = array
            raise InputError(f"{self.package.path}: {error}") from error
        types = self.program.types
        return {name: _stored(value, types[name]) for name, value in outputs.items()}

    def placement(self) -> dict[str, int] | None:
        return None if self._machine is None else {"CPU": len(self.program)}

    def close(self) -> None:
        self._machine = None


def functions(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the functions of a package, the default one first."""
    package = Package.open(path)
    default = _chosen(package, None)
    return (default, *sorted(set(package.model.mlProgram.functions) - {default}))


def _chosen(package: Package, function: str | None) -> str:
    names = sorted(package.model.mlProgram.functions)
    if function is not None:
        if function not in names:
            raise unknown("function", function, names)
        return function
    default = package.model.description.defaultFunctionName
    for name in (default, "main", *names):
        if name in names:
            return name
    raise InputError("the program has no function")


def _info(name: str, type_: Type, feature: Feature | None) -> TensorInfo:
    if not isinstance(type_, TensorType):
        raise InputError(f"input '{name}' is a {getattr(type_, 'kind', 'state')}, which cannot be fed")
    shape = tuple(size or 0 for size in type_.shape)
    if None in type_.shape:
        if feature is None or not type_.fits(feature.shape) or min(feature.shape) < 0:
            raise InputError(
                f"input '{name}' is of type {type_}, and the package does not say which shapes it may have"
            )
        shape = feature.shape
    return TensorInfo(name=name, shape=shape, dtype=type_.dtype.stored.name, meaning=feature.meaning if feature else "")


def _output(name: str, program: Program) -> TensorInfo:
    type_ = program.types[name]
    if isinstance(type_, TensorType):
        # A size that depends on the input is not known yet, and is told as 0.
        dtype = "str" if type_.dtype.name == "string" else type_.dtype.stored.name
        return TensorInfo(name=name, shape=tuple(size or 0 for size in type_.shape), dtype=dtype)
    if isinstance(type_, OtherType) and type_.kind == "dictionary":
        return TensorInfo(name=name, shape=(0,), dtype="float32", meaning="probabilities in the order of the classes")
    raise InputError(f"output '{name}' is neither a tensor nor a dictionary of probabilities")


def _states(program: Program, max_bytes: int) -> dict[str, State]:
    states, total = {}, 0
    for name, type_ in program.block.inputs:
        if isinstance(type_, StateType):
            total += type_.tensor.held_bytes
            if None in type_.tensor.shape or total > max_bytes:
                raise InputError(
                    f"state '{name}' is of type {type_.tensor}: its size is not known, or beyond {max_bytes} bytes"
                )
            states[name] = State.zeros(type_.tensor)
    return states


def _stored(value: Any, type_: Type) -> np.ndarray:
    """A copy of a value as the package declares it, which the caller may keep and change."""
    if isinstance(type_, TensorType) and type_.dtype.name != "string":
        return np.array(value, dtype=type_.dtype.stored, order="C")
    return np.array(value, dtype=str if isinstance(type_, TensorType) else None)


class CoreMLSession(Session):
    """A package that edgewise made: it takes and gives what the program does, by the ports that the package keeps.

    `files`: those of the package, its `Manifest.json` first. `function`: see `InterpreterSession`.
    """

    stand_in: str | None = "the interpreter of Core ML packages in the place of Core ML"
    no_placement = "the interpreter is no unit of Core ML, which tells its plan on a Mac alone"

    def __init__(self, files: Sequence[Path], *, function: str | None = None, threads: int | None = None) -> None:
        self._session = InterpreterSession(Path(files[0]).parent, function=function, threads=threads)
        metadata = self._session.package.model.description.metadata.userDefined
        stated = metadata.get(key_of(self._session.function), metadata.get(METADATA_KEY))
        if stated is None:
            raise InputError(
                f"{self._session.package.path} was not made by edgewise: it does not say what its inputs are"
            )
        try:
            self._inputs, self._outputs, self._states = parse(stated)
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self._session.package.path}: its ports cannot be read: {error}") from error
        kept = [TensorInfo(name=name, shape=v.shape, dtype=v.dtype.name) for name, v in self._session.states.items()]
        every = ((self._inputs, self._session.inputs), (self._outputs, self._session.outputs), (self._states, kept))
        for ports, found in every:
            have = {info.name: (info.shape, info.dtype) for info in found}
            for port in ports:
                if have.get(port.feature) != (port.stored_shape, port.stored):
                    raise InputError(
                        f"{self._session.package.path}: '{port.name}' should be {port.feature}, {port.stored} {port.stored_shape}, "
                        f"and the program has {have.get(port.feature)}"
                    )
        self.inputs = tuple(_port_info(port) for port in self._inputs)
        self.outputs = tuple(_port_info(port) for port in self._outputs)
        self.kept = tuple(_port_info(port) for port in self._states)

    @property
    def package(self) -> Package:
        return self._session.package

    @property
    def ports(self) -> tuple[list[Port], list[Port]]:
        """Inputs and outputs, and what they stand for."""
        return self._inputs, self._outputs

    def run(self, feeds: Mapping[str, np.ndarray], *, watch: Watch | None = None) -> dict[str, np.ndarray]:
        """Run once, see `Session.run`; `watch` as for `InterpreterSession.run`."""
        return self._compute(self._taken(feeds), watch)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._compute(feeds, None)

    def _compute(self, feeds: dict[str, np.ndarray], watch: Watch | None) -> dict[str, np.ndarray]:
        stored = {port.feature: _fed(feeds[port.name], port) for port in self._inputs}
        outputs = self._computed(stored, watch)
        return {port.name: outputs[port.feature].reshape(port.shape).astype(port.dtype) for port in self._outputs}

    def _computed(self, stored: dict[str, np.ndarray], watch: Watch | None) -> dict[str, np.ndarray]:
        """What the package gives, by its own names, for arrays by its own names."""
        return self._session.run(stored, watch=watch)

    def _write(self, states: dict[str, np.ndarray]) -> None:
        self._store({port.feature: _fed(states[port.name], port) for port in self._states if port.name in states})

    def _store(self, states: dict[str, np.ndarray]) -> None:
        """Write states by the package's own names."""
        self._session.reset(states)

    def reset(self) -> None:
        """Fill all states with zeros."""
        self._session.reset()

    def close(self) -> None:
        self._session.close()


def _port_info(port: Port) -> TensorInfo:
    return TensorInfo(name=port.name, shape=port.shape, dtype=port.dtype)


def _fed(array: np.ndarray, port: Port) -> np.ndarray:
    """An input as the package stores it. Raises `InputError` if a whole number does not fit."""
    with np.errstate(over="ignore"):
        stored = array.astype(port.stored).reshape(port.stored_shape)
    if port.image and not (np.array_equal(array, np.rint(array)) and array.min() >= 0 and array.max() <= 255):
        raise InputError(f"input '{port.name}' is an image, of pixels that are whole numbers from 0 to 255, and these are not")
    if array.dtype.kind in "iu" and not np.array_equal(stored.reshape(array.shape), array):
        raise InputError(f"input '{port.name}' has numbers beyond the range of {port.stored}, which the package holds")
    return stored
