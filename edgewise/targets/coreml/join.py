"""Several packages as the functions of one, which holds every weight once.

Weights are the same where their bytes and their types are, whatever they are called: what a pass or a quantisation made
differently in two functions stays two weights, and all else is shared. Nothing else is changed, so that a function computes
bit for bit what its package did. Needs protobuf alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from edgewise.errors import InputError
from edgewise.targets.coreml.package import HEADER, SENTINEL, Blob, Package
from edgewise.targets.coreml.ports import METADATA_KEY, key_of
from edgewise.targets.coreml.schema import Model
from edgewise.targets.coreml.write import weights_folder, write_rest

MAIN = "main"
IOS18 = 9
"""The specification version of the first systems whose packages hold several functions."""

_FILE = "weight.bin"
_START = struct.Struct("<II56x")
_STORAGE = 2
_ALIGNED = 64


def join(parts: Mapping[str, Sequence[Path]], package: Path) -> list[Path]:
    """Write packages with one function each, by the name that it gets, to one at the folder `package`; the first is the default.

    `parts`: the files of each, its `Manifest.json` first. Gives the files. Raises `InputError` if a package is damaged, is of
    systems that know no functions, or has several.
    """
    whole = Model()
    whole.description.defaultFunctionName = next(iter(parts))
    with open(weights_folder(package) / _FILE, "wb") as file:
        weights = _Weights(file)
        for name, files in parts.items():
            _add(whole, name, Package.open(Path(files[0]).parent), weights)
        weights.finish()
    return write_rest(whole, package, [weights_folder(package) / _FILE])


def _add(whole: Any, name: str, part: Package, weights: _Weights) -> None:
    model = part.model
    if list(model.mlProgram.functions) != [MAIN]:
        names = ", ".join(sorted(model.mlProgram.functions))
        raise InputError(f"{part.path} has the functions {names}, and packages of {MAIN} alone are joined")
    if model.specificationVersion < IOS18:
        raise InputError(f"{part.path} is for systems before iOS 18, whose packages have one function")
    whole.specificationVersion = max(whole.specificationVersion, model.specificationVersion)
    whole.mlProgram.version = model.mlProgram.version
    about = whole.description.functions.add(name=name)
    about.input.extend(model.description.input)
    about.output.extend(model.description.output)
    about.state.extend(model.description.state)
    metadata = model.description.metadata.userDefined
    if METADATA_KEY in metadata:
        whole.description.metadata.userDefined[key_of(name)] = metadata[METADATA_KEY]
    function = whole.mlProgram.functions[name]
    function.CopyFrom(model.mlProgram.functions[MAIN])
    for _, block in sorted(function.block_specializations.items()):
        for value in _values(block):
            blob = value.blobFileValue
            blob.offset = weights.add(part.stored(blob.fileName, blob.offset))
            blob.fileName = f"@model_path/weights/{_FILE}"


def _values(block: Any) -> Iterator[Any]:
    """The values of a block that lie in a file, in an order that is the same every time."""
    for operation in block.operations:
        for _, argument in sorted(operation.inputs.items()):
            yield from (one.value for one in argument.arguments if one.value.HasField("blobFileValue"))
        yield from (value for _, value in sorted(operation.attributes.items()) if value.HasField("blobFileValue"))
        for nested in operation.blocks:
            yield from _values(nested)


class _Weights:
    """A file of weights that is being written: its own header, and blobs, each with a header, at multiples of 64 bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._known: dict[tuple[int, int, bytes], int] = {}
        file.write(_START.pack(0, _STORAGE))

    def add(self, blob: Blob) -> int:
        """Where the header of a blob lies, which is written unless the same one is there."""
        key = (blob.code, blob.unused, hashlib.sha256(blob.data.data).digest())
        if key not in self._known:
            offset = self._file.tell()
            self._known[key] = offset
            start = offset + HEADER.size
            self._file.write(HEADER.pack(SENTINEL, blob.code, len(blob.data), start, blob.unused))
            self._file.write(blob.data.data)
            self._file.write(bytes(-len(blob.data) % _ALIGNED))
        return self._known[key]

    def finish(self) -> None:
        """Say in front how many blobs there are."""
        self._file.seek(0)
        self._file.write(_START.pack(len(self._known), _STORAGE))
