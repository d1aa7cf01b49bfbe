"""Write an ONNX model to a file without holding its serialised form in memory.

Protobuf's own serialiser copies every weight twice (ViT-B/16: 3 s and 700 MB). A message is a plain sequence
of fields, so the model is serialised without its weights and they are written after it, one by one. The
result is an ordinary ONNX file. Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx

_LENGTH_DELIMITED = 2
_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_EXTERNAL_FROM = 1024
_PAGE = 4096


def write_model(file: BinaryIO, model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> None:
    """Write `model`, which has no initialisers, with `weights` in their order."""
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    outer = onnx.ModelProto()
    outer.CopyFrom(model)
    outer.ClearField("graph")

    body = graph.SerializeToString(deterministic=True)
    heads = [(_tensor_head(name, array), array) for name, array in weights.items()]
    length = len(body)
    for head, array in heads:
        size = len(head) + array.nbytes
        length += len(_prefix(_INITIALIZER, size)) + size

    file.write(outer.SerializeToString(deterministic=True))
    file.write(_prefix(_GRAPH, length))
    file.write(body)
    for head, array in heads:
        file.write(_prefix(_INITIALIZER, len(head) + array.nbytes))
        file.write(head)
        file.write(_buffer(array))


def write_external(path: Path, data: Path, model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> None:
    """Write `model` to `path` and the weights to `data` beside it; small weights stay in the model.

    The runtime maps the second file, so that each weight begins at a page.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    with open(data, "wb") as file:
        for name, array in weights.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=kind)
            if array.nbytes < _EXTERNAL_FROM:
                tensor.raw_data = _buffer(array).tobytes()
            else:
                file.write(bytes(-file.tell() % _PAGE))
                entries = {"location": data.name, "offset": str(file.tell()), "length": str(array.nbytes)}
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in entries.items():
                    tensor.external_data.add(key=key, value=value)
                file.write(_buffer(array))
            whole.graph.initializer.append(tensor)
    path.write_bytes(whole.SerializeToString(deterministic=True))


def _buffer(array: np.ndarray) -> memoryview:
    """The bytes of an array as ONNX stores them: row-major, little-endian."""
    plain = np.ascontiguousarray(array)
    if sys.byteorder == "big":
        plain = plain.byteswap()
    return plain.reshape(-1).view(np.uint8).data


def _tensor_head(name: str, array: np.ndarray) -> bytes:
    """A serialised TensorProto up to its raw data, which follows."""
    tensor = onnx.TensorProto(
        name=name, dims=array.shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    )
    head: bytes = tensor.SerializeToString(deterministic=True)
    return head + _prefix(_RAW_DATA, array.nbytes)


def _prefix(field: int, length: int) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
