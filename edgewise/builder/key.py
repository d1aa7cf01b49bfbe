"""The key of a bundle: all that decides its bytes, known before anything is captured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edgewise import targets
from edgewise.exporter.identity import code_digest, data_digest, model_digest, values_digest
from edgewise.exporter.precisions import parse_precisions
from edgewise.exporter.recipe import Recipe
from edgewise.version import __version__

# What takes part in every export, besides what the targets name.
_TOOLS = ("numpy", "onnx", "onnx-ir", "onnxscript", "pydantic", "pyyaml", "safetensors", "torch", "transformers")


def tools(recipe: Recipe) -> dict[str, str]:
    """Versions of edgewise, Python and the packages that make a bundle, by name. A Python factory may use any package."""
    names = installed() if recipe.model.startswith("py:") else {name: version(name) for name in _TOOLS}
    for target in recipe.targets:
        for precision in parse_precisions(recipe.precision).all:
            names |= targets.get(target).versions(precision=precision)
    python = {"edgewise": __version__, "python": platform.python_version()}
    return dict(sorted({**{k: v for k, v in names.items() if v is not None}, **python}.items()))


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    found = {}
    for folder in reversed(sys.path):
        # Ray and setuptools, once imported, put copies of packages that lie inside of them on the path.
        if {"site-packages", "dist-packages"} & set(Path(os.path.abspath(folder)).parts[:-1]):
            continue
        names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        for name in sorted(names):
            match = re.fullmatch(r"(.+?)-([^-]+)\.(?:dist|egg)-info", name)
            if match:
                found[match[1].lower().replace("_", "-")] = match[2]
    return tuple(sorted(found.items()))


def installed() -> dict[str, str | None]:
    """All installed packages, by the names of their metadata folders: quick, as no metadata is read."""
    return dict(_installed())


class Keys:
    """Makes keys, and reads each model source once."""

    def __init__(self, trust_remote_code: bool = False, weights_only: bool = False) -> None:
        self._flags = {"trust_remote_code": trust_remote_code, "weights_only": weights_only}
        self._models: dict[str, str] = {}
        self._tools: dict[tuple[str, ...], dict[str, str]] = {}

    def parts(self, recipe: Recipe) -> dict[str, Any]:
        """What the key is made of."""
        which = (recipe.model, recipe.input_shapes, recipe.seed) if recipe.model.startswith("py:") else (recipe.model,)
        known = json.dumps(which)
        if known not in self._models:
            shapes, seed = recipe.input_shapes, recipe.seed
            remote = self._flags["trust_remote_code"]
            self._models[known] = model_digest(recipe.model, shapes, seed, trust_remote_code=remote)
        # Reading the versions of installed packages takes longer than all the rest.
        kind = (recipe.model.partition(":")[0] if recipe.model.startswith("py:") else "", recipe.precision, *recipe.targets)
        if kind not in self._tools:
            self._tools[kind] = tools(recipe)
        asked = recipe.model_dump(mode="json")
        return {
            "recipe": asked,
            "model": self._models[known],
            "files": values_digest({k: v for k, v in asked.items() if k != "model"}),
            "data": data_digest(recipe.calibration),
            "tools": self._tools[kind],
            "code": code_digest(),
            "machine": platform.machine(),
            "flags": self._flags,
        }

    def of(self, recipe: Recipe) -> str:
        """SHA-256 of the parts."""
        return hashlib.sha256(json.dumps(self.parts(recipe), sort_keys=True).encode()).hexdigest()

