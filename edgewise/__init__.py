"""edgewise: put multimodal models on edge devices, with fewer tokens.

    program = edgewise.capture(module, (x,))
    program = edgewise.compress(program, "tome:keep=0.5")
    bundle = edgewise.export(module, "build/model", example=(x,), targets=["openvino"], compress="tome:keep=0.5")
    session = edgewise.load(bundle)
    outputs = session.run({"x": array})

Importing the package imports no torch: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgewise.errors import extras_named
from edgewise.version import __version__

if TYPE_CHECKING:
    from edgewise.bundle import Bundle
    from edgewise.errors import CheckFailed, EdgewiseError, InputError, MissingExtra, Refused
    from edgewise.exporter.capture import capture
    from edgewise.exporter.export import export
    from edgewise.passes.program import Program, compress
    from edgewise.runtime import load
    from edgewise.targets import Session

_LAZY = {
    "Bundle": "edgewise.bundle",
    "CheckFailed": "edgewise.errors",
    "EdgewiseError": "edgewise.errors",
    "InputError": "edgewise.errors",
    "MissingExtra": "edgewise.errors",
    "Program": "edgewise.passes.program",
    "Refused": "edgewise.errors",
    "Session": "edgewise.targets",
    "capture": "edgewise.exporter.capture",
    "compress": "edgewise.passes.program",
    "export": "edgewise.exporter.export",
    "load": "edgewise.runtime",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgewise' has no attribute {name!r}")
    with extras_named():
        return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
