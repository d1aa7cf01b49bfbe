"""The ops of an ONNX file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgewise.errors import InputError


def ops(path: Path) -> dict[str, int] | None:
    """How many nodes of each op an ONNX file has, bodies of loops and functions included. None where the package `onnx` is absent.

    Raises InputError if the file cannot be read.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        return None
    if path.suffix != ".onnx":  # an engine, which its runtime alone can read
        return None
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's, which differ between its versions
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    found: Counter[str] = Counter()
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        for node in pending.pop().node:
            found[node.op_type if not node.domain else f"{node.domain}::{node.op_type}"] += 1
            for attribute in node.attribute:
                pending += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return dict(sorted(found.items()))
