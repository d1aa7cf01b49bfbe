"""The types that a program declares, and the arrays that stand for its values.

Half precision is held as float32 arrays whose values are halves: they are rounded once, when an op is done (`TensorType.settle`),
and every op between computes in single precision. Integers are held as declared, those of less than a byte as int8 or uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.half import to_half


@dataclass(frozen=True)
class DType:
    """An element type: its name in MIL, the numpy type that stores it, the one that computes with it, and its bits in a file."""

    name: str
    stored: np.dtype[Any]
    held: np.dtype[Any]
    bits: int


def _dtype(name: str, stored: str, bits: int, held: str | None = None) -> DType:
    return DType(name, np.dtype(stored), np.dtype(held or stored), bits)


# By their numbers in the protobuf.
DTYPES = {
    1: _dtype("bool", "?", 8),
    2: _dtype("string", "O", 0),
    10: _dtype("fp16", "<f2", 16, "f4"),
    11: _dtype("fp32", "<f4", 32),
    12: _dtype("fp64", "<f8", 64),
    21: _dtype("int8", "i1", 8),
    22: _dtype("int16", "<i2", 16),
    23: _dtype("int32", "<i4", 32),
    24: _dtype("int64", "<i8", 64),
    25: _dtype("int4", "i1", 4),
    31: _dtype("uint8", "u1", 8),
    32: _dtype("uint16", "<u2", 16),
    33: _dtype("uint32", "<u4", 32),
    34: _dtype("uint64", "<u8", 64),
    35: _dtype("uint4", "u1", 4),
    36: _dtype("uint2", "u1", 2),
    37: _dtype("uint1", "u1", 1),
    38: _dtype("uint6", "u1", 6),
    39: _dtype("uint3", "u1", 3),
}
BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}

MAX_RANK = 32


@dataclass(frozen=True)
class TensorType:
    """A tensor: element type, and shape with None where a size is not known before the program runs."""

    dtype: DType
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"

    @property
    def size(self) -> int:
        """Number of elements; unknown sizes count as one."""
        return math.prod(size for size in self.shape if size is not None)

    @property
    def held_bytes(self) -> int:
        """Bytes of an array that holds it."""
        return self.size * self.dtype.held.itemsize

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape may be such a tensor."""
        return len(shape) == len(self.shape) and all(b in (None, a) for a, b in zip(shape, self.shape, strict=True))

    def settle(self, array: np.ndarray) -> np.ndarray:
        """Make the array that holds a computed result: checked against the type, and rounded or converted as it says.

        Raises `InputError` if the shape differs, or the array is of another class of types: number, whole number, truth, text.
        """
        if not self.fits(array.shape) or _class(array.dtype) != _class(self.dtype.held):
            raise InputError(f"it was computed as {array.dtype}{list(array.shape)}, and is declared as {self}")
        if self.dtype.name == "fp16":
            return to_half(array)
        return array if array.dtype == self.dtype.held else array.astype(self.dtype.held)


@dataclass(frozen=True)
class StateType:
    """A tensor that is kept between calls."""

    tensor: TensorType


@dataclass(frozen=True)
class OtherType:
    """A list, tuple or dictionary: passed on as a Python object, and not checked further."""

    kind: str


Type = TensorType | StateType | OtherType


def _class(dtype: np.dtype[Any]) -> str:
    return "i" if dtype.kind in "iu" else dtype.kind


def read_type(message: Any, where: str) -> Type:
    """Read a protobuf `ValueType`. Raises `InputError` on a type that is not known, or a rank or size that cannot be."""
    if message.HasField("tensorType"):
        return _tensor_type(message.tensorType, where)
    if message.HasField("stateType"):
        inner = message.stateType.wrappedType
        if not inner.HasField("tensorType"):
            raise InputError(f"{where} is a state that holds no tensor")
        return StateType(_tensor_type(inner.tensorType, where))
    for kind in ("list", "tuple", "dictionary"):
        if message.HasField(kind + "Type"):
            return OtherType(kind)
    raise InputError(f"{where} has no type")


def _tensor_type(message: Any, where: str) -> TensorType:
    if message.dataType not in DTYPES:
        raise InputError(f"{where} has elements of type {message.dataType}, which this interpreter does not know")
    if len(message.dimensions) > MAX_RANK:
        raise InputError(f"{where} has {len(message.dimensions)} dimensions; at most {MAX_RANK} are possible")
    shape: list[int | None] = []
    for dimension in message.dimensions:
        if dimension.unknown.variadic:
            raise InputError(
                f"{where} has a rank that is not known before it runs, which this interpreter cannot check"
            )
        shape.append(None if dimension.HasField("unknown") else dimension.constant.size)
    return TensorType(DTYPES[message.dataType], tuple(shape))


Blob = Callable[[str, int, str, int], np.ndarray]


def read_value(message: Any, blob: Blob, where: str) -> Any:
    """Read a protobuf `Value`: an array as it is stored (halves as float16), or a list of texts or numbers.

    `blob(file, offset, dtype, bits)` gives the bytes of a value that lies in a weight file.
    """
    declared = read_type(message.type, where)
    if not isinstance(declared, TensorType):
        return _read_list(message, blob, where)
    if None in declared.shape:
        raise InputError(f"{where} is a constant of the type {declared}, whose shape is not known")
    dtype, size = declared.dtype, declared.size
    if message.HasField("blobFileValue"):
        data = blob(message.blobFileValue.fileName, message.blobFileValue.offset, dtype.name, size * dtype.bits)
        flat = _from_bytes(data, dtype, size, where)
    elif message.HasField("immediateValue") and message.immediateValue.HasField("tensor"):
        flat = _immediate(message.immediateValue.tensor, dtype, size, where)
    else:
        raise InputError(f"{where} is a constant without a value")
    if flat.size != size:
        raise InputError(f"{where} is a constant of {flat.size} elements, declared as {declared}")
    return flat.reshape([size or 0 for size in declared.shape])


def _read_list(message: Any, blob: Blob, where: str) -> list[Any]:
    if not message.HasField("immediateValue") or not message.immediateValue.HasField("list"):
        raise InputError(f"{where} is a constant that is neither a tensor nor a list")
    items = [read_value(item, blob, where) for item in message.immediateValue.list.values]
    return [item.item() if isinstance(item, np.ndarray) and item.ndim == 0 else item for item in items]


def _immediate(tensor: Any, dtype: DType, size: int, where: str) -> np.ndarray:
    """The elements of a `TensorValue`, flat."""
    if tensor.HasField("bytes"):
        return _from_bytes(np.frombuffer(tensor.bytes.values, np.uint8), dtype, size, where)
    for field in ("floats", "ints", "bools", "strings", "longInts", "doubles"):
        if tensor.HasField(field):
            values = np.array(getattr(tensor, field).values, dtype=None if field != "strings" else object)
            if values.size and _class(values.dtype) != _class(dtype.stored):
                raise InputError(f"{where} is a constant of {field}, declared as {dtype.name}")
            return values.astype(dtype.stored)
    if size:
        raise InputError(f"{where} is a constant without a value")
    return np.empty(0, dtype.stored)


def _from_bytes(data: np.ndarray, dtype: DType, size: int, where: str) -> np.ndarray:
    if data.size != -(-size * dtype.bits // 8) or dtype.name == "string":
        raise InputError(f"{where} is a constant of {data.size} bytes, declared as {size} elements of {dtype.name}")
    if dtype.name == "bool":
        return data != 0
    if dtype.bits >= 8:
        return data.view(dtype.stored)
    return unpacked(data, dtype.bits, dtype.name == "int4")[:size]


def unpacked(data: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Elements of less than a byte each, the first in the lowest bits."""
    group = 3 if 8 % bits else 1  # bytes after which elements and bytes end together
    padded = np.zeros(-(-data.size // group) * group, np.uint8)
    padded[: data.size] = data
    words = sum(padded[i::group].astype(np.uint32) << (8 * i) for i in range(group))
    shifts = np.arange(0, 8 * group, bits, dtype=np.uint32)
    elements = ((np.asarray(words)[:, None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8).reshape(-1)
    if not signed:
        return elements
    return ((elements ^ (1 << (bits - 1))).astype(np.int8) - (1 << (bits - 1))).astype(np.int8)


def held(value: Any) -> Any:
    """The array that stands for a stored one: halves become float32, everything else is as it is."""
    if isinstance(value, np.ndarray) and value.dtype == np.float16:
        return value.astype(np.float32)
    return value
