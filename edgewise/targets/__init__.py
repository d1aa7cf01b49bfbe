"""Targets: what each can run, how a program is lowered to it, and how its artifacts are run.

A target is one module or folder and one line here. It is imported when it is asked for, and its runtime when
it is used; the session half of a target imports no torch.
"""

from __future__ import annotations

import importlib

from edgewise.errors import unknown
from edgewise.targets.artifacts import choose, joined_labels, load, runnable
from edgewise.targets.base import Requirement, Session, Target, Tolerance

_TARGETS = {
    "coreai": "edgewise.targets.coreai:CoreAI",
    "coreml": "edgewise.targets.coreml:CoreML",
    "coreml-ane": "edgewise.targets.coreml:CoreMLLayout",
    "coreml-ios18": "edgewise.targets.coreml:CoreMLFused",
    "coreml-topk": "edgewise.targets.coreml:CoreMLTopK",
    "onnxruntime": "edgewise.targets.onnxruntime:OnnxRuntime",
    "openvino": "edgewise.targets.openvino:OpenVino",
    "tensorrt": "edgewise.targets.tensorrt:TensorRT",
}


def names() -> tuple[str, ...]:
    """The names of all targets, sorted."""
    return tuple(sorted(_TARGETS))


def get(name: str) -> Target:
    """The target of this name. Raises `InputError` with the nearest name if there is none."""
    if name not in _TARGETS:
        raise unknown("target", name, _TARGETS)
    module, _, attribute = _TARGETS[name].partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target


__all__ = ["Requirement", "Session", "Target", "Tolerance", "choose", "get", "joined_labels", "load", "names", "runnable"]
