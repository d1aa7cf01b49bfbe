"""The ops of a Core ML package."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgewise.errors import InputError


def ops(path: Path) -> dict[str, int] | None:
    """How many operations of each type a package's program has, bodies of loops included, constants left out.

    None where protobuf is absent, or the package holds no program. Raises InputError if it cannot be read.
    """
    try:
        from edgewise.targets.coreml.package import Package
    except ModuleNotFoundError:
        return None
    root = next((folder for folder in (path, *path.parents) if folder.suffix == ".mlpackage"), None)
    if root is None:
        raise InputError(f"{path} is in no .mlpackage")
    found: Counter[str] = Counter()
    functions = Package.open(root).model.mlProgram.functions
    pending: list[Any] = [block for function in functions.values() for block in function.block_specializations.values()]
    while pending:
        for operation in pending.pop().operations:
            if operation.type != "const":
                found[operation.type] += 1
            pending += operation.blocks
    return dict(sorted(found.items())) or None
