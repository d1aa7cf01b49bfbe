"""Small bundles for tests: without torch by hand, and with it from a tiny exported module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from edgewise.bundle import Artifact, Bundle, Component, Manifest, ModelInfo, Site, TensorInfo, write_bundle

ROLE = "vision_encoder"


def component(**changes: Any) -> Component:
    values: dict[str, Any] = {
        "role": ROLE,
        "inputs": (TensorInfo(name="x", shape=(1, 2), dtype="float32", meaning="pixels"),),
        "outputs": (TensorInfo(name="y", shape=(1, 2), dtype="float32"),),
        "sites": (Site(name="encoder.block[0]", method="tome", tokens_in=17, tokens_out=9),),
        "flops_before": 100,
        "flops_after": 60,
    }
    return Component(**{**values, **changes})


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "edgewise_version": "0.1.0",
        "model": ModelInfo(source="demo:tiny", class_name="Tiny", parameters=12, weights_digest="0" * 64),
        "compress": ("tome:r=8",),
        "components": (component(),),
        "golden": {ROLE: f"golden/{ROLE}.safetensors"},
        "preprocessing": {"mean": [0.5, 0.5], "size": 8},
    }
    return Manifest(**{**values, **changes})


def build(fill: bytes = b"weights", **changes: Any) -> Callable[[Path], Manifest]:
    """A build with a golden file, a recipe and one artifact that no runtime can load."""

    def run(folder: Path) -> Manifest:
        (folder / "golden").mkdir()
        x = np.arange(6, dtype=np.float32).reshape(3, 1, 2)
        save_file(
            {"input.x": x, "output.y": x * 2, "reference.y": x * 3}, folder / f"golden/{ROLE}.safetensors"
        )
        (folder / "recipe.yaml").write_text("model: demo:tiny\n")
        (folder / "openvino").mkdir()
        (folder / f"openvino/{ROLE}.bin").write_bytes(fill)
        artifact = Artifact(target="openvino", role=ROLE, precision="fp32", files=(f"openvino/{ROLE}.bin",))
        return manifest(**{"targets": (artifact,), **changes})

    return run


def make(out: Path, fill: bytes = b"weights") -> Bundle:
    return write_bundle(out, build(fill))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a bundle as an attacker would."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def list_file(bundle: Path, name: str) -> None:
    """Give the file `name` of a bundle a true digest in the manifest."""
    data = (bundle / name).read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit(bundle, lambda document: document["files"].update({name: entry}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
