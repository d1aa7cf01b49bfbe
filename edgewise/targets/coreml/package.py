"""Read a saved Core ML package: `Manifest.json`, the model's protobuf, and the blobs of `weight.bin`.

A package may come from anywhere. Nothing outside of its folder is read, no size that it states is believed before it was
compared with the file, and whatever is wrong becomes an `InputError` that says where.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from google.protobuf.message import DecodeError

from edgewise.bundle.manifest import path_fault
from edgewise.errors import InputError
from edgewise.targets.coreml.schema import Model

MANIFEST_NAME = "Manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_MODEL_BYTES = (1 << 31) - 1
"""What a protobuf message may have."""

_MEND = "Copy the package again, or convert the model again."
_MODEL_PATH = "@model_path/"

# A blob's header: a mark, the type of its elements, its size in bytes, where it starts in the file, unused bits at its end.
HEADER = struct.Struct("<IIQQQ32x")
SENTINEL = 0xDEADBEEF

BLOB_TYPES = {
    **{1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 5: "bf16", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1"},
    **{10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32", 16: "fp8e4m3fn", 17: "fp8e5m2"},
}


@dataclass(frozen=True)
class Blob:
    """A blob as it lies in a file: the code of its type, the unused bits at its end, and its bytes `(size,)`."""

    code: int
    unused: int
    data: np.ndarray


@dataclass(frozen=True)
class Package:
    """An opened package: `path` is its folder, `model` the message `Model`, `folder` where its model file lies (`@model_path`)."""

    path: Path
    model: Any
    folder: str

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Package:
        """Open the package in the folder `path`. Raises `InputError` if it is no package or is damaged."""
        root = Path(path)
        name = _model_file(root)
        model = Model()
        try:
            model.ParseFromString(_read(root, name, MAX_MODEL_BYTES))
        except DecodeError as error:
            raise InputError(f"{root / name} is not a Core ML model, or is damaged: {error}. {_MEND}") from error
        if not model.HasField("mlProgram"):
            raise InputError(
                f"{root} holds no ML Program (specification version {model.specificationVersion}): models of older kinds, such "
                f'as neural networks and pipelines, cannot be run; convert it with convert_to="mlprogram"'
            )
        return cls(root, model, name.rpartition("/")[0])

    def blob(self, file_name: str, offset: int, dtype: str, bits: int) -> np.ndarray:
        """The bytes `(size,)` of the blob whose header lies at `offset` in a file such as `@model_path/weights/weight.bin`.

        `bits` is what the program declares: elements times bits of `dtype`. Raises `InputError` if the file, the header or the size
        do not fit.
        """

        def fits(code: int, size: int, unused: int) -> str | None:
            if BLOB_TYPES.get(code) != dtype:
                return f"is of type {BLOB_TYPES.get(code, code)}, and the model says {dtype}"
            if size != -(-bits // 8) or (unused and size * 8 - unused != bits):
                return f"has {size} bytes, and the model says {bits} bits"
            return None

        return self._stored(file_name, offset, fits).data

    def stored(self, file_name: str, offset: int) -> Blob:
        """The blob whose header lies at `offset` in a file, whatever it holds. Raises `InputError` as `blob` does."""
        return self._stored(file_name, offset, lambda code, size, unused: None)

    def _stored(self, file_name: str, offset: int, fault: Callable[[int, int, int], str | None]) -> Blob:
        if not file_name.startswith(_MODEL_PATH):
            raise InputError(
                f"{self.path}: weights are in '{file_name}', which does not start with {_MODEL_PATH}. {_MEND}"
            )
        name = _inside(self.path, f"{self.folder}/{file_name.removeprefix(_MODEL_PATH)}", "the model")
        with _opened(self.path, name) as (file, length):
            where = f"{self.path / name}: the blob at {offset}"
            if offset + HEADER.size > length:
                raise InputError(f"{where} lies outside of the file, which has {length} bytes. {_MEND}")
            file.seek(offset)
            mark, code, size, start, unused = HEADER.unpack(_exactly(file, HEADER.size, where))
            if mark != SENTINEL:
                raise InputError(f"{where} does not start with the mark of a blob. {_MEND}")
            if start + size > length:
                raise InputError(
                    f"{where} has its {size} bytes at {start}, outside of the file of {length} bytes, which was truncated. {_MEND}"
                )
            if found := fault(code, size, unused):
                raise InputError(f"{where} {found}. {_MEND}")
            file.seek(start)
            data = np.empty(size, np.uint8)
            if file.readinto(data) != size:  # type: ignore[attr-defined]
                raise InputError(f"{where} was cut off while it was read. {_MEND}")
            return Blob(code, unused, data)


def _model_file(root: Path) -> str:
    """The path of the model's protobuf in the package, as the manifest gives it."""
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}. Give the folder of a Core ML package, MODEL.mlpackage.")
    if not os.path.lexists(root / MANIFEST_NAME):
        raise InputError(f"{root} is not a Core ML package: it has no {MANIFEST_NAME}.")
    where = root / MANIFEST_NAME
    try:
        manifest = json.loads(_read(root, MANIFEST_NAME, MAX_MANIFEST_BYTES).decode("utf-8"))
        key = manifest["rootModelIdentifier"]
        path = manifest["itemInfoEntries"][key]["path"]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}. {_MEND}") from error
    except (LookupError, TypeError) as error:
        raise InputError(f"{where} does not say where the model is: {type(error).__name__} {error}. {_MEND}") from error
    if not isinstance(path, str):
        raise InputError(f"{where}: the model's path is {path!r}. {_MEND}")
    return _inside(root, f"Data/{path}", MANIFEST_NAME)


def _inside(root: Path, name: str, said_by: str) -> str:
    """`name` if it may be opened in the package, else `InputError`."""
    if fault := path_fault(name):
        raise InputError(
            f"{root}: {said_by} names the file {name!r}, which is not allowed in a package: {fault}. {_MEND}"
        )
    return name


def _read(root: Path, name: str, limit: int) -> bytes:
    with _opened(root, name) as (file, length):
        if length > limit:
            raise InputError(f"{root / name} has {length} bytes; at most {limit} are read. {_MEND}")
        return file.read(length)


@contextmanager
def _opened(root: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a plain file below `root`, with its size; no part of its path may be a link, which could lead out of the package."""
    path = root
    try:
        for part in name.split("/"):
            path = path / part
            if stat.S_ISLNK(os.lstat(path).st_mode):
                raise InputError(
                    f"{path} is a link, which may lead out of the package. Copy it with its files: cp -RL."
                )
        # Without O_NONBLOCK, a pipe would block for ever.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(path, flags)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. {_MEND}") from error
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        os.close(handle)
        raise InputError(f"{path} is not a plain file. {_MEND}")
    with os.fdopen(handle, "rb") as file:
        yield file, about.st_size


def _exactly(file: BinaryIO, size: int, where: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise InputError(f"{where} was cut off while it was read. {_MEND}")
    return data
